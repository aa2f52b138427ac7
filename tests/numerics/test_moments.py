"""Sufficient statistics: every covariance against linearmodels', merging, files, streams."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linearmodels.datasets import card
from linearmodels.iv.gmm import (
    HeteroskedasticWeightMatrix,
    HomoskedasticWeightMatrix,
    KernelWeightMatrix,
    OneWayClusteredWeightMatrix,
)

import hakari.inference as hi
from tests.designs import iv_design

FORMULA = "lwage ~ 1 + exper + expersq + black + south + smsa + [educ ~ nearc4 + nearc2]"


@pytest.fixture(scope="module")
def data():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = card.load()
    columns = ["lwage", "exper", "expersq", "black", "south", "smsa", "educ", "nearc4", "nearc2"]
    return frame[columns].astype(float)


@pytest.fixture(scope="module")
def design(data):
    exog = np.column_stack(
        [np.ones(len(data)), data[["exper", "expersq", "black", "south", "smsa"]]]
    )
    X = np.column_stack([exog, data.educ])
    Z = np.column_stack([exog, data.nearc4, data.nearc2])
    theta = np.random.default_rng(0).standard_normal(7) * 0.1
    return X, Z, theta, (data.lwage.to_numpy() - X @ theta)[:, None]


CASES = {
    "robust": lambda data, centred: HeteroskedasticWeightMatrix(center=centred),
    "hac:3": lambda data, centred: KernelWeightMatrix("bartlett", 3, center=centred),
    "hac:5:parzen": lambda data, centred: KernelWeightMatrix("parzen", 5, center=centred),
    "hac:2:qs": lambda data, centred: KernelWeightMatrix("qs", 2, center=centred),
    "cluster:exper": lambda data, centred: OneWayClusteredWeightMatrix(
        data.exper.to_numpy(), center=centred
    ),
}


@pytest.mark.parametrize("covariance", CASES)
@pytest.mark.parametrize("centred", [False, True])
def test_covariance_is_linearmodels(data, design, covariance, centred):
    X, Z, theta, residual = design
    theirs = CASES[covariance](data, centred).weight_matrix(X, Z, residual)
    ours = hi.LinearMoments.from_formula(FORMULA, data, covariance, centred=centred)
    np.testing.assert_allclose(ours.covariance_at(theta), theirs, rtol=1e-11)


def test_iid_covariance(data, design):
    """linearmodels centres the residuals always; uncentred is σ² Z'Z/n by definition."""
    X, Z, theta, residual = design
    centred = hi.LinearMoments.from_formula(FORMULA, data, "iid", centred=True)
    theirs = HomoskedasticWeightMatrix(center=True).weight_matrix(X, Z, residual)
    np.testing.assert_allclose(centred.covariance_at(theta), theirs, rtol=1e-11)
    plain = hi.LinearMoments.from_formula(FORMULA, data, "iid").covariance_at(theta)
    np.testing.assert_allclose(plain, (residual**2).mean() * Z.T @ Z / len(Z), rtol=1e-11)


@pytest.mark.parametrize("kernel", ["bartlett", "parzen", "quadratic-spectral"])
def test_automatic_bandwidth_is_linearmodels(data, design, kernel):
    X, Z, _, _ = design
    first = np.linalg.lstsq(
        Z @ np.linalg.lstsq(Z, X, rcond=None)[0], data.lwage.to_numpy(), rcond=None
    )[0]
    weight = KernelWeightMatrix(kernel, optimal_bw=True)
    weight.weight_matrix(X, Z, (data.lwage.to_numpy() - X @ first)[:, None])
    ours = hi.LinearMoments.from_formula(FORMULA, data, f"hac:auto:{kernel}")
    assert ours.covariance.bandwidth == weight.bandwidth


