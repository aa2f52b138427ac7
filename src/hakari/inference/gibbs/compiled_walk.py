"""The adaptive random walk of a loss of a linear predictor, compiled: one chain at a time.

The same moves as lockstep.py makes, given the same noise and coins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy import ndarray

from hakari.inference.density import log_prior
from hakari.inference.gibbs.lockstep import EVERY
from hakari.inference.gibbs.loss_kernels import totals
from hakari.inference.gibbs.risk import LinearRisk
from hakari.inference.gibbs.target import Target


class Rows(NamedTuple):
    """A target as arrays: loss, rows, rate, coordinates, and the prior as density.py reads it."""

    kind: int
    shape: float
    y: ndarray  # (n,)
    columns: ndarray  # (d, n)
    weights: ndarray  # (n,), or (0,)
    rate: float
    centre: ndarray  # (d,)
    factor: ndarray  # (d, d)
    constant: float  # of the normalised prior
    prior_df: ndarray  # (B,)
    prior_start: ndarray  # (B + 1,)
    prior_offset: ndarray  # (D,)
    prior_slope: ndarray  # (D, d)


def rows_of(target: Target, risk: LinearRisk) -> Rows:
    """The arrays of a target."""
    blocks, d = target.posterior.blocks, target.d
    offset = [block.root @ target.centre - block.centre for block in blocks]
    slope = [block.root @ target.factor for block in blocks]
    return Rows(
        risk.loss.kind,
        risk.loss.shape,
        np.ascontiguousarray(risk.y),
        risk.columns,
        np.empty(0) if risk.weights is None else np.ascontiguousarray(risk.weights),
        target.posterior.learning_rate,
        target.centre,
        target.factor,
        float(sum(block.constant for block in blocks)),
        np.array([block.df for block in blocks], dtype=float),
        np.cumsum([0, *(len(block.centre) for block in blocks)]).astype(np.int64),
        np.concatenate([np.empty(0), *offset]),
        np.ascontiguousarray(np.vstack([np.empty((0, d)), *slope])),
    )


@njit(cache=True, nogil=True)
def log_density(rows, u):  # type: ignore[no-untyped-def]
    """Log π_η at u (d,)."""
    theta = (rows.centre + rows.factor @ u).reshape((1, len(u)))
    total = totals(rows.kind, rows.shape, rows.y, rows.columns, rows.weights, theta)[0]
    value = rows.constant - rows.rate * total + log_prior(rows, u)
    return -np.inf if np.isnan(value) else value


@njit(cache=True, nogil=True)
def move(rows, u, density, factor, noise, coin):  # type: ignore[no-untyped-def]
    """One step of a walk with lower factor (d, d): (u, log density, log α, accepted)."""
    there = u + factor @ noise
    value = log_density(rows, there)
    log_accept = min(0.0, value - density) if value > -np.inf else -np.inf
    if np.log(coin) < log_accept:
        return there, value, log_accept, True
    return u, density, log_accept, False


@njit(cache=True, nogil=True)
def walk(rows, start, tuning, schedule, noise, coins):  # type: ignore[no-untyped-def]
    """N moves: points (N, d), log densities (N,), acceptances (N,), and the tuning after them.

    schedule: (moves done, moves of the warm-up, goal); the tuning is learned, as lockstep.learned
    says, until the warm-up is over. One function for both, so that it is compiled once.
    """
    N, d = noise.shape
    size, shape, centre, covariance = tuning
    done, warmup, goal = schedule
    draws, densities, accepted = np.empty((N, d)), np.empty(N), np.empty(N, dtype=np.bool_)
    u, density = start, log_density(rows, start)
    for i in range(N):
        u, density, log_accept, accepted[i] = move(
            rows, u, density, size * shape, noise[i], coins[i]
        )
        draws[i] = u
        densities[i] = density
        if done + i < warmup:
            size *= np.exp((np.exp(log_accept) - goal) / (1 + done + i) ** 0.6)
            share = 1 / (1 + (done + i) % max(1, warmup // 2) + 10 * d)
            gap = u - centre
            centre = centre + share * gap
            covariance = covariance + share * (np.outer(gap, gap) - covariance)
            if (done + i) % EVERY == EVERY - 1:
                shape = np.linalg.cholesky(covariance)
    return draws, densities, accepted, (size, shape, centre, covariance)
