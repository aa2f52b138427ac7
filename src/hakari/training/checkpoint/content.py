"""One number for the content of a logical tensor, the same however it is cut into parts.

    content = sum over elements of bits(x_ij...) a(i) b(j) ...   modulo 2^64

with fixed pseudo-random odd factors for each index of each dimension. A sum needs no order, so
every process adds up its own box, and the boxes' sums add up to the tensor's. A change of one
element always changes the sum, since odd factors have inverses; any other change is missed with
a chance of 2^-32 at worst, where only the highest bits of elements differ, and of 2^-64 typically
(multilinear hashing). It is against accidents, not against an adversary.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hakari.training.checkpoint.boxes import Box

INNER = 2**14
BLOCK = 2**15
MASK = 2**64 - 1


def content(values: np.ndarray, box: Box) -> int:
    """The sum over a box of a tensor; `values` are its bits, as unsigned integers.

    Not necessarily contiguous. The sums of boxes that tile a tensor add up, modulo 2^64, to that
    of the tensor. Derived here; multilinear hashing is Carter and Wegman's (1979).
    """
    if not values.size:
        return 0
    halves = values.dtype.itemsize == 8  # the top bits of two whole words would cancel
    (start, stop), outer = (box[-1], box[:-1]) if box else ((0, 1), ())
    rows = values.reshape(-1, stop - start)
    if halves:
        start, stop = 2 * start, 2 * stop
    sums = np.zeros(len(rows), np.uint64)
    for first in range(0, len(rows), max(1, BLOCK // max(1, stop - start))):
        part = rows[first : first + max(1, BLOCK // max(1, stop - start))]
        if halves:
            part = np.ascontiguousarray(part).view(np.uint32)
        sums[first : first + len(part)] = _along_rows(part, start, stop)
    weights = np.ones((), np.uint64)
    for d, (low, high) in enumerate(outer):
        weights = np.multiply.outer(weights, _factors(len(outer) - d, low, high))
    return int(np.dot(sums, weights.reshape(-1))) & MASK


def hexadecimal(total: int) -> str:
    """A content as it is written in a manifest."""
    return f"{total & MASK:016x}"


def _along_rows(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Weighted sum of each row, whose columns have the indices start .. stop - 1."""
    total = np.zeros(len(rows), np.uint64)
    column = start
    while column < stop:
        end = min(stop, (column // INNER + 1) * INNER)
        wide = rows[:, column - start : end - start].astype(np.uint64)
        near = _factors(0, 0, INNER)[column % INNER : column % INNER + end - column]
        total += (wide @ near) * _factors(-1, column // INNER, column // INNER + 1)[0]
        column = end
    return total


@lru_cache(maxsize=256)
def _factors(dimension: int, start: int, stop: int) -> np.ndarray:
    """Odd numbers for the indices start .. stop - 1 of a dimension (splitmix64)."""
    z = np.arange(start, stop, dtype=np.uint64)
    z += np.uint64((dimension + 2) << 48)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    z.flags.writeable = False
    return z
