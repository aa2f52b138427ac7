"""Simulated data for the benchmarks: linear moments with heteroskedastic errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ENDOGENEITY = 0.5  # correlation of an endogenous regressor's first-stage error with u


def heteroskedastic_iv(n: int, K: int, L: int, seed: int) -> tuple[Array, Array, Array]:
    """Simulate y = X theta + (0.5 + |z_2|) u with Student-5 errors u.

    The first column of X and of Z is 1, the others are normal with correlation 0.5^|i-j|, and
    theta runs evenly from 1 to -1. With L = K the regression is exogenous: Z = X. With L > K the
    last max(1, K/5) regressors are endogenous (`_endogenous`), and the other K - max(1, K/5)
    regressors are instruments for themselves.

    Args:
        n: observations.
        K: regressors, at least 2.
        L: instruments, at least K.
        seed: of the one generator used.

    Returns:
        y (n,), X (n, K), Z (n, L).

    Source: 'Designs to simulate' of the note on quasi-posteriors.

    >>> y, X, Z = heteroskedastic_iv(500, 5, 8, seed=0)
    >>> y.shape, X.shape, Z.shape
    ((500,), (500, 5), (500, 8))
    """
    if not 2 <= K <= L < n:
        raise ValueError(f"n = {n}, K = {K}, L = {L}: the design needs 2 <= K <= L < n")
    rng = np.random.default_rng(seed)
    steps = np.abs(np.subtract.outer(np.arange(L - 1), np.arange(L - 1)))
    normals = rng.standard_normal((n, L - 1)) @ np.linalg.cholesky(0.5**steps).T
    Z = np.column_stack([np.ones(n), normals])
    u = rng.standard_t(5, n)
    X = Z if L == K else np.column_stack([Z[:, : K - _count(K)], _endogenous(rng, Z, u, K)])
    return X @ np.linspace(1.0, -1.0, K) + (0.5 + np.abs(Z[:, 1])) * u, X, Z


def _count(K: int) -> int:
    """Endogenous regressors among K, when there are more instruments than regressors."""
    return max(1, K // 5)


def _endogenous(rng: np.random.Generator, Z: Array, u: Array, K: int) -> Array:
    """Endogenous regressors (n, E) = excluded instruments @ loadings + error correlated with u.

    The loadings are normal with variance 1 / (number of excluded instruments), so that about half
    of each regressor's variance comes from the instruments: a strong first stage.
    """
    excluded = Z[:, K - _count(K) :]
    loadings = rng.standard_normal((excluded.shape[1], _count(K))) / np.sqrt(excluded.shape[1])
    noise = rng.standard_normal((len(u), _count(K)))
    shared = u[:, None] / np.sqrt(5 / 3)  # the variance of Student-5 is 5/3
    return excluded @ loadings + ENDOGENEITY * shared + np.sqrt(1 - ENDOGENEITY**2) * noise
