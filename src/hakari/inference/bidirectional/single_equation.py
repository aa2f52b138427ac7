"""Least squares of each equation alone, which feedback biases: the baseline to hold others against.

y1 on y2 and functions of x, and y2 on y1 and functions of x. By the theorem of Frisch, Waugh and
Lovell that is W1 on W2 and W2 on W1, whose sums all evidence holds already: no pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.bidirectional.orthogonal_moments import MomentSums


@dataclass(frozen=True, eq=False)
class SingleEquation:
    """Coefficients (a, b) of the other outcome, and their covariance robust to any variances."""

    estimate: tuple[float, float]
    covariance: Float[ndarray, "2 2"]

    @property
    def std_error(self) -> tuple[float, float]:
        """Standard errors of both: about the limits below, not about the effects."""
        first, second = np.sqrt(np.diag(self.covariance))
        return float(first), float(second)


def single_equation(sums: MomentSums) -> SingleEquation:
    """Least squares of each outcome on the other one, means given x taken off both.

    sums: made with `constant_covariance`, whose first instrument is the constant. The limits are
    (b S1 + a S2)/(S2 + b² S1) for a and (b S1 + a S2)/(S1 + a² S2) for b, S_j = E s_j²: see
    `structure.single_equation_limits`. They are the effects only where the other effect is 0. The
    covariance is White's (1980). Raises ValueError for sums without the constant, and for an
    outcome that its mean explains to the last digit.

    >>> rng = np.random.default_rng(0)
    >>> W2 = rng.standard_normal(1000)
    >>> sums = MomentSums.of(2 * W2, W2, np.ones((1000, 1)), constant_covariance=True)
    >>> single_equation(sums).estimate
    (2.0, 0.5)
    """
    if sums.blocks != 4:
        raise ValueError(
            "sums without the constant as instrument hold no least squares: make them by "
            "MomentSums.of(..., constant_covariance=True)"
        )
    at = sums.instruments * np.arange(3)
    cross, first, second = sums.first[at]
    for name, total in (("W1", first), ("W2", second)):
        if not total > 0:
            raise ValueError(
                f"{name} is 0 in all {sums.count} rows: it has nothing left to regress"
            )
    a, b = cross / second, cross / first
    score = np.array([[1.0, 0.0, -a], [1.0, -b, 0.0]]) / [[second], [first]]
    spread = score @ sums.second[np.ix_(at, at)] @ score.T
    return SingleEquation((float(a), float(b)), spread)
