"""Rows a second and memory of both effects from a stream, beside online regressors and DML.

    python benchmarks/feedback.py [--quick] [--rows N ...] [--out FOLDER]

A synthetic stream of Arrow batches, 10 covariates, y1 and y2 that cause each other; 200 random
Fourier features. The batches are drawn before the clock starts, one million rows, and come again
until there are enough. hakari (`one pass`) learns both means, both log variances, both effects and
their standard errors. On the same features, made by the same transform: scikit-learn's SGDRegressor
(partial_fit) for one outcome, and River's linear regression (learn_many), which learn one
conditional mean. EconML's LinearDML for the effect of y2 on y1 in one direction, with ridge on the
same features, where it fits in memory.

`rows a second` is of the whole: features, learning, both effects with sets and tests. `peak` is the
growth of the process's memory while it learns, MiB. A stream starts with some tenths of a second
that no number of rows changes (features, first heads, compiled code): `exponent` is the slope of
log seconds in log rows after the first 131,072 rows, `exponent of the whole` with them. Each run is
a process of its own; seconds are the middle of five runs (three at 10^7 rows, one at 10^8). Writes
results/feedback.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

import hakari.inference as hi

RESULTS = Path(__file__).parent / "results"
NAMES = [f"x{k}" for k in range(10)]
FEATURES = hi.RandomFourier(200, seed=1, length_scale=3.0)
BATCH = 65_536
POOL = 16  # batches that are drawn, and come again
START = 2 * BATCH  # rows of a stream's beginning
ROWS = {
    "hakari, one pass": (10**5, 10**6, 10**7, 10**8),
    "hakari, five passes": (10**5, 10**6, 10**7),
    "scikit-learn SGDRegressor": (10**5, 10**6, 10**7),
    "River LinearRegression": (10**5, 10**6, 10**7),
    "EconML LinearDML": (10**5, 10**6),
}
REPEATS = {10**5: 5, 10**6: 5, 10**7: 3}  # of which the middle is reported; others once
Answer = dict[str, Any]


def main() -> None:
    """Every system at every size, each in a process of its own; print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10^5 rows; writes with --out")
    parser.add_argument("--rows", nargs="*", type=int, help="sizes, such as 100000 1000000")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    wanted = options.rows or ([10**5] if options.quick else None)
    out = options.out or (None if options.quick else RESULTS)
    report: Answer = {"command": "python benchmarks/feedback.py", "device": _device(), "runs": []}
    for system, sizes in ROWS.items():
        for rows in [n for n in sizes if wanted is None or n in wanted]:
            found = apart(system, rows)
            report["runs"].append(found)
            Console(stderr=True).print(found)
    report["exponent"] = exponent(report["runs"], START)
    report["exponent of the whole"] = exponent(report["runs"], 0)
    report["goals"] = goals(report)
    show(report)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "feedback.json").write_text(json.dumps(report, indent=1))
        plot(report, out / "feedback.png")


def apart(system: str, rows: int) -> Answer:
    """Runs in processes of their own: what they print last, with the middle of their seconds."""
    command = [sys.executable, __file__, "--one", system, str(rows)]
    runs: list[Answer] = []
    for _ in range(REPEATS.get(rows, 1)):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode
            return {"system": system, "rows": rows, "failed": str(error)}
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    found = runs[0] | {"all_seconds": [run["seconds"] for run in runs]}
    for name in ("seconds", "seconds_after", "peak_mib"):
        if found.get(name) is not None:
            found[name] = float(np.median([run[name] for run in runs]))
    return found | {"rows_per_second": rows / found["seconds"]}


def pool(batches: int) -> list[pa.RecordBatch]:
    """Batches of the stream."""
    out = []
    for k in range(batches):
        chance = np.random.default_rng([7, k])
        x = chance.standard_normal((BATCH, 10))
        h1, h2 = np.sin(x[:, 0]) + 0.5 * x[:, 1], np.cos(x[:, 2]) - 0.7 * x[:, 1]
        e = chance.standard_normal((2, BATCH)) * np.exp(np.stack([h1, h2]) / 2)
        u = e + np.stack([np.sin(x[:, 0]) + x[:, 3], x[:, 1] * x[:, 2]])
        y = np.stack([u[0] + 0.5 * u[1], u[1] + 0.4 * u[0]]) / 0.8
        out.append(pa.record_batch({"y1": y[0], "y2": y[1]} | dict(zip(NAMES, x.T, strict=True))))
    return out


