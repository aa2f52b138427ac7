"""Routes to the joint posterior of impulse responses: hakari's, NumPyro's NUTS and localproj's.

And the system that local_projections.py measures them on. Each route takes a `ProjectionPosterior`
and a seed, and gives a `Run`; peers are imported when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray

import hakari.inference as hi
from hakari.inference.projection_sampling import log_densities

LAGS, BURN = 12, 500
ROOTS = (0.97, 0.95, 0.9, 0.8, 0.7)  # the largest of each variable
NAMES = tuple(f"v{k}" for k in range(1, len(ROOTS) + 1))
CHAINS = 4
BLOCK = 1000  # draws whose density is evaluated at a time, as `sample` does
JITTER = 0.1  # of NUTS' starts, in posterior standard deviations


@dataclass(frozen=True)
class Run:
    """Draws theta (chains, draws, Q) and what they cost.

    seconds: of sampling; warmup: before, compiled; density: of `seconds`, for densities that the
    moves did not need; total: of the call, with compilation. same_target: see the module.
    """

    theta: ndarray
    seconds: float
    warmup: float
    total: float
    density: float = 0.0
    same_target: bool = True


# --- the system --------------------------------------------------------------------------


def simulate(length: int, seed: int) -> pd.DataFrame:
    """A VAR(12) of v1 to v5 and its first structural shock, a column `shock`.

    Each variable has a root of `ROOTS` and a ring of eleven of modulus 0.7, and feels all later
    ones, with weights that fade over lags: the roots are those of the diagonal.
    """
    K = len(ROOTS)
    ring = 0.7 * np.exp(2j * np.pi * np.arange(1, LAGS) / LAGS)
    lags = 0.1 * (0.7 ** np.arange(LAGS))[:, None, None] * np.triu(np.ones((K, K)), 1)
    lags *= np.where(np.add.outer(np.arange(K), np.arange(K)) % 2, -1.0, 1.0)
    for k, root in enumerate(ROOTS):
        lags[:, k, k] = -np.poly(np.append(ring, root))[1:].real
    e = np.random.default_rng(seed).standard_normal((BURN + length, K))
    x = e @ (np.eye(K) + 0.3).T
    flat = np.concatenate(lags, axis=1)
    for t in range(LAGS, len(x)):
        x[t] += flat @ x[t - LAGS : t][::-1].ravel()
    return pd.DataFrame(x[BURN:], columns=list(NAMES)).assign(shock=e[BURN:, 0])


def project(data: pd.DataFrame, H: int, J: int) -> hi.LocalProjection:
    """The first J variables' responses; lags of all are controls."""
    return hi.LocalProjection(
        data, NAMES[:J], "shock", controls=NAMES[J:], lags=LAGS, horizons=H, shock_lags=0
    )


# --- routes ------------------------------------------------------------------------------


def kernel(
    method: Any, draws: int, warmup: int | None, posterior: hi.ProjectionPosterior, seed: int
) -> Run:
    """One of hakari's; the density of each draw, which `sample` reports, is timed again."""
    began = perf_counter()
    result = hi.sample(posterior, method, draws=draws, chains=CHAINS, seed=seed, warmup=warmup)
    total = perf_counter() - began
    theta = result["posterior"]["theta"].values
    began = perf_counter()
    for chain in theta:
        for start in range(0, draws, BLOCK):
            log_densities(posterior, chain[start : start + BLOCK])
    density = perf_counter() - began
    spent = result.attrs
    return Run(theta, spent["sampling_seconds"], spent["warmup_seconds"], total, density)


def nuts(
    centred: bool, warmup: int, draws: int, posterior: hi.ProjectionPosterior, seed: int
) -> Run:
    """NumPyro's NUTS with a dense mass matrix, compiled ahead, chains one after the other."""
    began = perf_counter()
    import jax
    from peers import _numpyro, _timed

    jax.config.update("jax_enable_x64", True)
    log_density, to_path, start = _coordinates(posterior.paths[0], centred)
    starts = start + JITTER * np.random.default_rng(seed).standard_normal((CHAINS, len(start)))
    begin, adapt, sample = _numpyro(log_density, 0.8, warmup, draws)
    keys = jax.random.split(jax.random.PRNGKey(seed), CHAINS)
    adapt, sample = (jax.jit(partial(jax.lax.map, work)) for work in (adapt, sample))
    states, adapted = _timed(adapt, begin(keys, starts))
    x, seconds = _timed(sample, states)
    theta = np.asarray(to_path(np.asarray(x)))
    return Run(theta, seconds, adapted, perf_counter() - began)


def _coordinates(
    path: Any, centred: bool
) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Any]:
    """(log density of x (D,), path (..., q) at x (..., D), a start); the last entry is log τ.

    Centred: x = (β − mean)/sd. Not centred: β = free a + root⁺ τ u, u ~ N(0, 1), `free` the
    directions that the differences leave alone, in posterior standard deviations too.
    """
    import jax.numpy as jnp

    form, (mean, sd) = path.form, path.moments
    nodes, density = path.tau_grid
    t0 = nodes[np.argmax(density)]
    r, spread = len(form.root), np.linalg.pinv(form.root)
    free = np.linalg.svd(form.root)[2][r:].T * np.median(sd)
    estimate, weight, fixed = (jnp.asarray(v) for v in (path.estimate, path.weight, form.fixed))

    def to_path(x: Any) -> Any:
        if centred:
            return mean + sd * x[..., :-1]
        smooth = x[..., -r - 1 : -1] * jnp.exp(x[..., -1:])
        return x[..., : -r - 1] @ free.T + smooth @ spread.T

    def log_density(x: Any) -> Any:
        beta, log_tau = to_path(x), x[-1]
        bend = (form.root @ beta) * jnp.exp(-log_tau) if centred else x[-r - 1 : -1]
        gap, shifted = beta - estimate, 2 * (log_tau - np.log(form.scale))
        value = -0.5 * (gap @ weight @ gap + beta @ fixed @ beta + bend @ bend)
        value = value + 0.5 * shifted - jnp.logaddexp(0.0, shifted)
        return value - r * log_tau if centred else value  # dβ = τ^r da du

    if centred:
        return log_density, to_path, np.append(np.zeros(len(mean)), t0)
    away = np.linalg.lstsq(free, mean, rcond=None)[0]
    return log_density, to_path, np.concatenate([away, form.root @ mean * np.exp(-t0), [t0]])


def su_lp(
    data: pd.DataFrame, burnin: int, draws: int, posterior: hi.ProjectionPosterior, seed: int
) -> Run:
    """Bayesian SU-LP by localproj, of the same regressions, with its default prior."""
    import localproj

    H = posterior.projection.question.horizons[-1]
    lags = " + ".join(f"l({name}, 1:{LAGS})" for name in NAMES)
    options = {"draws": draws, "burnin": burnin, "chains": CHAINS, "seed": seed}
    began = perf_counter()
    found = localproj.lp(
        f"{NAMES[0]} ~ shock + {lags}", data, shock="shock", horizons=H, sample="common",
        estimator="bayesian_sulp", sulp={**options, "store_standardized": False},
    )  # fmt: skip
    total = perf_counter() - began
    seconds = found.metadata["sulp"]["mcmc"]["elapsed_seconds"] * draws / (draws + burnin)
    theta = found.posterior.beta_draws[:, :, 0]
    return Run(theta, seconds, total - seconds, total, same_target=False)
