"""Checkpoints: save a run's state, find the newest whole one, load it on any split.

Through torch.distributed.checkpoint, as safetensors: each rank writes what it holds, and a run
resumes on other numbers of processes. A folder counts only once its `COMMIT` stands in it.

    checkpoints/step-00001000/*.safetensors, progress.json, COMMIT
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

FOLDER, COMMIT, PROGRESS = "checkpoints", "COMMIT", "progress.json"


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    keep: int = 0,
) -> Path:
    """Write the state after `step` steps; every rank calls it.

    progress: plain values, saved as JSON. keep: newest checkpoints to leave, 0 for all; older
    ones go only after this one is whole.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    first = dist.get_rank() == 0
    if first and folder.exists():
        shutil.rmtree(folder)  # of an earlier try at the same step
    dist.barrier()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(  # type: ignore[attr-defined]
        _tensors(model, optimizer), storage_writer=writer
    )
    if first:
        (folder / PROGRESS).write_text(json.dumps(dict(progress, step=step)), encoding="utf-8")
        (folder / COMMIT).touch()
        for old in whole(run)[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def whole(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (run / FOLDER).glob("step-*")
    return sorted(path for path in found if (path / COMMIT).is_file())


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read a checkpoint into a model and optimizer, however they are split now.

    Returns the progress it was saved with. Raises ValueError if the checkpoint lacks a tensor or
    has it in another shape.
    """
    tensors = _tensors(model, optimizer)
    _read(folder, tensors)
    return progress(folder)


def load_model(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Read the weights alone, such as for generating text; returns the progress."""
    _read(folder, _weights(model))
    return progress(folder)


def progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint was saved with."""
    return dict(json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


# --- tensors by name ----------------------------------------------------------------------


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Each weight once, under its first name where two are tied, and what else is kept."""
    names = [name for name, _ in model.named_parameters()]
    state, all_names = model.state_dict(), dict(model.named_parameters(remove_duplicate=False))
    names += [name for name in state if name not in all_names]
    return {f"model.{name}": state[name] for name in names}


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state under the names of the weights, the same on any split."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    _, state = get_state_dict(model, optimizer, options=flat)
    tensors = _weights(model)
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"optimizer.{name}"] = value
    return tensors


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    missing = sorted(set(tensors) - set(stored))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors, such as {missing[0]}: it belongs to another "
            "model or optimizer"
        )
    for name, tensor in sorted(tensors.items()):
        there = stored[name]
        if isinstance(there, TensorStorageMetadata) and there.size != tensor.shape:
            raise ValueError(f"{folder}: {name} is {[*there.size]}, here {[*tensor.shape]}")
    dcp.load(  # type: ignore[attr-defined]
        tensors, storage_reader=reader
    )
