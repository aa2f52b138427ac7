"""Rows on disk, in TensorBoard and on the screen; the figures made of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.image import imread

from hakari.training import plots
from hakari.training.hardware import memory_bytes, peak_flops, pick_device
from hakari.training.metrics import METRICS, SCHEMA, Metrics, read
from hakari.training.moe.health import LayerHealth

COLUMNS = [
    "step",
    "loss",
    "validation_loss",
    "tokens",
    "tokens_per_second",
    "mfu",
    "learning_rate",
    "gradient_norm",
    "memory_gib",
    "seconds",
    "layer",
    "load",
    "entropy",
    "singletons",
    "balance",
    "router_peak",
]


def row(step: int, held: float | None = None) -> dict:
    return {
        "step": step,
        "loss": 2 + 6 / step,
        "validation_loss": held,
        "tokens": 100 * step,
        "tokens_per_second": 1234.5,
        "mfu": 0.25,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "memory_gib": 1.5,
        "seconds": 0.1,
    }


def layer(number: int, load: tuple[int, ...]) -> LayerHealth:
    mean = sum(load) / len(load)
    return LayerHealth(number, load, max(load) / mean, min(load) / mean, 1.2, 0.5, 1.1, 0.1, 2.0)


HEALTH = [layer(1, (5, 3, 4, 4)), layer(3, (2, 6, 4, 4))]


def write(run: Path, steps: range, start: int = 0, total: int = 10, health=HEALTH) -> None:
    run.mkdir(exist_ok=True)
    with Metrics(run, total, start, watch=False) as metrics:
        for step in steps:
            metrics.add(row(step, 2.5 if step % 4 == 0 else None), health)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) of each name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


# --- on disk --------------------------------------------------------------------------------


def test_the_file_has_the_documented_columns_and_one_row_a_step(tmp_path):
    write(tmp_path, range(1, 9))
    table = pq.read_table(tmp_path / METRICS)
    assert table.column_names == COLUMNS
    assert table.schema.equals(SCHEMA)
    assert table.schema.field("load").type == pa.list_(pa.list_(pa.int64()))
    found = table.to_pylist()
    assert [r["step"] for r in found] == list(range(1, 9))
    assert found == read(tmp_path)
    expected = row(4, 2.5) | {
        "layer": [1, 3],
        "load": [[5, 3, 4, 4], [2, 6, 4, 4]],
        "entropy": [1.2, 1.2],
        "singletons": [0.5, 0.5],
        "balance": [1.1, 1.1],
        "router_peak": [2.0, 2.0],
    }
    assert found[3] == expected
    assert found[4]["validation_loss"] is None


def test_a_dense_model_has_empty_lists(tmp_path):
    write(tmp_path, range(1, 3), health=[])
    assert [r["load"] for r in read(tmp_path)] == [[], []]


def test_nothing_measured_is_no_rows(tmp_path):
    assert read(tmp_path) == []


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, range(1, 9))
    write(tmp_path, range(6, 11), start=5)
    assert [r["step"] for r in read(tmp_path)] == list(range(1, 11))
    with Metrics(tmp_path, 10, 3, watch=False):
        pass
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3]


def test_rows_are_saved_when_an_error_ends_the_run(tmp_path):
    def fail() -> None:
        with Metrics(tmp_path, 10, 0, watch=False) as metrics:
            metrics.add(row(1))
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert [r["step"] for r in read(tmp_path)] == [1]
    assert not list(tmp_path.glob("*.part"))


def test_a_value_that_is_not_finite_is_kept(tmp_path):
    with Metrics(tmp_path, 10, 0, watch=False) as metrics:
        metrics.add(row(1) | {"mfu": math.inf})
    assert read(tmp_path)[0]["mfu"] == math.inf


# --- TensorBoard ----------------------------------------------------------------------------


def test_tensorboard_reads_the_losses_and_each_layer(tmp_path):
    write(tmp_path, range(1, 9))
    found = scalars(tmp_path)
    expected = [(step, pytest.approx(2 + 6 / step)) for step in range(1, 9)]
    assert found["loss"] == expected
    assert found["validation_loss"] == [(4, 2.5), (8, 2.5)]
    assert [value for _, value in found["layer3/largest"]] == [1.5] * 8
    assert set(found) >= {"gradient_norm", "tokens_per_second", "layer1/singletons"}


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, range(1, 9))
    write(tmp_path, range(6, 8), start=5)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == list(range(1, 8))


# --- on the screen --------------------------------------------------------------------------


def test_without_a_terminal_a_line_now_and_then_and_at_the_end(tmp_path, capsys):
    with Metrics(tmp_path, 3, 0) as metrics:
        for step in (1, 2, 3):
            metrics.add(row(step), HEALTH)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 1/3  loss 8.000  1,234 tokens/s  MFU 25%  1.5 GiB  load 0.50-1.50",
        "step 3/3  loss 4.000  1,234 tokens/s  MFU 25%  1.5 GiB  load 0.50-1.50",
    ]


def test_a_warning_is_said_when_new_and_every_hundred_steps(tmp_path, capsys):
    with Metrics(tmp_path, 1000, 0) as metrics:
        for step in range(1, 250):
            metrics.add(row(step), [], [f"layer 1: load {step}"] if step != 60 else ["layer 2: x"])
    said = [line for line in capsys.readouterr().err.splitlines() if "layer" in line]
    expected = [(1, "1: load 1"), (60, "2: x"), (101, "1: load 101"), (201, "1: load 201")]
    assert said == [f"step {step}: layer {text}" for step, text in expected]


def test_two_warnings_about_one_layer_are_both_said(tmp_path, capsys):
    with Metrics(tmp_path, 1000, 0) as metrics:
        for step in (1, 2):
            metrics.add(row(step), [], [f"layer 1: load {step}.5", f"layer 1: 9{step}% single"])
    said = [line for line in capsys.readouterr().err.splitlines() if "layer" in line]
    assert said == ["step 1: layer 1: load 1.5", "step 1: layer 1: 91% single"]


# --- figures --------------------------------------------------------------------------------


def test_plots_are_saved_as_pictures_with_something_on_them(tmp_path):
    write(tmp_path, range(1, 101), total=100)
    saved = plots.save_plots(tmp_path)
    assert [path.name for path in saved] == ["loss.png", "experts.png"]
    for path in saved:
        picture = imread(path)[..., :3]
        assert picture.shape[1] > 900
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_a_dense_run_has_no_expert_plot_and_an_empty_one_none(tmp_path):
    assert plots.save_plots(tmp_path) == []
    write(tmp_path, range(1, 3), health=[])
    assert [path.name for path in plots.save_plots(tmp_path)] == ["loss.png"]


def test_the_loss_plot_shows_the_losses(tmp_path):
    write(tmp_path, range(1, 101))
    (axis,) = plots.loss(read(tmp_path)).axes
    raw, smooth, held = axis.lines
    np.testing.assert_allclose(raw.get_ydata(), [2 + 6 / s for s in range(1, 101)])
    two = [(raw.get_ydata()[i] + raw.get_ydata()[max(0, i - 1)]) / 2 for i in range(100)]
    np.testing.assert_allclose(smooth.get_ydata(), two)  # a fiftieth of 100 steps
    assert list(held.get_xdata()) == list(range(4, 101, 4))
    assert axis.get_xlabel() == "step"
    assert axis.get_ylabel() == "loss, nats a token"


def test_the_heat_map_shows_loads_over_their_mean_by_expert_and_step():
    rows = [{"step": s, "layer": [1, 3], "load": [[s, 0, 2 * s, s], [1, 1, 1, 1]]} for s in (1, 2)]
    first, second, bar = plots.expert_loads(rows).axes
    table = first.images[0].get_array()
    assert table.shape == (4, 2)  # experts down, steps across
    np.testing.assert_allclose(table, [[1, 1], [0, 0], [2, 2], [1, 1]])
    np.testing.assert_allclose(second.images[0].get_array(), 1)
    assert first.images[0].get_extent() == [0.5, 2.5, 4, 0]
    assert (first.get_ylabel(), second.get_ylabel()) == ("layer 1", "layer 3")
    assert bar.get_ylabel() == "load / mean load"


def test_many_steps_are_averaged_into_columns():
    rows = [{"step": s, "layer": [0], "load": [[s % 2, 1 - s % 2]]} for s in range(1000)]
    table = plots.expert_loads(rows, columns=100).axes[0].images[0].get_array()
    assert table.shape == (2, 100)
    np.testing.assert_allclose(table, 1)


# --- the device -----------------------------------------------------------------------------


def test_the_device_has_a_peak_and_uses_memory():
    device = pick_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15
    assert 2**24 < memory_bytes(torch.device("cpu")) < 2**44


def test_a_run_that_changed_its_layers_is_drawn_from_its_last_ones(tmp_path):
    early = [{"step": 1, "layer": [0], "load": [[1, 1]]}]
    late = [{"step": s, "layer": [0, 1], "load": [[1, 1], [2, 0]]} for s in (2, 3)]
    axes = plots.expert_loads(early + late).axes
    assert axes[0].images[0].get_array().shape == (2, 2)
