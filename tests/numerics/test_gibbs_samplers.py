"""Samplers of Gibbs posteriors: laws by closed forms and quadrature, the balance of each kernel."""

from __future__ import annotations

import inspect
from math import lgamma

import arviz_stats as az
import numpy as np
import pytest
from scipy.stats import loggamma, multivariate_normal, multivariate_t, norm

import hakari.inference as hi
from hakari.inference.gibbs import compiled_walk, lockstep, smc
from hakari.inference.gibbs.crank_nicolson import crank_nicolson
from hakari.inference.gibbs.langevin import langevin, slope
from hakari.inference.gibbs.lockstep import Tuning, step, walk
from hakari.inference.gibbs.target import target_of
from hakari.inference.sampling import generator

METHODS = ["mh", "smc", "pcn", "mala"]
WORST = 4.5  # Monte Carlo errors, of some 200 comparisons
ALWAYS = np.array([1e-300])
PRIOR = hi.Normal([0.5, 0.0], [[1.0, 0.3], [0.3, 0.5]])


def design(n=40, d=2, seed=3):
    rng = np.random.default_rng(seed)
    X = np.column_stack([np.ones(n), rng.standard_normal((n, d - 1)) + 1])
    return X @ np.linspace(0.5, 0.2, d), X, rng


def gaussian(prior=PRIOR, rate=0.3):
    """A posterior of squared loss, its mean, its covariance and the log of its integral."""
    mean, X, rng = design()
    y = mean + rng.standard_normal(len(mean))
    P, m = np.zeros((2, 2)), np.zeros(2)
    if not isinstance(prior, hi.Flat):
        P, m = np.linalg.inv(prior.cov), np.asarray(prior.mean)
    V = np.linalg.inv(rate * X.T @ X + P)
    centre = V @ (rate * X.T @ y + P @ m)
    top = -0.5 * rate * ((y - X @ centre) ** 2).sum()
    if not isinstance(prior, hi.Flat):
        top += multivariate_normal(prior.mean, prior.cov).logpdf(centre)
    integral = top + 0.5 * np.linalg.slogdet(2 * np.pi * V)[1]
    return hi.GibbsPosterior(hi.losses.squared(), (y, X), prior, rate), centre, V, integral


def gap(values, expected):
    """Monte Carlo errors between the mean of values (chain, draw) and what it should be."""
    error = values.std() / np.sqrt(float(az.ess(values, method="mean")))
    return abs(values.mean() - expected) / error


def theta(result):
    return result["posterior"]["theta"].values


def integral_gap(result, expected):
    each = result["checks"]["log_normaliser"].values
    error = each.std(ddof=1) / np.sqrt(len(each))
    assert error < 0.1
    return abs(each.mean() - expected) / error


# --- laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_squared_loss_has_the_gaussian_law(method):
    posterior, mean, V, _ = gaussian()
    z = theta(hi.sample(posterior, method, draws=3000, seed=2)) - mean
    z = np.linalg.solve(np.linalg.cholesky(V), z.reshape(-1, 2).T).T.reshape(z.shape)
    gaps = [gap(z[..., k], 0) for k in range(2)]
    gaps += [gap(z[..., j] * z[..., k], float(j == k)) for j, k in ((0, 0), (0, 1), (1, 1))]
    for level in (0.02, 0.25, 0.5, 0.75, 0.98):
        gaps += [gap((z[..., k] < norm.ppf(level)) * 1.0, level) for k in range(2)]
    assert max(gaps) < WORST


@pytest.mark.parametrize("method", ["mh", "smc", "mala"])
def test_poisson_loss_has_the_law_of_a_logarithm_of_a_gamma(method):
    """exp θ is Gamma(η Σy, η n) under a flat prior: skewed, so that no sign can hide."""
    y, rate = np.array([0.0, 1, 0, 2, 1, 0]), 0.4
    posterior = hi.GibbsPosterior(hi.losses.poisson(), (y, np.ones(6)), learning_rate=rate)
    a, b = rate * y.sum(), rate * 6
    exact = loggamma(a, loc=-np.log(b))
    result = hi.sample(posterior, method, draws=4000, chains=6, seed=1)
    draws = theta(result)[..., 0]
    gaps = [gap((draws < exact.ppf(q)) * 1.0, q) for q in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)]
    gaps += [gap(draws, exact.mean()), gap((draws - exact.mean()) ** 2, exact.var())]
    assert exact.stats("s") < -0.8
    if method == "smc":
        gaps.append(integral_gap(result, lgamma(a) - a * np.log(b)))
    assert max(gaps) < WORST


