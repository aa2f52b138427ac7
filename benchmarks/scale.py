"""Ten million rows of Parquet to sufficient statistics: rows per second and peak memory.

The model has K = 10 parameters (a constant, 7 exogenous and 2 endogenous regressors), L = 12
instruments and errors (0.5 + |w1|) u. The data are 14 columns of random doubles, which Parquet
cannot compress, in two files with pyarrow's default settings. Measured, each in a process of its
own, so that peak memory is its own, and in turns, so that a busy moment meets all:

- `from_formula`: the whole call, from the path to the moments, robust covariance.
- `read`: pyarrow alone, every column decoded in batches of 65,536 rows and dropped, by the fastest
  way found: file by file with a buffer (its dataset scanner needed 1.5 GB and mostly more time).
  The files were written just before and sit in the page cache: the price of decoding, not of disk.
- `gram`: NumPy's X.T @ X on as many rows, held in memory, products only.
- `tensor`: NumPy's product of all pairs of instruments with all pairs of (y, x), the arithmetic
  that a robust Omega(theta) cannot do without (51 times that of X.T @ X), on operands in cache,
  one thread a core with one BLAS thread each: BLAS's own threads collapse on a busy machine.

The same run checks that the moments of the whole equal those of the two files added, and that
two-step GMM from them is within sampling error of the truth.

    python benchmarks/scale.py [--rows 10_000_000] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXOGENOUS = [f"w{k}" for k in range(1, 8)]
ENDOGENOUS = ["x1", "x2"]
EXCLUDED = ["z1", "z2", "z3", "z4"]
COLUMNS = ["y", *EXOGENOUS, *ENDOGENOUS, *EXCLUDED]
K, L = 1 + len(EXOGENOUS) + len(ENDOGENOUS), 1 + len(EXOGENOUS) + len(EXCLUDED)
FORMULA = f"y ~ 1 + {' + '.join(EXOGENOUS)} + [{' + '.join(ENDOGENOUS)} ~ {' + '.join(EXCLUDED)}]"
TRUTH = np.linspace(1.0, -1.0, K)
LOADINGS = np.array([[0.6, 0.1], [0.3, -0.4], [-0.2, 0.5], [0.1, 0.3]])  # z to x
SEED = 20260801
BATCH = 65_536  # rows read at a time
CHUNK = 1 << 20  # rows drawn at a time: one row group of pyarrow's default size
GOAL_MIB = 1024
PACKAGES = ["hakari", "numpy", "scipy", "numba", "pandas", "pyarrow", "formulaic"]
RESULTS = Path(__file__).parent / "results"
Answer = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, help="default 10_000_000; 1_000_000 with --quick")
    parser.add_argument("--quick", action="store_true", help="1 repeat; writes only with --out")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = options.rows or (1_000_000 if options.quick else 10_000_000)
    if rows < 1000:
        parser.error(f"--rows {rows}: at least 1000 are needed")
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.folder, rows)))
        return
    report = measure(rows, repeats=1 if options.quick else 5, quick=options.quick)
    show(report)
    out = options.out or (None if options.quick else RESULTS)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "scale.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, out / "scale.png")


def measure(rows: int, repeats: int, quick: bool) -> Answer:
    """Write the data, run every measurement `repeats` times in turn, then check the results."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        written = child("write", folder, rows)
        answers: dict[str, list[Answer]] = {name: [] for name in MEASURED}
        for _ in range(repeats):
            for label, runs in answers.items():
                runs.append(child(label, folder, rows))
        checks = child("check", folder, rows)
    measured = {label: _summary(runs, rows) for label, runs in answers.items()}
    own = measured["from_formula"]["rows_per_second"]
    for figures in measured.values():
        figures["ratio"] = own / figures["rows_per_second"]
    return {
        "command": f"python benchmarks/scale.py --rows {rows:_}" + " --quick" * quick,
        "device": _device(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "design": {"rows": rows, "K": K, "L": L, "formula": FORMULA, "seed": SEED} | written,
        "repeats": repeats,
        "goal_peak_mib": GOAL_MIB,
        "goal_met": measured["from_formula"]["peak_mib"] < GOAL_MIB,
        "measured": measured,
        "checks": checks,
    }


def child(name: str, folder: Path, rows: int) -> Answer:
    """What one child process answers.

    A child's ru_maxrss starts at its parent's (exec keeps the maximum): this process must stay
    small until all are done, so it imports no more than NumPy.
    """
    command = [
        sys.executable,
        __file__,
        "--child",
        name,
        "--folder",
        str(folder),
        "--rows",
        str(rows),
    ]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: Answer = json.loads(run.stdout.splitlines()[-1])
    return answer


def _summary(runs: list[Answer], rows: int) -> Answer:
    seconds = median(run["seconds"] for run in runs)
    return {
        "seconds": seconds,
        "seconds_each": [run["seconds"] for run in runs],
        "cpu_seconds": median(run["cpu_seconds"] for run in runs),
        "rows_per_second": rows / seconds,
        "peak_mib": median(run["peak_mib"] for run in runs),
        "imports_mib": median(run["imports_mib"] for run in runs),
    }


def _device() -> Answer:
    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    load = os.getloadavg()[1] if hasattr(os, "getloadavg") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "machine": platform.machine(), "load_5min": load}


