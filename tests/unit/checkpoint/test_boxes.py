"""Boxes tile, or what keeps them from it is named."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hakari.training.checkpoint.boxes import (
    Box,
    extents,
    flat_range,
    flaw,
    intersect,
    moved,
    show,
    volume,
    whole,
    within,
)

SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that tile it: cut in two again and again."""
    shape = draw(st.lists(st.integers(1, 7), max_size=3).map(tuple))
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        wide = [d for d, (start, stop) in enumerate(box) if stop - start > 1]
        if not wide:
            boxes.append(box)
            continue
        d = draw(st.sampled_from(wide))
        at = draw(st.integers(box[d][0] + 1, box[d][1] - 1))
        boxes += [(*box[:d], part, *box[d + 1 :]) for part in ((box[d][0], at), (at, box[d][1]))]
    return shape, draw(st.permutations(boxes))


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(prod(shape)).reshape(shape)


@given(SHAPES, st.data())
def test_a_flat_range_is_its_elements_in_order(shape, data):
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    boxes = flat_range(shape, start, stop)
    found = [numbered(shape)[within(box, whole(shape))].ravel() for box in boxes]
    assert [*itertools.chain(*found)] == [*range(start, stop)]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(map(volume, boxes))


def test_flat_ranges_are_exhaustive_for_a_small_tensor():
    shape = (3, 2, 4)
    for start, stop in itertools.combinations(range(25), 2):
        found = [
            numbered(shape)[within(b, whole(shape))].ravel() for b in flat_range(shape, start, stop)
        ]
        assert [*itertools.chain(*found)] == [*range(start, stop)]


@given(tilings())
def test_boxes_that_tile_have_no_flaw(tiling):
    shape, boxes = tiling
    assert flaw(shape, boxes) == ""
    assert sum(map(volume, boxes)) == prod(shape)


@given(tilings(), st.data())
def test_what_is_missing_is_named_and_is_really_missing(tiling, data):
    shape, boxes = tiling
    lost = data.draw(st.sampled_from(boxes))
    left = [box for box in boxes if box is not lost]
    found = flaw(shape, left)
    assert found.startswith("nothing holds [")
    gap = eval("np.s_" + found.removeprefix("nothing holds ")) if shape else ()
    mask = np.zeros(shape, bool)
    mask[within(lost, whole(shape))] = True
    assert mask[gap].all()
    assert mask[gap].size


@given(tilings(), st.data())
def test_an_overlap_is_named_by_its_two_boxes(tiling, data):
    shape, boxes = tiling
    again = data.draw(st.sampled_from(boxes))
    found = flaw(shape, [*boxes, again])
    assert found == f"{show(again)} and {show(again)} overlap"


@given(tilings(), st.data())
def test_a_box_that_is_moved_is_never_accepted(tiling, data):
    shape, boxes = tiling
    if not shape:
        return
    index = data.draw(st.integers(0, len(boxes) - 1))
    d = data.draw(st.integers(0, len(shape) - 1))
    by = data.draw(st.sampled_from([-2, -1, 1, 2]))
    box = list(boxes[index])
    box[d] = (box[d][0] + by, box[d][1] + by)
    found = flaw(shape, [*boxes[:index], tuple(box), *boxes[index + 1 :]])
    assert "overlap" in found or "outside" in found or "nothing holds" in found


ROWS, COLUMNS = st.integers(0, 5), st.integers(0, 4)


@given(st.lists(st.tuples(ROWS, ROWS, COLUMNS, COLUMNS), max_size=6))
@settings(max_examples=200)
def test_flaw_agrees_with_counting(edges):
    """Any boxes, by an array that counts how often each element is held."""
    boxes = [((min(a, b), max(a, b)), (min(c, d), max(c, d))) for a, b, c, d in edges]
    count = np.zeros((5, 4), int)
    for box in boxes:
        count[within(box, whole((5, 4)))] += 1
    assert (flaw((5, 4), boxes) == "") == bool((count == 1).all())


def test_flaws_of_many_boxes_are_found():
    rows = [((i, i + 1), (0, 4)) for i in range(2000)]
    assert flaw((2000, 4), rows) == ""
    assert flaw((2000, 4), [*rows, ((1000, 1001), (2, 3))]) == (
        "[1000:1001, 0:4] and [1000:1001, 2:3] overlap"
    )
    columns = [((0, 2000), (i, i + 1)) for i in range(4)]
    assert flaw((2000, 4), columns) == ""


@pytest.mark.parametrize(
    ("shape", "boxes", "message"),
    [
        ((4,), [((0, 2),)], "nothing holds [2:4]"),
        ((4,), [((0, 5),)], "[0:5] lies outside [4]"),
        ((4,), [((-1, 4),)], "[-1:4] lies outside [4]"),
        ((4,), [((3, 1),)], "[3:1] lies outside [4]"),
        ((4, 2), [((0, 4),)], "[0:4] lies outside [4, 2]"),
        ((), [()], ""),
        ((), [], "nothing holds []"),
        ((), [(), ()], "[] and [] overlap"),
        ((0, 3), [], ""),
        ((0, 3), [((0, 0), (0, 3))], ""),
    ],
)
def test_flaws_are_said(shape, boxes, message):
    if shape == (4, 2):  # another number of dimensions
        assert "outside" in flaw(shape, boxes)
    else:
        assert flaw(shape, boxes) == message


@given(tilings())
def test_an_intersection_is_where_both_are(tiling):
    shape, boxes = tiling
    numbers = numbered(shape)
    for a, b in itertools.product(boxes[:3], [whole(shape), *boxes[:3]]):
        shared = intersect(a, b)
        both = {*numbers[within(a, whole(shape))].flat} & {*numbers[within(b, whole(shape))].flat}
        assert both == (
            {*numbers[within(shared, whole(shape))].flat} if shared is not None else set()
        )
        if shared is not None:
            inner = tuple((s.start, s.stop) for s in within(shared, a))
            assert moved(inner, a) == shared
            assert extents(inner) == extents(shared)
