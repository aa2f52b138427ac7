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
        return _begin_multipliers(posterior, chain, warmup)
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


def _begin_multipliers(posterior: ProjectionPosterior, chain: Chain, warmup: int) -> Chain:
    """Multipliers of the chain's path, of which others leave the posterior slowly; then the steps.

    A flat prior accepts all: its steps are whole, and draws independent.
    """
    multipliers = chain.streams["noise"].standard_normal((1, len(posterior.noise_root)))
    multipliers = np.repeat(multipliers, len(posterior.paths), axis=0)
    for j, part in enumerate(slices(posterior)):
        path, root = posterior.paths[j], posterior.noise_root[:, part]
        error = (chain.path[part] - path.estimate) * np.sqrt(path.precision)
        multipliers[j] += np.linalg.lstsq(root.T, error - multipliers[j] @ root, rcond=None)[0]
    step = np.array([1.0 if path.form is None else 0.5 for path in posterior.paths])
    chain = replace(chain, state=(multipliers, np.ones(len(step)), step))
    chain = replace(chain, path=_paths_of(posterior, multipliers))
    for k in range(warmup // EVERY):
        chain, draws = walk(posterior, "da-approx", chain, EVERY)
        multipliers, auxiliary, step = chain.state
        gain = 2 / np.sqrt(1 + k)  # less and less, so that the last one is no accident
        chain = replace(chain, state=(multipliers, auxiliary, _retuned(step, draws, gain)))
    return chain


def _multipliers(posterior: ProjectionPosterior, chain: Chain) -> tuple[Chain, ndarray]:
    """θ = θ̂ + Ψ'ξ: an autoregression of ξ keeps the frozen quasi-likelihood, the prior screens."""
    streams = chain.streams
    multipliers, auxiliary, step = chain.state
    fresh = streams["noise"].standard_normal(multipliers.shape[1])  # of all responses
    keep = np.sqrt(1 - step**2)[:, None]
    proposed = keep * multipliers + np.multiply.outer(step, fresh)
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


def _retuned(step: ndarray, draws: PathDraws, gain: float) -> ndarray:
    """Longer steps where more than `TARGET` were accepted, shorter otherwise."""
    rate = draws.accepted.mean(axis=0)
    return np.asarray(np.clip(step * np.exp(gain * (rate - TARGET)), 1e-3, 1.0))


# --- mh -----------------------------------------------------------------------------------


def _begin_walk(posterior: ProjectionPosterior, chain: Chain, warmup: int) -> Chain:
    """Steps of each response's walk: of the Gaussian approximation, then of the chain's past."""
    path, log_tau, roots = chain.path.copy(), chain.log_tau.copy(), []
    for j, part in enumerate(slices(posterior)):
        axes = _axes(posterior.paths[j])
        end, root = _learning_walk(
            np.append(path[part], log_tau[j]),
            axes,
            *_chance(chain, warmup * axes.shape[1], axes.shape[1]),
            *_arrays(posterior.paths[j]),
        )
        path[part], log_tau[j] = end[:-1], end[-1]
        roots.append(root)
    return replace(chain, path=path, log_tau=log_tau, state=tuple(roots))


def _axes(path: QuasiPath) -> Float[ndarray, "K k"]:
    """R with RR' the posterior covariance of β, and of log τ where it is sampled.

    That of β is at the mean of log τ, plus what its mean moves with τ. Directions in which
    nothing varies have no axis.
    """
    form, V = path.form, path.covariance
    if form is not None:
        nodes, share = np.array([path.chosen if not form.sampled else 0.0]), np.ones(1)
        if form.sampled:
            nodes, density = path.tau_grid
            share = np.exp(density) * (nodes[1] - nodes[0])
        rough = form.root.T @ form.root * np.exp(-2 * share @ nodes)
        V = np.zeros((len(V) + form.sampled,) * 2)
        q = len(form.mean)
        V[:q, :q] = np.linalg.inv(path.weight + form.fixed + rough)
        if form.sampled:
            both = np.column_stack([path.conditional_mean(nodes), nodes])
            both = both - share @ both
            V += both.T @ (share[:, None] * both)
    size = np.sqrt(np.diag(V))
    scale = np.where(size > 0, size, 1.0)
    values, vectors = np.linalg.eigh(V / np.multiply.outer(scale, scale))
    kept = values > 1e-12 * values[-1]
    return np.ascontiguousarray(scale[:, None] * vectors[:, kept] * np.sqrt(values[kept]))


def _adaptive(posterior: ProjectionPosterior, chain: Chain, size: int) -> tuple[Chain, PathDraws]:
    """A random walk on (β, log τ) of each response: as many moves a draw as it has axes."""
    J = len(posterior.paths)
    theta, tau = np.empty((size, len(chain.path))), np.zeros((size, J))
    accepted = np.empty((size, J), dtype=bool)
    for j, part in enumerate(slices(posterior)):
        root = chain.state[j]
        moves = max(1, root.shape[1])
        values, took = _random_walk(
            np.append(chain.path[part], chain.log_tau[j]),
            np.ascontiguousarray(root),
            *_chance(chain, size * moves, root.shape[1]),
            *_arrays(posterior.paths[j]),
        )
        values, accepted[:, j] = values[moves - 1 :: moves], took[moves - 1 :: moves]
        theta[:, part], tau[:, j] = values[:, :-1], values[:, -1]
    moved = replace(chain, path=theta[-1], log_tau=tau[-1])
    return moved, PathDraws(theta, tau, log_densities(posterior, theta), accepted)


def _chance(chain: Chain, moves: int, axes: int) -> tuple[ndarray, ndarray]:
    """Noise (moves, axes) and logs of coins (moves,)."""
    noise = chain.streams["noise"].standard_normal((moves, axes))
    return noise, np.log(chain.streams["coins"].random(moves))


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
def _learning_walk(start, axes, noise, coins, estimate, weight, rough, fixed, mean, kind, hyper):  # type: ignore[no-untyped-def]
    """Where a walk ends that learns its covariance and scale, ever more slowly, and its root.

    Within `axes` (K, k): all past weighs the same, and what it starts with as 10 k iterations.
    Haario, Saksman and Tamminen (2001); scale: Andrieu and Thoms (2008), algorithm 4.
    """
    N, k = noise.shape
    here, at, centre = start.copy(), np.zeros(k), np.zeros(k)
    covariance, factor = np.eye(k), np.eye(k)
    log_scale = np.log(2.38 / np.sqrt(k))
    density = _log_target(here, estimate, weight, rough, fixed, mean, kind, hyper)
    for i in range(N):
        step = np.exp(log_scale) * (factor @ noise[i])
        there = here.copy()
        there[: len(axes)] += axes @ step
        gain = _log_target(there, estimate, weight, rough, fixed, mean, kind, hyper) - density
        if coins[i] < gain:
            here, at, density = there, at + step, density + gain
        log_scale += (np.exp(min(gain, 0.0)) - 0.234) / (1 + i) ** 0.6
        gap, share = at - centre, 1 / (1 + i + 10 * k)
        centre += share * gap
        covariance += share * (np.outer(gap, gap) - covariance)
        if i % 20 == 19:
            factor = np.linalg.cholesky(covariance)  # type: ignore[assignment]
    return here, axes @ factor * np.exp(log_scale)


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
