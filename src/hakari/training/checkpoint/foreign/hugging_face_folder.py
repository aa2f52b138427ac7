"""Hugging Face folders: model.safetensors, or shards and their index. They hold weights alone.

A header is a stranger's file: whatever it claims is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from hakari.training.checkpoint import fragments
from hakari.training.checkpoint.boxes import Box, flaw, whole
from hakari.training.checkpoint.conversion import Progress, empty_folder, entry
from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.fragments import Fragment
from hakari.training.checkpoint.manifest import SAFE
from hakari.training.checkpoint.shard_file import Entry, chunks, split, write_file
from hakari.training.checkpoint.source import WEIGHT, Info, Key, Source
from hakari.training.checkpoint.storage import Folder, Location, open_folder, small

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
COPIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""What is taken over from a folder with a model's configuration, where it is there."""
HEADER = 100_000_000
"""Bytes of a header that are read at most, as the safetensors library has it."""
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Entered:
    """A tensor as a header has it: where its values start and end in the file."""

    info: Info
    start: int
    stop: int


def open_hugging_face(where: Location) -> Source:
    """Open a folder with model.safetensors, or with model.safetensors.index.json and its shards.

    Headers alone are read. Raises ValueError for a header or index that is damaged or cannot be,
    naming file and tensor; FileNotFoundError for a shard that is missing.
    """
    folder = open_folder(where)
    infos: dict[Key, Info] = {}
    places: dict[Key, tuple[Fragment, ...]] = {}
    for file, names in _shards(folder).items():
        found = read_header(folder, file)
        _as_indexed(folder, file, names, found)
        for name, entered in found.items():
            key, box = (name, WEIGHT), whole(entered.info.shape)
            infos[key] = entered.info
            places[key] = (
                (Fragment(box, file, entered.start),) if 0 not in entered.info.shape else ()
            )
            if wrong := flaw(entered.info.shape, [part.box for part in places[key]]):
                raise ValueError(f"{folder.where}/{file}: {name}: {wrong}")
    config = _config(folder)

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        fragments.read(folder, [(key, box, out)], infos, places)

    origin = {"framework": "hugging-face", "architectures": config.get("architectures") or []}
    return Source(infos, read, tied=_tied(config, infos), origin=origin)


