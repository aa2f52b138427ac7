"""Runs that save, and are cut off: by signals, full disks, errors and slow ranks.

What a run holds at a step is a pure function of the step, so that any checkpoint can be checked
to the bit by whoever knows its number.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from hakari.training import checkpoint
from hakari.training.checkpoint import Piece, flat_pieces, saving, storage, tensor_pieces
from hakari.training.checkpoint.source import WEIGHT

SHAPES = {"embed": (13, 10), "experts": (3, 7, 10), "norm": (7,), "scale": ()}
TYPES = {"embed": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")


def values(step: int) -> dict[tuple[str, str], Tensor]:
    """Every tensor of a run after a step."""
    chance = torch.Generator().manual_seed(step)
    found = {}
    for name, shape in SHAPES.items():
        found[name, WEIGHT] = torch.randn(shape, generator=chance).to(TYPES.get(name))
        for moment in MOMENTS:
            found[name, moment] = torch.randn(shape, generator=chance)
    return found


def pieces(step: int, rank: int = 0, world: int = 1) -> list[Piece]:
    """What a rank holds: all weights, and a flat share of each moment."""
    found = []
    for key, tensor in values(step).items():
        if key[1] == WEIGHT or not tensor.ndim:
            found += tensor_pieces(key, tensor)
        else:
            share = -(-tensor.numel() // world)
            low, high = share * rank, min(share * (rank + 1), tensor.numel())
            found += flat_pieces(key, tensor.shape, low, tensor.reshape(-1)[low:high].clone())
    return found


def checked(root: Path | str) -> int:
    """Step of the newest checkpoint, all of which is what that step had; 0 if there is none."""
    newest = checkpoint.latest(str(root))
    return checked_one(newest) if newest else 0


def checked_one(newest: str) -> int:
    """Step of a checkpoint, all of which is what that step had."""
    step = int(newest.rpartition("-")[2])
    found = pieces(-step)  # other values
    loaded = checkpoint.load(newest, None, pieces=found, workers=1)
    assert loaded.verified == loaded.tensors == len(values(step))
    assert (loaded.step, loaded.extra_state) == (step, {"step": step})
    expected = values(step)
    for piece in found:
        torch.testing.assert_close(piece.tensor, expected[piece.key], rtol=0, atol=0)
    return step


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A folder on a disk of memory, where there is one: no test here needs that bytes stay."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


# --- faults of the disk ---------------------------------------------------------------------


@dataclass
class Faulty:
    """`storage.os`, where one call fails, once or from then on, or takes its time.

    call: name of the function. after: calls that still succeed. every: or one of so many fails.
    seconds: of sleep instead.
    """

    call: str
    after: int
    number: int = 0
    forever: bool = False
    every: int = 0
    seconds: float = 0.0
    seen: int = field(default=0)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name != self.call:
            return real

        def called(*arguments: Any, **named: Any) -> Any:
            self.seen += 1
            fails = self.seen == self.after + 1 or (self.forever and self.seen > self.after)
            if self.seen % self.every == 0 if self.every else fails:
                if not self.seconds:
                    raise OSError(self.number, os.strerror(self.number))
                time.sleep(self.seconds)
            return real(*arguments, **named)

        return called


# --- a run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """asynchronous: of each step, None for alternately. fault: on `rank` alone."""

    root: str
    world: int
    steps: int
    asynchronous: bool | None = None
    fault: Faulty | None = None
    rank: int = 0
    timeout: float = 4.0
    keep: int = 2
    limit: bool = True  # whether the space that is left is looked at before a save


def run(plan: Plan, rank: int, meeting: str) -> None:
    """One process: go on from the newest checkpoint and save each step.

    It says in log-RANK what it has seen to the end: 'ack STEP', 'failed STEP MESSAGE'.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=plan.world
    )
    log = os.open(f"{meeting}/log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(text: str) -> None:
        os.write(log, f"{text}\n".encode())

    first = resumed(plan) + 1
    say(f"start {first} {os.getpid()}")
    pending: dict[int, checkpoint.Save] = {}
    with injected(plan, rank):
        for step in range(first, first + plan.steps):
            one_step(plan, step, rank, pending, say)
        acknowledge(pending, say)
    say("end")
    dist.destroy_process_group()


def resumed(plan: Plan) -> int:
    if checkpoint.latest(plan.root) is None:
        return 0
    found = pieces(-1, dist.get_rank(), plan.world)
    loaded = checkpoint.load(plan.root, None, pieces=found)
    assert loaded.verified == loaded.tensors
    return loaded.step


@contextlib.contextmanager
def injected(plan: Plan, rank: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not plan.limit:
            stack.enter_context(patch.object(storage.LocalFolder, "free", lambda self: None))
        if plan.fault and rank == plan.rank:
            stack.enter_context(patch.object(storage, "os", plan.fault))
        yield


def one_step(
    plan: Plan, step: int, rank: int, pending: dict[int, Any], say: Callable[[str], None]
) -> None:
    say(f"begin {step}")
    background = step % 2 == 0 if plan.asynchronous is None else plan.asynchronous
    try:
        found = checkpoint.save(
            plan.root,
            None,
            extra_state={"step": step},
            pieces=pieces(step, rank, plan.world),
            step=step,
            asynchronous=background,
            keep=plan.keep,
            timeout=plan.timeout,
        )
    except OSError as error:
        pending.clear()
        say(f"failed {step} {type(error).__name__}: {error}")
        return
    acknowledge(pending, say)  # the one before is complete, or this one had not begun
    if background:
        pending[step] = found
        say(f"writer {saving._session.writer.process.pid}")
    else:
        say(f"ack {step}")


def acknowledge(pending: dict[int, Any], say: Callable[[str], None]) -> None:
    for step, found in list(pending.items()):
        del pending[step]
        try:
            found.wait()
            say(f"ack {step}")
        except OSError as error:
            say(f"failed {step} {type(error).__name__}: {error}")


# --- worlds, seen from outside --------------------------------------------------------------


@dataclass
class World:
    """The processes of a run, and what they said."""

    plan: Plan
    meeting: Path
    processes: list[Any]

    def said(self, word: str, rank: int | None = None) -> list[str]:
        """Rest of each line that begins with a word."""
        chosen = range(self.plan.world) if rank is None else [rank]
        lines = []
        for each in chosen:
            path = self.meeting / f"log-{each}"
            lines += path.read_text().split("\n")[:-1] if path.exists() else []
        return [line.partition(" ")[2] for line in lines if line.split(" ")[0] == word]

    @property
    def acknowledged(self) -> int:
        """The newest step that any rank has seen complete."""
        return max(map(int, self.said("ack")), default=0)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, until: Callable[[], Any], seconds: float) -> bool:
        """Whether it came true in time; not waited for once all processes have ended."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end or not self.alive():
                return bool(until())
            time.sleep(0.002)
        return True

    def join(self, seconds: float) -> bool:
        """Whether all processes ended by themselves in time, writers too."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        writers = [int(pid) for pid in self.said("writer")]
        while any(map(running, writers)) and time.monotonic() < end:
            time.sleep(0.01)
        hung_writers = [pid for pid in writers if running(pid)]
        for pid in hung_writers:
            os.kill(pid, signal.SIGKILL)
        return not hung and not hung_writers


def running(pid: int) -> bool:
    """Whether it is a writer that has not ended."""
    try:
        said = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"hakari.training.checkpoint.writer" in said


def started(plan: Plan, meeting: Path) -> World:
    """Start a run; its processes are forked from one that has imported torch already."""
    meeting.mkdir(parents=True)
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.faults"])
    processes = [
        context.Process(target=run_quietly, args=(plan, rank, str(meeting)), daemon=True)
        for rank in range(plan.world)
    ]
    for process in processes:
        process.start()
    return World(plan, meeting, processes)


def run_quietly(plan: Plan, rank: int, meeting: str) -> None:
    """`run`, with what it prints in a file."""
    with Path(f"{meeting}/output-{rank}").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            run(plan, rank, meeting)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise


@dataclass(frozen=True)
class Cut:
    """What became of a run that was cut off."""

    world: int
    signal: int
    victim: str  # 'rank 1', 'writer 0'
    saving: bool  # whether a save was under way
    begun: int
    acknowledged: int
    latest: int
    ended: bool  # whether all others ended by themselves


def cut_off(
    root: Path, meeting: Path, chance: random.Random, number: int = signal.SIGKILL
) -> Cut | None:
    """Start a run in a folder, cut one process off at a random moment, and check what is left.

    Returns None if the run was over before.
    """
    world = chance.choice([2, 2, 3, 4])
    background = chance.choice([False, False, None, True])
    at_writer = background is not False and chance.random() < 0.5
    run_of = started(Plan(str(root), world, 12, background), meeting)
    rank = chance.randrange(world)
    word = "writer" if at_writer else chance.choice(["begin", "ack"])
    run_of.wait(lambda: run_of.said(word, rank), 60)
    time.sleep(chance.random() * (0.6 if background is not False else 0.3))
    writers = run_of.said("writer", rank)
    pid = int(writers[-1]) if at_writer and writers else run_of.processes[rank].pid
    begun, done = max(map(int, run_of.said("begin")), default=0), run_of.acknowledged
    if not pid or not run_of.processes[rank].is_alive() or (at_writer and not running(pid)):
        run_of.join(60)
        return None
    os.kill(pid, number)
    ended = run_of.join(60)
    acknowledged = run_of.acknowledged
    newest = checked(root)
    assert newest >= acknowledged, (run_of.plan, newest, acknowledged)
    victim = f"{'writer' if at_writer and writers else 'rank'} {rank}"
    return Cut(world, number, victim, begun > done, begun, acknowledged, newest, ended)


FULL, BROKEN = errno.ENOSPC, errno.EIO
