"""Saving to an object store: no rename, so COMMIT alone decides. fsspec's memory stands for one."""

from __future__ import annotations

import contextlib
import json
import uuid
from unittest.mock import patch

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hakari.training import checkpoint
from hakari.training.checkpoint import commit, convert, open_checkpoint, storage
from hakari.training.checkpoint.storage import ObjectFolder, open_folder
from tests.distributed.faults import checked, pieces


@pytest.fixture
def store():
    """A bucket that is empty, and gone afterwards."""
    url = f"memory://{uuid.uuid4().hex}/run"
    yield url
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def save(url: str, step: int, **options: int) -> None:
    checkpoint.save(
        url, None, extra_state={"step": step}, pieces=pieces(step), step=step, **options
    )


def objects(url: str) -> list[str]:
    return open_folder(url).names()


def test_it_is_saved_loaded_and_pruned(store):
    assert checkpoint.latest(store) is None
    for step in (1, 2, 3):
        save(store, step, keep=2)
        assert checked(store) == step
    assert checkpoint.steps(store) == [2, 3]
    assert checkpoint.latest(store) == f"{store}/step-00000003"
    assert not [name for name in objects(store) if "step-00000001" in name or "ready" in name]
    assert fsspec.filesystem("memory").cat_file(f"{store}/LATEST".removeprefix("memory:/")) == (
        b"step-00000003\n"
    )


def test_it_needs_no_rename(store):
    with patch.object(ObjectFolder, "rename", side_effect=AssertionError):
        save(store, 1)
    assert isinstance(open_folder(store), ObjectFolder)


def test_a_step_is_saved_once(store):
    save(store, 1)
    with pytest.raises(FileExistsError, match=r"run/step-00000001 exists"):
        save(store, 1)
    assert checked(store) == 1


@pytest.mark.parametrize("name", ["manifest.json", "COMMIT", "ready-00000.json"])
def test_half_a_save_is_ignored_and_made_good(store, name):
    """Whatever is written last, nothing counts without COMMIT; the same step can be saved again."""
    save(store, 1)
    real = ObjectFolder.write

    def write(self: ObjectFolder, each: str, data: bytes) -> None:
        if each == name:
            raise KeyboardInterrupt  # as if the process had died: nothing is cleaned up
        real(self, each, data)

    with (
        patch.object(ObjectFolder, "write", write),
        patch.object(commit, "_fail"),
        pytest.raises(KeyboardInterrupt),
    ):
        save(store, 2)
    assert checked(store) == 1
    assert checkpoint.leftovers(store) == ["step-00000002"]
    half = set(objects(f"{store}/step-00000002"))
    save(store, 2)
    assert checked(store) == 2
    assert not half & {*objects(f"{store}/step-00000002")} - {"manifest.json"}
    assert checkpoint.leftovers(store) == []


def test_what_failed_is_taken_back(store):
    save(store, 1)
    with (
        patch.object(commit.manifests, "write", side_effect=OSError("no quota")),
        pytest.raises(OSError, match="no quota"),
    ):
        save(store, 2)
    assert checked(store) == 1
    assert not [name for name in objects(store) if "step-00000002/data" in name]
    assert checkpoint.clear_leftovers(store) == ["step-00000002"]


@pytest.mark.parametrize("step", ["advance", "prune"])
def test_an_error_after_the_commit_does_not_take_it_back(store, step):
    save(store, 1)
    with (
        patch.object(commit, step, side_effect=OSError("no quota")),
        pytest.warns(UserWarning, match=r"step-00000002 is saved, but could not .*no quota"),
    ):
        save(store, 2, keep=1)
    assert checked(store) == 2


def test_pruning_keeps_the_last_whole_one(store):
    for step in (1, 2, 3):
        save(store, step)
    damaged = open_folder(f"{store}/step-00000003")
    damaged.remove(next(name for name in damaged.names() if name.startswith("data/")))
    save(store, 4)
    from hakari.training.checkpoint.retention import prune

    assert prune(store, 2) == ["step-00000001"]
    assert checkpoint.steps(store) == [2, 3, 4]
    assert prune(store, 1) == ["step-00000003", "step-00000002"]
    assert checked(store) == 4


def test_a_removal_that_is_cut_off_leaves_no_half_checkpoint(store):
    for step in (1, 2):
        save(store, step)
    real, removed = ObjectFolder.remove, []

    def remove(self: ObjectFolder, name: str) -> None:
        if len(removed) == 1:
            raise KeyboardInterrupt
        removed.append(name)
        real(self, name)

    with patch.object(ObjectFolder, "remove", remove), pytest.raises(KeyboardInterrupt):
        checkpoint.prune(store, 1)
    assert removed == ["step-00000001/COMMIT"]
    assert checkpoint.steps(store) == [2]
    assert checkpoint.leftovers(store) == ["step-00000001"]


def test_a_write_that_fails_is_discarded_and_not_completed(store):
    folder = open_folder(store)
    with (
        patch("fsspec.implementations.memory.MemoryFile.discard") as discarded,
        patch("fsspec.implementations.memory.MemoryFile.close") as completed,
        contextlib.suppress(RuntimeError),
        folder.create("x") as file,
    ):
        file.write(b"half")
        raise RuntimeError
    discarded.assert_called_once()
    completed.assert_not_called()


def test_it_is_converted_from_and_to_an_object_store(store, tmp_path):
    save(str(tmp_path), 5)
    convert(open_checkpoint(tmp_path), store)
    assert json.loads(json.dumps(open_checkpoint(store).step)) == 5
    convert(open_checkpoint(store), tmp_path / "back")
    source, back = (open_checkpoint(where) for where in (tmp_path, tmp_path / "back"))
    for key in source.tensors:
        assert (source.array(key) == back.array(key)).all()


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="nowhere"):
        storage.open_folder("nowhere://x")
