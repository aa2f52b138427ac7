"""The tables of local projections, and the words that tables and sentences share."""

from __future__ import annotations

from itertools import product
from math import isfinite

import numpy as np
import pandas as pd

from hakari.inference.iv_tables import number
from hakari.inference.lp_study import Findings
from hakari.report import Table


def horizon_tables(found: Findings) -> list[Table]:
    """Mean, spread and both bands at selected horizons, a table a response and shock."""
    level, out = found.study.level, []
    head = [f"{found.grain}s after", "mean", "sd", f"{level:.0%} pointwise", band_name(found)]
    for r, s, name in pairs(found):
        frame = rows_of(found.table, found, r, s)
        rows = [
            [
                str(row["horizon"]),
                number(row["mean"]),
                "known" if found.known[r, s, place] else number(row["sd"]),
                interval(row["lower_pointwise"], row["upper_pointwise"]),
                interval(row["lower_joint"], row["upper_joint"]),
            ]
            for place, row in frame.iterrows()
            if row["horizon"] in found.selected
        ]
        unit = found.study.units.get(found.irf.responses[r], "")
        what = f"{name} ({unit})" if unit else name
        out.append(Table(head, rows, f"Response of {what}: {lowered(impulse(found, s))}."))
    return out


def shape_table(found: Findings) -> Table:
    """Peak, when it is, half-life and one sign throughout, of the draws themselves."""
    level, what = f"{found.study.level:.0%}", f"{found.grain}s"
    head = [
        "",
        f"peak ({level})",
        f"at, {what}",
        f"half-life, {what}",
        "P(never < 0)",
        "P(never > 0)",
    ]
    rows = []
    for (r, s, name), (_, row) in zip(pairs(found), found.shape.iterrows(), strict=True):
        draws = found.irf.draws[:, r, s][:, ~found.known[r, s]]
        rows.append(
            [
                name,
                f"{number(row['peak'])}\n{interval(row['peak_lower'], row['peak_upper'])}",
                _whole(row, "peak_horizon"),
                _whole(row, "half_life"),
                f"{(draws >= 0).all(axis=1).mean():.2f}",
                f"{(draws <= 0).all(axis=1).mean():.2f}",
            ]
        )
    caption = (
        f"Largest response of each draw, whichever its sign: median and {level} interval. "
        f"Half-life: {what} until under half the peak; ∞: not within {found.irf.horizons[-1]}."
    )
    return Table(head, rows, caption)


def narrowed_table(found: Findings) -> Table | None:
    """Share by which the prior narrowed the standard deviation, at selected horizons."""
    if found.irf.narrowed is None:
        return None
    places = [found.irf.horizons.index(h) for h in found.selected]
    rows = []
    for r, s, name in pairs(found):
        share = found.irf.narrowed[r, s]
        mean = np.nanmean(share) if np.isfinite(share).any() else np.nan
        rows.append([name, *(_share(share[p]) for p in places), _share(mean)])
    head = [f"{found.grain}s after", *map(str, found.selected), "mean"]
    caption = "Share by which the prior narrowed the standard deviation; negative: widened."
    return Table(head, rows, caption)


def strength_table(found: Findings) -> Table | None:
    """The first stage, a row for horizons on the same rows of the table."""
    if found.first_stage is None:
        return None
    columns = ["rows", "partial_r2", "effective_f", "critical"]
    groups = found.first_stage.groupby(columns, sort=False)["horizon"].agg(["min", "max"])
    if len(groups) > len(found.selected):
        frame = found.first_stage[found.first_stage["horizon"].isin(found.selected)]
        groups = frame.groupby(columns, sort=False)["horizon"].agg(["min", "max"])
    rows = [
        [f"{low}" if low == high else f"{low} to {high}", f"{key[0]:.0f}", *map(number, key[1:])]
        for key, (low, high) in zip(groups.index, groups.to_numpy(), strict=True)
    ]
    caption = (
        f"First stage (instruments: {', '.join(found.study.instrument)}). Effective F of Montiel "
        "Olea and Pflueger (2013), below critical: weak."
    )
    return Table(
        [f"{found.grain}s after", "rows", "partial R²", "effective F", "critical"], rows, caption
    )


def rates_table(found: Findings) -> Table | None:
    """The learning rate of each response, its interval, and what it does to the width."""
    rates = found.posterior.calibration
    if not rates:
        return None
    rows = [
        [
            one.response,
            number(one.rate),
            interval(*one.interval),
            f"{one.covered:.0%}",
            f"{one.rate**-0.5 - 1:+.0%}",
        ]
        for one in rates
    ]
    head = ["", "learning rate", "90% interval", "covered before", "width"]
    caption = (
        "Each posterior to the power of its rate. Covered before: share of "
        f"{rates[0].replications} bootstrap samples whose {rates[0].level:.0%} joint band held the "
        "truth without it."
    )
    return Table(
        head,
        rows,
        f"{caption} Rates are cut at 1, their intervals not: calibration narrows nothing.",
    )


# --- words --------------------------------------------------------------------------------


def impulse(found: Findings, s: int) -> str:
    """`A rise of gs1 by 1`, with the unit where it is known."""
    shock, size = found.irf.shocks[s], float(found.size[s])
    unit = found.study.units.get(shock, "")
    name = shock.replace(" | not ", " outside ").replace(" | ", " in ")
    by = f"{number(abs(size))} {unit}".strip() if found.study.scale == "sd" else f"{abs(size):g}"
    by = f"{by} {unit}".strip() if found.study.scale != "sd" else f"one standard deviation ({by})"
    return f"A {'rise' if size > 0 else 'fall'} of {name} by {by}"


def pairs(found: Findings) -> list[tuple[int, int, str]]:
    """Places and name of each response and shock; the shock's name only where there are several."""
    irf = found.irf
    several = len(irf.shocks) > 1
    return [
        (r, s, f"{irf.responses[r]} to {irf.shocks[s]}" if several else irf.responses[r])
        for r, s in product(range(len(irf.responses)), range(len(irf.shocks)))
    ]


def rows_of(table: pd.DataFrame, found: Findings, r: int, s: int) -> pd.DataFrame:
    """The rows of one response to one shock."""
    mine = (table["response"] == found.irf.responses[r]) & (table["shock"] == found.irf.shocks[s])
    return table[mine].reset_index(drop=True)


def band_name(found: Findings) -> str:
    """The joint band with its level and kind."""
    kind, level = found.study.band, f"{found.study.level:.0%}"
    return f"{level} pointwise" if kind == "pointwise" else f"{level} simultaneous ({kind})"


def lowered(text: str) -> str:
    """The text with a small first letter."""
    return text[0].lower() + text[1:]


def interval(lower: float, upper: float) -> str:
    """Two ends as text."""
    return f"{number(lower)} to {number(upper)}"


def _whole(row: pd.Series, name: str) -> str:
    ends = (row[name], row[f"{name}_lower"], row[f"{name}_upper"])
    middle, low, high = ("∞" if np.isposinf(end) else f"{end:.0f}" for end in ends)
    return f"{middle}\n{low} to {high}"


def _share(value: float) -> str:
    return f"{value:.0%}".replace("-0%", "0%") if isfinite(value) else "–"
