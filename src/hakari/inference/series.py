"""A table of time series or a panel: read, checked and laid out in time order, with its lags.

local-projections.md 'System'. Dates of every kind become consecutive whole numbers, so that a
lag is a shift of rows: what would break this (gaps, copies, disorder) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from hakari.inference.tables import Wanted, as_frame, open_table

INDEX = "the index"  # name of an index of dates that has none
_PARTS = ((r"(\d{4})[ -]?[Qq]([1-4])", 4), (r"(\d{4})(?:-|[ -]?[Mm])(0?[1-9]|1[0-2])", 12))
# pandas' own guesses are not asked: they put 1/1/59 into 2059
_STYLES = ("ISO8601", "%b %Y", "%B %Y", "%d %b %Y", "%d%b%Y")
_WAYS = "write dates as 1990, 1990Q1, 1990-02, 1990-02-28 or 2/28/1990"


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
    values = {name: _numbers(frame[name], name)[panel.row] for name in columns}
    days = _clock(frame, dates) if dates else _counted(panel)
    days = replace(days, numbers=days.numbers[panel.row])
    _refuse_disorder(days, panel, [*panel.columns, *dates])
    clock = _coarse(days, panel.unit)
    period = _regular(clock, panel)
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
    edges = [_edges(series.unit, side) for side in ("start", "end")]
    for name in dict.fromkeys(names):
        there = np.flatnonzero(~np.isnan(series.columns[name]))
        if not len(there):
            raise ValueError(f"{name} has no values in {len(series.unit)} rows: drop it")
        unit = series.unit[there]
        missing = np.where(np.diff(unit) == 0, np.diff(there) - 1, 0)
        if missing.any():
            raise ValueError(
                f"{name} is missing at {_place(series, int(there[missing.argmax()]) + 1)}, one of "
                f"{missing.sum()} missing values between its first and its last: fill them, or "
                "cut the table to a stretch without them"
            )
        for verb, side, edge in zip(("starts", "ends"), ("start", "end"), edges, strict=True):
            inside = np.setdiff1d(there[_edges(unit, side)], edge)
            if len(inside):
                more = f", and inside the table in {len(inside) - 1} more units"
                notes.append(
                    f"{name} {verb} at {_place(series, int(inside[0]))}{more * (len(inside) > 1)}"
                )
        if without := len(series.units) - len(np.unique(unit)):
            notes.append(f"{name} has no values in {without} of {len(series.units)} units")
    return tuple(notes)


def _edges(unit: Int[ndarray, " N"], side: str) -> Int[ndarray, " G"]:
    """Rows at which a unit starts or ends."""
    change = np.flatnonzero(np.diff(unit)) + 1
    return np.concatenate([[0], change] if side == "start" else [change - 1, [len(unit) - 1]])


def _place(series: Series, row: int) -> str:
    unit = f" of {series.units[series.unit[row]]!r}" if len(series.units) > 1 else ""
    return series.labels[row] + unit


@dataclass(frozen=True)
class _Panel:
    """Units of the rows in the order of Series, and the place of each in the table."""

    unit: Int[ndarray, " N"]
    units: tuple[str, ...]
    row: Int[ndarray, " N"]
    columns: tuple[str, ...]  # the name of the column of units, if there is one

    def of(self, row: int) -> str:
        return f" of {self.units[self.unit[row]]!r}" if self.columns else ""


@dataclass(frozen=True)
class _Clock:
    """Numbers of the rows' dates (N,), what they count, and how one is written."""

    name: str
    numbers: Int[ndarray, " N"]
    label: Callable[[int], str]
    grain: str
    by_day: bool = False  # its rows are written as days
    notes: tuple[str, ...] = ()


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


def _panel(frame: pd.DataFrame, unit: str | None) -> _Panel:
    """Units in the order of appearance, the rows of each in the table's order."""
    if unit is None:
        return _Panel(np.zeros(len(frame), dtype=int), ("",), np.arange(len(frame)), ())
    _refuse_missing(frame[unit], unit)
    codes, labels = pd.factorize(frame[unit])
    row = np.argsort(codes, kind="stable")
    return _Panel(codes[row].astype(int), tuple(str(label) for label in labels), row, (unit,))


def _row(bad: Bool[ndarray, " N"]) -> str:
    return f"in row {int(bad.argmax()) + 1} (counting from 1), one of {int(bad.sum())} such rows"


