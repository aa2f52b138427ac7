"""What is written for torch.distributed.checkpoint, and at which paths of the tree it loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hakari.training.checkpoint.foreign.dcp import STEPS
from hakari.training.checkpoint.foreign.dcp_metadata import Path
from hakari.training.checkpoint.source import WEIGHT, Group, Key, Source

EXACT = 2**24
"""Steps up to which a float32 has every one."""
ADAMS = ("", "adam", "adamw", "fusedadam")
"""Classes, in lower case, that may be torch's Adam or AdamW; '' where it is unknown."""


@dataclass(frozen=True)
class Leaf:
    """Something to be written at a path: a tensor of the source, or a value.

    aliases: further paths of the same bytes.
    """

    path: Path
    value: Key | Any
    aliases: tuple[Path, ...] = ()
    held: bool = False

    @property
    def name(self) -> str:
        """The key that DCP makes of a path."""
        return ".".join(map(str, self.path))


def leaves_of(source: Source, prefix: str, optimizer_prefix: str) -> list[Leaf]:
    """All that a source has: weights, states, options of groups, and what else it came with.

    prefix, optimizer_prefix: keys below which weights and optimizer state lie; '' is the top.
    Raises ValueError for a step that torch's optimizers cannot keep.
    """
    return [
        *_weight_leaves(source, prefix),
        *_state_leaves(source, optimizer_prefix),
        *_option_leaves(source, optimizer_prefix),
        *_extra_leaves(source),
    ]


def _weight_leaves(source: Source, prefix: str) -> list[Leaf]:
    root, aliases = _root(prefix), _aliases(source)
    return [
        Leaf((*root, key[0]), key, tuple((*root, other) for other in aliases.get(key[0], ())), True)
        for key in source.tensors
        if key[1] == WEIGHT
    ]


def _state_leaves(source: Source, prefix: str) -> list[Leaf]:
    root, aliases = _root(prefix), _aliases(source)
    held = {key: (key, True) for key in source.tensors if key[1] != WEIGHT}
    values = {key: (_step_tensor(key, value), False) for key, value in source.scalars.items()}
    return [
        Leaf(
            (*root, f"state.{name}.{state}"),
            value,
            tuple((*root, f"state.{other}.{state}") for other in aliases.get(name, ())),
            is_held,
        )
        for (name, state), (value, is_held) in {**held, **values}.items()
    ]


def _step_tensor(key: Key, value: Any) -> Any:
    """A number of steps as torch's optimizers keep it: a float32 scalar."""
    if key[1] != "step":
        return value
    if value != int(value) or not 0 <= value <= EXACT:
        raise ValueError(f"{key[0]} (step) is {value}: torch keeps whole numbers up to {EXACT:,}")
    return torch.tensor(float(value))


def _aliases(source: Source) -> dict[str, list[str]]:
    """For a name with data, those that are tied to it and have none."""
    found: dict[str, list[str]] = {}
    for names in source.tied:
        there = [name for name in names if (name, WEIGHT) in source.tensors]
        if there:
            found[there[0]] = [name for name in names if name not in there]
    return found


def _option_leaves(source: Source, prefix: str) -> list[Leaf]:
    """Options of groups, of each parameter and of each group."""
    root, aliases, leaves = _root(prefix), _aliases(source), []
    names = {name for group in source.groups for name in group.members}
    for number, group in enumerate(source.groups):
        options = {key: _writable(value) for key, value in _completed(source, group).items()}
        for name in group.members:
            for option, value in options.items():
                others = (
                    (*root, f"param_groups.{other}.{option}") for other in aliases.get(name, ())
                )
                path = (*root, f"param_groups.{name}.{option}")
                leaves.append(Leaf(path, value, tuple(others)))
        nested = {} if str(number) in names else {**options, "params": [*group.members]}
        for option, value in nested.items():
            leaves.append(Leaf((*root, "param_groups", number, option), value))
    return leaves


def _completed(source: Source, group: Group) -> dict[str, Any]:
    """Options with those of torch's Adam that say how, and not what, it computes.

    Whether weight decay is decoupled changes the result, so it is added only where it is known.
    """
    options = dict(group.options)
    moments = any(state == "exp_avg_sq" for _, state in source.tensors)
    radam = "decoupled_weight_decay" in options and "amsgrad" not in options
    if not moments or not options or radam or source.optimizer.lower() not in ADAMS:
        return options
    how = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
    known = {"maximize": False} | how
    if not any(state == "max_exp_avg_sq" for _, state in source.tensors):
        known["amsgrad"] = False
    if source.optimizer == "AdamW" or options.get("weight_decay") == 0:
        known["decoupled_weight_decay"] = source.optimizer.lower() != "adam"
    return {**known, **options}


def _extra_leaves(source: Source) -> list[Leaf]:
    """What else the source has, at its own paths."""
    extra = source.extra
    if extra is None:
        extra = {}
    elif not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
        extra = {"extra": extra}
    leaves = [Leaf(path, value) for path, value in _branches((), extra)]
    if source.step is not None and not any(leaf.name in STEPS for leaf in leaves):
        leaves.append(Leaf(("step",), source.step))
    return leaves


def _branches(path: Path, tree: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping) and tree and all(isinstance(key, str) for key in tree):
        for key, value in tree.items():
            yield from _branches((*path, key), value)
    elif path:
        yield path, _writable(tree)


def _writable(value: Any) -> Any:
    """A value of torch's and Python's own types: arrays become tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C"))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _writable(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_writable(item) for item in value)
    return value


def _root(prefix: str) -> Path:
    return tuple(prefix.split(".")) if prefix else ()
