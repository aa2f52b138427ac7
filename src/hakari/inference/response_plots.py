"""Figures of impulse responses: a fan of bands a panel, as papers show them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
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
PATHS = 6  # of the prior, drawn as lines: they show its smoothness, which no band does
SHADES = ("#d8e8f3", "#a8cce3", "#6fadd3")  # of BLUE, wide to narrow; opaque, as the legend's
SETS = "Anderson-Rubin"
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
    units: Mapping[str, str] | None = None,
    impulses: Mapping[str, str] | None = None,
    estimator: str = "estimate",
    sets_level: float | None = None,
) -> Figure:
    """A panel a response and shock: the line, a joint and a pointwise band, a narrow one.

    level, kind: of the bands, see `ImpulseResponse.bands`; narrow: level of a second pointwise
    band, None for none; prior: its pointwise band and a few of its paths, where it is proper, on a
    scale that holds them; columns: of panels, or else one a shock, and at most three; line:
    `mean` or, for ratios, `median`; unit: of a horizon, such as `months`; units: of responses,
    by name, beside their axes; impulses: shocks in words, by name, as `a rise of rate by 1 point`;
    estimator: what the legend calls the point estimate; sets_level: of the Anderson-Rubin sets.
    Those are dotted, and the point estimate dashed, where there are such. Sets stretch a panel
    to at most three times its bands, and where they are unbounded the panel says so.
    Raises ValueError for an unknown line, and for names in units or impulses that are not there.
    """
    if line not in ("mean", "median"):
        raise ValueError(f"line {line!r}: 'mean' or 'median'")
    words = _Words(line, unit, dict(units or {}), dict(impulses or {}), estimator, sets_level)
    _refuse_unknown(irf, words)
    R, S, _ = irf.draws.shape[1:]
    count = columns or (min(S, 3) if S > 1 else {1: 1, 2: 2, 4: 2}.get(R, 3))
    rows = -(-R * S // count)
    figure = Figure(figsize=(WIDTH, _height(rows, count)), layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots(rows, count, squeeze=False, sharex=True).ravel()
    tables = _tables(irf, level, kind, narrow, prior, sets_level)
    for place, axis in enumerate(axes[: R * S]):
        r, s = divmod(place, S)
        part = {name: _of(table, irf.responses[r], irf.shocks[s]) for name, table in tables.items()}
        _panel(axis, irf, (r, s), part, words)
        _name(axis, irf, (r, s), count, words)
        if place + count >= R * S:
            axis.set_xlabel(f"horizon ({unit})" if unit else "horizon")
            axis.tick_params(labelbottom=True)
    for axis in axes[R * S :]:
        axis.set_axis_off()
    _head(figure, irf, axes[: R * S], words)
    return figure


# --- parts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Words:
    """What a figure is told to call things; see `fan`."""

    line: Line
    unit: str
    units: dict[str, str]
    impulses: dict[str, str]
    estimator: str
    sets_level: float | None

    def of(self, shock: str) -> str:
        """A shock in words."""
        return self.impulses.get(shock, shock)


def _refuse_unknown(irf: ImpulseResponse, words: _Words) -> None:
    for what, given, names in (
        ("units", words.units, (*irf.responses, *irf.shocks)),
        ("impulses", words.impulses, irf.shocks),
    ):
        for name in given:
            if name not in names:
                raise ValueError(f"{what} of {name!r}, which is not here ({', '.join(names)})")


def _tables(
    irf: ImpulseResponse,
    level: float,
    kind: str,
    narrow: float | None,
    prior: bool,
    sets_level: float | None,
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
        at = "" if sets_level is None else f"{sets_level:.0%} "
        tables[f"{SETS}, {at}pointwise"] = whole.merge(irf.anderson_rubin, how="left")
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
    words: _Words,
) -> None:
    r, s = place
    x = np.asarray(irf.horizons, dtype=float)
    draws = irf.draws[:, r, s]
    middle = draws.mean(axis=0) if words.line == "mean" else np.median(draws, axis=0)
    estimate = None if irf.estimate is None else irf.estimate[r, s]
    limits = _limits(bands, middle, estimate)
    joint = not all("pointwise" in label or _guest(label) for label in bands)
    shades = iter(SHADES if joint else SHADES[1:])
    for label, ends in bands.items():
        if label.startswith(SETS):
            _dotted(axis, x, ends, limits, label)
        elif label.startswith("prior"):
            _outlined(axis, x, ends, irf.prior_draws, place, label)
        else:
            _shade(axis, x, ends, next(shades), label)
    axis.axhline(0, color=INK, lw=0.8, zorder=2.6)
    dots: dict[str, Any] = {"marker": "o", "ms": 5} if len(x) == 1 else {}
    axis.plot(x, middle, color=BLUE, lw=1.8, label=f"posterior {words.line}", zorder=4, **dots)
    if estimate is not None:
        look: dict[str, Any] = {"color": RED, "lw": 1.1, "ls": "--", "zorder": 3}
        axis.plot(x, estimate, label=words.estimator, **look, **dots)
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


def _outlined(
    axis: Axes,
    x: ndarray,
    ends: Float[ndarray, "2 H"],
    draws: ndarray | None,
    place: tuple[int, int],
    label: str,
) -> None:
    """Both ends of the prior's band, and some of its paths: a fill would cover all else."""
    if not np.isfinite(ends).any() or draws is None:
        return
    for end, name in zip(ends, (label, "_"), strict=True):
        axis.plot(x, end, color=ORANGE, lw=1.3, label=name, zorder=2.5)
    paths = draws[:, place[0], place[1]]
    # those of heavy tails would leave the panel, which ends where the band does
    inside = ((paths >= ends[0]) & (paths <= ends[1])).all(axis=1)
    chosen = paths[inside][:PATHS].T
    if not chosen.size:
        return
    names = ["paths of the prior", *["_"] * (chosen.shape[1] - 1)]
    axis.plot(
        x, chosen, color=ORANGE, lw=0.6, alpha=0.8, label=names[: chosen.shape[1]], zorder=2.4
    )


