"""Particles of all bootstrap posteriors without simulating any of them.

`cloud`: one set of particles for all data sets. Its losses by rows (N, n), times the weights of
the data sets (B, n), are all losses at once: one matrix product. `shift`: a set of its own for
each data set, around that set's own minimum, for dimensions and data sets out of the cloud's
reach. Both are importance samples of the exact posteriors (gibbs-calibration.md section 1.10).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import joblib
import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import gammaincinv, ndtri
from scipy.stats import qmc

from hakari.inference.gibbs.cached_losses import Cache, digest
from hakari.inference.gibbs.particles import Particles
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.risk import LinearRisk
from hakari.inference.workers import workers

WIDTH = {1: 5.3, 2: 4.4, 3: 4.0, 5: 3.6, 10: 3.2}  # variance of the cloud over the posterior's
BLOCK = 2**25  # losses of single rows that are held at once: 128 MB
BATCHES = 4  # of particles, each a sample of its own
JOB = 16  # data sets in one task of a worker, at most
SECOND = 2**28  # losses of single rows that a compiled loss takes in a second or less
POINTS = 64  # θ at which a custom function is called before what it gave is kept


@dataclass(frozen=True)
class Centres:
    """Where the bootstrap posteriors lie, to first order: θ̂_b, and the spread of θ̂_b.

    share: weight of a data set over n, below 1 for m-out-of-n.
    """

    minimisers: Float[ndarray, "B d"]
    spread: Float[ndarray, "d d"]
    share: float


def first_order(posterior: GibbsPosterior, weights: Float[ndarray, "B n"]) -> Centres:
    """Minimisers of the data sets by one Newton step from θ̂; they need not be exact."""
    found = posterior.sandwich
    scores = posterior.risk.scores(posterior.minimiser)
    share = float(weights.sum(axis=1, dtype=float).mean()) / posterior.risk.n
    pull = weights.astype(float) @ (scores - scores.mean(axis=0)) / share
    steps = -pull @ found.bread
    return Centres(posterior.minimiser + steps, np.asarray(steps.T @ steps / len(steps)), share)


def posterior_form(
    posterior: GibbsPosterior, rate: float, share: float, minimisers: Float[ndarray, "B d"]
) -> tuple[Float[ndarray, "B d"], Float[ndarray, "d d"]]:
    """Gaussian approximation of each posterior: means (B, d) and the covariance of all."""
    precision = rate * share * posterior.sandwich.curvature
    pull = minimisers @ precision
    for block in posterior.blocks:
        precision = precision + block.root.T @ block.root
        pull = pull + block.root.T @ block.centre
    covariance = np.linalg.inv(precision)
    return np.asarray(pull @ covariance), covariance


def cloud(
    posterior: GibbsPosterior,
    weights: Float[ndarray, "B n"],
    centres: Centres,
    rate: float,
    noise: Float[ndarray, "N d+1"],
    cache: Cache,
) -> Particles:
    """One set of particles for all data sets. noise: of `uniforms`."""
    d = len(posterior.parameters)
    mean, covariance = posterior_form(posterior, rate, centres.share, posterior.minimiser[None])
    width = float(np.interp(d, [*WIDTH], [*WIDTH.values()]))
    spread = covariance + (width - 1) * centres.spread
    offsets, log_proposal = student(noise, np.linalg.cholesky(spread), degrees(d))
    theta = mean + offsets
    step = max(POINTS, BLOCK // posterior.risk.n)
    name = digest("cloud", theta)
    parts = [
        cache.kept(
            f"{name} {i}",
            partial(_products, posterior, weights, theta[i : i + step], cache, f"{name} {i}"),
        )
        for i in range(0, len(theta), step)
    ]
    return Particles(
        np.repeat(mean, len(weights), axis=0),
        offsets[None],
        np.concatenate(parts, axis=1),
        (posterior.log_prior(theta) - posterior.log_prior(posterior.minimiser))[None],
        log_proposal[None],
        posterior.minimiser,
    )


def shift(
    posterior: GibbsPosterior,
    weights: Float[ndarray, "B n"],
    centres: Float[ndarray, "B d"],
    covariance: Float[ndarray, "d d"],
    noise: Float[ndarray, "N d+1"],
    cache: Cache,
) -> Particles:
    """Particles around each data set's own centre, all with the same offsets."""
    offsets, log_proposal = student(noise, np.linalg.cholesky(covariance), degrees(len(covariance)))
    theta = centres[:, None] + offsets
    jobs = tasks(posterior, len(weights), len(offsets))
    name = digest("shift", offsets)
    parts = joblib.Parallel(n_jobs=workers(len(jobs)), prefer="threads")(
        joblib.delayed(cache.kept)(
            cache.name(name, centres[job], weights[job]),  # other data sets may have these centres
            partial(_losses, posterior, weights[job], theta[job]),
        )
        for job in jobs
    )
    return Particles(
        centres,
        offsets[None],
        np.concatenate(list(parts)),
        posterior.log_prior(theta) - posterior.log_prior(posterior.minimiser),
        log_proposal[None],
        posterior.minimiser,
    )


