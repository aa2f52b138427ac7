"""What `.metadata`, or the headers of safetensors, say of a folder: tensors and where they lie.

`.metadata` is a pickle, which is read and not executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hakari.training.checkpoint.boxes import Box, show
from hakari.training.checkpoint.foreign.hugging_face_folder import metadata, read_header
from hakari.training.checkpoint.foreign.pickles import MOST_PICKLE, unpickle
from hakari.training.checkpoint.source import Info
from hakari.training.checkpoint.storage import Folder, small
from hakari.training.checkpoint.tensors import NAMES

METADATA, SHARDING = ".metadata", "DCP_SHARDING_INFO"
CLASSES = (
    "torch.distributed.checkpoint.metadata.*",
    "torch.distributed.checkpoint.filesystem._Storage*",
)

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
class Contents:
    """What metadata say. tensors, chunks: by key. items: what is no tensor, by key.

    paths: of each key in the tree that was saved. record: the metadata, as it was pickled.
    """

    tensors: Mapping[str, Info]
    chunks: Mapping[str, tuple[Chunk, ...]]
    items: Mapping[str, Chunk]
    paths: Mapping[str, Path]
    record: Any = None


def from_metadata(folder: Folder, inert: Sequence[str]) -> Contents:
    """What the pickle `.metadata` says. inert: patterns of further classes that it may name."""
    what = f"{folder.where}/{METADATA}"
    record = unpickle(small(folder, METADATA, MOST_PICKLE), what, inert=(*CLASSES, *inert))
    try:
        return _indexed(record, what)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{what} is not as torch writes it ({type(error).__name__}: {error})"
        ) from error


def from_safetensors(folder: Folder, names: Sequence[str]) -> Contents:
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
    return Contents(tensors, chunks_of, {}, {key: (key,) for key in tensors})


def check_files(folder: Folder, names: Sequence[str], contents: Contents) -> None:
    """Raise an error for a file that is missing, or shorter than its items, or if these overlap."""
    there, ends = set(names), dict[str, tuple[int, str]]()
    single = ((key, (item,)) for key, item in contents.items.items())
    for key, held in (*contents.chunks.items(), *single):
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
    _apart(folder, contents)


def _apart(folder: Folder, contents: Contents) -> None:
    """Raise ValueError if two items share bytes; tied weights may lie at the very same place."""
    places: dict[tuple[str, int, int], str] = {}
    single = ((key, (item,)) for key, item in contents.items.items())
    for key, held in (*contents.chunks.items(), *single):
        for chunk in held:
            if chunk.length:
                places.setdefault((chunk.file, chunk.offset, chunk.offset + chunk.length), key)
    for (first, a), (second, b) in pairwise(sorted(places.items())):
        if first[0] == second[0] and second[1] < first[2]:
            raise ValueError(
                f"{folder.where}: {a} (bytes {first[1]:,} to {first[2]:,}) and {b} (bytes "
                f"{second[1]:,} to {second[2]:,}) overlap in {first[0]}: {METADATA} is damaged"
            )


def _indexed(record: Any, what: str) -> Contents:
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
    _told_alike(keys, {key for key, _ in places}, known, what)
    paths = {key: known.get(key, (key,)) for key in keys}
    return Contents(tensors, chunks_of, items, paths, record)


def _told_alike(
    keys: Mapping[str, Any], placed: set[str], known: Mapping[str, Any], what: str
) -> None:
    """Raise ValueError if metadata call something by different names: there is no checksum."""
    if lost := sorted(placed - set(keys)):
        raise ValueError(f"{what} says where {lost[0]} lies, but not what it is: damaged")
    for key in keys if known else ():
        path = known.get(key)
        if not isinstance(path, tuple) or ".".join(map(str, path)) != key:
            raise ValueError(f"{what} says that {key} lies at {path} of what was saved: damaged")


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


def _consecutive(folder: Folder, files: Sequence[str]) -> None:
    found = [re.match(r"shard-(\d+)-model-", file) for file in files]
    numbers = {int(match[1]) for match in found if match}
    missing = set(range(1, max(numbers, default=0))) - numbers
    if missing:
        raise FileNotFoundError(
            f"{folder.where}: the files of shard {min(missing)} are missing; there are shards up "
            f"to {max(numbers)}"
        )
