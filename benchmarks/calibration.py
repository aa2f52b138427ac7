"""Seconds and loss evaluations to a calibrated learning rate, by each method, in one run.

    python benchmarks/calibration.py [--quick] [--fresh] [--out FOLDER] [--only N,D ...]

Median regression, y = x'1 + sigma e with e and x standard normal, n from 10^2 to 10^5, d from 1 to
20; sigma is 2, and in two more cells 0.2 and 100, which are other units of y. Every method gets the
same bootstrap data sets and calibrates the 95 % highest posterior density region.

`gpc` (Syring and Martin) and `gpc-wp` (weighted particles) are as published: they begin at rate
0.5, step by Kesten's rule, stop within half a percent of coverage, and simulate chains of about
2,000 steps and 600 of burn-in for each data set (10,000 at d = 20), by hakari's compiled loss.
`gpc-smc` tempers 512 particles, where it takes less than minutes. `cloud` and `shift` are hakari's
own, of which `auto` picks one; they know the large-sample rate, as `calibrate` does.

Accuracy: `monte carlo` is the standard deviation of log rate that a method states for the particles
that it has. `gpc's over it` is gpc's seconds over the method's; `at equal accuracy` is that times
(gpc's monte carlo / the method's)^2, since the square of an error falls with the draws paid for.
`agrees` is |log(rate / gpc's)| in units of both errors together, that which the data sets share
left out, and half a percent of coverage, gpc's tolerance, put in. The number of data sets is 500,
and less where simulating them at every step takes too long; then it is less for all methods.
Compilation is done before. A cell that is in the result file is kept unless --fresh.
Writes results/calibration.json and .png.
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
from hakari.inference.gibbs.calibration import NoRateError

RESULTS = Path(__file__).parent / "results"
CELLS = ((100, 1, 2.0), (100, 2, 2.0), (1000, 2, 2.0), (1000, 2, 0.2), (1000, 2, 100.0),
         (1000, 5, 2.0), (10_000, 1, 2.0), (10_000, 5, 2.0), (1000, 20, 2.0), (10_000, 20, 2.0),
         (100_000, 5, 2.0))  # fmt: skip
METHODS = ("gpc", "gpc-wp", "gpc-smc", "cloud", "shift")
BUDGET = 4.5e11  # losses of single rows that gpc may take in a cell, about
STEPS = 15  # of gpc, as a first guess
START = 0.5  # rate at which gpc and gpc-wp begin
SLOPE = 0.1146  # of coverage in log rate at 95 %, by the normal law: what gpc's tolerance means
Answer = dict[str, Any]


def main() -> None:
    """Run the cells that are wanted and missing; print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small cell; writes with --out")
    parser.add_argument("--fresh", action="store_true", help="forget the cells that are there")
    parser.add_argument("--only", nargs="*", help="cells, such as 1000,5")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    options = parser.parse_args()
    cells = [(100, 2, 2.0)] if options.quick else list(CELLS)
    if options.only:
        cells = [c for c in CELLS if f"{c[0]},{c[1]}" in options.only]
    out = options.out or (None if options.quick else RESULTS)
    report = _stored(out) if out and not options.fresh else _empty()
    warm_up()
    for cell in cells:
        if any((c["n"], c["d"], c["sigma"]) == cell for c in report["cells"]):
            continue
        report["cells"].append(measure(*cell, 200 if options.quick else replicates(*cell[:2])))
        report["goals"] = goals(report["cells"])
        if out:
            out.mkdir(parents=True, exist_ok=True)
            (out / "calibration.json").write_text(json.dumps(report, indent=1))
            plot(report, out / "calibration.png")
    show(report)


def replicates(n: int, d: int) -> int:
    """Data sets of a cell: 500, or what the budget leaves, at least 100."""
    steps = 600 + particles(d) * max(4, 2 * d)
    return int(min(500, max(200, BUDGET / (n * steps * STEPS))))


def particles(d: int) -> int:
    """Kept draws of a chain of gpc and gpc-wp; `calibrate` makes max(4, 2 d) steps for each."""
    return 512 if d <= 5 else 256


def data(n: int, d: int, sigma: float) -> hi.GibbsPosterior:
    """The cell's regression."""
    chance = np.random.default_rng([n, d])
    X = np.column_stack([np.ones(n), chance.standard_normal((n, d - 1))])
    y = X.sum(axis=1) + sigma * chance.standard_normal(n)
    return hi.GibbsPosterior(hi.losses.quantile(0.5), (y, X))


def warm_up() -> None:
    """Compile what every method needs."""
    for method in METHODS:
        calibrate(data(60, 2, 2.0), method, 200)


def calibrate(gibbs: hi.GibbsPosterior, method: Any, B: int) -> hi.Calibration:
    """One call, as a user writes it."""
    more: Answer = {}
    if method in ("gpc", "gpc-wp"):
        more = {"start": START, "particles": particles(len(gibbs.parameters))}
    elif method == "gpc-smc":
        more = {"particles": 512}
    fresh = hi.GibbsPosterior(gibbs.loss, gibbs.rows)  # nothing is known of it yet
    return hi.calibrate(fresh, region="hpd", replicates=B, method=method, seed=1, **more)


