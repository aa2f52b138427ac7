"""A plain model -> the same model on many processes, by PyTorch's own parts.

One mesh (pipeline, data, tensor). Tensor parallelism shares out heads, widths and vocabulary;
data parallelism is FSDP2: other sequences on each rank, parameters and optimizer sharded. There
is no expert parallelism: every rank of a tensor group holds a slice of every expert, so that no
load makes one wait for another and no token is dropped (mixture-of-experts.md section 3).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from hakari.training.config import Config, Parallel
from hakari.training.model import Block, Transformer, tie
from hakari.training.moe.layer import MixtureOfExperts

AXES = ("pipeline", "data", "tensor")


def start_processes(device: str) -> None:
    """Join the process group that torchrun described; alone, make one of a single process."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def leave_processes() -> None:
    """Leave the process group once every process has come here (or ten seconds have passed).

    They meet at the store: the first one out of a last collective may close a connection with
    data that its peer has not read, and the peer would end in "connection reset".
    """
    size = dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    with suppress(RuntimeError):  # the owner of the store may be gone
        store.add("hakari/leaving", 1)
        until = time.monotonic() + 10
        while store.add("hakari/leaving", 0) < size and time.monotonic() < until:
            time.sleep(0.01)
    dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process, where there is none yet, for as long as the block runs."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_mesh(config: Parallel, device: str) -> DeviceMesh:
    """The mesh (pipeline, data, tensor) over all processes.

    Raises ValueError if the sizes do not multiply to the number of processes.
    """
    world = dist.get_world_size()
    fixed = config.tensor * config.pipeline
    data = config.data or max(1, world // fixed)
    if data * fixed != world:
        raise ValueError(
            f"parallel: data {data} x tensor {config.tensor} x pipeline {config.pipeline} = "
            f"{data * fixed} processes, but there are {world}: start that many with "
            "torchrun --nproc-per-node, or change the sizes"
        )
    return init_device_mesh(device, (config.pipeline, data, config.tensor), mesh_dim_names=AXES)


def check(config: Config, ranks: int) -> None:
    """Raise ValueError, before anything is built, for a split that does not divide the work.

    ranks: data-parallel processes.
    """
    _check_batch(config, ranks)
    model, split = config.model, config.parallel
    t = split.tensor
    widths = {
        "model.heads": model.heads,
        "model.kv_heads": model.kv_heads,
        "model.hidden": model.hidden,
        "model.vocabulary": model.vocabulary,
        "model.moe.hidden": model.moe.hidden if model.moe.experts else t,
    }
    for name, value in widths.items():
        if value % t:
            raise ValueError(f"{name} = {value} is not a multiple of parallel.tensor = {t}")
    if split.pipeline > model.layers:
        raise ValueError(f"parallel.pipeline = {split.pipeline} exceeds {model.layers} layers")
    if config.compile and t > 1:
        raise ValueError(
            f"compile = true with parallel.tensor = {t}: torch does not compile split weights; "
            "set compile = false"
        )
    if split.pipeline > 1 and model.tied:
        raise ValueError(
            "model.tied = true with parallel.pipeline > 1: embedding and head would lie on "
            "different stages; set model.tied = false"
        )


def _check_batch(config: Config, ranks: int) -> None:
    rows, size = config.batch // ranks, config.micro_batch
    if config.batch % ranks:
        raise ValueError(
            f"batch = {config.batch} is not a multiple of {ranks} data-parallel processes"
        )
    if config.parallel.pipeline > 1 and size and rows % size:
        raise ValueError(
            f"micro_batch = {size} does not divide the {rows} sequences of a pipeline: its stages "
            "expect equal micro-batches"
        )


def keep_stage(model: Transformer, stage: int, stages: int) -> Transformer:
    """Drop what other pipeline stages hold; layers keep their names."""
    layers = list(model.layers)
    bounds = [round(i * len(layers) / stages) for i in range(stages + 1)]
    for name in layers[: bounds[stage]] + layers[bounds[stage + 1] :]:
        del model.layers[name]
    if stage > 0:
        model.embed = None
    if stage < stages - 1:
        model.norm = model.head = None
    return model


def parallelize(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Apply tensor and data parallelism to a model, or a stage of one, that is still on meta."""
    if mesh["tensor"].size() > 1:
        _tensor(model, mesh["tensor"])
    if mesh["data"].size() > 1:
        _data(model, mesh["data"])
    return model


# --- tensor -------------------------------------------------------------------------------


class ExpertSlices(ParallelStyle):
    """Each rank holds a slice of the width of every expert; `expert_mlp` does the rest."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, dim in (("gate", 1), ("up", 1), ("down", 2)):
            whole = getattr(module, name)
            shard = distribute_tensor(whole, mesh, [Shard(dim)])
            module.register_parameter(name, nn.Parameter(shard))
        return module


def _tensor(model: Transformer, mesh: DeviceMesh) -> None:
    if model.embed is not None:
        parallelize_module(model.embed, mesh, RowwiseParallel(input_layouts=Replicate()))
    for block in model.layers.values():
        if isinstance(block, Block):
            parallelize_module(block, mesh, _block_plan(block))
    if model.head is not None:
        whole = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model.head, mesh, whole)
    tie(model)


def _block_plan(block: Block) -> dict[str, ParallelStyle]:
    whole = Replicate()
    plan: dict[str, ParallelStyle] = {
        "attention": PrepareModuleInput(
            input_layouts=(whole, None), desired_input_layouts=(whole, None)
        ),
        "attention.output": RowwiseParallel(),
    }
    plan |= {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    if isinstance(block.mlp, MixtureOfExperts):
        return plan | {"mlp": ExpertSlices()}
    return plan | {
        "mlp": PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }


# --- data ---------------------------------------------------------------------------------


def _data(model: Transformer, mesh: DeviceMesh) -> None:
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # losses are divided by the tokens of the whole step: gradients are sums
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def synchronise_on_last(model: nn.Module, last: bool) -> None:
    """Reduce gradients over data-parallel ranks only in the last backward pass of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def align_gradients(model: nn.Module) -> None:
    """Split each gradient as its parameter is: an embedding's comes whole from a tensor group."""
    for parameter in model.parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor):
            # nothing moves where the placements already agree
            parameter.grad = grad.redistribute(placements=parameter.placements)
