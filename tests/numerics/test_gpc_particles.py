"""Simulated bootstrap posteriors: chains and tempered clouds have the laws they claim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import hakari.inference as hi
from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs import pareto, simulation, tempered_clouds
from hakari.inference.gibbs.particles import effective, normalised
from hakari.inference.gibbs.simulation import relative_efficiency, simulate
from hakari.inference.gibbs.tempered_clouds import climb
from tests.gibbs_laws import MARGINAL, TRUTH, below, counts, line, location, problem_of, threshold

CASES = {
    "flat": location,
    "normal": lambda: location("normal"),
    "asymmetric": counts,
    "jumping": threshold,
}
MAKERS = {
    "chains": lambda problem, rate: simulate(problem, rate, problem.particles),
    "tempered": lambda problem, rate: next(
        made for made in climb(problem, rate / 20, print) if made.rate > rate / 4
    ),
}


def worst_gap(made, posterior, weights, change=lambda particles, rate: particles):
    """Error of the ranks in units of its Monte Carlo error, root mean square, at four rates.

    1 if the particles have the law they claim.
    """
    [(index, particles)] = made.groups
    other = replace(made, groups=((index, change(particles, made.rate)),))
    gaps = []
    for rate in made.rate * np.array([0.8, 1.0, 1.5, 2.5]):
        p = below(posterior, weights, rate)
        some = p * (1 - p) > 0.02
        error = 2 * np.sqrt(p * (1 - p) / made.quality(rate)[1])
        gap = other.ranks(MARGINAL, rate) - np.abs(2 * p - 1)
        gaps.append(np.sqrt(np.mean((gap[some] / error[some]) ** 2)))
    return max(gaps)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("case", CASES)
def test_particles_have_the_exact_law_at_their_rate_and_at_others(maker, case):
    posterior = CASES[case]()
    problem = problem_of(posterior, B=200)
    made = MAKERS[maker](problem, 0.25)
    assert 0.75 < worst_gap(made, posterior, problem.weights) < 1.25


MUTANTS = {
    "sign flipped": lambda p, rate: replace(
        p, losses=-p.losses, log_proposal=p.log_prior + rate * p.losses
    ),
    "truth instead of the estimate": lambda p, rate: replace(
        p, centres=p.centres, estimate=np.array([TRUTH])
    ),
    "last increment only": lambda p, rate: replace(
        p, log_proposal=p.log_prior - 1.4 * rate * p.losses
    ),
    "weights by the density": lambda p, rate: replace(p, log_proposal=0 * p.log_prior),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_tells_wrong_weights_from_right_ones(mutant):
    posterior = location("normal")
    problem = problem_of(posterior, B=200)
    made = simulate(problem, 0.25, 512)
    assert worst_gap(made, posterior, problem.weights, MUTANTS[mutant]) > 2


def test_a_climb_starts_from_the_prior_or_divides_its_reference_out(monkeypatch):
    """Of first clouds, without the moves that would mend them."""
    monkeypatch.setattr(tempered_clouds, "MOST", 0)
    student, draws = clouds.student, tempered_clouds.prior_draws
    mutants = {
        "flat": (clouds, "student", lambda *a: (student(*a)[0], np.zeros(512))),
        "normal": (tempered_clouds, "prior_draws", lambda k, z, free: draws(k, 1.2 * z, free)),
    }
    for prior, mutant in mutants.items():
        problem = problem_of(location(prior), B=200)
        first = next(climb(problem, 0.25, print))
        assert worst_gap(first, problem.posterior, problem.weights) < 1.25
        monkeypatch.setattr(*mutant)
        first = next(climb(problem, 0.25, print))
        assert worst_gap(first, problem.posterior, problem.weights) > 2


@pytest.mark.parametrize("d", [1, 2])
def test_reweighting_laws_of_gaussian_posteriors(d):
    """ESS, log Z and Pareto k at r times the rate: design note gibbs-calibration, section 1.9."""
    problem = problem_of(line(d), B=6)
    made = simulate(problem, 1.0, 2**15)
    particles = made.groups[0][1]
    X, y = problem.posterior.risk.X, problem.posterior.risk.y
    least = []
    for w in problem.weights.astype(float):
        own = np.linalg.solve(X.T @ (X * w[:, None]), X.T @ (w * y))
        residuals = [y - X @ t for t in (own, problem.posterior.minimiser)]
        least.append(0.5 * (w @ residuals[0] ** 2 - w @ residuals[1] ** 2))
    centred = particles.losses - np.array(least)[:, None]
    for r in (0.8, 1.5, 4.0):
        share = effective(normalised(particles.log_weights(r))) / 2**15
        assert share.mean() == pytest.approx(((2 * r - 1) / r**2) ** (d / 2), rel=0.02)
        log_ratio = np.log(np.exp(-(r - 1) * centred).mean(axis=1)).mean()
        assert log_ratio == pytest.approx(-d / 2 * np.log(r), abs=0.03)
    for r in (0.4, 0.6):
        k = pareto.smooth(particles.log_weights(r))[1]
        assert k.mean() == pytest.approx(1 - r, abs=0.1)


@pytest.mark.parametrize(("n", "spread"), [(30, 0.05), (2600, 0.001)])
def test_compiled_chains_and_chains_in_lock_step_are_equal(n, spread):
    """Of rows in one tile and in two, the second one not full."""
    rng = np.random.default_rng(5)
    X, own = rng.standard_normal((n, 2)), rng.uniform(0.5, 2, n)
    y = X @ [1.0, -1.0] + rng.standard_normal(n)
    prior = [hi.StudentT(3, 0.5, 0.2, ["theta[0]"]), hi.Normal(-0.5, 0.3, ["theta[1]"])]
    linear = hi.GibbsPosterior(hi.losses.huber(1.0), (y, X, own), prior)

    def loss(theta, rows):
        r = np.abs(y - X @ theta)
        return own * np.where(r < 1, r**2 / 2, r - 0.5)

    custom = hi.GibbsPosterior(loss, None, prior, start=linear.minimiser)
    found = []
    for posterior in (linear, custom):
        problem = replace(problem_of(linear, B=6), posterior=posterior)
        start = np.repeat(linear.minimiser[None], 6, axis=0)
        setup = (0.7, start, spread * np.eye(2), 40, 200, 2)
        found.append(simulation._chains(problem, slice(0, 6), *setup))
    assert np.ptp(found[0], axis=1).min() > np.sqrt(spread)  # they move
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_efficiency_of_chains():
    rng, phi = np.random.default_rng(0), 0.6
    x = np.zeros((40, 4000, 1))
    for i in range(1, 4000):
        x[:, i] = phi * x[:, i - 1] + rng.standard_normal((40, 1))
    assert relative_efficiency(x).mean() == pytest.approx((1 - phi) / (1 + phi), rel=0.05)
    stuck = np.concatenate([x, np.ones_like(x)], axis=2)
    np.testing.assert_allclose(relative_efficiency(stuck), 1 / 4000)
