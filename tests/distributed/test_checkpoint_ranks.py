"""Real processes: FSDP2, tensor parallelism, both, DDP and pipelines save for one another.

Runs are the same to the bit on any split, so that what goes wrong in a checkpoint is seen in the
numbers of the run that goes on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hakari.training import checkpoint
from hakari.training.checkpoint import SaveError, saving, tensor_pieces
from hakari.training.checkpoint.exchange import RankError
from hakari.training.checkpoint.pieces import Piece
from tests.distributed import faults
from tests.distributed.elementwise import Net, Run, ddp, made, pipeline, same, state, train
from tests.distributed.ranks import ranks


@pytest.fixture(scope="module")
def folder():
    with faults.in_memory() as found:
        yield found


def loaded(root: Path, run: Run) -> Run:
    found = checkpoint.load(root, *run)
    assert found.verified == found.tensors, str(found)
    assert not found.missing
    assert not found.unused
    assert "loaded state verified" in str(found)
    return run


def hops(folder: str, kind: str, splits: list[str], each: int = 9) -> int:
    """A -> B -> A for all pairs, each time to the bits of the uninterrupted run.

    each: of pairs that begin with one split, at most.
    """
    reference = [state(train(made("alone", kind), 0, steps)) for steps in (2, 4)]
    root, number = Path(folder) / f"{kind}-{dist.get_world_size()}", 0
    for i, here in enumerate(splits):
        run = train(made(here, kind), 0, 2)
        same(state(run), reference[0])
        checkpoint.save(root / here, *run, step=2)
        same(state(train(run, 2, 4)), reference[1])
        for there in [*splits[i + 1 :], *splits[: i + 1]][:each]:
            other = loaded(root / here, made(there, kind, seed=1))
            same(state(other), reference[0])
            checkpoint.save(root / f"{here}-{there}", *other, step=2)
            back = train(loaded(root / f"{here}-{there}", made(here, kind, seed=2)), 2, 4)
            same(state(back), reference[1])
            number += 1
    return number


def from_elsewhere(folder: str, kind: str, world: int, splits: list[str]) -> None:
    """What another number of processes saved."""
    expected = state(train(made("alone", kind), 0, 4))
    for path in sorted((Path(folder) / f"{kind}-{world}").iterdir()):
        for split in splits:
            same(state(train(loaded(path, made(split, kind, seed=3)), 2, 4)), expected)


FOUR = ["ddp", "fsdp", "tensor", "both", "pipeline"]


def on_four(folder: str, each: int) -> None:
    assert hops(folder, "AdamW", FOUR, each) == len(FOUR) * each
    assert hops(folder, "SGD", ["both", "pipeline"], 1) == 2
    redundancy(folder)
    others(folder)


def redundancy(folder: str) -> None:
    """ZeroRedundancyOptimizer keeps its states in the optimizer within."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    expected = state(train(made("ddp"), 0, 4))
    model = ddp(Net(0))
    outer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01, amsgrad=True)
    root = Path(folder) / "redundancy"
    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer.*pass optimizer\.optim"):
        checkpoint.save(root, model, outer, step=1)
    train((model, outer), 0, 2)
    checkpoint.save(root, model, outer.optim, step=2)
    for split in ("ddp", "both"):
        same(state(train(loaded(root, made(split, seed=1)), 2, 4)), expected)
    model = ddp(Net(1))
    again = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01, amsgrad=True)
    loaded(root, (model, again.optim))
    train((model, again), 2, 4)
    same(state((model, again.optim)), expected)


def others(folder: str) -> None:
    """Optimizers whose states have other shapes than their parameters."""
    kinds: dict[str, Any] = {"Adafactor": torch.optim.Adafactor}
    if hasattr(torch.optim, "Muon"):
        kinds["Muon"] = torch.optim.Muon
    for name, kind in kinds.items():

        def make(seed: int, kind: Any = kind) -> Run:
            model = ddp(Net(seed))
            return model, kind([p for p in model.parameters() if p.ndim == 2], lr=0.01)

        run = train(make(0), 0, 2)
        root = Path(folder) / name
        checkpoint.save(root, *run, step=2)
        again = loaded(root, make(1))
        same(state(again), state(run))
        same(state(train(again, 2, 4)), state(train(run, 2, 4)))


def on_two(folder: str, each: int) -> None:
    assert hops(folder, "AdamW", ["fsdp", "tensor"], each) >= 2
    from_elsewhere(folder, "AdamW", 4, ["fsdp"])
    objects(folder)


