"""How large a run is, before anything is allocated: parameters, memory, arithmetic."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hakari.training.config import Config, Model
from hakari.training.model import Transformer

GIB = 2**30
DEVICES = (4, 8, 12, 16, 24, 32, 40, 48, 80, 141, 192)  # GiB of common accelerators
ITEMS = {"float32": (4, 4), "bfloat16": (4, 2), "float64": (8, 8)}  # of a value, of a product
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


def size(config: Config, processes: int = 1, device: str = "cpu") -> Size:
    """Of a run whose `model.vocabulary` is known, on so many processes.

    device: its type; accelerators fuse the norm, and keep other parts of the experts.
    Source of the flops: 6 per active parameter that is multiplied, 12 L H C S for attention
    (PaLM, arXiv 2204.02311, appendix B). The activations are counted tensor by tensor.
    """
    model, split = config.model, config.parallel
    with torch.device("meta"):
        weights = {name: p.numel() for name, p in Transformer(model).named_parameters()}
    total = sum(weights.values())
    active = total - _idle(model)
    data = split.data or max(1, processes // (split.tensor * split.pipeline))
    stage = _fullest_stage(weights, model, split.pipeline) / split.tensor
    # autocast keeps a copy of each weight from forward to backward, whole on each data rank
    copies = stage * 2 if config.precision == "bfloat16" else 0.0
    multiplied = active - (0 if model.tied else weights["embed.weight"])
    attention = 12 * model.layers * model.heads * model.head_dim * config.length
    return Size(
        total,
        active,
        int(stage / data * STATE[config.precision]),
        int(copies + _activations(config, data, device)),
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


def _fullest_stage(weights: Mapping[str, int], model: Model, stages: int) -> int:
    """Parameters of the pipeline stage that has the most, divided as `parallel.keep_stage` does."""
    bounds = [round(i * model.layers / stages) for i in range(1, stages)]
    found = [0] * stages
    for name, count in weights.items():
        part = name.split(".")
        layer = {"embed": 0, "layers": int(part[1]) if part[0] == "layers" else 0}
        found[bisect_right(bounds, layer.get(part[0], model.layers))] += count
    return max(found)


def _activations(config: Config, data: int, device: str) -> float:
    """Bytes kept for the backward pass of the micro-batches in flight, and around the logits.

    Derived: what autograd saves of each operation, per token. A recomputed block keeps its input;
    one at a time keeps everything.
    """
    model, split = config.model, config.parallel
    rows = config.micro_batch or -(-config.batch // data)
    pieces = -(-config.batch // data // rows)
    flying = pieces if split.schedule == "GPipe" else min(split.pipeline, pieces)
    flying = flying if split.pipeline > 1 else 1
    wide, narrow = ITEMS[config.precision]
    layers = range(-(-model.layers // split.pipeline))
    kept = sum(_block_bytes(config, i, device) for i in layers)
    again = 0.0
    if config.recompute:
        kept = len(layers) * model.dim * wide
        again = max(_block_bytes(config, i, device) for i in layers)
    # the logits' probabilities and their gradient, under autocast also the logits
    logits = model.vocabulary / split.tensor * (2 * wide + (narrow if narrow < wide else 0))
    return rows * config.length * (kept * flying + again + logits + 3 * model.dim * wide)


def _block_bytes(config: Config, layer: int, device: str) -> float:
    """Kept per token by one block; by matrix products in their dtype, by norms and router wide."""
    model, tensor = config.model, config.parallel.tensor
    wide, narrow = ITEMS[config.precision]
    cast = narrow < wide  # autocast makes a copy of the input for each product
    fused = device != "cpu" or model.norm == "layer"
    norms = 2 * model.dim * wide * (1 if fused else 2)
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    masked = config.data.isolate or not config.data.packing or 0 < model.window < config.length
    mask = config.length if masked else 0  # as numbers, one for each pair of positions
    attention = narrow * (model.dim * (3 if cast else 1) + mask + (2 * queries + 2 * keys) / tensor)
    attention += wide * model.heads / tensor
    if model.sparse(layer):
        return norms + attention + _sparse_bytes(config, device)
    return norms + attention + narrow * (model.dim * (2 if cast else 1) + 4 * model.hidden / tensor)


def _sparse_bytes(config: Config, device: str) -> float:
    """Kept per token by router and experts."""
    model, moe = config.model, config.model.moe
    wide, narrow = ITEMS[config.precision]
    parts = 2 if device == "cpu" else 4  # one operator keeps gate and up, three also products
    experts = moe.top_k * narrow * (2 * model.dim + parts * moe.hidden / config.parallel.tensor)
    return experts + wide * (model.dim + 3 * moe.experts)


def _count(parameters: int) -> str:
    for scale, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if parameters >= scale:
            return f"{parameters / scale:.3g} {name}"
    return str(parameters)
