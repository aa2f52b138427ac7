"""A few training steps on made-up tokens, and everything they leave that a split may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hakari.training.batches import Batch
from hakari.training.config import from_dict
from hakari.training.parallel import make_mesh
from hakari.training.step import make_work, prepare, train_step

BATCH, LENGTH, VOCABULARY, STEPS = 8, 12, 64, 3


@dataclass(frozen=True)
class Seen:
    losses: list[float]
    norms: list[float]
    loads: list[list[tuple[int, ...]]]
    first: dict[str, torch.Tensor]  # whole gradients of the first step, of this rank's layers
    gradients: dict[str, torch.Tensor]  # of the last
    weights: dict[str, torch.Tensor]


def table(**changes: Any) -> dict[str, Any]:
    """A small model's configuration; `model__moe__experts=4` sets a nested field."""
    found: dict[str, Any] = {
        "batch": BATCH,
        "length": LENGTH,
        "steps": 10,
        "precision": "float64",
        "optimizer": {"warmup": 0, "clip": 0.05, "learning_rate": 1e-2},
        "model": {
            "vocabulary": VOCABULARY,
            "dim": 32,
            "layers": 4,
            "heads": 4,
            "kv_heads": 4,
            "hidden": 48,
            "tied": False,
            "initial_std": 0.2,
            "moe": {"experts": 4, "hidden": 16, "jitter": 0.3, "balance": 0.1, "z_loss": 0.01},
        },
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        section = found
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return found


def batch(rank: int = 0, size: int = 1) -> Batch:
    """Rows of one data-parallel rank, the same global batch whatever the number of ranks."""
    draw = torch.Generator().manual_seed(3)
    text = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=draw)
    documents = torch.arange(LENGTH).expand(BATCH, -1) // 5
    targets = text[:, 1:].clone()
    targets[1, 4:] = -100  # rows of unequal length: a mean of means would show
    documents = documents.clone()
    documents[1, 4:] = -1
    index = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    return Batch(text[part, :-1], targets[part], documents[part], index[part])


def steps(changes: dict[str, Any]) -> Seen:
    """Three steps of the configuration, on the processes there are."""
    config = from_dict(table(**changes))
    mesh = make_mesh(config.parallel, "cpu")
    trainer = prepare(config, mesh)
    axis = mesh["data"]
    losses, norms, loads = [], [], []
    first: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        work = make_work(trainer, batch(axis.get_local_rank(), axis.size()), step)
        outcome = train_step(trainer, work, step)
        losses.append(outcome.loss)
        norms.append(outcome.gradient_norm)
        loads.append([one.load for one in outcome.health])
        first = first or gradients(trainer.model)
    return Seen(
        losses,
        norms,
        loads,
        first,
        gradients(trainer.model),
        {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()},
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient, whole."""
    named = model.named_parameters()
    return {name: whole(p.grad).clone() for name, p in named if p.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
