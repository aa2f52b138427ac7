"""Memory-mapped token shards with checksums: prepared once, opened by every process.

A folder holds index.json, tokenizer.json, and for each shard of a split a .bin of tokens
(little-endian uint16, or uint32 for large vocabularies) and a .len of its documents' lengths
(uint32). A document is [end of text] + its tokens: the separator stands first, so its input
belongs to the new document, and as a target it says that the last one has ended.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import tokenizers
from jaxtyping import Int64, UInt
from numpy import ndarray

from hakari.training.text import Document, Unit, documents, files
from hakari.training.tokenizer import FILE, Tokenizer, encode_documents, load, save, train

INDEX = "index.json"
FORMAT, VERSION = "hakari.tokens", 1
SPLITS = ("train", "validation")
LENGTH = np.dtype("<u4")  # of a document
EVERY = 2**18  # bytes of text between two calls of `progress`

Progress = Callable[[str, int, int], None]  # stage, documents and bytes of text so far


@dataclass(frozen=True)
class Shard:
    """One pair of files, and the SHA-256 of each."""

    file: str
    tokens: int
    documents: int
    sha256: str
    lengths_sha256: str


@dataclass(frozen=True)
class Index:
    """What index.json says. tokenizer: SHA-256 of tokenizer.json; text_bytes: of the UTF-8 text."""

    tokenizer: str
    vocabulary: int
    end_of_text: int
    dtype: str
    documents: int
    text_bytes: int
    splits: dict[str, tuple[Shard, ...]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A split: tokens in memory-mapped shards, addressed as if they were one array.

    begins: position of each shard's first token. starts: position of each document's separator,
    and last the number of all tokens. No document crosses from one shard to the next.
    """

    shards: tuple[UInt[ndarray, " _"], ...]
    begins: Int64[ndarray, " shards"]
    starts: Int64[ndarray, " bounds"]
    end_of_text: int
    vocabulary: int

    @property
    def count(self) -> int:
        """Tokens, separators included."""
        return int(self.starts[-1])


@dataclass(frozen=True)
class _Plan:
    sources: tuple[str, ...]
    column: str | None
    validation: float
    seed: int
    shard_tokens: int
    unit: Unit


def prepare(
    sources: Sequence[str],
    column: str | None,
    tokenizer: str | Path | None,
    vocabulary: int,
    validation: float,
    seed: int,
    folder: Path,
    shard_tokens: int = 100_000_000,
    unit: Unit = "file",
    progress: Progress = lambda stage, documents, size: None,
) -> Path:
    """Tokenize text into `folder`/KEY and return that path; KEY names all that the result is of.

    sources, column, unit: as in `text.documents`. tokenizer: as in `tokenizer.load`; None: train
    one of so large a `vocabulary` on the training documents. validation: share of the documents
    that is kept apart, by a hash of (seed, text), so that equal texts go the same way in any order.
    progress: called with "tokenizer" or "tokens", and the documents and bytes read so far.
    What is there already is not made again. The result appears at once when it is complete; of
    two processes that make the same, the later one throws its own away. A killed one may leave
    a `.KEY-*.partial`, which nothing reads.
    Where the share of few documents would be none, one is kept.
    Raises what reading text and tokenizers raises; ValueError if a split is left without text.
    """
    plan = _Plan(tuple(sources), column, validation, seed, shard_tokens, unit)
    _check(plan)
    given = load(tokenizer) if tokenizer else None
    key = _key(plan, given.digest + str(given.end_of_text) if given else str(vocabulary))
    target = Path(folder).expanduser() / key
    if target.exists():
        read_index(target)
        return target
    partial = target.with_name(f".{key}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        try:
            _fill(partial, plan, given, vocabulary, progress)
        except _NoneKeptError as few:  # of few documents
            _fill(partial, replace(plan, validation=few.share), given, vocabulary, progress)
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def read_index(folder: Path) -> Index:
    """What a folder of shards holds; FileNotFoundError or ValueError if it is none, or damaged."""
    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {INDEX}: it is no whole folder of token shards; prepare the text "
            "again, and remove this first if it is in the way"
        )
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not UTF-8
        raise _damaged(file, "is not JSON") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"{file} is not an index of token shards ({FORMAT!r})")
    if table.get("version") != VERSION:
        raise ValueError(
            f"{file} has version {table.get('version')} of the format, this is version {VERSION}: "
            "prepare the text again"
        )
    if table.pop("sha256", None) != _digest(table):
        raise _damaged(file, "was changed after it was written")
    for name in ("format", "version", "made_from"):
        table.pop(name)
    splits = {s: tuple(Shard(**row) for row in rows) for s, rows in table.pop("splits").items()}
    return Index(**table, splits=splits)


