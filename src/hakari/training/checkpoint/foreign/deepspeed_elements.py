"""Elements of a source's tensors as DeepSpeed's files hold them: read while they are written."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from hakari.training.checkpoint.boxes import extents, flat_range, volume
from hakari.training.checkpoint.dtypes import bits
from hakari.training.checkpoint.foreign.deepspeed_parts import Span
from hakari.training.checkpoint.foreign.torch_writing import Lazy
from hakari.training.checkpoint.source import Key, Source
from hakari.training.checkpoint.tensors import TORCH, as_bits, as_tensor

WIDENED = {("BF16", "F32"), ("F16", "F32")}


def whole(source: Source, key: Key, dtype: str | None = None) -> Lazy:
    """A tensor of the source, cast if a type is named."""
    info = source.tensors[key]
    dtype = dtype or info.dtype

    def fill(start: int, out: np.ndarray) -> None:
        _read(source, key, start, out, dtype)

    return Lazy(dtype, info.shape, fill)


def exact(source: Source, key: Key, dtype: str = "F32") -> Lazy:
    """A tensor of the source as the optimizer's type, of which each value is one."""
    _widened(source, key, dtype)
    return whole(source, key, dtype)


def _widened(source: Source, key: Key, dtype: str) -> None:
    found = source.tensors[key].dtype
    if found != dtype and (found, dtype) not in WIDENED:
        raise ValueError(f"{key[0]} ({key[1]}) is {found}, but DeepSpeed's optimizer holds {dtype}")


def laid(
    source: Source, state: str, spans: Sequence[Span], length: int, dtype: str = "F32"
) -> Lazy:
    """A flat tensor with spans of parameters in it, and zeros as padding."""
    starts = [span.start for span in spans]
    for span in spans:
        _widened(source, (span.name, state), dtype)

    def fill(start: int, out: np.ndarray) -> None:
        out[...] = 0
        stop = start + out.size
        for span in spans[max(0, bisect_right(starts, start) - 1) :]:
            if span.start >= stop:
                break
            low, high = max(start, span.start), min(stop, span.start + span.count)
            if low < high:
                first = span.first + low - span.start
                part = out[low - start : high - start]
                _read(source, (span.name, state), first, part, dtype)

    return Lazy(dtype, (length,), fill)


def _read(source: Source, key: Key, start: int, out: np.ndarray, dtype: str) -> None:
    """Fill `out` with elements of the flattened tensor from `start`, cast to a type."""
    info = source.tensors[key]
    data = out if info.dtype == dtype else np.empty(out.size, bits(info.dtype))
    at = 0
    for box in flat_range(info.shape, start, start + data.size):
        size = volume(box)
        source.read(key, box, data[at : at + size].reshape(extents(box)))
        at += size
    if data is not out:
        out[...] = as_bits(as_tensor(data, info.dtype).to(TORCH[dtype]))
