"""Files that are written are safetensors, byte for byte, and cut as they should be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from zlib_ng.zlib_ng import crc32

from hakari.training.checkpoint import shard_file
from hakari.training.checkpoint.boxes import extents, flaw, volume, whole, within
from hakari.training.checkpoint.dtypes import bits
from hakari.training.checkpoint.shard_file import (
    Entry,
    Part,
    chunks,
    split,
    write_file,
    write_parts,
)
from hakari.training.checkpoint.source import Info
from hakari.training.checkpoint.storage import LocalFolder
from hakari.training.checkpoint.tensors import TORCH, as_bits


def parts():
    chance = np.random.default_rng(0)
    for number, dtype in enumerate(TORCH):
        for shape in [(), (3,), (2, 5), (4, 1, 3)]:
            values = chance.integers(0, 2, shape, np.uint8).astype(bits(dtype))
            yield Part(
                (f"p{number}.{len(shape)}", "weight"),
                Info(shape, dtype),
                whole(shape),
                lambda values=values: values,
            )


def test_safetensors_reads_every_type_bit_for_bit(tmp_path):
    everything = [*parts()]
    written = write_parts(LocalFolder(str(tmp_path)), "data/x", everything, "abc")
    assert list(written.files) == ["data/x-000.safetensors"]
    path = tmp_path / "data/x-000.safetensors"
    loaded = load_file(path)
    assert len(loaded) == len(everything)
    for part in everything:
        tensor = loaded[f"weight/{part.key[0]}"]
        assert tensor.dtype == TORCH[part.info.dtype]
        np.testing.assert_array_equal(as_bits(tensor), part.values())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "save_id": "abc"}


def test_offsets_and_checksums_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "TILE", 16)
    everything = [*parts()]
    written = write_parts(LocalFolder(str(tmp_path)), "x", everything, "abc")
    data = (tmp_path / "x-000.safetensors").read_bytes()
    stored = written.files["x-000.safetensors"]
    assert (stored.bytes, stored.crc) == (len(data), crc32(data[: stored.header]))
    assert stored.header == 8 + int.from_bytes(data[:8], "little")
    assert stored.header % 64 == 0
    for part, (key, fragment) in zip(everything, written.fragments, strict=True):
        raw = data[fragment.offset : fragment.offset + part.values().nbytes]
        assert key == part.key
        assert raw == part.values().tobytes()
        assert fragment.offset % part.values().itemsize == 0
        tiles = [crc32(raw[i : i + 16]) for i in range(0, len(raw), 16)]
        assert fragment.crcs == tuple(tiles)


def test_files_are_as_large_as_they_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "MOST", 100)
    values = np.arange(20, dtype=np.uint32)
    box = ((0, 20),)
    many = [Part((f"p{i}", "w"), Info((20,), "F32"), box, lambda: values) for i in range(3)]
    written = write_parts(LocalFolder(str(tmp_path)), "x", many, "abc")
    assert [len(load_file(tmp_path / name)) for name in written.files] == [1, 1, 1]


def test_a_part_is_named_by_its_box(tmp_path):
    part = Part(
        ("p", "exp_avg"), Info((9, 4), "F32"), ((2, 5), (0, 4)), lambda: np.ones((3, 4), np.uint32)
    )
    write_parts(LocalFolder(str(tmp_path)), "x", [part], "abc")
    assert list(load_file(tmp_path / "x-000.safetensors")) == ["exp_avg/p[2:5, 0:4]"]


def test_values_that_are_strided_are_written_in_rows(tmp_path):
    tensor = torch.randn(6, 8)
    part = Part(("p", "w"), Info((8, 6), "F32"), whole((8, 6)), lambda: as_bits(tensor.T))
    write_parts(LocalFolder(str(tmp_path)), "x", [part], "abc")
    assert torch.equal(load_file(tmp_path / "x-000.safetensors")["w/p"], tensor.T)


def test_two_of_a_name_and_values_that_are_too_few_are_refused(tmp_path):
    one = Entry("a", "F32", (2,), lambda: [np.ones(2, np.uint32)])
    with pytest.raises(ValueError, match="two tensors of a file would be called 'a'"):
        write_file(LocalFolder(str(tmp_path)), "x", [one, one], {})
    few = Entry("a", "F32", (2,), lambda: [np.ones(1, np.uint32)])
    with pytest.raises(ValueError, match="a has 4 bytes instead of 8"):
        write_file(LocalFolder(str(tmp_path)), "y", [few], {})
    with pytest.raises(FileExistsError):
        write_file(LocalFolder(str(tmp_path)), "y", [one], {})


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from([1, 2, 4, 8]), st.integers(1, 200))
def test_chunks_follow_one_another_and_are_small_enough(shape, width, most):
    box = whole(shape)
    found = [*chunks(box, width, most)]
    assert flaw(shape, found) == ""
    numbers = np.arange(volume(box)).reshape(shape)
    rows = [numbers[within(each, box)].ravel() if box else numbers.ravel() for each in found]
    assert [i for row in rows for i in row] == [*range(volume(box))]
    assert all(volume(each) * width <= max(most, width) for each in found)
    assert all(extents(each) for each in found if box)


def test_chunks_are_not_needlessly_small():
    assert len([*chunks(whole((1000, 16)), 4, 640)]) == 100
    assert len([*chunks(whole((2, 1000)), 4, 400)]) == 20


@given(st.lists(st.integers(0, 50)), st.integers(1, 60))
def test_runs_have_everything_once_and_are_small_enough(sizes, most):
    found = [*split(sizes, most)]
    assert [i for run in found for i in run] == [*range(len(sizes))]
    assert all(len(run) == 1 or sum(sizes[i] for i in run) <= most for run in found)


def test_the_header_is_plain_json(tmp_path):
    write_parts(LocalFolder(str(tmp_path)), "x", [*parts()], "abc")
    data = (tmp_path / "x-000.safetensors").read_bytes()
    table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    ends = sorted(row["data_offsets"] for name, row in table.items() if name != "__metadata__")
    assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]
