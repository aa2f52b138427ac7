"""Routers at equal active parameters on the demo's text: validation loss, its spread, loads.

Arms: `dense` (one SwiGLU as wide as the two experts a token visits), and eight experts, two of
them visited, under each router. Every arm sees the same tokens in the same order with the same
schedule and, seed by seed, the same initial weights where names agree. Evaluated without noise.
A small model early in training: GRIN's own controlled comparison (arXiv 2409.12136, figure 2) has
gshard ahead of its router for the first half trillion tokens.

    python benchmarks/routers.py [--steps 1000] [--seeds 3] [--quick] [--fresh] [--out FOLDER]

Each run is a process with one thread, as many at a time as there are cores; runs that results
already hold with the same settings are not repeated, unless --fresh. Writes results/routers.json
and results/routers.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

ARMS = ("dense", "gshard", "aux_free", "grin", "grin_star")
WIDTH, EXPERTS, TOP_K = 128, 8, 2  # of one expert
PACKAGES = ["hakari", "torch", "tokenizers"]
RESULTS = Path(__file__).parent / "results"
Answer = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="default 1000; 4 with --quick")
    parser.add_argument("--seeds", type=int, help="default 3; 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="writes only with --out")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are there")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    options = parser.parse_args()
    steps = options.steps or (4 if options.quick else 1000)
    seeds = options.seeds or (2 if options.quick else 3)
    out = options.out or (None if options.quick else RESULTS)
    settings = settings_of(steps)
    runs = measure(settings, seeds, out, options.fresh)
    report = summarise(settings, runs, seeds)
    show(report)
    if out:
        save(report, out)
        plot(report, out / "routers.png")


def settings_of(steps: int) -> Answer:
    """The configuration that all arms share."""
    return {
        "steps": steps,
        "batch": 16,
        "length": 128,
        "validate_every": max(1, steps // 5),
        "validate_batches": 0 if steps >= 100 else 2,
        "checkpoint_every": 0,
        "model": {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": WIDTH * TOP_K},
        "data": {"text": ["stdlib:**/*.py"], "vocabulary": 2048},
        "optimizer": {"learning_rate": 3e-3, "warmup": min(50, steps // 2), "schedule": "cosine"},
    }


def measure(settings: Answer, seeds: int, out: Path | None, fresh: bool) -> dict[str, Answer]:
    """Every run by name; those that `out` holds already are taken from there."""
    runs = {} if fresh or out is None else _stored(out, settings)
    wanted = [(seed, arm) for seed in range(1, seeds + 1) for arm in ARMS]
    missing = [(seed, arm) for seed, arm in wanted if f"{arm} {seed}" not in runs]
    console = Console(stderr=True)
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        calls = {pool.submit(one, settings, arm, seed): (seed, arm) for seed, arm in missing}
        for call in as_completed(calls):
            seed, arm = calls[call]
            runs[f"{arm} {seed}"] = call.result()
            loss = runs[f"{arm} {seed}"]["validation_loss"][-1]
            console.print(f"{arm}, seed {seed}: {loss:.4f}")
            if out:  # what is done is kept, whatever comes
                save(summarise(settings, runs, seeds), out)
    return runs


def one(settings: Answer, arm: str, seed: int) -> Answer:
    """Train one arm with one seed, in this process."""
    import torch

    from hakari.training.config import from_dict
    from hakari.training.metrics import read
    from hakari.training.parallel import alone
    from hakari.training.sizing import size
    from hakari.training.train_command import run_training

    torch.set_num_threads(1)
    moe = {"experts": EXPERTS, "top_k": TOP_K, "hidden": WIDTH, "router": arm}
    model = settings["model"] | ({} if arm == "dense" else {"moe": moe})
    config = from_dict(settings | {"seed": seed, "model": model})
    begun = perf_counter()
    with TemporaryDirectory() as folder, alone():
        run_training(config, Path(folder), torch.device("cpu"), watch=False)
        rows = read(Path(folder))
    resolved = from_dict(settings | {"model": model | {"vocabulary": 2048}})
    held = [row for row in rows if row["validation_loss"] is not None]
    last = rows[-100:]
    return {
        "parameters": size(resolved).total,
        "active": size(resolved).active,
        "steps": [row["step"] for row in held],
        "validation_loss": [row["validation_loss"] for row in held],
        "training_loss": mean(row["loss"] for row in last),
        "largest_load": _mean_over([_extreme(row, max) for row in last]),
        "smallest_load": _mean_over([_extreme(row, min) for row in last]),
        "singletons": _mean_over([_singletons(row) for row in last]),
        "seconds": perf_counter() - begun,
    }


def summarise(settings: Answer, runs: dict[str, Answer], seeds: int) -> Answer:
    """Means and spreads over the seeds that are done."""
    arms = {}
    for arm in ARMS:
        done = [runs[f"{arm} {s}"] for s in range(1, seeds + 1) if f"{arm} {s}" in runs]
        if not done:
            continue
        last = [run["validation_loss"][-1] for run in done]
        arms[arm] = {
            "parameters": done[0]["parameters"],
            "active": done[0]["active"],
            "seeds": len(done),
            "validation_loss": mean(last),
            "spread": stdev(last) if len(last) > 1 else None,
            "less_dense": _paired(runs, arm, "dense", seeds),
            "less_gshard": _paired(runs, arm, "gshard", seeds),
            **{
                name: _mean_over([run[name] for run in done])
                for name in ("largest_load", "smallest_load", "singletons")
            },
        }
    return {
        "command": f"python benchmarks/routers.py --steps {settings['steps']} --seeds {seeds}",
        "device": _device(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "settings": settings,
        "arms": arms,
        "runs": dict(sorted(runs.items())),
    }


def save(report: Answer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    part = out / "routers.part"
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(out / "routers.json")


def show(report: Answer) -> None:
    table = Table(title="Validation loss, nats a token: mean (standard deviation over seeds)")
    for name in ("router", "parameters", "active", "loss", "less dense", "load", "one candidate"):
        table.add_column(name, justify="left" if name == "router" else "right")
    for arm, found in report["arms"].items():
        spread = "" if found["spread"] is None else f" ({found['spread']:.4f})"
        sparse = found["largest_load"] is not None
        table.add_row(
            arm,
            f"{found['parameters'] / 1e6:.2f} M",
            f"{found['active'] / 1e6:.2f} M",
            f"{found['validation_loss']:.4f}{spread}",
            f"{found['less_dense']:+.4f}" if found["less_dense"] is not None else "",
            f"{found['smallest_load']:.2f} to {found['largest_load']:.2f}" if sparse else "",
            f"{found['singletons']:.0%}" if sparse else "",
        )
    Console().print(table)


def plot(report: Answer, path: Path) -> None:
    """Validation curves, and the last losses seed by seed."""
    from matplotlib.figure import Figure

    colours = dict(zip(ARMS, ("#222222", "#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))
    marks = dict(zip(ARMS, "osD^v", strict=True))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, arm in enumerate(report["arms"]):
        runs = [run for name, run in report["runs"].items() if name.rpartition(" ")[0] == arm]
        columns = list(zip(*(run["validation_loss"] for run in runs), strict=True))
        steps, style = runs[0]["steps"], {"color": colours[arm], "marker": marks[arm]}
        curves.plot(steps, [mean(c) for c in columns], label=arm, markersize=4, **style)
        curves.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15,
            color=colours[arm],
        )  # fmt: skip
        ends.plot([place] * len(runs), columns[-1], linestyle="", markersize=5, **style)
        ends.plot([place - 0.3, place + 0.3], [mean(columns[-1])] * 2, color=colours[arm])
    curves.set_xlabel("step")
    curves.set_ylabel("validation loss, nats a token")
    curves.legend(frameon=False)
    ends.set_xticks(range(len(report["arms"])), list(report["arms"]), rotation=20)
    ends.set_ylabel("at the last step, each seed")
    for axis in (curves, ends):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# --- helpers ------------------------------------------------------------------------------


def _stored(out: Path, settings: Answer) -> dict[str, Answer]:
    with suppress(OSError, ValueError, KeyError):
        report = json.loads((out / "routers.json").read_text())
        if report["settings"] == settings:
            return dict(report["runs"])
    return {}


def _paired(runs: dict[str, Answer], arm: str, base: str, seeds: int) -> float | None:
    """Mean difference of the last losses over seeds that both have."""
    pairs = [
        (runs[f"{arm} {s}"]["validation_loss"][-1], runs[f"{base} {s}"]["validation_loss"][-1])
        for s in range(1, seeds + 1)
        if f"{arm} {s}" in runs and f"{base} {s}" in runs
    ]
    return mean(a - b for a, b in pairs) if pairs else None


def _extreme(row: Answer, pick: Any) -> float | None:
    loads = row["load"]
    return pick(pick(load) / mean(load) for load in loads) if loads else None


def _singletons(row: Answer) -> float | None:
    return mean(row["singletons"]) if row["singletons"] else None


def _mean_over(values: list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return mean(found) if found else None


def _device() -> Answer:
    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {"cpu": cpu, "cores": os.cpu_count(), "machine": platform.machine()}


if __name__ == "__main__":
    main()