def _refuse_missing(column: pd.Series, name: str) -> None:
    bad = column.isna().to_numpy()
    if bad.any():
        raise ValueError(f"{name} is missing {_row(bad)}: fill it in, or drop these rows")


def _numbers(column: pd.Series, name: str) -> Float[ndarray, " N"]:
    """The column as floats, NaN where missing; raises ValueError for text and infinite values."""
    known = column.dropna()
    numeric = pd.api.types.is_numeric_dtype(column.dtype)
    if not numeric and not (column.dtype == object and all(isinstance(v, Number) for v in known)):
        raise ValueError(
            f"{name} holds {column.dtype} ({', '.join(map(repr, known[:1]))}), not numbers: make "
            f"it numeric first, as in pd.to_numeric(data[{name!r}])"
        )
    values = np.full(len(column), np.nan)
    values[column.notna()] = known.to_numpy(dtype=float)
    bad = np.isinf(values)
    if bad.any():
        raise ValueError(f"{name} is {values[bad][0]} {_row(bad)}: leave it empty, or drop them")
    return values


def _counted(panel: _Panel) -> _Clock:
    """Rows numbered as they come, from 1 in each unit."""
    numbers = np.empty_like(panel.row)
    numbers[panel.row] = np.arange(len(panel.row)) - _edges(panel.unit, "start")[panel.unit] + 1
    each = ", all units from the same first one" if panel.columns else ""
    note = f"no dates are given: the rows are taken in order as consecutive periods{each}"
    return _Clock("row", numbers, str, "steps", notes=(note,))


def _clock(frame: pd.DataFrame, dates: tuple[str, ...]) -> _Clock:
    """The dates as numbers, in the order of the table's rows."""
    if len(dates) > 2:
        raise ValueError(f"time={dates}: name one column, or year and quarter, or year and month")
    for name in dates:
        _refuse_missing(frame[name], name)
    if len(dates) == 2:
        return _year_and_part(frame, *dates)
    name, column = dates[0], frame[dates[0]]
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    kind = column.dtype
    if isinstance(kind, pd.PeriodDtype):
        label = lambda number: str(pd.Period(ordinal=number, freq=kind.freq))  # noqa: E731
        return _Clock(name, pd.PeriodIndex(column).asi8, label, "steps")
    if pd.api.types.is_datetime64_any_dtype(kind):
        return _days(column, name)
    if pd.api.types.is_numeric_dtype(kind):
        return _numbered(_numbers(column, name), name)
    return _written(column.astype(str).str.strip(), name)


def _year_and_part(frame: pd.DataFrame, year: str, part: str) -> _Clock:
    """Quarters or months, by the second column's name or else by its largest value."""
    years, parts = _numbers(frame[year], year), _numbers(frame[part], part)
    named = {"q": 4, "m": 12}.get(part[:1].lower())
    per_year = named or (4 if parts.max() <= 4 else 12)
    word = "quarter" if per_year == 4 else "month"
    for name, values, top in ((year, years, 9999), (part, parts, per_year)):
        bad = (values % 1 != 0) | (values < 1) | (values > top)
        if bad.any():
            raise ValueError(
                f"{name} is {values[bad][0]:g} {_row(bad)}: time=({year!r}, {part!r}) must be a "
                f"year and its {word}, 1 to {per_year}"
            )
    notes = () if named else (f"{part} is read as a {word}",)
    return _in_year(f"{year}, {part}", years * per_year + parts - 1, per_year, notes)


def _in_year(name: str, numbers: Any, per_year: int, notes: tuple[str, ...] = ()) -> _Clock:
    label, grain = (_quarter, "quarters") if per_year == 4 else (_month, "months")
    return _Clock(name, np.asarray(numbers).astype(int), label, grain, notes=notes)


