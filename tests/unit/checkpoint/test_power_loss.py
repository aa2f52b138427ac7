"""The power fails after any system call of a save: what is on the disk holds a whole checkpoint.

All calls of `storage` that change a disk are recorded and replayed on a model of one that keeps
only what was flushed: a file's bytes once the file was, a name once its folder was. Whatever was
not may be lost or kept, in any combination. (universal-checkpoints.md B4.5)
"""

# system calls, as `storage` makes them:
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH119, PTH120

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hakari.training import checkpoint
from hakari.training.checkpoint import commit, manifest, saving, storage
from hakari.training.checkpoint.assign import assign
from hakari.training.checkpoint.retention import LATEST, named, remove, steps
from hakari.training.checkpoint.tensors import as_bits
from tests.distributed.faults import checked, in_memory, pieces

# --- a disk ---------------------------------------------------------------------------------


@dataclass
class File:
    live: bytes = b""
    safe: bytes = b""


@dataclass
class Folder:
    live: dict[str, Any] = field(default_factory=dict)
    safe: dict[str, Any] = field(default_factory=dict)


@dataclass
class Disk:
    """Files and folders as programs see them, and as they are after the power failed."""

    root: Folder = field(default_factory=Folder)

    def at(self, path: str) -> Any:
        node: Any = self.root
        for name in filter(None, path.split("/")):
            node = node.live[name]
        return node

    def place(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        return self.at(above), name

    def apply(self, call: tuple[Any, ...]) -> None:
        kind, path, *rest = call
        if kind == "fsync":
            node = self.at(path)
            node.safe = dict(node.live) if isinstance(node, Folder) else node.live
            return
        if kind == "write":
            self.at(path).live += rest[0]
            return
        folder, name = self.place(path)
        if kind == "create":
            folder.live[name] = File()
        elif kind == "mkdir":
            folder.live[name] = Folder()
        elif kind == "remove":
            del folder.live[name]
        elif kind == "rename":
            there, new = self.place(rest[0])
            there.live[new] = folder.live.pop(name)

    def write_to(self, path: Path, choose: Callable[[Any, Any], Any]) -> None:
        """Make it real; choose: what a name, or a file's bytes, is, of (flushed, seen)."""

        def make(node: Any, at: Path) -> None:
            if isinstance(node, File):
                at.write_bytes(choose(node.safe, node.live))
                return
            at.mkdir()
            for name in sorted({*node.safe, *node.live}):
                child = choose(node.safe.get(name), node.live.get(name))
                if child is not None:
                    make(child, at / name)

        make(self.root, path)


def flushed(safe: Any, _: Any) -> Any:
    return safe


def seen(_: Any, live: Any) -> Any:
    return live


def some(chance: random.Random) -> Callable[[Any, Any], Any]:
    """Any of what was not flushed survives, files in part."""

    def choose(safe: Any, live: Any) -> Any:
        if isinstance(live, bytes) and live != safe and chance.random() < 0.5:
            return live[: chance.randrange(len(live) + 1)]
        return chance.choice([safe, live])

    return choose


# --- recording ------------------------------------------------------------------------------


@dataclass
class Recorder:
    """`storage.os`, that also notes what changes the disk, by paths below `root`."""

    root: str
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mark(self, name: str) -> None:
        self.marks[name] = len(self.calls)

    def inside(self, path: str) -> str:
        return os.path.relpath(path, self.root)

    def note(self, *call: Any) -> None:
        if not call[1].startswith(".."):
            self.calls.append(tuple("" if part == "." else part for part in call))

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        with self.lock:
            handle = os.open(path, flags, mode)
            self.names[handle] = self.inside(path)
            if flags & os.O_CREAT:
                self.note("create", self.inside(path))
            return handle

    def write(self, handle: int, data: Any) -> int:
        with self.lock:
            done = os.write(handle, data)
            self.note("write", self.names[handle], bytes(data[:done]))
            return done

    def fsync(self, handle: int) -> None:
        with self.lock:
            os.fsync(handle)
            self.note("fsync", self.names[handle])

    def close(self, handle: int) -> None:
        with self.lock:
            os.close(handle)

    def mkdir(self, path: str) -> None:
        with self.lock:
            os.mkdir(path)
            self.note("mkdir", self.inside(path))

    def rename(self, old: str, new: str) -> None:
        with self.lock:
            os.rename(old, new)
            self.note("rename", self.inside(old), self.inside(new))
            for handle, name in self.names.items():  # still open ones
                if name.startswith(self.inside(old) + "/"):
                    self.names[handle] = self.inside(new) + name[len(self.inside(old)) :]

    replace = rename

    def unlink(self, path: str) -> None:
        with self.lock:
            os.unlink(path)
            self.note("remove", self.inside(path))

    def rmtree(self, path: str) -> None:
        for folder, folders, files in os.walk(path, topdown=False):
            for name in files:
                self.unlink(f"{folder}/{name}")
            for name in folders:
                os.rmdir(f"{folder}/{name}")
                self.note("remove", self.inside(f"{folder}/{name}"))
        os.rmdir(path)
        self.note("remove", self.inside(path))

    def disk_usage(self, path: str) -> Any:
        return shutil.disk_usage(path)


@contextmanager
def recorded(root: Path) -> Iterator[Recorder]:
    recorder = Recorder(str(root))
    with patch.object(storage, "os", recorder), patch.object(storage, "shutil", recorder):
        yield recorder


def save(root: str, step: int, world: int = 1) -> None:
    """A save as `world` processes make it, keeping the newest one only."""
    if world == 1:
        found, tree = pieces(step), {"step": step}
        checkpoint.save(root, None, extra_state=tree, pieces=found, step=step, keep=1)
        return
    everyone = [
        saving._collect(None, None, pieces(step, r, world), {"step": step}, None)
        for r in range(world)
    ]
    held = [[(piece.key, piece.info, piece.box) for piece in mine] for mine, _ in everyone]
    shares = assign(held)
    requests = [
        commit.Request(root, step, f"{step:032x}", r, world, tuple(held[r]), tuple(shares[r]),
                       everyone[r][1], keep=1, timeout=20)
        for r in range(world)
    ]  # fmt: skip
    with ThreadPoolExecutor(world) as pool:
        calls = [
            pool.submit(commit.carry_out, request, [as_bits(p.tensor) for p in mine])
            for request, (mine, _) in zip(requests, everyone, strict=True)
        ]
        for call in calls:
            call.result()


def recording(
    base: Path, world: int, changes: Callable[[ExitStack], None] = lambda _: None
) -> Recorder:
    """Two saves into a folder that was not there; each mark is when one was acknowledged."""
    base.mkdir()
    with ExitStack() as stack:
        recorder = stack.enter_context(recorded(base))
        changes(stack)
        for step in (1, 2):
            save(f"{base}/runs/a", step, world)
            recorder.mark(str(step))
    return recorder


def replay(recorder: Recorder, folder: Path, seed: int = 0, random_ones: int = 6) -> list[str]:
    """What went wrong after any prefix of the calls, on any disk that it may have left."""
    chance, wrong = random.Random(seed), []
    models = [("seen", seen), ("flushed", flushed)] + [("some", some(chance))] * random_ones
    disk = Disk()
    for number in range(len(recorder.calls) + 1):
        if number:
            disk.apply(recorder.calls[number - 1])
        least = max((int(s) for s, at in recorder.marks.items() if at <= number), default=0)
        for name, choose in models:
            shutil.rmtree(folder, ignore_errors=True)
            disk.write_to(folder, choose)
            try:
                found = checked(folder / "runs/a")
                problem = "" if found >= least else f"step {found}"
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                wrong.append(f"{name}, after {number} of {len(recorder.calls)}: {problem}")
    return wrong


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


# --- the proof ------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
def test_a_whole_checkpoint_is_left_whenever_the_power_fails(folder, world):
    recorder = recording(folder / "real", world)
    kinds = {call[0] for call in recorder.calls}
    assert kinds == {"create", "write", "fsync", "mkdir", "rename", "remove"}
    assert recorder.marks["1"] > 20
    assert replay(recorder, folder / "replayed") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_whole_checkpoint_is_left_on_many_disks(folder, seed):
    recorder = recording(folder / "real", 2)
    assert replay(recorder, folder / "replayed", seed, random_ones=60) == []


def test_the_replayed_disk_is_the_real_one(folder):
    recorder = recording(folder / "real", 2)
    disk = Disk()
    for call in recorder.calls:
        disk.apply(call)
    disk.write_to(folder / "replayed", seen)

    def everything(root: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(root)): p.read_bytes() if p.is_file() else b""
            for p in root.rglob("*")
        }

    assert everything(folder / "replayed") == everything(folder / "real")


