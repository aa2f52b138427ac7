"""`skeleton`: what a kernel file looks like; copy it to src/hakari/inference/kernels/.

This one proposes by an autoregression about the estimate, u' ~ N(u/2, F F') with F the tuning,
and screens nothing, so that
α = min{1, π(u') N(u; u'/2, F F') / (π(u) N(u'; u/2, F F'))}.
Write the exact ratio here, as above, and where it comes from (paper and equation, or note).
`transition.step` computes it from `place` and `log_screen`; a kernel never does so itself.
"""

from numba import njit

from hakari.inference.transition import PLACE, SCREEN, Kernel


@njit(PLACE, cache=True, nogil=True)
def place(target, state, tuning):  # type: ignore[no-untyped-def]
    """Centre (K,) and lower factor (K, K): the proposal is centre + factor @ noise.

    target: `density.Target`, the posterior in whitened coordinates; state: `density.State`,
    where the chain stands, with the Cholesky factor of Ω there; tuning: (K, K), what the
    warm-up found. Depend on nothing else: the reverse move is placed by the same function.
    """
    return 0.5 * state.u, tuning


@njit(SCREEN, cache=True, nogil=True)
def log_screen(target, state, u):  # type: ignore[no-untyped-def]
    """Log α₁(state, u) ≤ 0, cheap: it runs before the density at u is known. 0: no screen."""
    return 0.0


skeleton = Kernel("skeleton", place, log_screen)
