"""DeepSpeed's checkpoints, against values that the real DeepSpeed held when it made them."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hakari.training.checkpoint.foreign.deepspeed import open_deepspeed, open_slices
from hakari.training.checkpoint.foreign.deepspeed_files import open_save
from hakari.training.checkpoint.foreign.deepspeed_universal import open_universal
from hakari.training.checkpoint.foreign.deepspeed_zero import (
    dealt,
    flat_spans,
    in_order,
    partition_spans,
)
from hakari.training.checkpoint.source import Info
from hakari.training.checkpoint.tensors import NAMES, as_bits
from tests.unit.checkpoint.deepspeed_cases import (
    CASES,
    FIXTURES,
    TAG,
    TRAINED,
    WITH_OPTIONS,
    assert_same,
    copy_of,
    rewrite,
    truth,
)


def test_fixtures_cover_all_stages_and_layouts() -> None:
    assert len(CASES) == 11
    assert {open_save(FIXTURES / case, None).stage for case in CASES} == {0, 1, 2, 3}
    sizes = [file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file()]
    assert sum(sizes) < 2**20


@pytest.mark.parametrize("case", CASES)
def test_import_equals_what_the_engine_held(case: str) -> None:
    source, wanted = open_deepspeed(FIXTURES / case), truth(case)
    assert {key for key in source.tensors if key[1] != "step"} == set(wanted)
    for key, value in wanted.items():
        assert source.tensors[key] == Info(tuple(value.shape), NAMES[value.dtype]), key
        assert np.array_equal(source.array(key), as_bits(value)), key


@pytest.mark.parametrize("case", CASES)
def test_groups_ties_steps_and_values_of_the_run(case: str) -> None:
    source = open_deepspeed(FIXTURES / case)
    assert tuple(set(group.members) for group in source.groups) == TRAINED
    assert source.tied == (("embed.weight", "head.weight"),)
    assert source.step == 3
    for names in TRAINED:
        for name in names:
            assert source.tensors[name, "step"] == Info((), "F32")
            # without ZeRO, DeepSpeed's bf16 optimizer takes a step of zeros at its start
            assert source.array((name, "step")).view(np.float32) == 3 + (case == "zero0-bf16")
    assert ("frozen", "exp_avg") not in source.tensors
    assert source.extra["lr_scheduler"] == {"last_batch_iteration": 2}
    assert source.extra["buffers"] == ["shift"]
    client = source.extra["client"]
    assert (client["epoch"], client["note"]) == (1, "tiny")
    assert torch.equal(client["seen"], torch.arange(5))
    assert source.origin["framework"] == "deepspeed"


@pytest.mark.parametrize("case", WITH_OPTIONS)
def test_options_of_groups(case: str) -> None:
    source = open_deepspeed(FIXTURES / case)
    decay, plain = (group.options for group in source.groups)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decay["betas"] == (0.9, 0.95)
    assert 0 < decay["lr"] < 0.01
    assert not {"params", "param_names", "foreach", "fused"} & set(decay)
    assert source.optimizer == "AdamW"


def test_the_loss_scaler_is_kept_as_plain_values() -> None:
    scaler = open_deepspeed(FIXTURES / "zero2-bf16").extra["optimizer"]["loss_scaler"]
    assert scaler["class"] == "deepspeed.runtime.fp16.loss_scaler.LossScaler"
    assert (scaler["cur_scale"], scaler["dynamic"]) == (1.0, False)


@pytest.mark.parametrize("case", CASES)
def test_a_box_is_a_slice_of_the_whole(case: str) -> None:
    source = open_deepspeed(FIXTURES / case)
    for state in ("weight", "exp_avg"):
        whole = source.array(("embed.weight", state))
        for rows, columns in (
            ((3, 8), (0, 7)),
            ((0, 12), (2, 5)),
            ((11, 12), (6, 7)),
            ((5, 5), (0, 7)),
        ):
            box = source.array(("embed.weight", state), (rows, columns))
            assert np.array_equal(box, whole[slice(*rows), slice(*columns)])


def test_a_wrong_box_or_tensor_is_refused() -> None:
    source = open_deepspeed(FIXTURES / "zero1-fp32")
    out = np.empty((2, 7), np.uint32)
    with pytest.raises(ValueError, match=r"embed.weight \(weight\) is F32 \[12, 7\]"):
        source.read(("embed.weight", "weight"), ((11, 13), (0, 7)), out)
    with pytest.raises(ValueError, match=r"has no head.weight \(weight\)"):
        source.read(("head.weight", "weight"), ((0, 2), (0, 7)), out)


def test_a_save_is_found_by_latest_by_tag_and_by_itself(tmp_path: Path) -> None:
    where = FIXTURES / "zero1-fp32"
    first = open_deepspeed(where)
    assert_same(first, open_deepspeed(where, tag=TAG))
    assert_same(first, open_deepspeed(where / TAG))
    with pytest.raises(ValueError, match="has no folder 'global_step9', the tag to open"):
        open_deepspeed(where, tag="global_step9")
    with pytest.raises(ValueError, match=r"has no model_states.pt file"):
        open_deepspeed(tmp_path)


@pytest.mark.parametrize("dp", [1, 2, 3, 7])
def test_spans_are_those_of_an_enumeration(dp: int) -> None:
    """Each element is followed by hand through flattening, padding and cutting."""
    names = {"a": (3, 5), "b": (), "c": (4,), "d": (2, 3, 2), "e": (1,)}
    order = [(name, i) for name, shape in names.items() for i in range(prod(shape))]
    chunk = -(-len(order) // (2 * dp)) * 2
    wanted = {(n, i): divmod(at, chunk) for at, (n, i) in enumerate(order)}
    spans = flat_spans(names, chunk)
    assert {
        (s.name, s.first + i): (s.rank, s.start + i) for s in spans for i in range(s.count)
    } == (wanted)
    spans, length = partition_spans(names, dp)
    at, each = 0, {}
    for name, shape in names.items():
        size = -(-prod(shape) // dp)
        each |= {(name, i): (i // size, at + i % size) for i in range(prod(shape))}
        at += size
    assert length == at
    assert {
        (s.name, s.first + i): (s.rank, s.start + i) for s in spans for i in range(s.count)
    } == (each)


def test_parameters_that_were_dealt_out_are_in_the_optimizers_order() -> None:
    """With round_robin_gradients; the order in the file is that of hands of 3."""
    where = FIXTURES / "zero1-round-robin"
    laid = open_save(where, None).slices[0].models[0].tree["param_shapes"]
    assert list(laid[1]) == ["gain", "norm.bias", "up.bias", "down.bias", "norm.weight"]
    assert open_deepspeed(where).groups == open_deepspeed(FIXTURES / "zero2-three").groups
    dealing = {"zero_optimization": {"round_robin_gradients": True}}
    assert dealt("abcdefgh", dealing, 3) == list("adgbehcf")
    for dp in (1, 2, 3, 8, 9):
        assert in_order(dealt("abcdefgh", dealing, dp), dealing, dp) == list("abcdefgh")
        assert dealt("abcdefgh", {}, dp) == list("abcdefgh")


def test_zero0_without_names_asks_for_them(tmp_path: Path) -> None:
    where = copy_of("zero0-fp32", tmp_path)
    named = open_deepspeed(FIXTURES / "zero0-fp32")
    model = "mp_rank_00_model_states.pt"

    def nameless(tree: Any) -> Any:
        for group in tree["optimizer"]["param_groups"]:
            del group["param_names"]
        return tree

    rewrite(where / TAG, model, nameless)
    with pytest.raises(ValueError, match=r"by number \(3, 5 in each group\) .* give names="):
        open_deepspeed(where)
    order = [list(group.members) for group in named.groups]
    given = open_deepspeed(where, names=order)
    for key in named.tensors:
        assert np.array_equal(given.array(key), named.array(key))
    swapped = [["up.weight", "embed.weight", "down.weight"], order[1]]
    with pytest.raises(ValueError, match=r"up.weight \(exp_avg\) is \[5, 7\] in the module"):
        open_deepspeed(where, names=swapped)
    with pytest.raises(ValueError, match="the module has no parameter 'up'"):
        open_deepspeed(where, names=[["up", *order[0][1:]], order[1]])
    with pytest.raises(ValueError, match="2 names for an optimizer group of 3 parameters"):
        open_deepspeed(where, names=[order[0][1:], order[1]])
    with pytest.raises(ValueError, match="names has 1 groups, the optimizer 2"):
        open_deepspeed(where, names=order[:1])


def test_zero0_with_one_group_takes_the_order_of_the_module(tmp_path: Path) -> None:
    """Made by torch alone, as `model.parameters()` gives parameters to one group."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree = {"module": model.state_dict(), "buffer_names": [], "optimizer": optimizer.state_dict()}
    (tmp_path / TAG).mkdir()
    sizes = {"dp_world_size": 1, "mp_world_size": 1, "global_steps": 1}
    torch.save(tree | sizes, tmp_path / TAG / "mp_rank_00_model_states.pt")
    source = open_deepspeed(tmp_path / TAG)
    assert source.groups[0].members == ("0.weight", "0.bias", "1.weight")
    for name, parameter in model.named_parameters():
        wanted = optimizer.state[parameter]["exp_avg"]
        assert np.array_equal(source.array((name, "exp_avg")), as_bits(wanted))


