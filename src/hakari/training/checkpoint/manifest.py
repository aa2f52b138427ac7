"""manifest.json: all that a checkpoint says of itself; and COMMIT, which says that it is whole.

    {"format": "hakari-checkpoint", "version": 1, "save_id": ..., "step": ..., "origin": {...},
     "files": {"data/r00000-000.safetensors": [bytes, bytes of its header, CRC-32 of that]},
     "tensors": {NAME: {STATE: {"dtype", "shape", "content",
                                "fragments": [[file, offset, box, [CRC-32 of each 16 MiB]]]}}},
     "scalars": {NAME: {STATE: value}}, "groups": [[options, [NAME, ...]]], ...}

A manifest is a stranger's file: whatever it claims is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from hakari.training.checkpoint.boxes import Box, flaw, volume
from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.fragments import TILE, DamageError, Fragment
from hakari.training.checkpoint.source import Group, Info, Key
from hakari.training.checkpoint.storage import Folder, small

MANIFEST, COMMIT = "manifest.json", "COMMIT"
FORMAT, VERSION = "hakari-checkpoint", 1
LARGEST = 2**31
"""Bytes of a manifest that are read at most: 2 GiB."""
MESSAGE = 500
"""Characters of what a manifest says that an error quotes at most."""
STEP = re.compile(r"step-(\d{8,})")
"""Names of folders that say which step's they are."""
SAFE = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class Stored:
    """A data file: its size, and size and CRC-32 of its header, in bytes."""

    bytes: int
    header: int
    crc: int


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents.

    contents: `content.content` of each tensor. extra and ranks: trees as `tree.encode` writes
    them, of the run and of each process; modules: of those that keep more than tensors.
    optimizer: names of classes.
    """

    save_id: str
    step: int
    files: Mapping[str, Stored]
    infos: Mapping[Key, Info]
    fragments: Mapping[Key, tuple[Fragment, ...]]
    contents: Mapping[Key, str]
    scalars: Mapping[Key, Any] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    optimizer: str = ""
    tied: tuple[tuple[str, ...], ...] = ()
    extra: Any = None
    ranks: tuple[Any, ...] = ()
    modules: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all data files."""
        return sum(stored.bytes for stored in self.files.values())


def write(folder: Folder, manifest: Manifest) -> None:
    """Write the manifest, then COMMIT, each on disk before the next thing happens.

    Raises ValueError, having written nothing, for a manifest that `read` would refuse.
    """
    data = json.dumps(to_json(manifest), separators=(",", ":")).encode()
    from_json(json.loads(data), f"step {manifest.step}")
    folder.write(MANIFEST, data)
    folder.write(COMMIT, json.dumps(_commit(data, manifest)).encode())


def _commit(data: bytes, manifest: Manifest) -> dict[str, Any]:
    return {
        "manifest_sha256": hashlib.sha256(data).hexdigest(),
        "manifest_bytes": len(data),
        "files": len(manifest.files),
        "bytes": manifest.bytes,
        "save_id": manifest.save_id,
    }


def read(folder: Folder) -> Manifest:
    """The manifest of a committed folder, checked.

    Raises FileNotFoundError if there is no COMMIT, ValueError if anything in it or in the
    manifest is not what was written or cannot be.
    """
    try:
        commit = json_object(small(folder, COMMIT, 2**16), f"{folder.where}/{COMMIT}")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder.where} is not a complete checkpoint: it has no {COMMIT}"
        ) from None
    try:
        data = small(folder, MANIFEST, LARGEST)
    except FileNotFoundError:
        raise ValueError(f"{folder.where} is damaged: {MANIFEST} is missing") from None
    if hashlib.sha256(data).hexdigest() != commit.get("manifest_sha256"):
        raise ValueError(
            f"{folder.where} is damaged: {MANIFEST} or {COMMIT} is not what was written "
            "(their hashes differ)"
        )
    where = f"{folder.where}/{MANIFEST}"
    found = from_json(json_object(data, where), where)
    if commit != _commit(data, found):
        raise ValueError(f"{folder.where} is damaged: {COMMIT} is not what was written")
    if wrong := misnamed(folder, found):
        raise ValueError(f"{folder.where} is damaged: {wrong}")
    return found


def misnamed(folder: Folder, manifest: Manifest) -> str:
    """In what a folder's name and its manifest differ, if it is named as a step's."""
    match = STEP.fullmatch(folder.where.rstrip("/").rpartition("/")[2])
    if not match or int(match[1]) == manifest.step:
        return ""
    return (
        f"the folder's name says step {int(match[1])}, and its {MANIFEST} step {manifest.step}: "
        "it was renamed, or is another's"
    )


def to_json(manifest: Manifest) -> dict[str, Any]:
    """A manifest as plain JSON."""
    files = list(manifest.files)
    number = {name: i for i, name in enumerate(files)}
    tensors: dict[str, dict[str, Any]] = {}
    for key, info in manifest.infos.items():
        tensors.setdefault(key[0], {})[key[1]] = {
            "dtype": info.dtype,
            "shape": info.shape,
            "content": manifest.contents[key],
            "fragments": [
                [number[part.file], part.offset, part.box, part.crcs]
                for part in manifest.fragments[key]
            ],
        }
    return {
        "format": FORMAT,
        "version": VERSION,
        "save_id": manifest.save_id,
        "step": manifest.step,
        "origin": manifest.origin,
        "files": {name: [s.bytes, s.header, s.crc] for name, s in manifest.files.items()},
        "tensors": tensors,
        "scalars": nested(manifest.scalars),
        "groups": [[group.options, group.members] for group in manifest.groups],
        "optimizer": manifest.optimizer,
        "tied": manifest.tied,
        "extra": manifest.extra,
        "ranks": manifest.ranks,
        "modules": manifest.modules,
    }


