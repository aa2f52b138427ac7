"""The heavy-tailed reference that the batched kernels propose from, fitted by pilot batches.

Start from the mode and the curvature there, then let weighted draws correct location,
spread and tail: each batch is importance-weighted, its smoothed weights give the next
mean and covariance, and the degrees of freedom and inflation that would have had the
smallest second moment of the weights are kept. quasi-posteriors.md 'Ours'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from arviz_stats.base import array_stats
from numpy import ndarray
from numpy.random import Generator
from scipy.optimize import minimize

from hakari.inference.density import Target
from hakari.inference.diagnostics import pareto_k
from hakari.inference.kernels.independence import (
    WIDE_DF,
    Reference,
    log_reference,
    log_weights,
    mixed_scales,
)
from hakari.inference.posterior import value_and_gradient

DEFENCE, SHARE = 0.4, 0.1  # k-hat from which a share of wider draws is mixed in
DEGREES = (4.0, 6.0, 8.0, 12.0, 20.0)
SAFETY = 1.04  # a little wider than the pilot's best: a weight it missed would hold the chain
INFLATIONS = (0.85, 0.92, 1.0, 1.08, 1.17, 1.3)


@dataclass(frozen=True)
class Fit:
    """A fitted reference and how good it is, from the last pilot batch of `size` draws."""

    reference: Reference
    k_hat: float  # Pareto shape of the weights' tail (Vehtari et al., 2024)
    acceptance: float  # of the independence sampler at stationarity
    efficiency: float  # effective share of importance draws
    size: int  # evaluations of the density spent


def fit_reference(target: Target, generator: Generator, rounds: int = 4) -> Fit:
    """Fit a reference to `target`; costs about 6,000 + 600 K evaluations and 0.1 s.

    The last, longest batch decides how good it is; where its weights' tail is long, a share of
    wider draws is mixed in, which costs a little efficiency and bounds the weights.
    """
    L, K = target.slope.shape
    batch = int(min(1500 + 150 * K, max(20 * K, 3e10 / (L * K) ** 2)))
    last = batch + int(min(20_000, 1e9 / (L * L * K * K)))  # k-hat is noisy: spend 0.1 s on it
    reference, spent = _laplace(target), 0
    for _ in range(rounds - 1):
        u, density, weight = _pilot(target, reference, generator, batch)
        reference, spent = _refit(reference, u, density, weight), spent + batch
    fit = _quality(reference, _pilot(target, reference, generator, last)[2], spent + last)
    if fit.k_hat > DEFENCE:
        wide = reference._replace(share=SHARE)
        guarded = _quality(wide, _pilot(target, wide, generator, last)[2], fit.size + last)
        return guarded if guarded.k_hat < fit.k_hat else fit
    return fit


def _pilot(
    target: Target, reference: Reference, generator: Generator, size: int
) -> tuple[ndarray, ndarray, ndarray]:
    noise = generator.standard_normal((size, len(reference.mean)))
    wide = generator.random(size) < reference.share
    chi2 = np.ones(size) if np.isinf(reference.df) else generator.chisquare(reference.df, size)
    chi2_wide = generator.chisquare(WIDE_DF, int(wide.sum()))
    return log_weights(target, reference, noise, mixed_scales(reference, chi2, wide, chi2_wide))


def _laplace(target: Target) -> Reference:
    """Mode and inverse curvature; the whitened N(0, I) where the mode cannot be found."""
    K = target.slope.shape[1]
    start = np.zeros(K)

    def objective(u: ndarray) -> tuple[float, ndarray]:
        value, slope = value_and_gradient(target, u)
        if not np.isfinite(value):
            return 1e300, np.zeros(K)
        return -value, -slope

    found = minimize(objective, start, jac=True, method="BFGS", options={"maxiter": 200})
    mode = found.x if np.linalg.norm(found.x) < 10 * np.sqrt(K) else start
    step = 1e-4
    hessian = np.array(
        [
            (objective(mode + step * e)[1] - objective(mode - step * e)[1]) / (2 * step)
            for e in np.eye(K)
        ]
    )
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    spread = vectors * (1 / np.clip(values, 0.05, 20.0)) @ vectors.T
    return Reference(mode, np.linalg.cholesky(spread), 8.0)


def _quality(reference: Reference, log_weight: ndarray, size: int) -> Fit:
    finite = log_weight[np.isfinite(log_weight)]
    if len(finite) < 50 or np.ptp(finite) == 0:
        flat = len(finite) >= 50
        return Fit(reference, -np.inf if flat else np.inf, float(flat), float(flat), size)
    weight = np.exp(log_weight - finite.max())
    k_hat = pareto_k(finite)
    ordered = np.sort(weight)[::-1]
    rank = np.arange(1, len(ordered) + 1)
    total = ordered.sum()
    # mean of min(w_i, w_j) over pairs, over the mean of w: stationary acceptance
    acceptance = float((ordered * (2 * rank - 1)).sum() / len(ordered) / total)
    efficiency = float(total**2 / (ordered**2).sum() / len(ordered))
    return Fit(reference, k_hat, acceptance, efficiency, size)


def _refit(reference: Reference, u: ndarray, density: ndarray, log_weight: ndarray) -> Reference:
    """Moments under smoothed weights, then the tail and inflation of least second moment."""
    finite = np.isfinite(log_weight)
    u, density, log_weight = u[finite], density[finite], log_weight[finite]
    K = u.shape[1]
    if len(u) < 2 * K + 50:
        return reference
    smooth, _ = array_stats.psislw(-log_weight)
    weight = np.exp(smooth - smooth.max())
    weight /= weight.sum()
    if 1 / (weight**2).sum() < 4 * K:
        # too few draws carry the weight: temper until enough do
        power = 0.5
        weight = np.exp(power * (smooth - smooth.max()))
        weight /= weight.sum()
    mean = weight @ u
    spread = (u - mean).T * weight @ (u - mean)
    try:
        root = np.linalg.cholesky(spread)
    except np.linalg.LinAlgError:
        return reference
    log_from = log_reference(reference, u)
    peak = density.max()
    best, least = reference, np.inf
    for df in DEGREES:
        for inflation in INFLATIONS:
            scale = inflation * np.sqrt(max(df - 2, 1) / df)
            trial = Reference(mean, root * scale, df)
            second = np.logaddexp.reduce(2 * (density - peak) - log_reference(trial, u) - log_from)
            if second < least:
                best, least = trial, second
    return best._replace(factor=best.factor * SAFETY)
