"""Bootstrap posteriors simulated: a random-walk Metropolis chain for each data set.

The draws are particles whose weights are uniform at the rate that they were simulated at, and
exp{−(η − rate) L} at another, always from that rate (gibbs-calibration.md sections 1.4 and 1.6).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import joblib
import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.fft import irfft, next_fast_len, rfft

from hakari.inference.gibbs.cached_losses import digest
from hakari.inference.gibbs.cloud import JOB, posterior_form, tasks
from hakari.inference.gibbs.importance import Made, Problem
from hakari.inference.gibbs.particles import Particles
from hakari.inference.gibbs.risk import AT_ONCE, LinearRisk
from hakari.inference.gibbs.sandwich import sampling_steps
from hakari.inference.sampling import generator
from hakari.inference.workers import workers

BURN = 600  # steps before those that are kept
MOVES = 4  # steps a kept draw, or 2 a coefficient: 512 draws are the 2,000 steps of the paper
WINDOW = 50  # steps between adaptations
PIECE = 64  # draws whose noise is held at once
KEPT = 32  # steps of a custom loss's chains after which they are kept
ACCEPTED = {1: 0.44, 2: 0.35}  # acceptance to tune for; 0.234 from three coefficients on
Advance = Callable[[ndarray, ndarray, ndarray, ndarray, int], tuple[ndarray, ndarray, ndarray]]


@dataclass(frozen=True)
class Simulated(Made):
    """Draws of Markov chains. efficiency (B,): independent draws that one draw is worth."""

    efficiency: Float[ndarray, " B"]

    def quality(self, rate: float) -> tuple[Float[ndarray, " B"], Float[ndarray, " B"]]:
        """k-hat, and effective size: of the weights times the efficiency of the chain.

        Weights without a tail, as all are at the chains' own rate, have the k-hat 0, the limit of
        the law 1 − η/rate: their effective size alone is judged.
        """
        if rate == self.rate:
            sizes = np.full(len(self.efficiency), self.groups[0][1].losses.shape[1])
            return np.zeros(len(sizes)), sizes * self.efficiency
        with np.errstate(divide="ignore", invalid="ignore"):  # tails of equal losses
            k_hat, size = super().quality(rate)
        return np.where(np.isfinite(k_hat), k_hat, 0.0), size * self.efficiency


def simulate(problem: Problem, rate: float, N: int, burn: int = BURN) -> Simulated:
    """N draws of each data set's posterior at a rate; the same ones for any number of workers.

    Proposals: 2.38/√d times the Cholesky factor of the posterior's Gaussian approximation, its
    covariance and scale adapted to the chain in the burn-in alone. A loss that jumps has no such
    form: its chains start at θ̂ with the steps of its sampling error. The noise is the same at
    every rate, so that rates differ by nothing else.
    """
    start, covariance = _form(problem, rate)
    B, d = start.shape
    every = max(MOVES, 2 * d)
    linear = isinstance(problem.posterior.risk, LinearRisk)
    # a custom loss takes the proposals of all chains at once
    jobs = tasks(problem.posterior, B, burn + N * every) if linear else [slice(0, B)]
    near = problem.posterior.log_prior(start[:, None] + covariance)  # names the prior
    settings = np.array([rate, N, burn, every, problem.seed])
    name = digest("walk", settings, start, covariance, near)

    def chains(job: slice) -> ndarray:
        whole = f"{name} {job}"
        work = partial(_chains, problem, job, rate, start, covariance, N, burn, every, whole)
        return problem.cache.kept(whole, work)

    pool = joblib.Parallel(n_jobs=workers(len(jobs)), prefer="threads")
    parts = pool(joblib.delayed(chains)(job) for job in jobs)
    present = float((problem.weights > 0).sum()) if linear else B * problem.posterior.risk.n
    draws = np.concatenate(list(parts))
    return as_made(problem, rate, draws, relative_efficiency(draws), present * (burn + N * every))


def as_made(
    problem: Problem,
    rate: float,
    draws: Float[ndarray, "B N d+1"],
    efficiency: Float[ndarray, " B"],
    evaluations: float,
) -> Simulated:
    """Draws at a rate as particles; the last column is each draw's loss less that of θ̂."""
    posterior, B = problem.posterior, len(draws)
    estimate, theta = posterior.minimiser, draws[..., :-1]
    losses = draws[..., -1].astype(np.float32)
    log_prior = posterior.log_prior(theta) - posterior.log_prior(estimate)
    particles = Particles(
        np.repeat(estimate[None], B, axis=0),
        theta - estimate,
        losses,
        log_prior,
        log_prior - rate * losses.astype(float),
        estimate,
    )
    return Simulated(rate, ((np.arange(B), particles),), int(evaluations), efficiency)


