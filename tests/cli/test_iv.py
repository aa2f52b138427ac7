"""`hakari iv` from a file to numbers."""

import json
import math
import tomllib

import numpy as np
import pytest
from linearmodels.datasets import mroz
from linearmodels.iv import IVGMM

import hakari.inference as hi
from hakari.inference import sampling

from .conftest import hakari

FORMULA = "y ~ 1 + other + [x ~ z]"
FILES = ["config.toml", "posterior.nc", "report.html", "summary.csv"]


def strict(text):
    """Parsed JSON; NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture(scope="module")
def from_csv(tables):
    return hakari("iv", FORMULA, "--data", "strong.csv", "--out", "text", cwd=tables)


@pytest.fixture(scope="module")
def from_parquet(tables):
    words = ["iv", FORMULA, "--data", "strong.parquet", "--json", "--seed", "1"]
    return hakari(*words, cwd=tables)


def test_the_last_line_is_the_report(from_csv, tables):
    assert from_csv.returncode == 0
    assert from_csv.stdout.splitlines()[-1] == "text/report.html"
    assert sorted(p.name for p in (tables / "text").iterdir()) == FILES
    assert "Traceback" not in from_csv.stderr


def test_tables_show_the_posterior_beside_linearmodels(from_csv):
    for word in ("Quasi-posterior", "IV-GMM", "CUE", "2SLS", "linearmodels", "effective F"):
        assert word in from_csv.stdout
    assert "Anderson-Rubin set of x" in from_csv.stdout
    assert "Kernel independence" in from_csv.stdout


def test_json_is_one_object_and_nothing_else(from_parquet, tables):
    assert from_parquet.returncode == 0
    assert from_parquet.stdout.count("\n") == 1
    found = strict(from_parquet.stdout)
    assert (tables / found["report"]).is_file()
    assert found["run"].startswith("runs")
    assert found["rows"] == 600
    assert found["estimates"][0]["J"]["value"] is None  # just identified
    assert found["notes"] == []


def test_parquet_and_csv_and_a_second_run_give_the_same_numbers(from_parquet, from_csv, tables):
    found = strict(from_parquet.stdout)["posterior"]["x"]
    result = hi.load(tables / "text" / "posterior.nc")
    row = hi.summary(result).loc["x"]
    assert from_csv.returncode == 0
    assert found["mean"] == row["mean"]
    assert found["ess_bulk"] == row["ess_bulk"]


def test_numbers_are_those_of_linearmodels_and_of_the_truth(from_parquet):
    found = strict(from_parquet.stdout)
    assert found["linearmodels_disagreement"] < 1e-6
    x = found["posterior"]["x"]
    assert x["lower"] < 2 < x["upper"]
    gmm = next(e for e in found["estimates"] if (e["label"], e["source"]) == ("IV-GMM", "hakari"))
    assert x["mean"] == pytest.approx(gmm["coefficients"]["x"]["estimate"], abs=0.5 * x["sd"])
    assert found["weak_instruments"] is None


def test_config_repeats_the_run(from_csv, tables):
    assert from_csv.returncode == 0
    config = tomllib.loads((tables / "text" / "config.toml").read_text())
    assert config["model"]["formula"] == FORMULA
    assert config["sampler"]["seed"] == 1
    assert config["posterior"]["prior"] == ["weak"]
    assert {"hakari", "python", "numba"} <= set(config["versions"])
    result = hi.load(tables / "text" / "posterior.nc")
    assert config["model"]["data_digest"] == result.attrs["data_digest"]


def test_default_names_never_collide(type_in, tables, tmp_path):
    words = ["iv", FORMULA, "--data", tables / "strong.csv", "--draws", "200", "--json"]
    first, second = (strict(type_in(*words)[1])["run"] for _ in range(2))
    assert (first, second) == ("runs/iv", "runs/iv-2")


def test_missing_drop(type_in, tables):
    words = ["--data", tables / "gaps.csv", "--missing", "drop", "--draws", "500", "--json"]
    status, out, _ = type_in("iv", FORMULA, *words)
    assert status == 0
    assert 500 < strict(out)["rows"] < 600


def test_a_prior_is_a_standard_deviation(type_in, tables):
    words = ["--data", tables / "strong.csv", "--prior", "x=normal(5, 0.01)", "--json"]
    found = strict(type_in("iv", FORMULA, *words)[1])
    assert found["prior"] == "x ~ normal(5, sd 0.01); all others flat"
    assert found["posterior"]["x"]["sd"] == pytest.approx(0.01, rel=0.1)
    assert [s["scale"] for s in found["sensitivity"]] == [0.25, 0.5, 1, 2, 4, "flat"]


def test_weak_instruments_are_told_and_shown(type_in, tables):
    found = strict(type_in("iv", FORMULA, "--data", tables / "weak.csv", "--json")[1])
    assert "weak for x" in found["weak_instruments"]
    flat = found["sensitivity"][-1]
    assert "improper" in flat["refused"]
    assert flat["coefficients"]["x"]["mean"] is None
    assert any("leans on the prior" in sentence for sentence in found["verdict"])
    ends = [end for piece in found["anderson_rubin"]["intervals"] for end in piece]
    assert None in ends  # unbounded


def test_a_regression_has_no_first_stage(type_in, tables):
    words = ["y ~ 1 + x + other", "--data", tables / "strong.csv", "--draws", "500"]
    status, out, err = type_in("iv", *words, "--out", "ols")
    assert status == 0, err
    assert out.splitlines()[-1] == "ols/report.html"
    assert "flat on all coefficients" in out


def test_resume_continues_the_draws(type_in, tables):
    words = ["iv", FORMULA, "--data", tables / "strong.csv", "--draws", "300"]
    type_in(*words, "--out", "first")
    assert type_in(*words, "--resume", "first", "--out", "second")[0] == 0
    assert type_in(*words[:-1], "600", "--out", "whole")[0] == 0
    second, whole = hi.load("second/posterior.nc"), hi.load("whole/posterior.nc")
    np.testing.assert_allclose(
        second["posterior"]["theta"], whole["posterior"]["theta"], rtol=1e-12
    )


def test_ctrl_c_keeps_the_draws_so_far(type_in, tables, monkeypatch):
    advance, calls = sampling.advance, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return advance(*arguments)

    monkeypatch.setattr(sampling, "advance", interrupted)
    words = ["--data", tables / "strong.csv", "--draws", "50000", "--chains", "2", "--out", "cut"]
    status, out, err = type_in("iv", FORMULA, *words)
    assert status == 130
    assert "interrupted" in err
    assert out.splitlines()[-1] == "cut/report.html"
    result = hi.load("cut/posterior.nc")
    assert result.attrs["interrupted"] == 1
    assert 0 < result["posterior"].sizes["draw"] < 50000


def test_ctrl_c_before_any_draw_leaves_nothing(type_in, tables, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "advance", interrupted)
    status, out, err = type_in("iv", FORMULA, "--data", tables / "strong.csv", "--out", "cut")
    assert (status, out) == (130, "")
    assert err.endswith("hakari: interrupted; nothing was written\n")
    assert not (tmp_path / "cut").exists()


def test_mroz_with_a_transformed_variable_and_missing_wages(type_in, tmp_path):
    data = mroz.load()
    data.to_csv(tmp_path / "mroz.csv", index=False)
    formula = "log(wage) ~ 1 + exper + expersq + [educ ~ fatheduc + motheduc]"
    status, _, err = type_in("iv", formula, "--data", "mroz.csv")
    assert status == 2
    assert "wage (325)" in err
    status, out, err = type_in("iv", formula, "--data", "mroz.csv", "--missing", "drop", "--json")
    assert status == 0, err
    found = strict(out)
    working = data.dropna(subset=["wage"])
    working = working.assign(lwage=np.log(working.wage))
    theirs = IVGMM.from_formula(
        "lwage ~ 1 + exper + expersq + [educ ~ fatheduc + motheduc]", working
    ).fit()
    ours = next(e for e in found["estimates"] if (e["label"], e["source"]) == ("IV-GMM", "hakari"))
    assert found["rows"] == 428
    assert ours["coefficients"]["educ"]["estimate"] == pytest.approx(theirs.params["educ"])
    assert ours["coefficients"]["educ"]["std_error"] == pytest.approx(theirs.std_errors["educ"])
    assert math.isclose(ours["J"]["value"], theirs.j_stat.stat, rel_tol=1e-6)
