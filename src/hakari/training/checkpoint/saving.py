"""Save what all processes hold as one checkpoint, at once or in the background."""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import index
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import hakari
from hakari.training.checkpoint import exchange
from hakari.training.checkpoint.assign import Held, assign
from hakari.training.checkpoint.boxes import Box, volume
from hakari.training.checkpoint.collector import collector_paused
from hakari.training.checkpoint.commit import Request, SaveError, carry_out
from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.manifest import COMMIT
from hakari.training.checkpoint.pieces import (
    Holdings,
    Models,
    Optimizers,
    Piece,
    holdings,
    several,
    stateful_modules,
    tensor_pieces,
)
from hakari.training.checkpoint.retention import STEP, named
from hakari.training.checkpoint.snapshot import Save, Writer, finished, start
from hakari.training.checkpoint.storage import Location, absolute, open_folder
from hakari.training.checkpoint.stored import EXTRA
from hakari.training.checkpoint.tensors import as_bits
from hakari.training.checkpoint.tree import encode

KEPT = ("extra_state/", "rank_state/", "module_state/")
"""Starts of names that parameters cannot have."""

Plan = tuple[tuple[int, Box], ...]


@dataclass
class _Session:
    """What one process keeps between saves: its writer, the save under way, the last plan."""

    writer: Writer | None = None
    running: Save | None = None
    digests: tuple[str, ...] = ()
    plan: Plan = ()
    total: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_session = _Session()


@contextmanager
def _alone() -> Iterator[None]:
    """One thread at a time. Raises RuntimeError in a forked child of a process with a writer."""
    if _session.writer:
        _session.writer.check_owner()
    with _session.lock:
        yield


@collector_paused()
@_alone()
def save(
    path: Location,
    model: Models | None,
    optimizer: Optimizers | None = None,
    extra_state: Any = None,
    *,
    step: int,
    rank_state: Any = None,
    pieces: Iterable[Piece] = (),
    asynchronous: bool = False,
    when_busy: Literal["wait", "skip"] = "wait",
    copies: Literal["equal", "first"] = "equal",
    keep: int = 0,
    timeout: float = 1800.0,
) -> Save | None:
    """Write a checkpoint PATH/step-N that any number of processes can load; every rank calls it.

    path: a folder that all processes see, or an fsspec URL. model, optimizer: one, or the parts
    that this process holds. extra_state: a tree of plain values, tensors and objects with a
    state_dict, the same on all ranks (schedule, data cursor). rank_state: another such tree of
    each rank's own (random generators). pieces: what else belongs in it, such as flat shards.

    asynchronous: return once the state is copied; a process of its own writes it. One save is
    under way at a time: another call waits, or skips (then None is returned, on all ranks). A
    failure is raised by the next save, by the result's `poll` and `wait`, or at exit.
    copies: what several ranks hold of the same box must be equal to the bit, or the first rank's
    is taken, for runs whose replicas may drift.
    keep: newest checkpoints to leave, 0 for all; older ones go when this one is complete.
    timeout: seconds to wait for other processes to write; in the background, for the writer to
    be done at all: then it is killed.

    Returns a `Save`; a synchronous one is complete. Warns of what does not keep a save from being
    one. Raises FileExistsError if the step was saved before, or a later one, ValueError if pieces
    do not tile a tensor or copies differ, TypeError if a state cannot be stored, OSError if the
    disk fails or is too small, SaveError (an OSError) if another process or the last save in the
    background failed, unless that was told.
    """
    root = absolute(path)
    settings: dict[str, Any] = {
        "asynchronous": asynchronous,
        "keep": keep,
        "copies": copies,
        "when_busy": when_busy,
        "path": root,
    }
    error: Exception | None = None
    held: tuple[Piece, ...] = ()
    record: dict[str, Any] = {}
    try:
        step, keep = _count("step", step), _count("keep", keep)
        _check(root, asynchronous, copies, when_busy)
        held, record = _collect(model, optimizer, pieces, extra_state, rank_state)
    except Exception as failure:  # a state_dict is anyone's code, and no rank may wait for it
        error = failure
    exchange.raise_together(error)
    busy, save_id = _agree(root, step, settings | {"step": step}, when_busy)
    if busy:
        return None
    boxes = tuple((piece.key, piece.info, piece.box) for piece in held)
    request = Request(
        root,
        step,
        save_id,
        exchange.rank(),
        exchange.world(),
        boxes,
        _planned(root, boxes, copies, record["buffers"]),
        record,
        copies,
        keep,
        timeout,
    )
    shown = f"{str(path).rstrip('/')}/{named(step)}"
    if asynchronous:
        _session.writer = _session.writer or start()
        _session.running = _session.writer.save(request, [piece.tensor for piece in held], shown)
        return _session.running
    carry_out(request, _Values([piece.tensor for piece in held]))
    return finished(shown)


