"""A model's state in one file: arrays as NumPy keeps them, everything else as JSON; no pickle."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from hakari.inference.bidirectional.batch import Passes
from hakari.inference.bidirectional.drift import Alarm, Monitor
from hakari.inference.bidirectional.evidence import Evidence
from hakari.inference.bidirectional.features import (
    FourierBasis,
    Polynomial,
    PolynomialBasis,
    RandomFourier,
    basis_from_dict,
)
from hakari.inference.bidirectional.heads import Grams, Heads
from hakari.inference.bidirectional.identification import RatioSums
from hakari.inference.bidirectional.nuisance import Nuisance
from hakari.inference.bidirectional.online_qml import OnlineFit, OnlinePasses
from hakari.inference.bidirectional.online_steps import Coordinates, OnlineSettings, OnlineState
from hakari.inference.bidirectional.orthogonal_moments import MomentSums
from hakari.inference.bidirectional.readings import Readings
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.bidirectional.stream import Stream

FORMAT = "hakari bidirectional effects, 1"
_KINDS: tuple[type[Any], ...] = (
    Alarm,
    Evidence,
    Grams,
    Heads,
    MomentSums,
    Monitor,
    Nuisance,
    Coordinates,
    OnlineFit,
    OnlinePasses,
    OnlineSettings,
    OnlineState,
    Passes,
    Polynomial,
    RandomFourier,
    RatioSums,
    Readings,
    Rows,
    Stream,
)


def write(path: Path, state: dict[str, Any]) -> None:
    """Write the state beside the path, then move it there: an older file is whole until then.

    Raises TypeError for a value that is neither an array, a plain one, nor one of ours.
    """
    arrays: dict[str, ndarray] = {}
    record = _plain(state, arrays)
    text = json.dumps({"format": FORMAT, "state": record})
    beside = path.with_name(path.name + ".partial")
    with beside.open("wb") as file:
        np.savez(file, text=np.array(text), **arrays)  # type: ignore[arg-type]
    beside.replace(path)


def read(path: Path) -> dict[str, Any]:
    """The state that `write` wrote. Raises ValueError for another file, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        whole = json.loads(str(arrays.pop("text")))
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a saved model: {error}") from None
    if whole.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {whole.get('format')!r}; {FORMAT!r} is read")
    state: dict[str, Any] = _made(whole["state"], arrays)
    return state


def _plain(value: Any, arrays: dict[str, ndarray]) -> Any:
    """As JSON takes it; arrays are put aside under names."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return {"labels": [_plain(label, arrays) for label in value]}
    if isinstance(value, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, FourierBasis | PolynomialBasis):
        return {"basis": value.to_dict()}
    if is_dataclass(value) and type(value) in _KINDS:
        parts = {field.name: _plain(getattr(value, field.name), arrays) for field in fields(value)}
        return {"kind": type(value).__name__, "of": parts}
    if isinstance(value, dict):
        return {"map": {str(name): _plain(part, arrays) for name, part in value.items()}}
    if isinstance(value, list | tuple):
        return {"tuple": [_plain(part, arrays) for part in value]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be saved: keep it out of the model")


def _made(record: Any, arrays: dict[str, ndarray]) -> Any:
    if not isinstance(record, dict):
        return record
    if "array" in record:
        return arrays[record["array"]]
    if "labels" in record:
        return np.array(record["labels"], dtype=object)
    if "basis" in record:
        return basis_from_dict(record["basis"])
    if "map" in record:
        return {name: _made(part, arrays) for name, part in record["map"].items()}
    if "tuple" in record:
        return tuple(_made(part, arrays) for part in record["tuple"])
    kinds = {kind.__name__: kind for kind in _KINDS}
    parts = {name: _made(part, arrays) for name, part in record["of"].items()}
    return kinds[record["kind"]](**parts)
