"""Figures of a result, each a function that returns a matplotlib `Figure` and shows nothing.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and line
styles say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from arviz_stats import base as stats
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import ndarray
from scipy.stats import norm, rankdata
from scipy.stats import t as student

from hakari.inference.anderson_rubin import AndersonRubin
from hakari.inference.comparison import PointEstimate
from hakari.inference.diagnostics import draws_of
from hakari.inference.posterior import QuasiPosterior
from hakari.inference.sensitivity import ScaledPrior

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, GREY, PALE = "#222222", "#767676", "#e2e2e2"
WIDTH = 7.2  # inches: a report column
TRACE = 2500  # points of a chain that a trace shows


def posterior_densities(
    result: xr.DataTree,
    posterior: QuasiPosterior | None = None,
    estimates: Sequence[PointEstimate] = (),
    names: Sequence[str] | None = None,
    level: float = 0.9,
) -> Figure:
    """Density of each coefficient, its interval shaded, with the prior and GMM's intervals.

    posterior: where the prior is taken from; estimates: drawn below as point and normal
    interval; names: at most a handful, all when None.
    """
    chosen = list(names or _coefficients(result))
    rows = -(-len(chosen) // 2) if len(chosen) > 1 else 1
    figure = _figure(2.9 * rows + 0.5 * (len(chosen) == 1))
    axes = figure.subplots(rows, min(2, len(chosen)), squeeze=False).ravel()
    for axis, name in zip(axes, chosen, strict=False):
        _density(axis, result, name, level)
        if posterior is not None:
            _prior(axis, posterior, name)
        _intervals(axis, estimates, name, level)
        axis.set_xlabel(f"coefficient of {name}")
        axis.xaxis.set_major_locator(MaxNLocator(8 if len(chosen) == 1 else 5))
    for axis in axes[len(chosen) :]:
        axis.set_axis_off()
    entries = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=5, frameon=False,
        fontsize=8.5, columnspacing=1.4,
    )  # fmt: skip
    return figure


def prior_sensitivity_plot(
    sensitivity: Sequence[ScaledPrior], names: Sequence[str], name: str, level: float = 0.9
) -> Figure:
    """Mean and interval of one coefficient, by the scale of its prior; names: of all K."""
    k = list(names).index(name)
    figure = _figure(0.42 * len(sensitivity) + 1.1)
    axis = figure.subplots()
    for place, one in enumerate(sensitivity):
        if one.refused is not None:
            axis.annotate(
                f"  {one.without}",
                (0.0, place),
                xycoords=("axes fraction", "data"),
                va="center",
                color=GREY,
                style="italic",
            )
            continue
        colour = BLUE if one.asked else INK
        axis.plot([one.lower[k], one.upper[k]], [place, place], color=colour, lw=2.2, zorder=2)
        hollow = "white" if one.notes else colour
        axis.plot(one.mean[k], place, "o", ms=7, color=colour, mfc=hollow, zorder=3)
    axis.set_yticks(range(len(sensitivity)), [_scale_label(s) for s in sensitivity])
    axis.set_ylim(len(sensitivity) - 0.4, -0.6)
    axis.grid(axis="x", color=PALE)
    axis.set_ylabel("scale of the prior")
    hollow = "; hollow: chains need care" if any(s.notes for s in sensitivity) else ""
    axis.set_xlabel(f"coefficient of {name}: mean and {level:.0%} interval{hollow}")
    return figure


def traces(result: xr.DataTree, names: Sequence[str]) -> Figure:
    """Trace of each coefficient, and its ranks over the chains, which should all be level."""
    theta = draws_of(result)
    step = -(-theta.shape[1] // TRACE)
    every = _coefficients(result)
    figure = _figure(1.9 * len(names) + 0.3)
    axes = figure.subplots(len(names), 2, squeeze=False, width_ratios=(3, 2))
    colours = _chain_colours(len(theta))
    for (left, right), name in zip(axes, names, strict=True):
        draws = theta[:, :, every.index(name)]
        for chain, colour in zip(draws, colours, strict=True):
            left.plot(
                np.arange(0, len(chain), step),
                chain[::step],
                color=colour,
                lw=0.5,
                alpha=0.75,
                rasterized=True,
            )
        left.set_ylabel(name)
        left.set_xlim(0, max(draws.shape[1] - 1, 1))
        _ranks(right, draws, colours)
    axes[0, 0].set_title("draws of each chain")
    axes[0, 1].set_title("ranks, a line a chain")
    axes[-1, 0].set_xlabel("draw")
    axes[-1, 1].set_xlabel("rank among all draws")
    return figure


def anderson_rubin_curve(found: AndersonRubin, result: xr.DataTree) -> Figure:
    """The Anderson-Rubin statistic over β with its critical value, above the posterior.

    Values under the critical line are not rejected. Raises ValueError if there is no set.
    """
    if found.note is not None:
        raise ValueError(f"no Anderson-Rubin set: {found.note}")
    draws = _draws(result, found.name)
    low, high = _window(draws)
    finite = [end for piece in found.intervals for end in piece if np.isfinite(end)]
    span = high - low
    near = [end for end in finite if low - span < end < high + span]
    low, high = min([low, *near]) - 0.08 * span, max([high, *near]) + 0.08 * span
    grid = np.linspace(low, high, 500)
    figure = _figure(4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    statistic = found.statistic(grid)
    above.plot(grid, statistic, color=INK, lw=1.8, label="Anderson-Rubin statistic")
    above.axhline(
        found.critical, color=RED, ls="--", lw=1.3, label=f"critical value ({found.level:.0%})"
    )
    inside = statistic <= found.critical
    above.fill_between(grid, 0, statistic, where=inside, color=GREEN, alpha=0.2, lw=0, label="set")
    above.set_ylim(0, min(4 * found.critical, 1.08 * float(np.nanmax(statistic))))
    above.set_ylabel("statistic")
    above.legend(frameon=False, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.2))
    _density(below, result, found.name, found.level, (low, high))
    below.xaxis.set_major_locator(MaxNLocator(8))
    below.legend(frameon=False, loc="upper right")
    below.set_xlabel(f"coefficient of {found.name}")
    return figure


# --- parts --------------------------------------------------------------------------------


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.set_facecolor("white")
    return figure


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_yticks([])


def _density(
    axis: Axes,
    result: xr.DataTree,
    name: str,
    level: float,
    window: tuple[float, float] | None = None,
) -> None:
    """Kernel density with the equal-tailed interval shaded and the mean marked."""
    draws = _draws(result, name)
    low, high = window or _window(draws)
    grid = np.linspace(low, high, 400)
    height = kernel_density(draws, grid, _effective(result, name))
    tails = (1 - level) / 2
    ends = np.quantile(draws, [tails, 1 - tails])
    inside = (grid >= ends[0]) & (grid <= ends[1])
    axis.plot(grid, height, color=BLUE, lw=1.8, label="posterior")
    axis.fill_between(
        grid, 0, height, where=inside, color=BLUE, alpha=0.22, lw=0, label=f"{level:.0%} interval"
    )
    axis.set_xlim(low, high)
    axis.set_ylim(0, 1.08 * float(height.max()))
    axis.set_ylabel("density")
    _bare(axis)


def _prior(axis: Axes, posterior: QuasiPosterior, name: str) -> None:
    density = prior_marginal(posterior, name)
    if density is None:
        return
    grid = np.linspace(*axis.get_xlim(), 400)
    axis.plot(grid, density(grid), color=ORANGE, lw=1.6, ls="--", label="prior")


def _intervals(axis: Axes, estimates: Sequence[PointEstimate], name: str, level: float) -> None:
    """Point estimates with normal intervals, on a strip below the density."""
    if not estimates:
        return
    top, reach = axis.get_ylim()[1], norm.ppf(0.5 + level / 2)
    marks = zip(estimates, ((RED, "s"), (GREEN, "D"), (PURPLE, "^"), (GREY, "v")), strict=False)
    for place, (one, (colour, mark)) in enumerate(marks):
        k = one.names.index(name)
        y = -top * (0.07 + 0.08 * place)
        half = reach * one.std_error[k]
        axis.errorbar(
            one.theta[k], y, xerr=half, fmt=mark, color=colour, ms=5, lw=1.8,
            label=f"{one.label} ± {reach:.3g} s.e.",
        )  # fmt: skip
    axis.set_ylim(-top * (0.08 * len(estimates) + 0.06), top)
    axis.axhline(0, color=INK, lw=0.8)


def _ranks(axis: Axes, draws: Float[ndarray, "chains draws"], colours: list[ndarray]) -> None:
    ranks = rankdata(draws).reshape(draws.shape)
    edges = np.linspace(0.5, draws.size + 0.5, 21)
    expected = draws.shape[1] / 20
    for chain, colour in zip(ranks, colours, strict=True):
        counts, _ = np.histogram(chain, edges)
        axis.stairs(counts / expected, edges, color=colour, lw=1.2, baseline=None)
    axis.axhline(1, color=INK, lw=0.8, ls=":")
    axis.set_ylim(0, max(2.0, axis.get_ylim()[1]))
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.set_ylabel("share / expected")


def _chain_colours(chains: int) -> list[ndarray]:
    """From dark to light of cividis, which is made for colour-blind readers."""
    from matplotlib import colormaps

    return list(colormaps["cividis"](np.linspace(0.05, 0.85, chains)))


def _effective(result: xr.DataTree, name: str) -> float:
    """ArviZ's bulk effective sample size, at least 20."""
    theta = draws_of(result)
    draws = np.ascontiguousarray(theta[:, :, _coefficients(result).index(name)])
    found = float(stats.array_stats.ess(draws, chain_axis=0, draw_axis=1))
    return float(min(max(found, 20.0), draws.size)) if np.isfinite(found) else 20.0


