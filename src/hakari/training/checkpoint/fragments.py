"""Reading boxes of tensors out of the parts of them that lie in files.

A fragment is a box of a tensor, stored row by row at an offset of a file. With checksums it is
read by whole tiles, each verified; without (foreign formats) by just the bytes that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from operator import attrgetter

import numpy as np
from zlib_ng.zlib_ng import crc32

from hakari.training.checkpoint.boxes import (
    Box,
    extents,
    flat_range,
    intersect,
    moved,
    show,
    within,
)
from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.source import Info, Key
from hakari.training.checkpoint.storage import Folder

TILE = 2**24
"""Bytes to a checksum: 16 MiB."""
NEAR, TOGETHER = 2**16, 2**23
"""Reads of one file with a gap below 64 KiB are made in one, of up to 8 MiB."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A box of a tensor in a file: its elements in row-major order from byte `offset`.

    crcs: CRC-32 of each 16 MiB from the start, or none.
    """

    box: Box
    file: str
    offset: int
    crcs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """Bytes to read, and where their elements go."""

    file: str
    offset: int
    bytes: int
    key: Key
    fragment: Fragment
    start: int  # within the fragment, in bytes
    box: Box
    out: np.ndarray  # of `box`

    @property
    def stop(self) -> int:
        """Where the bytes end in the file."""
        return self.offset + self.bytes


class DamageError(ValueError):
    """A tile or a file is not what was written. `keys`: tensors that it holds; `key`: the first."""

    def __init__(self, message: str, key: Key, *more: Key) -> None:
        super().__init__(message)
        self.key, self.keys = key, (key, *more)


def read(
    folder: Folder,
    wanted: Iterable[tuple[Key, Box, np.ndarray]],
    infos: Mapping[Key, Info],
    fragments: Mapping[Key, Sequence[Fragment]],
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fill each array with its box of a tensor; arrays hold unsigned integers.

    workers: threads. progress: told of bytes as they are read. Memory: 16 MiB a worker, at most.
    Raises DamageError for a tile whose checksum is not that in the manifest.
    """
    jobs = sorted(
        (
            job
            for key, box, out in wanted
            for job in _jobs(key, infos[key].dtype, fragments[key], box, out)
        ),
        key=attrgetter("file", "offset"),
    )

    def work(batch: list[Job]) -> None:
        size = _read_batch(folder, batch, infos)
        if progress:
            progress(size)

    if workers < 2 or len(jobs) < 2:
        for batch in _batches(jobs):
            work(batch)
        return
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, batch) for batch in _batches(jobs)]:
            done.result()


def _jobs(
    key: Key, dtype: str, fragments: Sequence[Fragment], box: Box, out: np.ndarray
) -> Iterator[Job]:
    """What to read for a box. Shared tiles of different boxes are read once for each."""
    width = BYTES[dtype]
    for fragment in fragments:
        shared = box if fragment.box == box else intersect(fragment.box, box)
        if shared is None or 0 in out.shape:
            continue
        shape = extents(fragment.box)
        total = prod(shape) * width
        first, last = 0, total
        if shared != fragment.box:
            first, last = _span(shape, within(shared, fragment.box), width)
        part = out if shared == box else out[within(shared, box)]
        step = TILE
        start, stop = first, last
        if fragment.crcs:
            start, stop = first // step * step, min(total, -(-last // step) * step)
        for at in range(start, stop, step):
            size = min(step, stop - at)
            yield Job(fragment.file, fragment.offset + at, size, key, fragment, at, shared, part)


def _span(shape: Sequence[int], slices: Sequence[slice], width: int) -> tuple[int, int]:
    """First byte and the one after the last of a box within a fragment."""
    first = last = 0
    for n, part in zip(shape, slices, strict=True):
        first, last = first * n + part.start, last * n + part.stop - 1
    return first * width, (last + 1) * width


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that lie near one another in a file, to be read at once; large ones alone."""
    batch: list[Job] = []
    for job in jobs:
        if batch and not (
            job.file == batch[0].file
            and job.offset - batch[-1].stop < NEAR
            and job.stop - batch[0].offset <= TOGETHER
        ):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _read_batch(folder: Folder, batch: list[Job], infos: Mapping[Key, Info]) -> int:
    if len(batch) == 1:
        direct = _direct(batch[0])
        if direct is not None:
            _fetch(folder, batch[0], batch[0].offset, direct)
            _verify(folder, batch[0], direct)
            return batch[0].bytes
    begin, end = batch[0].offset, max(job.stop for job in batch)
    staging = memoryview(bytearray(end - begin))
    _fetch(folder, batch[0], begin, staging)
    for job in batch:
        data = staging[job.offset - begin : job.stop - begin]
        _verify(folder, job, data)
        direct = _direct(job)
        if direct is None:
            _scatter(job, data, infos[job.key].dtype)
        else:
            direct[:] = data
    return end - begin


def _fetch(folder: Folder, job: Job, offset: int, out: memoryview) -> None:
    try:
        folder.read(job.file, offset, out)
    except (ValueError, FileNotFoundError) as error:
        raise DamageError(
            f"{error}; it holds {_name(job.key)} {show(job.fragment.box)}", job.key
        ) from error


def _direct(job: Job) -> memoryview | None:
    """The destination's own bytes, where the tile goes there as it is."""
    if job.box != job.fragment.box or not job.out.flags.c_contiguous:
        return None
    flat = job.out.reshape(-1).view(np.uint8)
    return flat.data[job.start : job.start + job.bytes]


def _verify(folder: Folder, job: Job, data: memoryview) -> None:
    crcs = job.fragment.crcs
    if not crcs:
        return
    tile = job.start // TILE
    if crc32(data) != crcs[tile]:
        raise DamageError(
            f"{_name(job.key)} is damaged: bytes {job.offset:,} to {job.stop:,} of "
            f"{folder.where}/{job.file} (tile {tile}, {show(job.fragment.box)}) are not what was "
            "written",
            job.key,
        )


def _scatter(job: Job, data: memoryview, dtype: str) -> None:
    """Copy the wanted part of a run of a fragment's elements to where it belongs."""
    width = BYTES[dtype]
    values = np.frombuffer(data, job.out.dtype)
    shape = extents(job.fragment.box)
    if not shape:
        job.out[...] = values[0]
        return
    at = 0
    for run in flat_range(shape, job.start // width, (job.start + job.bytes) // width):
        size = prod(extents(run))
        place = moved(run, job.fragment.box)
        shared = intersect(place, job.box)
        if shared is not None:
            block = values[at : at + size].reshape(extents(run))
            job.out[within(shared, job.box)] = block[within(shared, place)]
        at += size


def _name(key: Key) -> str:
    return f"{key[0]} ({key[1]})"
