"""An alarm for effects that change along a stream: a CUSUM of the moments' scores.

A batch's moments at the estimate from the rows before it, over √(1 + n/N), are like a recursive
residual: without change their standardised sum is a random walk, W. By Ville's inequality for the
normal mixture of its exponential martingales (Robbins, 1970),

    P{ some n: |W|² ≥ 2 (n + m) (log 1/α + log(1 + n/m)) } ≤ α

however long the stream; m is the number of rows at which the bound is tightest.
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
    """The walk. walk (2,): W of both moments; rows: n; scale: m; first: rows before it began.

    ratio: the largest |W|² over the bound so far; above 1 there is an alarm.
    """

    walk: Float[ndarray, " 2"]
    rows: float
    scale: float
    ratio: float = 0.0
    alarm: Alarm | None = None

    @classmethod
    def starting(cls, rows: float) -> Monitor:
        """Before the first batch, after so many rows of a warm-up."""
        return cls(np.zeros(2), 0.0, rows)

    @property
    def bound(self) -> float:
        """Of |W|²."""
        n, m = self.rows, self.scale
        return 2 * (n + m) * (log(1 / LEVEL) + log(1 + n / m))

    def after(self, assumptions: Assumptions, before: MomentSums, new: MomentSums) -> Monitor:
        """The walk after a batch, judged at the estimate from the rows before."""
        past, batch = assumptions.moments(before), assumptions.moments(new)
        found = past.solve(assumptions.restrict)
        if not np.isfinite(found.uv).all() or past.instruments < 2:
            return self
        u, v = found.uv
        g = (np.kron([1.0, -u, -v], np.eye(batch.instruments)) @ batch.first)[:2]
        V = past.score_covariance(u, v)[:2, :2]
        step = np.linalg.solve(np.linalg.cholesky(V), g)
        step = step / sqrt(1 + new.count / past.weight)
        moved = replace(self, walk=self.walk + step, rows=self.rows + new.count)
        ratio = float(moved.walk @ moved.walk) / moved.bound
        alarm = self.alarm
        if alarm is None and ratio >= 1:
            alarm = Alarm(int(self.scale + moved.rows), LEVEL)
        return replace(moved, ratio=max(self.ratio, ratio), alarm=alarm)

    def beside(self, other: Monitor) -> Monitor:
        """The walk, with the other's alarm where it has none: shards are watched apart."""
        alarm = self.alarm or other.alarm
        return replace(self, ratio=max(self.ratio, other.ratio), alarm=alarm)
