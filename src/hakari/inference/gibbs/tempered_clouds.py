"""Clouds of all bootstrap posteriors at rising learning rates, by sequential Monte Carlo.

The rate is an inverse temperature (arXiv 2404.16528; gibbs-calibration.md section 1.5): a cloud
is reweighted to a rate where its weights still have half the effective size, resampled, and moved
until it has forgotten where it was. All data sets climb in lock-step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import joblib
import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator
from threadpoolctl import threadpool_limits

from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs.cached_losses import digest
from hakari.inference.gibbs.importance import Problem
from hakari.inference.gibbs.particles import effective, normalised
from hakari.inference.gibbs.simulation import ACCEPTED, Simulated, as_made
from hakari.inference.prior import prior_draws
from hakari.inference.sampling import generator
from hakari.inference.workers import workers

SHRINKAGE = 0.5  # effective over actual size of the weights of a rung, at least in any data set
FORGOTTEN = 0.8  # of the squared distance of independent particles, before moves end
MOST = 200  # moves of a rung
USUAL = 16  # the same, as tasks are sized for
DOUBLINGS = 30  # of the rate between two rungs, at most
LARGEST = 1e30  # a loss: single precision holds no more, and its weight is 0


def proper(problem: Problem) -> bool:
    """Whether the prior is a distribution over all coefficients."""
    known = sum(len(block.positions) for block in problem.posterior.blocks)
    return known == len(problem.posterior.parameters)


def climb(problem: Problem, first: float, tell: Callable[[str], None]) -> Iterator[Simulated]:
    """Clouds at rising rates, without end: from the prior at rate 0 where it is proper.

    An improper prior cannot be drawn from. There, the particles of the first cloud, at rate
    `first`, are a wide Student sample around the minimiser, whose density is divided out of their
    weights. Raises ValueError for that with a loss that jumps, which says not how wide.
    """
    if proper(problem):
        made = _from_prior(problem)
        yield made
        first = _next_rate(made, first)
        log_weight = made.groups[0][1].log_weights(first)
    else:
        made, log_weight = _from_student(problem, first)
    for rung in range(1, 10_000):
        tell(f"tempered particles at rate {first:.3g}")
        made = _moved(problem, made, first, log_weight, rung)
        yield made
        first = _next_rate(made, made.rate)
        log_weight = made.groups[0][1].log_weights(first)


# --- the first cloud ----------------------------------------------------------------------


def _from_prior(problem: Problem) -> Simulated:
    posterior, N = problem.posterior, problem.particles
    d, blocks, theta = len(posterior.parameters), posterior.blocks, []
    for b in range(len(problem.weights)):
        chance = generator(problem.seed, f"prior {b}")
        free = [
            chance.chisquare(k.df, N) / k.df if np.isfinite(k.df) else np.ones(N) for k in blocks
        ]
        theta.append(prior_draws(blocks, chance.standard_normal((N, d)), np.stack(free, axis=1)))
    return _weighed(problem, np.stack(theta))


def _from_student(problem: Problem, rate: float) -> tuple[Simulated, Float[ndarray, "B N"]]:
    """Particles around the minimisers, and their log weights at a rate."""
    posterior, N, d = problem.posterior, problem.particles, len(problem.posterior.parameters)
    share, minimisers = problem.centres.share, problem.centres.minimisers
    mean, covariance = clouds.posterior_form(posterior, rate, share, minimisers)
    noise = clouds.uniforms(N, d, problem.seed)
    root = np.linalg.cholesky(2 * covariance)
    offsets, log_density = clouds.student(noise, root, clouds.degrees(d))
    made = _weighed(problem, mean[:, None] + offsets)
    particles = made.groups[0][1]
    return made, particles.log_prior - log_density - rate * particles.losses.astype(float)


def _weighed(problem: Problem, theta: Float[ndarray, "B N d"]) -> Simulated:
    """Draws as a cloud of rate 0, with their losses."""
    B, N = theta.shape[:2]
    jobs = clouds.tasks(problem.posterior, B, N)
    name = digest("first cloud", theta)
    parts = _parallel(
        problem,
        [f"{name} {job}" for job in jobs],
        [partial(clouds._losses, problem.posterior, problem.weights[j], theta[j]) for j in jobs],
    )
    losses = np.nan_to_num(np.concatenate(parts), nan=LARGEST, posinf=LARGEST)
    draws = np.concatenate([theta, losses[..., None]], axis=2)
    return as_made(problem, 0.0, draws, np.ones(B), B * N * problem.posterior.risk.n)


# --- rungs --------------------------------------------------------------------------------


def _next_rate(made: Simulated, scale: float) -> float:
    """The rate at which the worst data set's weights have `SHRINKAGE` of their size.

    scale: of rates, to begin looking.
    """
    particles, N = made.groups[0][1], made.groups[0][1].losses.shape[1]

    def enough(step: float) -> bool:
        log_weight = particles.log_weights(made.rate + step)
        return bool(effective(normalised(log_weight)).min() >= SHRINKAGE * N)

    low, high = 0.0, scale
    for _ in range(DOUBLINGS):
        if not enough(high):
            break
        low, high = high, 2 * high
    while low == 0.0 or high > 1.02 * low:
        middle = np.sqrt(low * high) if low else high / 4
        low, high = (middle, high) if enough(middle) else (low, middle)
    return made.rate + low


def _moved(
    problem: Problem, made: Simulated, rate: float, log_weight: Float[ndarray, "B N"], rung: int
) -> Simulated:
    """The cloud at another rate: resampled by its weights, then moved."""
    particles, weights = made.groups[0][1], normalised(log_weight.astype(float))
    theta = particles.centres[:, None] + particles.offsets
    jobs = clouds.tasks(problem.posterior, len(theta), USUAL * theta.shape[1])
    parts = _parallel(
        problem,
        [digest(f"rung {rung} {rate} {problem.seed} {j}", theta[j], weights[j]) for j in jobs],
        [partial(_job, problem, j, rate, theta[j], weights[j], rung) for j in jobs],
    )
    found = np.concatenate(parts)
    present = float(((problem.weights > 0).sum(axis=1) * found[:, 0, -1]).sum())
    draws = found[..., :-1]
    return as_made(problem, rate, draws, _distinct(draws), present * draws.shape[1])


def _job(
    problem: Problem, job: slice, rate: float, theta: ndarray, weights: ndarray, rung: int
) -> Float[ndarray, "C N d+2"]:
    """Moved particles of some data sets, their losses, and the number of moves."""
    out = np.empty((*theta.shape[:2], theta.shape[2] + 2))
    for c in range(len(theta)):
        b = job.start + c
        chance = generator(problem.seed, f"rung {rung} {b}")
        target = _Target(problem, problem.weights[b].astype(float), rate)
        mean = weights[c] @ theta[c]
        away = theta[c] - mean
        spread = (weights[c] * away.T) @ away
        root = np.linalg.cholesky(spread + 1e-9 * np.diag(np.diag(spread)))
        begin = theta[c][_systematic(weights[c], chance.random())]
        out[c] = _walked(target, begin, root, chance)
    return out


@dataclass(frozen=True)
class _Target:
    """One data set's posterior at a rate."""

    problem: Problem
    weights: Float[ndarray, " n"]
    rate: float

    def evaluate(self, theta: Float[ndarray, "N d"]) -> tuple[ndarray, ndarray]:
        """Losses less that of θ̂, and log densities."""
        posterior = self.problem.posterior
        total = posterior.risk.totals(np.vstack([theta, posterior.minimiser]), self.weights)
        losses = np.nan_to_num(total[:-1] - total[-1], nan=LARGEST, posinf=LARGEST)
        return losses, posterior.log_prior(theta) - self.rate * losses