def _products(
    posterior: GibbsPosterior, weights: ndarray, theta: ndarray, cache: Cache, name: str
) -> ndarray:
    """Losses of the data sets at θ. Those of the rows are kept on the way if a function's."""
    risk, at = posterior.risk, posterior.minimiser
    if isinstance(risk, LinearRisk):
        return np.asarray(weights @ risk.excess(theta, at).T)
    rows = np.empty((len(theta), risk.n), dtype=np.float32)
    for number, i in enumerate(range(0, len(theta), POINTS)):
        some = slice(i, i + POINTS)
        rows[some] = cache.part(name, number, partial(risk.excess, theta[some], at))
    return np.asarray(weights @ rows.T)


def _losses(posterior: GibbsPosterior, weights: ndarray, theta: ndarray) -> ndarray:
    """Each data set's loss at its own particles, less that at θ̂."""
    out = np.empty(theta.shape[:2], dtype=np.float32)
    for b, (w, points) in enumerate(zip(weights.astype(float), theta, strict=True)):
        both = np.concatenate([points, posterior.minimiser[None]])
        total = posterior.risk.totals(both, w)
        out[b] = total[:-1] - total[-1]
    return out


def tasks(posterior: GibbsPosterior, B: int, points: int) -> list[slice]:
    """Data sets in tasks of about a second, which is what an interruption loses.

    points: θ at which each data set's loss is taken. A data set a task where that is a custom
    function's, whose time is not known.
    """
    size = 1
    if isinstance(posterior.risk, LinearRisk):
        size = min(max(1, SECOND // (points * posterior.risk.n)), JOB)
    return [slice(i, min(i + size, B)) for i in range(0, B, size)]


# --- proposals ------------------------------------------------------------------------------


def degrees(d: int) -> float:
    """Degrees of freedom of the Student proposals: heavy tails where they cost little."""
    return float(max(5, d))


def uniforms(N: int, d: int, seed: int) -> Float[ndarray, "N d+1"]:
    """Sobol points in `BATCHES` independent scrambles, one after the other; N a power of 2.

    Evener than independent points, each one uniform; the scrambles' disagreement is their error.
    """
    chance = np.random.SeedSequence([seed, d, N]).spawn(BATCHES)
    parts = [qmc.Sobol(d + 1, rng=np.random.default_rng(c)).random(N // BATCHES) for c in chance]
    return np.asarray(np.clip(np.concatenate(parts), 1e-12, 1 - 1e-12))


def student(
    noise: Float[ndarray, "N d+1"], root: Float[ndarray, "d d"], df: float
) -> tuple[Float[ndarray, "N d"], Float[ndarray, " N"]]:
    """Student offsets with covariance-like scale root root', and their log density."""
    normal = ndtri(noise[:, :-1])
    stretch = np.sqrt(df / (2 * gammaincinv(df / 2, noise[:, -1])))
    z = normal * stretch[:, None]
    d = z.shape[1]
    return z @ root.T, -0.5 * (df + d) * np.log1p((z**2).sum(axis=1) / df)
