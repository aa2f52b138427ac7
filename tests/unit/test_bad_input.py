"""Each bad input gets one clear error that names the thing, its value and the way out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import hakari.inference as hi
from tests.designs import iv_design


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    z1, z2, w, v = rng.standard_normal((4, 200))
    x = z1 + 0.5 * z2 + v
    return pd.DataFrame({"y": x + w + v, "x": x, "w": w, "z1": z1, "z2": z2, "one": 1.0})


def fit(frame, formula="y ~ 1 + w + [x ~ z1 + z2]", **options):
    return hi.QuasiPosterior(hi.LinearMoments.from_formula(formula, frame, **options))


def test_missing_values_are_named_counted_and_can_be_dropped(frame):
    frame.loc[[3, 7], "z1"] = np.nan
    frame.loc[7, "w"] = np.nan
    with pytest.raises(ValueError, match=r"2 rows with missing values, .* row 4 .*: .*z1 \(2\)"):
        fit(frame)
    assert fit(frame, missing="drop").moments.n == 198
    table = pa.Table.from_pandas(frame)
    with pytest.raises(ValueError, match=r"missing values"):
        fit(table)


def test_all_rows_missing(frame):
    with pytest.raises(ValueError, match="no complete rows: 200 rows read, 0 without missing"):
        fit(frame.assign(w=np.nan), missing="drop")


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_values(frame, value):
    frame.loc[5, "w"] = value
    with pytest.raises(ValueError, match=r"w is -?inf in row 6 .*, one of 1 rows"):
        fit(frame)


def test_logarithm_of_zero_is_infinite(frame):
    frame["count"] = np.arange(200.0)
    with (
        np.errstate(divide="ignore"),
        pytest.raises(ValueError, match=r"np\.log\(count\) is -inf in row 1 "),
    ):
        fit(frame, "y ~ 1 + np.log(count) + [x ~ z1]")


def test_unknown_column_suggests_the_nearest(frame):
    with pytest.raises(ValueError, match=r"no column 'z11' in the data; did you mean 'z1'\?"):
        fit(frame, "y ~ 1 + w + [x ~ z11]")


@pytest.mark.parametrize(
    "formula", ["y", "y ~ 1 + [x ~ z1", "y ~ 1 w [x ~ z1]", "y ~ 1 + [x + ~ z1]", "a ~ b ~ c"]
)
def test_formula_that_is_not_understood(frame, formula):
    with pytest.raises(ValueError, match=r"write 'y ~ 1"):
        fit(frame, formula)


def test_fewer_instruments_than_parameters(frame):
    with pytest.raises(
        ValueError,
        match=r"3 instruments for 4 parameters: add 1 instrument or drop a regressor "
        r"\(instruments: Intercept, w, z1; regressors: Intercept, w, x, z2\)",
    ):
        fit(frame, "y ~ 1 + w + [x + z2 ~ z1]")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("y ~ 1 + w + I(2 * w) + [x ~ z1]", r"collinear regressors \(X\): .*w"),
        ("y ~ 1 + w + [x ~ z1 + I(z1 - w)]", r"collinear instruments \(Z\): .*w, .*z1"),
        ("y ~ 1 + w + [x + I(x + w) ~ z1 + z2]", r"collinear regressors \(X\)"),
        ("y ~ 1 + one + w + [x ~ z1]", r"collinear regressors \(X\): Intercept, one"),
        ("y ~ 1 + I(0 * w) + [x ~ z1]", r"I\(0 \* w\) is zero in every row"),
    ],
)
def test_collinear_and_constant_columns(frame, formula, message):
    with pytest.raises(ValueError, match=message):
        fit(frame, formula)


def test_unidentified_parameter():
    rng = np.random.default_rng(1)
    Z = rng.standard_normal((100, 2))
    x = rng.standard_normal(100)
    x -= Z @ np.linalg.lstsq(Z, x, rcond=None)[0]
    with pytest.raises(ValueError, match=r"do not identify x"):
        hi.QuasiPosterior(
            hi.LinearMoments.from_arrays(x, np.column_stack([Z[:, 0], x]), Z, names=["w", "x"])
        )


def test_fewer_rows_than_moments():
    y, X, Z = iv_design(6, 2, 6)
    with pytest.raises(ValueError, match="6 rows for 6 moments"):
        hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z))


def test_perfect_fit_is_a_singular_covariance():
    X = np.random.default_rng(0).standard_normal((50, 2))
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(X @ [1.0, 2.0], X))
    with pytest.raises(ValueError, match="Ω is singular at the estimate"):
        _ = posterior.whitened


def test_fewer_clusters_than_moments(frame):
    frame["state"] = np.arange(200) % 3
    posterior = fit(frame, covariance="cluster:state")
    with pytest.raises(
        ValueError, match=r"rank 3 for 4 moments; .* more independent rows or clusters"
    ):
        _ = posterior.whitened


@pytest.mark.parametrize(
    ("weights", "message"),
    [(0.0, "weights sum to 0"), (-1.0, "weight -1.0"), (np.inf, "weight inf")],
)
def test_weights_that_do_not_sum(frame, weights, message):
    frame["weight"] = weights
    with pytest.raises(ValueError, match=message):
        fit(frame, weights="weight")


@pytest.mark.parametrize("text", ["robst", "hac:soon", "hac:-1", "hac:3:boxcar", "iid:4"])
def test_covariance_that_is_not_known(frame, text):
    with pytest.raises(ValueError, match=r"write iid, robust|must be finite"):
        fit(frame, covariance=text)


def test_cluster_without_labels(frame):
    with pytest.raises(ValueError, match="write 'cluster:COLUMN'"):
        fit(frame, covariance="cluster")
    y, X, _ = iv_design(50, 2, 2)
    with pytest.raises(ValueError, match="needs clusters="):
        hi.LinearMoments.from_arrays(y, X, covariance="cluster")


def test_automatic_bandwidth_of_too_few_rows():
    y, X, _ = iv_design(4, 1, 1)
    with pytest.raises(ValueError, match="4 rows are too few for an automatic bandwidth"):
        hi.LinearMoments.from_arrays(y, X, covariance="hac:auto:parzen")


def test_files_that_are_not_there_or_not_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data at"):
        hi.LinearMoments.from_formula("y ~ x", tmp_path / "no.csv")
    (tmp_path / "data.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"\.xlsx; CSV"):
        hi.LinearMoments.from_formula("y ~ x", tmp_path / "data.xlsx")
    with pytest.raises(TypeError, match="data of type int is not understood"):
        hi.LinearMoments.from_formula("y ~ x", 3)


def test_text_in_a_stream():
    batch = pa.record_batch({"y": [1.0, 2.0], "x": ["a", "b"]})
    with pytest.raises(ValueError, match="text columns x in a stream"):
        hi.LinearMoments.from_formula("y ~ 1 + x", iter([batch]))


def test_wrong_shapes_and_names():
    y, X, Z = iv_design(50, 2, 3)
    with pytest.raises(ValueError, match="Z has 49 rows, y has 50"):
        hi.LinearMoments.from_arrays(y, X, Z[1:])
    with pytest.raises(ValueError, match="1 names for 2 columns of X"):
        hi.LinearMoments.from_arrays(y, X, Z, names=["a"])
    with pytest.raises(ValueError, match="name 'a' appears twice"):
        hi.LinearMoments.from_arrays(y, X, Z, names=["a", "a"])
    bad = X.copy()
    bad[4, 0] = np.nan
    with pytest.raises(ValueError, match=r"x0 is nan in row 5 .*, one of 1 rows"):
        hi.LinearMoments.from_arrays(y, bad, Z)
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z))
    with pytest.raises(ValueError, match=r"theta has shape \(3,\): its last axis must be 2"):
        posterior.log_density(np.zeros(3))


def test_general_moments_of_wrong_kind():
    G, g = np.ones((10, 3, 2)), np.ones((10, 3))
    with pytest.raises(ValueError, match=r"need \(n, L, K\) and \(n, L\)"):
        hi.LinearMoments.from_moments(G, g[:, :2])
    with pytest.raises(ValueError, match="'iid' needs instruments"):
        hi.LinearMoments.from_moments(G, g, covariance="iid")


def test_moments_that_do_not_add_up():
    y, X, Z = iv_design(60, 2, 3)
    a = hi.LinearMoments.from_arrays(y, X, Z, names=["a", "b"])
    with pytest.raises(ValueError, match="moments of different models"):
        a + hi.LinearMoments.from_arrays(y, X, Z, names=["a", "c"])
    with pytest.raises(ValueError, match="covariances differ: robust and iid"):
        a + hi.LinearMoments.from_arrays(y, X, Z, names=["a", "b"], covariance="iid")


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (hi.Normal(0, np.array([[1.0, 2.0], [2.0, 1.0]])), "not positive definite"),
        (hi.Normal(0, np.array([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        (hi.Normal(np.zeros(3), 1.0), r"mean has shape \(3,\)"),
        (hi.Normal(0, np.inf), "must be finite"),
        (hi.Normal(0, 1, names=["educ"]), "unknown coefficient 'educ' .have x0, x1."),
        (hi.StudentT(0, 0, 1), "degrees of freedom must be positive"),
        ([hi.Normal(0, 1), hi.Normal(0, 1, names=["x1"])], "two priors on 'x1'"),
    ],
)
def test_priors_that_do_not_fit(prior, message):
    y, X, _ = iv_design(50, 2, 2)
    with pytest.raises(ValueError, match=message):
        hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X), prior)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nuts"}, "method 'nuts' is unknown: use one of auto, mh"),
        ({"draws": 0}, "draws 0: a whole number of at least 1"),
        ({"draws": 2.5}, "draws 2.5: a whole number"),
        ({"seed": -1}, "seed -1: a whole number of at least 0"),
        ({"warmup": -5}, "warmup -5: a whole number"),
        ({"chains": 0}, "chains 0: a whole number of at least 1"),
    ],
)
def test_sampler_options(options, message):
    y, X, _ = iv_design(200, 2, 2)
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X))
    with pytest.raises(ValueError, match=message):
        hi.sample(posterior, **options)


def test_exact_kernel_refuses_a_student_prior():
    y, X, _ = iv_design(200, 2, 2)
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X), hi.StudentT(3, 0, 1))
    with pytest.raises(ValueError, match="cannot take a Student prior"):
        hi.sample(posterior, "da-exact")


def test_improper_posteriors_are_refused_with_the_way_out():
    """A weak instrument and a flat prior; no determinant in many dimensions; proper ones pass."""
    rng = np.random.default_rng(2)
    z, v, e = rng.standard_normal((3, 500))
    x = 0.1 * z + v
    weak = hi.LinearMoments.from_arrays(x + v + e, x, z, names=["x"], instrument_names=["z"])
    with pytest.raises(ValueError, match=r"improper under this prior: along x .*weak_prior"):
        hi.sample(hi.QuasiPosterior(weak))
    assert hi.sample(hi.QuasiPosterior(weak, hi.Normal(0, 1)), draws=100, seed=1)
    assert hi.sample(hi.QuasiPosterior(weak, weighting="two-step"), draws=100, seed=1)
    y, X, _ = iv_design(200, 20, 20)
    many = hi.LinearMoments.from_arrays(y, X)
    with pytest.raises(ValueError, match="without the determinant"):
        hi.sample(hi.QuasiPosterior(many, determinant=False))


def test_columns_may_bear_the_names_of_formula_functions(frame):
    """formulaic knows `lag`, `exp` and `poly` as functions; a column of that name is a column."""
    named = frame.rename(columns={"w": "lag", "z2": "exp"})
    theirs = fit(frame).whitened.centre
    ours = fit(named, "y ~ 1 + lag + [x ~ z1 + exp]").whitened.centre
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert fit(named, "y ~ 1 + np.exp(lag) + [x ~ z1]").moments.names.parameters[1] == "np.exp(lag)"


def test_moments_that_do_not_exist_are_said():
    """Weak, one instrument too many, a flat prior: the tail falls like 1/s, and has no mean."""
    rng = np.random.default_rng(2)
    z1, z2, v, e = rng.standard_normal((4, 500))
    x = 0.1 * z1 + 0.1 * z2 + v
    Z = np.column_stack([z1, z2])
    moments = hi.LinearMoments.from_arrays(x + v + e, x, Z, names=["x"])
    result = hi.sample(hi.QuasiPosterior(moments), draws=500, seed=1)
    missing = "neither mean nor variance of x exists"
    assert any(missing in note for note in hi.convergence_notes(result))
    proper = hi.sample(hi.QuasiPosterior(moments, hi.Normal(0, 9.0)), draws=500, seed=1)
    assert not any("exists" in note for note in hi.convergence_notes(proper))
    y, X, Z = iv_design(1000, 2, 3)  # the same tail, out of reach
    strong = hi.sample(hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z)), draws=500, seed=1)
    assert not any("exists" in note for note in hi.convergence_notes(strong))


def test_terms_that_learn_from_the_data_are_refused_in_blocks(frame, monkeypatch):
    """`scale` and the like know only the first block; in one block they know the whole table."""
    from hakari.inference import tables

    text = "y ~ 1 + scale(w) + [x ~ z1]"
    assert fit(frame, text).moments.names.parameters[1] == "scale(w)"
    monkeypatch.setattr(tables, "BLOCK_ROWS", 80)
    with pytest.raises(ValueError, match=r"scale\(w\) learns from the data, .* blocks of 80 rows"):
        fit(frame, text)
    assert fit(frame, "y ~ 1 + np.exp(w) + [x ~ z1]").moments.n == 200


def test_function_that_is_not_there(frame):
    with pytest.raises(ValueError, match=r"a term of the formula cannot be computed: .*foo"):
        fit(frame, "y ~ 1 + np.foo(w) + [x ~ z1]")


def test_missing_values_are_counted_to_the_end_of_the_table(frame, tmp_path, monkeypatch):
    from hakari.inference import tables

    monkeypatch.setattr(tables, "BLOCK_ROWS", 50)
    frame.loc[[10, 70, 71, 190], "z1"] = np.nan
    frame.to_csv(tmp_path / "gaps.csv", index=False)
    for source in (frame, tmp_path / "gaps.csv"):
        with pytest.raises(ValueError, match=r"4 rows with missing .* row 11 .*: z1 \(4\)"):
            fit(source)


def test_csv_files_as_people_have_them(frame, tmp_path):
    """Semicolons, Stata's dot for missing, no content, words among numbers, types that change."""
    expected = fit(frame).whitened.centre
    frame.to_csv(tmp_path / "semicolon.csv", index=False, sep=";")
    frame.to_csv(tmp_path / "tab.csv.gz", index=False, sep="\t")
    for name in ("semicolon.csv", "tab.csv.gz"):
        np.testing.assert_allclose(fit(tmp_path / name).whitened.centre, expected, rtol=1e-10)
    dotted = frame.astype(object)
    dotted.loc[3, "x"] = "."
    dotted.to_csv(tmp_path / "dot.csv", index=False)
    with pytest.raises(ValueError, match=r"1 rows with missing .* row 4 .*: x \(1\)"):
        fit(tmp_path / "dot.csv")
    dotted.loc[3, "x"] = "none"
    dotted.to_csv(tmp_path / "word.csv", index=False)
    for source in (tmp_path / "word.csv", dotted):
        with pytest.raises(ValueError, match=r"x holds text among numbers \('none'\)"):
            fit(source)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"empty\.csv is empty"):
        fit(tmp_path / "empty.csv")
    lines = ["y,x", *(f"{i},{i * i % 7}" for i in range(300_000)), "1.5,2.5"]
    (tmp_path / "late.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"late\.csv: y changes its type along the file"):
        fit(tmp_path / "late.csv", "y ~ 1 + x")


def test_numbers_that_are_held_as_objects(frame):
    np.testing.assert_allclose(
        fit(frame.astype(object)).whitened.centre, fit(frame).whitened.centre, rtol=1e-12
    )


def test_outcome_that_does_not_vary(frame):
    with pytest.raises(ValueError, match="a perfect fit leaves nothing to weigh"):
        _ = fit(frame, "one ~ 1 + w + [x ~ z1]").whitened
