"""Load a checkpoint into whatever model, split and number of processes there are now."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from hakari.training.checkpoint import exchange
from hakari.training.checkpoint.agreement import agree
from hakari.training.checkpoint.boxes import Box, flaw, show, whole
from hakari.training.checkpoint.collector import collector_paused
from hakari.training.checkpoint.content import content, hexadecimal
from hakari.training.checkpoint.dtypes import bits
from hakari.training.checkpoint.foreign.optimizer_class import class_by_states
from hakari.training.checkpoint.fragments import DamageError
from hakari.training.checkpoint.manifest import Manifest, check_sizes
from hakari.training.checkpoint.matching import (
    Target,
    compare,
    has_options,
    has_states,
    same_groups,
    targets_of,
)
from hakari.training.checkpoint.pieces import (
    Models,
    Optimizers,
    Piece,
    Ties,
    holdings,
    several,
    stateful_modules,
)
from hakari.training.checkpoint.retention import named, steps
from hakari.training.checkpoint.source import WEIGHT, Key
from hakari.training.checkpoint.states import made_states, restore_options
from hakari.training.checkpoint.storage import Location
from hakari.training.checkpoint.stored import EXTRA, Stored, extras, open_stored, read_all
from hakari.training.checkpoint.tensors import as_bits, as_tensor

AT_ONCE = 2**29
"""Bytes that are read before they go on to another device, or to another type: 512 MiB."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    extra_state: as saved. rank_states: that of each process that saved; one of them is this
    process's own only if their number is the same. missing, unused: tensors that only this
    program has, or only the checkpoint, where strict=False let them pass. zeroed: damaged states
    that were set to zero. verified: tensors whose content, after loading, is proven to be what
    was saved; tensors: how many there are. options_missing: whether it has the optimizer's states
    and not its options, so that those that were set before stay, where strict=False let it pass.
    """

    path: str
    step: int
    extra_state: Any
    rank_states: tuple[Any, ...]
    missing: tuple[Key, ...]
    unused: tuple[Key, ...]
    zeroed: tuple[Key, ...]
    tensors: int
    verified: int
    bytes: int
    seconds: float
    options_missing: bool = False

    def __str__(self) -> str:
        lost = {"missing": self.missing, "unused": self.unused, "set to zero": self.zeroed}
        said = [f"{len(keys)} {what}" for what, keys in lost.items() if keys]
        said += ["the optimizer's options are not in it"] if self.options_missing else []
        if self.verified < self.tensors or said:
            said = [f"{self.verified} of {self.tensors} tensors verified", *said]
        return (
            f"{self.path}: step {self.step}, {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB in "
            f"{self.seconds:.2f} s, {', '.join(said) or 'loaded state verified'}"
        )


@collector_paused()
def load(
    path: Location,
    model: Models | None,
    optimizer: Optimizers | None = None,
    *,
    strict: bool = True,
    options: bool = True,
    cast: bool = False,
    zero_damaged: Collection[str] = (),
    pieces: Iterable[Piece] = (),
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Loaded:
    """Fill a model and its optimizer from a checkpoint; every rank calls it.

    path: a checkpoint, or a folder of them: then its newest. model, optimizer, pieces: as in
    `save`, on any mesh and any number of processes; an optimizer that has made no step gets the
    states that were saved. Without an optimizer only weights are loaded.

    strict: raise if either side has a tensor that the other lacks. options: also restore what the
    optimizer's groups say (learning rate, weight decay, ...), by parameter. cast: convert weights
    and states to the types they have here, instead of refusing. zero_damaged: states, such as
    'exp_avg', that may start from zero where the file is damaged. workers: reading threads.

    Every tile's checksum is verified, then, over all ranks, the content of every loaded tensor.
    Raises FileNotFoundError without a complete checkpoint, DamageError with the tensor that is
    damaged, ValueError for what does not fit, or if ranks do not agree; the model is then not to
    be used, as part of it may be loaded.
    """
    begun = time.perf_counter()
    pieces = tuple(pieces)
    any_pieces = agree(
        optimizer, bool(pieces), zero_damaged, strict=strict, options=options, cast=cast
    )
    states = {WEIGHT} if optimizer is None and not any_pieces else None
    stored = _open(path, states, zero_damaged)
    parts = () if model is None else model
    threads = workers or min(4, os.cpu_count() or 1)
    with _made_on_all(stored, parts, optimizer, strict):
        targets, tied = _found_on_all(stored, parts, optimizer, pieces, cast)
        missing, unused = compare(stored, targets, tied, states, strict)
        unsaid = optimizer is not None and options and not has_options(stored.manifest)
        if optimizer is not None and strict:
            same_groups(stored, parts, optimizer, unsaid)
        present = [target for target in targets if target.saved is not None]
        zeroed = _fill(stored, present, zero_damaged, threads, progress, path)
        verified, tensors = _verify(stored, present, zeroed)
        extra, ranks = _rest(stored, parts, optimizer if options else None, strict, path)
    return Loaded(
        stored.folder.where,
        stored.manifest.step,
        extra,
        ranks,
        missing,
        unused,
        zeroed,
        tensors,
        verified,
        sum(target.piece.tensor.nbytes for target in present),
        time.perf_counter() - begun,
        unsaid,
    )


def _open(path: Location, states: Collection[str] | None, may_zero: Collection[str]) -> Stored:
    """The same checkpoint on every rank: the one that rank 0 finds."""
    error, where, stored = None, "", None
    if exchange.rank() == 0:
        try:
            stored = open_stored(path)
            where = stored.folder.where
            _check_sizes(stored, states, may_zero)
        except (OSError, ValueError) as failure:
            error = _with_way_out(path, failure)
    exchange.raise_together(error)
    where = exchange.from_first(where)
    try:
        stored = stored or open_stored(where)
    except (OSError, ValueError) as failure:
        error = failure
    exchange.raise_together(error)
    if stored is None:
        raise RuntimeError(f"{where} was not opened")
    return stored


def _with_way_out(path: Location, error: Exception) -> Exception:
    """An error that also says what could be loaded instead."""
    from hakari.training.checkpoint.formats import detect

    older = steps(path)[:-1]
    way = f"; the one before is {str(path).rstrip('/')}/{named(older[-1])}" if older else ""
    if way and isinstance(error, DamageError):
        return DamageError(f"{error}{way}", *error.keys)
    if way and isinstance(error, ValueError) and "is damaged" in str(error):  # the manifest
        return ValueError(f"{error}{way}")
    if isinstance(error, FileNotFoundError):
        try:
            form = detect(path)
        except (OSError, ValueError):
            return error
        if not form.startswith("hakari"):
            return ValueError(f"{path} is a checkpoint of {form}: hakari checkpoint convert first")
    return error


def _check_sizes(stored: Stored, states: Collection[str] | None, may_zero: Collection[str]) -> None:
    """Sizes of the files that are needed, before memory is taken for what is said to be there."""
    files = {
        part.file
        for key, parts in stored.manifest.fragments.items()
        if states is None or key[1] in states
        for part in parts
    }
    for name in sorted(files):
        try:
            check_sizes(stored.folder, stored.manifest, [name])
        except DamageError as damage:
            needed = {state for _, state in damage.keys if states is None or state in states}
            if not needed <= {*may_zero}:
                raise


def _rest(
    stored: Stored, model: Models, optimizer: Optimizers | None, strict: bool, path: Location
) -> Any:
    """Extra states; and what modules keep and the options of an optimizer, which are set."""
    error: Exception | None = None
    found = None
    try:
        extra, ranks, kept = extras(stored)
        found = extra, ranks
        _set_modules(kept, stateful_modules(several(model)), strict)
        if optimizer is not None:
            restore_options(stored.manifest, model, optimizer)
    except Exception as failure:  # a set_extra_state is anyone's code, and no rank may wait for it
        error = _with_way_out(path, failure)
    exchange.raise_together(error)
    return found


def _set_modules(kept: Mapping[str, Any], modules: Mapping[str, nn.Module], strict: bool) -> None:
    lacking = sorted(set(modules) - set(kept))
    if lacking and strict:
        raise ValueError(
            f"{lacking[0]} keeps an extra state, which the checkpoint does not have: pass "
            "strict=False to go on without"
        )
    for name, module in modules.items():
        if name in kept:
            module.set_extra_state(kept[name])


def _class_of(found: Manifest) -> str:
    """The saved optimizer's class; where it was not said, what its states and options tell."""
    keys = [key for key in (*found.infos, *found.scalars) if key[1] != EXTRA]
    return found.optimizer or class_by_states(keys, found.groups)


