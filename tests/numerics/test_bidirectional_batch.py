"""Both effects from data at rest: the law of the estimates, equivariance, workers and shards."""

from __future__ import annotations

from dataclasses import replace

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2

from hakari.inference import tables
from hakari.inference.bidirectional import batch
from hakari.inference.bidirectional.evidence import Assumptions
from hakari.inference.bidirectional.features import Polynomial, RandomFourier
from hakari.inference.bidirectional.model import BidirectionalEffects
from hakari.inference.bidirectional.nuisance import FOLDS, left_out
from hakari.inference.bidirectional.rows import Columns, read
from tests.bidirectional_designs import EFFECTS, table

FEATURES = RandomFourier(40, seed=1, length_scale=1.0)


def model(**settings):
    settings = {"features": FEATURES} | settings
    return BidirectionalEffects("p", "q", ["u", "v"], **settings)


@pytest.mark.parametrize("law", ["normal", "chi-square"])
def test_errors_have_the_law_that_the_standard_errors_say(law):
    """Squared errors in the metric of their covariance are chi-square: mean and far quantile."""
    distances = []
    for seed in range(24):
        found = model().fit(table(4000, seed, law)).effects()
        gap = np.array(found.estimate) - EFFECTS
        distances.append(gap @ np.linalg.solve(found.covariance, gap))
    assert chi2.ppf(1e-3, 48) < np.sum(distances) < chi2.ppf(1 - 1e-3, 48)
    assert np.mean(np.array(distances) < chi2.ppf(0.95, 2)) > 0.75


def test_an_error_in_the_means_enters_as_a_product():
    """The moments are orthogonal: a mean that is wrong for one outcome alone costs a square."""
    rows = next(read(table(65_536, 3), Columns("p", "q", ("u", "v"))))
    nuisance = model().fit(table(20_000, 4)).nuisance
    phi = nuisance.matrix(rows)
    h = nuisance.variances.predict(phi)
    W = nuisance.outcomes(rows) - nuisance.means.predict(phi)
    solve = Assumptions().solve
    exact = np.array(solve(batch.evidence_of(nuisance, rows, W, h).sums).estimate)
    moved = []
    for size in (0.1, 0.2):
        wrong = W + size * np.column_stack([np.sin(5 * rows.X[:, 0]), 0 * h[:, 0]]) @ [
            [1, 0],
            [0, 1],
        ]
        found = solve(batch.evidence_of(nuisance, rows, wrong, h).sums).estimate
        moved.append(np.array(found) - exact)
    ratio = np.linalg.norm(moved[1]) / np.linalg.norm(moved[0])
    assert np.linalg.norm(moved[0]) < 0.01
    assert 2.5 < ratio < 5.5  # 4 for a square, 2 for what is not orthogonal


def test_units_and_names_of_the_outcomes_do_not_matter():
    data = table(6000, 5)
    plain = model().fit(data).effects()
    scaled = model().fit(table(6000, 5, scale=(1e4, 1e-2))).effects()
    assert scaled.estimate[0] == pytest.approx(1e6 * plain.estimate[0], rel=1e-6)
    assert scaled.estimate[1] == pytest.approx(1e-6 * plain.estimate[1], rel=1e-6)
    swapped = BidirectionalEffects("q", "p", ["u", "v"], FEATURES).fit(data).effects()
    assert swapped.estimate == pytest.approx(plain.estimate[::-1], rel=1e-3)
    assert swapped.std_error == pytest.approx(plain.std_error[::-1], rel=1e-3)


def test_workers_change_no_bit(monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 2000)
    data, found = table(9000, 6), []
    for jobs in (1, 2):
        with joblib.parallel_config(n_jobs=jobs):
            found.append(model(bootstraps=3).fit(data).effects())
    assert found[0].estimate == found[1].estimate
    for name in ("first", "second"):
        one, two = (getattr(f.evidence.sums, name) for f in found)
        assert one.tobytes() == two.tobytes()
    assert found[0].evidence.draws.tobytes() == found[1].evidence.draws.tobytes()


def test_a_folder_of_files_is_the_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 2048)
    frame = pd.DataFrame(table(8192, 7))
    for k in range(4):
        frame[2048 * k : 2048 * (k + 1)].to_parquet(tmp_path / f"part-{k}.parquet")
    assert model().fit(tmp_path).effects().estimate == model().fit(frame).effects().estimate


def test_sums_of_shards_with_the_same_heads_are_those_of_one_pass():
    size = 1024 * FOLDS
    data = table(3 * size, 8)
    nuisance = model().fit(data).nuisance
    whole = next(read(data, Columns("p", "q", ("u", "v"))))
    parts = [
        batch._evidence(nuisance, 0, 0, whole.cut(i, i + size), 0) for i in range(0, 3 * size, size)
    ]
    once = batch._evidence(nuisance, 0, 0, whole, 0)
    total = parts[0] + parts[1] + parts[2]
    np.testing.assert_allclose(total.sums.first, once.sums.first, rtol=1e-9)
    np.testing.assert_allclose(total.sums.second, once.sums.second, rtol=1e-9)
    np.testing.assert_allclose(total.ratio.gram, once.ratio.gram, rtol=1e-9)


def test_no_row_is_met_by_heads_that_saw_it():
    """Heads with too many features: residuals of rows left out are larger than of their own."""
    data = table(3000, 9)
    nuisance = model(features=RandomFourier(400, seed=1, length_scale=0.2)).fit(data).nuisance
    rows = next(read(data, Columns("p", "q", ("u", "v"))))
    W, _, _ = left_out(nuisance, rows)
    loose = replace(
        nuisance.means, coefficients=nuisance.means.coefficients[-1:].repeat(FOLDS + 1, 0)
    )
    own = left_out(replace(nuisance, means=loose), rows)[0]
    assert (own.var(axis=0) < 0.97 * W.var(axis=0)).all()
    np.testing.assert_allclose((W**2).mean(axis=0), nuisance.means.error, rtol=1e-3)


def test_the_bootstrap_has_the_spread_of_the_sandwich():
    found = model(bootstraps=400).fit(table(5000, 10)).effects()
    np.testing.assert_allclose(found.draws.std(axis=0), found.std_error, rtol=0.15)
    np.testing.assert_allclose(found.draws.mean(axis=0), found.estimate, atol=0.01)
    assert found.to_datatree()["posterior"]["effect"].shape == (1, 400, 2)


def test_polynomials_do_as_features():
    found = model(features=Polynomial(4)).fit(table(6000, 11)).effects()
    assert np.abs(np.array(found.estimate) - EFFECTS).max() < 5 * max(found.std_error)
