"""Which covariates matter: designs whose truth is known, and the parts by other routes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import chi2, norm

from hakari.inference.bidirectional import effect_search, relevance
from hakari.inference.bidirectional.features import RandomFourier
from hakari.inference.sampling import generator

P = 100


def normal(n, p, seed=1):
    return generator(seed, "relevance").standard_normal((n, p))


def copula(chance, n, p, correlation=0.3):
    """Uniform covariates whose normal scores are an AR(1) along the columns."""
    z = chance.standard_normal((n, p))
    for j in range(1, p):
        z[:, j] = correlation * z[:, j - 1] + np.sqrt(1 - correlation**2) * z[:, j]
    return norm.cdf(z)


def system(seed, n=5000, product=False, correlation=0.3):
    """Covariates, targets and what they are without noise: two outcomes, two log variances.

    Covariates 0, 1 and 2 of 100 matter; with `product` also 3 and 60, but in no mean of one alone.
    Signal to noise is 1 in both equations, a = 0.5, b = 0.4, shocks are chi-square.
    """
    chance = generator(seed, "bidirectional design")
    x = copula(chance, n, P, correlation)
    f = np.column_stack(
        [
            np.sin(2 * np.pi * x[:, 0]) + 4 * (x[:, 1] - 0.5) ** 2 + x[:, 0] * x[:, 2],
            np.cos(np.pi * x[:, 0]) - 2 * (x[:, 1] - 0.5) ** 2 + x[:, 2] ** 2,
        ]
    )
    f[:, 0] += product * 8 * (x[:, 3] - 0.5) * (x[:, 60] - 0.5)
    h = 1.5 * np.sin(2 * np.pi * x[:, [0, 2]]) * [1, -1] + (x[:, [1]] - 0.5)
    h += np.log(f.var(axis=0)) - np.log(np.exp(h).mean(axis=0))
    shocks = (chance.chisquare(4, (n, 2)) - 4) / np.sqrt(8)
    eps = np.exp(h / 2) * shocks
    to_outcomes = np.linalg.inv([[1, -0.5], [-0.4, 1]]).T
    targets = np.column_stack([(f + eps) @ to_outcomes, np.log(eps**2)])
    level = np.log(shocks**2).mean(axis=0)
    return x, targets, np.column_stack([f @ to_outcomes, h + level])


# --- what matters ----------------------------------------------------------------------------


def found(X, targets, seed=0):
    return set(np.flatnonzero(np.isfinite(relevance.relevance(X, targets, seed))))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("product", [False, True])
def test_three_of_a_hundred_are_found_and_two_in_a_product(seed, product):
    X, targets, _ = system(seed, product=product)
    assert found(X, targets, seed) == ({0, 1, 2, 3, 60} if product else {0, 1, 2})


def test_neighbours_are_not_taken_for_what_they_are_correlated_with():
    X, targets, _ = system(6, product=True, correlation=0.9)
    assert found(X, targets) == {0, 1, 2, 3, 60}


def test_a_sum_that_stands_in_for_its_parts_is_dropped_again():
    X = normal(2000, 3)
    X[:, 2] = X[:, 0] + X[:, 1] + 0.5 * X[:, 2]
    assert found(X, X[:, [0, 1]].sum(axis=1) + 0.5 * normal(2000, 1, seed=2)[:, 0]) == {0, 1}


def test_functions_that_bend_more_get_shorter_length_scales():
    X = copula(generator(3, "bends"), 3000, 5)
    y = np.sin(4 * np.pi * X[:, 1]) + np.sin(np.pi * X[:, 3]) + 0.3 * normal(3000, 1)[:, 0]
    scales = relevance.relevance(X, y)
    assert_array_equal(np.isfinite(scales), [False, True, False, True, False])
    assert 2 * scales[1] < scales[3]


def test_noise_alone_finds_nothing():
    for seed in range(20):
        chance = generator(seed, "noise alone")
        X = copula(chance, 1000, 40)
        loud = np.exp(3 * X[:, :1]) * chance.standard_t(3, (1000, 1))  # its variance moves
        assert not found(X, np.hstack([loud, chance.standard_normal((1000, 2))]))


def test_ties_and_targets_without_noise_are_no_trouble():
    chance = generator(7, "ties")
    X = copula(chance, 3000, 20)
    X[:, :5], X[:, 5:10] = X[:, :5] > 0.5, np.floor(4 * X[:, 5:10])
    y = X[:, 0] * X[:, 15] + 0.3 * X[:, 6]
    assert found(X, y + 0.5 * y.std() * chance.standard_normal(3000)) == {0, 6, 15}
    assert found(X, X[:, 2]) == {2}
    assert found(X, np.hstack([X[:, [2, 7]], chance.standard_normal((3000, 1))])) == {2, 7}


def test_a_basis_says_what_it_found_and_falls_back():
    X, targets, _ = system(0, n=2000)
    names = [f"x{k}" for k in range(P)]
    basis = RandomFourier(40).fit(X, targets, names)
    assert basis.note == "3 of 100 covariates matter: x0, x1, x2"
    assert basis.size == 1 + 3 + 40
    X, noise = normal(500, 4), normal(500, 1, seed=8)
    nothing = RandomFourier(40).fit(X, noise)
    assert nothing.note.startswith("no covariate was found to matter")
    assert_array_equal(nothing.transform(X), RandomFourier(40, 0, "median").fit(X).transform(X))


def explained(X, targets, truth, basis, train=5000):
    """Share of the truth's variance in rows out of the sample that ridge fits explain."""
    phi = basis.transform(X).astype(float)[:, 1:]
    phi -= phi[:train].mean(axis=0)
    values, vectors = np.linalg.eigh(phi[:train].T @ phi[:train])
    found = []
    for y, f in zip(targets.T, truth.T, strict=True):
        turned = vectors.T @ (phi[:train].T @ (y[:train] - y[:train].mean()))
        fits = [phi @ (vectors @ (turned / (values + c))) for c in np.logspace(-2, 4, 13)]
        errors = [np.mean((f - y[:train].mean() - fit)[train:] ** 2) for fit in fits]
        found.append(1 - min(errors) / f[train:].var())
    return np.array(found)


