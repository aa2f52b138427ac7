"""Weights of particles and credibility ranks, by other routes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from arviz_stats.base import array_stats
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import logsumexp
from scipy.stats import chi2, kstest

from hakari.inference.gibbs import pareto, region_kernels
from hakari.inference.gibbs.cloud import student, uniforms
from hakari.inference.gibbs.particles import Particles, effective
from hakari.inference.gibbs.regions import Region, ranks
from hakari.inference.sampling import generator

B, N, D = 40, 700, 3  # more than one tile of particles
RATE = 1.7


def chance(purpose):
    return generator(21, purpose)


def particles(shared=True, seed=0):
    """Any numbers in the shapes of particles that are shared, or of each data set's own."""
    draw = generator(seed, "particles")
    b = 1 if shared else B
    mix = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-30.0, 9.0, 40.0]])
    offsets = draw.standard_normal((b, N, D)) @ mix.T
    centres = np.array([1.0, -2.0, 300.0]) + 0.5 * draw.standard_normal((B, D)) @ mix.T
    losses = (draw.chisquare(D, (B, N)) / 2 - 1).astype(np.float32)
    return Particles(
        centres,
        offsets,
        losses,
        0.3 * draw.standard_normal((b, N)),
        0.5 * draw.standard_normal((b, N)),
        np.array([1.0, -2.0, 300.0]),
    )


def by_hand(found, rate):
    """Particles (N, D) and weights (N,) of each data set, from the definition of the weights."""
    for b in range(B):
        pick = lambda a, b=b: a[b if len(a) > 1 else 0].astype(float)  # noqa: E731
        prior, proposal = pick(found.log_prior), pick(found.log_proposal)
        log_weight = -rate * found.losses[b].astype(float) + prior - proposal
        weights = np.exp(log_weight - logsumexp(log_weight))
        higher = prior - rate * found.losses[b] > 0
        yield found.centres[b] + pick(found.offsets), weights, higher


either = pytest.mark.parametrize("shared", [True, False])


@either
def test_marginal_ranks_are_those_of_sorted_particles(shared):
    found = particles(shared)
    for j in range(D):
        expected = []
        for theta, weights, _ in by_hand(found, RATE):
            order = np.argsort(theta[:, j])
            place = np.searchsorted(theta[order, j], found.estimate[j], side="right")
            below = np.concatenate([[0], np.cumsum(weights[order])])[place]
            expected.append(abs(2 * below - 1))
        own = ranks(found, Region("marginal", "x", j), RATE)
        assert_allclose(own, expected, atol=2e-5)
        whole = Region("functional", "h", function=lambda theta, j=j: np.exp(theta[..., j] / 100))
        assert_allclose(ranks(found, whole, RATE), own, atol=2e-5)


@either
def test_density_ranks_count_what_is_higher(shared):
    found = particles(shared)
    expected = [w[higher].sum() for _, w, higher in by_hand(found, RATE)]
    assert_allclose(ranks(found, Region("hpd", "hpd"), RATE), expected, atol=2e-5)


def ellipse_by_hand(found, rate):
    for theta, weights, _ in by_hand(found, rate):
        mean = weights @ theta
        spread = (theta - mean).T @ (weights[:, None] * (theta - mean))
        distance = lambda t: ((t - mean) @ np.linalg.inv(spread) * (t - mean)).sum(-1)  # noqa: B023, E731
        yield weights[distance(theta) < distance(found.estimate)].sum()


@either
def test_ellipse_ranks_are_those_of_distances(shared):
    found = particles(shared)
    own = ranks(found, Region("ellipse", "ellipse"), RATE)
    expected = list(ellipse_by_hand(found, RATE))
    assert_allclose(own, expected, atol=2e-5)
    assert np.ptp(own) > 0.5


def test_compiled_moments_are_the_sums():
    draw = chance("moments")
    w, x = draw.random((4, N)).astype(np.float32), draw.standard_normal((4, D, N))
    for columns in (x, x[:1]):
        mean, square = region_kernels.moments(w, columns)
        assert_allclose(mean, np.einsum("bn,bdn->bd", w, columns), rtol=1e-9)
        assert_allclose(square, np.einsum("bn,bdn,ben->bde", w, columns, columns), rtol=1e-9)


@either
@pytest.mark.parametrize("kind", ["ellipse", "hpd"])
def test_ranks_do_not_know_the_coordinates(kind, shared):
    found = particles(shared)
    turn = np.array([[2.0, -1.0, 0.1], [0.0, 3.0, 0.2], [5.0, 1.0, -0.3]])
    moved = replace(
        found,
        centres=found.centres @ turn.T,
        offsets=found.offsets @ turn.T,
        estimate=turn @ found.estimate,
    )
    region = Region(kind, kind)
    assert_allclose(ranks(moved, region, RATE), ranks(found, region, RATE), atol=1e-12)


@pytest.mark.parametrize("kind", ["marginal", "ellipse", "hpd"])
def test_a_loss_times_a_constant_is_a_rate_divided_by_it(kind):
    found, region = particles(), Region(kind, kind)
    scaled = replace(found, losses=8 * found.losses)
    assert_array_equal(ranks(scaled, region, RATE / 8), ranks(found, region, RATE))
    assert abs(ranks(found, region, RATE / 8) - ranks(found, region, RATE)).max() > 0.05


