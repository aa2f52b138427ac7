"""Writing safetensors files from start to end, each tile with its checksum."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from zlib_ng.zlib_ng import crc32

from hakari.training.checkpoint.boxes import Box, extents, show, whole
from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.fragments import TILE, Fragment
from hakari.training.checkpoint.manifest import Stored
from hakari.training.checkpoint.source import Info, Key
from hakari.training.checkpoint.storage import File, Folder

MOST = 2**31
"""Bytes of data in a file, unless one tensor is larger: 2 GiB."""
GATHERED = 2**20
"""Bytes of small tensors that are written at once: 1 MiB."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file.

    chunks: makes its values, as arrays of unsigned integers that follow one another row by row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Part:
    """A box of a logical tensor, and what makes its values, as unsigned integers."""

    key: Key
    info: Info
    box: Box
    values: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Written:
    """What was written: files, and where in them each box lies."""

    files: dict[str, Stored]
    fragments: list[tuple[Key, Fragment]]


def write_parts(folder: Folder, prefix: str, parts: Sequence[Part], save_id: str) -> Written:
    """Write boxes into files PREFIX-000.safetensors, ...; on disk when this returns."""
    written = Written({}, [])
    sizes = [prod(extents(part.box)) * BYTES[part.info.dtype] for part in parts]
    for number, chosen in enumerate(split(sizes, MOST)):
        name = f"{prefix}-{number:03d}.safetensors"
        entries = [_entry(parts[index]) for index in chosen]
        written.files[name], places = write_file(folder, name, entries, {"save_id": save_id})
        for index, (offset, crcs) in zip(chosen, places, strict=True):
            fragment = Fragment(parts[index].box, name, offset, crcs)
            written.fragments.append((parts[index].key, fragment))
    return written


def write_file(
    folder: Folder, name: str, entries: Sequence[Entry], metadata: Mapping[str, str]
) -> tuple[Stored, list[tuple[int, tuple[int, ...]]]]:
    """Write a safetensors file; it is on disk when this returns.

    Returns its size and header, and for each entry where it starts and the CRC-32 of each 16 MiB.
    Tensors stand in order of their width, widest first, so that all lie aligned.
    """
    sizes = [entry.bytes for entry in entries]
    order = sorted(range(len(entries)), key=lambda i: -BYTES[entries[i].dtype])
    head = _header([(entries[i], sizes[i]) for i in order], metadata)
    places: list[tuple[int, tuple[int, ...]]] = [(0, ())] * len(entries)
    at = len(head)
    with folder.create(name) as file:
        gathered = _Gathered(file)
        gathered.write(memoryview(head))
        for i in order:
            places[i] = (at, _write_tiles(gathered, entries[i], sizes[i]))
            at += sizes[i]
        gathered.flush()
    return Stored(at, len(head), crc32(head)), places


@dataclass
class _Gathered:
    """A file to which small writes go together."""

    file: File
    pending: bytearray = field(default_factory=bytearray)

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        if len(data) >= GATHERED:
            self.flush()
            self.file.write(data)
            return
        self.pending += data
        if len(self.pending) >= GATHERED:
            self.flush()

    def flush(self) -> None:
        """Have the file told of all of them."""
        if self.pending:
            self.file.write(self.pending)
            self.pending = bytearray()


def label(key: Key, info: Info, box: Box) -> str:
    """Name of a box in a safetensors file: STATE/NAME, and the box where it is not all."""
    name = f"{key[1]}/{key[0]}"
    return name if box == whole(info.shape) else f"{name}{show(box)}"


def split(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in runs whose sizes add up to at most `most`, or that have one member."""
    chosen: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if chosen and total + size > most:
            yield chosen
            chosen, total = [], 0
        chosen.append(index)
        total += size
    if chosen:
        yield chosen


def chunks(box: Box, width: int, most: int) -> Iterator[Box]:
    """Boxes of at most `most` bytes that follow one another row by row; width: of an element."""
    size = prod(extents(box)) * width
    if size <= most or not box:
        if size:
            yield box
        return
    (start, stop), rest = box[0], box[1:]
    row = size // (stop - start)
    step = max(1, most // row)
    for low in range(start, stop, step):
        here = ((low, min(low + step, stop)), *rest)
        if step > 1 or row <= most:
            yield here
        else:
            yield from ((here[0], *inner) for inner in chunks(rest, width, most))


def _entry(part: Part) -> Entry:
    name = label(part.key, part.info, part.box)
    return Entry(name, part.info.dtype, extents(part.box), lambda: [part.values()])


def _header(entries: Iterable[tuple[Entry, int]], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for entry, size in entries:
        if entry.name in table:
            raise ValueError(f"two tensors of a file would be called {entry.name!r}")
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _write_tiles(file: _Gathered, entry: Entry, size: int) -> tuple[int, ...]:
    """Append the values; returns the CRC-32 of each 16 MiB, wherever the chunks end."""
    crcs: list[int] = []
    total = 0
    for chunk in entry.chunks():
        rest = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        while rest:
            piece = rest[: TILE - total % TILE]
            if total % TILE == 0:
                crcs.append(0)
            crcs[-1] = crc32(piece, crcs[-1])
            file.write(piece)
            total += len(piece)
            rest = rest[len(piece) :]
    if total != size:
        raise ValueError(f"{entry.name} has {total:,} bytes instead of {size:,}")
    return tuple(crcs)
