"""The training run: from the newest checkpoint to the last step, measured, validated, saved.

`train(config, run, text, held_out, mesh)` is the same program on one process and on many.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hakari.training import checkpoint
from hakari.training.batches import Batch, Windows, rank_batch, validation_batches
from hakari.training.config import Config
from hakari.training.hardware import memory_bytes, peak_flops
from hakari.training.interrupt import graceful_stop
from hakari.training.metrics import Metrics
from hakari.training.moe.health import CollapseError, problems
from hakari.training.shards import Tokens
from hakari.training.sizing import size
from hakari.training.step import Outcome, Trainer, make_work, prepare, train_step, validate

GIB = 2**30
CHECKPOINTS = "checkpoints"
"""Folder of a run in which its checkpoints lie."""


@dataclass(frozen=True)
class Cursor:
    """How far a run is: steps, sequences and predicted tokens. Saved with each checkpoint."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    silent: dict[str, int] = field(default_factory=dict)  # steps without a token, by expert

    def after(self, samples: int, tokens: int) -> Cursor:
        """One step on."""
        return Cursor(
            self.step + 1, self.samples + samples, self.tokens + tokens, dict(self.silent)
        )


def train(
    config: Config,
    run: Path,
    text: Tokens,
    held_out: Tokens,
    mesh: DeviceMesh,
    watch: bool = True,
) -> bool:
    """Train until `config.steps`, from the newest checkpoint in `run` if there is one.

    text, held_out: token shards to train on and to validate with. watch: show progress.
    Every process calls it.
    Returns False if a signal stopped the run early; a checkpoint is written either way.
    Raises FloatingPointError if a value is not finite, CollapseError if an expert is lost, with a
    checkpoint of the last good state.
    """
    if dist.get_rank() == 0:
        checkpoint.clear_leftovers(run / CHECKPOINTS)
    dist.barrier()
    found = checkpoint.latest(run / CHECKPOINTS)
    trainer = prepare(replace(config, start="") if found else config, mesh)
    cursor = _resume(trainer, found) if found else Cursor()
    with ExitStack() as stack:
        stack.enter_context(_collecting_between_steps())
        asked = stack.enter_context(graceful_stop())
        metrics = None
        if dist.get_rank() == 0:
            metrics = stack.enter_context(Metrics(run, config.steps, cursor.step, watch))
        return _loop(trainer, run, (text, held_out), cursor, asked, metrics)


def _loop(
    trainer: Trainer,
    run: Path,
    texts: tuple[Tokens, Tokens],
    cursor: Cursor,
    asked: Event,
    metrics: Metrics | None,
) -> bool:
    config = trainer.config
    text, held_out = (
        Windows(tokens, config.length, config.seed, config.data.packing) for tokens in texts
    )
    measure = _meter(trainer)
    saved, saving = cursor.step, None
    while cursor.step < config.steps:
        begun = time.perf_counter()
        try:
            outcome = _one(trainer, text, cursor)
            cursor = cursor.after(config.batch, outcome.tokens)
            dead_steps = config.model.moe.dead_steps
            said = problems(outcome.health, cursor.step, cursor.silent, dead_steps)
        except (FloatingPointError, CollapseError):  # on all processes alike, so they can save
            if saved < cursor.step:
                _save(trainer, run, cursor, metrics)
            raise
        row = measure(outcome, cursor, time.perf_counter() - begun)
        if _due(config.validate_every, cursor.step, config.steps):
            row["validation_loss"] = validate(trainer, _held_out(trainer, held_out))
        if metrics:
            metrics.add(row, outcome.health, said)
        stop, failed = _any([asked.is_set(), bool(saving and saving.failure())], trainer.mesh)
        if failed:
            checkpoint.wait()  # raises, on every process
        if stop or _due(config.checkpoint_every, cursor.step, config.steps):
            more = not stop and cursor.step < config.steps
            saving = _save(trainer, run, cursor, metrics, more)
            saved = cursor.step
        if stop:
            break
    return cursor.step >= config.steps


def _one(trainer: Trainer, text: Windows, cursor: Cursor) -> Outcome:
    axis = trainer.mesh["data"]
    batch = rank_batch(
        text, cursor.samples, trainer.config.batch, axis.get_local_rank(), axis.size()
    )
    if cursor.step % 100 == 0:
        gc.collect()
    return train_step(trainer, make_work(trainer, batch, cursor.step), cursor.step)


def _held_out(trainer: Trainer, windows: Windows) -> Iterator[Batch]:
    """Validation batches, the share of this data-parallel rank."""
    config, axis = trainer.config, trainer.mesh["data"]
    share = (axis.get_local_rank(), axis.size())
    batches = validation_batches(windows, config.batch, *share)
    return itertools.islice(batches, config.validate_batches or None)


def _resume(trainer: Trainer, found: str) -> Cursor:
    """Load a checkpoint; the learning rate and the like are what the configuration says now."""
    loaded = checkpoint.load(found, trainer.model, trainer.optimizer, options=False)
    if dist.get_rank() == 0:
        print(f"hakari: {loaded}", file=sys.stderr, flush=True)
    return Cursor(**loaded.extra_state)


def _save(
    trainer: Trainer, run: Path, cursor: Cursor, metrics: Metrics | None, more: bool = False
) -> checkpoint.Save | None:
    """Save the state; in the background if there is more to do."""
    saving = checkpoint.save(
        run / CHECKPOINTS,
        trainer.model,
        trainer.optimizer,
        asdict(cursor),
        step=cursor.step,
        asynchronous=more,
        keep=trainer.config.keep,
    )
    if metrics:
        metrics.save()
    return saving


def _meter(trainer: Trainer) -> Callable[[Outcome, Cursor, float], dict[str, Any]]:
    """A function that turns a step into its row of metrics."""
    config, device = trainer.config, torch.device(trainer.mesh.device_type)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    peak = peak_flops(device, dtype) * dist.get_world_size()
    flops = size(config, dist.get_world_size()).flops_per_token

    def row(outcome: Outcome, cursor: Cursor, seconds: float) -> dict[str, Any]:
        speed = outcome.tokens / seconds
        return {
            "step": cursor.step,
            "loss": outcome.loss,
            "validation_loss": None,
            "tokens": cursor.tokens,
            "tokens_per_second": speed,
            "mfu": speed * flops / peak,
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "gradient_norm": outcome.gradient_norm,
            "memory_gib": memory_bytes(device) / GIB,
            "seconds": seconds,
        }

    return row


def _due(every: int, step: int, steps: int) -> bool:
    return step == steps or bool(every and step % every == 0)


def _any(flags: list[bool], mesh: DeviceMesh) -> list[bool]:
    """Which flags are set on any process, so that all do the same after the same step."""
    told = torch.tensor(flags, dtype=torch.float32, device=mesh.device_type)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return [bool(flag) for flag in told.tolist()]


def _collecting_between_steps() -> ExitStack:
    """Python's garbage collector, off: it runs between steps, so that ranks do not stall."""
    gc.collect()
    gc.disable()
    stack = ExitStack()
    stack.callback(gc.enable)
    return stack
