"""What two ranks hold that cannot be saved as it is, or is only warned of; and a frozen writer."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hakari.training import checkpoint
from hakari.training.checkpoint import saving
from tests.distributed.faults import in_memory
from tests.distributed.ranks import ranks
from tests.distributed.test_agreement import SOON, linear, said, timed


def fully_sharded(root: Path, rank: int) -> dict[str, Any]:
    """FSDP2 with statistics of each rank's own, and FSDP1."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fully_shard(model)
    with torch.no_grad():
        model[1].running_mean.fill_(rank)
    found: dict[str, Any] = {"buffers": []}
    for step, copies in enumerate(("equal", "equal", "first"), 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.save(root, model, step=step, asynchronous=step == 2, copies=copies).wait()
        found["buffers"].append([str(each.message) for each in caught])
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)
    assert checkpoint.load(root, model).step == 3
    found["mean"] = model[1].running_mean.tolist()
    old = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    found["save"] = said(lambda: checkpoint.save(root, nn.Sequential(old), step=9, copies="first"))
    found["load"] = said(lambda: checkpoint.load(root, nn.Sequential(old)))
    assert checkpoint.steps(root) == [1, 2, 3]
    return found


def ddp(root: Path, rank: int) -> list[str]:
    """DDP makes the buffers equal by itself, unless it is told not to."""
    model, found = nn.BatchNorm1d(2), []
    for step, broadcast in enumerate((True, False), 1):
        wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
        model.running_mean.fill_(rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.save(root, wrapped, step=step)
        found.append(" ".join(str(each.message) for each in caught))
    return found


def frozen_writer(root: Path, rank: int) -> list[tuple[str, float]]:
    """The writer of rank 1 is stopped, as by a disk that hangs; then a rank is not told of it."""
    model = linear()
    checkpoint.save(root, model, step=1, asynchronous=True).wait()
    if rank:
        os.kill(saving._session.writer.process.pid, signal.SIGSTOP)
    dist.barrier()
    save = checkpoint.save(root, model, step=2, asynchronous=True, timeout=0.5)
    with patch.object(saving._session.writer, "until", time.monotonic() + 1.5):
        found = [timed(save.wait)]
    checkpoint.save(root, model, step=3)
    checkpoint.save(root, model, step=4, asynchronous=True).wait()
    assert checkpoint.steps(root) == [1, 3, 4]
    return found


def everything(folder: str) -> dict[str, Any]:
    root, rank = Path(folder), dist.get_rank()
    return {
        "sharded": fully_sharded(root / "sharded", rank),
        "ddp": ddp(root / "ddp", rank),
        "frozen": frozen_writer(root / "frozen", rank),
    }


@pytest.fixture(scope="module")
def two():
    """What each of two ranks has seen, in one start."""
    with in_memory() as folder:
        yield ranks(2, everything, str(folder))


STATISTICS = (
    "ranks hold different values of buffers (1.running_mean): the first rank's are saved; "
    "copies='first' says so on purpose"
)


def test_buffers_that_differ_are_named_once_by_rank_0_and_its_own_are_saved(two):
    assert two[0]["sharded"]["buffers"] == [[STATISTICS], [STATISTICS], []]
    assert two[1]["sharded"]["buffers"] == [[], [], []]
    assert two[0]["sharded"]["mean"] == two[1]["sharded"]["mean"] == [0.0, 0.0]


def test_buffers_that_ddp_makes_equal_are_not_named(two):
    assert two[0]["ddp"] == ["", STATISTICS.replace("1.running", "running")]
    assert two[1]["ddp"] == ["", ""]


@pytest.mark.parametrize("way", ["save", "load"])
def test_fsdp1_is_refused_with_the_way_out(two, way):
    for rank in two:
        message = rank["sharded"][way]
        assert message.startswith("ValueError: FullyShardedDataParallel (FSDP1) keeps flat shards")
        assert "torch.distributed.fsdp.fully_shard" in message
        assert "tensor_pieces((name, 'weight'), value)" in message


def test_a_writer_that_is_frozen_is_killed_and_hangs_no_rank(two):
    (first, soon), (second, later) = (rank["frozen"][0] for rank in two)
    assert "given up after 0.5 s: ranks [1] wrote nothing" in first
    expected = r"SaveError: .* writer process of rank 1 did not answer within 0\.5 s \(timeout\) .*"
    assert re.fullmatch(expected + "it was killed", second)
    assert max(soon, later) < SOON
