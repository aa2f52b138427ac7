"""Documents from files, folders, globs, tables and Python's own library, one at a time.

Memory holds one document (one row group's batch of a Parquet file), whatever the corpus.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

STDLIB = "stdlib:"
# of Python's library: installed packages are not it, and tests hold text broken on purpose
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
LEFT_OUT |= {"encodings"}  # and these are tables of characters
ROWS = (".jsonl", ".ndjson", ".json")
TEXT_CONTROLS = {7, 8, 9, 10, 11, 12, 13, 27}  # control characters that text holds, as file(1)
HEAD = 8192  # bytes that tell text from binary
PART = 32_000  # characters of a part, if blank lines allow

Unit = Literal["file", "part", "line"]


class Document(NamedTuple):
    """One text, and where it came from: a file, or FILE:LINE of a table."""

    name: str
    text: str


def documents(
    sources: Sequence[str], column: str | None = None, unit: Unit = "file"
) -> Iterator[Document]:
    """Every document that is not empty, in the order of `files` and of each file's rows.

    sources: as in `files`. A file is one document; but a .jsonl, .ndjson or .json file holds one
    a line, and a .parquet file one a row, in `column`. All but Parquet may be packed as .gz.
    unit: what a plain file's documents are: the whole file; parts of about 32,000 characters, cut
    at blank lines, for books; or lines.
    Text is UTF-8, kept byte for byte but for a byte order mark at its start.
    Raises FileNotFoundError as `files` does; ValueError, with the place, for what cannot be
    read, a missing column, and a corpus without any text.

    >>> next(documents(["stdlib:this.py"])).text[:15]
    's = \"\"\"Gur Mra '
    """
    paths = files(sources)
    empty = True
    for path in paths:
        for document in _read(path, column, unit):
            if document.text:
                empty = False
                yield document
    if empty:
        raise ValueError(f"no text in the {len(paths)} files of {', '.join(sources)}: all empty")


def files(sources: Sequence[str]) -> list[Path]:
    """Every file that the sources name, once: in the order of the sources, each sorted.

    sources: files; folders, searched in depth but for hidden and binary files; globs (`**`: any
    depth); `stdlib:GLOB` in the running Python's library, without its tests.
    Raises FileNotFoundError for a source that names nothing, with the nearest name there is.
    """
    if not sources:
        raise ValueError("no sources of text: name a file, a folder or a glob")
    found: dict[str, Path] = {}
    for source in sources:
        for path in _expand(source):
            found.setdefault(os.path.abspath(path), path)  # noqa: PTH100 - links stay unresolved
    return list(found.values())


def missing(path: Path, what: str = "file or folder") -> FileNotFoundError:
    """The error for a path that does not exist, with the nearest name that does."""
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    hint = f": did you mean {parent / near[0]}?" if near else f"; {parent} holds no similar name"
    return FileNotFoundError(f"no {what} {path}{hint}")


# --- sources ------------------------------------------------------------------------------


def _expand(source: str) -> list[Path]:
    if source.startswith(STDLIB):
        return _stdlib(source)
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder(path)
    if not glob.has_magic(source):
        raise missing(path)
    return _matches(path)


def _matches(pattern: Path) -> list[Path]:
    # not Path.glob: it takes hidden files too
    found = map(Path, glob.glob(str(pattern), recursive=True))  # noqa: PTH207
    kept = sorted(path for path in found if path.is_file())
    if not kept:
        folder = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
        if not folder.exists():
            raise missing(folder, "folder")
        raise FileNotFoundError(f"no file matches {pattern}: {_contents(folder)}")
    return kept


def _stdlib(source: str) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    pattern = source.removeprefix(STDLIB)
    names = sorted(glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
    kept = [root / name for name in names if not LEFT_OUT & set(Path(name).parts[:-1])]
    kept = [path for path in kept if path.is_file()]
    if not kept:
        raise FileNotFoundError(
            f"no file matches {source} in Python's library at {root}: "
            f"{STDLIB}**/*.py is all of its code"
        )
    return kept


def _folder(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    kept = [path for path in sorted(found) if path.is_file() and not _binary(path)]
    if not kept:
        raise FileNotFoundError(f"no text files in {folder}: {_contents(folder)}")
    return kept


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return f"{folder} is empty"
    more = ", ..." if len(names) > 5 else ""
    return f"{folder} holds {', '.join(names[:5])}{more}"


def _binary(path: Path) -> bool:
    """Whether a file of a folder is no text; UTF-16 counts as text, so that it is not missed."""
    if path.suffix.lower() == ".parquet":
        return False
    try:
        with _open(path) as stream:
            head = stream.read(HEAD)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False  # reading it tells what is wrong
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return False
    return any(byte < 32 and byte not in TEXT_CONTROLS for byte in set(head))


# --- one file -----------------------------------------------------------------------------


def _read(path: Path, column: str | None, unit: Unit) -> Iterator[Document]:
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, column)
        return
    try:
        with _open(path) as stream:
            if path.name.lower().removesuffix(".gz").endswith(ROWS):
                yield from _json_lines(path, stream, column)
            else:
                yield from _cut(str(path), _decode(path, stream.read()), unit)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): pack it again") from None


def _cut(name: str, text: str, unit: Unit) -> Iterator[Document]:
    """A plain text's documents; joined, they are the text (lines: without the line ends)."""
    if unit == "file":
        yield Document(name, text)
    elif unit == "line":
        for number, line in enumerate(text.splitlines(), 1):
            yield Document(f"{name}:{number}", line)
    else:
        start = 0
        while start < len(text):
            blank = text.find("\n\n", start + PART)
            end = len(text) if blank < 0 else blank + 2
            yield Document(f"{name}@{start}", text[start:end])
            start = end


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.GzipFile(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(path: Path, raw: bytes, offset: int = 0) -> str:
    """The text of bytes that begin at this offset of the file."""
    try:
        return raw.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        # the byte order mark is skipped before positions are counted
        at = error.start + (len(raw) - len(error.object))
        utf16 = not offset and raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{raw[at]:02x} at offset {offset + at}; leave it out, "
            f"or convert it: iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8"
        ) from None


