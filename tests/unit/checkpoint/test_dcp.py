"""Folders of torch.distributed.checkpoint, made and loaded by torch itself in one process."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from hakari.training.checkpoint.foreign import dcp as ours
from hakari.training.checkpoint.foreign import dcp_writing
from hakari.training.checkpoint.foreign.dcp import open_dcp
from hakari.training.checkpoint.foreign.dcp_container import open_container
from hakari.training.checkpoint.foreign.dcp_writing import write_dcp
from hakari.training.checkpoint.source import WEIGHT, Group, Info, Source
from hakari.training.checkpoint.storage import open_folder
from hakari.training.checkpoint.tensors import TORCH, as_bits, as_tensor, name_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)
torch.set_num_threads(1)
FLAT = {False: StateDictOptions(), True: StateDictOptions(flatten_optimizer_state_dict=True)}


def trained(seed: int = 0, lr: float = 1e-3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    decayed, others = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    others += list(model[1].parameters())
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def truth(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], Any]:
    """Every tensor by its key, by a way that neither DCP nor ours takes."""
    found = {(name, WEIGHT): tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {(name, key): value for key, value in optimizer.state[parameter].items()}
    return found


def assert_equal(source: Source, expected: dict[tuple[str, str], torch.Tensor]) -> None:
    assert set(source.tensors) == set(expected)
    for key, tensor in expected.items():
        assert source.tensors[key] == Info(tuple(tensor.shape), name_of(tensor.dtype))
        assert np.array_equal(source.array(key), as_bits(tensor)), key


def save(tree: dict[str, Any], path: Path) -> None:
    dcp.save(tree, checkpoint_id=path)


def in_memory(tensors: dict[tuple[str, str], torch.Tensor], **more: Any) -> Source:
    def read(key: Any, box: Any, out: np.ndarray) -> None:
        out[...] = as_bits(tensors[key])[tuple(slice(*ends) for ends in box)]

    infos = {key: Info(tuple(t.shape), name_of(t.dtype)) for key, t in tensors.items()}
    return Source(infos, read, **more)


# --- reading what torch saved ---------------------------------------------------------------


def nested(model: Any, optimizer: Any) -> dict[str, Any]:
    return {"model": model, "optim": optimizer, "step": torch.tensor(7), "note": {"a": [1, "b"]}}


LAYOUTS = {
    "model and optim": nested,
    "app": lambda model, optimizer: {"app": {"model": model, "optimizer": optimizer}},
    "titan": lambda model, optimizer: {
        **model,
        "optimizer": optimizer,
        "train_state": {"step": torch.tensor(7, dtype=torch.int32)},
        "lr_scheduler": {"last_epoch": 7},
        "dataloader": {"dp_rank_0": b"\x80\x04"},
    },
    "one flat dictionary": lambda model, optimizer: {
        **{f"model.{name}": value for name, value in model.items()},
        **{f"optim.{name}": value for name, value in optimizer.items()},
    },
}


CASES = [(layout, flat) for layout in LAYOUTS for flat in (True, False)]
CASES.remove(("one flat dictionary", False))  # there are no flat keys


@pytest.mark.parametrize(("layout", "flat"), CASES)
def test_every_layout_is_read_byte_for_byte(tmp_path, layout, flat):
    model, optimizer = trained()
    save(LAYOUTS[layout](*get_state_dict(model, optimizer, options=FLAT[flat])), tmp_path)
    source = open_dcp(tmp_path)
    assert_equal(source, truth(model, optimizer))
    assert [group.options["weight_decay"] for group in source.groups] == [0.1, 0.0]
    assert source.groups[0].options["betas"] == (0.9, 0.999)
    assert source.groups[0].members == ("0.weight", "2.weight")
    assert set(source.groups[1].members) == {"0.bias", "2.bias", "1.weight", "1.bias"}
    assert source.step == (7 if layout in ("model and optim", "titan") else 3)
    if layout == "model and optim":
        assert source.extra == {"step": torch.tensor(7), "note": {"a": [1, "b"]}}
    if layout == "titan":
        assert source.extra["lr_scheduler"] == {"last_epoch": 7}
        assert source.extra["dataloader"] == {"dp_rank_0": b"\x80\x04"}


def test_weights_alone_and_an_optimizer_alone_are_read(tmp_path):
    model, optimizer = trained()
    weights, states = get_state_dict(model, optimizer, options=FLAT[True])
    save(weights, tmp_path / "weights")
    save(states, tmp_path / "states")
    expected = truth(model, optimizer)
    weights_alone = {key: value for key, value in expected.items() if key[1] == WEIGHT}
    assert_equal(open_dcp(tmp_path / "weights"), weights_alone)
    states_alone = {key: value for key, value in expected.items() if key[1] != WEIGHT}
    found = open_dcp(tmp_path / "states")
    assert_equal(found, states_alone)
    assert len(found.groups) == 2


@pytest.mark.parametrize("dtype", TORCH)
def test_every_type_and_any_box_is_read(tmp_path, dtype):
    raw = np.random.default_rng(1).integers(0, 2, 24 * TORCH[dtype].itemsize, dtype=np.uint8)
    tensor = torch.from_numpy(raw).view(TORCH[dtype]).reshape(4, 6)
    save({"model": {"a.w": tensor, "a.s": tensor[0, 0].clone(), "a.e": tensor[:0]}}, tmp_path)
    source = open_dcp(tmp_path)
    assert np.array_equal(
        source.array(("a.w", WEIGHT), ((1, 3), (2, 5))), as_bits(tensor)[1:3, 2:5]
    )
    assert source.array(("a.s", WEIGHT)) == as_bits(tensor)[0, 0]
    assert source.array(("a.e", WEIGHT)).shape == (0, 6)


def test_a_transposed_tensor_lies_by_columns_and_is_read_by_rows(tmp_path):
    tensor = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save({"model": {"t": tensor, "i": image}}, tmp_path)
    source = open_dcp(tmp_path)
    assert np.array_equal(source.array(("t", WEIGHT)), as_bits(tensor.contiguous()))
    assert np.array_equal(source.array(("i", WEIGHT)), as_bits(image.contiguous()))
    box = ((1, 3), (0, 1), (1, 3))
    part = as_bits(tensor.contiguous())[1:3, 0:1, 1:3]
    assert np.array_equal(source.array(("t", WEIGHT), box), part)


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    save({"model": {"big": torch.zeros(2**18)}}, tmp_path)
    read = []
    real = type(open_folder(tmp_path)).read

    def counted(folder: Any, name: str, offset: int, out: memoryview) -> None:
        read.append(out.nbytes)
        real(folder, name, offset, out)

    monkeypatch.setattr(type(open_folder(tmp_path)), "read", counted)
    source = open_dcp(tmp_path)
    opened = sum(read)
    assert opened == (tmp_path / ".metadata").stat().st_size
    source.array(("big", WEIGHT), ((5, 9),))
    assert sum(read) - opened < 2**20 + 2**15  # all of the storage, to check it
    checked = sum(read)
    source.array(("big", WEIGHT), ((5, 9),))
    assert sum(read) - checked == 16


def test_keys_can_be_left_out(tmp_path):
    model, optimizer = trained()
    weights, _ = get_state_dict(model, optimizer)
    save({"model": weights, "optim": optimizer.state_dict()}, tmp_path)  # by number, not name
    with pytest.raises(ValueError, match=r"number 0, without its name.*or open with skip="):
        open_dcp(tmp_path)
    assert open_dcp(tmp_path, skip=["optim.*"]).groups == ()


def test_large_values_beside_the_model_are_not_read(tmp_path, monkeypatch):
    save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(200)}}, tmp_path)
    assert torch.equal(open_dcp(tmp_path).extra["ema"]["w"], torch.ones(200))
    monkeypatch.setattr(ours, "MOST_EXTRA", 799)
    with pytest.raises(ValueError, match=r"ema\.w makes over 799 bytes.*skip=\['ema\.w'\]"):
        open_dcp(tmp_path)
    assert open_dcp(tmp_path, skip=["ema.*"]).extra is None


# --- damage ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save(nested(*get_state_dict(*trained(), options=FLAT[True])), tmp_path)
    return tmp_path


def changed(folder: Path, change: Any) -> None:
    with (folder / ".metadata").open("rb") as file:
        found = pickle.load(file)
    change(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def test_a_missing_file_is_named_with_what_it_holds(folder):
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__0_0\.distcp is missing; it holds \S+"):
        open_dcp(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither \.metadata nor safetensors"):
        open_dcp(folder)


def test_a_truncated_file_is_named(folder):
    os.truncate(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size - 1)
    with pytest.raises(ValueError, match=r"distcp has [\d,]+ bytes, and .* ends at .*: truncated"):
        open_dcp(folder)


def test_a_gap_names_the_tensor_and_the_box(folder):
    def change(found: Any) -> None:
        chunk = found.state_dict_metadata["model.0.weight"].chunks[0]
        chunk.sizes = torch.Size([7, 3])

    changed(folder, change)
    with pytest.raises(ValueError, match=r"model\.0\.weight \[8, 3\]: nothing holds \[7:8, 0:3\]"):
        open_dcp(folder)


def test_an_overlap_and_a_chunk_without_a_place_are_found(folder):
    def twice(found: Any) -> None:
        chunks = found.state_dict_metadata["model.0.weight"].chunks
        chunks.append(chunks[0])

    changed(folder, twice)
    with pytest.raises(ValueError, match=r"model\.0\.weight .* overlap"):
        open_dcp(folder)

    def lost(found: Any) -> None:
        found.storage_data = {
            key: value for key, value in found.storage_data.items() if "0.weight" not in key.fqn
        }

    changed(folder, lost)
    with pytest.raises(ValueError, match=r"does not say where model\.0\.weight \[0:8, 0:3\] lies"):
        open_dcp(folder)


def test_metadata_that_contradict_the_item_are_found(folder):
    def change(found: Any) -> None:
        found.state_dict_metadata["model.0.weight"].properties.dtype = torch.float16

    changed(folder, change)
    message = r"model\.0\.weight \[0:8, 0:3\] is F32 \[8, 3\], and \.metadata says F16"
    source = open_dcp(folder)
    with pytest.raises(ValueError, match=message):
        source.array(("0.weight", WEIGHT))


@pytest.mark.parametrize("path", ["../x.distcp", "/etc/passwd", "a/../../b", ""])
def test_files_outside_the_folder_are_refused(folder, path):
    def change(found: Any) -> None:
        for place in found.storage_data.values():
            place.relative_path = path

    changed(folder, change)
    with pytest.raises(ValueError, match=r"it cannot"):
        open_dcp(folder)


def test_extensions_are_refused(folder):
    def change(found: Any) -> None:
        for place in found.storage_data.values():
            place.transform_descriptors = ["stream.zstd"]

    changed(folder, change)
    with pytest.raises(ValueError, match=r"was saved through extensions \['stream\.zstd'\]"):
        open_dcp(folder)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_no_pickle_is_executed(folder, tmp_path_factory):
    mark = tmp_path_factory.mktemp("mark") / "executed"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(
        ValueError, match=r"\.metadata is refused: the pickle names 'posix\.system'"
    ):
        open_dcp(folder)
    other = tmp_path_factory.mktemp("other")
    save({"model": {"w": torch.ones(2)}, "extra": Evil(mark)}, other)
    with pytest.raises(
        ValueError, match=r"extra: .*refused: the pickle names 'posix\.system'.*skip"
    ):
        open_dcp(other)
    assert open_dcp(other, skip=["extra"]).array(("w", WEIGHT)).size == 2
    assert not mark.exists()


def test_flipped_bits_of_metadata_are_errors_or_a_source(folder):
    data = (folder / ".metadata").read_bytes()
    chance = np.random.default_rng(2)
    for _ in range(60):
        mutant = bytearray(data)
        mutant[chance.integers(len(data))] ^= 1 << int(chance.integers(8))
        (folder / ".metadata").write_bytes(mutant)
        try:
            open_dcp(folder)
        except (ValueError, FileNotFoundError):
            continue


def test_truncated_metadata_are_an_error(folder):
    data = (folder / ".metadata").read_bytes()
    for length in range(0, len(data), len(data) // 50):
        (folder / ".metadata").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"\.metadata"):
            open_dcp(folder)


# --- writing what torch loads ---------------------------------------------------------------


def loaded(path: Path, flat: bool, **names: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh model and optimizer with what torch's own load finds in the folder."""
    model, optimizer = trained(seed=1, lr=0.5)
    weights, states = get_state_dict(model, optimizer, options=FLAT[flat])
    optimizer_name = names.get("optimizer", "optim")
    tree = {"model": weights, optimizer_name: states}
    if names.get("model") == "":
        tree = {**weights, optimizer_name: states}
    dcp.load(tree, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=tree[optimizer_name],
        options=FLAT[flat],
    )
    return model, optimizer


