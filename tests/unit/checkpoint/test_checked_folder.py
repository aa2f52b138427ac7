"""Storages of torch's files against their CRC-32: when they are read and how often."""

from __future__ import annotations

import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hakari.training.checkpoint.foreign import checked_folder
from hakari.training.checkpoint.foreign.checked_folder import (
    CheckedFolder,
    Storage,
    StorageError,
    audit,
    checked,
)
from hakari.training.checkpoint.foreign.torch_files import read_torch
from hakari.training.checkpoint.foreign.torch_values import Stored, load, plain
from hakari.training.checkpoint.storage import Folder, LocalFolder, open_folder


class Counted:
    """A folder that notes what is read of it."""

    def __init__(self, where: Path) -> None:
        self.inside = open_folder(where)
        self.reads: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def read(self, name: str, offset: int, out: memoryview) -> None:
        self.reads.append((offset, out.nbytes))
        time.sleep(0.01 * (out.nbytes == 4096))  # time enough for another thread to begin too
        self.inside.read(name, offset, out)


def saved(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def opened(tmp_path: Path) -> tuple[Folder, dict[str, Stored]]:
    folder = checked(open_folder(tmp_path))
    return folder, read_torch(folder, "a.pt")


def read(folder: Folder, stored: Stored, first: int, count: int) -> np.ndarray:
    out = np.zeros(count, np.uint32)
    folder.read(stored.file, stored.offset + 4 * first, out.view(np.uint8).data)
    return out


@pytest.fixture
def no_checksums() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("at", [0, 1234, 4 * 3000 - 1])
def test_a_flipped_bit_anywhere_in_a_storage_stops_every_read_of_it(
    at: int, bit: int, tmp_path: Path
) -> None:
    path = saved(tmp_path, a=torch.randn(3000), b=torch.randn(50))
    flip(path, opened(tmp_path)[1]["a"].offset + at, bit)
    for first, count in ((0, 3000), (0, 1), (700, 300), (2999, 1)):
        folder, tree = opened(tmp_path)
        start, stop = tree["a"].offset, tree["a"].offset + 12_000
        told = rf"a\.pt: storage 0 \(bytes {start:,} to {stop:,}\) is not what was written"
        for _ in range(2):
            with pytest.raises(StorageError, match=told):
                read(folder, tree["a"], first, count)
        read(folder, tree["b"], 0, 50)


def test_a_read_across_storages_checks_each(tmp_path: Path) -> None:
    path = saved(tmp_path, a=torch.randn(100), b=torch.randn(100), c=torch.randn(100))
    whole = torch.load(path)
    tree = opened(tmp_path)[1]
    words = (tree["c"].offset - tree["a"].offset) // 4
    for count, bad, hit in ((words, "c", ""), (words, "b", "1"), (words + 1, "c", "2")):
        flip(path, tree[bad].offset + 7)
        folder = opened(tmp_path)[0]
        if hit:
            with pytest.raises(StorageError, match=f"storage {hit} "):
                read(folder, tree["a"], 0, count)
        else:
            found = read(folder, tree["a"], 0, count)[:100]
            assert np.array_equal(found.view(np.float32), whole["a"].numpy())
        flip(path, tree[bad].offset + 7)


def test_a_storage_is_read_once_more_than_asked_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_folder, "BLOCK", 4096)
    saved(tmp_path, a=torch.randn(3000), b=torch.randn(3000))
    counted: Any = Counted(tmp_path)
    folder = checked(counted)
    tree = read_torch(folder, "a.pt")
    counted.reads.clear()
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda i: read(folder, tree["a"], 10 * i, 10), range(300)):
            pass
    own = Counter(reads for reads in counted.reads if reads[1] > 40)
    start = tree["a"].offset
    assert own == Counter({(start, 4096): 1, (start + 4096, 4096): 1, (start + 8192, 3808): 1})
    counted.reads.clear()
    read(folder, tree["b"], 0, 3000)  # all of it: what was read is checked, without a pass
    read(folder, tree["b"], 5, 10)
    assert counted.reads == [(tree["b"].offset, 12_000), (tree["b"].offset + 20, 40)]


