"""Folders of torch.distributed.checkpoint by their own keys; tensors are read box by box.

A folder has `.metadata` and `.distcp` files, in which every chunk of a tensor is a torch.save
file of its own; or it has safetensors whose headers say where in its tensor each chunk belongs
(HuggingFaceStorageWriter with save_distributed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hakari.training.checkpoint import fragments
from hakari.training.checkpoint.boxes import Box, extents, flaw, intersect, show, volume, whole
from hakari.training.checkpoint.dtypes import bits
from hakari.training.checkpoint.foreign.checked_folder import audit, checked
from hakari.training.checkpoint.foreign.dcp_metadata import (
    METADATA,
    Chunk,
    check_files,
    from_metadata,
    from_safetensors,
)
from hakari.training.checkpoint.foreign.dcp_metadata import Path as KeyPath
from hakari.training.checkpoint.foreign.torch_files import read_torch
from hakari.training.checkpoint.foreign.torch_values import Stored, plain, row_major
from hakari.training.checkpoint.fragments import DamageError, Fragment
from hakari.training.checkpoint.source import Info
from hakari.training.checkpoint.storage import Folder, Location, open_folder
from hakari.training.checkpoint.tensors import as_tensor


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
    paths: Mapping[str, KeyPath]
    record: Any
    read: Callable[[str, Box, np.ndarray], None]
    inert: tuple[str, ...] = ()

    @property
    def audit(self) -> Callable[[], tuple[list[str], list[str]]] | None:
        """As a `Source` has it; `.metadata` has no checksum."""
        safetensors = self.record is None
        return None if safetensors else partial(audit, self.folder, METADATA)

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


def open_container(where: Location | Folder, inert: Sequence[str] = ()) -> Container:
    """Open a folder by the keys that were saved; metadata and sizes of files alone are read.

    inert: patterns of classes in pickles that become records. Raises as `open_dcp`.
    """
    folder = checked(open_folder(where) if isinstance(where, str | Path) else where)
    names = folder.names()
    if METADATA in names:
        found = from_metadata(folder, inert)
    elif any(name.endswith(".safetensors") for name in names):
        found = from_safetensors(folder, names)
    else:
        raise FileNotFoundError(f"{folder.where} has neither {METADATA} nor safetensors")
    check_files(folder, names, found)
    for key, info in found.tensors.items():
        if wrong := flaw(info.shape, [chunk.box for chunk in found.chunks[key]]):
            files = sorted({chunk.file for chunk in found.chunks[key]})
            raise ValueError(f"{folder.where}: {key} {[*info.shape]}: {wrong} (in {files[:4]})")
    places: dict[tuple[str, int], Stored] = {}
    read = partial(_read, folder, found.tensors, found.chunks, places)
    keys = (found.tensors, found.chunks, found.items, found.paths, found.record)
    return Container(folder, *keys, read, tuple(inert))


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
    try:
        stored = read_torch(folder, chunk.file, chunk.offset, chunk.length)
    except ValueError as error:
        raise DamageError(f"{error}; it holds {key} {show(chunk.box)}", (key, "DCP")) from error
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
