"""A table of any kind and size as blocks of rows, only the columns that are wanted."""

from __future__ import annotations

import difflib
import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import narwhals as nw
import pandas as pd
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.dataset as pads
import pyarrow.parquet as pq

BLOCK_ROWS = 65_536
Missing = Literal["raise", "drop"]
_KINDS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".txt": "csv", ".gz": "csv"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Wanted:
    """Columns to read: those required, and words of the formula that may be columns.

    formulaic counts `lag`, `exp` or `poly` as its functions, also where a column bears the name.
    levels: whether text columns are to be encoded, for which all their values must be known first.
    """

    required: tuple[str, ...]
    words: frozenset[str] = frozenset()
    levels: bool = True


def open_table(
    data: Any, wanted: Wanted
) -> tuple[Iterator[pd.DataFrame | pa.RecordBatch], dict[str, list[Any]]]:
    """Tables with the needed columns, and the levels of the text columns where they are known."""
    if isinstance(data, str | Path):
        data = _dataset(Path(data))
        if isinstance(data.format, pads.ParquetFileFormat):
            needed = _choose(wanted, data.schema.names)
            return _parquet_batches(data, needed), _dataset_levels(data, needed, wanted)
        needed, names = _choose(wanted, data.schema.names), data.schema.names
        batches = data.to_batches(columns=needed, batch_size=BLOCK_ROWS)
        levels = _dataset_levels(data, needed, wanted)
        return _named(batches, str(data.files[0]), names), levels
    if isinstance(data, dict):
        data = pd.DataFrame(data)
    if isinstance(data, pa.RecordBatchReader) or (
        isinstance(data, Iterable) and not hasattr(data, "columns") and not hasattr(data, "schema")
    ):
        return _from_stream(data, wanted), {}
    if isinstance(data, pads.Dataset):
        needed = _choose(wanted, data.schema.names)
        batches = data.to_batches(
            columns=needed, batch_size=BLOCK_ROWS, batch_readahead=2, fragment_readahead=1
        )
        return batches, _dataset_levels(data, needed, wanted)
    frame = _to_pandas(data)
    needed = _choose(wanted, list(frame.columns))
    frame = frame[needed]
    frame = frame.infer_objects()  # numbers that are held as objects
    text = [name for name in needed if not pd.api.types.is_numeric_dtype(frame[name])]
    levels = {
        name: _levels(name, frame[name].dropna().unique().tolist())
        for name in text
        if wanted.levels and not isinstance(frame[name].dtype, pd.CategoricalDtype)
    }
    starts = range(0, max(len(frame), 1), BLOCK_ROWS)
    return (frame.iloc[start : start + BLOCK_ROWS] for start in starts), levels


