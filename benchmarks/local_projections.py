"""Time to the joint posterior of impulse responses: hakari's routes, NUTS and localproj, one core.

    python benchmarks/local_projections.py [--quick] [--peers none] [--out FOLDER]

A system of 5 variables with 12 lags and an observed shock (62 regressors at each horizon, T = 400),
responses of one or of all five variables up to H = 24 and 48, roughness prior of order 2 with a
half-Cauchy on its smoothness. Goals: 2,000 effective draws (smallest bulk ESS over the responses)
in under 2 s from the table, at H = 48, by `concentrated`; 100 times the ESS per second of `mh`.

All routes but localproj have one target, the frozen Gaussian quasi-likelihood times the prior, and
each one's means are compared with the closed form. `mh` is a compiled random walk whose covariance
is learned by 80,000 iterations a chain (its default, 2,000, leaves it stuck). NUTS (NumPyro, dense
mass matrix, compiled ahead) is given the same target in units of posterior standard deviations,
centred and not. localproj samples a full likelihood of some 3,000 coefficients and the covariance
of its errors, with its own defaults: another model, so only its time per effective draw is told.

`seconds_to_2000` is building the system, adapting and sampling, scaled to 2,000 effective draws;
compilation is left out. hakari's sampling seconds contain the density of every draw, which NUTS
knows already: `ess_per_second_moves` leaves it out. Everything runs on one core with one thread, in
turns. Peers that are not installed are left out: `pip install -r benchmarks/requirements.txt`.
Writes results/local_projections.json and results/local_projections.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from arviz_stats.base import array_stats
from lp_routes import CHAINS, LAGS, NAMES, ROOTS, Run, kernel, nuts, project, simulate, su_lp
from numpy import ndarray
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import hakari.inference as hi

T, SEED = 400, 20260901
PRIOR = hi.RoughnessPenalty(order=2, smoothness="half-cauchy")
TARGET = 2000  # effective draws
GOAL_SECONDS, GOAL_RATIO = 2.0, 100.0
MOVES = 0.1  # least share of sampling counted as moves: short runs' differences are noise
CASES = [(24, 1), (48, 1), (24, 5), (48, 5)]  # (H, responses)
LENGTHS = {"concentrated": 5000, "gibbs": 5000, "da-approx": 20_000, "mh": 100_000}  # a chain
MH_WARMUP = 80_000
PEERS = {"numpyro": ("NUTS, centred", "NUTS, not centred"), "localproj": ("localproj SU-LP",)}
PACKAGES = ("hakari", "numpy", "scipy", "numba", "jax", "numpyro", "localproj")
RESULTS = Path(__file__).parent / "results"
Answer = dict[str, Any]
Route = Callable[[hi.ProjectionPosterior, int], Run]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="H = 8, short; writes with --out only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="responses of one variable only")
    parser.add_argument("--peers", choices=["installed", "none"], default="installed")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    options = parser.parse_args()
    pinned = one_core()
    found = [p for p in PEERS if importlib.util.find_spec(p)] if options.peers != "none" else []
    if missing := [p for p in PEERS if p not in found]:
        Console(stderr=True).print(
            f"left out: {', '.join(missing)}; pip install -r benchmarks/requirements.txt"
        )
    with threadpool_limits(1):
        report = measure(found, options.quick, options.repeats, options.one)
    report["device"] = device(pinned)
    show(report)
    out = options.out or (None if options.quick else RESULTS)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "local_projections.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, out / "local_projections.png")


def one_core() -> int | None:
    """Bind this process to one core, and what it loads later to one thread; None: not bound."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if not hasattr(os, "sched_setaffinity"):  # macOS has none
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def measure(peers: list[str], quick: bool, repeats: int, one: bool) -> Answer:
    """Every case in turn."""
    repeats = 1 if quick else repeats
    data = simulate(T, SEED)
    cases = [(8, 1), (8, 2)] if quick else [case for case in CASES if case[1] == 1 or not one]
    found = [measure_case(data, H, J, peers, repeats, quick) for H, J in cases]
    return {
        "benchmark": f"seconds to a joint posterior with {TARGET} effective draws, one core",
        "command": "python benchmarks/local_projections.py"
        + " --quick" * quick
        + f" --repeats {repeats}" * (repeats != 3)
        + " --one" * one,
        "repeats": repeats,
        "design": {
            "T": T, "variables": len(NAMES), "lags": LAGS, "largest_roots": ROOTS, "seed": SEED,
            "prior": repr(PRIOR), "covariance": "hc3", "weighting": "frozen",
        },
        "left_out": [p for p in PEERS if p not in peers],
        "cases": found,
        "goals": goals(found),
    }  # fmt: skip


