"""Which checkpoints a folder holds, which is newest, and what may go."""

from __future__ import annotations

import json
import re

from hakari.training.checkpoint.manifest import COMMIT, check_sizes, read
from hakari.training.checkpoint.storage import Folder, Location, open_folder, small

LATEST = "LATEST"
OLD = ".old-step-"
STEP = re.compile(r"step-(\d{8,})")


def named(step: int) -> str:
    """Folder of a step's checkpoint."""
    return f"step-{step:08d}"


def steps(where: Location) -> list[int]:
    """Steps of the committed checkpoints in a folder, oldest first."""
    root = open_folder(where)
    found = [int(match[1]) for name in root.entries() if (match := STEP.fullmatch(name))]
    return sorted(step for step in found if COMMIT in root.child(named(step)).entries())


def latest(where: Location) -> str | None:
    """Where the newest committed checkpoint is, or None if there is none.

    Raises ValueError if LATEST names a newer one: that one was complete and is no more.
    """
    root = open_folder(where)
    there = steps(where)
    newest = named(there[-1]) if there else None
    if LATEST in root.entries():
        said = small(root, LATEST, 2**12).decode(errors="replace").strip()
        match = STEP.fullmatch(said)
        if not match or (int(match[1]) not in there):
            way = f"to go on from {newest}, remove {LATEST}" if newest else "none is complete"
            raise ValueError(
                f"{root.where}/{LATEST} names {said!r}, which is not a complete checkpoint; {way}"
            )
    return f"{root.where.rstrip('/')}/{newest}" if newest else None


def located(where: Location) -> Folder:
    """The checkpoint at a path: itself, or the newest in it.

    Raises FileNotFoundError if there is none, ValueError as `latest`.
    """
    folder = open_folder(where)
    if COMMIT in folder.entries():
        return folder
    newest = latest(where)
    if newest is None:
        lost = leftovers(where)
        said = f" ({len(lost)} incomplete save, such as {lost[0]})" if lost else ""
        raise FileNotFoundError(f"{folder.where} holds no complete checkpoint{said}")
    return open_folder(newest)


def leftovers(where: Location) -> list[str]:
    """Folders of saves that were never completed, and of checkpoints half removed."""
    root = open_folder(where)
    found = []
    for name in root.entries():
        half = STEP.fullmatch(name) and COMMIT not in root.child(name).entries()
        if half or name.startswith((".tmp-step-", OLD)):
            found.append(name)
    return found


def clear_leftovers(where: Location) -> list[str]:
    """Remove what unfinished saves left; no save may be under way. Returns what was removed."""
    root = open_folder(where)
    found = leftovers(where)
    for name in found:
        root.remove(name)
    return found


def go_back(root: Folder, step: int) -> None:
    """Point LATEST to the newest checkpoint up to a step, so that those after it can go."""
    root.write(LATEST, f"{named(max(s for s in steps(root.where) if s <= step))}\n".encode())


def advance(root: Folder, name: str) -> None:
    """Point LATEST to a checkpoint, unless it points to a newer one."""
    newest = max(steps(root.where), default=0)
    mine = int(name.removeprefix("step-"))
    root.write(LATEST, f"{named(max(mine, newest))}\n".encode())


def prune(where: Location, keep: int, fresh: str = "") -> list[str]:
    """Remove all but the newest `keep` whole checkpoints; returns the names of those removed.

    where, keep, fresh: as of `removable`, which also says what is raised.
    """
    root, names = open_folder(where), removable(where, keep, fresh)
    for name in names:
        remove(root, name)
    for name in root.entries():  # half removed, before
        if name.startswith(OLD):
            root.remove(name)
    return names


def after(where: Location, step: int) -> list[str]:
    """Names of the checkpoints that are newer than a step, newest first.

    Raises ValueError if no whole one would be left.
    """
    there = steps(where)
    root, older = open_folder(where), [each for each in there if each <= step]
    if not any(_intact(root.child(named(each)), thoroughly=True) for each in reversed(older)):
        raise ValueError(f"{root.where} has no whole checkpoint of step {step} or before it")
    return [named(each) for each in reversed(there) if each > step]


def removable(where: Location, keep: int, fresh: str = "") -> list[str]:
    """Names of the checkpoints that are older than the newest `keep` whole ones.

    A checkpoint counts as whole if every byte of it is what was written: one that is damaged
    never lets the one before go. fresh: name of one that was just written, so that the others
    need not be read; it stays though there may be newer ones, as when a run went back.
    Raises ValueError for keep < 1, and for a folder that is itself a checkpoint.
    """
    root, whole, found = open_folder(where), 0, []
    if keep < 1:
        raise ValueError(f"keep {keep}: at least 1 checkpoint has to be kept")
    if COMMIT in root.entries():
        raise ValueError(f"{root.where} is one checkpoint: give the folder that it lies in")
    for step in reversed(steps(where)):
        if whole >= keep:
            found += [named(step)] if named(step) != fresh else []
        elif _intact(root.child(named(step)), thoroughly=not fresh):
            whole += 1
    return found


def remove(root: Folder, name: str) -> None:
    """Take a checkpoint away such that no part of it is ever taken for a whole one."""
    if root.renames:
        old = OLD + name.removeprefix("step-")
        if old in root.entries():  # half removed, before
            root.remove(old)
        root.rename(name, old)
        root.remove(old)
    else:
        root.remove(f"{name}/{COMMIT}")
        root.remove(name)


def _intact(folder: Folder, thoroughly: bool) -> bool:
    if thoroughly:
        from hakari.training.checkpoint.verification import verify

        return not verify(folder.where).damage
    try:
        check_sizes(folder, read(folder))
    except (OSError, ValueError, json.JSONDecodeError):
        return False
    return True