def test_a_step_of_deepspeeds_own_optimizers_is_a_whole_number(tmp_path: Path) -> None:
    where = copy_of("zero1-fp32", tmp_path)

    def whole(tree: Any) -> Any:
        for state in tree["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["step"] = 3
        return tree

    for rank in (0, 1):
        rewrite(where / TAG, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", whole)
    assert_same(open_deepspeed(where), open_deepspeed(FIXTURES / "zero1-fp32"))


# --- tensor parallelism -------------------------------------------------------------------


def synthesised(where: Path, tp: int, dp: int) -> dict[str, torch.Tensor]:
    """A ZeRO-1 save of tp x dp ranks, made here by the documented layout: not by DeepSpeed.

    'up' is cut along its rows, 'norm' is on each rank.
    """
    torch.manual_seed(0)
    full = {"up": torch.randn(6, 5), "norm": torch.randn(5)}
    (where / TAG).mkdir(parents=True)
    for t in range(tp):
        own = {"up": full["up"].chunk(tp)[t], "norm": full["norm"]}
        flat = torch.cat([value.flatten() for value in own.values()])
        total = flat.numel()
        chunk = -(-total // (2 * dp)) * 2
        padded = torch.cat([flat, torch.zeros(dp * chunk - total)])
        for d in range(dp):
            held = min(chunk, max(0, total - d * chunk))
            mine = padded[d * chunk : (d + 1) * chunk].clone()
            state = {"step": torch.tensor(2.0), "exp_avg": -mine, "exp_avg_sq": mine**2}
            groups = [{"lr": 0.1, "params": [0]}]
            saved = {
                "base_optimizer_state": {"state": {0: state}, "param_groups": groups},
                "single_partition_of_fp32_groups": [mine[:held]],
                "zero_stage": 1,
                "group_paddings": [chunk - held],
                "partition_count": [dp],
            }
            name = f"zero_pp_rank_{d}_mp_rank_{t:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": saved}, where / TAG / name)
        model = {
            "module": {name: value.bfloat16() for name, value in own.items()},
            "buffer_names": [],
            "param_shapes": [{name: value.shape for name, value in own.items()}],
            "shared_params": {},
            "global_steps": 2,
            "dp_world_size": dp,
            "mp_world_size": tp,
        }
        torch.save(model, where / TAG / f"mp_rank_{t:02d}_model_states.pt")
    return full


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_slices_of_a_synthesised_tensor_parallel_save(dp: int, tmp_path: Path) -> None:
    full = synthesised(tmp_path, 2, dp)
    with pytest.raises(ValueError, match=r"saved by 2 model-parallel ranks: .* open_slices"):
        open_deepspeed(tmp_path, tag=TAG)
    slices = open_slices(tmp_path, tag=TAG)
    assert list(slices) == [(0, 0, 0), (1, 0, 0)]
    for t in range(2):
        source = slices[t, 0, 0]
        up = full["up"].chunk(2)[t]
        assert np.array_equal(source.array(("up", "weight")), as_bits(up))
        assert np.array_equal(source.array(("up", "exp_avg")), as_bits(-up))
        assert np.array_equal(source.array(("norm", "weight")), as_bits(full["norm"]))
        assert source.origin["topology"] == {"dp": dp, "mp": 2, "rank": t}


def test_synthesised_ranks_are_numbered_by_stages(tmp_path: Path) -> None:
    synthesised(tmp_path, 2, 1)
    assert list(open_slices(tmp_path, tag=TAG, stages=2)) == [(0, 0, 0), (0, 1, 0)]
    with pytest.raises(ValueError, match="2 model-parallel ranks are not a multiple of 3 stages"):
        open_slices(tmp_path, tag=TAG, stages=3)
    (tmp_path / TAG / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(ValueError, match=r"has no mp_rank_01_model_states.pt"):
        open_slices(tmp_path, tag=TAG)


def test_without_tensor_parallelism_there_is_one_slice() -> None:
    slices = open_slices(FIXTURES / "zero2-three")
    assert_same(slices[0, 0, 0], open_deepspeed(FIXTURES / "zero2-three"))


# --- other layouts, synthesised -----------------------------------------------------------


def test_a_synthesised_flat_group_of_the_fused_optimizer(tmp_path: Path) -> None:
    """As FP16_Optimizer lays a group out, by its source; made here, as it wants a GPU."""
    values = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    flat = torch.cat([value.flatten() for value in values.values()])
    state = {"step": 4, "exp_avg": -flat, "exp_avg_sq": flat**2}
    optimizer = {
        "optimizer_state_dict": {"state": {0: state}, "param_groups": [{"lr": 1.0, "params": [0]}]},
        "fp32_groups_flat": [flat],
        "clip_grad": 0.0,
    }
    tree = {
        "module": {name: value.half() for name, value in values.items()},
        "buffer_names": [],
        "optimizer": optimizer,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": 4,
    }
    torch.save(tree, tmp_path / "mp_rank_00_model_states.pt")
    source = open_deepspeed(tmp_path)
    for name, value in values.items():
        assert np.array_equal(source.array((name, "weight")), as_bits(value))
        assert np.array_equal(source.array((name, "exp_avg")), as_bits(-value))
        assert source.array((name, "step")).view(np.float32) == 4
    tree["module"]["c"] = torch.zeros(3)
    torch.save(tree, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"flat group has 10 elements, but a, b, c have 13"):
        open_deepspeed(tmp_path)
    assert open_deepspeed(tmp_path, names=[["a", "b"]]).groups[0].members == ("a", "b")


def test_a_synthesised_pipeline_keeps_its_module_elsewhere(tmp_path: Path) -> None:
    synthesised(tmp_path, 2, 2)
    for rank in (0, 1):
        name = f"mp_rank_{rank:02d}_model_states.pt"
        rewrite(tmp_path / TAG, name, lambda tree: tree | {"module": None})
    slices = open_slices(tmp_path, tag=TAG, stages=2)
    assert set(slices[0, 1, 0].tensors) == {
        (name, state)
        for name in ("up", "norm")
        for state in ("weight", "exp_avg", "exp_avg_sq", "step")
    }
    name = "mp_rank_01_model_states.pt"
    rewrite(tmp_path / TAG, name, lambda tree: tree | {"buffer_names": ["shift"]})
    with pytest.raises(ValueError, match="the buffers shift lie in layer files"):
        open_slices(tmp_path, tag=TAG)


def test_slices_of_frozen_parameters_are_left_out_of_universal_checkpoints(tmp_path: Path) -> None:
    """With two model-parallel ranks, synthesised: a second model file, and sizes changed."""
    where = copy_of("zero1-fp32", tmp_path)
    save = where / f"{TAG}_universal"
    rewrite(save, "mp_rank_00_model_states.pt", lambda tree: tree | {"mp_world_size": 2})
    shutil.copy(save / "mp_rank_00_model_states.pt", save / "mp_rank_01_model_states.pt")
    source = open_universal(where)
    assert source.origin["left_out"] == ["frozen", "shift"]
    assert ("frozen", "weight") not in source.tensors
    assert np.array_equal(
        source.array(("up.weight", "weight")), as_bits(truth("zero1-fp32")["up.weight", "weight"])
    )


def test_a_save_in_an_object_store() -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(FIXTURES / "zero3-fp32"), "/deepspeed", recursive=True)
    try:
        source = open_deepspeed("memory://deepspeed")
        assert_same(source, open_deepspeed(FIXTURES / "zero3-fp32"))
    finally:
        memory.rm("/deepspeed", recursive=True)


@pytest.mark.parametrize("step", [torch.tensor(3), torch.tensor(3.0, dtype=torch.float64), 3, 3.0])
def test_steps_of_any_type_become_what_torchs_adamw_keeps(step: Any, tmp_path: Path) -> None:
    synthesised(tmp_path, 1, 1)

    def other(tree: Any) -> Any:
        tree["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = step
        return tree

    rewrite(tmp_path / TAG, "zero_pp_rank_0_mp_rank_00_optim_states.pt", other)
    source = open_deepspeed(tmp_path, tag=TAG)
    assert source.tensors["up", "step"] == Info((), "F32")
    assert source.array(("up", "step")).view(np.float32) == 3


@pytest.mark.parametrize("step", [2**24 + 1, 2.5, -1, "3"])
def test_a_step_that_is_no_number_of_steps_is_refused(step: Any, tmp_path: Path) -> None:
    synthesised(tmp_path, 1, 1)

    def other(tree: Any) -> Any:
        tree["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = step
        return tree

    rewrite(tmp_path / TAG, "zero_pp_rank_0_mp_rank_00_optim_states.pt", other)
    with pytest.raises(ValueError, match="not a number of steps up to 16,777,216"):
        open_deepspeed(tmp_path, tag=TAG)
