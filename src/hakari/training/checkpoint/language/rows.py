"""Index maps along one dimension: how slices that processes hold make up whole tensors.

Shards of any widths, fused and grouped blocks, permutations, padding, stacked layers and experts
are all the same: each row of a tensor is a row of one of several pieces. The map is an array, so
its proof is counting, its inverse is sorting, and reading a box is following it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from hakari.training.checkpoint.boxes import Box, extents, within
from hakari.training.checkpoint.tensors import as_bits, as_tensor

Coordinate = tuple[int, int, int]
"""Ranks of tensor, pipeline and expert parallelism."""
Split = str | tuple[int, ...]
Order = str | tuple[int, ...]
SPLITS, ORDERS = ("even", "balanced", "chunk", "heads"), ("", "pairs", "halves")
NEAR, STAGING = 2**16, 2**24
"""Runs of 64 KiB are read in place; shorter ones through a buffer of up to 16 MiB."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Where each row comes from: which piece (-1: none, it is zero), and which row of it."""

    piece: np.ndarray
    row: np.ndarray


def single(piece: int) -> Rows:
    """The one element of a scalar, of that piece."""
    return Rows(np.full(1, piece), np.zeros(1, np.int64))


@dataclass(frozen=True)
class Cut:
    """A block of `rows` rows of target `target`; `unit` rows stay together when it is split.

    split: 'even', 'balanced' ([3, 3, 2, 2] of 10), 'chunk' (torch.chunk's [3, 3, 3, 1]), 'heads'
    (even, or each unit on several ranks), or units of each rank. order: '' as in the target;
    'pairs': each unit of a slice has rotary pairs side by side, of the target in two halves;
    'halves': the other way round; or the target's row for each row of the block.
    """

    rows: int
    target: int = 0
    unit: int = 1
    split: Split = "even"
    order: Order = ""


@dataclass(frozen=True)
class Layout:
    """How `ranks` slices hold blocks, one after another or, with `groups`, in so many rounds.

    padded: rows of all slices together, where they hold more than the target; 0: just as many.
    """

    cuts: tuple[Cut, ...]
    ranks: int = 1
    groups: int = 0
    padded: int = 0


@dataclass(frozen=True)
class Piece:
    """A tensor somewhere, at fixed indices of its leading dimensions."""

    where: Coordinate
    name: str
    at: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class View:
    """A tensor made of the rows of pieces, along dimension `dim`."""

    pieces: tuple[Piece, ...]
    rows: Rows
    dim: int


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor that one or several views, copies of one another, give.

    how: 'bitwise' (all are read and must be equal), 'first', or 'average' (of numbers that differ
    by `limit` at most, relative to the larger).
    """

    views: tuple[View, ...]
    how: str = "bitwise"
    limit: float = 0.0


Fetch = Callable[[Piece, Box, np.ndarray], None]


# --- maps ---------------------------------------------------------------------------------


def shares(units: int, ranks: int, split: Split) -> list[tuple[int, int]]:
    """Half-open range of units on each rank. Raises ValueError if `split` does not fit them."""
    if isinstance(split, tuple):
        if len(split) != ranks or sum(split) != units or min(split) < 0:
            raise ValueError(f"split = {[*split]} is not {units} units over {ranks} ranks")
        widths = [*split]
    elif split == "balanced":
        widths = [units // ranks + (rank < units % ranks) for rank in range(ranks)]
    elif split == "chunk":
        step = -(-units // ranks)
        widths = [max(0, min(step, units - rank * step)) for rank in range(ranks)]
    elif split == "heads" and units and not ranks % units:
        return [(rank * units // ranks, rank * units // ranks + 1) for rank in range(ranks)]
    elif units % ranks:
        raise ValueError(
            f"{units} units do not divide over {ranks} ranks (split = {split!r}): use 'balanced' "
            "or 'chunk', or list the widths"
        )
    else:
        widths = [units // ranks] * ranks
    stops = np.cumsum(widths).tolist()
    return [(stop - width, stop) for width, stop in zip(widths, stops, strict=True)]


@lru_cache(maxsize=1024)
def slice_rows(layout: Layout) -> tuple[Rows, ...]:
    """For each rank's slice: the target and the row of it that each of its rows is."""
    offsets: list[int] = []
    sizes = [0] * (1 + max(cut.target for cut in layout.cuts))
    for cut in layout.cuts:
        offsets.append(sizes[cut.target])
        sizes[cut.target] += cut.rows
    blocks = [
        np.stack([np.full(cut.rows, cut.target), offset + _order(cut)])
        for cut, offset in zip(layout.cuts, offsets, strict=True)
    ]
    if layout.padded:
        return _padded(layout, blocks)
    if layout.groups:
        return _grouped(layout, blocks)
    made = []
    ranges = [shares(_units(cut), layout.ranks, cut.split) for cut in layout.cuts]
    for rank in range(layout.ranks):
        spans = [
            (own[rank][0] * c.unit, own[rank][1] * c.unit)
            for own, c in zip(ranges, layout.cuts, strict=True)
        ]
        made.append(
            np.concatenate([block[:, a:b] for block, (a, b) in zip(blocks, spans, strict=True)], 1)
        )
    return tuple(Rows(pair[0], pair[1]) for pair in made)


