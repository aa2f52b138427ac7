"""An alarm for effects that change along a stream: a CUSUM of the moments' scores.

A batch's scores of the effects at the estimate from the rows before it are like recursive
residuals: with G their sum, Q the sum of their rows' squares, both over 1 + n/N for the error of
that estimate, G is without change a martingale that Q keeps in scale, and

    P{ some batch: G'(Q + m I)⁻¹ G ≥ 2 log 1/α + log det(I + Q/m) } ≤ α

however long the stream: Robbins' (1970) mixture of exponential martingales, normalised by what was
seen instead of a variance that is known (de la Peña, Klass and Lai, 2004: exact for symmetric
scores, whose tails do not matter then). The bound is tightest where Q is about m I. All rows count,
also where the estimate forgets; `stream.watched` says which moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, sqrt

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.bidirectional.evidence import Assumptions
from hakari.inference.bidirectional.orthogonal_moments import MomentSums

LEVEL = 0.01  # of false alarms, in all the stream


@dataclass(frozen=True)
class Alarm:
    """The first row after which the moments had left the bound: effects, or heads, have changed."""

    row: int
    level: float

    def __str__(self) -> str:
        return (
            f"the effects, or what is held against them, changed before row {self.row:,} (false "
            f"alarms in a whole stream: {self.level:.0%})"
        )


@dataclass(frozen=True)
class Monitor:
    """The walk. walk (2,): G of both effects' scores; squares (2, 2): Q; scale: m; past: all sums.

    Scores have unit variance by the rows before. ratio: the largest statistic over its bound so
    far; above 1 there is an alarm.
    """

    walk: Float[ndarray, " 2"]
    squares: Float[ndarray, "2 2"]
    scale: float
    past: MomentSums
    ratio: float = 0.0
    alarm: Alarm | None = None

    @classmethod
    def starting(cls, past: MomentSums) -> Monitor:
        """Before the first batch, after the rows of a warm-up."""
        return cls(np.zeros(2), np.zeros((2, 2)), float(past.count), past)

    @property
    def heights(self) -> tuple[float, float]:
        """The statistic and its bound."""
        total = self.squares + self.scale * np.eye(2)
        growth = float(np.linalg.slogdet(total / self.scale)[1])
        return float(self.walk @ np.linalg.solve(total, self.walk)), 2 * log(1 / LEVEL) + growth

    def after(self, assumptions: Assumptions, new: MomentSums, row: int) -> Monitor:
        """The walk after a batch that ends with a row, judged at the estimate from before it."""
        past, batch = assumptions.moments(self.past), assumptions.moments(new)
        turn, moved = _scores(past, assumptions), replace(self, past=self.past + new)
        if turn is None:
            return moved
        u, v = past.solve(assumptions.restrict).uv
        g = np.kron([1.0, -u, -v], np.eye(batch.instruments)) @ batch.first
        square = batch.weight * batch.score_covariance(u, v)
        share = 1 + new.count / past.weight
        walk = self.walk + turn @ g / sqrt(share)
        squares = self.squares + turn @ square @ turn.T / share
        moved = replace(moved, walk=walk, squares=squares)
        height, bound = moved.heights
        alarm = self.alarm
        if alarm is None and height >= bound:
            alarm = Alarm(row, LEVEL)
        return replace(moved, ratio=max(self.ratio, height / bound), alarm=alarm)

    def beside(self, other: Monitor) -> Monitor:
        """The walk, with the other's alarm where it has none: shards are watched apart."""
        alarm = self.alarm or other.alarm
        return replace(self, ratio=max(self.ratio, other.ratio), alarm=alarm)


def _scores(past: MomentSums, assumptions: Assumptions) -> Float[ndarray, "2 q"] | None:
    """What makes scores of u and v from the moments, of unit covariance by the rows so far.

    A row of zeros stands for an effect that is known. None where there is no estimate.
    """
    u, v = past.solve(assumptions.restrict).uv
    if not np.isfinite([u, v]).all():
        return None
    free = {None: [1, 2], "b=0": [2], "a=0": [1]}[assumptions.restrict]
    V = past.score_covariance(u, v)
    size = np.sqrt(np.diag(V))
    inverse = np.linalg.pinv(V / np.outer(size, size), rcond=1e-10, hermitian=True)
    V = inverse / np.outer(size, size)  # its inverse, without instruments that are one too many
    D = past.first.reshape(3, -1)[free].T
    out = np.zeros((2, len(V)))
    out[: len(free)] = np.linalg.solve(np.linalg.cholesky(D.T @ V @ D), D.T @ V)
    return out
