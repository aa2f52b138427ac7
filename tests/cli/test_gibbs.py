"""`hakari gibbs` from a file to numbers, and what a user's mistakes look like."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import norm

import hakari.inference as hi
from hakari import gibbs_cli
from hakari.inference.gibbs import study as studies
from hakari.inference.gibbs.bootstrap import SCHEMES
from hakari.inference.gibbs.calibration import METHODS
from hakari.inference.gibbs.command import command_line
from hakari.inference.gibbs.regions import REGIONS
from hakari.inference.gibbs.study import Study

from .conftest import hakari

FILES = ["config.toml", "coverage.csv", "posterior.nc", "ranks.csv", "report.html", "summary.csv"]
ASKED = ["--loss", "quantile:0.5", "--replicates", 200, "--draws", 500, "--level", 0.9]
FEW = ["--replicates", 200, "--draws", 300, "--chains", 2, "--level", 0.9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(3)
    x, e = rng.standard_normal((2, 200))
    g = np.repeat(np.arange(20), 10)
    shared = rng.standard_normal(20)[g]
    frame = pd.DataFrame({"y": 1 + 2 * x + (1 + 0.5 * np.abs(x)) * e + shared, "x": x, "g": g})
    frame = frame.assign(sold=(x + e > 0).astype(int), apart=(x > 0).astype(int))
    frame.to_csv(place / "rows.csv", index=False)
    frame.assign(y=frame["y"].where(frame.index != 7)).to_csv(place / "gap.csv", index=False)
    return place


def strict(text):
    """Parsed JSON; NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture(scope="module")
def done(folder):
    words = ["y ~ 1 + x", "--data", "rows.csv", *ASKED, "--rate", 2, "--out", "text"]
    return hakari("gibbs", *words, cwd=folder)


# --- the command --------------------------------------------------------------------------


def test_the_last_line_is_the_report_and_the_folder_is_whole(done, folder):
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "text/report.html"
    assert sorted(p.name for p in (folder / "text").iterdir()) == FILES
    assert "Traceback" not in done.stderr
    said = " ".join(done.stdout.split())
    assert "Learning rates at which 90% regions cover the estimate that often in 200" in said
    assert "90% intervals; the estimate minimises the loss. estimate calibrated at rate 2" in said
    assert "• x: " in said
    assert "times as wide as that at learning rate 2" in said


def test_numbers_are_those_of_the_library(done, folder):
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(folder / "text" / "summary.csv", index_col=0)
    loss = hi.losses.quantile(0.5)
    gibbs = hi.GibbsPosterior.from_formula(loss, "y ~ 1 + x", folder / "rows.csv")
    cal = hi.calibrate(gibbs, 0.9, replicates=200, seed=1)
    np.testing.assert_allclose(rows["estimate"], gibbs.minimiser, rtol=1e-9)
    np.testing.assert_allclose(rows["learning_rate"], cal.rates["rate"], rtol=1e-9)
    kept = hi.load(folder / "text" / "posterior.nc")["posterior"]["theta"]
    ours = hi.sample(cal.posterior, draws=500, seed=1)["posterior"]["theta"]
    np.testing.assert_array_equal(kept, ours)
    for column, found in enumerate(cal.found):
        for way, rate in (("", found.rate), ("_uncalibrated", 2.0)):
            theta = hi.sample(gibbs.at_rate(rate), draws=500, seed=1)["posterior"]["theta"]
            ends = np.quantile(theta[:, :, column], [0.05, 0.95])
            shown = rows.iloc[column][[f"lower{way}", f"upper{way}"]]
            np.testing.assert_allclose(shown.astype(float), ends, rtol=1e-9)


def test_config_and_report_say_what_was_done(done, folder):
    assert done.returncode == 0, done.stderr
    config = tomllib.loads((folder / "text" / "config.toml").read_text())
    assert config["model"]["formula"] == "y ~ 1 + x"
    assert config["model"]["rows"] == 200
    assert config["model"]["prior_resolved"] == "flat on all coefficients"
    assert config["calibration"]["method_resolved"] == "cloud"
    assert list(config["calibration"]["learning_rates"]) == ["Intercept", "x"]
    assert (config["calibration"]["level"], config["calibration"]["rate"]) == (0.9, 2.0)
    assert config["sampler"]["seed"] == 1
    assert {"hakari", "python", "numba"} <= set(config["versions"])
    report = (folder / "text" / "report.html").read_text()
    for heading in ("Question", "What the data say", "Before and after calibration"):
        assert f"{heading}</h3>" in report
    for heading in ("Calibration", "Diagnostics", "How to repeat"):
        assert f"{heading}</h3>" in report
    assert report.count("data:image/svg") == 2
    assert "hakari gibbs &#39;y ~ 1 + x&#39; --data rows.csv --loss quantile:0.5" in report


