"""Small models and optimizers on every split, whose runs are the same to the bit on all of them.

Gradients are a function of each element and the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from hakari.training.checkpoint.pieces import named_values


class Net(nn.Module):
    """Sizes that no number of processes divides, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(10, 13), nn.LayerNorm(13), nn.Linear(13, 7)
        self.register_buffer("scale", torch.tensor(1.0 + seed))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()) * self.scale


# --- splits ---------------------------------------------------------------------------------


def alone_in_it(net: Net) -> nn.Module:
    return net


def ddp(net: Net) -> nn.Module:
    return DistributedDataParallel(net)


def fsdp(net: Net) -> nn.Module:
    fully_shard(net.first)
    return fully_shard(net)


def tensor(net: Net, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    return parallelize_module(net, mesh, {"first": ColwiseParallel(), "last": RowwiseParallel()})


def both(net: Net) -> nn.Module:
    mesh = init_device_mesh(
        "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor")
    )
    tensor(net, mesh["tensor"])
    return fully_shard(net, mesh=mesh["data"])


def pipeline(net: Net) -> nn.Module:
    """Ranks that have different modules, each named as in the whole."""
    mine = nn.Module()
    if dist.get_rank() % 2 == 0:
        mine.first = net.first
        mine.register_buffer("scale", net.scale)
    else:
        mine.norm, mine.last = net.norm, net.last
    return mine


SPLITS: dict[str, Callable[[Net], nn.Module]] = {
    "alone": alone_in_it, "ddp": ddp, "fsdp": fsdp, "tensor": tensor, "both": both,
    "pipeline": pipeline,
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}
Run = tuple[nn.Module, torch.optim.Optimizer]


def made(split: str, kind: str = "AdamW", seed: int = 0) -> Run:
    model = SPLITS[split](Net(seed))
    return model, OPTIMIZERS[kind](model.parameters())


def train(run: Run, first: int, last: int) -> Run:
    for step in range(first, last):
        for parameter in run[0].parameters():
            value = parameter.detach()
            parameter.grad = value * value - value * (0.5 * step + 0.5)
        run[1].step()
    return run


def state(run: Run) -> dict[str, Tensor]:
    """Whole tensors by name, of what a rank has."""
    values, _, _ = named_values([run[0]])
    found = {name: full(value) for name, value in values.items()}
    for name, parameter in values.items():
        for key, value in run[1].state.get(parameter, {}).items():
            found[f"{name} {key}"] = full(value)
    return found


def full(value: Any) -> Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
    return whole.detach().clone()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found
    assert set(found) <= set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