def test_covariates_that_do_not_matter_cost_no_accuracy():
    X, targets, truth = system(9, n=10_000)
    few = np.array([k in (0, 1, 2) for k in range(P)])
    scale = relevance.median_distance(X[:5000, few] / X[:5000, few].std(axis=0))
    oracle = RandomFourier(length_scale=tuple(np.where(few, scale, np.inf))).fit(X[:5000])
    learned = RandomFourier().fit(X[:5000], targets[:5000])
    blind = RandomFourier(length_scale="median").fit(X[:5000])
    with_truth, with_all = (explained(X, targets, truth, b) for b in (oracle, blind))
    reached = explained(X, targets, truth, learned)
    assert (reached > with_truth - 0.01).all()
    assert (reached > with_all + 0.05).all()


# --- its parts, by other routes --------------------------------------------------------------


def test_columns_are_orthonormal_within_a_covariate():
    X = normal(700, 3)
    X[:, 1] = X[:, 1] > 0
    X[:, 2] = np.clip(np.round(X[:, 2]), -1, 1)
    columns = effect_search._columns(X).astype(float)
    for k, distinct in enumerate((700, 2, 3)):
        expected = np.diag(np.arange(effect_search.COSINES + 1) < distinct - 1).astype(float)
        assert_allclose(columns[k] @ columns[k].T / 700, expected, atol=2e-6)
        assert_allclose(columns[k].sum(axis=1), 0, atol=2e-3)


