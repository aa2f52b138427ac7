"""`smc`: particles tempered in the learning rate, from the prior up; one independent run a chain.

Del Moral, Doucet and Jasra (2006). Rungs: the next rate is the one at which the effective size is
half of the particles (Jasra et al., 2011), which are then resampled (systematic) and moved by a
random walk of their own covariance until the mean squared jump from where they stood no longer
rises. Where some coefficient has a flat prior the path starts at a Student reference r around the
Gaussian form instead: r^(1−t) (exp(−η loss) prior)^t, so that t η is the learning rate where the
reference is the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lgamma, log, pi
from typing import Any

import joblib
import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.gibbs.lockstep import walk
from hakari.inference.gibbs.risk import LinearRisk
from hakari.inference.gibbs.target import Target, free_positions
from hakari.inference.prior import prior_draws
from hakari.inference.workers import workers

LEAST = 1000  # particles of a run
SHARE = 0.5  # of the particles, effective, at the next rung
DF = 5.0  # of the reference under a flat prior
STILL = 1.05  # rise of the mean squared jump in d moves up to which it counts as settled
SWEEPS = 25  # of d moves at a rung, at most
JOB = 256  # particles in one task of a worker: fixed, so that sums do not depend on workers
WORTH = 10**7  # numbers read in an evaluation from which workers are asked

Evaluate = Callable[[ndarray], ndarray]


@dataclass(frozen=True)
class Cloud:
    """Equally weighted particles, at share t of the way from the reference to the posterior.

    log_start (N,): log density of the reference; log_density: of the posterior, not normalised;
    accepted: whether the last move was.
    """

    u: Float[ndarray, "N d"]
    log_start: Float[ndarray, " N"]
    log_density: Float[ndarray, " N"]
    accepted: ndarray

    def taken(self, index: ndarray) -> Cloud:
        """The particles of an index."""
        return Cloud(*(a[index] for a in vars(self).values()))

    def log_path(self, t: float) -> Float[ndarray, " N"]:
        """Log density of the rung t > 0."""
        return np.asarray((1 - t) * self.log_start + t * self.log_density)


@dataclass(frozen=True)
class Run:
    """Particles of the posterior, and how they came there.

    log_normaliser: log ∫ exp(−η loss) prior. settled: whether jumps stopped rising at every rung.
    """

    cloud: Cloud
    log_normaliser: float
    rungs: int
    moves: int
    settled: bool


def reference_of(target: Target) -> str:
    """What the path starts from, in words."""
    return "a Student reference" if free_positions(target.posterior) else "the prior"


def temper(
    target: Target, particles: int, streams: dict[str, Generator], tick: Callable[[float], Any]
) -> Run:
    """One run. tick: told the share of the way that each rung goes."""
    cloud = _start(target, particles, streams)
    t, log_normaliser, rungs, moves, settled = 0.0, 0.0, 0, 0, True
    log_size = log(walk.first(target.d))
    while t < 1:
        gain = cloud.log_density - cloud.log_start
        ahead = next_rung(gain, 1 - t)
        weight, increment = reweighted(gain, ahead)
        t, log_normaliser = t + ahead if ahead < 1 - t else 1.0, log_normaliser + increment
        root = _root(cloud.u, weight)
        cloud = cloud.taken(systematic(weight, float(streams["start"].random())))
        cloud, log_size, sweeps, still = _moved(target, cloud, t, root, log_size, streams)
        rungs, moves, settled = rungs + 1, moves + sweeps * target.d, settled and still
        tick(ahead)
    return Run(cloud, log_normaliser, rungs, moves, settled)


def next_rung(gain: Float[ndarray, " N"], left: float) -> float:
    """The step, at most `left`, at which the effective size is `SHARE` of the particles."""
    wanted = SHARE * np.isfinite(gain).sum()
    low, high = log(left) - 200.0, log(left)
    if _effective(gain * left) >= wanted:
        return left
    for _ in range(60):
        middle = (low + high) / 2
        enough = _effective(gain * np.exp(middle)) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return float(np.exp(low))


def reweighted(gain: Float[ndarray, " N"], ahead: float) -> tuple[Float[ndarray, " N"], float]:
    """Normalised weights of a step, and the log of the mean weight."""
    top = float((gain * ahead).max())
    weight = np.exp(gain * ahead - top)
    return weight / weight.sum(), top + float(np.log(weight.mean()))


def systematic(weight: Float[ndarray, " N"], coin: float) -> ndarray:
    """Indices (N,) of a systematic resampling; equal ones stand side by side."""
    N = len(weight)
    edges = np.cumsum(weight)
    return np.searchsorted(edges / edges[-1], (np.arange(N) + coin) / N)


# --- parts --------------------------------------------------------------------------------


def _start(target: Target, N: int, streams: dict[str, Generator]) -> Cloud:
    noise = streams["start"].standard_normal((N, target.d))
    if free_positions(target.posterior):
        u = noise * np.sqrt(DF / streams["tail"].chisquare(DF, N))[:, None]
    else:
        df = [block.df for block in target.posterior.blocks]
        chi2 = [streams["tail"].chisquare(f, N) / f if np.isfinite(f) else np.ones(N) for f in df]
        theta = prior_draws(target.posterior.blocks, noise, np.column_stack(chi2))
        u = np.linalg.solve(target.factor, (theta - target.centre).T).T
    cloud = Cloud(u, _log_start(target, u), _evaluated(target, u), np.ones(N, dtype=bool))
    if not np.isfinite(cloud.log_density).any():
        raise ValueError(
            f"the {target.posterior.risk.loss.name} loss has no finite value at {N} draws of "
            f"{reference_of(target)}: give a tighter prior"
        )
    return cloud


def _log_start(target: Target, u: Float[ndarray, "N d"]) -> Float[ndarray, " N"]:
    """Log density of the reference, in θ."""
    if not free_positions(target.posterior):
        return target.posterior.log_prior(target.theta(u))
    d = target.d
    constant = lgamma((DF + d) / 2) - lgamma(DF / 2) - 0.5 * d * log(DF * pi)
    constant -= float(np.linalg.slogdet(target.factor)[1])
    return np.asarray(constant - 0.5 * (DF + d) * np.log1p((u**2).sum(axis=1) / DF))


def _evaluated(target: Target, u: Float[ndarray, "N d"]) -> Float[ndarray, " N"]:
    """Log density of all particles; of compiled losses in tasks for workers."""
    risk = target.posterior.risk
    if not isinstance(risk, LinearRisk):
        return target.log_density(u)
    parts = [u[i : i + JOB] for i in range(0, len(u), JOB)]
    worth = len(u) * risk.n * target.d > WORTH
    jobs = workers(len(parts)) if worth else 1
    if jobs == 1:
        return np.concatenate([target.log_density(part) for part in parts])
    work = joblib.delayed(target.log_density)
    found = joblib.Parallel(jobs, prefer="threads")(work(part) for part in parts)
    return np.concatenate(list(found))


def _effective(log_weight: Float[ndarray, " N"]) -> float:
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / (weight**2).sum())


def _root(u: Float[ndarray, "N d"], weight: Float[ndarray, " N"]) -> Float[ndarray, "d d"]:
    """Lower factor of the weighted covariance."""
    away = u - weight @ u
    spread = (away * weight[:, None]).T @ away
    size = np.sqrt(np.diag(spread))
    scaled = spread / np.multiply.outer(size, size)
    ridge = 1e-8 * np.eye(len(size))
    return np.asarray(size[:, None] * np.linalg.cholesky(scaled + ridge))


def _moved(
    target: Target,
    cloud: Cloud,
    t: float,
    root: Float[ndarray, "d d"],
    log_size: float,
    streams: dict[str, Generator],
) -> tuple[Cloud, float, int, bool]:
    """The cloud after sweeps of d moves, until they lead no further away; (…, settled)."""
    begin, inverse = cloud.u, np.linalg.inv(root)
    last = 0.0
    for sweep in range(1, SWEEPS + 1):
        for _ in range(target.d):
            noise = streams["noise"].standard_normal(cloud.u.shape)
            coins = streams["coins"].random(len(cloud.u))
            cloud, rate = moved(target, cloud, t, np.exp(log_size) * root, noise, coins)
            log_size += rate - walk.goal(target.d)
        jump = float((((cloud.u - begin) @ inverse.T) ** 2).mean())
        if jump < STILL * last:
            return cloud, log_size, sweep, True
        last = jump
    return cloud, log_size, SWEEPS, False


def moved(
    target: Target,
    cloud: Cloud,
    t: float,
    factor: Float[ndarray, "d d"],
    noise: Float[ndarray, "N d"],
    coins: Float[ndarray, " N"],
) -> tuple[Cloud, float]:
    """One random-walk move of every particle at rung t, and the mean acceptance probability."""
    u = cloud.u + noise @ factor.T
    there = Cloud(u, _log_start(target, u), _evaluated(target, u), cloud.accepted)
    gain = np.minimum(there.log_path(t) - cloud.log_path(t), 0.0)
    accepted = np.log(coins) < gain
    pairs = zip(vars(there).values(), vars(cloud).values(), strict=True)
    kept = [np.where(accepted.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs]
    return Cloud(kept[0], kept[1], kept[2], accepted), float(np.exp(gain).mean())


def joined(runs: Sequence[Run], draws: int) -> tuple[ndarray, ndarray, ndarray]:
    """(u (C, draws, d), log density, accepted) of runs: evenly spaced particles of each."""
    index = np.floor((np.arange(draws) + 0.5) * len(runs[0].cloud.u) / draws).astype(int)
    clouds = [run.cloud.taken(index) for run in runs]
    u = np.stack([c.u for c in clouds])
    return u, np.stack([c.log_density for c in clouds]), np.stack([c.accepted for c in clouds])
