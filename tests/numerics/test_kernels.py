"""Each kernel leaves the target invariant: probability flows equally both ways.

The shipped `step` is asked for its acceptance by coins near zero and noise that lands on a
chosen point; target and proposal densities come by routes that `step` does not take. Mutants
of `step`, made from its own source, must fail.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from scipy.stats import kstest, multivariate_normal, multivariate_t
from scipy.stats import t as student

import hakari.inference as hi
from hakari.inference import transition
from hakari.inference.density import evaluate, log_density_batch
from hakari.inference.kernels import preconditioned
from hakari.inference.kernels.approximate import approximate
from hakari.inference.kernels.delayed import delayed
from hakari.inference.kernels.exact import exact
from hakari.inference.kernels.independence import (
    Reference,
    accept,
    log_reference,
    log_weights,
    mixed_scales,
    proposals,
)
from hakari.inference.kernels.metropolis import metropolis
from hakari.inference.transition import step
from tests.designs import direct_log_density, iv_design

KERNELS = [metropolis, delayed, exact, approximate]
ALWAYS = np.array([1e-300, 1e-300])
NORMAL = hi.Normal(0.8, 0.05)
STUDENT = hi.StudentT(3, 0.8, 0.05)
CASES = [  # (K, L, prior)
    (1, 2, NORMAL),
    (2, 2, NORMAL),
    (3, 5, NORMAL),
    (3, 3, hi.Flat()),
    (3, 4, STUDENT),
]


def problem(K, L, prior, n=60):
    y, X, Z = iv_design(n, K, L, seed=K + L)
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z), prior)

    def log_target(u):
        theta = posterior.whitened.theta(u)
        return direct_log_density(theta, y, X, Z) + float(posterior.log_prior(theta))

    return posterior.whitened.target, log_target


def tuning_of(kernel, target):
    L, K = target.slope.shape
    if kernel is approximate and L == K:
        return np.linalg.inv(target.slope) / np.sqrt(target.n)
    return np.linalg.cholesky(0.6 * np.eye(K) + 0.2) / np.sqrt(K)


def log_flow(run_step, kernel, target, log_target, x, y):
    """log π(x) q(x, y) α(x, y)."""
    tuning = tuning_of(kernel, target)
    state = evaluate(target, x)
    placed = kernel.place(target, state, tuning)
    noise = np.linalg.solve(placed[1], y - placed[0])
    move = run_step(target, kernel.place, kernel.log_screen, state, placed, tuning, noise, ALWAYS)
    np.testing.assert_allclose(move.state.u, y, rtol=1e-9, atol=1e-12)
    q = multivariate_normal(placed[0], placed[1] @ placed[1].T).logpdf(y)
    return log_target(x) + q + move.log_screen + move.log_accept


def imbalance(run_step, kernel, K, L, prior):
    target, log_target = problem(K, L, prior)
    rng = np.random.default_rng(5)
    worst = 0.0
    for _ in range(20):
        x, y = rng.standard_normal((2, K)) * 1.5
        there = log_flow(run_step, kernel, target, log_target, x, y)
        worst = max(worst, abs(there - log_flow(run_step, kernel, target, log_target, y, x)))
    return worst


FITTING = [  # da-exact takes Gaussian and flat priors only; `sample` refuses the rest
    pytest.param(kernel, case, id=f"{kernel.name}-{case}")
    for kernel in KERNELS
    for case in CASES
    if not (kernel is exact and case[2] is STUDENT)
]


@pytest.mark.parametrize(("kernel", "case"), FITTING)
def test_probability_flows_equally_both_ways(kernel, case):
    assert imbalance(step, kernel, *case) < 1e-11


MUTANTS = {
    "without the proposal's density": ("+ backward + log_screen", "+ log_screen", exact),
    "without the reverse screen": ("+ log_screen(target, arrival, state.u)", "", delayed),
    "without the forward screen": ("- forward - screen", "- forward", delayed),
    "without the forward density": ("- forward - screen", "- screen", approximate),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_acceptance_ratio_is_noticed(mutant):
    old, new, kernel = MUTANTS[mutant]
    source = inspect.getsource(step.py_func).split("\n", 1)[1]
    assert old in source
    space = dict(vars(transition))
    exec(source.replace(old, new), space)
    assert imbalance(step.py_func, kernel, 3, 5, NORMAL) < 1e-11, "interpreted, unchanged"
    assert imbalance(space["step"], kernel, 3, 5, NORMAL) > 1e-2


def step_moves(kernel):
    """Off-diagonal moves q α of a step kernel between two points."""

    def moves(target, x, y):
        return np.exp(log_flow(step, kernel, target, lambda u: 0.0, x, y))

    return moves


def independence_moves(target, x, y):
    """r(y) times the probability with which `accept` takes y, found by its coins."""
    ref = reference(1)
    noise = np.linalg.solve(ref.factor, (np.array([x, y]) - ref.mean).T).T
    weight = log_weights(target, ref, noise, np.ones(2))[2]
    return np.exp(log_law(ref, y)) * taken(
        lambda coin: accept(weight[0], weight[1:], np.array([coin]))[0] == 0
    )


def preconditioned_moves(target, x, y):
    """The autoregressive law of y times the probability with which `run` takes it."""
    ref, rho = reference(1, np.inf), 0.6
    v, moved = (np.linalg.solve(ref.factor, p - ref.mean)[None] for p in (x, y))
    noise = (moved - rho * v) / np.sqrt(1 - rho**2)

    def accepts(coin):
        coins = np.array([[coin]])
        args = (ref.mean, ref.factor, ref.df, rho, v, noise[None], coins)
        return preconditioned.run(target, *args)[3][0, 0]

    law = multivariate_normal(rho * v[0], (1 - rho**2) * np.eye(1)).logpdf(moved[0])
    return np.exp(law) / ref.factor[0, 0] * taken(accepts)


def taken(accepts):
    """Probability of acceptance, the largest coin that still accepts, by bisection."""
    if accepts(1 - 1e-15):
        return 1.0
    low, high = -800.0, 0.0  # of the coin's logarithm
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accepts(np.exp(middle)) else (low, middle)
    return np.exp(low)


CHAINS = {kernel.name: step_moves(kernel) for kernel in KERNELS} | {
    "independence": independence_moves,
    "preconditioned": preconditioned_moves,
}


def enumerated(moves):
    """Transition matrix over 31 states on a line, and the target by its definition."""
    target, log_target = problem(1, 2, NORMAL, n=25)
    grid = np.linspace(-4, 4, 31)
    log_pi = np.array([log_target(np.array([g])) for g in grid])
    pi = np.exp(log_pi - log_pi.max())
    P = np.array([[moves(target, np.array([x]), np.array([y])) for y in grid] for x in grid])
    np.fill_diagonal(P, 0.0)
    P *= 0.9 / P.sum(axis=1).max()  # a coin decides whether to move at all: a proper chain
    np.fill_diagonal(P, 1 - P.sum(axis=1))
    return P, pi / pi.sum()


@pytest.mark.parametrize("chain", CHAINS)
def test_enumerated_transition_matrix_keeps_the_target(chain):
    P, pi = enumerated(CHAINS[chain])
    assert P.min() >= 0
    balance = pi[:, None] * P
    assert np.abs(balance - balance.T).max() < 1e-12
    assert np.abs(pi @ P - pi).max() < 1e-12


def test_enumerated_chain_of_a_mutant_loses_the_target():
    """Independence that accepts by the density, not by the weight."""

    def moves(target, x, y):
        at = log_density_batch(target, np.array([x, y]))
        return np.exp(log_law(reference(1), y)) * min(1.0, np.exp(at[1] - at[0]))

    P, pi = enumerated(moves)
    assert np.abs(pi @ P - pi).max() > 1e-3


def test_screened_proposals_are_not_evaluated():
    """With a coin of one the delayed kernel stops after the first stage."""
    target, _ = problem(3, 5, NORMAL)
    state = evaluate(target, np.zeros(3))
    placed = delayed.place(target, state, np.eye(3))
    far, coins = np.full(3, 3.0), np.array([0.999, 1e-300])
    move = step(target, *delayed[1:], state, placed, np.eye(3), far, coins)
    assert move.outcome == transition.SCREENED
    assert np.isnan(move.log_accept)


def reference(K, df=8.0, share=0.0):
    factor = np.linalg.cholesky(0.7 * np.eye(K) + 0.3)
    return Reference(np.linspace(0.1, 0.3, K), factor, df, share)


def log_law(ref, u):
    """Log density of the reference by scipy: a mixture of two Student laws, or one, or a normal."""
    scale = ref.factor @ ref.factor.T
    if np.isinf(ref.df):
        return multivariate_normal(ref.mean, scale).logpdf(u)
    main = multivariate_t(ref.mean, scale, df=ref.df).pdf(u)
    wide = multivariate_t(ref.mean, 4 * scale, df=4).pdf(u)
    return np.log((1 - ref.share) * main + ref.share * wide)


@pytest.mark.parametrize("df", [8.0, np.inf])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_reference_density_is_scipys(df, share):
    ref = reference(3, df, share if np.isfinite(df) else 0.0)
    u = np.random.default_rng(0).standard_normal((50, 3)) * 3
    np.testing.assert_allclose(log_reference(ref, u), log_law(ref, u), rtol=1e-11)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_proposals_have_the_law_they_claim(share):
    ref, rng, N = reference(2, share=share), np.random.default_rng(3), 20_000
    wide = rng.random(N) < share
    chi2_wide = rng.chisquare(4, int(wide.sum()))
    scales = mixed_scales(ref, rng.chisquare(8, N), wide, chi2_wide)
    u, log_r = proposals(ref, rng.standard_normal((N, 2)), scales)
    np.testing.assert_allclose(log_r, log_reference(ref, u), rtol=1e-9, atol=1e-12)
    z = np.linalg.solve(ref.factor, (u - ref.mean).T)

    def cdf(x):
        return (1 - share) * student(8).cdf(x) + share * student(4).cdf(x / 2)

    for row in (z[0], z[1], (z[0] + z[1]) / np.sqrt(2)):
        assert kstest(row, cdf).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_independence_accepts_exactly_with_the_ratio_of_weights(share):
    target, log_target = problem(3, 5, STUDENT)
    ref, rng = reference(3, share=share), np.random.default_rng(1)
    for _ in range(20):
        x, y = rng.standard_normal((2, 3)) * 1.5
        log_w = [log_target(point) - log_law(ref, point) for point in (x, y)]
        log_alpha = min(0.0, log_w[1] - log_w[0])
        noise = np.linalg.solve(ref.factor, (np.array([x, y]) - ref.mean).T).T
        u, _, weights = log_weights(target, ref, noise, np.ones(2))
        np.testing.assert_allclose(u, [x, y], rtol=1e-12)
        for factor, taken in ((1 - 1e-9, 0), (1 + 1e-9, -1 if log_alpha < 0 else 0)):
            coin = np.array([np.exp(log_alpha) * factor])
            assert accept(weights[0], weights[1:], coin)[0] == taken


@pytest.mark.parametrize("df", [8.0, np.inf])
@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_preconditioned_accepts_exactly_with_the_ratio_of_weights(df, rho):
    """In latent normals N(v) q(v, v') is symmetric, so α is the ratio of w alone."""
    target, log_target = problem(3, 5, STUDENT)
    ref, rng = reference(3, df), np.random.default_rng(2)
    M = preconditioned.latent_size(ref)
    for _ in range(10):
        v, noise = rng.standard_normal((2, 1, M))
        moved = rho * v + np.sqrt(1 - rho**2) * noise
        at = [preconditioned.place(ref.mean, ref.factor, df, p)[0][0] for p in (v, moved)]
        log_w = [log_target(u) - log_law(ref, u) for u in at]
        log_alpha = min(0.0, log_w[1] - log_w[0])
        for factor, taken in ((1 - 1e-9, True), (1 + 1e-9, log_alpha >= 0)):
            coins = np.array([[np.exp(log_alpha) * factor]])
            end, _, _, accepted = preconditioned.run(
                target, ref.mean, ref.factor, df, rho, v, noise[None], coins
            )
            assert accepted[0, 0] == taken
            np.testing.assert_array_equal(end, moved if taken else v)


def test_preconditioned_without_memory_is_independence_draw_by_draw():
    target, _ = problem(3, 5, NORMAL)
    ref, rng = reference(3), np.random.default_rng(4)
    N, M = 400, preconditioned.latent_size(ref)
    start, noise, coins = rng.standard_normal((1, M)), rng.standard_normal((N, 1, M)), rng.random(N)
    _, draws, _, _ = preconditioned.run(
        target, ref.mean, ref.factor, ref.df, 0.0, start, noise, coins[:, None]
    )
    chi2 = (noise[:, 0, 3:] ** 2).sum(axis=1) / 8
    proposed, _, weight = log_weights(target, ref, noise[:, 0, :3], 1 / chi2)
    first = preconditioned.place(ref.mean, ref.factor, ref.df, start)[0]
    at_first = log_density_batch(target, first) - log_reference(ref, first)
    where = accept(float(at_first[0]), weight, coins)
    expected = np.where(where[:, None] < 0, first, proposed[where])
    np.testing.assert_allclose(draws[:, 0], expected, rtol=1e-12)


def test_batches_and_single_evaluations_agree():
    for K, L, prior in CASES:
        target, log_target = problem(K, L, prior)
        u = np.random.default_rng(7).standard_normal((37, K)) * 2
        batch = log_density_batch(target, u)
        single = np.array([evaluate(target, row.copy()).log_density for row in u])
        direct = np.array([log_target(row) for row in u])
        np.testing.assert_allclose(batch, single, rtol=0, atol=1e-10)
        assert np.ptp(batch - direct) < 1e-10


def test_all_kernels_share_one_compilation():
    assert len(transition.run.signatures) == 1
