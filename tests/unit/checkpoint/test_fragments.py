"""A box that is read out of any fragments is that part of the whole tensor."""

from __future__ import annotations

import tempfile
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zlib_ng.zlib_ng import crc32

from hakari.training.checkpoint import fragments
from hakari.training.checkpoint.boxes import extents, whole, within
from hakari.training.checkpoint.dtypes import bits
from hakari.training.checkpoint.fragments import DamageError, Fragment, read
from hakari.training.checkpoint.source import Info
from hakari.training.checkpoint.storage import LocalFolder
from tests.unit.checkpoint.test_boxes import tilings

TYPES = {"U8": 1, "BF16": 2, "F32": 4, "F64": 8}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(fragments, "TILE", 32)
    monkeypatch.setattr(fragments, "NEAR", 16)
    monkeypatch.setattr(fragments, "TOGETHER", 100)


def stored(folder, values, boxes, chance, checked):
    """Fragments of a tensor in two files, in any order, with gaps between them."""
    found, data = [], {name: bytearray(chance.bytes(8)) for name in ("a", "b")}
    for box in boxes:
        name = chance.choice(["a", "b"])
        raw = np.ascontiguousarray(values[within(box, whole(values.shape))]).tobytes()
        crcs = tuple(crc32(raw[i : i + 32]) for i in range(0, len(raw), 32)) if checked else ()
        found.append(Fragment(box, name, len(data[name]), crcs))
        data[name] += raw + chance.bytes(chance.integers(0, 3) * 20)
    for name, raw in data.items():
        (folder / name).write_bytes(raw)
    return found


@given(
    tilings(), st.sampled_from([*TYPES]), st.booleans(), st.sampled_from([1, 3]), st.booleans(),
    st.integers(0, 2**32 - 1), st.data(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_box_is_that_part_of_the_whole(tiling, dtype, checked, workers, strided, seed, data):
    shape, boxes = tiling
    chance = np.random.default_rng(seed)
    values = chance.integers(0, 255, (*shape, 1), np.uint8).astype(bits(dtype))[..., 0]
    edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = tuple((start, stop) for start, stop in edges)
    out = np.zeros((*extents(box), 2 if strided else 1), bits(dtype))[..., 0]
    everything = np.zeros(shape, bits(dtype))
    with tempfile.TemporaryDirectory() as name:
        parts = stored(Path(name), values, boxes, chance, checked)
        key, seen = ("p", "weight"), []
        wanted = [(key, box, out), (key, whole(shape), everything)]
        read(
            LocalFolder(name), wanted, {key: Info(shape, dtype)}, {key: parts}, workers, seen.append
        )
    np.testing.assert_array_equal(out, values[within(box, whole(shape))])
    np.testing.assert_array_equal(everything, values)
    assert sum(seen) >= values.nbytes


def test_without_checksums_only_what_is_wanted_is_read(tmp_path):
    values = np.arange(1000, dtype=np.uint32).reshape(100, 10)
    (tmp_path / "a").write_bytes(values.tobytes())
    key, out, seen = ("p", "weight"), np.zeros((2, 3), np.uint32), []
    fragment = Fragment(whole((100, 10)), "a", 0)
    info = Info((100, 10), "F32")
    read(LocalFolder(str(tmp_path)), [(key, ((50, 52), (4, 7)), out)], {key: info},
         {key: [fragment]}, progress=seen.append)  # fmt: skip
    np.testing.assert_array_equal(out, values[50:52, 4:7])
    assert sum(seen) == 4 * 13  # from the first element to the last


@pytest.mark.parametrize("at", range(0, 80, 7))
def test_a_tile_that_changed_is_named(tmp_path, at):
    values = np.arange(20, dtype=np.uint32)
    parts = stored(tmp_path, values, [((0, 20),)], np.random.default_rng(0), checked=True)
    path = tmp_path / parts[0].file
    data = bytearray(path.read_bytes())
    data[parts[0].offset + at] ^= 4
    path.write_bytes(data)
    key = ("p", "exp_avg")
    out = np.zeros(20, np.uint32)
    with pytest.raises(
        DamageError, match=rf"p \(exp_avg\) is damaged.*tile {at // 32}, \[0:20\]"
    ) as e:
        read(
            LocalFolder(str(tmp_path)),
            [(key, ((0, 20),), out)],
            {key: Info((20,), "F32")},
            {key: parts},
        )
    assert e.value.key == key
    first, last = (0, 8) if at >= 32 else (8, 16)  # elements of another tile
    part = np.zeros(8, np.uint32)
    read(LocalFolder(str(tmp_path)), [(key, ((first, last),), part)], {key: Info((20,), "F32")},
         {key: parts})  # fmt: skip
    np.testing.assert_array_equal(part, values[first:last])


def test_a_file_that_ends_early_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    key, out = ("p", "weight"), np.zeros(20, np.uint8)
    for name, message in [("a", "a ends at byte 10: truncated"), ("b", "No such file")]:
        with pytest.raises(DamageError, match=rf"{message}.*it holds p \(weight\) \[0:20\]"):
            read(LocalFolder(str(tmp_path)), [(key, ((0, 20),), out)], {key: Info((20,), "U8")},
                 {key: [Fragment(((0, 20),), name, 0)]})  # fmt: skip
    assert prod(out.shape) == 20
