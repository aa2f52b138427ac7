"""Bootstrap weights by their laws, caches, workers, rival rates and adjusted draws."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

import hakari.inference as hi
from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs import rival_rates
from hakari.inference.gibbs.adjustment import transport
from hakari.inference.gibbs.bootstrap import default_block, default_m, draw_weights
from hakari.inference.gibbs.cached_losses import cache_for
from hakari.inference.gibbs.rival_rates import holmes_walker, lyddon_holmes_walker
from hakari.inference.sampling import generator

losses = hi.losses
REPLICATES = 20_000


def chance(purpose):
    return generator(41, purpose)


def drawn(scheme, n=40, **options):
    return draw_weights(scheme, n, REPLICATES, chance(scheme), **options).astype(float)


def ar1(n=4000, rho=0.6):
    e = chance("ar1").standard_normal(n)
    for t in range(1, n):
        e[t] += rho * e[t - 1]
    return e


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "total", "variance"),
    [("multinomial", 40, 1 - 1 / 40), ("bayesian", 40, 39 / 41), ("m-out-of-n", 12, 12 / 40)],
)
def test_weights_have_the_moments_of_their_scheme(scheme, total, variance):
    weights = drawn(scheme, **({"m": 12} if scheme == "m-out-of-n" else {}))
    variance = variance * (39 / 40 if scheme == "m-out-of-n" else 1)
    assert_allclose(weights.sum(axis=1), total, rtol=1e-5)
    assert_allclose(weights.mean(axis=0), total / 40, atol=5 / np.sqrt(REPLICATES))
    covariance = np.cov(weights.T)
    expected = variance * (np.eye(40) * 40 - 1) / 39
    assert_allclose(covariance, expected, atol=10 * variance / np.sqrt(REPLICATES))
    if scheme != "bayesian":
        assert_array_equal(weights, np.round(weights))


def test_clusters_are_drawn_whole():
    clusters = np.repeat(["b", "a", "c", *"defghijklm"], [1, 2, 3] + [1] * 10)
    weights = drawn("cluster", 16, clusters=clusters)
    for name in ("a", "c"):
        assert not np.ptp(weights[:, clusters == name], axis=1).any()
    one = weights[:, [np.flatnonzero(clusters == c)[0] for c in np.unique(clusters)]]
    assert_array_equal(one.sum(axis=1), 13)
    assert_allclose(one.var(axis=0), 1 - 1 / 13, atol=0.06)


def stationary_variance(x, block):
    """Exact variance of the mean, Politis and Romano (1994), lemma 1."""
    n, p, z = len(x), 1 / block, x - x.mean()
    circular = np.fft.irfft(np.abs(np.fft.rfft(z)) ** 2, n) / n
    lag = np.arange(1, n)
    return (circular[0] + 2 * ((1 - lag / n) * (1 - p) ** lag * circular[1:]).sum()) / n


@pytest.mark.parametrize("block", [1, 3, 8])
def test_blocks_give_the_mean_its_stationary_variance(block):
    x = ar1(60)
    weights = drawn("block", 60, block=block)
    assert_array_equal(weights.sum(axis=1), 60)
    assert_allclose(weights.mean(axis=0), 1, atol=0.07)
    means = weights @ x / 60
    assert means.var() == pytest.approx(stationary_variance(x, block), rel=5 * np.sqrt(2 / 20_000))


def test_defaults_grow_with_the_rows():
    assert (default_block(1000), default_block(1001), default_block(1)) == (10, 11, 1)
    assert (default_m(1000), default_m(10), default_m(30)) == (100, 10, 20)


# --- what they do to rates -------------------------------------------------------------------


def rate(y, bootstrap, replicates=2000, clusters=None, **options):
    posterior = hi.GibbsPosterior(losses.squared(), (y, np.ones(len(y))), clusters=clusters)
    options = {"bootstrap": bootstrap, "replicates": replicates, "particles": 1024} | options
    return hi.calibrate(posterior, seed=2, **options).learning_rate


ERROR = 3 * 0.061  # three standard errors of a ratio of rates with 2,000 data sets each


def test_blocks_see_the_dependence_of_time():
    y, block = ar1(), 60
    found = rate(y, "block", block=block) / rate(y, "multinomial")
    exact = y.var() / len(y) / stationary_variance(y, block)
    assert abs(np.log(found / exact)) < ERROR
    assert found == pytest.approx((1 - 0.6) / (1 + 0.6), rel=0.35)


def test_clusters_divide_the_rate_by_the_design_effect():
    clusters = np.repeat(np.arange(300), 10)
    y = np.repeat(chance("cluster").standard_normal(300), 10) + chance("rows").standard_normal(3000)
    found = rate(y, "cluster", clusters=clusters) / rate(y, "multinomial")
    sums = np.add.reduceat(y - y.mean(), np.arange(0, 3000, 10))
    exact = y.var() * 10 / sums.var()
    assert abs(np.log(found / exact)) < ERROR
    assert found == pytest.approx(1 / (1 + 9 / 2), rel=0.35)  # intraclass correlation 1/2


def test_fewer_rows_leave_the_rate_of_a_regular_loss():
    y = 2 * chance("fewer").standard_normal(3000)
    assert abs(np.log(rate(y, "m-out-of-n", m=300) * y.var())) < ERROR
    assert abs(np.log(rate(y, "bayesian") * y.var())) < ERROR


# --- workers and caches ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["shift", "cloud"])
def test_workers_change_nothing(method, monkeypatch):
    y, X = ar1(200), np.column_stack([np.ones(200), chance("x").standard_normal(200)])
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(clouds, "workers", lambda jobs, w=workers: w)
        posterior = hi.GibbsPosterior(losses.quantile(0.4), (y, X))
        result = hi.calibrate(posterior, region="ellipse", replicates=200, method=method, seed=3)
        found.append(result.found[0])
    assert found[0].rate == found[1].rate
    assert found[0].interval == found[1].interval
    assert_array_equal(found[0].ranks, found[1].ranks)


@pytest.mark.parametrize("method", ["shift", "cloud"])
def test_an_interrupted_calibration_goes_on_from_its_cache(method, tmp_path, monkeypatch):
    monkeypatch.setattr(clouds, "workers", lambda jobs: 1)
    monkeypatch.setattr(clouds, "BLOCK", 2**14)  # many small blocks, as of large data
    calls, last = [0], [np.inf]

    def loss(theta, y):
        calls[0] += len(theta)
        if calls[0] > last[0]:
            raise KeyboardInterrupt
        return abs(y - theta)

    def calibrated(cache):
        calls[0] = 0
        posterior = hi.GibbsPosterior(hi.Loss(loss, batched=True), ar1(150), start=[0.0])
        return hi.calibrate(
            posterior, replicates=200, method=method, particles=512, seed=4, cache=cache
        )

    whole = calibrated(None)
    needed = calls[0]
    last[0] = needed - 100
    with pytest.raises(KeyboardInterrupt):
        calibrated(tmp_path)
    last[0] = np.inf
    again = calibrated(tmp_path)
    resumed = calls[0]
    assert again.found[0].rate == whole.found[0].rate
    assert again.interval == whole.interval
    assert_array_equal(again.found[0].ranks, whole.found[0].ranks)
    assert calibrated(tmp_path).found[0].rate == whole.found[0].rate
    assert calls[0] < resumed < needed
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]  # no half files


def test_a_cache_is_of_one_problem(tmp_path):
    y = ar1(150)
    one = hi.GibbsPosterior(losses.squared(), (y, np.ones(150)))
    other = hi.GibbsPosterior(losses.huber(0.5), (y, np.ones(150)))
    apart = [hi.calibrate(p, replicates=200, seed=1).learning_rate for p in (one, other)]
    kept = [
        hi.calibrate(p, replicates=200, seed=1, cache=tmp_path).learning_rate for p in (one, other)
    ]
    assert kept == apart
    assert apart[0] != apart[1]
    twice = hi.GibbsPosterior(losses.squared(), (y, np.ones(150), np.full(150, 2.0)))
    weights = np.ones((2, 150), dtype=np.float32)
    problems = [cache_for(tmp_path, p, weights).problem for p in (one, twice)]
    problems.append(cache_for(tmp_path, one, 2 * weights).problem)
    assert len({*problems}) == 3
    assert cache_for(tmp_path, one.at_rate(3.0), weights).problem == problems[0]


# --- rival rates -----------------------------------------------------------------------------


def test_rival_rates_are_their_closed_forms():
    y, X = ar1(500), np.column_stack([np.ones(500), chance("rival").chisquare(2, 500)])
    own = hi.GibbsPosterior(losses.squared(), (y, np.ones(500)))
    assert lyddon_holmes_walker(own.sandwich) == pytest.approx(1 / y.var())
    assert holmes_walker(own.sandwich) == pytest.approx(1 / y.std())
    both = hi.GibbsPosterior(losses.squared(), (y, X))
    e = y - X @ both.minimiser
    J, K = X.T @ X, (X.T * e**2) @ X
    trace = np.trace(J @ np.linalg.inv(K) @ J) / np.trace(J)
    assert lyddon_holmes_walker(both.sandwich) == pytest.approx(trace, rel=1e-8)
    fisher = np.sqrt(np.trace(J) / np.trace(K))
    assert holmes_walker(both.sandwich) == pytest.approx(fisher, rel=1e-8)


@pytest.mark.parametrize("mean", [0.4, 0.7])
def test_safe_bayes_is_the_exact_sum_of_predicted_losses(mean, monkeypatch):
    """Location under N(mean, 0.1²): posteriors are Gaussian, and so is each predicted loss."""
    n = 400
    y = chance("safe").standard_normal(n) * 2 + 0.3
    posterior = hi.GibbsPosterior(losses.squared(), (y, np.ones(n)), hi.Normal(mean, 0.01))
    grid = 0.05 * 2.0 ** np.arange(-6, 7)
    order = generator(7, "safe").permutation(n)
    z, first = y[order], n // 20
    before = np.cumsum(z) - z
    i = np.arange(n)
    sums = []
    for eta in grid:
        precision = eta * i + 100.0
        centre = (eta * before + 100.0 * mean) / precision
        sums.append((((centre - z) ** 2 + 1 / precision) / 2)[first:].sum())
    own, predicted = [], rival_rates._predicted
    monkeypatch.setattr(rival_rates, "_predicted", lambda *a: own.append(predicted(*a)) or own[-1])
    found = rival_rates.safe_bayes(posterior, generator(7, "safe"), grid)
    assert found == grid[np.argmin(own)]
    assert_allclose(np.subtract(own, own[0]), np.subtract(sums, sums[0]), atol=0.1)
    assert sums[list(grid).index(found)] < min(sums) + 1e-3  # flat there for 0.4
    assert grid[0] < found < grid[-1]


# --- adjusted draws --------------------------------------------------------------------------


def test_adjusted_draws_have_the_covariance_of_the_sandwich():
    draw = chance("draws")
    X = np.column_stack([np.ones(300), draw.standard_normal(300)])
    posterior = hi.GibbsPosterior(losses.squared(), (X.sum(1) + X[:, 1] * ar1(300), X))
    theta = posterior.minimiser + draw.standard_normal((2, 400, 2)) @ [[1.0, 0.4], [0.0, 0.2]]
    dims = ("chain", "draw", "coefficient")
    result = xr.DataTree.from_dict(
        {"posterior": xr.Dataset({"theta": (dims, theta)}), "checks": xr.Dataset(attrs={"a": 1})}
    )
    moved = hi.sandwich_adjusted(result, posterior)
    after = moved["posterior"]["theta"].values.reshape(-1, 2)
    assert_allclose(np.cov(after.T), posterior.sandwich.covariance, rtol=1e-10)
    assert_allclose(result["posterior"]["theta"].values, theta)
    assert moved["checks"].attrs == {"a": 1}
    spread = np.array([[2.0, 0.3], [0.3, 1.0]])
    given = hi.sandwich_adjusted(result, posterior, spread)["posterior"]["theta"].values
    assert_allclose(np.cov(given.reshape(-1, 2).T), spread, rtol=1e-10)
    move = transport(np.cov(theta.reshape(-1, 2).T), spread)
    assert_allclose(move, move.T, rtol=1e-12)  # the least move is symmetric
    assert (np.linalg.eigvalsh(move) > 0).all()
