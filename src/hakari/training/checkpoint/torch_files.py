"""torch's zip files (torch.save) read and written without executing pickles, tensors left in place.

A .pt file is an uncompressed zip: data.pkl is a pickle that names storages, and each storage
lies raw in an entry of its own. The pickle is run by a machine that knows no functions but those
in a table, so there is nothing in it that a file could call; objects of other classes are either
inert records or refused.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from hakari.training.checkpoint.dtypes import BYTES, NAMES, TORCH, as_tensor, bits, name_of
from hakari.training.checkpoint.storage import File, Folder

Fill = Callable[[int, np.ndarray], None]
Progress = Callable[[int], None] | None

MOST_PICKLE = 2**30
"""Bytes of a pickle, at most: 1 GiB."""
MOST_NODES, MOST_DEPTH = 10**8, 400
"""Of the tree in a pickle, with what it holds several times counted each time."""
ALIGNED = 64
"""Storages start at multiples of 64 bytes, as torch has them."""
BIG = MARK = 2**32 - 1
"""Sizes and places from BIG on need ZIP64; MARK is in their place."""
CHUNK = 2**24
"""Bytes that are made at once when a file is written: 16 MiB."""
PLAIN = (
    "argparse.Namespace",
    "builtins.range",
    "builtins.slice",
    "io.BytesIO",
    "_io.BytesIO",
    "pathlib.*Path",
    "types.SimpleNamespace",
)
"""Classes that become records in any file."""
WRITTEN = (
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of which records are written: other programs will execute what is written here."""
STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "IntStorage": "I32",
    "FloatStorage": "F32",
    "LongStorage": "I64",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


@dataclass(frozen=True)
class Stored:
    """A tensor that lies raw in a file: strides in elements, offset in bytes from its start."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    file: str
    offset: int


@dataclass(eq=False)
class Record:
    """An object of a class that is not imported: what it was made of, and given afterwards.

    args is None for the class itself. items: of a list or dictionary that the class extends.
    """

    name: str
    args: tuple[Any, ...] | None = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor to be written: fill(start, out) makes elements start .. start + out.size - 1.

    dtype: safetensors name. out: flat array of unsigned integers as wide as the elements.
    """

    dtype: str
    shape: tuple[int, ...]
    fill: Fill


def read_torch(
    folder: Folder,
    name: str,
    offset: int = 0,
    length: int | None = None,
    inert: Sequence[str] = (),
) -> Any:
    """The tree in a file that torch.save made, with `Stored` in place of tensors and storages.

    offset, length: in bytes, of a zip that lies within a larger file. inert: patterns of classes,
    such as 'deepspeed.*', whose objects become `Record`s. Raises ValueError, naming the file, for
    any other class, for damage, and for files in the format from before torch 1.6.
    """
    what = f"{folder.where}/{name}" + (f" (item at byte {offset:,})" if offset else "")
    size = folder.size(name)
    length = size - offset if length is None else length
    if offset < 0 or length < 0 or offset + length > size:
        raise ValueError(f"{what} ends at byte {size:,}, not {offset + length:,}: truncated")
    window = _Window(folder, name, offset, length)
    try:
        entries = _entries(window, what)
        data = _pickle(window, entries, what)
        storage = partial(_storage, window, entries)
        return unpickle(data, f"{what}: data.pkl", TENSORS, inert, storage)
    except DAMAGE as error:
        raise _damaged(what, error) from error


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
        raise _damaged(what, error) from error
    return tree


def write_torch(
    folder: Folder,
    name: str,
    tree: Any,
    budget: int = 2**29,
    progress: Progress = None,
    records: Sequence[str] = WRITTEN,
) -> None:
    """Write a tree as torch.save does; `Lazy` leaves become tensors whose elements are made now.

    budget: bytes of a tensor that are made at once, 16 MiB at most. progress: told of bytes as
    they are written. records: classes, by full name, of which records may be written. Raises
    ValueError for a value that torch's safe loader would refuse, FileExistsError for an old file.
    """
    pickle = _pickled(tree, name, records)  # before there is a file, as values may be refused
    with folder.create(name) as file:
        _append(file, pickle, budget, progress)


