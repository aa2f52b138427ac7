"""Losses kept on disk while they are computed: an interrupted calibration goes on from them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, takewhile
from pathlib import Path
from threading import get_ident

import joblib
import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.risk import CustomRisk, LinearRisk
from hakari.inference.gibbs.sandwich import sampling_steps
from hakari.inference.sampling import generator

REACH = (1.0, 3.0, 9.0, 27.0)  # sampling errors from θ̂ at which a custom loss is known by values
PROBES = 8  # θ at each


@dataclass(frozen=True)
class Cache:
    """A folder (or None: nothing is kept), and what names the problem that its files belong to."""

    folder: Path | None
    problem: str

    def kept(self, name: str, compute: Callable[[], ndarray]) -> ndarray:
        """The array of a name, from its file if there is one, else computed and written.

        What `part` kept of it on the way is removed then.
        """
        if self.folder is None:
            return compute()
        found = _stored(self.folder / self._file(name), compute)
        parts = (self.folder / self._file(name, number) for number in count())
        for part in takewhile(Path.exists, parts):
            part.unlink(missing_ok=True)
        return found

    def part(self, name: str, number: int, compute: Callable[[], ndarray]) -> ndarray:
        """As `kept`, of an array that is a step, the first is 0, on the way to that of the name."""
        if self.folder is None:
            return compute()
        return _stored(self.folder / self._file(name, number), compute)

    def name(self, text: str, *arrays: ndarray) -> str:
        """As `digest`; nothing is read where nothing is kept."""
        return text if self.folder is None else digest(text, *arrays)

    def _file(self, name: str, number: int | None = None) -> str:
        end = "" if number is None else f"-{number}"
        return f"{self.problem}-{digest(name)}{end}.npy"


def cache_for(
    folder: str | Path | None, posterior: GibbsPosterior, weights: Float[ndarray, "B n"]
) -> Cache:
    """The cache of a posterior and its data sets.

    A loss of a linear predictor is known by its kind, shape and rows; a function by its name, its
    rows and its values at θ near and far. Functions that differ in none of them share their files.
    Raises NotADirectoryError where the folder is a file.
    """
    if folder is None:
        return Cache(None, "")
    where = Path(folder)
    if where.exists() and not where.is_dir():
        raise NotADirectoryError(f"cache {where} is a file: give a folder")
    where.mkdir(parents=True, exist_ok=True)
    risk = posterior.risk
    loss = _linear(risk) if isinstance(risk, LinearRisk) else _custom(risk, posterior)
    return Cache(where, digest(loss, posterior.minimiser, weights))


def digest(name: str, *arrays: ndarray) -> str:
    """A short text for a name and the kinds, shapes and bytes of arrays."""
    found = sha256(name.encode())
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:20]


def _stored(file: Path, compute: Callable[[], ndarray]) -> ndarray:
    if file.exists():
        return np.asarray(np.load(file, allow_pickle=False))
    found = compute()
    begun = file.with_name(f".{file.name}.{os.getpid()}.{get_ident()}")
    with begun.open("wb") as stream:
        np.save(stream, found, allow_pickle=False)
    begun.replace(file)
    return found


# --- what a loss is known by ----------------------------------------------------------------


def _linear(risk: LinearRisk) -> str:
    own = () if risk.weights is None else (risk.weights,)
    return digest(f"{risk.loss.kind} {risk.loss.shape!r}", risk.y, risk.X, *own)


def _custom(risk: CustomRisk, posterior: GibbsPosterior) -> str:
    values = [_values(risk, theta) for theta in _probes(risk, posterior)]
    return digest(f"{risk.loss.name} {risk.loss.batched} {_rows(risk)}", *values)


def _probes(risk: CustomRisk, posterior: GibbsPosterior) -> Float[ndarray, "M d"]:
    """θ around the minimiser, in all directions, from a sampling error to far beyond particles."""
    theta = posterior.minimiser
    d = len(theta)
    if risk.loss.jumps:
        root = np.diag(sampling_steps(risk, theta, np.eye(d)))
    else:
        root = np.linalg.cholesky(posterior.sandwich.covariance)
    ways = generator(0, "cache").standard_normal((len(REACH), PROBES, d))
    return np.asarray(theta + (np.array(REACH)[:, None, None] * ways @ root.T).reshape(-1, d))


def _values(risk: CustomRisk, theta: Float[ndarray, " d"]) -> ndarray:
    """Losses less those at θ̂; none outside the loss's domain, which says where it ends."""
    try:
        return risk.excess(theta[None], risk.minimiser)
    except ValueError:
        return np.empty(0)


def _rows(risk: CustomRisk) -> str:
    """A text for the rows; empty for what cannot be pickled, whose losses alone tell it apart."""
    try:
        return str(joblib.hash(risk.rows))
    except (pickle.PicklingError, TypeError, AttributeError):
        return ""
