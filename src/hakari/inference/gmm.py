"""Point estimates by the generalised method of moments, beside the posterior.

Everything comes from the sufficient statistics: Ω(θ) is quadratic in θ, so that estimates,
sandwich errors and Hansen's J cost nothing that depends on n. Hansen (1982); Hansen, Heaton
and Yaron (1996) for the continuously updated form. The work is done in working columns,
p̃ = (head, q), in which the moments are well conditioned (moments.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import solve_triangular
from scipy.optimize import minimize
from scipy.stats import chi2

from hakari.inference.moments import LinearMoments
from hakari.inference.posterior import (
    QuasiPosterior,
    covariance_of,
    first_step,
    head,
    solve,
    value_and_gradient,
)
from hakari.inference.prior import Flat

Method = Literal["two-step", "iterated", "cue"]

ROUNDS = 1000  # iterated GMM contracts by a constant factor a round, and may cycle
STANDS = 1e-10  # in standard errors: a step this short ends the search
FAR = 10.0  # in standard errors: a CUE this far from its start is worth a word


@dataclass(frozen=True)
class Statistic:
    """A test statistic, or NaN and a note that says why there is none.

    df: of the numerator (chi-square, F) or effective (Montiel Olea and Pflueger);
    df_residual: of an F's denominator, else infinite; critical: where a table or procedure
    gives one, the value at or above which the null is rejected.
    """

    value: float
    df: float
    p_value: float
    note: str | None = None
    df_residual: float = inf
    critical: float = nan

    @classmethod
    def unavailable(cls, note: str, df: float = nan) -> Statistic:
        """No number; `note` says why."""
        return cls(nan, df, nan, note)


@dataclass(frozen=True)
class Estimate:
    """A GMM estimate of K parameters with its sandwich covariance and Hansen's J.

    note: what the reader should know, such as why it did not converge; None when all is well.
    """

    method: Method
    names: tuple[str, ...]
    theta: Float[ndarray, " K"]
    covariance: Float[ndarray, "K K"]
    J: Statistic
    converged: bool
    note: str | None = None

    @property
    def std_error(self) -> Float[ndarray, " K"]:
        """Standard errors (K,)."""
        error: ndarray = np.sqrt(np.diag(self.covariance))
        return error


class _Fit(NamedTuple):
    """Estimate in working columns, the Ω (L, L) whose inverse weighted it, and how it went."""

    q: ndarray
    weighting: ndarray
    converged: bool = True
    note: str | None = None


def estimate(moments: LinearMoments, method: Method = "two-step") -> Estimate:
    """Estimate θ by GMM, from the sufficient statistics alone.

    method: `two-step` weights by Ω at two-stage least squares (for general moments, at equal
        weights of the scaled moments); `iterated` repeats until weighting and estimate agree;
        `cue` minimises n m(θ)'Ω(θ)⁻¹m(θ), Hansen, Heaton and Yaron's (1996) continuously
        updated estimator, locally, starting from the two-step estimate.

    Returns an `Estimate`; its covariance is the sandwich
    (R'WR)⁻¹ R'W Ω(θ̂) W R (R'WR)⁻¹ / n, with Ω of the kind that `moments` carries and no
    degrees-of-freedom correction, as linearmodels' IVGMM with the matching `cov_type`;
    J is n m(θ̂)'W m(θ̂), chi-square with L − K degrees of freedom, and not available if L = K.
    Raises ValueError for an unknown method, moments that do not identify θ, or an Ω that is
    singular at the estimate.

    >>> X = np.random.default_rng(1).standard_normal((100, 2))
    >>> moments = LinearMoments.from_arrays(X @ [1.0, 2.0] + 0.1 * X[:, 0] ** 2, X)
    >>> estimate(moments).theta.round(1)
    array([1., 2.])
    """
    if method not in get_args(Method):
        raise ValueError(f"GMM method {method!r}: use one of {', '.join(get_args(Method))}")
    moments.check()
    routes = {"two-step": _two_step, "iterated": _iterated, "cue": _continuous}
    fit = routes[method](moments)
    p = np.concatenate([[head(moments)], fit.q])
    back = -moments.scale.right[1:]
    return Estimate(
        method,
        moments.names.parameters,
        back @ p,
        back[:, 1:] @ _sandwich(moments, fit) @ back[:, 1:].T,
        _hansen(moments, fit),
        fit.converged,
        fit.note,
    )


# --- estimates ----------------------------------------------------------------------------


def _two_step(moments: LinearMoments) -> _Fit:
    weighting = covariance_of(moments, first_step(moments))
    return _Fit(_weighted(moments, weighting), weighting)


def _iterated(moments: LinearMoments) -> _Fit:
    q, weighting = _two_step(moments)[:2]
    step = inf
    for _ in range(ROUNDS):
        weighting = covariance_of(moments, q)
        new = _weighted(moments, weighting)
        step = np.sqrt(moments.n) * np.linalg.norm(_slope(moments, weighting) @ (new - q))
        q = new
        if step <= STANDS:
            return _Fit(q, weighting)
    note = f"estimate and weighting still move by {step:.1g} standard errors after {ROUNDS} rounds"
    return _Fit(q, weighting, False, note)


def _continuous(moments: LinearMoments) -> _Fit:
    """BFGS, then Newton; the criterion is −2 log of the posterior without determinant."""
    white = QuasiPosterior(moments, Flat(), determinant=False).whitened
    two_step, right = _two_step(moments).q, moments.scale.right[1:]
    start = white.u(-right @ np.concatenate([[head(moments)], two_step]))

    def descent(u: ndarray) -> tuple[float, ndarray]:
        value, slope = value_and_gradient(white.target, np.ascontiguousarray(u))
        return (-value, -slope) if np.isfinite(value) else (1e300, np.zeros_like(u))

    rough = minimize(descent, start, jac=True, method="BFGS", options={"gtol": 1e-6}).x
    u, step = _newton(lambda point: descent(point)[1], rough)
    q = np.linalg.solve(-right[:, 1:], white.theta(u) + right[:, 0] * head(moments))
    distance = float(np.abs(u - start).max())
    converged = bool(step <= 1e3 * STANDS)
    return _Fit(q, covariance_of(moments, q), converged, _journey(converged, distance))


def _journey(converged: bool, distance: float) -> str | None:
    if not converged:
        return (
            f"continuous updating did not converge: the search ended {distance:.3g} standard "
            "errors from the two-step estimate, where the criterion has no minimum, as happens "
            "when instruments are weak"
        )
    if distance > FAR:
        return (
            f"the continuously updated estimate lies {distance:.3g} standard errors from the "
            "two-step estimate: instruments may be weak"
        )
    return None


def _newton(gradient: Callable[[ndarray], ndarray], u: ndarray) -> tuple[ndarray, float]:
    """Sharpen a minimum; returns it and the last step, infinite where it is no minimum.

    The Hessian (K, K) comes from central differences of the gradient, at a distance of 1e-4
    standard errors. Flat tails have no positive curvature, or steps that stay long.
    """
    reach = 1e-4 * np.eye(len(u))
    length = inf
    for _ in range(8):
        columns = [(gradient(u + h) - gradient(u - h)) / 2e-4 for h in reach]
        hessian = (np.array(columns) + np.array(columns).T) / 2
        if not np.linalg.eigvalsh(hessian)[0] > 0:
            return u, inf
        step = np.linalg.solve(hessian, gradient(u))
        length = float(np.abs(step).max())
        if length > 1:
            return u, inf
        u = u - step
        if length <= STANDS:
            break
    return u, length


# --- what comes with an estimate ----------------------------------------------------------


def _hansen(moments: LinearMoments, fit: _Fit) -> Statistic:
    df = moments.L - moments.K
    if df == 0:
        note = f"as many moments as parameters ({moments.L}): no restriction to test"
        return Statistic.unavailable(note, 0)
    m = moments.mean_C @ np.concatenate([[head(moments)], fit.q])
    root = np.linalg.cholesky(fit.weighting)
    value = float(moments.n * (solve_triangular(root, m, lower=True) ** 2).sum())
    return Statistic(value, df, float(chi2.sf(value, df)))


def _sandwich(moments: LinearMoments, fit: _Fit) -> Float[ndarray, "K K"]:
    root = np.linalg.cholesky(fit.weighting)
    bread = solve_triangular(root.T, np.linalg.pinv(_slope(moments, fit.weighting)).T).T
    covariance = bread @ covariance_of(moments, fit.q) @ bread.T / moments.n
    symmetric: ndarray = (covariance + covariance.T) / 2
    return symmetric


def _slope(moments: LinearMoments, weighting: Float[ndarray, "L L"]) -> Float[ndarray, "L K"]:
    """chol(Ω)⁻¹ ∂m/∂q: √n times it turns a step into standard errors."""
    root = np.linalg.cholesky(weighting)
    slope: ndarray = solve_triangular(root, moments.mean_C[:, 1:], lower=True)
    return slope


def _weighted(moments: LinearMoments, weighting: Float[ndarray, "L L"]) -> Float[ndarray, " K"]:
    q: ndarray = solve(moments, weighting, np.empty((0, moments.K)), np.empty(0))
    return q
