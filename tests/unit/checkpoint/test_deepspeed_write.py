"""What is written for DeepSpeed, against what the real DeepSpeed wrote.

What it makes of our files is checked by tests/fixtures/deepspeed/check_against_deepspeed.py,
which needs DeepSpeed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hakari.training.checkpoint.foreign.deepspeed import open_deepspeed
from hakari.training.checkpoint.foreign.deepspeed_files import open_save, row_major, tensors_of
from hakari.training.checkpoint.foreign.deepspeed_plan import make_plan, sub_groups
from hakari.training.checkpoint.foreign.deepspeed_universal import open_universal
from hakari.training.checkpoint.foreign.deepspeed_write import write_universal, write_zero
from hakari.training.checkpoint.foreign.torch_values import Record, Stored, load
from hakari.training.checkpoint.source import Group, Info, Source
from hakari.training.checkpoint.storage import open_folder
from hakari.training.checkpoint.tensors import NAMES, as_bits, as_tensor
from tests.unit.checkpoint.deepspeed_cases import (
    FIXTURES,
    TAG,
    UNIVERSAL,
    WITH_OPTIONS,
    assert_same,
    copy_of,
    rewrite,
)

# --- universal ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", UNIVERSAL)
def test_deepspeeds_universal_atoms_equal_our_import_of_the_save(case: str) -> None:
    assert_same(open_universal(FIXTURES / case), open_deepspeed(FIXTURES / case))


@pytest.mark.parametrize("case", UNIVERSAL)
def test_our_universal_atoms_equal_deepspeeds(case: str, tmp_path: Path) -> None:
    """File by file, as torch loads them; ours hold the shape where ZeRO-3's are flat."""
    stage = int(case[4])
    write_universal(open_deepspeed(FIXTURES / case), tmp_path / "ours", stage=stage)
    theirs, ours = FIXTURES / case / f"{TAG}_universal", tmp_path / "ours" / f"{TAG}_universal"
    atoms = sorted(path.relative_to(theirs) for path in theirs.glob("zero/*/*.pt"))
    assert atoms == sorted(path.relative_to(ours) for path in ours.glob("zero/*/*.pt"))
    assert (tmp_path / "ours" / "latest_universal").read_text() == f"{TAG}_universal"
    for atom in atoms:
        wanted = torch.load(theirs / atom, weights_only=True)
        got = torch.load(ours / atom, weights_only=True)
        if isinstance(wanted, dict):
            assert got.keys() == wanted.keys()
            assert got["cat_dim"] == wanted["cat_dim"]
            wanted, got = wanted["param"], got["param"]
            assert got.shape == wanted.shape
        assert np.array_equal(as_bits(got).reshape(-1), as_bits(wanted).reshape(-1))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", WITH_OPTIONS)
def test_universal_round_trip(case: str, stage: int, tmp_path: Path) -> None:
    source = open_deepspeed(FIXTURES / case)
    if case == "zero1-round-robin" and stage < 3:
        with pytest.raises(ValueError, match="into the wrong parameters: switch that off"):
            write_universal(source, tmp_path / "u", stage=stage)
        assert not (tmp_path / "u").exists()
        template = FIXTURES / "zero2-three"
        write_universal(source, tmp_path / "u", stage=stage, template=template)
    else:
        write_universal(source, tmp_path / "u", stage=stage)
    assert_same(open_universal(tmp_path / "u"), source)


def test_an_interrupted_conversion_is_refused(tmp_path: Path) -> None:
    where = copy_of("zero1-fp32", tmp_path)
    zero = where / f"{TAG}_universal" / "zero"
    (zero / "gain" / "exp_avg.pt").rename(tmp_path / "kept.pt")
    with pytest.raises(ValueError, match=r"gain/exp_avg.pt is missing"):
        open_universal(where)
    (tmp_path / "kept.pt").rename(zero / "gain" / "exp_avg.pt")
    (zero / "gain").rename(zero / "grain")
    with pytest.raises(ValueError, match="gain is missing, by param_shapes"):
        open_universal(where)
    shutil.copytree(zero / "grain", zero / "gain")
    with pytest.raises(ValueError, match="grain is no parameter of the model"):
        open_universal(where)
    shutil.rmtree(zero)
    with pytest.raises(ValueError, match="has no folder 'zero'"):
        open_universal(where)


