"""Modes of the quasi-posterior's forms, and how far they are from the GMM estimates.

With a flat prior the form without determinant has its mode at continuously updated GMM, the
form with fixed weighting at two-step GMM; the full target's mode is neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize

from hakari.inference.gmm import Estimate, estimate
from hakari.inference.moments import LinearMoments
from hakari.inference.posterior import QuasiPosterior, value_and_gradient
from hakari.inference.prior import Flat


@dataclass(frozen=True)
class Mode:
    """A form's mode under a flat prior (K,), NaN where it has none near the estimate.

    shift: from CUE, in CUE's standard errors (K,).
    """

    form: str
    theta: Float[ndarray, " K"]
    shift: Float[ndarray, " K"]


def modes(moments: LinearMoments) -> list[Mode]:
    """Modes of the full target, without determinant and with fixed weighting, prior flat."""
    cue = estimate(moments, "cue")
    forms = {
        "full target": QuasiPosterior(moments, Flat()),
        "without determinant": QuasiPosterior(moments, Flat(), determinant=False),
        "fixed weighting": QuasiPosterior(moments, Flat(), weighting="two-step"),
    }
    return [_compared(form, mode(posterior), cue) for form, posterior in forms.items()]


def mode(posterior: QuasiPosterior) -> Float[ndarray, " K"]:
    """The local mode near the GMM estimate; NaN where the search runs away.

    >>> X = np.random.default_rng(1).standard_normal((100, 2))
    >>> moments = LinearMoments.from_arrays(X @ [1.0, 2.0] + 0.1 * X[:, 0] ** 2, X)
    >>> mode(QuasiPosterior(moments)).round(1)
    array([1., 2.])
    """
    white = posterior.whitened

    def descent(u: ndarray) -> tuple[float, ndarray]:
        value, slope = value_and_gradient(white.target, np.ascontiguousarray(u))
        return (-value, -slope) if np.isfinite(value) else (1e300, np.zeros_like(u))

    start = np.zeros(posterior.moments.K)
    found = minimize(descent, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    found = minimize(descent, found, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    lost = np.abs(found).max() > 10 or np.abs(descent(found)[1]).max() > 1e-4
    return np.full(posterior.moments.K, np.nan) if lost else white.theta(found)


def _compared(form: str, theta: Float[ndarray, " K"], cue: Estimate) -> Mode:
    return Mode(form, theta, (theta - cue.theta) / cue.std_error)