def append_torch(
    file: File,
    tree: Any,
    what: str,
    budget: int = 2**29,
    progress: Progress = None,
    records: Sequence[str] = WRITTEN,
) -> int:
    """Append what torch.save writes to an open file, as `write_torch`; returns its bytes.

    what: names the tree in messages.
    """
    return _append(file, _pickled(tree, what, records), budget, progress)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor that lies row by row."""
    return tuple(prod(shape[d + 1 :]) for d in range(len(shape)))


def load(folder: Folder, stored: Stored, most: int = 2**28) -> torch.Tensor:
    """A small tensor's values. Raises ValueError if they span more than `most` bytes."""
    span = 1 + sum((n - 1) * step for n, step in zip(stored.shape, stored.strides, strict=True))
    span = span if prod(stored.shape) else 0
    if span * BYTES[stored.dtype] > most:
        raise ValueError(
            f"{folder.where}/{stored.file}: a tensor of {span * BYTES[stored.dtype]:,} bytes lies "
            f"among plain values, over the limit of {most:,}"
        )
    data = np.zeros(span, bits(stored.dtype))
    if span:
        folder.read(stored.file, stored.offset, data.view(np.uint8).data)
    return as_tensor(data, stored.dtype).as_strided(stored.shape, stored.strides).clone()


def plain(folder: Folder, value: Any) -> Any:
    """A tree that was read, of plain values alone: tensors are loaded, records are dictionaries.

    Raises ValueError for a tensor of over 256 MiB.
    """
    if isinstance(value, Stored):
        return load(folder, value)
    if isinstance(value, Record):
        state = value.state if isinstance(value.state, Mapping) else {"state": value.state}
        args = plain(folder, list(value.args or ()))
        items = {"items": plain(folder, value.items)} if value.items else {}
        kept = {str(key): plain(folder, item) for key, item in state.items() if item is not None}
        return {"class": value.name, "args": args} | items | kept
    if isinstance(value, Mapping):
        return {plain(folder, key): plain(folder, item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(folder, item) for item in value), key=repr)
    if isinstance(value, list | tuple):
        items_of = [plain(folder, item) for item in value]
        return items_of if isinstance(value, list | torch.Size) else tuple(items_of)
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    return bytes(value) if isinstance(value, bytearray) else value


def _damaged(what: str, error: BaseException) -> ValueError:
    said = str(error) or type(error).__name__
    return (
        error
        if said.startswith(what) and type(error) is ValueError
        else ValueError(f"{what} cannot be read ({said}): damaged, or not made by torch.save")
    )


# --- the zip ------------------------------------------------------------------------------

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
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"
BLOCK = 2**12


class _Window(io.RawIOBase):
    """Part of a file, to be read at any place; small reads are served from blocks of 4 KiB."""

    def __init__(self, folder: Folder, name: str, begin: int, length: int) -> None:
        self.folder, self.name, self.begin, self.length = folder, name, begin, length
        self.at = 0
        self.blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        if self.at < 0:
            raise ValueError(f"a place before the start, {self.at:,}")
        return self.at

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self.length - self.at)
        size = rest if size < 0 else min(size, rest)
        if size > MOST_PICKLE:
            raise ValueError(f"{size:,} bytes to be read at once, over {MOST_PICKLE:,}")
        first, last = self.at // BLOCK, (self.at + size - 1) // BLOCK
        near = last - first < 2
        data = b"".join(map(self._block, range(first, last + 1))) if near and size else b""
        start = self.at - first * BLOCK
        data = data[start : start + size] if near else self._fetch(self.at, size)
        self.at += len(data)
        return data

    def _block(self, number: int) -> bytes:
        if number not in self.blocks:
            if len(self.blocks) > 8:
                self.blocks.clear()
            at = number * BLOCK
            self.blocks[number] = self._fetch(at, min(BLOCK, self.length - at))
        return self.blocks[number]

    def _fetch(self, at: int, size: int) -> bytes:
        data = bytearray(size)
        self.folder.read(self.name, self.begin + at, memoryview(data))
        return bytes(data)