# --- children ---------------------------------------------------------------------------


def write(folder: Path, rows: int) -> Answer:
    """Two files of half of the rows each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = folder / "data"
    data.mkdir()
    halves = [rows // 2, rows - rows // 2]
    for part, size in enumerate(halves):
        schema = pa.schema([(name, pa.float64()) for name in COLUMNS])
        with pq.ParquetWriter(data / f"part-{part}.parquet", schema) as file:
            for chunk in chunks(size, part):
                file.write_table(pa.table(chunk))
    size = sum(path.stat().st_size for path in data.iterdir())
    return {"columns": len(COLUMNS), "parquet_mib": size / 2**20, "files": len(halves)}


def chunks(rows: int, part: int) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Columns of at most CHUNK rows at a time, the same for the same part."""
    for index, start in enumerate(range(0, rows, CHUNK)):
        n = min(CHUNK, rows - start)
        rng = np.random.default_rng([SEED, part, index])
        shared = rng.standard_normal((n, 1))
        given = 0.8 * rng.standard_normal((n, L - 1)) + 0.6 * shared
        w, z = given[:, : len(EXOGENOUS)], given[:, len(EXOGENOUS) :]
        u = rng.standard_normal(n)
        x = z @ LOADINGS + 0.5 * u[:, None] + 0.8 * rng.standard_normal((n, len(ENDOGENOUS)))
        X = np.column_stack([np.ones(n), w, x])
        y = X @ TRUTH + (0.5 + np.abs(w[:, 0])) * u
        yield dict(zip(COLUMNS, [y, *w.T, *x.T, *z.T], strict=True))


def from_formula(folder: Path, rows: int) -> Answer:
    """The call that is on trial; leaves the moments for `check`."""
    from hakari.inference.moments import LinearMoments

    answer, moments = timed(lambda: LinearMoments.from_formula(FORMULA, folder / "data"))
    if moments.n != rows:
        raise ValueError(f"{moments.n} rows summed, {rows} written")
    (folder / "whole.pickle").write_bytes(pickle.dumps(moments))
    return answer


def read(folder: Path, rows: int) -> Answer:
    """Decode every column and drop it."""
    import pyarrow.parquet as pq

    def decode() -> int:
        seen = 0
        for path in sorted((folder / "data").iterdir()):
            with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                seen += sum(len(batch) for batch in file.iter_batches(BATCH, columns=COLUMNS))
        return seen

    answer, seen = timed(decode)
    if seen != rows:
        raise ValueError(f"{seen} rows read, {rows} written")
    return answer


def gram(folder: Path, rows: int) -> Answer:
    """X.T @ X on `rows` rows: chunks of 80 MB, beyond the cache, each used again and again."""
    X = np.random.default_rng(SEED).standard_normal((min(rows, CHUNK), K))
    pieces = [X[: rows - start] for start in range(0, rows, CHUNK)]
    return timed(lambda: [piece.T @ piece for piece in pieces])[0]


