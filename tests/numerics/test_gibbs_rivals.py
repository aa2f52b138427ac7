"""Other learning rates, and the sandwich under each bootstrap with the draws adjusted to it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import xarray as xr
from numpy.testing import assert_allclose

import hakari.inference as hi
from hakari.inference.gibbs import rival_rates as module
from hakari.inference.gibbs.bootstrap import draw_weights
from hakari.inference.gibbs.rival_intervals import sandwich_under
from hakari.inference.gibbs.rival_rates import rival_rates, safe_bayes
from hakari.inference.sampling import generator

losses = hi.losses


def chance(purpose):
    return generator(53, purpose)


def own(rows, factor=1.0, prior=hi.Flat(), start=(0.0,)):  # noqa: B008 - frozen
    """A function of theta whose values are a multiple of half the squares."""

    def loss(theta, rows):
        return factor * (np.asarray(rows[0]) - theta @ np.asarray(rows[1]).T) ** 2 / 2

    return hi.GibbsPosterior(hi.Loss(loss, batched=True), rows, prior, start=list(start))


# --- scale -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [hi.Flat(), hi.Normal(0.0, 0.02)])
def test_four_times_the_loss_has_a_quarter_of_the_rate_but_for_holmes_walker(prior):
    y = 1.5 * chance("scale").standard_normal(200) + 0.1
    rows = (y, np.ones((200, 1)))
    once, four = (rival_rates(own(rows, factor, prior), seed=3) for factor in (1.0, 4.0))
    ratios = {name: once[name] / four[name] for name in once}
    wanted = {"Lyddon-Holmes-Walker": 4, "Holmes-Walker": 2, "SafeBayes": 4}
    assert ratios == pytest.approx(wanted, rel=1e-5)


# --- SafeBayes -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("law", ["normal", "t3"])
def test_safe_bayes_ends_at_the_natural_rate(seed, law):
    """Under a flat prior narrower is better, however narrow: only the ceiling ends it."""
    draw = chance("flat")
    y = draw.standard_normal(500) if law == "normal" else draw.standard_t(3, 500)
    found = rival_rates(hi.GibbsPosterior(losses.squared(), (y, np.ones(500))), seed)
    assert found["SafeBayes"] == found["Lyddon-Holmes-Walker"] == pytest.approx(1 / y.var())


def test_safe_bayes_of_a_likelihood_starts_at_one():
    """Poisson of dispersion 1 and 6, under a prior about as informative as the rows are."""
    prior, mean = hi.Normal([0.5, *np.zeros(7)], np.eye(8) / 60), np.full(160, np.exp(0.5))
    found = {1: [], 6: []}
    for phi, seed in product(found, range(5)):
        draw = chance(f"counts {phi} {seed}")
        X = np.column_stack([np.ones(160), draw.standard_normal((160, 7))])
        y = draw.poisson(mean if phi == 1 else draw.gamma(mean / (phi - 1), phi - 1))
        posterior = hi.GibbsPosterior(losses.poisson(), (y, X), prior)
        found[phi].append(rival_rates(posterior, seed)["SafeBayes"])
    assert np.median(found[1]) == max(found[1]) == 1.0
    assert np.median(found[6]) <= 1 / 4


def test_safe_bayes_learns_slower_under_heteroskedastic_errors():
    """The inliers of Grünwald and van Ommen: half of the rows are x = 0, y = 0, exactly."""
    n, d, prior = 160, 8, hi.Normal(np.zeros(8), np.eye(8) / 40)
    right, wrong = [], []
    for seed in range(5):
        draw = chance(f"inliers {seed}")
        X, e = draw.standard_normal((n, d)), draw.standard_normal(n)
        far = draw.random(n) < 0.5
        for rows, found in (((e, X), right), ((e * far * np.sqrt(6), X * far[:, None]), wrong)):
            posterior = hi.GibbsPosterior(losses.squared(), rows, prior)
            found.append(safe_bayes(posterior, generator(seed, "safe"), 0.5 ** np.arange(6)))
    assert np.median(right) == 1.0
    assert np.median(wrong) <= 1 / 8


@pytest.mark.parametrize("d", [2, 6, 12])
def test_predicted_losses_are_those_of_gaussian_posteriors(d):
    """Σ_i of the squared loss in closed form, for every rate of the grid and any dimension."""
    n = 300
    draw = chance(f"exact {d}")
    X = draw.standard_normal((n, d)) + 0.3
    y = X @ np.linspace(-0.3, 0.3, d) + draw.standard_t(5, n)
    posterior = hi.GibbsPosterior(losses.squared(), (y, X), hi.Normal(np.zeros(d), np.eye(d) * 0.1))
    first = max(5 * d, n // 20)
    noise = module.clouds.uniforms(4096, d, 5)
    risk = module._ordered(posterior, np.arange(n))
    base = (y - X @ posterior.minimiser) ** 2 / 2
    for rate in (1.0, 0.25, 0.03):
        total = 0.0
        for i in range(first, n):
            P = rate * X[:i].T @ X[:i] + 10 * np.eye(d)
            mean = np.linalg.solve(P, rate * X[:i].T @ y[:i])
            spread = X[i] @ np.linalg.solve(P, X[i])
            total += ((y[i] - X[i] @ mean) ** 2 + spread) / 2 - base[i]
        found = module._predicted(posterior, risk, first, noise, rate)
        assert found == pytest.approx(total, abs=0.02 * abs(total) + 0.02)


# --- where there is none ---------------------------------------------------------------------


def test_a_loss_that_jumps_has_none():
    x = chance("jump").standard_normal(200)
    y = np.where(x > 0.1, 1.0, -1.0)
    for jumps in (True, False):
        loss = hi.Loss(losses.threshold().function, batched=True, name="mcid", jumps=jumps)
        found = rival_rates(hi.GibbsPosterior(loss, (x, y), start=[0.1]))
        assert list(found) == ["Lyddon-Holmes-Walker", "Holmes-Walker", "SafeBayes"]
        assert np.isnan([*found.values()]).all()


def test_safe_bayes_is_nan_where_particles_do_not_reach(monkeypatch):
    y = chance("reach").standard_normal(200)
    posterior = hi.GibbsPosterior(losses.squared(), (y, np.ones(200)))
    assert np.isfinite(rival_rates(posterior)["SafeBayes"])
    monkeypatch.setattr(module, "LEAST", 2000)
    found = rival_rates(posterior)
    assert np.isnan(found["SafeBayes"])
    assert np.isfinite(found["Lyddon-Holmes-Walker"])


def test_rows_are_taken_one_by_one_or_not_at_all():
    y = chance("rows").standard_normal(60)
    X = np.ones((60, 1))
    table = pd.DataFrame({"y": y})
    kinds = [(y, X), (table["y"], X), [y, X]]
    found = [rival_rates(own(rows))["SafeBayes"] for rows in kinds]
    assert_allclose(found, found[0])
    assert np.isfinite(found[0])
    pairs = hi.GibbsPosterior(lambda theta, z: (np.diff(z) - theta) ** 2, y, start=[0.0])
    assert np.isnan(rival_rates(pairs)["SafeBayes"])  # rows are not the losses' own


# --- rows that hang together -----------------------------------------------------------------


def in_clusters(purpose="clusters", groups=40, size=15):
    """y, X (n, 2) and labels; a column and an error that a cluster's rows share."""
    draw = chance(purpose)
    g = np.repeat(np.arange(groups), size)
    x = draw.standard_normal(groups)[g]
    y = 1 + x + 1.5 * draw.standard_normal(groups)[g] * (1 + x**2) + draw.standard_normal(len(g))
    return y, np.column_stack([np.ones(len(g)), x]), np.array([f"group {k}" for k in g])


