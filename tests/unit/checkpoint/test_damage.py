"""Any bit that flips, any file that is cut, lost or exchanged is found, and its tensors named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from hakari.training import checkpoint
from hakari.training.checkpoint import DamageError, Piece, fragments, manifest, shard_file
from hakari.training.checkpoint.boxes import whole
from hakari.training.checkpoint.stored import check_files, open_stored
from tests.distributed.faults import SHAPES, checked, in_memory, pieces, values


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


def small_tiles(monkeypatch, size: int = 64) -> None:
    for module in (fragments, shard_file, manifest):
        monkeypatch.setattr(module, "TILE", size)


def save(root: Path, step: int) -> Path:
    found = pieces(step)
    checkpoint.save(root, None, extra_state={"step": step}, pieces=found, step=step)
    return root / f"step-{step:08d}"


def flipped(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


# --- every byte -----------------------------------------------------------------------------


def tiny(value: float) -> list[Piece]:
    tensor = torch.full((3, 2), value)
    return [Piece(("a", "weight"), (3, 2), whole((3, 2)), tensor)]


def test_a_flipped_bit_is_found_in_every_byte_of_a_checkpoint(folder):
    """And in LATEST, unless it is in the line's end, where it does no harm."""
    checkpoint.save(folder, None, extra_state={"sample": 7}, pieces=tiny(1.5), step=3)
    chance, found = random.Random(0), 0
    for path in files_of(folder):
        whole_one = path.read_bytes()
        for at in range(len(whole_one)):
            flipped(path, at, chance.randrange(8))
            target, error = tiny(0.0), None
            try:
                checkpoint.load(folder, None, pieces=target, workers=1)
            except ValueError as failure:
                error, found = failure, found + 1
            if error is None:
                assert path.name == "LATEST"
                assert torch.equal(target[0].tensor, tiny(1.5)[0].tensor)
            elif path.suffix == ".safetensors":
                assert isinstance(error, DamageError)
                assert "a (weight)" in str(error)
                assert path.name in str(error)
            path.write_bytes(whole_one)
        assert checkpoint.load(folder, None, pieces=tiny(0.0)).verified == 1
    assert found >= sum(path.stat().st_size for path in files_of(folder)) - 2


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_every_byte(folder, bit):
    checkpoint.save(folder, None, pieces=tiny(1.5), step=3)
    for path in files_of(folder / "step-00000003"):
        whole_one = path.read_bytes()
        for at in range(len(whole_one)):
            flipped(path, at, bit)
            with pytest.raises(ValueError, match=r"damage|malformed|step-00000003"):
                checkpoint.load(folder, None, pieces=tiny(0.0), workers=1)
            path.write_bytes(whole_one)


def test_the_damaged_tensor_and_tile_are_named(folder, monkeypatch):
    small_tiles(monkeypatch)
    step = save(folder, 2)
    found = open_stored(step).manifest
    chance = random.Random(1)
    for key, parts in found.fragments.items():
        for part in parts:
            size = found.infos[key].bytes
            for at in {0, size - 1, chance.randrange(size)}:
                path = step / part.file
                before = path.read_bytes()
                flipped(path, part.offset + at, chance.randrange(8))
                with pytest.raises(
                    DamageError, match=rf"{key[0]} \({key[1]}\) is damaged.*tile {at // 64},"
                ) as caught:
                    checkpoint.load(step, None, pieces=pieces(-1), workers=1)
                assert caught.value.key == key
                path.write_bytes(before)
    assert checked(folder) == 2


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, -1, 5000])
def test_a_file_of_another_size_is_refused_before_anything_is_read(folder, size):
    path = next(save(folder, 2).glob("data/*"))
    data = path.read_bytes()
    path.write_bytes(data[:size] if size < len(data) else data + b"x")
    target = pieces(-1)
    with pytest.raises(
        DamageError,
        match=rf"{path.name} has [\d,]+ bytes instead of {len(data):,}; it holds .* more",
    ):
        checkpoint.load(folder, None, pieces=target)
    expected = pieces(-1)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(target, expected, strict=True))


def test_a_file_that_is_missing_is_named_with_what_it_held(folder):
    path = next(save(folder, 2).glob("data/*"))
    path.unlink()
    with pytest.raises(
        DamageError, match=rf"{path.name} is missing instead of .*it holds embed \("
    ):
        checkpoint.load(folder, None, pieces=pieces(-1))
    with pytest.raises(DamageError, match="is missing"):
        checkpoint.open_checkpoint(folder)


def test_files_that_were_exchanged_are_found(folder, monkeypatch):
    monkeypatch.setattr(shard_file, "MOST", 1)  # a file for each tensor
    step = save(folder, 2)
    found = open_stored(step).manifest.fragments
    one, two = (step / found["embed", state][0].file for state in ("exp_avg", "exp_avg_sq"))
    shutil.copy(one, step / "other")
    two.replace(one)
    (step / "other").replace(two)
    with pytest.raises(DamageError, match=r"header|bytes instead of"):
        checkpoint.load(folder, None, pieces=pieces(-1))


