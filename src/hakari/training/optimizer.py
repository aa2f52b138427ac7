"""AdamW with decoupled decay (torch's fused one), the learning rate over a run, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate

from hakari.training.config import Optimizer


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over a model whose parameters may be shards.

    Matrices decay; vectors and the embedding do not. Parameters that lie on different meshes
    (tensor-parallel or not) go into different groups, since one fused call takes one mesh.
    """
    embedding = getattr(getattr(model, "embed", None), "weight", None)
    groups: dict[tuple[bool, tuple[str, ...]], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and parameter is not embedding
            groups.setdefault((decays, _axes(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": found, "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, _), found in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: Optimizer, step: int, steps: int) -> float:
    """The rate of step `step`, counted from 0, of a run of `steps`.

    Linear warm-up from rate / warmup; then cosine to `final`, or stable and a linear decay to
    `final` over the last share `decay` of the run (WSD), or constant.
    """
    low = config.final
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        done = max(0, step - config.warmup) / max(1, steps - 1 - config.warmup)
        level = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    elif config.schedule == "wsd":
        length = max(1, round(config.decay * steps))
        level = 1 - (1 - low) * max(0, step - (steps - 1 - length)) / length
    else:
        level = 1.0
    return config.learning_rate * warm * level


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(parameters: Iterable[Tensor], mesh: DeviceMesh) -> Tensor:
    """Norm of the whole gradient, over all shards and pipeline stages; the same on every rank.

    mesh: with dimensions named pipeline, data and tensor.
    """
    totals: dict[tuple[str, ...], Tensor] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        split = _axes(parameter, sharded=True)
        local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        square = local.detach().double().square().sum()
        totals[split] = totals[split] + square if split in totals else square
    for split, total in totals.items():
        for axis in split:
            dist.all_reduce(total, group=mesh.get_group(axis))
    whole = torch.stack([*totals.values()]).sum()
    if mesh["pipeline"].size() > 1:
        dist.all_reduce(whole, group=mesh.get_group("pipeline"))
    return whole.sqrt()


def clip(parameters: Iterable[Tensor], norm: Tensor, largest: float) -> None:
    """Scale the gradients down if their norm is above `largest`; 0 leaves them."""
    if not largest:
        return
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(factor.to(local.dtype))


def _axes(parameter: Tensor, sharded: bool = False) -> tuple[str, ...]:
    """Names of the mesh dimensions a parameter lies on, or only those that split it."""
    if not isinstance(parameter, DTensor):
        return ()
    names = parameter.device_mesh.mesh_dim_names or ()
    return tuple(
        name
        for name, placement in zip(names, parameter.placements, strict=True)
        if not (sharded and isinstance(placement, Replicate))
    )
