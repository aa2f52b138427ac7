"""What a torch file's tree holds in place of tensors and of objects, and the plain values of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from hakari.training.checkpoint.dtypes import BYTES, bits
from hakari.training.checkpoint.storage import Folder
from hakari.training.checkpoint.tensors import as_tensor


@dataclass(frozen=True)
class Stored:
    """A tensor that lies raw in a file: strides in elements, offset in bytes from its start."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    file: str
    offset: int


@dataclass(eq=False)
class Record:
    """An object of a class that is not imported: what it was made of, and given afterwards.

    args is None for the class itself. items: of a list or dictionary that the class extends.
    """

    name: str
    args: tuple[Any, ...] | None = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


def load(folder: Folder, stored: Stored, most: int = 2**28) -> torch.Tensor:
    """A small tensor's values. Raises ValueError if they span more than `most` bytes."""
    span = 1 + sum((n - 1) * step for n, step in zip(stored.shape, stored.strides, strict=True))
    span = span if prod(stored.shape) else 0
    if span * BYTES[stored.dtype] > most:
        raise ValueError(
            f"{folder.where}/{stored.file}: a tensor of {span * BYTES[stored.dtype]:,} bytes lies "
            f"among plain values, over the limit of {most:,}"
        )
    data = np.zeros(span, bits(stored.dtype))
    if span:
        folder.read(stored.file, stored.offset, data.view(np.uint8).data)
    return as_tensor(data, stored.dtype).as_strided(stored.shape, stored.strides).clone()


def plain(folder: Folder, value: Any) -> Any:
    """A tree that was read, of plain values alone: tensors are loaded, records are dictionaries.

    Raises ValueError for a tensor of over 256 MiB.
    """
    if isinstance(value, Stored):
        return load(folder, value)
    if isinstance(value, Record):
        state = value.state if isinstance(value.state, Mapping) else {"state": value.state}
        made = {"args": list(value.args or ()), "items": value.items}
        given = {key: item for key, item in made.items() if item} | dict(state)
        kept = {str(key): plain(folder, item) for key, item in given.items() if item is not None}
        return {"class": value.name} | kept
    if isinstance(value, Mapping):
        return {plain(folder, key): plain(folder, item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(folder, item) for item in value), key=repr)
    if isinstance(value, list | tuple):
        items_of = [plain(folder, item) for item in value]
        return items_of if isinstance(value, list | torch.Size) else tuple(items_of)
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    return bytes(value) if isinstance(value, bytearray) else value


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor that lies row by row."""
    return tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
