"""Dates of every kind as consecutive whole numbers: what is written, and how often it comes.

local-projections.md 'System'. A column of dates becomes a clock; a clock that is not regular within
each unit is refused, with the date at which it breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray

INDEX = "the index"  # name of an index of dates that has none
_PARTS = ((r"(\d{4})[ -]?[Qq]([1-4])", 4), (r"(\d{4})(?:-|[ -]?[Mm])(0?[1-9]|1[0-2])", 12))
# pandas' own guesses are not asked: they put 1/1/59 into 2059
_STYLES = ("ISO8601", "%b %Y", "%B %Y", "%d %b %Y", "%d%b%Y")
_WAYS = "write dates as 1990, 1990Q1, 1990-02, 1990-02-28 or 2/28/1990"


@dataclass(frozen=True)
class Panel:
    """Units of the rows in the order of Series, and the place of each in the table."""

    unit: Int[ndarray, " N"]
    units: tuple[str, ...]
    row: Int[ndarray, " N"]
    columns: tuple[str, ...]  # the name of the column of units, if there is one

    def of(self, row: int) -> str:
        """' of UNIT' of a row, for messages; empty where there is no column of units."""
        return f" of {self.units[self.unit[row]]!r}" if self.columns else ""


@dataclass(frozen=True)
class Clock:
    """Numbers of the rows' dates (N,), what they count, and how one is written."""

    name: str
    numbers: Int[ndarray, " N"]
    label: Callable[[int], str]
    grain: str
    by_day: bool = False  # its rows are written as days
    notes: tuple[str, ...] = ()


def counted(panel: Panel) -> Clock:
    """Rows numbered as they come, from 1 in each unit."""
    numbers = np.empty_like(panel.row)
    numbers[panel.row] = np.arange(len(panel.row)) - _starts(panel.unit)[panel.unit] + 1
    each = ", all units from the same first one" if panel.columns else ""
    note = f"no dates are given: the rows are taken in order as consecutive periods{each}"
    return Clock("row", numbers, str, "steps", notes=(note,))


def clock_of(frame: pd.DataFrame, dates: tuple[str, ...]) -> Clock:
    """The dates as numbers, in the order of the table's rows."""
    if len(dates) > 2:
        raise ValueError(f"time={dates}: name one column, or year and quarter, or year and month")
    for name in dates:
        refuse_missing(frame[name], name)
    if len(dates) == 2:
        return _year_and_part(frame, *dates)
    name, column = dates[0], frame[dates[0]]
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    kind = column.dtype
    if isinstance(kind, pd.PeriodDtype):
        label = lambda number: str(pd.Period(ordinal=number, freq=kind.freq))  # noqa: E731
        return Clock(name, pd.PeriodIndex(column).asi8, label, "steps")
    if pd.api.types.is_datetime64_any_dtype(kind):
        return _days(column, name)
    if pd.api.types.is_numeric_dtype(kind):
        return _numbered(numbers_of(column, name), name)
    return _written(column.astype(str).str.strip(), name)


def refuse_disorder(clock: Clock, panel: Panel, by: list[str]) -> None:
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


