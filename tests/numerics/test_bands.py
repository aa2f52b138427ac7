"""Bands by closed forms, integrals and their definition; a pointwise band is no joint one."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from hakari.inference import bands
from hakari.inference.bands import KINDS, band, critical_value, sup_t, sup_t_quantile

N, Q = 2000, 12
LEVELS = [0.5, 0.68, 0.9, 0.95]


def autoregressive(q, rho):
    return rho ** np.abs(np.subtract.outer(np.arange(q), np.arange(q)))


def noise(n, q, seed=1):
    """Standard normals whose reflection is there too: the sample mean is 0."""
    half = np.random.default_rng(seed).standard_normal((n // 2, q))
    return np.vstack([half, -half])


@pytest.fixture(scope="module")
def draws():
    factor = np.linalg.cholesky(autoregressive(Q, 0.7))
    wide = np.geomspace(0.01, 100, Q)
    return 3 * wide + wide * (np.random.default_rng(0).standard_normal((N, Q)) @ factor.T)


def inside(draws, found):
    """The definition, draw by draw."""
    return sum(all(found.lower <= d) and all(d <= found.upper) for d in draws)


@pytest.mark.parametrize("level", LEVELS)
def test_sup_t_holds_exactly_the_share(draws, level):
    found = sup_t(draws, level)
    assert inside(draws, found) == ceil(level * N - 1e-9) == round(found.inside * N)
    half = (found.upper - found.lower) / 2
    np.testing.assert_allclose(half, found.critical * draws.std(axis=0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose((found.upper + found.lower) / 2, draws.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("n", [20, 100, 332])
def test_the_count_is_not_rounded_up_by_a_product(n):
    e = np.random.default_rng(n).standard_normal((n, 3))
    assert inside(e, sup_t(e, 0.7)) == -(-7 * n // 10)
    assert bands._count(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001


@pytest.mark.parametrize("end", ["lower", "upper"])
def test_rounding_pushes_no_draw_out(draws, end):
    """Near 0 the draw at the edge is known to more digits than mean ± c sd is."""
    for part in np.split(draws[:, 5:6], 40):
        moved = part - getattr(sup_t(part, 0.9), end) + 1e-9
        assert inside(moved, sup_t(moved, 0.9)) == 0.9 * len(part)


@pytest.mark.parametrize("level", LEVELS)
def test_quantile_form_is_the_narrowest_that_holds_the_share(draws, level):
    skewed = np.exp(draws / draws.std(axis=0))
    found = sup_t_quantile(skewed, level)
    assert level <= found.inside <= level + 2 * Q / N
    assert inside(skewed, found) == round(found.inside * N)
    ordered = np.sort(skewed, axis=0)
    k = int(np.searchsorted(ordered[:, 0], found.lower[0]))
    np.testing.assert_array_equal(found.lower, ordered[k])
    np.testing.assert_array_equal(found.upper, ordered[N - 1 - k])
    narrower = (ordered[k + 1] <= skewed) & (skewed <= ordered[N - 2 - k])
    assert narrower.all(axis=1).mean() < level


def test_quantile_form_commutes_with_increasing_functions(draws):
    there, back = sup_t_quantile(draws / 100, 0.9), sup_t_quantile(np.exp(draws / 100), 0.9)
    np.testing.assert_allclose(np.exp(there.upper), back.upper)
    assert there.inside == back.inside


@pytest.mark.parametrize("level", LEVELS)
def test_independent_coordinates(level):
    c = critical_value(np.eye(6), level, noise(100_000, 6))
    exact = norm.ppf((1 + level ** (1 / 6)) / 2)
    assert c == pytest.approx(exact, abs=0.015)
    found = bands.sidak(noise(N, 6), level)
    assert found.critical == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_perfectly_correlated_coordinates_are_one(level):
    column = noise(N, 1)
    scaled = column * np.array([1.0, -2.0, 0.1])
    found = sup_t(scaled, level)
    assert found.critical == pytest.approx(
        np.quantile(np.abs(column), level) / column.std(), abs=0.01
    )
    every = critical_value(np.ones((3, 3)), level, noise(100_000, 3))
    assert every == pytest.approx(norm.ppf((1 + level) / 2), abs=0.02)
    lower, upper = bands.pointwise(scaled, level)
    np.testing.assert_allclose(found.upper, upper, rtol=0.02)
    np.testing.assert_allclose(found.lower, lower, rtol=0.02)


def equicorrelated(rho, q, level):
    """c with ∫ φ(u) P(|√ρ u + √(1−ρ) e| < c)^q du = level."""

    def share(c):
        def given(u):
            ends = (np.array([c, -c]) - np.sqrt(rho) * u) / np.sqrt(1 - rho)
            return norm.pdf(u) * -(np.diff(norm.cdf(ends))[0] ** q) * (-1) ** (q + 1)

        return quad(given, -9, 9)[0] - level

    return brentq(share, 0.5, 5)


@pytest.mark.parametrize("rho", [0.2, 0.6, 0.95])
def test_equicorrelated_coordinates_by_an_integral(rho):
    correlation = np.full((8, 8), rho) + (1 - rho) * np.eye(8)
    c = critical_value(correlation, 0.9, noise(100_000, 8))
    assert c == pytest.approx(equicorrelated(rho, 8, 0.9), abs=0.015)


def test_autoregressive_coordinates_by_the_normal_probability():
    correlation = autoregressive(4, 0.8)
    c = critical_value(correlation, 0.9, noise(100_000, 4))
    law = multivariate_normal(np.zeros(4), correlation, seed=3)
    assert law.cdf(np.full(4, c), lower_limit=np.full(4, -c)) == pytest.approx(0.9, abs=0.003)


def test_the_critical_value_of_draws_is_that_of_their_law():
    correlation = autoregressive(Q, 0.7)
    e = noise(50_000, Q)
    drawn = sup_t(e @ np.linalg.cholesky(correlation).T, 0.9).critical
    assert drawn == pytest.approx(critical_value(correlation, 0.9, noise(50_000, Q, 2)), abs=0.02)


def test_a_pointwise_band_is_no_joint_band(draws):
    """The mutant: taken for a joint band, it holds far too few."""
    assert band(draws, 0.9, "pointwise").inside < 0.6
    for kind in KINDS[1:]:
        assert band(draws, 0.9, kind).inside >= 0.89


def test_pointwise_within_sup_t_within_sidak_within_bonferroni():
    e = noise(20_000, Q) @ np.linalg.cholesky(autoregressive(Q, 0.7)).T
    width = [
        (found.upper - found.lower).min()
        for found in (band(e, 0.9, k) for k in ("pointwise", "sup-t", "sidak", "bonferroni"))
    ]
    assert width == sorted(width)
    narrow, wide = band(e, 0.9, "pointwise"), band(e, 0.9, "sup-t")
    assert (wide.lower < narrow.lower).all()
    assert (narrow.upper < wide.upper).all()


def test_bonferroni_by_its_definition(draws):
    found = bands.bonferroni(draws, 0.9)
    assert found.critical == pytest.approx(norm.ppf(1 - 0.05 / Q), rel=1e-12)
    half = found.critical * draws.std(axis=0, ddof=1)
    np.testing.assert_allclose(found.upper, draws.mean(axis=0) + half)


def test_given_centre_and_spread(draws):
    centre, spread = np.median(draws, axis=0), np.geomspace(0.01, 100, Q)
    found = sup_t(draws, 0.8, centre, spread)
    assert inside(draws, found) == 0.8 * N
    np.testing.assert_allclose(found.upper - centre, found.critical * spread, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_coordinate_that_does_not_vary_changes_nothing(draws, kind):
    """The response on impact that is scaled to 1 is 1 in all draws, up to rounding."""
    alone = band(draws, 0.9, kind)
    rounded = np.where(np.arange(N) % 2, 1.0, 1 + 2**-52)
    more = band(np.column_stack([draws, rounded, np.full(N, 0.1)]), 0.9, kind)
    np.testing.assert_array_equal(more.lower[:-2], alone.lower)
    np.testing.assert_array_equal(more.upper[:-2], alone.upper)
    assert more.inside == alone.inside
    assert more.lower[-2:] == pytest.approx([1, 0.1], rel=1e-14)
    assert more.upper[-2:] == pytest.approx([1, 0.1], rel=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_that_do_not_vary_at_all(kind):
    found = band(np.full((50, 2), 0.3), 0.9, kind)
    assert found.inside == 1
    assert (found.lower == 0.3).all()
    assert (found.upper == 0.3).all()


def test_highest_density_keeps_the_share_of_a_given_density(draws):
    density = -np.abs(draws[:, 0] - draws[:, 0].mean())
    found = bands.highest_density(draws, 0.9, density)
    kept = draws[np.argsort(-density)[: int(0.9 * N)]]
    np.testing.assert_array_equal(found.lower, kept.min(axis=0))
    np.testing.assert_array_equal(found.upper, kept.max(axis=0))
    assert found.inside >= 0.9


def test_highest_density_is_gaussian_by_default(draws):
    law = multivariate_normal(draws.mean(axis=0), np.cov(draws.T))
    by_law = bands.highest_density(draws, 0.9, law.logpdf(draws))
    found = bands.highest_density(draws, 0.9)
    np.testing.assert_array_equal(found.upper, by_law.upper)
    twice = bands.highest_density(np.hstack([draws, draws]), 0.9)  # a singular covariance
    np.testing.assert_array_equal(twice.lower[:Q], found.lower)


def test_one_coordinate_of_highest_density_is_an_interval():
    column = noise(N, 1)
    kept = np.sort(np.abs(column[:, 0]))[int(0.9 * N) - 1]
    assert bands.highest_density(column, 0.9).upper[0] == kept


def test_refusals(draws):
    with pytest.raises(ValueError, match=r"kind 'supt'; did you mean 'sup-t'\? \(kinds: pointwise"):
        band(draws, 0.9, "supt")
    for level in (0.0, 1.0, 90, np.nan):
        with pytest.raises(ValueError, match=f"level {level}: a share between 0 and 1"):
            band(draws, level, "sidak")
    with pytest.raises(ValueError, match=r"199 draws for a band of level 0\.99: at least 200"):
        band(draws[:199], 0.99)
    assert band(draws[:200], 0.99).inside == 0.99
    assert band(draws[:20], 0.9).inside == 0.9
    with pytest.raises(ValueError, match=r"1 of 2000 draws of coordinate 4 are not finite"):
        band(np.where((np.arange(N)[:, None] == 7) & (np.arange(Q) == 4), np.nan, draws), 0.9)
    with pytest.raises(ValueError, match=r"draws of shape \(2000, 0\): need \(draws, coord"):
        band(draws[:, :0], 0.9)
    with pytest.raises(ValueError, match=r"24 draws span a covariance of rank 23, so that all"):
        bands.highest_density(noise(24, 24) + np.random.default_rng(5).random((24, 24)), 0.9)
    with pytest.raises(ValueError, match=r"log_density of shape \(3,\) with 0 NaN: .*2000 draws"):
        bands.highest_density(draws, 0.9, np.zeros(3))
    with pytest.raises(ValueError, match=r"not a correlation: its diagonal is off 1 by 3"):
        critical_value(4 * np.eye(2), 0.9, noise(100, 2))
