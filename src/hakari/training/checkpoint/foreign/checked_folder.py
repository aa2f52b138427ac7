"""A folder whose reads are checked against the CRC-32 that torch keeps of each storage.

A storage is checked once, when any of it is first read: by what was read if that is all of it,
else by a pass over it in blocks. Nothing of a storage that differs is handed out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast

from zlib_ng.zlib_ng import crc32

from hakari.training.checkpoint.storage import Folder

BLOCK = 2**24
"""Bytes of a storage that are held while it is checked: 16 MiB."""


class StorageError(ValueError):
    """A storage, bytes start .. stop - 1 of a file, is not what was written."""

    def __init__(self, where: str, file: str, storage: str, start: int, stop: int) -> None:
        super().__init__(
            f"{where}/{file}: storage {storage} (bytes {start:,} to {stop:,}) is not what was "
            "written: its CRC-32 differs"
        )
        self.file, self.start, self.stop = file, start, stop


@dataclass(eq=False)
class Storage:
    """Bytes start .. stop - 1 of a file, and the CRC-32 that the file says they have."""

    name: str
    start: int
    stop: int
    crc: int
    right: bool | None = None
    lock: Lock = field(default_factory=Lock)


class CheckedFolder:
    """A `Folder`; `unchecked` are files that were read and keep no checksums."""

    def __init__(self, inside: Folder) -> None:
        self.inside = inside
        self.unchecked: set[str] = set()
        self.storages: dict[str, list[Storage]] = {}
        self.lock = Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inside"], name)

    def note(self, file: str, storage: Storage) -> None:
        """Check a storage when it is read. Raises ValueError if it overlaps another one."""
        if storage.start == storage.stop:
            return
        with self.lock:
            known = self.storages.setdefault(file, [])
            at = bisect_left(known, storage.start, key=lambda each: each.start)
            near = [each for each in known[max(0, at - 1) : at + 1] if each.stop > storage.start]
            if any((each.start, each.stop) == (storage.start, storage.stop) for each in near):
                return
            if any(each.start < storage.stop for each in near):
                raise ValueError(f"storages {near[0].name} and {storage.name} overlap")
            known.insert(at, storage)

    def read(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset`. Raises ValueError, or StorageError for damage."""
        self.inside.read(name, offset, out)
        stop = offset + out.nbytes
        for storage in self._within(name, offset, stop):
            whole = offset <= storage.start and storage.stop <= stop
            first, last = storage.start - offset, storage.stop - offset
            self.check(name, storage, out.cast("B")[first:last] if whole else None)

    def check(self, file: str, storage: Storage, data: memoryview | None = None) -> None:
        """Raise StorageError for a storage that differs; its bytes are read unless given."""
        with storage.lock:
            if storage.right is None:
                found = self._crc(file, storage) if data is None else crc32(data)
                storage.right = found == storage.crc
        if not storage.right:
            place = (storage.name, storage.start, storage.stop)
            raise StorageError(self.inside.where, file, *place)

    def _within(self, file: str, start: int, stop: int) -> list[Storage]:
        with self.lock:
            known = self.storages.get(file, [])
            first = bisect_right(known, start, key=lambda each: each.stop)
            return known[first : bisect_left(known, stop, key=lambda each: each.start)]

    def _crc(self, file: str, storage: Storage) -> int:
        block = memoryview(bytearray(min(BLOCK, storage.stop - storage.start)))
        crc = 0
        for at in range(storage.start, storage.stop, BLOCK):
            part = block[: min(BLOCK, storage.stop - at)]
            self.inside.read(file, at, part)
            crc = crc32(part, crc)
        return crc


def checked(folder: Folder) -> Folder:
    """The folder, with storages checked that `read_torch` finds in it."""
    return cast(Folder, folder if isinstance(folder, CheckedFolder) else CheckedFolder(folder))


def audit(folder: Folder, *unchecked: str) -> tuple[list[str], list[str]]:
    """Damage to storages that were not read yet, and files without checksums, `unchecked` first."""
    assert isinstance(folder, CheckedFolder)
    damage = []
    for file, storages in folder.storages.items():
        for storage in [each for each in storages if each.right is None]:
            try:
                folder.check(file, storage)
            except (OSError, ValueError) as error:
                damage.append(str(error))
    return damage, [*unchecked, *sorted(folder.unchecked)]
