"""What `sample` promises: seeds, resuming, interruption, stuck chains, saving, choosing."""

from __future__ import annotations

import json

import joblib
import numpy as np
import pytest
import xarray as xr

import hakari.inference as hi
from hakari.inference import sampling
from hakari.inference.diagnostics import minimum_ess
from tests.designs import iv_design

METHODS = ["mh", "da", "da-exact", "da-approx", "independence", "preconditioned"]


@pytest.fixture(scope="module")
def posterior():
    y, X, Z = iv_design(200, 3, 4)
    return hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z), hi.Normal(1, 0.5))


def theta(result):
    return result["posterior"]["theta"].values


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_draws_whatever_the_workers_and_blocks(posterior, method, monkeypatch):
    first = hi.sample(posterior, method, draws=300, chains=3, seed=5)
    monkeypatch.setattr(sampling, "workers", lambda groups: 1)
    monkeypatch.setattr(sampling, "SUB_BLOCK", 77)
    again = hi.sample(posterior, method, draws=300, chains=3, seed=5)
    np.testing.assert_array_equal(theta(first), theta(again))
    other = hi.sample(posterior, method, draws=300, chains=3, seed=6)
    assert not np.array_equal(theta(first), theta(other))


def test_chains_run_on_the_backend_that_joblib_is_told(posterior):
    alone = hi.sample(posterior, "mh", draws=100, chains=2, seed=1)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        elsewhere = hi.sample(posterior, "mh", draws=100, chains=2, seed=1)
    np.testing.assert_array_equal(theta(alone), theta(elsewhere))


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_uninterrupted(posterior, method, tmp_path):
    whole = hi.sample(posterior, method, draws=400, chains=2, seed=3)
    part = hi.sample(posterior, method, draws=150, chains=2, seed=3)
    hi.save(part, tmp_path / "part.nc")
    resumed = hi.sample(posterior, draws=250, resume=hi.load(tmp_path / "part.nc"))
    np.testing.assert_allclose(theta(resumed), theta(whole), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        resumed["sample_stats"]["lp"], whole["sample_stats"]["lp"], rtol=0, atol=1e-9
    )


def test_resuming_another_posterior_is_refused(posterior):
    result = hi.sample(posterior, draws=50, chains=2, seed=1)
    other = hi.QuasiPosterior(posterior.moments, hi.Normal(0, 1))
    with pytest.raises(ValueError, match="of another posterior"):
        hi.sample(other, resume=result)


def test_interrupted_run_keeps_its_draws_and_goes_on(posterior, monkeypatch, tmp_path):
    whole = hi.sample(posterior, "mh", draws=6000, chains=2, seed=9)
    honest, calls = sampling.advance, []

    def impatient(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(sampling, "advance", impatient)
    monkeypatch.setattr(sampling, "workers", lambda groups: 1)
    part = hi.sample(posterior, "mh", draws=6000, chains=2, seed=9)
    assert part.attrs["interrupted"] == 1
    assert theta(part).shape == (2, 2000, 3)
    assert any("interrupted" in note for note in hi.summary(part).attrs["notes"])
    monkeypatch.setattr(sampling, "advance", honest)
    hi.save(part, tmp_path / "part.nc")
    rest = hi.sample(posterior, draws=4000, resume=hi.load(tmp_path / "part.nc"))
    np.testing.assert_allclose(theta(rest), theta(whole), rtol=1e-12, atol=1e-13)


def test_result_records_how_it_was_made(posterior, tmp_path):
    result = hi.sample(posterior, "da", draws=200, chains=2, seed=1)
    hi.save(result, tmp_path / "r.nc")
    with pytest.raises(FileExistsError, match=r"r\.nc exists"):
        hi.save(result, tmp_path / "r.nc")
    back = hi.load(tmp_path / "r.nc")
    xr.testing.assert_identical(back["posterior"].dataset, result["posterior"].dataset)
    assert back.attrs["method"] == "da"
    assert back.attrs["seed"] == 1
    assert len(back.attrs["data_digest"]) == 64
    assert json.loads(back.attrs["versions"])["numba"]
    stats = back["sample_stats"]
    lp = posterior.log_density(theta(result))
    np.testing.assert_allclose(stats["lp"], lp, rtol=0, atol=1e-9)
    moved = (np.diff(theta(result), axis=1) != 0).any(axis=2)
    np.testing.assert_array_equal(stats["accepted"].values[:, 1:], moved)
    assert not (stats["accepted"].values & stats["screened"].values).any()
    evaluated = (~stats["screened"].values).sum()
    assert back.attrs["evaluations"] == evaluated < back.attrs["iterations"]


def test_prior_group_holds_draws_of_the_prior(posterior):
    prior = hi.sample(posterior, draws=50, chains=1, seed=2)["prior"]["theta"].values[0]
    assert abs(prior.mean(axis=0) - 1).max() < 5 * np.sqrt(0.5 / 2000)
    assert abs(prior.var(axis=0) / 0.5 - 1).max() < 0.2


def test_auto_says_what_it_chose_and_why(posterior):
    result = hi.sample(posterior, draws=50, chains=2, seed=1)
    assert result.attrs["method"] == "independence"
    assert "k-hat" in result.attrs["why"]


def test_auto_leaves_independence_where_it_would_get_stuck():
    y, X, Z = iv_design(200, 30, 30, seed=1)
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z), hi.Normal(1, 1.0))
    result = hi.sample(posterior, draws=300, chains=2, seed=1)
    assert result.attrs["method"] in ("preconditioned", "da")
    assert result["checks"]["acceptance"].values.min() > 0.05


