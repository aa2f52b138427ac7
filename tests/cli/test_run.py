"""The run folder: names, refusals, and a config.toml that reads back as it was written."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as some

from hakari import run


def test_default_names_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(run.new_run("iv")) for _ in range(3)] == ["runs/iv", "runs/iv-2", "runs/iv-3"]


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    assert run.new_run("iv", tmp_path / "mine") == tmp_path / "mine"
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty: give --out another name"):
        run.new_run("iv", tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is a file: give --out a folder"):
        run.new_run("iv", tmp_path / "mine" / "file")


def test_parents_are_made(tmp_path):
    assert run.new_run("iv", tmp_path / "a" / "b").is_dir()


def test_discard_takes_only_empty_folders(tmp_path):
    empty, full = run.new_run("iv", tmp_path / "empty"), run.new_run("iv", tmp_path / "full")
    (full / "file").touch()
    run.discard(empty)
    run.discard(full)
    assert not empty.exists()
    assert full.exists()


TEXT = some.text(some.characters(exclude_categories=["Cs"]))
PLAIN = some.one_of(
    some.booleans(), some.integers(-(2**60), 2**60), some.floats(allow_nan=False), TEXT
)
VALUES = some.one_of(PLAIN, some.lists(TEXT), some.lists(some.dictionaries(TEXT, PLAIN)))


@given(some.dictionaries(TEXT, some.one_of(VALUES, some.dictionaries(TEXT, VALUES))))
def test_what_is_written_is_read(config):
    assert tomllib.loads(run.to_toml(config)) == config


def test_none_is_left_out_and_the_unknown_refused():
    assert run.to_toml({"weights": None}) == ""
    with pytest.raises(TypeError, match=r"of type set has no place in config\.toml"):
        run.to_toml({"a": {1}})


def test_config_of_a_folder(tmp_path):
    run.write_config(tmp_path, {"command": "iv", "model": {"level": 0.9}})
    assert run.read_config(tmp_path) == {"command": "iv", "model": {"level": 0.9}}
    with pytest.raises(FileNotFoundError, match="it is not the folder of a run"):
        run.read_config(tmp_path / "other")


def test_versions_leave_out_what_is_not_installed():
    assert set(run.versions("numpy", "no-such-package")) == {"python", "hakari", "numpy"}
