"""Who writes what: all of it, none of it twice, nobody much more than others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hakari.training.checkpoint import assign as module
from hakari.training.checkpoint.assign import assign
from hakari.training.checkpoint.boxes import flaw, intersect, volume, whole
from hakari.training.checkpoint.source import Info
from tests.unit.checkpoint.test_boxes import tilings


def written(held, shares):
    """{key: boxes} over all ranks; each within the piece that it names."""
    found = {}
    for rank, share in enumerate(shares):
        for index, box in share:
            key, _, piece = held[rank][index]
            assert intersect(box, piece) == box or not box
            found.setdefault(key, []).append(box)
    return found


@given(st.lists(tilings(), min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.data())
@settings(max_examples=100)
def test_what_is_written_tiles_every_tensor(cases, world, share, data):
    held = [[] for _ in range(world)]
    for number, (shape, boxes) in enumerate(cases):
        info = Info(shape, "F32")
        for box in boxes:
            for rank in data.draw(st.sets(st.integers(0, world - 1), min_size=1)):
                held[rank].append(((f"p{number}", "weight"), info, box))
    found = written(held, assign(held, share))
    for number, (shape, _) in enumerate(cases):
        assert flaw(shape, found[f"p{number}", "weight"]) == ""


@pytest.mark.parametrize("world", [2, 3, 7])
def test_copies_are_shared_out_evenly(monkeypatch, world):
    monkeypatch.setattr(module, "SPLIT", 64)
    infos = [Info((32, 8 + i), "F32") for i in range(12)] + [Info((3,), "F32")] * 30
    held = [[((f"p{i}", "w"), info, whole(info.shape)) for i, info in enumerate(infos)]] * world
    shares = assign(held)
    loads = [sum(volume(box) for _, box in share) for share in shares]
    assert sum(loads) == sum(volume(whole(info.shape)) for info in infos)
    assert max(loads) - min(loads) < 0.2 * sum(loads) / world


def test_small_copies_go_to_whoever_has_least():
    own = (("own", "w"), Info((100,), "F32"), ((0, 100),))
    small = [((f"s{i}", "w"), Info((2,), "F32"), ((0, 2),)) for i in range(6)]
    shares = assign([[own, *small], small])
    assert [len(share) for share in shares] == [1, 6]


def test_the_first_holder_writes_where_copies_may_differ():
    piece = (("p", "w"), Info((2**20, 4), "F32"), whole((2**20, 4)))
    assert assign([[], [piece], [piece]], share=False) == [[], [(0, whole((2**20, 4)))], []]
    assert [len(share) for share in assign([[], [piece], [piece]])] == [0, 1, 1]


def test_empty_parts_are_written_by_nobody():
    info = Info((0, 4), "F32")
    held = [[(("p", "w"), info, ((0, 0), (0, 4)))], [(("q", "w"), Info((2,), "F32"), ((0, 2),)),
            (("q", "w"), Info((2,), "F32"), ((2, 2),))]]  # fmt: skip
    assert assign(held) == [[], [(0, ((0, 2),))]]


def test_ranks_that_disagree_are_named():
    one, two = Info((4,), "F32"), Info((4,), "BF16")
    with pytest.raises(
        ValueError, match=r"a \(w\) is F32 \[4\] on rank 0 and BF16 \[4\] on rank 2"
    ):
        assign([[(("a", "w"), one, ((0, 4),))], [], [(("a", "w"), two, ((0, 4),))]])
    with pytest.raises(
        ValueError, match=r"a \(w\) \[4\]: nothing holds \[2:3\]; the pieces of all"
    ):
        assign([[(("a", "w"), one, ((0, 2),))], [(("a", "w"), one, ((3, 4),))]])
    with pytest.raises(ValueError, match=r"a \(w\) \[4\]: \[0:3\] and \[2:4\] overlap"):
        assign([[(("a", "w"), one, ((0, 3),))], [(("a", "w"), one, ((2, 4),))]])
