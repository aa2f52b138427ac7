"""Checkpoints of torch.distributed.checkpoint: what FSDP2, torchtitan and others save."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import Tensor

from hakari.training.checkpoint.boxes import Box
from hakari.training.checkpoint.foreign.dcp_container import Container, open_container
from hakari.training.checkpoint.foreign.dcp_metadata import Chunk, Path
from hakari.training.checkpoint.foreign.optimizer_class import class_by_states
from hakari.training.checkpoint.source import WEIGHT, Group, Key, Source
from hakari.training.checkpoint.storage import Location

MODELS = ("model", "module", "model_state_dict")
OPTIMIZERS = ("optim", "optimizer", "optimizer_state_dict")
STEPS = ("step", "train_state.step", "global_step", "iteration", "trainer.step")
FLAT = re.compile(rf"(?:(?:{'|'.join(OPTIMIZERS)})\.)?((?:state|param_groups)\..+)")
MOST_EXTRA = 2**28
"""Bytes of values beside weights and optimizer states that are read at opening: 256 MiB."""


def open_dcp(where: Location, skip: Sequence[str] = ()) -> Source:
    """Open a folder that torch.distributed.checkpoint saved; tensors are read when asked for.

    Layouts: {"model": ..., "optim": ...} as get_state_dict gives them, with the optimizer's state
    flattened or not, also below a further key ({"app": ...}), and with "module" or "optimizer" as
    names; torchtitan's, with weights at the top beside "optimizer", "train_state", ...; weights
    alone; one dictionary of an optimizer's flattened states. All else becomes `extra`. Where the
    options of groups were flattened, parameters with equal options are one group. skip: patterns
    of keys to leave out, such as 'optim.*'. In the safetensors form, which does not say how many
    files or how large tensors are, files that are missing at the end cannot be noticed.

    Raises FileNotFoundError for a missing file, ValueError for a truncated one, for chunks that
    do not tile their tensor, for pickles that name classes, and for optimizer states that number
    parameters instead of naming them.
    """
    container = open_container(where)
    dropped = [k for k in container.paths if any(fnmatchcase(k, each) for each in skip)]
    paths = {key: path for key, path in container.paths.items() if key not in dropped}
    parts = _parts(container, paths)
    parts.tensors, tied = _untied(container, parts.tensors)
    groups = _nested_groups(container, parts) or _flat_groups(container, parts)
    scalars = {key: container.value(own) for key, own in parts.scalars.items()}
    tensors, keys = parts.tensors, parts.tensors

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        container.read(keys[key], box, out)

    return Source(
        {key: container.tensors[own] for key, own in tensors.items()},
        read,
        scalars,
        groups,
        class_by_states([*tensors, *scalars], groups),
        tied,
        step=_step(container, parts),
        extra=_extra(container, parts.rest) or None,
        origin={"framework": "torch.distributed.checkpoint", **_version(container)},
        audit=container.audit,
    )


# --- weights and states -------------------------------------------------------------------


@dataclass
class Parts:
    """Keys of a container by what they are; options and rest by their paths."""

    tensors: dict[Key, str]
    scalars: dict[Key, str]
    options: dict[Path, str]
    rest: dict[Path, str]


def _parts(container: Container, paths: Mapping[str, Path]) -> Parts:
    alone = any(str(path[0]).startswith("param_groups.") for path in paths.values())
    tails = {key: _tail(path, alone) for key, path in paths.items()}
    weights = _weights(container, {key: path for key, path in paths.items() if not tails[key]})
    names = set(weights.values())
    parts = Parts({(name, WEIGHT): key for key, name in weights.items()}, {}, {}, {})
    if len(parts.tensors) < len(weights):
        twice = next(n for n in names if [*weights.values()].count(n) > 1)
        raise ValueError(f"{container.folder.where}: two tensors are called {twice!r}: use skip=")
    for key, tail in tails.items():
        if tail and tail[0] == "param_groups":
            parts.options[tail[1:]] = key
        elif tail:
            _add_state(container, parts, _named(tail[1:], names), key)
        elif key not in weights:
            parts.rest[paths[key]] = key
    return parts


def _tail(path: Path, alone: bool) -> Path:
    """What of a path lies below an optimizer: ('state', ...), ('param_groups', ...) or ()."""
    for i, part in enumerate(path[:-1]):
        kind, _, rest = str(path[i + 1]).partition(".")
        if part in OPTIMIZERS and kind in ("state", "param_groups"):
            return (kind, *([rest] if rest else []), *path[i + 2 :])
    match = FLAT.fullmatch(path[0]) if len(path) == 1 and isinstance(path[0], str) else None
    if match is None or (match.start(1) == 0 and not alone):
        return ()
    return tuple(match[1].split(".", 1))


def _weights(container: Container, paths: Mapping[str, Path]) -> dict[str, str]:
    """Names of the model's tensors: what lies below 'model', else what lies at the top."""
    tensors = {key: path for key, path in paths.items() if key in container.tensors}
    rooted = {key: _below(path) for key, path in tensors.items()}
    if any(rooted.values()):
        return {key: name for key, name in rooted.items() if name}
    steps = {key for key in tensors if key in STEPS and not container.tensors[key].shape}
    top = {
        key: str(path[0]) for key, path in tensors.items() if len(path) == 1 and key not in steps
    }
    optimizer = any(
        key.startswith(tuple(f"{o}.state." for o in OPTIMIZERS)) for key in container.paths
    )
    if top and optimizer and all(name.startswith("model.") for name in top.values()):
        return {key: name.removeprefix("model.") for key, name in top.items()}
    return top or {key: key for key in tensors if key not in steps}


