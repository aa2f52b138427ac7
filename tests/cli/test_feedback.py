"""`hakari feedback` from a file to numbers, and what a user's mistakes look like."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hakari.inference as hi
from hakari import feedback_cli
from hakari.inference.bidirectional.command import command_line
from hakari.inference.bidirectional.features import RandomFourier
from hakari.inference.bidirectional.model import BidirectionalEffects, Method
from hakari.inference.bidirectional.study import Study
from hakari.inference.sampling import generator

from .conftest import hakari
from .test_demo import Page, needs_browser, opened

ASKED = ["--y1", "p", "--y2", "q", "--covariates", "x", "z", "--features", 20]


def frame(n, strength, seed, a=0.5, b=0.4):
    draw = generator(seed, "feedback")
    x, z = draw.uniform(size=(2, n))
    e1, e2 = draw.standard_normal((2, n)) * np.exp(strength / 2 * np.stack([2 * x - 1, 1 - 2 * x]))
    d = 1 - a * b
    return pd.DataFrame({"p": (e1 + a * e2) / d + x, "q": (e2 + b * e1) / d - x, "x": x, "z": z})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows")
    rows = frame(3000, 1.5, 1)
    rows = rows.assign(g=np.where(rows["x"] > 0.5, "wild", "calm"), one=1.0)
    rows.to_csv(place / "rows.csv", index=False)
    rows.assign(p=rows["p"].where(rows.index != 7)).to_csv(place / "gap.csv", index=False)
    rows.head(300).to_csv(place / "few.csv", index=False)
    frame(2000, 0.0, 9).to_csv(place / "flat.csv", index=False)
    frame(1500, 0.12, 5).to_csv(place / "weak.csv", index=False)
    return place


def strict(text):
    """Parsed JSON; NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture(scope="module")
def done(folder):
    words = ["--data", "rows.csv", *ASKED, "--bootstraps", 40, "--level", 0.9, "--out", "text"]
    return hakari("feedback", *words, cwd=folder)


# --- the command --------------------------------------------------------------------------


def test_the_last_line_is_the_report_and_the_folder_is_whole(done, folder):
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "text/report.html"
    names = ["config.toml", "effects.csv", "model.npz", "posterior.nc", "report.html"]
    assert sorted(p.name for p in (folder / "text").iterdir()) == names
    said = " ".join(done.stdout.split())
    assert "• One more of q moves p by 0." in said
    assert "|ab| < 1: feedback dies out. The other root, 2." in said
    assert "the 90% Anderson-Rubin set holds q on p from" in said
    assert "Least squares of each equation alone gives" in said


def test_numbers_are_those_of_the_library(done, folder):
    assert done.returncode == 0, done.stderr
    shown = pd.read_csv(folder / "text" / "effects.csv", index_col=0)
    model = BidirectionalEffects("p", "q", ("x", "z"), RandomFourier(20, 1), bootstraps=40, seed=1)
    effects = model.fit(folder / "rows.csv").effects()
    assert list(shown.index) == ["q on p", "p on q"]
    np.testing.assert_allclose(shown["estimate"], effects.estimate, rtol=1e-10)
    np.testing.assert_allclose(shown["std_error"], effects.std_error, rtol=1e-10)
    np.testing.assert_allclose(shown[["lower", "upper"]], effects.interval(0.9), rtol=1e-10)
    np.testing.assert_allclose(shown["other_root"], effects.other_root, rtol=1e-10)
    kept = effects.confidence_set(0.9)
    ends = [kept.a[0], kept.b[0]]
    np.testing.assert_allclose(shown[["set_lower", "set_upper"]], ends, rtol=1e-6)
    draws = hi.load(folder / "text" / "posterior.nc")["posterior"]["effect"]
    np.testing.assert_allclose(draws[0], effects.draws, rtol=1e-10)
    again = BidirectionalEffects.load(folder / "text" / "model.npz")
    assert again.effects().estimate == pytest.approx(effects.estimate, rel=1e-12)


def test_least_squares_alone_is_that_of_the_residuals(done, folder):
    """By Frisch, Waugh and Lovell, with a mean that is linear in x here."""
    shown = pd.read_csv(folder / "text" / "effects.csv", index_col=0)["single_equation"]
    rows = pd.read_csv(folder / "rows.csv")
    for label, (y, other) in {"q on p": ("p", "q"), "p on q": ("q", "p")}.items():
        X = np.column_stack([rows[other], np.ones(len(rows)), rows["x"]])
        theirs = np.linalg.lstsq(X, rows[y], rcond=None)[0][0]
        assert shown[label] == pytest.approx(theirs, abs=0.01)
        assert shown[label] > 0.6


