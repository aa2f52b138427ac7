"""That all ranks call `load` alike: else some would wait for others that do something else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hakari.training.checkpoint import exchange
from hakari.training.checkpoint.pieces import Optimizers


def agree(
    optimizer: Optimizers | None,
    some_pieces: bool,
    zero_damaged: Collection[str],
    **settings: Any,
) -> bool:
    """Whether any rank has pieces of its own; others may have none, as of a short flat shard.

    Raises TypeError for a text as zero_damaged, ValueError on every rank for a setting that
    differs, or an optimizer on some of them.
    """
    error = None
    if isinstance(zero_damaged, str):
        error = TypeError(
            f"zero_damaged is the text {zero_damaged!r}: pass a list of states, [{zero_damaged!r}]"
        )
    exchange.raise_together(error)
    settings["zero_damaged"] = sorted(zero_damaged)
    settings["optimizer"] = "None" if optimizer is None else "given"
    told = exchange.gather((settings, some_pieces))
    for rank, (theirs, _) in enumerate(told):
        for name, value in told[0][0].items():
            if theirs[name] != value:
                way = ", [] where a rank has none" if name == "optimizer" else ""
                raise ValueError(
                    f"{name} is {value} on rank 0 and {theirs[name]} on {rank}: call load with the "
                    f"same on every rank{way}"
                )
    return any(some for _, some in told)
