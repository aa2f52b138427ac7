"""All damage to a checkpoint is found, and named."""

import hashlib
import json
import random
import struct
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hakari.training.checkpoint import Piece, convert, load, open_checkpoint, save
from hakari.training.checkpoint.verification import verify


def make(folder, step=7):
    """A checkpoint with an optimizer, extra tensors, a scalar, an empty and a cut tensor."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    model.register_buffer("none", torch.empty(0, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    value = torch.arange(24, dtype=torch.int16).reshape(4, 6)
    boxes = [((0, 3), (0, 6)), ((3, 4), (0, 2)), ((3, 4), (2, 6))]
    pieces = [
        Piece(("cut", "weight"), (4, 6), box, value[box[0][0] : box[0][1], box[1][0] : box[1][1]])
        for box in boxes
    ]
    save(folder, model, optimizer, {"rng": torch.arange(5)}, step=step, pieces=pieces)
    return folder / f"step-{step:08d}"


def split_up(folder, monkeypatch):
    """The same in several files."""
    made = make(folder / "one")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[convert.__module__], "FILE", 200)
        convert(open_checkpoint(made), folder / "several")
    return folder / "several" / "step-00000007"


def data_files(folder):
    return sorted((folder / "data").iterdir())


def owners(file):
    """(start, stop, STATE/NAME) of each tensor of a file, by a route of its own."""
    data = file.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8:length])
    table.pop("__metadata__")
    return [
        (length + r["data_offsets"][0], length + r["data_offsets"][1], n) for n, r in table.items()
    ]


def flip(file, at, bit=0):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def forge(folder, change):
    """Rewrite the manifest, and COMMIT so that it agrees."""
    table = json.loads((folder / "manifest.json").read_text())
    change(table)
    data = json.dumps(table).encode()
    (folder / "manifest.json").write_bytes(data)
    commit = json.loads((folder / "COMMIT").read_text())
    commit |= {
        "manifest_sha256": hashlib.sha256(data).hexdigest(),
        "manifest_bytes": len(data),
        "files": len(table["files"]),
        "bytes": sum(row[0] for row in table["files"].values()),
    }
    (folder / "COMMIT").write_text(json.dumps(commit))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_byte_of_a_whole_checkpoint_is_read(tmp_path, monkeypatch, workers):
    for folder in (make(tmp_path), split_up(tmp_path / "more", monkeypatch)):
        told = []
        report = verify(folder, told.append, workers=workers)
        files = data_files(folder)
        assert report.whole
        assert report.checked
        assert report.damage == report.unlisted == ()
        assert report.step == 7
        assert report.bytes == sum(file.stat().st_size for file in files)
        assert sum(told) == sum(stop - start for f in files for start, stop, _ in owners(f))
        assert report.tensors == 19  # 5 values, 4 times 3 states, the cut one, extra state
        assert str(report).startswith("whole: 19 tensors, ")
        assert str(report).endswith("GB/s)")


def test_a_folder_of_checkpoints_means_its_newest(tmp_path):
    flip(data_files(make(tmp_path, 5))[0], 100)
    make(tmp_path, 7)
    assert verify(tmp_path).step == 7


def test_any_flipped_bit_of_data_is_found_and_its_tensor_named(tmp_path, monkeypatch):
    rng = random.Random(2)
    for folder in (make(tmp_path), split_up(tmp_path / "more", monkeypatch)):
        for file in data_files(folder):
            places = owners(file)
            size = file.stat().st_size
            for at in rng.sample(range(size), min(size, 60)):
                bit = rng.randrange(8)
                flip(file, at, bit)
                report = verify(folder, workers=1)
                flip(file, at, bit)
                (damage,) = report.damage
                assert damage.file == f"data/{file.name}"
                assert damage.start <= at < damage.stop
                hit = [name for start, stop, name in places if start <= at < stop]
                if not hit:
                    assert damage.what == "the header is not what was written"
                    assert damage.start == 0
                else:
                    assert hit[0].partition("[")[0] == f"{damage.state}/{damage.parameter}"
        assert verify(folder).whole


@pytest.mark.parametrize("name", ["manifest.json", "COMMIT"])
def test_any_flipped_bit_of_the_manifest_is_found(tmp_path, name):
    folder = make(tmp_path)
    size = (folder / name).stat().st_size
    rng = random.Random(3)
    missed = []
    for at in rng.sample(range(size), min(size, 250)):
        bit = rng.randrange(8)
        before = (folder / name).read_bytes()[at]
        flip(folder / name, at, bit)
        if verify(folder).whole:
            missed.append((before, before ^ 1 << bit))
        flip(folder / name, at, bit)
    assert all(chr(a).isspace() and chr(b).isspace() for a, b in missed)  # says the same


def test_all_damage_is_listed_in_order(tmp_path, monkeypatch):
    folder = split_up(tmp_path, monkeypatch)
    files = data_files(folder)
    assert len(files) > 3
    flip(files[0], 3)
    spoilt = [(file, *owners(file)[0]) for file in files[1:]]
    for file, start, _, _ in spoilt:
        flip(file, start, 7)
    report = verify(folder)
    assert not report.whole
    assert str(report).startswith(f"damaged: {len(files)} places; 19 tensors, ")
    assert [d.file for d in report.damage] == [f"data/{file.name}" for file in files]
    assert report.damage[0].parameter == ""
    for damage, (file, start, stop, name) in zip(report.damage[1:], spoilt, strict=True):
        state, _, parameter = name.partition("/")
        said = f"{parameter} ({state}): data/{file.name}, bytes {start:,} to {stop:,}: not what was"
        assert str(damage).startswith(said)


def test_what_a_file_that_ends_early_has_lost(tmp_path):
    folder = make(tmp_path)
    (file,) = data_files(folder)
    whole = file.read_bytes()
    places = owners(file)
    for size in (0, 8, places[0][0] + 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        report = verify(folder)
        lost = {d.parameter: d for d in report.damage if d.what.startswith("lost")}
        assert {n.partition("/")[2].partition("[")[0] for _, stop, n in places if stop > size} == (
            lost.keys() | ({"none"} if size < places[0][0] else set())
        ) - {"none"}
        (short,) = [d for d in report.damage if "instead of" in d.what]
        assert (short.start, short.stop) == (size, len(whole))
        assert short.what == f"has {size:,} bytes instead of {len(whole):,}"
    file.write_bytes(whole + b"x")
    (longer,) = verify(folder).damage
    assert longer.what.endswith("; no tensor is hit")
    file.unlink()
    report = verify(folder)
    assert report.damage[0].what == f"is missing instead of {len(whole):,}"
    assert len([d for d in report.damage if d.what.startswith("lost (")]) == len(
        [1 for start, stop, _ in places if start < stop]
    )


def test_swapped_files_are_found(tmp_path, monkeypatch):
    folder = split_up(tmp_path, monkeypatch)
    one, two = (f for f in data_files(folder)[:2])
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    assert {d.file for d in verify(folder).damage} == {f"data/{f.name}" for f in (one, two)}


def test_large_tensors_are_told_by_tile(tmp_path):
    value = torch.randint(0, 256, (3, 7_000_001), dtype=torch.uint8)
    save(
        tmp_path,
        None,
        step=1,
        pieces=[Piece(("big", "weight"), value.shape, ((0, 3), (0, 7_000_001)), value)],
    )
    folder = tmp_path / "step-00000001"
    assert verify(folder).whole
    (file,) = data_files(folder)
    ((start, stop, _),) = owners(file)
    flip(file, start + 2**24 + 5)
    (damage,) = verify(folder).damage
    assert (damage.start, damage.stop) == (start + 2**24, stop)
    assert damage.what == "not what was written (tile 1 of [0:3, 0:7000001])"


def test_values_that_agree_with_forged_checksums_are_still_found(tmp_path):
    """Content is the last line: values changed together with their CRC, and the manifest's hash."""
    from zlib_ng.zlib_ng import crc32

    folder = make(tmp_path)
    (file,) = data_files(folder)
    start, stop, _ = next(row for row in owners(file) if row[2] == "weight/0.weight")
    flip(file, start + 2, 5)
    crc = crc32(file.read_bytes()[start:stop])

    def change(table):
        table["tensors"]["0.weight"]["weight"]["fragments"][0][3] = [crc]

    forge(folder, change)
    (damage,) = verify(folder).damage
    assert (damage.parameter, damage.state) == ("0.weight", "weight")
    assert "although all checksums are right" in str(damage)


