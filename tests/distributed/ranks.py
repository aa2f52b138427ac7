"""Run a test's body on several gloo processes; a rank's error is the test's error."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
        errors = [error for call in calls if (error := call.exception(timeout=300))]
        if errors:  # the first cause, not the peers' "connection reset" that follows from it
            raise min(errors, key=lambda error: "peer" in str(error))
        return [call.result() for call in calls]


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
        dist.barrier()  # who leaves with data unread resets the connection under its peers
        return result
    finally:
        dist.destroy_process_group()
