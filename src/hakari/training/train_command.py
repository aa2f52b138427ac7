"""`hakari train` and `python -m hakari.training`: from a TOML file to a run folder.

config -> process group -> token shards -> sizes, said first -> train -> plots
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from hakari import run
from hakari.terminal import INTERRUPTED
from hakari.training import checkpoint, config, shards
from hakari.training.config import Config, Model
from hakari.training.hardware import pick_device
from hakari.training.parallel import check, make_mesh, start_processes
from hakari.training.shards import Tokens
from hakari.training.size import first_line, size
from hakari.training.trainer import train

FREE: tuple[str, ...] = ("parallel", "micro_batch", "steps", "recompute", "compile")
FREE += ("deterministic", "validate_every", "validate_batches", "checkpoint_every", "keep")
ENVIRONMENT = "environment.json"
SPLITS = ("train", "validation")


def answer(file: Path | None, changes: Sequence[str], out: Path | None, resume: Path | None) -> int:
    """Run the command on this process; returns the exit status.

    file: TOML; None with `resume`, a run folder that is carried on. changes: `name=value`.
    """
    if (file is None) == (resume is None):
        raise ValueError("give a TOML file, or --resume RUN to carry a run on, and not both")
    wanted = config.load(file, changes) if file else _resumed(Path(resume or ""), changes)
    device = pick_device()
    start_processes(device.type)
    try:
        folder = resume or _new_run(Path(str(file)).stem, out)
        try:
            finished = run_training(wanted, folder, device)
        finally:
            if dist.get_rank() == 0:
                run.discard(folder)
        if dist.get_rank() == 0:
            _close(folder, finished)
        return 0 if finished else INTERRUPTED
    finally:
        dist.destroy_process_group()


def run_training(wanted: Config, folder: Path, device: torch.device, watch: bool = True) -> bool:
    """Text to shards, the resolved configuration on disk, then the steps; True when finished.

    Every process calls it, in a process group; the first one writes.
    """
    _deterministic(wanted)
    mesh = make_mesh(wanted.parallel, device.type)
    wanted = with_start(wanted)
    store = _shards(wanted)
    verify = int(os.environ.get("LOCAL_RANK", 0)) == 0
    text, held_out = (shards.open_shards(store, name, verify) for name in SPLITS)
    resolved = with_vocabulary(wanted, text)
    check(resolved.model, resolved.parallel, resolved.batch, mesh["data"].size())
    if dist.get_rank() == 0:
        found = size(resolved, dist.get_world_size())
        print(f"hakari: {first_line(found, resolved, device)}", file=sys.stderr, flush=True)
        _record(folder, resolved, store, device)
    dist.barrier()
    return train(resolved, folder, text, held_out, mesh, watch)


def with_start(wanted: Config) -> Config:
    """The configuration with the sizes of the model it starts from, where it names one.

    The experts stay as the configuration says: a dense model is upcycled.
    Raises ValueError if a size in the configuration contradicts the folder's.
    """
    if not wanted.start:
        return wanted
    from hakari.training.hugging_face import read_config

    found, said = read_config(wanted.start), wanted.model
    moe = said.moe if said.moe.experts else found.moe
    model = replace(found, moe=moe)
    for name, value in config.to_dict(said).items():
        theirs = getattr(found, name)
        if name != "moe" and value not in (theirs, getattr(Model(), name)):
            raise ValueError(
                f"model.{name} = {value!r}, but {wanted.start} has {theirs!r}: leave it out"
            )
    tokenizer = wanted.data.tokenizer or wanted.start
    return replace(wanted, model=model, data=replace(wanted.data, tokenizer=tokenizer))


def with_vocabulary(wanted: Config, text: Tokens) -> Config:
    """The configuration with the tokenizer's size, rounded up to 64, unless it has one.

    Raises ValueError if the model's vocabulary is smaller than the tokenizer's.
    """
    size = wanted.model.vocabulary
    if size and size < text.vocabulary:
        raise ValueError(
            f"model.vocabulary = {size} is smaller than the tokenizer's {text.vocabulary} tokens"
        )
    rounded = size or -(-text.vocabulary // 64) * 64
    return replace(wanted, model=replace(wanted.model, vocabulary=rounded))


def store_of(folder: Path) -> Path:
    """The token shards that a run read."""
    return Path(json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))["tokens"])


# --- the run folder -----------------------------------------------------------------------


def _resumed(folder: Path, changes: Sequence[str]) -> Config:
    """A run's configuration with changes that leave what it computes the same."""
    stored = config.from_dict(run.read_config(folder))
    if not checkpoint.whole(folder):
        raise ValueError(f"{folder} has no complete checkpoint to resume from")
    wanted = config.load(folder / run.CONFIG, changes)
    for name, value in config.to_dict(wanted).items():
        if name not in FREE and value != config.to_dict(stored)[name]:
            raise ValueError(
                f"--set {name}...: it would change what {folder} has learnt or reads; a resumed "
                f"run may change {', '.join(FREE)}"
            )
    return wanted


def _new_run(name: str, out: Path | None) -> Path:
    """The run folder, made by the first process and told to the others."""
    told: list[object] = [None]
    if dist.get_rank() == 0:
        try:
            told = [str(run.new_run(name, out))]
        except OSError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], OSError):
        raise told[0]
    return Path(str(told[0]))


def _record(folder: Path, resolved: Config, store: Path, device: torch.device) -> None:
    run.write_config(folder, config.to_dict(resolved))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts = {
        "versions": run.versions("torch", "tokenizers", "numpy"),
        "device": name,
        "processes": dist.get_world_size(),
        "tokens": str(store),
    }
    (folder / ENVIRONMENT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(store / name, folder / name)


def _close(folder: Path, finished: bool) -> None:
    from hakari.training.plots import save_plots

    save_plots(folder)
    if not finished:
        print(f"hakari: stopped; go on with: hakari train --resume {folder}", file=sys.stderr)
    print(folder)


# --- before the steps ---------------------------------------------------------------------


def _shards(wanted: Config) -> Path:
    """The token shards, made by the first process of each machine, then found by the others."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    found = _prepare(wanted, first and dist.get_rank() == 0) if first else None
    dist.barrier()
    return found or _prepare(wanted, False)


def _prepare(wanted: Config, watch: bool) -> Path:
    data = wanted.data
    cache = Path(data.cache) if data.cache else _cache()
    console = Console(stderr=True, highlight=False)
    with console.status("reading text") as status:

        def progress(stage: str, documents: int, size: int) -> None:
            if watch:
                status.update(f"{stage}: {documents:,} documents, {size / 1e6:,.1f} MB")

        return shards.prepare(
            data.text,
            data.column,
            data.tokenizer or None,
            data.vocabulary,
            data.validation,
            0,  # runs with other seeds keep the same text for validation
            cache,
            data.shard_tokens,
            data.documents,
            progress,
        )


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hakari" / "tokens"


def _deterministic(wanted: Config) -> None:
    if wanted.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted.deterministic)
