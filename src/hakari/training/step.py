"""One training step: model, optimizer and passes of a configuration, and what is done with them.

`trainer = prepare(config, mesh)`, then, for each step and batch,
`train_step(trainer, make_work(trainer, batch, step), step)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hakari.training.batches import Batch
from hakari.training.config import Config
from hakari.training.model import Transformer, initialise, tie
from hakari.training.moe import balance
from hakari.training.moe.health import LayerHealth, examine, finite
from hakari.training.moe.layer import adjust_bias
from hakari.training.noise import token_keys
from hakari.training.optimizer import clip, gradient_norm, learning_rate, make_optimizer, set_rate
from hakari.training.parallel import align_gradients, keep_stage, parallelize
from hakari.training.passes import Passes, Work, make_passes

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Trainer:
    """What the loop works with; made by `prepare`, usable without the loop."""

    config: Config
    mesh: DeviceMesh
    model: Transformer
    optimizer: torch.optim.Optimizer
    passes: Passes
    rows: int  # sequences of this data-parallel rank in a step


def prepare(config: Config, mesh: DeviceMesh) -> Trainer:
    """Model, optimizer and passes of a configuration whose vocabulary is known."""
    model = build(config, mesh)
    rows = config.batch // mesh["data"].size()
    passes = make_passes(
        model,
        mesh,
        sequences=rows,
        micro_batch=config.micro_batch or rows,
        length=config.length,
        schedule=config.parallel.schedule,
        autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
    )
    return Trainer(config, mesh, model, make_optimizer(model, config.optimizer), passes, rows)


def build(config: Config, mesh: DeviceMesh) -> Transformer:
    """The model, or this rank's part of it: on meta, split, then filled with weights."""
    with torch.device("meta"):
        model = Transformer(config.model).to(DTYPES[config.precision])
    stages = mesh["pipeline"]
    keep_stage(model, stages.get_local_rank(), stages.size())
    parallelize(model, mesh)
    model.to_empty(device=mesh.device_type)
    tie(model)
    initialise(model, config.seed)
    if config.start:
        from hakari.training.upcycling import start

        start(model, config.start, config.seed)
    model.recompute = config.recompute
    if config.compile:
        # the experts' operator says what it keeps only when it has seen the load
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
        for block in model.layers.values():
            block.compile()
    return model


@dataclass(frozen=True)
class Outcome:
    """Of one step, the same on every rank: nats a token, norm before clipping, routers."""

    loss: float
    gradient_norm: float
    tokens: int
    health: list[LayerHealth]


def train_step(trainer: Trainer, work: Work, step: int) -> Outcome:
    """One optimizer step on this rank's `work`; step counts from 0.

    Raises FloatingPointError, and leaves weights and optimizer as they were, if loss, gradient
    or router is not finite on any rank.
    """
    config, model, mesh = trainer.config, trainer.model, trainer.mesh
    trainer.optimizer.zero_grad()
    tokens = (work.targets != -100).sum()
    dist.all_reduce(tokens, group=mesh.get_group("data"))
    loss = _summed(trainer.passes.train(work, tokens), mesh)
    align_gradients(model)
    parameters = list(model.parameters())
    norm = gradient_norm(parameters, mesh)
    outcome = Outcome(loss.item(), norm.item(), int(tokens), examine(model, mesh))
    _refuse(outcome, trainer, work, step)
    clip(parameters, norm, config.optimizer.clip)
    set_rate(trainer.optimizer, learning_rate(config.optimizer, step, config.steps))
    trainer.optimizer.step()
    if config.model.moe.router == "aux_free":
        balance.settle(model, mesh.get_group("data"))
        adjust_bias(model, config.model.moe.bias_rate)
    return outcome


def make_work(trainer: Trainer, batch: Batch, step: int | None) -> Work:
    """A batch on the device, with the noise of a step; step None: no noise, for validation."""
    device = trainer.mesh.device_type
    data = trainer.config.data
    masked = data.isolate or not data.packing
    return Work(
        batch.tokens.to(device),
        batch.targets.to(device),
        batch.documents.to(device) if masked else None,
        None if step is None else token_keys(trainer.config.seed, step, batch.index).to(device),
    )


def validate(trainer: Trainer, batches: Iterable[Batch]) -> float:
    """Mean loss in nats a token over batches, each this data-parallel rank's share."""
    mesh = trainer.mesh
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device_type)
    for batch in batches:
        work = make_work(trainer, batch, None)
        total[0] += trainer.passes.evaluate(work)
        total[1] += (work.targets != -100).sum()
    loss = _summed(total[0], mesh)
    dist.all_reduce(total[1], group=mesh.get_group("data"))
    return float(loss / total[1])


# --- helpers ------------------------------------------------------------------------------


def _summed(loss: Tensor, mesh: DeviceMesh) -> Tensor:
    """Over data-parallel ranks and pipeline stages; tensor-parallel ranks have the same."""
    loss = loss.clone()
    for axis in ("data", "pipeline"):
        if mesh[axis].size() > 1:
            dist.all_reduce(loss, group=mesh.get_group(axis))
    return loss


def _refuse(outcome: Outcome, trainer: Trainer, work: Work, step: int) -> None:
    for one in outcome.health:
        if not finite(one.peak):
            raise FloatingPointError(
                f"step {step + 1}: router logits of layer {one.layer} are not finite: lower "
                "optimizer.learning_rate, or raise model.moe.z_loss"
            )
    if not (finite(outcome.loss) and finite(outcome.gradient_norm)):
        where = _first_broken(trainer, work)
        raise FloatingPointError(
            f"step {step + 1}: loss {outcome.loss}, gradient norm {outcome.gradient_norm}{where}: "
            "lower optimizer.learning_rate or lengthen optimizer.warmup"
        )


def _first_broken(trainer: Trainer, work: Work) -> str:
    """Where a value stops being finite: a weight, else a module's output in a second forward.

    Every rank takes part, since the forward pass may communicate; each names what it has.
    """
    weights = [name for name, p in trainer.model.named_parameters() if _broken(p.detach())]
    outputs: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and _broken(output):
                outputs.append(name)

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in trainer.model.named_modules()
        if name.count(".") == 2 or name in ("embed", "norm", "head")
    ]
    trainer.passes.evaluate(work)
    for handle in hooks:
        handle.remove()
    if weights:
        return f", weight {weights[0]} is not finite"
    return f", first in the output of {outputs[0]}" if outputs else ", in the backward pass"


def _broken(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not bool(local.isfinite().all())
