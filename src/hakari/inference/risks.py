"""First-order conditions of risks that are linear in θ, as linear moments.

A quasi-posterior of a risk needs only that its gradient is a_i − B_i θ on average:
arXiv 2511.17117 names asymmetric least squares with fixed weights and penalised least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hakari.inference.moments import LinearMoments


def expectile_moments(
    y: ArrayLike, X: ArrayLike, tau: float, *, rounds: int = 200, **options: Any
) -> LinearMoments:
    """Moments x_i w_i (y_i − x_i'θ), w_i = |τ − 1(y_i < x_i'θ̂)| fixed at the sample expectile θ̂.

    y (n,), X (n, K); tau in (0, 1), 0.5 is least squares. θ̂ comes by iterated weighted least
    squares (Newey and Powell, 1987), at which the moments' mean is zero. `options` go to
    `LinearMoments.from_arrays` (names, covariance, ...).
    Raises ValueError for tau outside (0, 1), or when the weights do not settle.
    """
    if not 0 < tau < 1:
        raise ValueError(f"tau {tau}: the asymmetry must lie between 0 and 1 (0.5: least squares)")
    y, X = np.asarray(y, dtype=float), np.asarray(X, dtype=float)
    weight = np.ones(len(y))
    for _ in range(rounds):
        root = np.sqrt(weight)
        theta = np.linalg.lstsq(X * root[:, None], y * root, rcond=None)[0]
        new = np.where(y < X @ theta, 1 - tau, tau)
        if np.array_equal(new, weight):
            return LinearMoments.from_arrays(y, X, weights=weight, **options)
        weight = new
    raise ValueError(
        f"the expectile's weights did not settle in {rounds} rounds: give more rounds="
    )


def ridge_moments(
    y: ArrayLike,
    X: ArrayLike,
    penalty: float | ArrayLike,
    *,
    names: Sequence[str] | None = None,
    **options: Any,
) -> LinearMoments:
    """Moments x_i (y_i − x_i'θ) − (Λ/n) θ of least squares with the penalty θ'Λθ / 2 in all.

    y (n,), X (n, K); penalty: λ, (K,) or a symmetric (K, K) matrix Λ, at least 0.
    `options` go to `LinearMoments.from_moments` (covariance, ...).
    Raises ValueError for a penalty of another shape or below 0.
    """
    y, X = np.asarray(y, dtype=float), np.asarray(X, dtype=float)
    n, K = X.shape
    weight = np.asarray(penalty, dtype=float)
    matrix = weight if weight.ndim == 2 else np.diag(np.broadcast_to(weight, K))
    if matrix.shape != (K, K) or np.linalg.eigvalsh(matrix)[0] < 0:
        raise ValueError(f"penalty {penalty!r}: need a number, ({K},) or ({K}, {K}), at least 0")
    G = X[:, :, None] * X[:, None, :] + matrix / n
    names = names if names is not None else [f"x{k}" for k in range(K)]
    return LinearMoments.from_moments(G, X * y[:, None], names=names, **options)
