"""Additive sums of the orthogonal moments, and the estimate, its sandwich and J from them.

Each row gives g(u, v) = k(x) (W1 W2 − u W1² − v W2²), with W_j = y_j − E[y_j|x] and instruments k:
k times ε1 ε2/(1 + ab) at the truth. Errors in E[y_j|x] enter as products and errors in k not at
all (Neyman orthogonality). Sums of the stacked z = (k W1 W2, k W1², k W2²) and of z z' say all of
g's mean and covariance at any (u, v). Design note bidirectional-effects, sections 2.3 and 2.6.

With w = (1, −u, −v), g = (w' ⊗ I) z, and the statistics are functions of w up to its length. So
they extend to infinite (u, v), where ab = −1, and take w = (1 + ab, −b, −a) for any effects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import nan, sqrt
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import chi2

from hakari.inference.bidirectional.structure import (
    Roots,
    effects_jacobian,
    effects_of,
    mirror,
)

Restriction = Literal["a=0", "b=0"]
ALIKE = 1e-9  # W1² and W2² so near to proportional that sums of doubles keep no digits of V
DEPENDENT = 1e-12  # share of the largest eigenvalue below which instruments are one too many


@dataclass(frozen=True)
class Solution:
    """The estimate of (a, b) under |ab| < 1, and what comes with it; NaN with `roots.reason`.

    covariance: of (a, b); uv, uv_covariance: of (u, v); j, df, p_value: Hansen's test that all
    instruments agree, NaN without more instruments than effects.
    """

    estimate: tuple[float, float]
    covariance: Float[ndarray, "2 2"]
    roots: Roots
    uv: tuple[float, float]
    uv_covariance: Float[ndarray, "2 2"]
    j: float
    df: int
    p_value: float

    @property
    def std_error(self) -> tuple[float, float]:
        """Standard errors of a and b."""
        first, second = np.sqrt(np.diag(self.covariance))
        return float(first), float(second)

    def moved(self, estimate: tuple[float, float], covariance: Float[ndarray, "2 2"]) -> Solution:
        """The same moments' tests beside an estimate that another method found."""
        a, b = estimate
        other = tuple(float(x) for x in mirror(a, b))
        roots = Roots(True, a, b, (other[0], other[1]))
        return replace(self, estimate=estimate, covariance=covariance, roots=roots)


@dataclass(frozen=True)
class MomentSums:
    """Sums over rows of z and, with squared row weights, of z z'; they add over rows and shards.

    count: rows that entered; weight: sum of their weights; first (m q,), second (m q, m q): m = 3
    blocks W1 W2, W1², W2² times the q instruments, or m = 4, with the instruments alone last and
    the constant as first of them, for `centred`.
    """

    count: int
    weight: float
    first: Float[ndarray, " z"]
    second: Float[ndarray, "z z"]
    blocks: int = 3

    @classmethod
    def of(
        cls,
        W1: Float[ndarray, " n"],
        W2: Float[ndarray, " n"],
        k: Float[ndarray, "n q"],
        row_weights: Float[ndarray, " n"] | None = None,
        constant_covariance: bool = False,
    ) -> MomentSums:
        """Sums of the rows' residuals W1, W2 and instruments k.

        row_weights: of importance or age, not counts of repeated rows, since a row of weight 2 has
        one error; default 1. constant_covariance: the shocks may be correlated with a covariance
        that does not depend on x (Lewbel, 2012): estimate with `centred`. Raises ValueError for
        arrays of other lengths or values that are not finite.

        >>> rng = np.random.default_rng(0)
        >>> W1, W2, k = rng.standard_normal(9), rng.standard_normal(9), rng.random((9, 2))
        >>> whole = MomentSums.of(W1[:4], W2[:4], k[:4]) + MomentSums.of(W1[4:], W2[4:], k[4:])
        >>> np.allclose(whole.second, MomentSums.of(W1, W2, k).second)
        True
        """
        weights = np.ones(len(W1)) if row_weights is None else np.asarray(row_weights, dtype=float)
        W1, W2, k = (np.asarray(x, dtype=float) for x in (W1, W2, k))
        _check_rows({"W1": W1, "W2": W2, "k": k, "row_weights": weights})
        products = [W1 * W2, W1 * W1, W2 * W2]
        if constant_covariance:
            products.append(np.ones(len(W1)))
            k = np.column_stack([np.ones(len(W1)), k])
        z = weights[:, None] * np.concatenate([k * p[:, None] for p in products], axis=1)
        return cls(len(W1), float(weights.sum()), z.sum(axis=0), z.T @ z, len(products))

    def __add__(self, other: MomentSums) -> MomentSums:
        if self.first.shape != other.first.shape or self.blocks != other.blocks:
            raise ValueError(
                f"sums of {self.instruments} instruments in {self.blocks} blocks and of "
                f"{other.instruments} in {other.blocks} do not add: use the same instruments"
            )
        return MomentSums(
            self.count + other.count,
            self.weight + other.weight,
            self.first + other.first,
            self.second + other.second,
            self.blocks,
        )

    def scaled(self, factor: float) -> MomentSums:
        """The sums with every row's weight times factor: forgetting before the next rows enter."""
        return replace(
            self,
            weight=factor * self.weight,
            first=factor * self.first,
            second=factor**2 * self.second,
        )

    @property
    def instruments(self) -> int:
        """q, the instruments in the sums."""
        return len(self.first) // self.blocks

    def centred(self) -> MomentSums:
        """Sums of (k − mean k) times (W1 W2, W1², W2², each minus its mean): Lewbel's moments.

        z is linear in what was summed, with weights that are its own means: their errors do not
        matter to first order. Raises ValueError unless made with `constant_covariance`.
        """
        if self.blocks != 4:
            raise ValueError(
                "sums without the instruments' own mean cannot be centred: make them by "
                "MomentSums.of(..., constant_covariance=True)"
            )
        means = self.first.reshape(4, -1) / self.weight
        of_instruments = np.column_stack([-means[3, 1:], np.eye(self.instruments - 1)])
        of_products = np.column_stack([np.eye(3), -means[:3, 0]])
        change = np.kron(of_products, of_instruments)
        return replace(
            self, first=change @ self.first, second=change @ self.second @ change.T, blocks=3
        )

    def score_covariance(self, u: float, v: float) -> Float[ndarray, "q q"]:
        """V(u, v), the mean of g g': g's mean has the covariance V/weight."""
        C = np.kron([1.0, -u, -v], np.eye(self.instruments))
        return np.asarray(C @ self.second @ C.T) / self.weight

    def solve(self, restrict: Restriction | None = None) -> Solution:
        """Estimate of (a, b): see `solve`."""
        return solve(self, restrict)

    @cached_property
    def standard(self) -> Standard:
        """The sums in units of their own: see `Standard`."""
        return _standardise(self)


