"""Runs of several processes are killed, run out of disk and get errors while they save.

Always: the newest checkpoint is whole and to the bit what its step had, no acknowledged save is
lost, and those who are left do not wait for ever.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from hakari.training import checkpoint
from tests.distributed.faults import (
    BROKEN,
    FULL,
    Cut,
    Faulty,
    Plan,
    World,
    checked,
    checked_one,
    cut_off,
    in_memory,
    started,
)


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


# --- signals --------------------------------------------------------------------------------


def campaign(folder: Path, seed: int, cuts: int, number: int = signal.SIGKILL) -> list[Cut]:
    """Runs that go on from one another's checkpoints, each cut off once."""
    chance, found, tries = random.Random(seed), list[Cut](), 0
    while len(found) < cuts:
        tries += 1
        assert tries < 3 * cuts + 10
        cut = cut_off(folder / "run", folder / f"meeting{tries}", chance, number)
        if cut:
            found.append(cut)
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "terminate"])
def test_a_run_that_is_cut_off_leaves_a_whole_checkpoint(folder, number):
    for cut in campaign(folder, seed=int(number), cuts=2, number=number):
        assert cut.ended
        assert cut.latest >= cut.acknowledged


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_runs_that_are_killed(folder):
    """The counts are written to the file that HAKARI_FAULTS_JSON names."""
    with ThreadPoolExecutor(2) as pool:
        folders = [folder / str(seed) for seed in range(4)]
        calls = [pool.submit(campaign, each, 100 + i, 26) for i, each in enumerate(folders)]
        found = [cut for call in calls for cut in call.result()]
    assert len(found) >= 100
    assert all(cut.ended for cut in found)
    assert all(cut.latest >= cut.acknowledged for cut in found)
    assert len({cut.victim for cut in found}) >= 6
    table = {
        "kills": len(found),
        "while a save was under way": sum(cut.saving for cut in found),
        "processes": dict(sorted(Counter(str(cut.world) for cut in found).items())),
        "victims": dict(sorted(Counter(cut.victim for cut in found).items())),
        "acknowledged saves lost": sum(cut.latest < cut.acknowledged for cut in found),
        "damaged checkpoints": 0,  # any would have raised
        "runs that hung": sum(not cut.ended for cut in found),
        "cuts": [asdict(cut) for cut in found],
    }
    print(json.dumps({name: value for name, value in table.items() if name != "cuts"}))
    if os.environ.get("HAKARI_FAULTS_JSON"):
        text = json.dumps(table, indent=1)
        Path(os.environ["HAKARI_FAULTS_JSON"]).write_text(f"{text}\n")


def test_without_the_coordinator_the_others_give_up(folder):
    plan = Plan(str(folder / "run"), 3, 400, asynchronous=False, timeout=1.0)
    world = started(plan, folder / "meeting")
    assert world.wait(lambda: len(world.said("ack", 1)) > 2, 60)
    os.kill(world.processes[0].pid, signal.SIGKILL)
    assert world.join(30)
    assert all(process.exitcode for process in world.processes)
    assert checked(folder / "run") >= world.acknowledged > 0


# --- errors ---------------------------------------------------------------------------------


def went(plan: Plan, meeting: Path, seconds: float = 60) -> World:
    """A run that is left alone."""
    world = started(plan, meeting)
    assert world.join(seconds), plan
    assert world.said("end") == [""] * plan.world, said_at_the_end(world)
    assert not any(process.exitcode for process in world.processes)
    return world


def said_at_the_end(world: World) -> str:
    return "".join(path.read_text() for path in world.meeting.glob("output-*"))


CALLS = [("write", FULL), ("fsync", BROKEN), ("replace", BROKEN), ("rename", BROKEN)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("call", "number"), CALLS)
def test_an_error_of_one_rank_fails_that_save_alone_and_on_all(folder, call, number, rank):
    if call == "rename" and rank:
        pytest.skip("the coordinator alone renames")
    fault = Faulty(call, after=0, number=number)
    plan = Plan(str(folder / "run"), 2, 3, asynchronous=False, fault=fault, rank=rank)
    world = went(plan, folder / "meeting")
    failed = {rank: world.said("failed", rank) for rank in range(2)}
    message = os.strerror(number)
    assert len(failed[rank]) == 1
    assert message in failed[rank][0]
    assert len(failed[1 - rank]) == 1
    assert f"SaveError: the save of step 1 failed on rank {rank}: OSError: " in failed[1 - rank][0]
    assert world.said("ack", 0) == world.said("ack", 1) == ["2", "3"]
    assert checkpoint.steps(folder / "run") == [2, 3]
    assert checked(folder / "run") == 3


