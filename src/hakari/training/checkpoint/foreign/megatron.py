"""Megatron-core's torch_dist checkpoints, both ways.

    program = shipped("megatron-gpt", {"heads": 32, "kv_heads": 8, "head_dim": 128,
                                       "vocab": 128256, "vocab_multiple": 128})
    source = open_megatron("iter_0001000", program)  # by Hugging Face's names
    write_megatron(source, "another", program)

A folder is a container of torch.distributed.checkpoint, whose tensors are whole whatever the
tensor and pipeline parallelism was, beside common.pt (what all ranks share, such as arguments)
and metadata.json (which container it is). An optimizer's states are there by the names of
parameters, 'optimizer.state.exp_avg.decoder. ...', if it was saved fully reshardable; other forms
are ranges of one rank's buffers, and are refused.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hakari.training.checkpoint.boxes import Box
from hakari.training.checkpoint.foreign.checked_folder import checked
from hakari.training.checkpoint.foreign.dcp_container import Container, open_container
from hakari.training.checkpoint.foreign.dcp_writing import write_dcp
from hakari.training.checkpoint.foreign.optimizer_class import class_by_states
from hakari.training.checkpoint.foreign.torch_files import read_torch
from hakari.training.checkpoint.foreign.torch_values import Record, plain
from hakari.training.checkpoint.foreign.torch_writing import write_torch
from hakari.training.checkpoint.language.assembly import apply, invert
from hakari.training.checkpoint.language.rules import Program
from hakari.training.checkpoint.source import WEIGHT, Group, Info, Key, Source
from hakari.training.checkpoint.storage import Folder, Location, open_folder, small

CONTAINER, COMMON = "metadata.json", "common.pt"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MASTERS = ("fp32_param", "param")
"""What optimizers call the weights that they update: Float16Optimizer's, DistributedOptimizer's."""
RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")
STEP, CLASS, ARGUMENTS = "step", "class", "argparse.Namespace"
NAMES = "param_names"
"""Key of a group's parameters, torch's own; `write_megatron` gives it where groups are several."""
INERT = ("megatron.*", "torch.distributed.checkpoint.planner.*", "torch.serialization.*")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")


def open_megatron(where: Location, program: Program | None = None) -> Source:
    """An opened torch_dist folder (iter_...), by the names of `program`'s atoms, or its own.

    A weight is the optimizer's fp32 one, where there is one; then the module's own copy is left
    out. Steps, which Megatron has once, are each parameter's. One optimizer group has all
    parameters; of which of several a parameter is Megatron does not save (`write_megatron` does),
    so that several are only in `extra`, {'common': common.pt's tree, 'objects': names of what is
    neither and stays unread}.
    Raises FileNotFoundError; ValueError for another container, an optimizer's state that is not
    fully reshardable, or what `apply` raises.
    """
    folder = checked(open_folder(where))
    _container(folder)
    common = _tree(folder, read_torch(folder, COMMON, inert=INERT))
    if not isinstance(common, dict):
        raise ValueError(f"{folder.where}/{COMMON} holds a {type(common).__name__}, not a table")
    inside = open_container(folder, INERT)
    _reshardable(folder, common, inside)
    source = _renamed(folder, inside)
    groups = [group for table in _tables(common, "param_groups") for group in table["param_groups"]]
    trained = tuple(dict.fromkeys(name for name, state in source.tensors if state != WEIGHT))
    source = _stepped(source, trained, _step(folder, common, groups))
    source = replace(
        source,
        groups=_groups(groups, source, trained),
        step=common.get("iteration"),
        extra={"common": common, "objects": [*inside.items]},
        origin={"framework": "megatron", "master": _master(inside)},
        audit=inside.audit,
    )
    source = replace(source, optimizer=class_by_states(source.tensors, source.groups))
    return source if program is None else apply(program, {(0, 0, 0): source})


def write_megatron(
    source: Source,
    where: Location,
    program: Program,
    *,
    common: Mapping[str, Any] | None = None,
    master: str | None = None,
    budget: int = 2**29,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a torch_dist folder of `program`'s slices that megatron.core.dist_checkpointing loads.

    common: tree of common.pt; None: that which the source came with, or the little that follows
    from the source. master: the optimizer's name of its own weights, 'param' (distributed) or
    'fp32_param'; None: that of the source, or 'param'. budget: bytes of tensors held at once.
    progress: told of bytes written.
    Weights with optimizer states are written twice, as the module's and as the optimizer's.
    Raises FileExistsError for a folder that is not empty, ValueError as `invert` does.
    """
    folder = open_folder(where)
    if folder.entries():
        raise FileExistsError(f"{folder.where} exists and is not empty: name another")
    slices = invert(program, source)[0, 0, 0]
    step = _common_step(slices)
    tree = _written(common if common is not None else _common(slices, step), COMMON)
    raw = _raw(slices, master or slices.origin.get("master", MASTERS[1]))
    write_dcp(raw, where, prefix="", budget=budget, progress=progress)
    write_torch(folder, COMMON, tree)
    folder.write(CONTAINER, json.dumps(BACKEND).encode())  # last: what makes it a checkpoint


