"""Gathering where the elements of tensors lie, file by file, until they make a `Source`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np

from hakari.training.checkpoint import fragments
from hakari.training.checkpoint.boxes import Box, extents, flat_range, flaw, volume, whole
from hakari.training.checkpoint.dtypes import BYTES, bits
from hakari.training.checkpoint.foreign.checked_folder import StorageError, audit
from hakari.training.checkpoint.foreign.deepspeed_files import numel, row_major
from hakari.training.checkpoint.foreign.torch_values import Stored, load
from hakari.training.checkpoint.source import Group, Info, Key, Source
from hakari.training.checkpoint.storage import Folder

EXACT = 2**24
"""Whole numbers up to here are exact as 32-bit floats."""


@dataclass(frozen=True)
class Parts:
    """What was found so far: tensors, where their boxes lie, and values that are known already."""

    folder: Folder
    infos: dict[Key, Info] = field(default_factory=dict)
    fragments: dict[Key, list[fragments.Fragment]] = field(default_factory=dict)
    values: dict[Key, np.ndarray] = field(default_factory=dict)
    scalars: dict[Key, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Elements first .. first + count - 1 of a flattened tensor lie from element `start` of what
    a data-parallel rank holds.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    start: int
    first: int
    count: int


def place(parts: Parts, state: str, span: Span, stored: Stored) -> None:
    """Note that a span of a tensor lies in a stored one, which holds elements in flat order."""
    key = (span.name, state)
    info = parts.infos.setdefault(key, Info(span.shape, stored.dtype))
    if info != Info(span.shape, stored.dtype):
        raise ValueError(
            f"{span.name} ({state}) is {info.dtype} {[*info.shape]} in one file and "
            f"{stored.dtype} {[*span.shape]} in {stored.file}"
        )
    if prod(stored.shape) < span.start + span.count:
        raise ValueError(
            f"{stored.file} holds {prod(stored.shape):,} elements where {span.name} ({state}) "
            f"should lie at {span.start:,} to {span.start + span.count:,}"
        )
    found = parts.fragments.setdefault(key, [])
    offset = stored.offset + span.start * BYTES[stored.dtype]
    for box in flat_range(span.shape, span.first, span.first + span.count):
        found.append(fragments.Fragment(box, stored.file, offset))
        offset += volume(box) * BYTES[stored.dtype]


def place_whole(parts: Parts, name: str, state: str, stored: Stored) -> None:
    """Note that a tensor lies in one piece."""
    shape = tuple(stored.shape)
    place(parts, state, Span(name, shape, 0, 0, 0, prod(shape)), stored)


def place_scalar(parts: Parts, name: str, state: str, value: Any, what: str) -> None:
    """Keep a scalar state. The number of steps becomes a 0-dim 32-bit float, as torch has it."""
    if isinstance(value, Stored) and state == "step" and value.dtype != "F32":
        value = load(parts.folder, value).item()
    if isinstance(value, Stored):
        raw = number(parts.folder, value)[1]
        parts.infos[name, state] = Info((), value.dtype)
        parts.values[name, state] = np.frombuffer(raw, bits(value.dtype)).reshape(())
    elif state == "step":
        if not isinstance(value, int | float) or value != int(value) or not 0 <= value <= EXACT:
            raise ValueError(f"{what}: step is {value!r}, not a number of steps up to {EXACT:,}")
        parts.infos[name, state] = Info((), "F32")
        parts.values[name, state] = np.array(value, np.float32).view(np.uint32)
    elif value is not None:
        parts.scalars[name, state] = value


def number(folder: Folder, value: Any) -> Any:
    """What a scalar state is compared by: its bytes, if it is a tensor."""
    if not isinstance(value, Stored):
        return value
    raw = bytearray(BYTES[value.dtype])
    folder.read(value.file, value.offset, memoryview(raw))
    return value.dtype, bytes(raw)


def place_states(
    parts: Parts,
    spans: Sequence[Span],
    states: Sequence[Mapping[str, Any]],
    sizes: Sequence[int],
    files: Sequence[str],
    shape: tuple[int, ...] | None = None,
) -> None:
    """Place the optimizer's states of a group: flat tensors, cut like its weights, or scalars."""
    names = dict.fromkeys(span.name for span in spans)
    for key in dict.fromkeys(key for state in states for key in state):
        values = [state.get(key) for state in states]
        if any(isinstance(value, Stored) and len(value.shape) for value in values):
            for value, size, file in zip(values, sizes, files, strict=True):
                held = row_major(value, f"{file}: {key}")
                if shape is not None:
                    shaped(held, shape, f"{next(iter(names))} ({key})")
                if numel(held) != size:
                    raise ValueError(
                        f"{file}: {key} has {numel(held):,} elements, the weights that it belongs "
                        f"to {size:,} ({', '.join(names)})"
                    )
            for span in spans:
                place(parts, key, span, row_major(values[span.rank], key))
            continue
        seen = [number(parts.folder, value) for value in values]
        for other, file in zip(seen, files, strict=True):
            if other != seen[0]:
                raise ValueError(f"{key} differs between {files[0]} and {file}: two saves mixed?")
        for name in names:
            place_scalar(parts, name, key, values[0], files[0])


