"""The content of a tensor: the same however it is cut, another for any change."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hakari.training.checkpoint import content as module
from hakari.training.checkpoint.boxes import extents, flat_range, whole, within
from hakari.training.checkpoint.content import content, hexadecimal
from hakari.training.checkpoint.tensors import as_bits
from tests.unit.checkpoint.test_boxes import tilings

MASK = 2**64 - 1


def splitmix(z: int) -> int:
    z = z * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return (z ^ z >> 31) | 1


def factor(dimension: int, index: int) -> int:
    return splitmix(index + ((dimension + 2) << 48) & MASK)


def slowly(values: np.ndarray) -> int:
    """The definition, one element at a time, in Python's integers."""
    if values.dtype.itemsize == 8:
        values = np.ascontiguousarray(values).reshape(*values.shape, 1).view("<u4")
        values = (
            values.reshape(*values.shape[:-2], -1)
            if values.ndim > 1 and values.shape[:-1] != ()
            else values.reshape(-1)
        )
    values = values.reshape(1) if not values.ndim else values
    total, last = 0, values.ndim - 1
    for index in np.ndindex(*values.shape):
        term = int(values[index])
        term *= factor(0, index[-1] % module.INNER) * factor(-1, index[-1] // module.INNER)
        for d, i in enumerate(index[:-1]):
            term *= factor(last - d, i)
        total += term
    return total & MASK


def random_bits(shape: tuple[int, ...], width: int = 4, seed: int = 0) -> np.ndarray:
    kind = np.dtype(f"<u{width}")
    return np.random.default_rng(seed).integers(0, 2 ** (8 * width), shape, kind)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2), (0, 4), (3, 0)])
def test_it_is_the_sum_that_defines_it(shape, width):
    values = random_bits(shape, width)
    assert content(values, whole(shape)) == (slowly(values) if values.size else 0)


def test_it_is_that_sum_beyond_the_first_block(monkeypatch):
    monkeypatch.setattr(module, "INNER", 8)
    monkeypatch.setattr(module, "BLOCK", 16)
    for shape in [(50,), (5, 21), (3, 2, 17), (40, 3)]:
        for width in (2, 8):
            assert content(random_bits(shape, width), whole(shape)) == slowly(
                random_bits(shape, width)
            )


@given(tilings(), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=60)
def test_boxes_add_up(tiling, width):
    shape, boxes = tiling
    values = random_bits(shape, width)
    parts = [content(values[within(box, whole(shape))] if box else values, box) for box in boxes]
    assert sum(parts) & MASK == content(values, whole(shape))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), st.data())
@settings(max_examples=60)
def test_flat_ranges_add_up(shape, data):
    values = random_bits(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, prod(shape)), max_size=4)))
    total = 0
    for start, stop in zip([0, *cuts], [*cuts, prod(shape)], strict=True):
        total += sum(
            content(values[within(b, whole(shape))], b) for b in flat_range(shape, start, stop)
        )
    assert total & MASK == content(values, whole(shape))


def test_long_rows_add_up_wherever_they_are_cut():
    n = 3 * module.INNER + 5
    for width in (2, 8):
        values = random_bits((2, n), width)
        for cut in (1, module.INNER - 1, module.INNER, module.INNER + 1, 2 * module.INNER, n - 1):
            boxes = [((0, 2), (0, cut)), ((0, 2), (cut, n))]
            parts = [content(values[within(box, whole((2, n)))], box) for box in boxes]
            assert sum(parts) & MASK == content(values, whole((2, n)))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_flipped_bit_changes_it(width):
    shape = (3, 4, 2)
    values = random_bits(shape, width)
    before, found = content(values, whole(shape)), set()
    for index in np.ndindex(*shape):
        for bit in range(8 * width):
            other = values.copy()
            other[index] ^= values.dtype.type(1 << bit)
            found.add(content(other, whole(shape)))
    assert before not in found
    assert len(found) == prod(shape) * 8 * width


def test_what_changes_places_changes_it():
    """Elements, rows, columns, planes and blocks: none of them commutes."""
    shape = (6, 8, 10)
    values = random_bits(shape)
    before, found = content(values, whole(shape)), []
    for axis, size in enumerate(shape):
        for i in range(size):
            for j in range(i):
                order = [*range(size)]
                order[i], order[j] = j, i
                found.append(content(values.take(order, axis), whole(shape)))
    found += [
        content(np.roll(values, by, axis), whole(shape)) for axis in range(3) for by in (1, 2)
    ]
    found.append(content(values.reshape(-1)[::-1].reshape(shape).copy(), whole(shape)))
    assert before not in found
    assert len({*found}) == len(found)


def test_a_transposed_square_is_another():
    values = random_bits((9, 9))
    assert content(values, whole((9, 9))) != content(values.T, whole((9, 9)))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_signs_that_flip_in_pairs_change_it(kind):
    """The highest bits alone: the worst case of a sum modulo a power of two."""
    tensor = torch.randn(8, 9, dtype=torch.float64).to(kind)
    before = content(as_bits(tensor), whole((8, 9)))
    for i in range(72):
        for j in range(i):
            other = tensor.clone().reshape(-1)
            other[[i, j]] *= -1
            assert content(as_bits(other.view(8, 9)), whole((8, 9))) != before


def test_where_a_box_lies_matters():
    values = random_bits((2, 3))
    places = [((i, i + 2), (j, j + 3)) for i in range(40) for j in range(40)]
    assert len({content(values, box) for box in places}) == 1600


def test_strides_do_not_matter():
    values = random_bits((8, 6, 4))
    assert content(values[::2, :, 1:3], whole((4, 6, 2))) == content(
        values[::2, :, 1:3].copy(), whole((4, 6, 2))
    )
    tensor = torch.randn(6, 4, dtype=torch.float64)
    assert content(as_bits(tensor.T), whole((4, 6))) == content(
        as_bits(tensor.T.contiguous()), whole((4, 6))
    )


def test_nothing_has_no_content_and_it_is_written_with_sixteen_digits():
    assert content(random_bits((0, 5)), whole((0, 5))) == 0
    assert hexadecimal(-1) == "f" * 16
    assert hexadecimal(2**64 + 255) == "00000000000000ff"
    assert extents(whole((3,))) == (3,)
