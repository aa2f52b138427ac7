"""What FSDP2 saves on two and four processes is read exactly, and what is written FSDP2 loads."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from hakari.training.checkpoint.foreign.dcp import open_dcp
from hakari.training.checkpoint.foreign.dcp_container import open_container
from hakari.training.checkpoint.foreign.dcp_writing import write_dcp
from hakari.training.checkpoint.source import WEIGHT
from hakari.training.checkpoint.tensors import as_bits
from tests.distributed.ranks import meet, ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)
torch.set_num_threads(1)
FLAT = {flat: StateDictOptions(flatten_optimizer_state_dict=flat) for flat in (True, False)}
LAYOUTS = {"data and tensor": (2, 2), "data": (2, 1)}  # (data, tensor), the larger one first


class Block(nn.Module):
    """Sizes that two processes do not divide, and one row that only one of them holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()) * self.scale.sum()


def sharded(seed: int, layout: tuple[int, int]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Block()
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("data", "tensor"))
    if layout[1] > 1:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (1 + seed), foreach=False)
    torch.manual_seed(seed + dist.get_rank() // layout[1])
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def truth(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], Any]:
    """Every tensor in full, by collectives of DTensor."""
    found = {(name, WEIGHT): value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {(name, key): value for key, value in optimizer.state[parameter].items()}
    return {key: as_bits(whole(value.detach())).copy() for key, value in found.items()}


def saved(folder: str, layout: tuple[int, int]) -> dict[tuple[str, str], np.ndarray]:
    model, optimizer = sharded(0, layout)
    for flat, options in FLAT.items():
        weights, states = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optim": states}, checkpoint_id=f"{folder}/{flat}")
    writer = dcp.HuggingFaceStorageWriter(path=f"{folder}/safetensors", save_distributed=True)
    dcp.save(get_model_state_dict(model), storage_writer=writer)
    return truth(model, optimizer)


def loaded(folder: str, layout: tuple[int, int]) -> list[Any]:
    """What a fresh model and optimizer hold after torch's own load of both kinds of state."""
    found = []
    for options in FLAT.values():
        model, optimizer = sharded(1, layout)
        weights, states = get_state_dict(model, optimizer, options=options)
        dcp.load({"model": weights, "optim": states}, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=states,
            options=options,
        )
        found.append((truth(model, optimizer), optimizer.param_groups[0]["lr"]))
    return found


def everything(folder: str) -> dict[str, tuple[Any, dict[str, list[Any]]]]:
    """All that processes do, in one go, as starting them takes the longest.

    By layout: the tensors that are saved, and what is loaded from each folder that is written of
    a save, that of this layout and those of larger ones.
    """
    found = {}
    for name, layout in LAYOUTS.items():
        if not in_world(prod(layout), folder):
            break
        where = f"{folder}/{name}"
        full = saved(where, layout)
        if dist.get_rank() == 0:
            write_dcp(open_dcp(f"{where}/True"), f"{where}/ours")
        dist.barrier()
        loads = {each: loaded(f"{folder}/{each}/ours", layout) for each in (*found, name)}
        found[name] = full, loads
    return found


def in_world(size: int, folder: str) -> bool:
    """Go on as one of `size` processes. Whether this is one of them."""
    rank, now = dist.get_rank(), dist.get_world_size()
    if size < now:
        meet(Path(folder), rank, now, f"left-{now}")
    if size < now and rank < size:
        dist.destroy_process_group()
        meeting = f"file://{folder}/world-of-{size}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    return rank < size


@dataclass(frozen=True)
class Run:
    """A folder that FSDP2 saved to, and the tensors in full as the ranks saw them.

    loads: by the size of a world, what each rank has after loading `ours`, which is written of it.
    """

    folder: Path
    layout: tuple[int, int]
    full: dict[tuple[str, str], np.ndarray]
    loads: dict[int, list[Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("dcp")
    by_rank = ranks(max(map(prod, LAYOUTS.values())), everything, str(folder))
    found: dict[str, Run] = {}
    for name, layout in LAYOUTS.items():
        everyone = [rank[name] for rank in by_rank if name in rank]
        full = everyone[0][0]
        for other, _ in everyone[1:]:
            assert all(np.array_equal(full[key], other[key]) for key in full)
        found[name] = Run(folder / name, layout, full, {})
        for each in found:
            found[each].loads[len(everyone)] = [loads[each] for _, loads in everyone]
    return found


@pytest.fixture(params=LAYOUTS)
def run(runs, request) -> Run:
    return runs[request.param]


@pytest.mark.parametrize("flat", [True, False])
def test_shards_are_read_byte_for_byte(run, flat):
    folder, layout, full = run.folder, run.layout, run.full
    source = open_dcp(folder / str(flat))
    assert set(source.tensors) == set(full)
    for key, expected in full.items():
        assert np.array_equal(source.array(key), expected), key
    chunks = open_container(folder / str(flat)).chunks["model.up.weight"]
    assert len(chunks) == layout[0] * layout[1]
    assert source.groups[0].options["lr"] == 0.01
    assert source.step == 2


def test_any_box_of_sharded_tensors_is_read(run):
    folder, full = run.folder, run.full
    source = open_dcp(folder / "True")
    chance = np.random.default_rng(4)
    for key in (("up.weight", WEIGHT), ("down.weight", "exp_avg"), ("down.bias", "exp_avg_sq")):
        for _ in range(20):
            ends = [sorted(chance.choice(n + 1, 2, replace=False)) for n in full[key].shape]
            box = tuple((int(a), int(b)) for a, b in ends)
            part = full[key][tuple(slice(*each) for each in box)]
            assert np.array_equal(source.array(key, box), part), (key, box)


def test_sharded_safetensors_are_read_byte_for_byte(run):
    folder, full = run.folder, run.full
    source = open_dcp(folder / "safetensors")
    for key in source.tensors:
        assert np.array_equal(source.array(key), full[key]), key
    assert {name for name, _ in source.tensors} == {n for n, state in full if state == WEIGHT}


def test_a_lost_file_of_a_rank_is_noticed(run, tmp_path):
    for file in (run.folder / "True").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "__1_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__1_0\.distcp is missing; it holds \S+ \["):
        open_dcp(tmp_path)


def test_fsdp_loads_what_is_written_from_its_own_save(run):
    """On as many processes, and on fewer."""
    sizes = {prod(run.layout), 2}
    assert {size: len(everyone) for size, everyone in run.loads.items()} == {n: n for n in sizes}
    for rank in (rank for everyone in run.loads.values() for rank in everyone):
        assert len(rank) == len(FLAT)
        for found, rate in rank:
            assert rate == 0.01
            assert set(found) == set(run.full)
            assert all(np.array_equal(found[key], run.full[key]) for key in run.full)


def test_what_is_written_has_one_process_load_it(run, tmp_path):
    folder, full = run.folder, run.full
    write_dcp(open_dcp(folder / "False"), tmp_path / "ours")
    tree = {
        "model": {
            name: torch.zeros(value.shape, dtype=torch.int64 if name == "count" else torch.float32)
            for (name, state), value in full.items()
            if state == WEIGHT
        }
    }
    dcp.load(tree, checkpoint_id=tmp_path / "ours", no_dist=True)
    for name, tensor in tree["model"].items():
        assert np.array_equal(as_bits(tensor), full[name, WEIGHT]), name
