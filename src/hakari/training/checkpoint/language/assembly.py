"""Whole tensors from the slices that processes hold, and slices from whole tensors, by rules.

    atoms = apply(program, {(0, 0, 0): first, (1, 0, 0): second})  # by (tp, pp, ep) rank
    slices = invert(program, atoms, tp=4)

(universal-checkpoints.md B3)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from hakari.training.checkpoint.language.composite import (
    Composite,
    Index,
    Shape,
    Slices,
    composed,
    leading,
)
from hakari.training.checkpoint.language.patterns import Bindings, outline
from hakari.training.checkpoint.language.rows import (
    Coordinate,
    Layout,
    Part,
    Piece,
    Rows,
    View,
    gathered,
    place,
    shares,
    single,
    slice_rows,
)
from hakari.training.checkpoint.language.rules import (
    AXES,
    Program,
    Rule,
    about,
    check,
    evaluate,
    layout,
    need_numbers,
    raise_faults,
)
from hakari.training.checkpoint.source import Source

ORIGIN: Coordinate = (0, 0, 0)


def apply(program: Program, slices: Slices) -> Source:
    """The whole tensors that slices, by their (tp, pp, ep) ranks, are of; nothing is read yet.

    What was saved beside tensors (extra, origin) is that of the first rank.
    Raises ValueError as `check` does; for slices that are missing, have another size than the
    rules say, leave a gap or overlap; and, when a box is read, for copies that differ.
    """
    sizes = _grid(slices)
    shapes = {where: _shapes(source) for where, source in slices.items()}
    rules = check(program, dict.fromkeys(name for own in shapes.values() for name in own))
    need_numbers(program, (rule for rule, _ in rules.values()))
    families: dict[Any, tuple[Rule, Bindings, dict[Coordinate, str]]] = {}
    for where, name in ((where, name) for where, own in shapes.items() for name in own):
        rule, bindings = rules[name]
        with about(f"{rule}: {name} on {place(where)}"):
            bound = _renumbered(program, rule, bindings, where, sizes, 1)
        key = (rule.tie, rule.match, *sorted(bound.items()))
        families.setdefault(key, (rule, bound, {}))[2][where] = name
    made: dict[str, Composite] = {}
    for key in sorted(families, key=lambda key: key[0]):  # ties last
        rule, groups, names = families[key]
        with about(f"{rule}: {next(iter(names.values()))}"):
            _expect(names, _places(program, rule, groups, sizes))
            _join(made, rule, groups, names, shapes, _values(program, sizes))
    _whole(made)
    _complete(program, _seen(families.values(), shapes))
    return composed(made, slices, lambda name: _atom_of(program, name))


def invert(
    program: Program,
    source: Source,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    counts: Mapping[str, int | tuple[int, ...]] | None = None,
) -> dict[Coordinate, Source]:
    """What each of tp * pp * ep processes has of whole tensors, by its ranks; nothing is read yet.

    counts: instead of the program's, such as {'layer': (5, 4)}, the layers of two stages.
    Raises ValueError as `apply` does, and where tensors do not have the sizes that rules say.
    """
    program, sizes = replace(program, counts=counts or program.counts), (tp, pp, ep)
    if min(sizes) < 1:
        raise ValueError(f"tp = {tp}, pp = {pp}, ep = {ep}: each is at least 1")
    shapes, values = _shapes(source), _values(program, sizes)
    made: dict[Coordinate, dict[str, Composite]] = {
        where: {} for where in product(range(tp), range(pp), range(ep))
    }
    wanted = [*_wanted(program, shapes)]
    need_numbers(program, (rule for rule, _, _ in wanted))
    _complete(program, ((rule, own, leading(i for i, _ in found)) for rule, own, found in wanted))
    for rule, bindings, found in wanted:
        with about(f"{rule}: {next(iter(found.values())).name}"):
            for where in _places(program, rule, bindings, sizes):
                name = rule.pattern.fill(_renumbered(program, rule, bindings, where, sizes, -1))
                if name in made[where]:
                    raise ValueError(f"{made[where][name].rule} makes {name} too")
                made[where][name] = _cut(rule, found, shapes, values, where)
    return {
        where: composed(own, {ORIGIN: source}, lambda name: _slice_of(program, name))
        for where, own in made.items()
    }


def _seen(
    families: Iterable[tuple[Rule, Bindings, Mapping[Coordinate, str]]],
    shapes: Mapping[Coordinate, Mapping[str, Shape]],
) -> Iterator[tuple[Rule, Bindings, Shape]]:
    for rule, bindings, names in families:
        where, name = next(iter(names.items()))
        yield rule, bindings, shapes[where][name][: len(rule.stack)]


def _join(
    made: dict[str, Composite],
    rule: Rule,
    bindings: Bindings,
    names: Mapping[Coordinate, str],
    shapes: Mapping[Coordinate, Mapping[str, Shape]],
    values: Mapping[str, int],
) -> None:
    """Add the atoms that the slices of one name are of."""
    depth, own = len(rule.stack), {w: shapes[w][name] for w, name in sorted(names.items())}
    shape = next(iter(own.values()))
    copies, sizes = _arranged(rule, own, values)
    if (most := max(map(len, copies))) > 1 and not rule.has_copies:
        raise ValueError(f"{most} ranks hold the same rows: set copies = true if that is meant")
    for index in product(*map(range, shape[:depth])):
        pieces = tuple(Piece(where, names[where], index) for where in own)
        bound = {**bindings, **_numbers(rule.stack, index)}
        at = tuple(int(bound[name]) for name in rule.at)
        for target, rows, size in zip(rule.targets, copies, sizes, strict=True):
            atom = target.fill(bound)
            told = target.solve(atom)
            if told is None or not told.items() <= bound.items():
                raise ValueError(f"{atom} does not tell what its groups were: make them stricter")
            views = tuple(View(pieces, copy, rule.dim) for copy in rows)
            part = Part(views, rule.how, rule.max_rel_diff)
            _add(made, atom, at, part, _with(shape[depth:], rule.dim, size), rule)


def _arranged(
    rule: Rule, own: Mapping[Coordinate, Shape], values: Mapping[str, int]
) -> tuple[tuple[tuple[Rows, ...], ...], list[int]]:
    """For each target, where its rows are, once for each copy; and how many rows it has."""
    depth, dim = len(rule.stack), len(rule.stack) + rule.dim
    members, first = [*own], next(iter(own.values()))
    for where, shape in own.items():
        if _with(shape, dim, 0) != _with(first, dim, 0):
            raise ValueError(
                f"it is {[*first]} on {place(members[0])}, but {[*shape]} on {place(where)}"
            )
    if not _splits(rule, first[depth:]):
        return (tuple(map(single, range(len(members)))),), [1]
    ranks = tuple(_rank(rule, where) for where in members)
    widths = {rank: own[where][dim] for rank, where in zip(ranks, members, strict=True)}
    plan = layout(rule, values, sum(widths.values()))
    for rank, where in zip(ranks, members, strict=True):
        if own[where][dim] != (wanted := len(slice_rows(plan)[rank].row)):
            raise ValueError(
                f"it has {own[where][dim]} rows along dimension {rule.dim} on {place(where)}; "
                f"the rule says {wanted}"
            )
    return gathered(plan, ranks), _target_rows(rule, plan)


def _add(
    made: dict[str, Composite], name: str, at: Index, part: Part, shape: Shape, rule: Rule
) -> None:
    old = made.get(name)
    if rule.tie and (old is None or at not in old.parts):
        raise ValueError(f"it is a tie, but no other rule makes {name}")
    if old is None:
        made[name] = Composite(rule, shape, {at: part})
        return
    if old.shape != shape or {len(at)} != set(map(len, old.parts)):
        raise ValueError(f"it is {[*shape]} of {name}, which is {[*old.shape]} by {old.rule}")
    if at not in old.parts:
        old.parts[at] = part
    elif not rule.tie:
        raise ValueError(f"{old.rule} makes {name} too: the two overlap")
    elif rule.check != "first":
        old.parts[at] = replace(old.parts[at], views=old.parts[at].views + part.views)
        old.tied = True


def _whole(made: Mapping[str, Composite]) -> None:
    """Raise ValueError if an index of a leading dimension has no tensor."""
    for name, own in made.items():
        if lost := {*product(*map(range, own.lead))} - {*own.parts}:
            raise ValueError(f"{own.rule}: {name} has nothing at index {[*min(lost)]}")


def _complete(program: Program, families: Iterable[tuple[Rule, Bindings, Shape]]) -> None:
    """Raise ValueError if a rule, unless optional, lacks a layer that counts or others have."""
    seen: dict[str, dict[str, set[int]]] = {}
    for rule, bindings, lead in families:
        numbers = {g: {int(n)} for g, n in bindings.items() if n.isdigit() and not g.isdigit()}
        numbers |= {group: {*range(n)} for group, n in zip(rule.stack, lead, strict=True)}
        for group, own in numbers.items():
            seen.setdefault(rule.match, {}).setdefault(group, set()).update(own)
    needed = [rule for rule in program.rules if rule.match in seen and not rule.optional]
    for group in dict.fromkeys(group for rule in needed for group in seen[rule.match]):
        everything = set().union(*(seen[rule.match].get(group, set()) for rule in needed))
        if any(group in rule.local for rule in needed):
            count = program.counts.get(group, 0)
            everything |= {*range(count if isinstance(count, int) else sum(count))}
        for rule in needed:
            if lost := everything - seen[rule.match].get(group, everything):
                raise ValueError(f"{rule} has nothing for {group} {min(lost)}, which must be there")


# --- invert -------------------------------------------------------------------------------

Found = Mapping[tuple[Index, int], Piece]


def _wanted(
    program: Program, shapes: Mapping[str, Shape]
) -> Iterator[tuple[Rule, Bindings, Found]]:
    """Each tensor of slices: its rule, its groups, and atoms by stack index and target."""
    rules = [rule for rule in program.rules if rule.written]
    found: dict[str, list[tuple[Rule, Any]]] = {name: [] for name in shapes}
    families: dict[Any, tuple[Rule, Bindings, dict[tuple[Index, int], Piece]]] = {}
    for (number, rule), name in product(enumerate(rules), shapes):
        for t, target in enumerate(rule.targets):
            bindings = target.solve(name)
            if bindings is None:
                continue
            found[name] += [] if rule.tie else [(rule, bindings)]
            for at in product(*map(range, shapes[name][: len(rule.at)])):
                bound = bindings | _numbers(rule.at, at)
                index = tuple(int(bound.pop(group)) for group in rule.stack)
                key = (number, *sorted(bound.items()))
                families.setdefault(key, (rule, bound, {}))[2][index, t] = Piece(ORIGIN, name, at)
    nearest = {outline(t.text): t.text for rule in rules for t in rule.targets}
    raise_faults(found, [rule for rule in rules if not rule.tie], nearest)
    yield from families.values()


def _cut(
    rule: Rule,
    found: Found,
    shapes: Mapping[str, Shape],
    values: Mapping[str, int],
    where: Coordinate,
) -> Composite:
    """The slice of one rank."""
    lead, count = leading(index for index, _ in found), range(len(rule.targets))
    for index, t in product(product(*map(range, lead)), count):
        if (index, t) not in found:
            at = f" for {_numbers(rule.stack, index)}" if index else ""
            raise ValueError(f"it needs {rule.targets[t].text} too{at}")
    pieces = {i: tuple(found[i, t] for t in count) for i in product(*map(range, lead))}
    rest = {i: [shapes[p.name][len(p.at) :] for p in own] for i, own in pieces.items()}
    first = next(iter(rest.values()))
    for index, own in rest.items():
        if {_with(s, rule.dim, 0) for s in own} != {_with(first[0], rule.dim, 0)} or own != first:
            raise ValueError(f"it cannot join {own} of {', '.join(p.name for p in pieces[index])}")
    if not _splits(rule, first[0]):
        rows, shape = single(0), first[0]
    else:
        has = [shape[rule.dim] for shape in first]
        plan = layout(rule, values, sum(has))
        if has != (wanted := _target_rows(rule, plan)):
            raise ValueError(
                f"it has {has} rows along dimension {rule.dim}; the rule says {wanted}"
            )
        rows = slice_rows(plan)[_rank(rule, where)]
        shape = _with(first[0], rule.dim, len(rows.row))
    parts = {i: Part((View(own, rows, rule.dim),), "first") for i, own in pieces.items()}
    return Composite(rule, shape, parts)


# --- ranks --------------------------------------------------------------------------------


def _grid(slices: Slices) -> tuple[int, ...]:
    """Ranks along each axis. Raises ValueError for a rank that is missing."""
    if not slices:
        raise ValueError("there are no slices: give a source for each (tp, pp, ep) rank")
    sizes = tuple(max(edge) + 1 for edge in zip(*slices, strict=True))
    for where in product(range(sizes[0]), range(sizes[1]), range(sizes[2])):
        if where not in slices:
            raise ValueError(f"there are no slices of {place(where)}: of {sizes} ranks all count")
    return sizes


def _values(program: Program, sizes: tuple[int, ...]) -> dict[str, int]:
    return dict(program.config) | {f"{a}_size": n for a, n in zip(AXES, sizes, strict=True)}


def _places(
    program: Program, rule: Rule, bindings: Bindings, sizes: tuple[int, ...]
) -> list[Coordinate]:
    """The ranks that have a tensor."""
    values, axes = _values(program, sizes), []
    for axis, size in zip(AXES, sizes, strict=True):
        ranks = [*range(size)]
        for group in [g for g, own in rule.spread.items() if own == axis and size > 1]:
            spans = _spans(program, group, size)
            number = int(bindings[group])
            ranks = [r for r in ranks if spans[r][0] <= number < spans[r][1]]
            if not ranks:
                raise ValueError(f"{group} {number} is on no {axis} rank: counts are too few")
        if axis in rule.on:
            chosen = [evaluate(rank, values) for rank in rule.on[axis]]
            ranks = [rank for rank in ranks if rank in chosen]
        elif axis not in rule.spread.values() and not rule.has_copies:
            if axis == "pp" and size > 1:
                raise ValueError("on which stage it is is not said: set on = {pp = [...]}")
            ranks = ranks if rule.kind == "shard" and axis == rule.over else [0]
        if not ranks:
            raise ValueError(f"it is on no {axis} rank of {size}: on = {dict(rule.on)}")
        axes.append(ranks)
    return [(t, p, e) for t, p, e in product(*axes)]


def _expect(names: Iterable[Coordinate], wanted: Iterable[Coordinate]) -> None:
    found, expected = {*names}, {*wanted}
    if lost := sorted(expected - found):
        raise ValueError(f"it is missing on {', '.join(map(place, lost))}")
    if extra := sorted(found - expected):
        raise ValueError(
            f"it is on {', '.join(map(place, extra))} too, where the rule says it is not: its kind "
            f"is {'replicated' if len(found) > 1 else 'another'}, or set on"
        )


def _spans(program: Program, group: str, size: int) -> list[tuple[int, int]]:
    """First and last + 1 number on each rank."""
    count = program.counts.get(group)
    if count is None:
        raise ValueError(f"how many {group} each of {size} ranks has is unknown: give counts")
    units = count if isinstance(count, int) else sum(count)
    return shares(units, size, "even" if isinstance(count, int) else count)


def _renumbered(
    program: Program,
    rule: Rule,
    bindings: Bindings,
    where: Coordinate,
    sizes: tuple[int, ...],
    sign: int,
) -> dict[str, str]:
    """Groups with local numbers made global (sign 1) or the other way round (-1)."""
    bound = dict(bindings)
    for group, axis in rule.local.items():
        a = AXES.index(axis)
        if sizes[a] == 1:
            continue
        start, stop = _spans(program, group, sizes[a])[where[a]]
        if sign > 0 and int(bound[group]) >= stop - start:
            raise ValueError(f"counts say there are {stop - start} of {group} there")
        bound[group] = str(int(bound[group]) + sign * start)
    return bound


def _rank(rule: Rule, where: Coordinate) -> int:
    return where[AXES.index(rule.over)] if rule.kind == "shard" else 0


# --- names and shapes ---------------------------------------------------------------------


def _atom_of(program: Program, name: str) -> str | None:
    """The atom that all of a slice is, if its name has a rule and is not stacked or split."""
    for rule in program.rules:
        bindings = rule.pattern.solve(name)
        if bindings is not None and len(rule.targets) == 1 and not rule.stack:
            return rule.targets[0].fill(bindings)
    return None


def _slice_of(program: Program, name: str) -> str | None:
    for rule in program.rules:
        bindings = rule.targets[0].solve(name) if rule.written and not rule.at else None
        if bindings is not None and len(rule.targets) == 1 and not rule.stack:
            return rule.pattern.fill(bindings)
    return None


def _shapes(source: Source) -> dict[str, Shape]:
    """Shape of each parameter. Raises ValueError for states of another shape, unless scalars."""
    shapes: dict[str, Shape] = {}
    for (name, state), info in source.tensors.items():
        shape = shapes.setdefault(name, info.shape) or info.shape
        shapes[name] = shape
        if info.shape not in ((), shape):
            raise ValueError(f"{name} ({state}) is {[*info.shape]}, its other states {[*shape]}")
    return shapes


def _splits(rule: Rule, shape: Shape) -> bool:
    """Whether a tensor has rows. Raises ValueError if a scalar should be split."""
    if rule.dim < len(shape):
        return True
    if shape or rule.kind == "shard" or len(rule.targets) > 1:
        raise ValueError(f"it is {[*shape]}: it has no dimension {rule.dim}")
    return False


def _target_rows(rule: Rule, plan: Layout) -> list[int]:
    cuts = plan.cuts
    return [sum(c.rows for c in cuts if c.target == t) for t in range(len(rule.targets))]


def _with(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :]) if dim < len(shape) else shape


def _numbers(groups: Iterable[str], index: Index) -> dict[str, str]:
    return {group: str(i) for group, i in zip(groups, index, strict=True)}
