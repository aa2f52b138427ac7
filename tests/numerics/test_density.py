"""The density by several routes: rows, tensor, definition; and its gradient by differences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import hakari.inference as hi
from tests.designs import direct_log_density, iv_design

SHAPES = [(120, 1, 1), (120, 3, 3), (150, 4, 7), (80, 20, 22)]


def moments(n, K, L, **options):
    y, X, Z = iv_design(n, K, L)
    return hi.LinearMoments.from_arrays(y, X, Z, **options), (y, X, Z)


def points(K, seed=0):
    return 1 + 0.2 * np.random.default_rng(seed).standard_normal((6, K))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("determinant", [False, True])
def test_log_density_is_its_definition(shape, centred, determinant):
    stats, data = moments(*shape, centred=centred)
    posterior = hi.QuasiPosterior(stats, determinant=determinant)
    theta = points(shape[1])
    direct = [direct_log_density(t, *data, determinant, centred) for t in theta]
    np.testing.assert_allclose(posterior.log_density(theta), direct, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_tensor_agree(shape):
    stats, _ = moments(*shape)
    y, X, Z = iv_design(*shape)
    tensor = dataclasses.replace(stats, rows=None)
    rows = dataclasses.replace(
        stats, rows=(Z @ stats.scale.left.T, np.column_stack([y, X]) @ stats.scale.right)
    )
    theta = points(shape[1])
    by_tensor = hi.QuasiPosterior(tensor)
    assert len(by_tensor.whitened.target.rows_z) == 0
    if rows.prefers_rows:
        assert len(hi.QuasiPosterior(rows).whitened.target.rows_z) == shape[0]
    np.testing.assert_allclose(
        by_tensor.log_density(theta),
        hi.QuasiPosterior(rows).log_density(theta),
        rtol=1e-10,
        atol=1e-10,
    )


def test_one_of_the_shapes_prefers_rows():
    assert moments(80, 20, 22)[0].prefers_rows
    assert not moments(120, 3, 3)[0].prefers_rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighting", ["continuous", "two-step"])
def test_gradient_by_differences(shape, weighting):
    stats, _ = moments(*shape)
    first = stats.names.parameters[0]
    rest = stats.names.parameters[1:]
    prior = [hi.StudentT(4, 0.5, 0.3, names=[first])] + [
        hi.Normal(0.5, np.eye(len(rest)), names=rest)
    ] * bool(rest)
    posterior = hi.QuasiPosterior(stats, prior, weighting=weighting)
    theta = points(shape[1])[0]
    value, gradient = posterior.log_density_and_gradient(theta)
    assert value == pytest.approx(float(posterior.log_density(theta)), abs=1e-9)
    step = 1e-6
    numeric = [
        float(posterior.log_density(theta + step * e) - posterior.log_density(theta - step * e))
        / (2 * step)
        for e in np.eye(shape[1])
    ]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())


def test_shape_of_the_batch_is_kept():
    posterior = hi.QuasiPosterior(moments(120, 3, 3)[0])
    theta = np.random.default_rng(0).standard_normal((2, 5, 3))
    assert posterior.log_density(theta).shape == (2, 5)
    assert posterior.log_density(theta[0, 0]).shape == ()


def test_singular_covariance_has_density_zero():
    """With y = X·1 exactly, Ω(θ) vanishes at θ = 1 and nowhere near 0."""
    rng = np.random.default_rng(1)
    X = rng.standard_normal((50, 2))
    stats = hi.LinearMoments.from_arrays(X @ np.ones(2) + 1e-3 * rng.standard_normal(50), X)
    target = hi.QuasiPosterior(stats).whitened.target
    broken = target._replace(tensor=np.zeros_like(target.tensor))
    from hakari.inference.density import evaluate, log_density_batch

    assert evaluate(broken, np.zeros(2)).log_density == -np.inf
    assert (log_density_batch(broken, np.zeros((5, 2))) == -np.inf).all()
    nan = target._replace(tensor=np.full_like(target.tensor, np.nan))
    assert (log_density_batch(nan, np.zeros((5, 2))) == -np.inf).all()
    assert evaluate(nan, np.zeros(2)).log_density == -np.inf


def test_whitened_coordinates_are_white():
    posterior = hi.QuasiPosterior(moments(150, 4, 7)[0], hi.Normal(0, 4.0), determinant=False)
    white = posterior.whitened
    target = white.target
    identity = target.tensor @ np.concatenate([[1.0], np.zeros(target.tensor.shape[1] - 1)])
    rows, columns = np.tril_indices(7)
    np.testing.assert_allclose(identity, rows == columns, atol=1e-10)
    precision = target.n * target.slope.T @ target.slope + target.prior_slope.T @ target.prior_slope
    np.testing.assert_allclose(precision, np.eye(4), atol=1e-10)
    assert np.abs(np.triu(target.slope, 1)).max() == 0