@lru_cache(maxsize=1024)
def gathered(layout: Layout, ranks: tuple[int, ...]) -> tuple[tuple[Rows, ...], ...]:
    """For each target: where its rows are in the slices of `ranks`, once for each copy there is.

    Raises ValueError for rows that no slice holds.
    """
    maps = [slice_rows(layout)[rank] for rank in ranks]
    piece = np.concatenate([np.full(len(m.row), i) for i, m in enumerate(maps)])
    row = np.concatenate([np.arange(len(m.row)) for m in maps])
    target, place = (np.concatenate([getattr(m, x) for m in maps]) for x in ("piece", "row"))
    sizes = [0] * (1 + max(cut.target for cut in layout.cuts))
    for cut in layout.cuts:
        sizes[cut.target] += cut.rows
    return tuple(
        _copies(piece[target == t], row[target == t], place[target == t], size)
        for t, size in enumerate(sizes)
    )


def _copies(piece: np.ndarray, row: np.ndarray, place: np.ndarray, size: int) -> tuple[Rows, ...]:
    counts = np.bincount(place, minlength=size)
    if size and not counts.min():
        gap = int(counts.argmin())
        stop = gap + int(np.append(np.flatnonzero(counts[gap:]), size - gap)[0])
        raise ValueError(f"no slice holds rows {gap}:{stop} of {size}")
    order = np.argsort(place, kind="stable")
    first = np.cumsum(counts) - counts
    picks = [order[first + np.where(counts > k, k, 0)] for k in range(max(counts, default=1))]
    return tuple(Rows(piece[pick], row[pick]) for pick in picks)


def _units(cut: Cut) -> int:
    if cut.unit < 1 or cut.rows % cut.unit:
        raise ValueError(f"{cut.rows} rows are not a multiple of unit = {cut.unit}")
    return cut.rows // cut.unit


