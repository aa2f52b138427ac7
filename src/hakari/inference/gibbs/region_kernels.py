"""Ellipses of weighted particles, compiled: moments, and the weight of what is nearer than θ̂.

Particles lie column by column, x (1, d, N) where all data sets share them, else (B, d, N), and
are taken a tile at a time (as rows are in `loss_kernels`).
"""

from __future__ import annotations

import numpy as np
from numba import njit

TILE = 512  # particles
_FAST = {"reassoc", "contract", "nsz", "arcp"}


@njit(cache=True, nogil=True, fastmath=_FAST)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True, fastmath=_FAST)
def moments(w, x):  # type: ignore[no-untyped-def]
    """Σ_i w_bi x_i (B, d) and Σ_i w_bi x_i x_i' (B, d, d)."""
    B, N = w.shape
    d = x.shape[1]
    mean, square = np.zeros((B, d)), np.zeros((B, d, d))
    room = np.empty(TILE)
    for b in range(B):
        columns = x[b if len(x) > 1 else 0]
        for start in range(0, N, TILE):
            weight = w[b, start : start + TILE]
            weighted = room[: len(weight)]
            for j in range(d):
                column = columns[j, start : start + TILE]
                for i in range(len(weight)):
                    weighted[i] = weight[i] * column[i]
                mean[b, j] += np.sum(weighted)
                for k in range(j + 1):
                    square[b, j, k] += _dot(weighted, columns[k, start : start + TILE])
        for j in range(d):
            for k in range(j):
                square[b, k, j] = square[b, j, k]
    return mean, square


@njit(cache=True, nogil=True, fastmath=_FAST)
def nearer(w, x, mean, metric, own):  # type: ignore[no-untyped-def]
    """Σ_i w_bi 1{(x_i − mean_b)' metric_b (x_i − mean_b) < own_b}: (B,)."""
    B, N = w.shape
    d = x.shape[1]
    out = np.zeros(B)
    away, room = np.empty((d, TILE)), np.empty(TILE)
    for b in range(B):
        columns = x[b if len(x) > 1 else 0]
        for start in range(0, N, TILE):
            weight = w[b, start : start + TILE]
            distance = room[: len(weight)]
            distance[:] = 0.0
            for j in range(d):
                away[j, : len(weight)] = columns[j, start : start + TILE] - mean[b, j]
                for k in range(j + 1):
                    _add(metric[b, j, k] * (2.0 if k < j else 1.0), away[j], away[k], distance)
            total = 0.0
            for i in range(len(weight)):
                total += weight[i] if distance[i] < own[b] else 0.0
            out[b] += total
    return out


@njit(cache=True, nogil=True, fastmath=_FAST)
def _add(factor, a, b, out):  # type: ignore[no-untyped-def]
    for i in range(len(out)):
        out[i] += factor * a[i] * b[i]