def measure_case(
    data: pd.DataFrame, H: int, J: int, peers: list[str], repeats: int, quick: bool
) -> Answer:
    """All routes on one system, in turn, `repeats` times; medians."""
    routes = _routes(data, J, peers, quick)
    lp = project(data, H, J)
    posterior = lp.posterior(PRIOR)
    from_table(data, H, J)
    for name in LENGTHS:  # compiles what is compiled, and makes what every route needs
        kernel(name, 10, 10, posterior, 0)
    wholes: list[Answer] = []
    rows: dict[str, list[Answer]] = {name: [] for name in routes}
    for repeat in range(repeats):
        wholes.append(from_table(data, H, J, repeat))
        shared = wholes[-1]["design_seconds"] + wholes[-1]["setup_seconds"]
        for name, route in routes.items():
            rows[name].append(measured(route(posterior, repeat), posterior, shared))
    Console(stderr=True).print(f"H = {H}, {J} responses: done")
    return {
        "H": H,
        "responses": J,
        "rows": lp.rows_used[0],
        "regressors": lp.coefficients,
        "coefficients": lp.coefficients * (H + 1) * J,
        "from_table": _medians(wholes),
        "routes": {name: _medians(found) for name, found in rows.items()},
    }


def _routes(data: pd.DataFrame, J: int, peers: list[str], quick: bool) -> dict[str, Route]:
    """What runs; routes that take one response at a time are left out where there are more."""
    lengths = {name: 200 if quick else length for name, length in LENGTHS.items()}
    if J > 1:
        lengths.pop("mh")
    routes: dict[str, Route] = {
        name: partial(kernel, name, draws, 400 if quick else MH_WARMUP if name == "mh" else None)
        for name, draws in lengths.items()
    }
    short = (200, 200) if quick else (1000, 2000)
    if J == 1 and "numpyro" in peers:
        centred, other = PEERS["numpyro"]
        routes |= {centred: partial(nuts, True, *short), other: partial(nuts, False, *short)}
    if J == 1 and "localproj" in peers:
        lengths_of_peer = (50, 50) if quick else (1000, 1000)  # the second are its defaults
        routes[PEERS["localproj"][0]] = partial(su_lp, data, *lengths_of_peer)
    return routes


def goals(cases: list[Answer]) -> Answer:
    """The two goals, on the cases with one response; `ratio_strictest` credits `mh` alone."""
    alone = [case for case in cases if case["responses"] == 1]
    ratios = {f"H{case['H']}": _ratios(case["routes"]) for case in alone}
    seconds = {f"H{case['H']}": case["from_table"]["total_seconds"] for case in alone}
    return {
        "seconds_from_table": seconds,
        "seconds_met": max(seconds.values()) < GOAL_SECONDS,
        "ess_per_second_over_mh": ratios,
        "ratio_met": min(r["ratio"] for r in ratios.values()) >= GOAL_RATIO,
        "ratio_strictest_met": min(r["ratio_strictest"] for r in ratios.values()) >= GOAL_RATIO,
    }


def _ratios(routes: Answer) -> Answer:
    """As both are shipped; without the densities of draws; without those of `mh` only."""
    fast, slow = routes["concentrated"], routes["mh"]
    return {
        "ratio": fast["ess_per_second"] / slow["ess_per_second"],
        "ratio_moves": fast["ess_per_second_moves"] / slow["ess_per_second_moves"],
        "ratio_strictest": fast["ess_per_second"] / slow["ess_per_second_moves"],
        "mh_note": slow["note"],
    }


# --- from the table ------------------------------------------------------------------------


def from_table(data: pd.DataFrame, H: int, J: int, seed: int = 0) -> Answer:
    """From the table to `TARGET` effective draws: seconds of each part, and of all controls.

    Draws that were too few are thrown away and twice as many taken; their time counts.
    """
    began = perf_counter()
    lp = project(data, H, J)
    _ = lp.influence
    designed = perf_counter()
    posterior = lp.posterior(PRIOR)
    _ = posterior.noise_root, [path.tau_grid for path in posterior.paths]
    ready = perf_counter()
    draws, checking, ess = 350, 0.0, 0.0
    while ess < TARGET:
        draws *= 2
        result = hi.sample(posterior, "concentrated", draws=draws, chains=CHAINS, seed=seed)
        drawn = perf_counter()
        ess = smallest_ess(result["posterior"]["theta"].values)
        checking += perf_counter() - drawn
    total = perf_counter() - began
    begun = perf_counter()
    lp.control_draws(result, draws=500, seed=seed)
    return {
        "design_seconds": designed - began,
        "setup_seconds": ready - designed,
        "sampling_seconds": total - checking - (ready - began),
        "ess_check_seconds": checking,
        "total_seconds": total,
        "ess": ess,
        "draws": draws * CHAINS,
        "controls_of_one_response_500_draws_seconds": perf_counter() - begun,
    }


# --- figures ------------------------------------------------------------------------------


