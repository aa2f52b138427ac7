"""J, K and what follows: statsmodels' robust covariances, closed forms, differences, jumps."""

from __future__ import annotations

from math import erf, exp, pi, sqrt

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.optimize import root
from scipy.stats import norm

import hakari.inference as hi
from hakari.inference.gibbs.sandwich import CubeRootError, _growth, sampling_steps
from hakari.inference.sampling import generator
from tests.numerics.test_gibbs_losses import FORMULAS, custom, gibbs, rows

losses = hi.losses


def chance(purpose):
    return generator(11, purpose)


def design(n, purpose):
    """X (n, 2) with a column that is not symmetric."""
    return np.column_stack([np.ones(n), chance(purpose).random(n) ** 2])


def rates(posterior):
    """Large-sample rate of each coefficient, J⁻¹ over J⁻¹ K J⁻¹."""
    found = posterior.sandwich
    return np.diag(found.bread) / np.diag(found.covariance)


# --- against statsmodels ---------------------------------------------------------------------


def test_covariances_are_those_of_robust_regressions():
    fits = {
        "squared": sm.OLS(*rows("squared")).fit(cov_type="HC0"),
        "logistic": sm.Logit(*rows("logistic")).fit(disp=0, tol=1e-13, cov_type="HC0"),
        "poisson": sm.Poisson(*rows("poisson")).fit(disp=0, tol=1e-13, cov_type="HC0"),
    }
    for name, fit in fits.items():
        assert_allclose(gibbs(name).sandwich.covariance, fit.cov_params(), rtol=1e-7, atol=1e-12)
    for name, model in (("logistic", sm.Logit), ("poisson", sm.Poisson)):
        own = model(*rows(name)).fit(disp=0, tol=1e-13)
        assert_allclose(gibbs(name).sandwich.bread, own.cov_params(), rtol=1e-7, atol=1e-12)


def test_weighted_rows_have_the_covariance_of_weighted_least_squares():
    y, X = rows("squared")
    w = chance("weights").random(len(y)) + 0.1
    own = hi.GibbsPosterior(losses.squared(), (y, X, w))
    fit = sm.WLS(y, X, weights=w).fit(cov_type="HC0")
    assert_allclose(own.sandwich.covariance, fit.cov_params(), rtol=1e-8)


def test_misspecified_least_squares_rates_are_classical_over_white():
    y, X = rows("squared")
    y = y + X[:, 2] * chance("errors").standard_normal(len(y))
    fit = sm.OLS(y, X).fit()
    n, d = X.shape
    classical = np.diag(fit.cov_params()) * (n - d) / n
    own = hi.GibbsPosterior(losses.squared(), (y, X))
    sigma2 = fit.ssr / n
    assert_allclose(rates(own) * sigma2, classical / np.diag(fit.cov_HC0), rtol=1e-9)
    assert rates(own).max() > 1.5 * rates(own).min()


def test_spectrum_is_the_rates_of_directions():
    found = gibbs("huber").sandwich
    values = np.linalg.eigvals(found.bread @ found.score_variance).real
    assert_allclose(found.spectrum, np.sort(values), rtol=1e-9)


# --- closed forms in large samples (design note gibbs-calibration, section 1.11) --------------

N = 400_000
HUBER = {"normal": 1.15660, "t3": 0.88164}


def errors(law):
    make = chance(f"errors {law}")
    draws = {"normal": make.standard_normal, "laplace": make.laplace}
    return make.standard_t(3, N) if law == "t3" else draws[law](size=N)


def of_errors(loss, law, scale=1.0):
    X = design(N, "columns")
    return hi.GibbsPosterior(loss, (X @ [2.0, 1.0] + scale * errors(law), X))


CLOSED = [  # loss, law of the errors, scale, rate, four standard errors (of 12 seeds)
    (losses.squared(), "normal", 2.0, 0.25, 0.01),
    (losses.huber(1.345), "normal", 1.0, HUBER["normal"], 0.01),
    (losses.huber(1.345), "t3", 1.0, HUBER["t3"], 0.013),
    (losses.quantile(0.5), "normal", 2.0, 0.79788, 0.06),
    (losses.quantile(0.25), "normal", 1.0, 1.69481, 0.05),
    (losses.quantile(0.9), "normal", 1.0, 1.94998, 0.07),
    (losses.quantile(0.5), "laplace", 2.0, 2 / 2.0, 0.09),
]


@pytest.mark.parametrize(("loss", "law", "scale", "rate", "error"), CLOSED)
def test_rates_are_the_closed_forms(loss, law, scale, rate, error):
    found = of_errors(loss, law, scale)
    assert_allclose(rates(found), rate, rtol=error)
    assert_allclose(1 / found.sandwich.spectrum, rate, rtol=error)


@pytest.mark.parametrize("phi", [1.0, 3.0])
def test_poisson_rates_are_one_over_the_dispersion(phi):
    X = design(N, "columns")
    mu = np.exp(0.5 + 0.4 * X[:, 1])
    draw = chance("counts")
    y = draw.poisson(mu if phi == 1 else draw.gamma(mu / (phi - 1), phi - 1))
    assert_allclose(
        rates(hi.GibbsPosterior(losses.poisson(), (y, X))), 1 / phi, rtol=0.03 * sqrt(phi)
    )


