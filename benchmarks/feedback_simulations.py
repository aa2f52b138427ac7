"""Bias and RMSE of both effects, by each estimator and baseline, in simulations like the paper's.

    python benchmarks/feedback_simulations.py [--quick] [--replications R] [--out FOLDER]

Effects (0.5, 0.4). 100 covariates, a Gaussian copula in (0, 1) with neighbours correlated by 0.3,
of which three matter; nonlinear means and log variances; skewed shocks, centred and scaled
chi-square with 4 degrees of freedom; R, the mean's variance over the shock's, 1 and 4; n from 5,000
to 20,000. (arXiv 2511.05050 describes such a design; its numbers were not read.)

Estimators: `moments` in five passes and in one, and `online-qml`, on 200 random Fourier features
whose length scales are learned; the same two on polynomials of degree 2 without products (`SEM-PAB`
has such a form); `single-equation` least squares. `rmse` is over the efficiency bound of the
design's own variance ratio, √n RMSE / √AVar; `coverage` of 95 % intervals. A cell that is in the
result file is kept unless --fresh. Writes results/feedback_simulations.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numba
import numpy as np
from numpy import ndarray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import norm
from threadpoolctl import threadpool_limits

import hakari.inference as hi
from hakari.inference.bidirectional.structure import efficient_variance

RESULTS = Path(__file__).parent / "results"
EFFECTS = (0.5, 0.4)
COVARIATES = 100
CELLS = [(n, R) for R in (1, 4) for n in (5000, 10_000, 20_000)]
ESTIMATORS = (
    "moments",
    "moments, one pass",
    "online-qml",
    "moments, polynomial",
    "online-qml, polynomial",
    "single-equation",
)
Answer = dict[str, Any]


def main() -> None:
    """All cells that are wanted and missing; print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 samples; writes with --out")
    parser.add_argument("--fresh", action="store_true", help="forget the cells that are there")
    parser.add_argument("--replications", type=int, help="default 100; 4 with --quick")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    options = parser.parse_args()
    count = options.replications or (4 if options.quick else 100)
    out = options.out or (None if options.quick else RESULTS)
    report = _stored(out, count) if out and not options.fresh else _empty(count)
    for n, R in CELLS[:1] if options.quick else CELLS:
        if any((cell["n"], cell["R"]) == (n, R) for cell in report["cells"]):
            continue
        report["cells"].append(study(n, R, count))
        if out:
            write(report, out)
    report["goals"] = goals(report)
    if out:
        write(report, out)
    show(report)


def draw(n: int, R: float, seed: int) -> tuple[dict[str, ndarray], ndarray]:
    """A sample as columns, and the variance ratio of its rows."""
    chance = np.random.default_rng([n, int(R), seed])
    z = chance.standard_normal((n, COVARIATES))
    for k in range(1, COVARIATES):
        z[:, k] = 0.3 * z[:, k - 1] + np.sqrt(1 - 0.09) * z[:, k]
    x = norm.cdf(z)
    f1 = np.sin(2 * np.pi * x[:, 0]) + 2 * x[:, 1] * x[:, 2]
    f2 = 4 * (x[:, 1] - 0.5) ** 2 + np.cos(np.pi * x[:, 2])
    h1 = 1.2 * np.sin(2 * np.pi * x[:, 0]) + x[:, 1]
    h2 = 3 * (x[:, 1] - 0.5) - np.cos(2 * np.pi * x[:, 2])
    s1, s2 = (np.exp(h / 2) / np.sqrt(np.exp(h).mean() * R / f.var())
              for h, f in ((h1, f1), (h2, f2)))  # fmt: skip
    e1, e2 = (chance.chisquare(4, (2, n)) - 4) / np.sqrt(8)
    u1, u2 = f1 + s1 * e1, f2 + s2 * e2
    a, b = EFFECTS
    y = {"y1": (u1 + a * u2) / (1 - a * b), "y2": (u2 + b * u1) / (1 - a * b)}
    return y | {f"x{k}": x[:, k] for k in range(COVARIATES)}, s1**2 / s2**2


def study(n: int, R: float, count: int) -> Answer:
    """One cell."""
    jobs = (joblib.delayed(once)(n, R, seed) for seed in range(count))
    found = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"n = {n}, R = {R}", total=count)
        for one in joblib.Parallel(n_jobs=-1, return_as="generator")(jobs):
            found.append(one)
            bar.advance(task)
    bound = np.sqrt(np.mean([one["bound"] for one in found], axis=0))
    cell: Answer = {"n": n, "R": R, "bound": bound.tolist(), "estimators": {}}
    for name in ESTIMATORS:
        errors = np.array([one[name][0] for one in found]) - EFFECTS
        inside = np.abs(errors) < 1.96 * np.array([one[name][1] for one in found])
        given = np.isfinite(errors).all(axis=1)
        errors = errors[given]
        rmse = np.sqrt((errors**2).mean(axis=0))
        spread = (errors**2).std(axis=0) / np.sqrt(len(errors)) / (2 * rmse)
        cell["estimators"][name] = {
            "given": float(given.mean()),
            "bias": errors.mean(axis=0).tolist(),
            "rmse": rmse.tolist(),
            "rmse_over_bound": (rmse / bound).tolist(),
            "error_of_ratio": (spread / bound).tolist(),
            "coverage": inside[given].mean(axis=0).tolist(),
        }
    return cell