def _entries(window: _Window, what: str) -> dict[str, zipfile.ZipInfo]:
    """Entries by their names below the archive's folder. Only the central directory is read."""
    head = window.read(len(LEGACY))
    if head == LEGACY or not head.startswith(b"PK"):
        old = "is in the format from before torch 1.6" if head == LEGACY else "is not a zip file"
        raise ValueError(
            f"{what} {old}: load it where you trust it, and torch.save it again with a newer torch"
        )
    with zipfile.ZipFile(window) as archive:
        infos = archive.infolist()
    names = [info.filename for info in infos]
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1 or len(set(names)) < len(names):
        raise ValueError(f"{what} has {len(roots)} data.pkl, or an entry twice: not by torch.save")
    if f"{roots[0]}constants.pkl" in names:
        raise ValueError(f"{what} is TorchScript, a program: torch.save its state_dict() instead")
    return {info.filename.removeprefix(roots[0]): info for info in infos}


def _place(window: _Window, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, by its local header. Raises ValueError if it is packed."""
    if info.compress_type or info.file_size != info.compress_size or info.flag_bits & 1:
        raise ValueError(f"{info.filename} is compressed or encrypted, which torch.save never does")
    window.seek(info.header_offset)
    head = window.read(30)
    magic, named, more = struct.unpack("<4s22xHH", head)
    if magic != b"PK\x03\x04" or window.read(named) != info.orig_filename.encode():
        raise ValueError(f"{info.filename} is not where the directory says")
    if not _fields(window.read(more)):
        raise ValueError(f"{info.filename} has a damaged header")
    start = info.header_offset + 30 + named + more
    if start + info.file_size > window.length:
        raise ValueError(f"{info.filename} ends behind the file")
    return int(start)


def _fields(extra: bytes) -> bool:
    """Whether an extra field is well formed: a wrong length would move all that follows it."""
    while len(extra) >= 4:
        extra = extra[4 + int.from_bytes(extra[2:4], "little") :] if _fits(extra) else b"?"
    return not extra


def _fits(extra: bytes) -> bool:
    return 4 + int.from_bytes(extra[2:4], "little") <= len(extra)


def _pickle(window: _Window, entries: Mapping[str, zipfile.ZipInfo], what: str) -> bytes:
    order = entries.get("byteorder")
    if order is not None:
        window.seek(_place(window, order))
        if window.read(min(order.file_size, 16)) != b"little":
            raise ValueError(f"{what} is not of a little-endian machine: save it on one")
    info = entries["data.pkl"]
    start = _place(window, info)
    if info.file_size > MOST_PICKLE:
        raise ValueError(
            f"{what}: data.pkl has {info.file_size:,} bytes, over the limit of {MOST_PICKLE:,}"
        )
    window.seek(start)
    data = window.read(info.file_size)
    if zlib.crc32(data) != info.CRC:
        raise ValueError(
            f"{what}: data.pkl is not what was written: its checksum differs (or checksums were "
            "switched off by set_crc32_options: save it with them)"
        )
    return data


def _storage(window: _Window, entries: Mapping[str, zipfile.ZipInfo], given: Any) -> Stored:
    """The storage that a persistent id names: ('storage', class, key, device, elements)."""
    kind, storage, key, _, count = given
    dtype = STORAGES[storage.name.rpartition(".")[2]]
    info = entries[f"data/{key}"]
    start = _place(window, info)
    if kind != "storage" or type(count) is not int or count * BYTES[dtype] != info.file_size:
        raise ValueError(f"storage {key} has {info.file_size:,} bytes, not {count} of {dtype}")
    return Stored(dtype, (count,), (1,), window.name, window.begin + start)


# --- what a pickle may make ---------------------------------------------------------------


def _tensor(
    storage: Stored,
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
    *rest: Any,
    dtype: torch.dtype | None = None,
) -> Stored:
    """A view of a storage, as torch._utils._rebuild_tensor_v2 makes it."""
    name = storage.dtype if dtype is None else name_of(dtype)
    width = BYTES[name]
    if storage.strides != (1,):
        raise ValueError("a tensor of a tensor, in place of a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
        raise ValueError(f"a tensor of shape {[*shape]}, strides {[*strides]}, offset {offset}")
    pairs = zip(shape, strides, strict=True)
    last = offset + 1 + sum((n - 1) * step for n, step in pairs) if 0 not in shape else 0
    if last * width > storage.shape[0] * BYTES[storage.dtype]:
        raise ValueError(f"a tensor of shape {[*shape]} is larger than its storage")
    start = storage.offset + offset * width
    return Stored(name, tuple(shape), tuple(strides), storage.file, start)


def _tensor_v3(*given: Any) -> Stored:
    return _tensor(*given[:6], dtype=given[6])


def _from_type(make: Record, _: Any, given: tuple[Any, ...], state: Any) -> Any:
    """A tensor with attributes, which are left out, or of a subclass, whose data it holds."""
    return TENSORS[make.name](*given)


def _first(value: Any, *rest: Any) -> Any:
    if not isinstance(value, Stored):
        raise ValueError(f"a {type(value).__name__} in place of a tensor")
    return value


def _bytes(text: str | bytes, encoding: str = "latin1") -> bytes:
    if isinstance(text, bytes):
        return text
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _numpy_dtype(code: str, *rest: Any) -> np.dtype[Any]:
    if not re.fullmatch(r"[<|=]?([biufcSU]\d{1,4})", code):
        raise ValueError(f"NumPy's type {code[:40]!r}")
    return np.dtype(code)


def _numpy_scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
        raise ValueError("a NumPy scalar of another size than its type")
    return np.frombuffer(data, dtype)[0]


def _numpy_array(*_: Any) -> np.ndarray:
    return np.empty(0, "u1")  # its state, which follows, gives shape, type and values


def _copied(make: type, *given: Any) -> Any:
    plain = (list, tuple, set, frozenset, dict)
    if len(given) > 1 or not all(isinstance(value, plain) for value in given):
        raise ValueError(f"{make.__name__}{given!r:.40}")
    return make(*given)


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a {type(text).__name__} in place of a string")
    return text


def _named_only(*_: Any) -> Any:
    raise ValueError("a class that may be named, but not made")


def _new(kind: Record, base: Record, state: Any) -> Record:
    """An object of a plain class, as protocols 0 and 1 make it."""
    if base.name != "builtins.object" or kind.args is not None:
        raise ValueError(f"an object of {kind.name} that extends {base.name}")
    return Record(kind.name)


NUMPY = ("numpy.core.multiarray.", "numpy._core.multiarray.")
VALUES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": partial(_copied, OrderedDict),
    "collections.defaultdict": lambda factory=None, *rest: _copied(dict, *rest),
    "collections.Counter": partial(_copied, dict),
    "collections.deque": lambda items=(), most=None: list(items),
    **{
        f"builtins.{make.__name__}": partial(_copied, make)
        for make in (set, frozenset, list, dict, tuple)
    },
    **{
        f"builtins.{name}": _named_only
        for name in ("object", "int", "long", "float", "str", "bool")
    },
    "builtins.bytearray": lambda text="", *code: bytearray(_bytes(text, *code)),
    "builtins.bytes": lambda: b"",
    "builtins.complex": complex,
    "_codecs.encode": _bytes,
    "copyreg._reconstructor": _new,
    "torch.Size": lambda sizes=(): torch.Size(sizes),
    "torch.device": lambda kind, index=None: torch.device(kind, index),
    "torch.serialization._get_layout": _text,
    "torch.torch_version.TorchVersion": _text,
    "numpy.dtype": _numpy_dtype,
    "numpy.ndarray": _numpy_array,
    **{f"{module}scalar": _numpy_scalar for module in NUMPY},
    **{f"{module}_reconstruct": _numpy_array for module in NUMPY},
}
TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _first,
    "torch.Tensor": _first,
    **{f"torch.{name}": _first for name in STORAGES},
    **{f"torch.storage.{name}": _first for name in STORAGES},
}
CONSTANTS = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


# --- the machine --------------------------------------------------------------------------

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
            _fill_array(thing, *state)
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


def _fill_array(array: np.ndarray, _: int, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
    """Give an array its state, once that is known to be plain values of the right size."""
    plain = isinstance(dtype, np.dtype) and not dtype.hasobject and isinstance(data, bytes)
    if not plain or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("a NumPy array of objects")
    if prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"a NumPy array of shape {[*shape]} in {len(data):,} bytes")
    state: Any = (1, tuple(shape), dtype, bool(fortran), data)
    array.__setstate__(state)


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


LEAVES = {str, int, float, bool, bytes, type(None), Stored, torch.dtype}


def _limited(tree: Any, what: str) -> None:
    """Raise ValueError for a tree that is too deep, holds itself, or is too large to walk."""
    sizes: dict[int, int] = {}
    path: list[tuple[int, Iterator[Any], int]] = [(0, iter([tree]), 1)]
    open_ids = {0}
    while path:
        here, rest, size = path[-1]
        for child in rest:
            if type(child) in LEAVES:
                size += 1
                continue
            parts = _parts(child)
            known = 1 if parts is None else sizes.get(id(child))
            size += known or 0
            if known is None:
                if id(child) in open_ids or len(path) > MOST_DEPTH:
                    raise ValueError(f"{what} holds a tree that holds itself, or is too deep")
                path[-1] = (here, rest, size)
                open_ids.add(id(child))
                path.append((id(child), iter(parts or ()), 1))
                break
        else:
            if size > MOST_NODES:
                raise ValueError(f"{what} holds a tree of over {MOST_NODES:,} values")
            path.pop()
            open_ids.discard(here)
            sizes[here] = size
            if path:
                path[-1] = (path[-1][0], path[-1][1], path[-1][2] + size)


def _parts(value: Any) -> Iterable[Any] | None:
    if isinstance(value, dict):
        return (part for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Record):
        return (value.args or (), value.state, value.items)
    return None


# --- writing ------------------------------------------------------------------------------


def _append(file: File, pickle: _Pickle, budget: int, progress: Progress) -> int:
    archive = _Archive(file)
    archive.add("data.pkl", [b"\x80\x02" + bytes(pickle.out) + b"."])
    archive.add("byteorder", [b"little"])
    step = max(8, min(CHUNK, budget))
    for key, (leaf, size) in enumerate(pickle.storages):
        archive.add(f"data/{key}", _chunks(leaf, step, progress), size)
    archive.add("version", [b"3\n"])
    archive.close()
    return archive.at


def _pickled(tree: Any, what: str, records: Sequence[str]) -> _Pickle:
    pickle = _Pickle(records)
    pickle.put(tree, what, 0)
    return pickle


class _Pickle:
    """A pickle of protocol 2 in the making, and the storages that it names."""

    def __init__(self, records: Sequence[str]) -> None:
        self.out = bytearray()
        self.records = records
        self.storages: list[tuple[Lazy | torch.UntypedStorage, int]] = []
        self.known: dict[int, tuple[int, str]] = {}

    def put(self, value: Any, path: str, depth: int) -> None:
        """Append a value. path: names it in messages."""
        if depth > MOST_DEPTH:
            raise ValueError(f"{path[:120]}... lies deeper than {MOST_DEPTH} levels")
        kind = type(value)
        if value is None or kind is bool:
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, torch.Tensor | Lazy):
            self._tensor(value, path)
        elif kind in (int, float, str, bytes, bytearray, complex):
            self._plain(value)
        elif kind in (dict, OrderedDict, list, tuple, set, torch.Size):
            self._container(value, path, depth + 1)
        elif isinstance(value, torch.dtype):
            self._name(str(value))
        elif isinstance(value, torch.device):
            self._call("torch.device", (str(value),), path, depth)
        elif isinstance(value, Record):
            self._record(value, path, depth)
        else:
            raise ValueError(
                f"{path} is a {kind.__module__}.{kind.__qualname__}: torch's safe loader refuses "
                "it, write plain values and tensors"
            )

    def _plain(self, value: Any) -> None:
        if isinstance(value, int):
            self._int(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            raw = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(raw)) + raw
        elif isinstance(value, complex):
            self._call("builtins.complex", (value.real, value.imag), "", 0)
        elif isinstance(value, bytes):
            self._call("_codecs.encode", (value.decode("latin1"), "latin1"), "", 0)
        else:
            self._call("builtins.bytearray", (bytes(value),), "", 0)

    def _int(self, value: int) -> None:
        if -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
            return
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(raw) > 255:
            raise ValueError(f"a number of {value.bit_length():,} bits: torch reads at most 2,039")
        self.out += b"\x8a" + bytes([len(raw)]) + raw

    def _container(self, value: Any, path: str, depth: int) -> None:
        if isinstance(value, dict):
            if isinstance(value, OrderedDict):
                self._call("collections.OrderedDict", (), path, depth)
            else:
                self.out += b"}"
            for key, item in value.items():
                self.put(key, f"{path}/{key!s:.80} (key)", depth)
                self.put(item, f"{path}/{key!s:.80}", depth)
                self.out += b"s"
        elif isinstance(value, list):
            self.out += b"]"
            for number, item in enumerate(value):
                self.put(item, f"{path}/{number}", depth)
                self.out += b"a"
        elif isinstance(value, set):
            self._call("builtins.set", (sorted(value, key=repr),), path, depth)
        elif isinstance(value, torch.Size):
            self._call("torch.Size", (tuple(value),), path, depth)
        else:
            self._tuple(value, path, depth)

    def _tuple(self, value: Sequence[Any], path: str, depth: int) -> None:
        self.out += b"("
        for number, item in enumerate(value):
            self.put(item, f"{path}/{number}", depth)
        self.out += b"t"

    def _name(self, full: str) -> None:
        """A class or function. Modules have the names that protocol 2 gives them."""
        module, _, name = full.rpartition(".")
        module = {"builtins": "__builtin__"}.get(module, module)
        self.out += f"c{module}\n{name}\n".encode()

    def _call(self, name: str, arguments: tuple[Any, ...], path: str, depth: int) -> None:
        self._name(name)
        self._tuple(arguments, path, depth)
        self.out += b"R"

    def _record(self, record: Record, path: str, depth: int) -> None:
        """An object: made by a call of its class, or without one if it has a state."""
        if record.name not in self.records or record.args is None or record.items:
            raise ValueError(
                f"{path} is a record of {record.name[:120]!r}, which is not written: who loads the "
                f"file would execute it (records of {', '.join(self.records)} are)"
            )
        self._name(record.name)
        self._tuple(record.args, path, depth + 1)
        self.out += b"R" if record.state is None else b"\x81"
        if record.state is not None:
            self.put(record.state, path, depth + 1)
            self.out += b"b"

    def _tensor(self, value: torch.Tensor | Lazy, path: str) -> None:
        if isinstance(value, Lazy):
            shape, key = value.shape, self._storage(value, value, value.dtype, path)
            self._view(key, value.dtype, 0, shape, row_major(shape))
            return
        if type(value) is torch.nn.Parameter:
            self._name("torch._utils._rebuild_parameter")
            self.out += b"("
            self._tensor(value.detach(), path)
            self.put(value.requires_grad, path, 0)
            self._call("collections.OrderedDict", (), path, 0)
            self.out += b"tR"
            return
        plain = type(value) is torch.Tensor and value.layout == torch.strided
        if not plain or value.device.type == "meta" or value.dtype not in NAMES:
            raise ValueError(
                f"{path} is a {type(value).__name__} of {value.dtype}, {value.layout}, on "
                f"{value.device}: write plain tensors of a type that safetensors has"
            )
        value = value.detach().resolve_conj().resolve_neg()
        storage, dtype = value.untyped_storage(), name_of(value.dtype)
        key = self._storage(storage, value, dtype, path)
        self._view(key, dtype, int(value.storage_offset()), value.shape, value.stride())

    def _storage(self, storage: Any, value: torch.Tensor | Lazy, dtype: str, path: str) -> int:
        """The number of a storage; what shares one in memory shares one in the file."""
        lazy = isinstance(value, Lazy)
        same = id(value) if lazy else storage._cdata
        size = prod(value.shape) * BYTES[dtype] if lazy else storage.nbytes()
        if same not in self.known:
            self.known[same] = (len(self.storages), dtype)
            self.storages.append((storage, size))
        key, before = self.known[same]
        if before != dtype:
            raise ValueError(f"{path} views the memory of a {before} tensor as {dtype}: clone it")
        return key

    def _view(
        self, key: int, dtype: str, offset: int, shape: Sequence[int], strides: Sequence[int]
    ) -> None:
        """A tensor by its storage, as torch's Tensor.__reduce_ex__ has it."""
        old, size = dtype in STORAGE_OF, self.storages[key][1]
        self._name(f"torch._utils._rebuild_tensor_{'v2' if old else 'v3'}")
        self.out += b"(("
        self.put("storage", "", 0)
        self._name(f"torch.{STORAGE_OF[dtype]}" if old else "torch.storage.UntypedStorage")
        for part in (str(key), "cpu", size // BYTES[dtype] if old else size):
            self.put(part, "", 0)
        self.out += b"tQ"
        for value in (offset, tuple(shape), tuple(strides), False):
            self.put(value, "", 0)
        self._call("collections.OrderedDict", (), "", 0)
        if not old:
            self._name(str(TORCH[dtype]))
        self.out += b"tR"


def _chunks(
    leaf: Lazy | torch.UntypedStorage, step: int, progress: Progress
) -> Iterator[np.ndarray]:
    """The bytes of a storage, a chunk at a time."""
    for data in _made(leaf, step) if isinstance(leaf, Lazy) else _held(leaf, step):
        yield data
        if progress:
            progress(data.nbytes)


def _made(leaf: Lazy, step: int) -> Iterator[np.ndarray]:
    count, many = prod(leaf.shape), max(1, step // BYTES[leaf.dtype])
    for start in range(0, count, many):
        data = np.empty(min(many, count - start), bits(leaf.dtype))
        leaf.fill(start, data)
        yield data


def _held(leaf: torch.UntypedStorage, step: int) -> Iterator[np.ndarray]:
    memory = torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(leaf)
    for start in range(0, leaf.nbytes(), step):
        yield memory[start : start + step].cpu().numpy()


class _Archive:
    """An uncompressed zip, written from start to end; ZIP64 where sizes ask for it."""

    def __init__(self, file: File) -> None:
        self.file, self.at = file, 0
        self.directory: list[bytes] = []

    def add(self, name: str, chunks: Iterable[Any], size: int | None = None) -> None:
        """Append an entry, aligned as torch has it. size: bytes that the chunks add up to."""
        if size is None:
            chunks = list(chunks)
            size = sum(map(len, chunks))
        title, start, big = f"archive/{name}".encode(), self.at, size >= BIG
        wide = struct.pack("<HHQQ", 1, 16, 0, 0) if big else b""
        pad = -(start + 30 + len(title) + len(wide) + 4) % ALIGNED
        extra = wide + b"FB" + struct.pack("<H", pad) + b"Z" * pad
        sizes = (MARK,) * 2 if big else (0, 0)
        fixed = (45 if big else 20, 0x0808, 0, 0, 0x21)
        head = struct.pack("<4s5H3I2H", b"PK\3\4", *fixed, 0, *sizes, len(title), len(extra))
        self._write(head + title + extra)
        crc, begin = 0, self.at
        for chunk in chunks:
            crc = zlib.crc32(chunk, crc)
            self._write(chunk)
        if self.at - begin != size:
            raise ValueError(f"{name} has {self.at - begin:,} bytes instead of {size:,}")
        self._write(struct.pack("<4sIQQ" if big else "<4sIII", b"PK\7\10", crc, size, size))
        self._enter(title, fixed, crc, size, start)

    def _enter(self, title: bytes, fixed: tuple[int, ...], crc: int, size: int, start: int) -> None:
        big = size >= BIG or start >= BIG
        wide = struct.pack("<HHQQQ", 1, 24, size, size, start) if big else b""
        sizes = (MARK,) * 3 if big else (size, size, start)
        head = (45 if big else 20, 45 if big else fixed[0], *fixed[1:], crc, *sizes[:2])
        more = (len(title), len(wide), 0, 0, 0, 0, sizes[2])
        self.directory.append(struct.pack("<4s6H3I5H2I", b"PK\1\2", *head, *more) + title + wide)

    def close(self) -> None:
        """Append the central directory, the ZIP64 one if needed, and the end."""
        start, count = self.at, len(self.directory)
        for entry in self.directory:
            self._write(entry)
        size, end = self.at - start, self.at
        if count >= 2**16 - 1 or start >= BIG or size >= BIG:
            counts = (count, count, size, start)
            self._write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *counts))
            self._write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
            count, size, start = 2**16 - 1, MARK, MARK
        self._write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, start, 0))

    def _write(self, data: Any) -> None:
        self.file.write(data)
        self.at += memoryview(data).nbytes
