"""Losses and risks against plain NumPy, finite differences, statsmodels and linear programs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import statsmodels.api as sm
from numba import njit
from numpy.testing import assert_allclose
from scipy.optimize import linprog, root
from statsmodels.datasets import engel

import hakari.inference as hi
from hakari.inference.gibbs import loss_kernels as kernels
from hakari.inference.gibbs.risk import _dual
from hakari.inference.sampling import generator

N = 1300  # more than two tiles, the last one cut
THETA = np.array([0.3, -0.7, 0.4])
losses = hi.losses
FORMULAS = {  # ρ(y, f) as its definition says
    "squared": (losses.squared(), lambda y, f: (y - f) ** 2 / 2),
    "quantile": (losses.quantile(0.3), lambda y, f: (y - f) * (0.3 - (y < f))),
    "expectile": (losses.expectile(0.8), lambda y, f: abs(0.8 - (y < f)) * (y - f) ** 2),
    "huber": (
        losses.huber(0.9),
        lambda y, f: np.where(abs(y - f) <= 0.9, (y - f) ** 2 / 2, 0.9 * abs(y - f) - 0.9**2 / 2),
    ),
    "logistic": (losses.logistic(), lambda y, f: np.logaddexp(0, f) - y * f),
    "poisson": (losses.poisson(), lambda y, f: np.exp(f) - y * f),
    "hinge": (losses.hinge(), lambda y, f: np.maximum(0, 1 - y * f)),
}
every = pytest.mark.parametrize("name", FORMULAS)


@cache
def rows(name, n=N):
    """y that the loss takes, and X (n, 3), the last column skewed and of another scale."""
    chance = generator(1, "gibbs losses")
    X = np.column_stack([np.ones(n), chance.standard_normal(n), 2 * chance.chisquare(2, n) / 3])
    f = X @ THETA
    y = f + chance.standard_t(4, n)
    if name == "logistic":
        y = (chance.random(n) < 1 / (1 + np.exp(-f))).astype(float)
    if name == "hinge":
        y = np.where(chance.random(n) < 1 / (1 + np.exp(-3 * f)), 1.0, -1.0)
    if name == "poisson":
        y = chance.poisson(np.exp(f)).astype(float)
    return y, X


def gibbs(name, **options):
    return hi.GibbsPosterior(FORMULAS[name][0], rows(name), **options)


def points(M=7, seed=2):
    return THETA + 0.3 * generator(seed, "theta").standard_normal((M, 3))


def by_definition(name, theta):
    y, X = rows(name)
    return FORMULAS[name][1](y, theta @ X.T)


@every
def test_losses_are_their_definitions(name):
    risk, theta = gibbs(name).risk, points()
    direct = by_definition(name, theta)
    assert_allclose(risk.totals(theta), direct.sum(axis=1), rtol=1e-13)
    rise = direct - by_definition(name, THETA[None])
    assert_allclose(risk.excess(theta, THETA), rise, rtol=2e-7, atol=1e-6)
    assert risk.excess(theta, THETA).dtype == np.float32


@every
def test_slopes_and_curvatures_are_the_derivatives(name):
    loss, formula = FORMULAS[name]
    y, X = rows(name)
    f, h = X @ THETA, 1e-5
    kinks = {"quantile": [y], "expectile": [y], "huber": [y - 0.9, y + 0.9], "hinge": [y]}
    clear = np.all([abs(f - k) > 1e-3 for k in kinks.get(name, [f + 1])], axis=0)
    slope = kernels.slopes(loss.kind, loss.shape, y, f)
    numeric = (formula(y, f + h) - formula(y, f - h)) / (2 * h)
    assert_allclose(slope[clear], numeric[clear], atol=2e-9 * np.exp(f[clear]).max())
    assert_allclose(gibbs(name).risk.scores(THETA), X * slope[:, None], rtol=1e-15)
    if loss.smooth:
        sides = [kernels.slopes(loss.kind, loss.shape, y, f + s * h) for s in (1, -1)]
        bend = kernels.curvatures(loss.kind, loss.shape, y, f)
        assert_allclose(bend[clear], ((sides[0] - sides[1]) / (2 * h))[clear], rtol=1e-6, atol=1e-8)
        assert_allclose(gibbs(name).risk.curvature(THETA), (X.T * bend) @ X, rtol=1e-12)


def test_slope_at_a_kink_is_the_mean_of_both_sides():
    check, hinge = losses.quantile(0.3), losses.hinge()
    zero, one = np.zeros(1), np.ones(1)
    assert kernels.slopes(check.kind, 0.3, zero, zero)[0] == pytest.approx(0.2)
    assert kernels.slopes(hinge.kind, 1.0, -one, -one)[0] == pytest.approx(0.5)


def test_exponentials_of_the_compiled_losses_are_exact_over_their_range():
    f = np.concatenate([np.linspace(-700, 700, 20_001), np.linspace(-1, 1, 2001)])
    out, zero = np.empty_like(f), np.zeros_like(f)
    kernels._loss(kernels.POISSON, 1.0, zero, f, out)
    assert_allclose(out, np.exp(f), rtol=3e-16)
    kernels._loss(kernels.LOGISTIC, 1.0, zero, f, out)
    assert_allclose(out, np.logaddexp(0, f), rtol=6e-16)
    kernels._loss(kernels.POISSON, 1.0, zero, np.full_like(f, -1e5), out)
    assert (abs(out) < 1e-300).all()


# --- weights, counts, tiles ------------------------------------------------------------------


@every
@pytest.mark.parametrize("mean", [0.5, 8.0])  # many rows left out, and none
def test_counts_and_weights_are_rows_repeated(name, mean):
    counts = generator(3, "counts").poisson(mean, N)
    y, X = rows(name)
    loss, theta = FORMULAS[name][0], points()
    repeated = hi.GibbsPosterior(loss, (np.repeat(y, counts), np.repeat(X, counts, axis=0)))
    weighted = hi.GibbsPosterior(loss, (y, X, counts.astype(float)))
    expected = repeated.risk.totals(theta)
    assert_allclose(gibbs(name).risk.totals(theta, counts.astype(float)), expected, rtol=1e-12)
    assert_allclose(weighted.risk.totals(theta), expected, rtol=1e-12)
    assert_allclose(weighted.risk.scores(THETA).sum(0), repeated.risk.scores(THETA).sum(0))
    assert_allclose(weighted.minimiser, repeated.minimiser, atol=1e-8)
    twice = weighted.risk.totals(theta, np.full(N, 2.0))
    assert_allclose(twice, 2 * expected, rtol=1e-12)
    rise = weighted.risk.excess(theta, THETA).astype(float).sum(axis=1)
    assert_allclose(rise, expected - repeated.risk.totals(THETA[None])[0], rtol=1e-5, atol=1e-3)
    if loss.smooth:
        assert_allclose(weighted.risk.curvature(THETA), repeated.risk.curvature(THETA), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 511, 512, 513, 1025])
def test_tiles_of_any_cut_give_the_same_totals(n):
    y, X = rows("huber")
    theta, weight = points(3), generator(4, "weights").random(n)
    columns = np.ascontiguousarray(X[:n].T)
    direct = by_definition("huber", theta)[:, :n]
    for w, expected in ((np.empty(0), direct.sum(axis=1)), (weight, direct @ weight)):
        found = kernels.totals(kernels.HUBER, 0.9, y[:n], columns, w, theta)
        assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 21])
def test_any_number_of_columns(d):
    chance = generator(5, "columns")
    y, X, theta = (chance.standard_normal(shape) for shape in (700, (700, d), (4, d)))
    risk = hi.GibbsPosterior(losses.quantile(0.5), (y, X)).risk
    assert_allclose(risk.totals(theta), abs(y - theta @ X.T).sum(axis=1) / 2, rtol=1e-12)


# --- minimisers ------------------------------------------------------------------------------


def test_minimisers_of_statsmodels():
    pairs = {
        "squared": sm.OLS(*rows("squared")).fit().params,
        "logistic": sm.Logit(*rows("logistic")).fit(disp=0, tol=1e-13).params,
        "poisson": sm.Poisson(*rows("poisson")).fit(disp=0, tol=1e-13).params,
    }
    for name, expected in pairs.items():
        assert_allclose(gibbs(name).minimiser, expected, rtol=1e-9)


def test_huber_minimiser_is_that_of_rlm_with_the_scale_held():
    y, X = rows("huber")
    fit = sm.RLM(y, X, M=sm.robust.norms.HuberT(1.345))
    found = fit.fit(update_scale=False, tol=1e-13, maxiter=1000, conv="coefs")
    own = hi.GibbsPosterior(losses.huber(1.345 * found.scale), (y, X))
    assert_allclose(own.minimiser, found.params, rtol=1e-9)


def test_expectile_minimiser_solves_its_moments():
    y, X = rows("expectile")

    def moments(theta):
        return X.T @ (np.where(y < X @ theta, 0.2, 0.8) * (y - X @ theta)) / N

    expected = root(moments, THETA, tol=1e-13).x
    assert_allclose(gibbs("expectile").minimiser, expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["quantile", "hinge"])
def test_rows_far_from_the_kink_can_be_left_out_of_the_program(name):
    y, X = rows(name, 9000)
    eighth = np.arange(9000) % 8 == 0  # says where the others are; or misleads
    below = (y + np.where(eighth, 0.5, 0.0), X)
    aside = (y, X + np.outer(eighth, [0.0, 3.0, 1.0]))
    for data in ((y, X), below if name == "quantile" else aside, (y, X, 30.0 - 29 * eighth)):
        risk = hi.GibbsPosterior(FORMULAS[name][0], data).risk
        whole = _dual(risk, np.ones(9000, dtype=bool), np.zeros(9000, dtype=bool))
        assert_allclose(risk.minimiser, whole, atol=1e-11)


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.75])
def test_quantile_minimiser_beats_and_equals_quantreg(tau):
    y, X = rows("quantile")
    fit = sm.QuantReg(y, X).fit(q=tau, p_tol=1e-10, max_iter=20_000)
    own = hi.GibbsPosterior(losses.quantile(tau), (y, X))
    assert_allclose(own.minimiser, fit.params, atol=2e-4)
    best, theirs = own.risk.totals(np.array([own.minimiser, np.asarray(fit.params)]))
    assert best <= theirs * (1 + 1e-12)
    assert (abs(y - X @ own.minimiser) < 1e-8).sum() == 3  # a basic solution passes through d rows
    slopes = own.risk.scores(own.minimiser)[:, 0]
    assert (slopes == 0.5 - tau).sum() == 3  # whatever their residuals round to


def test_hinge_minimiser_is_that_of_the_primal_program():
    y, X = rows("hinge")
    cost = np.concatenate([np.zeros(3), np.ones(N)])
    inequality = np.hstack([-X * y[:, None], -np.eye(N)])
    bounds = [(None, None)] * 3 + [(0, None)] * N
    primal = linprog(cost, inequality, -np.ones(N), bounds=bounds, method="highs")
    own = gibbs("hinge")
    assert own.risk.totals(own.minimiser[None])[0] == pytest.approx(primal.fun, rel=1e-10)
    assert_allclose(own.minimiser, primal.x[:3], atol=1e-7)


@pytest.mark.parametrize("name", ["squared", "quantile", "expectile", "huber"])
@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_minimisers_do_not_know_the_units(name, unit):
    y, X = rows(name)
    loss = losses.huber(0.9 * unit) if name == "huber" else FORMULAS[name][0]
    other = hi.GibbsPosterior(loss, (unit * y, X * [1.0, 1e-6, 1e6]))
    assert_allclose(other.minimiser * [1.0, 1e-6, 1e6] / unit, gibbs(name).minimiser, rtol=1e-7)


def test_engel_values():
    data = engel.load_pandas().data
    expected = {0.5: (81.48226, 0.56018054), 0.25: (95.4835, 0.474103), 0.75: (62.3966, 0.644014)}
    for tau, values in expected.items():
        own = hi.GibbsPosterior.from_formula(losses.quantile(tau), "foodexp ~ 1 + income", data)
        assert_allclose(own.minimiser, values, rtol=2e-6)
    own = hi.GibbsPosterior.from_formula(losses.squared(), "foodexp ~ 1 + income", data)
    assert_allclose(own.minimiser, [147.47539, 0.48517842], rtol=1e-7)


# --- any function ----------------------------------------------------------------------------


def custom(name, batched=False, gradient=None):
    formula = FORMULAS[name][1]
    loss = hi.Loss(lambda theta, z: formula(z[0], theta @ z[1].T), gradient, batched)
    return hi.GibbsPosterior(loss, rows(name), start=np.zeros(3), names=["a", "b", "c"])


@every
@pytest.mark.parametrize("batched", [False, True])
def test_a_function_has_the_totals_of_the_compiled_loss(name, batched):
    own, linear = custom(name, batched).risk, gibbs(name).risk
    theta, counts = points(), generator(6, "counts").poisson(1.0, N).astype(float)
    assert_allclose(own.totals(theta), linear.totals(theta), rtol=1e-12)
    assert_allclose(own.totals(theta, counts), linear.totals(theta, counts), rtol=1e-12)
    assert_allclose(own.excess(theta, THETA), linear.excess(theta, THETA), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["squared", "huber", "logistic", "quantile", "hinge"])
def test_a_function_has_the_minimiser_of_the_compiled_loss(name):
    own, linear = custom(name), gibbs(name)
    low, best = linear.risk.totals(np.array([own.minimiser, linear.minimiser]))
    assert (low - best) / N < 1e-9
    if linear.risk.loss.smooth:
        assert_allclose(own.minimiser, linear.minimiser, atol=2e-6)
        numeric, exact = own.risk.scores(THETA), linear.risk.scores(THETA)
        assert np.quantile(abs(numeric - exact), 0.99) < 1e-6


def test_a_gradient_is_used_where_there_is_one():
    own = custom("squared", gradient=lambda theta, z: (z[1] @ theta - z[0])[:, None] * z[1])
    assert_allclose(own.risk.scores(THETA), gibbs("squared").risk.scores(THETA), rtol=1e-12)
    assert_allclose(own.minimiser, gibbs("squared").minimiser, rtol=1e-7)


def test_a_compiled_function_of_the_user():
    @njit
    def absolute(theta, y):
        return np.abs(y - theta[0])

    y = rows("quantile")[0]
    own = hi.GibbsPosterior(absolute, y, start=[0.0])
    assert own.minimiser[0] == pytest.approx(np.median(y), abs=0.01)
    best, at_median = own.risk.totals(np.array([own.minimiser, [np.median(y)]]))
    assert best <= at_median * (1 + 1e-9)


def test_a_loss_that_jumps_is_minimised_globally():
    chance = generator(7, "threshold")
    x = chance.standard_normal(201)
    y = np.where(chance.random(201) < np.where(x > 0.4, 0.9, 0.1), 1.0, -1.0)
    own = hi.GibbsPosterior(losses.threshold(), (x, y), start=[8.0])
    grid = np.concatenate([x - 1e-9, x + 1e-9])[:, None]
    assert own.risk.totals(own.minimiser[None])[0] == own.risk.totals(grid).min()
    smooth = hi.GibbsPosterior(losses.smooth_threshold(1e-7), (x, y), start=[0.1])
    assert_allclose(smooth.risk.totals(grid + 1e-3), own.risk.totals(grid + 1e-3), atol=1e-3)
