"""Algebra of two equations that feed each other: roots, mirror, information, reduced form.

y1 = a y2 + f1(x) + ε1 and y2 = b y1 + f2(x) + ε2, with ε_j = s_j(x) e_j uncorrelated given x and
d = 1 − ab. Two parameter points fit equally well, (a, b) and its mirror (1/b, 1/a): the data choose
the pair, |ab| < 1 chooses the point. The moments are linear in u = b/(1 + ab), v = a/(1 + ab).
Design note bidirectional-effects, sections 2.1 to 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan, sqrt

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Rows = Float[ndarray, "*rows"] | float


@dataclass(frozen=True)
class Roots:
    """Both parameter points of one (u, v): the one with |ab| < 1, and its mirror.

    exists: whether there are any, 4uv < 1; a, b, other are NaN where not, and `reason` says why.
    """

    exists: bool
    a: float
    b: float
    other: tuple[float, float]
    reason: str = ""


def effects_of(u: float, v: float) -> Roots:
    """Both roots of u = b/(1 + ab), v = a/(1 + ab).

    With r = √(1 − 4uv), which is (1 − ab)/(1 + ab), the root with |ab| < 1 is
    2(v, u)/(1 + r): no difference of like numbers, however small uv. Source: design note
    bidirectional-effects, section 2.3.

    >>> roots = effects_of(0.4 / 1.2, 0.5 / 1.2)
    >>> round(roots.a, 12), round(roots.b, 12), tuple(round(x, 12) for x in roots.other)
    (0.5, 0.4, (2.5, 2.0))
    """
    if not 4 * u * v < 1:
        reason = (
            f"4uv = {4 * u * v:.4g} is not below 1, so that no pair of effects fits the moments: "
            "the shocks are correlated, or the variances' ratio hardly moves"
        )
        return Roots(False, nan, nan, (nan, nan), reason)
    share = 2 / (1 + sqrt(1 - 4 * u * v))
    a, b = v * share, u * share
    return Roots(True, a, b, (1 / b if b else inf, 1 / a if a else inf))


def mirror(a: Rows, b: Rows) -> tuple[ndarray, ndarray]:
    """The point (1/b, 1/a), at which the same distribution is written with equations swapped.

    Infinite where b or a is 0. Source: design note bidirectional-effects, section 2.2.

    >>> tuple(float(x) for x in mirror(0.5, 0.4))
    (2.5, 2.0)
    """
    with np.errstate(divide="ignore"):
        return np.divide(1.0, b), np.divide(1.0, a)


def to_uv(a: Rows, b: Rows) -> tuple[ndarray, ndarray]:
    """(u, v) = (b, a)/(1 + ab), the coefficients that the moments are linear in.

    Infinite where ab = −1. Source: design note bidirectional-effects, section 2.3.
    """
    with np.errstate(divide="ignore"):
        share = np.divide(1.0, 1 + np.multiply(a, b))
    return np.asarray(b * share), np.asarray(a * share)


def effects_jacobian(a: float, b: float) -> Float[ndarray, "2 2"]:
    """Derivative of (a, b) by (u, v): (1 + ab)/(1 − ab) [[a², 1], [1, b²]].

    The inverse of the derivative of `to_uv`, whose determinant is (ab − 1)/(1 + ab)³.
    """
    return (1 + a * b) / (1 - a * b) * np.array([[a * a, 1.0], [1.0, b * b]])


def flip(
    a: float, b: float, f1: Rows, f2: Rows, s1: Rows, s2: Rows
) -> tuple[float, float, Rows, Rows, Rows, Rows]:
    """The same model written at the mirror: effects, mean functions and standard deviations.

    (1/b, 1/a, −f2/b, −f1/a, s2/|b|, s1/|a|); twice is the identity. Raises ValueError where an
    effect is 0, whose mirror is infinite. Source: design note bidirectional-effects, section 2.2.
    """
    if a == 0 or b == 0:
        raise ValueError(
            f"effects ({a:g}, {b:g}) have their mirror at infinity: only pairs without a 0 flip"
        )
    return 1 / b, 1 / a, -f2 / b, -f1 / a, s2 / abs(b), s1 / abs(a)


def log_likelihood(
    y1: Rows, y2: Rows, f1: Rows, f2: Rows, h1: Rows, h2: Rows, a: float, b: float
) -> Rows:
    """Gaussian log-likelihood of each row without its constant −log 2π.

    log |1 − ab| − ½ Σ (h_j + ε_j² exp(−h_j)), with h_j = log s_j². Equal at a point and at its
    `flip`. Source: design note bidirectional-effects, section 2.4, with the sign turned.

    >>> float(log_likelihood(1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    -2.5
    """
    first, second = y1 - a * y2 - f1, y2 - b * y1 - f2
    spread = h1 + first**2 * np.exp(-h1) + h2 + second**2 * np.exp(-h2)
    found: Rows = float(np.log(abs(1 - a * b))) - spread / 2
    return found


def information(rho: Float[ndarray, " n"], a: float, b: float) -> Float[ndarray, "2 2"]:
    """Efficient information of (a, b) in one row, (1 − ab)⁻² [[E 1/ρ, 1], [1, E ρ]].

    rho: s1²/s2² of each row. Singular where it is constant. Source: design note
    bidirectional-effects, section 2.3.
    """
    return np.array([[np.mean(1 / rho), 1.0], [1.0, np.mean(rho)]]) / (1 - a * b) ** 2


def efficient_variance(rho: Float[ndarray, " n"], a: float, b: float) -> Float[ndarray, "2 2"]:
    """Least variance of √n times the error of (a, b), the inverse of `information`.

    It holds for shocks of any law that are independent of each other given x; under another
    dependence the sandwich does. Infinite where ρ is constant. Source: design note
    bidirectional-effects, section 2.3.
    """
    up, down = float(np.mean(rho)), float(np.mean(1 / rho))
    with np.errstate(divide="ignore"):
        scale = np.divide((1 - a * b) ** 2, up * down - 1)
    return np.asarray(scale * np.array([[up, -1.0], [-1.0, down]]))


def multipliers(
    a: float, b: float, covariance: Float[ndarray, "2 2"] | None = None
) -> tuple[Float[ndarray, "2 2"], Float[ndarray, "4 4"]]:
    """What shocks do to (y1, y2) after all feedback, A⁻¹ = [[1, a], [b, 1]]/(1 − ab).

    covariance: of (a, b), for the covariance of A⁻¹ row by row (delta method); zeros without.
    Raises ValueError where ab = 1, at which feedback never ends.

    >>> multipliers(0.5, 0.4)[0].tolist()
    [[1.25, 0.625], [0.5, 1.25]]
    """
    d = 1 - a * b
    if d == 0:
        raise ValueError(f"effects ({a:g}, {b:g}) with ab = 1: feedback never ends, no multiplier")
    slope = np.array([[b, a], [1.0, a * a], [b * b, 1.0], [b, a]]) / d**2
    spread = np.zeros((2, 2)) if covariance is None else covariance
    return np.array([[1.0, a], [b, 1.0]]) / d, np.asarray(slope @ spread @ slope.T)


def single_equation_limits(a: float, b: float, S1: float, S2: float) -> tuple[float, float]:
    """Where least squares of one equation alone ends: its limits for a and for b.

    S1, S2: mean variances E s1² and E s2². Source: design note bidirectional-effects, 'Cases that
    cannot be tuned to', case 3.

    >>> tuple(round(x, 6) for x in single_equation_limits(0.5, 0.4, 1.0, 1.0))
    (0.775862, 0.72)
    """
    shared = b * S1 + a * S2
    return shared / (S2 + b * b * S1), shared / (S1 + a * a * S2)


def reduced_covariance(a: float, b: float, s1: Rows, s2: Rows) -> Float[ndarray, "*rows 2 2"]:
    """Covariance of (y1, y2) given x, A⁻¹ diag(s1², s2²) A⁻ᵀ, for standard deviations s1, s2."""
    inverse, _ = multipliers(a, b)
    variances = np.stack([np.square(s1), np.square(s2)], axis=-1)
    found: ndarray = (inverse * variances[..., None, :]) @ inverse.T
    return found
