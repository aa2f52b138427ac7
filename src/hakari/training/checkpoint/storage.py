"""Where files lie: a local folder, or an object store through fsspec.

All that changes a disk goes through here, so that its order can be recorded and replayed in tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

Location = str | Path


class File(Protocol):
    """A file that is written from start to end and is on disk once it is closed."""

    def write(self, data: Any) -> None:
        """Append bytes, or any contiguous buffer."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...


class Folder(Protocol):
    """Files by their names relative to the folder ('data/r00000-000.safetensors')."""

    @property
    def where(self) -> str:
        """Path or URL, for people."""

    @property
    def renames(self) -> bool:
        """Whether a folder is renamed in one step; object stores cannot."""

    def read(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset`. Raises ValueError if the file ends before."""

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""

    def names(self) -> list[str]:
        """All files, sorted, those in folders below with their folder."""

    def entries(self) -> list[str]:
        """Names of files and folders directly in this one, sorted; none if it does not exist."""

    def create(self, name: str) -> File:
        """A new file; its folder is made. Raises FileExistsError."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, replacing it in one step, and have it on disk when this returns."""

    def child(self, name: str) -> Folder:
        """A folder in this one."""

    def rename(self, old: str, new: str) -> None:
        """Rename a folder durably. Raises FileExistsError if `new` exists."""

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it."""

    def sync(self) -> None:
        """Have the names of all files and folders on disk."""

    def free(self) -> int | None:
        """Bytes left, or None where that is unlimited or unknown."""


def open_folder(where: Location) -> Folder:
    """The folder at a path, or at a URL that fsspec knows, such as 's3://bucket/run'."""
    text = os.path.expanduser(str(where).removeprefix("file://"))
    if "://" not in text:
        return LocalFolder(text)
    import fsspec

    system, path = fsspec.core.url_to_fs(text)
    return ObjectFolder(text, system, path.rstrip("/"))


def absolute(where: Location) -> str:
    """The same place whatever the working directory will be."""
    text = os.path.expanduser(str(where).removeprefix("file://"))
    return text if "://" in text else os.path.abspath(text)


def small(folder: Folder, name: str, most: int) -> bytes:
    """The content of a small file. Raises ValueError if it is larger than `most` bytes."""
    size = folder.size(name)
    if size > most:
        raise ValueError(f"{folder.where}/{name} has {size:,} bytes, over the limit of {most:,}")
    data = bytearray(size)
    folder.read(name, 0, memoryview(data))
    return bytes(data)


# --- local --------------------------------------------------------------------------------

SYNC_EVERY = 2**28


@dataclass(frozen=True)
class LocalFolder:
    """A folder of a local or shared file system."""

    where: str
    renames: bool = True

    def read(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset`."""
        handle = os.open(self._path(name), os.O_RDONLY)
        try:
            rest = out.cast("B") if out.nbytes else out
            while len(rest):
                got = os.preadv(handle, [rest], offset)
                if not got:
                    raise ValueError(f"{self.where}/{name} ends at byte {offset:,}: truncated")
                offset, rest = offset + got, rest[got:]
        finally:
            os.close(handle)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return os.stat(self._path(name)).st_size

    def names(self) -> list[str]:
        """All files below."""
        found = []
        for folder, _, files in os.walk(self.where):
            base = os.path.relpath(folder, self.where)
            found += [file if base == "." else f"{base}/{file}" for file in files]
        return sorted(found)

    def entries(self) -> list[str]:
        """Names directly in this folder."""
        try:
            return sorted(os.listdir(self.where))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def create(self, name: str) -> LocalFile:
        """A new file."""
        path = self._path(name)
        _make_folders(os.path.dirname(path))
        return LocalFile(path)

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file in one step."""
        fresh = f"{name}.new"
        if os.path.exists(self._path(fresh)):
            os.unlink(self._path(fresh))
        with self.create(fresh) as file:
            file.write(data)
        os.replace(self._path(fresh), self._path(name))
        _sync_folder(os.path.dirname(self._path(name)))

    def child(self, name: str) -> LocalFolder:
        """A folder in this one."""
        return LocalFolder(self._path(name))

    def rename(self, old: str, new: str) -> None:
        """Rename a folder, and have that on disk."""
        os.rename(self._path(old), self._path(new))  # refused if `new` is a folder with files
        _sync_folder(self.where)

    def remove(self, name: str) -> None:
        """Remove a file or folder."""
        path = self._path(name)
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def sync(self) -> None:
        """Have the names in this folder, and in those below, on disk."""
        for folder, _, _ in os.walk(self.where, topdown=False):
            _sync_folder(folder)

    def free(self) -> int | None:
        """Bytes left for this user."""
        path = self.where
        while not os.path.exists(path):
            path = os.path.dirname(os.path.abspath(path))
        usage = shutil.disk_usage(path)
        return usage.free if usage.total else None  # /proc and its like have no size

    def _path(self, name: str) -> str:
        return os.path.join(self.where, name) if name else self.where


@dataclass
class LocalFile:
    """A new local file; what was written is flushed every 256 MiB, so that closing is short."""

    path: str
    handle: int = -1
    unsynced: int = 0

    def __enter__(self) -> LocalFile:
        self.handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        return self

    def write(self, data: Any) -> None:
        """Append bytes."""
        view = memoryview(data)
        rest = view.cast("B") if view.nbytes else view[:0]
        with _naming(self.path):
            while rest.nbytes:
                done = os.write(self.handle, rest[: 2**30])
                rest, self.unsynced = rest[done:], self.unsynced + done
            if self.unsynced >= SYNC_EVERY:
                os.fsync(self.handle)
                self.unsynced = 0

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                with _naming(self.path):
                    os.fsync(self.handle)
        finally:
            os.close(self.handle)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Have errors of the disk say of which file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or path
        raise


def _make_folders(path: str) -> None:
    if path and not os.path.isdir(path):
        _make_folders(os.path.dirname(path))
        try:
            os.mkdir(path)
        except FileExistsError:
            return
        except OSError as error:
            raise OSError(f"{path} cannot be made: {error.strerror or error}") from error
        _sync_folder(os.path.dirname(path) or ".")


def _sync_folder(path: str) -> None:
    handle = os.open(path or ".", os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        with _naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


# --- object stores ------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectFolder:
    """A prefix of an object store, through fsspec. An object appears whole or not at all."""

    where: str
    system: Any
    path: str
    renames: bool = False

    def read(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset`."""
        if not out.nbytes:
            return
        data = self.system.cat_file(self._path(name), start=offset, end=offset + out.nbytes)
        if len(data) != out.nbytes:
            raise ValueError(f"{self.where}/{name} ends at byte {offset + len(data):,}: truncated")
        out.cast("B")[:] = data

    def size(self, name: str) -> int:
        """Bytes of an object."""
        self.system.invalidate_cache()
        return int(self.system.info(self._path(name))["size"])

    def names(self) -> list[str]:
        """All objects below."""
        self.system.invalidate_cache()
        return sorted(path.removeprefix(self.path + "/") for path in self.system.find(self.path))

    def entries(self) -> list[str]:
        """Names directly below."""
        self.system.invalidate_cache()
        if not self.system.exists(self.path):
            return []
        found: Iterable[str] = self.system.ls(self.path, detail=False)
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def create(self, name: str) -> ObjectFile:
        """A new object."""
        self.system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
        return ObjectFile(self.system, self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Replace an object."""
        self.system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
        self.system.pipe_file(self._path(name), data)

    def child(self, name: str) -> ObjectFolder:
        """The objects below a longer prefix."""
        return ObjectFolder(f"{self.where.rstrip('/')}/{name}", self.system, self._path(name))

    def rename(self, old: str, new: str) -> None:
        """Not to be had."""
        raise OSError(f"{self.where}: an object store does not rename {old} to {new}")

    def remove(self, name: str) -> None:
        """Remove an object, or all below."""
        self.system.rm(self._path(name), recursive=True)
        self.system.invalidate_cache()

    def sync(self) -> None:
        """Nothing to do: an object that appears is stored."""

    def free(self) -> int | None:
        """Unknown."""
        return None

    def _path(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


@dataclass
class ObjectFile:
    """A new object."""

    system: Any
    path: str
    stream: Any = None

    def __enter__(self) -> ObjectFile:
        self.stream = self.system.open(self.path, "wb")
        return self

    def write(self, data: Any) -> None:
        """Append bytes."""
        self.stream.write(memoryview(data))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and hasattr(self.stream, "discard"):
            self.stream.discard()  # else half an object would appear
        else:
            self.stream.close()