def write_hugging_face(
    source: Source,
    where: Location,
    *,
    config: Location | None = None,
    dtype: str | None = None,
    budget: int = 2**29,
    workers: int = 4,
    shard_bytes: int = 5 * 10**9,
    progress: Progress = None,
) -> None:
    """Write the weights as a folder that transformers opens; of tied ones, a single copy.

    config: a folder whose config.json, tokenizer and generation_config.json are taken over.
    dtype: safetensors name, such as 'BF16', that floating-point weights are rounded to; config.json
    is made to say so. budget: bytes of tensors held at once. shard_bytes: of a file, at most,
    unless one tensor is larger. Raises FileExistsError for a folder that is not empty, ValueError
    for a source without weights, for tied weights that differ, and for an unknown dtype.
    """
    folder = empty_folder(where)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"weights cannot be written as {dtype!r}: use one of {', '.join(FLOATS)}")
    most = max(2**16, budget // (4 * workers))  # a chunk, and twice as much where it is widened
    kept = _weights(source, most)
    copies = [] if config is None else _copied(open_folder(config), dtype)
    entries = [_entry(source, key, name, most, dtype, progress) for name, key in kept.items()]
    files = _files(entries, shard_bytes)

    def write(file: str) -> None:
        write_file(folder, file, files[file], {})

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(write, files):
            pass
    if len(files) > 1:
        folder.write(INDEX, _index(source, kept, files))
    for name, data in copies:
        folder.write(name, data)
    folder.sync()


def read_config(where: Location) -> dict[str, Any]:
    """The config.json of a model's folder. Raises FileNotFoundError if it has none."""
    folder = open_folder(where)
    if CONFIG not in folder.entries():
        raise FileNotFoundError(f"{folder.where} has no {CONFIG}: give a model's folder as config")
    return _config(folder)


# --- headers ------------------------------------------------------------------------------


def read_header(folder: Folder, file: str) -> dict[str, Entered]:
    """The tensors of a safetensors file, checked against its size.

    Raises ValueError, naming file and tensor, for a header that is cut off, too long, no JSON, has
    a name twice, or whose tensors do not fill the data exactly, one after another.
    """
    size, where = folder.size(file), f"{folder.where}/{file}"
    table, begin = _table(folder, file, size)
    found: dict[str, Entered] = {}
    for name, row in table.items():
        if name != "__metadata__":
            found[name] = _entered(f"{where}: {name}", row, begin)
    at, before = begin, "the header"
    for name, entered in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entered.start != at:
            kind = "overlap" if entered.start < at else "leave a gap"
            raise ValueError(
                f"{where}: {name} starts at byte {entered.start:,} and {before} ends at {at:,}: "
                f"they {kind}"
            )
        at, before = entered.stop, name
    if at != size:
        raise ValueError(f"{where} has {size:,} bytes, and its tensors end at byte {at:,}")
    return found


def metadata(folder: Folder, file: str) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors. Raises as read_header."""
    table, _ = _table(folder, file, folder.size(file))
    said = table.get("__metadata__", {})
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError(f"{folder.where}/{file}: __metadata__ is not an object of strings")
    return said


def _table(folder: Folder, file: str, size: int) -> tuple[dict[str, Any], int]:
    """The header as JSON, and the byte at which data begin."""
    where = f"{folder.where}/{file}"
    if size < 8:
        raise ValueError(f"{where} has {size} bytes: too few for a safetensors file")
    head = bytearray(8)
    folder.read(file, 0, memoryview(head))
    length = int.from_bytes(head, "little")
    if length > min(HEADER, size - 8):
        raise ValueError(
            f"{where}: its header claims {length:,} bytes; the file has {size:,}, and the limit is "
            f"{HEADER:,}: truncated, or not a safetensors file"
        )
    text = bytearray(length)
    folder.read(file, 8, memoryview(text))
    return _json(bytes(text), f"{where}: its header"), 8 + length


def _json(text: bytes, what: str) -> dict[str, Any]:
    try:
        table = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise ValueError(f"{what} is a {type(table).__name__} instead of an object")
    return table


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return table


def _entered(what: str, row: Any, begin: int) -> Entered:
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
        raise ValueError(f"{what}: {str(row)[:80]} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"{what}: dtype {str(dtype)[:80]!r} is none of {', '.join(BYTES)}")
    if not _counts(shape) or len(shape) > 64 or prod(n or 1 for n in shape) >= 2**60:
        raise ValueError(f"{what}: shape {str(shape)[:80]} cannot be")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{what}: data_offsets {str(offsets)[:80]} are not a start and an end")
    info, (start, stop) = Info(tuple(shape), dtype), offsets
    if stop - start != info.bytes:
        raise ValueError(
            f"{what}: {dtype} {shape} has {info.bytes:,} bytes, and its data_offsets {offsets} "
            f"{stop - start:,}"
        )
    return Entered(info, begin + start, begin + stop)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**60 for n in values)


# --- folders ------------------------------------------------------------------------------


def _shards(folder: Folder) -> dict[str, set[str] | None]:
    """Files, and the tensors that the index wants of each: None without an index."""
    names = folder.entries()
    if SINGLE in names and INDEX in names:
        raise ValueError(
            f"{folder.where} has {SINGLE} and {INDEX}: remove the one that is left from before"
        )
    if SINGLE in names:
        return {SINGLE: None}
    if INDEX not in names:
        raise FileNotFoundError(f"{folder.where} has neither {SINGLE} nor {INDEX}")
    where = f"{folder.where}/{INDEX}"
    held = _json(small(folder, INDEX, HEADER), where).get("weight_map")
    if not isinstance(held, dict):
        raise ValueError(f"{where} has no weight_map")
    shards: dict[str, set[str] | None] = {}
    for file in dict.fromkeys(map(str, held.values())):
        if not SAFE.fullmatch(file):
            raise ValueError(f"{where}: file name {file!r} could leave the folder")
        if file not in names:
            raise FileNotFoundError(f"{folder.where}/{file} is missing; {INDEX} names it")
        shards[file] = {name for name, there in held.items() if there == file}
    return shards


def _as_indexed(
    folder: Folder, file: str, wanted: set[str] | None, found: Mapping[str, Entered]
) -> None:
    for said, names in (
        ()
        if wanted is None
        else (
            ("lacks", wanted - found.keys()),
            ("has, unknown to the index,", found.keys() - wanted),
        )
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ", ".join(sorted(names)[:3])
            raise ValueError(f"{folder.where}/{file} {said} {shown}{more}: it is not of this index")


def _config(folder: Folder) -> dict[str, Any]:
    if CONFIG not in folder.entries():
        return {}
    return _json(small(folder, CONFIG, HEADER), f"{folder.where}/{CONFIG}")


def _tied(config: Mapping[str, Any], infos: Mapping[Key, Info]) -> tuple[tuple[str, ...], ...]:
    """The one tie that a configuration tells of, where the copy has been dropped."""
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    tied = config.get("tie_word_embeddings") is True
    there = (table, WEIGHT) in infos and (head, WEIGHT) not in infos
    return ((table, head),) if tied and there else ()


# --- writing ------------------------------------------------------------------------------


def _weights(source: Source, most: int) -> dict[str, Key]:
    """What is written, by name: of tied tensors one, under the name that transformers keeps."""
    kept = {key[0]: key for key in source.tensors if key[1] == WEIGHT}
    if not kept:
        raise ValueError("the source has no weights, which are all that Hugging Face folders hold")
    for names in source.tied:
        there = [name for name in names if name in kept]
        for copy in there[1:]:
            _same(source, there[0], copy, most)
        if there:
            best = min(names, key=lambda name: name.endswith("lm_head.weight"))
            first = kept[there[0]]
            kept = {
                best if name == there[0] else name: first if name == there[0] else key
                for name, key in kept.items()
                if name not in there[1:]
            }
    return kept


def _same(source: Source, one: str, other: str, most: int) -> None:
    info, copy = source.tensors[one, WEIGHT], source.tensors[other, WEIGHT]
    equal = info == copy and all(
        np.array_equal(source.array((one, WEIGHT), box), source.array((other, WEIGHT), box))
        for box in chunks(whole(info.shape), BYTES[info.dtype], most)
    )
    if not equal:
        raise ValueError(
            f"{one} and {other} are tied, and differ: one of them would be lost; take away the tie "
            "or make them equal"
        )


def _entry(
    source: Source, key: Key, name: str, most: int, dtype: str | None, progress: Progress
) -> Entry:
    floating = source.tensors[key].dtype in FLOATS
    return entry(source, key, name, most, progress, dtype if floating else None)


def _files(entries: Sequence[Entry], most: int) -> dict[str, list[Entry]]:
    if most < 1:
        raise ValueError(f"shards of {most} bytes: give at least 1")
    runs = list(split([each.bytes for each in entries], most))
    if len(runs) == 1:
        return {SINGLE: list(entries)}
    return {
        f"model-{n + 1:05d}-of-{len(runs):05d}.safetensors": [entries[i] for i in run]
        for n, run in enumerate(runs)
    }


def _index(source: Source, kept: Mapping[str, Key], files: Mapping[str, Sequence[Entry]]) -> bytes:
    table = {
        "metadata": {
            "total_parameters": sum(prod(source.tensors[key].shape) for key in kept.values()),
            "total_size": sum(each.bytes for entries in files.values() for each in entries),
        },
        "weight_map": {each.name: file for file, own in files.items() for each in own},
    }
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()


def _copied(folder: Folder, dtype: str | None) -> list[tuple[str, bytes]]:
    """Files to take over; read first, so that a folder without them fails before all the work."""
    names = folder.entries()
    if CONFIG not in names:
        raise FileNotFoundError(f"{folder.where} has no {CONFIG}: give a model's folder as config")
    return [(name, _dressed(name, folder, dtype)) for name in COPIED if name in names]


def _dressed(name: str, folder: Folder, dtype: str | None) -> bytes:
    data = small(folder, name, 2**30)
    if name != CONFIG or dtype is None:
        return data
    table = _json(data, f"{folder.where}/{name}")
    said = {key: FLOATS[dtype] for key in ("dtype", "torch_dtype") if key in table}
    return (json.dumps(table | said, indent=2) + "\n").encode() if said else data
