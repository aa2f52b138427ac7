"""Single equations with their limits, and cross-fitting with any regressor."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.ensemble import RandomForestRegressor

from hakari.inference.bidirectional import cross_fitting
from hakari.inference.bidirectional.evidence import Assumptions
from hakari.inference.bidirectional.features import RandomFourier
from hakari.inference.bidirectional.heads import folds_of
from hakari.inference.bidirectional.nuisance import FOLDS, warmed_up
from hakari.inference.bidirectional.orthogonal_moments import MomentSums
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.bidirectional.single_equation import single_equation
from hakari.inference.bidirectional.structure import efficient_variance, single_equation_limits
from tests.bidirectional_designs import EFFECTS, system


def sums_of(known):
    return MomentSums.of(known.W1, known.W2, known.k, constant_covariance=True)


# --- single equations -----------------------------------------------------------------------------


@pytest.mark.parametrize("effects", [EFFECTS, (-0.6, 0.9), (2.0, 0.1)])
@pytest.mark.parametrize("law", ["normal", "chi2"])
def test_single_equations_end_where_feedback_takes_them(effects, law):
    known = system(200_000, strength=1.5, law=law, effects=effects)
    found = single_equation(sums_of(known))
    limits = single_equation_limits(*effects, (known.s1**2).mean(), (known.s2**2).mean())
    assert (np.abs(np.array(found.estimate) - limits) < 4 * np.array(found.std_error)).all()
    assert (np.abs(np.array(found.estimate) - effects) > 20 * np.array(found.std_error)).all()


def test_single_equations_are_regressions_with_whites_covariance():
    known = system(500, law="chi2")
    found = single_equation(sums_of(known))
    influence = []
    for j, (y, x) in enumerate([(known.W1, known.W2), (known.W2, known.W1)]):
        slope = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
        assert_allclose(found.estimate[j], slope, rtol=1e-12)
        influence.append(x * (y - slope * x) / (x @ x))
    wanted = np.array(influence) @ np.array(influence).T
    assert_allclose(found.covariance, wanted, rtol=1e-10)
    assert_allclose(found.std_error, np.sqrt(np.diag(wanted)), rtol=1e-10)


def test_single_equations_add_over_shards_and_follow_units():
    known = system(1000)
    whole = single_equation(sums_of(known))
    parts = [
        MomentSums.of(known.W1[p], known.W2[p], known.k[p], constant_covariance=True)
        for p in (slice(0, 300), slice(300, 1000))
    ]
    assert_allclose(single_equation(parts[0] + parts[1]).estimate, whole.estimate, rtol=1e-12)
    scaled = MomentSums.of(1e6 * known.W1, known.W2, known.k, constant_covariance=True)
    assert_allclose(
        np.array(single_equation(scaled).std_error) / [1e6, 1e-6], whole.std_error, rtol=1e-9
    )


def test_single_equations_without_the_constant_or_without_variation_are_refused():
    known = system(100)
    with pytest.raises(ValueError, match="sums without the constant as instrument"):
        single_equation(MomentSums.of(known.W1, known.W2, known.k))
    still = MomentSums.of(known.W1, 0 * known.W2, known.k, constant_covariance=True)
    with pytest.raises(ValueError, match="W2 is 0 in all 100 rows"):
        single_equation(still)


# --- any regressor ------------------------------------------------------------------------------


class Smoother:
    """Cubic regression in each covariate and their product, with scikit-learn's manners."""

    fits = 0

    def __init__(self, random_state=None):
        self.random_state = random_state

    def get_params(self, deep=True):
        return {"random_state": self.random_state}

    def set_params(self, random_state):
        self.random_state = random_state
        return self

    def fit(self, X, y):
        Smoother.fits += 1
        self.rows_ = X
        self.slope_ = np.linalg.lstsq(self.features(X), y, rcond=None)[0]
        return self

    def predict(self, X):
        assert not set(X[:, 0]) & set(self.rows_[:, 0])
        return self.features(X) @ self.slope_

    @staticmethod
    def features(X):
        powers = [X**k for k in range(1, 4)]
        return np.column_stack([np.ones(len(X)), *powers, X[:, 0] * X[:, 1]])


def table(n, law="normal", seed=0, regimes=False, strength=1.0):
    known = system(n, strength, law, seed)
    means = np.column_stack([np.sin(2 * known.x[:, 0]), known.x[:, 0] * known.x[:, 1]])
    labels = np.digitize(known.x[:, 0], [-0.3, 0.3]) if regimes else None
    return Rows(np.column_stack([known.W1, known.W2]) + means, known.x, labels), known


def cross_fitted(rows, regressor, assumptions=None, bootstraps=0, seed=0):
    nuisance = warmed_up(None, rows, ("x1", "x2"))
    told = []
    found = cross_fitting.fit(
        nuisance,
        regressor,
        rows,
        assumptions or Assumptions(),
        bootstraps,
        seed,
        lambda name, n: told.append((name, n)),
    )
    return *found, told


