"""A function as a loss: its domain, its sign, its gradient, and where the search for it ends."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from statsmodels.datasets import engel

import hakari.inference as hi
from hakari.inference.gibbs.risk import LARGEST
from hakari.inference.gibbs.sandwich import GradientError, sandwich
from hakari.inference.sampling import generator

Z = generator(1, "own losses").normal(5, 2, 100)


def gaussian(theta, rows):
    """Minus the Gaussian log-likelihood of (mean, scale), many θ at once; scales are positive."""
    mean, scale = theta[:, :1], theta[:, 1:]
    inside = scale > 0
    safe = np.where(inside, scale, 1.0)
    return np.where(inside, 0.5 * ((rows - mean) / safe) ** 2 + np.log(safe), np.inf)


def squares(theta, rows):
    return (rows - theta[0]) ** 2


def refused(message, error=ValueError):
    return pytest.raises(error, match=re.escape(message))


def with_scale(rows=Z, **options):
    loss = hi.Loss(gaussian, batched=True, name="gaussian")
    return hi.GibbsPosterior(loss, rows, start=[0.0, 1.0], names=["mean", "scale"], **options)


def in_log_scale(rows=Z):
    def loss(theta, rows):
        return gaussian(np.column_stack([theta[:, 0], np.exp(theta[:, 1])]), rows)

    return hi.GibbsPosterior(hi.Loss(loss, batched=True), rows, start=[0.0, 0.0])


# --- domain ----------------------------------------------------------------------------------


def test_the_search_stays_inside_the_domain():
    found = with_scale(1000 * Z).minimiser
    np.testing.assert_allclose(found, [1000 * Z.mean(), 1000 * Z.std()], rtol=1e-5)


def test_totals_are_infinite_outside_whatever_the_weights_of_other_rows():
    posterior, theta = with_scale(), np.array([[5.0, -1.0], [5.0, 1.0]])
    assert posterior.log_density(theta)[0] == -np.inf
    assert np.isfinite(posterior.log_density(theta)[1])
    for weights in (None, np.ones(100), np.where(np.arange(100) == 3, 1e-9, 0)):
        assert np.isposinf(posterior.risk.totals(theta, weights)).tolist() == [True, False]


def test_a_row_that_was_not_drawn_does_not_close_the_domain():
    loss = hi.Loss(lambda t, rows: np.where(t > rows, np.inf, -t), batched=True)  # uniform's, logs
    posterior = hi.GibbsPosterior(loss, np.array([1.0, 2.0, 3.0]), start=[0.5])
    weights = np.array([0.0, 2.0, 1.0])
    np.testing.assert_array_equal(
        posterior.risk.totals(np.array([[1.5], [2.5]]), weights), [-4.5, np.inf]
    )
    excess = posterior.risk.excess(np.array([[1.5]]), np.array([0.5]))
    assert excess[0, 0] == np.float32(LARGEST)
    assert (excess @ weights.astype(np.float32))[0] == -3


@pytest.mark.parametrize("method", ["cloud", "shift", "gpc-wp"])
def test_calibration_in_a_domain_is_that_without_bounds(method):
    region = {"region": lambda theta: theta[..., 0], "replicates": 200, "level": 0.9, "seed": 1}
    few = Z[:25]  # the cloud's tails and the walks leave the domain
    cal = hi.calibrate(with_scale(few), method=method, **region)
    other = hi.calibrate(in_log_scale(few), method="cloud", **region)
    low, high = cal.interval
    assert low < other.learning_rate * 1.02
    assert other.learning_rate < high * 1.02
    assert np.isfinite(cal.rates["rate"]).all()


@pytest.mark.parametrize("method", ["mh", "smc"])
def test_draws_stay_inside_and_have_the_exact_mean(method):
    rows = Z[:8]
    result = hi.sample(with_scale(rows), method, draws=1000, seed=1)
    scale = result["posterior"]["theta"].values[..., 1]
    assert scale.min() > 0
    # under a flat prior scale has the density s^(1 − n) exp(−S/(2 s²)); its mean by quadrature
    s = np.linspace(0.01, 60, 200_000)
    log_p = -7 * np.log(s) - ((rows - rows.mean()) ** 2).sum() / (2 * s**2)
    p = np.exp(log_p - log_p.max())
    error = 4 * scale.std() / np.sqrt(400)
    assert abs(np.median(scale) - s[np.searchsorted(np.cumsum(p), p.sum() / 2)]) < error


def test_a_sampling_error_that_reaches_the_end_of_the_domain_is_refused():
    def poisson(theta, rows):
        return theta[0] - rows * np.log(theta[0]) if theta[0] > 0 else np.full(len(rows), np.inf)

    few = hi.GibbsPosterior(poisson, np.arange(10.0) == 3, start=[1.0], names=["mean"])
    with refused("is inf two sampling errors from its minimum along mean: its domain ends there"):
        _ = few.sandwich


def test_no_number_outside_the_domain_names_both_ways_out():
    def loss(theta, rows):
        with np.errstate(invalid="ignore"):
            return 0.5 * ((rows - theta[0]) / theta[1]) ** 2 + np.log(theta[1])

    with refused("Return np.inf there, or parametrise so that every theta is inside (a scale by"):
        hi.GibbsPosterior(loss, Z, start=[0.0, -1.0])


# --- searches that find nothing --------------------------------------------------------------

FALLING = [
    lambda theta, rows: -squares(theta, rows),
    lambda theta, rows: -abs(rows - theta[0]),
]


@pytest.mark.parametrize("loss", FALLING)
def test_a_wrong_sign_is_asked_for(loss):
    with refused("is its sign right? A log-likelihood is a loss with a minus before it"):
        _ = hi.GibbsPosterior(loss, Z, start=[0.0]).minimiser


def test_a_loss_that_falls_for_ever_to_a_limit_has_no_minimum():
    with refused("has no minimum that was found from start [0.]: it does not rise at theta ["):
        _ = hi.GibbsPosterior(lambda t, rows: np.exp(-t[0] - 0 * rows), Z, start=[0.0]).minimiser


def test_a_search_at_a_maximum_asks_for_the_sign():
    median = np.median(Z)
    with refused("the risk curves downward along theta[0], from a maximum: is the loss's sign"):
        sandwich(hi.GibbsPosterior(FALLING[1], Z, start=[median]).risk, np.array([median]))


def test_a_bounded_loss_far_away_is_the_same_all_around():
    def loss(theta, rows):
        return np.minimum(squares(theta, rows), 4)

    with refused("is the same all around start [10000.]: start nearer to its minimum"):
        _ = hi.GibbsPosterior(loss, Z, start=[1e4]).minimiser
    assert abs(hi.GibbsPosterior(loss, Z, start=[4.0]).minimiser[0] - Z.mean()) < 1


def test_a_start_at_the_minimum_is_kept():
    start = [Z.mean()]
    assert hi.GibbsPosterior(squares, Z, start=start).minimiser == pytest.approx(start, rel=1e-8)


def outside(theta, rows):
    return (np.abs(rows - 600 * theta[0]) > 50).astype(float)


@pytest.mark.parametrize("start", [0.5, 0.9, 1.0, 1.1])
def test_jumps_that_are_not_declared_are_offered_the_cube_root(start):
    rows = engel.load_pandas().data["foodexp"].to_numpy()  # at 1 the search ends beside a row
    with pytest.raises(ValueError, match="m-out-of-n"):
        _ = hi.GibbsPosterior(outside, rows, start=[start]).sandwich


# --- gradients -------------------------------------------------------------------------------


def slope(theta, rows):
    return 2 * (theta[0] - rows)[:, None]


@pytest.mark.parametrize("factor", [3.0, -1.0, 0.5, 1.3])
def test_a_gradient_of_another_function_is_refused(factor):
    loss = hi.Loss(squares, lambda theta, rows: factor * slope(theta, rows))
    posterior = hi.GibbsPosterior(loss, Z, start=[0.0])
    with refused("the gradient of loss 'custom' along theta[0] is", GradientError):
        _ = posterior.sandwich
    with refused("where its losses change by", GradientError):
        hi.sample(posterior, "mala", draws=50, seed=1)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_right_gradient_passes_in_any_unit_and_with_kinks(unit):
    smooth = hi.GibbsPosterior(hi.Loss(squares, slope), unit * Z, start=[0.0])
    assert np.isfinite(smooth.sandwich.curvature).all()

    def side(theta, rows):
        return np.sign(theta[0] - rows)[:, None]

    kinks = hi.Loss(lambda theta, rows: abs(rows - theta[0]), side)
    assert np.isfinite(hi.GibbsPosterior(kinks, unit * Z, start=[0.0]).sandwich.curvature).all()


# --- rows and names --------------------------------------------------------------------------


def test_a_formula_takes_a_function_with_a_start():
    frame = pd.DataFrame({"y": Z, "x": np.arange(100.0), "w": np.ones(100)})

    def loss(theta, rows):
        return (rows[0] - rows[1] @ theta) ** 2 * (rows[2] if len(rows) == 3 else 1)

    wanted = hi.GibbsPosterior.from_formula(hi.losses.squared(), "y ~ 1 + x", frame)
    for weights in (None, "w"):
        own = hi.GibbsPosterior.from_formula(
            loss, "y ~ 1 + x", frame, weights=weights, start=[0.0, 0.0]
        )
        assert own.parameters == ("Intercept", "x")
        np.testing.assert_allclose(own.minimiser, wanted.minimiser, rtol=1e-4)


def test_a_frame_names_its_coefficients():
    frame = pd.DataFrame({"x": np.arange(100.0), "z": np.sin(np.arange(100.0))})
    assert hi.GibbsPosterior(hi.losses.huber(), (Z, frame)).parameters == ("x", "z")
    named = hi.GibbsPosterior(hi.losses.huber(), (Z, frame), names=["a", "b"])
    assert named.parameters == ("a", "b")


@pytest.mark.parametrize("loss", [hi.losses.squared(), hi.losses.huber(), hi.losses.expectile(0.3)])
@pytest.mark.parametrize("y", [np.zeros(50), np.full(50, 7.1), 0.1 * np.arange(50) - 3])
def test_a_perfect_fit_is_refused(loss, y):
    X = np.column_stack([np.ones(50), np.arange(50)])
    posterior = hi.GibbsPosterior(loss, (y, X), names=["const", "x"])
    with refused("const, x give y without error in all 50 rows"):
        hi.calibrate(posterior, seed=1)


def test_small_errors_around_a_large_number_are_no_perfect_fit():
    y = 1e9 + Z
    assert np.isfinite(hi.GibbsPosterior(hi.losses.squared(), (y, np.ones(100))).sandwich.spectrum)


def test_a_frame_is_the_dict_of_its_columns_to_jax():
    pytest.importorskip("blackjax")
    frame = pd.DataFrame({"y": Z, "x": np.arange(100)})
    loss = hi.losses.from_jax(lambda t, rows: (rows["y"] - t[0] - t[1] * rows["x"]) ** 2, "lines")
    posterior = hi.GibbsPosterior(loss, frame, start=[0.0, 0.0])
    slope_, const = np.polyfit(np.arange(100), Z, 1)
    np.testing.assert_allclose(posterior.minimiser, [const, slope_], rtol=1e-5)
