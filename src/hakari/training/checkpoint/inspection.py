"""What a checkpoint holds, and in what two of them differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import hypot, inf, isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hakari.training.checkpoint import tree
from hakari.training.checkpoint.boxes import whole
from hakari.training.checkpoint.conversion import Progress
from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.formats import ROOT, detect, open_any
from hakari.training.checkpoint.manifest import check_sizes, read
from hakari.training.checkpoint.retention import latest, leftovers, located, named, steps
from hakari.training.checkpoint.shard_file import chunks
from hakari.training.checkpoint.source import WEIGHT, Group, Info, Key, Source
from hakari.training.checkpoint.storage import Folder, Location, open_folder
from hakari.training.checkpoint.stored import EXTRA, open_checkpoint, open_stored
from hakari.training.checkpoint.tensors import as_bits, as_tensor, name_of

CHUNK = 2**22
"""Bytes of each of two tensors that are compared at once: 4 MiB, or up to 48 MiB as numbers."""


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer: its value's type, what the optimizer keeps for it, bytes of all."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    states: Mapping[str, Info]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says of itself. made: when, as its files' time says, on a local disk."""

    where: str
    form: str
    step: int | None
    bytes: int
    files: int | None
    made: str | None
    origin: Mapping[str, Any]
    optimizer: str
    groups: tuple[Group, ...]
    tied: tuple[tuple[str, ...], ...]
    tensors: int
    parameters: tuple[Parameter, ...]
    scalars: int = 0
    extra: tuple[str, ...] = ()
    ranks: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Saved:
    """A step in a folder of checkpoints; whole: its manifest is, and its files have their sizes."""

    step: int
    bytes: int
    made: str | None
    whole: bool


@dataclass(frozen=True)
class Root:
    """A folder of checkpoints. problem: why none of them can be called the latest."""

    where: str
    latest: str | None
    steps: tuple[Saved, ...]
    leftovers: tuple[str, ...]
    problem: str = ""


def inspect(where: Location, form: str | None = None, tag: str | None = None) -> Inspection:
    """What a checkpoint of any format holds, or the newest one in a folder; reads no tensor.

    Raises FileNotFoundError or ValueError if it cannot be opened.
    """
    form = form or detect(where, tag)
    if form in ("hakari", ROOT):
        return _inspect_ours(where)
    source, folder = open_any(where, form, tag=tag), open_folder(where)
    return Inspection(
        folder.where,
        form,
        source.step,
        sum(info.bytes for info in source.tensors.values()),
        None,
        _made(folder),
        source.origin,
        source.optimizer,
        source.groups,
        source.tied,
        len(source.tensors),
        _parameters(source.tensors),
        len(source.scalars),
        _keys(source.extra),
    )


def inspect_root(where: Location) -> Root:
    """The checkpoints in a folder, and what is left of saves that were never completed."""
    folder, problem, newest = open_folder(where), "", None
    try:
        newest = latest(where)
    except ValueError as error:
        problem = str(error)
    found = tuple(_saved(folder.child(named(step)), step) for step in steps(where))
    return Root(folder.where, newest, found, tuple(leftovers(where)), problem)


def _inspect_ours(where: Location) -> Inspection:
    stored = open_stored(where)
    found = stored.manifest
    tensors = {key: info for key, info in found.infos.items() if key[1] != EXTRA}
    nothing = torch.empty(0)
    extra = tree.decode(found.extra, lambda _: nothing)
    return Inspection(
        stored.folder.where,
        "hakari",
        found.step,
        found.bytes,
        len(found.files),
        _made(stored.folder),
        found.origin,
        found.optimizer,
        tuple(
            Group(tree.decode(dict(g.options), lambda _: nothing), g.members) for g in found.groups
        ),
        found.tied,
        len(tensors),
        _parameters(tensors),
        len(found.scalars),
        _keys(extra),
        tuple(_keys(tree.decode(own, lambda _: nothing)) for own in found.ranks),
    )


def _saved(folder: Folder, step: int) -> Saved:
    try:
        found = read(folder)
    except (OSError, ValueError):
        return Saved(step, 0, _made(folder), False)
    try:
        check_sizes(folder, found)
    except (OSError, ValueError):
        return Saved(step, found.bytes, _made(folder), False)
    return Saved(step, found.bytes, _made(folder), True)