def test_bytes_that_belong_to_nothing_are_told(tmp_path):
    folder = make(tmp_path)
    (file,) = data_files(folder)
    start, stop, _ = next(row for row in owners(file) if row[2] == "exp_avg/0.weight")
    forge(folder, lambda table: table["tensors"]["0.weight"].pop("exp_avg"))
    (damage,) = verify(folder).damage
    assert (damage.start, damage.stop) == (start, stop)
    assert damage.what == "these bytes belong to no tensor"


def test_a_damaged_commit_hides_no_other_damage(tmp_path):
    folder = make(tmp_path)
    (file,) = data_files(folder)
    flip(file, 3)
    commit = json.loads((folder / "COMMIT").read_text())
    for name in ("files", "bytes", "save_id", "manifest_bytes"):
        (folder / "COMMIT").write_text(json.dumps(commit | {name: 5}))
        first, second = verify(folder).damage
        assert first.file == "COMMIT"
        assert "COMMIT is not what was written" in first.what
        assert second.what == "the header is not what was written"


def test_a_damaged_manifest_is_damage_and_a_newer_version_is_not(tmp_path):
    folder = make(tmp_path)
    good = (folder / "manifest.json").read_bytes()
    flip(folder / "manifest.json", 30)
    report = verify(folder)
    assert not report.whole
    assert "manifest.json: " in str(report.damage[0])
    assert "hashes differ" in str(report.damage[0])
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing" in str(verify(folder).damage[0])
    (folder / "manifest.json").write_bytes(good)
    forge(folder, lambda table: table.update(version=2))
    with pytest.raises(ValueError, match="version 2, and this hakari reads 1: update it"):
        verify(folder)


