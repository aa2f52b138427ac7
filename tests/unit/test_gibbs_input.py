"""Each bad input of Gibbs posteriors gets one error: the thing, its value and the way out."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import hakari.inference as hi
from hakari.inference.gibbs import pareto
from hakari.inference.gibbs.bootstrap import draw_weights
from hakari.inference.gibbs.importance import Problem
from hakari.inference.gibbs.regions import Region, ranks
from hakari.inference.gibbs.sandwich import CubeRootError
from hakari.inference.sampling import generator

losses = hi.losses
X = np.column_stack([np.ones(60), np.linspace(-1, 1, 60)])
Y = X[:, 1] + np.sin(np.arange(60.0))


def gibbs(loss=losses.squared(), y=Y, X=X, **options):  # noqa: B008 - frozen
    return hi.GibbsPosterior(loss, (y, X), **options)


def absolute(theta, rows):
    return abs(rows[0] - rows[1] @ theta)


def any_function(loss=absolute, **options):
    return hi.GibbsPosterior(loss, (Y, X), **{"start": [0.0, 0.0]} | options)


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


# --- losses and rows -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.quantile(1.0), "tau 1.0: give a share between 0 and 1"),
        (lambda: losses.expectile(float("nan")), "tau nan: give a share between 0 and 1"),
        (lambda: losses.huber(0), "delta 0: give a number above 0"),
        (lambda: losses.smooth_threshold(-1.0), "bandwidth -1.0: give a number above 0"),
        (
            lambda: gibbs(losses.logistic()),
            "logistic needs two classes, 0 and 1 or -1 and 1; y has -1",
        ),
        (
            lambda: gibbs(losses.hinge(), np.arange(60) % 3),
            "hinge needs two classes, 0 and 1 or -1 and 1; y has 0, 1, 2",
        ),
        (lambda: gibbs(losses.poisson(), Y - 2), "poisson needs y of at least 0; it has -"),
        (lambda: gibbs(learning_rate=0), "learning_rate 0: give a number above 0"),
        (lambda: gibbs().at_rate(-1), "learning_rate -1: give a number above 0"),
        (lambda: gibbs(clusters=np.arange(5)), "5 cluster labels for 60 rows"),
        (lambda: gibbs(names=["a"]), "1 names for 2 coefficients: a"),
        (lambda: gibbs(y=Y[:, None]), "y has shape (60, 1) and X (60, 2): (n,) and (n, d)"),
        (lambda: gibbs(y=np.where(Y > 1.5, np.nan, Y)), "y is not finite in row"),
        (lambda: gibbs(X=np.where(X == 1, np.inf, X)), "X is not finite in row 1: drop"),
        (lambda: gibbs(y=Y[:2], X=X[:2]), "2 rows for 2 coefficients: more rows"),
        (lambda: hi.GibbsPosterior(losses.squared(), Y), "rows for squared must be (y, X) or"),
        (
            lambda: hi.GibbsPosterior(losses.squared(), (Y, X, -np.ones(60))),
            "weights of shape (60,): (60,) and at least 0 are needed",
        ),
        (lambda: gibbs(X=np.column_stack([X, X[:, 0]])), "collinear"),
        (lambda: hi.GibbsPosterior(absolute, (Y, X)), "start is missing: for a function"),
        (lambda: gibbs(losses.quantile), "loss quantile is not made: call it, as hi."),
        (lambda: gibbs("huber"), "loss huber is not made: call it, as hi.losses.huber()"),
        (lambda: gibbs("lasso"), "loss 'lasso': give one of hi.losses, such as hi.losses.huber()"),
        (lambda: gibbs(None), "loss None: give one of hi.losses, such as hi.losses.huber(), or"),
        (
            lambda: any_function(lambda t, z: abs(z[0] - z[1] @ t).sum()),
            "gave (1,): it must return (n,) for theta (d,)",
        ),
        (
            lambda: any_function(hi.Loss(lambda t, z: z[0], batched=True)),
            "loss 'custom' gave (60,): it must return (M, n) for theta (M, d)",
        ),
        (
            lambda: any_function(lambda t, z: np.where(z[0] == Y[2], np.nan, 1)),
            "is nan in row 3 at theta [0. 0.]: is it outside the loss's domain?",
        ),
        (
            lambda: any_function(lambda t, z: np.where(z[0] == Y[2], np.inf, 1)),
            "is inf in row 3 at start [0. 0.]: start inside its domain; if it overflows, write it",
        ),
        (
            lambda: any_function(hi.Loss(absolute, lambda t, z: z[1][0])).risk.scores(np.zeros(2)),
            "the gradient of loss 'custom' gave (2,): it must return (60, 2), a row for each",
        ),
        (lambda: gibbs().log_density(np.zeros(3)), "theta has shape (3,): its last axis must be 2"),
    ],
)  # fmt: skip
def test_losses_and_rows(make, message):
    with np.errstate(invalid="ignore"), refused(message):
        make()


def test_starts():
    with refused("start 0.5 with method 'auto': only gpc and gpc-wp begin there"):
        hi.calibrate(gibbs(), start=0.5)
    with refused("start -1.0: a learning rate above 0 is needed"):
        hi.calibrate(gibbs(), method="gpc", start=-1.0)


def test_formulas():
    frame = pd.DataFrame({"y": Y, "x": X[:, 1], "z": Y})
    with refused("has instruments: a loss of y and x has none"):
        hi.GibbsPosterior.from_formula(losses.squared(), "y ~ 1 + [x ~ z]", frame)
    with refused("start is missing: for a function give start"):
        hi.GibbsPosterior.from_formula(absolute, "y ~ 1 + x", frame)
    with refused("t is text or a category: a y of numbers is needed"):
        hi.GibbsPosterior.from_formula(losses.squared(), "t ~ 1 + x", frame.assign(t="a"))
    with refused("no column 'w' in the data"):
        hi.GibbsPosterior.from_formula(losses.squared(), "y ~ 1 + w", frame)


# --- minima ----------------------------------------------------------------------------------


def test_classes_that_separate_have_no_minimum():
    with refused("the logistic loss has no finite minimum: some combination of a, b predicts"):
        gibbs(losses.logistic(), (X[:, 1] > 0).astype(float), names=["a", "b"]).minimiser


def test_counts_that_are_all_zero_have_no_minimum():
    with refused("the poisson loss has no finite minimum"):
        gibbs(losses.poisson(), np.zeros(60)).minimiser


def test_classes_that_a_hinge_separates_have_many_minima():
    with refused("the hinge loss has no single minimum: some combination of a, b separates"):
        gibbs(losses.hinge(), X[:, 1] > 0, names=["a", "b"]).minimiser


FEW = ~np.isin(np.arange(60), [20, 39])  # all of class 1 but two opposite rows
KINKS = [(losses.quantile(0.5), np.zeros(60), "add noise"), (losses.hinge(), FEW, "smooth loss")]


@pytest.mark.parametrize(("loss", "y", "way"), KINKS)
def test_a_risk_with_a_kink_at_its_minimum_has_no_curvature(loss, y, way):
    with pytest.raises(ValueError, match=rf"rows or more lie exactly at the kink .*{way}"):
        gibbs(loss, y).sandwich


IGNORANT = [
    (lambda t, z: (z[0] - t[0]) ** 2, "b"),
    (lambda t, z: (z[0] - t[0] - t[1]) ** 2, "a, b"),
    (lambda t, z: abs(t - 1.0) @ X.T**2, "a, b"),
]


@pytest.mark.parametrize(("loss", "named"), IGNORANT)
def test_coefficients_that_the_loss_does_not_identify_are_named(loss, named):
    own = any_function(loss, names=["a", "b"])
    with refused(f"does not curve upward at its minimum along {named}: the loss does not identify"):
        own.sandwich


def test_jumps():
    rows = (X[:, 1], np.where(Y > 0.2, 1.0, -1.0))
    told = hi.GibbsPosterior(losses.threshold(), rows, start=[0.0])
    with pytest.raises(
        CubeRootError, match=r"'threshold' jumps.*bootstrap='multinomial'.*use boot"
    ):
        hi.calibrate(told)
    proper = hi.GibbsPosterior(losses.threshold(), rows, hi.Normal(0, 1), start=[0.0])
    for method in ("cloud", "shift"):
        with refused(f"method {method!r} is not for losses that jump: use 'gpc-wp'"):
            hi.calibrate(proper, bootstrap="m-out-of-n", method=method)
    with refused("a loss that jumps has no large-sample form"):
        Problem(told, np.ones((5, 60)), None, "gpc", 256, 0, None).centres  # type: ignore[arg-type]


# --- calibration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, "level 1.0: a probability between 0 and 1 is needed"),
        ({"method": "mcmc"}, "method 'mcmc' is unknown: use one of auto, cloud, shift, gpc"),
        ({"replicates": 10}, "replicates 10: at least 200 data sets are needed for level 0.95"),
        ({"replicates": 500, "level": 0.99}, "replicates 500: at least 1000 data sets"),
        ({"replicates": 500.0}, "replicates 500.0: a whole number is needed"),
        ({"seed": -1}, "seed -1: a whole number of at least 0"),
        ({"seed": 1.5}, "seed 1.5: a whole number of at least 0"),
        ({"particles": 1000}, "particles 1000: a power of 2 of at least 256 is needed by auto"),
        ({"particles": 128}, "particles 128: a power of 2 of at least 256"),
        ({"particles": 200, "method": "gpc"}, "particles 200: at least 256"),
        ({"particles": 512.5, "method": "gpc"}, "particles 512.5: at least 256"),
        ({"region": "box"}, "region 'box' is unknown: use marginal, ellipse, hpd, or a function"),
        ({"coefficients": ["x"]}, "no coefficient 'x': there are theta[0], theta[1]"),
        (
            {"region": "hpd", "coefficients": ["theta[0]"]},
            "coefficients= are for region='marginal', not 'hpd'",
        ),
        ({"bootstrap": "wild"}, "bootstrap 'wild' is unknown: use one of multinomial, bayesian"),
        ({"bootstrap": "cluster"}, "bootstrap 'cluster' needs clusters: give the posterior"),
        ({"block": 5}, "block=5 is only for bootstrap='block'"),
        ({"m": 5, "bootstrap": "bayesian"}, "m=5 is only for bootstrap='m-out-of-n'"),
        ({"block": 0, "bootstrap": "block"}, "block=0: give a number of rows from 1 to 60"),
        ({"m": 61, "bootstrap": "m-out-of-n"}, "m=61: give a number of rows from 1 to 60"),
        (
            {"region": lambda theta: theta},
            "the function of theta gave (3, 2, 2) for theta (3, 2, 2): it must take (..., d) and",
        ),
        (
            {"region": lambda theta: theta[1]},
            "the function of theta gave (2, 2) for theta (3, 2, 2): it must take (..., d) and",
        ),
        (
            {"region": lambda theta: theta[7]},
            "the function of theta failed for theta (3, 2, 2) (index 7 is out of bounds",
        ),
        (
            {"region": lambda theta: theta[..., 0] * np.nan},
            "the function of theta is nan at the minimiser",
        ),
        (
            {"region": lambda theta: 0 * theta[..., 0]},
            "the function of theta does not change around the minimiser",
        ),
    ],
)  # fmt: skip
def test_settings(options, message):
    with refused(message):
        hi.calibrate(gibbs(), **options)


def test_clusters():
    few = gibbs(clusters=np.arange(60) % 7)
    with refused("7 clusters: at least 10 are needed to draw from"):
        hi.calibrate(few, bootstrap="cluster")
    chance = generator(0, "input")
    with refused("clusters are for bootstrap='cluster', not 'bayesian'"):
        draw_weights("bayesian", 60, 5, chance, clusters=np.arange(60))
    with refused("59 cluster labels for 60 rows"):
        draw_weights("cluster", 60, 5, chance, clusters=np.arange(59))


def test_a_cache_must_be_a_folder(tmp_path):
    file = tmp_path / "cache"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match=r"cache .*cache is a file: give a folder"):
        hi.calibrate(gibbs(), cache=file)


def test_particles_and_regions():
    with refused("20 particles: at least 25 are needed to judge their weights"):
        pareto.smooth(np.zeros((3, 20)))
    from tests.numerics.test_gibbs_regions import particles

    with refused("region 'functional' needs a function"):
        ranks(particles(), Region("functional", "h"), 1.0)


def test_draws_of_another_posterior():
    draws = xr.Dataset({"theta": (("chain", "draw", "coefficient"), np.zeros((2, 5, 3)))})
    with refused("the draws have 3 coefficients and the posterior 2"):
        hi.sandwich_adjusted(xr.DataTree.from_dict({"posterior": draws}), gibbs())