@either
def test_parts_have_the_ranks_of_the_whole(shared):
    found, region = particles(shared), Region("ellipse", "ellipse")
    chosen = np.arange(B) % 3 == 1
    assert_array_equal(ranks(found.some(chosen), region, 1.0), ranks(found, region, 1.0)[chosen])
    batch = found.batch(2, 4)
    assert_array_equal(batch.losses, found.losses[:, 350:525])
    assert_array_equal(batch.offsets, found.offsets[:, 350:525])
    assert_array_equal(batch.log_prior, found.log_prior[:, 350:525])
    assert_array_equal(batch.log_proposal, found.log_proposal[:, 350:525])


def test_chunks_of_the_cache_have_the_ranks_of_the_whole(monkeypatch):
    found = particles(shared=False)
    whole = [ranks(found, Region(kind, kind), RATE) for kind in ("marginal", "ellipse", "hpd")]
    monkeypatch.setattr("hakari.inference.gibbs.regions.IN_CACHE", 3 * N)
    for expected, kind in zip(whole, ("marginal", "ellipse", "hpd"), strict=True):
        assert_allclose(ranks(found, Region(kind, kind), RATE), expected, atol=3e-7)


# --- a conjugate case ------------------------------------------------------------------------

SIGMA = np.array([[2.0, 0.9, 0.0], [0.9, 1.0, -0.4], [0.0, -0.4, 0.5]])


def gaussian(replicates=3000, size=4096):
    """Posteriors N(m_b, SIGMA) at rate 1, whose m_b ~ N(estimate, SIGMA); Student particles."""
    root = np.linalg.cholesky(SIGMA)
    estimate = np.array([1.0, 2.0, 3.0])
    centres = estimate + chance("centres").standard_normal((replicates, D)) @ root.T
    offsets, log_proposal = student(uniforms(size, D, 1), root, 5.0)
    loss = lambda t: 0.5 * (t @ np.linalg.inv(SIGMA) * t).sum(-1)  # noqa: E731
    losses = loss(offsets) - loss(estimate - centres)[:, None]
    flat = np.zeros((1, size))
    return Particles(centres, offsets[None], losses, flat, log_proposal[None], estimate)


@pytest.mark.parametrize("kind", ["marginal", "ellipse", "hpd"])
def test_ranks_are_uniform_if_and_only_if_the_rate_is_right(kind):
    found, region = gaussian(), Region(kind, kind)
    own = ranks(found, region, 1.0)
    assert kstest(own, "uniform").pvalue > 0.01
    away = found.estimate - found.centres
    if kind == "marginal":
        exact = chi2.cdf(away[:, 0] ** 2 / SIGMA[0, 0], 1)
    else:
        exact = chi2.cdf((away @ np.linalg.inv(SIGMA) * away).sum(1), D)
    assert_allclose(own, exact, atol=0.03)
    for rate in (0.8, 1.25):
        assert kstest(ranks(found, region, rate), "uniform").pvalue < 1e-4


# --- Pareto tails ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [25, 200, 4096])
def test_smoothed_weights_are_those_of_arviz_row_by_row(size):
    draw = chance(f"tails {size}")
    sets = [scale * draw.standard_normal(size) for scale in (0.1, 1, 3, 10)]
    sets += [draw.exponential(size=size) * k for k in (0.2, 0.5, 0.9, 1.5)]
    sets += [-draw.exponential(size=size), draw.standard_normal(size) - 900.0]
    log_weight = np.stack(sets)
    smoothed, k = pareto.smooth(log_weight)
    for own, k_own, row in zip(smoothed, k, log_weight, strict=True):
        expected, k_expected = array_stats.psislw(-row)
        assert k_own == pytest.approx(k_expected, abs=1e-10)
        assert_allclose(own - logsumexp(own), expected - logsumexp(expected), atol=1e-10)


@pytest.mark.parametrize("k", [-0.4, 0.0, 0.3, 0.7, 1.2])
def test_the_shape_of_a_pareto_tail_is_found_again(k):
    u = chance(f"pareto {k}").random((20, 20_000))
    tail = -np.log(u) if k == 0 else np.expm1(-k * np.log(u)) / k
    found, sigma = pareto.fit(np.sort(2.5 * tail, axis=1))
    error = max(1 + k, 0.5) / np.sqrt(20_000)  # of one fit
    assert_allclose(found, k, atol=4 * error)
    assert found.mean() == pytest.approx(k, abs=4 * error / np.sqrt(20) + 5e-4)
    assert_allclose(sigma, 2.5, rtol=0.07)


@pytest.mark.parametrize(("d", "r"), [(1, 0.6), (2, 0.6), (3, 0.5), (1, 1.5), (3, 2.0)])
def test_reweighted_gaussians_have_the_effective_size_and_tail_of_the_law(d, r):
    """Design note gibbs-calibration, section 1.9: particles of rate 1 at rate r."""
    theta = chance(f"law {d} {r}").standard_normal((16, 50_000, d))
    log_weight = -(r - 1) * (theta**2).sum(-1) / 2
    _, k = pareto.smooth(log_weight)
    assert k.mean() == pytest.approx(1 - r if r < 1 else -2 / d, abs=0.1 if r < 1 else 0.25)
    if r > 0.75:
        weights = np.exp(log_weight - logsumexp(log_weight, axis=1, keepdims=True))
        share = effective(weights).mean() / 50_000
        assert share == pytest.approx(((2 * r - 1) / r**2) ** (d / 2), rel=0.01)
        ratio = logsumexp(log_weight, axis=1) - np.log(50_000)
        assert ratio.mean() == pytest.approx(-d / 2 * np.log(r), abs=0.005)


def test_equal_weights_have_no_tail():
    smoothed, k = pareto.smooth(np.zeros((2, 100)))
    assert (k == np.inf).all()
    assert_array_equal(smoothed, 0)
