"""What any checkpoint is, once opened: named logical tensors that are read box by box.

Each format has a function that opens a folder as a `Source`; rules turn a source into another
one; writers take any source. Nothing is read before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from hakari.training.checkpoint.boxes import Box, whole
from hakari.training.checkpoint.dtypes import BYTES, bits

Key = tuple[str, str]
"""(name of the parameter or buffer, state): its value is the state 'weight', and an optimizer's
states keep their own names, such as 'exp_avg'."""

WEIGHT = "weight"


@dataclass(frozen=True)
class Info:
    """Shape and element type (safetensors name, such as 'BF16') of a logical tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Group:
    """Options of an optimizer (learning rate, ...) and the parameters they hold for."""

    options: Mapping[str, Any]
    members: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    read(key, box, out): fill `out`, an array of unsigned integers as wide as the elements and of
    the box's shape, not necessarily contiguous. Raises ValueError for damage, naming the tensor.
    scalars: states that are plain numbers. extra: what else was saved, a tree of plain values and
    tensors; ranks: such trees of each process's own, modules: of modules that
    keep more than tensors, by their names. origin: where it came from, for people:
    framework, topology, versions. audit(): what is damaged of that which no tensor needed,
    and files that were read and have no checksum; None where no file of the format has one.
    """

    tensors: Mapping[Key, Info]
    read: Callable[[Key, Box, np.ndarray], None]
    scalars: Mapping[Key, Any] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    optimizer: str = ""
    tied: tuple[tuple[str, ...], ...] = ()
    step: int | None = None
    extra: Any = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[Any, ...] = ()
    modules: Mapping[str, Any] = field(default_factory=dict)
    audit: Callable[[], tuple[Sequence[str], Sequence[str]]] | None = None

    def array(self, key: Key, box: Box | None = None) -> np.ndarray:
        """A box of a tensor, or all of it, as unsigned integers."""
        info = self.tensors[key]
        box = whole(info.shape) if box is None else box
        out = np.empty([stop - start for start, stop in box], bits(info.dtype))
        self.read(key, box, out)
        return out