def _numbered(values: Float[ndarray, " N"], name: str) -> _Clock:
    """Whole numbers as they are, but 199002 as a month; decimals as 1990.25 or 1990.083."""
    whole = (values % 1 == 0) & (np.abs(values) < 1e15)
    if whole.all():
        years, months = np.divmod(values.astype(int), 100)
        if not ((years >= 1600) & (years < 2200) & (months >= 1) & (months <= 12)).all():
            return _Clock(name, values.astype(int), str, "steps")
        note = f"{name}: {values[0]:.0f} is read as year {years[0]}, month {months[0]}"
        return _in_year(name, years * 12 + months - 1, 12, (note,))
    for per_year, slack in ((4, 1e-6), (12, 0.05)):  # two digits, 1990.08, are enough
        parts = np.round(values * per_year)
        if ((np.abs(values * per_year - parts) <= slack) & (np.abs(values) < 1e4)).all():
            return _in_year(name, parts, per_year)
    raise ValueError(
        f"{name} is {values[~whole][0]:g}: write whole numbers, or years with decimals for the "
        "quarter (1990.25) or month (1990.083), or name two columns, year and month"
    )


def _written(text: pd.Series, name: str) -> _Clock:
    """Dates in words: the first way of writing that fits all rows."""
    numeric = pd.to_numeric(text, errors="coerce")
    if numeric.notna().all():
        return _numbered(numeric.to_numpy(dtype=float), name)
    for pattern, per_year in _PARTS:
        found = text.str.extract(f"^{pattern}$")
        if found.notna().all(axis=None):
            return _in_year(name, found.astype(int) @ [per_year, 1] - 1, per_year)
    slashed = text.str.extract(r"^(\d{1,2})[/.-](\d{1,2})[/.-](\d{4})$")
    if slashed.notna().all(axis=None):
        return _slashed(text, slashed.astype(int), name)
    read = [pd.to_datetime(text, format=style, errors="coerce") for style in _STYLES]
    best = min(read, key=lambda stamps: stamps.isna().sum())
    bad = best.isna().to_numpy()
    if bad.any():
        raise ValueError(f"{name} is {text[bad].iloc[0]!r} {_row(bad)}: {_WAYS}")
    return _days(best, name)


def _slashed(text: pd.Series, parts: pd.DataFrame, name: str) -> _Clock:
    """2/28/1990 or 28/2/1990: where both can be, the one with fewer different days of the month."""
    read = {}
    for first, order in (("month", [1, 0, 2]), ("day", [0, 1, 2])):
        fields = parts[order].set_axis(["day", "month", "year"], axis=1)
        read[first] = pd.to_datetime(fields, errors="coerce")
    bad = read["month"].isna().to_numpy()
    fits = [first for first, stamps in read.items() if stamps.notna().all()]
    if not fits:
        raise ValueError(f"{name} is {text[bad].iloc[0]!r} {_row(bad)}: {_WAYS}")
    first = min(fits, key=lambda order: read[order].dt.day.nunique())
    differ = (parts[0] != parts[1]).to_numpy()
    if not differ.any():
        return _days(read[first], name)
    row = int(differ.argmax())
    note = f"{name}: {text.iloc[row]} is read {first} first, as {read[first].iloc[row].date()}"
    return _days(read[first], name, (note,))


def _days(stamps: pd.Series, name: str, notes: tuple[str, ...] = ()) -> _Clock:
    """Days since 1970; raises ValueError for dates that differ in their time of day."""
    local = stamps.dt.tz_localize(None)
    other = (local.dt.time != local.iloc[0].time()).to_numpy()
    if other.any():
        raise ValueError(
            f"{name} is {local[other].iloc[0]} {_row(other)} at another time of day than the "
            "first: drop the times (.dt.normalize()), or number periods shorter than a day"
        )
    days = local.to_numpy().astype("datetime64[D]").astype(int)
    return _Clock(name, days, _day, "days", True, notes)


def _month(number: int) -> str:
    return f"{number // 12}-{number % 12 + 1:02d}"


def _quarter(number: int) -> str:
    return f"{number // 4}Q{number % 4 + 1}"


def _day(number: int) -> str:
    return str(np.datetime64(number, "D"))


_COARSER: dict[tuple[str, int], tuple[Callable[[int], str], str]] = {
    ("months", 3): (_quarter, "quarters"),
    ("months", 12): (str, "years"),
    ("quarters", 4): (str, "years"),
}


