"""`independence`: proposals from a heavy-tailed reference, drawn beforehand, evaluated in batches.

Reference r: Student t with `df` degrees of freedom, u = mean + factor z √(df/χ²).
Acceptance: α = min{1, w(u')/w(u)} with w = π/r. The weights are computed for the whole batch
as one matrix product and a batched Cholesky; only the accept loop runs in sequence.
Hastings (1970); Tierney (1994). Derived for this target in quasi-posteriors.md 'Ours'.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy import ndarray

from hakari.inference.density import Target, log_density_batch


class Reference(NamedTuple):
    """Student t with `df` (inf: Gaussian), location mean (K,), scale factor factor' (K, K)."""

    mean: ndarray
    factor: ndarray
    df: float


def proposals(reference: Reference, noise: ndarray, chi2: ndarray) -> tuple[ndarray, ndarray]:
    """Draws (N, K) of the reference and their log r (N,), without its constant.

    noise (N, K) standard normal, chi2 (N,) χ²_df/df, ones when df is infinite.
    """
    u, log_r = _propose(reference.mean, reference.factor, reference.df, noise, chi2)
    return u, log_r


def log_weights(
    target: Target, reference: Reference, noise: ndarray, chi2: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    """Proposals u (N, K), their log π and log w = log π − log r, up to constants."""
    u, log_r = proposals(reference, noise, chi2)
    density = log_density_batch(target, u)
    return u, density, density - log_r


def log_reference(reference: Reference, u: ndarray) -> ndarray:
    """Log r of each row of u (N, K), without the terms that do not depend on u."""
    inverse = np.linalg.inv(reference.factor)
    q = (((u - reference.mean) @ inverse.T) ** 2).sum(axis=1)
    if np.isinf(reference.df):
        return np.asarray(-0.5 * q)
    return np.asarray(-0.5 * (reference.df + u.shape[1]) * np.log1p(q / reference.df))


@njit(cache=True, nogil=True)
def _propose(mean, factor, df, noise, chi2):  # type: ignore[no-untyped-def]
    N, K = noise.shape
    u, log_r = np.empty((N, K)), np.empty(N)
    for n in range(N):
        scale, q = 1.0 / np.sqrt(chi2[n]), 0.0
        for i in range(K):
            q += noise[n, i] ** 2
            value = 0.0
            for j in range(i + 1):
                value += factor[i, j] * noise[n, j]
            u[n, i] = mean[i] + scale * value
        q *= scale * scale
        log_r[n] = -0.5 * q if np.isinf(df) else -0.5 * (df + K) * np.log1p(q / df)
    return u, log_r


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