def _json_lines(path: Path, stream: io.BufferedIOBase, column: str | None) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, 1):
        text = _decode(path, line, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(_not_rows(path, number, f"is not JSON ({error.msg})")) from None
        if not isinstance(row, dict):
            raise ValueError(_not_rows(path, number, f"holds a {type(row).__name__}"))
        place = f"{path}:{number}"
        yield Document(place, _text(place, row[_column(place, column, list(row))], column))


def _not_rows(path: Path, number: int, what: str) -> str:
    return (
        f"{path}, line {number} {what}: a {'/'.join(ROWS)} file holds one JSON object a line; "
        "leave it out, or rename it to .txt to take it as plain text"
    )


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    import pyarrow as pa  # slow to import, and most corpora are plain files
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error})") from None
    with file:
        name = _column(str(path), column, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[name]):
            for value in batch.column(0).to_pylist():
                number += 1
                place = f"{path}:{number}"
                yield Document(place, _text(place, value, name))


def _column(place: str, column: str | None, known: Sequence[str]) -> str:
    if column is not None and column in known:
        return column
    there = f"it has {', '.join(known)}" if known else "it has none"
    if column is None:
        raise ValueError(f"{place} is a table: name the column that holds the text ({there})")
    near = difflib.get_close_matches(column, known, 1, 0.5)
    hint = f": did you mean {near[0]!r}?" if near else ":"
    raise ValueError(f"{place} has no column {column!r}{hint} {there}")


def _text(place: str, value: Any, column: str | None) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__} ({str(value)[:40]})"
        raise ValueError(f"{place}: column {column!r} is {kind}; it should be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character
        raise ValueError(
            f"{place}: column {column!r} holds half of a surrogate pair, "
            f"\\u{ord(value[error.start]):04x}, at character {error.start}: not Unicode text"
        ) from None
    return value
