"""Losses kept on disk while they are computed: an interrupted calibration goes on from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs.posterior import GibbsPosterior


@dataclass(frozen=True)
class Cache:
    """A folder (or None: nothing is kept), and what names the problem that its files belong to."""

    folder: Path | None
    problem: str

    def kept(self, name: str, compute: Callable[[], ndarray]) -> ndarray:
        """The array of a name, from its file if there is one, else computed and written."""
        if self.folder is None:
            return compute()
        file = self.folder / f"{self.problem}-{digest(name)}.npy"
        if file.exists():
            return np.asarray(np.load(file, allow_pickle=False))
        found = compute()
        part = file.with_name(f".{file.name}.{os.getpid()}")
        with part.open("wb") as stream:
            np.save(stream, found, allow_pickle=False)
        part.replace(file)
        return found


def cache_for(
    folder: str | Path | None, posterior: GibbsPosterior, weights: Float[ndarray, "B n"]
) -> Cache:
    """The cache of a posterior and its data sets; the loss and rows are known by their values.

    Raises NotADirectoryError where the folder is a file.
    """
    if folder is None:
        return Cache(None, "")
    where = Path(folder)
    if where.exists() and not where.is_dir():
        raise NotADirectoryError(f"cache {where} is a file: give a folder")
    where.mkdir(parents=True, exist_ok=True)
    theta = posterior.minimiser
    near = posterior.risk.excess(theta + np.diag(1e-3 * (1 + np.abs(theta))), theta)
    return Cache(where, digest("problem", theta, near, weights))


def digest(name: str, *arrays: ndarray) -> str:
    """A short text for a name and the bytes of arrays."""
    found = sha256(name.encode())
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:20]