# --- reading ------------------------------------------------------------------------------


def _container(folder: Folder) -> None:
    if CONTAINER not in folder.entries():
        raise FileNotFoundError(
            f"{folder.where} has no {CONTAINER}: give the folder of one iteration (iter_...), "
            "saved with --ckpt-format torch_dist"
        )
    try:
        table = json.loads(small(folder, CONTAINER, 2**20))
        found = table["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder.where}/{CONTAINER} is damaged: {error!r}") from None
    if found != BACKEND["sharded_backend"]:
        raise ValueError(
            f"{folder.where} is saved as {found!r}: save it again with --ckpt-format torch_dist"
        )


def _reshardable(folder: Folder, common: Any, inside: Container) -> None:
    """Raise ValueError if optimizer states are ranges of buffers."""
    tables = _tables(common, "param_state_sharding_type")
    found = {table["param_state_sharding_type"] for table in tables} - {*RESHARDABLE}
    buckets = [key for key in (*inside.tensors, *inside.items) if "optimizer.distributed." in key]
    if found or buckets:
        what = ", ".join(sorted(map(repr, found))) or f"in buffers ({buckets[0]})"
        raise ValueError(
            f"{folder.where} has optimizer states {what}, which belong to its own parallelism: "
            "re-save with --dist-ckpt-optim-fully-reshardable, or without the optimizer"
        )


def _renamed(folder: Folder, inside: Container) -> Source:
    """Parameters and their states, without the module's copies of weights that have a master."""
    own = {key: (key, WEIGHT) for key in inside.tensors if not _STATE.fullmatch(key)}
    keys: dict[Key, str] = {}
    for key in inside.tensors:
        if found := _STATE.fullmatch(key):
            state = WEIGHT if found[1] in MASTERS else found[1]
            if keys.setdefault((found[2], state), key) != key:
                raise ValueError(f"{folder.where} has {state} of {found[2]} twice: {key}")
            if found[2] not in own:
                raise ValueError(f"{folder.where} has {found[1]} of {found[2]}, but no weight")
            if (has := inside.tensors[key].shape) != (wanted := inside.tensors[found[2]].shape):
                raise ValueError(
                    f"{folder.where}: {key} is {[*has]}, the parameter {[*wanted]}: re-save with "
                    "--dist-ckpt-optim-fully-reshardable"
                )
    keys = {**{name: key for key, name in own.items()}, **keys}

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        inside.read(keys[key], box, out)

    return Source({name: inside.tensors[key] for name, key in keys.items()}, read)


def _master(inside: Container) -> str:
    found = [match[1] for key in inside.tensors if (match := _STATE.fullmatch(key))]
    return next((state for state in found if state in MASTERS), MASTERS[1])


def _step(folder: Folder, common: Any, groups: list[Any]) -> float | None:
    steps = [group[STEP] for group in groups if STEP in group]
    steps += [table["common_step"] for table in _tables(common, "common_step")]
    numbers = {step.item() if isinstance(step, Tensor) else step for step in steps}
    if len(numbers) > 1:
        raise ValueError(f"{folder.where}: optimizer groups are at different steps {numbers}")
    return float(numbers.pop()) if numbers else None


def _stepped(source: Source, trained: tuple[str, ...], step: float | None) -> Source:
    """Each trained parameter with its step, as torch's AdamW has it."""
    if step is None:
        return source
    value = np.array(step, np.float32).view(np.uint32)
    steps = {(name, STEP): Info((), "F32") for name in trained}

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        if key in steps:
            out[...] = value
        else:
            source.read(key, box, out)

    return replace(source, tensors={**source.tensors, **steps}, read=read)


