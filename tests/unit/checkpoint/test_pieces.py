"""Where a rank's part of a tensor lies: as torch itself cuts it."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from hakari.training.checkpoint.boxes import flaw, volume, whole, within
from hakari.training.checkpoint.pieces import (
    flat_pieces,
    flatten,
    holdings,
    named_values,
    placed,
    plain,
    tensor_pieces,
)
from hakari.training.checkpoint.source import WEIGHT

SHAPES = [(1,), (2,), (7,), (13, 10), (3, 5), (10, 4), (2, 3, 5), (8, 8), (0, 4), (4, 0)]
MESHES = [(1,), (2,), (3,), (4,), (2, 2), (2, 3), (4, 2), (2, 2, 2)]


def cases(shape: tuple[int, ...], mesh: tuple[int, ...]):
    """All placements: copies and shards, and the strided ones that FSDP2 makes of TP shards."""
    simple = [Replicate(), *(Shard(d) for d in range(len(shape))), Shard(-1)]
    yield from itertools.product(simple, repeat=len(mesh))
    if len(mesh) == 2:
        for d in range(len(shape)):
            yield (_StridedShard(d, split_factor=mesh[1]), Shard(d))
            for other in range(len(shape)):
                if other != d:
                    yield (_StridedShard(d, split_factor=2), Shard(other))


def by_torch(shape, mesh, placements, coordinate):
    """The local part of a tensor of indices, cut by torch's placements one after another."""
    local = torch.arange(prod(shape)).view(shape)
    for size, placement, rank in zip(mesh, placements, coordinate, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            if placement.dim < 0:
                placement = Shard(placement.dim % len(shape))
            parts, _ = placement._split_tensor(local, size, with_padding=False, contiguous=False)
            local = parts[rank] if rank < len(parts) else local[:0]
    return local


def put_together(shape, parts) -> np.ndarray:
    numbers = np.arange(prod(shape)).reshape(shape)
    extent = [max((here[d].stop for here, _ in parts), default=0) for d in range(len(shape))]
    local = np.full(extent, -1)
    for here, box in parts:
        local[here] = numbers[within(box, whole(shape))]
    return local


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_shards_lie_where_torch_puts_them(mesh):
    for shape in SHAPES:
        for placements in cases(shape, mesh):
            boxes = {}
            for coordinate in np.ndindex(*mesh):
                parts = placed(shape, mesh, placements, coordinate)
                expected = by_torch(shape, mesh, placements, coordinate).numpy()
                found = put_together(shape, parts)
                assert found.size == expected.size
                if found.size:
                    np.testing.assert_array_equal(found, expected)
                boxes |= {box: None for _, box in parts}
            assert flaw(shape, boxes) == "", (shape, placements)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_offsets_are_those_that_torch_computes(mesh):
    """By another part of torch: of plain shards, whose part is one box."""
    for shape in SHAPES:
        simple = [Replicate(), *(Shard(d) for d in range(len(shape)))]
        for placements in itertools.product(simple, repeat=len(mesh)):
            for coordinate in np.ndindex(*mesh):
                sizes, offsets = _compute_local_shape_and_global_offset(
                    shape, mesh, [*coordinate], placements
                )
                parts = placed(shape, mesh, placements, coordinate)
                assert len(parts) <= 1
                if 0 in sizes:
                    assert not any(volume(box) for _, box in parts)
                    continue
                ((here, box),) = parts
                assert box == tuple((o, o + s) for o, s in zip(offsets, sizes, strict=True))
                assert here == tuple(slice(0, s) for s in sizes)


def test_a_partial_sum_is_refused():
    with pytest.raises(ValueError, match=r"layer\.weight is a partial sum .*redistribute it first"):
        placed((4,), (2,), [Partial()], (0,), "layer.weight")


def test_an_empty_tensor_is_known_wherever_it_is_flat():
    (piece,) = flat_pieces(("a", "exp_avg"), (0, 3), 0, torch.zeros(0))
    assert (piece.box, piece.tensor.shape) == (((0, 0), (0, 3)), (0, 3))
    assert flat_pieces(("a", "exp_avg"), (2, 3), 4, torch.zeros(0)) == []


class Odd(torch.Tensor):
    pass


def test_a_tensor_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"a \(weight\) is a Odd: only plain tensors and DTensors"):
        tensor_pieces(("a", WEIGHT), torch.zeros(2).as_subclass(Odd))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_orig_mod.module.a", "module.a"),
        ("layers._checkpoint_wrapped_module.0.weight", "layers.0.weight"),
        ("_fsdp_wrapped_module.module_list.0", "module_list.0"),
        ("encoder.module.a", "encoder.module.a"),
    ],
)
def test_what_wrappers_add_to_names_is_taken_off(name, expected):
    assert plain(name) == expected


def test_tied_weights_are_held_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    values, tied, _ = named_values([model])
    assert list(values) == ["embed.weight"]
    assert tied == (("embed.weight", "head.weight"),)


def test_parts_of_a_model_do_not_share_names():
    with pytest.raises(ValueError, match=r"two parts of the model have a weight"):
        named_values([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])


def test_an_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(2, 3).parameters())
    with pytest.raises(
        ValueError, match=r"has a parameter of shape \[3, 2\] that the model does not"
    ):
        holdings(nn.Linear(2, 3), optimizer)


def test_two_optimizers_do_not_share_a_parameter():
    model = nn.Linear(2, 3)
    two = [torch.optim.SGD(model.parameters(), momentum=0.9) for _ in range(2)]
    for optimizer in two:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    with pytest.raises(ValueError, match=r"two optimizers keep states of weight"):
        holdings(model, two)


def test_nested_states_are_flattened_by_path():
    state = {"step": 1, "history": [torch.ones(1), {"x": 2}], "empty": []}
    assert [key for key, _ in flatten(state)] == ["step", "history/0", "history/1/x", "empty"]
