"""Which parameter is which where DeepSpeed saved the optimizer as torch has it, by numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from hakari.training.checkpoint.foreign.deepspeed_files import Rank, numel, row_major
from hakari.training.checkpoint.foreign.deepspeed_model import STATE, options, tied_in_module
from hakari.training.checkpoint.foreign.deepspeed_parts import (
    Parts,
    Span,
    place,
    place_states,
    place_whole,
    shaped,
)
from hakari.training.checkpoint.foreign.deepspeed_zero import flat_spans
from hakari.training.checkpoint.foreign.torch_values import Stored
from hakari.training.checkpoint.source import WEIGHT, Group


def whole_groups(
    parts: Parts, model: Rank, given: Sequence[Sequence[str]] | None
) -> tuple[Group, ...]:
    """Place the weights and states of each optimizer group, whole; its options and members."""
    saved = model.tree.get("optimizer")
    if not saved:
        return ()
    base = saved.get(STATE, saved)
    if "param_groups" not in base or "state" not in base:
        raise ValueError(f"{model.file}: the optimizer's state has no groups: not torch's layout")
    groups = []
    masters = saved.get("fp32_groups")
    flats = saved.get("fp32_groups_flat")
    named = groups_of_names(model, base["param_groups"], given, flat=flats is not None)
    for index, (group, names) in enumerate(zip(base["param_groups"], named, strict=True)):
        groups.append(Group(options(group), tuple(names)))
        if flats is not None:
            _one_flat(parts, model, names, flats[index], base["state"].get(group["params"][0], {}))
            continue
        for place_in, (name, number_) in enumerate(zip(names, group["params"], strict=True)):
            shape = tuple(model.get("module", name).shape)
            if masters is not None:
                held = row_major(masters[index][place_in], f"{model.file}: {name}")
                place_whole(parts, name, WEIGHT, shaped(held, shape, f"{name} (weight)"))
            spans = [Span(name, shape, 0, 0, 0, prod(shape))]
            state = base["state"].get(number_, {})
            place_states(parts, spans, [state], [prod(shape)], [model.file], shape)
    return tuple(groups)


def groups_of_names(
    model: Rank,
    groups: Sequence[Mapping[str, Any]],
    given: Sequence[Sequence[str]] | None,
    flat: bool,
) -> list[list[str]]:
    """Names of the parameters of each optimizer group, in order.

    given: what the caller says; else the names that torch keeps if the optimizer was given them;
    else, for a single group of as many parameters as the module has, the module's order. Raises
    ValueError where that leaves the names open, or names what is not in the module.
    """
    if given is not None:
        named = [list(names) for names in given]
    elif all("param_names" in group for group in groups):
        named = [list(group["param_names"]) for group in groups]
    else:
        named = _in_order(model, groups, flat)
    if len(named) != len(groups):
        raise ValueError(f"names has {len(named)} groups, the optimizer {len(groups)}")
    module = model.get("module")
    for group, names in zip(groups, named, strict=True):
        unknown = [name for name in names if not isinstance(module.get(name), Stored)]
        if unknown:
            raise ValueError(f"{model.file}: the module has no parameter {unknown[0]!r}")
        if not flat and len(names) != len(group["params"]):
            raise ValueError(
                f"{len(names)} names for an optimizer group of {len(group['params'])} parameters"
            )
    return named


def _in_order(model: Rank, groups: Sequence[Mapping[str, Any]], flat: bool) -> list[list[str]]:
    """The module's parameters, if there is one group and it has as many."""
    left_out = {*tied_in_module(model), *(model.tree.get("buffer_names") or ())}
    names = [name for name in model.get("module") if name not in left_out]
    if len(groups) == 1 and (flat or len(groups[0]["params"]) == len(names)):
        return [names]
    counts = ", ".join(str(len(group["params"])) for group in groups)
    raise ValueError(
        f"{model.file} keeps optimizer states by number ({counts} in each group) and does not say "
        f"of which of the {len(names)} parameters: give names=, those of each group in order"
    )


def _one_flat(
    parts: Parts, model: Rank, names: Sequence[str], flat: Any, state: Mapping[str, Any]
) -> None:
    """A group whose parameters lie end to end in one tensor (DeepSpeed's fused FP16_Optimizer)."""
    held = row_major(flat, f"{model.file}: fp32_groups_flat")
    shapes = {name: tuple(model.get("module", name).shape) for name in names}
    total = sum(map(prod, shapes.values()))
    if numel(held) != total:
        raise ValueError(
            f"{model.file}: a flat group has {numel(held):,} elements, but {', '.join(names)} have "
            f"{total:,}: give names=, the parameters of each group in order"
        )
    spans = flat_spans(shapes, max(total, 1))
    for span in spans:
        place(parts, WEIGHT, span, held)
    place_states(parts, spans, [state], [total], [model.file])