def methods_of(n: int, d: int) -> list[str]:
    """Those that a cell is for: one set of particles up to 5 coefficients, tempering if small."""
    left_out = {"cloud"} if d > 5 else set()
    left_out |= {"gpc-smc"} if n * d > 5000 else set()
    return [m for m in METHODS if m not in left_out]


def measure(n: int, d: int, sigma: float, B: int) -> Answer:
    """All methods on one data set."""
    gibbs = data(n, d, sigma)
    cell: Answer = {"n": n, "d": d, "sigma": sigma, "replicates": B, "methods": {}}
    for method in methods_of(n, d):
        began = time.perf_counter()
        try:
            found: Any = calibrate(gibbs, method, B)
        except NoRateError as error:
            found = error
        seconds = time.perf_counter() - began
        (one,) = found.found
        cell["methods"][method] = {
            "seconds": seconds,
            "evaluations": one.evaluations,
            "simulations": one.simulations,
            "rate": one.rate,  # NaN where none was found
            "interval": list(one.interval),
            "monte_carlo": one.monte_carlo,
            "lost": float(one.lost.mean()),
            "solved": bool(one.solved),
        }
        said = f"n={n} d={d} sigma={sigma:g} {method}: {seconds:.2f} s, rate {one.rate:.4g}"
        Console(stderr=True).print(said, one.simulations, one.solved, one.monte_carlo)
    cell["auto"] = "cloud" if d <= 5 else "shift"
    gpc = cell["methods"]["gpc"]
    for found in cell["methods"].values():
        compare(found, gpc)
    return cell


def compare(found: Answer, gpc: Answer) -> None:
    """Put in how a method stands to gpc."""
    found["ratio"] = gpc["seconds"] / found["seconds"]
    found["evaluations_ratio"] = gpc["evaluations"] / found["evaluations"]
    found["equal"] = found["ratio"] * (gpc["monte_carlo"] / found["monte_carlo"]) ** 2
    tolerance = 0.0 if found is gpc else 0.005 / SLOPE
    error = np.sqrt(found["monte_carlo"] ** 2 + gpc["monte_carlo"] ** 2 + tolerance**2)
    found["agrees"] = float(abs(np.log(found["rate"] / gpc["rate"])) / error)


def goals(cells: list[Answer]) -> list[Answer]:
    """Goals of the design, each with the worst cell that it is about."""
    best = [(c, c["methods"][c["auto"]]["equal"]) for c in cells]
    found = [
        (
            "gpc-wp, times as fast as gpc at equal accuracy",
            10,
            min(c["methods"]["gpc-wp"]["equal"] for c in cells),
        ),
        (
            "hakari, times as fast as gpc at equal accuracy, d <= 5",
            100,
            _least([r for c, r in best if c["d"] <= 5]),
        ),
        (
            "hakari, times as fast as gpc at equal accuracy, d = 20",
            10,
            _least([r for c, r in best if c["d"] == 20]),
        ),
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
    for head in ("n", "d", "sigma", "B", "method", "seconds", "gpc's over it", "at equal accuracy",
                 "evaluations", "rate", "90 % interval", "monte carlo", "agrees"):  # fmt: skip
        table.add_column(head, justify="left" if head == "method" else "right")
    for cell in report["cells"]:
        for name, m in cell["methods"].items():
            low, high = m["interval"]
            table.add_row(
                f"{cell['n']:,}",
                str(cell["d"]),
                f"{cell['sigma']:g}",
                str(cell["replicates"]),
                name + (" (auto)" if name == cell["auto"] else ""),
                f"{m['seconds']:.2f}",
                f"{m['ratio']:.1f}",
                f"{m['equal']:.1f}",
                f"{m['evaluations']:.2g}",
                f"{m['rate']:.4g}" + ("" if m["solved"] else " (not found)"),
                f"{low:.3g} to {high:.3g}",
                f"{m['monte_carlo']:.3f}",
                f"{m['agrees']:.1f}",
            )
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    for goal in report["goals"]:
        console.print(f"{goal['name']}: {goal['got']:.3g} (goal {goal['goal']:g})")


def plot(report: Answer, path: Path) -> None:
    """Seconds of each method in each cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    cells = report["cells"]
    labels = [
        f"{c['n']:,}\nd = {c['d']}" + (f"\nσ = {c['sigma']:g}" if c["sigma"] != 2 else "")
        for c in cells
    ]
    colours = {"cloud": "C3", "shift": "C1", "gpc": "0.2", "gpc-wp": "0.5", "gpc-smc": "0.7"}
    for name, colour in colours.items():
        y = [c["methods"].get(name, {}).get("seconds", np.nan) for c in cells]
        axes.plot(range(len(cells)), y, "o", color=colour, label=name)
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