# --- mutants: each flush and each order that is needed --------------------------------------


def without_file_flush(stack: ExitStack) -> None:
    def leave(self: Any, kind: Any, *rest: object) -> None:
        storage.os.close(self.handle)

    stack.enter_context(patch.object(storage.LocalFile, "__exit__", leave))


def without_folder_flush(stack: ExitStack) -> None:
    stack.enter_context(patch.object(storage, "_sync_folder", lambda path: None))


def rename_without_flush(stack: ExitStack) -> None:
    def rename(self: Any, old: str, new: str) -> None:
        storage.os.rename(self._path(old), self._path(new))

    stack.enter_context(patch.object(storage.LocalFolder, "rename", rename))


def flush_of_renames_alone(stack: ExitStack) -> None:
    """Neither new files' names nor new folders' are flushed."""
    real = storage._sync_folder

    def rename(self: Any, old: str, new: str) -> None:
        storage.os.rename(self._path(old), self._path(new))
        real(self.where)

    stack.enter_context(patch.object(storage, "_sync_folder", lambda path: None))
    stack.enter_context(patch.object(storage.LocalFolder, "rename", rename))


def commit_before_the_manifest(stack: ExitStack) -> None:
    """In place and in the wrong order."""

    def write(folder: Any, found: Any) -> None:
        written: dict[str, bytes] = {}
        stub = type("Stub", (), {"write": lambda self, name, data: written.update({name: data})})
        manifest_write(stub(), found)
        target = named(found.step)
        above = storage.LocalFolder(os.path.dirname(folder.where))
        above.rename(os.path.basename(folder.where), target)
        for name in (manifest.COMMIT, manifest.MANIFEST):
            above.child(target).write(name, written[name])
        above.rename(target, os.path.basename(folder.where))

    manifest_write = manifest.write
    stack.enter_context(patch.object(commit.manifests, "write", write))