def measured(run: Run, posterior: hi.ProjectionPosterior, shared: float) -> Answer:
    """ESS, rates and seconds to `TARGET`. shared: seconds of building the posterior."""
    ess, rhat = smallest_ess(run.theta), _largest_rhat(run.theta)
    before = run.warmup + (shared if run.same_target else 0.0)
    answer = {
        "ess": ess,
        "rhat": rhat,
        "draws": run.theta.shape[0] * run.theta.shape[1],
        "sampling_seconds": run.seconds,
        "warmup_seconds": run.warmup,
        "total_seconds": run.total,
        "ess_per_second": ess / run.seconds,
        "ess_per_second_moves": ess / max(run.seconds - run.density, MOVES * run.seconds),
        f"seconds_to_{TARGET}": before + run.seconds * TARGET / ess,
        "note": _note(ess, rhat),
    }
    if run.same_target:
        means, sds = (np.concatenate([p.moments[i] for p in posterior.paths]) for i in (0, 1))
        flat = run.theta.reshape(-1, run.theta.shape[2])
        answer["mean_gap_in_sd"] = float(np.abs((flat.mean(axis=0) - means) / sds).max())
        answer["sd_gap"] = float(np.abs(flat.std(axis=0) / sds - 1).max())
    return answer


def _note(ess: float, rhat: float) -> str:
    """Why an ESS may be too large; the thresholds of Vehtari et al. (2021)."""
    few = f"ESS {ess:.0f} under {100 * CHAINS}" if ess < 100 * CHAINS else ""
    apart = f"R-hat {rhat:.3f}" if rhat > 1.01 else ""
    reasons = " and ".join(filter(None, (few, apart)))
    return f"{reasons}: its rate is an upper bound" if reasons else ""


def smallest_ess(theta: ndarray) -> float:
    """Of ArviZ's bulk ESS of each column of draws (chains, draws, Q)."""
    return min(_by_column(array_stats.ess, theta))


def _largest_rhat(theta: ndarray) -> float:
    return max(_by_column(array_stats.rhat, theta))


def _by_column(statistic: Any, theta: ndarray) -> list[float]:
    columns = np.moveaxis(theta, 2, 0)
    return [float(statistic(np.ascontiguousarray(c), chain_axis=0, draw_axis=1)) for c in columns]


def _medians(found: list[Answer]) -> Answer:
    """Of each number; the last note that says something, since one bad run is a warning."""
    out: Answer = {k: median(f[k] for f in found) for k in found[0] if k != "note"}
    if "note" in found[0]:
        out["note"] = next((f["note"] for f in reversed(found) if f["note"]), "")
    return out


def device(pinned: int | None) -> Answer:
    """What ran it."""
    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    load = os.getloadavg()[1] if hasattr(os, "getloadavg") else None
    cores = {"cores": os.cpu_count(), "bound_to_one": pinned is not None}
    return {"cpu": cpu, **cores, "load_5min": load, "versions": versions}


def show(report: Answer) -> None:
    """The tables on the terminal."""
    console = Console()
    for case in report["cases"]:
        table = Table(title=_title(case))
        table.add_column("route", no_wrap=True)
        for heading in ("ESS", "draws", "R-hat", "ESS/s", "moves", "s to 2,000", "gap"):
            table.add_column(heading, justify="right")
        for name, row in case["routes"].items():
            gap = f"{row['mean_gap_in_sd']:.3f}" if "mean_gap_in_sd" in row else "-"
            table.add_row(
                name + " *" * bool(row["note"]),
                *(f"{row['ess']:,.0f}", f"{row['draws'] / 1000:,.1f}k", f"{row['rhat']:.3f}"),
                *(f"{row[k]:,.0f}" for k in ("ess_per_second", "ess_per_second_moves")),
                *(f"{row[f'seconds_to_{TARGET}']:,.3g}", gap),
            )
        console.print(table)
        for name, row in case["routes"].items():
            if row["note"]:
                console.print(f"* {name}: {row['note']}")
        console.print({k: float(f"{v:.3g}") for k, v in case["from_table"].items()})
    console.print(report["goals"])


def _title(case: Answer) -> str:
    many = f"{case['responses']} response{'s' * (case['responses'] > 1)}"
    return f"H = {case['H']}, {many}, {case['coefficients']:,} coefficients"


def plot(report: Answer, path: Path) -> None:
    """Seconds to 2,000 effective draws by route, a panel a case; open bars are extrapolated."""
    from matplotlib.figure import Figure

    cases = report["cases"]
    rows = -(-len(cases) // 2)
    figure = Figure(figsize=(10, 0.6 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True).ravel()
    for axis, case in zip(axes, cases, strict=False):
        total = case["from_table"]["total_seconds"]
        shown = [("concentrated, from the table, measured", total, "#0072B2", "")]
        for name, row in case["routes"].items():
            colour = "#0072B2" if name in LENGTHS else "#D55E00"
            shown.append((name, row[f"seconds_to_{TARGET}"], colour, row["note"]))
        labels, seconds, colours, notes = zip(*reversed(shown), strict=True)
        fills = ["none" if note else colour for note, colour in zip(notes, colours, strict=True)]
        bars = axis.barh(labels, seconds, color=fills, edgecolor=colours)
        axis.bar_label(
            bars, [f" {s:.2g} s" if s < 10 else f" {s:,.0f} s" for s in seconds], fontsize=8
        )
        axis.axvline(GOAL_SECONDS, color="#222222", lw=0.8, ls=":")
        axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.set_title(_title(case), fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[len(cases) :]:
        axis.set_axis_off()
    figure.supxlabel(
        f"seconds to {TARGET:,} effective draws, one core (open: a lower bound, too few effective "
        "draws; localproj: another model)",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
