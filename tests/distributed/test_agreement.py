"""Ranks that do not agree, or of which one fails, all say so, and soon, and in whose name."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hakari.training import checkpoint
from hakari.training.checkpoint import saving, snapshot
from tests.distributed.faults import in_memory
from tests.distributed.ranks import ranks

TIMEOUT, SOON = 60.0, 20.0
"""Seconds: what a save waits for others at most, and what is short beside it."""

SETTINGS: dict[str, tuple[Any, Any]] = {
    "step": (1, 2),
    "copies": ("equal", "first"),
    "asynchronous": (False, True),
    "keep": (0, 3),
    "when_busy": ("wait", "skip"),
}


# --- on each rank ---------------------------------------------------------------------------


def said(work: Callable[[], Any]) -> str:
    """What it raises, or nothing."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 2)


class Model(nn.Module):
    """Two parameters and a buffer, each in many pieces if they are shared out."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2**10, 2**9))
        self.bias = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.full((2**10, 2**9), value))


def disagree(root: Path, rank: int) -> dict[str, str]:
    model, found = linear(), {}
    for name, values in SETTINGS.items():
        options = {"step": 1, "timeout": 2, name: values[rank]}
        found[name] = said(lambda options=options: checkpoint.save(root, model, **options))
    path = f"{root}/{rank}"
    found["path"] = said(lambda: checkpoint.save(path, model, step=1, timeout=2))
    assert not any(root.rglob("*"))
    checkpoint.save(root, model, step=1)
    return found


def replicas(root: Path, rank: int) -> dict[str, Any]:
    model = Model(rank + 1.0)
    checkpoint.save(root, model, step=1)
    checkpoint.save(root, model, step=2, asynchronous=True).wait()
    found: dict[str, Any] = {}
    for step in (1, 2):
        other = Model(7.0)
        loaded = checkpoint.load(root / f"step-{step:08d}", other)
        assert loaded.verified == loaded.tensors == 3
        found[f"buffer {step}"] = other.mean.unique().tolist()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter[-1] += rank
        found[name] = said(lambda: checkpoint.save(root, model, step=3))
        with torch.no_grad():
            parameter[-1] -= rank
    assert checkpoint.steps(root) == [1, 2]
    return found


def timed(work: Callable[[], Any]) -> tuple[str, float]:
    begun = time.monotonic()
    return said(work), time.monotonic() - begun


def lost_writer(root: Path, rank: int, victim: int) -> tuple[str, float]:
    """The writer of one rank is killed before it has begun."""
    model = linear()
    checkpoint.save(root, model, step=1, asynchronous=True).wait()
    writer = saving._session.writer.process.pid
    if rank == victim:
        os.kill(writer, signal.SIGSTOP)
    dist.barrier()
    save = checkpoint.save(root, model, step=2, asynchronous=True, timeout=TIMEOUT)
    if rank == victim:
        os.kill(writer, signal.SIGKILL)
    found = timed(save.wait)
    return seen(root, found)


def failed_copy(root: Path, rank: int, victim: int) -> tuple[str, float]:
    """One rank has no memory for the copy of its state, after all have agreed to save."""

    def save() -> None:
        checkpoint.save(root, linear(), step=2, asynchronous=True, timeout=TIMEOUT).wait()

    with ExitStack() as stack:
        if rank == victim:
            none = MemoryError("none is left")
            stack.enter_context(patch.object(snapshot, "layout", side_effect=none))
        found = timed(save)
    return seen(root, found)


def seen(root: Path, found: tuple[str, float]) -> tuple[str, float]:
    """The failure is also raised by the next save, of all ranks, and then it is over."""
    said(lambda: checkpoint.save(root, linear(), step=9))
    step = len(checkpoint.steps(root)) + 20
    dist.barrier()
    checkpoint.save(root, linear(), step=step, asynchronous=True).wait()
    return found


class Stubborn(nn.Module):
    """A module whose extra state cannot be set."""

    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        raise KeyError(f"no place for {state}")


class Willing(Stubborn):
    def set_extra_state(self, state: int) -> None:
        pass


def stubborn(root: Path, rank: int) -> str:
    checkpoint.save(root, nn.Sequential(Willing()), step=1)
    model = nn.Sequential(Stubborn() if rank else Willing())
    return said(lambda: checkpoint.load(root, model))


def everything(folder: str) -> dict[str, Any]:
    root, rank = Path(folder), dist.get_rank()
    found: dict[str, Any] = {
        "disagree": disagree(root / "disagree", rank),
        "replicas": replicas(root / "replicas", rank),
        "stubborn": stubborn(root / "stubborn", rank),
    }
    for victim in (0, 1):
        place = root / f"writer {victim}"
        found[f"writer {victim}"] = lost_writer(place, rank, victim)
        place = root / f"copy {victim}"
        found[f"copy {victim}"] = failed_copy(place, rank, victim)
    return found


# --- the tests ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    """What each of two ranks has seen, in one start."""
    with in_memory() as folder:
        yield ranks(2, everything, str(folder))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_differs_is_named_with_both_values_on_every_rank(two, name):
    first, second = SETTINGS[name]
    for rank in two:
        expected = f"ValueError: {name} is {first!r} on rank 0 and {second!r} on 1"
        assert rank["disagree"][name] == expected


def test_a_path_that_differs_is_named_on_every_rank(two):
    for rank in two:
        expected = r"ValueError: path is '.*/disagree/0' on rank 0 and '.*/disagree/1' on 1"
        assert re.fullmatch(expected, rank["disagree"]["path"])


def test_buffers_of_replicas_may_differ_and_the_first_ranks_are_saved(two):
    for rank in two:
        assert rank["replicas"]["buffer 1"] == rank["replicas"]["buffer 2"] == [1.0]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_of_replicas_may_not_differ(two, name):
    message = rf"ValueError: ranks 0 and 1 hold different values of {name} \(weight\) \["
    for way in ("copies='first' takes the first rank's", "given as pieces (flat_pieces)"):
        assert way in two[0]["replicas"][name]
    assert re.match(message, two[0]["replicas"][name])
    assert re.match(f"SaveError: .* failed on rank 0: {message}", two[1]["replicas"][name])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_is_killed_fails_the_save_of_the_others_soon(two, victim):
    status = "the writer process ended with status -9"
    for rank, told in enumerate(two):
        text, seconds = told[f"writer {victim}"]
        other = f".* failed on rank {victim}: SaveError: " if rank != victim else ""
        assert re.fullmatch(f"SaveError: saving in the background failed: {other}{status}", text)
        assert seconds < SOON


@pytest.mark.parametrize("victim", [0, 1])
def test_a_state_that_cannot_be_copied_fails_the_save_of_the_others_soon(two, victim):
    for rank, told in enumerate(two):
        text, seconds = told[f"copy {victim}"]
        other = f"SaveError: .* failed on rank {victim}: SaveError: " if rank != victim else ""
        assert re.fullmatch(f"{other}MemoryError: none is left", text)
        assert seconds < SOON


def test_a_module_that_fails_on_one_rank_fails_the_load_on_all(two):
    assert two[0]["stubborn"] == "RankError: rank 1: KeyError: 'no place for 3'"
    assert two[1]["stubborn"] == "KeyError: 'no place for 3'"
