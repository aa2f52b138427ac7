"""Moments of shards on disk and of a stream of batches: the same as of all rows at once.

python examples/shards_and_streams.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

import hakari.inference as hi

FORMULA = "y ~ 1 + w + [x ~ z1 + z2]"


def table(rows: int, seed: int) -> pd.DataFrame:
    """One endogenous regressor, errors whose spread grows with |w|; the truth is (1, 1, 0.5)."""
    z1, z2, w, u, v = np.random.default_rng(seed).standard_normal((5, rows))
    x = 0.5 * z1 + 0.3 * z2 + 0.5 * u + v
    return pd.DataFrame(
        {"y": 1 + w + 0.5 * x + (0.5 + np.abs(w)) * u, "x": x, "w": w, "z1": z1, "z2": z2}
    )


def shards(folder: Path) -> hi.LinearMoments:
    """Each file on its own, then added, as machines would that hold one file each."""
    parts = [hi.LinearMoments.from_formula(FORMULA, path) for path in sorted(folder.iterdir())]
    return sum(parts[1:], start=parts[0])


def batches(folder: Path) -> Iterator[pd.DataFrame]:
    """Rows as they might arrive."""
    for path in sorted(folder.iterdir()):
        frame = pd.read_parquet(path)
        for start in range(0, len(frame), 1000):
            yield frame[start : start + 1000]


def main() -> None:
    """Compare three routes to one posterior; draw from it as the stream goes on."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(4):
            table(5000, index).to_parquet(folder / f"part-{index}.parquet")
        routes = {
            "folder": hi.LinearMoments.from_formula(FORMULA, folder),
            "shards": shards(folder),
            "batches": hi.LinearMoments.from_formula(FORMULA, batches(folder)),
        }
        for label, moments in routes.items():
            density = hi.QuasiPosterior(moments).log_density(np.array([1.0, 1.0, 0.5]))
            print(f"{label:8} {moments.n} rows, log density at the truth {density:.9f}")
        total: hi.LinearMoments | None = None
        for count, batch in enumerate(batches(folder), start=1):
            part = hi.LinearMoments.from_formula(FORMULA, batch)
            total = part if total is None else total + part
            if count in (1, 5, 20):
                row = hi.summary(hi.sample(hi.QuasiPosterior(total), seed=1)).loc["x"]
                print(f"after {total.n:6} rows: x {row['mean']:.3f} ({row['sd']:.3f})")


if __name__ == "__main__":
    main()
