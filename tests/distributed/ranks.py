"""Run a test's body on several gloo processes; a rank's error is the test's error."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist


def ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[what work(*arguments) returned on rank 0, rank 1, ...]."""
    with (
        TemporaryDirectory() as meeting,
        ProcessPoolExecutor(size, get_context("spawn")) as pool,
    ):
        calls = [pool.submit(on_rank, rank, size, meeting, work, arguments) for rank in range(size)]
        _, waiting = wait(calls, 300, FIRST_EXCEPTION)
        if waiting:  # for a rank that failed, or for one another
            wait(waiting, 5)
            for process in list(pool._processes.values()):
                process.kill()
        errors = [error for call in calls if (error := call.exception())]
        if errors:  # the first cause, not what followed from it on the other ranks
            raise min(errors, key=_follows)
        return [call.result() for call in calls]


def _follows(error: BaseException) -> bool:
    return isinstance(error, BrokenProcessPool) or "peer" in str(error)


def on_rank(
    rank: int, size: int, meeting: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    # a meeting file instead of a port, so that tests never collide
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=size
    )
    try:
        result = work(*arguments)
        meet(Path(meeting), rank, size)
        return result
    finally:  # after an error at once, so that the peers do not wait for this rank
        dist.destroy_process_group()


def meet(folder: Path, rank: int, size: int, name: str = "end", timeout: float = 120.0) -> None:
    """Wait for every rank, by files: before a process group is left.

    A collective cannot do it: the first rank out of it may close a connection that holds data
    which its peer has not read, and the peer sees "connection reset".
    """
    (folder / f"{name}-{rank}").touch()
    until = time.monotonic() + timeout
    while time.monotonic() < until and len(list(folder.glob(f"{name}-*"))) < size:
        time.sleep(0.01)
