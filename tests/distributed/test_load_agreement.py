"""Ranks that call `load` with other arguments all say so, before they wait for one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hakari.training import checkpoint
from tests.distributed.faults import in_memory
from tests.distributed.ranks import ranks

SETTINGS: dict[str, tuple[Any, Any]] = {
    "strict": (True, False),
    "options": (True, False),
    "cast": (False, True),
    "zero_damaged": ([], ["exp_avg"]),
}
"""What rank 0 says, and rank 1."""


def said(work: Callable[[], Any]) -> str:
    """What it raises, or nothing."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def program() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def short_shard(root: Path, rank: int) -> list[int]:
    """A flat state of which the second rank has no element."""
    model = nn.Linear(2, 2)
    flat = torch.arange(4.0) if rank == 0 else torch.empty(0)

    def pieces(tensor: torch.Tensor) -> list[checkpoint.Piece]:
        return checkpoint.flat_pieces(("weight", "exp_avg"), (2, 2), 4 * rank, tensor)

    checkpoint.save(root, model, step=1, pieces=pieces(flat), copies="first")
    found = torch.zeros_like(flat)
    loaded = checkpoint.load(root, model, pieces=pieces(found))
    assert loaded.verified == loaded.tensors == 3
    return found.tolist()


def everything(folder: str) -> dict[str, Any]:
    root, rank = Path(folder), dist.get_rank()
    model, optimizer = program()
    checkpoint.save(root / "run", model, optimizer, step=1)
    found: dict[str, Any] = {}
    for name, values in SETTINGS.items():
        options = {name: values[rank]}
        found[name] = said(lambda options=options: checkpoint.load(root / "run", model, **options))
    own = None if rank else optimizer
    found["optimizer"] = said(lambda: checkpoint.load(root / "run", model, own))
    text: Any = "exp_avg" if rank else ()
    found["text"] = said(lambda: checkpoint.load(root / "run", model, zero_damaged=text))
    found["in step"] = checkpoint.load(root / "run", model, optimizer).verified
    found["short shard"] = short_shard(root / "shard", rank)
    return found


@pytest.fixture(scope="module")
def two():
    """What each of two ranks has seen, in one start."""
    with in_memory() as folder:
        yield ranks(2, everything, str(folder))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_differs_is_named_with_both_values_on_every_rank(two, name):
    first, second = SETTINGS[name]
    for rank in two:
        told = f"ValueError: {name} is {first} on rank 0 and {second} on 1: call load with the same"
        assert rank[name].startswith(told)


def test_an_optimizer_on_one_rank_alone_is_told_on_every_rank(two):
    for rank in two:
        assert rank["optimizer"] == (
            "ValueError: optimizer is given on rank 0 and None on 1: call load with the same on "
            "every rank, [] where a rank has none"
        )


def test_a_text_on_one_rank_is_told_on_every_rank(two):
    assert two[0]["text"].startswith("RankError: rank 1: TypeError: zero_damaged is the text")
    assert two[1]["text"].startswith("TypeError: zero_damaged is the text 'exp_avg'")


def test_ranks_are_still_in_step_afterwards(two):
    assert [rank["in step"] for rank in two] == [8, 8]


def test_a_rank_may_have_no_element_of_a_flat_state(two):
    assert [rank["short shard"] for rank in two] == [[0.0, 1.0, 2.0, 3.0], []]