def open_shards(folder: Path, split: str, verify: bool = True) -> Tokens:
    """Map one split, "train" or "validation".

    verify: compare all checksums, which reads every byte once; sizes are compared always.
    Raises FileNotFoundError or ValueError that names the file that is missing or damaged.
    """
    index = read_index(folder)
    if split not in index.splits:
        near = difflib.get_close_matches(split, index.splits, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(index.splits)}"
        raise ValueError(f"{folder} has no split {split!r}: {hint}")
    shards = index.splits[split]
    if verify:
        _compare(folder / FILE, index.tokenizer)
    mapped = tuple(_map(folder, shard, np.dtype(index.dtype), verify) for shard in shards)
    lengths = np.concatenate([_lengths(folder, shard, verify) for shard in shards])
    return Tokens(
        mapped,
        np.cumsum([0] + [shard.tokens for shard in shards[:-1]], dtype=np.int64),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        index.end_of_text,
        index.vocabulary,
    )


def take(tokens: Tokens, positions: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """The tokens at these positions, in any order."""
    found = np.empty(len(positions), np.int64)
    shards = np.searchsorted(tokens.begins, positions, side="right") - 1
    for shard in np.unique(shards):
        here = shards == shard
        found[here] = tokens.shards[shard][positions[here] - tokens.begins[shard]]
    return found


# --- what a folder is made of ---------------------------------------------------------------


def _check(plan: _Plan) -> None:
    if not 0 < plan.validation < 1:
        raise ValueError(f"validation = {plan.validation} is not a share between 0 and 1")
    if plan.shard_tokens < 1:
        raise ValueError(f"shard_tokens = {plan.shard_tokens} is below 1")


def _key(plan: _Plan, tokenizer: str) -> str:
    """A digest of everything that decides what the shards will hold."""
    found = []
    for path in files(plan.sources):
        status = path.stat()
        found.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
    made_from = [VERSION, tokenizers.__version__, tokenizer, asdict(plan), found]
    return _digest(made_from)[:20]


def _digest(table: Any) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _share(document: Document, seed: int) -> float:
    """Where in [0, 1) a document falls; below `validation` it is kept apart."""
    digest = hashlib.blake2b(document.text.encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "little") / 2**64


def _training(plan: _Plan, progress: Progress) -> Iterator[Document]:
    read = documents(plan.sources, plan.column, plan.unit)
    for document in _counted(read, "tokenizer", progress):
        if _share(document, plan.seed) >= plan.validation:
            yield document


def _counted(found: Iterable[Document], stage: str, progress: Progress) -> Iterator[Document]:
    number = size = told = 0
    for document in found:
        yield document
        number += 1
        size += len(document.text.encode())
        if size - told >= EVERY:
            told = size
            progress(stage, number, size)
    progress(stage, number, size)


# --- writing --------------------------------------------------------------------------------


class _Writer:
    """The open shard of one split, and those before it; closed whatever happens."""

    def __init__(self, folder: Path, split: str, dtype: str, limit: int, separator: int) -> None:
        self.folder, self.split, self.limit = folder, split, limit
        self.separator = np.array([separator], dtype)
        self.shards: list[Shard] = []
        self.lengths: list[int] = []
        self.tokens = 0
        self.stream: IO[bytes] | None = None

    def add(self, ids: UInt[ndarray, " n"]) -> None:
        length = len(ids) + 1
        if self.lengths and self.tokens + length > self.limit:
            self.close()
        if self.stream is None:
            self.stream = self._path().open("wb")
            self.digest = hashlib.sha256()
        for part in (self.separator.tobytes(), ids.astype(self.separator.dtype).tobytes()):
            self.stream.write(part)
            self.digest.update(part)
        self.lengths.append(length)
        self.tokens += length

    def close(self) -> None:
        if self.stream is None:
            return
        self.stream.close()
        path, lengths = self._path(), np.array(self.lengths, LENGTH).tobytes()
        path.with_suffix(".len").write_bytes(lengths)
        digests = self.digest.hexdigest(), hashlib.sha256(lengths).hexdigest()
        self.shards.append(Shard(path.name, self.tokens, len(self.lengths), *digests))
        self.stream, self.tokens, self.lengths = None, 0, []

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05}.bin"


