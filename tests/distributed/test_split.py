"""However the work is split, training is the same: to 1e-12 in float64, with sampled routing."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hakari.training import passes, step
from hakari.training.moe import balance
from tests.distributed.ranks import ranks
from tests.distributed.steps import Seen, steps

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model__moe__experts": 0},
    "grin": {},
    "gshard, tied": {"model__moe__router": "gshard", "model__tied": True},
    "aux_free, z-loss, dense layers between": {
        "model__moe__router": "aux_free",
        "model__moe__layers": [1, 3],
    },
    "grin, float32": {"precision": "float32"},
    "rank scope": {"model__moe__balance_scope": "rank"},
}
SPLITS = {  # (data, tensor, pipeline): more changes
    (1, 1, 1): {},
    (2, 1, 1): {},
    (1, 2, 1): {},
    (1, 1, 2): {"micro_batch": 2},
    (2, 2, 1): {"micro_batch": 2},
    (2, 1, 2): {"micro_batch": 2, "recompute": True},
    (1, 2, 2): {"micro_batch": 4, "parallel__schedule": "GPipe"},
}
MICRO = {"micro-batches": {"micro_batch": 2}, "recomputed": {"recompute": True}}


def case(model: str, split: tuple[int, int, int]) -> dict[str, Any]:
    data, tensor, pipeline = split
    sizes = {"data": data, "tensor": tensor, "pipeline": pipeline}
    named = {f"parallel__{name}": size for name, size in sizes.items()}
    return MODELS[model] | named | SPLITS[split]


def runs(model: str, split: tuple[int, int, int]) -> bool:
    tied = MODELS[model].get("model__tied", False)
    return not (tied and split[2] > 1) and not (model == "rank scope" and split != (1, 1, 1))


CASES = {(model, split): case(model, split) for model in MODELS for split in SPLITS}
CASES = {key: changes for key, changes in CASES.items() if runs(*key)}


def many(cases: list[dict[str, Any]]) -> list[Seen]:
    """One start of the processes for all cases of their number."""
    return [steps(changes) for changes in cases]


@cache
def seen(size: int) -> dict[Any, list[Seen]]:
    """What each rank saw, by case, for all cases on this number of processes."""
    keys = [key for key in CASES if key[1][0] * key[1][1] * key[1][2] == size]
    alone: dict[Any, Any] = {key: CASES[key] for key in keys}
    if size == 1:
        alone |= {
            (model, name): MODELS[model] | changes
            for model in MODELS
            for name, changes in MICRO.items()
        }
    found = ranks(size, many, list(alone.values()))
    return {key: [rank[i] for rank in found] for i, key in enumerate(alone)}


def differences(one: Seen, other: Seen) -> dict[str, float]:
    """Largest relative differences of what a split must not change."""
    scalars = zip(one.losses + one.norms, other.losses + other.norms, strict=True)
    return {
        "losses and norms": max(abs(a - b) / abs(b) for a, b in scalars),
        "first gradients": _largest(one.first, other.first),
        "gradients": _largest(one.gradients, other.gradients),
        "weights": _largest(one.weights, other.weights),
    }


def together(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative difference of whole gradients, of the parameters that `one` has."""
    gap = sum((value - other[name]).square().sum() for name, value in one.items())
    return float((gap / sum(other[name].square().sum() for name in one)).sqrt())


def _largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(
        ((value - other[name]).norm() / other[name].norm().clamp(min=1e-30)).item()
        for name, value in one.items()
    )


@pytest.mark.parametrize("key", [key for key in CASES if key[1] != (1, 1, 1)], ids=str)
def test_a_split_changes_nothing(key: tuple[str, tuple[int, int, int]]) -> None:
    model, (data, tensor, pipeline) = key
    alone = seen(1)[model, (1, 1, 1)][0]
    found = seen(data * tensor * pipeline)[key]
    assert set().union(*(rank.gradients for rank in found)) == set(alone.gradients)
    for rank in found:
        assert rank.loads == alone.loads
        if "float32" in model:  # the optimizer divides noise by noise: look before its first step
            assert together(rank.first, alone.first) < 1e-6
        else:
            assert max(differences(rank, alone).values()) < 1e-12


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("model", [model for model in MODELS if model != "rank scope"])
def test_neither_do_micro_batches_nor_recomputation(model: str, name: str) -> None:
    alone, other = seen(1)[model, (1, 1, 1)][0], seen(1)[model, name][0]
    assert other.loads == alone.loads
    assert together(other.first, alone.first) < 1e-6
    if "float32" not in model:
        assert max(differences(other, alone).values()) < 1e-12
    if name == "recomputed":
        assert max(differences(other, alone).values()) == 0


def test_experts_are_sampled_and_the_balance_loss_is_felt() -> None:
    # otherwise the equalities above would prove little
    alone = seen(1)["grin", (1, 1, 1)][0]
    local = seen(1)["rank scope", "micro-batches"][0]
    deterministic = seen(1)["gshard, tied", (1, 1, 1)][0]
    assert alone.loads[0] != deterministic.loads[0]
    assert differences(local, alone)["gradients"] > 1e-3


# --- mutants ------------------------------------------------------------------------------


def mutant(kind: str, changes: dict[str, Any]) -> Seen:
    """The same steps with one deliberate mistake."""
    if kind == "mean of means":
        with patch.object(step.dist, "all_reduce", _only_losses):
            return steps(changes)
    if kind == "local load":
        with patch.object(passes.balance, "settle", lambda model, group: balance_settle(model)):
            return steps(changes)
    if kind == "noise of the rank":
        with patch.object(step, "token_keys", _rank_keys):
            return steps(changes)
    raise ValueError(kind)


balance_settle = balance.settle
all_reduce = torch.distributed.all_reduce
token_keys = step.token_keys


def _only_losses(tensor: torch.Tensor, *rest: Any, **named: Any) -> None:
    if tensor.is_floating_point() or tensor.ndim or rest:
        all_reduce(tensor, *rest, **named)
        return
    tensor *= 2  # each rank takes its own number of tokens for the other's


def _rank_keys(seed: int, step: int, index: torch.Tensor) -> torch.Tensor:
    return token_keys(seed, step, index - index.min())


@pytest.mark.parametrize("kind", ["mean of means", "local load", "noise of the rank"])
def test_a_mistake_in_the_split_is_caught(kind: str) -> None:
    alone = seen(1)["grin", (1, 1, 1)][0]
    wrong = ranks(2, mutant, kind, CASES["grin", (2, 1, 1)])[0]
    assert max(differences(wrong, alone).values()) > 1e-6