def _coefficients(result: xr.DataTree) -> list[str]:
    return [str(name) for name in result["posterior"].dataset["coefficient"].values]


def _scale_label(one: ScaledPrior) -> str:
    return f"{one.label}  (asked)" if one.asked else one.label


def _draws(result: xr.DataTree, name: str) -> Float[ndarray, " draws"]:
    values: ndarray = draws_of(result)[:, :, _coefficients(result).index(name)].ravel()
    return values


def _window(draws: Float[ndarray, " draws"]) -> tuple[float, float]:
    """Where nearly all draws are; heavy tails may reach further."""
    low, middle, high = np.quantile(draws, [0.003, 0.5, 0.997])
    spread = max(float(high - low), 1e-6 * abs(float(middle)), 1e-12)
    return float(low) - 0.1 * spread, float(high) + 0.1 * spread


def kernel_density(
    draws: Float[ndarray, " draws"], grid: Float[ndarray, " grid"], size: float | None = None
) -> Float[ndarray, " grid"]:
    """Gaussian kernel density, Silverman's bandwidth with the interquartile range as a guard.

    size: number of independent draws that these are worth, all when None; without it, draws
    that repeat look like modes. Draws are binned first, so that many cost nothing.
    """
    quartiles = np.quantile(draws, [0.25, 0.75])
    spread = min(float(draws.std()), float(np.diff(quartiles)[0]) / 1.34) or float(draws.std())
    width = max(spread * (size or len(draws)) ** -0.2, float(np.ptp(grid)) / 400)
    reach = 4 * width
    edges = np.arange(grid[0] - reach, grid[-1] + reach + width / 8, width / 8)
    counts, _ = np.histogram(draws, edges)
    centres = (edges[:-1] + edges[1:]) / 2
    density: ndarray = norm.pdf(grid[:, None], centres, width) @ counts / len(draws)
    return density


def prior_marginal(posterior: QuasiPosterior, name: str) -> Callable[[ndarray], ndarray] | None:
    """The prior's marginal density of one coefficient, or None where it is flat."""
    position = posterior.moments.names.parameters.index(name)
    for block in posterior.blocks:
        if position not in block.positions:
            continue
        k = block.positions.index(position)
        mean, scale = float(block.mean[k]), float(np.linalg.norm(block.factor[k]))
        law = norm(mean, scale) if np.isinf(block.df) else student(block.df, mean, scale)
        return law.pdf  # type: ignore[no-any-return]
    return None
