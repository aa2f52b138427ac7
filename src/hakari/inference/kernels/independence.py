"""`independence`: proposals from a heavy-tailed reference, drawn beforehand, evaluated in batches.

Reference r: Student t with `df` degrees of freedom, of which a `share` of draws comes from a
Student-4 twice as wide, so that the weights stay bounded where tails are long (defensive
mixture: Hesterberg, 1995). u = mean + factor z √s, s = df/χ²_df, or 4 · 4/χ²_4 when wide.
Acceptance: α = min{1, w(u')/w(u)} with w = π/r. The weights are computed for the whole batch
as one matrix product and a batched Cholesky; only the accept loop runs in sequence.
Hastings (1970); Tierney (1994). Derived for this target in quasi-posteriors.md 'Ours'.
"""

from __future__ import annotations

from math import lgamma, log, pi
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy import ndarray

from hakari.inference.density import Target, log_density_batch

WIDE, WIDE_DF = 2.0, 4.0


class Reference(NamedTuple):
    """Student t with `df` (inf: Gaussian), location mean (K,), scale factor factor' (K, K)."""

    mean: ndarray
    factor: ndarray
    df: float
    share: float = 0.0  # of draws from the wider component


def mixed_scales(reference: Reference, chi2: ndarray, wide: ndarray, chi2_wide: ndarray) -> ndarray:
    """Squared scales s (N,) of chi2 (N,) χ²_df; the draws `wide` (N,) take chi2_wide χ²_4."""
    scales = np.ones(len(chi2)) if np.isinf(reference.df) else reference.df / chi2
    scales[wide] = WIDE**2 * WIDE_DF / chi2_wide
    return scales


def proposals(reference: Reference, noise: ndarray, scales: ndarray) -> tuple[ndarray, ndarray]:
    """Draws (N, K) of the reference and their log r (N,).

    noise (N, K) standard normal, scales (N,) as `mixed_scales` makes them.
    """
    u, q = _propose(reference.mean, reference.factor, noise, scales)
    return u, _log_reference(reference, q)


def log_weights(
    target: Target, reference: Reference, noise: ndarray, scales: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    """Proposals u (N, K), their log π and log w = log π − log r, up to constants."""
    u, log_r = proposals(reference, noise, scales)
    density = log_density_batch(target, u)
    return u, density, density - log_r


def log_reference(reference: Reference, u: ndarray) -> ndarray:
    """Log r of each row of u (N, K)."""
    inverse = np.linalg.inv(reference.factor)
    return _log_reference(reference, (((u - reference.mean) @ inverse.T) ** 2).sum(axis=1))


def _log_reference(reference: Reference, q: ndarray) -> ndarray:
    """Log r from the squared radius q = |factor⁻¹(u − mean)|²."""
    K = len(reference.mean)
    volume = float(np.log(np.diag(reference.factor)).sum())
    main = _log_student(q, reference.df, K) - volume
    if not reference.share:
        return main
    wide = _log_student(q / WIDE**2, WIDE_DF, K) - volume - K * log(WIDE)
    return np.asarray(np.logaddexp(log(1 - reference.share) + main, log(reference.share) + wide))


def _log_student(q: ndarray, df: float, K: int) -> ndarray:
    if np.isinf(df):
        return np.asarray(-0.5 * (q + K * log(2 * pi)))
    constant = lgamma((df + K) / 2) - lgamma(df / 2) - 0.5 * K * log(df * pi)
    return np.asarray(constant - 0.5 * (df + K) * np.log1p(q / df))


@njit(cache=True, nogil=True)
def _propose(mean, factor, noise, scales):  # type: ignore[no-untyped-def]
    N, K = noise.shape
    u, q = np.empty((N, K)), np.zeros(N)
    for n in range(N):
        scale = np.sqrt(scales[n])
        for i in range(K):
            q[n] += noise[n, i] ** 2
            value = 0.0
            for j in range(i + 1):
                value += factor[i, j] * noise[n, j]
            u[n, i] = mean[i] + scale * value
        q[n] *= scales[n]
    return u, q


@njit("int64[::1](float64, float64[::1], float64[::1])", cache=True, nogil=True)
def accept(log_weight, proposed, coins):  # type: ignore[no-untyped-def]
    """Index of the proposal at which the chain stands after each, −1 for where it began.

    log_weight: of the current state; proposed (N,): of the proposals; coins (N,) uniform.
    """
    where = np.empty(len(proposed), dtype=np.int64)
    current = -1
    for i in range(len(proposed)):
        gain = proposed[i] - log_weight
        if gain >= 0.0 or coins[i] < np.exp(gain):
            current = i
            log_weight = proposed[i]
        where[i] = current
    return where