def test_effects_are_taken_out_of_what_is_left_and_no_more_than_rows_allow():
    columns, n = normal(8, 200), 200
    y = columns[[0, 5]].sum(axis=0, keepdims=True) + 0.1 * normal(1, n, seed=2)
    search = effect_search.Search(y, np.empty((0, n)), [], [])
    first = search.add(columns[:5], (0,), 1)
    second = search.add(columns[4:7], (1,), 1)  # one column of it is in the first
    assert (len(first), len(second)) == (5, 2)
    assert_allclose(search.basis @ search.basis.T, np.eye(7), atol=1e-12)
    fitted = columns[:7].T @ np.linalg.lstsq(columns[:7].T, y[0], rcond=None)[0]
    assert_allclose(search.residual[0], y[0] - fitted, atol=1e-12)
    assert search.noise[0] == pytest.approx(((y[0] - fitted) ** 2).sum() / (n - 7))
    many = normal(44, n, seed=3)
    many[0] = search.residual = np.sign(many[:1])
    assert len(search.add(many, (2,), 1)) == 0  # 51 columns for 200 rows
    assert len(search.add(many[:43], (2,), 1)) == 43


def test_score_test_is_the_regression_of_one_on_scores():
    columns, left = normal(3, 400), normal(1, 400, seed=2)
    left = left * (1 + abs(columns[:1])) + 0.3 * columns[:1]
    scores = (columns * left).T
    fitted = scores @ np.linalg.lstsq(scores, np.ones(400), rcond=None)[0]
    statistic = fitted.sum()  # n R², uncentred
    level = chi2(3).sf(statistic)
    assert effect_search._significant(columns, left, tests=effect_search.ERROR / (level * 1.001))
    assert not effect_search._significant(columns, left, effect_search.ERROR / (level * 0.999))


def test_leaving_out_an_effect_costs_its_rise_of_squares():
    design, y = normal(8, 300), normal(300, 1, seed=3)
    own = np.arange(8) >= 5
    inverse = np.linalg.inv(design @ design.T / 300)
    slopes = inverse @ (design @ y / 300)
    left = [np.linalg.lstsq(d.T, y, rcond=None)[1][0] for d in (design[~own], design)]
    ratio = effect_search._ratio(slopes, inverse, own, np.array([left[1] / 300**2]))
    bound = chi2(3).isf(effect_search.ERROR)
    assert ratio == pytest.approx((left[0] - left[1]) / (left[1] / 300) / bound, rel=1e-10)


def test_ridge_is_that_of_the_hat_matrix():
    X, y = normal(150, 2), normal(150, 1, seed=4)
    frequencies = normal(2, 8, seed=5)
    fit = relevance._ridge(X, y, frequencies)
    phi = relevance._features(X, frequencies).astype(float)
    phi, centred = phi - phi.mean(axis=0), y - y.mean()
    criteria, slopes = [], []
    for penalty in relevance.PENALTIES:
        inverse = np.linalg.inv(phi.T @ phi / 150 + penalty * np.eye(phi.shape[1]))
        hat = phi @ inverse @ phi.T / 150
        rest = ((centred - hat @ centred) ** 2).mean()
        criteria.append(rest / (1 - (1 + np.trace(hat)) / 150) ** 2)
        slopes.append(inverse @ phi.T @ centred / 150)
    best = int(np.argmin(criteria))
    assert fit.score == pytest.approx(np.log(criteria[best]), abs=1e-5)
    assert_allclose(fit.slopes, slopes[best], atol=1e-4 * abs(slopes[best]).max())


def test_gradients_are_finite_differences():
    X, frequencies, slopes = normal(50, 2), normal(2, 8, seed=5), normal(18, 2, seed=6)
    steps = 1e-3 * np.eye(2)
    differences = [
        (relevance._features(X + h, frequencies) - relevance._features(X - h, frequencies)) / 2e-3
        for h in steps
    ]
    numeric = [((d.astype(float) @ slopes) ** 2).mean(axis=0).sum() for d in differences]
    exact = relevance._mean_square_gradient(X, frequencies, slopes)
    assert_allclose(exact, numeric, rtol=1e-3)
