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
from itertools import pairwise

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
    if not outer and not halves and start // INNER == (stop - 1) // INNER:  # a small vector
        return int(_in_block(values.reshape(-1), start, stop)[0])
    rows = values.reshape(-1, stop - start)
    if halves:
        start, stop = 2 * start, 2 * stop
    step = max(1, BLOCK // (stop - start))
    sums = []
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        if halves:
            part = np.ascontiguousarray(part).view(np.uint32)
        sums.append(_along_rows(part, start, stop))
    if not outer:
        return int(sums[0][0])
    together = sums[0] if len(sums) == 1 else np.concatenate(sums)
    return int(np.dot(together, _weights(outer)))


def hexadecimal(total: int) -> str:
    """A content as it is written in a manifest."""
    return f"{total & MASK:016x}"


def _along_rows(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Weighted sum of each row, whose columns have the indices start .. stop - 1."""
    first, last = start // INNER, (stop - 1) // INNER
    if first == last:  # nearly always
        return _in_block(rows, start, stop)
    edges = [start, *range((first + 1) * INNER, stop, INNER), stop]
    total = np.zeros(len(rows), np.uint64)
    for low, high in pairwise(edges):
        total += _along_rows(rows[:, low - start : high - start], low, high)
    return total


def _in_block(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The same for columns of one block; of one row, given flat, an array of one sum."""
    at = start % INNER
    near = _kept(0, 0, INNER)[at : at + stop - start]
    far = _kept(-1, start // INNER, start // INNER + 1)
    return np.asarray(np.dot(rows.astype(np.uint64), near) * far)


def _weights(outer: Box) -> np.ndarray:
    """The product of the factors of all dimensions but the last, for each row."""
    first, *rest = (_factors(len(outer) - d, low, high) for d, (low, high) in enumerate(outer))
    for factors in rest:
        first = np.multiply.outer(first, factors).reshape(-1)
    return first


def _factors(dimension: int, start: int, stop: int) -> np.ndarray:
    """Odd numbers for the indices start .. stop - 1 of a dimension."""
    if stop - start <= INNER:
        return _kept(dimension, start, stop)
    return _made(dimension, start, stop)


@lru_cache(maxsize=64)
def _kept(dimension: int, start: int, stop: int) -> np.ndarray:
    """The same, remembered: 128 KiB each, 8 MiB together, at most."""
    return _made(dimension, start, stop)


def _made(dimension: int, start: int, stop: int) -> np.ndarray:
    """splitmix64 of dimension and index."""
    z = np.arange(start, stop, dtype=np.uint64)
    z += np.uint64((dimension + 2) << 48)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    z.flags.writeable = False
    return z