def test_config_and_report_say_what_was_done(done, folder):
    config = tomllib.loads((folder / "text" / "config.toml").read_text())
    assert config["command"] == "feedback"
    assert config["model"]["covariates"] == ["x", "z"]
    assert (config["model"]["level"], config["model"]["features"]) == (0.9, 20)
    assert config["rows"]["rows"] == 3000
    assert config["rows"]["streamed"] is False
    assert {"hakari", "python", "numba"} <= set(config["versions"])
    report = (folder / "text" / "report.html").read_text()
    headings = Page(report).headings
    assert headings == [
        "p and q", "Question", "What the data say", "Both effects", "Can the data tell?",
        "Diagnostics", "How to repeat",
    ]  # fmt: skip
    assert report.count("data:image/svg") == 2
    line = "hakari feedback --data rows.csv --y1 p --y2 q --covariates x z --features 20"
    assert f"{line} --bootstraps 40 --level 0.9" in report


@needs_browser
def test_a_browser_opens_the_report(done, folder, tmp_path):
    dom, console, outside = opened(folder / "text" / "report.html", tmp_path / "browser")
    assert "<title>p and q: effects on each other</title>" in dom
    assert (console, outside) == ([], set())


def test_every_option_that_is_not_at_its_default_is_in_the_command():
    study = Study(
        "a b.csv", "p", "q", ("x",), polynomial=2, restrict="b=0", one_pass=True, half_life=5e4,
        anyway=True, seed=3,
    )  # fmt: skip
    assert command_line(study) == (
        "hakari feedback --data 'a b.csv' --y1 p --y2 q --covariates x --polynomial 2 --restrict "
        "b=0 --one-pass --half-life 50000.0 --anyway --seed 3"
    )


def test_the_json_of_an_answer(type_in, folder):
    status, out, err = type_in("feedback", "--data", folder / "rows.csv", *ASKED, "--json")
    assert status == 0, err
    assert out.count("\n") == 1
    found = strict(out)
    assert [row["effect of"] for row in found["effects"]] == ["q on p", "p on q"]
    for row, truth, other in zip(found["effects"], (0.5, 0.4), (2.5, 2.0), strict=True):
        assert abs(row["estimate"] - truth) < 4 * row["std_error"] < 0.2
        assert row["other_root"] == pytest.approx(other, rel=0.1)
    assert found["set"]["kind"] == "bounded"
    assert found["set"]["a"] == [[found["effects"][0][f"set_{e}"] for e in ("lower", "upper")]]
    assert found["rule"] == "|ab| < 1: feedback dies out"
    told = found["identification"]
    assert (told["identified"], told["reasons"]) == (True, [])
    assert set(told["tests"]["rank of the moments"]) == {"statistic", "df", "p_value"}
    assert found["J"]["df"] == 1
    assert found["J"]["p_value"] > 0.001
    assert found["rows"] == 3000
    assert found["rows_per_second"] == pytest.approx(3000 / found["seconds"])
    assert (found["alarm"], found["interrupted"], found["method"]) == (None, False, "moments")
    assert found["report"] == "runs/feedback/report.html"


def test_what_the_data_cannot_tell_is_said_and_is_no_error(type_in, folder):
    words = ["--data", folder / "flat.csv", *ASKED]
    status, out, err = type_in("feedback", *words, "--out", "plain")
    assert status == 0, err
    said = " ".join(out.split())
    assert "• The data cannot tell the effect of q on p from that of p on q: no sign that" in said
    assert "Anderson-Rubin set holds" in said
    status, out, _ = type_in("feedback", *words, "--json", "--out", "json")
    found = strict(out)
    assert status == 0
    assert [row["estimate"] for row in found["effects"]] == [None, None]
    assert found["identification"]["identified"] is False
    assert found["set"]["kind"] == "unbounded"
    assert found["set"]["reaches"]
    assert found["set"]["text"].startswith("95% Anderson-Rubin set with |ab| ≤ 1: a from")
    assert "The data cannot tell" in Path("plain/report.html").read_text()


def test_anyway_shows_a_number_with_a_warning(type_in, folder):
    words = ["--data", folder / "weak.csv", *ASKED, "--anyway", "--json"]
    status, out, err = type_in("feedback", *words)
    assert status == 0, err
    found = strict(out)
    assert found["identification"]["identified"] is False
    assert all(abs(row["estimate"]) < 2 for row in found["effects"])
    assert any("shown because it was asked for" in note for note in found["notes"])


