"""`hakari train` and `python -m hakari.training`: from a TOML file to a run folder.

config -> process group -> token shards -> sizes, said first -> train -> plots
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from hakari import run
from hakari.terminal import INTERRUPTED
from hakari.training import checkpoint, config, shards
from hakari.training.config import Config, Model
from hakari.training.hardware import pick_device
from hakari.training.moe.health import CollapseError
from hakari.training.parallel import check, make_mesh, start_processes
from hakari.training.shards import Tokens
from hakari.training.sizing import first_line, size
from hakari.training.trainer import train

# what a resumed run may change: how the work is done, not what was learnt or is read
FREE: tuple[str, ...] = (
    "steps",
    "batch",
    "micro_batch",
    "recompute",
    "compile",
    "deterministic",
    "keep",
    "parallel",
)
FREE += ("validate_every", "validate_batches", "checkpoint_every", "optimizer", "data.cache")
FREE += tuple(
    f"model.moe.{name}"
    for name in ("balance", "balance_scope", "z_loss", "bias_rate", "dead_steps")
)
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
        except (FloatingPointError, CollapseError) as error:
            raise ValueError(f"{error}{_way_on(folder)}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the step is lost{_way_on(folder)}") from None
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
    if not checkpoint.whole(folder):
        wanted = with_start(wanted)
    check(wanted, mesh["data"].size())
    store = _shards(wanted)
    verify = int(os.environ.get("LOCAL_RANK", 0)) == 0
    text, held_out = (shards.open_shards(store, name, verify) for name in SPLITS)
    resolved = with_vocabulary(wanted, text)
    check(resolved, mesh["data"].size())
    found = size(resolved, dist.get_world_size(), device.type)
    if dist.get_rank() == 0:
        print(f"hakari: {first_line(found, resolved, device)}", file=sys.stderr, flush=True)
        _record(folder, resolved, store, device)
    dist.barrier()
    return train(resolved, folder, text, held_out, mesh, watch)


def with_start(wanted: Config) -> Config:
    """The configuration with the model it starts from, where it names one.

    Experts stay as the configuration says where the folder's model is dense: it is upcycled.
    Of a sparse one, the configuration may change what is not stored in weights.
    Raises ValueError if a size in the configuration contradicts the folder's.
    """
    if not wanted.start:
        return wanted
    from hakari.training.hugging_face import read_config

    found, said = read_config(wanted.start), wanted.model
    moe = said.moe
    if found.moe.experts:
        moe = _merged(found.moe, said.moe, "model.moe", ("experts", "top_k", "hidden", "layers"))
    names = tuple(f.name for f in fields(Model) if f.name != "moe")
    model = replace(_merged(found, said, "model", names), moe=moe)
    tokenizer = wanted.data.tokenizer or wanted.start
    return replace(wanted, model=model, data=replace(wanted.data, tokenizer=tokenizer))


def _merged(found: Any, said: Any, section: str, fixed: Sequence[str]) -> Any:
    """The folder's values, but for what the configuration says; the fixed ones must agree."""
    plain, changed = type(said)(), {}
    for f in fields(said):
        value, theirs = getattr(said, f.name), getattr(found, f.name)
        if f.name == "moe" or value in (theirs, getattr(plain, f.name)):
            continue
        if f.name in fixed:
            raise ValueError(
                f"{section}.{f.name} = {value!r}, but the model it starts from has {theirs!r}: "
                "leave it out"
            )
        changed[f.name] = value
    return replace(found, **changed)


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
    """A run's configuration with changes that leave what it has learnt, and reads, the same."""
    stored = config.to_dict(config.from_dict(run.read_config(folder)))
    if not checkpoint.whole(folder):
        raise ValueError(f"{folder} has no complete checkpoint to resume from")
    wanted = config.load(folder / run.CONFIG, changes)
    for name, *_ in config.explain():
        old, new = _field(stored, name), _field(config.to_dict(wanted), name)
        if new != old and not any(name == free or name.startswith(f"{free}.") for free in FREE):
            raise ValueError(
                f"{name} = {new!r} is not what {folder} was trained with ({old!r}); a resumed run "
                f"may change {', '.join(FREE)}"
            )
    return wanted


def _field(table: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        table = table[part]
    return table


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
        "tokens": str(store.resolve()),
    }
    (folder / ENVIRONMENT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(store / name, folder / name)


def _way_on(folder: Path) -> str:
    saved = checkpoint.whole(folder)
    return f"; {saved[-1]} is whole: hakari train --resume {folder}" if saved else ""


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
