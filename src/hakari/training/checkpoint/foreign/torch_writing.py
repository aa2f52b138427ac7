"""torch's zip files written as torch.save does, tensors made while they are written."""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from hakari.training.checkpoint.dtypes import BYTES, bits
from hakari.training.checkpoint.foreign.pickles import MOST_DEPTH
from hakari.training.checkpoint.foreign.torch_files import STORAGES
from hakari.training.checkpoint.foreign.torch_values import Record, row_major
from hakari.training.checkpoint.storage import File, Folder
from hakari.training.checkpoint.tensors import NAMES, TORCH, name_of

Fill = Callable[[int, np.ndarray], None]
Progress = Callable[[int], None] | None

ALIGNED = 64
"""Storages start at multiples of 64 bytes, as torch has them."""
BIG = MARK = 2**32 - 1
"""Sizes and places from BIG on need ZIP64; MARK is in their place."""
CHUNK = 2**24
"""Bytes that are made at once when a file is written: 16 MiB."""
WRITTEN = (
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of which records are written: other programs will execute what is written here."""
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor to be written: fill(start, out) makes elements start .. start + out.size - 1.

    dtype: safetensors name. out: flat array of unsigned integers as wide as the elements.
    """

    dtype: str
    shape: tuple[int, ...]
    fill: Fill


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


# --- the pickle ---------------------------------------------------------------------------


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


# --- the zip ------------------------------------------------------------------------------


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