def _refuse_disorder(clock: _Clock, panel: _Panel, by: list[str]) -> None:
    """Raise ValueError for dates that are twice in a unit, or earlier than the one before."""
    pairs = pd.DataFrame({"unit": panel.unit, "number": clock.numbers})
    twice = np.flatnonzero(pairs.duplicated())
    if len(twice):
        row = int(twice[0])
        more = "" if panel.columns else "; of a panel, name the column of units: unit=..."
        raise ValueError(
            f"{clock.name}: {clock.label(int(clock.numbers[row]))}{panel.of(row)} is "
            f"there more than once, one of {len(twice)} rows too many: keep one row a date{more}"
        )
    steps = _steps(clock.numbers, panel.unit)[1]
    late = _within(panel.unit)[steps < 0]
    if len(late):
        row = int(late[0])
        before, here = (clock.label(int(clock.numbers[row - back])) for back in (1, 0))
        sort = "data.sort_index()" if INDEX in by else f"data.sort_values({by})"
        raise ValueError(
            f"{clock.name}: {here}{panel.of(row)} stands after {before}, in row "
            f"{panel.row[row] + 1} (counting from 1): sort the rows first, {sort}"
        )


def _within(unit: Int[ndarray, " N"]) -> Int[ndarray, " n"]:
    """Rows that have a row before them in their unit."""
    return np.flatnonzero(unit[1:] == unit[:-1]) + 1


def _steps(numbers: Int[ndarray, " N"], unit: Int[ndarray, " N"]) -> tuple[int, Int[ndarray, " n"]]:
    """The most frequent step between the rows of a unit (1 where there is none), and all steps."""
    rows = _within(unit)
    steps = numbers[rows] - numbers[rows - 1]
    sizes, counts = np.unique(steps, return_counts=True)
    return int(sizes[counts.argmax()]) if len(sizes) else 1, steps


def _coarse(clock: _Clock, unit: Int[ndarray, " N"]) -> _Clock:
    """The longest periods that tell all rows apart: quarters rather than every third month."""
    clock = _coarse_days(clock, unit) if clock.by_day else clock
    usual = _steps(clock.numbers, unit)[0]
    label, grain = _COARSER.get((clock.grain, usual), (clock.label, ""))
    if not grain or np.ptp(clock.numbers % usual):
        return clock
    return replace(clock, numbers=clock.numbers // usual, label=label, grain=grain)


def _coarse_days(clock: _Clock, unit: Int[ndarray, " N"]) -> _Clock:
    """Days as months, weeks or business days where that makes them regular."""
    days = clock.numbers
    usual = _steps(days, unit)[0]
    months = days.astype("datetime64[D]").astype("datetime64[M]").astype(int) + 1970 * 12
    if usual >= 28 and (_steps(months, unit)[1] > 0).all():
        return replace(clock, numbers=months, label=_month, grain="months", by_day=False)
    weeks, weekday = np.divmod(days + 3, 7)  # from a Monday
    if usual % 7 == 0 and (_steps(weeks, unit)[1] > 0).all():
        shown = int(np.bincount(weekday).argmax())
        return replace(clock, numbers=weeks, label=lambda n: _day(7 * n - 3 + shown), grain="weeks")
    if usual == 1 and (weekday < 5).all():
        label = lambda n: _day(7 * (n // 5) + n % 5 - 3)  # noqa: E731
        return replace(clock, numbers=5 * weeks + weekday, label=label, grain="business days")
    return clock


def _regular(clock: _Clock, panel: _Panel) -> Int[ndarray, " N"]:
    """Consecutive numbers; raises ValueError for gaps and for other steps than the usual one."""
    rows = _within(panel.unit)
    usual, steps = _steps(clock.numbers, panel.unit)
    way = "or number the rows by a column of whole numbers"
    gaps = steps // usual - 1
    off = np.flatnonzero((clock.numbers - clock.numbers[0]) % usual)
    if len(off):
        row = int(off[0])
        start, here = (clock.label(int(clock.numbers[r])) for r in (0, row))
        raise ValueError(
            f"{clock.name}: {here}{panel.of(row)} is off the usual step of {usual} "
            f"{clock.grain} that starts at {start}: correct the date, {way}"
        )
    if gaps.any():
        first = int(rows[np.flatnonzero(gaps)[0]])
        before = int(clock.numbers[first - 1])
        raise ValueError(
            f"{clock.name}: {clock.label(before + usual)}{panel.of(first)} is missing after "
            f"{clock.label(before)}, the first of {np.count_nonzero(gaps)} gaps with {gaps.sum()} "
            f"{clock.grain} in all: add these rows, with empty values, {way}"
        )
    return clock.numbers // usual