def test_fixed_weighting_is_gaussian_and_always_accepted(posterior):
    """Quadratic criterion, Gaussian prior: the reference is the posterior itself."""
    exact = hi.QuasiPosterior(posterior.moments, posterior.prior, weighting="two-step")
    result = hi.sample(exact, draws=4000, seed=4)
    white = exact.whitened
    draws = theta(result).reshape(-1, 3)
    covariance = white.factor @ white.factor.T
    error = np.sqrt(np.diag(covariance) / 4000)
    assert (np.abs(draws.mean(axis=0) - white.centre) < 5 * error).all()
    np.testing.assert_allclose(np.cov(draws.T), covariance, rtol=0.12, atol=0.06 * covariance.max())


# --- diagnostics --------------------------------------------------------------------------


def tree(draws):
    names = [f"x{k}" for k in range(draws.shape[2])]
    dataset = xr.Dataset(
        {"theta": (("chain", "draw", "coefficient"), draws)}, {"coefficient": names}
    )
    return xr.DataTree.from_dict({"/posterior": dataset, "/checks": xr.Dataset()})


def test_stuck_chains_are_not_called_converged():
    draws = np.zeros((4, 1000, 2))
    frame = hi.summary(tree(draws))
    assert frame[["ess_bulk", "r_hat"]].isna().all(axis=None)
    assert "chain 0 is stuck: 1 distinct draws of 1000" in frame.attrs["notes"][0]
    ess = hi.multivariate_ess(draws)
    assert np.isnan(ess.value)
    assert "stuck" in ess.note
    assert hi.convergence_notes(tree(draws))
    moving = np.random.default_rng(0).standard_normal((4, 1000, 2))
    moving[2] = moving[2, 0]
    assert hi.summary(tree(moving)).attrs["notes"] == [
        "chain 2 is stuck: 1 distinct draws of 1000 (0.0 % of moves accepted)"
    ]


def test_multivariate_ess_of_known_processes():
    """Independent draws: N. A vector autoregression A = a I: N (1 − a)/(1 + a)."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((4, 40_000, 3))
    root = np.linalg.cholesky(0.5 * np.eye(3) + 0.5)
    assert hi.multivariate_ess(noise @ root.T).value == pytest.approx(160_000, rel=0.06)
    a, chain = 0.8, noise.copy()
    for i in range(1, chain.shape[1]):
        chain[:, i] = a * chain[:, i - 1] + np.sqrt(1 - a**2) * noise[:, i]
    assert hi.multivariate_ess(chain @ root.T).value == pytest.approx(160_000 / 9, rel=0.1)


def test_minimum_ess_is_the_published_one():
    """Vats, Flegal and Jones (2019); the values of R's mcmcse::minESS."""
    assert minimum_ess(1) == pytest.approx(6146, abs=1)
    assert minimum_ess(2) == pytest.approx(7529, abs=1)
    assert minimum_ess(5) == pytest.approx(8605, abs=1)


def test_too_few_batches_are_said():
    ess = hi.multivariate_ess(np.random.default_rng(0).standard_normal((1, 100, 15)))
    assert np.isnan(ess.value)
    assert "batches are too few" in ess.note


def test_multivariate_ess_of_short_or_slow_chains_is_refused_or_unbiased():
    rng = np.random.default_rng(2)

    def autoregression(a, draws, K):
        noise, chain = rng.standard_normal((2, 4, draws, K))
        for i in range(1, draws):
            chain[:, i] = a * chain[:, i - 1] + np.sqrt(1 - a**2) * noise[:, i]
        return chain

    slow = hi.multivariate_ess(autoregression(0.97, 1500, 40))
    assert np.isnan(slow.value)
    assert not slow.enough
    assert "short against an autocorrelation time" in slow.note
    many = autoregression(0.5, 2500, 60)  # 200 batches of 50 for 60 dimensions; truth N/3
    assert hi.multivariate_ess(many).value == pytest.approx(10_000 / 3, rel=0.06)
