"""Figures of a calibration and of what it did to a posterior; each returns a `Figure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from arviz_stats import base as stats
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import ndarray
from scipy.stats import binom

from hakari.inference.diagnostics import draws_of
from hakari.inference.gibbs.calibration import Calibration
from hakari.inference.gibbs.rival_intervals import Rival
from hakari.inference.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    WIDTH,
    kernel_density,
)

COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE)
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
BINS = 20
CHANCE = 0.95  # of the bands
BAND = "#cfd4da"

Draws = xr.DataTree | Mapping[str, ndarray]


def coverage(cal: Calibration) -> Figure:
    """Share of bootstrap data sets whose region covers θ̂, by level, and their credibility ranks.

    Both inside their bands: calibrated at every level and not only at the one asked for.
    """
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    figure.set_facecolor("white")
    left, right = figure.subplots(1, 2)
    _curve(left, cal)
    _histogram(right, cal)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def before_and_after(
    before: Draws,
    after: Draws,
    names: Sequence[str],
    level: float = 0.95,
    rivals: Sequence[Rival] = (),
    *,
    labels: tuple[str, str] = ("learning rate 1", "calibrated"),
) -> Figure:
    """Density of coefficients at two learning rates, and below them all intervals.

    before, after: results of `sample`, or draws by name. Each density is drawn to its own height,
    since one is often many times as narrow as the other. names: a handful.
    """
    rows = -(-len(names) // 2) if len(names) > 1 else 1
    figure = Figure(figsize=(WIDTH, 3.1 * rows + 0.4 * (len(names) == 1)), layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots(rows, min(2, len(names)), squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        both = (_draws(before, name), _draws(after, name))
        _densities(axis, both, labels, level)
        _strip(axis, _ends(both, level) + _rivals(rivals, name))
        axis.set_xlabel(f"coefficient of {name}")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    handles, shown = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, shown, loc="outside upper center", ncols=5, frameon=False, fontsize=8.5,
        title=f"densities, each to its own height; bars: {level:.0%} intervals",
        title_fontsize=8.5,
    )  # fmt: skip
    return figure


# --- coverage -------------------------------------------------------------------------------


def _curve(axis: Axes, cal: Calibration) -> None:
    frame = cal.coverage_curve
    level = frame["level"]
    axis.fill_between(
        level, frame["lower"], frame["upper"], color=BAND, lw=0, label=f"{CHANCE:.0%} by chance"
    )
    axis.plot([0, 1], [0, 1], color=INK, lw=0.8, label="as the level says")
    for place, found in enumerate(f for f in cal.found if f.solved):
        axis.plot(level, frame[found.region.label], **_line(place, cal, found.region.label))
    axis.axvline(cal.level, color=GREY, lw=1, ls=":")
    axis.annotate(
        f"{cal.level:.0%} asked", (cal.level, 0.02), xytext=(-4, 0), textcoords="offset points",
        ha="right", color=GREY, fontsize=8.5,
    )  # fmt: skip
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the region", ylabel="share that covers")
    axis.set_aspect("equal")
    axis.set_axisbelow(True)
    axis.grid(color=PALE)


def _histogram(axis: Axes, cal: Calibration) -> None:
    B = len(cal.found[0].ranks)
    low, high = (binom.ppf(q, B, 1 / BINS) * BINS / B for q in ((1 - CHANCE) / 2, (1 + CHANCE) / 2))
    axis.axhspan(low, high, color=BAND, lw=0)
    axis.axhline(1, color=INK, lw=0.8)
    edges, top = np.linspace(0, 1, BINS + 1), high
    for place, found in enumerate(f for f in cal.found if f.solved):
        counts, _ = np.histogram(found.ranks, edges)
        look = _line(place, cal, found.region.label)
        axis.stairs(
            counts * BINS / B, edges, baseline=None, color=look["color"], ls=look["linestyle"],
            lw=look["linewidth"],
        )  # fmt: skip
        top = max(top, float(counts.max()) * BINS / B)
    axis.set(xlim=(0, 1), ylim=(0, 1.12 * top), xlabel="credibility rank of the estimate")
    axis.set_ylabel("data sets / expected")
    axis.set_box_aspect(1)


def _line(place: int, cal: Calibration, label: str) -> dict[str, Any]:
    """Colour and style of a region's line; those past the palette are grey, under one label."""
    if place < len(COLOURS):
        return {
            "color": COLOURS[place],
            "linestyle": STYLES[place],
            "linewidth": 1.6,
            "label": label,
        }
    rest = (
        f"{sum(f.solved for f in cal.found) - len(COLOURS)} more" if place == len(COLOURS) else None
    )
    return {"color": GREY, "linestyle": "-", "linewidth": 0.7, "label": rest}


