"""Atoms, as `hakari checkpoint export` writes them: plain safetensors named STATE/NAME.

They lie in files atoms-00000.safetensors, ..., or each in its own, NAME/STATE.safetensors. There
are tensors alone: no step, no options of an optimizer, no extra state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

import numpy as np

from hakari.training.checkpoint import fragments
from hakari.training.checkpoint.boxes import Box, whole
from hakari.training.checkpoint.conversion import ATOMS
from hakari.training.checkpoint.foreign.hugging_face_folder import metadata, read_header
from hakari.training.checkpoint.fragments import Fragment
from hakari.training.checkpoint.source import Info, Key, Source
from hakari.training.checkpoint.storage import Folder, Location, open_folder

GROUPED = re.compile(r"atoms-\d{5,}\.safetensors")
SUFFIX = ".safetensors"
DEEPEST = 16
"""Folders within one another that are looked into to tell the format."""


def open_atoms(where: Location) -> Source:
    """Open a folder of atoms; headers alone are read.

    Where no file says which states there are, a state is what stands before the first '/'. Raises
    ValueError for files that are damaged, missing, or not of an export, FileNotFoundError if there
    is none.
    """
    folder = open_folder(where)
    files = _files(folder)
    if not files:
        raise FileNotFoundError(
            f"{folder.where} has neither atoms-00000{SUFFIX} nor NAME/STATE{SUFFIX}"
        )
    states = _states(folder, files)
    infos: dict[Key, Info] = {}
    places: dict[Key, tuple[Fragment, ...]] = {}
    for file in files:
        for title, entered in read_header(folder, file).items():
            key = _key(folder, file, title, states)
            if key in infos:
                raise ValueError(f"{folder.where} has {key[0]} ({key[1]}) twice, also in {file}")
            infos[key] = entered.info
            places[key] = (Fragment(whole(entered.info.shape), file, entered.start),)

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        fragments.read(folder, [(key, box, out)], infos, places)

    return Source(infos, read, origin={"framework": "atoms"})


def holds_atoms(folder: Folder, names: Collection[str]) -> bool:
    """Whether a folder with these entries was exported, as far as its first file says."""
    if any(GROUPED.fullmatch(name) for name in names):
        return True
    file = _first(folder, names)
    if not file:
        return False
    try:
        titles = [*read_header(folder, file)]
    except (OSError, ValueError):
        return False
    return len(titles) == 1 and bool(_fitting(file, titles[0]))


def _first(folder: Folder, names: Collection[str]) -> str:
    """The first file in the first folder, and in the first of that; '' if it is no safetensors."""
    path: list[str] = []
    for _ in range(DEEPEST):
        visible = sorted(name for name in names if not name.startswith("."))
        files = [name for name in visible if name.endswith(SUFFIX)]
        if files and path:
            return "/".join([*path, files[0]])
        if not visible:
            break
        path.append(visible[0])
        folder = folder.child(visible[0])
        names = folder.entries()
    return ""


def _files(folder: Folder) -> list[str]:
    grouped = [name for name in folder.entries() if GROUPED.fullmatch(name)]
    return grouped or [n for n in folder.names() if n.endswith(SUFFIX) and "/" in n]


def _states(folder: Folder, files: Sequence[str]) -> list[str]:
    """States as the first file tells, longest first. Raises ValueError if files are missing."""
    said = metadata(folder, files[0]).get(ATOMS)
    if said is None:
        return []
    try:
        table = json.loads(said)
        count, states = int(table["files"]), sorted(map(str, table["states"]), key=len)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder.where}/{files[0]}: metadata {ATOMS} is {error!r}") from None
    if count != len(files):
        raise ValueError(
            f"{folder.where} has {len(files):,} of {count:,} files: the export was interrupted, or "
            "files were taken away; export again"
        )
    return states[::-1]


def _key(folder: Folder, file: str, title: str, states: Sequence[str]) -> Key:
    if "/" in file:
        keys = _fitting(file, title)
    else:
        known = [state for state in states if title.startswith(f"{state}/")]
        keys = _cuts(title) if not known else [(title.removeprefix(f"{known[0]}/"), known[0])]
    if not keys:
        wanted = (
            f"{file.removesuffix(SUFFIX)}, the other way round" if "/" in file else "STATE/NAME"
        )
        raise ValueError(
            f"{folder.where}/{file} holds {title!r}, which is not {wanted}: it is of no export"
        )
    return keys[0]


def _fitting(file: str, title: str) -> list[Key]:
    """What STATE/NAME can be in a file NAME/STATE.safetensors."""
    return [key for key in _cuts(title) if file == f"{key[0]}/{key[1]}{SUFFIX}"]


def _cuts(title: str) -> list[Key]:
    """(NAME, STATE) for each '/' that may stand between them."""
    slashes = [at for at, letter in enumerate(title) if letter == "/"]
    return [(title[at + 1 :], title[:at]) for at in slashes if 0 < at < len(title) - 1]
