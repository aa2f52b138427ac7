"""Which process writes what, where several hold the same box: each a share, none twice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

from hakari.training.checkpoint.boxes import Box, extents, flaw, volume
from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.source import WEIGHT, Info, Key

SPLIT = 2**20
"""A box of at least 1 MiB is shared out by rows; a smaller one goes to whoever has least."""

Held = tuple[Key, Info, Box]
"""A piece without its values."""


def assign(
    held: Sequence[Sequence[Held]], share: bool = True, first: Collection[str] = ()
) -> list[list[tuple[int, Box]]]:
    """For each rank, what it writes: (which of its pieces, box). held: the pieces of each rank.
    share: let all holders of a box write a part of it; else its first holder writes it. first:
    names whose values are the first holder's in any case.

    The boxes tile each tensor exactly. Raises ValueError, naming tensor and ranks, where ranks
    differ in shape or type, or where their pieces leave a gap or overlap in part.
    """
    infos, holders = _gather(held)
    for key, boxes in holders.items():
        found = flaw(infos[key].shape, boxes)
        if found:
            raise ValueError(
                f"{key[0]} ({key[1]}) {[*infos[key].shape]}: {found}; the pieces of all processes "
                "must tile it exactly"
            )
    load = [0] * len(held)
    shares: list[list[tuple[int, Box]]] = [[] for _ in held]
    ordered = [
        (len(ranks), key, box, ranks)
        for key, boxes in holders.items()
        for box, ranks in boxes.items()
    ]
    for copies, key, box, ranks in sorted(ordered, key=lambda entry: entry[:3]):
        width = BYTES[infos[key].dtype]
        shared = copies > 1 and share and not (key[0] in first and key[1] == WEIGHT)
        for rank, part in _parts(box, [*ranks] if shared else None, load, width):
            rank = next(iter(ranks)) if rank < 0 else rank
            shares[rank].append((ranks[rank], part))
            load[rank] += volume(part) * width
    return shares


def _gather(
    held: Sequence[Sequence[Held]],
) -> tuple[dict[Key, Info], dict[Key, dict[Box, dict[int, int]]]]:
    """What each key is, and who holds which box of it (rank: index of its piece)."""
    infos: dict[Key, tuple[Info, int]] = {}
    holders: dict[Key, dict[Box, dict[int, int]]] = {}
    for rank, pieces in enumerate(held):
        for index, (key, info, box) in enumerate(pieces):
            known, first = infos.setdefault(key, (info, rank))
            if known is not info and known != info:
                raise ValueError(
                    f"{key[0]} ({key[1]}) is {known.dtype} {[*known.shape]} on rank {first} and "
                    f"{info.dtype} {[*info.shape]} on rank {rank}"
                )
            boxes = holders.setdefault(key, {})
            if 0 not in extents(box):
                boxes.setdefault(box, {})[rank] = index
    return {key: info for key, (info, _) in infos.items()}, holders


def _parts(
    box: Box, ranks: Sequence[int] | None, load: Sequence[int], width: int
) -> list[tuple[int, Box]]:
    if ranks is None:
        return [(-1, box)]
    rows = extents(box)[0] if box else 1
    if prod(extents(box)) * width < SPLIT or rows < len(ranks):
        return [(min(ranks, key=lambda rank: (load[rank], rank)), box)]
    start = box[0][0]
    edges = [start + rows * i // len(ranks) for i in range(len(ranks) + 1)]
    return [
        (rank, ((low, high), *box[1:]))
        for rank, low, high in zip(ranks, edges[:-1], edges[1:], strict=True)
    ]
