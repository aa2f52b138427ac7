"""The Anderson-Rubin set of both effects: it covers however little the variances' ratio moves.

The statistic depends on w = (1 + ab, −b, −a) up to its length alone, so it is smooth on the whole
plane and equal at a point and its mirror. With A = a/σ = tan α and B = bσ = tan β, the region
|ab| ≤ 1 with its infinities is the square of s = α + β and t = α − β in ±π/2: ab = 1 at s = ±π/2,
ab = −1 at t = ±π/2, infinite effects in the corners. For a fixed t,

    w ∝ (cos t, (sin t − S)/2, −(sin t + S)/2),  S = sin s,

is a straight line in S, on which the set is exact: the statistic is critical where a polynomial
has its roots. Moments that move together leave a set along u + v, which these lines cross at right
angles; so it is found by such lines, however thin. Derived here; the set is that of design note
bidirectional-effects, section 2.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, pi
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import eig
from scipy.optimize import minimize_scalar
from scipy.stats import chi2

from hakari.inference.bidirectional.orthogonal_moments import (
    MomentSums,
    Restriction,
    Standard,
    anderson_rubin,
)
from hakari.inference.bidirectional.set_pieces import (
    Slice,
    interval_text,
    merged,
    percent,
    pieces_of,
)

Kind = Literal["empty", "bounded", "two pieces", "unbounded", "all"]
LINES = 181  # values of t that are tried before the set's own range is known
NODES = 301  # values of t in each range, dense at its ends: 1e-4 of its width
FLAT = 1e-6  # squared slope of moments that stay as they are along a line
ACROSS = np.array([0.0, -0.5, -0.5])  # w's move along S


@dataclass(frozen=True, repr=False)
class ConfidenceSet:
    """Effects that the moments do not reject: those with |ab| ≤ 1, and the mirror of each.

    kind: `bounded` and `two pieces` (or more) stay away from |ab| = 1; `unbounded` reaches it or
    infinity, as `edges` says, so that a point is not told from its mirror. pieces: polygons (m, 2)
    of (a, b), with infinite vertices for infinite effects. a, b: the intervals into which it
    projects. df: instruments.
    """

    level: float
    df: int
    kind: Kind
    pieces: tuple[Float[ndarray, "m 2"], ...]
    a: tuple[tuple[float, float], ...]
    b: tuple[tuple[float, float], ...]
    edges: tuple[str, ...]
    restrict: Restriction | None
    sums: MomentSums

    @property
    def critical(self) -> float:
        """The statistic's critical value, chi-square with one degree an instrument."""
        return float(chi2.ppf(self.level, self.df))

    def contains(self, a: ndarray | float, b: ndarray | float) -> ndarray:
        """Whether the points are in the set, exactly, mirrors included."""
        inside = np.asarray(anderson_rubin(self.sums, a, b) <= self.critical)
        allowed = {None: True, "b=0": np.equal(b, 0), "a=0": np.equal(a, 0)}[self.restrict]
        return inside & allowed

    def __repr__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        """The set in plain words."""
        given = f" given {self.restrict}" if self.restrict else ""
        label = f"{percent(self.level)} Anderson-Rubin set{given}"
        if self.kind == "empty":
            return f"{label}: empty, no effects agree with all instruments"
        if self.kind == "all":
            return f"{label}: everything, the variances say nothing about the effects"
        if self.restrict:
            name, free = ("a", self.a) if self.restrict == "b=0" else ("b", self.b)
            return f"{label}: {name} from {interval_text(free)}"
        found = (
            f"{label} with |ab| ≤ 1: a from {interval_text(self.a)}; b from {interval_text(self.b)}"
        )
        if self.kind != "unbounded":
            return found
        return f"{found}; it reaches {' and '.join(self.edges)}, where no rule picks a root"


def confidence_set(
    sums: MomentSums, level: float = 0.95, restrict: Restriction | None = None
) -> ConfidenceSet:
    """Effects whose Anderson-Rubin statistic is at most the chi-square quantile of the level.

    restrict: an effect known to be 0; then the set of the other is the roots of a polynomial, a
    quadratic for one instrument (the types of Dufour, 1997: bounded, unbounded, all). Raises
    ValueError for a level outside (0, 1).

    >>> rng = np.random.default_rng(1)
    >>> s = np.exp(rng.uniform(-1, 1, (1000, 2)))
    >>> W2 = s[:, 1] * rng.standard_normal(1000)
    >>> W1 = 0.5 * W2 + s[:, 0] * rng.standard_normal(1000)
    >>> found = confidence_set(MomentSums.of(W1, W2, s**-2.0), restrict="b=0")
    >>> found.text
    '95% Anderson-Rubin set given b=0: a from 0.4697 to 0.5195'
    """
    if not (isinstance(level, int | float) and 0 < level < 1):
        raise ValueError(f"level {level!r} must lie between 0 and 1, such as 0.95")
    own = sums.standard
    critical = float(chi2.ppf(level, own.rank))
    if restrict is not None:
        return _triangular(sums, level, critical, restrict)
    ranges = _ranges(own, critical, _estimate(sums))
    runs = [[(t, _slice(own, critical, t)) for t in _nodes(lo, hi)] for lo, hi in ranges]
    slices = [one for run in runs for one in run]
    count, pieces = pieces_of(runs, own.scale)
    edges = _edges(own, critical, slices)
    return ConfidenceSet(
        level,
        own.rank,
        _kind(count, edges, ranges, slices),
        tuple(p.polygon for p in pieces if len(p.polygon) > 2),
        merged([p.a for p in pieces]),
        merged([p.b for p in pieces]),
        edges,
        None,
        sums,
    )


