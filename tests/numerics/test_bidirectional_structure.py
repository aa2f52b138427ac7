"""Algebra of two equations with feedback: exact recovery, invariance, differences, limits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from hakari.inference.bidirectional import structure as st
from hakari.inference.sampling import generator
from tests.bidirectional_designs import EFFECTS, system, two_regimes

draw = generator(1, "points")
POINTS = [
    (a, p / a)
    for a, p in np.column_stack([draw.normal(0, 3, 40), draw.uniform(-0.999, 0.999, 40)]).tolist()
]


def difference(function, point, step=1e-6):
    """Central differences of a vector function, one column a coordinate."""
    moves = step * np.eye(len(point))
    columns = [(function(*(point + m)) - function(*(point - m))) / (2 * step) for m in moves]
    return np.array(columns).T


# --- roots and mirror ------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
def test_roots_are_the_point_and_its_mirror(point):
    a, b = point
    roots = st.effects_of(*map(float, st.to_uv(a, b)))
    assert_allclose((roots.a, roots.b), point, rtol=1e-12)
    assert_allclose(roots.other, (1 / b, 1 / a), rtol=1e-12)
    assert_allclose(st.to_uv(*roots.other), st.to_uv(a, b), rtol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-8, 1e-150])
def test_small_effects_lose_no_digits(size):
    """a = v(1 + p) with p = q + 2q² + 5q³ + ...: the series of small q = uv."""
    u, v = 2 * size, -3 * size
    q = u * v
    p = q + 2 * q**2 + 5 * q**3 + 14 * q**4
    roots = st.effects_of(u, v)
    assert_allclose((roots.a, roots.b), (v * (1 + p), u * (1 + p)), rtol=1e-15)


def test_a_triangular_system_has_its_mirror_at_infinity():
    roots = st.effects_of(0.0, 0.7)
    assert (roots.a, roots.b) == (0.7, 0.0)
    assert roots.other == (np.inf, 1 / 0.7)
    assert [float(x) for x in st.mirror(0.7, 0.0)] == [np.inf, 1 / 0.7]


def test_no_pair_of_effects_is_said_with_its_number():
    roots = st.effects_of(0.6, 0.6)
    assert not roots.exists
    assert np.isnan([roots.a, roots.b, *roots.other]).all()
    assert "4uv = 1.44 is not below 1" in roots.reason


@pytest.mark.parametrize("point", POINTS[:8])
def test_jacobian_is_that_of_differences(point):
    uv = np.array(st.to_uv(*point))

    def effects(u, v):
        roots = st.effects_of(u, v)
        return np.array([roots.a, roots.b])

    own = st.effects_jacobian(*point)
    assert_allclose(own, difference(effects, uv, 1e-6 * (1 - 4 * uv.prod())), rtol=1e-5)
    back = difference(lambda a, b: np.array(st.to_uv(a, b)), np.array(point))
    assert_allclose(own @ back, np.eye(2), atol=1e-5 * np.abs(own).max())


# --- likelihood ------------------------------------------------------------------------------


def nuisances(n):
    f = draw.standard_normal((2, n))
    return f[0], f[1], np.exp(draw.normal(0, 0.7, n)), np.exp(draw.normal(0, 0.7, n))


@pytest.mark.parametrize("point", [EFFECTS, (-0.8, 0.9), (2.0, -0.3), (3.0, 1.7)])
def test_likelihood_is_equal_at_the_mirror(point):
    y = draw.standard_normal((2, 50))
    f1, f2, s1, s2 = nuisances(50)
    own = st.log_likelihood(*y, f1, f2, 2 * np.log(s1), 2 * np.log(s2), *point)
    a, b, f1, f2, s1, s2 = st.flip(*point, f1, f2, s1, s2)
    other = st.log_likelihood(*y, f1, f2, 2 * np.log(s1), 2 * np.log(s2), a, b)
    assert_allclose(other, own, rtol=1e-12, atol=1e-12)


def test_likelihood_is_the_density_of_the_reduced_form():
    """Up to log 2π, the Gaussian with mean A⁻¹f and covariance A⁻¹ diag(s²) A⁻ᵀ."""
    a, b = EFFECTS
    y = draw.standard_normal((2, 9))
    f1, f2, s1, s2 = nuisances(9)
    own = st.log_likelihood(*y, f1, f2, 2 * np.log(s1), 2 * np.log(s2), a, b)
    omega = st.reduced_covariance(a, b, s1, s2)
    gap = (y - st.multipliers(a, b)[0] @ [f1, f2]).T
    form = (gap * np.linalg.solve(omega, gap[..., None])[..., 0]).sum(axis=1)
    assert_allclose(own, -(form + np.linalg.slogdet(omega)[1]) / 2, rtol=1e-12)


def test_flip_twice_is_the_identity():
    start = (0.5, -0.4, *nuisances(5))
    for own, back in zip(start, st.flip(*st.flip(*start)), strict=True):
        assert_allclose(back, own, rtol=1e-14)
    with pytest.raises(ValueError, match=r"effects \(0, 0.4\) have their mirror at infinity"):
        st.flip(0.0, 0.4, 0.0, 0.0, 1.0, 1.0)


def test_likelihood_of_exact_regimes_is_stationary_at_the_truth_alone():
    W1, W2, k = two_regimes()
    h1, h2 = np.log(k @ [1.0, 3.0]), np.log(k @ [2.0, 0.5])

    def slope(a, b):
        def mean(a, b):
            return np.array([st.log_likelihood(W1, W2, 0, 0, h1, h2, a, b).mean()])

        return difference(mean, np.array([a, b]))[0]

    assert_allclose(slope(*EFFECTS), 0, atol=1e-8)
    assert np.abs(slope(0.45, 0.4)).max() > 0.01


# --- information, multipliers, limits --------------------------------------------------------


def test_variance_is_the_inverse_of_the_information():
    rho = system(500).rho
    assert_allclose(
        st.information(rho, *EFFECTS) @ st.efficient_variance(rho, *EFFECTS), np.eye(2), atol=1e-12
    )


def test_information_is_singular_where_the_ratio_is_constant():
    rho = np.full(7, 2.0)
    assert np.linalg.matrix_rank(st.information(rho, *EFFECTS)) == 1
    assert np.isposinf(np.diag(st.efficient_variance(rho, *EFFECTS))).all()


def test_information_is_the_part_of_fishers_that_nuisances_leave():
    """Gaussian shocks, at one x with free f_j and h_j: the efficient score of each row is
    ε1 ε2/(d s1²) for a and ε1 ε2/(d s2²) for b, whose mean products are the information.
    """
    rows = system(400_000, strength=0.8, seed=4)
    a, b = EFFECTS
    d = 1 - a * b
    product = (rows.W1 - a * rows.W2) * (rows.W2 - b * rows.W1)
    psi = product[:, None] * rows.k / d
    error = np.sqrt(np.einsum("ni,nj->nij", psi, psi).var(axis=0) / len(psi))
    gap = psi.T @ psi / len(psi) - st.information(rows.rho, a, b)
    assert (np.abs(gap) < 4 * error).all()


def test_multipliers_are_the_inverse_with_its_delta_method():
    a, b = EFFECTS
    spread = np.array([[0.04, -0.01], [-0.01, 0.02]])
    inverse, covariance = st.multipliers(a, b, spread)
    assert_allclose(inverse @ [[1, -a], [-b, 1]], np.eye(2), atol=1e-15)
    slope = difference(lambda a, b: np.linalg.inv([[1, -a], [-b, 1]]).ravel(), np.array([a, b]))
    assert_allclose(covariance, slope @ spread @ slope.T, rtol=1e-8)
    with pytest.raises(ValueError, match=r"effects \(2, 0.5\) with ab = 1"):
        st.multipliers(2.0, 0.5)


def test_reduced_covariances_are_those_of_the_regimes():
    W1, W2, k = two_regimes()
    s1, s2 = np.sqrt(k @ [1.0, 3.0]), np.sqrt(k @ [2.0, 0.5])
    omega = st.reduced_covariance(*EFFECTS, s1, s2)
    products = np.einsum("in,jn->nij", [W1, W2], [W1, W2])
    assert_allclose(k.T @ omega.reshape(-1, 4), k.T @ products.reshape(-1, 4), rtol=1e-13)


@pytest.mark.parametrize("variances", [(1.0, 1.0), (0.3, 2.0)])
def test_least_squares_of_one_equation_ends_at_its_limit(variances):
    omega = st.reduced_covariance(*EFFECTS, *np.sqrt(variances))
    own = st.single_equation_limits(*EFFECTS, *variances)
    assert_allclose(own, omega[0, 1] / np.array([omega[1, 1], omega[0, 0]]), rtol=1e-13)


def test_least_squares_of_a_large_sample_is_at_its_limit():
    rows = system(400_000, law="chi-square")
    limits = st.single_equation_limits(*EFFECTS, (rows.s1**2).mean(), (rows.s2**2).mean())
    for (y, x), limit in zip(((rows.W1, rows.W2), (rows.W2, rows.W1)), limits, strict=True):
        slope = x @ y / (x @ x)
        error = np.sqrt((x**2 * (y - slope * x) ** 2).sum()) / (x @ x)
        assert abs(slope - limit) < 4 * error


@pytest.mark.parametrize("point", POINTS[:10])
def test_variances_of_the_reduced_form_move_apart_with_the_shocks(point):
    omega = st.reduced_covariance(*point, np.sqrt(np.linspace(0.1, 9, 50)), np.ones(50))
    ratio = omega[:, 0, 0] / omega[:, 1, 1]
    assert (np.diff(ratio) > 0).all()