def prune_first(stack: ExitStack) -> None:
    real = manifest.write

    def write(folder: Any, found: Any) -> None:
        root = storage.LocalFolder(os.path.dirname(folder.where))
        for step in steps(root.where):
            remove(root, named(step))
        real(folder, found)

    stack.enter_context(patch.object(commit.manifests, "write", write))


def latest_first(stack: ExitStack) -> None:
    real = manifest.write

    def write(folder: Any, found: Any) -> None:
        root = storage.LocalFolder(os.path.dirname(folder.where))
        root.write(LATEST, f"{named(found.step)}\n".encode())
        real(folder, found)

    stack.enter_context(patch.object(commit.manifests, "write", write))


def latest_in_place(stack: ExitStack) -> None:
    def write(self: Any, name: str, data: bytes) -> None:
        if name in self.entries():
            self.remove(name)
        with self.create(name) as file:
            file.write(data)
        storage._sync_folder(self.where)

    stack.enter_context(patch.object(storage.LocalFolder, "write", write))


MUTANTS = [
    without_file_flush,
    without_folder_flush,
    rename_without_flush,
    flush_of_renames_alone,
    commit_before_the_manifest,
    prune_first,
    latest_first,
    latest_in_place,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_flush_and_every_order_is_needed(folder, mutant):
    recorder = recording(folder / "real", 1, mutant)
    assert replay(recorder, folder / "replayed")
