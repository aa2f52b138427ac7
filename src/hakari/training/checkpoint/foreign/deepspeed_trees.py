"""What DeepSpeed's files hold, as trees: the optimizer's of each rank, and the model's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from hakari.training.checkpoint.foreign.deepspeed_elements import laid, whole
from hakari.training.checkpoint.foreign.deepspeed_model import STATE
from hakari.training.checkpoint.foreign.deepspeed_parts import Span
from hakari.training.checkpoint.foreign.deepspeed_plan import (
    CONSTANT,
    TEMPLATE,
    Plan,
    address,
    sub_groups,
)
from hakari.training.checkpoint.foreign.deepspeed_zero import dealt, flat_spans, partition_spans
from hakari.training.checkpoint.source import WEIGHT, Key, Source
from hakari.training.checkpoint.tensors import TORCH, as_tensor

KEPT = ("global_samples", "universal_checkpoint_info")


def flat_state(source: Source, plan: Plan, stage: int, processes: int, rank: int) -> dict[str, Any]:
    """One rank's optimizer state of ZeRO-1 or 2: equal parts of each group laid end to end."""
    weights, states, paddings, mappings = [], {}, [], []
    for index, group in enumerate(plan.groups):
        names = dealt(group.members, plan.config, processes)
        shapes = {name: source.tensors[name, WEIGHT].shape for name in names}
        total = sum(map(prod, shapes.values()))
        chunk = -(-total // (2 * processes)) * 2
        held = min(chunk, max(0, total - rank * chunk))
        spans = [span for span in flat_spans(shapes, chunk) if span.rank == rank]
        weights.append(laid(source, WEIGHT, spans, held))
        states[index] = _state_of(source, plan, group.members, spans, chunk)
        paddings.append(chunk - held)
        mappings.append(OrderedDict((span.name, address(span.start, span.count)) for span in spans))
    return {
        **_common(plan, stage),
        **_known(plan, "clip_grad"),
        "base_optimizer_state": {"state": states, "param_groups": _param_groups(plan)},
        "single_partition_of_fp32_groups": weights,
        "group_paddings": paddings,
        "partition_count": [processes] * len(plan.groups),
        "ds_version": plan.version,
        "param_slice_mappings": mappings,
    }


def partitioned_state(
    source: Source, plan: Plan, stage: int, processes: int, rank: int
) -> dict[str, Any]:
    """One rank's optimizer state of ZeRO-3: its part of each parameter, by sub-groups."""
    weights, states = [], {}
    found = sub_groups(plan, source, processes)
    for index, (_, names) in enumerate(found):
        shapes = {name: source.tensors[name, WEIGHT].shape for name in names}
        spans, length = partition_spans(shapes, processes)
        mine = [span for span in spans if span.rank == rank]
        weights.append(laid(source, WEIGHT, mine, length))
        states[index] = _state_of(source, plan, names, mine, length)
    ids = [[i for i, (g, _) in enumerate(found) if g == n] for n in range(len(plan.groups))]
    return {
        **_common(plan, stage),
        **_scaled(plan),
        "partition_count": processes,
        STATE: {"state": states, "param_groups": _param_groups(plan, ids)},
        "fp32_flat_groups": weights,
    }


def _common(plan: Plan, stage: int) -> dict[str, Any]:
    """What is not known is left out: the run that loads then keeps its own."""
    known: dict[str, Any] = {"zero_stage": stage, "overflow": False}
    if plan.scaler is not None:
        known["loss_scaler"] = plan.scaler
    return known | _known(plan, "dynamic_loss_scale")


def _known(plan: Plan, key: str) -> dict[str, Any]:
    return {key: plan.optimizer[key]} if key in plan.optimizer else {}


def _scaled(plan: Plan) -> dict[str, Any]:
    """ZeRO-3 cannot load without a loss scaler: unless in fp16, that is a constant 1."""
    if plan.scaler is None and plan.precision == "F16":
        raise ValueError(f"ZeRO-3 in fp16 needs the loss scaler's state: give {TEMPLATE}")
    return {
        "loss_scaler": plan.scaler or CONSTANT,
        "dynamic_loss_scale": plan.optimizer.get("dynamic_loss_scale", False),
    }


def _param_groups(plan: Plan, ids: Sequence[Sequence[int]] | None = None) -> list[dict[str, Any]]:
    ids = [[i] for i in range(len(plan.groups))] if ids is None else ids
    pairs = zip(plan.groups, ids, strict=True)
    return [{**group.options, "params": list(numbers)} for group, numbers in pairs]


def universal_options(source: Source, plan: Plan, stage: int) -> dict[str, Any]:
    """What the universal format keeps of the optimizer beside atoms."""
    groups = _param_groups(plan)
    tree = {
        **_common(plan, stage),
        **_known(plan, "clip_grad"),
        "group_paddings": [0] * len(groups),
        "partition_count": [1] * len(groups),
        "ds_version": plan.version,
        "param_groups": groups,
    }
    if stage == 3:
        scalars = [states_of(source, group.members)[1] for group in plan.groups]
        states = {
            i: {key: counted(plan, key, value) for key, value in s.items()}
            for i, s in enumerate(scalars)
        }
        tree[STATE] = {"state": states, "param_groups": groups}
    return tree


def states_of(source: Source, names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """States of a group's parameters: tensors shaped as the parameters, and common scalars."""
    tensors: dict[str, None] = {}
    scalars: dict[str, Any] = {}
    by_name: dict[str, set[str]] = {name: set() for name in names}
    for key, info in source.tensors.items():
        if key[0] not in by_name or key[1] == WEIGHT:
            continue
        by_name[key[0]].add(key[1])
        if _shaped_as_weight(source, key):
            tensors[key[1]] = None
        else:
            value = as_tensor(source.array(key).reshape(1), info.dtype)[0].item()
            _same(scalars, key, value)
    for key, value in source.scalars.items():
        if key[0] in by_name:
            by_name[key[0]].add(key[1])
            _same(scalars, key, value)
    for name, has in by_name.items():
        lacks = {*tensors, *scalars} - has
        if lacks:
            raise ValueError(f"{name} has no {min(lacks)}, which others of its group have")
    return list(tensors), scalars


def _shaped_as_weight(source: Source, key: Key) -> bool:
    """Whether a state is cut as the weight is; else it is a scalar, or refused."""
    shape, weight = source.tensors[key].shape, source.tensors[key[0], WEIGHT].shape
    if shape == weight and (shape or key[1] != "step"):
        return True
    if shape:
        raise ValueError(
            f"{key[0]} ({key[1]}) is {[*shape]}, its weight {[*weight]}: DeepSpeed shards only "
            "states that are shaped as the weight"
        )
    return False


def _same(scalars: dict[str, Any], key: Key, value: Any) -> None:
    if scalars.setdefault(key[1], value) != value:
        raise ValueError(
            f"{key[0]} has {key[1]} {value!r}, others of its optimizer group {scalars[key[1]]!r}: "
            "DeepSpeed keeps one for a group"
        )


def _state_of(
    source: Source, plan: Plan, names: Sequence[str], spans: Sequence[Span], length: int
) -> dict[str, Any]:
    states, scalars = states_of(source, names)
    return {
        **{key: counted(plan, key, value) for key, value in scalars.items()},
        **{state: laid(source, state, spans, length) for state in states},
    }


def counted(plan: Plan, key: str, value: Any) -> Any:
    """The number of steps as torch keeps it, or as DeepSpeed's own optimizers do."""
    if key != "step":
        return value
    return int(value) if plan.whole_steps else torch.tensor(float(value))


# --- model files --------------------------------------------------------------------------


def model_tree(
    source: Source, plan: Plan, stage: int, processes: int, rank: int, universal: bool = False
) -> dict[str, Any]:
    """A model file. Of a universal checkpoint, ZeRO-3's sub-groups are the groups."""
    sizes = {n: torch.Size(info.shape) for (n, s), info in source.tensors.items() if s == WEIGHT}
    aliases = {alias: name for name, *others in source.tied for alias in others}
    order = _laid_out(source, plan, stage, processes, universal)
    frozen = plan.frozen if stage > 1 else ()
    return {
        "module": _module(source, plan, stage, aliases),
        "buffer_names": list(plan.buffers),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, sizes[name]) for name in names) for names in order],
        "frozen_param_shapes": OrderedDict((n, sizes[n]) for n in frozen) or None,
        "shared_params": aliases,
        "frozen_param_fragments": _fragments(source, frozen, stage, processes, rank) or None,
        "lr_scheduler": plan.lr_scheduler,
        **{key: plan.engine.get(key) for key in ("data_sampler", "random_ltd")},
        "sparse_tensor_module_names": set(plan.engine.get("sparse_tensor_module_names") or ()),
        "skipped_steps": plan.engine.get("skipped_steps", 0),
        "global_steps": source.step or 0,
        "dp_world_size": processes,
        "mp_world_size": 1,
        "ds_config": dict(plan.config),
        "ds_version": plan.version,
        **{key: plan.engine[key] for key in KEPT if key in plan.engine},
        **plan.client,
    }


