"""How often calibrated Gibbs intervals hold the true coefficient, on simulated data.

    python benchmarks/gibbs_coverage.py [--quick] [--replications R] [--out FOLDER]

Median regression in the design of Syring and Martin (2019): y = 2 + x + e, e ~ N(0, 4) and
x + 2 chi-square with 2 degrees of freedom; least squares under errors whose standard deviation
grows with x; a support vector machine of two overlapping classes, whose true coefficients are the
minimiser on two million rows. 80, 90 and 95 % intervals of each coefficient: calibrated at that
level, at learning rate 1, and of the sandwich formula. `error` is the binomial standard error.
Writes results/gibbs_coverage.json and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numba
import numpy as np
from numpy import ndarray
from numpy.random import Generator
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import norm
from threadpoolctl import threadpool_limits

import hakari.inference as hi
from hakari.inference.gibbs import cloud

RESULTS = Path(__file__).parent / "results"
LEVELS = (0.8, 0.9, 0.95)
REPLICATES = 500
PARTICLES = 4096
Answer = dict[str, Any]


@dataclass(frozen=True)
class Design:
    """A loss and how its data are drawn: rows (y (n,), X (n, d)) of n and a generator."""

    name: str
    loss: Any
    draw: Callable[[int, Generator], tuple[ndarray, ndarray]]
    truth: tuple[float, ...] | None = None
    sizes: tuple[int, ...] = (100, 400)


def median_rows(n: int, chance: Generator) -> tuple[ndarray, ndarray]:
    """Syring and Martin's."""
    x = chance.chisquare(2, n) - 2
    return 2 + x + 2 * chance.standard_normal(n), np.column_stack([np.ones(n), x])


def uneven_rows(n: int, chance: Generator) -> tuple[ndarray, ndarray]:
    """Errors whose standard deviation is |x| + 1/2."""
    x = chance.standard_normal(n)
    e = (np.abs(x) + 0.5) * chance.standard_normal(n)
    return 1 + x + e, np.column_stack([np.ones(n), x])


def class_rows(n: int, chance: Generator) -> tuple[ndarray, ndarray]:
    """Two Gaussian classes, unequal in size, two units apart in one of two directions."""
    y = np.where(chance.random(n) < 0.4, 1.0, -1.0)
    x = chance.standard_normal((n, 2)) + y[:, None] * [1.0, 0.0]
    return y, np.column_stack([np.ones(n), x])


DESIGNS = (
    Design("median regression", hi.losses.quantile(0.5), median_rows, (2.0, 1.0)),
    Design("least squares, uneven errors", hi.losses.squared(), uneven_rows, (1.0, 1.0)),
    Design("support vector machine", hi.losses.hinge(), class_rows, sizes=(400,)),
)