def normal_draws(posterior):
    """A result whose draws are far too narrow, and correlated the wrong way."""
    z = chance("draws").standard_normal((2, 500, 2)) @ [[0.01, -0.009], [0.0, 0.003]]
    data = xr.Dataset({"theta": (("chain", "draw", "coefficient"), posterior.minimiser + z)})
    return xr.DataTree.from_dict({"posterior": data})


def adjusted(of, posterior):
    moved = hi.sandwich_adjusted(normal_draws(posterior), of)["posterior"]["theta"].values
    return np.cov(moved.reshape(-1, 2).T)


@pytest.mark.parametrize("name", ["squared", "own"])
def test_adjusted_draws_and_spectrum_follow_the_clusters(name):
    y, X, g = in_clusters()
    kinds = {"groups": np.unique(g, return_inverse=True)[1], "use_correction": False}
    fit = sm.OLS(y, X).fit(cov_type="cluster", cov_kwds=kinds)
    loss = losses.squared()
    if name == "own":
        loss = hi.Loss(lambda t, z: (z[0] - t @ z[1].T) ** 2 / 2, batched=True)
    own = hi.GibbsPosterior(loss, (y, X), start=[0.0, 0.0], clusters=g)
    cal = hi.calibrate(own, bootstrap="cluster", replicates=200)
    rtol = 1e-6 if name == "squared" else 1e-2
    assert_allclose(adjusted(cal, own), fit.cov_params(), rtol=rtol)
    assert_allclose(adjusted(own, own), fit.cov_params(), rtol=rtol)
    rates = np.linalg.eigvals(X.T @ X @ fit.cov_params())  # J V, of J = X'X
    assert_allclose(cal.spectrum, np.sort(rates.real), rtol=rtol)
    assert cal.spectrum.max() > 5 * own.sandwich.spectrum.max()
    rows = hi.calibrate(own, replicates=200)  # as if they were independent
    assert_allclose(adjusted(rows, own), own.sandwich.covariance, rtol=1e-6)
    assert_allclose(rows.spectrum, own.sandwich.spectrum, rtol=1e-9)


