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


def proposals(reference: Reference, noise: ndarray, chi2: ndarray) -> ndarray:
    """Draws (N, K) of the reference: noise (N, K) standard normal, chi2 (N,) χ²_df/df."""
    return np.ascontiguousarray(
        reference.mean + (noise / np.sqrt(chi2)[:, None]) @ reference.factor.T
    )


def log_weights(target: Target, reference: Reference, u: ndarray) -> tuple[ndarray, ndarray]:
    """Log π and log w = log π − log r, up to constants, of each row of u (N, K)."""
    density = log_density_batch(target, u)
    return density, density - log_reference(reference, u)


def log_reference(reference: Reference, u: ndarray) -> ndarray:
    """Log r of each row of u (N, K), without the terms that do not depend on u."""
    inverse = np.linalg.inv(reference.factor)
    q = (((u - reference.mean) @ inverse.T) ** 2).sum(axis=1)
    if np.isinf(reference.df):
        return -0.5 * q
    return -0.5 * (reference.df + u.shape[1]) * np.log1p(q / reference.df)


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
