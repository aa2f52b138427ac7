"""Tests that the variances' ratio moves: regressions, laws under the null, noise, reasons."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.testing import assert_allclose
from scipy.stats import chi2, kstest

from hakari.inference.bidirectional.identification import (
    RatioSums,
    identification,
    index_test,
    rank_test,
    ratio_test,
    variance_strength,
)
from hakari.inference.bidirectional.orthogonal_moments import MomentSums, anderson_rubin
from hakari.inference.sampling import generator
from tests.bidirectional_designs import (
    EFFECTS,
    blurred,
    reduced,
    sums_of,
    system,
)

# --- does the ratio move ---------------------------------------------------------------------


def log_ratio(rows):
    return np.log(rows.W1**2) - np.log(rows.W2**2)


def features_of(rows):
    return np.column_stack([np.ones(len(rows.x)), rows.x, rows.x**2])


def test_ratio_test_is_the_regressions_and_adds():
    rows = system(300)
    P, r = features_of(rows), log_ratio(rows)
    fit = sm.OLS(r, P).fit()
    halves = RatioSums.of(P[:100], r[:100]) + RatioSums.of(P[100:], r[100:])
    statistic, df, p = ratio_test(halves)
    assert_allclose(statistic, 300 * fit.rsquared, rtol=1e-9)
    assert (df, p) == (4, chi2.sf(statistic, 4))
    repeated = RatioSums.of(np.column_stack([P, P[:, 1] - P[:, 2], np.full(300, 2.0)]), r)
    assert_allclose(ratio_test(repeated)[:2], (statistic, 4), rtol=1e-9)


def test_ratio_tests_are_uniform_where_the_ratio_is_constant():
    draw = generator(12, "constant")
    rows = system(800, strength=0.0)
    P, index = features_of(rows), np.column_stack([np.ones(800), rows.x[:, 0]])
    p = []
    for _ in range(300):
        again = reduced(rows.s1 * draw.standard_normal((2, 800)), rows.s1, rows.s2, rows.x)
        r = log_ratio(again)
        p.append((ratio_test(RatioSums.of(P, r))[2], index_test(RatioSums.of(index, r))[2]))
    for values in np.array(p).T:
        assert kstest(values, "uniform").pvalue > 0.001


def test_an_index_points_one_way():
    rows = system(2000)
    r, predicted = log_ratio(rows), np.log(rows.rho)
    up, down = (
        index_test(RatioSums.of(np.column_stack([np.ones(2000), f * predicted]), r))
        for f in (1.0, -3.0)
    )
    assert_allclose(up[0], -down[0], rtol=1e-9)
    assert up[2] < 1e-6
    assert down[2] > 1 - 1e-6
    with pytest.raises(ValueError, match="5 columns: an index test takes the constant and one"):
        index_test(RatioSums.of(features_of(rows), r))


def test_wrong_ratio_sums_are_named():
    one = RatioSums.of(np.ones((3, 2)), np.ones(3))
    with pytest.raises(ValueError, match="sums of 2 and 1 features do not add"):
        one + RatioSums.of(np.ones((3, 1)), np.ones(3))
    with pytest.raises(ValueError, match="not finite in row 1: drop"):
        RatioSums.of(np.ones((3, 2)), np.array([0.0, -np.inf, 1.0]))
    with pytest.raises(ValueError, match="sum of squares 12 over 3 rows: it must be 1"):
        ratio_test(RatioSums.of(np.full((3, 2), 2.0), np.arange(3.0)))


# --- strength --------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [False, True])
def test_rank_statistic_is_the_least_at_infinite_moments(extra):
    rows = system(300, strength=0.3)
    own = sums_of(rows, np.column_stack([rows.k, rows.x]) if extra else rows.k)
    a = own.standard.scale * np.tan(np.linspace(-np.pi / 2, np.pi / 2, 20_000)[1:-1])
    statistic, df, p = rank_test(own)
    assert_allclose(statistic, anderson_rubin(own, a, -1 / a).min(), rtol=1e-4)
    assert df == (3 if extra else 1)
    assert p == chi2.sf(statistic, df)


def test_rank_statistic_is_chi_square_where_the_ratio_is_constant():
    rows, draw = system(1000, strength=0.0), generator(13, "rank")
    k = blurred(rows)
    found = []
    for _ in range(300):
        eps = np.stack([rows.s1, rows.s2]) * draw.standard_normal((2, 1000))
        found.append(rank_test(sums_of(reduced(eps, rows.s1, rows.s2, rows.x), k)))
    assert kstest([p for _, _, p in found], "uniform").pvalue > 0.001


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_strength_is_not_swollen_by_noise_of_the_instruments(noise):
    rows = system(400_000, strength=0.8, seed=5)
    truth = rows.rho.mean() * (1 / rows.rho).mean() - 1
    k = blurred(rows, noise)
    own = variance_strength(sums_of(rows, k), *EFFECTS)
    plugged = (k[:, 1] / k[:, 0]).mean() * (k[:, 0] / k[:, 1]).mean() - 1
    assert own == pytest.approx(truth, rel=0.03)
    if noise:
        assert plugged > 1.5 * truth
    swapped = variance_strength(sums_of(rows, k[:, ::-1]), *EFFECTS)
    assert swapped == pytest.approx(1 / (1 + own) - 1, rel=1e-9)


def report(strength, n=4000):
    rows = system(n, strength=strength, seed=2)
    r, index = log_ratio(rows), np.column_stack([np.ones(n), rows.x[:, 0]])
    return identification(
        sums_of(rows, blurred(rows)), RatioSums.of(features_of(rows), r), RatioSums.of(index, r)
    )


def test_a_strong_design_is_identified():
    found = report(1.0)
    assert found.identified
    assert found.reasons == ()
    assert found.least_information > 0.1
    assert str(found).startswith("identified\n  constant ratio, features: ")


def test_a_constant_ratio_is_refused_with_reasons():
    found = report(0.0)
    assert not found.identified
    words = str(found)
    assert "no sign that the variances' ratio depends on the covariates" in words
    assert "the moments are weak, F" in words
    assert found.tests["rank of the moments"][0] < 10
    proportional = identification(sums_of(system(300, strength=0.0)))
    assert not proportional.identified
    assert "the variances' ratio is constant" in str(proportional)


def test_moments_without_a_solution_are_a_reason():
    """Two moments that hold at u = v = 0.6 alone, well measured: 4uv is 1.44."""
    mean = np.array([1.8, 1.8, 2.0, 1.0, 1.0, 2.0])
    sums = MomentSums(100, 100.0, 100 * mean, 100 * (0.01 * np.eye(6) + np.outer(mean, mean)))
    found = identification(sums)
    assert found.reasons == (sums.solve().roots.reason,)
    assert "4uv = 1.44 is not below 1, so that no pair of effects fits" in str(found)
    # z = (1 − 4uv) over its error: V = 0.01 (1 + u² + v²) I at u = v = 0.6 apart from the mean
    G = np.array([[2.0, 1.0], [1.0, 2.0]])
    spread = np.linalg.inv(G) @ np.linalg.inv(G).T * 0.01 * 1.72 / 100
    z = -0.44 / (2.4 * np.sqrt(spread.sum()))
    assert_allclose(found.tests["a solution exists"][0], z, rtol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_positive_instruments_always_have_a_solution(seed):
    """Each moment's line, w12 = u w11 + v w22, stays in 4uv < 1, by Cauchy and Schwarz."""
    draw = generator(seed, "positive")
    own = MomentSums.of(*draw.standard_normal((2, 3)), draw.random((3, 2)))
    assert own.solve().roots.exists
