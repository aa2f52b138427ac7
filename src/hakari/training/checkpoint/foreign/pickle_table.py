"""What a pickle may make beside tensors: Python's, NumPy's and torch's values, by full names."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from hakari.training.checkpoint.foreign.torch_values import Record

PLAIN = (
    "argparse.Namespace",
    "builtins.range",
    "builtins.slice",
    "io.BytesIO",
    "_io.BytesIO",
    "pathlib.*Path",
    "types.SimpleNamespace",
)
"""Classes that become records in any file."""
CONSTANTS = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


def fill_array(array: np.ndarray, _: int, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
    """Give an array its state, once that is known to be plain values of the right size."""
    plain = isinstance(dtype, np.dtype) and not dtype.hasobject and isinstance(data, bytes)
    if not plain or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("a NumPy array of objects")
    if prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"a NumPy array of shape {[*shape]} in {len(data):,} bytes")
    state: Any = (1, tuple(shape), dtype, bool(fortran), data)
    array.__setstate__(state)


def _bytes(text: str | bytes, encoding: str = "latin1") -> bytes:
    if isinstance(text, bytes):
        return text
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _numpy_dtype(code: str, *rest: Any) -> np.dtype[Any]:
    if not re.fullmatch(r"[<|=]?([biufcSU]\d{1,4})", code):
        raise ValueError(f"NumPy's type {code[:40]!r}")
    return np.dtype(code)


def _numpy_scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
        raise ValueError("a NumPy scalar of another size than its type")
    return np.frombuffer(data, dtype)[0]


def _numpy_array(*_: Any) -> np.ndarray:
    return np.empty(0, "u1")  # its state, which follows, gives shape, type and values


def _copied(make: type, *given: Any) -> Any:
    plain = (list, tuple, set, frozenset, dict)
    if len(given) > 1 or not all(isinstance(value, plain) for value in given):
        raise ValueError(f"{make.__name__}{given!r:.40}")
    return make(*given)


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a {type(text).__name__} in place of a string")
    return text


def _named_only(*_: Any) -> Any:
    raise ValueError("a class that may be named, but not made")


def _new(kind: Record, base: Record, state: Any) -> Record:
    """An object of a plain class, as protocols 0 and 1 make it."""
    if base.name != "builtins.object" or kind.args is not None:
        raise ValueError(f"an object of {kind.name} that extends {base.name}")
    return Record(kind.name)


NUMPY = ("numpy.core.multiarray.", "numpy._core.multiarray.")
VALUES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": partial(_copied, OrderedDict),
    "collections.defaultdict": lambda factory=None, *rest: _copied(dict, *rest),
    "collections.Counter": partial(_copied, dict),
    "collections.deque": lambda items=(), most=None: list(items),
    **{
        f"builtins.{make.__name__}": partial(_copied, make)
        for make in (set, frozenset, list, dict, tuple)
    },
    **{
        f"builtins.{name}": _named_only
        for name in ("object", "int", "long", "float", "str", "bool")
    },
    "builtins.bytearray": lambda text="", *code: bytearray(_bytes(text, *code)),
    "builtins.bytes": lambda: b"",
    "builtins.complex": complex,
    "_codecs.encode": _bytes,
    "copyreg._reconstructor": _new,
    "torch.Size": lambda sizes=(): torch.Size(sizes),
    "torch.device": lambda kind, index=None: torch.device(kind, index),
    "torch.serialization._get_layout": _text,
    "torch.torch_version.TorchVersion": _text,
    "numpy.dtype": _numpy_dtype,
    "numpy.ndarray": _numpy_array,
    **{f"{module}scalar": _numpy_scalar for module in NUMPY},
    **{f"{module}_reconstruct": _numpy_array for module in NUMPY},
}