@pytest.mark.parametrize("prior", [PRIOR, hi.Flat()])
def test_tempering_gives_the_closed_integral(prior):
    """From the prior, and from the Student reference of a flat one."""
    posterior, _, _, integral = gaussian(prior)
    result = hi.sample(posterior, "smc", draws=1000, chains=10, seed=4)
    assert integral_gap(result, integral) < WORST
    assert abs(result.attrs["log_normaliser"] - integral) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_each_method_agrees_with_quadrature_where_the_loss_has_kinks_or_jumps(method):
    rng = np.random.default_rng(5)
    x = rng.standard_normal(60)
    y = np.where(x + 0.5 * rng.standard_normal(60) > 0.2, 1.0, -1.0)
    prior, grid = hi.Normal(0.0, 1.0), np.linspace(-4, 4, 40_001)
    loss, rows, start = hi.losses.threshold(), (x, y), [0.0]
    if method == "mala":
        loss, rows, start = hi.losses.huber(0.5), (x + y, np.ones(60)), None
    posterior = hi.GibbsPosterior(loss, rows, prior, 0.2, start=start)
    draws = theta(hi.sample(posterior, method, draws=3000, seed=1))[..., 0]
    density = np.exp(posterior.log_density(grid[:, None]) - posterior.log_density([[0.2]]))
    below = np.cumsum(density) / density.sum()
    gaps = [
        gap((draws < cut) * 1.0, np.interp(cut, grid, below))
        for cut in np.interp([0.03, 0.2, 0.5, 0.8, 0.97], below, grid)
    ]
    assert max(gaps) < WORST


# --- balance --------------------------------------------------------------------------------

STUDENT = hi.StudentT(3, [0.5, 0.0], [[1.0, 0.3], [0.3, 0.5]])
CASES = {  # name: loss, density of a row, prior
    "poisson": (hi.losses.poisson(), lambda y, f: np.exp(f) - y * f, PRIOR),
    "logistic": (hi.losses.logistic(), lambda y, f: np.log(1 + np.exp(f)) - y * f, STUDENT),
    "squared": (hi.losses.squared(), lambda y, f: (y - f) ** 2 / 2, hi.Flat()),
}
KERNELS = {"mh": walk, "pcn": crank_nicolson, "mala": langevin}


def problem(case):
    """A target, and its log density row by row."""
    loss, value, prior = CASES[case]
    f, X, rng = design(25)
    y = (rng.random(25) < 0.5) * 1.0 if case == "logistic" else rng.poisson(np.exp(f)) * 1.0
    target = target_of(hi.GibbsPosterior(loss, (y, X), prior, 0.7))

    def log_target(u):
        point = target.centre + target.factor @ u
        total = sum(value(a, x @ point) for a, x in zip(y, X, strict=True))
        return -0.7 * total + log_prior(prior, point)

    return target, log_target


def log_prior(prior, point):
    if prior is PRIOR:
        return multivariate_normal(prior.mean, prior.cov).logpdf(point)
    return (
        multivariate_t(prior.mean, prior.scale, prior.df).logpdf(point) if prior is STUDENT else 0
    )


def log_flow(run_step, kernel, target, log_target, x, y):
    """log π(x) q(x, y) α(x, y)."""
    size, shape = np.array([0.8]), np.linalg.cholesky([[1.0, 0.4], [0.4, 0.7]])[None]
    tuning = Tuning(size, shape, np.zeros((1, 2)), shape)
    state = lockstep.evaluate(target, kernel, x[None])
    centre, factor = kernel.place(state, size)[0], kernel.spread(size)[0] * shape[0]
    noise = np.linalg.solve(factor, y - centre)
    move = run_step(target, kernel, state, tuning, noise[None], ALWAYS)
    np.testing.assert_allclose(move.state.u[0], y, rtol=1e-9, atol=1e-12)
    q = multivariate_normal(centre, factor @ factor.T).logpdf(y)
    return log_target(x) + q + move.log_accept[0]


def imbalance(run_step, kernel, case):
    target, log_target = problem(case)
    rng, worst = np.random.default_rng(7), 0.0
    for _ in range(20):
        x, y = rng.standard_normal((2, 2)) * 1.5
        there = log_flow(run_step, kernel, target, log_target, x, y)
        worst = max(worst, abs(there - log_flow(run_step, kernel, target, log_target, y, x)))
    return worst


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_probability_flows_equally_both_ways(kernel, case):
    assert imbalance(step, KERNELS[kernel], case) < 1e-12


