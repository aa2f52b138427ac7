"""Random-walk Metropolis chains of bootstrap posteriors of a linear predictor, compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numba import njit
from numpy import ndarray

from hakari.inference.gibbs.loss_kernels import _FAST, TILE, _loss, _predict
from hakari.inference.prior import PriorBlock


class PriorArrays(NamedTuple):
    """Blocks of a prior one under the other; ends: where each stops. df inf is Gaussian."""

    root: Float[ndarray, "R d"]
    centre: Float[ndarray, " R"]
    ends: Int[ndarray, " blocks"]
    df: Float[ndarray, " blocks"]


def prior_arrays(blocks: Sequence[PriorBlock], d: int) -> PriorArrays:
    """What the compiled walk needs of a prior; nothing of a flat one."""
    return PriorArrays(
        np.concatenate([np.empty((0, d)), *(b.root for b in blocks)]),
        np.concatenate([np.empty(0), *(b.centre for b in blocks)]),
        np.cumsum([len(b.centre) for b in blocks], dtype=np.int64),
        np.array([b.df for b in blocks], dtype=float),
    )


@njit(cache=True, nogil=True)
def walk(kind, shape, y, Xt, weights, at, prior, rate, start, roots, noise, log_coins, every):  # type: ignore[no-untyped-def]
    """A chain for each row of weights (C, n), from start (C, d); each `every`-th state is kept.

    Proposals: here + roots (C, d, d) @ noise (C, S, d); log_coins (C, S). at (d,): losses
    are relative to its loss. Returns states (C, S/every, d), their losses, acceptances (C,).
    """
    C, S, d = noise.shape
    states = np.empty((C, S // every, d))
    losses, accepted = np.empty((C, S // every)), np.zeros(C)
    for c in range(C):
        rows = _present(y, Xt, weights[c])
        base = _total(kind, shape, rows, at)
        here, there = start[c].copy(), start[c].copy()
        loss = _total(kind, shape, rows, here) - base
        density = _log_prior(here, prior)
        for s in range(S):
            _propose(here, roots[c], noise[c, s], there)
            other = _total(kind, shape, rows, there) - base
            other_density = _log_prior(there, prior)
            if log_coins[c, s] < rate * (loss - other) + other_density - density:
                here[:], loss, density = there, other, other_density
                accepted[c] += 1
            if (s + 1) % every == 0:
                states[c, s // every], losses[c, s // every] = here, loss
    return states, losses, accepted / S


@njit(cache=True, nogil=True)
def _present(y, Xt, weights):  # type: ignore[no-untyped-def]
    """The rows that a bootstrap did not leave out, in tiles (T, size): y, X (T, d, size), weights.

    The last tile is filled up with rows of weight 0. The last array is room for two tiles.
    """
    d, count = len(Xt), 0
    for weight in weights:
        count += weight != 0
    T = max(1, -(-count // TILE))
    size = max(1, -(-count // T))
    some_y, some_w, some_X = np.zeros((T, size)), np.zeros((T, size)), np.zeros((T, d, size))
    k = 0
    for i in range(len(y)):
        if weights[i] != 0:
            t, place = k // size, k % size
            some_y[t, place], some_w[t, place] = y[i], weights[i]
            for j in range(d):
                some_X[t, j, place] = Xt[j, i]
            k += 1
    return some_y, some_X, some_w, np.empty((2, size))


@njit(cache=True, nogil=True, fastmath=_FAST)
def _total(kind, shape, rows, theta):  # type: ignore[no-untyped-def]
    """Sum of the weighted losses of tiles of rows."""
    y, X, weights, room = rows
    f, loss = room[0], room[1]
    total = 0.0
    for t in range(len(y)):
        _predict(X[t], theta, f)
        _loss(kind, shape, y[t], f, loss)
        part = 0.0
        for i in range(len(f)):
            part += weights[t, i] * loss[i]
        total += part
    return total


@njit(cache=True, nogil=True)
def _propose(here, root, noise, there):  # type: ignore[no-untyped-def]
    for j in range(len(here)):
        there[j] = here[j]
        for k in range(j + 1):
            there[j] += root[j, k] * noise[k]


@njit(cache=True, nogil=True)
def _log_prior(theta, prior):  # type: ignore[no-untyped-def]
    """Log density up to a constant."""
    total, row = 0.0, 0
    for block in range(len(prior.ends)):
        first, square = row, 0.0
        while row < prior.ends[block]:
            off = -prior.centre[row]
            for k in range(len(theta)):
                off += prior.root[row, k] * theta[k]
            square += off * off
            row += 1
        df = prior.df[block]
        if np.isinf(df):
            total -= 0.5 * square
        else:
            total -= 0.5 * (df + row - first) * np.log1p(square / df)
    return total
