"""Losses of a linear predictor, compiled: ρ(y, f), its slope and its curvature in f = x'θ.

The rows lie column by column, Xt (d, n), and are taken a tile at a time, so that a tile stays in
the cache while many θ pass over it. Sums run in the order of rows, whatever the threads. Loops
run over whole contiguous slices: an index that is a sum, or a division that might raise, keeps
the compiler from vectorising them (5 to 10 times slower).
"""

from __future__ import annotations

from math import factorial

import numpy as np
from numba import njit

SQUARED, QUANTILE, HUBER, EXPECTILE, LOGISTIC, POISSON, HINGE = range(7)
TILE = 512  # rows: with 20 columns 80 KB
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_ROUND = 1.5 * 2.0**52  # added and taken away: the nearest whole number
_EXP = tuple(1.0 / factorial(j) for j in range(12, 1, -1))
_ARTANH = tuple((1.0 / j, 1.0 / (j + 2)) for j in range(31, 2, -4))


@njit(cache=True, nogil=True, fastmath={"contract"})
def _exp(x):  # type: ignore[no-untyped-def]
    """Exponential of x up to 709, to one unit in the last place, in steps that vectorise.

    2^k times the Taylor series at x − k log 2; log 2 in two parts (fdlibm): k log 2 is exact.
    """
    x = min(max(x, -708.0), 709.0)
    shifted = x * 1.4426950408889634 + _ROUND
    k = shifted - _ROUND
    r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10
    p = 1.0 / 6227020800.0  # 1/13!
    for c in _EXP:
        p = p * r + c
    p = p * r * r + r + 1.0
    power = np.int64((np.float64(shifted).view(np.int64) + 1023) << 52)
    return p * power.view(np.float64)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def _log1p(z):  # type: ignore[no-untyped-def]
    """Logarithm of 1 + z, z from 0 to 1, by the series of 2 artanh(z/(2 + z)); error as above."""
    s = z / (2.0 + z)
    q = s * s
    square = q * q
    p = 1.0 / 35.0
    for even, odd in _ARTANH:  # two terms a step: a longer loop is not unrolled
        p = p * square + (even + odd * q)
    return 2.0 * s * (p * q) + 2.0 * s


@njit(cache=True, nogil=True, fastmath=_FAST)
def _loss(kind, shape, y, f, out):  # type: ignore[no-untyped-def]
    """ρ(y, f) of a tile into `out`; a loop a kind, so that each is vectorised."""
    n = len(y)
    if kind == SQUARED:
        for i in range(n):
            r = y[i] - f[i]
            out[i] = 0.5 * r * r
    elif kind == QUANTILE:
        for i in range(n):
            r = y[i] - f[i]
            out[i] = max(shape * r, (shape - 1.0) * r)
    elif kind == HUBER:
        for i in range(n):
            r = abs(y[i] - f[i])
            small = min(r, shape)
            out[i] = small * (r - 0.5 * small)
    elif kind == EXPECTILE:
        for i in range(n):
            r = y[i] - f[i]
            out[i] = (shape if r >= 0 else 1.0 - shape) * r * r
    elif kind == LOGISTIC:
        for i in range(n):
            out[i] = max(f[i], 0.0) + _log1p(_exp(-abs(f[i]))) - y[i] * f[i]
    elif kind == POISSON:
        for i in range(n):
            out[i] = _exp(f[i]) - y[i] * f[i]
    else:
        for i in range(n):
            out[i] = max(0.0, 1.0 - y[i] * f[i])


@njit(cache=True, nogil=True, fastmath=_FAST)
def _predict(tile, theta, f):  # type: ignore[no-untyped-def]
    n = len(f)
    first, column = theta[0], tile[0]
    for i in range(n):
        f[i] = first * column[i]
    for k in range(1, len(theta)):
        slope, column = theta[k], tile[k]
        for i in range(n):
            f[i] += slope * column[i]


@njit(cache=True, nogil=True, fastmath=_FAST)
def totals(kind, shape, y, Xt, weights, theta):  # type: ignore[no-untyped-def]
    """Σ_i w_i ρ(y_i, x_i'θ) of each row of theta (M, d): (M,). No weights: all 1."""
    n, M = len(y), len(theta)
    out = np.zeros(M)
    room = np.empty((2, TILE))
    weighted = len(weights) > 0
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        f, loss = room[0, : stop - start], room[1, : stop - start]
        tile = np.ascontiguousarray(Xt[:, start:stop])
        target, w = y[start:stop], weights[start:stop]
        for m in range(M):
            _predict(tile, theta[m], f)
            _loss(kind, shape, target, f, loss)
            total = 0.0
            if weighted:
                for i in range(len(loss)):
                    total += w[i] * loss[i]
            else:
                for i in range(len(loss)):
                    total += loss[i]
            out[m] += total
    return out


@njit(cache=True, nogil=True, fastmath=_FAST)
def excess(kind, shape, y, Xt, theta, base, out):  # type: ignore[no-untyped-def]
    """ρ(y_i, x_i'θ) − base_i of each θ and row, into out (M, n) of any float type."""
    n, M = len(y), len(theta)
    room = np.empty((2, TILE))
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        f, loss = room[0, : stop - start], room[1, : stop - start]
        tile = np.ascontiguousarray(Xt[:, start:stop])
        target, below = y[start:stop], base[start:stop]
        for m in range(M):
            _predict(tile, theta[m], f)
            _loss(kind, shape, target, f, loss)
            row = out[m, start:stop]
            for i in range(len(loss)):
                row[i] = loss[i] - below[i]


@njit(cache=True, nogil=True)
def slopes(kind, shape, y, f):  # type: ignore[no-untyped-def]
    """∂ρ/∂f of each row; at a kink the mean of both sides."""
    n = len(y)
    out = np.empty(n)
    for i in range(n):
        r = y[i] - f[i]
        if kind == SQUARED:
            out[i] = -r
        elif kind == QUANTILE:
            out[i] = -shape if r > 0 else (1.0 - shape if r < 0 else 0.5 - shape)
        elif kind == HUBER:
            out[i] = -min(max(r, -shape), shape)
        elif kind == EXPECTILE:
            out[i] = -2.0 * (shape if r >= 0 else 1.0 - shape) * r
        elif kind == LOGISTIC:
            out[i] = 1.0 / (1.0 + np.exp(-f[i])) - y[i]
        elif kind == POISSON:
            out[i] = np.exp(f[i]) - y[i]
        else:
            margin = y[i] * f[i]
            out[i] = -y[i] if margin < 1 else (0.0 if margin > 1 else -0.5 * y[i])
    return out


@njit(cache=True, nogil=True)
def curvatures(kind, shape, y, f):  # type: ignore[no-untyped-def]
    """∂²ρ/∂f² of each row, of losses that have one (almost everywhere)."""
    n = len(y)
    out = np.zeros(n)
    for i in range(n):
        if kind == SQUARED:
            out[i] = 1.0
        elif kind == HUBER:
            out[i] = 1.0 if abs(y[i] - f[i]) <= shape else 0.0
        elif kind == EXPECTILE:
            out[i] = 2.0 * (shape if y[i] >= f[i] else 1.0 - shape)
        elif kind == LOGISTIC:
            p = 1.0 / (1.0 + np.exp(-f[i]))
            out[i] = p * (1.0 - p)
        elif kind == POISSON:
            out[i] = np.exp(f[i])
    return out
