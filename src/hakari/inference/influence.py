"""Joint covariance of estimates of all horizons and equations, from their influence functions.

Every form is V = Ψ'Ψ for rows Ψ made of the estimates' influence (N, q): Ψ'ξ with ξ standard normal
then has the law N(0, V) and no matrix is factored. Leads and lags of projection errors are
correlated by construction; with lag augmentation the scores are not, which is why the default
has no lags: local-projections.md 'Which Ω'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from hakari.inference.series import Series

Kind = Literal["hc0", "hc1", "hc3", "hac", "cluster", "driscoll-kraay"]
GRAMMAR = (
    "hc3, hc1, hc0, hac, hac:BANDWIDTH, and in panels cluster, driscoll-kraay or "
    "driscoll-kraay:BANDWIDTH"
)


@dataclass(frozen=True)
class ScoreCovariance:
    """How scores covary; make one with `parse_scores`. bandwidth: lags; None: 0.75 T^(1/3)."""

    kind: Kind
    bandwidth: int | None = None

    def __str__(self) -> str:
        lags = self.kind in ("hac", "driscoll-kraay")
        return self.kind + (
            f":{'auto' if self.bandwidth is None else self.bandwidth}" if lags else ""
        )


def parse_scores(text: str | ScoreCovariance) -> ScoreCovariance:
    """Read a covariance; raises ValueError, naming the grammar, for anything else.

    `robust` is `hc0`: White's, without a correction.

    >>> parse_scores("hac:4")
    ScoreCovariance(kind='hac', bandwidth=4)
    """
    if isinstance(text, ScoreCovariance):
        return text
    if not isinstance(text, str):
        raise TypeError(f"covariance {text!r} is not text: write {GRAMMAR}")
    kind, _, rest = text.strip().lower().partition(":")
    kind = {"robust": "hc0", "ehw": "hc0", "dk": "driscoll-kraay"}.get(kind, kind)
    if kind in ("hc0", "hc1", "hc3", "cluster") and not rest:
        return ScoreCovariance(kind)  # type: ignore[arg-type]
    if kind in ("hac", "driscoll-kraay"):
        if rest in ("", "auto"):
            return ScoreCovariance(kind)  # type: ignore[arg-type]
        if rest.isdecimal():
            return ScoreCovariance(kind, int(rest))  # type: ignore[arg-type]
    raise ValueError(f"unknown covariance {text!r}: write {GRAMMAR}")


def refuse_unfit(spec: ScoreCovariance, series: Series) -> None:
    """Raise ValueError where a covariance asks for a panel and there is none, or the reverse."""
    units = len(series.units)
    if spec.kind in ("cluster", "driscoll-kraay") and units == 1:
        raise ValueError(f"covariance '{spec}' needs a panel: give unit=COLUMN, or use hc3 or hac")
    if spec.kind == "hac" and units > 1:
        raise ValueError("covariance 'hac' is for one series: use driscoll-kraay or cluster")
    if spec.kind == "cluster" and units < 5:
        raise ValueError(f"covariance 'cluster' with {units} units: use driscoll-kraay")
    dates = len(np.unique(series.period))
    if spec.bandwidth is not None and spec.bandwidth >= dates:
        raise ValueError(
            f"covariance '{spec}' takes in {spec.bandwidth} lags of {dates} dates: use fewer, or "
            f"'{spec.kind}' for {automatic_lags(dates)}"
        )


def automatic_lags(dates: int) -> int:
    """Andrews's (1991) rate with Stock and Watson's constant: 0.75 T^(1/3)."""
    return int(np.ceil(0.75 * dates ** (1 / 3)))


def score_rows(
    influence: Float[ndarray, "N q"],
    leverage: Float[ndarray, "N q"],
    coefficients: int | Int[ndarray, " q"],
    spec: ScoreCovariance,
    series: Series,
) -> Float[ndarray, "R q"]:
    """Ψ with V = Ψ'Ψ.

    influence: of each row of the table, zero where a row is not used; leverage: of those rows,
    zero only where a row is not used; coefficients: of each column's regression, for hc1.
    """
    if spec.kind == "hc0":
        return influence
    if spec.kind == "hc1":
        used = (leverage > 0).sum(axis=0)  # a row of no influence is a row all the same
        return np.asarray(influence * np.sqrt(used / np.maximum(used - coefficients, 1)))
    if spec.kind == "hc3":
        left = np.maximum(1 - leverage, 1e-9)  # a row that fits itself has no residual either
        return np.asarray(influence / left)
    if spec.kind == "cluster":
        groups = _sums(influence, series.unit)
        there = _sums(np.asarray(leverage > 0, dtype=float), series.unit).any(axis=1).sum()
        return np.asarray(groups * np.sqrt(there / max(there - 1, 1)))
    by_date = _sums(influence, series.period - series.period.min())
    return moving_sums(by_date, lags(spec, by_date))


def lags(spec: ScoreCovariance, by_date: Float[ndarray, "D q"]) -> int:
    """The lags that a covariance takes in; 0 where it has none."""
    if spec.kind not in ("hac", "driscoll-kraay"):
        return 0
    if spec.bandwidth is not None:
        return spec.bandwidth
    return automatic_lags(int((by_date != 0).any(axis=1).sum()))


def moving_sums(rows: Float[ndarray, "N q"], bandwidth: int) -> Float[ndarray, "R q"]:
    """Ψ of Newey and West's covariance with `bandwidth` lags, R = N + bandwidth.

    Bartlett weights 1 − l/(m + 1) are the autocorrelation of m + 1 ones, so that sums over a
    moving window, over √(m + 1), have the HAC covariance as their plain one.
    """
    if bandwidth == 0:
        return rows
    padded = np.concatenate([np.zeros((1, rows.shape[1])), rows]).cumsum(axis=0)
    last = np.minimum(np.arange(len(rows) + bandwidth) + 1, len(rows))
    first = np.maximum(np.arange(len(rows) + bandwidth) - bandwidth, 0)
    window: ndarray = padded[last] - padded[first]
    return np.asarray(window / np.sqrt(bandwidth + 1))


def _sums(rows: ndarray, groups: ndarray) -> ndarray:
    out = np.zeros((int(groups.max()) + 1, rows.shape[1]))
    np.add.at(out, groups, rows)
    return out


def independent_rows(rows: Float[ndarray, "R q"], spec: ScoreCovariance, series: Series) -> float:
    """How many independent rows a covariance is worth: its degrees of freedom.

    With m lags, 1.5 n/(m + 1), the Bartlett kernel's equivalent (Kiefer and Vogelsang, 2005).
    """
    used = int((rows != 0).any(axis=1).sum())
    if spec.kind not in ("hac", "driscoll-kraay"):
        return float(used)
    dates = len(np.unique(series.period))
    m = len(rows) - int(np.ptp(series.period)) - 1
    return float(used - m) if m == 0 else min(1.5 * min(used - m, dates) / (m + 1), used - m)
