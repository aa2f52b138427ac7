"""Whole tensors in plain safetensors files, as `hakari checkpoint export` writes them.

    source = open_atoms("atoms")

Two layouts: atoms-00000.safetensors, ..., with tensors called STATE/NAME; or a file for each,
NAME/STATE.safetensors. They hold tensors alone: no step, optimizer, options or other state.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hakari.training.checkpoint import fragments
from hakari.training.checkpoint.boxes import Box, whole
from hakari.training.checkpoint.foreign.hugging_face_folder import Entered, read_header
from hakari.training.checkpoint.fragments import Fragment
from hakari.training.checkpoint.source import Info, Key, Source
from hakari.training.checkpoint.storage import Folder, Location, open_folder

ENDING = ".safetensors"
GROUPED = re.compile(r"atoms-(\d{5,})\.safetensors")
DEPTH = 32
"""Folders below one another in which a file of its own tensor is looked for."""
WORKERS = 8
"""Threads that read headers, of which an export may have many."""


def are_atoms(folder: Folder, names: set[str]) -> bool:
    """Whether a folder, with these names in it, is of one of the layouts; reads a header at most.

    Raises ValueError for a damaged header.
    """
    if any(map(GROUPED.fullmatch, names)):
        return True
    if any("." in name and name.endswith((ENDING, ".pt", ".bin")) for name in names):
        return False
    file = _first(folder)
    return bool(file) and _own(file, [*read_header(folder, file)])


def open_atoms(where: Location) -> Source:
    """Open a folder of whole tensors; headers alone are read.

    Files that are missing at the end cannot be noticed. Raises FileNotFoundError for one that is
    missing before, ValueError for a damaged header, for names that are not of the layout, and for
    a tensor that is there twice.
    """
    folder = open_folder(where)
    infos: dict[Key, Info] = {}
    places: dict[Key, tuple[Fragment, ...]] = {}
    files = _files(folder)
    with ThreadPoolExecutor(WORKERS) as pool:
        headers = pool.map(lambda file: read_header(folder, file), files)
        for file, found in zip(files, headers, strict=True):
            for key, entered in _keys(folder, file, found).items():
                if key in infos:
                    raise ValueError(f"{folder.where}: {key[0]} ({key[1]}) is also in {file}")
                box = whole(entered.info.shape)
                infos[key] = entered.info
                some = 0 not in entered.info.shape
                places[key] = (Fragment(box, file, entered.start),) if some else ()

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        fragments.read(folder, [(key, box, out)], infos, places)

    return Source(infos, read, origin={"framework": "atoms"})


# --- files and names ----------------------------------------------------------------------


def _files(folder: Folder) -> list[str]:
    numbers = {int(m[1]): m[0] for name in folder.entries() if (m := GROUPED.fullmatch(name))}
    for number in range(len(numbers)):
        if number not in numbers:
            raise FileNotFoundError(f"{folder.where}/atoms-{number:05d}{ENDING} is missing")
    files = [numbers[number] for number in sorted(numbers)]
    files = files or [name for name in folder.names() if name.endswith(ENDING)]
    if not files:
        raise FileNotFoundError(
            f"{folder.where} has neither atoms-00000{ENDING} nor NAME/STATE{ENDING}: give a folder "
            "that hakari checkpoint export made"
        )
    return files


def _keys(folder: Folder, file: str, found: dict[str, Entered]) -> dict[Key, Entered]:
    """The tensors of a file by their keys; the file's own name tells where a state ends."""
    if not GROUPED.fullmatch(file):
        if not _own(file, [*found]):
            raise ValueError(f"{folder.where}/{file} does not hold the one tensor that it names")
        name, _, state = file.removesuffix(ENDING).rpartition("/")
        return {(name, state): next(iter(found.values()))}
    keys: dict[Key, Entered] = {}
    for label, entered in found.items():
        state, _, name = label.partition("/")
        if not state or not name:
            raise ValueError(f"{folder.where}/{file}: {label!r} is not STATE/NAME")
        keys[name, state] = entered
    return keys


def _own(file: str, labels: list[str]) -> bool:
    """Whether NAME/STATE.safetensors has just the tensor STATE/NAME."""
    name, _, state = file.removesuffix(ENDING).rpartition("/")
    return bool(name) and labels == [f"{state}/{name}"]


def _first(folder: Folder) -> str:
    """A safetensors file in the first of the folders, or of those in it; '' if there is none.

    Not the list of all files: the folder may be anything, however large.
    """
    below = ""
    for _ in range(DEPTH):
        names = folder.entries()
        file = next((name for name in names if name.endswith(ENDING)), "")
        if file and below:
            return below + file
        here = next((name for name in names if "." not in name[:1]), "")
        inner = folder.child(here) if here else None
        if inner is None or not inner.entries():
            return ""
        folder, below = inner, f"{below}{here}/"
    return ""
