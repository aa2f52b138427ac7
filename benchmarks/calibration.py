"""Seconds and loss evaluations to a calibrated learning rate, by each method, in one run.

    python benchmarks/calibration.py [--quick] [--out FOLDER] [--only N,D ...]

Median regression, y = x'1 + 2 e with e and x standard normal, n from 10^2 to 10^5, d from 1 to 20.
Every method gets the same bootstrap data sets and calibrates the 95 % highest posterior density
region from the same start, the large-sample rate of the data. `gpc` (Syring and Martin) and
`gpc-wp` (weighted particles) simulate as many draws for each data set as `calibrate` does unless
told otherwise, with the same compiled loss; `gpc-smc` tempers; `cloud` and `shift` are hakari's
own, of which `auto` picks one.

The number of data sets is 500, and less where simulating them at every step would take too long:
then it is less for all methods, and the first four columns say so. `agrees` is |log(rate / that of
gpc)| in units of the two stated standard errors, which share the data sets; seconds are of the
whole call. `ratio` is gpc's seconds over the method's. Compilation is done before. A cell that
exists already in the result file is kept unless --fresh. Writes results/calibration.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import hakari.inference as hi

RESULTS = Path(__file__).parent / "results"
CELLS = ((100, 1), (100, 2), (1000, 2), (1000, 5), (10_000, 1), (10_000, 5), (1000, 20),
         (10_000, 20), (100_000, 5))  # fmt: skip
METHODS = ("gpc", "gpc-wp", "gpc-smc", "cloud", "shift")
BUDGET = 2.5e11  # losses of single rows that gpc may take in a cell, about
STEPS = 12  # of gpc, as a first guess
DRAWS = 3000  # of gpc for each data set and step, about, burn-in included
Answer = dict[str, Any]


def main() -> None:
    """Run the cells that are wanted and missing; print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small cell; writes with --out")
    parser.add_argument("--fresh", action="store_true", help="forget the cells that are there")
    parser.add_argument("--only", nargs="*", help="cells, such as 1000,5")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    options = parser.parse_args()
    cells = [(100, 2)] if options.quick else list(CELLS)
    if options.only:
        cells = [(int(a), int(b)) for a, b in (text.split(",") for text in options.only)]
    out = options.out or (None if options.quick else RESULTS)
    report = _stored(out) if out and not options.fresh else _empty()
    warm_up()
    for n, d in cells:
        if any(cell["n"] == n and cell["d"] == d for cell in report["cells"]):
            continue
        report["cells"].append(measure(n, d, 100 if options.quick else replicates(n)))
        report["cells"].sort(key=lambda cell: (cell["n"], cell["d"]))
        report["goals"] = goals(report["cells"])
        if out:
            out.mkdir(parents=True, exist_ok=True)
            (out / "calibration.json").write_text(json.dumps(report, indent=1))
            plot(report, out / "calibration.png")
    show(report)


def replicates(n: int) -> int:
    """Data sets of a cell: 500, or what the budget leaves, at least 200."""
    return int(min(500, max(200, BUDGET / (n * DRAWS * STEPS))))


def data(n: int, d: int, seed: int) -> hi.GibbsPosterior:
    """The cell's regression."""
    chance = np.random.default_rng([n, d, seed])
    X = np.column_stack([np.ones(n), chance.standard_normal((n, d - 1))])
    y = X.sum(axis=1) + 2 * chance.standard_normal(n)
    return hi.GibbsPosterior(hi.losses.quantile(0.5), (y, X))


def warm_up() -> None:
    """Compile what every method needs."""
    for method in METHODS:
        calibrate(data(60, 2, 1), method, 200)


def calibrate(gibbs: hi.GibbsPosterior, method: Any, B: int) -> hi.Calibration:
    """One call, as a user writes it."""
    prior = hi.Normal(0.0, 100.0**2) if method == "gpc-smc" else hi.Flat()
    gibbs = hi.GibbsPosterior(gibbs.loss, gibbs.rows, prior, names=gibbs.names)
    return hi.calibrate(gibbs, region="hpd", replicates=B, method=method, seed=1)


