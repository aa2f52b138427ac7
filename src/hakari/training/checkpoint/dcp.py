"""Checkpoints of torch.distributed.checkpoint: what FSDP2, torchtitan and others save.

A folder has `.metadata`, a pickle that is read and not executed, and `.distcp` files, in which
every chunk of a tensor is a torch.save file of its own; or it has safetensors whose headers say
where in its tensor each chunk belongs (HuggingFaceStorageWriter with save_distributed).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as saved
from torch.distributed.checkpoint.filesystem import _StorageInfo

from hakari.training.checkpoint import fragments
from hakari.training.checkpoint.boxes import (
    Box,
    extents,
    flat_range,
    flaw,
    intersect,
    moved,
    show,
    volume,
    whole,
)
from hakari.training.checkpoint.dtypes import BYTES, NAMES, TORCH, as_tensor, bits, name_of
from hakari.training.checkpoint.fragments import Fragment
from hakari.training.checkpoint.hugging_face_folder import metadata, read_header
from hakari.training.checkpoint.shard_file import chunks
from hakari.training.checkpoint.source import WEIGHT, Group, Info, Key, Source
from hakari.training.checkpoint.storage import File, Folder, Location, open_folder, small
from hakari.training.checkpoint.torch_files import (
    MOST_PICKLE,
    Lazy,
    Stored,
    append_torch,
    plain,
    read_torch,
    row_major,
    unpickle,
)

METADATA, SHARDING = ".metadata", "DCP_SHARDING_INFO"
CLASSES = (
    "torch.distributed.checkpoint.metadata.*",
    "torch.distributed.checkpoint.filesystem._Storage*",
)
MODELS = ("model", "module", "model_state_dict")
OPTIMIZERS = ("optim", "optimizer", "optimizer_state_dict")
STEPS = ("step", "train_state.step", "global_step", "iteration", "trainer.step")
FLAT = re.compile(rf"(?:(?:{'|'.join(OPTIMIZERS)})\.)?((?:state|param_groups)\..+)")
MOST_EXTRA = 2**28
"""Bytes of values beside weights and optimizer states that are read at opening: 256 MiB."""
ITEM, FILE = 2**28, 2**32
"""Bytes of a tensor in one item, which torch loads whole, and of items in one file."""
EXACT = 2**24

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: an item of `length` bytes in a file, or raw if its place is known."""

    box: Box
    file: str
    offset: int
    length: int
    raw: bool = False


@dataclass(frozen=True)
class Container:
    """A folder by its own keys, before any of them is taken for a weight or a state.

    tensors, chunks: by key. items: what is no tensor, by key. paths: of each key in the tree that
    was saved. record: the metadata, as it was pickled. read(key, box, out): as a Source's.
    """

    folder: Folder
    tensors: Mapping[str, Info]
    chunks: Mapping[str, tuple[Chunk, ...]]
    items: Mapping[str, Chunk]
    paths: Mapping[str, Path]
    record: Any
    read: Callable[[str, Box, np.ndarray], None]
    inert: tuple[str, ...] = ()

    def value(self, key: str) -> Any:
        """An item's plain value, or a tensor. Raises ValueError for a class that is refused."""
        if key in self.tensors:
            info = self.tensors[key]
            out = np.empty(info.shape, bits(info.dtype))
            self.read(key, whole(info.shape), out)
            return as_tensor(out.reshape(-1), info.dtype).reshape(info.shape)
        item = self.items[key]
        try:
            tree = read_torch(self.folder, item.file, item.offset, item.length, self.inert)
            return plain(self.folder, tree)
        except ValueError as error:
            raise ValueError(f"{key}: {error}; or leave it out by skip={[key]}") from error


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
        tied=tied,
        step=_step(container, parts),
        extra=_extra(container, parts.rest) or None,
        origin={"framework": "torch.distributed.checkpoint", **_version(container)},
    )