def relative_efficiency(draws: Float[ndarray, "B N K"]) -> Float[ndarray, " B"]:
    """Effective over actual size of each chain: the least of its columns, at most 1.

    One over the integrated autocorrelation time by Geyer's (1992) initial monotone sequence. A
    column that never moves makes the chain one draw.
    """
    N = draws.shape[1]
    size, out = next_fast_len(2 * N, real=True), np.empty(len(draws))
    for rows in (slice(i, i + JOB) for i in range(0, len(draws), JOB)):
        x = draws[rows] - draws[rows].mean(axis=1, keepdims=True)
        covariance = irfft(np.abs(rfft(x, size, axis=1)) ** 2, size, axis=1)[:, : N - N % 2]
        moves = np.ptp(draws[rows], axis=1) > 0
        rho = covariance / np.where(moves, covariance[:, 0], 1)[:, None]
        pairs = np.minimum.accumulate(rho[:, 0::2] + rho[:, 1::2], axis=1)
        time = np.where(moves, 2 * np.maximum(pairs, 0).sum(axis=1) - 1, N)
        out[rows] = 1 / np.maximum(time.max(axis=1), 1)
    return out


# --- chains -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """What chains know of their posteriors: means (C, d), covariances (C, d, d), a log scale each.

    count: iterations that this knowledge is worth.
    """

    mean: Float[ndarray, "C d"]
    covariance: Float[ndarray, "C d d"]
    log_scale: Float[ndarray, " C"]
    count: float

    @property
    def roots(self) -> Float[ndarray, "C d d"]:
        """Factors of the proposals."""
        return np.asarray(
            np.exp(self.log_scale)[:, None, None] * np.linalg.cholesky(self.covariance)
        )

    def after(
        self, draws: Float[ndarray, "C S d"], accepted: Float[ndarray, " C"], gain: float
    ) -> Tuning:
        """The same after a window of draws: all past weighs the same (Haario et al., 2001)."""
        new, goal = draws.shape[1], ACCEPTED.get(draws.shape[2], 0.234)
        share = new / (self.count + new)
        away = draws - self.mean[:, None]
        move = share * away.mean(axis=1)
        spread = np.einsum("csd,cse->cde", away, away) / new
        covariance = (1 - share) * self.covariance + share * spread
        return replace(
            self,
            mean=self.mean + move,
            covariance=covariance - move[:, :, None] * move[:, None, :],
            log_scale=self.log_scale + gain * (accepted - goal),
            count=self.count + new,
        )


def _chains(
    problem: Problem,
    job: slice,
    rate: float,
    start: ndarray,
    covariance: ndarray,
    N: int,
    burn: int,
    every: int,
    name: str = "",
) -> Float[ndarray, "C N d+1"]:
    """Draws and their losses of some data sets' chains; name: of what is kept on the way."""
    here, d = start[job], start.shape[1]
    streams = [generator(problem.seed, f"walk {b}") for b in range(job.start, job.stop)]
    advance = _advance(problem, job, rate, name)
    spread = np.repeat(covariance[None], len(here), axis=0)
    tuning = Tuning(here, spread, np.full(len(here), np.log(2.38 / np.sqrt(d))), 10.0 * d + WINDOW)
    for k in range(-(-burn // WINDOW)):
        states, _, accepted = advance(here, tuning.roots, *_chance(streams, WINDOW, d), 1)
        here, tuning = states[:, -1], tuning.after(states, accepted, 2 / np.sqrt(1 + k))
    roots, parts = tuning.roots, []
    for done in range(0, N, PIECE):
        steps = min(PIECE, N - done) * every
        states, losses, _ = advance(here, roots, *_chance(streams, steps, d), every)
        here = states[:, -1]
        parts.append(np.concatenate([states, losses[..., None]], axis=2))
    return np.concatenate(parts, axis=1)


def _chance(streams: list[np.random.Generator], steps: int, d: int) -> tuple[ndarray, ndarray]:
    """Noise (C, S, d) and logs of coins (C, S): each chain's from its own stream."""
    noise = np.stack([s.standard_normal((steps, d)) for s in streams])
    return noise, np.log(np.stack([s.random(steps) for s in streams]))


def _advance(problem: Problem, job: slice, rate: float, name: str) -> Advance:
    """How the chains of a job advance: (here, roots, noise, log_coins, every) -> `walk`'s."""
    posterior, weights = problem.posterior, problem.weights[job].astype(float)
    risk = posterior.risk
    if not isinstance(risk, LinearRisk):
        return partial(_kept_steps, problem, weights, rate, name, itertools.count())
    from hakari.inference.gibbs.walk_kernel import prior_arrays, walk

    weights = weights if risk.weights is None else weights * risk.weights
    at, prior = posterior.minimiser, prior_arrays(posterior.blocks, len(risk.names))
    loss = (risk.loss.kind, risk.loss.shape, risk.y, risk.columns)
    return partial(walk, *loss, weights, at, prior, rate)


def _kept_steps(
    problem: Problem,
    weights: ndarray,
    rate: float,
    name: str,
    number: Iterator[int],
    here: ndarray,
    roots: ndarray,
    noise: ndarray,
    log_coins: ndarray,
    every: int,
) -> tuple[ndarray, ndarray, ndarray]:
    """As `_lock_step`, in pieces that are kept: the noise is the seed's, and drawn again.

    number: of the next piece of these chains.
    """
    size, parts = max(1, KEPT // every) * every, []
    loss = np.empty(0)
    for s in range(0, noise.shape[1], size):
        chance = noise[:, s : s + size], log_coins[:, s : s + size]
        steps = partial(_lock_step, problem, weights, rate, here, loss, roots, *chance, every)
        parts.append(problem.cache.part(name, next(number), steps))
        here, loss = parts[-1][:, -1, :-2], parts[-1][:, -1, -2]
    found = np.concatenate(parts, axis=1)
    accepted = sum(part[:, -1, -1] for part in parts)
    return found[..., :-2], found[..., -2], np.asarray(accepted / noise.shape[1])


def _lock_step(
    problem: Problem,
    weights: ndarray,
    rate: float,
    here: ndarray,
    loss: ndarray,
    roots: ndarray,
    noise: ndarray,
    log_coins: ndarray,
    every: int,
) -> Float[ndarray, "C S/every d+2"]:
    """States as of `walk`, their losses, and the steps so far that were accepted.

    All chains together: one call of the loss a step. loss (C,): that of `here`, or empty.
    """
    C, S, d = noise.shape
    log_prior = problem.posterior.log_prior
    out, count = np.empty((C, S // every, d + 2)), np.zeros(C)
    loss = loss if len(loss) else _losses(problem, weights, here)
    density = log_prior(here)
    for s in range(S):
        there = here + np.einsum("cde,ce->cd", roots, noise[:, s])
        other, other_density = _losses(problem, weights, there), log_prior(there)
        yes = log_coins[:, s] < rate * (loss - other) + other_density - density
        here, loss = np.where(yes[:, None], there, here), np.where(yes, other, loss)
        density, count = np.where(yes, other_density, density), count + yes
        if (s + 1) % every == 0:
            out[:, s // every] = np.column_stack([here, loss, count])
    return out


def _losses(problem: Problem, weights: ndarray, theta: ndarray) -> Float[ndarray, " C"]:
    """Each data set's loss at its own θ, less that at θ̂."""
    risk, at = problem.posterior.risk, problem.posterior.minimiser
    step = max(1, AT_ONCE // risk.n)
    rows = (slice(i, i + step) for i in range(0, len(theta), step))
    return np.concatenate(
        [np.einsum("cn,cn->c", weights[r], risk.excess(theta[r], at)) for r in rows]
    )


def _form(problem: Problem, rate: float) -> tuple[Float[ndarray, "B d"], Float[ndarray, "d d"]]:
    """Where the chains start, and a covariance of all of them."""
    posterior = problem.posterior
    if problem.placed is not None:
        share, minimisers = problem.placed.share, problem.placed.minimisers
        return posterior_form(posterior, rate, share, minimisers)
    theta = posterior.minimiser
    steps = sampling_steps(posterior.risk, theta, np.eye(len(theta)))
    return np.repeat(theta[None], len(problem.weights), axis=0), np.diag(steps**2)