def test_regimes_instead_of_covariates(type_in, folder):
    words = ["--data", folder / "rows.csv", "--y1", "p", "--y2", "q", "--regimes", "g"]
    status, out, err = type_in("feedback", *words, "--covariates", "x", "--json", "--out", "r")
    assert status == 0, err
    found = strict(out)
    assert "constant ratio, features" in found["identification"]["tests"]
    for row, truth in zip(found["effects"], (0.5, 0.4), strict=True):
        assert abs(row["estimate"] - truth) < 4 * row["std_error"] < 0.4
    assert "The log of the ratio in each regime" in Path("r/report.html").read_text()


def test_the_likelihood_by_online_steps(type_in, folder):
    words = ["--data", folder / "rows.csv", *ASKED, "--method", "online-qml", "--json"]
    status, out, err = type_in("feedback", *words)
    assert status == 0, err
    found = strict(out)
    assert found["method"] == "online-qml"
    for row, truth in zip(found["effects"], (0.5, 0.4), strict=True):
        assert abs(row["estimate"] - truth) < 5 * row["std_error"] < 0.25


# --- mistakes -----------------------------------------------------------------------------


def test_help_shows_every_option_and_imports_no_half():
    code = """
import sys
from hakari.cli import app
app(["feedback", "--help"], result_action="return_value")
print("HEAVY", sorted({"numpy", "pandas", "matplotlib"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    for option in (
        "y1", "y2", "covariates", "regimes", "features", "length-scale", "polynomial", "method",
        "covariance",
        "restrict", "root", "one-pass", "half-life", "window", "resume", "bootstraps", "anyway",
        "missing", "level", "seed", "out", "json",
    ):  # fmt: skip
        assert f"--{option}" in shown
    assert shown.count("For example") == 4
    assert shown.splitlines()[-1] == "HEAVY []"


MISTAKES = {
    "no file": (["--data", "lost.csv"], "no data at lost.csv"),
    "column": (["--y2", "w"], "no column 'w' in the data"),
    "text": (["--covariates", "g"], "g does not hold numbers"),
    "twice": (["--covariates", "p"], "p named twice"),
    "gap": (["--data", "gap.csv"], "1 rows with missing values"),
    "few": (["--data", "few.csv"], "300 rows: at least 1,000 are needed"),
    "outcome": (["--y1", "one"], "y1 is 1 in all rows: it has no effect to find"),
    "level": (["--level", "95"], "level 95 must lie between 0 and 1"),
    "seed": (["--seed", "-1"], "seed -1"),
    "features": (["--features", "21"], "count 21: cosines and sines come in pairs"),
    "length": (["--length-scale", "long"], "length_scale 'long'"),
    "both": (["--polynomial", "2", "--features", "40"], "a polynomial has neither"),
    "mirror": (["--restrict", "b=0", "--root", "mirror"], "the mirror is infinite"),
    "half-life": (["--half-life", "9"], "half_life 9.0: at least 1,024 rows are needed"),
    "window": (["--half-life", "5000", "--window", "5000"], "give one of them"),
    "method": (["--method", "online-qml", "--covariance", "constant"], "method 'online-qml' with"),
    "bootstraps": (["--bootstraps", "-1"], "bootstraps -1"),
    "root": (["--root", "both"], "both"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, type_in, folder, tmp_path):
    for name in ("rows.csv", "gap.csv", "few.csv"):
        (tmp_path / name).symlink_to(folder / name)
    words, told = MISTAKES[mistake]
    base = {"--data": "rows.csv", "--y1": "p", "--y2": "q", "--covariates": "x", "--out": "answer"}
    base |= dict(zip(words[::2], words[1::2], strict=True))
    status, out, err = type_in("feedback", *(word for pair in base.items() for word in pair))
    assert (status, out) == (2, "")
    assert err.startswith("hakari: ")
    assert err.count("\n") == 1
    assert told in err
    assert not (tmp_path / "answer").exists()


def test_choices_are_those_of_the_library():
    assert feedback_cli.Method.__args__ == Method.__args__


def test_no_covariates_and_no_regimes(type_in, folder):
    status, _, err = type_in("feedback", "--data", folder / "rows.csv", "--y1", "p", "--y2", "q")
    assert status == 2
    assert "no covariates and no regimes" in err


def test_what_cannot_be_shown_leaves_nothing(type_in, folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no figure")

    monkeypatch.setattr("hakari.inference.bidirectional.command.write_run", refuse)
    status, out, err = type_in("feedback", "--data", folder / "rows.csv", *ASKED, "--out", "cut")
    assert (status, out) == (2, "")
    assert "hakari: no figure" in err
    assert not (tmp_path / "cut").exists()
