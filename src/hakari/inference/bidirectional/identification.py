"""Do the variances move apart enough to tell the two effects, and to trust a point estimate?

Both effects are identified, up to their mirror, if and only if ρ(x) = s1²/s2² is not constant
(design note bidirectional-effects, section 2.2). Three views: does log ρ depend on x at all; how
large is E ρ E 1/ρ − 1, on which the standard errors hang; and have the means of k W1² and k W2²
the rank 2 that the solution divides by.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, pi, sqrt

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize_scalar
from scipy.stats import chi2, norm

from hakari.inference.bidirectional.orthogonal_moments import MomentSums, Restriction, Solution

WEAK_F = 10.0  # Staiger and Stock (1997); Stock and Yogo (2005): a 5% test then errs under 15%
DEPENDENT = 1e-10  # share of the largest eigenvalue below which a feature repeats others
Test = tuple[float, int, float]  # statistic, degrees of freedom, p-value


WANTED = {
    "constant ratio, features": "small p: the variances' ratio moves",
    "constant ratio, index": "small p: the variances' ratio moves",
    "rank of the moments": f"{WEAK_F:g} a degree and more: strong",
    "a solution exists": "small p: no effects fit",
    "instruments agree": "small p: the shocks' covariance moves, or effects are not linear",
}


@dataclass(frozen=True)
class RatioSums:
    """Sums over rows of features P, the constant first, and r = log ε1² − log ε2².

    gram P'P, cross P'r, square r'r; they add over rows, folds and shards. count: of rows, or their
    weight.
    """

    count: float
    gram: Float[ndarray, "P P"]
    cross: Float[ndarray, " P"]
    square: float

    @classmethod
    def of(cls, features: Float[ndarray, "n P"], log_ratio: Float[ndarray, " n"]) -> RatioSums:
        """Sums of rows; features has the constant first, log_ratio is log ε1² − log ε2².

        The same of W1 and W2 tests the same: Var W1/Var W2 = (ρ + a²)/(b²ρ + 1) moves with ρ alone,
        always the same way while |ab| < 1, and needs no estimate of the effects. Raises ValueError
        where a value is not finite, such as the log of an error of 0.

        >>> RatioSums.of(np.array([[1.0, 2.0], [1.0, 4.0]]), np.array([1.0, 3.0])).cross.tolist()
        [4.0, 14.0]
        """
        P, r = np.asarray(features, dtype=float), np.asarray(log_ratio, dtype=float)
        if not (np.isfinite(P).all() and np.isfinite(r).all()):
            bad = int(np.flatnonzero(~(np.isfinite(P).all(axis=1) & np.isfinite(r)))[0])
            raise ValueError(f"features or log ratio are not finite in row {bad}: drop the row")
        return cls(len(r), P.T @ P, P.T @ r, float(r @ r))

    def __add__(self, other: RatioSums) -> RatioSums:
        if self.gram.shape != other.gram.shape:
            raise ValueError(
                f"sums of {len(self.cross)} and {len(other.cross)} features do not add: use the "
                "same features"
            )
        return RatioSums(
            self.count + other.count,
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
        )

    def scaled(self, factor: float) -> RatioSums:
        """The sums with every row's weight times factor."""
        return RatioSums(
            factor * self.count, factor * self.gram, factor * self.cross, factor * self.square
        )


@dataclass(frozen=True)
class Identification:
    """Whether a point estimate is to be trusted, why not, and the tests behind it.

    tests: name to (statistic, degrees of freedom, p-value). strength: E ρ E 1/ρ − 1 without the
    noise of the instruments; least_information: the smallest eigenvalue of the information of one
    row, with y1 and y2 scaled so that both effects weigh the same.
    """

    identified: bool
    reasons: tuple[str, ...]
    tests: dict[str, Test]
    strength: float
    least_information: float

    def __str__(self) -> str:
        head = "identified" if self.identified else "not identified: " + "; ".join(self.reasons)
        lines = [
            f"  {name}: {s:.4g}, df {df}, {_p(p)}; {WANTED.get(name, '')}"
            for name, (s, df, p) in self.tests.items()
        ]
        if np.isfinite(self.strength):
            lines.append(f"  strength E ρ E 1/ρ − 1: {self.strength:.4g}; the larger the better")
        return "\n".join([head, *lines])