def _dotted(
    axis: Axes,
    x: ndarray,
    ends: Float[ndarray, "2 H"],
    limits: tuple[float, float],
    label: str,
) -> None:
    """Both ends of a set; an infinite one leaves the panel, which says so, as does nothing else."""
    far = 3 * (limits[1] - limits[0])
    shown = np.where(np.isinf(ends), np.sign(ends) * (far + np.abs(limits).max()), ends)
    axis.plot(x, shown[0], color=GREEN, ls=":", lw=1.5, label=label, zorder=3)
    axis.plot(x, shown[1], color=GREEN, ls=":", lw=1.5, zorder=3)
    endless = np.isinf(ends).any(axis=0)
    if endless.any():
        where = "" if endless.all() else f" at {_runs(x[endless].astype(int).tolist())}"
        told = textwrap.fill(f"AR set unbounded{where}", 34)
        look: dict[str, Any] = {"color": GREEN, "fontsize": 7.5, "zorder": 5}
        axis.text(0.02, 0.98, told, va="top", transform=axis.transAxes, **look)


def _runs(horizons: list[int]) -> str:
    """Whole numbers as text, those that follow each other as `3 to 5`."""
    runs: list[list[int]] = []
    for h in horizons:
        if runs and h == runs[-1][-1] + 1:
            runs[-1].append(h)
        else:
            runs.append([h])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def _guest(label: str) -> bool:
    """Whether a band is another's than the posterior's."""
    return label.startswith((SETS, "prior"))


def _limits(
    bands: dict[str, Float[ndarray, "2 H"]], middle: ndarray, estimate: ndarray | None
) -> tuple[float, float]:
    """The panel's ends: bands, line, estimate, prior and 0 whole; sets as far as is fair."""
    guests = [ends for label, ends in bands.items() if label.startswith(SETS)]
    hosts = [ends for label, ends in bands.items() if not label.startswith(SETS)]
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
    axis: Axes, irf: ImpulseResponse, place: tuple[int, int], columns: int, words: _Words
) -> None:
    """Names: responses beside their row and shocks above their column, or both on the panel."""
    response, shock = irf.responses[place[0]], words.of(irf.shocks[place[1]])
    title, side = f"{response} to {shock}", words.units.get(response, "")
    if len(irf.shocks) == 1:
        title = response
    elif columns == len(irf.shocks):
        title = f"response to {shock}" if place[0] == 0 else ""
        side = (f"{response} ({side})" if side else response) if place[1] == 0 else ""
    axis.set_ylabel(_plain(side, 30), fontsize=9)
    axis.set_title(_plain(title, {1: 80, 2: 40}.get(columns, 27)), fontsize=9.5)


def _head(figure: Figure, irf: ImpulseResponse, axes: ndarray, words: _Words) -> None:
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
    one = f"response to {words.of(irf.shocks[0])}" if len(irf.shocks) == 1 else ""
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