def _laid_out(
    source: Source, plan: Plan, stage: int, processes: int, universal: bool
) -> list[list[str]]:
    """Trained parameters in the order in which the optimizer's files have them."""
    if stage < 3:
        return [dealt(group.members, plan.config, processes) for group in plan.groups]
    if universal:
        return [list(group.members) for group in plan.groups]
    return [names for _, names in sub_groups(plan, source, processes)]


def _module(
    source: Source, plan: Plan, stage: int, aliases: Mapping[str, str]
) -> OrderedDict[str, Any]:
    """The module's own tensors; with ZeRO-3, empty ones in place of parameters."""
    module: OrderedDict[str, Any] = OrderedDict()
    for name in (name for group in plan.groups for name in group.members):
        module[name] = whole(source, (name, WEIGHT), plan.precision)
    for name in (*plan.frozen, *plan.buffers):
        module[name] = whole(source, (name, WEIGHT))
    if stage == 3:
        for name in set(module) - set(plan.buffers):
            module[name] = torch.empty(0, dtype=TORCH[plan.precision])
    for alias, name in aliases.items():
        module[alias] = module[name]
    return module


def _fragments(
    source: Source, frozen: Sequence[str], stage: int, processes: int, rank: int
) -> OrderedDict[str, Any]:
    """Frozen parameters: whole, or with ZeRO-3 this rank's part of each."""
    found: OrderedDict[str, Any] = OrderedDict()
    for name in frozen:
        info = source.tensors[name, WEIGHT]
        if stage < 3:
            found[name] = whole(source, (name, WEIGHT))
            continue
        spans, length = partition_spans({name: info.shape}, processes)
        mine = [span for span in spans if span.rank == rank]
        found[name] = laid(source, WEIGHT, mine, length, info.dtype)
    return found
