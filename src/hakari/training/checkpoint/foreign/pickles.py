"""Pickles read without executing them, by a machine that imports nothing.

The machine calls no functions but those in a table, so there is nothing in a pickle that a file
could call; objects of other classes are either inert records or refused.
"""

from __future__ import annotations

import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from hakari.training.checkpoint.foreign.pickle_table import CONSTANTS, PLAIN, VALUES, fill_array
from hakari.training.checkpoint.foreign.torch_values import Record, Stored

MOST_PICKLE = 2**30
"""Bytes of a pickle, at most: 1 GiB."""
MOST_NODES, MOST_DEPTH = 10**8, 400
"""Of the tree in a pickle, with what it holds several times counted each time."""
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


def unpickle(
    data: bytes,
    what: str,
    allowed: Mapping[str, Callable[..., Any]] | None = None,
    inert: Sequence[str] = (),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The tree in a pickle, of which nothing is imported or executed.

    allowed: what makes objects of further classes and functions. inert: patterns of classes whose
    objects become `Record`s. persistent: finds what a persistent id stands for. Raises ValueError
    for any other class and for damage; what: names the pickle in the message.
    """
    try:
        table = {**VALUES, **(allowed or {})}
        tree = _Machine(data, what, table, (*PLAIN, *inert), persistent).run()
        _limited(tree, what)
    except DAMAGE as error:
        raise damaged(what, error) from error
    return tree


def damaged(what: str, error: BaseException) -> ValueError:
    """The error that names what is damaged; the error itself if it does so already."""
    said = str(error) or type(error).__name__
    return (
        error
        if said.startswith(what) and type(error) is ValueError
        else ValueError(f"{what} cannot be read ({said}): damaged, or not made by torch.save")
    )


# --- the machine --------------------------------------------------------------------------

RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
EMPTY: dict[int, Callable[[], Any]] = {
    ord("]"): list,
    ord("}"): dict,
    ord(")"): tuple,
    0x8F: set,
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
}
NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
COUNTED: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    ord("X"): (4, lambda raw: raw.decode("utf-8", "surrogatepass")),
    0x8C: (1, lambda raw: raw.decode("utf-8", "surrogatepass")),
    0x8D: (8, lambda raw: raw.decode("utf-8", "surrogatepass")),
    ord("U"): (1, lambda raw: raw.decode("latin1")),
    ord("T"): (4, lambda raw: raw.decode("latin1")),
    ord("B"): (4, bytes),
    ord("C"): (1, bytes),
    0x8E: (8, bytes),
    0x96: (8, bytearray),
    0x8A: (1, lambda raw: int.from_bytes(raw, "little", signed=True)),
    0x8B: (4, lambda raw: int.from_bytes(raw, "little", signed=True)),
}
SIZED = {str, bytes, bytearray, list, tuple, dict, OrderedDict, set, frozenset}
GETS, PUTS = {ord("h"): 1, ord("j"): 4}, {ord("q"): 1, ord("r"): 4}
TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


class _Machine:
    """A pickle, its stack and its memo. Made anew for each pickle; calls what `table` has."""

    def __init__(
        self,
        data: bytes,
        what: str,
        table: Mapping[str, Callable[..., Any]],
        inert: Sequence[str],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.data, self.what, self.table, self.inert = data, what, table, inert
        self.persistent = persistent
        self.at = self.copied = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Any] = {}

    def run(self) -> Any:
        data, end = self.data, len(self.data)
        while self.at < end:
            op = data[self.at]
            self.at += 1
            if op in EMPTY:
                self.stack.append(EMPTY[op]())
            elif op in GETS:
                self.stack.append(self.memo[self.count(GETS[op])])
            elif op in PUTS:
                self.memo[self.count(PUTS[op])] = self.stack[-1]
            elif op in NUMBERS:
                size = struct.calcsize(NUMBERS[op])
                self.stack.append(struct.unpack(NUMBERS[op], self.take(size))[0])
            elif op in COUNTED:
                width, make = COUNTED[op]
                self.stack.append(make(self.take(self.count(width))))
            elif op in TUPLES:
                self.stack[-TUPLES[op] :] = [tuple(self.some(TUPLES[op]))]
            elif op == ord("."):
                return self.stack.pop()
            elif op in ACTIONS:
                ACTIONS[op](self)
            else:
                raise ValueError(f"{self.what} has an operation {op:#x} that torch never writes")
        raise ValueError(f"it ends after {end:,} bytes: truncated")

    def take(self, size: int) -> bytes:
        data = self.data[self.at : self.at + size]
        if len(data) < size:
            raise ValueError(f"it ends after {len(self.data):,} bytes: truncated")
        self.at += size
        return data

    def count(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def some(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("its stack is empty")
        return self.stack[-count:]

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def find(self, module: str, name: str) -> Any:
        """A class or function by its name: a constant, or a `Record` that says which it is."""
        full = f"{RENAMED.get(module, module)}.{name}"
        if full not in self.globals:
            if full in CONSTANTS:
                self.globals[full] = CONSTANTS[full]
            elif full in self.table or any(fnmatchcase(full, each) for each in self.inert):
                self.globals[full] = Record(full, None)
            else:
                raise ValueError(
                    f"{self.what} is refused: the pickle names {full[:120]!r}, which is not one of "
                    "the classes that are read; load it where you trust it, and save plain values"
                )
        return self.globals[full]

    def made(self, kind: Any, given: Any, named: Any = None) -> Any:
        """What a class or function makes of arguments, if it is in the table; else a record."""
        if not isinstance(kind, Record) or kind.args is not None or not isinstance(given, tuple):
            raise ValueError("a call of something that is no class")
        self.copied += sum(len(each) for each in given if type(each) in SIZED)
        if self.copied > max(2**24, 8 * len(self.data)):
            raise ValueError("it copies the same values over and over")
        if kind.name in self.table:
            return self.table[kind.name](*given)
        return Record(kind.name, (*given, named) if named else given)

    def build(self, state: Any) -> None:
        thing = self.stack[-1]
        if isinstance(thing, Record) and thing.args is not None:
            thing.state = state
        elif isinstance(thing, np.ndarray):
            fill_array(thing, *state)
        elif isinstance(thing, np.dtype):
            if state[1] not in ("<", "|", "="):
                raise ValueError(f"NumPy's type {thing} in byte order {state[1]!r}")
        elif not isinstance(thing, OrderedDict | Stored):  # their attributes are left out
            raise ValueError(f"a state for a {type(thing).__name__}")

    def extend(self, items: Iterable[Any]) -> None:
        thing = self.stack[-1]
        if isinstance(thing, Record) and thing.args is not None:
            thing.items.extend(items)
        elif type(thing) is list:
            thing.extend(items)
        elif type(thing) is set:
            thing.update(items)
        else:
            raise ValueError(f"items for a {type(thing).__name__}")

    def update(self, items: Sequence[Any]) -> None:
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(self.stack[-1], Record):
            self.extend(pairs)
        elif type(self.stack[-1]) in (dict, OrderedDict):
            self.stack[-1].update(pairs)
        else:
            raise ValueError(f"items for a {type(self.stack[-1]).__name__}")

    def popped(self, count: int) -> list[Any]:
        items = self.some(count)
        del self.stack[-count:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def resolve(self, given: Any) -> Any:
        if self.persistent is None:
            raise ValueError("it names a storage, and there are none")
        return self.persistent(given)


ACTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),
    0x95: lambda m: m.take(8),
    ord("("): _Machine.mark,
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): _Machine.pop_mark,
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    ord("l"): lambda m: m.push(list(m.pop_mark())),
    0x91: lambda m: m.push(frozenset(m.pop_mark())),
    ord("a"): lambda m: m.extend(m.popped(1)),
    ord("e"): lambda m: m.extend(m.pop_mark()),
    0x90: lambda m: m.extend(m.pop_mark()),
    ord("s"): lambda m: m.update(m.popped(2)),
    ord("u"): lambda m: m.update(m.pop_mark()),
    0x94: lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    ord("c"): lambda m: m.push(m.find(m.line(), m.line())),
    0x93: lambda m: m.push(m.find(*m.popped(2))),
    ord("R"): lambda m: m.push(m.made(*m.popped(2))),
    0x81: lambda m: m.push(m.made(*m.popped(2))),
    0x92: lambda m: m.push(m.made(*m.popped(3))),
    ord("b"): lambda m: m.build(*m.popped(1)),
    ord("Q"): lambda m: m.push(m.resolve(*m.popped(1))),
}


# --- limits -------------------------------------------------------------------------------

LEAVES = {str, int, float, bool, bytes, type(None), Stored, torch.dtype}


@dataclass
class _Level:
    """A container on the way down a tree: what is left of it, and the values counted in it."""

    rest: Iterator[Any]
    size: int = 1


def _limited(tree: Any, what: str) -> None:
    """Raise ValueError for a tree that is too deep, holds itself, or is too large to walk."""
    sizes: dict[int, int] = {}
    path = {0: _Level(iter([tree]))}
    while path:
        inner = _inner(path[next(reversed(path))], sizes)
        if inner is not None:
            if id(inner) in path or len(path) > MOST_DEPTH:
                raise ValueError(f"{what} holds a tree that holds itself, or is too deep")
            path[id(inner)] = _Level(iter(_parts(inner) or ()))
            continue
        here, level = path.popitem()
        if level.size > MOST_NODES:
            raise ValueError(f"{what} holds a tree of over {MOST_NODES:,} values")
        sizes[here] = level.size
        if path:
            path[next(reversed(path))].size += level.size


def _inner(level: _Level, sizes: Mapping[int, int]) -> Any:
    """The next container of a level that was not counted yet; what precedes it now is."""
    for child in level.rest:
        if type(child) in LEAVES or _parts(child) is None:
            level.size += 1
        elif id(child) in sizes:
            level.size += sizes[id(child)]
        else:
            return child
    return None


def _parts(value: Any) -> Iterable[Any] | None:
    if isinstance(value, dict):
        return (part for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Record):
        return (value.args or (), value.state, value.items)
    return None