def test_expectile_rates_of_normal_errors():
    tau = 0.8
    # m of N(0, 1): tau E(e - m)+ = (1 - tau) E(m - e)+
    up = lambda m: norm.pdf(m) - m * norm.sf(m)  # noqa: E731
    down = lambda m: norm.pdf(m) + m * norm.cdf(m)  # noqa: E731
    m = root(lambda m: tau * up(m) - (1 - tau) * down(m), 0.5).x[0]
    J = 2 * (tau * norm.sf(m) + (1 - tau) * norm.cdf(m))
    square = lambda e: (e - m) ** 2 * norm.pdf(e)  # noqa: E731
    K = 4 * (tau**2 * quad(square, m, 9)[0] + (1 - tau) ** 2 * quad(square, -9, m)[0])
    assert_allclose(rates(of_errors(losses.expectile(tau), "normal")), J / K, rtol=0.02)


def test_hinge_sandwich_is_that_of_the_population():
    """X = (1, z), z normal, P(y = 1 | z) = Φ(0.3 + z): J sits where the margin is 1."""
    share = lambda y, z: norm.cdf(y * (0.3 + z))  # noqa: E731

    def integral(function, theta, y):
        """E of function(z) on rows of class y with margin under 1."""
        edge = (1 / y - theta[0]) / theta[1]
        ends = (-9, edge) if y > 0 else (edge, 9)
        return quad(lambda z: function(z) * share(y, z) * norm.pdf(z), *ends, epsabs=1e-12)[0]

    def scores(theta):
        return [
            sum(-y * integral(f, theta, y) for y in (1, -1)) for f in (lambda z: 1, lambda z: z)
        ]

    theta = root(scores, [0.3, 1.0]).x
    K, J = np.empty((2, 2)), np.zeros((2, 2))
    for (i, j), power in np.ndenumerate(np.array([[0, 1], [1, 2]])):
        K[i, j] = sum(integral(lambda z, p=power: z**p, theta, y) for y in (1, -1))
    for y in (1, -1):
        z = (1 / y - theta[0]) / theta[1]
        J += share(y, z) * norm.pdf(z) / abs(theta[1]) * np.outer([1, z], [1, z])
    draw = chance("classes")
    z = draw.standard_normal(N)
    y = np.where(draw.random(N) < share(1, z), 1.0, -1.0)
    own = hi.GibbsPosterior(losses.hinge(), (y, np.column_stack([np.ones(N), z])))
    assert_allclose(own.minimiser, theta, atol=0.015)
    assert_allclose(own.sandwich.score_variance / N, K, rtol=0.02, atol=0.003)
    assert_allclose(own.sandwich.curvature / N, J, rtol=0.04, atol=0.01)


# --- differences -----------------------------------------------------------------------------


def test_steps_are_one_sampling_error():
    y = 3 * chance("steps").standard_normal(900) + 1e3
    own = hi.GibbsPosterior(lambda theta, y: (y - theta) ** 2 / 2, y, start=[0.0])
    step = sampling_steps(own.risk, own.minimiser, np.eye(1))
    assert step[0] == pytest.approx(y.std() / 30, rel=0.2)


@pytest.mark.parametrize(
    ("name", "error"),
    [("squared", 1e-4), ("logistic", 0.02), ("poisson", 0.05), ("expectile", 0.05),
     ("huber", 0.15), ("quantile", 0.3), ("hinge", 0.3)],
)  # fmt: skip
def test_differences_find_the_sandwich_of_the_compiled_loss(name, error):
    own, linear = custom(name).sandwich, gibbs(name).sandwich
    whiten = np.linalg.inv(np.linalg.cholesky(linear.covariance))
    assert_allclose(whiten @ own.covariance @ whiten.T, np.eye(3), atol=2 * error)
    root = np.linalg.inv(np.linalg.cholesky(linear.curvature))
    assert_allclose(root @ own.curvature @ root.T, np.eye(3), atol=error)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_differences_do_not_know_the_units(scale):
    y, X = rows("huber")
    formula = FORMULAS["huber"][1]

    def loss(theta, z):
        return formula(z[0], z[1] @ theta)

    own = hi.GibbsPosterior(loss, (y, X * scale), start=np.zeros(3))
    assert_allclose(rates(own), rates(custom("huber")), rtol=0.1)


def test_jumps_are_told_by_how_the_rise_grows():
    x = chance("x").standard_normal(3000)
    y = np.where(chance("y").random(3000) < np.where(x > 0.4, 0.8, 0.2), 1.0, -1.0)
    jump = hi.Loss(losses.threshold().function, batched=True, name="mcid")
    own = hi.GibbsPosterior(jump, (x, y), start=[0.4])
    with pytest.raises(CubeRootError, match=r"loss 'mcid' jumps .* to the [01]\.\d\d\)"):
        own.sandwich
    smooth = hi.GibbsPosterior(losses.smooth_threshold(0.3), (x, y), start=[0.4])
    assert smooth.sandwich.curvature > 0
    for posterior, low, high in ((own, 0.0, 1.4), (smooth, 1.9, 2.1), (custom("hinge"), 1.6, 2.1)):
        theta = posterior.minimiser if posterior is not own else np.array([0.4])
        axes = np.diag(sampling_steps(posterior.risk, theta, np.eye(len(theta))))
        assert low <= _growth(posterior.risk, theta, axes) < high


def test_constants_of_the_note():
    assert 2 / sqrt(2 * pi) * 2 == pytest.approx(1.5958, abs=1e-4)  # N(0, 1), tau = 1/2
    inside = erf(1.345 / sqrt(2))
    square = inside - 2 * 1.345 * exp(-(1.345**2) / 2) / sqrt(2 * pi)
    K = square + 1.345**2 * (1 - inside)
    assert inside / K == pytest.approx(HUBER["normal"], abs=1e-5)
