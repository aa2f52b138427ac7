"""A table of time series or a panel: read, checked and laid out in time order, with its lags.

local-projections.md 'System'. Dates of every kind become consecutive whole numbers, so that a
lag is a shift of rows: what would break this (gaps, copies, disorder) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from hakari.inference.dates import (
    INDEX,
    Panel,
    clock_of,
    coarse,
    counted,
    numbers_of,
    refuse_disorder,
    refuse_missing,
    regular,
)
from hakari.inference.tables import Wanted, as_frame, open_table


@dataclass(frozen=True)
class Series:
    """Columns of a table in time order, one regular stretch of periods a unit.

    columns: each (N,), NaN where missing. unit: (N,) 0..G-1, the rows of a unit contiguous and in
    time order; units: their G labels, ("",) for one series. period: (N,) consecutive numbers,
    equal for equal dates of all units; labels: the N dates in words, as "1990-02" or "1990Q1".
    notes: what was decided for the user, in sentences.
    """

    columns: dict[str, Float[ndarray, " N"]]
    unit: Int[ndarray, " N"]
    units: tuple[str, ...]
    period: Int[ndarray, " N"]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Term:
    """Lags of a column; a negative lag is a lead, 0 the column itself."""

    column: str
    lags: tuple[int, ...]


def read_series(
    data: Any,
    columns: Sequence[str],
    time: str | Sequence[str] | None = None,
    unit: str | None = None,
) -> Series:
    """The columns of a table in time order, unit by unit.

    data: whatever `open_table` takes. time: a column of dates, of whole numbers or of decimals
    such as 1947.25, or two columns, year and quarter or year and month; None takes a pandas index
    of dates, or else the rows as they come. unit: the column of a panel's units. The frequency
    is the most frequent step between rows. Missing values stay, as NaN. Raises ValueError for
    dates that are missing, twice, in disorder or with gaps, and for columns that are unknown,
    text or infinite; TypeError for `columns` that are one text.

    >>> read_series({"y": [1.0, 2.0], "date": ["1990-02", "1990-03"]}, ["y"], "date").labels
    ('1990-02', '1990-03')
    """
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is one text: give a list, [{columns!r}]")
    data, dates = _index_as_column(data, time, unit)
    frame = _read(data, (*columns, *dates, *([] if unit is None else [unit])))
    panel = _panel(frame, unit)
    values = {name: numbers_of(frame[name], name)[panel.row] for name in columns}
    days = clock_of(frame, dates) if dates else counted(panel)
    days = replace(days, numbers=days.numbers[panel.row])
    refuse_disorder(days, panel, [*panel.columns, *dates])
    clock = coarse(days, panel.unit)
    period = regular(clock, panel)
    shown = days if clock.by_day else clock
    labels = tuple(shown.label(int(number)) for number in shown.numbers)
    return Series(values, panel.unit, panel.units, period, labels, clock.notes)


def lagged(series: Series, values: Float[ndarray, " N"], lag: int) -> Float[ndarray, " N"]:
    """Values (N,) at t - lag of the same unit (lag < 0: leads), NaN where there is none."""
    out = np.full(len(values), np.nan)
    shift = min(abs(lag), len(values))
    early, late = slice(0, len(values) - shift), slice(shift, None)
    target, source = (late, early) if lag >= 0 else (early, late)
    same = series.unit[target] == series.unit[source]
    out[target] = np.where(same, values[source], np.nan)
    return out


def parse_term(text: str) -> Term | None:
    """`l(x, 1:4)` lags, `f(x, 1:2)` leads, `l(x)` one lag; None for a bare column name.

    Raises ValueError that shows the form for lags that are not whole numbers in rising order.

    >>> parse_term("f(x, 1:2)")
    Term(column='x', lags=(-1, -2))
    """
    if not re.match(r"\s*[lf]\(", text):
        return None
    found = re.fullmatch(r"\s*([lf])\(\s*([^,]+?)\s*(?:,\s*(\d+)\s*(?::\s*(\d+)\s*)?)?\)\s*", text)
    kind, column, first, last = found.groups() if found else ("l", "", None, None)
    start = 1 if first is None else int(first)
    stop = start if last is None else int(last)
    if found is None or stop < start:
        raise ValueError(
            f"term {text!r} is not understood: write l(x), l(x, 2) or l(x, 1:4) for lags and "
            "f(x, 1:2) for leads, in whole numbers that rise"
        )
    sign = 1 if kind == "l" else -1
    return Term(column, tuple(sign * lag for lag in range(start, stop + 1)))


def term_names(term: Term) -> tuple[str, ...]:
    """Names of the term's columns: `l(x, 1)`, `f(x, 2)`, and `x` for lag 0."""
    return tuple(
        term.column if lag == 0 else f"{'l' if lag > 0 else 'f'}({term.column}, {abs(lag)})"
        for lag in term.lags
    )


