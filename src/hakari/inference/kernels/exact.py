"""`da-exact`: proposals from the conditional posterior with the weighting frozen, prior included.

q_θ = N(μ_θ, Σ_θ), Σ_θ⁻¹ = n R'W(θ)R + P₀, μ_θ = Σ_θ(n R'W(θ)r + P₀b₀) for a Gaussian prior
N(b₀, P₀⁻¹) or a flat one (P₀ = 0). q_θ ∝ exp(s_θ), so the first stage always passes and
α₂ = min{1, π(θ') N(θ; μ_θ', Σ_θ') / (π(θ) N(θ'; μ_θ, Σ_θ))}.
arXiv 2511.17117, DA-MCMC-Exact. Its spread follows Ω(θ): it can leave states to which it
seldom returns, so `sample` mixes in a random walk. quasi-posteriors.md '`da-exact`'.
"""

import numpy as np
from numba import njit

from hakari.inference.kernels.metropolis import log_screen
from hakari.inference.transition import PLACE, Kernel


@njit(cache=True, nogil=True)
def conditional(target, factor, with_prior):  # type: ignore[no-untyped-def]
    """Mean (K,) and lower factor (K, K) of exp(−(n/2) m'(factor factor')⁻¹m) [p(u)] in u."""
    L, K = target.slope.shape
    slope = target.slope.copy()  # becomes √n factor⁻¹ slope
    offset = target.offset.copy()
    root_n = np.sqrt(target.n)
    for i in range(L):
        for j in range(i):
            weight = factor[i, j] / root_n
            for k in range(K):
                slope[i, k] -= weight * slope[j, k]
            offset[i] -= weight * offset[j]
        scale = root_n / factor[i, i]
        for k in range(K):
            slope[i, k] *= scale
        offset[i] *= scale
    precision = slope.T @ slope
    pull = -(slope.T @ offset)
    if with_prior:
        precision += target.prior_slope.T @ target.prior_slope
        pull -= target.prior_slope.T @ target.prior_offset
    # precision = U U' with U upper, so that U'⁻¹ is the lower factor of the covariance
    upper = np.zeros((K, K))
    for j in range(K - 1, -1, -1):
        value = precision[j, j]
        for k in range(j + 1, K):
            value -= upper[j, k] * upper[j, k]
        upper[j, j] = np.sqrt(max(value, 1e-300))
        for i in range(j):
            value = precision[i, j]
            for k in range(j + 1, K):
                value -= upper[i, k] * upper[j, k]
            upper[i, j] = value / upper[j, j]
    lower = np.zeros((K, K))  # inverse of U'
    for j in range(K):
        lower[j, j] = 1.0 / upper[j, j]
        for i in range(j + 1, K):
            value = 0.0
            for k in range(j, i):
                value -= upper[k, i] * lower[k, j]
            lower[i, j] = value / upper[i, i]
    return lower @ (lower.T @ pull), lower


@njit(PLACE, cache=True, nogil=True)
def place(target, state, tuning):  # type: ignore[no-untyped-def]
    """The Gaussian conditional posterior at the state's weighting."""
    return conditional(target, state.factor, True)


exact = Kernel("da-exact", place, log_screen)