def test_the_command_in_the_report_gives_the_same_numbers(done, folder, type_in, monkeypatch):
    assert done.returncode == 0, done.stderr
    numbers = {"rate": 2.0, "replicates": 200, "draws": 500, "level": 0.9}
    line = command_line(Study("y ~ 1 + x", "rows.csv", "quantile:0.5", **numbers))
    monkeypatch.chdir(folder)
    words = [w.strip("'") for w in line.replace("'y ~ 1 + x'", "FORMULA").split()]
    words = ["y ~ 1 + x" if w == "FORMULA" else w for w in words]
    assert type_in(*words[1:], "--out", "again")[0] == 0
    again, first = (pd.read_csv(folder / name / "summary.csv") for name in ("again", "text"))
    pd.testing.assert_frame_equal(again, first, rtol=1e-12)


def test_every_option_that_is_not_at_its_default_is_in_the_command():
    asked = {"prior": ("flat", "x=normal(0, 1)"), "coefficients": ("x",), "clusters": "g"}
    study = Study("y ~ x", "a b.csv", "huber", bootstrap="cluster", method="shift", **asked)
    assert command_line(study) == (
        "hakari gibbs 'y ~ x' --data 'a b.csv' --loss huber --prior flat 'x=normal(0, 1)' "
        "--coefficients x --bootstrap cluster --clusters g --method shift --seed 1 --level 0.95"
    )


def test_json_of_clusters_and_a_prior(type_in, folder):
    """With squared loss the sandwich is statsmodels' cluster covariance."""
    words = ["--data", folder / "rows.csv", "--loss", "squared", *FEW, "--clusters", "g"]
    more = ["--bootstrap", "cluster", "--prior", "x=normal(2, 0.01)", "--json", "--out", "c"]
    status, out, err = type_in("gibbs", "y ~ 1 + x", *words, *more)
    assert status == 0, err
    assert out.count("\n") == 1
    found = strict(out)
    assert found["prior"] == "x ~ normal(2, sd 0.01); all others flat"
    assert found["learning_rate"] == min(c["rate"] for c in found["calibration"])
    first, x = found["coefficients"]
    assert abs(x["mean"] - 2) < 0.02
    frame = pd.read_csv(folder / "rows.csv")
    kinds = {"groups": frame["g"], "use_correction": False}
    model = sm.OLS(frame["y"], sm.add_constant(frame["x"]))
    theirs = model.fit(cov_type="cluster", cov_kwds=kinds)
    wanted = theirs.params["const"] + norm.ppf([0.05, 0.95]) * theirs.bse["const"]
    assert [first["lower_sandwich"], first["upper_sandwich"]] == pytest.approx(list(wanted))
    assert found["run"] == "c"


def test_one_region_has_one_rate_for_all(type_in, folder):
    words = ["--data", folder / "rows.csv", "--loss", "squared", *FEW, "--region", "ellipse"]
    found = strict(type_in("gibbs", "y ~ 1 + x", *words, "--json", "--out", "e")[1])
    assert [one["of"] for one in found["calibration"]] == ["ellipse"]
    rates = {row["learning_rate"] for row in found["coefficients"]}
    assert rates == {found["learning_rate"]}
    assert [row["coefficient"] for row in found["coefficients"]] == ["Intercept", "x"]


