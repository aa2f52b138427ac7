"""Small designs and slow, obvious formulas that the fast code is held against."""

from __future__ import annotations

import numpy as np


def iv_design(n, K, L, seed=0):
    """y, X, Z with heteroskedastic errors; the last regressor is endogenous when L > K."""
    rng = np.random.default_rng(seed)
    Z = rng.standard_normal((n, L))
    Z[:, 0] = 1.0
    X = Z[:, :K].copy()
    error = (0.5 + np.abs(Z[:, -1])) * rng.standard_t(6, n)
    if L > K:
        X[:, -1] = Z[:, K - 1 :].sum(axis=1) + rng.standard_normal(n) + 0.5 * error
    return X @ np.ones(K) + error, X, Z


def direct_log_density(theta, y, X, Z, determinant=True, centred=False):
    """The target row by row, from its definition."""
    m = Z * (y - X @ theta)[:, None]
    mean = m.mean(axis=0)
    omega = m.T @ m / len(y) - (np.outer(mean, mean) if centred else 0)
    value = -0.5 * len(y) * mean @ np.linalg.solve(omega, mean)
    return value - (0.5 * np.linalg.slogdet(omega)[1] if determinant else 0.0)
