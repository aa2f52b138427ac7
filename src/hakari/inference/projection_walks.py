"""The chains that move step by step: `gibbs`, `da-approx` and `mh` of projection_sampling.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numba import njit
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.path_prior import PathForm
from hakari.inference.projection_posterior import ProjectionPosterior
from hakari.inference.projection_sampling import (
    Chain,
    PathDraws,
    correction,
    log_densities,
    slices,
)
from hakari.inference.quasi_path import QuasiPath

TARGET = 0.3  # acceptance that `da-approx` tunes its step for
EVERY = 50  # iterations between adaptations


def tuned(posterior: ProjectionPosterior, method: str, chain: Chain, warmup: int) -> Chain:
    """The chain ready to walk: its kernel's state made, and tuned by `warmup` iterations.

    Raises ValueError where a kernel does not fit the posterior.
    """
    if posterior.weighting == "continuous" and method != "gibbs":
        raise ValueError(
            f"method {method!r} is for weighting='frozen': use 'concentrated' or 'gibbs', or "
            "sample QuasiPosterior(lp.moments(RESPONSE)) with any kernel"
        )
    J = len(posterior.paths)
    if method == "gibbs":
        return replace(chain, state=(np.ones(J),))  # the half-Cauchy's auxiliary variable
    if method == "da-approx":
        streams = chain.streams
        multipliers = streams["noise"].standard_normal((J, len(posterior.noise_root)))
        chain = replace(chain, state=(multipliers, np.ones(J), np.full(J, 0.5)))
        chain = replace(chain, path=_paths_of(posterior, multipliers))
        for _ in range(max(1, warmup // EVERY)):
            chain, draws = walk(posterior, method, chain, EVERY)
            chain = replace(chain, state=(*chain.state[:2], _retuned(chain.state[2], draws)))
        return chain
    return _begin_walk(posterior, chain, warmup)


def walk(
    posterior: ProjectionPosterior, method: str, chain: Chain, size: int
) -> tuple[Chain, PathDraws]:
    """`size` iterations of a kernel that keeps a state."""
    step = {"gibbs": _gibbs, "da-approx": _multipliers}.get(method)
    if step is None:
        return _adaptive(posterior, chain, size)
    J = len(posterior.paths)
    theta, tau = np.empty((size, len(chain.path))), np.empty((size, J))
    accepted = np.empty((size, J), dtype=bool)
    for i in range(size):
        chain, accepted[i] = step(posterior, chain)
        theta[i], tau[i] = chain.path, chain.log_tau
    return chain, PathDraws(theta, tau, log_densities(posterior, theta), accepted)


# --- gibbs --------------------------------------------------------------------------------


def _gibbs(posterior: ProjectionPosterior, chain: Chain) -> tuple[Chain, ndarray]:
    """Path given smoothness (a Metropolis step where weighting is continuous), then the reverse."""
    streams = chain.streams
    noise = streams["noise"].standard_normal(len(posterior.noise_root)) @ posterior.noise_root
    path, log_tau, weight = chain.path.copy(), chain.log_tau.copy(), chain.log_weight.copy()
    auxiliary, accepted = chain.state[0].copy(), np.ones(len(posterior.paths), dtype=bool)
    for j, part in enumerate(slices(posterior)):
        one = posterior.paths[j]
        error = noise[None, part] / np.sqrt(one.precision)
        if one.form is None:
            proposal = one.estimate + error
        else:
            proposal = one.posterior_step(
                log_tau[j : j + 1],
                error,
                streams["wide"].standard_normal((1, len(one.form.root))),
                streams["wide tail"].standard_normal((1, len(one.estimate))),
            )
        if posterior.weighting == "continuous":
            here = float(correction(posterior, j, path[None, part])[0])
            there = float(correction(posterior, j, proposal)[0])
            accepted[j] = np.log(streams["coins"].random()) < there - here
        if accepted[j]:
            path[part] = proposal[0]
        if one.form is not None and one.form.sampled:
            log_tau[j], auxiliary[j] = _smoothness(
                one.form, path[part], log_tau[j], auxiliary[j], streams["start"]
            )
    moved = replace(chain, path=path, log_tau=log_tau, log_weight=weight, state=(auxiliary,))
    return moved, accepted


def _smoothness(
    form: PathForm, path: Float[ndarray, " q"], log_tau: float, auxiliary: float, chance: Generator
) -> tuple[float, float]:
    """(log τ, auxiliary) given the path: conjugate, for gamma and half-Cauchy priors.

    Half-Cauchy as a mixture of inverse gammas: Makalic and Schmidt (2016), eq. 3.
    """
    rough = 0.5 * float(((form.root @ (path - form.mean)) ** 2).sum())
    half = 0.5 * len(form.root)
    if form.smoothness == "gamma":
        precision = chance.gamma(form.shape + half) / (form.rate + rough)
        return -0.5 * float(np.log(precision)), auxiliary
    rate = 1 / form.scale**2 + float(np.exp(-2 * log_tau))
    auxiliary = rate / chance.gamma(1.0)
    precision = chance.gamma(half + 0.5) / (1 / auxiliary + rough)
    return -0.5 * float(np.log(precision)), auxiliary


# --- da-approx: multipliers ------------------------------------------------------------------


def _multipliers(posterior: ProjectionPosterior, chain: Chain) -> tuple[Chain, ndarray]:
    """θ = θ̂ + Ψ'ξ: an autoregression of ξ keeps the frozen quasi-likelihood, the prior screens."""
    streams = chain.streams
    multipliers, auxiliary, step = chain.state
    fresh = streams["noise"].standard_normal(multipliers.shape)
    keep = np.sqrt(1 - step**2)[:, None]
    proposed = keep * multipliers + step[:, None] * fresh
    theta = _paths_of(posterior, proposed)
    coins = np.log(streams["coins"].random(len(step)))
    path, log_tau, auxiliary = chain.path.copy(), chain.log_tau.copy(), auxiliary.copy()
    accepted = np.ones(len(step), dtype=bool)
    for j, part in enumerate(slices(posterior)):
        form = posterior.paths[j].form
        if form is not None:
            both = np.stack([path[part], theta[part]])
            density = form.log_path(both, np.repeat(log_tau[j], 2))
            accepted[j] = coins[j] < density[1] - density[0]
        if accepted[j]:
            path[part] = theta[part]
        if form is not None and form.sampled:
            log_tau[j], auxiliary[j] = _smoothness(
                form, path[part], log_tau[j], auxiliary[j], streams["start"]
            )
    kept = np.where(accepted[:, None], proposed, multipliers)
    return replace(chain, path=path, log_tau=log_tau, state=(kept, auxiliary, step)), accepted


