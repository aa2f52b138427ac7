"""The example on Gertler and Karadi's data, and the demo's chapter on macrodata."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from hakari.inference.macro import SLOW, monetary_policy, quarters

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "monetary_policy.py"
DATA = ROOT.parent / "shared" / "data" / "gk.csv.gz"
needs_data = pytest.mark.skipif(not DATA.is_file(), reason="the study's data are not here")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    words = [sys.executable, "-W", "error", str(SCRIPT), str(DATA), str(out)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False), out


def lagged(data, names, lags):
    return pd.concat(
        {f"{n}{p}": data[n].shift(p) for n in names for p in range(1, lags + 1)}, axis=1
    )


@needs_data
def test_example_writes_and_says(run):
    done, out = run
    assert done.returncode == 0, done.stderr
    ways = ("monetary_policy_lp", "monetary_policy_iv", "monetary_policy_lp_1990")
    assert {p.name for p in out.iterdir()} == {f"{w}.{end}" for w in ways for end in ("png", "csv")}
    assert "Samples differ: (a) is 1980-07 to 2008-06, (b) 1990-01 to 2012-06" in done.stdout
    assert done.stdout.count("Simultaneous 90% bands covered in the bootstrap before") == 3
    assert "First stage of ff4_tc: effective F" in done.stdout
    assert "logip: the simultaneous 90% band excludes 0 at months 1 to" in done.stdout
    assert "the output puzzle, a reason to doubt" in done.stdout


@needs_data
def test_no_finding_hides_what_the_sets_say(run):
    """From the tables: where sets exclude 0 and the band does not, the months are printed."""
    done, out = run
    assert done.returncode == 0, done.stderr
    said = done.stdout.partition("monetary_policy_iv:")[2].partition("monetary_policy_lp_1990")[0]
    table = pd.read_csv(out / "monetary_policy_iv.csv")
    for response, part in table.groupby("response"):
        (line,) = [text for text in said.splitlines() if text.startswith(f"{response}: ")]
        sets = (part["lower_ar"] > 0) | (part["upper_ar"] < 0)
        band = (part["lower_joint"] > 0) | (part["upper_joint"] < 0)
        assert ("exclude 0 at months" in line) == (sets & ~band).any()
        assert ("contains 0 at every horizon" in line) == (not (sets | band).any())


@needs_data
def test_estimates_are_those_of_least_squares(run):
    """statsmodels, a regression a horizon, and two-stage least squares by hand."""
    done, out = run
    assert done.returncode == 0, done.stderr
    data = pd.read_csv(DATA)
    names = ["logip", "logcpi", "ebp", "gs1"]
    past = lagged(data, names, 12)
    found = {way: pd.read_csv(out / f"monetary_policy_{way}.csv") for way in ("lp", "iv")}
    for response, h in (("logip", 24), ("ebp", 6)):
        y = data[response].shift(-h)
        x = sm.add_constant(pd.concat([data[["gs1", "logip", "logcpi"]], past], axis=1))
        whole = pd.concat([y.rename("_y"), x], axis=1)
        rows = whole.notna().all(axis=1) & (np.arange(len(data)) < len(data) - 48)
        theirs = sm.OLS(whole.loc[rows, "_y"], x[rows]).fit().params["gs1"]
        ours = found["lp"].query("response == @response and horizon == @h")["estimate"].item()
        assert ours == pytest.approx(theirs, rel=1e-8)
        c = sm.add_constant(past)
        whole = pd.concat([y.rename("_y"), data[["gs1", "ff4_tc"]], c], axis=1).dropna()
        x, z = (whole[[n, *c.columns]].to_numpy() for n in ("gs1", "ff4_tc"))
        theirs = np.linalg.solve(z.T @ x, z.T @ whole["_y"])[0]
        ours = found["iv"].query("response == @response and horizon == @h")["estimate"].item()
        assert ours == pytest.approx(theirs, rel=1e-6)


@needs_data
def test_findings_are_not_claimed_of_what_is_zero_by_assumption():
    spec = importlib.util.spec_from_file_location("example", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    band = {"lower_joint": [1e-12, -1.0], "upper_joint": [2e-12, 1.0]}
    band |= {"lower_pointwise": [1e-12, -0.5], "upper_pointwise": [2e-12, 0.5]}
    table = pd.DataFrame({"horizon": [0, 1], "mean": [1e-12, 0.0], "sd": [1e-12, 0.5]} | band)
    assert "contains 0 at every horizon" in example.finding(table, "y")
    wide = table.assign(lower_ar=[0.0, -2.0], upper_ar=[0.0, 2.0])
    assert "contains 0 at every horizon" in example.finding(wide, "y")
    above = example.finding(table.assign(lower_ar=[0.0, 0.2], upper_ar=[0.0, 3.0]), "logip")
    assert "every horizon" not in above
    assert "exclude 0 at months 1, where the simultaneous band contains it" in above
    assert "as the pointwise band does. It rises (sets: months 1)" in above
    away = table.assign(lower_joint=[0.0, 0.1], mean=[0.0, 0.4], lower_ar=-2.0, upper_ar=2.0)
    said = example.finding(away, "ebp")
    assert "Anderson-Rubin sets contain 0, although the simultaneous band does not" in said
    assert "puzzle" not in said
    strong = pd.DataFrame({"effective_f": [30.0, 40.0], "critical": [23.1, 23.1]})
    assert example.strength(strong).endswith("strong.")


def test_usage_without_arguments():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "TABLE FOLDER" in done.stderr


# --- the demo's chapter -------------------------------------------------------------------


def test_demo_chapter_on_macrodata(tmp_path):
    part = monetary_policy(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".nc", ".csv", ".png", ".pdf"}
    titles = [section.title for section in part.chapter.sections]
    assert titles == [
        "Question", "What the data say", "Responses", "The prior's share", "Learning rates",
        "Diagnostics", "How to repeat",
    ]  # fmt: skip
    rows = pd.DataFrame(part.record["responses"])
    at_once = rows[rows["horizon"] == 0]
    assert (at_once[["mean", "sd"]] == 0).all(axis=None)
    prices = rows[(rows["response"] == "prices") & (rows["horizon"] == 4)]
    assert prices["estimate"].item() > 0  # the puzzle that the introduction tells of
    assert [one["response"] for one in part.record["calibration"]] == list(SLOW)
    assert part.record["rows"] == [179] * 21


def test_demo_estimates_are_statsmodels(tmp_path):
    part = monetary_policy(tmp_path)
    data = quarters()
    names = [*SLOW, "tbill"]
    x = sm.add_constant(pd.concat([data[["tbill", *SLOW]], lagged(data, names, 4)], axis=1))
    rows = x.notna().all(axis=1) & (np.arange(len(data)) < len(data) - 20)
    table = pd.DataFrame(part.record["responses"])
    for response, h in (("output", 8), ("unemployment", 20)):
        theirs = sm.OLS(data[response].shift(-h)[rows], x[rows]).fit().params["tbill"]
        ours = table.query("response == @response and horizon == @h")["estimate"].item()
        assert ours == pytest.approx(theirs, rel=1e-8)
