"""Kernels for paths of local projections: one law, that of the closed forms; and mutants."""

from __future__ import annotations

from dataclasses import replace

import arviz_stats as az
import numpy as np
import pytest
from scipy.stats import chi2, kstest

import hakari.inference as hi
from benchmarks.lp_designs import var1
from hakari.inference import projection_walks
from hakari.inference.path_prior import PathForm
from hakari.inference.projection_sampling import METHODS, begin, log_densities
from hakari.inference.sampling import _streams

KERNELS = [name for name in METHODS if name != "auto"]
PRIORS = {
    "fixed": hi.RoughnessPenalty(1, 0.3),  # horizons in logarithms, as by default
    "half-cauchy": hi.RoughnessPenalty(1, spacing="even"),
    "gamma": hi.RoughnessPenalty(1, "gamma", shape=2.0, rate=0.1, spacing="even"),
    "process": hi.GaussianProcess(0.5, 2.0, 0.6),
    "normal": hi.Normal(np.zeros(4), 0.2 * np.eye(4), [f"y.h{h}" for h in range(4)]),
}
WORST = 4.5  # Monte Carlo errors, of some 200 comparisons


def posterior(prior, H=3, response="y", T=200, shrinkage="none"):
    table = var1(0.9, H).make(np.random.default_rng(0), T)
    lp = hi.LocalProjection(
        table, response, "shock", controls=["y", "x1", "x2"], lags=2, horizons=H, shock_lags=0
    )
    return lp.posterior(prior, shrinkage=shrinkage)


def gap(found, method, draws=6000, seed=1):
    """Largest gap of means, spreads and the law of τ to closed forms, in Monte Carlo errors."""
    path = found.paths[0]
    result = hi.sample(found, method, draws=draws, chains=4, seed=seed)["posterior"].dataset
    (mean, sd), gaps = path.moments, []
    for h in range(len(mean)):
        z = (result["theta"].values[..., h] - mean[h]) / sd[h]
        gaps += [abs(z.mean()) / error(z), abs((z**2).mean() - 1) / error(z**2)]
    if path.form is not None and path.form.sampled:
        nodes, density = path.tau_grid
        below = np.cumsum(np.exp(density)) * (nodes[1] - nodes[0])
        log_tau = np.log(result["tau"].values[..., 0])
        for level in (0.1, 0.5, 0.9):
            share = (log_tau < np.interp(level, below, nodes)).astype(float)
            gaps.append(abs(share.mean() - level) / error(share))
    return max(gaps)


def error(values):
    """Monte Carlo error of the mean of values (chain, draw)."""
    return values.std() / np.sqrt(float(az.ess(values, method="mean")))


# --- one law --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KERNELS)
def test_every_kernel_has_the_law_with_a_shrunk_correlation(method):
    found = posterior(PRIORS["fixed"], shrinkage="ledoit-wolf")
    assert 0 < found.intensity < 1
    assert found.paths[0].precision == 1
    assert gap(found, method) < WORST


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("method", KERNELS)
def test_every_kernel_has_the_law_of_the_closed_forms(method, prior):
    assert gap(posterior(PRIORS[prior]), method) < WORST


@pytest.mark.parametrize("method", KERNELS)
def test_flat_draws_are_the_estimate_and_its_covariance(method):
    """Mahalanobis distances are χ², and no direction has another mean."""
    found = posterior(hi.Flat())
    theta = hi.sample(found, method, draws=4000, chains=4, seed=1)["posterior"]["theta"].values
    gaps = theta - found.paths[0].estimate
    root = np.linalg.cholesky(found.joint_covariance)
    z = np.linalg.solve(root, gaps.reshape(-1, 4).T).T.reshape(gaps.shape)
    thin = 40 if method == "mh" else 1
    distance = (z[:, ::thin] ** 2).sum(axis=2).ravel()
    assert kstest(distance, chi2(4).cdf).pvalue > 1e-3
    for k in range(4):
        assert abs(z[..., k].mean()) < WORST * error(z[..., k])
        for other in range(k):
            both = z[..., k] * z[..., other]
            assert abs(both.mean()) < WORST * error(both)