def open_container(where: Location, inert: Sequence[str] = ()) -> Container:
    """Open a folder by the keys that were saved; metadata and sizes of files alone are read.

    inert: patterns of classes in pickles that become records. Raises as `open_dcp`.
    """
    folder = open_folder(where)
    names = folder.names()
    if METADATA in names:
        parts = _from_metadata(folder, inert)
    elif any(name.endswith(".safetensors") for name in names):
        parts = _from_safetensors(folder, names)
    else:
        raise FileNotFoundError(f"{folder.where} has neither {METADATA} nor safetensors")
    tensors, chunks_of, items, paths, record = parts
    _check_files(folder, names, chunks_of, items)
    for key, info in tensors.items():
        if wrong := flaw(info.shape, [chunk.box for chunk in chunks_of[key]]):
            files = sorted({chunk.file for chunk in chunks_of[key]})
            raise ValueError(f"{folder.where}: {key} {[*info.shape]}: {wrong} (in {files[:4]})")
    places: dict[tuple[str, int], Stored] = {}
    read = partial(_read, folder, tensors, chunks_of, places)
    return Container(folder, tensors, chunks_of, items, paths, record, read, tuple(inert))


# --- metadata -----------------------------------------------------------------------------

Opened = tuple[
    dict[str, Info], dict[str, tuple[Chunk, ...]], dict[str, Chunk], dict[str, Path], Any
]


def _from_metadata(folder: Folder, inert: Sequence[str]) -> Opened:
    what = f"{folder.where}/{METADATA}"
    record = unpickle(small(folder, METADATA, MOST_PICKLE), what, inert=(*CLASSES, *inert))
    try:
        return _indexed(record, what)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{what} is not as torch writes it ({type(error).__name__}: {error})"
        ) from error


def _indexed(record: Any, what: str) -> Opened:
    state = record.state
    places = {
        (index.state["fqn"], _numbers(index.state.get("offset"))): place.state
        for index, place in (state.get("storage_data") or {}).items()
    }
    tensors, chunks_of, items = {}, {}, {}
    for key, about in state["state_dict_metadata"].items():
        if about.name.endswith(".BytesStorageMetadata"):
            items[key] = _item(places[key, None], (), f"{what}: {key}")
            continue
        dtype = about.state["properties"].state[0]
        if dtype not in NAMES:
            raise ValueError(f"{what}: {key} is of {dtype}, which safetensors lacks")
        tensors[key] = Info(_numbers(about.state["size"]) or (), NAMES[dtype])
        chunks_of[key] = tuple(_chunk(places, key, c.state, what) for c in about.state["chunks"])
    planned = state.get("planner_data")
    known = planned if isinstance(planned, Mapping) else {}
    keys = state["state_dict_metadata"]
    paths = {key: path if isinstance(path := known.get(key), tuple) else (key,) for key in keys}
    return tensors, chunks_of, items, paths, record


def _chunk(places: Mapping[Any, Any], key: str, about: Any, what: str) -> Chunk:
    start, size = _numbers(about["offsets"]) or (), _numbers(about["sizes"]) or ()
    box = tuple((i, i + n) for i, n in zip(start, size, strict=True))
    place = places.get((key, start))
    if place is None:
        raise ValueError(f"{what} does not say where {key} {show(box)} lies")
    return _item(place, box, f"{what}: {key}")


def _item(place: Any, box: Box, what: str) -> Chunk:
    if place.get("transform_descriptors"):
        raise ValueError(
            f"{what} was saved through extensions {place['transform_descriptors']}, which are not "
            "read: save it without"
        )
    file, offset, length = place["relative_path"], place["offset"], place["length"]
    inside = isinstance(file, str) and file and not {"", ".", ".."} & set(file.split("/"))
    if not inside or "\\" in file or not _counts((offset, length)):
        raise ValueError(f"{what} lies in {str(file)[:80]!r} at {offset}, {length}: it cannot")
    return Chunk(box, file, offset, length)