# --- writing ------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", WITH_OPTIONS)
def test_round_trip(case: str, stage: int, processes: int, tmp_path: Path) -> None:
    """Also with more processes than a parameter has elements, and with ranks of padding only."""
    source = open_deepspeed(FIXTURES / case)
    write_zero(source, tmp_path / "z", stage=stage, processes=processes)
    again = open_deepspeed(tmp_path / "z")
    assert_same(again, source)
    assert again.origin["topology"]["dp"] == processes
    for key in ("lr_scheduler", "buffers"):
        assert again.extra[key] == source.extra[key]
    assert again.extra["client"].keys() == source.extra["client"].keys()


SAME = ["zero1-fp32", "zero1-bf16", "zero2-bf16", "zero2-three", "zero3-fp32", "zero3-bf16"]


@pytest.mark.parametrize("case", SAME)
def test_what_is_written_is_what_deepspeed_wrote(case: str, tmp_path: Path) -> None:
    """Tree by tree and byte by byte, for the same stage and processes.

    But for ZeRO-3's padding, which DeepSpeed leaves as it finds it, and for ties, which it names
    in the first rank's file alone.
    """
    save = open_save(FIXTURES / case, None)
    write_zero(open_deepspeed(FIXTURES / case), tmp_path / "z", save.stage, save.dp)
    ours, theirs = open_folder(tmp_path / "z" / TAG), open_folder(FIXTURES / case / TAG)
    assert ours.entries() == theirs.entries()
    for name in theirs.entries():
        mine = flattened(ours, tensors_of(ours, name))
        wanted = flattened(theirs, tensors_of(theirs, name))
        if "zero_pp_rank_0" not in name and save.stage == 3:
            mine.pop("/shared_params/head.weight", None)
        assert mine.keys() == wanted.keys(), name
        for path in wanted:
            sharded = save.stage == 3 and ("/optimizer_state_dict/" in path or "_frag" in path)
            upto = 2 if sharded and isinstance(wanted[path], tuple) else 3
            assert (
                mine[path][:upto] == wanted[path][:upto]
                if upto == 2
                else (mine[path] == wanted[path])
            ), (name, path)
    assert_same(open_deepspeed(tmp_path / "z"), open_deepspeed(FIXTURES / case))


