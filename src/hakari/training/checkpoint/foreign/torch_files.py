"""torch's zip files (torch.save) read without executing pickles, tensors left in place.

A .pt file is an uncompressed zip: data.pkl is a pickle that names storages, and each storage
lies raw in an entry of its own, with a CRC-32 that a `checked` folder compares when it is read.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from zlib_ng.zlib_ng import crc32

from hakari.training.checkpoint.dtypes import BYTES
from hakari.training.checkpoint.foreign.checked_folder import CheckedFolder, Storage
from hakari.training.checkpoint.foreign.pickles import DAMAGE, MOST_PICKLE, damaged, unpickle
from hakari.training.checkpoint.foreign.torch_values import Record, Stored
from hakari.training.checkpoint.storage import Folder
from hakari.training.checkpoint.tensors import name_of

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
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"
BLOCK = 2**12


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
    any other class, for damage, and for files in the format from before torch 1.6. Files saved
    without checksums (torch.serialization.set_crc32_options) have 0 in place of each; they are
    read, and `audit` names them if the folder is a `checked` one.
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
        if isinstance(folder, CheckedFolder) and not _sealed(entries):
            folder.unchecked.add(name)
        storage = partial(_storage, folder, window, entries)
        return unpickle(data, f"{what}: data.pkl", TENSORS, inert, storage)
    except DAMAGE as error:
        raise damaged(what, error) from error


# --- the zip ------------------------------------------------------------------------------


class _Window(io.RawIOBase):
    """Part of a file, to be read at any place; small reads are served from blocks of 4 KiB."""

    def __init__(self, folder: Folder, name: str, begin: int, length: int) -> None:
        self.folder = folder.inside if isinstance(folder, CheckedFolder) else folder
        self.name, self.begin, self.length = name, begin, length
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
    magic, flags, crc, packed, size, named, more = struct.unpack("<4s2xH6xIIIHH", head)
    if magic != b"PK\x03\x04" or window.read(named) != info.orig_filename.encode():
        raise ValueError(f"{info.filename} is not where the directory says")
    if not _fields(window.read(more)):
        raise ValueError(f"{info.filename} has a damaged header")
    start = info.header_offset + 30 + named + more
    if start + info.file_size > window.length:
        raise ValueError(f"{info.filename} ends behind the file")
    said = struct.pack("<III", crc, packed, size)
    if flags != info.flag_bits or not _agrees(window, info, start, said):
        raise ValueError(f"{info.filename}: its header and the directory say different things")
    return int(start)


def _agrees(window: _Window, info: zipfile.ZipInfo, start: int, said: bytes) -> bool:
    """Whether checksum and size beside an entry are the directory's, with 32 or 64 bits.

    said: by the local header, which has zeros where they follow the data (bit 3 of the flags).
    """
    narrow = struct.pack("<III", info.CRC, *(min(info.file_size, 2**32 - 1),) * 2)
    if not info.flag_bits & 8:
        return said == narrow
    window.seek(start + info.file_size)
    after = window.read(24)
    wide = struct.pack("<IQQ", info.CRC, info.file_size, info.file_size)
    return after[:4] == b"PK\7\10" and after[4:].startswith((narrow, wide))


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
    if _sealed(entries) and crc32(data) != info.CRC:
        raise ValueError(f"{what}: data.pkl is not what was written: its checksum differs")
    return data


def _sealed(entries: Mapping[str, zipfile.ZipInfo]) -> bool:
    """Whether the file keeps checksums; without, torch writes 0 for every entry."""
    return any(info.CRC for info in entries.values())


def _storage(
    folder: Folder, window: _Window, entries: Mapping[str, zipfile.ZipInfo], given: Any
) -> Stored:
    """The storage that a persistent id names: ('storage', class, key, device, elements)."""
    kind, storage, key, _, count = given
    dtype = STORAGES[storage.name.rpartition(".")[2]]
    info = entries[f"data/{key}"]
    start = _place(window, info)
    if kind != "storage" or type(count) is not int or count * BYTES[dtype] != info.file_size:
        raise ValueError(f"storage {key} has {info.file_size:,} bytes, not {count} of {dtype}")
    begin = window.begin + start
    if isinstance(folder, CheckedFolder) and _sealed(entries):
        folder.note(window.name, Storage(str(key), begin, begin + info.file_size, info.CRC))
    return Stored(dtype, (count,), (1,), window.name, begin)


# --- tensors ------------------------------------------------------------------------------


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
