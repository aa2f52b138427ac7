"""Trees of plain values and tensors as JSON, exactly: what a run saves beside its tensors.

Tuples, keys that are no strings, bytes and numbers that JSON lacks are written as objects with
one key that starts with '$'. Tensors and arrays are taken out and named by their path.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MARKS = ("$tensor", "$array", "$tuple", "$pairs", "$bytes", "$float")


def encode(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON of a tree; its tensors and arrays are put into `tensors` under their paths.

    Objects that have a `state_dict` are replaced by it. Raises TypeError, naming the path, for
    anything that is neither a plain value nor a tensor.
    """
    if hasattr(tree, "state_dict") and not isinstance(tree, Mapping):
        tree = tree.state_dict()
    if isinstance(tree, np.ndarray):
        return {"$array": _put(tensors, name, _of_array(tree, name))}
    if isinstance(tree, Tensor):
        return {"$tensor": _put(tensors, name, tree.detach())}
    if tree is None or isinstance(tree, bool | str):
        return tree
    if isinstance(tree, int | np.integer):
        return int(tree)
    if isinstance(tree, float | np.floating):
        return float(tree) if math.isfinite(tree) else {"$float": repr(float(tree))}
    if isinstance(tree, bytes):
        return {"$bytes": base64.b64encode(tree).decode()}
    return _container(tree, name, tensors)


def _put(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> str:
    while name in tensors:  # {"a/b": ...} and {"a": {"b": ...}}, or the keys 1 and "1"
        name += "'"
    tensors[name] = tensor
    return name


def _of_array(array: np.ndarray, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is an array of {array.dtype}, which cannot be saved") from error


def _container(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list | tuple):
        items = [encode(value, f"{name}/{i}", tensors) for i, value in enumerate(tree)]
        return items if isinstance(tree, list) else {"$tuple": items}
    if isinstance(tree, Mapping):
        plain = all(isinstance(key, str) and key not in MARKS for key in tree)
        pairs = [(key, encode(value, f"{name}/{key}", tensors)) for key, value in tree.items()]
        if plain:
            return dict(pairs)
        return {"$pairs": [[encode(key, f"{name}/key", tensors), value] for key, value in pairs]}
    raise TypeError(
        f"{name} is a {type(tree).__module__}.{type(tree).__qualname__}: only plain values, "
        "tensors, arrays and objects with a state_dict can be saved"
    )


def decode(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The tree that `encode` was given; `tensor` finds a tensor by its path.

    Raises ValueError for what `encode` cannot have written.
    """
    try:
        return _decoded(tree, tensor)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"malformed state ({type(error).__name__}: {error})") from error


def _decoded(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decoded(value, tensor) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        mark, value = next(iter(tree.items()))
        if mark in MARKS:
            return _marked(mark, value, tensor)
    return {key: _decoded(value, tensor) for key, value in tree.items()}


def _marked(mark: str, value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if mark == "$tensor":
        return tensor(value)
    if mark == "$array":
        return tensor(value).numpy()
    if mark == "$tuple":
        return tuple(_decoded(item, tensor) for item in value)
    if mark == "$pairs":
        return {_decoded(key, tensor): _decoded(item, tensor) for key, item in value}
    if mark == "$bytes":
        return base64.b64decode(value)
    return float(value)
