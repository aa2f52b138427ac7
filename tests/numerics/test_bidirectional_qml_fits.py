"""Online quasi-maximum likelihood on data: efficiency, folds, streams, what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import chi2

from hakari.inference.bidirectional import online_qml, online_steps
from hakari.inference.bidirectional.evidence import Assumptions
from hakari.inference.bidirectional.features import RandomFourier
from hakari.inference.bidirectional.heads import folds_of
from hakari.inference.bidirectional.nuisance import FOLDS, warmed_up
from hakari.inference.bidirectional.online_steps import OnlineSettings, residuals
from hakari.inference.bidirectional.orthogonal_moments import MomentSums
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.bidirectional.structure import efficient_variance
from tests.bidirectional_designs import EFFECTS, system

FEATURES = RandomFourier(60, seed=1, length_scale=1.5)
SETTINGS = OnlineSettings()


def table(n, law="normal", seed=0, strength=1.0):
    """Rows with nonlinear means and variances in both covariates, and what they were made from."""
    known = system(n, strength=strength, law=law, seed=seed)
    means = np.column_stack([np.sin(2 * known.x[:, 0]), known.x[:, 0] * known.x[:, 1]])
    return Rows(np.column_stack([known.W1, known.W2]) + means, known.x), known


def quiet(name, rows):
    """Nothing is told."""


def fitted(rows, settings=SETTINGS, seed=0):
    nuisance = warmed_up(FEATURES, rows, ("x1", "x2"))
    half = len(rows) // 2
    parts = [Rows(rows.y[part], rows.X[part]) for part in (slice(0, half), slice(half, None))]
    begun = online_qml.at_rest(nuisance, lambda: iter(parts), settings)
    *_, passes = online_qml.fit(begun, lambda: iter(parts), settings, 0, seed, quiet)
    return passes.found


# --- fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["normal", "chi2"])
def test_epochs_reach_the_efficiency_bound(law):
    """Beside the efficient estimator with means and variances known, error by error, and alone."""
    excess, errors, shares = [], [], []
    for seed in range(4):
        rows, known = table(3000, law, seed)
        found = fitted(rows)
        bound = np.sqrt(np.diag(efficient_variance(known.rho, *EFFECTS)) / len(rows))
        oracle = MomentSums.of(known.W1, known.W2, known.k).solve().estimate
        excess.append((np.array(found.estimate) - oracle) / bound)
        errors.append((np.array(found.estimate) - EFFECTS) / bound)
        shares.append(np.sqrt(np.diag(found.covariance)) / bound)
        assert found.stationary
    assert np.mean(np.square(excess)) < 1.3**2 - 1
    assert np.sum(np.square(errors)) < 1.3**2 * chi2.ppf(0.99, 8)
    assert_allclose(np.mean(shares, axis=0), 1, atol=0.25)


def test_heads_come_near_the_true_means_and_variances():
    rows, known = table(6000, strength=2.0)
    found = fitted(rows)
    nuisance = found.nuisance
    phi = nuisance.matrix(rows)
    h = nuisance.variances.predict(phi)
    true = 2 * np.log(np.column_stack([known.s1, known.s2]) / nuisance.unit)
    assert (((h - true) ** 2).mean(axis=0) < 0.1 * true.var(axis=0)).all()
    moved = nuisance.variances.variance - nuisance.variances.error
    assert_allclose(moved, h.var(axis=0), rtol=0.05)
    assert_allclose(nuisance.variances.mean, h.mean(axis=0), atol=0.01)
    means = (rows.y - np.column_stack([known.W1, known.W2]) - nuisance.centre) / nuisance.unit
    assert (((nuisance.means.predict(phi) - means) ** 2).mean(axis=0) < 0.01).all()
    ratio = nuisance.unit[1] / nuisance.unit[0]
    assert_allclose(nuisance.start, np.array(found.estimate) * [ratio, 1 / ratio], rtol=1e-12)


def test_likelihoods_own_derivative_and_beta_lead_to_the_same_effects():
    rows, known = table(4000, "chi2", 5)
    bound = np.sqrt(np.diag(efficient_variance(known.rho, *EFFECTS)) / len(rows))
    efficient = np.array(fitted(rows).estimate)
    for other in (OnlineSettings(orthogonal=False), OnlineSettings(beta=0.5)):
        assert (np.abs(fitted(rows, other).estimate - efficient) < bound).all()


def test_a_seed_gives_the_same_bits_and_units_do_not_matter():
    rows, _ = table(2560)
    quick = OnlineSettings(epochs=4)
    one, again = fitted(rows, quick, seed=1), fitted(rows, quick, seed=1)
    assert one.estimate == again.estimate
    assert one.estimate != fitted(rows, quick, seed=2).estimate
    assert [state.rows for state in one.states] == [2048] * 5
    scaled = fitted(Rows(rows.y * [100.0, 0.1] + [5, -5], rows.X), quick, seed=1)
    assert_allclose(np.array(scaled.estimate) / [1000, 0.001], one.estimate, rtol=1e-3)
    units = np.outer([1000, 0.001], [1000, 0.001])
    assert_allclose(scaled.covariance / units, one.covariance, rtol=1e-2)


def test_the_run_of_a_fold_never_meets_its_rows():
    rows, _ = table(2560)
    nuisance = warmed_up(FEATURES, rows, ("x1", "x2"))
    nuisance, state = online_steps.begin(nuisance, rows, SETTINGS)
    other = rows.y.copy()
    other[folds_of(len(rows), FOLDS) == 2] += 3.0
    ends = []
    for y in (rows.y, other):
        found = online_qml.OnlineFit(nuisance, (state,) * FOLDS, None)
        ends.append(online_qml._epoch(found, Rows(y, rows.X), 0, 0, SETTINGS, 0).states)
    same = [np.array_equal(one.heads, two.heads) for one, two in zip(*ends, strict=True)]
    assert same == [False, False, True, False, False]


# --- streams ------------------------------------------------------------------------------------


def streamed(rows, parts, settings, saved=False):
    nuisance = warmed_up(FEATURES, rows, ("x1", "x2"))
    found = online_qml.start(nuisance, Rows(rows.y[:2048], rows.X[:2048]), settings)
    for part in parts:
        found = online_qml.partial(found, Rows(rows.y[part], rows.X[part]), settings, 3, 0)
        found = pickle.loads(pickle.dumps(found)) if saved else found
    return found


def test_a_stream_that_was_saved_goes_on_as_if_it_had_not_been():
    rows, _ = table(8192)
    settings = OnlineSettings(batch=64)
    whole = streamed(rows, [slice(0, 8192)], settings)
    parts = [slice(i, i + 2048) for i in range(0, 8192, 2048)]
    resumed = streamed(rows, parts, settings, saved=True)
    assert resumed.estimate == whole.estimate
    assert resumed.states[0].rows == len(rows)


def test_evidence_of_a_stream_is_of_rows_that_come_later():
    rows, _ = table(8192)
    settings = OnlineSettings(batch=64)
    before = streamed(rows, [slice(0, 8128)], settings)
    after = streamed(rows, [slice(0, 8128), slice(8128, 8192)], settings)
    state, last = before.states[0], Rows(rows.y[8128:], rows.X[8128:])
    phi, y = before.nuisance.matrix(last), before.nuisance.outcomes(last)
    W, _ = residuals(state.coordinates, state.mean_heads, phi, y)
    added = after.evidence.sums.first - before.evidence.sums.first
    q = after.evidence.sums.instruments
    unit = before.nuisance.unit
    assert_allclose(added[0], (W * unit).prod(axis=1).sum(), rtol=1e-6)
    assert_allclose(added[[q, 2 * q]], ((W * unit) ** 2).sum(axis=0), rtol=1e-6)
    assert after.evidence.rows == before.evidence.rows + 64
    assert after.evidence.draws.shape == (3, len(added))


def test_a_long_stream_covers_the_truth():
    rows, known = table(30_000, "chi2", 2)
    found = streamed(rows, [slice(0, 15_000), slice(15_000, None)], SETTINGS)
    bound = np.sqrt(np.diag(efficient_variance(known.rho, *EFFECTS)) / len(rows))
    assert (np.abs(np.array(found.estimate) - EFFECTS) < 4 * bound).all()
    moments = Assumptions().solve(found.evidence.sums)
    assert (np.abs(np.array(moments.estimate) - EFFECTS) < 4 * np.array(moments.std_error)).all()


def test_without_stationary_steps_there_is_no_standard_error():
    rows, _ = table(2048)
    found = streamed(rows, [slice(0, 2048)], OnlineSettings(batch=512))
    assert not found.stationary
    assert found.evidence is None
    assert np.isnan(found.covariance).all()


# --- errors -------------------------------------------------------------------------------------


def test_going_on_after_epochs_and_no_rows_are_refused():
    rows, _ = table(2560)
    found = fitted(rows, OnlineSettings(epochs=1))
    with pytest.raises(ValueError, match="5 runs of a fit over epochs cannot go on"):
        online_qml.partial(found, rows, SETTINGS, 0, 0)
    with pytest.raises(ValueError, match="the data have no rows"):
        online_qml.at_rest(found.nuisance, lambda: iter([]), SETTINGS)
