"""Tuning of the proposals before the draws that count; nothing is adapted afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from scipy.stats import norm

from hakari.inference.covariance import packed_size
from hakari.inference.density import Target
from hakari.inference.kernels import preconditioned
from hakari.inference.kernels.independence import Reference
from hakari.inference.kernels.metropolis import metropolis
from hakari.inference.transition import ACCEPTED, Kernel, run

WINDOW = 50


def target_acceptance(target: Target, delayed: bool) -> float:
    """Acceptance of the random walk with most squared jumps per unit of work.

    A walk of scale l/√K in a K-dimensional Gaussian accepts a(l) = 2Φ(−l/2) and moves l²a(l)
    (Roberts, Gelman and Gilks, 1997). Metropolis pays one evaluation an iteration; delayed
    acceptance pays the screen and a(l) evaluations, so its best walk is bolder; not bolder than
    an acceptance of 0.1, where l²a(l) is still 4/5 of its greatest and chains still settle.
    """
    L, K = target.slope.shape
    length = np.linspace(0.5, 8.0, 400)
    accepted = 2 * norm.cdf(-length / 2)
    work: Any = 1.0
    if delayed:
        rows = len(target.rows_z)
        full = (rows * L * L if rows else packed_size(L) * packed_size(K + 1)) + L**3 / 6 + 200
        screen = 2 * (L * K + L * L / 2) + K * K + 200  # 200: the fixed price of a step
        work = screen / full + accepted
    best = int((length**2 * accepted / work).argmax())
    return max(float(accepted[best]), 0.1)


def tune_walk(
    target: Target, kernel: Kernel, start: ndarray, warmup: int, streams: dict[str, Generator]
) -> tuple[ndarray, ndarray]:
    """(end (K,), factor (K, K)) of a random walk: its scale and its covariance, by windows."""
    K = len(start)
    goal = target_acceptance(target, kernel.name == "da") if K > 1 else 0.44
    shape, log_scale = np.eye(K), np.log(2.4 / np.sqrt(K))
    walk = (metropolis.place, metropolis.log_screen)
    kept: list[ndarray] = []
    windows = max(warmup // WINDOW, 1)
    for window in range(windows):
        factor = np.exp(log_scale) * shape
        noise = streams["noise"].standard_normal((WINDOW, K))
        coins = streams["coins"].random((WINDOW, 3))
        draws, _, outcome = run(
            target, kernel.place, kernel.log_screen, *walk, 0.0, start, factor, factor, noise, coins
        )
        start = draws[-1].copy()
        kept.append(draws)
        log_scale += ((outcome == ACCEPTED).mean() - goal) * 4 / np.sqrt(window + 4)
        if window in (windows // 2, 3 * windows // 4) and window * WINDOW > 40 * K:
            shape = _shape(np.concatenate(kept[len(kept) // 3 :]), shape)
    return start, np.exp(log_scale) * shape


def _shape(draws: ndarray, fallback: ndarray) -> ndarray:
    spread = np.atleast_2d(np.cov(draws.T))
    try:
        return np.linalg.cholesky(0.95 * spread + 0.05 * np.diag(np.diag(spread)))
    except np.linalg.LinAlgError:
        return fallback


def tune_rho(
    target: Target,
    reference: Reference,
    start: ndarray,
    warmup: int,
    streams: list[dict[str, Generator]],
) -> tuple[ndarray, float]:
    """(latent ends (C, M), ρ) of preconditioned chains, for an acceptance of about 0.3.

    Where independence (ρ = 0) already accepts as much, ρ goes to 0.
    """
    odds = 2.0  # ρ = 1 − 1/(1 + e^odds) with odds in R; ρ² moves smoothly between its ends
    for window in range(max(warmup // WINDOW, 1)):
        rho = float(1 / (1 + np.exp(-odds))) if odds > -4 else 0.0
        noise = np.stack([s["noise"].standard_normal((WINDOW, start.shape[1])) for s in streams], 1)
        coins = np.stack([s["coins"].random(WINDOW) for s in streams], 1)
        start, _, _, accepted = preconditioned.run(
            target, reference.mean, reference.factor, reference.df, rho, start, noise, coins
        )
        odds -= (accepted.mean() - 0.3) * 6 / np.sqrt(window + 4)
        odds = min(max(odds, -5.0), 6.0)
    return start, float(1 / (1 + np.exp(-odds))) if odds > -4 else 0.0
