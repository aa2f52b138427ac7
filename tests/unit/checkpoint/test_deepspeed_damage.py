"""DeepSpeed's checkpoints that are incomplete, contradictory, damaged or malicious."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hakari.training.checkpoint.foreign.deepspeed import open_deepspeed
from hakari.training.checkpoint.foreign.deepspeed_files import tensors_of
from hakari.training.checkpoint.foreign.torch_writing import write_torch
from hakari.training.checkpoint.storage import open_folder
from tests.unit.checkpoint.deepspeed_cases import (
    FIXTURES,
    RECORDS,
    TAG,
    assert_same,
    copy_of,
    loaded,
    rewrite,
)

OPTIMIZER_FILES = [
    ("zero1-fp32", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ("zero2-bf16", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ("zero3-fp32", "zero_pp_rank_2_mp_rank_00_optim_states.pt"),
    ("zero3-fp32", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
]


@pytest.mark.parametrize(("case", "file"), OPTIMIZER_FILES)
def test_a_missing_rank_is_named(case: str, file: str, tmp_path: Path) -> None:
    where = copy_of(case, tmp_path)
    (where / TAG / file).unlink()
    with pytest.raises(ValueError, match=f"has no {file.removeprefix('bf16_')}, and 0 more miss"):
        open_deepspeed(where)


@pytest.mark.parametrize(("case", "file"), OPTIMIZER_FILES)
def test_a_left_over_rank_is_named(case: str, file: str, tmp_path: Path) -> None:
    where = copy_of(case, tmp_path) / TAG
    other = file.replace("rank_0_", "rank_7_").replace("rank_1_", "rank_7_")
    other = other.replace("rank_2_", "rank_7_")
    shutil.copy(where / file, where / other)
    with pytest.raises(ValueError, match=f"{other} is of a rank that did not save"):
        open_deepspeed(where)


@pytest.mark.parametrize(("case", "file"), OPTIMIZER_FILES)
def test_truncated_files_are_refused(case: str, file: str, tmp_path: Path) -> None:
    where = copy_of(case, tmp_path)
    path = where / TAG / file
    data = path.read_bytes()
    for size in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=file):
            open_deepspeed(where)


def test_another_world_size_is_refused(tmp_path: Path) -> None:
    where = copy_of("zero1-fp32", tmp_path)
    rewrite(where / TAG, "mp_rank_00_model_states.pt", lambda tree: tree | {"dp_world_size": 3})
    with pytest.raises(ValueError, match=r"has no zero_pp_rank_2_.*says that 3 data-parallel x 1"):
        open_deepspeed(where)
    rewrite(where / TAG, "mp_rank_00_model_states.pt", lambda tree: tree | {"dp_world_size": "2"})
    with pytest.raises(ValueError, match="dp_world_size is '2', not a number of processes"):
        open_deepspeed(where)


def test_two_saves_in_one_folder_are_refused(tmp_path: Path) -> None:
    where = copy_of("zero1-fp32", tmp_path) / TAG
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shutil.copy(where / name, where / f"bf16_{name}")
    with pytest.raises(ValueError, match=f"has both bf16_{name} and {name} for the same rank"):
        open_deepspeed(where)
    (where / f"bf16_{name}").unlink()
    shutil.copy(
        where / "mp_rank_00_model_states.pt", where / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    )
    with pytest.raises(ValueError, match="mixes files of ZeRO-3 and of a lower stage"):
        open_deepspeed(where)


def test_ranks_of_two_saves_are_refused(tmp_path: Path) -> None:
    where = copy_of("zero1-fp32", tmp_path) / TAG

    def later(tree: Any) -> Any:
        states = tree["optimizer_state_dict"]["base_optimizer_state"]["state"]
        states[1]["step"] = torch.tensor(4.0)
        return tree

    rewrite(where, "zero_pp_rank_1_mp_rank_00_optim_states.pt", later)
    with pytest.raises(ValueError, match=r"step differs between zero_pp_rank_0.* two saves mixed"):
        open_deepspeed(where)
    where = copy_of("zero3-fp32", tmp_path) / TAG
    name = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    rewrite(where, name, lambda tree: tree | {"global_steps": 4})
    with pytest.raises(ValueError, match=f"{name} and .* are not of the same save"):
        open_deepspeed(where)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("state", ["weight", "exp_avg"])
@pytest.mark.parametrize("case", ["zero1-fp32", "zero1-bf16-optimizer", "zero3-fp32"])
def test_partitions_of_a_wrong_length_are_refused(
    case: str, state: str, group: int, tmp_path: Path
) -> None:
    where = copy_of(case, tmp_path) / TAG
    file = next(path.name for path in where.glob("*rank_1_*optim_states.pt"))

    def shorter(tree: Any) -> Any:
        saved = tree["optimizer_state_dict"]
        if state == "weight":
            key = "fp32_flat_groups" if case == "zero3-fp32" else "single_partition_of_fp32_groups"
            saved[key][group] = saved[key][group][:-3].clone()
            return tree
        base = saved["optimizer_state_dict" if case == "zero3-fp32" else "base_optimizer_state"]
        base["state"][group][state] = base["state"][group][state][:-3].clone()
        return tree

    rewrite(where, file, shorter)
    with pytest.raises(ValueError, match=f"{file}.* elements"):
        open_deepspeed(where)


@pytest.mark.parametrize("state", ["weight", "exp_avg"])
@pytest.mark.parametrize("case", ["zero1-fp32", "zero1-bf16-optimizer", "zero3-fp32"])
def test_partitions_with_elements_of_nobody_are_refused(
    case: str, state: str, tmp_path: Path
) -> None:
    where = copy_of(case, tmp_path) / TAG
    file = next(path.name for path in where.glob("*rank_1_*optim_states.pt"))

    def longer(tree: Any) -> Any:
        saved = tree["optimizer_state_dict"]
        base = saved["optimizer_state_dict" if case == "zero3-fp32" else "base_optimizer_state"]
        key = "fp32_flat_groups" if case == "zero3-fp32" else "single_partition_of_fp32_groups"
        held = saved[key] if state == "weight" else base["state"][0]
        index = 0 if state == "weight" else state
        held[index] = torch.cat([held[index], torch.zeros(5)])
        return tree

    rewrite(where, file, longer)
    with pytest.raises(ValueError, match=f"{file}: .* has [0-9]+ elements, "):
        open_deepspeed(where)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("zero1-fp32", "group 1 has 11 elements, but of 16 in partitions of 12 it should hold 4"),
        ("zero1-bf16-optimizer", "group 1 has 16 elements in 2 partitions of 12, the last with 1"),
    ],
)
def test_a_parameter_that_the_model_file_forgot_is_noticed(
    case: str, says: str, tmp_path: Path
) -> None:
    """Also of an old save, whose ranks did not note where parameters start."""
    where = copy_of(case, tmp_path) / TAG

    def old(tree: Any) -> Any:
        del tree["optimizer_state_dict"]["param_slice_mappings"]
        return tree

    for path in where.glob("*optim_states.pt"):
        rewrite(where, path.name, old)
    assert_same(open_deepspeed(where), open_deepspeed(FIXTURES / case))

    def forget(tree: Any) -> Any:
        del tree["param_shapes"][1]["down.bias"]
        return tree

    rewrite(where, "mp_rank_00_model_states.pt", forget)
    with pytest.raises(ValueError, match=says):
        open_deepspeed(where)


def test_mappings_that_contradict_the_shapes_are_refused(tmp_path: Path) -> None:
    where = copy_of("zero1-fp32", tmp_path) / TAG

    def swapped(tree: Any) -> Any:
        groups = tree["param_shapes"]
        tree["param_shapes"] = [groups[0], dict(reversed(groups[1].items()))]
        return tree

    rewrite(where, "mp_rank_00_model_states.pt", swapped)
    with pytest.raises(ValueError, match=r"by param_slice_mappings and at .* by param_shapes"):
        open_deepspeed(where)


def test_a_parameter_that_no_file_holds_is_named(tmp_path: Path) -> None:
    where = copy_of("zero3-bf16", tmp_path) / TAG

    def forget(tree: Any) -> Any:
        tree["frozen_param_shapes"] = tree["frozen_param_fragments"] = None
        return tree

    rewrite(where, "zero_pp_rank_0_mp_rank_00_model_states.pt", forget)
    with pytest.raises(ValueError, match="frozen was saved without values, and no file has them"):
        open_deepspeed(where)


class Malicious:
    """Makes a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "file", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"]
)
def test_a_malicious_pickle_is_refused_and_not_executed(file: str, tmp_path: Path) -> None:
    where = copy_of("zero1-fp32", tmp_path)
    trap = tmp_path / "executed"
    (where / TAG / file).unlink()
    torch.save({"optimizer_state_dict": Malicious(trap)}, where / TAG / file)
    with pytest.raises(ValueError, match="mkdir"):
        open_deepspeed(where)
    assert not trap.exists()