@pytest.mark.parametrize("method", ["concentrated", "gibbs", "da-approx"])
def test_flat_draws_of_two_responses_have_the_joint_covariance(method):
    found = posterior(hi.Flat(), H=2, response=["y", "x1"])
    theta = hi.sample(found, method, draws=4000, chains=4, seed=1)["posterior"]["theta"].values
    gaps = (theta.reshape(-1, 6) - found.projection.estimate.ravel()).T
    z = np.linalg.solve(np.linalg.cholesky(found.joint_covariance), gaps)
    np.testing.assert_allclose(z @ z.T / z.shape[1], np.eye(6), atol=5 * np.sqrt(2 / 16_000))


def test_gibbs_and_concentrated_share_noise_between_responses():
    """Given fixed smoothness both have the covariance Σ₁W₁ V₁₂ W₂Σ₂ across responses."""
    found = posterior(PRIORS["fixed"], H=2, response=["y", "x1"])
    parts, V = (slice(3), slice(3, 6)), found.joint_covariance
    maps = []
    for path in found.paths:
        form = path.form
        prior = form.root.T @ form.root / 0.3**2 + form.fixed
        maps.append(np.linalg.solve(path.weight + prior, path.weight) / np.sqrt(path.precision))
    expected = maps[0] @ V[parts[0], parts[1]] @ maps[1].T
    sd = np.concatenate([path.moments[1] for path in found.paths])
    for method in ("concentrated", "gibbs"):
        theta = hi.sample(found, method, draws=4000, chains=4, seed=1)["posterior"]["theta"].values
        cov = np.cov(theta.reshape(-1, 6).T)[parts[0], parts[1]]
        scaled = (cov - expected) / np.multiply.outer(sd[:3], sd[3:])
        assert np.abs(scaled).max() < 5 / np.sqrt(16_000)
    assert np.abs(expected / np.multiply.outer(sd[:3], sd[3:])).max() > 0.1


def test_what_is_known_exactly_is_not_moved():
    """A variable's response to itself at once is 1 in every draw of every kernel."""
    table = var1(0.9, 4).make(np.random.default_rng(0), 200)
    lp = hi.LocalProjection(table, ["y"], "y", controls=["x1", "x2"], lags=2, horizons=4)
    for prior in (hi.Flat(), hi.RoughnessPenalty(2)):
        for method in KERNELS:
            result = hi.sample(lp.posterior(prior), method, draws=300, chains=2, seed=1)
            theta = result["posterior"]["theta"].values
            np.testing.assert_allclose(theta[..., 0], 1, atol=1e-4)
            assert (theta[..., 1:].std(axis=(0, 1)) > 1e-3).all()


# --- mutants --------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["half-cauchy", "gamma"])
@pytest.mark.parametrize("method", ["gibbs", "da-approx"])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_rank_wrong_by_one_fails(monkeypatch, method, prior, off):
    right = projection_walks._smoothness

    def wrong(form, path, log_tau, auxiliary, chance):
        rows = np.zeros((len(form.root) + off, form.root.shape[1]))
        size = np.sqrt((form.root @ (path - form.mean)) @ (form.root @ (path - form.mean)))
        gap = path - form.mean
        rows[0] = size * gap / (gap @ gap)  # the same roughness, another number of rows
        return right(replace(form, root=rows), path, log_tau, auxiliary, chance)

    monkeypatch.setattr(projection_walks, "_smoothness", wrong)
    assert gap(posterior(PRIORS[prior]), method) > 1.3 * WORST


@pytest.mark.parametrize("prior", ["fixed", "gamma", "process", "normal"])
def test_multipliers_that_the_prior_does_not_screen_fail(monkeypatch, prior):
    monkeypatch.setattr(
        PathForm, "log_path", lambda form, path, log_tau: np.zeros(len(path)), raising=True
    )
    assert gap(posterior(PRIORS[prior]), "da-approx") > 1.3 * WORST