@pytest.mark.parametrize("law", ["normal", "chi2"])
def test_any_regressor_finds_the_effects(law):
    rows, known = table(6000, law)
    evidence, explained, told = cross_fitted(rows, Smoother())
    found = Assumptions().solve(evidence.sums)
    bound = np.sqrt(np.diag(efficient_variance(known.rho, *EFFECTS)) / len(rows))
    assert (np.abs(np.array(found.estimate) - EFFECTS) < 3 * bound).all()
    assert_allclose(found.std_error, bound, rtol=0.3)
    wanted = (np.array([np.sin(2 * known.x[:, 0]), known.x.prod(axis=1)]).var(axis=1)) / (
        rows.y.var(axis=0)
    )
    assert_allclose([explained["mean of y1"], explained["mean of y2"]], wanted, atol=0.05)
    assert set(explained) == {
        *("mean of y1", "mean of y2"),
        *("log variance of shock 1", "log variance of shock 2"),
    }
    assert 0.02 < explained["log variance of shock 1"] < 0.2
    assert told == [(name, 6000) for name in ("means", "reduced-form variances", "variances")]


def test_residuals_are_those_of_folds_left_out():
    rows, _ = table(2000)
    Smoother.fits = 0
    evidence, _, _ = cross_fitted(rows, Smoother())
    assert Smoother.fits == 3 * FOLDS * 2
    fold, W = folds_of(len(rows), FOLDS), np.empty((len(rows), 2))
    features = Smoother.features(rows.X)
    for k in range(FOLDS):
        slope = np.linalg.lstsq(features[fold != k], rows.y[fold != k], rcond=None)[0]
        W[fold == k] = rows.y[fold == k] - features[fold == k] @ slope
    q = evidence.sums.instruments
    wanted = [W.prod(axis=1).sum(), *(W**2).sum(axis=0)]
    assert_allclose(evidence.sums.first[[0, q, 2 * q]], wanted, rtol=1e-9)


def test_variances_are_those_of_the_shocks_at_first_effects():
    rows, known = table(6000, strength=2.0)
    _, explained, _ = cross_fitted(rows, Smoother())
    own, reduced = (log_variance_shares(known, effects) for effects in (EFFECTS, (0.0, 0.0)))
    found = [explained[f"log variance of shock {j}"] for j in (1, 2)]
    assert own[0] - reduced[0] > 0.05
    assert_allclose(found, own, atol=0.02)


def log_variance_shares(known, effects):
    """Share of log squares that regressions of left-out folds explain, with known means."""
    W, fold = np.column_stack([known.W1, known.W2]), folds_of(len(known.W1), FOLDS)
    logs = np.log((W - W[:, ::-1] * effects) ** 2 + 1e-4)
    gaps, features = np.empty_like(logs), Smoother.features(known.x)
    for k in range(FOLDS):
        slope = np.linalg.lstsq(features[fold != k], logs[fold != k], rcond=None)[0]
        gaps[fold == k] = logs[fold == k] - features[fold == k] @ slope
    return 1 - (gaps**2).mean(axis=0) / logs.var(axis=0)


def test_a_forest_is_seeded_and_bootstraps_are_drawn():
    rows, _ = table(1500)
    forest = RandomForestRegressor(8, min_samples_leaf=30)
    ends = [cross_fitted(rows, forest, bootstraps=2, seed=seed)[0] for seed in (1, 1, 2)]
    assert (ends[0].sums.first == ends[1].sums.first).all()
    assert (ends[0].draws == ends[1].draws).all()
    assert ends[0].draws.shape[0] == 2
    assert (ends[0].sums.first != ends[2].sums.first).any()
    assert forest.random_state is None


def test_regimes_need_no_variances():
    rows, _ = table(8000, regimes=True)
    assumptions = Assumptions(regimes=True)
    evidence, explained, told = cross_fitted(rows, Smoother(), assumptions)
    found = assumptions.solve(evidence.sums)
    assert (np.abs(np.array(found.estimate) - EFFECTS) < 4 * np.array(found.std_error)).all()
    assert set(explained) == {"mean of y1", "mean of y2"}
    assert [name for name, _ in told] == ["means"]


class Constant(Smoother):
    def __init__(self, value=np.nan):
        self.value = value

    def get_params(self, deep=True):
        return {"value": self.value}

    def set_params(self, value):
        self.value = value
        return self

    def predict(self, X):
        return np.full((len(X), 1 if np.isnan(self.value) else 2), self.value)


def test_what_is_no_regressor_is_refused(monkeypatch):
    rows, _ = table(1500)
    with pytest.raises(ValueError, match="regressor 'forest' is no estimator with fit"):
        cross_fitted(rows, "forest")
    with pytest.raises(ValueError, match="is no estimator with fit"):
        cross_fitted(rows, Smoother)
    with pytest.raises(ValueError, match="predicts nan: use one that does not"):
        cross_fitted(rows, Constant())
    with pytest.raises(ValueError, match=r"predicts \(\d+, 2\) for \d+ rows"):
        cross_fitted(rows, Constant(0.0))
    nuisance = warmed_up(RandomFourier(20, length_scale=1.0), rows, ("x1", "x2"))
    few = Rows(rows.y[:900], rows.X[:900])
    arguments = (Assumptions(), 0, 0, print)
    with pytest.raises(ValueError, match="900 rows: at least 1,000 are needed"):
        cross_fitting.fit(nuisance, Smoother(), few, *arguments)
    with pytest.raises(ValueError, match="no covariates for the regressor"):
        cross_fitting.fit(nuisance, Smoother(), Rows(rows.y, rows.X[:, :0]), *arguments)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        cross_fitting.fit(nuisance, Smoother(), rows, *arguments)