def _parameters(tensors: Mapping[Key, Info]) -> tuple[Parameter, ...]:
    states: dict[str, dict[str, Info]] = {}
    for (name, state), info in tensors.items():
        states.setdefault(name, {})[state] = info
    found = []
    for name, own in states.items():
        value = own.get(WEIGHT) or next(iter(own.values()))
        size = sum(info.bytes for info in own.values())
        rest = {state: info for state, info in own.items() if state != WEIGHT}
        found.append(Parameter(name, value.shape, value.dtype, rest, size))
    return tuple(found)


def _keys(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        return tuple(map(str, value))
    return () if value is None else (type(value).__name__,)


def _made(folder: Folder) -> str | None:
    """When the newest file that lies directly in a local folder was written."""
    if "://" in folder.where:
        return None
    times = [path.stat().st_mtime for path in Path(folder.where).iterdir() if path.is_file()]
    if not times:
        return None
    return datetime.fromtimestamp(max(times), UTC).isoformat(sep=" ", timespec="seconds")


# --- differences --------------------------------------------------------------------------


@dataclass(frozen=True)
class Changed:
    """A tensor whose values differ in `elements` places: max |a - b| and ||a - b|| / ||a||."""

    parameter: str
    state: str
    elements: int
    largest: float
    relative: float


@dataclass(frozen=True)
class Difference:
    """In what two checkpoints differ.

    kinds: tensors of another shape or element type. rest: what is no tensor: (what, in the first,
    in the second). equal: tensors whose content is the same. ranks: as rest, of what each rank
    keeps of its own, which is no difference of the state: their number and chance may differ.
    """

    only_first: tuple[Key, ...]
    only_second: tuple[Key, ...]
    kinds: tuple[tuple[Key, Info, Info], ...]
    values: tuple[Changed, ...]
    rest: tuple[tuple[str, str, str], ...]
    equal: int
    ranks: tuple[tuple[str, str, str], ...] = ()

    @property
    def same(self) -> bool:
        """Whether there is none, but in ranks."""
        return not (self.only_first or self.only_second or self.kinds or self.values or self.rest)


@dataclass(frozen=True)
class _Side:
    source: Source
    ours: bool
    contents: Mapping[Key, str] = field(default_factory=dict)


def diff(
    first: Location,
    second: Location,
    *,
    forms: tuple[str | None, str | None] = (None, None),
    progress: Progress = None,
) -> Difference:
    """In what two checkpoints differ, of whatever formats.

    Two of ours are compared by the contents in their manifests, and only tensors that differ are
    read; others are read in chunks. forms: as of `open_any`. progress: told of bytes compared.
    Raises FileNotFoundError or ValueError if either cannot be opened or read.
    """
    a, b = _side(first, forms[0]), _side(second, forms[1])
    pairs = [(key, other) for key in a.source.tensors if (other := _partner(key, a, b))]
    met = {other for _, other in pairs}
    kinds, values, equal = [], [], 0
    for key, other in pairs:
        one, two = a.source.tensors[key], b.source.tensors[other]
        if one != two:
            kinds.append((key, one, two))
        changed = _changed(a, b, key, other, progress) if one.shape == two.shape else None
        if changed:
            values.append(changed)
        elif one == two:
            equal += 1
    return Difference(
        tuple(sorted(a.source.tensors.keys() - {key for key, _ in pairs})),
        tuple(
            sorted(key for key in b.source.tensors if key not in met and not _partner(key, b, a))
        ),
        tuple(kinds),
        tuple(values),
        tuple(_rest(a, b)),
        equal,
        tuple(_apart("rank_states", _kept(a), _kept(b))) if a.ours and b.ours else (),
    )


def _side(where: Location, form: str | None) -> _Side:
    form = form or detect(where)
    if form not in ("hakari", ROOT):
        return _Side(open_any(where, form), False)
    folder = located(where).where  # the same one for both calls
    return _Side(open_checkpoint(folder), True, open_stored(folder).manifest.contents)


def _partner(key: Key, a: _Side, b: _Side) -> Key | None:
    """The tensor of the other side; tied ones may be there under another of their names."""
    names = next((n for n in (*a.source.tied, *b.source.tied) if key[0] in n), ())
    for name in (key[0], *names):
        if (name, key[1]) in b.source.tensors:
            return name, key[1]
    return None


def _changed(a: _Side, b: _Side, key: Key, other: Key, progress: Progress) -> Changed | None:
    one, two = a.source.tensors[key], b.source.tensors[other]
    if one == two and a.ours and b.ours and a.contents[key] == b.contents[other]:
        return None
    elements, largest, norm, gap = 0, 0.0, 0.0, 0.0
    for box in chunks(whole(one.shape), max(BYTES[one.dtype], BYTES[two.dtype]), CHUNK):
        x, y = a.source.array(key, box), b.source.array(other, box)
        if progress:
            progress(x.nbytes + y.nbytes)
        size, distance = _distance(x, one.dtype, y, two.dtype)
        elements += len(distance)
        largest = _larger(largest, distance)
        norm, gap = hypot(norm, size), hypot(gap, _norm(distance))
    if not elements:
        return None
    return Changed(*key, elements, largest, gap / norm if norm else inf if gap else 0.0)


def _distance(x: np.ndarray, old: str, y: np.ndarray, new: str) -> tuple[float, np.ndarray]:
    """||a||, and |a - b| of the elements that differ: in any bit, or, between types, as numbers."""
    a, b = _numbers(x, old), _numbers(y, new)
    same = (x == y).reshape(-1) if old == new else (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        return _norm(a), np.abs(a[~same] - b[~same])


def _numbers(values: np.ndarray, dtype: str) -> np.ndarray:
    tensor = as_tensor(np.ascontiguousarray(values).reshape(-1), dtype)
    return tensor.to(torch.complex128 if dtype == "C64" else torch.float64).numpy()


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values))


