"""`da`: delayed acceptance, the surrogate keeps the weighting of the current state.

With s_θ(x) = −(n/2) m(x)'W(θ)m(x) + log p(x):
α₁(θ,θ') = min{1, exp(s_θ(θ') − s_θ(θ))},
α₂ = min{1, π(θ') min{1, e^(s_θ'(θ) − s_θ'(θ'))} / (π(θ) α₁(θ,θ'))}; the proposal is symmetric.
arXiv 2504.11761; Christen and Fox (2005). quasi-posteriors.md '`da`'.
"""

from numba import njit

from hakari.inference.density import log_frozen
from hakari.inference.kernels.metropolis import place
from hakari.inference.transition import SCREEN, Kernel


@njit(SCREEN, cache=True, nogil=True)
def log_screen(target, state, u):  # type: ignore[no-untyped-def]
    """The frozen surrogate's gain: no new covariance, no factorisation, no determinant."""
    gain = log_frozen(target, u, state.factor) - log_frozen(target, state.u, state.factor)
    return min(0.0, gain)


delayed = Kernel("da", place, log_screen)