def refuse_interior_gaps(series: Series, names: Iterable[str]) -> tuple[str, ...]:
    """Notes on the columns that start later or end earlier than the table.

    Raises ValueError that names column, date and number where values are missing strictly between
    a unit's first and last, and for a column without any.
    """
    notes: list[str] = []
    for name in dict.fromkeys(names):
        missing = np.isnan(series.columns[name])
        if missing.any():  # most columns are complete, and bootstraps ask thousands of times
            notes += _edge_notes(series, name, np.flatnonzero(~missing))
    return tuple(notes)


def _edge_notes(series: Series, name: str, there: Int[ndarray, " n"]) -> list[str]:
    """As `refuse_interior_gaps`, of one column with values in these rows only."""
    if not len(there):
        raise ValueError(f"{name} has no values in {len(series.unit)} rows: drop it")
    unit = series.unit[there]
    new = unit[1:] != unit[:-1]
    holes = np.where(new, 0, np.diff(there) - 1)
    if holes.any():
        raise ValueError(
            f"{name} is missing at {_place(series, int(there[holes.argmax()]) + 1)}, one of "
            f"{holes.sum()} missing values between its first and its last: cut the "
            "table to a stretch without gaps, or fill in the values"
        )
    notes, around = [], np.append(series.unit, -1)  # row -1 and row N belong to no unit
    first, last = there[np.append(True, new)], there[np.append(new, True)]
    for verb, at, step in (("starts", first, -1), ("ends", last, 1)):
        inside = at[around[at + step] == around[at]]
        if len(inside):
            more = f", and inside the table in {len(inside) - 1} more units"
            notes.append(
                f"{name} {verb} at {_place(series, int(inside[0]))}{more * (len(inside) > 1)}"
            )
    if without := len(series.units) - len(first):
        notes.append(f"{name} has no values in {without} of {len(series.units)} units")
    return notes


def _place(series: Series, row: int) -> str:
    unit = f" of {series.units[series.unit[row]]!r}" if len(series.units) > 1 else ""
    return series.labels[row] + unit


def _index_as_column(
    data: Any, time: str | Sequence[str] | None, unit: str | None
) -> tuple[Any, tuple[str, ...]]:
    """Levels of a pandas index that are dates or that the user names, as columns."""
    dates = () if time is None else (time,) if isinstance(time, str) else tuple(time)
    data = pd.DataFrame(data) if isinstance(data, dict) else data
    data = data.to_pandas() if isinstance(data, pa.Table | pa.RecordBatch) else data
    if not isinstance(data, pd.DataFrame):
        return data, dates
    index, kinds = data.index, pd.DatetimeIndex | pd.PeriodIndex
    of_dates = [isinstance(index.get_level_values(k), kinds) for k in range(index.nlevels)]
    if time is None and sum(of_dates) == 1:
        names = [
            INDEX if d and n is None else n for n, d in zip(index.names, of_dates, strict=True)
        ]
        index, dates = index.set_names(names), (names[of_dates.index(True)],)
    moved = [n for n in index.names if n in (*dates, unit) and n and n not in data.columns]
    return (data.set_axis(index).reset_index(level=moved) if moved else data), dates


def _read(data: Any, names: tuple[str, ...]) -> pd.DataFrame:
    """The named columns, all rows."""
    wanted = list(dict.fromkeys(names))
    for name in wanted if isinstance(data, pd.DataFrame) else ():
        if (count := list(data.columns).count(name)) > 1:
            raise ValueError(f"{count} columns are called {name!r}: rename all but one")
    parts = [as_frame(raw, {}) for raw in open_table(data, Wanted(tuple(wanted)))[0]]
    # a Parquet file that pandas wrote gives its index back as an index
    parts = [p.reset_index() if {*p.index.names} & {*wanted} else p for p in parts]
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if not len(frame):
        raise ValueError(f"the data have no rows: {', '.join(wanted)} are to be read from them")
    return frame


def _panel(frame: pd.DataFrame, unit: str | None) -> Panel:
    """Units in the order of appearance, the rows of each in the table's order."""
    if unit is None:
        return Panel(np.zeros(len(frame), dtype=int), ("",), np.arange(len(frame)), ())
    refuse_missing(frame[unit], unit)
    codes, labels = pd.factorize(frame[unit])
    row = np.argsort(codes, kind="stable")
    return Panel(codes[row].astype(int), tuple(str(label) for label in labels), row, (unit,))