@dataclass(frozen=True)
class Standard:
    """Sums in which residuals and instruments have unit scale and instruments are independent.

    first (3, r), second (3, r, 3, r): of r ≤ q combinations of the instruments; scale: σ, the size
    of W1 over that of W2, so that the working effects are A = a/σ and B = bσ.
    """

    first: Float[ndarray, "3 r"]
    second: Float[ndarray, "3 r 3 r"]
    scale: float

    @property
    def rank(self) -> int:
        """r, the instruments that are linearly independent."""
        return int(self.first.shape[1])

    def mean(self, w: Float[ndarray, "*batch 3"]) -> Float[ndarray, "*batch r"]:
        """Sum of g at w."""
        return np.asarray(w @ self.first)

    def covariance(self, w: Float[ndarray, "*batch 3"]) -> Float[ndarray, "*batch r r"]:
        """Sum of g g' at w."""
        return np.asarray(np.einsum("...a,aibj,...b->...ij", w, self.second, w))

    def criterion(self, w: Float[ndarray, "*batch 3"]) -> Float[ndarray, "*batch"]:
        """Anderson and Rubin's statistic n ḡ'V⁻¹ḡ, whatever the length of w."""
        g = self.mean(w)
        value: ndarray = (g * np.linalg.solve(self.covariance(w), g[..., None])[..., 0]).sum(-1)
        return value


def anderson_rubin(sums: MomentSums, a: ndarray | float, b: ndarray | float) -> ndarray:
    """Statistic n ḡ'V⁻¹ḡ of effects (a, b): chi-square, `sums.standard.rank` degrees, at the truth.

    Equal at a point and at its mirror, and valid however little the variances move. V is not
    centred, as the hypothesis has mean 0. Source: design note bidirectional-effects, section 2.6.
    """
    own = sums.standard
    A, B = np.broadcast_arrays(np.asarray(a, dtype=float) / own.scale, np.multiply(b, own.scale))
    w = np.stack([1 + A * B, -B, -A], axis=-1)
    return own.criterion(w / np.abs(w).max(axis=-1, keepdims=True))