def once(n: int, R: float, seed: int) -> Answer:
    """Every estimator on one sample: (estimate, standard errors), on one thread."""
    numba.set_num_threads(1)
    with threadpool_limits(1):
        data, rho = draw(n, R, seed)
        waves = hi.RandomFourier(200, seed=1)
        powers = hi.Polynomial(2, interactions=False)
        settings: dict[str, Answer] = {
            "moments": {"features": waves},
            "moments, one pass": {"features": waves, "warm_up": 2500, "half_life": 1e12},
            "online-qml": {"features": waves, "method": "online-qml"},
            "moments, polynomial": {"features": powers},
            "online-qml, polynomial": {"features": powers, "method": "online-qml"},
        }
        out: Answer = {"bound": np.diag(efficient_variance(rho, *EFFECTS)) / n}
        for name, more in settings.items():
            names = [f"x{k}" for k in range(COVARIATES)]
            model = hi.BidirectionalEffects("y1", "y2", names, **more).fit(data)
            found = model.effects(anyway=True)
            out[name] = (found.estimate, found.std_error)
            if name == "moments":
                alone = model.set_params(method="single-equation").effects(anyway=True)
                out["single-equation"] = (alone.estimate, alone.std_error)
        return out


def goals(report: Answer) -> list[Answer]:
    """Goals of the design, and whether the cells of a report meet them."""
    learned, baselines = ESTIMATORS[:3], ESTIMATORS[4:]
    error = np.sqrt(0.95 * 0.05 / report["replications"])
    out = []
    for cell in report["cells"]:
        found, where = cell["estimators"], f"n = {cell['n']}, R = {cell['R']}"
        for name in learned:
            worst = max(found[name]["rmse_over_bound"])
            if cell["n"] == max(n for n, _ in CELLS):
                out.append(
                    (f"{name}, RMSE over the bound, {where}", "<= 1.10", worst, worst <= 1.1)
                )
            far = max(abs(c - 0.95) / error for c in found[name]["coverage"])
            out.append((f"{name}, coverage, {where}", "<= 3 binomial errors", far, far <= 3))
        behind = min(
            rival / ours
            for name in baselines
            for rival, ours in zip(found[name]["rmse"], found["online-qml"]["rmse"], strict=True)
        )
        out.append((f"RMSE of baselines over online-qml's, {where}", "> 1", behind, behind > 1))
    names = ("name", "goal", "got", "met")
    return [dict(zip(names, (*goal, bool(met)), strict=True)) for *goal, met in out]


def write(report: Answer, out: Path) -> None:
    """The report and its plot."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "feedback_simulations.json").write_text(json.dumps(report, indent=1))
    plot(report, out / "feedback_simulations.png")


def show(report: Answer) -> None:
    """A row a cell and estimator."""
    table = Table(title=f"effects (0.5, 0.4) in {report['replications']} samples")
    for head in ("n", "R", "estimator", "bias a", "bias b", "RMSE a", "RMSE b", "over bound a",
                 "over bound b", "coverage a", "coverage b"):  # fmt: skip
        table.add_column(head, justify="left" if head == "estimator" else "right")
    for cell in report["cells"]:
        for name, found in cell["estimators"].items():
            numbers = [f"{v:.4f}" for key in ("bias", "rmse") for v in found[key]]
            numbers += [f"{v:.2f}" for key in ("rmse_over_bound", "coverage") for v in found[key]]
            table.add_row(f"{cell['n']:,}", f"{cell['R']:g}", name, *numbers)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    for goal in report["goals"]:
        console.print(f"{goal['name']}: {goal['got']:.3f} (goal {goal['goal']})")


def plot(report: Answer, path: Path) -> None:
    """RMSE over the bound, a panel an effect and R."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    for k, (R, j) in enumerate((R, j) for R in (1, 4) for j in range(2)):
        cells = [cell for cell in report["cells"] if cell["R"] == R]
        if not cells:
            continue  # a report that is under way
        axes[k].set_xscale("log")
        axes[k].set_yscale("log")
        for name in ESTIMATORS:
            y = [cell["estimators"][name]["rmse_over_bound"][j] for cell in cells]
            axes[k].plot([cell["n"] for cell in cells], y, "o-", label=name, markersize=4)
        axes[k].set_xticks([5000, 10_000, 20_000], ["5,000", "10,000", "20,000"], minor=False)
        axes[k].minorticks_off()
        axes[k].axhline(1, color="0.6", linewidth=1)
        axes[k].set_title(f"{'ab'[j]}, R = {R}")
        axes[k].set_xlabel("rows")
    axes[0].set_ylabel("RMSE over the efficiency bound")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


def _stored(out: Path, count: int) -> Answer:
    path = out / "feedback_simulations.json"
    if not path.exists():
        return _empty(count)
    report: Answer = json.loads(path.read_text())
    same = report["device"] == _device() and report["replications"] == count
    return report if same else _empty(count)


def _empty(count: int) -> Answer:
    command = "python benchmarks/feedback_simulations.py"
    return {"command": command, "device": _device(), "replications": count, "cells": []}


def _device() -> Answer:
    names = ("hakari", "numpy", "numba", "scipy")
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "versions": versions}


if __name__ == "__main__":
    main()
