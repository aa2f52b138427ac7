"""Figures of impulse responses: a fan of bands a panel, as papers show them."""

from __future__ import annotations

import textwrap
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import ndarray

from hakari.inference.impulse_response import ImpulseResponse
from hakari.inference.plots import BLUE, GREEN, INK, ORANGE, PALE, RED, WIDTH

Line = Literal["mean", "median"]
SHADES = ("#d8e8f3", "#a8cce3", "#6fadd3")  # of BLUE, wide to narrow; opaque, as the legend's
_NAMES = {
    "sup-t": "simultaneous (sup-t)",
    "quantile": "simultaneous (quantile)",
    "bonferroni": "simultaneous (Bonferroni)",
    "sidak": "simultaneous (Šidák)",
    "highest-density": "highest density",
}


def fan(
    irf: ImpulseResponse,
    level: float = 0.9,
    kind: str = "sup-t",
    narrow: float | None = 0.68,
    *,
    prior: bool = False,
    columns: int | None = None,
    line: Line = "mean",
    unit: str = "",
) -> Figure:
    """A panel a response and shock: the line, a joint and a pointwise band, a narrow one.

    level, kind: of the bands, see `ImpulseResponse.bands`; narrow: level of a second pointwise
    band, None for none; prior: its pointwise band, hatched, where it is proper; columns: of
    panels; line: `mean` or, for ratios, `median`; unit: of a horizon, such as `months`.
    Anderson-Rubin sets are dotted and the point estimate dashed, where there are such. Neither
    they nor the prior stretch a panel to more than three times its bands: they leave it.
    """
    if line not in ("mean", "median"):
        raise ValueError(f"line {line!r}: 'mean' or 'median'")
    R, S, _ = irf.draws.shape[1:]
    count = columns or (min(S, 3) if S > 1 else {1: 1, 2: 2, 4: 2}.get(R, 3))
    rows = -(-R * S // count)
    figure = Figure(figsize=(WIDTH, _height(rows, count)), layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots(rows, count, squeeze=False, sharex=True).ravel()
    tables = _tables(irf, level, kind, narrow, prior)
    for place, axis in enumerate(axes[: R * S]):
        r, s = divmod(place, S)
        part = {name: _of(table, irf.responses[r], irf.shocks[s]) for name, table in tables.items()}
        _panel(axis, irf, (r, s), part, line)
        _name(axis, irf, (r, s), count, first=place % count == 0)
        if place + count >= R * S:
            axis.set_xlabel(f"horizon ({unit})" if unit else "horizon")
            axis.tick_params(labelbottom=True)
    for axis in axes[R * S :]:
        axis.set_axis_off()
    _head(figure, irf, axes[: R * S])
    return figure


# --- parts --------------------------------------------------------------------------------


def _tables(
    irf: ImpulseResponse, level: float, kind: str, narrow: float | None, prior: bool
) -> dict[str, pd.DataFrame]:
    """Bands by the label that the legend gives them, widest first."""
    tables = {}
    if prior and irf.prior_draws is not None:
        own = ImpulseResponse(irf.prior_draws, irf.responses, irf.shocks, irf.horizons)
        tables[f"prior, {level:.0%} pointwise"] = own.bands(level, "pointwise")
    if kind != "pointwise":
        tables[f"{level:.0%} {_NAMES.get(kind, kind)}"] = irf.bands(level, kind)
    tables[f"{level:.0%} pointwise"] = irf.bands(level, "pointwise")
    if narrow is not None:
        tables[f"{narrow:.0%} pointwise"] = irf.bands(narrow, "pointwise")
    if irf.anderson_rubin is not None:
        whole = irf.bands(level, "pointwise")[["response", "shock", "horizon"]]
        tables["Anderson-Rubin"] = whole.merge(irf.anderson_rubin, how="left")
    return tables


def _of(table: pd.DataFrame, response: str, shock: str) -> Float[ndarray, "2 H"]:
    """Lower and upper ends of one panel."""
    mine = table[(table["response"] == response) & (table["shock"] == shock)]
    ends: ndarray = mine[["lower", "upper"]].to_numpy(dtype=float).T
    return ends


def _panel(
    axis: Axes,
    irf: ImpulseResponse,
    place: tuple[int, int],
    bands: dict[str, Float[ndarray, "2 H"]],
    line: Line,
) -> None:
    r, s = place
    x = np.asarray(irf.horizons, dtype=float)
    draws = irf.draws[:, r, s]
    middle = draws.mean(axis=0) if line == "mean" else np.median(draws, axis=0)
    estimate = None if irf.estimate is None else irf.estimate[r, s]
    limits = _limits(bands, middle, estimate)
    joint = not all("pointwise" in label or _guest(label) for label in bands)
    shades = iter(SHADES if joint else SHADES[1:])
    for label, ends in bands.items():
        if label == "Anderson-Rubin":
            _dotted(axis, x, ends, limits, label)
        elif label.startswith("prior"):
            _hatched(axis, x, ends, label)
        else:
            _shade(axis, x, ends, next(shades), label)
    axis.axhline(0, color=INK, lw=0.8, zorder=2.6)
    dots: dict[str, Any] = {"marker": "o", "ms": 5} if len(x) == 1 else {}
    axis.plot(x, middle, color=BLUE, lw=1.8, label=f"posterior {line}", zorder=4, **dots)
    if estimate is not None:
        axis.plot(x, estimate, color=RED, lw=1.1, ls="--", label="estimate", zorder=3, **dots)
    axis.set_ylim(*limits)
    _dress(axis, x)


def _dress(axis: Axes, x: Float[ndarray, " H"]) -> None:
    """Limits, grid, and ticks at even parts of a year of months or quarters."""
    span = x[-1] - x[0]
    axis.set_xlim(x[0] - 0.5 * (span == 0), x[-1] + 0.5 * (span == 0))
    step = next((s for s in (1, 2, 4, 6, 12, 24, 48) if span <= 5 * s), 120)
    axis.set_xticks(np.arange(-(-x[0] // step) * step, x[-1] + 1, step))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.grid(axis="y", color=PALE, lw=0.6, zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5)


def _shade(axis: Axes, x: ndarray, ends: Float[ndarray, "2 H"], colour: str, label: str) -> None:
    """A band; a single horizon is a bar, since between one point there is no area."""
    at, sides = (x, ends) if len(x) > 1 else (x[0] + np.array([-0.2, 0.2]), np.tile(ends, 2))
    axis.fill_between(at, *sides, color=colour, lw=0, label=label, zorder=2)


def _hatched(axis: Axes, x: ndarray, ends: Float[ndarray, "2 H"], label: str) -> None:
    """Hatched behind the bands, faint since it often fills the panel; outlined before them."""
    if not np.isfinite(ends).any():
        return
    hatch: dict[str, Any] = {"hatch": "//", "lw": 0.0, "alpha": 0.45}
    axis.fill_between(x, *ends, facecolor="none", edgecolor=ORANGE, label=label, zorder=1, **hatch)
    axis.plot(x, ends.T, color=ORANGE, lw=1.0, zorder=2.5)


def _dotted(
    axis: Axes,
    x: ndarray,
    ends: Float[ndarray, "2 H"],
    limits: tuple[float, float],
    label: str,
) -> None:
    """Both ends of a set; an infinite one leaves the panel, since lines break at infinity."""
    far = 3 * (limits[1] - limits[0])
    shown = np.where(np.isinf(ends), np.sign(ends) * (far + np.abs(limits).max()), ends)
    axis.plot(x, shown[0], color=GREEN, ls=":", lw=1.5, label=label, zorder=3)
    axis.plot(x, shown[1], color=GREEN, ls=":", lw=1.5, zorder=3)


def _guest(label: str) -> bool:
    """Whether a band is another's than the posterior's."""
    return label == "Anderson-Rubin" or label.startswith("prior")


def _limits(
    bands: dict[str, Float[ndarray, "2 H"]], middle: ndarray, estimate: ndarray | None
) -> tuple[float, float]:
    """The panel's ends: bands, line, estimate and 0 whole; sets and prior as far as is fair."""
    guests = [ends for label, ends in bands.items() if _guest(label)]
    hosts = [ends for label, ends in bands.items() if not _guest(label)]
    hosts += [middle] if estimate is None else [middle, estimate]
    inner = np.concatenate([np.ravel(v) for v in hosts])
    inner = inner[np.isfinite(inner)]
    low, high = min(inner.min(initial=0.0), 0.0), max(inner.max(initial=0.0), 0.0)
    span = (high - low) or 1.0
    outer = np.concatenate([np.ravel(v) for v in guests]) if guests else np.zeros(0)
    outer = outer[np.isfinite(outer)].clip(low - span, high + span)
    low, high = outer.min(initial=low), outer.max(initial=high)
    edge = 0.05 * ((high - low) or 1.0)
    return float(low - edge), float(high + edge)


def _name(
    axis: Axes, irf: ImpulseResponse, place: tuple[int, int], columns: int, first: bool
) -> None:
    """Names: responses beside their row and shocks above their column, or both on the panel."""
    response, shock = irf.responses[place[0]], irf.shocks[place[1]]
    title = f"{response} to {shock}"
    if len(irf.shocks) == 1:
        title = response
    elif columns == len(irf.shocks):
        title = f"response to {shock}" if place[0] == 0 else ""
        if first:
            axis.set_ylabel(_plain(response, 30))
    axis.set_title(_plain(title, {1: 80, 2: 40}.get(columns, 27)), fontsize=9.5)


def _head(figure: Figure, irf: ImpulseResponse, axes: ndarray) -> None:
    """The legend outside the panels, the title above it."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    ncols = len(entries) if len(entries) <= 4 else -(-len(entries) // 2)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=ncols, frameon=False,
        fontsize=8.5, columnspacing=1.4,
    )  # fmt: skip
    one = f"response to {irf.shocks[0]}" if len(irf.shocks) == 1 else ""
    title = ": ".join(part for part in (irf.title, one) if part)
    if title:
        figure.suptitle(_plain(title, 70), fontsize=11)


def _height(rows: int, columns: int) -> float:
    """Panels about three wide to two high, and room for title and legend."""
    each = {1: 3.2, 2: 2.3}.get(columns, 1.9)
    return each * rows + 0.9


def _plain(name: str, width: int) -> str:
    """A name as it is, since a dollar sign would open a formula, in lines of at most `width`."""
    return "\n".join(textwrap.wrap(name.replace("$", r"\$"), width))