def _fill(
    folder: Path, plan: _Plan, given: Tokenizer | None, vocabulary: int, progress: Progress
) -> None:
    made = given or train(_training(plan, progress), vocabulary)
    save(made, folder)
    _write_index(folder, _write_tokens(folder, plan, made, progress))


def _write_tokens(
    folder: Path, plan: _Plan, tokenizer: Tokenizer, progress: Progress
) -> dict[str, Any]:
    """Write every shard; the content of the index."""
    dtype = "<u2" if tokenizer.vocabulary <= 2**16 else "<u4"
    shares: list[float] = []  # lowest and highest, for what to say if a split stays empty
    number = size = 0
    with ExitStack() as stack:
        writers = {
            split: _Writer(folder, split, dtype, plan.shard_tokens, tokenizer.end_of_text)
            for split in SPLITS
        }
        for writer in writers.values():
            stack.callback(writer.close)
        read = _counted(documents(plan.sources, plan.column, plan.unit), "tokens", progress)
        for document, ids in encode_documents(tokenizer, read):
            share = _share(document, plan.seed)
            writers[SPLITS[share < plan.validation]].add(ids)
            shares = sorted([*shares, share])
            shares = [shares[0], shares[-1]]
            number, size = number + 1, size + len(document.text.encode())
    if plan.validation <= shares[0] < shares[1]:
        raise _NoneKeptError(_above(*shares))
    if not all(writer.shards for writer in writers.values()):
        raise ValueError(_no_split(plan, number, shares))
    return {
        "tokenizer": tokenizer.digest,
        "vocabulary": tokenizer.vocabulary,
        "end_of_text": tokenizer.end_of_text,
        "dtype": dtype,
        "documents": number,
        "text_bytes": size,
        "splits": {s: [asdict(shard) for shard in w.shards] for s, w in writers.items()},
        "made_from": asdict(plan) | {"tokenizers": tokenizers.__version__},
    }


class _NoneKeptError(Exception):
    """No document fell into the validation split; `share` would keep one."""

    def __init__(self, share: float) -> None:
        super().__init__(share)
        self.share = share


def _no_split(plan: _Plan, number: int, shares: list[float]) -> str:
    """Why a split is empty, and which share would fill both."""
    low, high = shares
    given = f"validation = {plan.validation} of {number} documents"
    if low == high:
        return (
            f"{given}, all the same, leaves nothing to divide: give more files, or set "
            "data.documents to part (of a book) or line"
        )
    return f"{given} leaves none for training: {_above(low, high)} would keep one for validation"


def _above(low: float, high: float) -> float:
    """A short number in (low, high]."""
    for digits in range(2, 17):
        found = math.floor(low * 10**digits + 1) / 10**digits
        if low < found <= high:
            return found
    return high


def _write_index(folder: Path, table: dict[str, Any]) -> None:
    table = {"format": FORMAT, "version": VERSION, **table}
    table["sha256"] = _digest(table)
    (folder / INDEX).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _publish(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:  # it is there by now: made at the same time by another process
        if not target.exists():
            raise
        read_index(target)


# --- reading --------------------------------------------------------------------------------


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} {what}: remove {file.parent} and prepare the text again")


def _sized(file: Path, size: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: remove {file.parent} and prepare again")
    if file.stat().st_size != size:
        raise _damaged(file, f"has {file.stat().st_size} bytes instead of {size}")


def _compare(file: Path, digest: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: remove {file.parent} and prepare again")
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
            raise _damaged(file, "was changed after it was written (its checksum differs)")


def _map(folder: Path, shard: Shard, dtype: np.dtype[Any], verify: bool) -> UInt[ndarray, " _"]:
    file = folder / shard.file
    _sized(file, shard.tokens * dtype.itemsize)
    if verify:
        _compare(file, shard.sha256)
    return np.memmap(file, dtype, "r")


def _lengths(folder: Path, shard: Shard, verify: bool) -> UInt[ndarray, " _"]:
    file = (folder / shard.file).with_suffix(".len")
    _sized(file, shard.documents * LENGTH.itemsize)
    if verify:
        _compare(file, shard.lengths_sha256)
    lengths = np.fromfile(file, LENGTH)
    if lengths.sum(dtype=np.int64) != shard.tokens:
        raise _damaged(file, f"sums to {lengths.sum(dtype=np.int64)} tokens, not {shard.tokens}")
    return lengths
