"""Losses as functions of any make: NumPy's, Numba's of one θ, Numba's of many θ in parallel."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest

import hakari.inference as hi

RNG = np.random.default_rng(5)
X = np.column_stack([np.ones(70), RNG.standard_normal(70)])
Y = X @ [0.4, -0.2] + RNG.standard_t(3, 70)


def plain(theta, rows):
    y, X = rows
    return np.log(np.cosh(y - X @ theta))


def plain_batched(theta, rows):
    y, X = rows
    return np.log(np.cosh(y - theta @ X.T))


@numba.njit
def one(theta, rows):
    y, X = rows
    out = np.empty(len(y))
    for i in range(len(y)):
        f = 0.0
        for k in range(len(theta)):
            f += X[i, k] * theta[k]
        out[i] = np.log(np.cosh(y[i] - f))
    return out


@numba.njit(parallel=True)
def many(theta, rows):
    y, X = rows
    out = np.empty((len(theta), len(y)))
    for m in numba.prange(len(theta)):
        for i in range(len(y)):
            f = 0.0
            for k in range(X.shape[1]):
                f += X[i, k] * theta[m, k]
            out[m, i] = np.log(np.cosh(y[i] - f))
    return out


@numba.njit
def slopes(theta, rows):
    y, X = rows
    out = np.empty(X.shape)
    for i in range(len(y)):
        f = 0.0
        for k in range(len(theta)):
            f += X[i, k] * theta[k]
        out[i] = -np.tanh(y[i] - f) * X[i]
    return out


LOSSES = {
    "NumPy": plain,
    "NumPy, batched": hi.Loss(plain_batched, batched=True),
    "Numba": one,
    "Numba, in Loss": hi.Loss(one),
    "Numba, batched": hi.Loss(many, batched=True),
    "Numba, with its gradient": hi.Loss(one, gradient=slopes),
}


def posterior(name):
    return hi.GibbsPosterior(LOSSES[name], (Y, X), start=[0.0, 0.0])


@pytest.mark.parametrize("name", LOSSES)
def test_each_gives_the_same_losses_and_minimum(name):
    ours, theirs = posterior(name), posterior("NumPy")
    theta = RNG.standard_normal((5, 2))
    expected = np.stack([plain(t, (Y, X)) for t in theta])
    found = ours.risk.loss.values(theta, (Y, X))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(ours.risk.totals(theta), expected.sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(ours.minimiser, theirs.minimiser, atol=1e-7)
    slope = ours.risk.scores(ours.minimiser).sum(axis=0)
    assert np.abs(slope).max() < 1e-4


def test_each_is_calibrated_alike():
    """By `shift`, which runs data sets in threads, each of which calls the loss."""
    rates = [
        hi.calibrate(posterior(name), method="shift", replicates=200, seed=1).rates["rate"]
        for name in ("NumPy, batched", "Numba, batched")
    ]
    np.testing.assert_allclose(*rates, rtol=1e-4)  # minimisers agree to 1e-6 standard errors


def test_a_compiled_gradient_is_used_by_the_sampler_that_needs_one():
    chosen = hi.sample(posterior("Numba, with its gradient"), draws=300, chains=2, seed=1)
    walk = hi.sample(posterior("Numba"), draws=300, chains=2, seed=1)
    assert (chosen.attrs["method"], walk.attrs["method"]) == ("mala", "mh")
    assert chosen.attrs["loss"] == "custom"
    assert walk.attrs["loss"] == "one"
    a, b = (r["posterior"]["theta"].values.reshape(-1, 2) for r in (chosen, walk))
    assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) < 0.4 * b.std(axis=0)).all()


def test_parallel_functions_take_turns():
    """Numba ends the process if threads enter one at once and its pool is `workqueue`."""
    inside, most = [], []

    def watched(theta, rows):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return theta + rows

    def entered():
        most.clear()
        loss = hi.Loss(watched, batched=True)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: loss.values(np.zeros((3, 1)), np.zeros(4)), range(12)))
        return max(most)

    assert entered() > 1
    watched.targetoptions = many.targetoptions  # what Numba calls its options
    assert entered() == 1


def test_a_curvature_of_the_wrong_shape_is_refused():
    loss = hi.Loss(plain, curvature=lambda theta, rows: np.ones(2), name="flat")
    wrong = hi.GibbsPosterior(loss, (Y, X), start=[0.0, 0.0])
    with pytest.raises(
        ValueError, match=r"curvature of loss 'flat' gave \(2,\): .* \(2, 2\), of t"
    ):
        _ = wrong.sandwich
