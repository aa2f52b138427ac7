"""Local projections as a design: what is regressed on what, on which rows.

Horizon h of response j is y_{j,t+h} = β_{j,h}' s_t + γ_{j,h}' c_t + u_{j,t+h}, s_t the shocks,
c_t deterministic terms, lags and whatever else is named; z_t replaces s_t in LP-IV.
local-projections.md 'System'.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from hakari.inference.series import Series, Term, lagged, parse_term, term_names

Trend = Literal["n", "c", "ct", "ctt"]
SampleRule = Literal["common", "available"]
Effects = Literal["unit", "unit+time", "none"]
SPARE = 2  # rows beyond the coefficients without which a regression says nothing


@dataclass(frozen=True)
class Question:
    """What is projected on what; the words of `LocalProjection` without the data."""

    response: tuple[str, ...]
    shock: tuple[str, ...]
    instruments: tuple[str, ...]
    controls: tuple[str, ...]
    lags: int
    augment: bool
    horizons: tuple[int, ...]
    cumulative: bool
    trend: Trend
    sample: SampleRule
    state: str | None
    effects: Effects
    shock_lags: int | None = None

    @property
    def lag_order(self) -> int:
        """Lags of each variable of the system, the one of the augmentation included."""
        return self.lags + self.augment

    @property
    def terms(self) -> tuple[Term, ...]:
        """The controls: lags of responses, shocks and bare controls, then terms as written."""
        bare = [name for name in self.controls if parse_term(name) is None]
        lags = dict.fromkeys((*self.response, *self.shock, *bare), self.lag_order)
        if self.shock_lags is not None:
            lags |= dict.fromkeys(set(self.shock) - {*self.response, *bare}, self.shock_lags)
        own = [Term(name, tuple(range(1, p + 1))) for name, p in lags.items() if p]
        written = [t for t in map(parse_term, self.controls) if t is not None]
        return (*own, *written)

    @property
    def system(self) -> tuple[str, ...]:
        """Every column but the instruments and the state, once."""
        names = (*self.response, *self.shock, *(term.column for term in self.terms))
        return tuple(dict.fromkeys(names))

    @property
    def state_term(self) -> Term | None:
        """The state as a term: `recession` is itself at t, `l(recession, 1)` a period earlier."""
        if self.state is None:
            return None
        return parse_term(self.state) or Term(self.state, (0,))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that are read."""
        state = () if self.state_term is None else (self.state_term.column,)
        return tuple(dict.fromkeys((*self.system, *self.instruments, *state)))


@dataclass(frozen=True)
class Design:
    """Arrays over the N rows of a table, NaN where a row lacks something.

    `instruments` is None in a projection on the shocks themselves. Effects of dates are not among
    the controls: which dates there are depends on the rows, see `controls_on`.
    """

    outcomes: Float[ndarray, "N J H"]
    shocks: Float[ndarray, "N S"]
    instruments: Float[ndarray, "N M"] | None
    controls: Float[ndarray, "N K"]
    shock_names: tuple[str, ...]
    instrument_names: tuple[str, ...]
    control_names: tuple[str, ...]
    unit: Int[ndarray, " N"] | None  # whose means are taken out; None: none are
    date: Int[ndarray, " N"] | None = None  # that have effects; None: none have

    @property
    def right(self) -> Float[ndarray, "N M"]:
        """What the residuals are orthogonal to beside the controls."""
        return self.shocks if self.instruments is None else self.instruments


def build(question: Question, series: Series) -> Design:
    """The design of a question on a table; the columns of both must be those of `columns`."""
    read = series.columns
    shocks = np.column_stack([read[name] for name in question.shock])
    instruments = (
        np.column_stack([read[name] for name in question.instruments])
        if question.instruments
        else None
    )
    controls, names = _controls(question, series)
    shock_names, instrument_names = question.shock, question.instruments
    term = question.state_term
    if term is not None:
        weight = _state(series, term, question.state or "")
        shocks, shock_names = _by_state(shocks, shock_names, weight, question.state or "")
        controls, names = _by_state(controls, names, weight, question.state or "")
        if instruments is not None:
            instruments, instrument_names = _by_state(
                instruments, instrument_names, weight, question.state or ""
            )
        if _held(question, series) and question.trend != "n" and _moves(question, series, weight):
            controls, names = np.column_stack([controls, weight]), (*names, question.state or "")
    held = _held(question, series)
    return Design(
        _outcomes(question, series),
        shocks,
        instruments,
        controls,
        shock_names,
        instrument_names,
        names,
        series.unit if held else None,
        series.period if held and question.effects == "unit+time" else None,
    )


def controls_on(
    design: Design, rows: Int[ndarray, " n"], series: Series
) -> tuple[Float[ndarray, "n K"], tuple[str, ...]]:
    """The controls of some rows and their names, with effects of the dates that are there."""
    c = design.controls[rows]
    if design.date is None:
        return c, design.control_names
    dates, first = np.unique(design.date[rows], return_index=True)
    dummies = np.asarray(design.date[rows][:, None] == dates[1:], dtype=float)
    names = tuple(f"date {series.labels[rows[i]]}" for i in first[1:])
    return np.column_stack([c, dummies]), (*design.control_names, *names)


def rows_by_horizon(design: Design, rule: SampleRule) -> Bool[ndarray, "N H"]:
    """Which rows each horizon's regressions use."""
    parts = [design.shocks, design.right, design.controls]
    known = np.all([np.isfinite(part).all(axis=1) for part in parts], axis=0)
    complete = np.isfinite(design.outcomes).all(axis=1)
    each = np.logical_and(np.asarray(known).reshape(-1, 1), complete)
    if rule == "common":
        each = np.repeat(each.all(axis=1)[:, None], each.shape[1], axis=1)
    return np.asarray(each)


