"""`hakari train` and `python -m hakari.training`: from a TOML file to a run folder.

config -> process group -> token shards -> sizes, said first -> train -> plots
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from hakari import run
from hakari.terminal import INTERRUPTED
from hakari.training import checkpoint, config, shards
from hakari.training.config import Config
from hakari.training.hardware import pick_device
from hakari.training.metrics import read
from hakari.training.moe.health import CollapseError
from hakari.training.parallel import check, leave_processes, make_mesh, start_processes
from hakari.training.shards import Tokens
from hakari.training.sizing import GIB, Size, first_line, free_bytes, size
from hakari.training.text import STDLIB
from hakari.training.trainer import CHECKPOINTS, train

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
    if resume and out:
        raise ValueError(f"--resume {resume} goes on in its own folder: leave out --out {out}")
    wanted = fresh(file, changes) if file else _resumed(Path(resume or ""), changes)
    device = pick_device()
    start_processes(device.type)
    try:
        folder = resume or _new_run(Path(str(file)).stem, out)
        status = _until_closed(wanted, folder, device, new=not resume)
    except BaseException:
        dist.destroy_process_group()
        raise
    leave_processes()
    return status


def _until_closed(wanted: Config, folder: Path, device: torch.device, new: bool) -> int:
    try:
        finished = run_training(wanted, folder, device)
    except (FloatingPointError, CollapseError) as error:
        again = " (unchanged settings would repeat it)" if _way_on(folder) else ""
        raise ValueError(f"{error}{_way_on(folder)}{again}") from error
    except KeyboardInterrupt:
        said = _way_on(folder) or "; nothing was saved"
        print(f"hakari: interrupted{said}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if dist.get_rank() == 0 and new:
            _forget(folder)
    if dist.get_rank() == 0:
        _close(folder, finished)
    return 0 if finished else INTERRUPTED


def run_training(wanted: Config, folder: Path, device: torch.device, watch: bool = True) -> bool:
    """Text to shards, the resolved configuration on disk, then the steps; True when finished.

    Every process calls it, in a process group; the first one writes.
    """
    _deterministic(wanted)
    mesh = make_mesh(wanted.parallel, device.type)
    check(wanted, mesh["data"].size())
    resumed = bool(checkpoint.steps(folder / CHECKPOINTS))
    store = _same_shards(wanted, folder) if resumed else _shards(wanted)
    verify = int(os.environ.get("LOCAL_RANK", 0)) == 0
    text, held_out = (shards.open_shards(store, name, verify) for name in SPLITS)
    resolved = with_vocabulary(wanted, text)
    check(resolved, mesh["data"].size())
    found = size(resolved, dist.get_world_size(), device.type)
    if dist.get_rank() == 0:
        print(f"hakari: {first_line(found, resolved, device)}", file=sys.stderr, flush=True)
    _fits(found, resolved, device)  # on every process, so that none waits for one that refused
    if dist.get_rank() == 0:
        run.write_config(folder, config.to_dict(resolved))
        if not resumed:
            _record(folder, store, device)
    dist.barrier()
    return train(resolved, folder, text, held_out, mesh, watch)


def fresh(file: Path, changes: Sequence[str] = ()) -> Config:
    """The configuration of a new run: what the file says, and the model it starts from if any.

    Of that model, what is stored in its weights stays: the configuration may leave it out or say
    the same. Experts may be asked of a dense one, which is upcycled.
    Raises ValueError if the file contradicts the folder, and as `config.load`.
    """
    table = config.read(file, changes)
    start = table.get("start")
    if start:
        from hakari.training.hugging_face import read_config

        found = config.to_dict(read_config(start))
        table["model"] = _onto(found, dict(table.get("model", {})), str(start))
        table.setdefault("data", {}).setdefault("tokenizer", str(Path(start).absolute()))
        table["start"] = str(Path(start).absolute())
    return _absolute(config.from_dict(table))


def _onto(found: dict[str, Any], said: dict[str, Any], start: str) -> dict[str, Any]:
    moe, theirs = dict(said.pop("moe", {})), found["moe"]
    stored = {f"model.{name}": (value, found.get(name, value)) for name, value in said.items()}
    if theirs["experts"]:
        fixed = [name for name in ("experts", "top_k", "hidden", "layers") if name in moe]
        stored |= {f"model.moe.{name}": (moe[name], theirs[name]) for name in fixed}
        moe = theirs | moe
    for name, (ours, value) in stored.items():
        if ours != (list(value) if isinstance(value, tuple) else value):
            raise ValueError(f"{name} = {ours!r}, but {start} has {value!r}: leave it out")
    return found | said | {"moe": moe}


def _absolute(wanted: Config) -> Config:
    """Paths that hold wherever the run is carried on from."""
    data = wanted.data
    text = tuple(t if t.startswith(STDLIB) else str(Path(t).absolute()) for t in data.text)
    tokenizer = str(Path(data.tokenizer).absolute()) if data.tokenizer else ""
    return replace(wanted, data=replace(data, text=text, tokenizer=tokenizer))


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
    if not checkpoint.latest(folder / CHECKPOINTS):
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


def _record(folder: Path, store: Path, device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts = {
        "versions": run.versions("torch", "tokenizers", "numpy"),
        "device": name,
        "processes": dist.get_world_size(),
        "tokens": str(store.resolve()),
        "text": _digest(store),
    }
    (folder / ENVIRONMENT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(store / file, folder / file)


def _digest(store: Path) -> str:
    return hashlib.sha256((store / shards.INDEX).read_bytes()).hexdigest()


def _forget(folder: Path) -> None:
    """Take away a new run's folder in which no step was made."""
    if not checkpoint.steps(folder / CHECKPOINTS) and not read(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _fits(found: Size, resolved: Config, device: torch.device) -> None:
    """Refuse a run that needs far more memory than there is."""
    free = free_bytes(device)
    if found.bytes > 1.5 * free:
        raise ValueError(
            f"the run needs about {found.bytes / GIB:.1f} GiB a process and {free / GIB:.1f} are "
            f"free: lower micro_batch ({resolved.micro_batch or resolved.batch}), length "
            f"({resolved.length}) or the model, set recompute = true, or use more processes"
        )


def _way_on(folder: Path) -> str:
    saved = checkpoint.steps(folder / CHECKPOINTS)
    return f"; step {saved[-1]} is saved: hakari train --resume {folder}" if saved else ""


def _close(folder: Path, finished: bool) -> None:
    from hakari.training.plots import save_plots

    save_plots(folder)
    if not finished:
        print(f"hakari: stopped; go on with: hakari train --resume {folder}", file=sys.stderr)
    print(folder)


# --- before the steps ---------------------------------------------------------------------


def _same_shards(wanted: Config, folder: Path) -> Path:
    """The shards that a run was trained on; made again from the same text if they are gone.

    Raises ValueError if the text is not what it was: the cursor would point into another one.
    """
    facts = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    store = Path(facts["tokens"])
    there = [(store / shards.INDEX).is_file()]
    dist.broadcast_object_list(there)  # one process looks: another may be making them by then
    if not there[0]:
        store = _shards(wanted)
    if _digest(store) != facts["text"]:
        raise ValueError(
            f"the text in {', '.join(wanted.data.text)} is not what {folder} was trained on, and "
            f"its token shards are gone from {facts['tokens']}: bring either back"
        )
    return store


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
