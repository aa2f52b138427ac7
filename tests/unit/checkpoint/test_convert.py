"""Converting: the same contents, within a budget of memory, and again after it was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hakari.training import checkpoint
from hakari.training.checkpoint import convert, export_atoms, open_checkpoint
from hakari.training.checkpoint.source import Info, Source
from hakari.training.checkpoint.storage import LocalFolder
from hakari.training.checkpoint.stored import open_stored
from hakari.training.checkpoint.tensors import TORCH, as_bits
from tests.distributed.faults import in_memory, pieces, values

module = sys.modules["hakari.training.checkpoint.conversion"]


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


@pytest.fixture
def saved(folder):
    checkpoint.save(
        folder / "run", None, extra_state={"step": 3, "order": torch.arange(5)}, pieces=pieces(3),
        step=3, rank_state=[1],
    )  # fmt: skip
    return folder / "run"


def test_contents_are_equal_whatever_the_budget_and_the_files(saved, folder, monkeypatch):
    monkeypatch.setattr(module, "FILE", 600)
    expected = open_stored(saved).manifest
    for budget, workers in [(1, 1), (2**20, 2), (2**30, 4)]:
        seen = []
        where = folder / f"{budget}"
        path = convert(
            open_checkpoint(saved), where, budget=budget, workers=workers, progress=seen.append
        )
        assert path == f"{where}/step-00000003"
        found = open_stored(path).manifest
        assert found.contents == expected.contents
        assert len(found.files) > 3
        assert sum(seen) == sum(info.bytes for info in found.infos.values())
        assert not [*Path(path).glob("done-*")]
        extra = open_checkpoint(path).extra
        assert extra["step"] == 3
        assert torch.equal(extra["order"], torch.arange(5))
        loaded = checkpoint.load(path, None, pieces=(target := pieces(-1)))
        assert loaded.extra_state["step"] == 3
        assert loaded.rank_states == ([1],)
        assert loaded.verified == loaded.tensors
        assert all(torch.equal(piece.tensor, values(3)[piece.key]) for piece in target)
        with pytest.raises(FileExistsError, match="step-00000003 exists: choose another folder"):
            convert(open_checkpoint(saved), where)


@pytest.mark.parametrize("layout", ["grouped", "one-file-per-parameter"])
def test_atoms_are_plain_safetensors(saved, folder, layout):
    files = export_atoms(open_checkpoint(saved), folder / "atoms", layout=layout, budget=1)
    loaded = {}
    for name in files:
        loaded |= load_file(folder / "atoms" / name)
    assert loaded.keys() == {f"{state}/{name}" for name, state in values(3)}
    for (name, state), value in values(3).items():
        assert torch.equal(loaded[f"{state}/{name}"], value)
    assert ("embed/exp_avg.safetensors" in files) == (layout != "grouped")
    with pytest.raises(FileExistsError, match="is not empty: choose another folder"):
        export_atoms(open_checkpoint(saved), folder / "atoms")


class Cut(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_was_cut_off_goes_on(saved, folder, monkeypatch, after):
    """With the same fingerprint files that are whole stay; half a file is written anew."""
    monkeypatch.setattr(module, "FILE", 600)
    source, real, written = open_checkpoint(saved), module.write_file, []

    def write(place, name, entries, metadata):
        if len(written) == after:
            with place.create(name) as file:
                file.write(b"half")
            raise Cut
        written.append(name)
        return real(place, name, entries, metadata)

    with patch.object(module, "write_file", write), pytest.raises(Cut):
        convert(source, folder / "new", workers=1, fingerprint="abc")
    assert checkpoint.latest(folder / "new") is None
    assert len(checkpoint.leftovers(folder / "new")) == 1
    again = []

    def count(place, name, entries, metadata):
        again.append(name)
        return real(place, name, entries, metadata)

    with patch.object(module, "write_file", count):
        path = convert(source, folder / "new", workers=1, fingerprint="abc")
    found = open_stored(path).manifest
    assert sorted([*written, *again]) == sorted(found.files)
    assert len(written) == after
    assert checkpoint.load(path, None, pieces=pieces(-1)).verified == len(values(3))
    assert checkpoint.leftovers(folder / "new") == []


def test_a_file_that_was_cut_short_since_is_written_again(saved, folder, monkeypatch):
    monkeypatch.setattr(module, "FILE", 600)
    source = open_checkpoint(saved)
    with (
        patch.object(module.manifests, "write", side_effect=Cut),
        patch.object(LocalFolder, "remove"),
        pytest.raises(Cut),
    ):
        convert(source, folder / "new", workers=1, fingerprint="abc")
    data = sorted((folder / "new").glob(".tmp-*/data/*"))
    data[0].write_bytes(data[0].read_bytes()[:-1])
    path = convert(source, folder / "new", workers=1, fingerprint="abc")
    assert checkpoint.load(path, None, pieces=pieces(-1)).verified == len(values(3))


def test_other_files_do_not_go_on_from_it(saved, folder):
    source = open_checkpoint(saved)
    for fingerprint in ("abc", "abd", ""):
        with patch.object(module.manifests, "write", side_effect=Cut), pytest.raises(Cut):
            convert(source, folder / "new", fingerprint=fingerprint)
    assert len(checkpoint.leftovers(folder / "new")) == 3


def test_an_error_while_reading_leaves_no_checkpoint(saved, folder):
    source = open_checkpoint(saved)
    broken = replace(source, read=lambda *_: (_ for _ in ()).throw(ValueError("damaged")))
    with pytest.raises(ValueError, match="damaged"):
        convert(broken, folder / "new")
    assert checkpoint.steps(folder / "new") == []


@pytest.mark.parametrize("old", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("new", ["F32", "BF16", "F16"])
def test_types_are_converted_as_torch_does(old, new):
    numbers = torch.randn(5, 3).to(TORCH[old])
    found = module.converted(as_bits(numbers), old, new)
    np.testing.assert_array_equal(found, as_bits(numbers.to(TORCH[new])))


# --- large ----------------------------------------------------------------------------------

LARGE = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from hakari.training.checkpoint import convert
    from hakari.training.checkpoint.source import Info, Source

    def peak():
        line = [x for x in Path("/proc/self/status").read_text().split("\\n") if "VmHWM" in x]
        return int(line[0].split()[1]) * 1024

    where, size, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    count = 4 * size // 2**30 if size > 2**30 else 4
    rows = size // count // 4096
    infos = {(f"p{i}", "weight"): Info((rows, 1024), "F32") for i in range(count)}

    def read(key, box, out):
        out[...] = np.arange(box[0][0], box[0][1], dtype=np.uint32)[:, None]

    small = {("p", "weight"): Info((4, 1024), "F32")}
    convert(Source(small, read, step=1), where + "/warm", budget=budget, workers=2)
    before = peak()
    convert(Source(infos, read, step=1), where + "/large", budget=budget, workers=2)
    print(before, peak())
"""