def tensor(folder: Path, rows: int) -> Answer:
    """The products behind a robust tensor, operands in cache and already made."""
    from threadpoolctl import threadpool_limits

    rng, block, cores = np.random.default_rng(SEED), 512, os.cpu_count() or 1
    left = rng.standard_normal((L * (L + 1) // 2, block))
    right = rng.standard_normal(((K + 1) * (K + 2) // 2, block))

    def share(first: int) -> None:
        for _ in range(first, rows, cores * block):
            left @ right.T

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores) as pool:
        return timed(lambda: list(pool.map(share, range(0, cores * block, block))))[0]


def check(folder: Path, rows: int) -> Answer:
    """Whole against the files added; two-step GMM against the truth; a sample, if there is one."""
    from hakari.inference.moments import LinearMoments

    whole = pickle.loads((folder / "whole.pickle").read_bytes())
    parts = sorted((folder / "data").iterdir())
    added = LinearMoments.from_formula(FORMULA, parts[0])
    added += LinearMoments.from_formula(FORMULA, parts[1])
    estimate, error = two_step(whole)
    gap = merge_gap(whole, added)
    worst = float(np.abs((estimate - TRUTH) / error).max())
    if not gap < 1e-10:
        raise ValueError(f"moments of the whole and of its parts differ by {gap:.1e}, not < 1e-10")
    if not worst < 4.5:
        raise ValueError(f"the estimate is {worst:.1f} standard errors from the truth, not < 4.5")
    return {
        "merge_gap": gap,
        "worst_error_in_standard_errors": worst,
        "worst_error": float(np.abs(estimate - TRUTH).max()),
        "posterior_sample_seconds": _sample_seconds(whole),
    }


def merge_gap(a: Any, b: Any) -> float:
    """Largest relative difference of the moments and of Omega at some theta."""
    if a.n != b.n:
        raise ValueError(f"the whole has {a.n} rows, its parts {b.n}")
    thetas = [np.zeros(K), TRUTH, TRUTH + 0.1]
    pairs = [(a.mean(t), b.mean(t)) for t in thetas]
    pairs += [(a.covariance_at(t), b.covariance_at(t)) for t in thetas]
    return max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in pairs)


def two_step(moments: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two-step GMM from identity weighting, and its standard errors."""
    start = moments.mean(np.zeros(K))
    slope = np.column_stack([start - moments.mean(unit) for unit in np.eye(K)])  # m = start - slope
    theta = np.linalg.lstsq(slope, start, rcond=None)[0]
    root = np.linalg.cholesky(moments.covariance_at(theta))
    slope, start = np.linalg.solve(root, slope), np.linalg.solve(root, start)
    variance = np.linalg.inv(slope.T @ slope) / moments.n
    return np.linalg.lstsq(slope, start, rcond=None)[0], np.sqrt(np.diag(variance))


def _sample_seconds(moments: Any) -> float | None:
    """Seconds of the first posterior sample, with compilation; None before there is a sampler."""
    if importlib.util.find_spec("hakari.inference.sampling") is None:
        return None
    import hakari.inference as hi

    start = perf_counter()
    hi.sample(hi.QuasiPosterior(moments, hi.Flat()), seed=1)
    return perf_counter() - start


def timed(work: Callable[[], Any]) -> tuple[Answer, Any]:
    """What `work` takes: seconds on the clock and of CPU, and peak MiB of the process so far."""
    imports, start, cpu = _peak_mib(), perf_counter(), process_time()
    result = work()
    spent = {"seconds": perf_counter() - start, "cpu_seconds": process_time() - cpu}
    return spent | {"peak_mib": _peak_mib(), "imports_mib": imports}, result


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


MEASURED: dict[str, Callable[[Path, int], Answer]] = {
    "from_formula": from_formula,
    "read": read,
    "gram": gram,
    "tensor": tensor,
}
CHILDREN = {"write": write, "check": check} | MEASURED


# --- what is shown ----------------------------------------------------------------------

LABELS = {
    "from_formula": "hakari from_formula",
    "read": "pyarrow, reading",
    "gram": "NumPy X.T @ X",
    "tensor": "NumPy tensor product",
}


def show(report: Answer) -> None:
    """Print the table and the checks."""
    from rich.console import Console
    from rich.table import Table

    design, checks = report["design"], report["checks"]
    table = Table(
        title=f"{design['rows']:,} rows, K = {K}, L = {L}, {design['parquet_mib']:,.0f} MiB Parquet"
    )
    table.add_column("", no_wrap=True)
    for heading in ("seconds", "million rows/s", "ratio", "peak MiB", "of it imports"):
        table.add_column(heading, justify="right")
    for name, row in report["measured"].items():
        table.add_row(
            LABELS[name],
            f"{row['seconds']:.2f}",
            f"{row['rows_per_second'] / 1e6:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['peak_mib']:.0f}",
            f"{row['imports_mib']:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(
        "ratio: rows per second of from_formula over this row's; "
        f"peak memory {'under' if report['goal_met'] else 'OVER'} {GOAL_MIB} MiB; "
        f"whole = sum of files to {checks['merge_gap']:.0e}; "
        f"estimate at most {checks['worst_error_in_standard_errors']:.1f} standard errors off"
    )
    if checks["posterior_sample_seconds"] is not None:
        console.print(f"posterior sample afterwards: {checks['posterior_sample_seconds']:.2f} s")


def plot(report: Answer, path: Path) -> None:
    """Rows per second and peak memory as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["measured"]
    labels = [LABELS[name] for name in rows]
    speed = [row["rows_per_second"] / 1e6 for row in rows.values()]
    peak = [row["peak_mib"] for row in rows.values()]
    colours = ["tab:blue"] + ["tab:gray"] * (len(rows) - 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
    left.bar_label(left.barh(labels, speed, color=colours), fmt="%.2f", padding=3)
    left.set(xscale="log", xlabel="million rows per second", xlim=(0.1, 5 * max(speed)))
    right.bar_label(right.barh(labels, peak, color=colours), fmt="%.0f", padding=3)
    right.axvline(GOAL_MIB, color="tab:red", linewidth=1)
    right.set(xlabel="peak memory, MiB (goal: red line)", xlim=(0, 1.25 * max(GOAL_MIB, *peak)))
    left.invert_yaxis()
    figure.suptitle(f"{report['design']['rows']:,} rows, K = {K}, L = {L}", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