def test_a_walk_that_forgets_the_width_of_tau_fails(monkeypatch):
    """The factor τ^−rank of the prior, left out of the walk's target."""
    right = projection_walks._arrays

    def wrong(path):
        estimate, weight, root, fixed, mean, kind, hyper = right(path)
        # −2 shape log τ stands in for the rank's term: shape less by half the rank
        return estimate, weight, root, fixed, mean, kind, hyper - [0, len(root) / 2, 0]

    monkeypatch.setattr(projection_walks, "_arrays", wrong)
    assert gap(posterior(PRIORS["gamma"]), "mh") > 1.3 * WORST


# --- chance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KERNELS)
def test_a_seed_has_its_draws_and_each_chain_its_own(method):
    found = posterior(PRIORS["half-cauchy"])
    first, again, other = (
        hi.sample(found, method, draws=60, chains=2, seed=seed, warmup=100)["posterior"].dataset
        for seed in (1, 1, 2)
    )
    for name in ("theta", "tau"):
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.isin(first[name].values[0], first[name].values[1]).any()
        assert not np.isin(first[name].values, other[name].values).any()


@pytest.mark.parametrize("method", KERNELS)
def test_the_density_that_is_kept_is_that_of_the_draws(method):
    found = posterior(PRIORS["half-cauchy"])
    result = hi.sample(found, method, draws=40, chains=2, seed=1, warmup=100)
    theta = result["posterior"]["theta"].values.reshape(-1, 4)
    kept = result["sample_stats"]["lp"].values.reshape(-1, 1)
    np.testing.assert_allclose(kept, log_densities(found, theta), rtol=1e-12)


# --- how they start -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gibbs", "da-approx", "mh"])
def test_chains_start_at_draws_of_the_posterior(method):
    """Without warm-up the starting points already have the posterior's law."""
    found = posterior(PRIORS["half-cauchy"])
    path = found.paths[0]
    roots = np.random.SeedSequence(7).spawn(300)
    starts = np.stack([begin(found, method, _streams(root), 0).path for root in roots])
    mean, sd = path.moments
    z = (starts - mean) / sd
    assert (np.abs(z.mean(axis=0)) < 4.5 * z.std(axis=0) / np.sqrt(300)).all()
    np.testing.assert_allclose(z.std(axis=0), 1, atol=0.3)


def test_multipliers_are_those_of_the_path_where_the_chain_starts():
    found = posterior(PRIORS["half-cauchy"], H=2, response=["y", "x1"])
    chain = begin(found, "da-approx", _streams(np.random.SeedSequence(3)), 0)
    plain = begin(found, "concentrated", _streams(np.random.SeedSequence(3)), 0)
    np.testing.assert_allclose(chain.path, plain.path, rtol=1e-9)


def test_the_walk_learns_a_fair_step():
    """15 dimensions, default warm-up: hundreds of effective draws, acceptance near 0.23."""
    found = posterior(PRIORS["gamma"], H=13)
    result = hi.sample(found, "mh", draws=1000, chains=2, seed=1)
    theta = result["posterior"]["theta"].values
    assert min(float(az.ess(theta[..., h])) for h in range(14)) > 200
    np.testing.assert_allclose(result["checks"]["acceptance"], 0.234, atol=0.08)


def test_multipliers_learn_the_acceptance_that_is_asked_for():
    tight = posterior(hi.RoughnessPenalty(2, 0.03), H=13)
    result = hi.sample(tight, "da-approx", draws=2000, chains=2, seed=1)
    np.testing.assert_allclose(result["checks"]["acceptance"], projection_walks.TARGET, atol=0.1)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="method 'nuts' is unknown: local projections have auto"):
        hi.sample(posterior(hi.Flat()), "nuts", draws=10, chains=1, seed=1)