def nested(values: Mapping[Key, Any]) -> dict[str, dict[str, Any]]:
    """{(name, state): value} as {name: {state: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for (name, state), value in values.items():
        found.setdefault(name, {})[state] = value
    return found


def from_json(table: Mapping[str, Any], where: str) -> Manifest:
    """A manifest from plain JSON. Raises ValueError, saying what of it cannot be."""
    if table.get("format") != FORMAT:
        raise ValueError(f"{where}: format is {table.get('format')!r}, not {FORMAT!r}")
    if table.get("version") != VERSION:
        raise ValueError(
            f"{where}: version {table.get('version')!r}, and this hakari reads {VERSION}: update it"
        )
    try:
        return _parse(table)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        said = f"{type(error).__name__}: {_short(error)}"
        raise ValueError(f"{where}: malformed ({said})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """What an error says, which may quote all of the manifest."""
    said = str(error)
    return said if len(said) <= MESSAGE else f"{said[:MESSAGE]}... ({len(said):,} characters)"


def _parse(table: Mapping[str, Any]) -> Manifest:
    files = {safe(name): _stored(name, row) for name, row in table["files"].items()}
    stored = [*files.items()]
    infos: dict[Key, Info] = {}
    fragments: dict[Key, tuple[Fragment, ...]] = {}
    contents: dict[Key, str] = {}
    for name, states in table["tensors"].items():
        for state, row in states.items():
            key = (name, state)
            info = _info(key, row)
            parts = tuple([_fragment(key, info, part, stored) for part in row["fragments"]])
            infos[key], fragments[key], contents[key] = info, parts, str(row["content"])
            found = flaw(info.shape, [part.box for part in parts])
            if found:
                raise ValueError(f"{name} ({state}) {[*info.shape]}: {found}")
    claimed = sum(info.bytes for info in infos.values())
    if claimed > sum(stored.bytes for stored in files.values()):
        raise ValueError(f"tensors of {claimed:,} bytes cannot lie in files that are smaller")
    scalars = table["scalars"].items()
    return Manifest(
        str(table["save_id"]),
        _count(table["step"]),
        files,
        infos,
        fragments,
        contents,
        {(name, state): value for name, states in scalars for state, value in states.items()},
        tuple(Group(dict(options), _names(members)) for options, members in table["groups"]),
        str(table["optimizer"]),
        tuple(map(_names, table["tied"])),
        table["extra"],
        tuple(table["ranks"]),
        dict(table.get("modules", {})),
        dict(table["origin"]),
    )


def _info(key: Key, row: Mapping[str, Any]) -> Info:
    dtype, shape = row["dtype"], tuple([_count(n) for n in row["shape"]])
    if dtype not in BYTES:
        raise ValueError(f"{key[0]} ({key[1]}): dtype {dtype!r} is none of {', '.join(BYTES)}")
    if len(shape) > 64 or prod(shape) * BYTES[dtype] >= 2**62:
        raise ValueError(f"{key[0]} ({key[1]}): shape {[*shape]} cannot be")
    return Info(shape, dtype)


def _fragment(
    key: Key, info: Info, row: Sequence[Any], files: Sequence[tuple[str, Stored]]
) -> Fragment:
    number, offset, box, crcs = row
    file, stored = files[_count(number)]
    place: Box = tuple([(_count(start), _count(stop)) for start, stop in box])
    size = volume(place) * BYTES[info.dtype]
    if _count(offset) < stored.header or offset + size > stored.bytes:
        raise ValueError(
            f"{key[0]} ({key[1]}): bytes {offset:,} to {offset + size:,} do not lie within the "
            f"data of {file}, which has {stored.bytes:,}"
        )
    if len(crcs) != -(-size // TILE):
        raise ValueError(f"{key[0]} ({key[1]}): {len(crcs)} checksums for {size:,} bytes")
    return Fragment(place, file, offset, tuple(map(_count, crcs)))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _stored(name: str, row: Sequence[Any]) -> Stored:
    stored = Stored(*map(_count, row))
    if stored.header > min(stored.bytes, LARGEST):
        raise ValueError(
            f"{name}: a header of {stored.header:,} bytes in a file of {stored.bytes:,} cannot be"
        )
    return stored


def _names(names: Sequence[Any]) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{names!r} is not a list of names")
    return tuple(names)


def safe(name: str) -> str:
    """A file's name, unless it could lead out of the folder: then ValueError."""
    if len(name) > 255 or not SAFE.fullmatch(name):
        raise ValueError(f"file name {name!r} could leave the folder")
    return name


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, and where a name in it stands twice."""
    try:
        table = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: not JSON ({error})") from error
    if not isinstance(table, dict):
        raise ValueError(f"{where} is damaged: {type(table).__name__} instead of an object")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} stands twice in one object")
    return table


def check_sizes(folder: Folder, manifest: Manifest, names: Sequence[str] | None = None) -> None:
    """Raise DamageError for a data file that is missing or has another size, and what it held."""
    for name in manifest.files if names is None else names:
        try:
            size = folder.size(name)
        except (FileNotFoundError, NotADirectoryError):
            size = -1
        if size != manifest.files[name].bytes:
            parts = manifest.fragments.items()
            keys = [key for key, found in parts if any(part.file == name for part in found)]
            shown = ", ".join(f"{key[0]} ({key[1]})" for key in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            state = "is missing" if size < 0 else f"has {size:,} bytes"
            raise DamageError(
                f"{folder.where}/{name} {state} instead of {manifest.files[name].bytes:,}; it "
                f"holds {shown or 'nothing'}{more}",
                *(keys or [("", "")]),
            )
