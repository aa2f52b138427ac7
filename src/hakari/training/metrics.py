"""What a run measures, one row a step: `metrics.parquet`, TensorBoard, and the person watching.

Only the first process writes. The file is replaced whole, so that a reader never sees half.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hakari.training.moe.health import LayerHealth

METRICS = "metrics.parquet"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("loss", pa.float64()),  # nats a token
        ("validation_loss", pa.float64()),  # null where none was taken
        ("tokens", pa.int64()),  # predicted since the run began
        ("tokens_per_second", pa.float64()),
        ("mfu", pa.float64()),  # share of the device's peak arithmetic
        ("learning_rate", pa.float64()),
        ("gradient_norm", pa.float64()),
        ("memory_gib", pa.float64()),
        ("seconds", pa.float64()),  # of the step
        ("layer", pa.list_(pa.int64())),  # sparse layers, as the lists below
        ("load", pa.list_(pa.list_(pa.int64()))),  # tokens of each expert
        ("entropy", pa.list_(pa.float64())),
        ("singletons", pa.list_(pa.float64())),
        ("balance", pa.list_(pa.float64())),
        ("router_peak", pa.list_(pa.float64())),
    ]
)


class Metrics:
    """The rows of a run, on disk and on the screen; a resource to close."""

    def __init__(self, run: Path, steps: int, start: int, watch: bool = True) -> None:
        self.path = run / METRICS
        self.rows = [row for row in read(run) if row["step"] <= start]
        self.writer = _tensorboard(run, start)
        self.warned: dict[str, int] = {}
        self.screen = Screen(steps, start) if watch else None

    def add(
        self,
        row: Mapping[str, Any],
        health: Sequence[LayerHealth] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        """One step; a warning is said when it is new and every 100 steps."""
        for text in warnings:
            layer, _, what = text.partition(":")
            about = layer + re.sub(r"[\d.]+", "", what)  # the same, whatever its numbers are
            if row["step"] - self.warned.get(about, -100) >= 100:
                self.warned[about] = row["step"]
                self.say(f"step {row['step']}: {text}")
        routers = {
            "layer": [one.layer for one in health],
            "load": [list(one.load) for one in health],
            "entropy": [one.entropy for one in health],
            "singletons": [one.singletons for one in health],
            "balance": [one.balance for one in health],
            "router_peak": [one.peak for one in health],
        }
        if row.get("validation_loss") is not None:
            self.say(f"step {row['step']}: validation loss {row['validation_loss']:.4f}")
        full = dict.fromkeys(SCHEMA.names) | dict(row) | routers
        self.rows.append(full)
        for name, value in row.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, row["step"])
        for one in health:
            for name in ("largest", "smallest", "entropy", "singletons", "balance", "peak"):
                self.writer.add_scalar(f"layer{one.layer}/{name}", getattr(one, name), row["step"])
        if self.screen:
            self.screen.show(full, health)

    def save(self) -> None:
        """Replace the file by the rows so far."""
        write(self.path, self.rows)
        self.writer.flush()

    def say(self, text: str) -> None:
        """A line above the progress."""
        if self.screen:
            self.screen.say(text)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.save()
        self.writer.close()
        if self.screen:
            self.screen.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; none if it has not measured anything."""
    path = run / METRICS
    return list(pq.read_table(path).to_pylist()) if path.is_file() else []


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as Parquet, whole or not at all."""
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), part)
    part.replace(path)


class Screen:
    """Progress on a terminal; where there is none, a line now and then."""

    def __init__(self, steps: int, start: int, every: float = 10.0) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.every, self.said, self.steps = every, 0.0, steps
        self.progress = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task("", total=steps, completed=start)
            self.progress.start()

    def show(self, row: Mapping[str, Any], health: Sequence[LayerHealth]) -> None:
        """The newest step."""
        words = _words(row, health)
        if self.progress:
            self.progress.update(self.task, completed=row["step"], description=words)
        elif time.monotonic() - self.said > self.every or row["step"] == self.steps:
            self.said = time.monotonic()
            print(f"step {row['step']}/{self.steps}  {words}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.progress:
            self.progress.stop()


def _words(row: Mapping[str, Any], health: Sequence[LayerHealth]) -> str:
    words = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
    words += f"  MFU {row['mfu']:.0%}  {row['memory_gib']:.1f} GiB"
    if health:
        words += f"  load {min(one.smallest for one in health):.2f}"
        words += f"-{max(one.largest for one in health):.2f}"
    return words


def _tensorboard(run: Path, start: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(run / "tensorboard", purge_step=start + 1)
