"""DeepSpeed's universal format: a folder `zero/<parameter>/` with one file for each state.

`fp32.pt`, `exp_avg.pt`, ... hold {'param': tensor, ...} where ZeRO-1 or 2 was converted, and bare,
flat tensors where ZeRO-3 was; `step.pt` is there in the first case only. `optimizer_state.pt`
has the options of the groups; the model's files are copies of those of the save.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from hakari.training.checkpoint.foreign.deepspeed_files import (
    MODEL,
    Rank,
    Slice,
    by_rank,
    laid_out,
    numel,
    read_rank,
    refuse,
    row_major,
    tagged,
    tensors_of,
)
from hakari.training.checkpoint.foreign.deepspeed_model import (
    STATE,
    extra,
    optimizer_class,
    options,
    place_module,
    shapes,
    ties,
)
from hakari.training.checkpoint.foreign.deepspeed_parts import (
    Parts,
    Span,
    close,
    place,
    place_scalar,
)
from hakari.training.checkpoint.foreign.deepspeed_zero import frozen_partitions, in_order
from hakari.training.checkpoint.source import WEIGHT, Group, Source
from hakari.training.checkpoint.storage import Folder, Location

LATEST, OPTIONS = "latest_universal", "zero/optimizer_state.pt"


def open_universal(where: Location, tag: str | None = None) -> Source:
    """Open a checkpoint in DeepSpeed's universal format.

    where: the folder with `latest_universal`, or one save in it. tag: the save, instead of the
    one that `latest_universal` names. Atoms are whole tensors, however many ranks saved; of
    more than one model-parallel rank, frozen parameters and buffers, which are slices, are left
    out and named in origin. Raises ValueError for atoms that are missing (a conversion that was
    interrupted), left over, damaged or of another shape.
    """
    with laid_out(where):
        folder, tag = tagged(where, tag, LATEST)
        names = folder.entries()
        refuse(folder, names)
        files = by_rank(folder, names, MODEL)
        if not files or "zero" not in names:
            raise ValueError(
                f"{folder.where} has no folder 'zero' beside model_states.pt files: give the "
                f"folder with '{LATEST}', or a save in it"
            )
        models = [read_rank(folder, files[rank]) for rank in sorted(files)]
        return _source(folder, tag, models, read_rank(folder, OPTIONS))


def _source(folder: Folder, tag: str, models: list[Rank], saved: Rank) -> Source:
    parts, model = Parts(folder), models[0]
    named = _wanted(models)
    _atoms(parts, named, saved)
    groups = _groups(model, named, saved)
    tied = ties(model)
    left_out = _rest(parts, models, {alias for _, *aliases in tied for alias in aliases})
    origin = {
        "framework": "deepspeed-universal",
        "version": model.tree.get("ds_version"),
        "topology": {"dp": model.get("dp_world_size"), "mp": model.get("mp_world_size")},
        "tag": tag,
        "left_out": left_out,
    }
    rest = extra(folder, model, saved.tree)
    keys = [*parts.infos, *parts.scalars]
    optimizer = optimizer_class(model.tree.get("ds_config"), keys, groups)
    return close(parts, groups, tied, optimizer, model.tree.get("global_steps"), rest, origin)


def _wanted(models: list[Rank]) -> list[dict[str, tuple[int, ...]]]:
    """Parameters by group: those of the first rank, then what other pipeline stages add."""
    groups = shapes(models[0])
    for model in models[1:]:
        for mine, theirs in zip(groups, shapes(model), strict=True):
            for name, shape in theirs.items():
                mine.setdefault(name, shape)
    return groups


def _atoms(parts: Parts, named: list[dict[str, tuple[int, ...]]], saved: Rank) -> None:
    folder = parts.folder.child("zero")
    wanted = {name: shape for group in named for name, shape in group.items()}
    found = {name for name in folder.entries() if name != "optimizer_state.pt"}
    for name in [*sorted(set(wanted) - found), *sorted(found - set(wanted))]:
        what = "is no parameter of the model" if name in found else "is missing"
        raise ValueError(
            f"{folder.where}/{name} {what}, by param_shapes: the conversion was interrupted, or "
            "files of two are mixed"
        )
    states: dict[str, list[str]] = {}
    for name, shape in wanted.items():
        files = [file for file in folder.child(name).entries() if file.endswith(".pt")]
        states[name] = [file.removesuffix(".pt") for file in files]
        for state in states[name]:
            _atom(parts, name, state, shape)
    every = {"fp32", *(state for has in states.values() for state in has)}
    for name, has in states.items():
        if every - set(has):
            raise ValueError(f"{folder.where}/{name}/{min(every - set(has))}.pt is missing")
    if STATE in saved.tree:
        _steps_of_sub_groups(parts, named, saved)


def _atom(parts: Parts, name: str, state: str, shape: tuple[int, ...]) -> None:
    file = f"zero/{name}/{state}.pt"
    value = tensors_of(parts.folder, file)
    if state == "step":
        place_scalar(parts, name, state, value, file)
        return
    logical = isinstance(value, Mapping)
    stored = row_major(value.get("param") if isinstance(value, Mapping) else value, file)
    if logical:
        shape = tuple(stored.shape)
    elif numel(stored) != prod(shape):
        raise ValueError(f"{file} has {numel(stored):,} elements; {name} is {[*shape]}")
    key = WEIGHT if state == "fp32" else state
    place(parts, key, Span(name, shape, 0, 0, 0, prod(shape)), stored)


def _steps_of_sub_groups(
    parts: Parts, named: list[dict[str, tuple[int, ...]]], saved: Rank
) -> None:
    """ZeRO-3's conversion leaves the numbers of steps in the optimizer's file, by sub-group."""
    states = saved.get(STATE, "state")
    for sub, names in enumerate(named):
        step = states.get(sub, states.get(0, {})).get("step")
        for name in names if step is not None else ():
            place_scalar(parts, name, "step", step, OPTIONS)


def _groups(model: Rank, named: list[dict[str, tuple[int, ...]]], saved: Rank) -> tuple[Group, ...]:
    groups = saved.get("param_groups")
    if STATE in saved.tree:
        members = [[name for sub in g["params"] for name in named[sub]] for g in groups]
    else:
        config, dp = model.tree.get("ds_config"), model.get("dp_world_size")
        members = [in_order(list(names), config, dp) for names in named]
    if len(members) != len(groups) or sum(map(len, members)) != sum(map(len, named)):
        raise ValueError(
            f"{OPTIONS} has {len(groups)} optimizer groups, which do not fit the {len(named)} of "
            f"param_shapes in {model.file}"
        )
    return tuple(
        Group(options(group), tuple(names)) for group, names in zip(groups, members, strict=True)
    )


def _rest(parts: Parts, models: list[Rank], aliases: set[str]) -> list[str]:
    """Place frozen parameters and buffers; or, of several slices, say which are left out."""
    model = models[0]
    if model.get("mp_world_size") > 1:
        own = model.get("module") or {}
        return [n for n in own if (n, WEIGHT) not in parts.infos and n not in aliases]
    if model.tree.get("frozen_param_shapes") and "zero_pp_rank" in model.file:
        if len(models) != model.get("dp_world_size"):
            raise ValueError(
                f"{parts.folder.where} has {len(models)} model_states.pt files of the "
                f"{model.get('dp_world_size')} that hold partitions of frozen parameters"
            )
        frozen_partitions(parts, Slice(0, tuple(models), ()))
    place_module(parts, model, aliases)
    return []