def test_files_of_something_else_are_told_and_are_no_damage(tmp_path):
    folder = make(tmp_path)
    (folder / "data" / "stray").write_text("x")
    report = verify(folder)
    assert report.whole
    assert report.unlisted == ("data/stray",)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder, or there is nothing in it"):
        verify(tmp_path)
    (tmp_path / ".tmp-step-00000003-ab").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        verify(tmp_path)


def test_other_formats_are_read_and_no_more_is_claimed(tmp_path):
    save_file({"a": torch.randn(3, 4), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    told = []
    report = verify(tmp_path, told.append)
    assert report.whole
    assert not report.checked
    assert (report.form, report.tensors, report.bytes) == ("hugging-face", 2, 56)
    assert sum(told) == 56
    assert str(report).startswith("readable: 2 tensors, ")
    assert "hugging-face keeps no checksums" in str(report)


def test_other_formats_tell_all_that_cannot_be_read(tmp_path, monkeypatch):
    save_file({"a": torch.randn(3), "b": torch.zeros(2), "c": torch.zeros(9)}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")

    def fails(folder, wanted, *rest):
        if next(iter(wanted))[0][0] != "b":
            raise OSError("the disk is ill")

    monkeypatch.setattr("hakari.training.checkpoint.fragments.read", fails)
    report = verify(tmp_path)
    assert [d.parameter for d in report.damage] == ["a", "c"]
    assert "the disk is ill" in str(report.damage[0])


def test_a_disk_that_fails_is_damage(tmp_path, monkeypatch):
    folder = make(tmp_path)
    expected = len(verify(folder).damage)
    assert expected == 0
    from hakari.training.checkpoint import storage

    plain = storage.LocalFolder.read

    def fails(self, name, offset, out):
        if name.startswith("data/") and offset:
            raise OSError(5, "Input/output error")
        plain(self, name, offset, out)

    monkeypatch.setattr(storage.LocalFolder, "read", fails)
    report = verify(folder)
    assert {d.parameter for d in report.damage} >= {"0.weight", "0.bias", "cut"}
    assert all("Input/output error" in d.what for d in report.damage)


def test_progress_that_raises_stops_it(tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(make(tmp_path), stop)


def test_what_is_verified_loads(tmp_path):
    """And the damage that it finds is what loading refuses."""
    folder = make(tmp_path)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    model.register_buffer("none", torch.empty(0, 3))
    load(folder, model, strict=False)
    (file,) = data_files(folder)
    start, _, _ = next(row for row in owners(file) if row[2] == "weight/1.bias")
    flip(file, start)
    (damage,) = verify(folder).damage
    with pytest.raises(ValueError, match=r"1\.bias \(weight\) is damaged"):
        load(folder, model, strict=False)
    assert damage.parameter == "1.bias"