def test_files_of_another_save_under_the_same_names_are_found(folder):
    """Two generations in one folder: only the save's name differs in the header."""
    with patch("uuid.uuid4", return_value=type("Id", (), {"hex": "a" * 32})):
        old, new = save(folder, 1), save(folder, 2)
    before, after = (next(step.glob("data/*")) for step in (old, new))
    assert before.name == after.name
    assert before.stat().st_size == after.stat().st_size
    shutil.copy(before, after)
    with pytest.raises(DamageError, match=r"embed \(exp_avg\) is damaged"):
        checkpoint.load(folder, None, pieces=pieces(-1))


@pytest.mark.parametrize("names", [["manifest.json"], ["COMMIT"], ["manifest.json", "COMMIT"]])
def test_tables_of_another_save_are_found(folder, names):
    old, new = save(folder, 1), save(folder, 2)
    for name in names:
        shutil.copy(old / name, new / name)
    with pytest.raises(ValueError, match=r"hashes differ|is missing|name says step 2"):
        checkpoint.load(folder, None, pieces=pieces(-1))


def test_without_its_manifest_it_is_damaged_and_without_commit_it_is_not_there(folder):
    save(folder, 1)
    new = save(folder, 2)
    (new / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        checkpoint.load(folder, None, pieces=pieces(-1))
    (new / "COMMIT").unlink()
    message = r"LATEST names 'step-00000002'.*to go on from step-00000001, remove LATEST"
    with pytest.raises(ValueError, match=message):
        checkpoint.latest(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no complete checkpoint"):
        checkpoint.load(new, None, pieces=pieces(-1))
    (folder / "LATEST").unlink()
    assert checked(folder) == 1
    assert checkpoint.leftovers(folder) == ["step-00000002"]
    assert checkpoint.clear_leftovers(folder) == ["step-00000002"]


def test_more_than_one_bad_file_is_found_by_checking_all(folder):
    step = save(folder, 2)
    stored = open_stored(step)
    check_files(stored, [*stored.manifest.files], workers=2)
    flipped(next(step.glob("data/*")), 3, 0)
    with pytest.raises(DamageError, match=r"header \(bytes 0 to [\d,]+\)") as caught:
        check_files(stored, [*stored.manifest.files], workers=2)
    assert set(caught.value.keys) == {*values(2)}


# --- going on without what is damaged -------------------------------------------------------


def adam(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def lose(step: Path, state: str, way: str) -> None:
    """All files of a state."""
    found = open_stored(step).manifest
    for name in {
        p.file for key, parts in found.fragments.items() for p in parts if key[1] == state
    }:
        if way == "missing":
            (step / name).unlink()
        elif way == "short":
            (step / name).write_bytes((step / name).read_bytes()[:-1])
        elif way == "header":
            flipped(step / name, 20, 1)
        else:
            flipped(step / name, found.files[name].header + 1, 1)


@pytest.mark.parametrize("way", ["missing", "short", "header", "data"])
def test_moments_may_start_from_zero_where_they_are_lost(folder, monkeypatch, way):
    model, optimizer = adam(0)
    with patch.object(shard_file, "split", lambda sizes, most: one_state_each(model, optimizer)):
        checkpoint.save(folder, model, optimizer, step=1)
    step = folder / "step-00000001"
    assert len([*step.glob("data/*")]) == 4
    lose(step, "exp_avg", way)
    again, other = adam(1)
    with pytest.raises(DamageError, match=r"exp_avg\)"):
        checkpoint.load(folder, again, other)
    loaded = checkpoint.load(folder, again, other, zero_damaged=["exp_avg"])
    lost = {key for key in loaded.zeroed if key[1] == "exp_avg"}
    assert lost == set(loaded.zeroed)
    assert len(lost) == (1 if way == "data" else 4)
    assert loaded.verified == loaded.tensors - len(lost)
    for (name, mine), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        state, saved = other.state[mine], optimizer.state[theirs]
        assert torch.equal(state["exp_avg_sq"], saved["exp_avg_sq"])
        zero = (name, "exp_avg") in lost
        assert torch.equal(state["exp_avg"], saved["exp_avg"] * (0 if zero else 1))
    assert "of 16 tensors verified" in str(loaded)
    assert checkpoint.load(folder, again).verified == 4  # weights alone need no moments


def one_state_each(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """Indices of a rank's parts, by state: weights, then each parameter's step and moments."""
    order = sorted(
        [(name, state) for name, _ in model.named_parameters()
         for state in ("weight", "step", "exp_avg", "exp_avg_sq")]
    )  # fmt: skip
    states = sorted({state for _, state in order})
    return [[i for i, key in enumerate(order) if key[1] == state] for state in states]


def test_weights_never_start_from_zero(folder):
    model, optimizer = adam(0)
    checkpoint.save(folder, model, optimizer, step=1)
    found = open_stored(folder).manifest
    part = found.fragments["1.weight", "weight"][0]
    flipped(folder / "step-00000001" / part.file, part.offset, 5)
    with pytest.raises(DamageError, match=r"1\.weight \(weight\) is damaged"):
        checkpoint.load(folder, model, optimizer, zero_damaged=["exp_avg"])


def test_what_is_saved_is_what_is_claimed(folder):
    step = save(folder, 4)
    commit = json.loads((step / "COMMIT").read_text())
    assert commit["bytes"] == sum(path.stat().st_size for path in step.glob("data/*"))
    assert commit["files"] == 1
    assert len(values(4)) == 3 * len(SHAPES)