@contextmanager
def _made_on_all(
    stored: Stored, model: Models, optimizer: Optimizers | None, strict: bool
) -> Iterator[None]:
    """`made_states`, where an error of one rank is an error of all.

    Raises ValueError if the optimizers of all ranks are of other classes than those that saved.
    """
    kinds = {type(each).__name__ for each in several(optimizer)}
    kind = "+".join(sorted(set().union(*exchange.gather(kinds))))
    saved = _class_of(stored.manifest)
    if kind and saved and kind != saved:
        raise ValueError(
            f"the checkpoint's optimizer is {saved}, and this is {kind}: use the same class, or "
            "load the weights alone (optimizer=None)"
        )
    if kind and strict and not saved and has_states(stored.manifest):
        raise ValueError(
            f"{stored.folder.where} does not say of which class its optimizer was: pass "
            f"strict=False if it was {kind} too, or say so in it: hakari checkpoint convert "
            f"{stored.folder.where} NEW --optimizer {kind}"
        )
    with ExitStack() as stack:
        error = None
        try:
            stack.enter_context(made_states(stored.manifest, model, optimizer))
        except ValueError as failure:
            error = failure
        exchange.raise_together(error)
        yield


def _found_on_all(
    stored: Stored,
    model: Models,
    optimizer: Optimizers | None,
    pieces: Iterable[Piece],
    cast: bool,
) -> tuple[list[Target], Ties]:
    """What to fill, and which names are tied here, on any rank."""
    error, targets, tied = None, [], Ties()
    try:
        held = holdings(model, optimizer, pieces)
        for piece in held.pieces:
            _fillable(piece)
        tied = held.tied
        targets = targets_of(stored.manifest, held.pieces, cast)
    except (ValueError, TypeError) as failure:
        error = failure
    exchange.raise_together(error)
    return targets, sum(exchange.gather(tied), Ties())


