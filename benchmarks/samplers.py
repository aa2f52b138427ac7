"""Minimum effective samples per second: hakari's kernels and general samplers, one target, one run.

    python benchmarks/samplers.py [--quick] [--part shapes|growth]

Part one, four shapes (n, K, L): every sampler's draws are of the same quasi-posterior (robust Ω,
uncentred, flat prior). Part two, the comparison of arXiv 2511.17117: multivariate ESS per
iteration and per second of hakari's kernels as K grows. Needs `benchmarks/requirements.txt`.
Writes results/samplers.json and results/samplers.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from arviz_stats.base import array_stats
from designs import heteroskedastic_iv
from peers import (
    blackjax_nuts,
    emcee_ensemble,
    numpyro_as_written,
    numpyro_nuts,
    numpyro_run,
)
from rich.console import Console
from rich.table import Table

import hakari.inference as hi

SHAPES = [(500, 5, 5), (500, 10, 10), (500, 20, 20), (2000, 20, 30)]
GROWTH = [(1000, 5), (1000, 10), (1000, 20), (1000, 50), (2000, 100)]
KERNELS = ["mh", "da", "da-exact", "da-approx", "independence", "preconditioned"]
PEERS: dict[str, Callable[..., Any]] = {
    "numpyro NUTS, MCMC.run": numpyro_run,
    "numpyro NUTS, as written": numpyro_as_written,
    "numpyro NUTS, on our tensor": numpyro_nuts,
    "blackjax NUTS, on our tensor": blackjax_nuts,
    "emcee, on our tensor": emcee_ensemble,
}
RATIOS = {
    "ratio_to_mcmc_run": "numpyro NUTS, MCMC.run",
    "ratio_to_numpyro_as_written": "numpyro NUTS, as written",
    "ratio_to_numpyro_on_our_tensor": "numpyro NUTS, on our tensor",
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat, two shapes, short runs")
    parser.add_argument("--part", choices=["all", "shapes", "growth"], default="all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else 3
    shapes = SHAPES[:2] if arguments.quick else SHAPES
    growth = GROWTH[:2] if arguments.quick else GROWTH
    report: dict[str, Any] = {
        "benchmark": "minimum bulk ESS per second of sampling, after warm-up and compilation",
        "command": "python benchmarks/samplers.py" + (" --quick" if arguments.quick else ""),
        "device": device(),
        "repeats": repeats,
    }
    path = arguments.out / "samplers.json"
    earlier = json.loads(path.read_text()) if arguments.part != "all" else {}  # the other part
    if arguments.part == "growth":
        report["shapes"] = earlier["shapes"]
    else:
        report["shapes"] = [compare(*shape, repeats, arguments.quick) for shape in shapes]
    if arguments.part == "shapes":
        report["growth"] = earlier["growth"]
    else:
        report["growth"] = [grow(n, K, arguments.quick) for n, K in growth]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    show(report)
    plot(report, arguments.out / "samplers.png")


def compare(n: int, K: int, L: int, repeats: int, quick: bool) -> dict[str, Any]:
    """All samplers on one shape, in turn, `repeats` times; medians."""
    y, X, Z = heteroskedastic_iv(n, K, L, seed=1)
    runs: dict[str, list[dict[str, float]]] = {}
    means = {}
    for repeat in range(repeats):
        for name, peer in PEERS.items():
            draws = 500 if quick else 2000 if peer is emcee_ensemble else 4000
            options = {"warmup": 500 if quick else 1000, "draws": draws, "seed": repeat}
            if peer is not emcee_ensemble:
                options["chains"] = 4
            run = peer(y, X, Z, **options)
            runs.setdefault(name, []).append(measured(run.draws, run.seconds, run.total_seconds))
            means[name] = run.draws.reshape(-1, K).mean(axis=0)
        posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z))
        for kernel in KERNELS:
            length = 5000 if quick else 100_000 if kernel == "independence" else 20_000
            began = perf_counter()
            result = hi.sample(posterior, kernel, draws=length, chains=4, seed=repeat)
            total = perf_counter() - began
            theta = result["posterior"]["theta"].values
            seconds = result.attrs["sampling_seconds"]
            runs.setdefault(f"hakari {kernel}", []).append(measured(theta, seconds, total))
            means[f"hakari {kernel}"] = theta.reshape(-1, K).mean(axis=0)
            sd = theta.reshape(-1, K).std(axis=0)
            if kernel == "independence":
                best = (means[f"hakari {kernel}"], sd)
    medians = {
        name: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        for name, rows in runs.items()
    }
    for name, row in medians.items():
        for column, peer in RATIOS.items():
            row[column] = row["ess_per_second"] / medians[peer]["ess_per_second"]
        row["mean_gap_in_sd"] = float(np.abs((means[name] - best[0]) / best[1]).max())
    Console().print(f"n = {n}, K = {K}, L = {L} done")
    return {"n": n, "K": K, "L": L, "samplers": medians}


def measured(draws: np.ndarray, seconds: float, total: float) -> dict[str, float]:
    """Smallest bulk ESS over the coefficients of draws (chains, draws, K), and rates."""
    ess = min(
        float(array_stats.ess(np.ascontiguousarray(draws[:, :, k]), chain_axis=0, draw_axis=1))
        for k in range(draws.shape[2])
    )
    return {
        "minimum_ess": ess,
        "seconds": seconds,
        "total_seconds": total,
        "ess_per_draw": ess / draws[:, :, 0].size,
        "ess_per_second": ess / seconds,
        "ess_per_second_in_all": ess / total,
    }


def grow(n: int, K: int, quick: bool) -> dict[str, Any]:
    """Multivariate ESS of hakari's kernels, z = x, Gaussian prior as the paper's kernels allow."""
    y, X, Z = heteroskedastic_iv(n, K, K, seed=2)
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z), hi.Normal(0, 100.0))
    rows: dict[str, Any] = {}
    for kernel in KERNELS:
        walks = 5 if kernel in ("mh", "da") else 1  # walks need longer chains, and are cheap
        length = 2000 if quick else walks * {50: 10_000, 100: 2000}.get(K, 20_000)
        result = hi.sample(posterior, kernel, draws=length, chains=4, seed=3)
        ess = hi.multivariate_ess(result)
        iterations = result.attrs["iterations"]
        theta, seconds = result["posterior"]["theta"].values, result.attrs["sampling_seconds"]
        smallest = measured(theta, seconds, seconds)["ess_per_second"]
        rows[kernel] = {
            "mess_per_iteration": _number(ess.value / iterations),
            "mess_per_second": _number(ess.value / result.attrs["sampling_seconds"]),
            "minimum_ess_per_second": None if "stuck" in ess.note else smallest,
            "seconds": result.attrs["sampling_seconds"],
            "acceptance": float(result["checks"]["acceptance"].mean()),
            "evaluations_per_iteration": result.attrs["evaluations"] / iterations,
            "note": ess.note or "; ".join(hi.convergence_notes(result)),
        }
    Console().print(f"growth n = {n}, K = {K} done")
    return {"n": n, "K": K, "kernels": rows}


def _number(value: float) -> float | None:
    """None for what could not be computed; `note` says why."""
    return value if np.isfinite(value) else None


def device() -> dict[str, Any]:
    """What ran it."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    packages = ("hakari", "numpy", "numba", "scipy", "jax", "numpyro", "blackjax", "emcee")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in packages},
    }


