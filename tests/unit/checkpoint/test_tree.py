"""Trees of plain values and tensors come back as they were, through JSON."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hakari.training.checkpoint.tree import MARKS, decode, encode


def through(tree: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(encode(tree, "extra", tensors)))
    return decode(plain, tensors.__getitem__)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return type(b) is Tensor and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, float):
        return (
            type(b) is float
            and (a == b or (a != a and b != b))
            and (math.copysign(1, a) == math.copysign(1, b) or a != a)
        )
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return type(b) is dict and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text()
    | st.binary()
)
keys = st.text() | st.integers() | st.booleans() | st.sampled_from(MARKS) | st.tuples(st.integers())
trees = st.recursive(
    plain
    | st.sampled_from([torch.arange(3), torch.tensor(2.0, dtype=torch.bfloat16), np.ones((2, 1))]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(trees)
@settings(max_examples=200)
def test_any_tree_comes_back(tree):
    assert same(tree, through(tree))


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {1: torch.ones(1), "1": torch.zeros(1)},
        {True: torch.ones(1), "True": torch.zeros(1)},
        [{"0": torch.ones(1)}, {"0": torch.zeros(1)}],
        {"$tensor": "x"},
        {"$tuple": [1]},
        {"$other": 1},
        {"": {"": 0.1}},
        [math.nan, math.inf, -math.inf, -0.0, 1e-320],
        {"x": np.arange(6, dtype=np.uint16).reshape(2, 3), "y": np.float64(0.5).tolist()},
        [torch.tensor([], dtype=torch.int64), np.zeros((0, 2))],
        random_state := __import__("random").Random(3).getstate(),
    ],
)
def test_trees_that_are_easily_confused_come_back(tree):
    assert same(tree, through(tree))


def test_objects_with_a_state_are_replaced_by_it():
    schedule = torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), [lambda step: 0.5]
    )
    found = through({"schedule": schedule})
    assert found["schedule"]["last_epoch"] == 0
    assert through(OrderedDict(b=1, a=2)) == {"b": 1, "a": 2}
    assert through([np.int64(3), np.float32(0.1)]) == [3, float(np.float32(0.1))]


def test_an_array_is_copied_and_a_view_is_not_stretched():
    array = np.arange(12).reshape(3, 4)[:, ::2]
    tensors: dict[str, Tensor] = {}
    encode({"a": array}, "extra", tensors)
    array += 1
    assert tensors["extra/a"].tolist() == (array - 1).tolist()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, {2}]}, r"extra/a/1 is a builtins\.set: only plain values"),
        ({"a": {"b": object()}}, r"extra/a/b is a builtins\.object"),
        ({"a": 1j}, r"extra/a is a builtins\.complex"),
        ((torch.float32,), r"extra/0 is a torch\.dtype"),
        ({"names": np.array(["x"])}, r"extra/names is an array of <U1"),
        (
            {"when": np.array(["2020-01-01"], "datetime64[D]")},
            r"extra/when is an array of datetime",
        ),
        ({"big": np.arange(3, dtype=">i4")}, r"extra/big is an array of >i4"),
        ({3: {(1, 2): len}}, r"extra/3/\(1, 2\) is a builtins\.builtin_function"),
    ],
)
def test_what_cannot_be_saved_is_named_by_its_path(tree, message):
    with pytest.raises(TypeError, match=message):
        through(tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "nowhere"}, {"$tensor": []}, {"$array": 1}, {"$tuple": 3}, {"$pairs": [1]},
        {"$pairs": [[[], 1]]}, {"$bytes": 1}, {"$bytes": "a"}, {"$float": "x"}, {"$float": None},
    ],
)  # fmt: skip
def test_what_was_never_written_is_refused(tree):
    with pytest.raises(ValueError, match="malformed state"):
        decode([tree], {}.__getitem__)
