"""Learning rates by posterior simulation: of closed form, given the data sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import hakari.inference as hi
from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs import gpc, rate_equation, simulation, tempered_clouds
from hakari.inference.gibbs.bootstrap import draw_weights
from hakari.inference.gibbs.simulation import simulate
from hakari.inference.sampling import generator
from tests.gibbs_laws import (
    LEVEL,
    MARGINAL,
    PRIORS,
    Y,
    exact_coverage,
    exact_rate,
    line,
    location,
    problem_of,
    threshold,
)

METHODS = ("gpc", "gpc-wp", "gpc-smc")


@pytest.mark.parametrize("prior", PRIORS)
def test_rates_are_the_closed_form_given_the_data_sets(prior):
    posterior = location(prior)
    settings = {"level": LEVEL, "replicates": 200, "seed": 2}
    importance = hi.calibrate(posterior, method="cloud", **settings).learning_rate
    weights = draw_weights("multinomial", len(Y), 200, generator(2, "bootstrap"))
    closed = exact_rate(posterior, weights)
    assert importance == pytest.approx(closed, rel=0.02)
    for method in METHODS:
        found = hi.calibrate(posterior, method=method, **settings).found[0]
        assert found.solved
        assert not found.lost.any()
        assert found.interval[0] < closed < found.interval[1]
        assert found.interval[0] < importance < found.interval[1]
        assert abs(exact_coverage(posterior, weights, found.rate) - LEVEL) <= 0.02
        assert found.rate == pytest.approx(closed, rel=0.05 + 3 * found.monte_carlo)


def test_the_monte_carlo_error_is_that_of_other_noise():
    problem = problem_of(location(), B=200)
    closed = exact_rate(problem.posterior, problem.weights)
    gaps, errors = [], []
    for seed in range(16):
        made = simulate(replace(problem, seed=seed), 0.25, 256)
        root = rate_equation.solve(lambda r: made.ranks(MARGINAL, r), LEVEL, 0.25, 1)  # noqa: B023
        gaps.append(np.log(root.rate / closed))
        errors.append(gpc._error(made, root, MARGINAL, LEVEL, 1)[1])
    ratio = np.sqrt(np.mean(np.square(errors)) / np.mean(np.square(gaps)))
    assert 0.7 < ratio < 1.7  # 1.1; a jackknife of quantiles errs upward


def test_regions_share_the_particles_of_reweighting_and_climbing():
    posterior = line(2, 80)
    rates = {}
    for method in ("shift", "gpc-wp", "gpc-smc"):
        found = hi.calibrate(posterior, LEVEL, method=method, replicates=100, seed=1).found
        rates[method] = np.array([f.rate for f in found])
        assert [f.region.column for f in found] == [0, 1]
        assert method == "shift" or found[1].simulations <= found[0].simulations + 1
    for method in ("gpc-wp", "gpc-smc"):
        np.testing.assert_allclose(rates[method], rates["shift"], rtol=0.25)


def test_kestens_rule_shortens_steps_when_they_turn():
    rule = gpc.Kesten(2.0, 1.0)
    rates, turns = [], []
    for excess in (0.05, 0.05, -0.05, -0.05, 0.05):
        rule = rule.after(excess)
        rates.append(rule.rate)
        turns.append(rule.turns)
    short = 0.1 * 2**-0.51
    assert rates == pytest.approx([1.1, 1.2, 1.1, 1.1 - short, 1.1])
    assert turns == [1, 1, 2, 2, 3]
    assert gpc.Kesten(2.0, 1.0).after(-0.95).rate == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_multiple_of_the_loss_divides_the_rate(method, monkeypatch):
    start, rates = gpc._start, []
    monkeypatch.setattr(gpc, "_start", lambda *problem: 0.6 * start(*problem))  # steps are needed
    for c in (1.0, 64.0):
        rows = (Y, np.ones(len(Y)), np.full(len(Y), c))
        posterior = hi.GibbsPosterior(hi.losses.squared(), rows)
        found = hi.calibrate(posterior, LEVEL, method=method, replicates=100, particles=256)
        rates.append(c * found.learning_rate)
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)


def test_half_the_rate_exhausts_the_particles_and_they_are_made_anew(monkeypatch):
    posterior = location()
    problem = problem_of(posterior)
    made = simulate(problem, 0.3, 512)
    assert gpc.reaches(made, 0.3 * 0.95)
    assert gpc.reaches(made, 0.3 * 1.5)
    assert not gpc.reaches(made, 0.3 / 2)
    assert not gpc.reaches(made, 0.3 * 50)
    with monkeypatch.context() as patch:
        patch.setattr(gpc, "RHO", 0.0)
        assert not gpc.reaches(made, 0.3 / 2)  # by k-hat alone
    closed = exact_rate(posterior, problem.weights)
    monkeypatch.setattr(gpc, "_start", lambda *_: 4 * closed)
    found = gpc.gpc_wp(problem, [MARGINAL], LEVEL, lambda text: None)[0]
    assert found.solved
    assert found.simulations > 1
    assert found.rate == pytest.approx(closed, rel=0.1 + 3 * found.monte_carlo)


@pytest.mark.parametrize("method", ["gpc", "gpc-wp"])
@pytest.mark.parametrize("times", [1 / 3, 16])
def test_a_start_far_from_the_rate_is_left(method, times):
    posterior = location()
    closed = exact_rate(
        posterior, draw_weights("multinomial", len(Y), 200, generator(2, "bootstrap"))
    )
    settings = {"replicates": 200, "seed": 2, "particles": 512}
    found = hi.calibrate(posterior, LEVEL, method=method, start=times * closed, **settings).found[0]
    assert found.solved
    assert found.simulations > 1 or (method, times) == ("gpc-wp", 1 / 3)  # weights reach that far
    assert found.rate == pytest.approx(closed, rel=0.05 + 3 * found.monte_carlo)


@pytest.mark.parametrize("method", METHODS)
def test_workers_and_a_cache_change_nothing(method, monkeypatch, tmp_path):
    found = []
    settings = {"level": LEVEL, "method": method, "replicates": 100, "particles": 256}
    for workers in (1, 2):
        for module in (simulation, clouds, tempered_clouds):
            monkeypatch.setattr(module, "workers", lambda jobs, workers=workers: workers)
        found.append(hi.calibrate(location(), cache=tmp_path / str(workers), **settings).found[0])
    for module, name in ((simulation, "_chains"), (tempered_clouds, "_job")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("losses are computed again"))
    found.append(hi.calibrate(location(), cache=tmp_path / "1", **settings).found[0])
    assert found[0].rate == found[1].rate == found[2].rate
    np.testing.assert_array_equal(found[0].ranks, found[1].ranks)
    np.testing.assert_array_equal(found[0].ranks, found[2].ranks)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_jumps_has_a_rate(method):
    """At the rate for m rows, before it is scaled to n, exact posteriors cover at the level."""
    posterior = threshold()
    problem = problem_of(posterior, B=200, N=256)
    found = gpc.SOLVERS[method](problem, [MARGINAL], LEVEL, lambda text: None)[0]
    assert found.solved
    assert abs(exact_coverage(posterior, problem.weights, found.rate) - LEVEL) <= 0.02
    assert found.interval[0] < found.rate < found.interval[1]
    assert np.isnan(found.asymptotic)


def test_a_loss_that_jumps_is_calibrated_from_m_rows():
    settings = {"bootstrap": "m-out-of-n", "replicates": 100, "particles": 256}
    found = hi.calibrate(threshold(), LEVEL, **settings)
    assert found.method == "gpc-wp"
    assert 0 < found.learning_rate < np.inf


def test_a_bounded_loss_under_a_flat_prior_has_no_posterior():
    flat = threshold(hi.Flat())
    for method in ("auto", "gpc", "gpc-smc"):
        with pytest.raises(
            ValueError, match=r"bounded: under a flat prior on theta\[0\] it has no"
        ):
            hi.calibrate(flat, bootstrap="m-out-of-n", method=method, replicates=200)
