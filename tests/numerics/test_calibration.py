"""The bootstrap world of `calibrate`, and what its learning rates do to draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import hakari.inference as hi
from benchmarks.lp_designs import lp_iv, var1
from hakari.inference import projection_calibration as calibration
from hakari.inference.projection_calibration import Rate, VectorAutoregression, fit_var
from hakari.inference.sampling import generator

LAGS = np.array([[[0.6, 0.2], [-0.1, 0.4]], [[0.1, 0.0], [0.1, 0.2]]])  # (p, k, k)


def var2(T, seed=0):
    """Two series of LAGS about levels 1 and −2, and their errors."""
    rng = np.random.default_rng(seed)
    errors = rng.standard_normal((T, 2)) @ np.array([[1.0, 0.3], [0.0, 0.8]])
    x = np.zeros((T, 2))
    for t in range(2, T):
        x[t] = LAGS[0] @ x[t - 1] + LAGS[1] @ x[t - 2] + errors[t]
    return pd.DataFrame(x + np.array([1.0, -2.0]), columns=["y", "s"])


def projection(T=300, H=4, seed=0, **options):
    table = var1(0.9, H).make(np.random.default_rng(seed), T)
    options = {"lags": 2, "shock_lags": 0, "controls": ["x1", "x2"]} | options
    return hi.LocalProjection(table, "y", "shock", horizons=H, **options)


# --- the VAR --------------------------------------------------------------------------------


def test_the_var_is_found_again_in_a_long_sample():
    table = var2(40_000)
    var = fit_var(hi.LocalProjection(table, "y", "s", lags=2, horizons=2))
    assert var.names == ("y", "s")
    np.testing.assert_allclose(var.lags, LAGS, atol=4.5 / np.sqrt(40_000) * 1.5)
    level = (np.eye(2) - LAGS.sum(axis=0)) @ [1.0, -2.0]
    np.testing.assert_allclose(var.deterministic[0], level, atol=0.05)
    np.testing.assert_allclose(var.residual.mean(axis=0), 0, atol=1e-10)


@pytest.mark.parametrize("trend", ["n", "c", "ct", "ctt"])
def test_its_own_residuals_give_back_the_data(trend):
    table = var2(150)
    var = fit_var(hi.LocalProjection(table, "y", "s", lags=3, horizons=2, trend=trend))
    assert var.start.shape == (3, 2)
    paths = var.simulate(np.stack([var.residual, 0 * var.residual]))
    np.testing.assert_allclose(paths[0], table.to_numpy(), atol=1e-10)
    x = paths[1]  # without shocks: the recursion of its lags alone
    for t in (3, 4, 149):
        own = sum(var.lags[i] @ x[t - 1 - i] for i in range(3))
        np.testing.assert_allclose(x[t], own + var.deterministic[t - 3], atol=1e-10)


def test_shocks_without_lags_of_their_own_have_none_in_the_var():
    lp = projection()
    var = fit_var(lp)
    s = var.names.index("shock")
    np.testing.assert_allclose(var.lags[:, :, s], 0, atol=1e-13)
    assert np.abs(var.lags[0]).max() > 0.3


def test_responses_are_the_powers_of_the_companion():
    var = VectorAutoregression(
        ("y", "s"), LAGS, np.zeros((5, 2)), np.zeros((5, 2)), np.zeros((2, 2)), 0
    )
    companion = np.block([[LAGS[0], LAGS[1]], [np.eye(2), np.zeros((2, 2))]])
    for h, response in enumerate(var.responses(6)):
        np.testing.assert_allclose(
            response, np.linalg.matrix_power(companion, h)[:2, :2], atol=1e-14
        )


def test_responses_are_what_a_shock_adds_to_a_simulated_path():
    var = VectorAutoregression(
        ("y", "s"), LAGS, np.ones((7, 2)), np.zeros((7, 2)), np.full((2, 2), 0.5), 0
    )
    shocks = np.zeros((3, 7, 2))
    shocks[1, 0, 0] = shocks[2, 0, 1] = 1.0
    paths = var.simulate(shocks)
    added = (paths[1:] - paths[0])[:, 2:]  # (shock, h, variable)
    np.testing.assert_allclose(added, var.responses(6).transpose(2, 0, 1), atol=1e-13)


# --- the bootstrap world --------------------------------------------------------------------


def test_the_worlds_truth_is_the_recursion_scaled_to_the_shock():
    """VAR(1) with s first: the response to a unit of its residual is Θ_h b, b by regression."""
    lp = projection(T=4000)
    truth, _ = calibration._bootstrap(lp, generator(1, "test"), 20)
    np.testing.assert_allclose(truth[0, 0], var1(0.9, 4).truth, atol=0.1)
    var = fit_var(lp)
    s, y = var.names.index("shock"), var.names.index("y")
    part = lp.parts[0].fit
    rows = lp.parts[0].rows - var.first - len(var.start)
    impact = (part.z.T @ var.residual[rows])[0] / (part.z**2).sum()
    closed = [theta[y] @ impact / impact[s] for theta in var.responses(4)]
    np.testing.assert_allclose(truth[0, 0], closed, atol=5e-3)


def test_cumulative_questions_have_cumulative_truths():
    plain, _ = calibration._bootstrap(projection(), generator(1, "test"), 20)
    summed, _ = calibration._bootstrap(projection(cumulative=True), generator(1, "test"), 20)
    np.testing.assert_allclose(summed, plain.cumsum(axis=2), rtol=1e-8)


def test_an_instruments_world_keeps_its_truth():
    design = lp_iv(0.9, 4)
    table = design.make(np.random.default_rng(1), 20_000)
    lp = hi.LocalProjection(table, "y", "r", "z", controls=["p"], lags=2, horizons=4)
    truth, samples = calibration._bootstrap(lp, generator(1, "test"), 20)
    np.testing.assert_allclose(truth[0, 0], design.truth, atol=0.1)
    found = lp.on(next(samples))
    sd = found.standard_errors()[0, 0]
    assert (np.abs(found.estimate[0, 0] - truth[0, 0]) < 4.5 * sd).all()


def test_samples_are_of_the_world_and_not_of_each_other():
    lp = projection(T=4000)
    truth, samples = calibration._bootstrap(lp, generator(1, "test"), 20)
    first, second = (lp.on(series) for series in (next(samples), next(samples)))
    for one in (first, second):
        z = (one.estimate - truth) / one.standard_errors()
        assert np.abs(z).max() < 4.5
        assert len(one.series.period) == 4000
    assert np.abs(first.estimate - second.estimate).max() > 1e-3


# --- learning rates -------------------------------------------------------------------------


def test_in_a_large_gaussian_sample_the_rate_is_near_one():
    (rate,) = projection(T=4000).posterior().calibrate(replications=400, seed=1).calibration
    assert rate.interval[0] < 1 < rate.interval[1]
    assert rate.rate == pytest.approx(1, abs=0.2)
    assert rate.covered == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / 400))
    assert (rate.response, rate.level, rate.replications) == ("y", 0.9, 400)


def test_covariances_that_are_too_small_get_a_smaller_rate():
    """Errors halved: bands half as wide need a rate of a quarter of what it was."""
    statistic = np.linspace(0.5, 3.5, 199)
    right = calibration._rate("y", statistic, 2.5, 0.9)
    half = calibration._rate("y", 2 * statistic, 2.5, 0.9)
    assert half.rate == pytest.approx(right.rate / 4, rel=1e-12)
    assert half.covered < right.covered


def test_the_rate_is_an_order_statistic():
    statistic = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))  # 1, ..., 99
    rate = calibration._rate("y", statistic, 45.0, 0.9)
    assert rate.rate == pytest.approx((45 / 90) ** 2, rel=1e-12)  # the 90th of 99
    assert rate.interval[0] < rate.rate < rate.interval[1]
    assert rate.covered == pytest.approx(45 / 99)


def test_a_seed_has_its_rate():
    posterior = projection().posterior(hi.RoughnessPenalty(2))
    one, again, other = (
        posterior.calibrate(replications=100, seed=seed).calibration[0] for seed in (1, 1, 2)
    )
    assert one == again
    assert one.interval != other.interval


def test_a_band_is_never_narrowed():
    """Errors of a tenth of what the posterior says: its rate would be 100, and is 1."""
    rate = calibration._rate("y", np.linspace(0.01, 0.4, 199), 3.0, 0.9)
    assert rate.rate == 1
    assert rate.interval[0] > 1
    assert rate.covered == 1


def test_powered_draws_spread_about_the_same_mean():
    posterior = projection().posterior(hi.RoughnessPenalty(2))
    powered = replace(posterior, calibration=(Rate("y", 0.64, (0.5, 0.8), 0.8, 0.9, 200),))
    plain, wide = (
        hi.sample(p, draws=200, chains=2, seed=1)["posterior"]["theta"].values
        for p in (posterior, powered)
    )
    mean = posterior.paths[0].moments[0]
    np.testing.assert_allclose(wide - mean, (plain - mean) / 0.8, rtol=1e-8, atol=1e-12)
    assert powered.rates == (0.64,)
    assert posterior.rates == (1.0,)


# --- what cannot be calibrated --------------------------------------------------------------


def panel():
    tables = [var2(60, seed).assign(unit=seed, time=range(60)) for seed in range(6)]
    return hi.LocalProjection(
        pd.concat(tables), "y", "s", lags=1, horizons=2, time="time", unit="unit"
    )


def with_states():
    table = var2(200).assign(state=np.arange(200) % 20 < 10)
    table["state"] = table["state"].astype(float)
    return hi.LocalProjection(table, "y", "s", lags=1, horizons=2, state="l(state, 1)")


def leading():
    return hi.LocalProjection(var2(200), "y", "s", controls=["f(s, 1:2)"], lags=1, horizons=2)


@pytest.mark.parametrize(
    ("make", "what"),
    [(panel, "a panel"), (with_states, "state-dependent projections"), (leading, "controls that")],
)
def test_what_one_var_cannot_draw_is_refused(make, what):
    with pytest.raises(ValueError, match=f"from one VAR and is not for {what}"):
        make().posterior().calibrate(replications=100)


def test_continuous_weighting_is_refused():
    posterior = projection().posterior(hi.RoughnessPenalty(2), weighting="continuous")
    with pytest.raises(ValueError, match="is not for continuous weighting"):
        posterior.calibrate(replications=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replications": 19}, "replications 19: at least 20 bootstrap samples are needed"),
        ({"replications": 50.0}, r"replications 50\.0: at least 20"),
        ({"level": 0.99, "replications": 200}, "replications 200: at least 1000 are needed"),
        ({"level": 1.0}, r"level 1\.0: a probability between 0 and 1 is needed"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        projection().posterior().calibrate(**options)


def test_a_var_needs_rows():
    lp = hi.LocalProjection(var2(30), "y", "s", lags=8, horizons=0)
    with pytest.raises(ValueError, match=r"22 rows for the 17 coefficients of the VAR that"):
        fit_var(lp)