def identification(
    sums: MomentSums,
    features: RatioSums | None = None,
    index: RatioSums | None = None,
    level: float = 0.05,
    restrict: Restriction | None = None,
) -> Identification:
    """Is there a point estimate to give? If not, the Anderson-Rubin set is what the data say.

    features: log ratio on features of x, for nR². index: log ratio on the constant and the log
    ratio that other folds predict, for one degree of freedom, sharper with many features. level:
    of both tests together (Bonferroni). Identified where one that is given rejects a constant
    ratio, `rank_test` is at least 10 per degree of freedom, and some effects solve the moments.
    restrict: an effect known to be 0; then the other needs no more than instruments that move with
    the square of its cause, by the same bound.
    """
    solution = sums.solve(restrict)
    tests: dict[str, Test] = {}
    if features is not None:
        tests["constant ratio, features"] = ratio_test(features)
    if index is not None:
        tests["constant ratio, index"] = index_test(index)
    varies = [p for _, _, p in tests.values()]
    tests["rank of the moments"] = rank_test(sums, restrict)
    if restrict is None:
        tests["a solution exists"] = _solvable(solution)
    if solution.df:
        tests["instruments agree"] = (solution.j, solution.df, solution.p_value)
    reasons = _reasons(varies, tests["rank of the moments"], solution, level)
    strength = variance_strength(sums, *solution.estimate)
    least = (sqrt(1 + max(strength, 0.0)) - 1) / (1 - np.prod(solution.estimate)) ** 2
    return Identification(not reasons, reasons, tests, strength, float(least))


def ratio_test(sums: RatioSums) -> Test:
    """The n R² of the log ratio on the features: chi-square if the ratio is constant.

    Degrees of freedom: features that do not repeat others, without the constant. Shocks
    independent of x are what makes the log ratio homoskedastic under the hypothesis.
    """
    residual, total, rank = _squares(sums)
    statistic = sums.count * (1 - residual / total)
    return statistic, rank, float(chi2.sf(statistic, rank)) if rank else nan


def index_test(sums: RatioSums) -> Test:
    """Slope of the log ratio on a predicted one, over its standard error without slope.

    One-sided: a prediction that is worth something has a positive slope. Predict each row from
    other folds, and take each fold's mean from its predictions, since a fold's mean and that of
    the others move oppositely. Raises ValueError for more than one feature beside the constant.
    """
    if len(sums.cross) != 2:
        raise ValueError(
            f"{len(sums.cross)} columns: an index test takes the constant and one predicted ratio"
        )
    statistic, rank, _ = ratio_test(sums)
    slope = sums.count * sums.cross[1] - sums.gram[0, 1] * sums.cross[0]
    z = float(np.sign(slope) * sqrt(max(statistic, 0.0)))
    return z, 1, float(norm.sf(z)) if rank else nan


