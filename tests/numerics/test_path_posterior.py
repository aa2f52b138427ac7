"""The closed forms of one path's quasi-posterior, against dense algebra and quadrature."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import hakari.inference as hi
from hakari.inference import path_prior
from hakari.inference.path_prior import by_response, differences, forms, matern
from hakari.inference.quasi_path import QuasiPath

SAMPLED = [
    hi.RoughnessPenalty(1),
    hi.RoughnessPenalty(2, "gamma", shape=2.0, rate=0.3, level=3.0),
    hi.GaussianProcess(length=2.0),
    hi.GaussianProcess(0.5, 1.0, "gamma", shape=3.0, rate=0.5),
]
ids = {"ids": lambda prior: f"{type(prior).__name__}-{prior.smoothness}"}


def path(prior, q=5, units=(1.3,), seed=0):
    """A path of q coefficients, correlated and unequal, and its prior."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((q, 2 * q)) * 0.3 * np.linspace(0.5, 2.0, q)[:, None]
    estimate = np.sin(np.arange(q)) + 0.3 * rng.standard_normal(q)
    horizons = range(q // len(units))
    if getattr(prior, "spacing", "") == "marginal":  # two forms: the tests are of one
        prior = replace(prior, spacing="even")
    form = next(iter(forms(prior, [f"y.h{h}" for h in range(q)], horizons, np.array(units))), None)
    return QuasiPath("y", estimate, root @ root.T / q, 0.8, form)


def dense(one, log_tau):
    """(mean, covariance) of β | τ, and the log marginal, from whole matrices."""
    W = one.precision * np.linalg.inv(one.covariance)
    prior = one.form.root.T @ one.form.root * np.exp(-2 * log_tau) + one.form.fixed
    cov = np.linalg.inv(W + prior)
    mean = cov @ (W @ one.estimate + prior @ one.form.mean)
    q, noise = len(mean), one.covariance / one.precision
    constant = 0.5 * (q * np.log(2 * np.pi) + np.linalg.slogdet(noise)[1])
    predicted = multivariate_normal(one.form.mean, np.linalg.inv(prior) + noise)
    return mean, cov, constant + predicted.logpdf(one.estimate)


# --- given τ --------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [*SAMPLED, hi.RoughnessPenalty(3, 0.4)], **ids)
@pytest.mark.parametrize("units", [(1.3,), (0.4, 30.0)])
def test_given_tau_all_is_dense_algebra(prior, units):
    one = path(prior, 8, units)
    beta = np.random.default_rng(1).standard_normal((1, 8))
    for t in (-1.5, 0.0, 2.0):
        at = np.array([t])
        mean, cov, marginal = dense(one, t)
        np.testing.assert_allclose(one.conditional_mean(at)[0], mean, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(one.conditional_variance(at)[0], np.diag(cov), rtol=1e-7)
        assert one.log_marginal(at)[0] == pytest.approx(marginal, rel=1e-7, abs=1e-7)
        distance, half = one.log_conditional(beta, at)
        gap = beta[0] - mean
        assert distance[0] == pytest.approx(gap @ np.linalg.solve(cov, gap), rel=1e-6)
        assert half[0] == pytest.approx(-0.5 * np.linalg.slogdet(cov)[1], rel=1e-7)


@pytest.mark.parametrize("prior", SAMPLED, **ids)
def test_a_paths_density_given_tau_is_the_gaussian(prior):
    one = path(prior, 4)
    beta = np.random.default_rng(1).standard_normal((3, 4))
    for t in (-1.0, 0.5):
        prior_cov = np.linalg.inv(one.form.root.T @ one.form.root * np.exp(-2 * t) + one.form.fixed)
        direct = multivariate_normal(one.form.mean, prior_cov).logpdf(beta)
        np.testing.assert_allclose(one.form.log_path(beta, np.full(3, t)), direct, rtol=1e-7)


@pytest.mark.parametrize("prior", SAMPLED, **ids)
def test_a_step_has_the_conditional_law(prior):
    """The step is mean + linear map of three noises: fed with unit noises, the map is exact."""
    one = path(prior, 5)
    q, r, t = 5, len(one.form.root), 0.3
    root = np.linalg.cholesky(one.covariance / one.precision)
    noises = np.eye(q + r + q)
    at = np.full(len(noises), t)
    parts = noises[:, :q] @ root.T, noises[:, q : q + r], noises[:, q + r :]
    still = one.posterior_step(at[:1], np.zeros((1, q)), np.zeros((1, r)), np.zeros((1, q)))
    mean, cov, _ = dense(one, t)
    np.testing.assert_allclose(still[0], mean, rtol=1e-8)
    linear = one.posterior_step(at, *parts) - still
    np.testing.assert_allclose(linear.T @ linear, cov, rtol=1e-7, atol=1e-10)


def test_shared_noise_carries_covariance_across_responses():
    """Two responses whose estimates covary by C: their paths covary by Σ₁W₁ C W₂Σ₂ √(h₁h₂)⁻¹."""
    first, second = path(SAMPLED[0], 4, seed=1), path(SAMPLED[2], 4, seed=2)
    rows = np.random.default_rng(3).standard_normal((12, 8)) * 0.3
    V = rows.T @ rows
    pair = [
        replace(one, covariance=V[s, s], precision=h)
        for one, s, h in ((first, slice(4), 0.8), (second, slice(4, 8), 0.9))
    ]
    moved = []
    for one, part in zip(pair, (slice(4), slice(4, 8)), strict=True):
        error = rows[:, part] / np.sqrt(one.precision)
        rest = np.zeros((12, len(one.form.root))), np.zeros((12, 4))
        moved.append(one.posterior_step(np.zeros(12), error, *rest) - dense(one, 0.0)[0])
    a, b = (dense(one, 0.0)[1] @ one.weight for one in pair)
    expected = a @ V[:4, 4:] @ b.T / np.sqrt(0.8 * 0.9)
    np.testing.assert_allclose(moved[0].T @ moved[1], expected, rtol=1e-7, atol=1e-12)


# --- τ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", SAMPLED, **ids)
@pytest.mark.parametrize("q", [3, 6])
def test_tau_integrated_out_is_quadrature(prior, q):
    one = path(prior, q)

    def mass(t):
        return np.exp(dense(one, t)[2] + one.form.log_hyper(t))

    def integral(of):
        return quad(lambda t: of(t) * mass(t), -12, 9, points=[-3, 0, 2], epsabs=0, limit=400)[0]

    total = integral(lambda t: 1.0)
    assert one.log_evidence == pytest.approx(np.log(total), abs=2e-4)
    mean, sd = one.moments
    for h in (0, q - 1):
        first = integral(lambda t, h=h: dense(one, t)[0][h]) / total
        square = integral(lambda t, h=h: dense(one, t)[1][h, h] + dense(one, t)[0][h] ** 2) / total
        assert mean[h] == pytest.approx(first, rel=1e-3, abs=1e-4)
        assert sd[h] == pytest.approx(np.sqrt(square - first**2), rel=1e-3)


@pytest.mark.parametrize("prior", SAMPLED, **ids)
@pytest.mark.parametrize("q", [3, 6, 30])
def test_the_density_of_a_path_is_quadrature(prior, q):
    one = path(prior, q)
    scale = np.array([0.3, 1.0, 2.0])[:, None]
    beta = one.moments[0] + scale * one.moments[1] * np.random.default_rng(1).standard_normal(q)
    found = one.log_path_posterior(beta)
    nodes = np.linspace(-14, 12, 40_001)
    direct = [
        logsumexp(one.form.log_path(np.tile(b, (len(nodes), 1)), nodes) + one.form.log_hyper(nodes))
        for b in beta
    ] + one.log_likelihood(beta)
    np.testing.assert_allclose(found - found[0], direct - direct[0], atol=2e-3)


@pytest.mark.parametrize("prior", SAMPLED, **ids)
def test_coins_become_tau_with_the_density_that_is_told(prior):
    one = path(prior, 5)
    nodes, density = one.tau_grid
    coins = (np.arange(20_000) + 0.5) / 20_000
    tau, told = one.draw_log_tau(coins)
    share = np.exp(density) * (nodes[1] - nodes[0])
    assert (np.diff(tau) > 0).all()
    assert tau.mean() == pytest.approx(share @ nodes, abs=2e-3)
    slope = np.diff(coins) / np.diff(tau)  # density by differences of the quantile function
    same = told[1:] == told[:-1]
    np.testing.assert_allclose(np.log(slope)[same], told[1:][same], atol=1e-6)


@pytest.mark.parametrize("rule", ["half-cauchy", "gamma"])
def test_hyperpriors_are_densities_of_log_tau(rule):
    form = path(hi.RoughnessPenalty(1, rule, scale=0.7, shape=1.5, rate=0.2), 4).form
    total = quad(lambda t: np.exp(form.log_hyper(t)), -40, 40, points=[-1, 0, 1], limit=400)[0]
    assert total == pytest.approx(1, abs=1e-8)
    if rule == "half-cauchy":
        below = quad(lambda t: np.exp(form.log_hyper(t)), -40, np.log(0.7), limit=400)[0]
        assert below == pytest.approx(0.5, abs=1e-8)  # the scale is the median


@pytest.mark.parametrize("rule", ["gcv", "marginal"])
@pytest.mark.parametrize(
    "kind", [hi.RoughnessPenalty, lambda **k: hi.GaussianProcess(length=2, **k)]
)
def test_the_chosen_smoothness_is_the_brute_force_minimum(rule, kind):
    one = path(kind(smoothness=rule), 7)
    W = one.weight

    def criterion(t):
        mean, cov, marginal = dense(one, t)
        gap = one.estimate - mean
        if rule == "marginal":
            return -marginal
        return 7 * gap @ W @ gap / (7 - np.trace(cov @ W)) ** 2

    grid = np.linspace(-5, 6, 1101)  # beyond it the direct traces cancel
    values = np.array([criterion(t) for t in grid])
    found = one._gcv(grid) if rule == "gcv" else -one.log_marginal(grid)
    np.testing.assert_allclose(found, values, rtol=1e-5)
    if 0 < values.argmin() < len(grid) - 1:
        assert criterion(one.chosen) <= values.min() + 1e-9 * abs(values.min())


def test_gcv_has_a_limit_where_smoothing_ends():
    """Loss and freedom vanish together: no spurious minimum where both are rounding errors."""
    one = path(hi.GaussianProcess(length=0.5, smoothness="gcv"), 7)
    B, D, c = one._diagonal
    share = np.einsum("qk,qp,pk->k", B, one.weight, B)
    limit = 7 * ((D * c) ** 2 * share).sum() / (D @ share) ** 2
    np.testing.assert_allclose(one._gcv(np.array([9.0, 11.0, 13.8])), limit, rtol=1e-5)


# --- pieces of priors -----------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_differences_annihilate_polynomials_on_uneven_horizons(order):
    h = [0, 1, 2, 4, 8, 12, 24]
    D = differences(h, order)
    for power in range(order):
        np.testing.assert_allclose(D @ np.array(h, float) ** power, 0, atol=1e-9)
    factorial = [1, 1, 2, 6][order]
    np.testing.assert_allclose(D @ np.array(h, float) ** order, factorial, rtol=1e-10)
    np.testing.assert_array_equal(differences(range(6), order), np.diff(np.eye(6), order, axis=0))


def test_matern_is_its_closed_forms():
    h = np.array([0, 1, 3, 7, 20])
    d = np.abs(h[:, None] - h) / 2.5
    a, b = np.sqrt(3) * d, np.sqrt(5) * d
    for nu, form in (
        (0.5, np.exp(-d)),
        (1.5, (1 + a) * np.exp(-a)),
        (2.5, (1 + b + b**2 / 3) * np.exp(-b)),
    ):
        np.testing.assert_allclose(matern(h, nu, 2.5), form, rtol=1e-12, atol=1e-14)


def test_a_process_picks_the_length_with_most_evidence():
    rng = np.random.default_rng(4)
    names = [f"y.h{h}" for h in range(12)]
    candidates = forms(hi.GaussianProcess(), names, range(12), np.array([1.0]))
    assert len(candidates) == path_prior.LENGTHS
    root = np.linalg.cholesky(matern(range(12), 1.5, 4.0) + 1e-9 * np.eye(12))
    beta = root @ rng.standard_normal(12) + 0.05 * rng.standard_normal(12)
    paths = [QuasiPath("y", beta, 0.05**2 * np.eye(12), 1.0, form) for form in candidates]
    lengths = np.geomspace(1, 22, 12)
    assert 1.5 < lengths[np.argmax([p.log_evidence for p in paths])] < 15


@pytest.mark.parametrize("units", [(1.0, 1.0), (1.0, 1e4), (1e-3, 1e3)])
def test_evidence_does_not_depend_on_the_units_of_shocks(units):
    """Nor do the process's length and smoothness: the quasi-likelihood is 0 at the estimate."""
    scale = np.repeat(units, 4)
    plain = path(hi.GaussianProcess(length=3.0), 8, (1.0, 1.0))
    moved = path(hi.GaussianProcess(length=3.0), 8, units)
    moved = replace(
        moved,
        estimate=plain.estimate * scale,
        covariance=plain.covariance * np.multiply.outer(scale, scale),
    )
    assert moved.log_evidence == pytest.approx(plain.log_evidence, abs=1e-5)


def test_what_is_known_exactly_stays_beside_what_is_not():
    """One variance of 1e-13 beside variances of 1: 1 it was estimated and 1 it remains."""
    one = path(hi.RoughnessPenalty(2), 6)
    V = one.covariance / one.covariance.max()
    V[0], V[:, 0] = 0.0, 0.0
    V[0, 0] = 1e-13
    one = replace(one, covariance=V, estimate=np.r_[1.0, one.estimate[1:]])
    mean, sd = one.moments
    assert mean[0] == pytest.approx(1, abs=1e-6)
    assert sd[0] < 1e-6


def test_a_flat_path_is_its_estimate():
    one = replace(path(SAMPLED[0]), form=None, precision=1.0)
    np.testing.assert_array_equal(one.moments[0], one.estimate)
    np.testing.assert_allclose(one.moments[1] ** 2, np.diag(one.covariance))
    with pytest.raises(ValueError, match="y has a flat prior: there is no smoothness"):
        one.conditional_mean(np.zeros(1))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (hi.RoughnessPenalty(4), "order 4 of a roughness penalty: use 1, 2 or 3"),
        (hi.RoughnessPenalty(3), "needs more than 3 horizons, there are 3: lower"),
        (hi.RoughnessPenalty(level=0), "level 0 of a prior on a path must be a positive number"),
        (hi.RoughnessPenalty(smoothness="aic"), "smoothness 'aic': a number .* or one of half-"),
        (hi.RoughnessPenalty(smoothness=-1.0), "smoothness -1.0 of a prior on a path must be"),
        (hi.GaussianProcess(nu=2), "nu 2 of a Gaussian process: use 0.5, 1.5 or 2.5"),
        (hi.GaussianProcess(length=-1), "length -1 of a prior on a path must be a positive"),
        (hi.GaussianProcess(scale=np.nan), "scale nan of a prior on a path must be a positive"),
    ],
)
def test_impossible_priors_are_named(prior, message):
    with pytest.raises(ValueError, match=message):
        forms(prior, ["a", "b", "c"], range(3), np.ones(1))


def test_things_that_are_no_priors_are_named():
    with pytest.raises(TypeError, match="prior 3: use Flat, Normal, RoughnessPenalty"):
        forms(3, ["a"], range(1), np.ones(1))
    with pytest.raises(ValueError, match="prior for unknown response 'gpd'"):
        by_response({"gpd": hi.Flat()}, ["gdp", "cpi"])