def _dataset(path: Path) -> pads.Dataset:
    if not path.exists():
        raise FileNotFoundError(
            f"no data at {path}: give a CSV or Parquet file, or a folder of them"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    kinds = {_KINDS.get(file.suffix.lower(), file.suffix or "no ending") for file in files}
    if kinds == {"parquet"}:
        return pads.dataset(path, format="parquet")
    if kinds == {"csv"}:
        return pads.dataset(path, format=_csv_format(files[0]))
    found = ", ".join(sorted(kinds)) or "nothing"
    raise ValueError(f"{path}: {found}; CSV (.csv, .csv.gz, .txt) or Parquet is read, one kind")


def _csv_format(file: Path) -> pads.CsvFileFormat:
    """Separated by what stands most often in the first line; `.` (Stata's) is missing too."""
    zipped = file.suffix.lower() == ".gz"
    with gzip.open(file, "rt") if zipped else file.open() as text:
        head = text.readline()
    if not head.strip():
        raise ValueError(f"{file} is empty, or its first line is: a line of column names is needed")
    return pads.CsvFileFormat(
        parse_options=csv.ParseOptions(delimiter=max(",;\t|", key=head.count)),
        convert_options=csv.ConvertOptions(null_values=[*csv.ConvertOptions().null_values, "."]),
    )


def _named(batches: Iterator[pa.RecordBatch], path: str, names: list[str]) -> Iterator[Any]:
    """The batches; Arrow's error about a column's type becomes one that names the column."""
    try:
        yield from batches
    except pa.ArrowInvalid as error:
        column = re.search(r"column #(\d+)", str(error))
        name = names[int(column[1])] if column and int(column[1]) < len(names) else "a column"
        raise ValueError(
            f"{path}: {name} changes its type along the file ({str(error).splitlines()[0]}); write "
            "it with decimals or quotes throughout, or convert the file to Parquet"
        ) from None


def _parquet_batches(data: pads.FileSystemDataset, needed: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches file by file, each decoded when asked for.

    The dataset's own scanner runs ahead of its reader and holds row groups whole: 2 GB for ten
    million rows of 14 columns, without end for larger groups. This holds 0.1 GB.
    """
    for path in data.files:
        source = data.filesystem.open_input_file(path)
        with pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as file:
            _choose(Wanted(tuple(needed)), file.schema_arrow.names)
            yield from file.iter_batches(BLOCK_ROWS, columns=needed)


def _dataset_levels(data: pads.Dataset, needed: list[str], wanted: Wanted) -> dict[str, list[Any]]:
    """One pass over the text columns only, so that every block is encoded alike."""
    if not wanted.levels:
        return {}
    text = [
        name
        for name in needed
        if pa.types.is_string(data.schema.field(name).type)
        or pa.types.is_large_string(data.schema.field(name).type)
        or pa.types.is_dictionary(data.schema.field(name).type)
    ]
    seen: dict[str, set[Any]] = {name: set() for name in text}
    if text:
        for batch in data.to_batches(columns=text):
            for name in text:
                seen[name] |= set(batch.column(name).unique().to_pylist()) - {None}
    return {name: _levels(name, values) for name, values in seen.items()}


def _levels(name: str, values: Iterable[Any]) -> list[Any]:
    """Levels of a text column in order; raises ValueError where most are numbers, and some not."""
    levels = sorted(values, key=str)
    words = [level for level in levels if not _NUMBER.fullmatch(str(level).strip())]
    if words and len(levels) > 10 and len(words) < len(levels) / 10:
        raise ValueError(
            f"{name} holds text among numbers ({', '.join(map(repr, words[:3]))}): is it a code "
            "for missing? Leave those cells empty, or make the column text throughout"
        )
    return levels


def _from_stream(data: Iterable[Any], wanted: Wanted) -> Iterator[pd.DataFrame]:
    for batch in data:
        frame = _to_pandas(batch)
        needed = _choose(wanted, list(frame.columns))
        frame = frame[needed]
        text = [n for n in needed if frame[n].dtype.kind in "OUT" if frame[n].dtype != "category"]
        if text and wanted.levels:
            raise ValueError(
                f"text columns {', '.join(text)} in a stream: their levels are not known before "
                "the end; pass a file or a frame, or categorical columns with all levels"
            )
        for start in range(0, len(frame), BLOCK_ROWS):
            yield frame.iloc[start : start + BLOCK_ROWS]


def _to_pandas(data: Any) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, pa.RecordBatch | pa.Table):
        return data.to_pandas()
    try:
        return nw.from_native(data).lazy().collect().to_pandas()
    except TypeError:
        raise TypeError(
            f"data of type {type(data).__name__} is not understood: pass a frame (pandas, polars, "
            "Arrow), a dict of arrays, a path, or an iterable of record batches"
        ) from None


def _choose(wanted: Wanted, available: list[str]) -> list[str]:
    """The columns to read; raises ValueError, with the nearest name, for one that is not there."""
    for name in wanted.required:
        if name not in available:
            near = difflib.get_close_matches(name, [str(c) for c in available], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            shown = ", ".join(map(str, available[:20])) + (", ..." if len(available) > 20 else "")
            raise ValueError(f"no column {name!r} in the data{hint} (columns: {shown})")
        if available.count(name) > 1:
            count = available.count(name)
            raise ValueError(f"column {name!r} is in the data {count} times: rename all but one")
    extra = [name for name in available if name in wanted.words - {*wanted.required}]
    return [*wanted.required, *extra]


def refuse_missing(
    frame: pd.DataFrame, first_row: int, later: Iterator[pd.DataFrame | pa.RecordBatch]
) -> None:
    """Raise ValueError that counts the rows with missing values, to the end of the table."""
    gaps = frame.isna()
    bad = gaps.any(axis=1).to_numpy()
    if not bad.any():
        return
    first = first_row + int(bad.argmax()) + 1
    counts, rows = gaps.sum(), int(bad.sum())
    for raw in later:
        gaps = as_frame(raw, {}).isna()
        counts, rows = counts + gaps.sum(), rows + int(gaps.any(axis=1).sum())
    shown = ", ".join(f"{name} ({count})" for name, count in counts[counts > 0].items())
    raise ValueError(
        f"{rows} rows with missing values, the first is row {first} (counting from 1): "
        f"{shown}; drop them with missing='drop' (--missing drop) or fill them first"
    )


def as_frame(raw: pd.DataFrame | pa.RecordBatch, levels: dict[str, list[Any]]) -> pd.DataFrame:
    """A block as a pandas frame, its text columns categorical with all the table's levels."""
    frame = raw.to_pandas() if isinstance(raw, pa.RecordBatch) else raw
    return _with_levels(frame, levels)


def _with_levels(frame: pd.DataFrame, levels: dict[str, list[Any]]) -> pd.DataFrame:
    if not levels:
        return frame
    return frame.assign(
        **{name: pd.Categorical(frame[name], categories=kept) for name, kept in levels.items()}
    )