def _paths_of(
    posterior: ProjectionPosterior, multipliers: Float[ndarray, "J r"]
) -> Float[ndarray, " Q"]:
    """θ̂ + Ψ'ξ of each response with its own ξ."""
    out = np.empty(len(posterior.names))
    for j, part in enumerate(slices(posterior)):
        path = posterior.paths[j]
        error = multipliers[j] @ posterior.noise_root[:, part]
        out[part] = path.estimate + error / np.sqrt(path.precision)
    return out


def _retuned(step: ndarray, draws: PathDraws) -> ndarray:
    """Longer steps where more than `TARGET` were accepted, shorter otherwise."""
    rate = draws.accepted.mean(axis=0)
    return np.asarray(np.clip(step * np.exp(rate - TARGET), 1e-3, 1.0))


# --- mh -----------------------------------------------------------------------------------


def _begin_walk(posterior: ProjectionPosterior, chain: Chain, warmup: int) -> Chain:
    """Covariance of the walk: of the Gaussian approximation, then of the chain's own past."""
    roots = []
    for path in posterior.paths:
        size = len(path.estimate) + (path.form is not None and path.form.sampled)
        root = np.eye(size)
        root[: len(path.estimate), : len(path.estimate)] = np.diag(path.moments[1])
        roots.append(root * 2.38 / np.sqrt(size))
    chain = replace(chain, state=tuple(roots))
    for _ in range(8):
        moved, draws = _adaptive(posterior, chain, max(1, warmup // 8))
        chain = replace(moved, state=tuple(_learned(posterior, draws, roots)))
    return chain


def _learned(
    posterior: ProjectionPosterior, draws: PathDraws, first: list[ndarray]
) -> list[ndarray]:
    out = []
    for j, part in enumerate(slices(posterior)):
        size = len(first[j])
        values = draws.theta[:, part]
        if size > values.shape[1]:
            values = np.column_stack([values, draws.log_tau[:, j]])
        own = np.atleast_2d(np.cov(values.T)) + 1e-10 * np.diag(values.var(axis=0) + 1e-12)
        if len(values) > 2 * size and draws.accepted[:, j].mean() > 0.01:
            rate = draws.accepted[:, j].mean()
            scale = 2.38 / np.sqrt(size) * np.exp(min(rate - 0.234, 0.5))
            out.append(np.linalg.cholesky(own) * scale)
        else:
            out.append(first[j] * (0.3 if draws.accepted[:, j].mean() < 0.1 else 1.0))
        first[j] = out[-1]
    return out


def _adaptive(posterior: ProjectionPosterior, chain: Chain, size: int) -> tuple[Chain, PathDraws]:
    """A random walk on (β, log τ) of each response."""
    J = len(posterior.paths)
    theta, tau = np.empty((size, len(chain.path))), np.zeros((size, J))
    accepted = np.empty((size, J), dtype=bool)
    for j, part in enumerate(slices(posterior)):
        root = chain.state[j]
        noise = chain.streams["noise"].standard_normal((size, len(root)))
        coins = np.log(chain.streams["coins"].random(size))
        values, accepted[:, j] = _random_walk(
            np.append(chain.path[part], chain.log_tau[j]),
            np.ascontiguousarray(root),
            noise,
            coins,
            *_arrays(posterior.paths[j]),
        )
        theta[:, part], tau[:, j] = values[:, :-1], values[:, -1]
    moved = replace(chain, path=theta[-1], log_tau=tau[-1])
    return moved, PathDraws(theta, tau, log_densities(posterior, theta), accepted)


def _arrays(path: QuasiPath) -> tuple[ndarray, ndarray, ndarray, ndarray, ndarray, int, ndarray]:
    """What the compiled walk needs of a target."""
    q = len(path.estimate)
    form = path.form
    if form is None:
        nothing = np.zeros(q)
        return (
            path.estimate,
            path.weight,
            np.empty((0, q)),
            np.zeros((q, q)),
            nothing,
            0,
            np.ones(3),
        )
    kind = {"half-cauchy": 1, "gamma": 2}.get(str(form.smoothness), 0)
    hyper = np.array([form.scale, form.shape, form.rate])
    root = np.ascontiguousarray(form.root)
    return path.estimate, path.weight, root, form.fixed, form.mean, kind, hyper


@njit(cache=True, nogil=True)
def _random_walk(start, root, noise, coins, estimate, weight, rough, fixed, mean, kind, hyper):  # type: ignore[no-untyped-def]
    """Random-walk Metropolis on (β, log τ); log τ stays put where the walk has no axis for it."""
    N, q = len(noise), len(estimate)
    here, out = start.copy(), np.empty((N, q + 1))
    accepted = np.empty(N, dtype=np.bool_)
    density = _log_target(here, estimate, weight, rough, fixed, mean, kind, hyper)
    for i in range(N):
        there = here.copy()
        there[: len(root)] += root @ noise[i]
        value = _log_target(there, estimate, weight, rough, fixed, mean, kind, hyper)
        accepted[i] = coins[i] < value - density
        if accepted[i]:
            here, density = there, value
        out[i] = here
    return out, accepted


@njit(cache=True, nogil=True)
def _log_target(point, estimate, weight, rough, fixed, mean, kind, hyper):  # type: ignore[no-untyped-def]
    q = len(estimate)
    gap, off = point[:q] - estimate, point[:q] - mean
    log_tau = point[q]
    total = -0.5 * gap @ (weight @ gap) - 0.5 * off @ (fixed @ off)
    if len(rough) > 0:
        bend = rough @ off
        total -= len(rough) * log_tau + 0.5 * (bend @ bend) * np.exp(-2 * log_tau)
    if kind == 1:
        shifted = 2 * (log_tau - np.log(hyper[0]))
        total += shifted / 2 - np.logaddexp(0.0, shifted)
    elif kind == 2:
        total += -2 * hyper[1] * log_tau - hyper[2] * np.exp(-2 * log_tau)
    return total