@pytest.mark.parametrize("flat", [True, False])
def test_torch_loads_what_is_written(tmp_path, flat):
    model, optimizer = trained()
    save(nested(*get_state_dict(model, optimizer)), tmp_path / "a")
    write_dcp(open_dcp(tmp_path / "a"), tmp_path / "b")
    other, restored = loaded(tmp_path / "b", flat)
    expected, found = truth(model, optimizer), truth(other, restored)
    assert all(np.array_equal(as_bits(found[key]), as_bits(expected[key])) for key in expected)
    options = [{**group, "params": None} for group in restored.param_groups]
    assert options == [{**group, "params": None} for group in optimizer.param_groups]


def test_what_is_written_comes_back(tmp_path):
    save(nested(*get_state_dict(*trained(), options=FLAT[True])), tmp_path / "a")
    one = open_dcp(tmp_path / "a")
    write_dcp(one, tmp_path / "b")
    two = open_dcp(tmp_path / "b")
    assert_equal(
        two,
        {
            k: as_tensor(one.array(k).reshape(-1), i.dtype).reshape(i.shape)
            for k, i in one.tensors.items()
        },
    )
    assert (two.groups, two.extra, two.step) == (one.groups, one.extra, one.step)


def test_names_above_weights_and_states_can_be_chosen(tmp_path):
    model, optimizer = trained()
    save(nested(*get_state_dict(model, optimizer)), tmp_path / "a")
    write_dcp(open_dcp(tmp_path / "a"), tmp_path / "b", prefix="", optimizer_prefix="optimizer")
    other, restored = loaded(tmp_path / "b", True, model="", optimizer="optimizer")
    expected, found = truth(model, optimizer), truth(other, restored)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert_equal(open_dcp(tmp_path / "b"), expected)