MUTANTS = {
    "mala without the Hastings term": ("mala", "+ hastings", ""),
    "pcn without its reference": ("pcn", "+ hastings", ""),
    "pcn with the reference's mean elsewhere": ("pcn", "place(arrival,", "place(shifted(arrival),"),
    "mh with half the density where it stands": ("mh", "- state.log", "- 0.5 * state.log"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_acceptance_is_noticed(mutant):
    kernel, old, new = MUTANTS[mutant]
    source = inspect.getsource(step)
    assert old in source
    space = vars(lockstep) | {"shifted": lambda s: s._replace(u=s.u + 0.1)}
    exec(source.replace(old, new), space)
    assert imbalance(space["step"], KERNELS[kernel], "poisson") > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_walk_flows_equally_both_ways(case):
    target, log_target = problem(case)
    rows = compiled_walk.rows_of(target, target.posterior.risk)
    factor = np.linalg.cholesky(np.array([[1.0, 0.4], [0.4, 0.7]]))
    rng = np.random.default_rng(7)
    for x, y in rng.standard_normal((20, 2, 2)) * 1.5:
        flows = []
        for a, b in ((x, y), (y, x)):
            noise, here = np.linalg.solve(factor, b - a), compiled_walk.log_density(rows, a)
            u, density, log_accept, _ = compiled_walk.move(rows, a, here, factor, noise, 1e-300)
            np.testing.assert_allclose(u, b, rtol=1e-9, atol=1e-12)
            assert abs(density - log_target(b)) < 1e-11
            flows.append(log_target(a) + log_accept)  # q is the same both ways
        assert abs(flows[0] - flows[1]) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_slopes_are_those_of_the_density(case):
    target, log_target = problem(case)
    for u in np.random.default_rng(1).standard_normal((5, 2)):
        found = slope(target, u[None])[0]
        expected = [(log_target(u + h) - log_target(u - h)) / 2e-5 for h in 1e-5 * np.eye(2)]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    if case == "poisson":  # far out exp explodes, and the drift is cut
        far = np.linalg.solve(target.factor, [30.0, 0.0])
        assert np.linalg.norm(slope(target, far[None])) == pytest.approx(10 * np.sqrt(2))


def test_the_form_is_the_posterior_where_that_is_gaussian():
    posterior, mean, V, _ = gaussian()
    target = target_of(posterior)
    np.testing.assert_allclose(target.centre, mean, rtol=1e-9)
    np.testing.assert_allclose(target.factor @ target.factor.T, V, rtol=1e-9)


def test_a_student_prior_far_from_the_data_does_not_move_the_form_to_itself():
    y = 50 + np.random.default_rng(1).standard_normal(100)
    posterior = hi.GibbsPosterior(hi.losses.squared(), (y, np.ones(100)), hi.StudentT(3, 0, 1))
    around = target_of(posterior).centre + np.array([[-1e-4], [0.0], [1e-4]])
    assert np.argmax(posterior.log_density(around)) == 1  # the mode


# --- tempering ------------------------------------------------------------------------------


def test_a_rung_halves_the_effective_size_and_resampling_keeps_weights():
    rng = np.random.default_rng(0)
    gain = -rng.gamma(0.5, 50.0, 2000)  # skewed
    gain[:300] = -np.inf
    ahead = smc.next_rung(gain, 1.0)
    weight, increment = smc.reweighted(gain, ahead)
    assert 1 / (weight**2).sum() == pytest.approx(850, rel=1e-6)
    assert increment == pytest.approx(np.log(np.exp(gain * ahead).mean()), rel=1e-12)
    assert smc.next_rung(gain * 1e-4, 0.5) == 0.5
    counts = np.bincount(smc.systematic(weight, 0.3), minlength=2000)
    assert (np.abs(counts - 2000 * weight) < 1).all()
    many = [np.bincount(smc.systematic(weight, c), minlength=2000) for c in rng.random(400)]
    assert np.abs(np.mean(many, axis=0) - 2000 * weight).max() < 5 * 0.5 / np.sqrt(400)


def test_particles_move_until_they_have_spread():
    """All at the mean of a Gaussian: sweeps go on until they have about its variance."""
    target = target_of(gaussian()[0])
    at = np.zeros((1000, 2))
    cloud = smc.Cloud(at, np.zeros(1000), target.log_density(at), np.ones(1000, dtype=bool))
    streams = {name: generator(1, name) for name in ("noise", "coins")}
    cloud, _, sweeps, settled = smc._moved(target, cloud, 1.0, np.eye(2), 0.5, streams)
    assert settled
    assert 3 < sweeps < smc.SWEEPS
    assert (cloud.u**2).mean() > 0.85


# --- two routes -----------------------------------------------------------------------------


def squared(theta, rows):
    return (rows[0] - rows[1] @ theta) ** 2 / 2


def squared_slope(theta, rows):
    return -(rows[0] - rows[1] @ theta)[:, None] * rows[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_function_gives_the_draws_of_the_loss_of_its_kind(method):
    """Forms and minimisers are found by other routes; `mh` is compiled for one of the two."""
    linear = gaussian()[0]
    loss = hi.Loss(squared, gradient=squared_slope)
    custom = hi.GibbsPosterior(loss, linear.rows, PRIOR, 0.3, start=[0.0, 0.0])
    one, two = (hi.sample(p, method, draws=300, chains=2, seed=3) for p in (linear, custom))
    np.testing.assert_allclose(theta(one), theta(two), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(one["sample_stats"]["accepted"], two["sample_stats"]["accepted"])
