"""What `save` refuses, what it only warns of, and what it does when others are in its way."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from hakari.training import checkpoint
from hakari.training.checkpoint import command, commit, retention, saving, storage
from hakari.training.checkpoint.retention import named
from hakari.training.checkpoint.storage import LocalFolder
from tests.distributed.faults import Faulty, in_memory


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


def net() -> nn.Module:
    return nn.Linear(2, 2)


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, net(), step=step)


# --- going back -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1])
def test_a_step_below_the_newest_is_refused_and_the_way_out_works(folder, keep):
    saved(folder, 10, 20, 30)
    with pytest.raises(
        FileExistsError,
        match=rf"^{folder}/step-00000030 exists, and is newer than step 15: save to another .* to "
        rf"go on from an older step N, .*\(hakari checkpoint prune {folder} --after N\)$",
    ):
        checkpoint.save(folder, net(), step=15, keep=keep)
    assert checkpoint.steps(folder) == [10, 20, 30]
    assert command.prune(str(folder), None, False, False, 10) == 0
    assert checkpoint.steps(folder) == [10]
    assert checkpoint.latest(folder) == f"{folder}/{named(10)}"
    assert (folder / "LATEST").read_text() == f"{named(10)}\n"
    checkpoint.save(folder, net(), step=15, keep=keep)
    assert checkpoint.latest(folder) == f"{folder}/{named(15)}"


def test_what_is_newer_and_not_complete_is_not_in_the_way(folder):
    saved(folder, 1, 9)
    (folder / named(9) / "COMMIT").unlink()
    saved(folder, 2)
    assert checkpoint.steps(folder) == [1, 2]


def test_newer_ones_go_only_if_a_whole_one_is_left(folder, capsys):
    saved(folder, 1, 2, 3)
    shutil.rmtree(folder / named(1) / "data")
    for step in (0, 1):
        with pytest.raises(ValueError, match=rf"no whole checkpoint of step {step} or before it"):
            command.prune(str(folder), None, False, False, step)
    with pytest.raises(ValueError, match=r"--keep removes old .* and --after new ones: give one"):
        command.prune(str(folder), 1, False, False, 2)
    capsys.readouterr()
    assert command.prune(str(folder), None, False, True, 2) == 0
    assert capsys.readouterr().out.startswith(f"would remove {named(3)} (")
    assert checkpoint.steps(folder) == [1, 2, 3]
    assert (folder / "LATEST").read_text() == f"{named(3)}\n"
    command.prune(str(folder), None, False, False, 2)
    assert checkpoint.steps(folder) == [1, 2]


# --- after the commit -----------------------------------------------------------------------

CLEANUP = {
    "move LATEST": "advance",
    "remove older checkpoints": "prune",
}


@pytest.mark.parametrize("what", CLEANUP)
def test_a_cleanup_that_fails_is_a_warning_and_the_next_save_tries_again(folder, what):
    saved(folder, 1, 2)
    broken = patch.object(commit, CLEANUP[what], side_effect=OSError(errno.EIO, "broken"))
    message = rf"{named(3)} is saved, but could not {what} \(OSError: .*broken\); the next save"
    with broken, pytest.warns(UserWarning, match=message):
        found = checkpoint.save(folder, net(), step=3, keep=1)
    assert found.wait() == f"{folder}/{named(3)}"
    assert 3 in checkpoint.steps(folder)
    checkpoint.save(folder, net(), step=4, keep=1)
    assert checkpoint.steps(folder) == [4]
    assert (folder / "LATEST").read_text() == f"{named(4)}\n"


def test_a_removal_that_fails_half_way_is_tried_again(folder):
    saved(folder, 1)
    with (
        patch.object(LocalFolder, "remove", side_effect=fails_for(".old-step-00000001")),
        pytest.warns(UserWarning, match="could not remove older checkpoints"),
    ):
        checkpoint.save(folder, net(), step=2, keep=1)
    assert checkpoint.leftovers(folder) == [".old-step-00000001"]
    checkpoint.save(folder, net(), step=3, keep=1)
    assert checkpoint.leftovers(folder) == []


def fails_for(name: str) -> Any:
    """`remove`, which fails for one name and does nothing else."""

    def remove(other: str) -> None:
        if other == name:
            raise OSError(errno.EBUSY, "busy")

    return remove


def test_a_warning_of_the_writer_is_told_when_its_answer_is_read(folder):
    (folder / "LATEST").mkdir()
    (folder / "LATEST/x").touch()
    found = checkpoint.save(folder, net(), step=1, asynchronous=True)
    with pytest.warns(UserWarning, match=r"is saved, but could not move LATEST"):
        assert found.wait() == f"{folder}/{named(1)}"


# --- the disk -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_place_that_cannot_be_written_is_said_to_be_so():
    with pytest.raises(OSError, match=r"^/proc/nowhere cannot be made: No such file") as caught:
        checkpoint.save("/proc/nowhere", net(), step=1)
    assert not isinstance(caught.value, checkpoint.SaveError)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_names_the_file_and_the_step(folder, call):
    full = Faulty(call, after=0 if call == "write" else 3, number=errno.ENOSPC, forever=True)
    with (
        patch.object(storage, "os", full),
        pytest.raises(OSError, match=rf"No space left on device: '{folder}/\.tmp-step-00000007-"),
    ):
        checkpoint.save(folder, net(), step=7)
    assert checkpoint.steps(folder) == []


def test_files_that_vanish_while_saving_hint_at_another_job(folder):
    write = commit.write_parts

    def vanish(place: Any, *arguments: Any) -> Any:
        found = write(place, *arguments)
        shutil.rmtree(place.where)
        return found

    with (
        patch.object(commit, "write_parts", vanish),
        pytest.raises(
            checkpoint.SaveError,
            match=rf"the save of step 1 lost its files \(.*\): another job may be saving into "
            rf"{folder}, or .*; give each job a folder of its own$",
        ),
    ):
        checkpoint.save(folder, net(), step=1)


# --- what is no module, optimizer or dense tensor -------------------------------------------


def test_state_dicts_are_refused(folder):
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match=r"^model is a OrderedDict: pass the module, not its s"):
        checkpoint.save(folder, model.state_dict(), step=1)
    with pytest.raises(TypeError, match=r"^optimizer is a dict: pass the optimizer itself"):
        checkpoint.save(folder, model, optimizer.state_dict(), step=1)
    saved(folder, 1)
    with pytest.raises(TypeError, match=r"^model is a OrderedDict: pass the module, not its s"):
        checkpoint.load(folder, model.state_dict())


def test_a_sparse_tensor_is_named(folder):
    model = net()
    model.register_buffer("graph", torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"^graph \(weight\) is a sparse tensor \(torch\.sparse_c"):
        checkpoint.save(folder, model, step=1)


# --- threads and told failures --------------------------------------------------------------


def test_threads_that_save_at_once_take_turns(folder):
    """Each to a folder of its own, all by the one writer; and several read one answer."""
    done: list[str] = []

    def work(number: int) -> None:
        found = checkpoint.save(folder / str(number), net(), step=1, asynchronous=True)
        readers = [threading.Thread(target=lambda: done.append(found.wait())) for _ in range(2)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(30)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = [f"{folder}/{number}/{named(1)}" for number in range(6)]
    assert sorted(done) == sorted(2 * expected)


@pytest.mark.parametrize("way", ["wait", "poll", "not at all"])
def test_a_failure_that_was_told_does_not_fail_the_next_save(folder, way):
    saved(folder, 1)
    with patch.object(saving, "_newer", return_value=None):
        found = checkpoint.save(folder, net(), step=1, asynchronous=True)
        while not found.done():
            pass
    if way == "not at all":
        with pytest.raises(checkpoint.SaveError, match=r"the last save failed on rank 0: .*exists"):
            checkpoint.save(folder, net(), step=2)
    else:
        with pytest.raises(checkpoint.SaveError, match="exists: another save made it meanwhile"):
            getattr(found, way)()
    saved(folder, 2)
    assert re.search("step-00000002", checkpoint.latest(folder) or "")


def test_old_names_of_removed_checkpoints_are_those_that_leftovers_finds():
    assert retention.OLD + named(7).removeprefix("step-") == f".old-{named(7)}"
