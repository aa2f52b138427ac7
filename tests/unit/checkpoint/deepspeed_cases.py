"""Checkpoints that the real DeepSpeed made, and what is done to them in tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from hakari.training.checkpoint.foreign.deepspeed_files import tensors_of
from hakari.training.checkpoint.foreign.torch_values import Stored, load
from hakari.training.checkpoint.foreign.torch_writing import WRITTEN, write_torch
from hakari.training.checkpoint.source import Source
from hakari.training.checkpoint.storage import open_folder

FIXTURES = Path(__file__).parents[2] / "fixtures" / "deepspeed"
CASES = sorted(path.name for path in FIXTURES.iterdir() if (path / "latest").exists())
UNIVERSAL = [name for name in CASES if (FIXTURES / name / "latest_universal").exists()]
WITH_OPTIONS = [name for name in CASES if name != "zero1-elastic"]
TAG = "global_step3"
RECORDS = (*WRITTEN, "deepspeed.runtime.zero.config.ZeroStageEnum")
TRAINED = (
    {"embed.weight", "up.weight", "down.weight"},
    {
        "gain",
        "up.bias",
        "norm.weight",
        "norm.bias",
        "down.bias",
    },
)


def truth(case: str) -> dict[tuple[str, str], torch.Tensor]:
    found = load_file(FIXTURES / case / "truth.safetensors")
    return {(key.split("|")[0], key.split("|")[1]): value for key, value in found.items()}


def assert_same(source: Source, other: Source) -> None:
    assert dict(source.tensors) == dict(other.tensors)
    for key in source.tensors:
        assert np.array_equal(source.array(key), other.array(key)), key
    assert source.groups == other.groups
    assert (source.tied, source.step) == (other.tied, other.step)


def copy_of(case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / case, tmp_path / case))


def rewrite(where: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change what a file of torch holds."""
    folder = open_folder(where)
    tree = change(loaded(folder, tensors_of(folder, name)))
    (where / name).unlink()
    write_torch(folder, name, tree, records=RECORDS)


def loaded(folder: Any, tree: Any) -> Any:
    if isinstance(tree, Stored):
        return load(folder, tree)
    if isinstance(tree, Mapping):
        return type(tree)((key, loaded(folder, value)) for key, value in tree.items())
    if isinstance(tree, list):
        return [loaded(folder, value) for value in tree]
    return tree
