"""The horseshoe: conditional laws exactly, the joint law by Geweke's test, and a quadrature."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from scipy.stats import norm

from hakari.inference import horseshoe
from hakari.inference.horseshoe import (
    Horseshoe,
    Local,
    _basis,
    _noise,
    _partial_out,
    _regression,
    by_columns,
    by_rows,
    horseshoe_means,
    sweep,
)


def regressions(n, K, m, seed=0, signals=3):
    """Outcomes (n, m), correlated controls (n, K), coefficients (K, m), all but a few zero."""
    random = np.random.default_rng(seed)
    C = random.standard_normal((n, K)) + 0.3 * random.standard_normal((n, 1))
    truth = np.zeros((K, m))
    truth[:signals] = np.array([2.0, -1.5, 1.0])[:signals, None]
    return C @ truth + random.standard_normal((n, m)), C, truth


# --- the law of one sweep -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 4), (12, 12), (7, 20)])
@pytest.mark.parametrize("route", ["columns", "rows"])
def test_coefficients_given_their_scales_have_the_gaussian_law(shape, route):
    """Mean, y'M⁻¹y and covariance against inverses: a draw is linear in its normals."""
    n, P = shape
    Y, X, _ = regressions(n, P, 1)
    y, d = Y[:, 0].copy(), np.exp(np.random.default_rng(1).standard_normal(P))
    count = P if route == "columns" else P + n

    def draw(normals):
        if route == "rows":
            return by_rows(X, y, d, normals)
        return by_columns(X, X.T @ X, y, d, normals)

    A = X.T @ X + np.diag(d**-2.0)
    M = np.eye(n) + (X * d**2) @ X.T
    mean, left, none = draw(np.zeros(count))
    np.testing.assert_allclose(none, 0)
    np.testing.assert_allclose(mean, np.linalg.solve(A, X.T @ y), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(left, y @ np.linalg.solve(M, y), rtol=1e-9)
    slopes = np.column_stack([draw(unit)[2] for unit in np.eye(count)])
    np.testing.assert_allclose(slopes @ slopes.T, np.linalg.inv(A), rtol=1e-8, atol=1e-10)


def geweke(step, wide, cycles, seed=0, n=6, P=3, gamma_shift=0.0):
    """Largest |z| by which the successive-conditional sampler misses the priors.

    y | β, σ and a sweep in turn leave the joint law invariant, if both are right. With p(σ²) ∝
    1/σ² that of σ is improper, but everything is equivariant to the scale of y, so that the chain
    of (β/σ, λ, τ) has its priors as law. Geweke (2004). Uniform transforms: u, u² of each.
    """
    random = np.random.default_rng(seed)
    X = regressions(n, P, 1, seed)[1]
    gram = X.T @ X
    normals = random.standard_normal((cycles, P + n * wide))
    waits = random.standard_exponential((cycles, 2 * P + 1))
    gammas = random.standard_gamma([n / 2, (P + 1) / 2 + gamma_shift], (cycles, 2))
    errors = random.standard_normal((cycles, n))
    state, beta = Local(np.ones(P), 1.0, np.ones(P), 1.0), np.zeros(P)
    record = np.empty((cycles, 2 * P + 1))
    for i in range(cycles):
        y = X @ beta + errors[i]
        found = step(X, gram, y, 0.0, float(n), wide, state, normals[i], waits[i], gammas[i])
        state = found.state
        beta = (found.mean + found.deviation) / np.sqrt(found.sigma2)
        scales = np.append(state.lam2, state.tau2)
        record[i, :P] = beta / np.sqrt(state.lam2 * state.tau2)
        record[i, P:] = 2 / np.pi * np.arctan(np.sqrt(scales))
    record[:, :P] = norm.cdf(record[:, :P])
    tests = np.hstack([record - 0.5, record**2 - 1 / 3])
    batches = tests.reshape(40, -1, tests.shape[1]).mean(axis=1)
    return np.abs(batches.mean(axis=0) / (batches.std(axis=0, ddof=1) / np.sqrt(40))).max()


@pytest.mark.parametrize("wide", [False, True])
def test_sweeps_leave_the_joint_law_invariant(wide):
    assert geweke(sweep, wide, 60_000) < 3.6  # 14 statistics: 0.4 % (normal) by chance


MUTANTS = {
    "auxiliary of τ forgotten": ("1.0 / state.xi + (", "("),
    "σ² without the prior's part": ("2.0 * sigma2", "sigma2"),
    "global update reads old local scales": ("size / lam2", "size / state.lam2"),
    "auxiliary of λ without its 1": ("(1.0 + 1.0 / lam2)", "(1.0 / lam2)"),
    "local update in the wrong unit": ("size / state.tau2", "size"),
    "deviation without σ": ("np.sqrt(sigma2)", "sigma2"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_conditionals_are_noticed(mutant):
    old, new = MUTANTS[mutant]
    source = inspect.getsource(sweep.py_func).split("\n", 1)[1]
    assert source.count(old) == 1
    space = dict(vars(horseshoe))
    exec(source.replace(old, new), space)
    with np.errstate(all="ignore"):
        assert not geweke(space["sweep"], False, 30_000) < 5


def test_a_wrong_shape_of_the_global_scale_is_noticed():
    assert geweke(sweep, False, 20_000, gamma_shift=-0.5) > 5


def test_noise_has_the_law_it_claims():
    normals, waits, gammas = _noise(np.random.default_rng(0), 40_000, 2, 3, 9.0)
    assert normals.shape[1] == 5
    assert waits.shape[1] == 7
    np.testing.assert_allclose(normals.std(axis=0), 1, atol=0.02)
    np.testing.assert_allclose([waits.mean(), waits.var()], 1, atol=0.02)
    np.testing.assert_allclose(gammas.mean(axis=0), [4.5, 2.0], rtol=0.02)


# --- posterior means ----------------------------------------------------------------------


def quadrature(y, F, x, unit):
    """Mean and sd of the coefficients of (F, x), F flat, over a grid of (λτ, σ); and E(1 − κ)."""
    n, q = F.shape
    W = np.column_stack([F, x])
    log_s, log_sigma = np.linspace(-30, 30, 3001), np.linspace(-2, 2, 401)
    means, inverses, shares = [], [], []
    log_weight = np.empty((len(log_s), len(log_sigma)))
    for i, s in enumerate(np.exp(log_s)):
        precision = W.T @ W
        precision[-1, -1] += (unit / s) ** 2
        inverses.append(np.linalg.inv(precision))
        means.append(inverses[-1] @ W.T @ y)
        left = y @ (y - W @ means[-1])
        prior = 4 / np.pi**2 * (0.5 if s == 1 else np.log(s) / (s**2 - 1)) * s  # of λτ, times ds
        marginal = np.linalg.slogdet(precision)[1] / 2 + np.log(s)  # |A|^(1/2) s: and σ^(n − q)
        log_weight[i] = np.log(prior) - marginal - (n - q) * log_sigma
        log_weight[i] -= left / (2 * np.exp(2 * log_sigma))
        shares.append((n - q) * s**2 / (1 + (n - q) * s**2))
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    of_s, means = weight.sum(axis=1), np.array(means)
    mean = of_s @ means
    spread = (weight @ np.exp(2 * log_sigma)) @ np.diagonal(inverses, axis1=1, axis2=2)
    return mean, np.sqrt(spread + of_s @ (means - mean) ** 2), of_s @ shares


@pytest.mark.parametrize("effect", [0.0, 0.4, 3.0])
def test_one_control_against_quadrature(effect):
    random = np.random.default_rng(5)
    n, chains = 25, 16
    F = np.column_stack([np.ones(n), np.linspace(0, 1, n)])
    x = 2 * random.standard_normal(n) + 3 * F[:, 1]
    y = F @ [1.0, 2.0] + effect * x / 2 + random.standard_normal(n)
    residual = x - F @ np.linalg.lstsq(F, x, rcond=None)[0]
    mean, sd, kept = quadrature(y, F, x, np.sqrt(residual @ residual / (n - 2)))
    found = horseshoe_means(
        np.tile(y[:, None], (1, chains)), np.column_stack([F, x]), random, 2000, 200, free=2
    )
    for values, exact in ((found.coefficients, mean), (found.sd, sd), (found.kept[None], [kept])):
        error = values.std(axis=1, ddof=1) / np.sqrt(chains)
        assert (error < 0.05 * np.maximum(sd[-len(exact) :], 0.2)).all()
        assert (np.abs(values.mean(axis=1) - exact) < 4 * error).all(), (values.mean(axis=1), exact)


def test_few_signals_among_many_controls():
    n, K, m = 100, 200, 2
    Y, C, truth = regressions(n, K, m)
    found = horseshoe_means(Y, C, np.random.default_rng(0), 600, 200)
    centred_y, centred_c = Y - Y.mean(axis=0), C - C.mean(axis=0)
    values, vectors = np.linalg.eigh(centred_c @ centred_c.T)
    ridges = [
        centred_c.T @ (vectors @ (vectors.T @ centred_y / (values + penalty)[:, None]))
        for penalty in np.geomspace(1, 1e4, 30)
    ]
    best_ridge = min(((ridge - truth) ** 2).sum() for ridge in ridges)
    least_norm = ((np.linalg.pinv(centred_c) @ centred_y - truth) ** 2).sum()
    error = ((found.coefficients - truth) ** 2).sum()
    assert error < 0.1 * min(best_ridge, least_norm)
    assert (np.abs(found.coefficients - truth)[:3] < 3.5 * found.sd[:3]).all()
    assert (np.abs(found.coefficients[:3]) > 5 * found.sd[:3]).all()
    assert np.abs(found.coefficients[3:]).mean() < 0.03
    assert ((found.kept > 3) & (found.kept < 0.2 * K)).all()


def test_both_samplers_have_the_same_means():
    Y, C, _ = regressions(40, 30, 1, seed=3)
    problem = _partial_out(Y, C, _basis(C[:, :0]), 0)
    assert not problem.wide
    random = np.random.default_rng(2)
    runs = np.array(
        [
            [np.concatenate(_regression(problem, 0, random, 300, 100, w)[:2]) for _ in range(8)]
            for w in (False, True)
        ]
    )
    gap = runs[0].mean(axis=0) - runs[1].mean(axis=0)
    error = np.sqrt((runs.var(axis=1, ddof=1) / 8).sum(axis=0))
    z = gap / error
    assert np.abs(z).max() < 5  # Student t of about 14, 60 of them
    assert 0.5 < (z**2).mean() < 2


def test_no_signal_is_shrunk_away_and_a_strong_one_is_least_squares():
    Y, C, truth = regressions(4000, 5, 1)
    found = horseshoe_means(Y, C, np.random.default_rng(0), 300, 100)
    X = np.column_stack([np.ones(4000), C])
    fitted, left, _, _ = np.linalg.lstsq(X, Y, rcond=None)
    sd = np.sqrt(np.diag(np.linalg.inv(X.T @ X)) * left / (4000 - 6))[1:]
    assert (np.abs(found.coefficients - fitted[1:])[:3, 0] < 0.2 * sd[:3]).all()
    np.testing.assert_allclose(found.sd[:3, 0], sd[:3], rtol=0.15)
    noise = horseshoe_means(Y - C @ truth, C, np.random.default_rng(0), 300, 100)
    assert (np.abs(noise.coefficients) < np.abs(fitted - np.vstack([[0], truth]))[1:]).all()


# --- what must not matter -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 8), (20, 30)])
def test_units_levels_and_free_columns_pass_through(shape):
    """y → a y + F g and c → c u + F h move the answer as algebra says, noise by noise."""
    Y, C, _ = regressions(*shape, 2)
    C[:, 0] = np.arange(shape[0])
    found = horseshoe_means(Y, C, np.random.default_rng(0), 50, 10, free=1)
    units = np.geomspace(1e-3, 1e3, shape[1])
    moved = horseshoe_means(
        1e4 * Y + 7 + 2 * C[:, :1], C * units + 100.0, np.random.default_rng(0), 50, 10, free=1
    )
    expected = 1e4 * found.coefficients
    expected[0] += 2
    np.testing.assert_allclose(moved.coefficients * units[:, None], expected, rtol=1e-5)
    np.testing.assert_allclose(moved.sd * units[:, None], 1e4 * found.sd, rtol=1e-5)
    np.testing.assert_allclose(moved.kept, found.kept, rtol=1e-5)


def test_a_constant_among_the_controls_changes_nothing_else():
    Y, C, _ = regressions(50, 6, 2)
    without = horseshoe_means(Y, C, np.random.default_rng(0), 50, 10)
    ones = np.column_stack([np.ones(50), C])
    with_one = horseshoe_means(Y, ones, np.random.default_rng(0), 50, 10, free=1)
    np.testing.assert_allclose(with_one.coefficients[1:], without.coefficients, rtol=1e-8)
    left = Y - ones @ with_one.coefficients
    np.testing.assert_allclose(left.mean(axis=0), 0, atol=1e-12)


def test_same_seed_same_answer_and_later_regressions_change_nothing():
    Y, C, _ = regressions(30, 5, 3)
    first, again, fewer, other = (
        horseshoe_means(Y[:, :m], C, np.random.default_rng(seed), 40, 10)
        for m, seed in ((3, 0), (3, 0), (2, 0), (3, 1))
    )
    np.testing.assert_array_equal(first.coefficients, again.coefficients)
    np.testing.assert_allclose(first.sd[:, :2], fewer.sd, rtol=1e-10)  # sums in another order
    assert (first.coefficients != other.coefficients).all()


def test_extreme_scales_do_not_break_the_factors():
    """λ of 1e200 or 1e-200: finite, and close to no shrinkage or to all of it."""
    n, P = 10, 25
    Y, X, _ = regressions(n, P, 1)
    random = np.random.default_rng(0)
    lam2 = np.ones(P)
    lam2[:4], lam2[4:8] = 1e200, 1e-200
    for wide in (False, True):
        normals, waits, gammas = (a[0] for a in _noise(random, 1, n * wide, P, float(n)))
        state = Local(lam2, 1.0, np.ones(P), 1.0)
        found = sweep(X, X.T @ X, Y[:, 0], 0.0, float(n), wide, state, normals, waits, gammas)
        assert np.isfinite(found.state.lam2).all()
        assert found.state.tau2 > 0
        assert (np.abs(found.mean[4:8]) < 1e-90).all()


# --- errors -------------------------------------------------------------------------------


def refuse(message, Y=None, C=None, **options):
    good_y, good_c, _ = regressions(20, 4, 2)
    arguments = (good_y if Y is None else Y, good_c if C is None else C, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        horseshoe_means(*arguments, **({"sweeps": 10, "warmup": 0} | options))


def test_refusals_name_the_thing_and_its_value():
    Y, C, _ = regressions(20, 4, 2)
    refuse(r"shape \(19, 2\) and controls of shape \(20, 4\)", Y=Y[1:])
    refuse(r"shape \(20, 0\) and controls", Y=Y[:, :0])
    refuse("4 free columns of 4 controls: leave at least one", free=4)
    refuse("-1 free columns of 4", free=-1)
    refuse("1 sweeps after a warmup of 0", sweeps=1)
    refuse("10 sweeps after a warmup of -1", warmup=-1)
    bad = Y.copy()
    bad[3, 1] = np.inf
    refuse("outcome 1 is inf in row 3", Y=bad)
    bad = C.copy()
    bad[5, 2] = np.nan
    refuse("control 2 is nan in row 5", C=bad)
    refuse("collinear free controls: control 0, control 1", C=C[:, [0, 0, 1, 2]], free=2)
    refuse("control 3 is explained by the free columns", C=C[:, [0, 1, 2, 0]], free=1)
    refuse("control 0 is explained by the free columns", C=np.ones((20, 1)))
    refuse("outcome 1 is explained by the free", Y=np.column_stack([Y[:, 0], C[:, 0]]), free=1)
    refuse("4 rows for 2 free columns .*: need 3 more", Y=Y[:4], C=C[:4], free=1)


def test_defaults_are_those_of_the_prior():
    parameters = inspect.signature(horseshoe_means).parameters
    assert parameters["sweeps"].default == Horseshoe().sweeps
    assert parameters["warmup"].default == Horseshoe().warmup
