"""Figures of two effects: how the variances' ratio moves, and the path along a stream."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from scipy.stats import norm

from hakari.inference.bidirectional.drift import Alarm
from hakari.inference.bidirectional.set_pieces import percent
from hakari.inference.bidirectional.variance_ratio import FEW, SPREAD, RatioCurve, RegimeRatios
from hakari.inference.plots import BLUE, ORANGE, PALE, RED, WIDTH


def variance_ratio(curve: RatioCurve | RegimeRatios, names: tuple[str, str]) -> Figure:
    """Log s1²/s2² along a covariate, or in each regime: what moves is what identifies.

    names: of both outcomes.
    """
    figure = _figure(3.0)
    axis = figure.subplots()
    if isinstance(curve, RegimeRatios):
        _regimes(axis, curve)
    else:
        _along(axis, curve)
    axis.set_ylabel(f"log variance, shocks of {names[0]}\nless that of {names[1]}")
    axis.set_axisbelow(True)
    axis.grid(color=PALE)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5)
    return figure


def estimates_path(
    path: pd.DataFrame, names: tuple[str, str], alarm: Alarm | None = None, level: float = 0.95
) -> Figure:
    """Both effects by the number of rows, with intervals, and the row of the alarm.

    path: columns rows, a, b, std_error_a, std_error_b, as `BidirectionalEffects.path`.
    """
    figure = _figure(4.2)
    half = norm.ppf((1 + level) / 2)
    labels = (f"effect of {names[1]} on {names[0]}", f"effect of {names[0]} on {names[1]}")
    panels = figure.subplots(2, 1, sharex=True)
    for axis, name, label, colour in zip(panels, "ab", labels, (BLUE, ORANGE), strict=True):
        rows, middle = path["rows"].to_numpy(), path[name].to_numpy()
        width = half * path[f"std_error_{name}"].to_numpy()
        axis.fill_between(
            rows, middle - width, middle + width, color=colour, alpha=0.2, lw=0,
            label=f"{percent(level)} interval",
        )  # fmt: skip
        axis.plot(rows, middle, color=colour, lw=1.6, label="estimate")
        if alarm is not None:
            axis.axvline(alarm.row, color=RED, ls="--", lw=1.2, label=f"alarm, row {alarm.row:,}")
        axis.set_ylim(*_sight(middle, width))
        axis.set_ylabel(label.replace(" on ", "\non "))
        axis.grid(color=PALE)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5, ncols=3)
    panels[-1].set_xlabel("rows so far")
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    return figure


# --- parts ------------------------------------------------------------------------------------


def _along(axis: Axes, curve: RatioCurve) -> None:
    few = "o-" if len(curve.values) <= FEW else "-"
    axis.fill_between(
        curve.values, curve.low, curve.high, color=BLUE, alpha=0.15, lw=0,
        label=f"{SPREAD[1] - SPREAD[0]:.0%} of rows",
    )  # fmt: skip
    axis.plot(curve.values, curve.log_ratio, few, color=BLUE, lw=1.8, label="mean over rows")
    axis.set_xlabel(curve.covariate)


def _regimes(axis: Axes, found: RegimeRatios) -> None:
    at = np.arange(len(found.labels))
    half = norm.ppf(0.975) * found.std_error
    axis.errorbar(
        at, found.log_ratio, half, fmt="o", color=BLUE, capsize=3, label="regime, 95% interval"
    )
    axis.set_xticks(at, [str(label) for label in found.labels])
    axis.set_xlim(-0.5, len(at) - 0.5)
    axis.set_xlabel("regime")


def _sight(middle: ndarray, width: ndarray) -> tuple[float, float]:
    """Ends that the first estimates, of few rows, do not stretch."""
    later = slice(len(middle) // 10, None)
    low, high = (middle - width)[later], (middle + width)[later]
    low, high = low[np.isfinite(low)], high[np.isfinite(high)]
    if not len(low):
        return (-1.0, 1.0)
    room = 0.1 * max(float(high.max() - low.min()), 1e-12)
    return float(low.min()) - room, float(high.max()) + room


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.set_facecolor("white")
    return figure
