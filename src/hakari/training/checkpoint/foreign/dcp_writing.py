"""Folders that torch.distributed.checkpoint loads, on any number of processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as saved
from torch.distributed.checkpoint.filesystem import _StorageInfo

from hakari.training.checkpoint.boxes import Box, extents, flat_range, moved, volume, whole
from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.foreign.dcp_leaves import Leaf, leaves_of
from hakari.training.checkpoint.foreign.dcp_metadata import METADATA, Path
from hakari.training.checkpoint.foreign.torch_writing import Lazy, append_torch
from hakari.training.checkpoint.shard_file import chunks
from hakari.training.checkpoint.source import Info, Key, Source
from hakari.training.checkpoint.storage import File, Folder, Location, open_folder
from hakari.training.checkpoint.tensors import TORCH, name_of

ITEM, FILE = 2**28, 2**32
"""Bytes of a tensor in one item, which torch loads whole, and of items in one file."""


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
    leaves = leaves_of(source, prefix, optimizer_prefix)
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