def _order(cut: Cut) -> np.ndarray:
    """The row within the block's target that each row of the block, as slices have it, is."""
    if isinstance(cut.order, tuple):
        if sorted(cut.order) != [*range(cut.rows)]:
            raise ValueError(f"order is not a permutation of the block's {cut.rows} rows")
        return np.array(cut.order, np.int64)
    rows = np.arange(cut.rows)
    if not cut.order:
        return rows
    if cut.unit % 2:
        raise ValueError(f"order = {cut.order!r} needs an even unit, not {cut.unit}")
    heads = rows.reshape(_units(cut), 2, cut.unit // 2)
    if cut.order == "pairs":
        return heads.swapaxes(1, 2).reshape(-1)
    return rows.reshape(_units(cut), cut.unit // 2, 2).swapaxes(1, 2).reshape(-1)


def _grouped(layout: Layout, blocks: Sequence[np.ndarray]) -> tuple[Rows, ...]:
    for cut in layout.cuts:
        if cut.rows % layout.groups:
            raise ValueError(f"{cut.rows} rows do not divide into groups = {layout.groups}")
    rounds = np.concatenate([block.reshape(2, layout.groups, -1) for block in blocks], 2)
    parts = [
        rounds[:, a:b].reshape(2, -1)
        for a, b in shares(layout.groups, layout.ranks, layout.cuts[0].split)
    ]
    return tuple(Rows(part[0], part[1]) for part in parts)


def _padded(layout: Layout, blocks: Sequence[np.ndarray]) -> tuple[Rows, ...]:
    if len(blocks) != 1 or layout.groups:
        raise ValueError("pad is for one block without groups")
    (block,) = blocks
    extra = layout.padded - block.shape[1]
    if extra < 0:
        raise ValueError(f"{layout.padded} padded rows are fewer than {block.shape[1]}")
    block = np.concatenate([block, np.stack([np.full(extra, -1), np.arange(extra)])], 1)
    parts = [block[:, a:b] for a, b in shares(layout.padded, layout.ranks, layout.cuts[0].split)]
    return tuple(Rows(part[0], part[1]) for part in parts)


# --- reading ------------------------------------------------------------------------------


def read_part(part: Part, fetch: Fetch, box: Box, out: np.ndarray, state: str, dtype: str) -> None:
    """Fill `out` with a box of a part; fetch(piece, box, out) reads a piece.

    Memory: a few buffers of 16 MiB. Raises ValueError naming ranks whose copies differ.
    """
    if part.how == "average" and len(part.views) > 1:
        for chunk in chunks(box, STAGING // 8):
            out[within(chunk, box)] = _average(part, fetch, chunk, out.dtype, state, dtype)
        return
    fill(part.views[0], fetch, box, out)
    if part.how == "first":
        return
    for view in part.views[1:]:
        for chunk in chunks(box, STAGING // out.itemsize):
            copy = np.empty(extents(chunk), out.dtype)
            fill(view, fetch, chunk, copy)
            own = out[within(chunk, box)]
            if not np.array_equal(own, copy):
                raise ValueError(
                    f"copies of {state} differ: "
                    + _difference(part.views[0], view, chunk, own, copy)
                )


def fill(view: View, fetch: Fetch, box: Box, out: np.ndarray) -> None:
    """Fill `out` with a box of a view."""
    if not out.size:
        return
    if not box:
        fetch(view.pieces[int(view.rows.piece[0])], box, out)
        return
    start, stop = box[view.dim]
    piece, row = view.rows.piece[start:stop], view.rows.row[start:stop]
    width = out.nbytes // (stop - start)
    jumps = (np.diff(piece) != 0) | (np.diff(row) != 1)
    edges = np.concatenate([[0], np.flatnonzero(jumps) + 1, [len(row)]])
    direct = (np.diff(edges) * width >= NEAR) | (piece[edges[:-1]] < 0) | (len(edges) == 2)
    lines = np.moveaxis(out, view.dim, 0)
    for i in np.flatnonzero(direct):
        first, last = int(edges[i]), int(edges[i + 1])
        if piece[first] < 0:
            lines[first:last] = 0
            continue
        wanted = _along(box, view.dim, int(row[first]), int(row[last - 1]) + 1)
        fetch(view.pieces[piece[first]], wanted, np.moveaxis(lines[first:last], 0, view.dim))
    for chosen in _near(np.flatnonzero(~np.repeat(direct, np.diff(edges))), piece, row, width):
        low, high = int(row[chosen[0]]), int(row[chosen[-1]]) + 1
        wanted = _along(box, view.dim, low, high)
        staging = np.empty(extents(wanted), out.dtype)
        fetch(view.pieces[piece[chosen[0]]], wanted, staging)
        lines[chosen] = np.moveaxis(staging, view.dim, 0)[row[chosen] - low]


def chunks(box: Box, elements: int) -> Iterator[Box]:
    """Boxes of at most so many elements (one, at least) that tile a box in row-major order."""
    if not box:
        yield box
        return
    (start, stop), inner = box[0], prod(extents(box[1:]))
    if inner > elements:
        for row in range(start, stop):
            for rest in chunks(box[1:], elements):
                yield ((row, row + 1), *rest)
        return
    step = max(1, elements // max(1, inner))
    for row in range(start, stop, step):
        yield ((row, min(stop, row + step)), *box[1:])


def _near(
    chosen: np.ndarray, piece: np.ndarray, row: np.ndarray, width: int
) -> Iterator[np.ndarray]:
    """Rows in batches that are close to one another in one piece."""
    chosen = chosen[np.lexsort((row[chosen], piece[chosen]))]
    if not len(chosen):
        return
    far = (np.diff(piece[chosen]) != 0) | (np.diff(row[chosen]) * width > NEAR)
    for run in np.split(chosen, np.flatnonzero(far) + 1):
        bucket = (row[run] - row[run[0]]) * width // STAGING
        yield from np.split(run, np.flatnonzero(np.diff(bucket)) + 1)


def _along(box: Box, dim: int, start: int, stop: int) -> Box:
    return (*box[:dim], (start, stop), *box[dim + 1 :])


def _average(
    part: Part, fetch: Fetch, box: Box, bits: np.dtype, state: str, dtype: str
) -> np.ndarray:
    own, copy = np.empty(extents(box), bits), np.empty(extents(box), bits)
    fill(part.views[0], fetch, box, own)
    first = as_tensor(own, dtype)
    if not first.is_floating_point():
        names = _names(part.views[0], box)
        raise ValueError(f"{state} of {names} is {dtype}: only floats are averaged")
    total, low, high, same = first.double(), first.double(), first.double(), True
    for view in part.views[1:]:
        fill(view, fetch, box, copy)
        same &= np.array_equal(own, copy)
        value = as_tensor(copy, dtype).double()
        total, low, high = total + value, low.minimum(value), high.maximum(value)
    if same:
        return own
    gap = (high - low) / low.abs().maximum(high.abs()).clamp(min=np.finfo(np.float64).tiny)
    if not bool((gap <= part.limit).all()):
        names = ", ".join(_names(view, box) for view in part.views)
        most = float(gap.nan_to_num(nan=float("inf")).max())
        raise ValueError(
            f"{state} of {names} differ by {most:.3g} relative to the larger, over max_rel_diff = "
            f"{part.limit:g}"
        )
    return as_bits((total / len(part.views)).to(first.dtype))


def _difference(a: View, b: View, box: Box, own: np.ndarray, copy: np.ndarray) -> str:
    where = np.argwhere(own != copy)
    index = tuple(int(i) + start for i, (start, _) in zip(where[0], box, strict=True))
    spot = tuple((i, i + 1) for i in index)
    return (
        f"{_names(a, spot)} and {_names(b, spot)}, in {len(where)} of {own.size} "
        f"elements, the first at {[*index]}: declare them 'average', or check = 'first'"
    )


def _names(view: View, box: Box) -> str:
    start, stop = box[view.dim] if box else (0, 1)
    return ", ".join(show(view.pieces[i]) for i in np.unique(view.rows.piece[start:stop]) if i >= 0)


def show(piece: Piece) -> str:
    """A piece as people write it: attention.weight[3] on tp 1 pp 0 ep 0."""
    at = f"[{', '.join(map(str, piece.at))}]" if piece.at else ""
    return f"{piece.name}{at} on {place(piece.where)}"


def place(where: Coordinate) -> str:
    """A coordinate as people write it."""
    return " ".join(f"{axis} {rank}" for axis, rank in zip(("tp", "pp", "ep"), where, strict=True))