def shaped(held: Stored, shape: tuple[int, ...], what: str) -> Stored:
    """A stored tensor that has the shape it must. Raises ValueError otherwise."""
    if tuple(held.shape) != shape:
        raise ValueError(
            f"{what} is {[*shape]} in the module and {[*held.shape]} in the optimizer: give "
            "names=, the parameters of each optimizer group in order"
        )
    return held


def close(
    parts: Parts,
    groups: tuple[Group, ...],
    tied: tuple[tuple[str, ...], ...],
    optimizer: str,
    step: int | None,
    extra: Any,
    origin: Mapping[str, Any],
) -> Source:
    """The source of what was gathered. Raises ValueError unless each tensor is there, once."""
    for key, found in parts.fragments.items():
        wrong = flaw(parts.infos[key].shape, [fragment.box for fragment in found])
        if wrong:
            files = ", ".join(sorted({fragment.file for fragment in found}))
            raise ValueError(f"{key[0]} ({key[1]}): {wrong} in {files} of {parts.folder.where}")

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        if key in parts.values:
            out[...] = parts.values[key]
            return
        if key not in parts.infos:
            raise ValueError(f"{parts.folder.where} has no {key[0]} ({key[1]})")
        _inside(key, box, parts.infos[key], out)
        try:
            fragments.read(parts.folder, [(key, box, out)], parts.infos, parts.fragments)
        except fragments.DamageError as error:
            if isinstance(error.__cause__, StorageError):
                raise _spoilt(parts, key, error.__cause__) from error
            raise

    given = (parts.infos, read, parts.scalars, groups, optimizer, tied, step, extra, origin)
    return Source(*given, audit=partial(audit, parts.folder))


def _spoilt(parts: Parts, key: Key, damage: StorageError) -> fragments.DamageError:
    """Damage to a storage, which holds parts of several tensors: `key`, and these."""
    hit = [key]
    for other, found in parts.fragments.items():
        inside = any(
            part.file == damage.file and damage.start <= part.offset < damage.stop for part in found
        )
        if inside and other != key:
            hit.append(other)
    names = ", ".join(f"{name} ({state})" for name, state in hit[:4])
    more = f" and {len(hit) - 4} more" if len(hit) > 4 else ""
    return fragments.DamageError(f"{damage}; it holds {names}{more}", *hit)


def _inside(key: Key, box: Box, info: Info, out: np.ndarray) -> None:
    fits = len(box) == len(info.shape) and all(
        0 <= start <= stop <= size
        for (start, stop), (_, size) in zip(box, whole(info.shape), strict=True)
    )
    if not fits or out.shape != extents(box) or out.dtype != bits(info.dtype):
        raise ValueError(
            f"{key[0]} ({key[1]}) is {info.dtype} {[*info.shape]}: it has no box {box} to fill an "
            f"array of {out.dtype} {[*out.shape]} with"
        )