@pytest.mark.parametrize("covariance", ["iid", *CASES])
@pytest.mark.parametrize("centred", [False, True])
def test_merged_shards_are_the_whole(data, design, covariance, centred):
    theta = design[2]

    def part(frame):
        return hi.LinearMoments.from_formula(FORMULA, frame, covariance, centred=centred)

    cuts = [0, 3, 40, 1500, len(data)]  # three rows are fewer than lags, clusters are cut
    shards = [part(data[a:b]) for a, b in itertools.pairwise(cuts)]
    left = ((shards[0] + shards[1]) + shards[2]) + shards[3]
    right = shards[0] + (shards[1] + (shards[2] + shards[3]))
    whole = part(data)
    for merged in (left, right):
        assert merged.n == whole.n
        np.testing.assert_allclose(merged.mean(theta), whole.mean(theta), rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(
            merged.covariance_at(theta), whole.covariance_at(theta), rtol=1e-10
        )


@pytest.mark.parametrize("covariance", ["robust", "hac:3", "cluster"])
def test_general_moments_equal_instrumental_ones(data, design, covariance):
    X, Z, theta, _ = design
    C = Z[:, :, None] * np.column_stack([data.lwage, X])[:, None, :]
    clusters = data.exper.to_numpy() if covariance == "cluster" else None
    general = hi.LinearMoments.from_moments(
        C[:, :, 1:], C[:, :, 0], covariance=covariance, clusters=clusters
    )
    iv = hi.LinearMoments.from_arrays(
        data.lwage.to_numpy(), X, Z, covariance=covariance, clusters=clusters
    )
    np.testing.assert_allclose(general.covariance_at(theta), iv.covariance_at(theta), rtol=1e-10)
    np.testing.assert_allclose(general.mean(theta), iv.mean(theta), rtol=1e-9, atol=1e-11)


def test_weights_multiply_moments_and_their_scale_does_not_matter(data, design):
    _, Z, theta, residual = design
    w = 0.5 + np.random.default_rng(3).random(len(data))
    frame = data.assign(w=w)
    ours = hi.LinearMoments.from_formula(FORMULA, frame, weights="w")
    m = w[:, None] * Z * residual
    np.testing.assert_allclose(ours.covariance_at(theta), m.T @ m / len(m), rtol=1e-11)
    scaled = hi.LinearMoments.from_formula(FORMULA, frame.assign(w=7 * w), weights="w")
    prior = hi.Normal(0.1, 0.04, names=["educ"])
    gap = [
        hi.QuasiPosterior(s, prior).log_density(np.stack([theta, theta * 0.9]))
        for s in (ours, scaled)
    ]
    assert np.diff(gap[0]) == pytest.approx(np.diff(gap[1]), rel=1e-9)


def test_files_and_streams_give_the_frame_s_answer(data, design, tmp_path):
    theta = design[2]
    frame = data.assign(region=np.where(data.smsa > 0.5, "city", "country"))
    formula = "lwage ~ 1 + exper + expersq + black + south + region + [educ ~ nearc4 + nearc2]"
    whole = hi.LinearMoments.from_formula(formula, frame)
    assert "region[T.country]" in whole.names.parameters
    frame.to_csv(tmp_path / "card.csv", index=False)
    (tmp_path / "parts").mkdir()
    for index, part in enumerate(np.array_split(np.arange(len(frame)), 3)):
        table = pa.Table.from_pandas(frame.iloc[part])
        pq.write_table(table, tmp_path / "parts" / f"{index}.parquet", row_group_size=500)
    for source in (tmp_path / "card.csv", tmp_path / "parts", pa.Table.from_pandas(frame)):
        moments = hi.LinearMoments.from_formula(formula, source)
        assert moments.names == whole.names
        np.testing.assert_allclose(
            moments.covariance_at(theta), whole.covariance_at(theta), rtol=1e-11
        )
    batches = pa.Table.from_pandas(data).to_batches(max_chunksize=400)
    stream = hi.LinearMoments.from_formula(FORMULA, iter(batches))
    direct = hi.LinearMoments.from_formula(FORMULA, data)
    np.testing.assert_allclose(stream.covariance_at(theta), direct.covariance_at(theta), rtol=1e-11)


def test_ill_scaled_columns_keep_their_digits():
    """Years and their squares in 1e6, an outcome in 1e-3: shifts undo themselves."""
    rng = np.random.default_rng(4)
    year = rng.uniform(1990, 2000, 400)
    X = np.column_stack([np.ones(400), year, year**2])
    y = 1e-3 * (year - 1995) ** 2 + 1e-3 * rng.standard_normal(400)
    moments = hi.LinearMoments.from_arrays(y, X)
    centre = hi.QuasiPosterior(moments, weighting="two-step").whitened.centre
    shifted = np.column_stack([np.ones(400), year - 1995, (year - 1995) ** 2])
    a, b, c = np.linalg.lstsq(shifted, y, rcond=None)[0]
    exact = np.array([a - 1995 * b + 1995**2 * c, b - 2 * 1995 * c, c])
    np.testing.assert_allclose(centre, exact, rtol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    K=st.integers(1, 4),
    extra=st.integers(0, 3),
    cut=st.integers(1, 59),
    seed=st.integers(0, 10_000),
    covariance=st.sampled_from(["robust", "iid", "hac:2", "hac:1.5:qs"]),
    centred=st.booleans(),
)
def test_merging_property(K, extra, cut, seed, covariance, centred):
    y, X, Z = iv_design(60, K, K + extra, seed)
    options = {"covariance": covariance, "centred": centred}
    names = {
        "names": [f"x{k}" for k in range(K)],
        "instrument_names": [f"z{m}" for m in range(K + extra)],
    }

    def part(rows):
        return hi.LinearMoments.from_arrays(y[rows], X[rows], Z[rows], **options, **names)

    whole, merged = part(slice(None)), part(slice(cut)) + part(slice(cut, None))
    theta = np.ones(K) * 0.7
    scale = np.abs(whole.covariance_at(theta)).max()
    assert np.abs(merged.covariance_at(theta) - whole.covariance_at(theta)).max() < 1e-9 * scale


def test_frames_of_polars_like_libraries_and_dicts(data, design):
    theta = design[2]
    whole = hi.LinearMoments.from_formula(FORMULA, data).covariance_at(theta)
    as_dict = {name: data[name].to_numpy() for name in data}
    np.testing.assert_allclose(
        hi.LinearMoments.from_formula(FORMULA, as_dict).covariance_at(theta), whole, rtol=1e-12
    )
    assert isinstance(data, pd.DataFrame)


def test_residuals_keep_their_digits_where_the_fit_is_close():
    """Residuals of 1e-7 of the outcome: its square would be 1e-14 of the tensor's entries."""
    rng = np.random.default_rng(5)
    X = np.column_stack([np.ones(300), rng.standard_normal((300, 2))])
    residual = 1e-7 * rng.standard_normal(300)
    moments = hi.LinearMoments.from_arrays(X @ [3.0, 2.0, -1.0] + residual, X)
    m = X * residual[:, None]
    ours = moments.covariance_at(np.array([3.0, 2.0, -1.0]))
    np.testing.assert_allclose(ours, m.T @ m / 300, rtol=1e-6, atol=1e-6 * (m**2).mean())


def test_outcome_that_is_constant_in_the_first_block():
    """Data sorted by a binary outcome: the constant to centre on must not be the outcome."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal(800)
    frame = pd.DataFrame({"y": (x + rng.standard_normal(800) > 0).astype(float), "x": x})
    frame = frame.sort_values("y", ascending=False)
    batches = pa.Table.from_pandas(frame, preserve_index=False).to_batches(max_chunksize=100)
    for formula in ("y ~ 1 + x", "y ~ 0 + x"):
        stream = hi.QuasiPosterior(hi.LinearMoments.from_formula(formula, iter(batches)))
        whole = hi.QuasiPosterior(hi.LinearMoments.from_formula(formula, frame))
        np.testing.assert_allclose(stream.whitened.centre, whole.whitened.centre, rtol=1e-10)


def test_long_arrays_are_summed_by_blocks(monkeypatch):
    from hakari.inference import moments

    y, X, Z = iv_design(230, 2, 3)
    names = {"names": ["a", "b"], "instrument_names": ["a", "p", "q"]}
    clusters = np.arange(230) % 17
    for covariance in ("robust", "iid", "hac:3", "cluster"):
        options = {"covariance": covariance, **names}
        if covariance == "cluster":
            options["clusters"] = clusters
        whole = hi.LinearMoments.from_arrays(y, X, Z, **options)
        with monkeypatch.context() as patch:
            patch.setattr(moments, "BLOCK_ROWS", 60)
            pieces = hi.LinearMoments.from_arrays(y, X, Z, **options)
        theta = np.array([0.5, 0.7])
        np.testing.assert_allclose(
            pieces.covariance_at(theta), whole.covariance_at(theta), rtol=1e-10
        )
