"""Rates that were not found, intervals at those that were, and what a calibration says of both."""

from functools import cache

import numpy as np
import pytest

import hakari.inference as hi
from hakari.inference.diagnostics import draws_of
from hakari.inference.gibbs import gpc, plots
from hakari.inference.gibbs.calibration import NoRateError
from hakari.inference.gibbs.rate_equation import Root
from hakari.inference.gibbs.rival_rates import rival_rates
from hakari.inference.gibbs.simulation import simulate
from tests.gibbs_laws import MARGINAL, location, problem_of

N = 80
SETTINGS = {"level": 0.9, "replicates": 100, "seed": 1}


@cache
def rows():
    rng = np.random.default_rng(8)
    X = np.column_stack([np.ones(N), rng.standard_normal(N)])
    return X.sum(axis=1) + rng.standard_normal(N), X


def line(prior=None, **more):
    return hi.GibbsPosterior(hi.losses.squared(), rows(), prior or hi.Flat(), **more)


def away(names):
    """A prior twenty of its standard deviations from the estimates, which are about 1."""
    return hi.Normal(np.zeros(len(names)), 0.05**2 * np.eye(len(names)), names=names)


@cache
def half():
    """A rate for theta[0], none for theta[1]."""
    return hi.calibrate(line([away(["theta[1]"])]), **SETTINGS)


# --- without a rate -------------------------------------------------------------------------


def test_regions_without_a_rate_do_not_count():
    cal = half()
    first, second = cal.found
    assert (first.solved, second.solved) == (True, False)
    assert cal.learning_rate == first.rate
    assert cal.interval == first.interval
    assert cal.rates.loc["theta[1]", ["rate", "lower 90%", "upper 90%"]].isna().all()
    assert "theta[0]" in cal.coverage_curve
    assert "theta[1]" not in cal.coverage_curve
    left, right = plots.coverage(cal).axes
    assert len(left.lines) == 1 + 1 + 1
    assert len(right.patches) == 1 + 1


def test_a_prior_far_from_the_estimate_is_named_first():
    said, estimate = half().notes[0], line().minimiser[1]
    assert said.startswith("no rate was found for theta[1] at which 90% sets cover: even at ")
    assert f"The prior on theta[1] is centred {estimate / 0.05:.1f} of its standard" in said


@pytest.mark.parametrize("region", ["marginal", "ellipse", "hpd"])
def test_no_rate_at_all_is_an_error_and_is_not_looked_for_by_simulation(region, monkeypatch):
    monkeypatch.setattr(gpc, "simulate", lambda *_: pytest.fail("simulated"))
    posterior = line(away(["theta[0]", "theta[1]"]))
    with pytest.raises(NoRateError, match=r"even at .* where little but the prior counts") as told:
        hi.calibrate(posterior, region=region, **SETTINGS)
    if region == "marginal":
        assert all(f"The prior on theta[{k}] is centred" in str(told.value) for k in (0, 1))
    assert not any(f.solved for f in told.value.found)
    assert told.value.found[0].simulations == 2  # at the first guess, and where the prior decides


def test_a_prior_that_is_near_is_no_conflict():
    near = hi.Normal(line().minimiser + 0.05, 0.05**2 * np.eye(2))
    cal = hi.calibrate(line(near), **SETTINGS)
    assert all(f.solved for f in cal.found)
    assert not any("no rate" in note for note in cal.notes)


@pytest.mark.parametrize("method", ["gpc", "gpc-wp"])
def test_simulation_gives_up_where_only_the_prior_counts(method):
    posterior = line(away(["theta[0]", "theta[1]"]))
    with pytest.raises(NoRateError, match="little but the prior counts") as told:
        hi.calibrate(posterior, method=method, coefficients=["theta[0]"], particles=256, **SETTINGS)
    (one,) = told.value.found
    assert one.simulations <= 15
    assert one.rate > one.asymptotic * 2.0**-16


def test_a_rate_lies_in_its_interval_where_coverage_is_off_the_level():
    problem = problem_of(location(), B=200)
    for rate in (0.1, 0.6):
        made = simulate(problem, rate, 256)
        root = Root(rate, made.ranks(MARGINAL, rate), False, 1)
        (low, high), _ = gpc._error(made, root, MARGINAL, 0.95, 1)
        assert low <= rate <= high


# --- with one -------------------------------------------------------------------------------


def test_intervals_are_quantiles_of_draws_at_each_rate():
    cal = hi.calibrate(line(), **SETTINGS)
    table = cal.intervals(draws=200, seed=3)
    assert list(table.index) == ["theta[0]", "theta[1]"]
    for k, found in enumerate(cal.found):
        result = hi.sample(cal.posterior.at_rate(found.rate), draws=200, seed=3)
        ends = np.quantile(draws_of(result)[..., k], [0.05, 0.95])
        wanted = [cal.posterior.minimiser[k], found.rate, *ends]
        np.testing.assert_allclose(table.iloc[k], wanted, rtol=1e-12)


def test_intervals_of_a_function_and_without_a_rate():
    cal = hi.calibrate(line(), region=lambda t: t[..., 0] - t[..., 1], **SETTINGS)
    table = cal.intervals(draws=100)
    assert list(table.index) == ["functional"]
    middle = np.subtract(*cal.posterior.minimiser)
    assert table["estimate"].item() == pytest.approx(middle)
    assert table["lower"].item() < middle < table["upper"].item()
    assert half().intervals(draws=100).loc["theta[1]", ["rate", "lower", "upper"]].isna().all()


def test_an_ellipse_is_no_interval():
    cal = hi.calibrate(line(), region="ellipse", **SETTINGS)
    with pytest.raises(ValueError, match="region 'ellipse' is no interval: use region='marginal'"):
        cal.intervals()


def test_functions_are_called_by_their_names():
    def difference(theta):
        return theta[..., 0] - theta[..., 1]

    assert [f.region.label for f in hi.calibrate(line(), region=difference, **SETTINGS).found] == [
        "difference"
    ]


def test_rival_rates_stand_beside():
    cal = hi.calibrate(line(), **SETTINGS)
    assert cal.rival_rates == rival_rates(cal.posterior)
    assert list(cal.rival_rates) == ["Lyddon-Holmes-Walker", "Holmes-Walker", "SafeBayes"]
    assert cal.rival_rates is cal.rival_rates


def test_clusters_that_the_bootstrap_ignores_are_told():
    clusters = np.repeat(np.arange(N // 4), 4)
    ignored = hi.calibrate(line(clusters=clusters), **SETTINGS)
    assert any("clusters are ignored: bootstrap='multinomial'" in n for n in ignored.notes)
    used = hi.calibrate(line(clusters=clusters), bootstrap="cluster", **SETTINGS)
    assert not any("clusters" in n for n in used.notes)


def test_a_bounded_loss_of_ones_own_needs_a_prior():
    y = rows()[0]

    def bounded(theta, z):
        return np.minimum((z - theta[0]) ** 2, 4.0)

    with pytest.raises(ValueError, match=r"improper under this prior: along theta\[0\]"):
        hi.calibrate(hi.GibbsPosterior(bounded, y, start=[1.0]), **SETTINGS)
    proper = hi.GibbsPosterior(bounded, y, hi.Normal(1.0, 4.0), start=[1.0])
    assert hi.calibrate(proper, **SETTINGS).learning_rate > 0


def test_simulated_particles_need_not_be_a_power_of_2():
    found = hi.calibrate(line(), method="gpc-wp", region="hpd", particles=300, **SETTINGS)
    assert found.learning_rate > 0