def _kind(
    count: int, edges: tuple[str, ...], ranges: list[tuple[float, float]], slices: list[Slice]
) -> Kind:
    if not slices:
        return "empty"
    if ranges == [(-pi / 2, pi / 2)] and all(spans == [(-1.0, 1.0)] for _, spans in slices):
        return "all"
    if edges:
        return "unbounded"
    return "bounded" if count == 1 else "two pieces"


def _edges(own: Standard, critical: float, slices: list[Slice]) -> tuple[str, ...]:
    """Which ends of the region |ab| < 1 the set reaches."""
    far = own.criterion(np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])) <= critical
    found = {
        "ab = 1": any(abs(end) == 1 for _, spans in slices for span in spans for end in span),
        "ab = -1": any(abs(t) == pi / 2 for t, _ in slices),
        "infinite effects": bool(far.any()),
    }
    return tuple(name for name, reached in found.items() if reached)


# --- which lines meet the set -------------------------------------------------------------


def _estimate(sums: MomentSums) -> list[float]:
    """The t of the estimate, around which a narrow set lies; none without an estimate."""
    if sums.standard.rank < 2:
        return []
    a, b = sums.solve().estimate
    t = np.arctan(a / sums.standard.scale) - np.arctan(b * sums.standard.scale)
    return [float(t)] if np.isfinite(t) else []


def _ranges(own: Standard, critical: float, likely: list[float]) -> list[tuple[float, float]]:
    """Intervals of t whose lines meet the set: lines in a grid, the profile's minima, `likely`."""

    def meets(t: float) -> bool:
        return bool(_slice(own, critical, t))

    grid = np.linspace(-pi / 2, pi / 2, LINES)
    inside = np.array([meets(t) for t in grid])
    between = likely + _minima(own, grid, inside)
    tried = np.concatenate([grid, between])
    order = np.argsort(tried)
    inside = np.concatenate([inside, [meets(t) for t in between]]).astype(bool)[order]
    tried = tried[order]
    steps = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(int)))
    return [
        (
            tried[i] if i == 0 else _border(meets, tried[i], tried[i - 1]),
            tried[j] if j == len(tried) - 1 else _border(meets, tried[j], tried[j + 1]),
        )
        for i, j in zip(steps[::2], steps[1::2] - 1, strict=True)
    ]


def _border(meets: Callable[[float], bool], inside: float, outside: float) -> float:
    """The last t on the way outside whose line meets the set, by bisection."""
    for _ in range(60):
        middle = (inside + outside) / 2
        if middle in (inside, outside):
            break
        inside, outside = (middle, outside) if meets(middle) else (inside, middle)
    return inside


def _minima(own: Standard, grid: ndarray, inside: ndarray) -> list[float]:
    """Where the least statistic of a line has minima between the grid's: narrow sets lie there."""

    def profile(t: ndarray) -> ndarray:
        start = np.broadcast_to(_start(t), (5, len(t), 3))
        S = np.linspace(-0.9, 0.9, 5)[:, None] + np.zeros(len(t))
        return np.asarray(_valley(own, start, ACROSS, S, 1.0)[0].min(axis=0))

    def root(t: float) -> float:
        return float(np.sqrt(profile(np.array([t]))[0]))  # a cone at a narrow set

    least = np.concatenate([[inf], profile(grid), [inf]])
    low = (least[1:-1] <= least[:-2]) & (least[1:-1] <= least[2:]) & ~inside
    found = []
    for i in np.flatnonzero(low).tolist():
        ends = float(grid[max(i - 1, 0)]), float(grid[min(i + 1, LINES - 1)])
        at = minimize_scalar(root, bounds=ends, method="bounded", options={"xatol": 1e-12})
        found.append(float(at.x))
    return found