def measure(n: int, d: int, B: int) -> Answer:
    """All methods on one data set."""
    gibbs = data(n, d, 0)
    methods = [m for m in METHODS if m != "cloud" or d <= 5]
    cell: Answer = {"n": n, "d": d, "replicates": B, "auto": "", "methods": {}}
    for method in methods:
        began = time.perf_counter()
        found = calibrate(gibbs, method, B)
        seconds = time.perf_counter() - began
        (one,) = found.found
        cell["methods"][method] = {
            "seconds": seconds,
            "evaluations": one.evaluations,
            "simulations": one.simulations,
            "rate": one.rate,
            "interval": list(one.interval),
            "monte_carlo": one.monte_carlo,
            "lost": float(one.lost.mean()),
            "solved": one.solved,
        }
        Console(stderr=True).print(f"n={n} d={d} {method}: {seconds:.2f} s, rate {one.rate:.4g}")
    cell["auto"] = "cloud" if d <= 5 else "shift"
    gpc = cell["methods"]["gpc"]
    for found in cell["methods"].values():
        found["ratio"] = gpc["seconds"] / found["seconds"]
        found["evaluations_ratio"] = gpc["evaluations"] / found["evaluations"]
        error = np.hypot(found["monte_carlo"], gpc["monte_carlo"])
        found["agrees"] = float(abs(np.log(found["rate"] / gpc["rate"])) / max(error, 1e-12))
    return cell


def goals(cells: list[Answer]) -> list[Answer]:
    """Goals of the design, each with the worst cell that it is about."""
    best = [(c, c["methods"][c["auto"]]["ratio"]) for c in cells]
    found = [
        ("gpc-wp, times as fast as gpc", 10, min(c["methods"]["gpc-wp"]["ratio"] for c in cells)),
        ("hakari, times as fast as gpc, d <= 5", 100, _least([r for c, r in best if c["d"] <= 5])),
        ("hakari, times as fast as gpc, d = 20", 10, _least([r for c, r in best if c["d"] == 20])),
    ]
    out = [
        {"name": name, "goal": goal, "got": got, "met": bool(got >= goal)}
        for name, goal, got in found
        if np.isfinite(got)
    ]
    big = [c for c in cells if (c["n"], c["d"], c["replicates"]) == (10_000, 5, 500)]
    for cell in big:
        seconds = cell["methods"][cell["auto"]]["seconds"]
        name = "hakari, seconds at n = 10^4, d = 5, 500 data sets"
        out.append({"name": name, "goal": 5.0, "got": seconds, "met": bool(seconds <= 5)})
    return out


def _least(values: list[float]) -> float:
    return min(values, default=float("nan"))


def show(report: Answer) -> None:
    """The report as tables."""
    table = Table(title="median regression, 95 % HPD region")
    for head in ("n", "d", "B", "method", "seconds", "gpc's over it", "evaluations", "rate",
                 "90 % interval", "agrees"):  # fmt: skip
        table.add_column(head, justify="left" if head == "method" else "right")
    for cell in report["cells"]:
        for name, m in cell["methods"].items():
            low, high = m["interval"]
            table.add_row(
                f"{cell['n']:,}",
                str(cell["d"]),
                str(cell["replicates"]),
                name + (" (auto)" if name == cell["auto"] else ""),
                f"{m['seconds']:.2f}",
                f"{m['ratio']:.1f}",
                f"{m['evaluations']:.2g}",
                f"{m['rate']:.4g}" + ("" if m["solved"] else " (not found)"),
                f"{low:.3g} to {high:.3g}",
                f"{m['agrees']:.1f}",
            )
    console = Console()
    console.print(table)
    for goal in report["goals"]:
        console.print(f"{goal['name']}: {goal['got']:.3g} (goal {goal['goal']:g})")


def plot(report: Answer, path: Path) -> None:
    """Seconds of each method in each cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    cells = report["cells"]
    labels = [f"{c['n']:,}\nd = {c['d']}" for c in cells]
    colours = {"cloud": "C3", "shift": "C1", "gpc": "0.2", "gpc-wp": "0.5", "gpc-smc": "0.7"}
    for name, colour in colours.items():
        y = [c["methods"].get(name, {}).get("seconds", np.nan) for c in cells]
        axes.plot(range(len(cells)), y, "o-", color=colour, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cells)), labels, fontsize=8)
    axes.set_ylabel("seconds to a calibrated rate")
    axes.set_xlabel("rows and coefficients")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _stored(out: Path) -> Answer:
    path = out / "calibration.json"
    if not path.exists():
        return _empty()
    report: Answer = json.loads(path.read_text())
    return report if report["device"] == _device() else _empty()


def _empty() -> Answer:
    return {"command": "python benchmarks/calibration.py", "device": _device(), "cells": [],
            "goals": []}  # fmt: skip


def _device() -> Answer:
    names = ("hakari", "numpy", "numba", "scipy")
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "versions": versions}  # fmt: skip


if __name__ == "__main__":
    main()
