"""The forward and backward passes of one step, in micro-batches, here or through a pipeline.

Losses are sums divided by the tokens of the whole step, over all ranks and micro-batches, so
that a gradient is a sum wherever its terms were computed: a mean of means would weigh a token
by the company it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from hakari.training.model import Transformer
from hakari.training.moe import balance
from hakari.training.parallel import synchronise_on_last

Precision = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Work:
    """The share of a step that falls to this data-parallel rank, on its device."""

    tokens: Int64[Tensor, "B S"]
    targets: Int64[Tensor, "B S"]  # -100 where there is nothing to predict
    documents: Int64[Tensor, "B S"] | None
    noise: Int64[Tensor, "B S"] | None

    def pieces(self, size: int) -> Iterator[Work]:
        """In micro-batches of `size` sequences."""
        for start in range(0, len(self.tokens), size):
            yield Work(
                self.tokens[start : start + size],
                self.targets[start : start + size],
                None if self.documents is None else self.documents[start : start + size],
                None if self.noise is None else self.noise[start : start + size],
            )


@dataclass(frozen=True)
class Passes:
    """What a step needs of a model, however it is split; each takes this rank's `Work`.

    train: (work, tokens of the whole step) -> this rank's part of the mean loss, zero on
    pipeline stages that do not see it; gradients are accumulated, experts balanced.
    evaluate: the summed loss, in evaluation mode.
    """

    train: Callable[[Work, Tensor], Tensor]
    evaluate: Callable[[Work], Tensor]


def make_passes(
    model: Transformer,
    mesh: DeviceMesh,
    *,
    sequences: int,
    micro_batch: int,
    length: int,
    schedule: str = "1F1B",
    autocast: torch.dtype | None = None,
) -> Passes:
    """The passes of a model, or of one stage of it where the mesh has a pipeline.

    sequences: rows of this rank's `Work`. micro_batch: rows in one forward pass.
    autocast: dtype of the matrix products.
    """
    device = mesh.device_type

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(device, autocast) if autocast else nullcontext()

    if mesh["pipeline"].size() > 1:
        shape = (micro_batch, length)
        return _pipelined(model, mesh, sequences // micro_batch, shape, schedule, precision)
    return _sequential(model, mesh, micro_batch, precision)


# --- one stage ----------------------------------------------------------------------------


def _sequential(model: Transformer, mesh: DeviceMesh, size: int, precision: Precision) -> Passes:
    def loss(piece: Work) -> Tensor:
        with precision():
            return model(piece.tokens, piece.documents, piece.noise, piece.targets)

    @torch.no_grad()
    def total(work: Work) -> Tensor:
        with _vocabulary(model):
            return torch.stack([loss(piece).double() for piece in work.pieces(size)]).sum()

    def train(work: Work, tokens: Tensor) -> Tensor:
        pieces = list(work.pieces(size))
        _open(model, mesh, tokens, (lambda: total(work)) if len(pieces) > 1 else None)
        found = torch.zeros((), device=work.tokens.device, dtype=torch.float64)
        for number, piece in enumerate(pieces, 1):
            synchronise_on_last(model, number == len(pieces))
            with _vocabulary(model):
                part = loss(piece) / tokens
                if len(pieces) == 1:
                    balance.settle(model, mesh.get_group("data"))
                part.backward()
            found += part.detach()
        return found

    return Passes(train, partial(_evaluating, model, total))


def _open(
    model: Transformer, mesh: DeviceMesh, tokens: Tensor, count: Callable[[], object] | None
) -> None:
    """Begin a step; with several micro-batches, count the load of all of them first.

    The balance gradient of the first micro-batch needs the load of the last: hence a pass
    without gradients, a quarter of the step's arithmetic, which balance_scope = 'rank' saves.
    """
    balance.begin(model, tokens)
    moe = model.config.moe
    needed = moe.experts and moe.balance and moe.balance_scope == "step"
    if count and needed and moe.router != "aux_free":
        count()
        balance.settle(model, mesh.get_group("data"))
        balance.begin(model, tokens, settled=True)


def _evaluating(model: Transformer, total: Callable[[Work], Tensor], work: Work) -> Tensor:
    model.eval()
    try:
        return total(work)
    finally:
        model.train()


def _vocabulary(model: Transformer) -> AbstractContextManager[object]:
    """What a loss over a split vocabulary needs around it, forward and backward."""
    weight = None if model.head is None else model.head.weight
    if isinstance(weight, DTensor) and "tensor" in (weight.device_mesh.mesh_dim_names or ()):
        return loss_parallel()
    return nullcontext()


# --- a pipeline ---------------------------------------------------------------------------


def _pipelined(
    model: Transformer,
    mesh: DeviceMesh,
    pieces: int,
    shape: tuple[int, int],
    schedule: str,
    precision: Precision,
) -> Passes:
    axis = mesh["pipeline"]
    device = torch.device(mesh.device_type)
    hidden = torch.empty(*shape, model.config.dim, device="meta", dtype=_dtype(model))
    hidden.requires_grad_()
    first, last = axis.get_local_rank() == 0, axis.get_local_rank() == axis.size() - 1
    stage = PipelineStage(
        model,
        axis.get_local_rank(),
        axis.size(),
        device,
        torch.empty(*shape, device="meta", dtype=torch.int64) if first else hidden,
        hidden.sum() if last else hidden,
        group=axis.get_group(),
    )
    make = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}[schedule]
    run = make(stage, pieces, lambda loss, _, tokens: loss / tokens, scale_grads=False)

    def go(call: Callable[..., Any], work: Work, tokens: Tensor) -> Tensor:
        given = {"documents": work.documents, "noise": work.noise, "targets": work.targets}
        losses: list[Tensor] = []
        with precision(), _vocabulary(model):
            call(
                *((work.tokens,) if first else ()),
                target=work.targets if last else None,
                losses=losses if last else None,
                return_outputs=False,
                loss_kwargs={"tokens": tokens},
                **{name: value for name, value in given.items() if value is not None},
            )
        found = [x.detach().double() for x in losses] or [torch.zeros((), dtype=torch.float64)]
        return torch.stack(found).sum().to(device)

    @torch.no_grad()
    def total(work: Work) -> Tensor:
        return go(run.eval, work, torch.ones((), device=device))

    def train(work: Work, tokens: Tensor) -> Tensor:
        _open(model, mesh, tokens, lambda: total(work))
        return go(run.step, work, tokens)

    return Passes(train, partial(_evaluating, model, total))


def _dtype(model: Transformer) -> torch.dtype:
    return next(model.parameters()).dtype
