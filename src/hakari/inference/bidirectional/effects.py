"""The answer: both effects, their errors and set, the other root, and whether to believe it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import norm

from hakari.inference.bidirectional.confidence_set import ConfidenceSet, confidence_set
from hakari.inference.bidirectional.evidence import Assumptions, Evidence
from hakari.inference.bidirectional.identification import Identification, identification
from hakari.inference.bidirectional.orthogonal_moments import Solution
from hakari.inference.bidirectional.structure import mirror, multipliers

Root = Literal["stable", "mirror"]
RULES = {
    "stable": "|ab| < 1: feedback dies out",
    "mirror": "|ab| > 1, as asked: the equations are named the other way round",
}


def judged(evidence: Evidence, assumptions: Assumptions) -> Identification:
    """`identification` of evidence under assumptions, and whether the rule can pick a root.

    Where the 95 % set reaches |ab| = 1, the point is not told from its mirror: no estimate then.
    """
    moments = assumptions.moments(evidence.sums)
    if assumptions.restrict is not None:
        return identification(moments, restrict=assumptions.restrict)
    if assumptions.regimes:  # dummies are not inverse variances, which strength is about
        found = identification(moments, features=evidence.ratio)
        found = replace(found, strength=np.nan, least_information=np.nan)
    else:
        found = identification(moments, index=evidence.ratio)
    if not found.identified:
        return found
    met = [edge for edge in confidence_set(moments).edges if edge.startswith("ab")]
    if not met:
        return found
    reason = f"the 95% set reaches {' and '.join(met)}: the rule |ab| < 1 does not pick a root"
    return replace(found, identified=False, reasons=(reason,))


Intervals = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Effects:
    """Effects (a, b): a of y2 on y1, b of y1 on y2.

    names: of y1 and y2. solution: of the moments. identification: the evidence that there is
    something to estimate; `estimate` is NaN without it, unless `anyway`. root: which of the two
    equivalent points is reported, by `rule`; `other_root` is the other.
    """

    names: tuple[str, str]
    solution: Solution
    evidence: Evidence
    assumptions: Assumptions
    identification: Identification
    root: Root = "stable"
    anyway: bool = False
    method: str = "moments"

    @property
    def given(self) -> bool:
        """Whether a point estimate is given."""
        return (self.identification.identified or self.anyway) and self.solution.roots.exists

    @property
    def rule(self) -> str:
        """What picked the root: the data cannot."""
        if self.method == "single-equation":
            return "none: each equation alone is biased by the other"
        return RULES[self.root]

    @property
    def estimate(self) -> tuple[float, float]:
        """(a, b) at the root that the rule picks; NaN where it is not given."""
        if not self.given:
            return (np.nan, np.nan)
        return self._points[self.root == "mirror"]

    @property
    def other_root(self) -> tuple[float, float]:
        """The observationally equivalent point, (1/b, 1/a)."""
        if not self.given or self.method == "single-equation":
            return (np.nan, np.nan)
        return self._points[self.root != "mirror"]

    @property
    def _points(self) -> tuple[tuple[float, float], tuple[float, float]]:
        a, b = self.solution.estimate
        one, other = mirror(a, b)
        return (a, b), (float(one), float(other))

    @property
    def covariance(self) -> Float[ndarray, "2 2"]:
        """Of `estimate`: the sandwich, by the delta method at the mirror."""
        if not self.given:
            return np.full((2, 2), np.nan)
        if self.root == "stable":
            return self.solution.covariance
        a, b = self.solution.estimate
        slope = np.array([[0.0, -1 / b**2], [-1 / a**2, 0.0]])
        return np.asarray(slope @ self.solution.covariance @ slope.T)

    @property
    def std_error(self) -> tuple[float, float]:
        """Standard errors of `estimate`."""
        first, second = np.sqrt(np.diag(self.covariance))
        return float(first), float(second)

    def interval(self, level: float = 0.95) -> Float[ndarray, "2 2"]:
        """Lower and upper ends of a and of b, (2, 2): estimate and standard errors.

        Right where the moments are strong; `confidence_set` is right everywhere.
        """
        if not (isinstance(level, int | float) and 0 < level < 1):
            raise ValueError(f"level {level!r} must lie between 0 and 1, such as 0.95")
        half = norm.ppf((1 + level) / 2) * np.array(self.std_error)
        return np.stack([self.estimate - half, self.estimate + half], axis=1)

    def confidence_set(self, level: float = 0.95) -> ConfidenceSet:
        """The Anderson-Rubin set of both effects; it may be unbounded, and says so."""
        if level not in self._sets:
            moments = self.assumptions.moments(self.evidence.sums)
            self._sets[level] = confidence_set(moments, level, self.assumptions.restrict)
        return self._sets[level]

    @cached_property
    def _sets(self) -> dict[float, ConfidenceSet]:
        return {}

    def set_intervals(self, level: float = 0.95) -> tuple[Intervals, Intervals]:
        """Intervals into which the confidence set projects, of a and of b, at the root's side.

        At the mirror a is 1/b of a point with |ab| < 1: an interval that holds 0 turns inside out.
        """
        found = self.confidence_set(level)
        if self.root == "stable":
            return found.a, found.b
        return _inverted(found.b), _inverted(found.a)

    def set_text(self, level: float = 0.95) -> str:
        """The confidence set in words, which are about its part with |ab| ≤ 1."""
        return self.confidence_set(level).text

    @cached_property
    def multipliers(self) -> pd.DataFrame:
        """What a shock to each outcome moves after all feedback, with standard errors."""
        if not self.given:
            value, error = np.full((2, 2), np.nan), np.full(4, np.nan)
        else:
            value, spread = multipliers(*self.estimate, self.covariance)
            error = np.sqrt(np.diag(spread))
        rows = [(f"shock to {self.names[j]}", self.names[i]) for i in range(2) for j in range(2)]
        index = pd.MultiIndex.from_tuples(rows, names=["shock", "outcome"])
        return pd.DataFrame({"effect": value.ravel(), "std_error": error}, index=index)

    @cached_property
    def instruments_agree(self) -> tuple[float, int, float]:
        """Hansen's J with all instruments: statistic, degrees of freedom, p-value.

        A small p says that the shocks are correlated in a way that moves with the covariates, or
        that an effect is not linear. NaN where there are no more instruments than effects.
        """
        found = self.assumptions.solve(self.evidence.sums, overidentified=True)
        return found.j, found.df, found.p_value

    @cached_property
    def draws(self) -> Float[ndarray, "R 2"]:
        """Multiplier bootstrap of `estimate`; empty unless `bootstraps` were asked for."""
        sums, out = self.evidence.sums, []
        for first in self.evidence.draws:
            again = replace(sums, first=first, weight=float(first[3 * sums.instruments]))
            roots = self.assumptions.solve(again).roots
            out.append(roots.other if self.root == "mirror" else (roots.a, roots.b))
        return np.array(out).reshape(-1, 2)

    @property
    def labels(self) -> tuple[str, str]:
        """Of the effects a and b."""
        one, two = self.names
        return f"{two} on {one}", f"{one} on {two}"

    @property
    def table(self) -> pd.DataFrame:
        """`table_at` 95 %."""
        return self.table_at(0.95)

    def table_at(self, level: float) -> pd.DataFrame:
        """A row an effect: estimate, standard error, interval, set's ends, other root."""
        ends, inside = self.interval(level), self.set_intervals(level)
        rows = {}
        for j, name in enumerate(self.labels):
            low = inside[j][0][0] if inside[j] else np.nan
            high = inside[j][-1][1] if inside[j] else np.nan
            rows[name] = {
                "estimate": self.estimate[j],
                "std_error": self.std_error[j],
                "lower": ends[j, 0],
                "upper": ends[j, 1],
                "set_lower": low,
                "set_upper": high,
                "other_root": self.other_root[j],
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("effect of")

    def plot(self, level: float = 0.95) -> Any:
        """A matplotlib `Figure`: the confidence set in the plane of both effects, and the roots."""
        from hakari.inference.bidirectional.effects_plane import effects_plane

        return effects_plane(self, level)

    def to_datatree(self) -> Any:
        """The bootstrap draws as a DataTree in ArviZ's schema. Raises ValueError without draws."""
        if not len(self.draws):
            raise ValueError("no draws: fit with bootstraps=200 or more")
        import xarray as xr

        data = xr.Dataset(
            {"effect": (("chain", "draw", "of"), self.draws[None])},
            {"chain": [0], "draw": np.arange(len(self.draws)), "of": list(self.labels)},
        )
        return xr.DataTree.from_dict({"/posterior": data})

    @property
    def _about_root(self) -> str:
        if self.method == "single-equation":
            return "least squares of each equation alone: biased wherever both effects are there"
        if self.assumptions.restrict is not None:
            return f"root: the one with {self.assumptions.restrict}, as assumed"
        return f"root: {self.rule}; the other root fits as well"

    def __str__(self) -> str:
        one, two = self.names
        lines = [f"{self.evidence.rows:,} rows, method {self.method}"]
        if self.given:
            columns = ["estimate", "std_error", "lower", "upper"]
            alone = self.method == "single-equation" or self.assumptions.restrict is not None
            columns += [] if alone else ["other_root"]
            lines += [self.table[columns].to_string(float_format=_digits)]
            lines += [self._about_root]
        else:
            lines += [f"no point estimate of {two} on {one} and {one} on {two}"]
        if self.method != "moments":
            lines += ["by the orthogonal moments, whatever the method:"]
        lines += [self.set_text(), str(self.identification)]
        return "\n".join(lines)


def _digits(value: float) -> str:
    return f"{value + 0.0:.4g}"  # no minus before a zero


def _inverted(intervals: Intervals) -> Intervals:
    """The values 1/x of x in intervals, in order."""
    out: list[tuple[float, float]] = []
    for low, high in intervals:
        with np.errstate(divide="ignore"):
            ends = float(np.divide(1.0, high)), float(np.divide(1.0, low))
        if low < 0 < high:
            out += [(-np.inf, ends[1]), (ends[0], np.inf)]
        else:
            out.append((-np.inf if high == 0 else ends[0], np.inf if low == 0 else ends[1]))
    return tuple(sorted(out))