@pytest.mark.parametrize("each", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_processes_save_for_one_another(folder, each):
    """On four, two and one: a chain of splits, or all pairs of them."""
    folder = folder / str(each)
    ranks(4, on_four, str(folder), each)
    ranks(2, on_two, str(folder), min(each, 2))
    for world in (4, 2):
        from_elsewhere(str(folder), "AdamW", world, ["alone"])
    from_elsewhere(str(folder), "SGD", 4, ["alone"])


# --- an object store ------------------------------------------------------------------------


def objects(folder: str) -> None:
    """Several processes and a store that has no rename."""
    from fsspec.implementations.local import LocalFileSystem

    from hakari.training.checkpoint import commit, retention, storage

    class Store(LocalFileSystem):
        """Small objects appear whole, as in a real store."""

        protocol = "bucket"

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **named: Any) -> None:
            fresh = f"{path}.{os.getpid()}"
            Path(fresh).write_bytes(value)
            Path(fresh).replace(path)

    def opened(where: Any) -> Any:
        return storage.ObjectFolder(str(where), Store(), str(where).removeprefix("bucket:/"))

    rank, root = dist.get_rank(), f"bucket:/{folder}/bucket"
    with ExitStack() as stack:
        for module in (commit, saving, retention):
            stack.enter_context(patch.object(module, "open_folder", opened))
        for step in (1, 2, 3):
            held = faults.pieces(step, rank, 2)
            checkpoint.save(root, None, None, {"step": step}, pieces=held, step=step, keep=2)
        dist.barrier()  # the first rank removes old ones when the save is complete
        assert checkpoint.steps(root) == [2, 3]
        found = faults.pieces(-1, rank, 2)
        assert checkpoint.load(root, None, pieces=found).step == 3
        for mine, theirs in zip(found, faults.pieces(3, rank, 2), strict=True):
            assert torch.equal(mine.tensor, theirs.tensor)


# --- in the background ----------------------------------------------------------------------


def background(folder: str) -> None:
    isolation(Path(folder) / "isolated")
    busy(Path(folder) / "busy")
    lost_writer(Path(folder) / "lost")


def isolation(root: Path) -> None:
    """What is written is what there was when save returned."""
    run = train(made("fsdp"), 0, 1)
    expected = state(run)
    found = checkpoint.save(root, *run, step=1, asynchronous=True)
    train(run, 1, 3)
    assert found is not None
    assert found.wait() == f"{root}/step-00000001"
    assert found.poll()
    same(state(loaded(root, made("fsdp", seed=1))), expected)


@contextmanager
def stopped(rank: int):
    """A writer that makes no progress."""
    if dist.get_rank() == rank:
        os.kill(saving._session.writer.process.pid, signal.SIGSTOP)
    dist.barrier()
    try:
        yield
    finally:
        if dist.get_rank() == rank:
            os.kill(saving._session.writer.process.pid, signal.SIGCONT)


def busy(root: Path) -> None:
    """While one is under way another is skipped, on all ranks, or waits."""
    run = train(made("fsdp"), 0, 1)
    with stopped(1):
        first = checkpoint.save(root, *run, step=1, asynchronous=True)
        assert checkpoint.save(root, *run, step=2, asynchronous=True, when_busy="skip") is None
        assert checkpoint.save(root, *run, step=2, when_busy="skip") is None
        assert first is not None
        assert not first.done()
    first.wait()
    dist.barrier()
    with stopped(1):
        checkpoint.save(root, *run, step=3, asynchronous=True)
        if dist.get_rank() == 1:
            go_on = [saving._session.writer.process.pid, signal.SIGCONT]
            threading.Timer(0.3, os.kill, go_on).start()
        begun = time.monotonic()
        second = checkpoint.save(root, *run, step=4, asynchronous=True)
        assert time.monotonic() - begun > 0.2
    assert second is not None
    second.wait()
    assert checkpoint.steps(root) == [1, 3, 4]
    checkpoint.wait()


def lost_writer(root: Path) -> None:
    """A writer that is killed is an error of the next save on all ranks, and then replaced."""
    run = train(made("fsdp"), 0, 1)
    checkpoint.save(root, *run, step=1)
    with stopped(1):
        found = checkpoint.save(root, *run, step=2, asynchronous=True, timeout=0.5)
        if dist.get_rank() == 1:
            os.kill(saving._session.writer.process.pid, signal.SIGKILL)
        with pytest.raises(SaveError, match=r"the last save failed on rank [01]: "):
            checkpoint.save(root, *run, step=3, asynchronous=True)
        with pytest.raises(SaveError, match=r"ended with status -9|given up after 0\.5 s"):
            found.wait()
        checkpoint.save(root, *run, step=4, asynchronous=True).wait()
    assert checkpoint.steps(root) == [1, 4]


# --- errors ---------------------------------------------------------------------------------


def errors(folder: str) -> None:
    root, rank = Path(folder) / "errors", dist.get_rank()
    unstorable(root, rank)
    copies(root, rank)
    tiling(root, rank)
    twice(root, rank)
    own_states(root, rank)
    options(root, rank)
    assert not [name for name in checkpoint.steps(root) if name >= 100]