def flattened(folder: Any, tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by their paths: tensors as bytes, records as their states, enumerations as numbers."""
    if isinstance(tree, Stored):
        held = load(folder, row_major(tree, path))
        if path.endswith(("exp_avg", "exp_avg_sq", "weight")) or held.numel():
            return {path: (tree.dtype, tuple(tree.shape), as_bits(held).tobytes())}
        return {path: (tree.dtype, tuple(tree.shape))}
    if isinstance(tree, Mapping):
        found: dict[str, Any] = {}
        for key, value in tree.items():
            if key not in ("foreach", "fused", "capturable", "differentiable"):
                found |= flattened(folder, value, f"{path}/{key}")
        return found
    if isinstance(tree, list):
        found = {}
        for index, value in enumerate(tree):
            found |= flattened(folder, value, f"{path}/{index}")
        return found
    if hasattr(tree, "name") and hasattr(tree, "args"):
        if tree.name.endswith("ZeroStageEnum"):
            return {path: tree.args[0]}
        return {path: (tree.name, tuple(tree.args or ()), tree.state)}
    return {path: tree}


def test_a_template_gives_what_the_source_lacks(tmp_path: Path) -> None:
    """An elastic save has no options; a source of another framework has no configuration."""
    bare = open_deepspeed(FIXTURES / "zero1-elastic")
    with pytest.raises(ValueError, match=r"no options \(lr, ...\) of its optimizer groups"):
        write_zero(bare, tmp_path / "no")
    write_zero(bare, tmp_path / "a", template=FIXTURES / "zero3-bf16", stage=3, processes=2)
    again = open_deepspeed(tmp_path / "a")
    for key in bare.tensors:
        assert np.array_equal(again.array(key), bare.array(key))
    assert again.groups == open_deepspeed(FIXTURES / "zero3-bf16").groups
    sub_groups = open_save(tmp_path / "a", None).slices[0].models[0].tree["param_shapes"]
    assert [len(names) for names in sub_groups] == [1, 2, 5]  # sub_group_size of the template

    foreign = replace(bare, extra=None, origin={}, groups=())
    with pytest.raises(ValueError, match=r"by position, not by name, .* give template="):
        write_zero(foreign, tmp_path / "no")
    with pytest.raises(ValueError, match="the source has no optimizer groups"):
        write_universal(foreign, tmp_path / "no")
    write_zero(foreign, tmp_path / "b", template=FIXTURES / "zero1-fp32")
    assert open_deepspeed(tmp_path / "b").groups == open_deepspeed(FIXTURES / "zero1-fp32").groups


def test_a_template_of_another_model_is_refused(tmp_path: Path) -> None:
    source = open_deepspeed(FIXTURES / "zero1-fp32")
    decay, plain = source.groups
    moved = (
        replace(decay, members=decay.members[1:]),
        replace(plain, members=(*plain.members, decay.members[0])),
    )
    with pytest.raises(ValueError, match=r"is not in a group with embed.weight"):
        write_zero(replace(source, groups=moved), tmp_path / "a", template=FIXTURES / "zero1-fp32")
    with pytest.raises(ValueError, match="is no template: a ZeRO save"):
        write_zero(source, tmp_path / "a", template=FIXTURES / "zero0-fp32")
    more = (replace(decay, members=(*decay.members, "shift")), plain)
    with pytest.raises(ValueError, match="shift is in the source's optimizer, but not in that of"):
        write_zero(replace(source, groups=more), tmp_path / "a", template=FIXTURES / "zero1-fp32")


@pytest.mark.parametrize("write", [write_zero, write_universal])
def test_a_folder_with_files_is_not_written_to(write: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="is not empty: choose a new folder"):
        write(open_deepspeed(FIXTURES / "zero1-fp32"), tmp_path)
    with pytest.raises(ValueError, match="stage 4"):
        write(open_deepspeed(FIXTURES / "zero1-fp32"), tmp_path / "new", stage=4)
    assert not (tmp_path / "new").exists()


def made(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, **more: Any
) -> Source:
    """A source in memory, of one optimizer group."""
    values = {
        (name, state): torch.randn(shape).to(dtype)
        for name, shape in shapes.items()
        for state in ("weight", "exp_avg")
    }
    values |= {(name, "step"): torch.tensor(float(more.get(name, 5))) for name in shapes}

    def read(key: Any, box: Any, out: np.ndarray) -> None:
        out[...] = as_bits(values[key])[tuple(slice(*side) for side in box)]

    infos = {key: Info(tuple(value.shape), NAMES[value.dtype]) for key, value in values.items()}
    kept = {"lr_scheduler": None, "engine": {}, "optimizer": {}, "client": {}, "buffers": []}
    groups = (Group({"lr": 0.1}, tuple(shapes)),)
    return Source(infos, read, groups=groups, step=5, extra=kept)


def test_parameters_of_all_shapes_are_written(tmp_path: Path) -> None:
    source = made({"a": (3, 5), "b": (), "c": (4, 2, 3), "d": (1,)})
    for stage in (1, 2, 3):
        write_zero(source, tmp_path / str(stage), stage=stage, processes=4)
        again = open_deepspeed(tmp_path / str(stage))
        for key in source.tensors:
            assert np.array_equal(again.array(key), source.array(key)), key


def test_module_copies_are_rounded_as_torch_rounds(tmp_path: Path) -> None:
    source = made({"a": (30, 5)})
    write_zero(source, tmp_path / "z", precision="BF16")
    path = tmp_path / "z" / "global_step5" / "mp_rank_00_model_states.pt"
    module = torch.load(path, weights_only=False)["module"]
    wanted = as_tensor(source.array(("a", "weight")), "F32").to(torch.bfloat16)
    assert torch.equal(module["a"], wanted)
    assert (path.parent / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").exists()


def test_only_exact_conversions_are_made(tmp_path: Path) -> None:
    narrow = made({"a": (3, 5)}, torch.bfloat16)
    write_zero(narrow, tmp_path / "z")
    wide = open_deepspeed(tmp_path / "z").array(("a", "weight"))
    assert np.array_equal(wide >> 16, narrow.array(("a", "weight")))
    assert not (wide & 0xFFFF).any()
    with pytest.raises(
        ValueError, match=r"a \(weight\) is F64, but DeepSpeed's optimizer holds F32"
    ):
        write_zero(made({"a": (3, 5)}, torch.float64), tmp_path / "y")
    with pytest.raises(ValueError, match="F64"):
        write_universal(made({"a": (3, 5)}, torch.float64), tmp_path / "x")


def test_states_that_deepspeed_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b has step 6.0, others of its optimizer group 5.0"):
        write_zero(made({"a": (3,), "b": (2,)}, b=6), tmp_path / "a")
    source = made({"a": (3,), "b": (2,)})
    tensors = {key: info for key, info in source.tensors.items() if key != ("b", "exp_avg")}
    with pytest.raises(ValueError, match="b has no exp_avg, which others of its group have"):
        write_zero(replace(source, tensors=tensors), tmp_path / "b")
    odd = {**source.tensors, ("a", "exp_avg"): Info((7,), "F32")}
    with pytest.raises(ValueError, match=r"a \(exp_avg\) is \[7\], its weight \[3\]"):
        write_zero(replace(source, tensors=odd), tmp_path / "c")
    group = (Group({"lr": 0.1}, ("a", "z")),)
    with pytest.raises(ValueError, match="the source has no z, which an optimizer group names"):
        write_zero(replace(source, groups=group), tmp_path / "d")


def test_writing_holds_no_more_than_the_budget(tmp_path: Path) -> None:
    source, budget, largest = made({"a": (4096, 64), "b": (4096, 3)}), 2**17, 0

    def read(key: Any, box: Any, out: np.ndarray) -> None:
        nonlocal largest
        largest = max(largest, out.nbytes)
        source.read(key, box, out)

    watched = replace(source, read=read)
    for stage in (1, 3):
        write_zero(watched, tmp_path / str(stage), stage=stage, processes=3, budget=budget)
    write_universal(watched, tmp_path / "u", budget=budget)
    assert 0 < largest <= budget
    assert_same(open_universal(tmp_path / "u"), open_deepspeed(tmp_path / "3"))


def test_a_template_of_another_step_gives_no_counts_of_its_own(tmp_path: Path) -> None:
    source = open_deepspeed(FIXTURES / "zero1-fp32")
    later = replace(source, extra=None, origin={}, step=10)
    write_zero(later, tmp_path / "a", template=FIXTURES / "zero1-fp32")
    extra = open_deepspeed(tmp_path / "a").extra
    assert extra["lr_scheduler"] == {"last_batch_iteration": 9}
    assert extra["engine"]["global_steps"] == 10
    assert "global_samples" not in extra["engine"]
    assert extra["client"]["note"] == "tiny"
    mine = replace(source, extra={**source.extra, "client": {"mine": 1}}, step=10)
    write_zero(mine, tmp_path / "b", template=FIXTURES / "zero2-bf16", stage=2)
    extra = open_deepspeed(tmp_path / "b").extra
    assert extra["client"] == {"mine": 1}
    assert extra["engine"]["ds_config"]["bf16"] == {"enabled": True}
    assert extra["lr_scheduler"] == source.extra["lr_scheduler"]


def test_a_schedule_that_is_not_deepspeeds_is_not_made_up(tmp_path: Path) -> None:
    template = copy_of("zero1-fp32", tmp_path)
    name = "mp_rank_00_model_states.pt"
    rewrite(template / TAG, name, lambda tree: tree | {"lr_scheduler": {"last_epoch": 3}})
    source = replace(open_deepspeed(FIXTURES / "zero1-fp32"), extra=None, step=4)
    write_zero(source, tmp_path / "z", template=template)
    assert open_deepspeed(tmp_path / "z").extra["lr_scheduler"] is None


def test_the_loss_scaler_of_fp16_comes_from_the_source_or_a_template(tmp_path: Path) -> None:
    source = open_deepspeed(FIXTURES / "zero1-fp32")
    config = {"fp16": {"enabled": True}}
    scaler = {
        "class": "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "cur_scale": 2.0**16,
        "cur_iter": 3,
    }
    engine = {**source.extra["engine"], "ds_config": config}
    dynamic = {**source.extra, "engine": engine, "optimizer": {"loss_scaler": scaler}}
    write_zero(replace(source, extra=dynamic), tmp_path / "a", stage=3)
    again = open_deepspeed(tmp_path / "a")
    assert again.extra["optimizer"]["loss_scaler"] == scaler
    none = {**dynamic, "optimizer": {}}
    with pytest.raises(ValueError, match="ZeRO-3 in fp16 needs the loss scaler's state"):
        write_zero(replace(source, extra=none), tmp_path / "b", stage=3)


@pytest.mark.parametrize("write", [write_zero, write_universal])
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "argparse.Namespace",  # of which records are written, but elsewhere
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler.evil",
        ["os.system"],
    ],
)
def test_a_loss_scaler_of_another_class_is_not_written(
    name: Any, write: Callable[..., None], tmp_path: Path
) -> None:
    source = open_deepspeed(FIXTURES / "zero1-fp32")
    optimizer = {"loss_scaler": {"class": name, "args": ["true"]}}
    foreign = replace(source, extra={**source.extra, "optimizer": optimizer})
    message = rf"loss_scaler is of .{re.escape(str(name)[:9])}.*, not one of DeepSpeed's \("
    with pytest.raises(ValueError, match=message):
        write(foreign, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_loss_scaler_that_a_file_names_is_not_copied(tmp_path: Path) -> None:
    """Of the class that the file calls it, and of one that its state calls itself."""
    save, name = copy_of("zero1-fp32", tmp_path), "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    namespace = Record("argparse.Namespace", (), {"lr": 1.0})
    disguised = Record("deepspeed.runtime.fp16.loss_scaler.LossScaler", (), {"class": "os.system"})
    for scaler, said in ((namespace, "argparse.Namespace"), (disguised, "os.system")):
        rewrite(save / TAG, name, partial(scaled_by, scaler))
        source = open_deepspeed(save)
        assert source.extra["optimizer"]["loss_scaler"]["class"] == said
        with pytest.raises(ValueError, match=rf"loss_scaler is of '{re.escape(said)}'"):
            write_zero(source, tmp_path / said)


def scaled_by(scaler: Record, tree: Any) -> Any:
    state = tree["optimizer_state_dict"]
    return {**tree, "optimizer_state_dict": {**state, "loss_scaler": scaler}}


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_not_known_is_left_to_the_run_that_loads(stage: int, tmp_path: Path) -> None:
    """A default here would silently end gradient clipping or loss scaling there."""
    write_zero(made({"a": (3, 5)}), tmp_path / "z", stage=stage)
    known = open_deepspeed(tmp_path / "z").extra
    assert not {"clip_grad", "loss_scaler", "dynamic_loss_scale"} & set(known["optimizer"])
    assert "global_samples" not in known["engine"]
    clipped = open_deepspeed(FIXTURES / "zero1-fp32")
    saved = {**clipped.extra["optimizer"], "clip_grad": 0.5}
    write_zero(replace(clipped, extra={**clipped.extra, "optimizer": saved}), tmp_path / "y")
    assert open_deepspeed(tmp_path / "y").extra["optimizer"]["clip_grad"] == 0.5


def test_sub_groups_are_closed_once_they_are_large_enough() -> None:
    """By DeepSpeed's rule: at least sub_group_size elements on a rank, or the group's last."""
    source = open_deepspeed(FIXTURES / "zero1-fp32")

    def cut(most: int, processes: int) -> list[int]:
        config = {"zero_optimization": {"stage": 3, "sub_group_size": most}}
        engine = {**source.extra["engine"], "ds_config": config}
        changed = replace(source, extra={**source.extra, "engine": engine})
        return [len(names) for _, names in sub_groups(make_plan(changed), changed, processes)]

    assert cut(42, 2) == [1, 2, 5]  # 84, 35 and 35 elements: 42, 18 and 18 on each of two ranks
    assert cut(43, 2) == [2, 1, 5]
    assert cut(77, 2) == [3, 5]
    assert cut(10, 2) == [1, 1, 1, 4, 1]  # 1, 3, 3, 3 and 4 of the second group
    assert cut(1, 7) == [1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["../../a", "..", "a/b", ""])
def test_names_that_lead_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        write_universal(made({name: (3, 5)}), tmp_path / "in" / "u")
    assert not list(tmp_path.glob("a*"))
