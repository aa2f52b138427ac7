"""Which checkpoints a folder holds, which is newest, and what may go."""

from __future__ import annotations

import json
import re

from hakari.training.checkpoint.manifest import COMMIT, check_sizes, read
from hakari.training.checkpoint.storage import Folder, Location, open_folder, small

LATEST = "LATEST"
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
        if half or name.startswith((".tmp-step-", ".old-step-")):
            found.append(name)
    return found


def clear_leftovers(where: Location) -> list[str]:
    """Remove what unfinished saves left; no save may be under way. Returns what was removed."""
    root = open_folder(where)
    found = leftovers(where)
    for name in found:
        root.remove(name)
    return found


def advance(root: Folder, name: str) -> None:
    """Point LATEST to a checkpoint, unless it points to a newer one."""
    newest = max(steps(root.where), default=0)
    mine = int(name.removeprefix("step-"))
    root.write(LATEST, f"{named(max(mine, newest))}\n".encode())


def prune(root: Folder, keep: int, spare: str = "") -> list[str]:
    """Remove all but the newest `keep` whole checkpoints (0: none is removed); returns names.

    A checkpoint counts as whole if its manifest is and its files have their sizes; nothing is
    removed that is newer than the oldest one kept, and never the last whole one. spare: name of
    one that stays though there are newer ones, such as that of a run that went back.
    """
    if keep < 1:
        return []
    whole, removed = 0, []
    for step in reversed(steps(root.where)):
        if whole >= keep and named(step) == spare:
            continue
        if whole >= keep:
            remove(root, named(step))
            removed.append(named(step))
        elif _intact(root.child(named(step))):
            whole += 1
    return removed


def remove(root: Folder, name: str) -> None:
    """Take a checkpoint away such that no part of it is ever taken for a whole one."""
    if root.renames:
        if f".old-{name}" in root.entries():  # half removed, before
            root.remove(f".old-{name}")
        root.rename(name, f".old-{name}")
        root.remove(f".old-{name}")
    else:
        root.remove(f"{name}/{COMMIT}")
        root.remove(name)


def _intact(folder: Folder) -> bool:
    try:
        check_sizes(folder, read(folder))
    except (OSError, ValueError, json.JSONDecodeError):
        return False
    return True
