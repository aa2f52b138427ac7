"""Small things that all processes tell one another, from the training thread."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

Told = TypeVar("Told")


class RankError(ValueError):
    """What went wrong on another rank."""


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if _together() else 0


def world() -> int:
    """How many processes there are; 1 without a process group."""
    return dist.get_world_size() if _together() else 1


def gather(thing: Told) -> list[Told]:
    """What each process says, on every one of them."""
    if not _together():
        return [thing]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, thing)
    return told


def from_first(thing: Told) -> Told:
    """What rank 0 says, on every process."""
    if not _together():
        return thing
    told: list[Any] = [thing]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def raise_together(error: Exception | None) -> None:
    """Raise on every process if any has an error, so that none waits for one that gave up."""
    said = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, text in enumerate(said):
        if text is not None:
            raise RankError(f"rank {number}: {text}")


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
