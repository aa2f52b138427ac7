"""`da-approx`: as `da-exact` without the prior in the proposal; the first stage screens by it.

q_θ = N((R'WR)⁻¹R'Wr, (n R'W(θ)R)⁻¹), s_θ − log q_θ = log p, so
α₁(θ,θ') = min{1, p(θ')/p(θ)}, any prior, before the covariance at θ' is computed, and
α₂ = min{1, π(θ') q_θ'(θ) α₁(θ',θ) / (π(θ) q_θ(θ') α₁(θ,θ'))}.
If L = K, μ = R⁻¹r for every θ and Σ^(1/2) = R⁻¹ chol(Ω(θ))/√n: no inverse but one of R.
arXiv 2511.17117, DA-MCMC-Approx. quasi-posteriors.md '`da-approx`'.
"""

import numpy as np
from numba import njit

from hakari.inference.density import log_prior
from hakari.inference.kernels.exact import conditional
from hakari.inference.transition import PLACE, SCREEN, Kernel


@njit(PLACE, cache=True, nogil=True)
def place(target, state, tuning):  # type: ignore[no-untyped-def]
    """The Gaussian conditional quasi-likelihood at the state's weighting.

    `tuning` holds R⁻¹/√n (K, K) when L = K, and is not read otherwise; R is lower
    triangular in whitened coordinates, and so is its product with chol(Ω).
    """
    L, K = target.slope.shape
    if L > K:
        return conditional(target, state.factor, False)
    centre = np.sqrt(target.n) * (tuning @ -target.offset)
    return centre, tuning @ state.factor


@njit(SCREEN, cache=True, nogil=True)
def log_screen(target, state, u):  # type: ignore[no-untyped-def]
    """The prior's ratio."""
    return min(0.0, log_prior(target, u) - log_prior(target, state.u))


approximate = Kernel("da-approx", place, log_screen)