def refuse_few_rows(question: Question, design: Design, series: Series) -> None:
    """Raise ValueError, saying the largest horizon that fits, where rows are too few."""
    used = rows_by_horizon(design, question.sample)
    short = [coefficients(design, rows) + SPARE - rows.sum() for rows in used.T]
    if max(short) <= 0:
        return
    least = len(short) - 1 - int(np.argmax(short[::-1]))  # the last: it makes the sample short
    count, needed = used[:, least].sum(), coefficients(design, used[:, least])
    raise ValueError(
        f"{count} rows are left for {needed} coefficients at horizon "
        f"{question.horizons[least]} ({len(series.period)} rows, {question.lag_order} lags, "
        f"sample={question.sample!r}): at least {needed + SPARE} are needed; "
        f"{_way_out(question, design)}"
    )


def coefficients(design: Design, used: Bool[ndarray, " N"]) -> int:
    """Coefficients of the regression on the rows `used`, effects of units and dates included."""
    count = design.controls.shape[1] + design.shocks.shape[1]
    if design.unit is not None:
        count += len(np.unique(design.unit[used]))
    if design.date is not None:
        count += max(len(np.unique(design.date[used])) - 1, 0)
    return int(count)


# --- parts --------------------------------------------------------------------------------


def _way_out(question: Question, design: Design) -> str:
    """What would leave enough rows."""
    alone = rows_by_horizon(design, "available").T
    fits = [
        h
        for h, rows in zip(question.horizons, alone, strict=True)
        if rows.sum() >= coefficients(design, rows) + SPARE
    ]
    if fits:
        return f"the largest horizon that fits is {fits[-1]} (horizons=range({fits[-1] + 1}))"
    known = len(design.right) - np.isnan(design.right).any(axis=1).sum()
    if question.instruments and known < coefficients(design, alone[0]) + SPARE:
        names = ", ".join(question.instruments)
        return f"all of {names} are there in {known} rows only: drop the instrument that is short"
    return "no horizon fits: use fewer lags or controls, or a longer table"


def _outcomes(question: Question, series: Series) -> Float[ndarray, "N J H"]:
    out = np.empty((len(series.period), len(question.response), len(question.horizons)))
    for j, name in enumerate(question.response):
        values = series.columns[name]
        if not question.cumulative:
            for k, h in enumerate(question.horizons):
                out[:, j, k] = lagged(series, values, -h)
            continue
        total, place = np.zeros(len(values)), 0
        for h in range(question.horizons[-1] + 1):
            total = total + lagged(series, values, -h)
            if h == question.horizons[place]:
                out[:, j, place] = total
                place += 1
    return out


def _controls(question: Question, series: Series) -> tuple[ndarray, tuple[str, ...]]:
    columns, names = _deterministic(question, series)
    for term in question.terms:
        for lag, name in zip(term.lags, term_names(term), strict=True):
            if name in names:
                continue
            columns.append(lagged(series, series.columns[term.column], lag))
            names.append(name)
    if not columns:
        return np.empty((len(series.period), 0)), ()
    return np.column_stack(columns), tuple(names)


def _deterministic(question: Question, series: Series) -> tuple[list[ndarray], list[str]]:
    """Constant and powers of time, which runs from -1 to 1; effects of units hold the constant."""
    period = series.period - series.period.min()
    time = 2 * period / max(int(period.max()), 1) - 1.0
    held = _held(question, series)
    powers = {"n": (), "c": (0,), "ct": (0, 1), "ctt": (0, 1, 2)}[question.trend]
    chosen = [p for p in powers if not (held and p == 0)]
    return [time**p for p in chosen], [("constant", "trend", "trend^2")[p] for p in chosen]


def _held(question: Question, series: Series) -> bool:
    """Whether there are effects of units, which hold the constant."""
    return len(series.units) > 1 and question.effects != "none"


def _moves(question: Question, series: Series, weight: Float[ndarray, " N"]) -> bool:
    """Whether the state moves within units, and differs within dates where these have effects.

    Otherwise the effects hold its level too.
    """
    known = np.isfinite(weight)
    groups = [series.unit, *([series.period] if question.effects == "unit+time" else [])]
    return all(
        any(np.ptp(weight[known & (group == g)]) > 0 for g in np.unique(group[known]))
        for group in groups
    )


def _state(series: Series, term: Term, text: str) -> Float[ndarray, " N"]:
    weight = lagged(series, series.columns[term.column], term.lags[0])
    if len(term.lags) != 1:
        raise ValueError(f"state {text!r} is {len(term.lags)} columns: name one, as 'l(x, 1)'")
    found = weight[np.isfinite(weight)]
    if not len(found) or (found < 0).any() or (found > 1).any():
        low, high = (found.min(), found.max()) if len(found) else (np.nan, np.nan)
        raise ValueError(
            f"state {text!r} lies between {low:g} and {high:g}: it must be one column of "
            "zeros and ones, or of weights from 0 to 1"
        )
    if found.min() == found.max():
        raise ValueError(f"state {text!r} is {found[0]:g} in every row: there is one state only")
    return weight


def _by_state(
    values: Float[ndarray, "N k"], names: Sequence[str], weight: Float[ndarray, " N"], state: str
) -> tuple[Float[ndarray, "N k2"], tuple[str, ...]]:
    both = np.column_stack([values * weight[:, None], values * (1 - weight)[:, None]])
    return both, (*(f"{n} | {state}" for n in names), *(f"{n} | not {state}" for n in names))


def near(name: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' where a known name is close."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""
