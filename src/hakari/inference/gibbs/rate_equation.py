"""The learning rate at which regions cover: the root of an equation in cached numbers.

The quantile of the credibility ranks at the wanted level is a continuous, rising function of the
rate; where it equals the level, that share of the data sets covers. On the scale of log η and of
the rank's normal (or chi-square) quantile the function is a straight line of slope 1/2 for
Gaussian posteriors, so that a bracketed secant finds the root in a few passes (derived in design
note gibbs-calibration, section 1.8: order statistics and the probit fixed point in one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import binom, chi2

TOLERANCE = 1e-3  # of log η
Ranks = Callable[[float], Float[ndarray, " B"]]


@dataclass(frozen=True)
class Root:
    """A rate, and the ranks there. found: whether the equation holds there."""

    rate: float
    ranks: Float[ndarray, " B"]
    found: bool
    passes: int


def solve(ranks: Ranks, level: float, start: float, degrees: int, share: float = -1.0) -> Root:
    """The rate at which the share (default: the level) of the ranks is at most the level.

    start: a first guess. degrees: the region's dimension. `found` is False where the ranks do not
    reach the level within a factor of 2^12 either way.
    """
    share = level if share < 0 else share
    wanted = float(chi2.ppf(level, degrees))
    low, high, width, passes = -np.inf, np.inf, np.inf, 0
    x = x0 = float(np.log(start))
    best = Root(start, np.empty(0), False, 0)
    slope = 1.0
    last: tuple[float, float] | None = None
    for passes in range(1, 61):
        found = ranks(float(np.exp(x)))
        at = float(np.quantile(found, share, method="inverted_cdf" if share != level else "linear"))
        gap = float(np.log(chi2.ppf(min(max(at, 1e-12), 1 - 1e-12), degrees) / wanted))
        best = Root(float(np.exp(x)), found, False, passes)
        low, high = (x, high) if gap < 0 else (low, x)
        if last is not None and x != last[0] and gap != last[1]:
            slope = min(max((gap - last[1]) / (x - last[0]), 0.2), 5.0)
        last = (x, gap)
        if abs(gap) < TOLERANCE or high - low < 0.1 * TOLERANCE:
            return Root(best.rate, found, True, passes)
        step = min(max(-gap / slope, -1.5), 1.5)
        halve = high - low > 0.5 * width  # ranks jump: the secant creeps
        width = high - low
        x = (low + high) / 2 if halve else _inside(x + step, low, high)
        if abs(x - x0) > 12 * np.log(2):
            break
    return best


def _inside(x: float, low: float, high: float) -> float:
    if np.isfinite(low) and np.isfinite(high):
        width = high - low
        return min(max(x, low + 0.05 * width), high - 0.05 * width)
    return x


def binomial_shares(level: float, replicates: int, confidence: float) -> tuple[float, float]:
    """Shares of covering data sets that chance alone makes of a coverage equal to the level."""
    tail = (1 - confidence) / 2
    low, high = binom.ppf([tail, 1 - tail], replicates, level) / replicates
    return float(low), float(high)
