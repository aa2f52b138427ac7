"""Flipped bits in other frameworks' checkpoints: never a different one, and what `verify` says."""

from __future__ import annotations

import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from hakari.training.checkpoint.conversion import convert
from hakari.training.checkpoint.formats import open_any
from hakari.training.checkpoint.fragments import DamageError
from hakari.training.checkpoint.source import WEIGHT, Source
from hakari.training.checkpoint.verification import verify
from tests.unit.checkpoint.deepspeed_cases import FIXTURES, TAG, copy_of, rewrite

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)
RANK = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def flipped(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def contents(source: Source) -> dict[object, object]:
    found: dict[object, object] = {key: source.array(key).tobytes() for key in source.tensors}
    rest = (source.groups, source.tied, source.step, source.extra, source.scalars)
    return found | {"rest": repr(rest)}


def refused_or_the_same(where: Path, path: Path, count: int, seed: int) -> int:
    """How many single flips are refused; the others must change nothing."""
    whole, data, refused = contents(open_any(where)), path.read_bytes(), 0
    chance = np.random.default_rng(seed)
    for at in chance.integers(0, len(data), count):
        flipped(path, int(at), int(chance.integers(8)))
        try:
            assert contents(open_any(where)) == whole, at
        except (ValueError, FileNotFoundError):
            refused += 1
        path.write_bytes(data)
    return refused


def dcp_folder(where: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 20)).square().sum().backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": states, "step": 7}, checkpoint_id=where)
    return where


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("zero2-bf16", f"{TAG}/{RANK}"),
        ("zero3-bf16", f"{TAG}/zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("zero1-fp32", f"{TAG}_universal/zero/up.weight/exp_avg.pt"),
    ],
)
def test_a_flip_in_deepspeeds_files_is_refused_or_changes_nothing(
    case: str, file: str, tmp_path: Path
) -> None:
    where = copy_of(case, tmp_path)
    if "universal" in file:
        where = where / f"{TAG}_universal"
        file = file.partition("/")[2]
    assert refused_or_the_same(where, where / file, 60, 0) > 5


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_flip_in_a_dcp_folder_is_refused_or_changes_nothing(file: str, tmp_path: Path) -> None:
    where = dcp_folder(tmp_path / "dcp")
    assert refused_or_the_same(where, where / file, 60, 1) > 10


def test_damage_names_file_storage_and_all_parameters_in_it(tmp_path: Path) -> None:
    where = copy_of("zero2-bf16", tmp_path)
    source = open_any(where)
    path = where / TAG / RANK
    bits = source.array(("up.weight", "exp_avg")).tobytes()[-64:]
    assert path.read_bytes().count(bits) == 1
    flipped(path, path.read_bytes().index(bits) + 9)
    source = open_any(where)
    told = rf"{RANK}: storage \d+ .* is not what was written: its CRC-32 differs; it holds up.weigh"
    with pytest.raises(DamageError, match=told) as caught:
        source.array(("up.weight", "exp_avg"))
    assert caught.value.keys[0] == ("up.weight", "exp_avg")
    assert ("down.weight", "exp_avg") in caught.value.keys
    assert ("up.weight", WEIGHT) not in caught.value.keys
    source.array(("up.weight", WEIGHT))
    with pytest.raises(DamageError):
        convert(source, tmp_path / "made")
    assert not [path for path in (tmp_path / "made").iterdir() if path.name.startswith("step")]
    report = verify(where)
    hit = {(each.parameter, each.state) for each in report.damage}
    assert hit == set(caught.value.keys)


def test_verify_of_deepspeed_says_whole_and_reads_all_storages(tmp_path: Path) -> None:
    where = copy_of("zero2-bf16", tmp_path)
    report = verify(where)
    assert (report.whole, report.checked, report.unchecked) == (True, True, ())
    assert str(report).startswith("whole: ")
    path = where / TAG / "mp_rank_00_model_states.pt"
    copies = torch.load(path, weights_only=False)["module"]["up.weight"]
    bits = copies.view(torch.int16).numpy().tobytes()
    flipped(path, path.read_bytes().index(bits))  # of a copy that the optimizer's makes useless
    (damage,) = verify(where).damage
    assert "mp_rank_00_model_states.pt: storage" in damage.what