def _numbers(given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not _counts(given):
        raise TypeError(f"{str(given)[:80]} are no sizes")
    return tuple(given)


def _counts(values: Any) -> bool:
    return all(type(n) is int and 0 <= n < 2**60 for n in values)


def _from_safetensors(folder: Folder, names: Sequence[str]) -> Opened:
    """Chunks that are raw in safetensors files, which say at which offsets they belong."""
    files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    found: dict[str, list[tuple[Info, Chunk]]] = {}
    _consecutive(folder, files)
    for file in files:
        said = metadata(folder, file).get(SHARDING)
        offsets = json.loads(said) if said else {}
        for key, entered in read_header(folder, file).items():
            shape = entered.info.shape
            start = offsets.get(key, {}).get("saved_offsets", [0] * len(shape))
            if len(start) != len(shape) or not _counts(start):
                raise ValueError(f"{folder.where}/{file}: {key} is said to start at {start}")
            box = tuple((i, i + n) for i, n in zip(start, shape, strict=True))
            chunk = Chunk(box, file, entered.start, entered.stop - entered.start, True)
            found.setdefault(key, []).append((entered.info, chunk))
    tensors = {}
    for key, parts in found.items():
        kinds = {(info.dtype, len(info.shape)) for info, _ in parts}
        if len(kinds) > 1:
            raise ValueError(f"{folder.where}: chunks of {key} differ: {sorted(kinds)}")
        stops = zip(*([stop for _, stop in chunk.box] for _, chunk in parts), strict=True)
        tensors[key] = Info(tuple(map(max, stops)), parts[0][0].dtype)
    chunks_of = {key: tuple(chunk for _, chunk in parts) for key, parts in found.items()}
    return tensors, chunks_of, {}, {key: (key,) for key in tensors}, None


def _consecutive(folder: Folder, files: Sequence[str]) -> None:
    found = [re.match(r"shard-(\d+)-model-", file) for file in files]
    numbers = {int(match[1]) for match in found if match}
    missing = set(range(1, max(numbers, default=0))) - numbers
    if missing:
        raise FileNotFoundError(
            f"{folder.where}: the files of shard {min(missing)} are missing; there are shards up "
            f"to {max(numbers)}"
        )


def _check_files(
    folder: Folder,
    names: Sequence[str],
    chunks_of: Mapping[str, tuple[Chunk, ...]],
    items: Mapping[str, Chunk],
) -> None:
    """Raise an error for a file that is missing, or ends before one of its items does."""
    there, ends = set(names), dict[str, tuple[int, str]]()
    for key, held in (*chunks_of.items(), *((key, (item,)) for key, item in items.items())):
        for chunk in held:
            stop = chunk.offset + chunk.length
            if stop >= ends.get(chunk.file, (0, ""))[0]:
                ends[chunk.file] = (stop, key + (f" {show(chunk.box)}" if chunk.box else ""))
    for file, (stop, key) in ends.items():
        if file not in there:
            raise FileNotFoundError(f"{folder.where}/{file} is missing; it holds {key}")
        if (size := folder.size(file)) < stop:
            raise ValueError(
                f"{folder.where}/{file} has {size:,} bytes, and {key} ends at {stop:,}: truncated"
            )


# --- reading ------------------------------------------------------------------------------


def _read(
    folder: Folder,
    tensors: Mapping[str, Info],
    chunks_of: Mapping[str, tuple[Chunk, ...]],
    places: dict[tuple[str, int], Stored],
    key: str,
    box: Box,
    out: np.ndarray,
) -> None:
    info = tensors[key]
    by_order: dict[tuple[int, ...], list[Fragment]] = {}
    for chunk in chunks_of[key]:
        if volume(chunk.box) == 0 or (box and intersect(chunk.box, box) is None):
            continue
        at = (chunk.file, chunk.offset)
        if at not in places:
            places[at] = _place(folder, key, info, chunk)
        order = _order(places[at], f"{key} {show(chunk.box)}")
        part = Fragment(_turned(chunk.box, order), chunk.file, places[at].offset)
        by_order.setdefault(order, []).append(part)
    for order, parts in by_order.items():
        named, turned = (key, "DCP"), Info(_turned(info.shape, order), info.dtype)
        wanted = (named, _turned(box, order), out.transpose(order))
        fragments.read(folder, [wanted], {named: turned}, {named: parts})


def _turned(parts: tuple[Any, ...], order: Sequence[int]) -> tuple[Any, ...]:
    return tuple(parts[d] for d in order)


def _order(stored: Stored, what: str) -> tuple[int, ...]:
    """Axes, from the slowest to the one along which elements lie next to one another."""
    axes = range(len(stored.shape))
    for order in (axes, sorted(axes, key=lambda d: (-stored.strides[d], stored.shape[d] == 1))):
        if _dense(stored, order):
            return tuple(order)
    raise ValueError(
        f"{what} was saved with strides {stored.strides}, which leave gaps: save it again with "
        ".contiguous()"
    )


def _place(folder: Folder, key: str, info: Info, chunk: Chunk) -> Stored:
    """Where in its item a chunk lies raw. Raises ValueError if it is not what metadata say."""
    if chunk.raw:
        shape = extents(chunk.box)
        return Stored(info.dtype, shape, row_major(shape), chunk.file, chunk.offset)
    stored = read_torch(folder, chunk.file, chunk.offset, chunk.length)
    if not isinstance(stored, Stored):
        raise ValueError(
            f"{folder.where}/{chunk.file}: {key} {show(chunk.box)} is a {type(stored).__name__}"
        )
    if (stored.shape, stored.dtype) != (extents(chunk.box), info.dtype):
        raise ValueError(
            f"{folder.where}/{chunk.file}: {key} {show(chunk.box)} is {stored.dtype} "
            f"{[*stored.shape]}, and {METADATA} says {info.dtype} {[*extents(chunk.box)]}"
        )
    return stored


def _dense(stored: Stored, order: Sequence[int]) -> bool:
    """Whether elements lie one after another when the axes are taken in this order."""
    step = 1
    for d in reversed(order):
        if stored.shape[d] > 1 and stored.strides[d] != step:
            return False
        step *= stored.shape[d]
    return True


# --- what the keys mean -------------------------------------------------------------------


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


# --- writing ------------------------------------------------------------------------------


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


@dataclass
class Index:
    """What `.metadata` will say."""

    about: dict[str, Any]
    paths: dict[str, Path]
    places: dict[Any, Any]


def write_dcp(
    source: Source,
    where: Location,
    prefix: str = "model",
    optimizer_prefix: str = "optim",
    budget: int = 2**29,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a folder that torch.distributed.checkpoint.load reads, on any number of processes.

    prefix, optimizer_prefix: keys below which weights and optimizer state lie; '' writes weights
    at the top, as torchtitan does. Options of groups are written as get_optimizer_state_dict
    gives them, both flattened and not; those that the source lacks and that change no result
    (foreach, fused, ...) are added for Adam. Tied weights are written once, under all their names.
    budget: bytes of tensor data held at once. Raises FileExistsError for a folder that is not
    empty, ValueError for values that torch's safe loader refuses.
    """
    folder = open_folder(where)
    if folder.entries():
        raise FileExistsError(f"{folder.where} is not empty: choose another folder")
    leaves = [
        *_weight_leaves(source, prefix),
        *_state_leaves(source, optimizer_prefix),
        *_option_leaves(source, optimizer_prefix),
        *_extra_leaves(source),
    ]
    index = Index({}, _distinct(leaves), {})
    rest = iter(leaves)
    leaf, number = next(rest, None), 0
    while leaf is not None:
        name = f"__0_{number}.distcp"
        leaf = _write_file(folder, name, source, leaf, rest, index, budget, progress)
        number += 1
    folder.write(METADATA, _pickled(index))
    folder.sync()


def _distinct(leaves: Sequence[Leaf]) -> dict[str, Path]:
    """Paths by DCP's keys. Raises ValueError for a key that two values would have."""
    paths: dict[str, Path] = {}
    for leaf in leaves:
        for path in (leaf.path, *leaf.aliases):
            name = ".".join(map(str, path))
            if name in paths:
                raise ValueError(f"two values would be called {name!r}: choose another prefix")
            paths[name] = path
    return paths


def _write_file(
    folder: Folder,
    name: str,
    source: Source,
    first: Leaf,
    rest: Iterator[Leaf],
    index: Index,
    budget: int,
    progress: Callable[[int], None] | None,
) -> Leaf | None:
    """One file of some gigabytes; returns the leaf that goes into the next one."""
    at = 0
    leaf: Leaf | None = first
    with folder.create(name) as file:
        while leaf is not None and at < FILE:
            at = _write_leaf(file, name, at, source, leaf, index, budget, progress)
            leaf = next(rest, None)
    return leaf


def _write_leaf(
    file: File,
    file_name: str,
    at: int,
    source: Source,
    leaf: Leaf,
    index: Index,
    budget: int,
    progress: Callable[[int], None] | None,
) -> int:
    names = [".".join(map(str, path)) for path in (leaf.path, *leaf.aliases)]
    info = _info(source, leaf)
    boxes: list[Box] = [()]
    if info is not None:
        boxes = [*chunks(whole(info.shape), BYTES[info.dtype], ITEM)] or [whole(info.shape)]
    for box in boxes:
        tree = _lazy(source, leaf.value, info, box) if leaf.held and info else leaf.value
        length = append_torch(file, tree, leaf.name, budget, progress)
        start = None if info is None else [begin for begin, _ in box]
        for name in names:
            place = _StorageInfo(file_name, at, length)
            index.places[saved.MetadataIndex(name, start)] = place
        at += length
    for name in names:
        index.about[name] = saved.BytesStorageMetadata() if info is None else _about(info, boxes)
    return at


def _info(source: Source, leaf: Leaf) -> Info | None:
    if leaf.held:
        return source.tensors[leaf.value]
    if isinstance(leaf.value, Tensor):
        return Info(tuple(leaf.value.shape), name_of(leaf.value.dtype))
    return None


def _lazy(source: Source, key: Key, info: Info, box: Box) -> Lazy:
    shape = extents(box)

    def fill(start: int, out: np.ndarray) -> None:
        at = 0
        for part in flat_range(shape, start, start + out.size):
            size = volume(part)
            source.read(key, moved(part, box), out[at : at + size].reshape(extents(part)))
            at += size

    return Lazy(info.dtype, shape, fill)


def _about(info: Info, boxes: Sequence[Box]) -> saved.TensorStorageMetadata:
    return saved.TensorStorageMetadata(
        saved.TensorProperties(dtype=TORCH[info.dtype]),
        torch.Size(info.shape),
        [
            saved.ChunkStorageMetadata(torch.Size([i for i, _ in box]), torch.Size(extents(box)))
            for box in boxes
        ],
    )


def _pickled(index: Index) -> bytes:
    found = saved.Metadata(
        index.about, index.paths, index.places, saved.StorageMeta(), version="1.0.0"
    )
    return pickle.dumps(found)


# --- leaves -------------------------------------------------------------------------------


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
    adam = any(state == "exp_avg_sq" for _, state in source.tensors)
    if not adam or not options:
        return options
    how = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
    known = {"maximize": False} | how
    if not any(state == "max_exp_avg_sq" for _, state in source.tensors):
        known["amsgrad"] = False
    if source.optimizer == "AdamW" or options.get("weight_decay") == 0:
        known["decoupled_weight_decay"] = True
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
