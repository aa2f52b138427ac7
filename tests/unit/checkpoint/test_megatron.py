"""Megatron's torch_dist folders: checkpoints that megatron-core saved, and ours in its form.

The fixtures were saved by megatron-core 0.16.1 from two tensor-parallel processes
(tests/fixtures/megatron/make_fixture.py), and what is written here is what
check_against_megatron.py there has megatron-core load.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hakari.training.checkpoint.boxes import whole, within
from hakari.training.checkpoint.foreign import megatron
from hakari.training.checkpoint.foreign.megatron import open_megatron, write_megatron
from hakari.training.checkpoint.foreign.torch_files import read_torch
from hakari.training.checkpoint.language.assembly import apply, invert
from hakari.training.checkpoint.language.rules import Program, check, shipped
from hakari.training.checkpoint.source import Group, Info, Source
from hakari.training.checkpoint.storage import open_folder
from hakari.training.config import Model
from hakari.training.model import Transformer

FIXTURES = Path(__file__).parents[2] / "fixtures" / "megatron"
CONFIG = {"heads": 4, "kv_heads": 2, "head_dim": 2, "vocab": 13, "vocab_multiple": 16}
KINDS = {"stacked": "megatron-gpt", "layered": "megatron-gpt-layers"}
both = pytest.mark.parametrize("kind", [*KINDS])


def truth() -> dict[Any, np.ndarray]:
    """Whole tensors by name and state, as they were before they were cut."""
    values = load_file(FIXTURES / "truth.safetensors")
    return {tuple(key.split("|")): value.view(np.uint32) for key, value in values.items()}


def program(kind: str) -> Program:
    return shipped(KINDS[kind], CONFIG)


def held(tensors: Mapping[Any, np.ndarray], **more: Any) -> Source:
    def read(key: Any, box: Any, out: np.ndarray) -> None:
        out[...] = tensors[key][within(box, whole(tensors[key].shape))]

    infos = {key: Info(value.shape, "F32") for key, value in tensors.items()}
    return Source(infos, read, **more)


def folder_with(tmp_path: Path, kind: str = "stacked") -> Path:
    shutil.copytree(FIXTURES / kind, tmp_path / "it")
    return tmp_path / "it"


def assert_equal(source: Source, expected: Mapping[Any, np.ndarray]) -> None:
    assert {*source.tensors} == {*expected}
    for key, value in expected.items():
        assert np.array_equal(source.array(key), value), key


def steps(value: float) -> dict[Any, np.ndarray]:
    return {(name, "step"): np.float32(value).view(np.uint32) for name, _ in truth()}


# --- reading ------------------------------------------------------------------------------


@both
def test_what_megatron_saved_is_what_was_cut(kind: str) -> None:
    source = open_megatron(FIXTURES / kind, program(kind))
    assert_equal(source, truth() | steps(5))
    (group,) = source.groups
    assert group.options == {"lr": 0.001, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    assert {*group.members} == {name for name, _ in truth()}
    assert (source.step, source.origin["framework"]) == (5, "megatron")
    assert source.extra["common"]["checkpoint_version"] == 3.0


@both
def test_hakaris_transformer_makes_megatrons_logits_of_it(kind: str) -> None:
    """Through Hugging Face's names to hakari's: the order of heads and halves is the right one."""
    atoms = open_megatron(FIXTURES / kind, program(kind))
    own = invert(shipped("hakari"), atoms)[0, 0, 0]
    config = Model(
        vocabulary=13, dim=8, layers=2, heads=4, kv_heads=2, head_dim=2, hidden=6, tied=False
    )
    model = Transformer(config)
    model.load_state_dict(
        {
            name: torch.from_numpy(own.array((name, state)).view(np.float32))
            for name, state in own.tensors
            if state == "weight"
        }
    )
    with torch.no_grad():
        ours = model(torch.tensor([[0, 5, 10, 2, 7, 12, 4, 9]]))[0]
    theirs = torch.from_numpy(load_file(FIXTURES / "logits.safetensors")["logits"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_boxes_of_what_megatron_saved() -> None:
    source = open_megatron(FIXTURES / "stacked", program("stacked"))
    key = ("model.layers.1.self_attn.k_proj.weight", "exp_avg")
    assert np.array_equal(source.array(key, ((1, 4), (2, 7))), truth()[key][1:4, 2:7])


def test_without_a_program_names_and_shapes_are_megatrons() -> None:
    source = open_megatron(FIXTURES / "stacked")
    assert source.tensors["decoder.layers.self_attention.linear_qkv.weight", "weight"].shape == (
        *(2, 16),
        8,
    )
    states = {state for _, state in source.tensors}
    assert states == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert np.array_equal(
        source.array(("embedding.word_embeddings.weight", "weight"))[13:], np.zeros((3, 8))
    )


def test_the_master_is_read_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's copy, made different, is left out."""
    inside = megatron.open_container(FIXTURES / "stacked", megatron.INERT)

    def read(key: str, box: Any, out: np.ndarray) -> None:
        inside.read(key, box, out)
        if not key.startswith("optimizer."):
            out[...] = 0

    monkeypatch.setattr(megatron, "open_container", lambda *_: replace(inside, read=read))
    assert_equal(open_megatron(FIXTURES / "stacked", program("stacked")), truth() | steps(5))


