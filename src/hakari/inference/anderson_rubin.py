"""The confidence set of Anderson and Rubin (1949): it covers however weak the instruments.

One endogenous variable; the other regressors are partialled out by a linear map of the
columns, so that the robust statistic, too, comes from the sums of moments.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, nan

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import eig
from scipy.stats import chi2

from hakari.inference.covariance import products, transform, unpack
from hakari.inference.instruments import orthonormal, partialled, regression_gram
from hakari.inference.moments import LinearMoments

SINGULAR = 1e-12  # smallest over largest eigenvalue of a covariance that cannot be inverted


@dataclass(frozen=True)
class AndersonRubin:
    """Confidence set of the coefficient of the one endogenous variable, by inverting a test.

    intervals: the pieces in order, ends may be infinite; none when every value is rejected;
    ((nan, nan),) with a `note` when the set is not available.
    """

    name: str
    level: float
    df: int  # q, the excluded instruments
    intervals: tuple[tuple[float, float], ...]
    note: str | None
    n: int
    centre: float  # β = centre + scale t, and p = (1, −t) is (y, x)'s combination
    scale: float
    mean: Float[ndarray, "q 2"]  # of the partialled instruments, times those columns
    tensor: Float[ndarray, "packedq 3"]  # Ω's packed tensor

    @property
    def critical(self) -> float:
        """The statistic's critical value, chi-square with one degree an excluded instrument."""
        return float(chi2.ppf(self.level, self.df))

    def statistic(self, beta: Float[ndarray, "*batch"] | float) -> Float[ndarray, "*batch"]:
        """AR(β) = n m(β)'Ω(β)⁻¹m(β), NaN where there is none; β may be infinite."""
        t = (np.asarray(beta, dtype=float) - self.centre) / self.scale
        return _criterion(self, np.arctan(t))

    def p_value(self, beta: Float[ndarray, "*batch"] | float) -> Float[ndarray, "*batch"]:
        """Of the hypothesis that the coefficient is β."""
        p: ndarray = chi2.sf(self.statistic(beta), self.df)
        return p

    def describe(self) -> str:
        """The set in plain words."""
        label = f"{self.level:.0%} Anderson-Rubin set of {self.name}"
        if self.note is not None:
            return f"{label}: not available, {self.note}"
        if not self.intervals:
            return f"{label}: empty, no value agrees with all instruments"
        if self.intervals == ((-inf, inf),):
            return f"{label}: the whole line, the instruments say nothing about it"
        pieces = " and ".join(f"{_number(a)} to {_number(b)}" for a, b in self.intervals)
        unbounded = self.intervals[0][0] == -inf or self.intervals[-1][1] == inf
        return f"{label}: {pieces}" + (", unbounded, since instruments are weak" * unbounded)


def anderson_rubin(moments: LinearMoments, level: float = 0.95) -> AndersonRubin:
    """Set of values of the endogenous variable's coefficient that its instruments don't reject.

    Anderson and Rubin (1949) with the covariance that `moments` carries, imposed under the null
    (Stock and Wright, 2000): AR(β) is the continuously updated criterion of y − xβ and the
    excluded instruments, all partialled of the included regressors (Frisch, Waugh and Lovell),
    and chi-square whatever the instruments' strength. Not available, with the reason in
    `note`, unless exactly one variable is endogenous and Ω can be inverted.

    Raises ValueError for a level outside (0, 1) or moments that do not identify θ.

    >>> Z = np.random.default_rng(1).standard_normal((200, 2))
    >>> x = Z @ [1.0, 1.0] + Z[:, 0] ** 2
    >>> moments = LinearMoments.from_arrays(2 * x + Z[:, 1] ** 2 - 1, x[:, None], Z)
    >>> anderson_rubin(moments).describe()
    '95% Anderson-Rubin set of x0: 1.544 to 2.318'
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level:g} must lie between 0 and 1, such as 0.95")
    names, q = moments.names, len(moments.names.excluded)
    found = AndersonRubin(
        ", ".join(names.endogenous) or "no variable",
        level,
        q,
        ((nan, nan),),
        None,
        moments.n,
        0.0,
        1.0,
        np.full((q, 2), nan),
        np.full((q * (q + 1) // 2, 3), nan),
    )
    if len(names.endogenous) != 1 or moments.grams is None:
        count = len(names.endogenous)
        return replace(found, note=f"it is for one endogenous variable, here are {count}")
    moments.check()
    found = _partialled_criterion(found, moments)
    if _singular(found):
        return replace(found, note="the moments' covariance is singular: too few clusters or rows")
    return replace(found, intervals=_pieces(found))


def _partialled_criterion(found: AndersonRubin, moments: LinearMoments) -> AndersonRubin:
    """Mean and tensor of partialled instruments times (y − centre x, scale x)."""
    names = moments.names
    shared = [k for k, name in enumerate(names.moments) if name in names.parameters]
    variables = np.linalg.inv(moments.scale.right)
    columns = [names.parameters.index(names.moments[k]) + 1 for k in shared]
    pair = [0, names.parameters.index(names.endogenous[0]) + 1]
    gram = regression_gram(moments)
    rest = partialled(gram, variables[:, columns], variables[:, pair])
    (yy, xy), (_, xx) = rest.T @ gram @ rest
    centre = xy / xx
    scale = np.sqrt(max(yy - centre * xy, 1e-24 * yy) / xx)
    change = rest @ np.array([[1.0, 0.0], [-centre, scale]])
    instruments = orthonormal(moments, shared).T
    return replace(
        found,
        centre=float(centre),
        scale=float(scale),
        mean=instruments @ moments.mean_C @ change,
        tensor=transform(moments.tensor, instruments, change),
    )


def _covariances(found: AndersonRubin, angle: Float[ndarray, "*batch"]) -> tuple[ndarray, ndarray]:
    """Mean (..., q) and Ω (..., q, q) at t = tan(angle), both scaled by the angle's cosine."""
    p = np.stack([np.cos(angle), -np.sin(angle)], axis=-1)
    return p @ found.mean.T, unpack(products(p) @ found.tensor.T, found.df)