def test_adjusted_draws_follow_the_blocks():
    n, draw = 500, chance("blocks")
    e, x = draw.standard_normal((2, n))
    for t in range(1, n):
        e[t] += 0.8 * e[t - 1]
        x[t] += 0.8 * x[t - 1]
    X = np.column_stack([np.ones(n), x])
    own = hi.GibbsPosterior(losses.squared(), (1 + x + e, X))
    cal = hi.calibrate(own, bootstrap="block", block=25, replicates=200)
    weights = draw_weights("block", n, 4000, draw, block=25).astype(float)
    pull = weights @ own.risk.scores(own.minimiser) @ own.sandwich.bread
    drawn = np.cov(pull.T)
    error = np.sqrt(np.multiply.outer(np.diag(drawn), np.diag(drawn)) / len(weights))
    assert (np.abs(adjusted(cal, own) - drawn) < 6 * error).all()
    assert (np.diag(drawn) > 3 * np.diag(own.sandwich.covariance)).all()
    other = hi.calibrate(own, bootstrap="block", block=2, replicates=200)
    assert other.spectrum.max() < 0.5 * cal.spectrum.max()


def test_m_out_of_n_is_scaled_to_all_rows():
    y, X, _ = in_clusters("m out of n")
    own = hi.GibbsPosterior(losses.huber(), (y, X))
    cal = hi.calibrate(own, bootstrap="m-out-of-n", m=150, replicates=200)
    assert_allclose(adjusted(cal, own), own.sandwich.covariance, rtol=1e-6)


def test_fewer_clusters_than_coefficients_leave_directions_without_spread():
    y, _, g = in_clusters("few", 10, 30)
    X = chance("many").standard_normal((300, 12))
    found = sandwich_under(hi.GibbsPosterior(losses.squared(), (y, X), clusters=g), "cluster")
    assert (found.spectrum > 0).all()
    assert found.spectrum[0] < 1e-12 * found.spectrum[-1]


def test_a_loss_that_jumps_has_no_sandwich_to_adjust_to():
    x = chance("x").standard_normal(300)
    y = np.where(chance("classes").random(300) < np.where(x > 0.4, 0.8, 0.2), 1.0, -1.0)
    own = hi.GibbsPosterior(losses.threshold(), (x, y), hi.Normal(0.0, 4.0), start=[0.4])
    empty = (0.0, (), None)  # seconds, notes, sandwich
    cal = hi.Calibration(own, 0.95, "m-out-of-n", "gpc-wp", "", (), *empty)
    theta = own.minimiser + chance("draws").standard_normal((1, 200, 1))
    data = xr.Dataset({"theta": (("chain", "draw", "coefficient"), theta)})
    draws = xr.DataTree.from_dict({"posterior": data})
    with pytest.raises(ValueError, match=r"jumps, so that .* give spread="):
        hi.sandwich_adjusted(draws, cal)
    moved = hi.sandwich_adjusted(draws, cal, np.array([[4.0]]))["posterior"]["theta"].values
    assert moved.var(ddof=1) == pytest.approx(4.0)