def test_states_without_a_weight_and_twice_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = megatron.open_container(FIXTURES / "stacked", megatron.INERT)
    info = Info((8,), "F32")
    more = {**inside.tensors, "optimizer.state.exp_avg.lost": info}
    monkeypatch.setattr(megatron, "open_container", lambda *_: replace(inside, tensors=more))
    with pytest.raises(ValueError, match="has exp_avg of lost, but no weight"):
        open_megatron(FIXTURES / "stacked")
    flat = {**inside.tensors, "optimizer.state.exp_avg.output_layer.weight": Info((1, 128), "F32")}
    monkeypatch.setattr(megatron, "open_container", lambda *_: replace(inside, tensors=flat))
    with pytest.raises(ValueError, match=r"exp_avg\.output.* is \[1, 128\], .* \[16, 8\]: re-save"):
        open_megatron(FIXTURES / "stacked")
    more = {**inside.tensors, "optimizer.state.param.decoder.final_layernorm.weight": info}
    monkeypatch.setattr(megatron, "open_container", lambda *_: replace(inside, tensors=more))
    with pytest.raises(ValueError, match=r"weight of decoder\.final_layernorm\.weight twice"):
        open_megatron(FIXTURES / "stacked")


# --- writing ------------------------------------------------------------------------------


@both
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    source = open_megatron(FIXTURES / kind, program(kind))
    write_megatron(source, tmp_path / "new", program(kind))
    assert_equal(open_megatron(tmp_path / "new", program(kind)), truth() | steps(5))
    assert json.loads((tmp_path / "new" / "metadata.json").read_bytes()) == json.loads(
        (FIXTURES / kind / "metadata.json").read_bytes()
    )
    common = read_torch(open_folder(tmp_path / "new"), "common.pt")
    assert common == read_torch(open_folder(FIXTURES / kind), "common.pt")


@both
def test_the_container_holds_what_megatrons_holds(kind: str, tmp_path: Path) -> None:
    """Every tensor of the folder, loaded by torch, equals that of the fixture."""
    source = open_megatron(FIXTURES / kind, program(kind))
    write_megatron(source, tmp_path / "new", program(kind))
    ours, theirs = (loaded(folder) for folder in (tmp_path / "new", FIXTURES / kind))
    assert {*ours} == {*theirs}
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    import warnings

    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    found = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(info.size) for name, info in found.items() if hasattr(info, "size")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def test_from_one_layout_to_the_other(tmp_path: Path) -> None:
    source = open_megatron(FIXTURES / "stacked", program("stacked"))
    write_megatron(source, tmp_path / "new", program("layered"))
    assert_equal(open_megatron(tmp_path / "new", program("layered")), truth() | steps(5))


