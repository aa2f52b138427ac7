"""Figures of a training run from its metrics: losses, and the load of every expert over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy import ndarray

from hakari.training.metrics import read

BLUE, ORANGE, INK, GREY = "#0072B2", "#E69F00", "#222222", "#767676"
WIDTH = 7.2  # inches: a report column

Rows = Sequence[Mapping[str, Any]]


def save_plots(run: Path) -> list[Path]:
    """Write loss.png and, for a sparse model, experts.png into a run's folder."""
    rows, saved = read(run), []
    if rows:
        saved.append(_save(loss(rows), run / "loss.png"))
        if rows[-1]["layer"]:
            saved.append(_save(expert_loads(rows), run / "experts.png"))
    return saved


def loss(rows: Rows) -> Figure:
    """Training loss, smoothed over a fiftieth of the run, and validation loss."""
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    held = [(r["step"], r["validation_loss"]) for r in rows if r["validation_loss"] is not None]
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    window = max(1, len(rows) // 50)
    axis.plot(steps, _smooth(losses, window), color=BLUE, label="training, smoothed")
    if held:
        axis.plot(*zip(*held, strict=True), "o-", color=ORANGE, markersize=4, label="validation")
        axis.annotate(
            f"{held[-1][1]:.3f}", held[-1], (0, 6), textcoords="offset points", ha="right"
        )
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats a token")
    axis.legend(frameon=False)
    _quiet(axis)
    return figure


def expert_loads(rows: Rows, columns: int = 200) -> Figure:
    """Heat map, a panel a layer: the load of each expert over the mean load, by step.

    columns: steps are averaged into at most so many.
    """
    layers = rows[-1]["layer"]
    every = [row for row in rows if row["layer"] == layers]
    loads = np.array([row["load"] for row in every], dtype=float)  # steps, layers, experts
    shares = loads / loads.mean(-1, keepdims=True)
    figure = Figure(figsize=(WIDTH, 0.6 + 0.85 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    edges = (every[0]["step"] - 0.5, every[-1]["step"] + 0.5)
    for place, axis in enumerate(axes):
        table = _averaged(shares[:, place], columns).T
        image = axis.imshow(
            table, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, extent=(*edges, len(table), 0)
        )
        axis.set_yticks([0.5, len(table) - 0.5], ["0", str(len(table) - 1)], fontsize=7)
        axis.set_ylabel(f"layer {layers[place]}", fontsize=8)
    axes[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8)
    bar.set_label("load / mean load", fontsize=8)
    return figure


def _smooth(values: Float[ndarray, " n"], window: int) -> Float[ndarray, " n"]:
    """Means of the last `window` values, fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - window)
    return (total[last] - total[first]) / (last - first)


def _averaged(table: Float[ndarray, "steps E"], columns: int) -> Float[ndarray, "columns E"]:
    parts = np.array_split(table, min(columns, len(table)))
    return np.stack([part.mean(0) for part in parts])


def _quiet(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e2e2e2", linewidth=0.7)
    axis.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
