"""What a model and an optimizer keep comes back, whatever its form, and a run goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hakari.training import checkpoint
from hakari.training.checkpoint.pieces import flatten
from hakari.training.parallel import alone
from tests.distributed.faults import in_memory


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


def alike(a: Any, b: Any) -> bool:
    """Equal to the bit, and of the same kinds."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and bool(a == b)


# --- modules --------------------------------------------------------------------------------


class Keeper(nn.Linear):
    """A layer that keeps something that is neither a parameter nor a buffer."""

    def __init__(self, kept: Any) -> None:
        super().__init__(3, 3)
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


KEPT = {
    "a tensor": torch.arange(6, dtype=torch.int16).view(2, 3),
    "a dict of nested tensors": {"amax": {"x": torch.rand(4), "w": [torch.zeros(())]}, "on": True},
    "a plain number": 7,
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_modules_keep_comes_back(folder, kept):
    checkpoint.save(folder, nn.Sequential(Keeper(KEPT[kept]), nn.Tanh(), Keeper(None)), step=1)
    model = nn.Sequential(Keeper("nothing"), nn.Tanh(), Keeper("nothing"))
    checkpoint.load(folder, model)
    assert alike(model[0].kept, KEPT[kept])
    assert model[2].kept is None


def test_what_a_module_keeps_is_missed(folder):
    checkpoint.save(folder, nn.Sequential(nn.Linear(3, 3)), step=1)
    model = nn.Sequential(Keeper("as it was"))
    with pytest.raises(ValueError, match=r"^0 keeps an extra state, which .* strict=False"):
        checkpoint.load(folder, model)
    checkpoint.load(folder, model, strict=False)
    assert model[0].kept == "as it was"


def stages(seed: int, kept: Any) -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    """Two parts of a pipeline, named as in the whole, after a step."""
    torch.manual_seed(seed)
    parts = [nn.ModuleDict({name: Keeper((kept, name))}) for name in ("first", "last")]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1) for part in parts]
    for part, optimizer in zip(parts, optimizers, strict=True):
        sum(p.square().sum() for p in part.parameters()).backward()
        optimizer.step()
    return parts, optimizers


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_pipeline_is_loaded_where_it_is_asked_for(folder, half):
    parts, optimizers = stages(0, "saved")
    checkpoint.save(folder, parts, optimizers, step=1)
    (part, optimizer), other = (both[half] for both in stages(1, "new")), ("last", "first")[half]
    with pytest.raises(ValueError, match=rf"only in the checkpoint \(8\): {other}\.bias \(exp_av"):
        checkpoint.load(folder, part, optimizer)
    found = checkpoint.load(folder, part, optimizer, strict=False)
    states = ("exp_avg", "exp_avg_sq", "step", "weight")
    assert found.unused == tuple((f"{other}.{p}", s) for p in ("bias", "weight") for s in states)
    assert not found.missing
    name = ("first", "last")[half]
    assert part[name].kept == ("saved", name)
    assert alike(part.state_dict(), parts[half].state_dict())
    assert alike(optimizer.state_dict(), optimizers[half].state_dict())


def test_all_parts_of_a_pipeline_are_loaded_at_once(folder):
    parts, optimizers = stages(0, "saved")
    checkpoint.save(folder, parts, optimizers, step=1)
    others, fresh = stages(1, "new")
    found = checkpoint.load(folder, others, fresh)
    assert found.verified == found.tensors == 16
    for mine, theirs in zip([*others, *fresh], [*parts, *optimizers], strict=True):
        assert alike(mine.state_dict(), theirs.state_dict())


# --- names ----------------------------------------------------------------------------------


def test_a_state_dict_that_lies_changes_nothing(folder):
    """Hooks may rename, drop and replace entries: the modules' own tensors are saved."""

    def lie(module: nn.Module, table: dict[str, Any], prefix: str, metadata: Any) -> None:
        table[f"{prefix}renamed"] = table.pop(f"{prefix}weight")
        table[f"{prefix}running_mean"] = torch.full((3,), 9.0)
        del table[f"{prefix}bias"]

    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].register_buffer("scratch", torch.ones(2), persistent=False)
    model[0]._register_state_dict_hook(lie)
    assert "0.renamed" in model.state_dict()
    checkpoint.save(folder, model, step=1)
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert {n for n, _ in checkpoint.open_checkpoint(folder).tensors} == {f"0.{n}" for n in names}
    with torch.no_grad():
        for value in (model[0].weight, model[0].running_mean, model[0].scratch):
            value.fill_(5.0)
    assert checkpoint.load(folder, model).verified == 5
    assert torch.equal(model[0].weight, torch.ones(3))
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert torch.equal(model[0].scratch, torch.full((2,), 5.0))