def test_arguments_and_dtypes_are_copied(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    args = argparse.Namespace(num_layers=2, none=None, params_dtype=torch.bfloat16, sizes=[1, (2,)])
    torch.save({"args": args, "iteration": 5}, folder / "common.pt")
    source = open_megatron(folder, program("stacked"))
    assert source.extra["common"]["args"]["num_layers"] == 2
    write_megatron(source, tmp_path / "new", program("stacked"))
    assert torch.load(tmp_path / "new" / "common.pt", weights_only=False) == {
        "args": args,
        "iteration": 5,
    }


def test_a_later_step_is_written_as_such(tmp_path: Path) -> None:
    source = open_megatron(FIXTURES / "stacked", program("stacked"))
    groups = (Group({**source.groups[0].options, "lr": 0.25}, source.groups[0].members),)
    later = held(
        truth() | steps(77), step=77, groups=groups, extra=source.extra, origin=source.origin
    )
    write_megatron(later, tmp_path / "new", program("stacked"))
    common = read_torch(open_folder(tmp_path / "new"), "common.pt")
    (group,) = common["optimizer"]["optimizer"]["param_groups"]
    assert (common["iteration"], group["step"], group["lr"]) == (77, 77, 0.25)
    assert source.extra["common"]["iteration"] == 5  # the source's own is as it was


def test_objects_of_other_classes_are_not_copied(tmp_path: Path) -> None:
    source = open_megatron(FIXTURES / "stacked", program("stacked"))
    extra = {
        "common": {"args": {"class": "argparse.Namespace", "mode": {"class": "megatron.Mode"}}}
    }
    with pytest.raises(ValueError, match=r"common\.pt\.args\.mode was an object of megatron\.Mode"):
        write_megatron(replace(source, extra=extra), tmp_path / "new", program("stacked"))
    assert not (tmp_path / "new").exists()
    write_megatron(
        replace(source, extra=extra), tmp_path / "new", program("stacked"), common={"iteration": 1}
    )
    assert open_megatron(tmp_path / "new").step == 1


def test_the_masters_name_is_chosen(tmp_path: Path) -> None:
    source = open_megatron(FIXTURES / "stacked", program("stacked"))
    write_megatron(source, tmp_path / "new", program("stacked"), master="param")
    keys = megatron.open_container(tmp_path / "new").tensors
    assert "optimizer.state.param.output_layer.weight" in keys
    assert "optimizer.state.fp32_param.output_layer.weight" not in keys
    with pytest.raises(ValueError, match="master = 'main': it is one of fp32_param, param"):
        write_megatron(source, tmp_path / "other", program("stacked"), master="main")


def test_weights_alone_of_another_format(tmp_path: Path) -> None:
    weights = {key: value for key, value in truth().items() if key[1] == "weight"}
    write_megatron(held(weights, step=3), tmp_path / "new", program("layered"))
    assert_equal(open_megatron(tmp_path / "new", program("layered")), weights)
    assert read_torch(open_folder(tmp_path / "new"), "common.pt") == {
        "checkpoint_version": 3.0,
        "iteration": 3,
    }


def test_an_optimizer_of_another_format_becomes_megatrons(tmp_path: Path) -> None:
    names = tuple(dict.fromkeys(name for name, _ in truth()))
    groups = (Group({"lr": 0.5}, names),)
    source = held(truth() | steps(9), step=9, groups=groups)
    write_megatron(source, tmp_path / "new", program("stacked"))
    back = open_megatron(tmp_path / "new", program("stacked"))
    assert_equal(back, truth() | steps(9))
    assert back.groups[0].options == {"lr": 0.5}
    table = read_torch(open_folder(tmp_path / "new"), "common.pt")["optimizer"]
    assert table["param_state_sharding_type"] == "fully_reshardable"
    assert table["optimizer"]["param_groups"] == [{"lr": 0.5, "step": 9}]


def test_an_optimizer_that_tells_its_class_has_it() -> None:
    names = tuple(dict.fromkeys(name for name, _ in truth()))
    for flags, told in (({"decoupled_weight_decay": True, "amsgrad": False}, "AdamW"), ({}, "")):
        source = held(truth() | steps(9), groups=(Group({"lr": 0.5, **flags}, names),))
        with TemporaryDirectory() as folder:
            write_megatron(source, folder, program("stacked"))
            assert open_megatron(folder).optimizer == told
            assert open_megatron(folder, program("stacked")).optimizer == told


# --- refusals -----------------------------------------------------------------------------


def test_buckets_are_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    tree = {"optimizer": {0: {"param_state_sharding_type": "dp_reshardable"}}, "iteration": 5}
    torch.save(tree, folder / "common.pt")
    message = "optimizer states 'dp_reshardable', .* --dist-ckpt-optim-fully-reshardable"
    with pytest.raises(ValueError, match=message):
        open_megatron(folder)


def test_buckets_are_refused_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = megatron.open_container(FIXTURES / "stacked", megatron.INERT)
    key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg"
    more = {**inside.tensors, key: Info((4,), "F32")}
    monkeypatch.setattr(megatron, "open_container", lambda *_: replace(inside, tensors=more))
    with pytest.raises(ValueError, match=r"in buffers \(optimizer\.distributed\.dp_group_idx_0"):
        open_megatron(FIXTURES / "stacked")


def test_another_container_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ValueError, match="is saved as 'zarr': save it again with --ckpt-format"):
        open_megatron(folder)
    (folder / "metadata.json").write_text("[")
    with pytest.raises(ValueError, match=r"metadata\.json is damaged"):
        open_megatron(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.json: give the folder of one"):
        open_megatron(folder)


def test_groups_at_different_steps_are_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    groups = [{"lr": 1.0, "step": 5}, {"lr": 2.0, "step": 6}]
    torch.save({"optimizer": {"optimizer": {"param_groups": groups}}}, folder / "common.pt")
    with pytest.raises(ValueError, match="optimizer groups are at different steps"):
        open_megatron(folder)
    groups[1]["step"] = 5
    torch.save({"optimizer": {"optimizer": {"param_groups": groups}}}, folder / "common.pt")
    source = open_megatron(folder)
    assert source.groups == ()  # which parameters are in which is not saved
    assert source.extra["common"]["optimizer"]["optimizer"]["param_groups"] == groups


def test_parameters_at_different_steps_cannot_be_written(tmp_path: Path) -> None:
    tensors = truth() | steps(9)
    tensors["model.norm.weight", "step"] = np.float32(8).view(np.uint32)
    with pytest.raises(ValueError, match=r"one step for all parameters, but these have .*8 \("):
        write_megatron(held(tensors), tmp_path / "new", program("stacked"))
    assert not (tmp_path / "new").exists()


def test_a_malicious_common_file_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    folder = folder_with(tmp_path)
    torch.save({"iteration": Evil()}, folder / "common.pt")
    with pytest.raises(ValueError, match=r"common\.pt"):
        open_megatron(folder)
    assert not (tmp_path / "executed").exists()


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises((ValueError, FileExistsError), match=str(tmp_path)):
        write_megatron(held(truth()), tmp_path, program("stacked"))
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_config_of_another_model_is_refused() -> None:
    other = shipped("megatron-gpt", CONFIG | {"kv_heads": 4})
    with pytest.raises(ValueError, match=r"linear_qkv\.weight: it has 16 rows .* the rule says 24"):
        open_megatron(FIXTURES / "stacked", other)
    wide = shipped("megatron-gpt", CONFIG | {"vocab": 17})
    with pytest.raises(ValueError, match=r"word_embeddings\.weight: it has 16 rows .* says 32"):
        open_megatron(FIXTURES / "stacked", wide)
    layers = shipped("megatron-gpt-layers", CONFIG)
    with pytest.raises(ValueError, match=r"decoder\.layers\.self_attention.* has no rule \(the ne"):
        open_megatron(FIXTURES / "stacked", layers)


# --- rules alone --------------------------------------------------------------------------


@both
def test_biases_and_norms_of_queries_have_rules(kind: str) -> None:
    shapes = {
        "self_attn.q_proj.bias": 8,
        "self_attn.k_proj.bias": 4,
        "self_attn.v_proj.bias": 4,
        "self_attn.q_norm.weight": 2,
        "self_attn.k_norm.weight": 2,
    }
    tensors = {key: value for key, value in truth().items() if key[1] == "weight"}
    for layer in range(2):
        for name, size in shapes.items():
            value = np.arange(size, dtype=np.uint32) + np.uint32(100 * layer)
            tensors[f"model.layers.{layer}.{name}", "weight"] = value
    slices = invert(program(kind), held(tensors))
    names = {name for name, _ in slices[0, 0, 0].tensors}
    check(program(kind), names)
    assert_equal(apply(program(kind), slices), tensors)


def test_a_tied_head_needs_no_tensor() -> None:
    tensors = {
        key: value
        for key, value in truth().items()
        if key[1] == "weight" and key[0] != "lm_head.weight"
    }
    assert_equal(apply(program("stacked"), invert(program("stacked"), held(tensors))), tensors)