def measure(system: str, rows: int) -> Answer:
    """Seconds and memory of one system."""
    batches = pool(min(POOL, -(-rows // BATCH)))
    learn = {
        "hakari, one pass": one_pass,
        "hakari, five passes": five_passes,
        "scikit-learn SGDRegressor": scikit_learn,
        "River LinearRegression": river,
        "EconML LinearDML": econml,
    }[system]
    one_pass(batches[:1], 30_000)  # compiles
    before, began = _peak(), time.perf_counter()
    found = learn(batches, rows)
    seconds = time.perf_counter() - began
    return {
        "system": system,
        "rows": rows,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "peak_mib": (_peak() - before) / 1024,
        **found,
    }


def stream(batches: list[pa.RecordBatch], rows: int) -> Any:
    """The batches again and again, until there are enough rows."""
    k = 0
    while rows > 0:
        batch = batches[k % len(batches)]
        batch = batch.slice(0, min(rows, len(batch)))
        yield batch
        rows, k = rows - len(batch), k + 1


def model() -> hi.BidirectionalEffects:
    """As a user writes it."""
    return hi.BidirectionalEffects("y1", "y2", NAMES, FEATURES)


def one_pass(batches: list[pa.RecordBatch], rows: int) -> Answer:
    """Both effects from the stream, and the seconds of its rows after the start."""
    began = []

    def clocked() -> Any:
        seen = 0
        for part in stream(batches, rows):
            if seen == START:
                began.append(time.perf_counter())
            yield part
            seen += len(part)

    fitted = model().fit(clocked())
    after = time.perf_counter() - began[0] if began else None
    found = fitted.effects()
    return {"estimate": found.estimate, "std_error": found.std_error, "seconds_after": after}


def five_passes(batches: list[pa.RecordBatch], rows: int) -> Answer:
    """Both effects from a table that is read five times."""
    from hakari.inference.bidirectional import batch
    from hakari.inference.bidirectional.evidence import Assumptions
    from hakari.inference.bidirectional.nuisance import warmed_up
    from hakari.inference.bidirectional.rows import Columns, read, sampled

    columns = Columns("y1", "y2", tuple(NAMES))

    def blocks() -> Any:
        return read(stream(batches, rows), columns)

    nuisance = warmed_up(FEATURES, sampled(blocks(), 20_000).rows, NAMES)
    told = lambda name, done: None  # noqa: E731
    fitting = batch.fit(batch.Passes(nuisance), Assumptions(), blocks, 0, 0, told)
    passes = deque(fitting, maxlen=1)[0]
    found = Assumptions().solve(passes.sums.sums)
    return {"estimate": found.estimate, "std_error": found.std_error}


def arrays(batches: list[pa.RecordBatch], rows: int) -> Any:
    """Features and both outcomes, batch by batch."""
    basis = None
    for part in stream(batches, rows):
        X = np.column_stack([part[name].to_numpy() for name in NAMES])
        basis = basis or FEATURES.fit(X[:20_000])
        yield basis.transform(X), part["y1"].to_numpy(), part["y2"].to_numpy()


def scikit_learn(batches: list[pa.RecordBatch], rows: int) -> Answer:
    """The mean of y1 given y2 and the features, by averaged stochastic gradients."""
    from sklearn.linear_model import SGDRegressor

    fitted = SGDRegressor(average=True, random_state=0)
    for phi, y1, y2 in arrays(batches, rows):
        fitted.partial_fit(np.column_stack([y2, phi[:, 1:]]), y1)
    return {"estimate": (float(fitted.coef_[0]), None)}


def river(batches: list[pa.RecordBatch], rows: int) -> Answer:
    """The same by River, in mini-batches."""
    import pandas as pd
    from river.linear_model import LinearRegression
    from river.optim import SGD

    fitted = LinearRegression(SGD(0.01))
    names: list[str] = []
    for phi, y1, y2 in arrays(batches, rows):
        X = np.column_stack([y2, phi[:, 1:]])
        names = names or [f"f{k}" for k in range(X.shape[1])]
        for i in range(0, len(X), 256):
            part = pd.DataFrame(X[i : i + 256], columns=names)
            fitted.learn_many(part, pd.Series(y1[i : i + 256]))
    return {"estimate": (float(fitted.weights["f0"]), None)}


def econml(batches: list[pa.RecordBatch], rows: int) -> Answer:
    """The effect of y2 on y1 as if y1 did not cause y2."""
    from econml.dml import LinearDML
    from sklearn.linear_model import Ridge

    parts = list(arrays(batches, rows))
    phi, y1, y2 = (np.concatenate([part[k] for part in parts]) for k in range(3))
    fitted = LinearDML(model_y=Ridge(1.0), model_t=Ridge(1.0), cv=5, random_state=0)
    fitted.fit(y1, y2, X=None, W=phi[:, 1:])
    return {"estimate": (float(fitted.const_marginal_effect().ravel()[0]), None)}


def exponent(runs: list[Answer], start: int) -> float | None:
    """Slope of log seconds in log rows of the stream, from a million rows on, after the start."""
    kept = [r for r in runs if r["system"] == "hakari, one pass" and r["rows"] >= 10**6]
    if len(kept) < 2:
        return None
    x = np.log([r["rows"] - start for r in kept])
    y = np.log([r["seconds_after" if start else "seconds"] for r in kept])
    return float(np.polyfit(x, y, 1)[0])


def goals(report: Answer) -> list[Answer]:
    """Goals of the design."""
    ours = [r for r in report["runs"] if r["system"] == "hakari, one pass"]
    out = []
    if report["exponent"] is not None:
        e = report["exponent"]
        out.append(
            {"name": "exponent", "goal": "1.00 +/- 0.03", "got": e, "met": abs(e - 1) <= 0.03}
        )
        big = [r for r in ours if r["rows"] >= 10**6]
        least = min(r["rows_per_second"] for r in big)
        out.append({"name": "rows a second", "goal": 500_000, "got": least, "met": least >= 5e5})
        peaks = [r["peak_mib"] for r in big]
        grown = max(peaks) - min(peaks)
        out.append({"name": "growth of memory, MiB", "goal": 64, "got": grown, "met": grown <= 64})
    return out


def show(report: Answer) -> None:
    """The report as a table."""
    table = Table(title="both effects from a stream, 10 covariates, 200 features")
    for head in ("system", "rows", "seconds", "rows a second", "peak MiB", "estimate"):
        table.add_column(head, justify="left" if head == "system" else "right")
    for run in report["runs"]:
        if "failed" in run:
            table.add_row(run["system"], f"{run['rows']:,}", run["failed"])
            continue
        a, b = run["estimate"]
        table.add_row(
            run["system"],
            f"{run['rows']:,}",
            f"{run['seconds']:.2f}",
            f"{run['rows_per_second']:,.0f}",
            f"{run['peak_mib']:.0f}",
            f"{a:.4f}" + ("" if b is None else f", {b:.4f}"),
        )
    Console().print(table)
    for goal in report["goals"]:
        Console().print(f"{goal['name']}: {goal['got']:.4g} (goal {goal['goal']})")


def plot(report: Answer, path: Path) -> None:
    """Seconds against rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ROWS:
        runs = [r for r in report["runs"] if r["system"] == name and "failed" not in r]
        if runs:
            axes.loglog([r["rows"] for r in runs], [r["seconds"] for r in runs], "o-", label=name)
    axes.set_xlabel("rows")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _peak() -> float:
    """Largest resident memory of the process so far, KiB."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _device() -> Answer:
    versions = {"python": platform.python_version()}
    for name in ("hakari", "numpy", "numba", "scipy", "scikit-learn", "river", "econml"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