def _below(path: Path) -> str:
    for i, part in enumerate(path[:-1]):
        if part in MODELS:
            return ".".join(map(str, path[i + 1 :]))
    return ""


def _named(path: Path, names: set[str]) -> Key:
    """(parameter, what of it): the longest name that there is, else all but the last word."""
    if len(path) > 1:
        if str(path[0]).isdecimal() and path[0] not in names:
            raise ValueError(
                f"the optimizer's state is of parameter number {path[0]}, without its name: save "
                "what get_optimizer_state_dict gives, or open with skip=['optim*']"
            )
        return str(path[0]), "/".join(map(str, path[1:]))
    words = str(path[0]).split(".")
    for count in range(len(words) - 1, 0, -1):
        name = ".".join(words[:count])
        if name in names:
            return name, ".".join(words[count:])
    return ".".join(words[:-1]), words[-1]


def _add_state(container: Container, parts: Parts, key: Key, own: str) -> None:
    held = parts.tensors if own in container.tensors else parts.scalars
    if not all(key) or key in parts.tensors or key in parts.scalars:
        raise ValueError(
            f"{container.folder.where}: {own} would be {key[1]!r} of {key[0]!r}, which cannot be "
            "or is there already: leave one of them out by skip="
        )
    held[key] = own


def _untied(
    container: Container, tensors: dict[Key, str]
) -> tuple[dict[Key, str], tuple[tuple[str, ...], ...]]:
    """Tensors without those that lie at the very place of another one, and which names these are.

    Torch never saves so; `write_dcp` does for tied weights.
    """
    first: dict[tuple[Chunk, ...], Key] = {}
    kept: dict[Key, str] = {}
    tied: dict[str, list[str]] = {}
    for key, own in tensors.items():
        before = first.setdefault(container.chunks[own], key)
        if before == key or not container.tensors[own].bytes or before[1] != key[1]:
            kept[key] = own
        elif key[1] == WEIGHT:
            tied.setdefault(before[0], [before[0]]).append(key[0])
    return kept, tuple(map(tuple, tied.values()))


# --- options of groups, and the rest ------------------------------------------------------


def _nested_groups(container: Container, parts: Parts) -> tuple[Group, ...]:
    options: dict[int, dict[str, Any]] = {}
    for path, key in parts.options.items():
        if len(path) > 1 and type(path[0]) is int:
            value = _number(container.value(key))
            options.setdefault(path[0], {})[".".join(map(str, path[1:]))] = value
    groups = []
    for number, own in sorted(options.items()):
        members = own.pop("params", [])
        if not all(isinstance(name, str) for name in members):
            raise ValueError(
                f"group {number} of the optimizer numbers its parameters instead of naming them: "
                "save what get_optimizer_state_dict gives, or open with skip=['optim*']"
            )
        groups.append(Group(own, tuple(members)))
    return tuple(groups)


def _flat_groups(container: Container, parts: Parts) -> tuple[Group, ...]:
    """Parameters with equal options, as a group."""
    names = {name for name, _ in parts.tensors}
    options: dict[str, dict[str, Any]] = {}
    known: dict[bytes, Any] = {}
    for path, key in parts.options.items():
        name, option = _named((".".join(map(str, path)),), names)
        options.setdefault(name, {})[option] = _option(container, key, known)
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, own in options.items():
        groups.setdefault(repr(sorted(own.items())), (own, []))[1].append(name)
    return tuple(Group(own, tuple(members)) for own, members in groups.values())


def _option(container: Container, key: str, known: dict[bytes, Any]) -> Any:
    """An option's value; the same bytes, of which there are thousands, are read once."""
    item = container.items.get(key)
    if item is None or item.length > 2**14:
        return _number(container.value(key))
    raw = bytearray(item.length)
    container.folder.read(item.file, item.offset, memoryview(raw))
    if bytes(raw) not in known:
        known[bytes(raw)] = _number(container.value(key))
    return known[bytes(raw)]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _step(container: Container, parts: Parts) -> int | None:
    named = {".".join(map(str, path)): key for path, key in parts.rest.items()}
    own = [named[name] for name in STEPS if name in named]
    both = {**parts.tensors, **parts.scalars}
    states = [key for (_, state), key in both.items() if state == "step"][:1]
    for key in (*own, *states):
        value = _number(container.value(key))
        if isinstance(value, int | float) and value == int(value) >= 0:
            return int(value)
    return None


def _extra(container: Container, rest: Mapping[Path, str]) -> dict[Any, Any]:
    total = 0
    tree: dict[Any, Any] = {}
    for path, key in rest.items():
        held = container.tensors.get(key)
        total += container.items[key].length if held is None else held.bytes
        if total > MOST_EXTRA:
            raise ValueError(
                f"{container.folder.where}: {key} makes over {MOST_EXTRA:,} bytes that are neither "
                f"weights nor optimizer states: leave some out by skip={[key]}"
            )
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = container.value(key)
    listed = _listed(tree)
    return listed if isinstance(listed, dict) else {"extra": listed}


def _listed(tree: Any) -> Any:
    """A tree in which dictionaries that were lists, with tensors in them, are lists again."""
    if not isinstance(tree, dict):
        return tree
    keys = list(tree)
    if keys and all(type(key) is int for key in keys) and sorted(keys) == [*range(len(keys))]:
        return [_listed(tree[i]) for i in range(len(keys))]
    return {key: _listed(value) for key, value in tree.items()}


def _version(container: Container) -> dict[str, Any]:
    state = getattr(container.record, "state", None)
    version = state.get("version") if isinstance(state, Mapping) else None
    return {"version": version} if isinstance(version, str) else {}