@pytest.mark.parametrize("item", [64, 1000])
def test_large_tensors_are_several_items_in_several_files(tmp_path, monkeypatch, item):
    monkeypatch.setattr(dcp_writing, "ITEM", item)
    monkeypatch.setattr(dcp_writing, "FILE", 5000)
    tensor = torch.randn(30, 5, 7)
    told: list[int] = []
    write_dcp(in_memory({("w", WEIGHT): tensor}), tmp_path, budget=256, progress=told.append)
    chunks = open_container(tmp_path).chunks["model.w"]
    assert sum(told) == tensor.nbytes
    assert len(chunks) > tensor.nbytes // item
    tree = {"model": {"w": torch.zeros(30, 5, 7)}}
    dcp.load(tree, checkpoint_id=tmp_path)
    assert torch.equal(tree["model"]["w"], tensor)
    assert np.array_equal(open_dcp(tmp_path).array(("w", WEIGHT)), as_bits(tensor))


def test_never_more_than_the_budget_is_asked_for(tmp_path):
    asked = []
    tensor = torch.randn(64, 50)
    source = in_memory({("w", WEIGHT): tensor})

    def read(key: Any, box: Any, out: np.ndarray) -> None:
        asked.append(out.nbytes)
        source.read(key, box, out)

    write_dcp(Source(source.tensors, read), tmp_path, budget=1000)
    assert max(asked) <= 1000