def _walked(
    target: _Target, begin: ndarray, root: ndarray, chance: Generator
) -> Float[ndarray, "N d+2"]:
    """Random-walk moves of all particles until they are as far from `begin` as others are."""
    N, d = begin.shape
    here, log_scale, count = begin.copy(), np.log(2.38 / np.sqrt(d)), 0
    losses, density = target.evaluate(here)
    for count in range(1, MOST + 1):
        there = here + np.exp(log_scale) * chance.standard_normal((N, d)) @ root.T
        other, other_density = target.evaluate(there)
        yes = np.log(chance.random(N)) < other_density - density
        here[yes], losses[yes], density[yes] = there[yes], other[yes], other_density[yes]
        log_scale += (yes.mean() - ACCEPTED.get(d, 0.234)) / np.sqrt(count)
        away = np.linalg.solve(root, (here - begin).T)
        if (away**2).sum(axis=0).mean() >= FORGOTTEN * 2 * d:
            break
    return np.column_stack([here, losses, np.full(N, count)])


def _systematic(weights: Float[ndarray, " N"], coin: float) -> ndarray:
    """Ancestors by one uniform number, in their order."""
    N = len(weights)
    place = (np.arange(N) + coin) / N
    return np.minimum(np.searchsorted(np.cumsum(weights), place, side="right"), N - 1)


def _distinct(draws: Float[ndarray, "B N d+1"]) -> Float[ndarray, " B"]:
    """Share of particles that differ from all others: moves have parted what was resampled."""
    first = np.sort(draws[..., 0], axis=1)
    return np.asarray((1 + (np.diff(first, axis=1) > 0).sum(axis=1)) / first.shape[1])


def _parallel(
    problem: Problem, names: list[str], jobs: list[Callable[[], ndarray]]
) -> list[ndarray]:
    work = joblib.delayed(problem.cache.kept)
    pool = joblib.Parallel(n_jobs=workers(len(jobs)), prefer="threads")
    with threadpool_limits(1, user_api="blas"):  # small matrices
        return list(pool(work(name, job) for name, job in zip(names, jobs, strict=True)))
