"""Linear risks: moments vanish at the risk's minimiser, found by another route."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

import hakari.inference as hi
from tests.designs import iv_design


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.8])
def test_expectile_is_the_minimiser_of_the_asymmetric_squares(tau):
    y, X, _ = iv_design(300, 3, 3)

    def risk(theta):
        residual = y - X @ theta
        return (np.abs(tau - (residual < 0)) * residual**2).mean()

    found = minimize(
        risk, np.ones(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}
    )
    posterior = hi.QuasiPosterior(hi.expectile_moments(y, X, tau), determinant=False)
    np.testing.assert_allclose(posterior.whitened.centre, found.x, atol=1e-5)


def test_ridge_is_the_closed_form():
    y, X, _ = iv_design(200, 4, 4)
    penalty = np.diag([0.0, 5.0, 5.0, 50.0])
    posterior = hi.QuasiPosterior(hi.ridge_moments(y, X, penalty), determinant=False)
    exact = np.linalg.solve(X.T @ X + penalty, X.T @ y)
    np.testing.assert_allclose(posterior.whitened.centre, exact, rtol=1e-9)
    plain = hi.ridge_moments(y, X, 0.0)
    theta = np.full(4, 0.9)
    np.testing.assert_allclose(
        plain.covariance_at(theta),
        hi.LinearMoments.from_arrays(y, X).covariance_at(theta),
        rtol=1e-10,
    )


def test_bad_risks_are_named():
    y, X, _ = iv_design(50, 2, 2)
    with pytest.raises(ValueError, match=r"tau 1.0: the asymmetry"):
        hi.expectile_moments(y, X, 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        hi.ridge_moments(y, X, -1.0)
    with pytest.raises(ValueError, match=r"need a number, \(2,\) or \(2, 2\)"):
        hi.ridge_moments(y, X, np.eye(3))