def rank_test(sums: MomentSums, restrict: Restriction | None = None) -> Test:
    """The least n (Gδ)'V(δ)⁻¹(Gδ) over directions δ, G = E[k (W1², W2²)]: has G rank 2?

    Chi-square with one degree less than instruments if the rank is 1. It is the robust statistic
    of Cragg and Donald (1997), and the Anderson-Rubin statistic at infinite (u, v), so that a set
    at its critical value is unbounded there. Per degree it is the first-stage F of the direction
    that is known least (Sanderson and Windmeijer, 2016).
    """
    own = sums.standard
    if restrict is not None:  # one direction is left, whose mean is to differ from 0
        alone = np.array([0.0, 0.0, 1.0] if restrict == "b=0" else [0.0, 1.0, 0.0])
        statistic = float(own.criterion(alone))
        return statistic, own.rank, float(chi2.sf(statistic, own.rank))
    if own.rank < 2:
        return 0.0, 1, 1.0
    angles = np.linspace(0, pi, 181)

    def at(angle: float | ndarray) -> ndarray:
        return own.criterion(np.stack([0 * angle, np.cos(angle), np.sin(angle)], axis=-1))

    centre = angles[int(at(angles).argmin())]
    found = minimize_scalar(
        lambda angle: float(np.sqrt(max(float(at(angle)), 0.0))),  # a cone where it is 0
        bounds=(centre - pi / 180, centre + pi / 180),
        method="bounded",
        options={"xatol": 1e-12},
    )
    statistic = float(found.fun) ** 2
    return statistic, own.rank - 1, float(chi2.sf(statistic, own.rank - 1))


def variance_strength(sums: MomentSums, a: float, b: float) -> float:
    """E ρ E 1/ρ − 1 from instruments k = (1/s1², 1/s2²), the first two of the sums.

    E[k2 ε1²] E[k1 ε2²] / (E[k1 ε1²] E[k2 ε2²]) − 1: errors of k that do not depend on the row's
    shocks nor on ρ cancel, while those of k1/k2 itself would add their variance. Not below 0 but
    for noise; NaN for instruments that are not positive. Derived here.
    """
    q = sums.instruments
    if sums.blocks != 3 or q < 2:
        return nan
    m = sums.first.reshape(3, q)[:, :2]
    first = m[1] - 2 * a * m[0] + a * a * m[2]  # E[k ε1²]
    second = m[2] - 2 * b * m[0] + b * b * m[1]
    if not (min(first) > 0 and min(second) > 0):
        return nan
    return float(first[1] * second[0] / (first[0] * second[1]) - 1)


def _p(value: float) -> str:
    return "p < 1e-16" if value < 1e-16 else f"p {value:.2g}"


def _reasons(varies: list[float], rank: Test, solution: Solution, level: float) -> tuple[str, ...]:
    reasons = []
    if varies and not min(varies) * len(varies) < level:
        reasons.append(
            f"no sign that the variances' ratio depends on the covariates (p {min(varies):.2g})"
        )
    if not rank[0] >= WEAK_F * rank[1]:
        reasons.append(
            f"the moments are weak, F {rank[0] / rank[1]:.3g} where {WEAK_F:g} are needed for 5% "
            "tests to reject less than 15%"
        )
    if not solution.roots.exists:
        reasons.append(solution.roots.reason)
    return tuple(reasons)


def _solvable(solution: Solution) -> Test:
    """(1 − 4uv) over its standard error; a small p says that no effects fit."""
    u, v = solution.uv
    slope = -4 * np.array([v, u])
    spread = float(slope @ solution.uv_covariance @ slope)
    z = (1 - 4 * u * v) / sqrt(spread) if spread > 0 else nan
    return float(z), 1, float(norm.cdf(z))


def _squares(sums: RatioSums) -> tuple[float, float, int]:
    """Residual and total sums of squares around the mean, and the rank of centred features."""
    n, mean = sums.gram[0, 0], sums.gram[0, 1:]
    if not np.isclose(n, sums.count):
        raise ValueError(
            f"the first feature has sum of squares {n:g} over {sums.count} rows: it must be 1"
        )
    gram = sums.gram[1:, 1:] - np.outer(mean, mean) / n
    cross = sums.cross[1:] - mean * sums.cross[0] / n
    total = sums.square - sums.cross[0] ** 2 / n
    size = np.sqrt(np.diag(sums.gram)[1:])
    size = np.where(size > 0, size, 1.0)
    values, vectors = np.linalg.eigh(gram / np.outer(size, size))
    kept = values > DEPENDENT * max(values[-1], DEPENDENT)
    along = vectors[:, kept].T @ (cross / size)
    return float(total - (along**2 / values[kept]).sum()), float(total), int(kept.sum())