def test_verify_of_dcp_says_which_file_has_no_checksum(tmp_path: Path) -> None:
    where = dcp_folder(tmp_path / "dcp")
    report = verify(where)
    assert (report.whole, report.checked, report.unchecked) == (True, True, (".metadata",))
    assert str(report).startswith("readable: ")
    assert "what has a CRC-32 agrees with it, and .metadata has none" in str(report)


def test_verify_names_files_that_were_saved_without_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = copy_of("zero2-bf16", tmp_path)
    monkeypatch.setattr(zlib, "crc32", lambda *data: 0)  # what set_crc32_options(False) writes
    rewrite(where / TAG, RANK, lambda tree: tree)
    report = verify(where)
    assert (report.whole, report.unchecked) == (True, (RANK,))
    assert f"and {RANK} has none, so that changed values there cannot be told" in str(report)


def test_metadata_that_give_two_items_the_same_bytes_are_refused(tmp_path: Path) -> None:
    where = dcp_folder(tmp_path / "dcp")
    reader = dcp.FileSystemReader(where)
    record = reader.read_metadata()
    first, second = [*record.storage_data.values()][:2]
    second.offset, second.length = first.offset + 4, first.length - 4
    _rewritten(where, record)
    with pytest.raises(ValueError, match=r"overlap in __0_0\.distcp: \.metadata is damaged"):
        open_any(where)


def test_metadata_that_name_a_key_in_two_ways_are_refused(tmp_path: Path) -> None:
    where = dcp_folder(tmp_path / "dcp")
    record = dcp.FileSystemReader(where).read_metadata()
    kept = dict(record.planner_data)
    record.planner_data["model.0.weight"] = ("model", "0.weighs")
    _rewritten(where, record)
    with pytest.raises(ValueError, match=r"says that model\.0\.weight lies at \('model', '0\.weig"):
        open_any(where)
    record.planner_data = kept
    del record.state_dict_metadata["model.0.weight"]
    _rewritten(where, record)
    with pytest.raises(ValueError, match=r"says where model\.0\.weight lies, but not what it is"):
        open_any(where)


def test_an_item_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    where = dcp_folder(tmp_path / "dcp")
    record = dcp.FileSystemReader(where).read_metadata()
    place = next(p for i, p in record.storage_data.items() if i.fqn == "model.0.weight")
    flipped(where / "__0_0.distcp", place.offset)
    with pytest.raises(DamageError, match=r"it holds model\.0\.weight \[0:30, 0:20\]") as caught:
        open_any(where).array(("0.weight", WEIGHT))
    assert caught.value.key[0] == "model.0.weight"


def test_megatrons_common_file_is_checked_and_named(tmp_path: Path) -> None:
    where = Path(shutil.copytree(FIXTURES.parent / "megatron" / "stacked", tmp_path / "it"))
    common = {"iteration": 5, "own": torch.arange(40.0)}
    torch.save(common, where / "common.pt")
    assert verify(where).unchecked == (".metadata",)
    bits = torch.arange(40.0).numpy().tobytes()
    flipped(where / "common.pt", (where / "common.pt").read_bytes().index(bits) + 60)
    with pytest.raises(ValueError, match=r"common\.pt: storage 0 .* is not what was written"):
        open_any(where)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(common, where / "common.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert verify(where).unchecked == (".metadata", "common.pt")


def test_the_fixtures_are_whole() -> None:
    for case in ("zero0-fp32", "zero1-fp32", "zero3-fp32"):
        assert str(verify(FIXTURES / case)).startswith("whole: ")


def _rewritten(where: Path, record: object) -> None:
    (where / ".metadata").write_bytes(pickle.dumps(record))
