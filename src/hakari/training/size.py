"""How large a run is, before anything is allocated: parameters, memory, arithmetic."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from hakari.training.config import Config, Model
from hakari.training.model import Transformer

GIB = 2**30
DEVICES = (4, 8, 12, 16, 24, 32, 40, 48, 80, 141, 192)  # GiB of common accelerators
STATE = {"float32": 16, "bfloat16": 16, "float64": 32}  # bytes: weight, gradient, two moments


@dataclass(frozen=True)
class Size:
    """Of one run. Bytes are for the fullest process; flops for one token, forward and backward."""

    total: int
    active: int
    state_bytes: int
    activation_bytes: int
    flops_per_token: float

    @property
    def bytes(self) -> int:
        """Weights, gradients, optimizer and activations of one process."""
        return self.state_bytes + self.activation_bytes


def size(config: Config, processes: int = 1) -> Size:
    """Of a run whose `model.vocabulary` is known, on so many processes.

    Source of the flops: 6 per active parameter that is multiplied, 12 L H C S for attention
    (PaLM, arXiv 2204.02311, appendix B). The activations are counted tensor by tensor.
    """
    model, split = config.model, config.parallel
    with torch.device("meta"):
        weights = {name: p.numel() for name, p in Transformer(model).named_parameters()}
    total = sum(weights.values())
    active = total - _idle(model)
    data = split.data or max(1, processes // (split.tensor * split.pipeline))
    held = total / (split.tensor * split.pipeline * data)
    multiplied = active - (0 if model.tied else weights["embed.weight"])
    attention = 12 * model.layers * model.heads * model.head_dim * config.length
    return Size(
        total,
        active,
        int(held * STATE[config.precision]),
        _activations(config, data),
        6.0 * multiplied + attention,
    )


def first_line(found: Size, config: Config, device: torch.device) -> str:
    """What a person wants to know before the run takes their machine."""
    sparse = f", {_count(found.active)} active" if found.active < found.total else ""
    need = found.bytes / GIB
    free = free_bytes(device) / GIB
    short = [f"{gib}" for gib in DEVICES if gib < need]
    beyond = f"; will not fit a {short[-1]} GiB device" if short else "; fits a 4 GiB device"
    here = f"{free:.1f} GiB free here" + ("" if need < free else ": IT WILL NOT FIT")
    return (
        f"{_count(found.total)} parameters{sparse}; about {need:.2f} GiB a process "
        f"({found.state_bytes / GIB:.2f} state, {found.activation_bytes / GIB:.2f} activations), "
        f"{here}{beyond}"
    )


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _idle(model: Model) -> int:
    """Parameters of the experts that one token does not visit."""
    moe = model.moe
    layers = sum(model.sparse(i) for i in range(model.layers))
    return layers * max(0, moe.experts - moe.top_k) * 3 * model.dim * moe.hidden


def _activations(config: Config, data: int) -> int:
    """Bytes kept for the backward pass of the micro-batches in flight, and the logits.

    Derived: what autograd saves of each operation, per token; a recomputed block keeps its input.
    """
    model, split = config.model, config.parallel
    item = {"float32": 4, "bfloat16": 4, "float64": 8}[config.precision]
    rows = config.micro_batch or -(-config.batch // data)
    tokens = rows * config.length
    layers = -(-model.layers // split.pipeline)
    blocks = [_block_values(model, i, split.tensor) for i in range(layers)]
    kept = layers * model.dim + max(blocks) if config.recompute else sum(blocks)
    flying = min(split.pipeline, -(-config.batch // data // rows)) if split.pipeline > 1 else 1
    logits = 3 * model.vocabulary / split.tensor + 2 * model.dim
    return int(tokens * item * (kept * flying + logits))


def _block_values(model: Model, layer: int, tensor: int) -> float:
    """Values kept per token by one block."""
    dim, moe = model.dim, model.moe
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = 2 * dim + (2 * queries + 3 * keys + model.heads) / tensor
    norms = 2 * dim
    if not model.sparse(layer):
        return attention + norms + 4 * model.hidden / tensor
    experts = moe.top_k * (2 * dim + 4 * moe.hidden / tensor)
    return attention + norms + experts + 4 * moe.experts


def _count(parameters: int) -> str:
    for scale, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if parameters >= scale:
            return f"{parameters / scale:.3g} {name}"
    return str(parameters)
