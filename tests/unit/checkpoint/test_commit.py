"""What processes tell one another through files, at the moments when it is easily misread."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from hakari.training.checkpoint import commit, storage
from hakari.training.checkpoint.commit import Request, SaveError, carry_out
from hakari.training.checkpoint.storage import LocalFolder
from tests.distributed.faults import in_memory


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


def request(root: Path, rank: int) -> Request:
    return Request(str(root), 1, "a" * 32, rank, 2, (), (), {"extra": None}, timeout=0.05)


def test_a_failure_that_is_being_written_is_not_read(folder):
    """It is there under another name until it is whole."""
    mine = request(folder, 0)
    place = folder / mine.folder
    place.mkdir()
    (place / "failed-00001.txt.new").write_text("OSEr")
    with pytest.raises(TimeoutError, match=r"given up after 0\.05 s: ranks \[1\] wrote nothing"):
        carry_out(mine, [])


def test_a_failure_is_passed_on(folder):
    mine = request(folder, 0)
    place = folder / mine.folder
    place.mkdir()
    (place / "failed-00001.txt").write_text("OSError: no space")
    with pytest.raises(SaveError, match=r"the save of step 1 failed on rank 1: OSError: no space"):
        carry_out(mine, [])


def test_who_fails_before_there_is_a_folder_tells_others_too(folder):
    with (
        patch.object(LocalFolder, "sync", side_effect=OSError("broken")),
        pytest.raises(OSError, match="broken"),
    ):
        carry_out(request(folder, 1), [])
    with pytest.raises(SaveError, match=r"failed on rank 1: OSError: broken"):
        carry_out(request(folder, 0), [])


def test_data_stay_once_the_record_may_have_been_seen(folder):
    """The record's own flush fails, or the process is interrupted, after others can read it."""
    for error in (OSError("broken"), KeyboardInterrupt()):
        mine, real = request(folder, 1), storage._sync_folder
        data = folder / mine.folder / "data" / "aaaaaaaa-r00001-000.safetensors"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_bytes(b"x")

        def flush(path: str, real=real, error=error) -> None:
            if list(Path(path).glob("ready-00001.json")):
                raise error
            real(path)

        expected = TimeoutError if isinstance(error, OSError) else KeyboardInterrupt
        with patch.object(storage, "_sync_folder", flush), pytest.raises(expected):
            carry_out(mine, [])
        assert data.exists()
        assert not list((folder / mine.folder).glob("failed-*"))
        (folder / mine.folder / "ready-00001.json").unlink()


def test_a_coordinator_that_is_gone_is_named(folder):
    with pytest.raises(TimeoutError, match="rank 0, the coordinator, did not commit"):
        carry_out(request(folder, 1), [])
    with pytest.raises(SaveError, match="given up: training has ended"):
        carry_out(request(folder, 1), [], lambda: True)


def test_a_record_of_another_save_is_refused():
    first = {"save_id": "b", "extra": None}
    with pytest.raises(ValueError, match=r"rank 0 wrote for another save \(b\)"):
        commit.merge(request(Path("x"), 0), [first, first])