def test_small_values_are_checked_too(tmp_path: Path) -> None:
    path = saved(tmp_path, a=torch.tensor(3.0), b=torch.arange(6)[2:4])
    folder, tree = opened(tmp_path)
    assert plain(folder, tree)["b"].tolist() == [2, 3]
    flip(path, tree["b"].offset - 16)  # another element of its storage
    folder, tree = opened(tmp_path)
    with pytest.raises(StorageError, match="storage 1"):
        load(folder, tree["b"])
    assert load(folder, tree["a"]) == 3


def test_files_saved_without_checksums_are_read_and_named(
    tmp_path: Path, no_checksums: None
) -> None:
    path = saved(tmp_path, a=torch.randn(300))
    folder, tree = opened(tmp_path)
    assert np.array_equal(read(folder, tree["a"], 0, 300).view("f4"), torch.load(path)["a"].numpy())
    assert audit(folder) == ([], ["a.pt"])
    torch.serialization.set_crc32_options(True)
    saved(tmp_path, a=torch.randn(300))
    assert audit(opened(tmp_path)[0]) == ([], [])


def test_an_audit_reads_what_nobody_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, a=torch.randn(30), b=torch.randn(30))
    folder, tree = opened(tmp_path)
    read(folder, tree["a"], 0, 30)
    flip(path, tree["a"].offset)  # known by now, and not read again
    flip(path, tree["b"].offset)
    damage, unchecked = audit(folder, "other")
    assert [("storage 1" in each, "storage 0" in each) for each in damage] == [(True, False)]
    assert unchecked == ["other"]


@pytest.mark.parametrize("what", ["header flags", "checksum behind", "size behind", "directory"])
def test_headers_and_directory_that_disagree_are_refused(what: str, tmp_path: Path) -> None:
    path = saved(tmp_path, a=torch.randn(30))
    tree = opened(tmp_path)[1]
    data = path.read_bytes()
    header = data.index(b"a/data/0") - 30
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"a/data/0"))
    end = tree["a"].offset + 120
    at = {
        "header flags": header + 6,
        "checksum behind": end + 4,
        "size behind": end + 8,
        "directory": entry + 16,
    }[what]
    flip(path, at)
    with pytest.raises(ValueError, match=r"a/data/0: its header and the directory say different"):
        opened(tmp_path)


def test_a_zip_that_another_program_stored_again_is_read(tmp_path: Path) -> None:
    """With checksums and sizes in the headers, in place of behind the data."""
    path = saved(tmp_path, a=torch.arange(30.0), b=torch.zeros(0))
    with zipfile.ZipFile(path) as old:
        items = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in items:
            new.writestr(name, data)
    folder, tree = opened(tmp_path)
    assert read(folder, tree["a"], 0, 30).view("f4").tolist() == list(range(30))
    flip(path, path.read_bytes().index(b"a/data/0") - 16)  # its checksum
    with pytest.raises(ValueError, match="its header and the directory say different"):
        opened(tmp_path)


@pytest.mark.parametrize(("start", "stop"), [(50, 150), (150, 250), (120, 130), (50, 250)])
def test_storages_that_overlap_are_refused(start: int, stop: int) -> None:
    folder = CheckedFolder(LocalFolder("."))
    folder.note("f", Storage("0", 100, 200, 1))
    folder.note("f", Storage("0", 100, 200, 1))
    folder.note("f", Storage("2", 200, 300, 1))
    folder.note("f", Storage("3", 20, 50, 1))
    with pytest.raises(ValueError, match="and 9 overlap"):
        folder.note("f", Storage("9", start, stop, 1))
    assert [each.name for each in folder.storages["f"]] == ["3", "0", "2"]