def test_help_shows_every_option_and_imports_no_half(tmp_path):
    code = """
import sys
from hakari.cli import app
app(["gibbs", "--help"], result_action="return_value")
print("HEAVY", sorted({"numpy", "pandas", "matplotlib"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    for option in ("loss", "region", "bootstrap", "replicates", "method", "rate", "coefficients"):
        assert f"--{option}" in shown
    assert shown.count("For example") == 4
    assert shown.splitlines()[-1] == "HEAVY []"


def test_choices_are_those_of_the_library():
    assert gibbs_cli.Region.__args__ == REGIONS
    assert gibbs_cli.Bootstrap.__args__ == SCHEMES
    assert gibbs_cli.Method.__args__ == METHODS


MISTAKES = {
    "no file": (["--data", "lost.csv"], "no data at lost.csv"),
    "no loss": (["--loss", "median"], "loss 'median' is unknown: use one of squared, quantile:TAU"),
    "tau": (["--loss", "quantile:90"], "loss 'quantile:90': tau 90.0: give a share between 0 and"),
    "column": (["formula", "y ~ 1 + w"], "no column 'w'"),
    "instruments": (["formula", "y ~ 1 + [x ~ g]"], "has instruments: a loss of y and x has none"),
    "gap": (["--data", "gap.csv"], "1 rows with missing values"),
    "classes": (["--loss", "hinge"], "hinge needs two classes"),
    "separable": (["formula", "apart ~ 1 + x", "--loss", "logistic"], "separates the classes"),
    "level": (["--level", "95"], "level 95 must lie between 0 and 1"),
    "rate": (["--rate", "0"], "rate 0: a learning rate above 0 is needed"),
    "replicates": (["--replicates", "20"], "replicates 20: at least 200 data sets are needed"),
    "clusters": (["--clusters", "g"], "--bootstrap cluster and --clusters COLUMN go together"),
    "no clusters": (["--bootstrap", "cluster"], "bootstrap cluster with no clusters"),
    "block": (["--block", "5"], "block=5 is only for bootstrap='block'"),
    "coefficient": (["--coefficients", "w"], "no coefficient 'w': there are Intercept, x"),
    "ellipse": (["--coefficients", "x", "--region", "ellipse"], "are for region='marginal'"),
    "prior": (["--prior", "gauss(0, 1)"], "prior 'gauss(0, 1)' is not understood"),
    "weak": (["--prior", "x=weak"], "weak is for instruments; use flat, or give a scale"),
    "draws": (["--draws", "0"], "draws 0: at least 1"),
    "few draws": (["--draws", "2"], "draws 2: at least 4 of each chain"),
    "seed": (["--seed", "-1"], "seed -1"),
    "method": (["--method", "magic"], "magic"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_comes_before_any_work(
    mistake, type_in, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(studies, "sample", lambda *_, **__: pytest.fail("sampled"))
    monkeypatch.setattr(
        "hakari.inference.gibbs.calibration.draw_weights",
        lambda *_, **__: pytest.fail("calibrated"),
    )
    for name in ("rows.csv", "gap.csv"):
        (tmp_path / name).symlink_to(folder / name)
    words, told = MISTAKES[mistake]
    base = {"formula": "y ~ 1 + x", "--data": "rows.csv", "--loss": "squared", "--out": "answer"}
    base |= dict(zip(words[::2], words[1::2], strict=True))
    status, out, err = type_in(
        "gibbs", base.pop("formula"), *(w for pair in base.items() for w in pair)
    )
    assert (status, out) == (2, "")
    assert err.startswith("hakari: ")
    assert err.count("\n") == 1
    assert told in err
    assert not (tmp_path / "answer").exists()


def stopped_at(monkeypatch, number, cut=False):
    """Ctrl-C at a call of `sample`: before any draw, or with draws so far."""
    sample, calls = studies.sample, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == number and not cut:
            raise KeyboardInterrupt
        result = sample(*arguments, **options)
        if len(calls) == number:
            result.attrs["interrupted"] = 1
        return result

    monkeypatch.setattr(studies, "sample", stopping)
    return calls


def test_ctrl_c_before_any_draw_leaves_nothing(type_in, folder, tmp_path, monkeypatch):
    stopped_at(monkeypatch, 1)
    words = ["y ~ 1 + x", "--data", folder / "rows.csv", "--loss", "squared", *FEW]
    status, out, err = type_in("gibbs", *words, "--out", "cut")
    assert (status, out) == (130, "")
    assert err.endswith("hakari: interrupted; nothing was written\n")
    assert not (tmp_path / "cut").exists()


def test_ctrl_c_in_the_comparison_says_where_the_draws_are(type_in, folder, monkeypatch):
    stopped_at(monkeypatch, 2)
    words = ["y ~ 1 + x", "--data", folder / "rows.csv", "--loss", "squared", *FEW]
    status, out, err = type_in("gibbs", *words, "--out", "cut")
    assert (status, out) == (130, "")
    assert "interrupted; the draws are in cut/posterior.nc, without a report" in err


def test_ctrl_c_reports_the_draws_so_far_and_asks_for_no_more(type_in, folder, monkeypatch):
    calls = stopped_at(monkeypatch, 1, cut=True)
    words = ["y ~ 1 + x", "--data", folder / "rows.csv", "--loss", "squared", *FEW]
    status, out, err = type_in("gibbs", *words, "--out", "cut", "--json")
    assert (status, len(calls)) == (130, 1), err
    assert "interrupted; the draws so far were written" in err
    found = strict(out)
    assert found["interrupted"] is True
    ends = [row["upper_uncalibrated"] for row in found["coefficients"]]
    assert ends == [None, None]
    assert "Interrupted by hand" in Path("cut/report.html").read_text()


def test_what_cannot_be_shown_after_sampling_leaves_nothing(type_in, folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no figure")

    monkeypatch.setattr("hakari.inference.gibbs.command.write_run", refuse)
    words = ["y ~ 1 + x", "--data", folder / "rows.csv", "--loss", "squared", *FEW]
    status, out, err = type_in("gibbs", *words, "--out", "answer")
    assert (status, out) == (2, "")
    assert "hakari: no figure" in err
    assert not (tmp_path / "answer").exists()
