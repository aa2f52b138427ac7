"""Boxes: half-open intervals, one for each dimension of a logical tensor.

Every part of a tensor that a process may hold is a box or, for a range of the flattened tensor,
a few boxes in row-major order. The rest is intersection. (universal-checkpoints.md B3)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod

import numpy as np

Box = tuple[tuple[int, int], ...]
"""(start, stop) for each dimension; () is the one element of a scalar."""


def whole(shape: Iterable[int]) -> Box:
    """The box of all of a tensor."""
    return tuple([(0, n) for n in shape])


def extents(box: Box) -> tuple[int, ...]:
    """Shape of what a box holds."""
    return tuple([stop - start for start, stop in box])


def volume(box: Box) -> int:
    """Elements in a box."""
    return prod([stop - start for start, stop in box])


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None if that is empty."""
    both = tuple((max(i, k), min(j, n)) for (i, j), (k, n) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def within(box: Box, origin: Box) -> tuple[slice, ...]:
    """Slices that take `box` out of an array that holds `origin`."""
    return tuple(slice(i - k, j - k) for (i, j), (k, _) in zip(box, origin, strict=True))


def moved(box: Box, origin: Box) -> Box:
    """The place of a box that was given relative to the start of `origin`."""
    return tuple((i + k, j + k) for (i, j), (k, _) in zip(box, origin, strict=True))


def flat_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Boxes that together, in order, are elements start .. stop - 1 of the flattened tensor.

    At most 2 d - 1 of them for d dimensions.
    """
    if start >= stop:
        return []
    if not shape:
        return [()]
    inner = prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if len(shape) == 1:
        return [((start, stop),)]
    if first == last:
        return _in_row(shape, first, start - first * inner, stop - first * inner)
    rows = (first, last + 1)
    head: list[Box] = []
    tail: list[Box] = []
    if start > first * inner:
        head, rows = _in_row(shape, first, start - first * inner, inner), (first + 1, rows[1])
    if stop < (last + 1) * inner:
        tail, rows = _in_row(shape, last, 0, stop - last * inner), (rows[0], last)
    middle: list[Box] = [(rows, *whole(shape[1:]))] if rows[0] < rows[1] else []
    return head + middle + tail


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [((row, row + 1), *box) for box in flat_range(shape[1:], start, stop)]


def flaw(shape: Sequence[int], boxes: Iterable[Box]) -> str:
    """What keeps boxes from tiling a tensor exactly: a gap, an overlap, a box outside; or ''."""
    shape, boxes = tuple(shape), tuple(boxes)
    if len(boxes) == 1 and boxes[0] == whole(shape):
        return ""
    return _flaw(shape, tuple(box for box in boxes if volume(box)))


@lru_cache(maxsize=64)  # a model has few shapes, and a thousand processes make long tables
def _flaw(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> str:
    everything = whole(shape)
    for box in boxes:
        if len(box) != len(shape) or intersect(box, everything) != box:
            return f"{show(box)} lies outside {[*shape]}"
    clash = _overlap(boxes)
    if clash:
        return f"{show(clash[0])} and {show(clash[1])} overlap"
    if sum(map(volume, boxes)) == prod(shape):
        return ""
    return f"nothing holds {show(_gap(everything, boxes))}"


def _overlap(boxes: tuple[Box, ...]) -> tuple[Box, Box] | None:
    """Two boxes that share an element. Only boxes that meet in the first dimension are compared."""
    if len(boxes) < 2:
        return None
    if not boxes[0]:
        return boxes[0], boxes[1]
    ordered = sorted(boxes)
    if all(a[0][1] <= b[0][0] for a, b in pairwise(ordered)):
        return None
    edges = np.array(ordered, dtype=np.int64)
    starts, stops = edges[:, :, 0], edges[:, :, 1]
    for i in range(len(ordered) - 1):
        last = int(np.searchsorted(starts[:, 0], stops[i, 0]))
        rest = slice(i + 1, last)
        met = (starts[rest] < stops[i]).all(1) & (starts[i] < stops[rest]).all(1)
        if met.any():
            return ordered[i], ordered[i + 1 + int(met.argmax())]
    return None


def _gap(everything: Box, boxes: tuple[Box, ...]) -> Box:
    left = [everything]
    for box in boxes:
        left = [part for piece in left for part in _minus(piece, box)]
    return left[0]


def _minus(piece: Box, box: Box) -> list[Box]:
    shared = intersect(piece, box)
    if shared is None:
        return [piece]
    parts, rest = [], list(piece)
    for d, ((i, j), (k, n)) in enumerate(zip(piece, shared, strict=True)):
        for edge in ((i, k), (n, j)):
            if edge[0] < edge[1]:
                parts.append((*rest[:d], edge, *rest[d + 1 :]))
        rest[d] = (k, n)
    return parts


def show(box: Box) -> str:
    """A box as people write it: [0:3, 4:8]."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
