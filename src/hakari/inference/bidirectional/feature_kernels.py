"""Feature maps: frequencies of a Gaussian kernel; cosines, sines and monomials, compiled.

A projection is a sum in double precision and in turns, θ/2π, so that taking away whole turns is
exact however large the angle is; only what is left, under half a turn, meets polynomials in
single precision. With u = 1/4 − |turn| both come from short series on |2πu| ≤ π/2:
cos θ = sin 2πu, |sin θ| = cos 2πu.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import factorial, pi
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numba import float32, float64, int64, njit
from numpy import ndarray

from hakari.inference.sampling import generator

ROWS = 2048  # a thread's share at least: less is done before the thread has begun
_F = np.float32
_TAU = _F(2 * pi)
_SIN = tuple(_F((-1) ** j / factorial(2 * j + 1)) for j in range(5, -1, -1))  # error 6e-8 at π/2
_COS = tuple(_F((-1) ** j / factorial(2 * j)) for j in range(6, -1, -1))  # error 7e-9 at π/2
_ARRAYS = (int64[::1], float64[::1], float64[::1])
_OUT = float32[:, ::1]


def spectrum(d: int, half: int, seed: int, orthogonal: bool = True) -> Float[ndarray, "d half"]:
    """Random frequencies, one a column, of the kernel exp(−|x − y|²/2) in d dimensions.

    seed: the same frequencies for the same seed, d and half. orthogonal: directions in blocks of d
    that are orthogonal to each other, each uniform on the sphere, norms chi(d) as of Gaussian ones;
    the kernel's estimate then varies less than with independent frequencies (False).

    Source: Rahimi and Recht (2007); Yu, Suresh, Choromanski, Holtmann-Rice and Kumar (2016).

    >>> spectrum(3, 100, seed=1).shape
    (3, 100)
    """
    chance = generator(seed, "random features")
    blocks = -(-half // d)
    normal = chance.standard_normal((blocks, d, d))
    if orthogonal:
        norms = np.sqrt(chance.chisquare(d, (blocks, 1, d)))
        q, r = np.linalg.qr(normal)
        normal = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None] * norms
    return np.ascontiguousarray(np.concatenate(normal, axis=1)[:, :half])


def fill_fourier(
    X: Float[ndarray, "n p"],
    columns: Int[ndarray, " d"],
    centre: Float[ndarray, " d"],
    scale: Float[ndarray, " d"],
    frequencies: Float[ndarray, "d half"],
    out: Float[ndarray, "n size"],
    names: Sequence[str],
) -> None:
    """Write [1, z, sqrt(1/half) cos(z'w), sqrt(1/half) sin(z'w)] of each row into `out`.

    X: float32 and float64, row by row in memory, are read as they lie. columns: those of X that
    are used, z = (x − centre)/scale of them. frequencies: w, radians a unit of z. out: float32, of
    size 1 + d + 2 half. names: of all columns of X. Rows are shared among threads; the result does
    not depend on how. Raises ValueError, naming row and column, for a value that is not finite.

    Source: Rahimi and Recht (2007), the paired form.
    """
    turns = np.ascontiguousarray(frequencies) / (2 * pi)
    columns, centre, scale = (_owned(part) for part in (columns, centre, scale))
    _fill(X, columns, out, names, lambda x, room: _fourier(x, columns, centre, scale, turns, room))


def fill_polynomial(
    X: Float[ndarray, "n p"],
    columns: Int[ndarray, " d"],
    centre: Float[ndarray, " d"],
    scale: Float[ndarray, " d"],
    steps: Int[ndarray, "size 2"],
    out: Float[ndarray, "n size"],
    names: Sequence[str],
) -> None:
    """Write monomials of z = (x − centre)/scale of each row into `out`, the first of them 1.

    steps: (j, k) of monomial m > 0: it is monomial j < m times z_k. Else as `fill_fourier`.
    """
    columns, centre, scale, steps = (_owned(part) for part in (columns, centre, scale, steps))
    _fill(X, columns, out, names, lambda x, o: _monomials(x, columns, centre, scale, steps, o))


def _owned(array: ndarray, dtype: Any = None) -> ndarray:
    """As kernels take it: a copy only of what is spread out, or read-only, as workers get it."""
    return np.require(array, dtype, ["C", "W"])


def _fill(
    X: ndarray, columns: ndarray, out: ndarray, names: Sequence[str], work: Callable[..., int]
) -> None:
    """Rows shared among threads: work(rows, room) returns the first that is not finite, or −1."""
    X = _owned(X, np.float32 if X.dtype == np.float32 else np.float64)
    workers = max(1, min(os.cpu_count() or 1, len(X) // ROWS))
    if workers == 1:
        bad = work(X, out)
    else:
        cuts = np.linspace(0, len(X), workers + 1).astype(int)
        parts = [slice(*pair) for pair in pairwise(cuts)]
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda part: work(X[part], out[part]), parts))
        bad = next((p.start + b for p, b in zip(parts, found, strict=True) if b >= 0), -1)
    if bad >= 0:
        column = next(int(c) for c in columns if not np.isfinite(X[bad, c]))
        value = X[bad, column]
        raise ValueError(
            f"covariate {names[column]} is {value} in row {bad}: drop the row or fill it in"
        )


@njit(cache=True, nogil=True, fastmath={"contract"})
def _standardised(row, columns, centre, scale, z):  # type: ignore[no-untyped-def]
    """Fill z of one row; whether all of it is finite."""
    total = 0.0
    for k in range(len(columns)):
        z[k] = (row[columns[k]] - centre[k]) / scale[k]
        total += 0.0 * z[k]
    return total == 0.0


@njit(cache=True, nogil=True, fastmath={"contract"})
def _waves(turns, scale, cosines, sines):  # type: ignore[no-untyped-def]
    """Cosines and sines of 2π turns, times scale."""
    for j in range(len(turns)):
        turn = turns[j] - np.rint(turns[j])
        angle = _TAU * _F(0.25 - abs(turn))
        square = angle * angle
        s = _F(0.0)
        for c in _SIN:
            s = s * square + c
        co = _F(0.0)
        for c in _COS:
            co = co * square + c
        cosines[j] = scale * (s * angle)
        sines[j] = scale * (co if turn >= 0.0 else -co)


@njit(
    [int64(X, *_ARRAYS, float64[:, ::1], _OUT) for X in (float64[:, ::1], float32[:, ::1])],
    cache=True,
    nogil=True,
    fastmath={"contract"},
)
def _fourier(X, columns, centre, scale, turns, out):  # type: ignore[no-untyped-def]
    """Fill `out`; the first row that is not finite, or −1."""
    d, half = turns.shape
    z, angle = np.empty(d), np.empty(half)
    size = _F(np.sqrt(1.0 / half))
    for i in range(len(X)):
        if not _standardised(X[i], columns, centre, scale, z):
            return i
        row = out[i]
        row[0] = _F(1.0)
        angle[:] = 0.0
        for k in range(d):
            row[1 + k] = _F(z[k])
            slope, wave = z[k], turns[k]
            for j in range(half):
                angle[j] += slope * wave[j]
        _waves(angle, size, row[1 + d : 1 + d + half], row[1 + d + half :])
    return -1


@njit(
    [int64(X, *_ARRAYS, int64[:, ::1], _OUT) for X in (float64[:, ::1], float32[:, ::1])],
    cache=True,
    nogil=True,
)
def _monomials(X, columns, centre, scale, steps, out):  # type: ignore[no-untyped-def]
    """Fill `out`; the first row that is not finite, or −1."""
    z, value = np.empty(len(columns)), np.empty(len(steps))
    value[0] = 1.0
    for i in range(len(X)):
        if not _standardised(X[i], columns, centre, scale, z):
            return i
        for m in range(1, len(steps)):
            value[m] = value[steps[m, 0]] * z[steps[m, 1]]
        for m in range(len(steps)):
            out[i, m] = _F(value[m])
    return -1