def _fillable(piece: Piece) -> None:
    """Raise ValueError for a tensor without memory, or without memory for each element."""
    name, tensor = f"{piece.key[0]} ({piece.key[1]})", piece.tensor
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device: call model.to_empty(device=...) before loading"
        )
    if any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name} {[*piece.shape]} is expanded, so that several of its elements share memory: "
            "make it a tensor of its own (.clone()) before loading"
        )


# --- filling ------------------------------------------------------------------------------


def _fill(
    stored: Stored,
    targets: Sequence[Target],
    may_zero: Collection[str],
    workers: int,
    progress: Callable[[int], None] | None,
    path: Location,
) -> tuple[Key, ...]:
    """Read all; returns what was zeroed, on any rank, since its files are damaged."""
    damaged: dict[Key, str] = {}
    error: Exception | None = None
    left = list(targets)
    while left:
        try:
            _read(stored, left, workers, progress)
            break
        except DamageError as failure:
            lost = {target.saved for target in left if target.saved in failure.keys}
            if not lost or any(key is None or key[1] not in may_zero for key in lost):
                error = _with_way_out(path, failure)
                break
            damaged |= {key: str(failure) for key in lost if key}
            left = [target for target in left if target.saved not in lost]
        except (OSError, ValueError, RuntimeError) as failure:
            error = failure
            break
    exchange.raise_together(error)
    zeroed: set[Key] = set().union(*(exchange.gather(set(damaged))))
    for target in targets:
        if target.saved in zeroed:
            target.piece.tensor.zero_()
    return tuple(sorted(zeroed))


def _read(
    stored: Stored,
    targets: Sequence[Target],
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Read into the tensors' own memory where they allow it, else through a bounded buffer."""
    direct, staged = [], []
    for target in targets:
        tensor, info = target.piece.tensor, target.info
        if target.saved is None or info is None:
            continue
        if target.memory is not None and target.exact:
            direct.append((target.saved, target.piece.box, target.memory))
        else:
            staged.append((target.saved, target.piece.box, info.dtype, tensor))
    read_all(stored, direct, workers, progress)
    while staged:
        chosen: list[tuple[Key, Box, str, Tensor]] = []
        size = 0
        while staged and (not chosen or size < AT_ONCE):
            chosen.append(staged.pop())
            size += chosen[-1][3].nbytes
        buffers = [
            (key, box, np.empty(tensor.shape, bits(dtype))) for key, box, dtype, tensor in chosen
        ]
        read_all(stored, buffers, workers, progress)
        for (_, _, buffer), (_, _, dtype, tensor) in zip(buffers, chosen, strict=True):
            tensor.copy_(as_tensor(buffer, dtype))


# --- proof --------------------------------------------------------------------------------


def _verify(stored: Stored, targets: Sequence[Target], zeroed: Collection[Key]) -> tuple[int, int]:
    """How many tensors are proven to hold what was saved, and how many there are.

    Those that were cast or zeroed, or of which the ranks together hold only a part, are not.
    Raises ValueError if a tensor's content is not that in the manifest.
    """
    sums = [
        (t.saved, t.piece.box, content(_now(t), t.piece.box))
        for t in targets
        if t.exact and t.saved not in zeroed
    ]
    everything: dict[Key, dict[Box, int]] = {}
    wrong: dict[Key, Box] = {}
    for told in exchange.gather(sums):
        for key, box, total in told:
            if key is None:
                continue
            boxes = everything.setdefault(key, {})
            if boxes.setdefault(box, total) != total:
                wrong[key] = box
    verified = 0
    for key, boxes in everything.items():
        if not flaw(stored.manifest.infos[key].shape, boxes):
            if hexadecimal(sum(boxes.values())) != stored.manifest.contents[key]:
                wrong[key] = whole(stored.manifest.infos[key].shape)
            verified += 1
    if wrong:
        key, box = min(wrong.items())
        raise ValueError(
            f"after loading, {len(wrong)} tensors are not what was saved, such as {key[0]} "
            f"({key[1]}) {show(box)}: this is a fault of hakari or of the machine's memory"
        )
    names = set().union(*exchange.gather({target.saved for target in targets}))
    return verified, len(names)


def _now(target: Target) -> np.ndarray:
    return as_bits(target.piece.tensor.cpu()) if target.memory is None else target.memory