def grown(folder: Path, size: int, budget: int) -> int:
    """Bytes by which the peak of a process's memory grows while it converts."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE), str(folder), str(size), str(budget)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    before, after = map(int, done.stdout.split())
    return after - before


def test_memory_stays_within_the_budget(tmp_path):
    assert grown(tmp_path, 400 * 2**20, 64 * 2**20) < (64 + 100) * 2**20


@pytest.mark.slow
def test_memory_stays_within_the_budget_for_four_gigabytes(tmp_path):
    assert grown(tmp_path, 4 * 2**30, 512 * 2**20) < (512 + 100) * 2**20
    found = open_stored(tmp_path / "large").manifest
    assert sum(info.bytes for info in found.infos.values()) == 4 * 2**30


def test_thousands_of_tiny_parameters_need_few_files(folder):
    """And no more open ones than workers."""
    count = 20_000
    infos = {(f"p{i:05d}", "weight"): Info((3,), "F32") for i in range(count)}

    def read(key, box, out):
        out[...] = int(key[0][1:]) + np.arange(box[0][0], box[0][1])

    most, real = [0], os.open

    def opened(*arguments, **options):
        most[0] = max(most[0], len([*Path("/proc/self/fd").iterdir()]))
        return real(*arguments, **options)

    before = len([*Path("/proc/self/fd").iterdir()])
    with patch.object(os, "open", opened):
        path = convert(Source(infos, read, step=1), folder / "new", workers=2)
        source = open_checkpoint(path)
        for number in (0, 777, count - 1):
            found = source.array((f"p{number:05d}", "weight"))
            assert found.tolist() == [number, number + 1, number + 2]
    assert most[0] < before + 10
    assert len(open_stored(path).manifest.files) == 1


def test_a_model_of_many_parameters_is_saved_and_loaded(folder):
    model = nn.ParameterList(nn.Parameter(torch.full((2,), float(i))) for i in range(2000))
    checkpoint.save(folder, model, step=1)
    again = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(2000))
    assert checkpoint.load(folder, again).verified == 2000
    assert all(torch.equal(a, b) for a, b in zip(model, again, strict=True))
    assert len(json.loads((folder / "step-00000001/manifest.json").read_text())["files"]) == 1