# --- densities ------------------------------------------------------------------------------


def _densities(
    axis: Axes, both: tuple[ndarray, ndarray], labels: tuple[str, str], level: float
) -> None:
    quantiles = np.array([np.quantile(draws, [0.003, 0.997]) for draws in both])
    low, high = float(quantiles[:, 0].min()), float(quantiles[:, 1].max())
    margin = 0.06 * max(high - low, 1e-12)
    grid = np.linspace(low - margin, high + margin, 600)
    looks = ((ORANGE, "--"), (BLUE, "-"))
    for draws, label, (colour, style) in zip(both, labels, looks, strict=True):
        near = (grid >= draws.min()) & (grid <= draws.max())
        own = np.linspace(grid[near][0], grid[near][-1], 300) if near.sum() > 1 else grid
        height = kernel_density(draws.ravel(), own, _effective(draws))
        height = height / height.max()
        axis.plot(own, height, color=colour, ls=style, lw=1.8, label=label)
        if colour == BLUE:
            ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
            inside = (own >= ends[0]) & (own <= ends[1])
            axis.fill_between(own, 0, height, where=inside, color=BLUE, alpha=0.18, lw=0)
    axis.set_xlim(grid[0], grid[-1])
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_yticks([])


Bar = tuple[str, float, float, float, str, str]  # label, middle, ends, colour, marker


def _ends(both: tuple[ndarray, ndarray], level: float) -> list[Bar]:
    """Medians and equal-tailed intervals; the densities' own labels stand for them."""
    tails = [0.5, (1 - level) / 2, (1 + level) / 2]
    out: list[Bar] = []
    for draws, (colour, mark) in zip(both, ((ORANGE, "v"), (BLUE, "o")), strict=True):
        middle, low, high = map(float, np.quantile(draws, tails))
        out.append(("_", middle, low, high, colour, mark))
    return out


def _rivals(rivals: Sequence[Rival], name: str) -> list[Bar]:
    looks = ((RED, "s"), (GREEN, "D"), (PURPLE, "^"), (GREY, "P"))
    return [
        (one.label, float(one.estimate[list(one.names).index(name)]), *one.ends(name), *look)
        for one, look in zip(rivals, looks, strict=False)
    ]


def _strip(axis: Axes, bars: Sequence[Bar]) -> None:
    """Intervals one under the other, below the densities."""
    low, high = axis.get_xlim()
    for place, (label, middle, lower, upper, colour, mark) in enumerate(bars):
        y = -0.1 - 0.1 * place
        axis.plot([lower, upper], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        axis.plot(middle, y, mark, color=colour, ms=5, label=label)
        low, high = min(low, lower), max(high, upper)
    axis.set_xlim(low, high)
    axis.set_ylim(-0.1 - 0.1 * len(bars), 1.06)
    axis.axhline(0, color=INK, lw=0.8)


def _draws(found: Draws, name: str) -> Float[ndarray, "chains draws"]:
    if not isinstance(found, xr.DataTree):
        return np.atleast_2d(np.asarray(found[name], dtype=float))
    names = [str(n) for n in found["posterior"].dataset["coefficient"].values]
    if name not in names:
        raise ValueError(f"no coefficient {name!r}: there are {', '.join(names)}")
    return np.asarray(draws_of(found)[:, :, names.index(name)])


def _effective(draws: Float[ndarray, "chains draws"]) -> float:
    """How many independent draws these are worth to a density, at least 20."""
    found = float(stats.array_stats.ess(np.ascontiguousarray(draws), chain_axis=0, draw_axis=1))
    return float(min(max(found, 20.0), draws.size)) if np.isfinite(found) else 20.0
