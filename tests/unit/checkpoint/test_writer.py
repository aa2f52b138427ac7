"""The process that writes in the background: where it writes, and how it ends with its program."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from hakari.training import checkpoint
from tests.distributed.faults import in_memory, running


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found
        checkpoint.wait()


# --- where ----------------------------------------------------------------------------------


def net(value: float) -> nn.Module:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_relative_path_lies_where_the_program_is_when_it_saves(folder, monkeypatch, asynchronous):
    """The writer may have been started elsewhere, and the program may be elsewhere by then."""
    for step, name in enumerate(("one", "two"), 1):
        (folder / name).mkdir()
        monkeypatch.chdir(folder / name)
        found = checkpoint.save("run", net(step), step=step, asynchronous=asynchronous)
        monkeypatch.chdir(folder)
        assert found.wait() == f"run/step-{step:08d}"
        assert checkpoint.steps(folder / name / "run") == [step]
    assert not (folder / "run").exists()
    monkeypatch.chdir(folder / "one")
    model = net(0)
    assert checkpoint.load("run", model).step == 1
    assert torch.equal(model.weight, net(1).weight)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_tilde_is_the_home_folder(folder, monkeypatch, asynchronous):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "mine"))
    found = checkpoint.save("~/run", net(1), step=1, asynchronous=asynchronous)
    assert found.wait() == "~/run/step-00000001"
    assert checkpoint.steps(folder / "mine/run") == checkpoint.steps("~/run") == [1]
    assert checkpoint.latest("~/run") == f"{folder}/mine/run/step-00000001"
    assert checkpoint.load("~/run", net(0)).step == 1
    assert [path.name for path in folder.iterdir()] == ["mine"]


# --- how it ends ----------------------------------------------------------------------------

BEGIN = """
import os, signal, subprocess, sys, time
import torch
from hakari.training import checkpoint
from hakari.training.checkpoint import saving

def save(step, **options):
    return checkpoint.save(
        sys.argv[1], torch.nn.Linear(2, 2), step=step, asynchronous=True, **options
    )

def writer():
    return saving._session.writer.process.pid

save(1).wait()
"""


@contextmanager
def program(folder: Path, text: str) -> Iterator[subprocess.Popen[str]]:
    """A program of its own, that has saved step 1; ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + text, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ends(pid: int, seconds: float) -> bool:
    """Whether a writer ends in time."""
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not running(pid)


def test_it_ends_with_a_program_that_is_killed_though_a_fork_holds_its_pipe(folder):
    text = """
child = os.fork()
if not child:
    os.close(1), os.close(2)
    time.sleep(60)
    os._exit(0)
print(writer(), child, flush=True)
time.sleep(60)
"""
    with program(folder, text) as process:
        pid, child = map(int, process.stdout.readline().split())
        try:
            assert running(pid)
            process.kill()
            process.wait()
            assert ends(pid, 10)
            os.kill(child, 0)  # it is there still
        finally:
            os.kill(child, signal.SIGKILL)
    assert checkpoint.steps(folder) == [1]


def test_a_fork_that_ends_during_a_save_ends_neither_it_nor_the_save(folder):
    text = """
before = writer()
os.kill(before, signal.SIGSTOP)
found = save(2)
child = os.fork()
if not child:
    sys.exit()  # and does what is registered for the exit
status = os.waitpid(child, 0)[1]
os.kill(before, signal.SIGCONT)
found.wait()
print(status, before == writer())
save(3)
"""
    with program(folder, text) as process:
        output, said = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "0 True\n"), said
    assert checkpoint.steps(folder) == [1, 2, 3]
    assert checkpoint.leftovers(folder) == []


def test_a_forked_child_that_saves_is_told_why_it_cannot(folder):
    text = """
found = save(2)
child = os.fork()
if not child:
    for work in (lambda: save(3), found.poll, found.wait):
        try:
            work()
        except RuntimeError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(child, os.getpid(), found.wait() == f"{sys.argv[1]}/step-00000002")
save(3).wait()
"""
    with program(folder, text) as process:
        output, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
    *messages, last = output.splitlines()
    child, parent, saved = last.split()
    assert saved == "True"
    assert set(messages) == {
        f"this process ({child}) was forked from {parent}, whose writer process it shares: save in "
        "that one, or start this one by 'spawn'"
    }
    assert len(messages) == 3
    assert checkpoint.steps(folder) == [1, 2, 3]


FAILS = """
saving._newer = lambda *arguments: None  # so that the writer is the first to see that it exists
"""
CAUSES = {
    "never looked at": (
        FAILS + "save(1)",
        "FileExistsError: .*step-00000001 exists: another save made it meanwhile",
    ),
    "seen to be over": (
        FAILS + "found = save(1)\nwhile not found.done(): time.sleep(0.01)",
        "FileExistsError: .*step-00000001 exists: another save made it meanwhile",
    ),
    "killed before the end": (
        """
os.kill(writer(), signal.SIGSTOP)
save(2)
os.kill(writer(), signal.SIGKILL)
saving._session.writer.process.wait()
""",
        "the writer process ended with status -9",
    ),
    "killed at the end": (
        """
os.kill(writer(), signal.SIGSTOP)
save(2)
subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {writer()}"])
""",
        "the writer process ended with status -9",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_save_that_fails_at_the_end_of_a_program_fails_it(folder, cause):
    text, message = CAUSES[cause]
    with program(folder, text) as process:
        output, said = process.communicate(timeout=60)
        assert process.returncode == 1, (output, said)
    lines = [line for line in said.split("\n") if line]
    assert len(lines) == 1, said
    assert lines[0].startswith("hakari: saving in the background failed: ")
    assert re.search(message, lines[0])
    assert checkpoint.steps(folder) == [1]


def test_a_failure_that_the_program_has_seen_does_not_fail_it_again(folder):
    text = f"""{FAILS}
found = save(1)
try:
    found.wait()
except checkpoint.SaveError as error:
    print(type(error).__name__)
"""
    with program(folder, text) as process:
        output, said = process.communicate(timeout=60)
        assert (process.returncode, output, said) == (0, "SaveError\n", "")
    assert checkpoint.steps(folder) == [1]
