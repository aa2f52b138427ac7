"""Chains that move together, one call of the loss a step: for functions, and kernels with slopes.

A kernel says where a proposal is centred, u' = place(u) + spread · shape ξ; the Hastings algebra
stands once, in `step`: log α = log π(u') − log π(u) + ½|ξ|² − ½|ξ⁻|², with ξ⁻ the noise that
leads back, since the spread is the same at u and u'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs.target import Target

EVERY = 20  # moves of the warm-up between factorisations of a learned covariance


class State(NamedTuple):
    """Where C chains stand; slope of the log density in u, of kernels that need it."""

    u: ndarray  # (C, d)
    log_density: ndarray  # (C,)
    slope: ndarray  # (C, d), or (C, 0)


class Tuning(NamedTuple):
    """Size of the steps and lower factor of their shape, of each chain; mean and covariance of u
    so far, of kernels that learn their shape from it.
    """

    size: ndarray  # (C,)
    shape: ndarray  # (C, d, d)
    centre: ndarray  # (C, d)
    covariance: ndarray  # (C, d, d)


class Kernel(NamedTuple):
    """place(state, size (C,)): centres (C, d); spread(size): (C,) scales of the noise.

    first, goal: size to begin with and acceptance to tune for, of d. longest: of sizes. slope:
    the kernel's gradient of the log density in u, or None. learns: whether the shape is learned.
    """

    name: str
    place: Callable[[State, ndarray], ndarray]
    spread: Callable[[ndarray], ndarray]
    first: Callable[[int], float]
    goal: Callable[[int], float]
    longest: float = np.inf
    slope: Callable[[Target, ndarray], ndarray] | None = None
    learns: bool = False


class Move(NamedTuple):
    """What one step did."""

    state: State
    log_accept: ndarray  # (C,)
    accepted: ndarray  # (C,)


walk = Kernel(
    "mh",
    place=lambda state, size: state.u,
    spread=lambda size: size,
    first=lambda d: 2.38 / np.sqrt(d),
    goal=lambda d: 0.234 if d > 1 else 0.44,  # Roberts, Gelman and Gilks (1997)
    learns=True,
)


def evaluate(target: Target, kernel: Kernel, u: Float[ndarray, "C d"]) -> State:
    """The state at u."""
    slope = np.empty((len(u), 0)) if kernel.slope is None else kernel.slope(target, u)
    return State(u, target.log_density(u), slope)


def begin(kernel: Kernel, chains: int, d: int) -> Tuning:
    """The tuning that a warm-up begins with."""
    unit = np.repeat(np.eye(d)[None], chains, axis=0)
    return Tuning(np.full(chains, kernel.first(d)), unit, np.zeros((chains, d)), unit)


def step(
    target: Target,
    kernel: Kernel,
    state: State,
    tuning: Tuning,
    noise: Float[ndarray, "C d"],
    coins: Float[ndarray, " C"],
) -> Move:
    """One move of each chain: noise standard normal, coins uniform in (0, 1)."""
    spread = kernel.spread(tuning.size)[:, None]
    jump = np.einsum("cij,cj->ci", tuning.shape, noise)
    arrival = evaluate(target, kernel, kernel.place(state, tuning.size) + spread * jump)
    gap = (state.u - kernel.place(arrival, tuning.size)) / spread
    back = np.linalg.solve(tuning.shape, gap[:, :, None])[:, :, 0]
    hastings = 0.5 * ((noise**2).sum(axis=1) - (back**2).sum(axis=1))
    gain = arrival.log_density - state.log_density + hastings
    gain = np.where(np.isfinite(arrival.log_density) & ~np.isnan(gain), gain, -np.inf)
    log_accept = np.minimum(gain, 0.0)
    accepted = np.log(coins) < log_accept
    kept = (
        np.where(accepted.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(arrival, state, strict=True)
    )
    return Move(State(*kept), log_accept, accepted)


def learned(kernel: Kernel, tuning: Tuning, move: Move, done: int, warmup: int) -> Tuning:
    """The tuning after the move that follows `done` others, of a warm-up of `warmup`.

    Haario, Saksman and Tamminen (2001), in u: all past weighs the same, and what was known before
    as 10 d moves; from half-way on the first half is forgotten but for its covariance. Sizes:
    Andrieu and Thoms (2008), algorithm 4.
    """
    d = move.state.u.shape[1]
    gain = (np.exp(move.log_accept) - kernel.goal(d)) / (1 + done) ** 0.6
    size = np.minimum(tuning.size * np.exp(gain), kernel.longest)
    if not kernel.learns:
        return tuning._replace(size=size)
    share = 1 / (1 + done % max(1, warmup // 2) + 10 * d)
    gap = move.state.u - tuning.centre
    centre = tuning.centre + share * gap
    spread = gap[:, :, None] * gap[:, None, :]
    covariance = tuning.covariance + share * (spread - tuning.covariance)
    due = done % EVERY == EVERY - 1
    return Tuning(size, np.linalg.cholesky(covariance) if due else tuning.shape, centre, covariance)