def _valley(
    own: Standard,
    start: Float[ndarray, "*batch 3"],
    along: Float[ndarray, 3],
    S: Float[ndarray, "*batch"],
    end: float,
) -> tuple[ndarray, ndarray, ndarray]:
    """Least statistic in ±end along lines, where it is, and the square of its slope there.

    Least squares with V from the step before, as the continuously updated estimate is found.
    """
    level, slope = own.mean(start), own.mean(along)
    both = np.stack([level, np.broadcast_to(slope, level.shape)], axis=-1)
    best, place, bend = np.full(S.shape, inf), S, np.ones(S.shape)
    for _ in range(8):
        V = own.covariance(start + S[..., None] * along)
        (ll, ls), (_, ss) = np.moveaxis(both.mT @ np.linalg.solve(V, both), (-2, -1), (0, 1))
        value, ss = (ll + 2 * S * ls + S * S * ss).clip(0), np.maximum(ss, FLAT)
        better = value < best
        best, place, bend = (
            np.where(better, new, old) for new, old in ((value, best), (S, place), (ss, bend))
        )
        S = np.clip(-ls / ss, -end, end)
    return best, place, bend


# --- one line -----------------------------------------------------------------------------


def _start(t: float | ndarray) -> Float[ndarray, "*batch 3"]:
    """The w of S = 0 on the line of t."""
    return np.stack([np.cos(t), np.sin(t) / 2, -np.sin(t) / 2], axis=-1)


def _slice(own: Standard, critical: float, t: float) -> list[tuple[float, float]]:
    """Intervals of S in ±1 in which the line of t is in the set."""
    return _below(own, critical, _start(t), ACROSS, 1.0)


def _below(
    own: Standard, critical: float, start: ndarray, along: ndarray, end: float
) -> list[tuple[float, float]]:
    """Intervals of τ in ±end (perhaps infinite) in which start + τ along is not rejected.

    Measured from where the statistic is least, in units of the set's width there: what is squared
    is small, so that thin sets keep their digits. That place is a cut too: where roots that all
    but meet are lost, no piece then has its middle in the set and its ends far outside.
    """
    _, place, bend = _valley(own, start, along, np.zeros(()), end)
    centre, width = float(place), float(np.sqrt(critical / bend))
    base, step = start + centre * along, width * along
    low, high = np.arctan((-end - centre) / width), np.arctan((end - centre) / width)
    cuts = np.sort([0.0, *_crossings(own, critical, base, step)])
    cuts = np.concatenate([[low], cuts[(cuts > low) & (cuts < high)], [high]])
    middle = (cuts[:-1] + cuts[1:])[:, None] / 2
    inside = own.criterion(np.cos(middle) * base + np.sin(middle) * step) <= critical
    ends = centre + width * np.tan(cuts)
    ends[0], ends[-1] = -end, end
    steps = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(int)))
    return [(float(ends[i]), float(ends[j])) for i, j in steps.reshape(-1, 2)]


def _crossings(own: Standard, critical: float, start: ndarray, along: ndarray) -> ndarray:
    """All angles arctan τ at which the statistic is critical, exactly, and perhaps some more.

    g'V⁻¹g = c where V − g g'/c, a quadratic polynomial in τ, is singular: the real eigenvalues of
    its companion pencil, infinite ones included.
    """
    ends = np.stack([start, along])
    g = own.mean(ends)
    form = np.einsum("xa,aibj,yb->xyij", ends, own.second, ends)
    form -= np.einsum("xi,yj->xyij", g, g) / critical
    (level, half), (other, bend) = form
    zero, one = np.zeros_like(level), np.eye(own.rank)
    pencil = (
        np.block([[zero, one], [-level, -half - other]]),
        np.block([[one, zero], [zero, bend]]),
    )
    top, bottom = eig(*pencil, right=False, homogeneous_eigvals=True)
    product, size = top * bottom.conj(), np.abs(top) ** 2 + np.abs(bottom) ** 2
    real = np.abs(product.imag) <= 1e-6 * size
    return np.asarray(np.arctan2(product.real, np.abs(bottom) ** 2)[real])


def _nodes(lo: float, hi: float) -> Float[ndarray, " t"]:
    nodes = lo + (hi - lo) * (1 - np.cos(np.linspace(0, pi, NODES))) / 2
    nodes[0], nodes[-1] = lo, hi
    return nodes


# --- a triangular system ------------------------------------------------------------------


def _triangular(
    sums: MomentSums, level: float, critical: float, restrict: Restriction
) -> ConfidenceSet:
    """The set of the effect that is free, on the line u = 0 or v = 0."""
    own = sums.standard
    free, unit = (2, own.scale) if restrict == "b=0" else (1, 1 / own.scale)
    spans = _below(own, critical, np.eye(3)[0], -np.eye(3)[free], inf)
    intervals = tuple((unit * lo, unit * hi) for lo, hi in spans)
    kind: Kind = "bounded" if len(intervals) == 1 else "two pieces"
    if not intervals:
        kind = "empty"
    elif intervals == ((-inf, inf),):
        kind = "all"
    elif intervals[0][0] == -inf or intervals[-1][1] == inf:
        kind = "unbounded"
    none = ((0.0, 0.0),) if intervals else ()
    a, b = (intervals, none) if restrict == "b=0" else (none, intervals)
    edges = ("infinite effects",) if kind in ("unbounded", "all") else ()
    return ConfidenceSet(level, own.rank, kind, (), a, b, edges, restrict, sums)
