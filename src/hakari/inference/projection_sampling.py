"""Kernels for quasi-posteriors of local projections; arrays of chance come from sampling.py.

`concentrated` (ours): controls and the responses integrated out in closed form, smoothness drawn
from its marginal, then the path given it: independent draws of the frozen target. `gibbs`:
smoothness given the path (conjugate), path given smoothness; `da-approx`: the multipliers of the
full system as an autoregression, screened by the prior, without any inverse; `mh`: adaptive
random walk (Haario, Saksman and Tamminen, 2001). All leave each response's target invariant where
the weighting is frozen; with continuous updating `concentrated` and `gibbs` correct for it. The
noise that responses share makes draws depend across them in `concentrated` and `gibbs`, in
`da-approx` where priors are flat; `mh` walks each response by itself.
local-projections.md 'Two simulators'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lgamma, log

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.kernels.independence import accept
from hakari.inference.projection_posterior import ProjectionPosterior
from hakari.inference.quasi_path import QuasiPath

METHODS = ("auto", "concentrated", "gibbs", "da-approx", "mh")
DF = 8.0  # of the proposals under continuous updating, whose tails are heavier than the frozen ones


@dataclass(frozen=True)
class PathDraws:
    """theta (N, Q), log τ (N, J), log density of each path (N, J), accepted (N, J)."""

    theta: Float[ndarray, "N Q"]
    log_tau: Float[ndarray, "N J"]
    log_density: Float[ndarray, "N J"]
    accepted: ndarray

    def followed_by(self, later: PathDraws) -> PathDraws:
        """These draws and then those."""
        pairs = zip(vars(self).values(), vars(later).values(), strict=True)
        return PathDraws(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True)
class Chain:
    """Where a chain stands: path, log τ and log weight by response, and what its kernel keeps."""

    path: Float[ndarray, " Q"]
    log_tau: Float[ndarray, " J"]
    log_weight: Float[ndarray, " J"]
    state: tuple[ndarray, ...]
    streams: dict[str, Generator]


def slices(posterior: ProjectionPosterior) -> list[slice]:
    """Where each response's coefficients stand."""
    q = len(posterior.names) // len(posterior.paths)
    return [slice(j * q, (j + 1) * q) for j in range(len(posterior.paths))]


def begin(
    posterior: ProjectionPosterior, method: str, streams: dict[str, Generator], warmup: int
) -> Chain:
    """A chain at a draw of the frozen posterior, after `warmup` iterations if its kernel learns."""
    theta, log_tau, weight = _propose(posterior, streams, 1)
    chain = Chain(theta[0], log_tau[0], weight[0], (), streams)
    if method == "concentrated":
        return chain
    from hakari.inference.projection_walks import tuned

    return tuned(posterior, method, chain, warmup)


def advance(
    posterior: ProjectionPosterior, method: str, chain: Chain, size: int
) -> tuple[Chain, PathDraws]:
    """`size` more draws, and where the chain then stands."""
    if method != "concentrated":
        from hakari.inference.projection_walks import walk

        return walk(posterior, method, chain, size)
    theta, log_tau, weight = _propose(posterior, chain.streams, size)
    path, tau = theta.copy(), log_tau.copy()
    accepted = np.ones(log_tau.shape, dtype=bool)
    last = chain.log_weight.copy()
    coins = chain.streams["coins"].random(log_tau.shape)
    for j, part in enumerate(slices(posterior)):
        if not np.ptp(np.append(weight[:, j], last[j])):  # the proposal is the target
            continue
        where = accept(float(last[j]), np.ascontiguousarray(weight[:, j]), coins[:, j].copy())
        stay = where < 0
        path[:, part] = np.where(stay[:, None], chain.path[part], theta[where][:, part])
        tau[:, j] = np.where(stay, chain.log_tau[j], log_tau[where, j])
        accepted[:, j] = where == np.arange(size)
        last[j] = last[j] if stay[-1] else weight[where[-1], j]
    moved = replace(chain, path=path[-1], log_tau=tau[-1], log_weight=last)
    return moved, PathDraws(path, tau, log_densities(posterior, path), accepted)


def log_densities(
    posterior: ProjectionPosterior, theta: Float[ndarray, "N Q"]
) -> Float[ndarray, "N J"]:
    """Log quasi-posterior density of each response's path, smoothness integrated out."""
    out = []
    for j, part in enumerate(slices(posterior)):
        path = theta[:, part]
        density = posterior.paths[j].log_path_posterior(path)
        if posterior.weighting == "continuous":
            density = density + correction(posterior, j, path)
        out.append(density)
    return np.column_stack(out)


def correction(
    posterior: ProjectionPosterior, j: int, path: Float[ndarray, "N q"]
) -> Float[ndarray, " N"]:
    """Log of the continuously updated quasi-likelihood over the frozen one."""
    gain = posterior.updating[j].log_likelihood(path)
    return np.asarray(gain - posterior.paths[j].log_likelihood(path))


# --- proposals: independent draws of the frozen posterior -----------------------------------


def _propose(
    posterior: ProjectionPosterior, streams: dict[str, Generator], size: int
) -> tuple[ndarray, ndarray, ndarray]:
    """(theta (N, Q), log τ (N, J), log weight of target over proposal (N, J))."""
    shared = streams["noise"].standard_normal((size, len(posterior.noise_root)))
    noise = shared @ posterior.noise_root
    theta = np.empty((size, len(posterior.names)))
    log_tau, weight = np.zeros((size, len(posterior.paths))), np.zeros((size, len(posterior.paths)))
    for j, part in enumerate(slices(posterior)):
        path = posterior.paths[j]
        error = noise[:, part] / np.sqrt(path.precision)
        if path.form is None:
            centre, theta[:, part] = path.estimate[None], path.estimate + error
        else:
            log_tau[:, j], drawn = path.draw_log_tau(streams["start"].random(size))
            if path.form.sampled:
                weight[:, j] = path.log_tau_density(log_tau[:, j]) - drawn
            theta[:, part] = path.posterior_step(
                log_tau[:, j],
                error,
                streams["wide"].standard_normal((size, len(path.form.root))),
                streams["wide tail"].standard_normal((size, len(path.estimate))),
            )
            centre = path.conditional_mean(log_tau[:, j])
        if posterior.weighting == "continuous":
            stretch = np.sqrt(DF / streams["tail"].chisquare(DF, size))
            theta[:, part] = centre + (theta[:, part] - centre) * stretch[:, None]
            weight[:, j] += correction(posterior, j, theta[:, part]) + _gaussian_over_student(
                path, theta[:, part], log_tau[:, j]
            )
    return theta, log_tau, weight


def _gaussian_over_student(
    path: QuasiPath, theta: Float[ndarray, "N q"], log_tau: Float[ndarray, " N"]
) -> Float[ndarray, " N"]:
    """Log of the frozen conditional's density over the Student's with its centre and shape."""
    q = len(path.estimate)
    if path.form is None:
        distance = -2 * path.log_likelihood(theta)
    else:
        distance, _ = path.log_conditional(theta, log_tau)
    constant = lgamma((DF + q) / 2) - lgamma(DF / 2) - 0.5 * q * log(DF / 2)
    return np.asarray(-0.5 * distance + 0.5 * (DF + q) * np.log1p(distance / DF) - constant)
