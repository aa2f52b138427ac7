"""Any opened checkpoint written as one of this format, or consolidated, within a memory budget.

Tensors are read in chunks of rows and written once, straight to where they stay; each worker
fills a file of its own, so there are no temporary fragments.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from torch import Tensor

from hakari.training.checkpoint import manifest as manifests
from hakari.training.checkpoint import tree
from hakari.training.checkpoint.boxes import Box, extents, whole, within
from hakari.training.checkpoint.content import content, hexadecimal
from hakari.training.checkpoint.dtypes import BYTES, bits
from hakari.training.checkpoint.fragments import Fragment
from hakari.training.checkpoint.manifest import COMMIT, Manifest, Stored, safe
from hakari.training.checkpoint.retention import advance, named
from hakari.training.checkpoint.shard_file import Entry, chunks, label, split, write_file
from hakari.training.checkpoint.source import Info, Key, Source
from hakari.training.checkpoint.storage import Folder, Location, open_folder, small
from hakari.training.checkpoint.stored import EXTRA
from hakari.training.checkpoint.tensors import TORCH, as_bits, as_tensor, name_of

FILE, LEAST = 2**30, 2**26
"""Bytes of data in a file: 1 GiB at most, and less where that leaves work for several workers."""

ATOMS = "atoms"
"""Key under which the headers of atoms say how many files there are, and which states."""

Progress = Callable[[int], None] | None


@dataclass(frozen=True)
class Done:
    """A file that is written: what it is, and of each tensor where it lies and what it holds."""

    name: str
    stored: Stored
    tensors: tuple[tuple[Key, int, tuple[int, ...], int], ...]


def convert(
    source: Source,
    where: Location,
    *,
    budget: int = 2**29,
    workers: int = 4,
    fingerprint: str = "",
    progress: Progress = None,
) -> str:
    """Write a checkpoint of this format, WHERE/step-N; returns where it is.

    budget: bytes of tensor data that are held at once. fingerprint: of the source's files; with
    it, an interrupted conversion of the same files goes on where it stopped. progress: told of
    bytes written. Raises FileExistsError if the step is there already, TypeError for a path
    instead of an opened checkpoint.
    """
    opened(source)
    root, target = open_folder(where), named(source.step or 0)
    there = target in root.entries()
    if there and (root.renames or COMMIT in root.child(target).entries()):
        raise FileExistsError(f"{root.where.rstrip('/')}/{target} exists: choose another folder")
    extra, ranks, modules, source = _with_extra(source)
    keys = sorted(source.tensors)
    identity = sha256(
        f"{fingerprint or uuid.uuid4().hex}{[(key, source.tensors[key]) for key in keys]}".encode()
    ).hexdigest()
    folder = root.child(f".tmp-{target}-{identity[:8]}" if root.renames else target)
    done = _write_all(source, folder, keys, identity, budget, workers, progress)
    manifests.write(folder, _manifest(source, (extra, ranks, modules), done, identity))
    _finish(root, folder, target)
    return f"{root.where.rstrip('/')}/{target}"


def export_atoms(
    source: Source,
    where: Location,
    *,
    layout: Literal["grouped", "one-file-per-parameter"] = "grouped",
    budget: int = 2**29,
    workers: int = 4,
    progress: Progress = None,
) -> list[str]:
    """Write each tensor whole, as plain safetensors named STATE/NAME; returns the files.

    grouped: files of up to 1 GiB. one-file-per-parameter: as DeepSpeed's universal format has
    it, NAME/STATE.safetensors. Each says how many files there are, and which states. Raises
    FileExistsError for a folder that is not empty, ValueError for a name that could leave it.
    """
    opened(source)
    folder = empty_folder(where)
    keys = sorted(source.tensors)
    if layout == "grouped":
        runs = _runs(source, keys)
        named_runs = ((f"atoms-{n:05d}.safetensors", run) for n, run in enumerate(runs))
        groups = {name: [keys[i] for i in run] for name, run in named_runs}
    else:
        groups = {safe(f"{key[0]}/{key[1]}.safetensors"): [key] for key in keys}
    step = max(2**20, budget // (2 * workers))
    about = {"files": len(groups), "states": sorted({state for _, state in keys})}

    def write(name: str) -> None:
        infos = {key: source.tensors[key] for key in groups[name]}
        titles = {key: label(key, info, whole(info.shape)) for key, info in infos.items()}
        entries = [entry(source, key, title, step, progress) for key, title in titles.items()]
        write_file(folder, name, entries, {ATOMS: json.dumps(about)})

    _each(write, [*groups], workers)
    folder.sync()
    return [*groups]


def opened(source: object) -> None:
    """Raise TypeError for what is no opened checkpoint, such as its path."""
    if not isinstance(source, Source):
        raise TypeError(
            f"{source!r} is a {type(source).__name__}, where an opened checkpoint is needed: pass "
            "open_any(PATH), or use the command, hakari checkpoint convert PATH TARGET"
        )


def entry(
    source: Source,
    key: Key,
    name: str,
    most: int,
    progress: Progress = None,
    dtype: str | None = None,
    seen: Callable[[int], None] | None = None,
) -> Entry:
    """A tensor of a source as an entry of a safetensors file, read in chunks of `most` bytes.

    dtype: convert to it. seen: told of each chunk's content, as it is read.
    """
    info = source.tensors[key]

    def read() -> Iterator[np.ndarray]:
        for box in chunks(whole(info.shape), BYTES[info.dtype], most):
            values = source.array(key, box)
            if seen:
                seen(content(values, box))
            if progress:
                progress(values.nbytes)
            yield values if dtype in (None, info.dtype) else converted(values, info.dtype, dtype)

    return Entry(name, dtype or info.dtype, info.shape, read)


def converted(values: np.ndarray, old: str, new: str | None) -> np.ndarray:
    """Values of one element type in another, rounded to nearest; both as unsigned integers."""
    if new is None or new == old:
        return values
    numbers = as_tensor(np.ascontiguousarray(values), old).to(TORCH[new])
    return numbers.reshape(-1).view(TORCH["U8"]).numpy().view(bits(new)).reshape(values.shape)


def empty_folder(where: Location) -> Folder:
    """A folder to write to. Raises FileExistsError if there is anything in it."""
    folder = open_folder(where)
    if folder.entries():
        raise FileExistsError(f"{folder.where} is not empty: choose another folder")
    return folder


# --- files --------------------------------------------------------------------------------


def _write_all(
    source: Source,
    folder: Folder,
    keys: Sequence[Key],
    identity: str,
    budget: int,
    workers: int,
    progress: Progress,
) -> list[Done]:
    runs = _runs(source, keys)
    step = max(2**20, budget // (2 * workers))

    def write(number: int) -> Done:
        name = f"data/{identity[:8]}-{number:05d}.safetensors"
        record = f"done-{number:05d}.json"
        before = _done_before(folder, record, name)
        if before:
            if progress:
                progress(before.stored.bytes - before.stored.header)
            return before
        done = _write_one(source, folder, name, [keys[i] for i in runs[number]], step, progress)
        folder.write(record, json.dumps(_done_json(done)).encode())
        return done

    done = _each(write, range(len(runs)), workers)
    for number in range(len(runs)):
        folder.remove(f"done-{number:05d}.json")
    return done


def _runs(source: Source, keys: Sequence[Key]) -> list[list[int]]:
    """Which tensors go into one file; the same whatever the number of workers."""
    sizes = [source.tensors[key].bytes for key in keys]
    return list(split(sizes, min(FILE, max(LEAST, sum(sizes) // 32))))


def _write_one(
    source: Source,
    folder: Folder,
    name: str,
    keys: Sequence[Key],
    step: int,
    progress: Progress,
) -> Done:
    if name in folder.names():  # half a file, from before
        folder.remove(name)
    totals: dict[Key, int] = dict.fromkeys(keys, 0)

    def add(key: Key) -> Callable[[int], None]:
        def adding(total: int) -> None:
            totals[key] += total

        return adding

    entries = []
    for key in keys:
        info = source.tensors[key]
        title = label(key, info, whole(info.shape))
        entries.append(entry(source, key, title, step, progress, seen=add(key)))
    stored, places = write_file(folder, name, entries, {})
    rows = zip(keys, places, strict=True)
    return Done(
        name, stored, tuple((key, offset, crcs, totals[key]) for key, (offset, crcs) in rows)
    )


def _done_json(done: Done) -> dict[str, Any]:
    stored = [done.stored.bytes, done.stored.header, done.stored.crc]
    return {"name": done.name, "stored": stored, "tensors": done.tensors}


def _done_before(folder: Folder, record: str, name: str) -> Done | None:
    if record not in folder.entries():
        return None
    try:
        table = json.loads(small(folder, record, 2**30))
        stored = Stored(*table["stored"])
        if table["name"] != name or folder.size(name) != stored.bytes:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = table["tensors"]
    return Done(
        name, stored, tuple(((k[0], k[1]), offset, tuple(crcs), n) for k, offset, crcs, n in rows)
    )


def _each(work: Callable[[Any], Any], things: Sequence[Any], workers: int) -> list[Any]:
    """work(thing) of each, by several threads; the first error stops what has not begun."""
    with ThreadPoolExecutor(workers) as pool:
        calls = [pool.submit(work, thing) for thing in things]
        try:
            return [call.result() for call in calls]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _finish(root: Folder, folder: Folder, target: str) -> None:
    if root.renames:
        folder.sync()
        root.rename(folder.where.rstrip("/").rpartition("/")[2], target)
    advance(root, target)


# --- the manifest -------------------------------------------------------------------------


def _manifest(
    source: Source,
    trees: tuple[Any, list[Any], dict[str, Any]],
    done: Sequence[Done],
    identity: str,
) -> Manifest:
    fragments: dict[Key, tuple[Fragment, ...]] = {}
    contents: dict[Key, str] = {}
    for file in done:
        for key, offset, crcs, total in file.tensors:
            shape = source.tensors[key].shape
            some = 0 not in extents(whole(shape))
            fragments[key] = (Fragment(whole(shape), file.name, offset, crcs),) if some else ()
            contents[key] = hexadecimal(total)
    none: dict[str, Tensor] = {}
    scalars = {key: tree.encode(v, "/".join(key), none) for key, v in source.scalars.items()}
    groups = tuple(
        type(group)(tree.encode(dict(group.options), "optimizer", none), group.members)
        for group in source.groups
    )
    return Manifest(
        identity,
        source.step or 0,
        {file.name: file.stored for file in done},
        source.tensors,
        fragments,
        contents,
        scalars,
        groups,
        source.optimizer,
        source.tied,
        trees[0],
        tuple(trees[1]),
        trees[2],
        source.origin,
    )


def _with_extra(source: Source) -> tuple[Any, list[Any], dict[str, Any], Source]:
    """Extra, rank and module states as JSON, and a source that also has the tensors in them."""
    tensors: dict[str, Tensor] = {}
    extra = tree.encode(source.extra, "extra_state", tensors)
    ranks = [
        tree.encode(own, f"rank_state/{rank:05d}", tensors) for rank, own in enumerate(source.ranks)
    ]
    modules = {
        name: tree.encode(kept, f"module_state/{name}", tensors)
        for name, kept in source.modules.items()
    }
    if tensors:
        source = with_tensors(source, {(name, EXTRA): t for name, t in tensors.items()})
    return extra, ranks, modules, source


def with_tensors(source: Source, more: Mapping[Key, Tensor]) -> Source:
    """A source that also has some tensors that are in memory."""
    infos = {key: Info(tuple(t.shape), name_of(t.dtype)) for key, t in more.items()}

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        if key in more:
            values = as_bits(more[key].cpu())
            out[...] = values[within(box, whole(values.shape))] if box else values
        else:
            source.read(key, box, out)

    return replace(source, tensors={**source.tensors, **infos}, read=read)
