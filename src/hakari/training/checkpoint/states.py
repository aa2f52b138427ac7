"""An optimizer's states and options, made and restored from what was saved for each parameter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hakari.training.checkpoint import tree
from hakari.training.checkpoint.manifest import Manifest
from hakari.training.checkpoint.pieces import (
    Models,
    Optimizers,
    flatten,
    name_in,
    parameter_names,
    several,
)
from hakari.training.checkpoint.source import WEIGHT, Group, Info
from hakari.training.checkpoint.tensors import TORCH


@contextmanager
def made_states(found: Manifest, model: Models, optimizer: Optimizers | None) -> Iterator[None]:
    """Give an optimizer the states that were saved and that it lacks, uninitialised, to be filled.

    Plain numbers are set at once. If the block raises, all is taken back. Raises ValueError if a
    state's place on a sharded parameter is unknown.
    """
    optimizers = several(optimizer)
    before = [{p: dict(state) for p, state in each.state.items()} for each in optimizers]
    try:
        _make_states(found, model, optimizers)
        yield
    except BaseException:
        for each, states in zip(optimizers, before, strict=True):
            each.state.clear()
            each.state.update(states)
        raise


def _make_states(
    found: Manifest, model: Models, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    names, states = parameter_names(several(model)), _saved_states(found)
    for each in optimizers:
        for group in each.param_groups:
            for parameter in group["params"]:
                name = _saved_name(found, name_in(names, parameter), states)
                _make(each.state[parameter], parameter, group, name, states.get(name, {}))
                if not each.state[parameter]:
                    del each.state[parameter]


def restore_options(found: Manifest, model: Models, optimizer: Optimizers) -> None:
    """Set what each group says (learning rate, betas, ...) to what was saved for its parameters.

    Raises ValueError if parameters that are now in one group were saved with different options.
    """
    saved = {name: group for group in found.groups for name in group.members}
    names = parameter_names(several(model))
    for each in several(optimizer):
        for number, group in enumerate(each.param_groups):
            members = [name_in(names, parameter) for parameter in group["params"]]
            known = {name: saved[name] for name in members if name in saved}
            if known:
                _restore(group, number, known)


def _restore(group: dict[str, Any], number: int, known: Mapping[str, Group]) -> None:
    first, chosen = next(iter(known.items()))
    for name, other in known.items():
        if other.options != chosen.options:
            raise ValueError(
                f"group {number} of the optimizer holds {first} and {name}, which were saved with "
                f"different options ({_compact(chosen)}; {_compact(other)}): put them into "
                "different groups, or pass options=False to keep the options of this program"
            )
    for option, value in chosen.options.items():
        value, now = tree.decode(value, _no_tensor), group.get(option)
        if isinstance(now, Tensor):
            now.fill_(value)
        else:
            group[option] = value


def _compact(group: Group) -> str:
    return json.dumps(dict(group.options))


def _no_tensor(name: str) -> Tensor:
    raise ValueError(f"{name} is a tensor")


def _saved_states(found: Manifest) -> dict[str, dict[str, Info | Any]]:
    states: dict[str, dict[str, Any]] = {}
    for (name, state), info in found.infos.items():
        if state != WEIGHT:
            states.setdefault(name, {})[state] = info
    for (name, state), value in found.scalars.items():
        states.setdefault(name, {})[state] = tree.decode(value, _no_tensor)
    return states


def _saved_name(found: Manifest, name: str, states: Mapping[str, Any]) -> str:
    tied = (other for names in found.tied if name in names for other in names)
    return next((each for each in (name, *tied) if each in states), name)


def _make(
    state: dict[str, Any],
    parameter: Tensor,
    group: Mapping[str, Any],
    name: str,
    saved: Mapping[str, Any],
) -> None:
    """Put in what was saved; trees that have the same leaves already keep their tensors."""
    trees: dict[str, dict[str, Any]] = {}
    for key, leaf in saved.items():
        if isinstance(leaf, Info) and isinstance(state.get(key), Tensor):
            continue  # nearly always: a tensor that is there
        trees.setdefault(key.partition("/")[0], {})[key] = leaf
    for top, leaves in trees.items():
        here = dict(flatten(state[top], top)) if top in state else {}
        same = here.keys() == leaves.keys() and _tensors(here) == _tensors(leaves)
        made = dict(leaves)
        for key in _tensors(leaves):
            made[key] = here[key] if same else _fresh(parameter, group, name, key, leaves[key])
        state[top] = _refilled(state[top], made, top) if same else _nested(made)[top]


def _tensors(leaves: Mapping[str, Any]) -> set[str]:
    return {key for key, leaf in leaves.items() if isinstance(leaf, Info | Tensor)}


def _refilled(tree: Any, leaves: Mapping[str, Any], path: str) -> Any:
    """A tree of the same kinds with these leaves."""
    if isinstance(tree, Mapping) and tree:
        return {key: _refilled(value, leaves, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple) and tree:
        items = [_refilled(value, leaves, f"{path}/{i}") for i, value in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    return leaves[path]


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree whose leaves have these paths; what is numbered from 0 on is a list."""
    found: dict[str, Any] = {}
    for path, value in leaves.items():
        *folders, last = path.split("/")
        place = found
        for each in folders:
            place = place.setdefault(each, {})
        place[last] = value
    return {key: _listed(value) for key, value in found.items()}


def _listed(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    inner = {key: _listed(value) for key, value in tree.items()}
    if inner and set(inner) == {str(number) for number in range(len(inner))}:
        return [inner[str(number)] for number in range(len(inner))]
    return inner


def grouped(models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> set[str]:
    """Names of all parameters that optimizers hold."""
    names = parameter_names(models)
    groups = (group for each in optimizers for group in each.param_groups)
    return {name_in(names, parameter) for group in groups for parameter in group["params"]}


def _fresh(parameter: Tensor, group: Mapping[str, Any], name: str, key: str, info: Info) -> Tensor:
    dtype = TORCH[info.dtype]
    if info.shape == tuple(parameter.shape) and info.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if not info.shape:  # torch keeps step counts on the host, but for fused and captured steps
        there = key != "step" or group.get("fused") or group.get("capturable")
        return torch.zeros((), dtype=dtype, device=parameter.device if there else "cpu")
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"{name} ({key}) {[*info.shape]} has another shape than its sharded parameter: let the "
            "optimizer make a step before loading, so that its place is known"
        )
    return torch.empty(info.shape, dtype=dtype, device=parameter.device)
