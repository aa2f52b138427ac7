"""Tensors put together from parts of others, as a source: states, scalars, groups, ties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from hakari.training.checkpoint.boxes import Box
from hakari.training.checkpoint.language.rows import Coordinate, Part, Piece, View, place, read_part
from hakari.training.checkpoint.language.rules import Rule
from hakari.training.checkpoint.source import WEIGHT, Group, Info, Key, Source

Slices = Mapping[Coordinate, Source]
Shape = tuple[int, ...]
Index = tuple[int, ...]


@dataclass(eq=False)
class Composite:
    """A tensor put together: its parts, by their leading indices, all of one shape.

    tied: some views are ties' copies, which need not have all states.
    """

    rule: Rule
    shape: Shape
    parts: dict[Index, Part]
    tied: bool = False

    @property
    def lead(self) -> Shape:
        """The leading dimensions."""
        return leading(self.parts)

    def views(self, part: Part, state: str, slices: Slices) -> tuple[View, ...]:
        """The views that have a state."""
        if not self.tied:
            return part.views
        return part.views[:1] + tuple(
            view
            for view in part.views[1:]
            if all((p.name, state) in slices[p.where].tensors for p in view.pieces)
        )

    def owners(self, state: str, slices: Slices) -> dict[tuple[Coordinate, str], None]:
        """The tensors that it is made of."""
        parts = self.parts.values()
        views = [view for part in parts for view in self.views(part, state, slices)]
        return dict.fromkeys((p.where, p.name) for view in views for p in view.pieces)


def leading(indices: Iterable[Index]) -> Shape:
    """Sizes of the leading dimensions that have these indices."""
    return tuple(max(edge) + 1 for edge in zip(*indices, strict=True))


def composed(
    made: Mapping[str, Composite], slices: Slices, rename: Callable[[str], str | None]
) -> Source:
    """The tensors `made`, by name, as a source; what is beside tensors is the first rank's.

    rename: the new name of a parameter, for ties; None if it has none of its own.
    Raises ValueError where slices differ in what must be the same: the step, states, or groups.
    """
    held: dict[Coordinate, dict[str, dict[str, Info]]] = {where: {} for where in slices}
    for where, source in slices.items():
        for (name, state), info in source.tensors.items():
            held[where].setdefault(name, {})[state] = info
    infos: dict[Key, Info] = {}
    for name, own in made.items():
        infos |= {(name, state): info for state, info in _states(name, own, slices, held)}
    first = slices[min(slices)]
    for where, source in slices.items():
        if (source.step, source.optimizer) != (first.step, first.optimizer):
            raise ValueError(
                f"{place(where)} is at step {source.step} of {source.optimizer or 'no optimizer'}, "
                f"{place(min(slices))} at {first.step} of {first.optimizer or 'no optimizer'}"
            )
    ties = dict.fromkeys(tie for source in slices.values() for tie in _ties(source, rename))
    return replace(
        first,
        tensors=infos,
        read=partial(_read, made, slices, infos),
        scalars=_scalars(made, slices),
        groups=_groups(made, slices),
        tied=tuple(ties),
    )


def _states(
    name: str,
    own: Composite,
    slices: Slices,
    held: Mapping[Coordinate, Mapping[str, Mapping[str, Info]]],
) -> Iterator[tuple[str, Info]]:
    """States of a tensor that all it is made of have; scalar states stay scalars."""
    (where, first), *_ = own.owners(WEIGHT, slices)
    of = {owner: held[owner[0]][owner[1]] for owner in own.owners("", slices)}
    for state in dict.fromkeys(state for states in of.values() for state in states):
        owners = [(owner, held[owner[0]][owner[1]]) for owner in own.owners(state, slices)]
        for (at, slice_name), states in owners:
            if state not in states or states[state].dtype != of[where, first][state].dtype:
                has = states[state].dtype if state in states else "missing"
                other = of[where, first][state].dtype if state in of[where, first] else "missing"
                raise ValueError(
                    f"{name} ({state}) cannot be made: it is {has} for {slice_name} on "
                    f"{place(at)}, but {other} for {first} on {place(where)}"
                )
        shapes = [info.shape for info in of[where, first].values()]
        scalar = of[where, first][state].shape == () != max(shapes)
        whole = () if scalar else (*own.lead, *own.shape)
        yield state, Info(whole, of[where, first][state].dtype)


def _read(
    made: Mapping[str, Composite],
    slices: Slices,
    infos: Mapping[Key, Info],
    key: Key,
    box: Box,
    out: np.ndarray,
) -> None:
    name, state = key
    if key not in infos:
        raise ValueError(f"there is no {name} ({state})")
    own, info = made[name], infos[key]

    def fetch(piece: Piece, box: Box, out: np.ndarray) -> None:
        whole = (*((i, i + 1) for i in piece.at), *box)
        slices[piece.where].read((piece.name, state), whole, out[(*(None,) * len(piece.at), ...)])

    if info.shape == () and own.lead + own.shape:
        out[...] = _agreed(own, slices, key, out.dtype)
        return
    depth = len(own.lead)
    for at in product(*(range(*edge) for edge in box[:depth])):
        part = replace(own.parts[at], views=own.views(own.parts[at], state, slices))
        inner = out
        for i, (start, _) in zip(at, box[:depth], strict=True):
            inner = inner[i - start, ...]
        read_part(part, fetch, box[depth:], inner, state, info.dtype)


def _agreed(own: Composite, slices: Slices, key: Key, dtype: np.dtype) -> np.ndarray:
    """A scalar state, such as the step, that must be the same for all slices."""
    found = {}
    for where, name in own.owners(key[1], slices):
        found[where, name] = np.empty((), dtype)
        slices[where].read((name, key[1]), (), found[where, name])
    (first, value), *others = found.items()
    for owner, other in others:
        if other != value:
            raise ValueError(
                f"{key[0]} ({key[1]}) is not one number: {first[1]} on {place(first[0])} and "
                f"{owner[1]} on {place(owner[0])} have different ones"
            )
    return value


def _scalars(made: Mapping[str, Composite], slices: Slices) -> dict[Key, Any]:
    found: dict[Key, Any] = {}
    of: dict[tuple[Coordinate, str], dict[str, Any]] = {}
    for where, source in slices.items():
        for (name, state), value in source.scalars.items():
            of.setdefault((where, name), {})[state] = value
    for name, own in made.items():
        for owner in own.owners(WEIGHT, slices):
            for state, value in of.get(owner, {}).items():
                if found.setdefault((name, state), value) != value:
                    raise ValueError(
                        f"{name} ({state}) is not one number: {found[name, state]} and {value} "
                        f"for {owner[1]} on {place(owner[0])}"
                    )
    return found


def _groups(made: Mapping[str, Composite], slices: Slices) -> tuple[Group, ...]:
    """The optimizer's groups, which all ranks must have alike, with the new names."""
    options: dict[int, Mapping[str, Any]] = {}
    of: dict[tuple[Coordinate, str], int] = {}
    for where, source in slices.items():
        for number, group in enumerate(source.groups):
            if options.setdefault(number, group.options) != group.options:
                raise ValueError(f"options of optimizer group {number} differ on {place(where)}")
            of |= {(where, name): number for name in group.members}
    members: dict[int | None, list[str]] = {number: [] for number in options}
    for name, own in made.items():
        owners = own.owners("", slices) if own.tied else own.owners(WEIGHT, slices)
        numbers = {of.get(owner) for owner in owners}
        if len(numbers) > 1:
            raise ValueError(
                f"{name} would be in {len(numbers)} optimizer groups: "
                f"{', '.join(owner[1] for owner in owners)} are in different ones"
            )
        members.get(numbers.pop(), []).append(name)
    return tuple(Group(own, tuple(members[number])) for number, own in options.items())


def _ties(source: Source, rename: Callable[[str], str | None]) -> Iterator[tuple[str, ...]]:
    for tie in source.tied:
        names = tuple(dict.fromkeys(new for name in tie if (new := rename(name)) is not None))
        if len(names) > 1:
            yield names
