"""`hakari feedback` in one pass: stopped, and gone on with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hakari.inference import tables
from hakari.inference.bidirectional.command import write_run
from hakari.inference.bidirectional.features import RandomFourier
from hakari.inference.bidirectional.model import BidirectionalEffects
from hakari.inference.bidirectional.readings import Readings
from hakari.inference.bidirectional.study import MODEL, Study, find

from .test_demo import Page
from .test_feedback import ASKED, frame, strict

STREAM = [*ASKED, "--one-pass", "--missing", "drop"]
BLOCK = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("stream")
    frame(3000, 1.5, 1).to_csv(place / "rows.csv", index=False)
    long = frame(27_000, 1.5, 2)
    long.loc[long.index % 1000 == 5] = np.nan
    long.to_parquet(place / "long.parquet")
    return place


def stopped_after(monkeypatch, blocks):
    """Ctrl-C when so many blocks have been learned from."""
    learn, calls = BidirectionalEffects.partial_fit, []

    def stopping(model, data):
        if len(calls) == blocks:
            raise KeyboardInterrupt
        calls.append(1)
        return learn(model, data)

    monkeypatch.setattr(BidirectionalEffects, "partial_fit", stopping)


@pytest.fixture(scope="module")
def whole(folder):
    """The stream without a stop, by the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK_ROWS", BLOCK)
        features = RandomFourier(20, 1)
        model = BidirectionalEffects("p", "q", ("x", "z"), features, missing="drop", seed=1)
        for first in range(0, 27_000, BLOCK):
            rows = pd.read_parquet(folder / "long.parquet").iloc[first : first + BLOCK]
            model.partial_fit(rows)
    return model


@pytest.mark.parametrize("blocks", [2, 8])
def test_interrupted_and_resumed_is_as_if_it_had_not_been(
    blocks, type_in, folder, whole, monkeypatch
):
    """Stopped before and after the warm-up of 20,000 rows is full."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", BLOCK)
    words = ["feedback", "--data", folder / "long.parquet", *STREAM, "--json"]
    with monkeypatch.context() as patch:
        stopped_after(patch, blocks)
        status, out, err = type_in(*words, "--out", "cut")
    assert status == 130
    assert err.endswith("hakari: interrupted; go on with --resume cut\n")
    cut = strict(out)
    assert (cut["interrupted"], cut["rows"]) == (True, blocks * (BLOCK - 3))
    assert "Interrupted by hand" in Path("cut/report.html").read_text()
    status, out, err = type_in(*words, "--resume", "cut", "--out", "on")
    assert status == 0, err
    found = strict(out)
    assert (found["interrupted"], found["rows"]) == (False, 27_000 - 27)
    effects = whole.effects()
    shown = pd.DataFrame(found["effects"])
    np.testing.assert_allclose(shown["estimate"], effects.estimate, rtol=1e-12)
    np.testing.assert_allclose(shown["std_error"], effects.std_error, rtol=1e-12)
    np.testing.assert_allclose(pd.read_csv("on/path.csv"), whole.path, rtol=1e-12)
    assert "Along the stream" in Page(Path("on/report.html").read_text()).headings


def test_ctrl_c_before_a_thousand_rows_leaves_nothing(type_in, folder, tmp_path, monkeypatch):
    stopped_after(monkeypatch, 0)
    words = ["feedback", "--data", folder / "long.parquet", *STREAM]
    status, out, err = type_in(*words, "--out", "cut")
    assert (status, out) == (130, "")
    assert err.endswith("hakari: interrupted; nothing was written\n")
    assert not (tmp_path / "cut").exists()


def test_ctrl_c_in_the_report_says_where_the_model_is(type_in, folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hakari.inference.bidirectional.command.write_run", stop)
    status, out, err = type_in("feedback", "--data", folder / "rows.csv", *ASKED, "--out", "cut")
    assert (status, out) == (130, "")
    assert "interrupted; the model is in cut/model.npz, without a report" in err
    assert BidirectionalEffects.load(tmp_path / "cut" / "model.npz").rows == 3000


def test_five_passes_that_ctrl_c_stopped_go_on(type_in, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 1500)
    words = ["feedback", "--data", folder / "rows.csv", *ASKED, "--json"]
    status, out, err = type_in(*words, "--out", "whole")
    whole = strict(out)
    with monkeypatch.context() as patch:
        after = Readings.after

        def stopped(readings, *more):
            if (readings.done, readings.blocks) == (2, 1):
                raise KeyboardInterrupt
            return after(readings, *more)

        patch.setattr(Readings, "after", stopped)
        status, out, err = type_in(*words, "--out", "cut")
    assert (status, out) == (130, "")
    kept = "the model is in cut/model.npz, without a report; go on with --resume cut\n"
    assert err.endswith(f"hakari: interrupted; {kept}")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["model.npz"]
    status, out, err = type_in(*words, "--resume", "cut", "--out", "on")
    assert status == 0, err
    found = strict(out)
    for name in ("effects", "identification", "rows", "J", "set"):
        assert found[name] == whole[name]


@pytest.fixture(scope="module")
def runs(folder):
    """Runs to go on from: one pass, and all at once."""
    study = Study(folder / "rows.csv", "p", "q", ("x", "z"), features=20)
    for name, one_pass in (("once", True), ("rest", False)):
        place = folder / name
        place.mkdir()
        asked = replace(study, one_pass=one_pass)
        write_run(find(asked, keep=lambda model, place=place: model.save(place / MODEL)), place)
    return folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume", "lost"], "no model at lost/model.npz"),
        (["--resume", "rest"], "rest has read its data several times"),
        (["--resume", "once"], "rows.csv has no rows after the 3,000 that once has learned from"),
        (["--resume", "once", "--seed", 2], "features is RandomFourier(count=20, seed=1"),
        (["--resume", "once", "--covariance", "constant"], "covariance is 'zero' in once and"),
    ],
)
def test_what_cannot_be_resumed(words, told, type_in, runs, tmp_path):
    for name in ("rows.csv", "once", "rest"):
        (tmp_path / name).symlink_to(runs / name)
    status, out, err = type_in("feedback", "--data", "rows.csv", *ASKED, *words, "--out", "next")
    assert (status, out) == (2, "")
    assert told in err
    assert not (tmp_path / "next").exists()
