"""Calibrated rates against laws known exactly given the bootstrap's weights, and closed forms."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.testing import assert_allclose
from scipy.optimize import brentq
from scipy.stats import chi2, norm
from statsmodels.datasets import engel

import hakari.inference as hi
from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs import importance, rate_equation
from hakari.inference.gibbs.bootstrap import draw_weights
from hakari.inference.gibbs.cached_losses import Cache
from hakari.inference.gibbs.importance import Problem
from hakari.inference.gibbs.regions import Region
from hakari.inference.sampling import generator

LEVEL, SEED = 0.95, 5
losses = hi.losses
LAWS = {"normal": "standard_normal", "laplace": "laplace"}


def chance(purpose):
    return generator(31, purpose)


@cache
def regression(d, n=300, scale=2.0, law="normal"):
    """y and X (n, d) of errors that do not depend on X: K ∝ J in the mean."""
    X = np.column_stack([np.ones(n), chance(f"X {d}").standard_normal((n, d - 1))])
    draw = chance(f"errors {law} {d}")
    e = draw.standard_t(3, n) if law == "t3" else getattr(draw, LAWS[law])(size=n)
    return X @ np.arange(1.0, d + 1) + scale * e, X


def uneven(n=600):
    """Errors that grow with the second column: one rate cannot serve both directions."""
    X = np.column_stack([np.ones(n), chance("uneven").standard_normal(n)])
    return X.sum(1) + (0.4 + X[:, 1] ** 2) * chance("uneven errors").standard_normal(n), X


def weights_of(n, replicates=500, bootstrap="multinomial", **options):
    """The weights that `calibrate` draws with SEED."""
    return draw_weights(bootstrap, n, replicates, generator(SEED, "bootstrap"), **options)


def exact_ranks(posterior, weights, rate, kind, column=0):
    """Ranks of least squares: Gaussian posteriors, in closed form given the weights."""
    y, X = posterior.rows
    out = []
    for w in weights.astype(float):
        precision, pull = rate * (X.T * w) @ X, rate * (X.T * w) @ y
        for block in posterior.blocks:
            precision = precision + block.root.T @ block.root
            pull = pull + block.root.T @ block.centre
        away = posterior.minimiser - np.linalg.solve(precision, pull)
        if kind == "marginal":
            out.append(chi2.cdf(away[column] ** 2 / np.linalg.inv(precision)[column, column], 1))
        else:
            out.append(chi2.cdf(away @ precision @ away, len(away)))
    return np.array(out)


def exact_rate(posterior, weights, kind, near, column=0):
    """The root of the equation itself, within a factor of 1.6 of a rate."""

    def gap(log_rate):
        found = exact_ranks(posterior, weights, np.exp(log_rate), kind, column)
        return np.quantile(found, LEVEL) - LEVEL

    ends = np.log(near) + np.array([-0.5, 0.5])
    return float(np.exp(brentq(gap, *ends, xtol=1e-5)))


def agrees(found, posterior, weights, column=0):
    """The rate and its ranks are the exact ones up to the error of the particles."""
    kind = found.region.kind
    expected = exact_rate(posterior, weights, kind, found.rate, column)
    assert found.solved
    assert abs(np.log(found.rate / expected)) < 4 * found.monte_carlo + 2e-3
    assert found.monte_carlo < 0.05
    exact = exact_ranks(posterior, weights, found.rate, kind, column)
    assert np.sqrt(((found.ranks - exact) ** 2).mean()) < 0.012
    assert found.interval[0] < expected < found.interval[1]


# --- exact given the weights -----------------------------------------------------------------

CASES = [
    ("cloud", 1, "marginal", hi.Flat(), "multinomial"),
    ("cloud", 1, "marginal", hi.Normal(0.8, 0.1), "bayesian"),
    ("cloud", 2, "ellipse", hi.Flat(), "multinomial"),
    ("cloud", 3, "hpd", hi.Flat(), "bayesian"),
    ("cloud", 3, "hpd", hi.Normal(2.0, 0.5), "multinomial"),
    ("shift", 2, "marginal", hi.Normal(0.0, 0.5), "multinomial"),
    ("shift", 3, "ellipse", hi.Flat(), "bayesian"),
    ("shift", 7, "hpd", hi.Flat(), "multinomial"),
]


@pytest.mark.parametrize(("method", "d", "region", "prior", "bootstrap"), CASES)
def test_rates_solve_the_equation_of_the_exact_posteriors(method, d, region, prior, bootstrap):
    posterior = hi.GibbsPosterior(losses.squared(), regression(d), prior)
    found = hi.calibrate(
        posterior, LEVEL, region, bootstrap, 400, method=method, seed=SEED, particles=4096,
        coefficients=["theta[0]"] if region == "marginal" else None,
    )  # fmt: skip
    agrees(found.found[0], posterior, weights_of(300, 400, bootstrap))
    assert found.learning_rate == found.found[0].rate


def test_one_coefficient_is_the_variance_of_the_model_over_that_of_the_data():
    """Exact as the number of data sets grows; with 8,000 one standard error of log η is 2.1 %."""
    y, X = regression(1)
    posterior = hi.GibbsPosterior(losses.squared(), (y / 3, X))  # model variance 9
    found = hi.calibrate(posterior, replicates=8000, seed=SEED, particles=1024)
    assert found.learning_rate == pytest.approx(9 / y.var(), rel=0.07)
    assert found.found[0].asymptotic == pytest.approx(9 / y.var(), rel=0.04)


def cloud_of(posterior, weights, seed=SEED, particles=4096, **changes):
    problem = Problem(
        posterior, weights, clouds.first_order(posterior, weights), "cloud", particles, seed,
        Cache(None, ""),
    )  # fmt: skip
    rate = importance.asymptotic_rate(problem, Region("marginal", "x"), LEVEL)
    made = importance._make(problem, rate)
    groups = tuple((i, replace(p, **{k: v(p) for k, v in changes.items()})) for i, p in made.groups)
    return replace(made, groups=groups)


MUTANTS = {
    "none": {},
    "sign flipped": {"losses": lambda p: -p.losses},
    "judged at the truth": {"estimate": lambda p: p.estimate + 2 / 300**0.5},
    "no proposal": {"log_proposal": lambda p: 0 * p.log_proposal},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_weights_and_wrong_targets_are_told_from_right_ones(mutant):
    posterior = hi.GibbsPosterior(losses.squared(), regression(1))
    weights = weights_of(300)
    made = cloud_of(posterior, weights, **MUTANTS[mutant])
    expected = exact_rate(posterior, weights, "marginal", 0.2)
    region = Region("marginal", "x")
    root = rate_equation.solve(lambda r: made.ranks(region, r), LEVEL, expected, 1)
    error = abs(np.log(root.rate / expected))
    exact = exact_ranks(posterior, weights, expected, "marginal")
    distance = np.sqrt(((made.ranks(region, expected) - exact) ** 2).mean())
    right = error < 0.03 and distance < 0.012
    assert right == (mutant == "none")
    assert mutant == "none" or error > 0.1 or not root.found


def test_a_loss_times_a_constant_is_a_rate_divided_by_it():
    y, X = regression(2)
    rates = [
        hi.calibrate(
            hi.GibbsPosterior(lambda t, z, c=c: c * abs(z[0] - z[1] @ t), (y, X), start=[1.0, 2.0]),
            region="ellipse", replicates=200, seed=SEED, particles=1024,
        ).learning_rate
        for c in (1.0, 2.0**10)
    ]  # fmt: skip
    assert rates[0] == pytest.approx(2.0**10 * rates[1], rel=1e-6)


# --- closed forms in large samples -----------------------------------------------------------

CLOSED = [  # loss, law, scale, rate
    (losses.huber(1.345), "normal", 1.0, 1.15660),
    (losses.huber(1.345), "t3", 1.0, 0.88164),
    (losses.quantile(0.5), "normal", 2.0, 0.79788),
    (losses.quantile(0.5), "laplace", 2.0, 1.0),
    (losses.quantile(0.9), "normal", 1.0, 1.94998),
]


@pytest.mark.parametrize(("loss", "law", "scale", "rate"), CLOSED)
def test_rates_are_the_closed_forms_of_the_note(loss, law, scale, rate):
    """One standard error: 4.3 % of 2,000 data sets, 5 % of 4,000 rows (kinks: f(0) of them)."""
    posterior = hi.GibbsPosterior(loss, regression(2, 4000, scale, law))
    found = hi.calibrate(posterior, replicates=2000, seed=SEED, particles=1024)
    assert_allclose([f.rate for f in found.found], rate, rtol=0.2)
    log_rates = np.log([f.rate for f in found.found]) - np.log(rate)
    assert abs(log_rates.mean()) < 0.12


@pytest.mark.parametrize("phi", [1.0, 4.0])
def test_poisson_rates_are_one_over_the_dispersion(phi):
    n = 4000
    X = np.column_stack([np.ones(n), chance("poisson").random(n)])
    mu = np.exp(1 + X[:, 1])
    draw = chance("counts")
    y = draw.poisson(mu if phi == 1 else draw.gamma(mu / (phi - 1), phi - 1))
    posterior = hi.GibbsPosterior(losses.poisson(), (y, X))
    found = hi.calibrate(posterior, region="ellipse", replicates=2000, seed=SEED, particles=1024)
    assert found.learning_rate == pytest.approx(1 / phi, rel=0.15)
    assert not found.notes


def test_engel_rates():
    """Note, "Cases that cannot be tuned to" 5; and exact given the weights."""
    data = engel.load_pandas().data
    own = hi.GibbsPosterior.from_formula(losses.squared(), "foodexp ~ 1 + income", data)
    found = np.diag(own.sandwich.bread) / np.diag(own.sandwich.covariance)
    assert_allclose(found, [9.0641e-6, 5.9138e-6], rtol=2e-5)
    fit = sm.OLS.from_formula("foodexp ~ income", data).fit()
    assert_allclose(found * fit.mse_resid, [0.11802, 0.07700], rtol=1e-4)
    assert_allclose(found * fit.mse_resid, fit.bse**2 / fit.HC0_se**2, rtol=1e-9)
    result = hi.calibrate(own, bootstrap="bayesian", replicates=400, seed=SEED)
    weights = weights_of(235, 400, "bayesian")
    for column, each in enumerate(result.found):
        agrees(each, own, weights, column)
    assert "no single rate calibrates all directions" in result.notes[0]


def test_misspecified_regressions_have_a_rate_for_each_coefficient():
    y, X = uneven(4000)
    fit = sm.OLS(y, X).fit()
    posterior = hi.GibbsPosterior(losses.squared(), (y, X))
    found = hi.calibrate(posterior, replicates=2000, seed=SEED, particles=1024)
    expected = fit.bse**2 / fit.HC0_se**2 / fit.mse_resid
    assert expected[0] > 2 * expected[1]
    assert_allclose([f.rate for f in found.found], expected, rtol=0.2)
    assert found.learning_rate == min(f.rate for f in found.found)


# --- regions against each other --------------------------------------------------------------


def test_a_box_of_marginals_needs_a_smaller_rate_than_its_sides():
    """(z of .95 / z of .95^(1/d))²: .582 with 5 coefficients that do not depend on each other."""
    d = 5
    posterior = hi.GibbsPosterior(losses.squared(), regression(d, 2000))
    made = cloud_of(posterior, weights_of(2000, 1000, "bayesian"), particles=8192)
    sides = [Region("marginal", str(j), j) for j in range(d)]
    solved = lambda ranks: rate_equation.solve(ranks, LEVEL, 0.25, 1).rate  # noqa: E731
    alone = [solved(lambda r, s=s: made.ranks(s, r)) for s in sides]
    box = solved(lambda r: np.max([made.ranks(s, r) for s in sides], axis=0))
    factor = (norm.ppf(0.975) / norm.ppf((1 + LEVEL ** (1 / d)) / 2)) ** 2
    assert factor == pytest.approx(0.582, abs=5e-4)
    assert box / np.mean(alone) == pytest.approx(factor, rel=0.08)
    ellipse = rate_equation.solve(lambda r: made.ranks(Region("ellipse", ""), r), LEVEL, 0.25, d)
    assert ellipse.rate / box == pytest.approx(1 / factor, rel=0.08)  # 1.7


def test_coverage_of_an_ellipse_is_that_of_the_weighted_chi_square():
    y, X = uneven(4000)
    posterior = hi.GibbsPosterior(losses.squared(), (y, X))
    found = hi.calibrate(posterior, LEVEL, "ellipse", "bayesian", 2000, seed=SEED)
    assert found.spectrum.max() > 2 * found.spectrum.min()
    assert any("no single rate calibrates all directions" in note for note in found.notes)
    z = chance("chi-square").standard_normal((400_000, 2)) ** 2 @ found.spectrum
    rate = chi2.ppf(LEVEL, 2) / np.quantile(z, LEVEL)
    assert found.learning_rate == pytest.approx(rate, rel=0.13)
    curve = found.coverage_curve.set_index("level")["ellipse"]
    for level in (0.3, 0.5, 0.8):
        law = (z <= chi2.ppf(level, 2) / found.learning_rate).mean()
        assert curve.loc[level] == pytest.approx(law, abs=0.035)
    assert curve.loc[0.5] > 0.55  # other levels than the calibrated one are not nominal


def test_all_levels_are_nominal_where_the_two_information_matrices_agree():
    posterior = hi.GibbsPosterior(losses.squared(), regression(2, 4000))
    found = hi.calibrate(posterior, LEVEL, "ellipse", "bayesian", 2000, seed=SEED)
    curve = found.coverage_curve.set_index("level")
    inside = curve["ellipse"].between(curve["lower"] - 0.01, curve["upper"] + 0.01)
    assert inside.mean() > 0.95
    assert not found.notes
