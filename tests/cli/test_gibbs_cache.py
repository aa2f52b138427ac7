"""`hakari gibbs --cache`: what an interrupted call has computed is there for the next one."""

import json
import tomllib

import numpy as np
import pandas as pd

import hakari.inference as hi
from hakari.inference.gibbs import cloud
from hakari.inference.gibbs.command import command_line
from hakari.inference.gibbs.study import Study

FEW = ["--loss", "squared", "--replicates", 200, "--draws", 300, "--chains", 2, "--level", 0.9]


def test_a_second_call_finds_the_losses_of_the_first(type_in, monkeypatch, tmp_path):
    x, e = np.random.default_rng(3).standard_normal((2, 100))
    pd.DataFrame({"y": x + e, "x": x}).to_csv("rows.csv", index=False)
    words = ["gibbs", "y ~ 1 + x", "--data", "rows.csv", *FEW, "--cache", "kept", "--json"]
    first = type_in(*words, "--out", "a")
    assert first[0] == 0, first[2]
    files = sorted((tmp_path / "kept").iterdir())
    assert files

    def computed(*_):
        raise AssertionError("losses are computed again")

    monkeypatch.setattr(cloud, "_products", computed)
    second = type_in(*words, "--out", "b")
    assert second[0] == 0, second[2]
    one, two = (json.loads(out) for _, out, _ in (first, second))
    assert two["learning_rate"] == one["learning_rate"]
    gibbs = hi.GibbsPosterior.from_formula(hi.losses.squared(), "y ~ 1 + x", "rows.csv")
    assert hi.calibrate(gibbs, 0.9, replicates=200, seed=1, cache="kept").method == "cloud"
    assert sorted((tmp_path / "kept").iterdir()) == files
    assert tomllib.loads((tmp_path / "a/config.toml").read_text())["calibration"]["cache"] == "kept"
    assert "--cache kept" in command_line(Study("y ~ 1 + x", "rows.csv", "squared", cache="kept"))


def test_a_cache_that_is_a_file_is_refused(type_in, tmp_path):
    pd.DataFrame({"y": [0.0, 1, 5, 2], "x": [1.0, 2, 3, 4]}).to_csv("rows.csv", index=False)
    (tmp_path / "kept").write_text("")
    words = ["gibbs", "y ~ 1 + x", "--data", "rows.csv", *FEW, "--cache", "kept"]
    status, _, err = type_in(*words)
    assert status != 0
    assert "cache kept is a file: give a folder" in err
    assert "Traceback" not in err
