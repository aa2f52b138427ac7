"""Feature maps against their formulas, the kernel they stand for, and designs whose truth is known.

The law of the kernel's estimate with independent frequencies is known in closed form; orthogonal
ones are compared with it.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import chi2, kstest

from hakari.inference.bidirectional import relevance
from hakari.inference.bidirectional.feature_kernels import fill_fourier, spectrum
from hakari.inference.bidirectional.features import (
    Polynomial,
    RandomFourier,
    basis_from_dict,
)
from hakari.inference.sampling import generator


def normal(n, p, seed=1):
    return generator(seed, "features").standard_normal((n, p))


# --- cosines and sines -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("largest", [1.0, 1e4, 1e9])
def test_waves_are_numpys(dtype, largest):
    X, frequencies = normal(5001, 3).astype(dtype), normal(3, 40, seed=2)
    frequencies *= largest / abs(X.astype(float) @ frequencies).max()
    out = np.empty((len(X), 1 + 3 + 80), dtype=np.float32)
    centre, scale = np.array([0.1, -2.0, 30.0]), np.array([0.5, 2.0, 1.0])
    columns = np.arange(3)
    rows = (X * scale + centre).astype(dtype)
    fill_fourier(rows, columns, centre, scale, frequencies, out, "abc")
    z = (rows.astype(float) - centre) / scale
    angle = z @ frequencies
    error = 5e-7 + largest * 2e-15
    assert_array_equal(out[:, 0], 1)
    assert_allclose(out[:, 1:4], z, rtol=1e-6, atol=1e-6)
    assert_allclose(out[:, 4:44] * np.sqrt(40), np.cos(angle), rtol=0, atol=error)
    assert_allclose(out[:, 44:] * np.sqrt(40), np.sin(angle), rtol=0, atol=error)


def test_whole_and_quarter_turns_are_exact():
    quarters = np.arange(-9.0, 10.0)[:, None]
    out = np.empty((len(quarters), 4), dtype=np.float32)
    fill_fourier(
        quarters, np.array([0]), np.zeros(1), np.ones(1), np.full((1, 1), np.pi / 2), out, "x"
    )
    assert_allclose(out[:, 2], np.round(np.cos(quarters[:, 0] * np.pi / 2)), atol=1.3e-7)
    assert_allclose(out[:, 3], np.round(np.sin(quarters[:, 0] * np.pi / 2)), atol=1.3e-7)


def test_rows_do_not_depend_on_how_they_are_cut_or_laid_out():
    X = normal(9000, 6)
    for spec in (RandomFourier(64, length_scale=1.0), Polynomial(3)):
        basis = spec.fit(X)
        whole = basis.transform(X)
        cuts = [basis.transform(X[i : i + 700]) for i in range(0, len(X), 700)]
        assert_array_equal(whole, np.concatenate(cuts))
        assert_array_equal(whole, basis.transform(np.asfortranarray(X)))
        room = np.full(whole.shape, np.nan, dtype=np.float32)
        assert basis.transform(X, room) is room
        assert_array_equal(whole, room)
        assert whole.flags.c_contiguous
        assert whole.dtype == np.float32


def test_fourier_part_has_length_one():
    X = normal(500, 4)
    phi = RandomFourier(50, length_scale=0.3).fit(X).transform(X).astype(float)
    assert_allclose((phi[:, 5:] ** 2).sum(axis=1), 1, rtol=5e-7)


# --- the kernel that the features stand for --------------------------------------------------


def estimates(delta, half, orthogonal, seeds=400):
    """The kernel at each delta by the features of so many seeds: (seeds, len(delta))."""
    draws = [spectrum(delta.shape[1], half, seed, orthogonal) for seed in range(seeds)]
    return np.array([np.cos(delta @ w).mean(axis=1) for w in draws])


def gaps():
    directions = normal(4, 5, seed=3)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions * np.array([[0.5], [1.0], [1.5], [2.5]])


def kernel(delta):
    return np.exp(-(delta**2).sum(axis=1) / 2)


@pytest.mark.parametrize("half", [10, 40])
def test_independent_frequencies_have_the_known_variance(half):
    delta = gaps()
    found = estimates(delta, half, orthogonal=False)
    variance = (1 + kernel(2 * delta) - 2 * kernel(delta) ** 2) / (2 * half)
    squares = (found - kernel(delta)) ** 2
    assert (abs(squares.mean(axis=0) - variance) < 4 * squares.std(axis=0) / 20).all()


def test_orthogonal_frequencies_are_unbiased_and_vary_less():
    delta = gaps()
    for half in (5, 20, 40):
        found = estimates(delta, half, orthogonal=True)
        away = found.mean(axis=0) - kernel(delta)
        assert (abs(away) < 4 * found.std(axis=0) / 20).all()
        variance = (1 + kernel(2 * delta) - 2 * kernel(delta) ** 2) / (2 * half)
        squares = (found - kernel(delta)) ** 2
        assert (squares.mean(axis=0) < variance - 4 * squares.std(axis=0) / 20)[:3].all()


def test_frequencies_are_gaussian_one_by_one_and_orthogonal_in_blocks():
    w = spectrum(6, 15, seed=4)
    gram = w.T @ w
    for block in (slice(0, 6), slice(6, 12), slice(12, 15)):
        assert_allclose(gram[block, block], np.diag(np.diag(gram[block, block])), atol=1e-12)
    assert abs(gram[0, 6]) > 1e-3  # other blocks are drawn anew
    many = np.array([spectrum(3, 5, seed)[:, 4] for seed in range(1000)])
    assert kstest((many**2).sum(axis=1), chi2(3).cdf).pvalue > 1e-3
    for k in range(3):
        assert kstest(many[:, k], "norm").pvalue > 1e-3


def test_features_multiply_to_the_kernel_of_each_covariates_length_scale():
    X, scales = normal(60, 3), (0.8, np.inf, 2.0)
    basis = RandomFourier(20_000, length_scale=scales).fit(X)
    phi = basis.transform(X).astype(float)[:, 3:]
    z = ((X - X.mean(axis=0)) / X.std(axis=0)) / scales
    square = ((z[:, None] - z[None]) ** 2).sum(axis=2)
    assert abs(phi @ phi.T - np.exp(-square / 2)).max() < 5 / np.sqrt(20_000)
    assert_array_equal(basis.columns, [0, 2])
    assert_array_equal(basis.frequencies[1], 0)


# --- specifications and bases ----------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [RandomFourier(20, 3, (1.0, np.inf, 0.7)), Polynomial(3), Polynomial(2, False)]
)
def test_a_basis_is_made_again_from_few_numbers(spec):
    X = normal(300, 3) * [1, 1e-3, 7.7]
    basis = spec.fit(X, names=("a", "b", "c"))
    record = json.loads(json.dumps(basis.to_dict(), allow_nan=False))
    again = basis_from_dict(record)
    assert type(again) is type(basis)
    assert_array_equal(again.transform(X), basis.transform(X))
    assert again.to_dict() == record
    assert max(np.size(value) for value in record.values()) == 3  # no frequencies


def test_the_seed_decides():
    X = normal(300, 3)
    one, same, other = (RandomFourier(20, seed, 1.0).fit(X).transform(X) for seed in (1, 1, 2))
    assert_array_equal(one, same)
    assert abs(one - other).max() > 0.1


@pytest.mark.parametrize("length_scale", [1.3, "median", "relevance"])
def test_units_do_not_matter(length_scale):
    X = normal(400, 3)
    y = np.sin(2 * X[:, [0]]) + 0.1 * normal(400, 1, seed=5)
    spec = RandomFourier(60, length_scale=length_scale)
    phi = spec.fit(X, y).transform(X)
    doubled = X * [2.0, 0.25, 1024.0]
    assert_array_equal(spec.fit(doubled, y).transform(doubled), phi)
    moved = X * [3.7, 0.01, 55.0] + [5.0, 0.0, -100.0]
    assert_allclose(spec.fit(moved, 9 * y + 4).transform(moved), phi, atol=2e-6)


def test_median_distance_is_that_of_gaussian_rows():
    distance = relevance.median_distance(normal(5000, 30))
    assert distance == pytest.approx(np.sqrt(2 * chi2(30).median()), rel=0.01)
    rare = np.zeros((5000, 1))
    rare[3] = np.sqrt(5000)
    assert relevance.median_distance(rare) == pytest.approx(np.sqrt(2))


def test_polynomials_are_the_products():
    X = np.clip(normal(200, 3), -1.5, 1.5)  # so that none is cut
    z = (X - X.mean(axis=0)) / X.std(axis=0)
    a, b, c = z.T
    expected = [a**0, a, b, c, a * a, a * b, a * c, b * b, b * c, c * c]
    assert_allclose(
        Polynomial(2).fit(X).transform(X), np.stack(expected, axis=1), rtol=2e-6, atol=1e-7
    )
    powers = np.stack([a**0, a, b, c, a**2, b**2, c**2, a**3, b**3, c**3], axis=1)
    plain = Polynomial(3, interactions=False).fit(X)
    assert_allclose(plain.transform(X), powers, rtol=2e-6, atol=1e-7)
    assert Polynomial(4).fit(X).size == 35
    assert Polynomial(2, interactions=False).fit(normal(50, 100)).size == 201


# --- refusals --------------------------------------------------------------------------------

GOOD = normal(200, 3)
NAN, CONSTANT = GOOD.copy(), GOOD.copy()
NAN[7, 1], CONSTANT[:, 2] = np.nan, 4.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomFourier(41), "count 41: cosines and sines come in pairs"),
        (lambda: RandomFourier(0), "count 0: a whole number of at least 2"),
        (lambda: RandomFourier(20, -1), "seed -1: a whole number"),
        (lambda: RandomFourier(20, 0, "mean"), "length_scale 'mean': give 'relevance'"),
        (lambda: RandomFourier(20, 0, -2.0), "length_scale -2.0: give"),
        (lambda: RandomFourier(20, 0, (np.inf,)), r"length_scale \(inf,\): give"),
        (lambda: RandomFourier(20, 0, (1.0,)).fit(GOOD), "1 length scales for 3 covariates"),
        (lambda: RandomFourier().fit(GOOD), "'relevance' needs targets"),
        (lambda: RandomFourier().fit(GOOD, GOOD[:9]), "targets have 9 rows, covariates 200"),
        (lambda: RandomFourier().fit(GOOD, NAN), "target 1 has values that are not finite"),
        (lambda: RandomFourier().fit(GOOD, CONSTANT), "target 2 is 4 in all rows"),
        (lambda: RandomFourier().fit(GOOD[:50], GOOD[:50]), "50 rows are too few"),
        (lambda: relevance.relevance(CONSTANT, GOOD), "covariate 2 is 4 in all rows"),
        (lambda: Polynomial().fit(NAN), "covariate 1 is nan in row 7: drop"),
        (lambda: Polynomial().fit(CONSTANT, names="abc"), "covariate c is 4 in all rows: leave"),
        (lambda: Polynomial().fit(GOOD, names="ab"), "2 names for 3 covariates"),
        (lambda: Polynomial().fit(GOOD[0]), r"warm-up sample of shape \(3,\)"),
        (lambda: Polynomial(0), "degree 0: a whole number of at least 1"),
        (lambda: Polynomial(3).fit(normal(9, 40)), "12341 monomials .* set interactions=False"),
        (lambda: Polynomial(2).fit(GOOD).transform(GOOD[:, :2]), "the basis has 3 covariates"),
        (lambda: Polynomial(2).fit(GOOD).transform(GOOD, np.empty((200, 9))), r"out \(200, 9\) of"),
        (lambda: basis_from_dict({"kind": "wavelets"}), "kind 'wavelets': known are random-f"),
    ],
)
def test_refusals_name_the_thing(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spec", [RandomFourier(20, 0, 1.0), Polynomial(2)])
def test_rows_that_are_not_finite_are_named(spec, value):
    basis = spec.fit(GOOD, names=("a", "b", "c"))
    X = normal(9000, 3)
    X[8000, 1] = X[8500, 2] = value
    with pytest.raises(ValueError, match=f"covariate b is {value} in row 8000: drop the row"):
        basis.transform(X)


def test_values_of_covariates_that_do_not_matter_are_not_read():
    basis = RandomFourier(20, 0, (1.0, np.inf, 1.0)).fit(GOOD)
    assert_array_equal(basis.transform(NAN), basis.transform(GOOD))


@pytest.mark.parametrize("spec", [RandomFourier(20, 1, 1.0), Polynomial(2)])
def test_read_only_arrays_are_read(spec):
    """As other processes get them: rows, and what a basis is made of."""
    X = np.random.default_rng(0).standard_normal((500, 3))
    basis = spec.fit(X)
    whole = basis.transform(X)
    for array in (X, *(v for v in vars(basis).values() if isinstance(v, np.ndarray))):
        array.flags.writeable = False
    np.testing.assert_array_equal(basis.transform(X), whole)
