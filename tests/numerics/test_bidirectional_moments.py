"""Sums of orthogonal moments: formulas of rows, exact regimes, Lewbel's ratio, large samples."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from hakari.inference.bidirectional.orthogonal_moments import MomentSums, anderson_rubin, solve
from hakari.inference.bidirectional.structure import efficient_variance, to_uv
from hakari.inference.sampling import generator
from tests.bidirectional_designs import (
    EFFECTS,
    direct_anderson_rubin,
    reduced,
    scores,
    shocks,
    sums_of,
    system,
    two_regimes,
)


def many(rows):
    """Four instruments: the efficient two, and each times a covariate."""
    return np.column_stack([rows.k, rows.k * rows.x])


def assert_same(one, other, rtol=1e-12):
    for own, wanted in zip(vars(one).items(), vars(other).items(), strict=True):
        if own[0] != "standard":
            assert_allclose(own[1], wanted[1], rtol=rtol, atol=rtol * np.abs(wanted[1]).max())


# --- exact cases -----------------------------------------------------------------------------


def test_two_regimes_are_recovered_exactly():
    found = MomentSums.of(*two_regimes()).solve()
    assert_allclose(found.estimate, EFFECTS, rtol=1e-13)
    assert_allclose(found.roots.other, (2.5, 2.0), rtol=1e-13)
    assert_allclose(found.uv, to_uv(*EFFECTS), rtol=1e-13)
    assert found.df == 0
    assert np.isnan([found.j, found.p_value]).all()


def test_a_triangular_system_is_lewbels_ratio_of_covariances():
    rows = system(400, effects=(0.5, 0.0), covariance=0.4)
    z = rows.x[:, 0]
    found = sums_of(rows, z[:, None], constant_covariance=True).centred().solve("b=0")
    top, bottom = np.cov(z, rows.W1 * rows.W2)[0, 1], np.cov(z, rows.W2**2)[0, 1]
    assert_allclose(found.estimate, (top / bottom, 0.0), rtol=1e-12)
    assert found.roots.other == (np.inf, 1 / found.estimate[0])
    turned = MomentSums.of(rows.W2, rows.W1, z[:, None], constant_covariance=True).centred()
    assert_allclose(turned.solve("a=0").estimate, (0.0, top / bottom), rtol=1e-12)


def test_a_restriction_is_the_general_solution_where_that_has_it():
    """Regimes whose moments hold at b = 0: the free solution is the restricted one."""
    signs = np.array([[1, 1, -1, -1], [1, -1, 1, -1]])
    s1, s2 = np.repeat([1.0, 3.0], 4), np.repeat([2.0, 0.5], 4)
    rows = reduced(np.tile(signs, 2) * [s1, s2], s1, s2, None, (0.7, 0.0))
    for restrict in (None, "b=0"):
        assert_allclose(sums_of(rows).solve(restrict).estimate, (0.7, 0.0), atol=1e-14)


# --- against rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("instruments", ["efficient", "four"])
def test_sums_know_the_scores_at_any_effects(instruments):
    rows = system(200)
    k = rows.k if instruments == "efficient" else many(rows)
    own = sums_of(rows, k)
    for u, v in ((0.0, 0.0), (0.3, -1.0), (2.0, 0.1)):
        g = scores(rows.W1, rows.W2, k, u, v)
        assert_allclose(own.score_covariance(u, v), g.T @ g / 200, rtol=1e-10)
    for a, b in (EFFECTS, (-1.0, 0.2), (3.0, 4.0)):
        wanted = direct_anderson_rubin(rows.W1, rows.W2, k, a, b)
        assert_allclose(anderson_rubin(own, a, b), wanted, rtol=1e-9)
        assert_allclose(anderson_rubin(own, 1 / b, 1 / a), wanted, rtol=1e-9)


def test_the_statistic_goes_through_minus_one_without_a_jump():
    own = sums_of(system(200))
    values = anderson_rubin(own, 2.0, -0.5 + np.array([-1e-9, 0, 1e-9]))
    assert_allclose(values, values[1], rtol=1e-6)


def direct_gmm(W1, W2, k):
    """Two steps of GMM in (u, v) with weights from the rows: (u, v), covariance, J."""
    n = len(W1)
    X, y = np.column_stack([W1**2, W2**2]), W1 * W2
    uv = np.zeros(2)
    for _ in range(2):
        g = k * (y - X @ uv)[:, None]
        weight = np.linalg.inv(g.T @ g / n)
        G = k.T @ X / n
        uv = np.linalg.solve(G.T @ weight @ G, G.T @ weight @ k.T @ y / n)
    g = k * (y - X @ uv)[:, None]
    bread = np.linalg.inv(G.T @ np.linalg.inv(g.T @ g / n) @ G) / n
    return uv, bread, n * g.mean(axis=0) @ weight @ g.mean(axis=0)


def test_two_steps_are_those_of_the_rows():
    rows = system(300)
    own = sums_of(rows, many(rows)).solve()
    uv, covariance, j = direct_gmm(rows.W1, rows.W2, many(rows))
    assert_allclose(own.uv, uv, rtol=1e-9)
    assert_allclose(own.uv_covariance, covariance, rtol=1e-8)
    assert_allclose(own.j, j, rtol=1e-8)
    assert own.df == 2


def test_just_identified_sandwich_is_in_closed_form():
    """√n error of ψ = ε1 ε2 k: G⁻¹ E[ψψ'] G⁻ᵀ with G the derivative of ψ's mean by (a, b)."""
    rows = system(500)
    own = sums_of(rows).solve()
    a, b = own.estimate
    e1, e2 = rows.W1 - a * rows.W2, rows.W2 - b * rows.W1
    psi = rows.k * (e1 * e2)[:, None]
    G = np.column_stack([rows.k.T @ (rows.W2 * e2), rows.k.T @ (rows.W1 * e1)])
    inverse = np.linalg.inv(G)
    assert_allclose(own.covariance, inverse @ (psi.T @ psi) @ inverse.T, rtol=1e-9)
    assert_allclose(own.std_error, np.sqrt(np.diag(own.covariance)), rtol=1e-15)


def test_centred_sums_are_those_of_centred_rows():
    rows = system(150, covariance=0.5)
    own = sums_of(rows, many(rows), constant_covariance=True).centred()
    k = many(rows) - many(rows).mean(axis=0)
    products = [rows.W1 * rows.W2, rows.W1**2, rows.W2**2]
    z = np.concatenate([k * (p - p.mean())[:, None] for p in products], axis=1)
    assert_allclose(own.first, z.sum(axis=0), rtol=1e-9, atol=1e-8)
    assert_allclose(own.second, z.T @ z, rtol=1e-9, atol=1e-8)


# --- additivity and units --------------------------------------------------------------------


@pytest.mark.parametrize("constant", [False, True])
def test_shards_add_to_the_whole(constant):
    rows = system(90)
    weights = generator(3, "weights").random(90)

    def part(rows_of):
        return MomentSums.of(
            rows.W1[rows_of], rows.W2[rows_of], rows.k[rows_of], weights[rows_of], constant
        )

    pieces = [part(slice(0, 20)), part(slice(20, 21)), part(slice(21, 90))]
    assert_same(pieces[0] + pieces[1] + pieces[2], part(slice(None)))
    assert_same(pieces[2] + (pieces[0] + pieces[1]), part(slice(None)))


def test_forgetting_is_a_weight_of_the_past():
    rows = system(60)
    halves = [MomentSums.of(rows.W1[i], rows.W2[i], rows.k[i]) for i in (slice(40), slice(40, 60))]
    weights = np.repeat([0.9, 1.0], [40, 20])
    assert_same(halves[0].scaled(0.9) + halves[1], sums_of(rows, row_weights=weights))


def test_weighted_statistics_are_those_of_weighted_instruments():
    rows = system(80)
    weights = generator(4, "weights").random(80)
    weighted = sums_of(rows, row_weights=weights)
    by_hand = sums_of(rows, rows.k * weights[:, None])
    assert_allclose(weighted.solve().covariance, by_hand.solve().covariance, rtol=1e-10)
    assert_allclose(anderson_rubin(weighted, 1, 0), anderson_rubin(by_hand, 1, 0), rtol=1e-10)


@pytest.mark.parametrize("c", [1e-6, 3.0, 1e6])
def test_units_of_a_variable_change_the_effects_and_nothing_else(c):
    rows = system(300)
    own = sums_of(rows, many(rows)).solve()
    other = MomentSums.of(c * rows.W1, rows.W2, many(rows) * [1e4, 1e-3, 1.0, 7.0])
    found = other.solve()
    units = np.array([c, 1 / c])
    assert_allclose(found.estimate, own.estimate * units, rtol=1e-9)
    assert_allclose(found.covariance, own.covariance * np.outer(units, units), rtol=1e-8)
    assert_allclose(found.j, own.j, rtol=1e-8)
    assert_allclose(
        anderson_rubin(other, 0.9 * c, 0.1 / c),
        direct_anderson_rubin(rows.W1, rows.W2, many(rows), 0.9, 0.1),
        rtol=1e-8,
    )


def test_only_the_span_of_instruments_matters():
    rows = system(300)
    turn = generator(5, "turn").standard_normal((4, 4))
    own, turned = (sums_of(rows, many(rows) @ m).solve() for m in (np.eye(4), turn))
    assert_allclose(turned.estimate, own.estimate, rtol=1e-8)
    assert_allclose(turned.covariance, own.covariance, rtol=1e-7)
    repeated = sums_of(rows, np.column_stack([many(rows), many(rows)[:, 0] * 2])).solve()
    assert_allclose(repeated.estimate, own.estimate, rtol=1e-7)
    assert repeated.df == own.df


# --- large samples ---------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["normal", "chi-square"])
def test_errors_have_the_efficient_variance_whatever_the_law(law):
    """n error' AVar⁻¹ error has mean 2 and variance 4, AVar that of the design; 600 samples."""
    n, repeats = 4000, 600
    rows = system(n, law=law)
    draw = generator(6, law)
    root = np.linalg.inv(efficient_variance(rows.rho, *EFFECTS))
    errors, estimated = np.empty((repeats, 2)), np.empty((repeats, 2, 2))
    for r in range(repeats):
        eps = np.stack([rows.s1, rows.s2]) * shocks(law, n, draw)
        found = sums_of(reduced(eps, rows.s1, rows.s2, rows.x)).solve()
        errors[r], estimated[r] = np.subtract(found.estimate, EFFECTS), found.covariance
    lengths = n * np.einsum("ri,ij,rj->r", errors, root, errors)
    assert abs(lengths.mean() - 2) < 4 * lengths.std() / np.sqrt(repeats)
    assert lengths.std() < 2 * 1.25
    own = np.einsum("ri,rij,rj->r", errors, np.linalg.inv(estimated), errors)
    assert abs(own.mean() - 2) < 4 * own.std() / np.sqrt(repeats)
    centre = errors.mean(axis=0) / (errors.std(axis=0) / np.sqrt(repeats))
    assert (np.abs(centre) < 4).all()


def test_j_is_chi_square_where_instruments_agree_and_large_where_not():
    draw = generator(7, "agree")
    rows = system(2000, seed=7)
    found = []
    for _ in range(300):
        eps = np.stack([rows.s1, rows.s2]) * draw.standard_normal((2, 2000))
        again = reduced(eps, rows.s1, rows.s2, rows.x)
        found.append(sums_of(again, many(again)).solve())
    j = np.array([f.j for f in found])
    assert abs(j.mean() - 2) < 4 * 2 / np.sqrt(300)
    p = np.array([f.p_value for f in found])
    assert abs((p < 0.1).mean() - 0.1) < 3 * np.sqrt(0.09 / 300)
    shared = 0.8 * draw.standard_normal(2000) * np.stack([np.ones(2000), np.sign(rows.x[:, 1])])
    wrong = reduced(eps + shared, rows.s1, rows.s2, rows.x)  # a covariance that changes sign in x
    assert sums_of(wrong, many(wrong)).solve().p_value < 1e-3


def test_a_common_shock_is_allowed_for_by_centring_alone():
    rows = system(100_000, covariance=0.5, seed=8)
    own = sums_of(rows, constant_covariance=True).centred().solve()
    assert (np.abs(np.subtract(own.estimate, EFFECTS)) < 4 * np.array(own.std_error)).all()
    plain = sums_of(rows).solve()
    assert (np.abs(np.subtract(plain.estimate, EFFECTS)) > 4 * np.array(plain.std_error)).all()


# --- what cannot be computed -----------------------------------------------------------------


def test_a_constant_ratio_has_no_solution_and_says_why():
    rows = system(100, strength=0.0)
    found = sums_of(rows).solve()
    assert not found.roots.exists
    assert "the variances' ratio is constant" in found.roots.reason
    assert np.isnan([*found.estimate, *found.std_error]).all()


def bad_rows(name, value):
    arrays = {"W1": np.ones(3), "W2": np.arange(3.0), "k": np.ones((3, 2))}
    arrays[name] = value
    return arrays


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("W2", np.ones(2), r"W2 has shape \(2,\): .* W1's 3 rows"),
        ("k", np.ones(3), r"k has shape \(3,\)"),
        ("row_weights", np.ones((3, 1)), r"row_weights has shape \(3, 1\)"),
        ("W1", np.array([1.0, np.nan, 2.0]), "W1 is not finite in row 1"),
        ("k", np.full((3, 2), np.inf), "k is not finite in row 0"),
    ],
)
def test_rows_that_are_wrong_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        MomentSums.of(**bad_rows(name, value))


def test_sums_that_do_not_serve_are_named():
    rows = system(50)
    own = sums_of(rows)
    with pytest.raises(ValueError, match="2 instruments in 3 blocks and of 4 in 3 do not add"):
        own + sums_of(rows, many(rows))
    with pytest.raises(ValueError, match="without the instruments' own mean cannot be centred"):
        own.centred()
    with pytest.raises(ValueError, match=r"are used through .centred\(\)"):
        sums_of(rows, constant_covariance=True).solve()
    with pytest.raises(ValueError, match="1 instrument for 2 effects: give at least 2"):
        solve(sums_of(rows, rows.k[:, :1]))
    with pytest.raises(ValueError, match="every row has 0 for W1 W2 times instrument 1"):
        sums_of(rows, rows.k * [1.0, 0.0]).solve()
    with pytest.raises(ValueError, match="W1 and W2 are proportional to"):
        MomentSums.of(rows.W1, rows.W1 + 1e-7 * rows.W2, rows.k).solve()