def coarse(clock: Clock, unit: Int[ndarray, " N"]) -> Clock:
    """The longest periods that tell all rows apart: quarters rather than every third month."""
    clock = _coarse_days(clock, unit) if clock.by_day else clock
    usual = _steps(clock.numbers, unit)[0]
    label, grain = _COARSER.get((clock.grain, usual), (clock.label, ""))
    if not grain or np.ptp(clock.numbers % usual):
        return clock
    return replace(clock, numbers=clock.numbers // usual, label=label, grain=grain)


def regular(clock: Clock, panel: Panel) -> Int[ndarray, " N"]:
    """Consecutive numbers; raises ValueError for gaps and for other steps than the usual one."""
    rows = _within(panel.unit)
    usual, steps = _steps(clock.numbers, panel.unit)
    number = "number the rows by a column of whole numbers"
    gaps = steps // usual - 1
    off = np.flatnonzero((clock.numbers - clock.numbers[0]) % usual)
    if len(off):
        row = int(off[0])
        start, here = (clock.label(int(clock.numbers[r])) for r in (0, row))
        raise ValueError(
            f"{clock.name}: {here}{panel.of(row)} is off the usual step of {usual} "
            f"{clock.grain} that starts at {start}: correct the date, or {number}"
        )
    if gaps.any():
        first = int(rows[np.flatnonzero(gaps)[0]])
        before = int(clock.numbers[first - 1])
        raise ValueError(
            f"{clock.name}: {clock.label(before + usual)}{panel.of(first)} is missing after "
            f"{clock.label(before)}, the first of {np.count_nonzero(gaps)} gaps with {gaps.sum()} "
            f"{clock.grain} in all: cut the table to a stretch without gaps, add the "
            f"rows with values, or, where nothing happened between, {number}"
        )
    return clock.numbers // usual


def numbers_of(column: pd.Series, name: str) -> Float[ndarray, " N"]:
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
        raise ValueError(
            f"{name} is {values[bad][0]} {_row(bad)}: give finite values, or cut the table to a "
            "stretch without gaps"
        )
    return values


def refuse_missing(column: pd.Series, name: str) -> None:
    """Raise ValueError where dates or units are missing."""
    bad = column.isna().to_numpy()
    if bad.any():
        raise ValueError(
            f"{name} is missing {_row(bad)}: fill it in, or cut the table to a stretch without gaps"
        )


# --- parts --------------------------------------------------------------------------------


def _year_and_part(frame: pd.DataFrame, year: str, part: str) -> Clock:
    """Quarters or months, by the second column's name or else by its largest value."""
    years, parts = numbers_of(frame[year], year), numbers_of(frame[part], part)
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


def _in_year(name: str, numbers: Any, per_year: int, notes: tuple[str, ...] = ()) -> Clock:
    label, grain = (_quarter, "quarters") if per_year == 4 else (_month, "months")
    return Clock(name, np.asarray(numbers).astype(int), label, grain, notes=notes)


def _numbered(values: Float[ndarray, " N"], name: str) -> Clock:
    """Whole numbers as they are, but 199002 as a month; decimals as 1990.25 or 1990.083."""
    whole = (values % 1 == 0) & (np.abs(values) < 1e15)
    if whole.all():
        years, months = np.divmod(values.astype(int), 100)
        if not ((years >= 1600) & (years < 2200) & (months >= 1) & (months <= 12)).all():
            return Clock(name, values.astype(int), str, "steps")
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


def _written(text: pd.Series, name: str) -> Clock:
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


def _slashed(text: pd.Series, parts: pd.DataFrame, name: str) -> Clock:
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


def _days(stamps: pd.Series, name: str, notes: tuple[str, ...] = ()) -> Clock:
    """Days since 1970; raises ValueError for dates that differ in their time of day."""
    local = stamps.dt.tz_localize(None)
    other = (local.dt.time != local.iloc[0].time()).to_numpy()
    if other.any():
        raise ValueError(
            f"{name} is {local[other].iloc[0]} {_row(other)} at another time of day than the "
            "first: drop the times (.dt.normalize()), or number periods shorter than a day"
        )
    days = local.to_numpy().astype("datetime64[D]").astype(int)
    return Clock(name, days, _day, "days", True, notes)


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


def _coarse_days(clock: Clock, unit: Int[ndarray, " N"]) -> Clock:
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


def _starts(unit: Int[ndarray, " N"]) -> Int[ndarray, " G"]:
    """Rows at which a unit starts."""
    return np.append(0, np.flatnonzero(np.diff(unit)) + 1)


def _within(unit: Int[ndarray, " N"]) -> Int[ndarray, " n"]:
    """Rows that have a row before them in their unit."""
    return np.flatnonzero(unit[1:] == unit[:-1]) + 1


def _steps(numbers: Int[ndarray, " N"], unit: Int[ndarray, " N"]) -> tuple[int, Int[ndarray, " n"]]:
    """The most frequent step between the rows of a unit (1 where there is none), and all steps."""
    rows = _within(unit)
    steps = numbers[rows] - numbers[rows - 1]
    sizes, counts = np.unique(steps, return_counts=True)
    return int(sizes[counts.argmax()]) if len(sizes) else 1, steps


def _row(bad: Bool[ndarray, " N"]) -> str:
    return f"in row {int(bad.argmax()) + 1} (counting from 1), one of {int(bad.sum())} such rows"