class Outer(nn.Module):
    """A model whose only child is called as the one of DDP is."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)


def test_a_child_called_module_keeps_its_name_and_ddp_is_taken_off(folder):
    with alone():
        wrapped = DistributedDataParallel(Outer())
        optimizer = torch.optim.SGD(wrapped.parameters(), momentum=0.9)
        wrapped.module.module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        checkpoint.save(folder, wrapped, optimizer, step=1)
        checkpoint.save(folder / "child", nn.Sequential(Outer()), step=1)
    source = checkpoint.open_checkpoint(folder)
    states = ("momentum_buffer", "weight")
    assert {*source.tensors} == {(f"module.{p}", s) for p in ("weight", "bias") for s in states}
    assert source.groups[0].members == ("module.weight", "module.bias")
    nested = {name for name, _ in checkpoint.open_checkpoint(folder / "child").tensors}
    assert nested == {"0.module.weight", "0.module.bias"}
    plain = Outer()
    found = checkpoint.load(folder, plain, torch.optim.SGD(plain.parameters(), momentum=0.9))
    assert found.verified == found.tensors == 4
    assert alike(plain.state_dict(), wrapped.module.state_dict())


# --- optimizers -----------------------------------------------------------------------------


class Nested(torch.optim.Optimizer):
    """States in lists and dicts, some of which are None, or empty, until there are enough."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any) -> None:
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                self._one(p, self.state[p], group["lr"])

    def _one(self, p: Tensor, state: dict[str, Any], rate: float) -> None:
        if not state:
            slow = {"mean": torch.zeros_like(p), "count": 0, "last": None, "more": {}, "spare": {}}
            state.update(past=[None] * 3, slow=slow, seen=[], never=[])
        slow = state["slow"]
        state["past"][slow["count"] % 3] = p.grad.clone()
        slow["mean"].mul_(0.9).add_(p.grad)
        slow["more"].setdefault("norms", []).append(p.grad.norm())
        slow["last"] = float(p.grad.sum())
        slow["count"] += 1
        state["seen"] = [*state["seen"], slow["count"]]
        for past in state["past"]:
            if past is not None:
                p.sub_(past, alpha=rate / len(state["seen"]))
        p.sub_(slow["mean"] + slow["last"] * len(slow["more"]["norms"]), alpha=0.01 * rate)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, history_size=20)


Run = tuple[nn.Module, torch.optim.Optimizer]


def run_of(kind: Any, seed: int, steps: int = 0) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    run = model, kind(model.parameters())
    go(run, 0, steps)
    return run


def go(run: Run, first: int, last: int) -> list[float]:
    """Losses of the steps from first to last."""
    model, optimizer = run
    losses = []
    for step in range(first, last):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        losses.append(float(closure().detach()))
        optimizer.step(closure)
    return losses


@pytest.mark.parametrize("before", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", [lbfgs, Nested])
def test_states_of_any_form_go_on_with_the_same_bits(folder, kind, before):
    """Into an optimizer that has made no step, or as many, or fewer, or more than were saved."""
    run = run_of(kind, 0, 2)
    states = [*dict(flatten(run[1].state_dict()["state"])).values()]
    assert any(value is None for value in states)
    checkpoint.save(folder, *run, step=2)
    again = run_of(kind, 1, before)
    found = checkpoint.load(folder, *again)
    assert found.verified == found.tensors > 4
    assert alike(again[1].state_dict(), run[1].state_dict())
    assert go(again, 2, 6) == go(run, 2, 6)
    for mine, theirs in zip(again, run, strict=True):
        assert alike(mine.state_dict(), theirs.state_dict())


def test_a_failed_load_leaves_nested_states_as_they_were(folder):
    checkpoint.save(folder, *run_of(Nested, 0, 2), step=2)
    model, optimizer = run_of(Nested, 1, 1)
    before = optimizer.state_dict()["state"]
    expected = {number: dict(flatten(state)) for number, state in before.items()}
    with pytest.raises(ValueError, match=r"only here \(1\): more"):
        checkpoint.load(folder, [model, nn.ParameterDict({"more": torch.ones(1)})], optimizer)
    now = optimizer.state_dict()["state"]
    assert alike({number: dict(flatten(state)) for number, state in now.items()}, expected)
