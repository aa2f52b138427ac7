"""Rows of two outcomes and their covariates, from a table of any kind and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from hakari.inference import tables
from hakari.inference.sampling import generator
from hakari.inference.tables import Missing, Wanted

LARGEST = 1e30  # beyond it products in single precision are none
MOST_REGIMES = 200  # each is an instrument of its own
FEWEST_OF_REGIME = 30  # rows that tell a regime's variances


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
    names = (*columns.numbers, *([columns.regimes] if columns.regimes else []))
    wanted = Wanted(names, levels=False)  # regimes are compared as they are
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


@dataclass(frozen=True)
class Sample:
    """Rows drawn from all, in their order; regimes: how many of all rows each label has, sorted."""

    rows: Rows
    regimes: dict[Any, int]


def sampled(blocks: Iterable[Rows], wanted: int, seed: int = 0) -> Sample:
    """`wanted` rows drawn at random from all blocks, or all rows where these are fewer.

    The rows are the same however the blocks are cut. Raises ValueError where there are no rows, and
    for regimes of several kinds or too many.
    """
    chance = generator(seed, "sample of the rows")
    kept, keys, limit = [], [], 1.0
    regimes: Counter[Any] = Counter()
    for rows in blocks:
        key = chance.random(len(rows))
        lucky = np.flatnonzero(key < limit)
        kept.append(rows.taken(lucky))
        keys.append(key[lucky])
        if rows.regimes is not None:
            regimes.update(_counted(rows.regimes))
            _refuse_many(regimes)
        if sum(map(len, keys)) > 2 * wanted:
            kept, keys, limit = _luckiest(kept, keys, wanted)
    if not kept:
        raise ValueError("the data have no rows")
    whole = stacked(_luckiest(kept, keys, wanted)[0])
    return Sample(whole, {label: regimes[label] for label in _sorted(regimes)})


def regimes_of(rows: Rows) -> dict[Any, int]:
    """Labels of the regimes in rows, sorted, and how many rows each has; none without regimes.

    Raises ValueError for regimes of several kinds or too many.
    """
    found = {} if rows.regimes is None else _counted(rows.regimes)
    _refuse_many(found)
    return {label: found[label] for label in _sorted(found)}


def refuse_rare(regimes: Mapping[Any, int]) -> None:
    """Raises ValueError for a regime of a handful of rows, whose variances nobody knows."""
    for label, rows in regimes.items():
        if rows < FEWEST_OF_REGIME:
            raise ValueError(
                f"regime {label!r} has {rows} rows, and {FEWEST_OF_REGIME} are needed: join it "
                "with another, or drop it"
            )


def refuse_two(regimes: Sequence[Any]) -> None:
    """Raises ValueError for two regimes, of which a constant covariance leaves one instrument."""
    if len(regimes) == 2:
        raise ValueError(
            f"two regimes ({regimes[0]}, {regimes[1]}) with covariance 'constant' tell one effect: "
            "give three regimes, or restrict='b=0' or 'a=0'"
        )


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
        regimes = _labels(np.asarray(_column(block, columns.regimes)))
    return Rows(np.column_stack(numbers[:2]), X, regimes)


def _labels(regimes: ndarray) -> ndarray:
    """Dates, periods and the like as text, so that they can be compared, printed and saved."""
    plain = regimes.dtype.kind in "biufUS" or isinstance(
        regimes[0] if len(regimes) else "", str | int | float
    )
    return regimes if plain else np.array([str(label) for label in regimes], dtype=object)


def _numbers(block: pd.DataFrame | pa.RecordBatch, name: str, first: int) -> ndarray:
    column = _column(block, name)
    try:
        if np.iscomplexobj(column):
            raise TypeError
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


def _luckiest(
    kept: list[Rows], keys: list[ndarray], wanted: int
) -> tuple[list[Rows], list[ndarray], float]:
    """The rows of the least keys, those keys, and the first key above them."""
    whole, key = stacked(kept), np.concatenate(keys)
    if len(key) <= wanted:
        return [whole], [key], 1.0
    limit = float(np.partition(key, wanted)[wanted])
    lucky = np.flatnonzero(key < limit)
    return [whole.taken(lucky)], [key[lucky]], limit


def _counted(regimes: ndarray) -> dict[Any, int]:
    try:
        labels, counts = np.unique(regimes, return_counts=True)
    except TypeError:
        raise _mixed(regimes) from None
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def _sorted(labels: Iterable[Any]) -> list[Any]:
    try:
        return sorted(labels)
    except TypeError:
        raise _mixed(labels) from None


def _mixed(labels: Iterable[Any]) -> ValueError:
    kinds = ", ".join(sorted({type(label).__name__ for label in labels}))
    return ValueError(
        f"regimes of several kinds ({kinds}): write all labels as text, or all as numbers"
    )


def _refuse_many(regimes: Mapping[Any, int]) -> None:
    if len(regimes) > MOST_REGIMES:
        raise ValueError(
            f"{len(regimes):,} regimes in {sum(regimes.values()):,} rows: at most {MOST_REGIMES} "
            "are taken; give a column of few values, or make it a covariate"
        )