def show(report: dict[str, Any]) -> None:
    """The tables on the terminal."""
    console = Console()
    for shape in report["shapes"]:
        table = Table(title=f"n = {shape['n']}, K = {shape['K']}, L = {shape['L']}")
        for column in ("sampler", "ESS/draw", "ESS/s", "x run", "x written", "x tensor", "gap"):
            table.add_column(column, justify="left" if column == "sampler" else "right")
        for name, row in shape["samplers"].items():
            table.add_row(
                name,
                f"{row['ess_per_draw']:.3f}",
                f"{row['ess_per_second']:,.0f}",
                *(f"{row[column]:.2f}" for column in RATIOS),
                f"{row['mean_gap_in_sd']:.3f}",
            )
        console.print(table)
    for point in report["growth"]:
        table = Table(title=f"multivariate ESS, n = {point['n']}, K = L = {point['K']}")
        for column in (
            "kernel",
            "per iteration",
            "per second",
            "minimum ESS/s",
            "acceptance",
            "evaluations",
            "note",
        ):
            table.add_column(column)
        for name, row in point["kernels"].items():
            table.add_row(
                name,
                "-" if row["mess_per_iteration"] is None else f"{row['mess_per_iteration']:.4f}",
                "-" if row["mess_per_second"] is None else f"{row['mess_per_second']:,.0f}",
                f"{row['minimum_ess_per_second'] or np.nan:,.0f}",
                f"{row['acceptance']:.2f}",
                f"{row['evaluations_per_iteration']:.2f}",
                row["note"][:60],
            )
        console.print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """ESS per second by sampler and shape; multivariate ESS per second as K grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(report["shapes"][0]["samplers"])
    for index, name in enumerate(names):
        at = np.arange(len(report["shapes"])) + (index - len(names) / 2) * 0.085
        heights = [shape["samplers"][name]["ess_per_second"] for shape in report["shapes"]]
        colour = f"C{index - len(PEERS)}" if name.startswith("hakari") else str(0.25 + 0.15 * index)
        left.bar(at, heights, 0.08, label=name, color=colour)
    left.set_xticks(
        range(len(report["shapes"])),
        [f"n {s['n']}\nK {s['K']}, L {s['L']}" for s in report["shapes"]],
    )
    left.set_yscale("log")
    left.set_ylabel("minimum ESS per second")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=6, loc="outside lower center")
    ks = [point["K"] for point in report["growth"]]
    for index, kernel in enumerate(KERNELS):
        rows = [point["kernels"][kernel] for point in report["growth"]]
        for key, style in (("mess_per_second", "o-"), ("minimum_ess_per_second", ".:")):
            rates = [np.nan if row[key] is None else row[key] for row in rows]
            label = kernel if style == "o-" else None
            right.loglog(ks, rates, style, label=label, color=f"C{index}")
    right.set_xticks([p["K"] for p in report["growth"]], [str(p["K"]) for p in report["growth"]])
    right.minorticks_off()
    right.set_xlabel("K = L")
    right.set_ylabel("multivariate (line) and minimum (dots) ESS per second")
    right.legend(fontsize=7)
    right.set_title(
        "hakari's kernels; no multivariate ESS where chains are too short for it", fontsize=8
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