def unstorable(root: Path, rank: int) -> None:
    run = made("ddp")
    extra = {"data": {"order": {1, 2} if rank else 3}}
    kind, message = [(RankError, "rank 1: TypeError: "), (TypeError, "^")][rank]
    with pytest.raises(kind, match=message + "extra_state/data/order is a builtins.set"):
        checkpoint.save(root, *run, extra, step=100)

    class Broken:
        def state_dict(self) -> Any:
            raise RuntimeError("no state")

    kind, message = [(RankError, "rank 1: RuntimeError: "), (RuntimeError, "^")][rank]
    with pytest.raises(kind, match=message + "no state"):
        checkpoint.save(root, *run, step=100, rank_state=Broken() if rank else None)
    kind, message = [
        (ValueError, "extra_state differs between ranks 0 and 1: pass what differs as rank_state"),
        (SaveError, "failed on rank 0: ValueError: extra_state differs"),
    ][rank]
    with pytest.raises(kind, match=message):
        checkpoint.save(root, *run, {"rank": rank}, step=100)


def copies(root: Path, rank: int) -> None:
    run = train(made("ddp"), 0, 1)
    expected = state(run)
    if rank:
        with torch.no_grad():
            run[0].module.last.bias[3] += 1e-6
    kind, message = [
        (ValueError, r"ranks 0 and 1 hold different values of last.bias \(weight\) \[0:7\]"),
        (SaveError, r"failed on rank 0: ValueError: ranks 0 and 1 hold different values of last"),
    ][rank]
    with pytest.raises(kind, match=message):
        checkpoint.save(root, *run, step=100)
    checkpoint.save(root / "first", *run, step=1, copies="first")
    same(state(loaded(root / "first", made("ddp", seed=1))), expected)


def tiling(root: Path, rank: int) -> None:
    """Said by all ranks, in the same words."""
    whole = torch.arange(12.0).view(6, 2)
    key = ("table", "weight")
    cases = {
        r"\[6, 2\]: nothing holds \[3:4, 0:2\]": [(0, 3), (4, 6)][rank],
        r"\[6, 2\]: \[0:3, 0:2\] and \[2:6, 0:2\] overlap": [(0, 3), (2, 6)][rank],
        r"\[6, 2\]: \[3:7, 0:2\] lies outside \[6, 2\]": [(0, 3), (3, 7)][rank],
    }
    for message, (start, stop) in cases.items():
        part = torch.zeros(stop - start, 2)
        piece = Piece(key, (6, 2), ((start, stop), (0, 2)), part)
        with pytest.raises(ValueError, match=r"table \(weight\) " + message):
            checkpoint.save(root, None, pieces=[piece], step=100)
    wrong = tensor_pieces(key, whole if rank else whole.double())
    with pytest.raises(ValueError, match=r"is F64 \[6, 2\] on rank 0 and F32 \[6, 2\] on rank 1"):
        checkpoint.save(root, None, pieces=wrong, step=100)


def twice(root: Path, rank: int) -> None:
    run = made("fsdp")
    checkpoint.save(root, *run, step=7)
    with pytest.raises(FileExistsError, match=r"step-00000007 exists: save to another folder"):
        checkpoint.save(root, *run, step=7)
    with patch.object(saving, "_newer", return_value=None):
        kind = [FileExistsError, (SaveError, TimeoutError)][rank]
        with pytest.raises(kind, match=r"another save made it meanwhile"):
            checkpoint.save(root, *run, step=7, timeout=2)


def own_states(root: Path, rank: int) -> None:
    run = made("fsdp")
    extra = {"schedule": {"step": 3}, "order": torch.arange(4)}
    own = {"generator": torch.full((3,), rank), "rank": rank}
    checkpoint.save(root / "own", *run, extra, step=1, rank_state=own)
    found = checkpoint.load(root / "own", *run)
    assert found.extra_state["schedule"] == {"step": 3}
    assert torch.equal(found.extra_state["order"], torch.arange(4))
    assert [each["rank"] for each in found.rank_states] == [0, 1]
    assert torch.equal(found.rank_states[rank]["generator"], torch.full((3,), rank))


def options(root: Path, rank: int) -> None:
    """A conflict on one rank alone is raised on all."""
    model = pipeline(Net(0))
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
    )
    checkpoint.save(root / "options", model, optimizer, step=1)
    model = pipeline(Net(1))
    parameters = [*model.parameters()]

    def groups() -> list[dict[str, Any]]:
        return [{"params": parameters}] if rank else [{"params": [p]} for p in parameters]

    kind, message = [(RankError, "rank 1: ValueError: "), (ValueError, "^")][rank]
    with pytest.raises(kind, match=message + "group 0 .* were saved with different options"):
        checkpoint.load(root / "options", model, torch.optim.AdamW(groups()))
    other = torch.optim.AdamW(groups(), lr=0.5)
    checkpoint.load(root / "options", model, other, options=False)
    assert {group["lr"] for group in other.param_groups} == {0.5}


def two_of_them(folder: str) -> None:
    errors(folder)
    background(folder)


def test_errors_of_one_are_errors_of_all_and_saves_in_the_background_are_apart(folder):
    ranks(2, two_of_them, str(folder))