def wait() -> None:
    """Wait until no save is under way in the background. Raises if it failed."""
    running, _session.running = _session.running, None
    if running:
        running.wait()


# --- what to save -------------------------------------------------------------------------


class _Values(Sequence[np.ndarray]):
    """The bits of tensors; those on another device come over one at a time."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.here = [as_bits(t) if t.device.type == "cpu" else t for t in tensors]

    def __len__(self) -> int:
        return len(self.here)

    def __getitem__(self, index: Any) -> Any:
        value = self.here[index]
        return as_bits(value.cpu()) if isinstance(value, Tensor) else value


def _collect(
    model: Models | None,
    optimizer: Optimizers | None,
    pieces: Iterable[Piece],
    extra_state: Any,
    rank_state: Any,
) -> tuple[tuple[Piece, ...], dict[str, Any]]:
    found = holdings(() if model is None else model, optimizer, pieces)
    rank = exchange.rank()
    extra, shared = _tree(extra_state, "extra_state")
    own, mine = _tree(rank_state, f"rank_state/{rank:05d}")
    modules = {}
    for name, module in stateful_modules(several(() if model is None else model)).items():
        modules[name], kept = _tree(module.get_extra_state(), f"module_state/{name}")
        mine += kept
    held = (*found.pieces, *shared, *mine)
    twice = {piece.key for piece in held if piece.key[0].startswith(KEPT) and piece.key[1] != EXTRA}
    if twice:
        raise ValueError(f"{min(twice)[0]} is a name that is kept for extra states")
    return held, _record(found, extra, own) | {"modules": modules}


def _tree(tree: Any, name: str) -> tuple[Any, list[Piece]]:
    tensors: dict[str, Tensor] = {}
    plain = encode(tree, name, tensors)
    return plain, [
        p for path, value in tensors.items() for p in tensor_pieces((path, EXTRA), value)
    ]


def _record(found: Holdings, extra: Any, own: Any) -> dict[str, Any]:
    """What of a process's state is not a tensor, as plain JSON."""
    none: dict[str, Tensor] = {}
    record = {
        "scalars": [
            [*key, encode(value, "/".join(key), none)] for key, value in found.scalars.items()
        ],
        "groups": [
            [encode(group.options, "optimizer", none), group.members] for group in found.groups
        ],
        "optimizer": found.optimizer,
        "tied": found.tied,
        "buffers": found.buffers,
        "broadcast": found.broadcast,
        "extra": extra,
        "own": own,
        "origin": {
            "framework": "hakari",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "mesh": found.mesh,
            "hakari": hakari.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    if none:
        raise TypeError(f"{min(none)} is a tensor with more than one element")
    return dict(json.loads(json.dumps(record)))


# --- what all processes must agree on -----------------------------------------------------


def _count(name: str, value: Any) -> int:
    """A step, or how many to keep, as an integer. Raises ValueError for what is no count."""
    try:
        number = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} is {value!r}: a whole number, 0 or more, is needed")
    return number


def _check(root: str, asynchronous: bool, copies: str, when_busy: str) -> None:
    """Raise ValueError for what cannot be meant."""
    for name, value, known in (
        ("copies", copies, ("equal", "first")),
        ("when_busy", when_busy, ("wait", "skip")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: {known[0]!r} or {known[1]!r}")
    if asynchronous and root.startswith("memory://"):
        raise ValueError(f"{root} would be in the writer process's memory: pass asynchronous=False")


def _agree(root: str, step: int, settings: Mapping[str, Any], when_busy: str) -> tuple[bool, str]:
    """Whether to skip, and the save's name. Raises on all ranks what is wrong on any."""
    error: Exception | None = None
    said, seen, busy, newer = None, False, False, None
    try:
        said, seen, busy = _last(wait=when_busy == "wait")
        newer = _newer(root, step) if exchange.rank() == 0 else None
    except (OSError, UserWarning) as found:
        error = found
    exchange.raise_together(error)
    told = exchange.gather((busy, uuid.uuid4().hex, newer, said, seen, settings))
    for rank, (_, _, _, _, _, theirs) in enumerate(told):
        for name, value in told[0][5].items():
            if theirs[name] != value:
                raise ValueError(f"{name} is {value!r} on rank 0 and {theirs[name]!r} on {rank}")
    for rank, (_, _, _, failure, _, _) in enumerate(told):
        if failure and not any(each[4] for each in told):
            raise SaveError(f"the last save failed on rank {rank}: {failure}")
    if told[0][2]:
        raise FileExistsError(_in_the_way(root, step, told[0][2]))
    return any(each[0] for each in told), told[0][1]


def _last(wait: bool) -> tuple[str | None, bool, bool]:
    """Of the last save in the background: what failed, whether the program saw it; if it runs."""
    running = _session.running
    if running is None:
        return None, False, False
    seen = running.told
    said = running.untold(wait) if wait or running.done() else None
    busy = not running.done()
    if not busy:
        _session.running = None
    return said, seen, busy


def _newer(root: str, step: int) -> str | None:
    """The newest checkpoint, if it is of this step or a later one.

    In an object store, what a save that died left of this step is removed.
    """
    folder = open_folder(root)
    names = folder.entries()
    found = [int(match[1]) for name in names if (match := STEP.fullmatch(name))]
    for each in sorted((each for each in found if each >= step), reverse=True):
        whole = COMMIT in folder.child(named(each)).entries()
        if whole or (each == step and folder.renames):
            return named(each)
        if each == step:
            folder.remove(named(step))
    return None


def _in_the_way(root: str, step: int, newest: str) -> str:
    place = root.rstrip("/")
    said = "exists" if newest == named(step) else f"exists, and is newer than step {step}"
    return (
        f"{place}/{newest} {said}: save to another folder, or, to go on from an older step N, "
        f"remove the newer ones first (hakari checkpoint prune {place} --after N)"
    )


def _planned(root: str, mine: Sequence[Held], copies: str, buffers: Sequence[str]) -> Plan:
    """What this rank writes. Worked out anew only if any rank holds something else than before."""
    rows = [(key, info.dtype, info.shape, box) for key, info, box in mine]
    digest = hashlib.sha256(json.dumps([copies, buffers, rows]).encode()).hexdigest()
    told = exchange.gather((digest, _free(root)))
    digests = tuple(each for each, _ in told)
    if digests != _session.digests:
        everyone = exchange.gather(mine)
        first = set().union(*exchange.gather(buffers))
        shares = assign(everyone, share=copies == "equal", first=first)
        _session.plan = tuple(shares[exchange.rank()])
        _session.total = sum(
            volume(box) * BYTES[everyone[rank][index][1].dtype]
            for rank, share in enumerate(shares)
            for index, box in share
        )
        _session.digests = digests
    left = [free for _, free in told if free is not None]
    if left and min(left) < _session.total:
        raise OSError(
            f"{root} has {min(left):,} bytes left, and the checkpoint needs {_session.total:,}: "
            "make room, or lower `keep`"
        )
    return _session.plan


def _free(root: str) -> int | None:
    try:
        return open_folder(root).free()
    except OSError:  # the save itself will say so
        return None