def test_tied_weights_are_written_once_under_all_names(tmp_path):
    tensors = {("embed.weight", WEIGHT): torch.randn(9, 4), ("x", WEIGHT): torch.zeros(0, 2)}
    tied = (("embed.weight", "head.weight"),)
    write_dcp(in_memory(tensors, tied=tied), tmp_path)
    tree = {"model": {"embed.weight": torch.zeros(9, 4), "head.weight": torch.ones(9, 4)}}
    dcp.load(tree, checkpoint_id=tmp_path)
    assert torch.equal(tree["model"]["head.weight"], tensors["embed.weight", WEIGHT])
    source = open_dcp(tmp_path)
    assert source.tied == tied
    assert set(source.tensors) == set(tensors)


def test_numbers_of_steps_and_options_are_made_as_torch_keeps_them(tmp_path):
    """As a source of another framework has them: plain numbers, and fewer options."""
    model, optimizer = trained()
    found = truth(model, optimizer)
    scalars = {(name, "step"): 3 for name, state in found if state == "step"}
    tensors = {key: value for key, value in found.items() if key[1] != "step"}
    members = tuple(dict(model.named_parameters()))
    options = {"lr": 0.25, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0}
    source = in_memory(tensors, scalars=scalars, groups=(Group(options, members),), step=3)
    write_dcp(source, tmp_path)
    other, restored = loaded(tmp_path, True)
    assert torch.equal(restored.state[other[0].weight]["step"], torch.tensor(3.0))
    assert [group["lr"] for group in restored.param_groups] == [0.25, 0.25]
    assert open_dcp(tmp_path).step == 3


def test_whether_decay_is_decoupled_is_not_guessed(tmp_path):
    tensors = {("w", state): torch.ones(2) for state in (WEIGHT, "exp_avg", "exp_avg_sq")}
    for optimizer, decay, known in (("Adam", 0.1, False), ("AdamW", 0.1, True), ("Adam", 0, True)):
        groups = (Group({"lr": 1.0, "weight_decay": decay}, ("w",)),)
        path = tmp_path / f"{optimizer}{decay}"
        write_dcp(in_memory(tensors, groups=groups, optimizer=optimizer), path)
        options = open_dcp(path).groups[0].options
        assert ("decoupled_weight_decay" in options) == known