def _tables(tree: Any, key: str) -> Iterator[dict[str, Any]]:
    """Tables with a key, in a tree of tables and lists."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree
        for inner in tree.values():
            yield from _tables(inner, key)
    elif isinstance(tree, list | tuple):
        for inner in tree:
            yield from _tables(inner, key)


def _groups(groups: list[Any], source: Source, trained: tuple[str, ...]) -> tuple[Group, ...]:
    """Groups with their parameters; none where these are not known."""
    if not trained:
        return ()
    members = [trained] if len(groups) == 1 else [group.get(NAMES, ()) for group in groups]
    known = all((name, WEIGHT) in source.tensors for names in members for name in names)
    if not known or not all(members):
        return ()
    pairs = zip(groups, members, strict=True)
    return tuple(Group(_options(group), tuple(names)) for group, names in pairs)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", NAMES, STEP)}


def _tree(folder: Folder, value: Any) -> Any:
    """A tree of plain values, of which arguments and dtypes can be made again."""
    if isinstance(value, Record) and value.name == ARGUMENTS:
        return {CLASS: ARGUMENTS, **{k: _tree(folder, v) for k, v in value.state.items()}}
    if isinstance(value, torch.dtype):
        return {CLASS: "torch.dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {key: _tree(folder, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_tree(folder, inner) for inner in value)
    return plain(folder, value)


# --- writing ------------------------------------------------------------------------------


def _raw(slices: Source, master: str) -> Source:
    """The container's names for everything."""
    if master not in MASTERS:
        raise ValueError(f"master = {master!r}: it is one of {', '.join(MASTERS)}")
    trained = {name for name, state in slices.tensors if state not in (WEIGHT, STEP)}
    keys: dict[Key, Key] = {}
    for name, state in slices.tensors:
        if state == WEIGHT:
            keys[name, WEIGHT] = (name, state)
        if state != STEP and name in trained:
            state_name = master if state == WEIGHT else state
            keys[f"optimizer.state.{state_name}.{name}", WEIGHT] = (name, state)
    tensors = {own: slices.tensors[key] for own, key in keys.items()}

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        slices.read(keys[key], box, out)

    return Source(tensors, read)


def _common_step(slices: Source) -> float | None:
    """The one step of all parameters. Raises ValueError if they have several."""
    found: dict[float, str] = {}
    for name, state in slices.tensors:
        if state == STEP:
            found.setdefault(float(slices.array((name, STEP)).view(np.float32)), name)
    for (name, state), value in slices.scalars.items():
        if state == STEP:
            found.setdefault(float(value), name)
    if len(found) > 1:
        told = ", ".join(f"{step:g} ({name})" for step, name in found.items())
        raise ValueError(f"Megatron has one step for all parameters, but these have {told}")
    return next(iter(found), None)


def _written(tree: Any, at: str) -> Any:
    """What `_tree` was made of. Raises ValueError for objects that are not made again."""
    if isinstance(tree, Mapping):
        kind = tree.get(CLASS)
        if kind == "torch.dtype":
            return getattr(torch, tree["name"])
        if kind not in (None, ARGUMENTS):
            raise ValueError(f"{at} was an object of {kind}, which is not copied: give common")
        inner = {k: _written(v, f"{at}.{k}") for k, v in tree.items() if k != CLASS}
        return Record(ARGUMENTS, (), inner) if kind else inner
    if isinstance(tree, list | tuple):
        return type(tree)(_written(inner, f"{at}[{i}]") for i, inner in enumerate(tree))
    return tree


def _updated(common: Mapping[str, Any], slices: Source, step: float | None) -> dict[str, Any]:
    """The tree that a source came with, of the step and with the options that it now has."""
    tree = copy.deepcopy(dict(common))
    if slices.step is not None:
        tree["iteration"] = slices.step
    groups = [group for table in _tables(tree, "param_groups") for group in table["param_groups"]]
    for group in groups:
        if step is not None and STEP in group:
            group[STEP] = int(step)
        group.pop(NAMES, None)
    if len(groups) == len(slices.groups):
        for group, new in zip(groups, _named(slices.groups), strict=True):
            group.update(new)
    for table in _tables(tree, "common_step"):
        table["common_step"] = table["common_step"] if step is None else int(step)
    return tree


def _named(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What groups say, and, where there are several, whose they are."""
    several = len(groups) > 1
    return [{**g.options, **({NAMES: [*g.members]} if several else {})} for g in groups]


def _common(slices: Source, step: float | None) -> dict[str, Any]:
    if isinstance(slices.extra, Mapping) and isinstance(slices.extra.get("common"), Mapping):
        return _updated(slices.extra["common"], slices, step)
    iteration = slices.step if slices.step is not None else int(step or 0)
    tree: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": iteration}
    if slices.groups:
        count = {} if step is None else {STEP: int(step)}
        groups = [{**group, **count} for group in _named(slices.groups)]
        tree["optimizer"] = {
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": RESHARDABLE[0],
        }
    return tree
