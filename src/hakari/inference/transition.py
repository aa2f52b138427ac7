"""The Hastings algebra, once for all kernels that move one chain step by step.

A kernel is two functions: `place` gives the Gaussian a proposal is drawn from, and
`log_screen` the logarithm of the first-stage probability. Delayed acceptance
(Christen and Fox, 2005): with α₁ the screen, the second stage accepts with
α₂(θ,θ') = min{1, [π(θ') q_θ'(θ) α₁(θ',θ)] / [π(θ) q_θ(θ') α₁(θ,θ')]},
and π(θ) q_θ(θ') α₁ α₂ is symmetric whatever α₁ is. quasi-posteriors.md 'general form'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numpy import ndarray

from hakari.inference.density import MATRIX, STATE, TARGET, VECTOR, State, evaluate

PLACED = types.Tuple((VECTOR, MATRIX))
PLACE = PLACED(TARGET, STATE, MATRIX)
SCREEN = types.float64(TARGET, STATE, VECTOR)

SCREENED, REJECTED, ACCEPTED, SINGULAR = 0, 1, 2, 3  # outcome of an iteration


class Kernel(NamedTuple):
    """`place(target, state, tuning)`: centre (K,) and lower factor (K, K) of the proposal;
    `log_screen(target, state, u)`: log α₁ ≤ 0.
    """

    name: str
    place: Callable[..., Any]
    log_screen: Callable[..., Any]


class Move(NamedTuple):
    """What one step did: the new state and its placement, and both log probabilities."""

    state: State
    placed: tuple[ndarray, ndarray]
    outcome: int
    log_screen: float
    log_accept: float  # NaN when the first stage rejected


@njit(cache=True, nogil=True)
def step(target, place, log_screen, state, placed, tuning, noise, coins):  # type: ignore[no-untyped-def]
    """One iteration: noise (K,) standard normal, coins (2,) uniform in (0, 1).

    The density is evaluated only if the first stage passes.
    """
    centre, factor = placed
    u = centre + factor @ noise
    screen = log_screen(target, state, u)
    if np.log(coins[0]) >= screen:
        return Move(state, placed, SCREENED, screen, np.nan)
    arrival = evaluate(target, u)
    if arrival.log_density == -np.inf:
        return Move(state, placed, SINGULAR, screen, -np.inf)
    landed = place(target, arrival, tuning)
    forward = -0.5 * noise @ noise - _log_diagonal(factor)
    backward = _log_gaussian(state.u - landed[0], landed[1])
    gain = arrival.log_density + backward + log_screen(target, arrival, state.u)
    log_accept = min(0.0, gain - state.log_density - forward - screen)
    if np.log(coins[1]) < log_accept:
        return Move(arrival, landed, ACCEPTED, screen, log_accept)
    return Move(state, placed, REJECTED, screen, log_accept)


@njit(cache=True, nogil=True)
def _log_diagonal(factor):  # type: ignore[no-untyped-def]
    total = 0.0
    for k in range(len(factor)):
        total += np.log(abs(factor[k, k]))
    return total


@njit(cache=True, nogil=True)
def _log_gaussian(gap, factor):  # type: ignore[no-untyped-def]
    """Log density of N(0, factor factor') at `gap`, without its constant."""
    K = len(gap)
    solved = np.empty(K)
    q = 0.0
    for i in range(K):
        value = gap[i]
        for j in range(i):
            value -= factor[i, j] * solved[j]
        solved[i] = value / factor[i, i]
        q += solved[i] * solved[i]
    return -0.5 * q - _log_diagonal(factor)


# Declared signatures: functions passed as plain arguments would be compiled anew by each process.
_RUN = (
    TARGET,
    types.FunctionType(PLACE),
    types.FunctionType(SCREEN),
    types.FunctionType(PLACE),
    types.FunctionType(SCREEN),
    types.float64,
    VECTOR,
    MATRIX,
    MATRIX,
    MATRIX,
    MATRIX,
)


@njit(_RUN, cache=True, nogil=True)
def run(target, place, log_screen, walk, walk_screen, mix, start, tuning, scale, noise, coins):  # type: ignore[no-untyped-def]
    """A chain of N iterations of a kernel, mixed with a random walk.

    start (K,); tuning and scale (K, K) of the kernel and of the walk; noise (N, K);
    coins (N, 3), the third picks the walk with probability `mix`.
    Returns draws (N, K), log densities (N,), outcomes (N,).
    """
    N, K = noise.shape
    draws, densities, outcomes = np.empty((N, K)), np.empty(N), np.empty(N, dtype=np.int8)
    state = evaluate(target, start)
    placed = place(target, state, tuning)
    for i in range(N):
        if coins[i, 2] < mix:
            here = walk(target, state, scale)
            move = step(target, walk, walk_screen, state, here, scale, noise[i], coins[i])
            if move.outcome == ACCEPTED:
                placed = place(target, move.state, tuning)
        else:
            move = step(target, place, log_screen, state, placed, tuning, noise[i], coins[i])
            placed = move.placed
        state = move.state
        draws[i] = state.u
        densities[i] = state.log_density
        outcomes[i] = move.outcome
    return draws, densities, outcomes
