"""Which tensor of a checkpoint fills which piece of this program, and what either side lacks."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hakari.training.checkpoint import exchange
from hakari.training.checkpoint.manifest import Manifest
from hakari.training.checkpoint.pieces import Models, Optimizers, Piece, Ties, several
from hakari.training.checkpoint.source import WEIGHT, Info, Key
from hakari.training.checkpoint.states import grouped
from hakari.training.checkpoint.stored import EXTRA, Stored
from hakari.training.checkpoint.tensors import as_bits


@dataclass(frozen=True)
class Target:
    """A piece to fill, and the tensor in the checkpoint that it is filled from, if there is one.

    exact: whether both are of the same type. memory: the tensor's own bits, if it is on the host.
    """

    piece: Piece
    saved: Key | None
    info: Info | None
    exact: bool = False
    memory: np.ndarray | None = None


def targets_of(found: Manifest, pieces: Sequence[Piece], cast: bool) -> list[Target]:
    """What each piece is filled from. Raises ValueError for another shape, or another type."""
    alias = {name: names for names in found.tied for name in names}
    targets = []
    for piece in pieces:
        key = _saved_as(found, piece.key, alias)
        if key is None:
            targets.append(Target(piece, None, None))
            continue
        info, here = found.infos[key], piece.info
        if info != here:
            _fits(piece, key, info, cast)
        memory = as_bits(piece.tensor) if piece.tensor.device.type == "cpu" else None
        targets.append(Target(piece, key, info, info.dtype == here.dtype, memory))
    return targets


def _saved_as(found: Manifest, key: Key, alias: Mapping[str, tuple[str, ...]]) -> Key | None:
    """The tensor a key was saved as: tied ones were saved under one of their names."""
    if key in found.infos:
        return key
    for name in alias.get(key[0], ()):
        if (name, key[1]) in found.infos:
            return name, key[1]
    return None


def _fits(piece: Piece, key: Key, info: Info, cast: bool) -> None:
    name = f"{key[0]} ({key[1]})"
    if info.shape != piece.shape:
        raise ValueError(f"{name} is {[*info.shape]} in the checkpoint and {[*piece.shape]} here")
    if info.dtype != piece.info.dtype and not cast:
        raise ValueError(
            f"{name} is {info.dtype} in the checkpoint and {piece.info.dtype} here: make it the "
            "same, or pass cast=True to convert"
        )


def compare(
    stored: Stored,
    targets: Sequence[Target],
    tied: Ties,
    states: Collection[str] | None,
    strict: bool,
) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
    """Tensors that only this program has, and that only the checkpoint has, over all ranks."""
    told = exchange.gather(
        (
            {target.piece.key for target in targets if target.saved is None},
            {target.saved for target in targets if target.saved is not None},
        )
    )
    missing = sorted(set().union(*(keys for keys, _ in told)))
    used: set[Key] = set().union(*(keys for _, keys in told))
    unused = sorted(
        key
        for key in stored.manifest.infos
        if key not in used and key[1] != EXTRA and (states is None or key[1] in states)
    )
    unused = _without_equal_copies(stored, used, tied, unused)
    if strict and (missing or unused):
        raise ValueError(_difference(stored, missing, unused))
    return tuple(missing), tuple(unused)


def _without_equal_copies(
    stored: Stored, used: Collection[Key], tied: Ties, unused: Sequence[Key]
) -> list[Key]:
    """Tensors that are tied here, and were saved apart but equal, are not missed."""
    saved, infos = stored.manifest.contents, stored.manifest.infos

    def copy(key: Key) -> bool:
        names = {name for each in tied if key[0] in each for name in each}
        others = [(name, WEIGHT) for name in names if (name, WEIGHT) in used]
        return key[1] == WEIGHT and any(
            (infos[other], saved[other]) == (infos[key], saved[key]) for other in others
        )

    return [key for key in unused if not copy(key)]


def _difference(stored: Stored, missing: Sequence[Key], unused: Sequence[Key]) -> str:
    """Both lists, with the nearest name on the other side where there is one."""
    lines = [f"{stored.folder.where} does not fit this program"]
    for said, keys, others in (
        ("only here", missing, unused),
        ("only in the checkpoint", unused, missing),
    ):
        if keys:
            shown = []
            for name, state in keys[:8]:
                near = difflib.get_close_matches(name, [o[0] for o in others if o[1] == state], 1)
                shown.append(f"{name} ({state})" + (f", like {near[0]}" if near else ""))
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            lines.append(f"{said} ({len(keys)}): {'; '.join(shown)}{more}")
    return ". ".join(lines) + ". Pass strict=False to load what both have"


def same_groups(stored: Stored, model: Models, optimizer: Optimizers, unsaid: bool) -> None:
    """Raise ValueError if the optimizer holds other parameters than the one that was saved.

    unsaid: whether options are wanted that the checkpoint does not have.
    """
    found, error, here = stored.manifest, None, set[str]()
    try:
        here = grouped(several(model), several(optimizer))
    except ValueError as failure:
        error = failure
    exchange.raise_together(error)
    everywhere: set[str] = set().union(*exchange.gather(here))
    ways = "; pass optimizer=None for the weights alone, or strict=False"
    if not found.groups and not has_states(found):
        raise ValueError(f"{stored.folder.where} has no optimizer state{ways}")
    if unsaid:
        raise ValueError(
            f"{stored.folder.where} has the optimizer's states but not its options (learning rate, "
            "weight decay, ...): pass options=False to keep those that are set here, or "
            "strict=False"
        )
    alias = {name: {*names} for names in found.tied for name in names}
    members = {name for group in found.groups for name in group.members}
    known = set().union(members, *(alias.get(name, set()) for name in members))
    held = set().union(everywhere, *(alias.get(name, set()) for name in everywhere))
    for names, side in (
        (everywhere - known, "this optimizer and not in the saved one"),
        (members - held, "the saved optimizer and not in this one"),
    ):
        if members and names:
            raise ValueError(f"{len(names)} parameters are in {side}, such as {min(names)}{ways}")


def has_states(found: Manifest) -> bool:
    """Whether there is any state of an optimizer."""
    return any(key[1] not in (WEIGHT, EXTRA) for key in found.infos)


def has_options(found: Manifest) -> bool:
    """Whether an optimizer's options are there, if its states are."""
    return any(group.options for group in found.groups) or not has_states(found)