def main() -> None:
    """All designs and sizes; print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 samples; writes with --out")
    parser.add_argument("--replications", type=int, help="default 300; 20 with --quick")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    options = parser.parse_args()
    count = options.replications or (20 if options.quick else 300)
    out = options.out or (None if options.quick else RESULTS)
    report: Answer = {
        "command": "python benchmarks/gibbs_coverage.py",
        "device": _device(),
        "replications": count,
        "replicates": REPLICATES,
        "cells": [],
    }
    for design, n in [(each, n) for each in DESIGNS for n in each.sizes]:
        report["cells"].append(study(design, n, count))
        if out:
            out.mkdir(parents=True, exist_ok=True)
            (out / "gibbs_coverage.json").write_text(json.dumps(report, indent=1))
            plot(report, out / "gibbs_coverage.png")
    show(report)


def study(design: Design, n: int, count: int) -> Answer:
    """One design and size."""
    truth = np.array(design.truth or true_minimiser(design))
    jobs = (joblib.delayed(covered)(design, n, seed, truth) for seed in range(count))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{design.name}, n = {n}", total=count)
        found = []
        for one in joblib.Parallel(n_jobs=-1, return_as="generator")(jobs):
            found.append(one)
            bar.advance(task)
    shares = {
        kind: {f"{c:g}": np.mean([f[kind][c] for f in found], axis=0).tolist() for c in LEVELS}
        for kind in found[0]
        if kind not in ("rates", "width")
    }
    return {
        "design": design.name,
        "n": n,
        "truth": truth.tolist(),
        "coverage": shares,
        "error": {f"{c:g}": float(np.sqrt(c * (1 - c) / count)) for c in LEVELS},
        "median rates": np.median([f["rates"] for f in found], axis=0).tolist(),
        "width over the sandwich's": np.median([f["width"] for f in found], axis=0).tolist(),
    }


def true_minimiser(design: Design) -> list[float]:
    """The mean of the minimisers of ten samples of 200,000 rows."""
    found = []
    for seed in range(10):
        rows = design.draw(200_000, np.random.default_rng([seed, 7]))
        found.append(hi.GibbsPosterior(design.loss, rows).minimiser)
    return np.mean(found, axis=0).tolist()


def covered(design: Design, n: int, seed: int, truth: ndarray) -> dict[str, Any]:
    """`intervals_hold` on one thread: the samples are what runs side by side."""
    numba.set_num_threads(1)
    with threadpool_limits(1):
        return intervals_hold(design, n, seed, truth)


def intervals_hold(design: Design, n: int, seed: int, truth: ndarray) -> dict[str, Any]:
    """Whether each interval of one sample holds the truth: kind -> level -> (d,)."""
    gibbs = hi.GibbsPosterior(design.loss, design.draw(n, np.random.default_rng([seed, n])))
    error = np.sqrt(np.diag(gibbs.sandwich.covariance))
    out: dict[str, Any] = {"calibrated": {}, "learning rate 1": {}, "sandwich": {}}
    for level in LEVELS:
        cal = hi.calibrate(gibbs, level, replicates=REPLICATES, seed=seed)
        rates = [f.rate for f in cal.found]
        ends = np.array([interval(gibbs, rate, level)[j] for j, rate in enumerate(rates)])
        out["calibrated"][level] = _holds(ends, truth)
        out["learning rate 1"][level] = _holds(interval(gibbs, 1.0, level), truth)
        half = float(norm.ppf((1 + level) / 2)) * error
        middle = gibbs.minimiser
        out["sandwich"][level] = _holds(np.column_stack([middle - half, middle + half]), truth)
    out["rates"] = rates
    out["width"] = (ends[:, 1] - ends[:, 0]) / (2 * half)
    return out


def interval(gibbs: hi.GibbsPosterior, rate: float, level: float) -> ndarray:
    """Equal-tailed intervals (d, 2) of the posterior on the data themselves, by particles."""
    d = len(gibbs.parameters)
    weights = np.ones((1, gibbs.risk.n), dtype=np.float32)
    mean, covariance = cloud.posterior_form(gibbs, rate, 1.0, gibbs.minimiser[None])
    noise = cloud.uniforms(PARTICLES, d, 0)
    made = cloud.shift(gibbs, weights, mean, 2 * covariance, noise, cloud.Cache(None, ""))
    theta, w = made.centres[0] + made.offsets[0], made.weights(rate)[0]
    tails = [(1 - level) / 2, (1 + level) / 2]
    return np.array([_quantiles(theta[:, j], w, tails) for j in range(d)])


def _quantiles(values: ndarray, weights: ndarray, shares: list[float]) -> ndarray:
    order = np.argsort(values)
    below = np.cumsum(weights[order].astype(float)) - 0.5 * weights[order]
    return np.interp(shares, below, values[order])


def _holds(ends: ndarray, truth: ndarray) -> ndarray:
    return (ends[:, 0] <= truth) & (truth <= ends[:, 1])


def show(report: Answer) -> None:
    """A row a design, size and coefficient."""
    table = Table(title=f"coverage in {report['replications']} samples")
    for head in ("design", "n", "coefficient", "kind", *(f"{c:.0%}" for c in LEVELS)):
        table.add_column(head)
    for cell in report["cells"]:
        for j in range(len(cell["truth"])):
            for kind, shares in cell["coverage"].items():
                cells = [f"{shares[f'{c:g}'][j]:.3f}" for c in LEVELS]
                table.add_row(cell["design"], str(cell["n"]), str(j), kind, *cells)
    Console().print(table)


def plot(report: Answer, path: Path) -> None:
    """Coverage less the level, a panel a design and size."""
    from matplotlib.figure import Figure

    cells = report["cells"]
    figure = Figure(figsize=(2.4 * len(cells) + 1, 3.4), layout="constrained")
    grid = figure.subplots(1, len(cells), sharex=True, sharey=True, squeeze=False)[0]
    for axes, cell in zip(grid, cells, strict=True):
        error = [2 * cell["error"][f"{c:g}"] for c in LEVELS]
        axes.fill_between(LEVELS, np.negative(error), error, color="0.9")
        colours = {"calibrated": "C3", "learning rate 1": "0.6", "sandwich": "C0"}
        for kind, shares in cell["coverage"].items():
            y = np.array([np.array(shares[f"{c:g}"]) - c for c in LEVELS])
            lines = axes.plot(LEVELS, y, "o-", color=colours[kind], markersize=3)
            lines[0].set_label(kind)
        axes.set_title(f"{cell['design']}\nn = {cell['n']}", fontsize=8)
    grid[0].legend(fontsize=7)
    figure.supxlabel("level")
    figure.supylabel("coverage less the level", fontsize=10)
    figure.savefig(path, dpi=130)


def _device() -> Answer:
    names = ("hakari", "numpy", "numba", "scipy")
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "versions": versions}


if __name__ == "__main__":
    main()
