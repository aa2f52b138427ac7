"""What a resumed run reads is what it began with, whatever has become of the files."""

from __future__ import annotations

import hashlib
import shutil

import pytest

SETTINGS = [
    "batch=2",
    "length=16",
    "steps=2",
    "model.dim=16",
    "model.layers=1",
    "model.heads=1",
    "model.kv_heads=1",
    "model.hidden=16",
    "data.vocabulary=300",
    "data.validation=0.2",
]


@pytest.fixture
def begun(type_in, tmp_path):
    """(notes, cache, run folder, hash of its tokenizer) of a run of two steps."""
    notes, cache, run = tmp_path / "notes", tmp_path / "cache", tmp_path / "run"
    notes.mkdir()
    for i in range(20):
        (notes / f"{i}.txt").write_text(f"note {i}: " + "the quick brown fox " * (i + 3))
    (tmp_path / "small.toml").write_text("")
    changes = [*SETTINGS, f'data.text=["{notes}"]', f"data.cache={cache}"]
    arguments = [part for change in changes for part in ("--set", change)]
    status, _, err = type_in("train", str(tmp_path / "small.toml"), *arguments, "--out", str(run))
    assert status == 0, err
    return notes, cache, run, tokenizer(run)


def tokenizer(run):
    return hashlib.sha256((run / "tokenizer.json").read_bytes()).hexdigest()


def go_on(type_in, run, steps):
    return type_in("train", "--resume", str(run), "--set", f"steps={steps}")


def test_new_files_do_not_change_its_tokens_or_its_tokenizer(begun, type_in):
    notes, _, run, before = begun
    (notes / "new.txt").write_text("zebras sphinx jukebox vexing " * 50)
    status, _, err = go_on(type_in, run, 4)
    assert (status, tokenizer(run)) == (0, before), err


def test_shards_that_are_gone_are_made_again_if_the_text_is_the_same(begun, type_in):
    notes, cache, run, before = begun
    shutil.rmtree(cache)
    status, _, err = go_on(type_in, run, 4)
    assert (status, tokenizer(run)) == (0, before), err
    shutil.rmtree(cache)
    (notes / "3.txt").write_text("another note altogether " * 9)
    status, _, err = go_on(type_in, run, 6)
    assert status == 2
    assert "is not what" in err
    assert tokenizer(run) == before
