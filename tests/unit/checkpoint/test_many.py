"""Many small tensors: few reads and writes, small caches, and each is still checked by itself."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hakari.training import checkpoint
from hakari.training.checkpoint import (
    DamageError,
    Piece,
    boxes,
    content,
    loading,
    manifest,
    shard_file,
)
from hakari.training.checkpoint.pieces import tensor_pieces
from hakari.training.checkpoint.shard_file import Part, write_parts
from hakari.training.checkpoint.source import Info
from hakari.training.checkpoint.storage import LocalFile, LocalFolder
from hakari.training.checkpoint.stored import open_stored

MANY = 500


def many(seed: int) -> list[Piece]:
    """Vectors, matrices, transposed ones and scalars, of several types."""
    made = torch.Generator().manual_seed(seed)
    found = []
    for number in range(MANY):
        size = 1 + number % 37
        tensor = torch.randn((size, 3, 5)[: number % 4], generator=made)
        tensor = tensor.to((torch.float32, torch.bfloat16, torch.float64)[number % 3])
        found += tensor_pieces((f"p{number}", "exp_avg"), tensor.T if tensor.ndim == 2 else tensor)
    return found


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path, None, pieces=many(0), step=1)
    return tmp_path


@pytest.mark.parametrize("workers", [1, 3])
def test_neighbours_are_read_at_once_and_each_arrives(saved, workers):
    target, reads = many(1), []
    real = LocalFolder.read

    def read(self: LocalFolder, name: str, offset: int, out: memoryview) -> None:
        reads.append(name)
        real(self, name, offset, out)

    with patch.object(LocalFolder, "read", read):
        loaded = checkpoint.load(saved, None, pieces=target, workers=workers)
    assert loaded.verified == MANY
    for mine, theirs in zip(target, many(0), strict=True):
        assert torch.equal(mine.tensor, theirs.tensor), mine.key
    assert len([name for name in reads if name.startswith("data/")]) == 2  # header, all tensors


@pytest.mark.parametrize("number", [0, 1, 250, MANY - 1])
def test_damage_to_one_of_them_names_just_it(saved, number):
    key = (f"p{number}", "exp_avg")
    step = saved / "step-00000001"
    (part,) = open_stored(step).manifest.fragments[key]
    data = bytearray((step / part.file).read_bytes())
    data[part.offset] ^= 1
    (step / part.file).write_bytes(data)
    with pytest.raises(DamageError, match=rf"^p{number} \(exp_avg\) is damaged") as caught:
        checkpoint.load(saved, None, pieces=many(1))
    assert caught.value.keys == (key,)
    target = many(1)
    loaded = checkpoint.load(saved, None, pieces=target, zero_damaged=["exp_avg"])
    assert loaded.zeroed == (key,)
    assert loaded.verified == MANY - 1
    for mine, theirs in zip(target, many(0), strict=True):
        expected = theirs.tensor * 0 if mine.key == key else theirs.tensor
        assert torch.equal(mine.tensor, expected), mine.key


def test_what_changes_after_it_was_read_is_found(saved):
    """The content of each tensor, as it is in memory, is compared after loading."""
    target, real = many(1), loading.read_all

    def read_all(*arguments: object) -> None:
        real(*arguments)
        target[7].tensor.view(torch.uint8).reshape(-1)[0] ^= 1

    with (
        patch.object(loading, "read_all", read_all),
        pytest.raises(ValueError, match=r"1 tensors are not what was saved, such as p7"),
    ):
        checkpoint.load(saved, None, pieces=target)


def test_small_ones_are_written_together_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "GATHERED", 64)
    chance = np.random.default_rng(0)
    arrays = {
        f"p{i}": chance.integers(0, 2**32, size, np.uint32)
        for i, size in enumerate([3, 5, 0, 40, 1, 16, 15, 2, 2, 2, 20, 1])
    }
    parts = [
        Part((name, "weight"), Info(a.shape, "F32"), boxes.whole(a.shape), lambda a=a: a)
        for name, a in arrays.items()
    ]
    writes, real = [], LocalFile.write

    def write(self: LocalFile, data: memoryview) -> None:
        writes.append(len(data))
        real(self, data)

    with patch.object(LocalFile, "write", write):
        written = write_parts(LocalFolder(str(tmp_path)), "x", parts, "abc")
    assert {key[0] for key, _ in written.fragments} == set(arrays)
    found = load_file(tmp_path / "x-000.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[f"weight/{name}"].view(np.uint32), array)
    assert writes[1:] == [32, 160, 4, 64, 68, 16, 80, 4]


def test_the_collector_of_cycles_rests_meanwhile(saved, tmp_path):
    seen = []
    real = manifest.from_json

    def from_json(*arguments):
        seen.append(gc.isenabled())
        return real(*arguments)

    with patch.object(manifest, "from_json", from_json):
        for enabled in (True, False):
            (gc.enable if enabled else gc.disable)()
            try:
                checkpoint.load(saved, None, pieces=many(1))
                assert gc.isenabled() == enabled
                checkpoint.save(tmp_path / f"{enabled}", None, pieces=many(0), step=1)
                assert gc.isenabled() == enabled
                with pytest.raises(FileNotFoundError):
                    checkpoint.load(tmp_path / "none", None, pieces=many(1))
                assert gc.isenabled() == enabled
            finally:
                gc.enable()
    assert seen == [False] * 4


def test_caches_stay_small():
    assert content._kept.cache_info().maxsize * content.INNER * 8 <= 2**23
    content._kept.cache_clear()
    tall = np.random.default_rng(0).integers(0, 2**32, (content.INNER + 20, 1), np.uint32)
    everything = content.content(tall, boxes.whole(tall.shape))
    assert content._kept.cache_info().currsize == 2  # of the columns alone
    parts = [content.content(tall[a:b], ((a, b), (0, 1))) for a, b in ((0, 7), (7, len(tall)))]
    assert sum(parts) % 2**64 == everything
    before = boxes._flaw.cache_info()
    for n in range(100):
        assert boxes.flaw((n, 4), [boxes.whole((n, 4))]) == ""
    assert boxes._flaw.cache_info() == before
    assert before.maxsize <= 64


def test_a_manifest_that_could_not_be_read_is_not_written(saved, tmp_path):
    found = open_stored(saved).manifest
    short = replace(found, infos={**found.infos, ("p1", "exp_avg"): Info((999,), "BF16")})
    folder = LocalFolder(str(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"step 1: p1 \(exp_avg\) \[999\]: nothing holds"):
        manifest.write(folder, short)
    assert folder.entries() == []


# --- options of object stores ---------------------------------------------------------------

SCRIPT = """
import torch
import hakari.training.checkpoint as ckpt
model = torch.nn.Linear(2, 3)
ckpt.save("dir://run", model, step=1)
print(ckpt.save("dir://run", model, step=2, asynchronous=True).wait())
print(ckpt.steps("dir://run"), ckpt.load("dir://run", model).verified)
"""


def test_the_environment_sets_options_of_a_store_in_the_background_too(tmp_path):
    """fsspec's 'dir' is a store that has to be told where it is, as others their endpoint."""
    options = {"path": str(tmp_path), "target_protocol": "file"}
    options["target_options"] = {"auto_mkdir": True}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "FSSPEC_DIR": json.dumps(options)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["dir://run/step-00000002", "[1, 2] 2"], done.stderr
    assert (Path(tmp_path) / "run" / "step-00000002" / "COMMIT").exists()