def _larger(largest: float, distance: np.ndarray) -> float:
    """Not a number as soon as one of them is, which a plain maximum may lose."""
    new = float(distance.max()) if distance.size else 0.0
    return new if isnan(new) or new > largest else largest


def _rest(a: _Side, b: _Side) -> Iterator[tuple[str, str, str]]:
    """What is no tensor. What one format keeps beside tensors is not looked for in another's."""
    one, two = a.source, b.source
    plain: list[tuple[str, Any, Any]] = [
        ("step", one.step, two.step),
        ("optimizer", one.optimizer, two.optimizer),
        ("scalars", dict(one.scalars), dict(two.scalars)),
    ]
    if a.ours and b.ours:
        plain.append(("extra_state", one.extra, two.extra))
    for name, x, y in plain:
        yield from _apart(name, x, y)
    yield from _options(one, two)


def _kept(side: _Side) -> dict[str, Any]:
    """What ranks keep of their own, of those that keep anything."""
    return {str(rank): own for rank, own in enumerate(side.source.ranks) if own is not None}


def _apart(name: str, one: Any, two: Any) -> Iterator[tuple[str, str, str]]:
    """Leaves of two trees that differ: path, in the first, in the second."""
    left, right = dict(_leaves(one, name)), dict(_leaves(two, name))
    for path in dict.fromkeys((*left, *right)):
        if left.get(path) != right.get(path):
            yield path, left.get(path, "nothing"), right.get(path, "nothing")


def _options(one: Source, two: Source) -> Iterator[tuple[str, str, str]]:
    """Options of the optimizer that differ, by parameter, however parameters are grouped."""
    if bool(one.groups) != bool(two.groups):
        yield "groups of options", str(len(one.groups)), str(len(two.groups))
        return
    left, right = _by_parameter(one), _by_parameter(two)
    found: dict[tuple[str, str, str], list[str]] = {}
    for name in dict.fromkeys((*left, *right)):
        mine, other = left.get(name, {}), right.get(name, {})
        for option in dict.fromkeys((*mine, *other)):
            x, y = mine.get(option, "nothing"), other.get(option, "nothing")
            if x != y:
                found.setdefault((option, x, y), []).append(name)
    for (option, x, y), names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{option} of {names[0]}{more}", x, y


def _by_parameter(source: Source) -> dict[str, dict[str, str]]:
    return {
        name: {
            path: text for option, v in group.options.items() for path, text in _leaves(v, option)
        }
        for group in source.groups
        for name in group.members
    }


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Each plain value of a tree with its path, as text; tensors by a digest of their bytes."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            name = " ".join(key) if isinstance(key, tuple) else str(key)
            yield from _leaves(item, f"{path}/{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}/{number}")
    elif isinstance(value, np.ndarray):
        yield from _leaves(torch.from_numpy(np.array(value, order="C")), path)
    elif isinstance(value, Tensor):
        data = np.ascontiguousarray(as_bits(value.detach().cpu().contiguous())).tobytes()
        yield path, f"{name_of(value.dtype)} {[*value.shape]} {_digest(data)}"
    else:
        text = repr(value)
        yield path, text if len(text) <= 80 else f"{text[:60]}... {_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