def solve(sums: MomentSums, restrict: Restriction | None = None) -> Solution:
    """Estimate of (a, b) by two-step GMM in (u, v), exact when instruments are as many as effects.

    restrict: an effect known to be 0, a triangular system. The first step weights with V(0, 0),
    the second with V at the first; V is not centred, as in `anderson_rubin` (J is smaller than
    with a centred one, by the factor 1/(1 + J/n)). The covariance is the sandwich. Where the
    moments have no solution, NaN with the reason in `roots`; two positive instruments have one
    always, as each moment's line w12 = u w11 + v w22 stays in 4uv < 1 (Cauchy and Schwarz). Raises
    ValueError for fewer instruments than effects. Source: design note bidirectional-effects,
    section 2.3.
    """
    free = {None: (1, 2), "b=0": (2,), "a=0": (1,)}[restrict]
    if sums.instruments < len(free):
        raise ValueError(
            f"{sums.instruments} instrument for {len(free)} effects: give at least {len(free)}, or "
            "restrict='b=0' or 'a=0' for a system with one"
        )
    own = sums.standard
    columns = own.first[list(free)].T
    if own.rank < len(free) or np.linalg.cond(columns) > 1 / DEPENDENT:
        return _refused("the instruments move together: the variances' ratio is constant")
    w = np.array([1.0, 0.0, 0.0])
    for _ in range(2):
        V = own.covariance(w)
        w = _step(own, V, columns, free)
    g, at_end = own.mean(w), own.covariance(w)
    j = float(g @ np.linalg.solve(V, g))
    spread = np.zeros((2, 2))
    spread[np.ix_([i - 1 for i in free], [i - 1 for i in free])] = np.linalg.inv(
        columns.T @ np.linalg.solve(at_end, columns)
    )
    return _in_effects(w, spread, own, j, own.rank - len(free))


def _step(own: Standard, V: ndarray, columns: ndarray, free: tuple[int, ...]) -> ndarray:
    """The w at which g'V⁻¹g is least; without V where g can be 0."""
    w = np.array([1.0, 0.0, 0.0])
    if len(free) == own.rank:
        w[list(free)] = -np.linalg.solve(columns, own.first[0])
        return w
    white = np.linalg.solve(np.linalg.cholesky(V), np.column_stack([own.first[0], columns]))
    w[list(free)] = -np.linalg.lstsq(white[:, 1:], white[:, 0], rcond=None)[0]
    return w


def _in_effects(w: ndarray, spread: ndarray, own: Standard, j: float, df: int) -> Solution:
    """The solution at working w, in the units of the data."""
    units = np.array([1 / own.scale, own.scale])
    u, v = -w[1:] * units
    uv_covariance = spread * np.outer(units, units)
    roots = effects_of(float(u), float(v))
    slope = effects_jacobian(roots.a, roots.b)
    return Solution(
        (roots.a, roots.b),
        slope @ uv_covariance @ slope.T,
        roots,
        (float(u), float(v)),
        uv_covariance,
        j if df else nan,
        df,
        float(chi2.sf(j, df)) if df else nan,
    )


def _refused(reason: str) -> Solution:
    none = np.full((2, 2), nan)
    roots = Roots(False, nan, nan, (nan, nan), reason)
    return Solution((nan, nan), none, roots, (nan, nan), none, nan, 0, nan)


def _standardise(sums: MomentSums) -> Standard:
    if sums.blocks != 3:
        raise ValueError("sums made with constant_covariance=True are used through .centred()")
    q = sums.instruments
    first, second = sums.first.reshape(3, q), sums.second.reshape(3, q, 3, q)
    size = np.sqrt(np.einsum("aiai->ai", second))
    if not (size > 0).all():
        block, instrument = np.argwhere(~(size > 0))[0]
        raise ValueError(
            f"every row has 0 for {('W1 W2', 'W1²', 'W2²')[block]} times instrument {instrument} "
            f"({sums.count} rows): drop the instrument, or use residuals that vary"
        )
    alike = np.einsum("aibi->abi", second)[1, 2] / (size[1] * size[2])
    if (1 - alike**2 < ALIKE).all():
        raise ValueError(
            f"W1 and W2 are proportional to {1 - alike.max() ** 2:.1g}: their errors cannot be "
            "told apart in double precision; check that y1 and y2 are two variables"
        )
    scale = sqrt(float(np.exp(np.mean(np.log(size[1]) - np.log(size[2])))))
    unit = np.array([1.0, 1 / scale, scale])[:, None] / size[0]
    first, second = first * unit, second * unit[..., None, None] * unit
    values, vectors = np.linalg.eigh(np.einsum("aiaj->ij", second))
    kept = values > DEPENDENT * values[-1]
    turn = vectors[:, kept] / np.sqrt(values[kept])
    return Standard(first @ turn, np.einsum("aibj,ik,jl->akbl", second, turn, turn), scale)


def _check_rows(arrays: dict[str, ndarray]) -> None:
    n = len(arrays["W1"])
    for name, x in arrays.items():
        wanted = (n, x.shape[1]) if name == "k" and x.ndim == 2 else (n,)
        if x.shape != wanted or n == 0 or (name == "k" and x.ndim != 2):
            raise ValueError(
                f"{name} has shape {x.shape}: W1, W2 and row_weights need one number a row, k one "
                f"row of instruments for each of W1's {n} rows"
            )
        if not np.isfinite(x).all():
            bad = int(np.argwhere(~np.isfinite(x))[0][0])
            raise ValueError(f"{name} is not finite in row {bad}: drop the row or fill it in")