def _criterion(found: AndersonRubin, angle: Float[ndarray, "*batch"]) -> Float[ndarray, "*batch"]:
    """AR at t = tan(angle): smooth on the circle that closes the line at infinity."""
    if found.note is not None:
        return np.full(np.shape(angle), nan)
    m, omega = _covariances(found, angle)
    value: ndarray = found.n * (m * np.linalg.solve(omega, m[..., None])[..., 0]).sum(axis=-1)
    return value


def _singular(found: AndersonRubin) -> bool:
    _, omega = _covariances(found, np.linspace(-np.pi / 2, np.pi / 2, 8))
    spectrum = np.linalg.eigvalsh(omega)
    return bool((spectrum[:, 0] <= SINGULAR * spectrum[:, -1]).any())


def _pieces(found: AndersonRubin) -> tuple[tuple[float, float], ...]:
    """Cut the line where AR crosses its critical value; keep the pieces below it."""
    cuts = np.concatenate([[-np.pi / 2], np.sort(_crossings(found)), [np.pi / 2]])
    below = _criterion(found, (cuts[:-1] + cuts[1:]) / 2) <= found.critical
    ends = found.centre + found.scale * np.tan(cuts)
    ends[0], ends[-1] = -inf, inf
    edges = np.flatnonzero(np.diff(np.concatenate([[False], below, [False]]).astype(int)))
    return tuple((float(ends[a]), float(ends[b])) for a, b in edges.reshape(-1, 2))


def _crossings(found: AndersonRubin) -> Float[ndarray, " crossings"]:
    """All angles at which AR is critical, exactly, and perhaps some more.

    n m'Ω⁻¹m = c where Ω − (n/c) m m', a quadratic polynomial in t, is singular: the real
    eigenvalues of its companion pencil, infinite ones included.
    """
    q = found.df
    y, x = found.mean.T
    outer = np.stack([np.outer(y, y), np.outer(y, x) + np.outer(x, y), np.outer(x, x)])
    level, slope, bend = unpack(found.tensor.T, q) - found.n / found.critical * outer
    zero, one = np.zeros((q, q)), np.eye(q)
    pencil = np.block([[zero, one], [-level, slope]]), np.block([[one, zero], [zero, bend]])
    top, bottom = eig(*pencil, right=False, homogeneous_eigvals=True)
    product, size = top * bottom.conj(), np.abs(top) ** 2 + np.abs(bottom) ** 2
    real = np.abs(product.imag) <= 1e-6 * size
    angles: ndarray = np.arctan2(product.real, np.abs(bottom) ** 2)[real]
    return angles


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else ("-" * (value < 0) + "∞")


# --- partialling, in working columns ------------------------------------------------------
# A variable is a vector b of coordinates, b'w̃ in every row. The gram matrix G is the mean of
# w̃ w̃', so that two variables have the mean product a'G b.
