"""Is the router well? Loads, dead experts, tokens without a gradient, size of the logits.

Summed over all ranks, named by layer, and turned into words before a run is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hakari.training.moe.balance import FACTS
from hakari.training.moe.layer import MixtureOfExperts


class CollapseError(RuntimeError):
    """An expert got no token for too long; the same on every process."""


@dataclass(frozen=True)
class LayerHealth:
    """One layer's router over one step, all ranks together.

    load: tokens sent to each expert. largest, smallest: load of one expert over the mean load.
    entropy: mean of the full probabilities' entropy, in nats. singletons: share of (token, slot)
    pairs with a single candidate, which give the router no gradient. balance: E f.P, 1 if even.
    """

    layer: int
    load: tuple[int, ...]
    largest: float
    smallest: float
    entropy: float
    singletons: float
    balance: float
    z_squared: float
    peak: float


def examine(model: nn.Module, mesh: DeviceMesh | None = None) -> list[LayerHealth]:
    """The health of every sparse layer of a model, or of all its pipeline stages together."""
    found = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    rows = {m.layer: _row(m) for m in found}
    if mesh is not None:
        rows = _together(rows, mesh)
    return [_health(layer, row) for layer, row in sorted(rows.items())]


def problems(
    health: list[LayerHealth], step: int, silent: dict[str, int], dead_steps: int
) -> list[str]:
    """Warnings in words; raises CollapseError naming layer and step if a layer is lost.

    silent: steps since an expert, named "layer.expert", got a token, if it got none in the last;
    updated here. dead_steps: how many end the run; 0 never.
    """
    warnings = []
    for one in health:
        for expert, tokens in enumerate(one.load):
            name = f"{one.layer}.{expert}"
            silent[name] = 0 if tokens else silent.get(name, 0) + 1
            if tokens:
                del silent[name]
        last = [silent.get(f"{one.layer}.{e}", 0) for e in range(len(one.load))]
        dead = [e for e, steps in enumerate(last) if steps >= max(dead_steps, 1)]
        if dead and dead_steps:
            raise CollapseError(
                f"step {step}: layer {one.layer} has collapsed: no token reached expert "
                f"{', '.join(map(str, dead))} for {dead_steps} steps; raise model.moe.balance, "
                "or set model.moe.dead_steps = 0 to go on"
            )
        warnings += _warnings(one)
    return warnings


def _warnings(one: LayerHealth) -> list[str]:
    said = []
    if one.largest > 2:
        said.append(
            f"layer {one.layer}: the fullest expert has {one.largest:.1f} times the mean load"
        )
    if one.singletons > 0.95:
        said.append(
            f"layer {one.layer}: {one.singletons:.0%} of choices have one candidate and give the "
            "router no gradient: raise model.moe.jitter"
        )
    return said


# --- rows of numbers ----------------------------------------------------------------------


def _row(module: MixtureOfExperts) -> Float[Tensor, " cells"]:
    """Counts, chances, facts, top_k and peak, in one row of float64."""
    book = module.ledger
    top_k = torch.tensor([float(module.config.top_k)], dtype=torch.float64).to(book.facts.device)
    peak = book.peak[None].nan_to_num(torch.inf, torch.inf)  # a maximum over ranks may lose NaN
    return torch.cat([book.counts.double(), book.chance, book.facts, top_k, peak])


def _together(rows: dict[int, Tensor], mesh: DeviceMesh) -> dict[int, Tensor]:
    names: list[list[int]] = [[] for _ in range(mesh["pipeline"].size())]
    dist.all_gather_object(names, sorted(rows), group=mesh.get_group("pipeline"))
    layers = sorted(layer for stage in names for layer in stage)
    if not layers:
        return {}
    width = max((len(row) for row in rows.values()), default=0)
    device = next(iter(rows.values())).device if rows else torch.device(mesh.device_type)
    shape = torch.tensor(width, device=device)
    dist.all_reduce(shape, dist.ReduceOp.MAX, mesh.get_group("pipeline"))
    table = torch.zeros(len(layers), int(shape), dtype=torch.float64, device=device)
    for layer, row in rows.items():
        table[layers.index(layer)] = row
    sums, peaks = table[:, :-1].contiguous(), table[:, -1].contiguous()
    for axis in ("data", "pipeline"):
        dist.all_reduce(sums, group=mesh.get_group(axis))
        dist.all_reduce(peaks, dist.ReduceOp.MAX, mesh.get_group(axis))
    sums[:, -1] /= mesh["data"].size()
    return {layer: torch.cat([sums[i], peaks[i : i + 1]]) for i, layer in enumerate(layers)}


def _health(layer: int, row: Float[Tensor, " cells"]) -> LayerHealth:
    cells = row.tolist()
    experts = (len(cells) - len(FACTS) - 2) // 2
    load, chance = cells[:experts], cells[experts : 2 * experts]
    tokens, entropy, singletons, z_squared = cells[2 * experts : 2 * experts + len(FACTS)]
    top_k, peak = cells[-2:]
    each, mean = max(tokens, 1.0), max(sum(load) / experts, 1e-300)
    share = [count / max(sum(load), 1.0) for count in load]
    return LayerHealth(
        layer,
        tuple(round(count) for count in load),
        max(load) / mean,
        min(load) / mean,
        entropy / each,
        singletons / (each * top_k),
        experts * sum(f * p / each for f, p in zip(share, chance, strict=True)),
        z_squared / each,
        peak,
    )


def finite(value: float) -> bool:
    """Neither infinite nor NaN."""
    return value - value == 0
