"""Rows of two outcomes and their covariates, from a table of any kind and size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from hakari.inference import tables
from hakari.inference.tables import Missing, Wanted

LARGEST = 1e150  # whose square is still a number


@dataclass(frozen=True)
class Rows:
    """y (n, 2), covariates X (n, p), and the regime of each row, or None."""

    y: Float[ndarray, "n 2"]
    X: Float[ndarray, "n p"]
    regimes: ndarray | None = None

    def __len__(self) -> int:
        return len(self.y)

    def cut(self, start: int, stop: int) -> Rows:
        """Rows from start to before stop."""
        return self.taken(slice(start, stop))

    def taken(self, rows: Int[ndarray, " m"] | slice) -> Rows:
        """Rows by number."""
        regimes = None if self.regimes is None else self.regimes[rows]
        return Rows(self.y[rows], self.X[rows], regimes)


@dataclass(frozen=True)
class Columns:
    """Names of the two outcomes, the covariates, and the column of regimes."""

    y1: str
    y2: str
    covariates: tuple[str, ...]
    regimes: str | None = None

    def __post_init__(self) -> None:
        names = [self.y1, self.y2, *self.covariates, *([self.regimes] if self.regimes else [])]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} named twice: outcomes and covariates must differ")

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns that must hold numbers."""
        return (self.y1, self.y2, *self.covariates)


def read(data: Any, columns: Columns, missing: Missing = "raise") -> Iterator[Rows]:
    """Blocks of at most `tables.BLOCK_ROWS` rows, in order, read once.

    data: what `tables.open_table` knows: a frame, a dict of arrays, a path, Arrow, an iterable of
    batches; rows that were read before come back as they are. missing: `raise`, or `drop` rows
    with missing values in a used column.
    Raises ValueError for absent columns, text where numbers are needed, values not finite.
    """
    if isinstance(data, Rows):
        yield data
        return
    wanted = Wanted((*columns.numbers, *([columns.regimes] if columns.regimes else [])))
    blocks, _ = tables.open_table(data, wanted)
    first = 0
    for raw in blocks:
        kept = _complete(raw, columns, missing, first, blocks)
        first += len(raw)
        if len(kept):
            yield _rows(kept, columns, first - len(raw))


def recut(blocks: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows in blocks of `tables.BLOCK_ROWS`, however they were cut; the last may be less.

    So a block has rows of every fold, and an answer does not depend on how files are laid out.
    """
    waiting: list[Rows] = []
    for rows in blocks:
        waiting.append(rows)
        while sum(map(len, waiting)) >= tables.BLOCK_ROWS:
            whole = waiting[0] if len(waiting) == 1 else stacked(waiting)
            yield whole.cut(0, tables.BLOCK_ROWS)
            rest = whole.cut(tables.BLOCK_ROWS, len(whole))
            waiting = [rest] if len(rest) else []
    if waiting:
        yield stacked(waiting)


def spread_rows(blocks: Iterable[Rows], wanted: int) -> Rows:
    """Rows spread evenly over all blocks, `wanted` of them or all; how many there are shows.

    Every row is kept, then every second, fourth and so on, whenever there are twice too many.
    Raises ValueError where there are none.
    """
    kept: list[Rows] = []
    stride, at = 1, 0
    for rows in blocks:
        kept.append(rows.taken(np.arange(-at % stride, len(rows), stride)))
        at += len(rows)
        while sum(map(len, kept)) > 2 * wanted:
            whole = stacked(kept)
            kept, stride = [whole.taken(np.arange(0, len(whole), 2))], 2 * stride
    if not kept:
        raise ValueError("the data have no rows")
    whole = stacked(kept)
    even = np.linspace(0, len(whole) - 1, min(wanted, len(whole))).round().astype(int)
    return whole.taken(even)


def is_stream(data: Any) -> bool:
    """Whether data are gone once they are read: an iterator of batches, or an Arrow reader."""
    return isinstance(data, pa.RecordBatchReader | Iterator)


def stacked(parts: Sequence[Rows]) -> Rows:
    """Rows of several blocks as one."""
    regimes = [part.regimes for part in parts if part.regimes is not None]
    return Rows(
        np.concatenate([part.y for part in parts]),
        np.concatenate([part.X for part in parts]),
        np.concatenate(regimes) if regimes else None,
    )


def _complete(
    raw: pd.DataFrame | pa.RecordBatch,
    columns: Columns,
    missing: Missing,
    first: int,
    later: Iterator[Any],
) -> pd.DataFrame | pa.RecordBatch:
    """The block without its incomplete rows; raises ValueError for them unless told to drop."""
    if isinstance(raw, pa.RecordBatch) and not any(c.null_count for c in raw.columns):
        return raw
    frame = tables.as_frame(raw, {})
    if missing == "raise":
        tables.refuse_missing(frame, first, later)
    return frame[frame.notna().all(axis=1)]


def _rows(block: pd.DataFrame | pa.RecordBatch, columns: Columns, first: int) -> Rows:
    numbers = [_numbers(block, name, first) for name in columns.numbers]
    X = np.empty((len(block), len(columns.covariates)))
    for k, column in enumerate(numbers[2:]):
        X[:, k] = column
    regimes = None
    if columns.regimes:
        regimes = np.asarray(_column(block, columns.regimes))
    return Rows(np.column_stack(numbers[:2]), X, regimes)


def _numbers(block: pd.DataFrame | pa.RecordBatch, name: str, first: int) -> ndarray:
    column = _column(block, name)
    try:
        values = np.asarray(column, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} does not hold numbers ({column[0]!r} in row {first + 1}): encode it, for "
            "example as dummies"
        ) from None
    fine = np.abs(values) < LARGEST  # so is no NaN
    if not fine.all():
        row = int(np.argmin(fine))
        raise ValueError(f"{name} is {values[row]} in row {first + row + 1}: drop or mend the row")
    return values


def _column(block: pd.DataFrame | pa.RecordBatch, name: str) -> Sequence[Any] | ndarray:
    if isinstance(block, pa.RecordBatch):
        return np.asarray(block.column(name).to_numpy(zero_copy_only=False))
    return np.asarray(block[name].to_numpy())
