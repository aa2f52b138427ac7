"""A checkpoint folder of this format, opened: every byte that is read is verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from hakari.training.checkpoint import fragments, manifest, tree
from hakari.training.checkpoint.boxes import Box, whole
from hakari.training.checkpoint.dtypes import bits
from hakari.training.checkpoint.fragments import DamageError
from hakari.training.checkpoint.manifest import Manifest
from hakari.training.checkpoint.retention import located
from hakari.training.checkpoint.source import Group, Key, Source
from hakari.training.checkpoint.storage import Folder, Location
from hakari.training.checkpoint.tensors import as_tensor

EXTRA = "extra"
"""State under which tensors of extra_state and rank_state are kept."""


@dataclass(frozen=True)
class Stored:
    """A committed folder and its manifest."""

    folder: Folder
    manifest: Manifest


def open_stored(where: Location) -> Stored:
    """Open a checkpoint, or the newest one in a folder.

    Raises FileNotFoundError if there is none, ValueError if its manifest is damaged.
    """
    folder = located(where)
    return Stored(folder, manifest.read(folder))


def open_checkpoint(where: Location) -> Source:
    """A checkpoint of this format as a `Source`; sizes and headers of all files are checked.

    Raises FileNotFoundError if there is none, DamageError if a file is not what was written.
    """
    stored = open_stored(where)
    check_files(stored, [*stored.manifest.files])
    found = stored.manifest

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        fragments.read(stored.folder, [(key, box, out)], found.infos, found.fragments)

    extra, ranks, modules = extras(stored)
    return Source(
        {key: info for key, info in found.infos.items() if key[1] != EXTRA},
        read,
        {key: tree.decode(value, _none) for key, value in found.scalars.items()},
        tuple(Group(tree.decode(dict(g.options), _none), g.members) for g in found.groups),
        found.optimizer,
        found.tied,
        found.step,
        extra,
        found.origin,
        ranks,
        modules,
    )


def read_all(
    stored: Stored,
    wanted: Iterable[tuple[Key, Box, np.ndarray]],
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fill arrays with boxes of tensors; files are checked first."""
    found, chosen = stored.manifest, list(wanted)
    files = {part.file for key, _, _ in chosen for part in found.fragments[key]}
    check_files(stored, sorted(files), workers)
    fragments.read(stored.folder, chosen, found.infos, found.fragments, workers, progress)


def check_files(stored: Stored, names: Sequence[str], workers: int = 1) -> None:
    """Raise DamageError for a file with another size or header than was written."""
    manifest.check_sizes(stored.folder, stored.manifest, names)
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(partial(_check_header, stored), names):
            pass


def _check_header(stored: Stored, name: str) -> None:
    expected = stored.manifest.files[name]
    head = bytearray(expected.header)
    stored.folder.read(name, 0, memoryview(head))
    if crc32(head) != expected.crc:
        held = [
            key
            for key, parts in stored.manifest.fragments.items()
            if any(part.file == name for part in parts)
        ]
        key = held[0] if held else ("", "")
        raise DamageError(
            f"{stored.folder.where}/{name} is damaged: its header (bytes 0 to {len(head):,}) is "
            f"not what was written; it holds {key[0]} ({key[1]}) and {max(0, len(held) - 1)} more",
            *(held or [key]),
        )


def extras(stored: Stored) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """extra_state, rank_state of each process, and what modules keep, as they were saved."""
    found = stored.manifest
    infos = {key: info for key, info in found.infos.items() if key[1] == EXTRA}
    files = {part.file for key in infos for part in found.fragments[key]}
    manifest.check_sizes(stored.folder, found, sorted(files))  # before memory is taken for them
    arrays = {key: np.empty(info.shape, bits(info.dtype)) for key, info in infos.items()}
    read_all(stored, [(key, whole(infos[key].shape), array) for key, array in arrays.items()], 1)
    tensors: Mapping[str, Tensor] = {
        key[0]: as_tensor(array, infos[key].dtype) for key, array in arrays.items()
    }

    def whole_tree(plain: Any) -> Any:
        return tree.decode(plain, tensors.__getitem__)

    modules = {name: whole_tree(plain) for name, plain in found.modules.items()}
    return whole_tree(found.extra), tuple(map(whole_tree, found.ranks)), modules


def _none(name: str) -> Tensor:
    raise ValueError(f"{name} names a tensor where a plain value belongs")
