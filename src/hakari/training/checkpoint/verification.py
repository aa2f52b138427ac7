"""Reading every byte of a checkpoint, and telling all that is not what was written.

Each tile against its checksum, each tensor against its content, headers, sizes, and whether any
byte of a file belongs to nothing. The first damage is not the last: all of it is listed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from threading import Lock

import numpy as np
from zlib_ng.zlib_ng import crc32

from hakari.training.checkpoint import manifest as manifests
from hakari.training.checkpoint.boxes import Box, extents, flat_range, moved, show, whole
from hakari.training.checkpoint.content import content, hexadecimal
from hakari.training.checkpoint.conversion import Progress
from hakari.training.checkpoint.dtypes import BYTES, bits
from hakari.training.checkpoint.formats import ROOT, detect, open_any
from hakari.training.checkpoint.fragments import TILE, Fragment
from hakari.training.checkpoint.manifest import COMMIT, MANIFEST, Manifest
from hakari.training.checkpoint.retention import located
from hakari.training.checkpoint.shard_file import chunks
from hakari.training.checkpoint.source import Info, Key, Source
from hakari.training.checkpoint.storage import Folder, Location, small

AT_ONCE = 2**24
"""Bytes that each thread reads at once: 16 MiB."""


@dataclass(frozen=True)
class Damage:
    """Something that is not what was written; bytes start .. stop - 1 of the file, where known.

    parameter, state: the tensor that is hit; '' where it is none, or more than one.
    """

    parameter: str
    state: str
    file: str
    start: int | None
    stop: int | None
    what: str

    def __str__(self) -> str:
        tensor = f"{self.parameter} ({self.state})" if self.parameter else ""
        place = "" if self.start is None else f", bytes {self.start:,} to {self.stop:,}"
        return ": ".join(part for part in (tensor, f"{self.file}{place}", self.what) if part)


@dataclass(frozen=True)
class Report:
    """What was found. checked: whether the format has checksums to compare with.

    unlisted: files of the folder that belong to no tensor. unchecked: files without checksums,
    in a format that has some.
    """

    where: str
    form: str
    step: int | None
    tensors: int
    bytes: int
    seconds: float
    damage: tuple[Damage, ...] = ()
    unlisted: tuple[str, ...] = ()
    checked: bool = True
    unchecked: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def __str__(self) -> str:
        rate = self.bytes / 1e9 / max(self.seconds, 1e-9)
        size = f"{size_text(self.bytes)} in {self.seconds:.2f} s ({rate:.2f} GB/s)"
        if not self.whole:
            places = "1 place" if len(self.damage) == 1 else f"{len(self.damage)} places"
            return f"damaged: {places}; {self.tensors} tensors, {size}"
        if self.unchecked:
            names = ", ".join(self.unchecked[:4]) + (", ..." if len(self.unchecked) > 4 else "")
            return (
                f"readable: {self.tensors} tensors, {size}; what has a CRC-32 agrees with it, "
                f"and {names} has none, so that changed values there cannot be told"
            )
        if self.checked:
            return f"whole: {self.tensors} tensors, {size}"
        return (
            f"readable: {self.tensors} tensors, {size}; {self.form} keeps no checksums, so that "
            "changed values cannot be told"
        )


def size_text(count: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


def verify(
    where: Location,
    progress: Progress = None,
    *,
    form: str | None = None,
    tag: str | None = None,
    workers: int = 2,
) -> Report:
    """Read all of a checkpoint, or of the newest one in a folder, and report all damage.

    progress: told of bytes read, from several threads. form, tag: as of `open_any`. workers:
    reading threads, of 16 MiB each. Of other formats every tensor is read, and compared with the
    CRC-32 that torch's files keep of it; safetensors keep none. Raises FileNotFoundError if there
    is no complete checkpoint.
    """
    form = form or detect(where, tag)
    if form not in ("hakari", ROOT):
        return _readable(where, form, tag, progress)
    begun = time.perf_counter()
    folder = located(where)
    found, lost = _manifest(folder)
    if found is None:
        return Report(folder.where, "hakari", None, 0, 0, time.perf_counter() - begun, lost)
    damage, done = _damage(folder, found, workers, progress)
    known = {MANIFEST, COMMIT, *found.files}
    return Report(
        folder.where,
        "hakari",
        found.step,
        len(found.infos),
        done,
        time.perf_counter() - begun,
        (*lost, *damage),
        tuple(name for name in folder.names() if name not in known),
    )


# --- this format --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tile:
    """Bytes of a file that have one checksum."""

    key: Key
    fragment: Fragment
    number: int
    start: int
    stop: int


@dataclass
class _Found:
    """What the threads found together."""

    damage: list[Damage]
    totals: dict[Key, int]
    spoilt: set[Key]
    bytes: int = 0


def _damage(
    folder: Folder, found: Manifest, workers: int, progress: Progress
) -> tuple[list[Damage], int]:
    tiles: dict[str, list[_Tile]] = {name: [] for name in found.files}
    for key, parts in found.fragments.items():
        for part in parts:
            tiles[part.file] += _tiles(key, part, found.infos[key])
    result = _Found([], dict.fromkeys(found.infos, 0), set())
    lock = Lock()
    batches: list[tuple[str, list[_Tile]]] = []
    for name, own in tiles.items():
        own.sort(key=lambda tile: tile.start)
        readable = _file(folder, found, name, own, result)
        batches += [(name, batch) for batch in _batches(readable)]

    def work(job: tuple[str, list[_Tile]]) -> None:
        _read(folder, *job, found, result, lock)
        if progress:
            progress(job[1][-1].stop - job[1][0].start)

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, batches):
            pass
    result.damage += _wrong_contents(found, result)
    order = {name: number for number, name in enumerate(found.files)}
    result.damage.sort(key=lambda d: (order.get(d.file, -1), d.start or 0, d.parameter, d.state))
    return result.damage, result.bytes


def _tiles(key: Key, part: Fragment, info: Info) -> Iterator[_Tile]:
    size = prod(extents(part.box)) * BYTES[info.dtype]
    for number, start in enumerate(range(0, size, TILE)):
        stop = min(start + TILE, size)
        yield _Tile(key, part, number, part.offset + start, part.offset + stop)


def _file(
    folder: Folder, found: Manifest, name: str, tiles: Sequence[_Tile], result: _Found
) -> list[_Tile]:
    """Check a file as such; returns the tiles that it is long enough for."""
    expected = found.files[name]
    try:
        size = folder.size(name)
    except FileNotFoundError:
        size = -1
    lost = [tile for tile in tiles if tile.stop > size]
    if size != expected.bytes:
        said = "is missing" if size < 0 else f"has {size:,} bytes"
        what = f"{said} instead of {expected.bytes:,}" + ("" if lost else "; no tensor is hit")
        start = min(max(size, 0), expected.bytes)
        result.damage.append(Damage("", "", name, start, max(size, expected.bytes), what))
    for tile in lost:
        result.damage.append(_hit(tile, "lost: the file ends before" if size >= 0 else "lost"))
        result.spoilt.add(tile.key)
    if size >= expected.header:
        head = bytearray(expected.header)
        folder.read(name, 0, memoryview(head))
        result.bytes += len(head)
        if crc32(head) != expected.crc:
            what = "the header is not what was written"
            result.damage.append(Damage("", "", name, 0, expected.header, what))
    result.damage += _uncovered(name, expected, tiles)
    return [tile for tile in tiles if tile.stop <= size]


def _uncovered(name: str, expected: manifests.Stored, tiles: Sequence[_Tile]) -> list[Damage]:
    """Bytes that no checksum covers, so that damage to them could not be seen."""
    edges = [(0, expected.header), *((t.start, t.stop) for t in tiles), (expected.bytes,) * 2]
    return [
        Damage("", "", name, a, b, "these bytes belong to no tensor")
        for (_, a), (b, _) in pairwise(edges)
        if a < b
    ]


def _batches(tiles: Sequence[_Tile]) -> Iterator[list[_Tile]]:
    """Tiles that lie end to end, up to 16 MiB together."""
    batch: list[_Tile] = []
    for tile in tiles:
        if batch and (tile.start != batch[-1].stop or tile.stop - batch[0].start > AT_ONCE):
            yield batch
            batch = []
        batch.append(tile)
    if batch:
        yield batch


def _read(
    folder: Folder, name: str, batch: list[_Tile], found: Manifest, result: _Found, lock: Lock
) -> None:
    begin = batch[0].start
    data = memoryview(bytearray(batch[-1].stop - begin))
    error = ""
    try:
        folder.read(name, begin, data)
    except (OSError, ValueError) as failure:
        error = f"cannot be read: {failure}"
    for tile in batch:
        part = data[tile.start - begin : tile.stop - begin]
        right = not error and crc32(part) == tile.fragment.crcs[tile.number]
        total = _content(tile, part, found.infos[tile.key].dtype) if right else 0
        with lock:
            result.totals[tile.key] += total
            if not right:
                result.spoilt.add(tile.key)
                result.damage.append(_hit(tile, error or "not what was written"))
    with lock:
        result.bytes += data.nbytes


def _content(tile: _Tile, data: memoryview, dtype: str) -> int:
    """A tile's share of its tensor's content."""
    values, width = np.frombuffer(data, bits(dtype)), BYTES[dtype]
    shape, origin = extents(tile.fragment.box), tile.fragment.box
    first = tile.number * TILE // width
    total = at = 0
    for run in flat_range(shape, first, first + len(values)):
        size = prod(extents(run))
        box: Box = moved(run, origin)
        total += content(values[at : at + size].reshape(extents(run)), box)
        at += size
    return total


def _wrong_contents(found: Manifest, result: _Found) -> Iterator[Damage]:
    for key, total in result.totals.items():
        if key not in result.spoilt and hexadecimal(total) != found.contents[key]:
            what = "its content is not that in the manifest, although all checksums are right"
            yield Damage(*key, MANIFEST, None, None, what)


def _hit(tile: _Tile, what: str) -> Damage:
    box = f"tile {tile.number} of {show(tile.fragment.box)}" if tile.fragment.box else "a scalar"
    return Damage(*tile.key, tile.fragment.file, tile.start, tile.stop, f"{what} ({box})")


def _manifest(folder: Folder) -> tuple[Manifest | None, tuple[Damage, ...]]:
    """The manifest, also where COMMIT is damaged and still has its hash; None without that.

    Raises ValueError for one that is as written, and of another version.
    """
    try:
        return manifests.read(folder), ()
    except ValueError as error:
        said = str(error)
    try:
        commit = json.loads(small(folder, COMMIT, 2**16))["manifest_sha256"]
        data = small(folder, MANIFEST, manifests.LARGEST)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        commit, data = "", b""
    if hashlib.sha256(data).hexdigest() != commit:
        return None, (Damage("", "", MANIFEST, None, None, said),)
    where = f"{folder.where}/{MANIFEST}"
    found = manifests.from_json(manifests.json_object(data, where), where)
    file = MANIFEST if manifests.misnamed(folder, found) else COMMIT
    return found, (Damage("", "", file, None, None, said),)


# --- other formats ------------------------------------------------------------------------


def _readable(where: Location, form: str, tag: str | None, progress: Progress) -> Report:
    begun = time.perf_counter()
    source, damage, done = open_any(where, form, tag=tag), [], 0
    for key, info in source.tensors.items():
        try:
            for size in _each_chunk(source, key, info):
                done += size
                if progress:
                    progress(size)
        except (OSError, ValueError) as error:
            damage.append(Damage(*key, str(where), None, None, str(error)))
    lost, unchecked = source.audit() if source.audit else ((), ())
    damage += [Damage("", "", str(where), None, None, what) for what in lost]
    return Report(
        str(where),
        form,
        source.step,
        len(source.tensors),
        done,
        time.perf_counter() - begun,
        tuple(damage),
        checked=source.audit is not None,
        unchecked=tuple(unchecked),
    )


def _each_chunk(source: Source, key: Key, info: Info) -> Iterator[int]:
    for box in chunks(whole(info.shape), BYTES[info.dtype], AT_ONCE):
        yield source.array(key, box).nbytes