def test_parts_that_are_not_read_are_refused(tmp_path: Path) -> None:
    where = copy_of("zero1-fp32", tmp_path)
    (where / TAG / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"layer_0_expert_1.*experts .* cannot be read"):
        open_deepspeed(where)


def test_every_error_is_a_value_error_whatever_byte_is_wrong(tmp_path: Path) -> None:
    """Bytes of the pickle are flipped: what is read is refused or, if it opens, is whole."""
    where = copy_of("zero1-fp32", tmp_path)
    path = where / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = path.read_bytes()
    chance = np.random.default_rng(0)
    for at in chance.integers(0, len(data), 150):
        wrong = bytearray(data)
        wrong[at] ^= 1 << int(chance.integers(8))
        path.write_bytes(wrong)
        try:
            open_deepspeed(where)
        except ValueError:
            continue


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values in dictionaries and lists."""
    pairs: Any = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    found = []
    for key, value in pairs:
        found.append((*path, key))
        if isinstance(value, Mapping | list):
            found += places(value, (*path, key))
    return found


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("zero1-fp32", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero1-fp32", "mp_rank_00_model_states.pt"),
        ("zero3-bf16", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("zero3-bf16", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("zero0-bf16", "mp_rank_00_model_states.pt"),
    ],
)
def test_trees_of_another_layout_open_or_are_a_value_error(
    case: str, file: str, tmp_path: Path
) -> None:
    """Each value in turn is taken away, or replaced by a string or a number."""
    where = copy_of(case, tmp_path) / TAG
    folder = open_folder(where)
    whole = loaded(folder, tensors_of(folder, file))
    chance, said = np.random.default_rng(1), []
    for path in places(whole):
        if "ds_config" in path and chance.random() < 0.9:
            continue
        tree = copy.deepcopy(whole)
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        action = int(chance.integers(3))
        if action == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = "text" if action == 1 else 7
        (where / file).unlink()
        write_torch(folder, file, tree, records=RECORDS)
        try:
            open_deepspeed(where)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 10
    assert min(map(len, said)) > 20
