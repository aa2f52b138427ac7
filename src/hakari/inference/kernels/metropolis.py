"""`mh`: random-walk Metropolis.

Acceptance: α = min{1, π(θ')/π(θ)}; the proposal is symmetric and nothing is screened.
"""

from numba import njit

from hakari.inference.transition import PLACE, SCREEN, Kernel


@njit(PLACE, cache=True, nogil=True)
def place(target, state, tuning):  # type: ignore[no-untyped-def]
    """Around the current state; `tuning` is the lower factor of the proposal's covariance."""
    return state.u, tuning


@njit(SCREEN, cache=True, nogil=True)
def log_screen(target, state, u):  # type: ignore[no-untyped-def]
    """No first stage: α₁ = 1."""
    return 0.0


metropolis = Kernel("mh", place, log_screen)