def test_other_values_are_written_at_their_paths(tmp_path):
    extra = {"rng": {"state": np.arange(3, dtype=np.uint32)}, "seen": (1, 2), "t": torch.ones(2)}
    write_dcp(in_memory({("w", WEIGHT): torch.ones(1)}, extra=extra, step=4), tmp_path)
    found = open_dcp(tmp_path)
    assert torch.equal(found.extra["rng"]["state"], torch.arange(3).to(torch.uint32))
    assert (found.extra["seen"], found.step) == ((1, 2), 4)
    tree = {"seen": (0,), "t": torch.zeros(2)}
    dcp.load(tree, checkpoint_id=tmp_path)
    assert tree["seen"] == (1, 2)
    assert torch.equal(tree["t"], torch.ones(2))


def test_writing_refuses_what_cannot_be(tmp_path):
    tensors = {("w", WEIGHT): torch.ones(1)}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match=r"full is not empty: choose another folder"):
        write_dcp(in_memory(tensors), tmp_path / "full")
    with pytest.raises(ValueError, match=r"two values would be called 'model\.w'"):
        write_dcp(in_memory(tensors, extra={"model": {"w": 1}}), tmp_path / "a")
    with pytest.raises(ValueError, match=r"w \(step\) is 2\.5: torch keeps whole numbers"):
        write_dcp(in_memory(tensors, scalars={("w", "step"): 2.5}), tmp_path / "b")
    with pytest.raises(ValueError, match=r"a is a builtins\.object: torch's safe loader refuses"):
        write_dcp(in_memory(tensors, extra={"a": object()}), tmp_path / "c")
    assert not (tmp_path / "c" / ".metadata").exists()


# --- safetensors ----------------------------------------------------------------------------


def sharded(path: Path, parts: dict[str, tuple[list[int], torch.Tensor]], number: int) -> None:
    """A file as HuggingFaceStorageWriter writes one for a rank."""
    offsets = {name: {"saved_offsets": start} for name, (start, _) in parts.items()}
    said = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    file = path / f"shard-{number:05d}-model-00001-of-00001.safetensors"
    save_file({name: tensor.contiguous() for name, (_, tensor) in parts.items()}, file, said)


def test_safetensors_of_dcp_are_read_as_one_tensor(tmp_path):
    whole, more = torch.randn(5, 4), torch.randn(3).bfloat16()
    sharded(tmp_path, {"a.w": ([0, 0], whole[:3]), "b": ([0], more)}, 1)
    sharded(tmp_path, {"a.w": ([3, 0], whole[3:])}, 2)
    assert_equal(open_dcp(tmp_path), {("a.w", WEIGHT): whole, ("b", WEIGHT): more})


def test_torchs_own_safetensors_are_read(tmp_path):
    model = trained()[0]
    writer = dcp.HuggingFaceStorageWriter(path=str(tmp_path), save_distributed=True)
    dcp.save(get_model_state_dict(model), storage_writer=writer)
    assert_equal(open_dcp(tmp_path), {(n, WEIGHT): t for n, t in model.state_dict().items()})


def test_gaps_between_safetensors_are_found(tmp_path):
    whole = torch.randn(6, 4)
    sharded(tmp_path, {"w": ([0, 0], whole[:2])}, 1)
    sharded(tmp_path, {"w": ([4, 0], whole[4:])}, 2)
    with pytest.raises(ValueError, match=r"w \[6, 4\]: nothing holds \[2:4, 0:4\]"):
        open_dcp(tmp_path)
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the files of shard 1 are missing"):
        open_dcp(tmp_path)


def test_the_index_of_a_place_is_torchs(tmp_path):
    """Keys of storage_data are what torch looks for, hints aside."""
    write_dcp(in_memory({("w", WEIGHT): torch.ones(3, 2)}), tmp_path)
    with (tmp_path / ".metadata").open("rb") as file:
        found = pickle.load(file)
    assert MetadataIndex("model.w", [0, 0]) in found.storage_data
    assert found.version == "1.0.0"


def test_an_object_store_will_do_for_both_ways(tmp_path):
    model, optimizer = trained()
    save(nested(*get_state_dict(model, optimizer)), tmp_path)
    write_dcp(open_dcp(tmp_path), "memory://dcp-test/run")
    assert_equal(open_dcp("memory://dcp-test/run"), truth(model, optimizer))