@pytest.mark.parametrize("after", [4, 9, 14])
def test_an_error_at_any_time_loses_nothing(folder, after):
    """At the coordinator too: a fifth write is that of LATEST, after the commit: no failure."""
    for number, call in enumerate(["fsync", "write"]):
        fault = Faulty(call, after=after, number=BROKEN)
        root = folder / str(number)
        plan = Plan(str(root), 2, 4, asynchronous=False, fault=fault)
        world = went(plan, folder / f"meeting{number}")
        assert checked(root) >= world.acknowledged == 4
        assert len(world.said("failed", 0)) == (call == "fsync")
        assert (root / "LATEST").read_text() == "step-00000004\n"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("call", "every"), [("fsync", 7), ("write", 4), ("replace", 3)])
def test_errors_again_and_again_damage_no_checkpoint(folder, call, every, rank):
    """At every place where a rank can fail, such as after the others have seen its record."""
    fault = Faulty(call, after=0, number=BROKEN, every=every)
    root = folder / "run"
    plan = Plan(str(root), 2, 24, asynchronous=False, fault=fault, rank=rank, keep=0)
    world = went(plan, folder / "meeting")
    acknowledged = {int(step) for step in world.said("ack")}
    assert world.said("failed", rank)
    assert acknowledged <= {*checkpoint.steps(root)}
    for step in checkpoint.steps(root):
        assert checked_one(f"{root}/step-{step:08d}") == step


def test_a_disk_that_stays_full_fails_every_save_and_keeps_the_last(folder):
    fault = Faulty("write", after=8, number=FULL, forever=True)
    plan = Plan(str(folder / "run"), 2, 6, asynchronous=False, fault=fault, rank=1, timeout=1.0)
    world = went(plan, folder / "meeting")
    done = world.acknowledged
    assert 1 <= done < 6
    assert len(world.said("failed", 1)) == 6 - done
    assert checked(folder / "run") == done
    left = checkpoint.leftovers(folder / "run")  # of failed saves no data stays, of any rank
    assert len(left) == 6 - done
    assert not [path for name in left for path in (folder / "run" / name).glob("data/*")]


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of its own. Skipped where mounting is not permitted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    try:
        mounted = os.geteuid() == 0 and not subprocess.run(command, capture_output=True).returncode
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("limit", [True, False], ids=["seen before", "met"])
def test_a_small_disk_fills_up(folder, limit):
    """Either the space that is left is seen to be too small, or a write fails; nothing is lost."""
    with small_disk(folder / "disk", "64k"):
        root = folder / "disk/run"
        plan = Plan(str(root), 2, 6, asynchronous=False, keep=0, limit=limit, timeout=2.0)
        world = went(plan, folder / "meeting")
        assert 1 <= world.acknowledged < 6
        for said in world.said("failed"):
            if limit:
                assert "bytes left, and the checkpoint needs" in said or "No space" in said
            else:
                assert any(s in said for s in ("No space left", "SaveError", "TimeoutError"))
        assert checked(root) >= world.acknowledged


def test_a_slow_rank_is_waited_for_in_the_background_too(folder):
    fault = Faulty("fsync", after=0, seconds=0.4, forever=True)
    plan = Plan(str(folder / "run"), 2, 2, fault=fault, rank=1, timeout=20)
    world = went(plan, folder / "meeting")
    assert sorted(world.said("ack")) == ["1", "1", "2", "2"]
    assert checked(folder / "run") == 2


def test_a_rank_that_is_too_slow_is_given_up(folder):
    fault = Faulty("fsync", after=0, seconds=1.5)
    plan = Plan(str(folder / "run"), 2, 2, asynchronous=False, fault=fault, rank=1, timeout=0.5)
    world = went(plan, folder / "meeting")
    assert "given up after 0.5 s: ranks [1] wrote nothing" in world.said("failed", 0)[0]
    assert "failed on rank 0: TimeoutError" in world.said("failed", 1)[0]
    assert checked(folder / "run") == world.acknowledged == 2
