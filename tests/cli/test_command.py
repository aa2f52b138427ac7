"""`hakari` itself: help, version, and what a user's mistakes look like."""

import subprocess
import sys

import pytest

from hakari import __version__, cli
from hakari.inference.sampling import METHODS

from .conftest import hakari

FORMULA = "y ~ 1 + other + [x ~ z]"


def test_help_lists_the_commands(tmp_path):
    done = hakari("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "iv" in done.stdout
    assert "demo" in done.stdout
    assert done.stderr == ""


def test_help_of_iv_shows_every_option_with_examples(tmp_path):
    shown = hakari("iv", "--help", cwd=tmp_path).stdout
    options = [
        "prior",
        "covariance",
        "centred",
        "weights",
        "missing",
        "weighting",
        "no-determinant",
    ]
    options += [
        "no-determinant",
        "method",
        "draws",
        "chains",
        "seed",
        "level",
        "out",
        "resume",
        "json",
        "data",
    ]
    for option in options:
        assert f"--{option}" in shown
    assert shown.count("For example") == 4
    assert "standard deviation, not" in " ".join(shown.split())


def test_version(tmp_path):
    assert hakari("--version", cwd=tmp_path).stdout.strip() == __version__


@pytest.mark.parametrize("words", [["--help"], ["iv", "--help"], ["demo", "--help"], ["--version"]])
def test_help_imports_no_half(words):
    code = f"""
import sys
from hakari.cli import main
try:
    main({words!r})
except SystemExit:
    pass
heavy = {{"numpy", "numba", "pandas", "torch", "matplotlib"}}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_methods_are_those_of_the_sampler():
    assert cli.Method.__args__ == METHODS


EXTRAS = [  # the missing module, the module that asks for it, the extra
    ("numba", "hakari.inference.density", "inference"),
    ("torch", "hakari.training.model", "training"),
    ("tokenizers.models", "hakari.cli", "training"),
    ("pyarrow", "hakari.inference.tables", "inference"),
    ("pyarrow", "hakari.training.metrics", "training"),
]


@pytest.mark.parametrize(("missing", "asking", "extra"), EXTRAS)
def test_missing_extra_says_what_to_install(missing, asking, extra, type_in, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # as when it is not installed
    ask = f"def app(*_, **__):\n    import {missing}"
    exec(ask, scope := {"__name__": asking})
    monkeypatch.setattr(cli, "app", scope["app"])
    status, out, err = type_in("iv")
    assert (status, out) == (2, "")
    assert err == f'hakari: {missing} is not installed: pip install "hakari[{extra}]"\n'


MISTAKES = {
    "no data": (["y ~ 1 + [x ~ z]"], "--data"),
    "unknown option": ([FORMULA, "--data", "strong.csv", "--dta", "a"], "--dta"),
    "unknown method": ([FORMULA, "--data", "strong.csv", "--method", "nuts"], "nuts"),
    "no file": ([FORMULA, "--data", "lost.csv"], "no data at lost.csv"),
    "unknown column": (["y ~ 1 + othr + [x ~ z]", "--data", "strong.csv"], "did you mean 'other'?"),
    "bad formula": (["y 1 + x", "--data", "strong.csv"], "is not understood"),
    "missing values": ([FORMULA, "--data", "gaps.csv"], "--missing drop"),
    "too few instruments": (
        ["y ~ 1 + [x + other ~ z]", "--data", "strong.csv"],
        "add 1 instrument",
    ),
    "covariance": ([FORMULA, "--data", "strong.csv", "--covariance", "hc3"], "hc3"),
    "level": ([FORMULA, "--data", "strong.csv", "--level", "90"], "level 90"),
    "draws": ([FORMULA, "--data", "strong.csv", "--draws", "0"], "draws 0"),
    "prior": ([FORMULA, "--data", "strong.csv", "--prior", "gauss(0,1)"], "gauss(0,1)"),
    "prior spread": ([FORMULA, "--data", "strong.csv", "--prior", "x=normal(0,-1)"], "-1"),
    "prior name": ([FORMULA, "--data", "strong.csv", "--prior", "w=normal(0,1)"], "'w'"),
    "two priors": (
        [FORMULA, "--data", "strong.csv", "--prior", "x=normal(0,1)", "--prior", "x=flat"],
        "two priors on 'x'",
    ),
    "improper": ([FORMULA, "--data", "weak.csv", "--prior", "flat"], "--prior weak"),
    "resume": ([FORMULA, "--data", "strong.csv", "--resume", "lost"], "no posterior.nc in lost"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, type_in, tables, tmp_path):
    for name in ("strong", "gaps", "weak"):
        (tmp_path / f"{name}.csv").symlink_to(tables / f"{name}.csv")
    words, told = MISTAKES[mistake]
    status, out, err = type_in("iv", *words, "--out", "answer")
    assert (status, out) == (2, "")
    assert err.startswith("hakari: ")
    assert err.count("\n") == 1
    assert told in err
    assert not (tmp_path / "answer").exists()


def test_a_folder_that_holds_something_is_refused_before_sampling(
    type_in, tables, tmp_path, monkeypatch
):
    (tmp_path / "answer").mkdir()
    (tmp_path / "answer" / "mine.txt").write_text("precious")
    monkeypatch.setattr("hakari.inference.iv_command.analyse", pytest.fail)
    status, _, err = type_in("iv", FORMULA, "--data", tables / "strong.csv", "--out", "answer")
    assert status == 2
    assert err == (
        "hakari: answer exists and is not empty: give --out another name, or remove it first\n"
    )
    assert [p.name for p in (tmp_path / "answer").iterdir()] == ["mine.txt"]
