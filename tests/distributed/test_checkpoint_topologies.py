"""Saved on one topology, loaded on another and saved again: the same contents, for all pairs.

Ranks are simulated: what a rank holds is a pure function of the topology, its coordinates and the
logical tensors. Processes meet through files alone, so threads of one process can stand for them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from hakari.training.checkpoint import storage
from hakari.training.checkpoint.assign import assign
from hakari.training.checkpoint.boxes import Box, extents, flat_range, moved, volume, whole, within
from hakari.training.checkpoint.commit import Request, carry_out
from hakari.training.checkpoint.content import content, hexadecimal
from hakari.training.checkpoint.dtypes import bits
from hakari.training.checkpoint.manifest import Manifest
from hakari.training.checkpoint.pieces import flat_pieces
from hakari.training.checkpoint.source import WEIGHT, Info, Key
from hakari.training.checkpoint.stored import open_stored, read_all
from hakari.training.checkpoint.tensors import as_bits

# --- the logical model ----------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """split: dimension of tensor parallelism; heads: of which each rank has a share or a copy."""

    shape: tuple[int, ...]
    dtype: str = "F32"
    split: int | None = None
    heads: int = 0
    stage: int = 0
    buffer: bool = False


MODEL = {
    "embed": Parameter((13, 10), "BF16", split=0),  # tied: both ends of a pipeline hold it
    "q": Parameter((12, 10), "BF16", split=0, heads=6),
    "k": Parameter((4, 10), "BF16", split=0, heads=2),  # fewer heads than ranks of tensor 4
    "o": Parameter((10, 12), "BF16", split=1),
    "norm": Parameter((7,)),
    "frequencies": Parameter((5,), buffer=True),
    "router": Parameter((3, 10)),
    "experts": Parameter((3, 7, 10), "BF16", split=0, stage=1),
    "gate": Parameter((10, 13), "BF16", split=0, stage=1),
    "scale": Parameter((), stage=1),
    "none": Parameter((0, 4), stage=1),
    "bias": Parameter((1,), split=0, stage=1),  # empty on all but one rank
}
MOMENTS = ("exp_avg", "exp_avg_sq")


def infos() -> dict[Key, Info]:
    found = {}
    for name, parameter in MODEL.items():
        found[name, WEIGHT] = Info(parameter.shape, parameter.dtype)
        if not parameter.buffer:
            found |= {(name, moment): Info(parameter.shape, "F32") for moment in MOMENTS}
            found[name, "step"] = Info((), "F32")
            if parameter.dtype == "BF16":
                found[name, "master"] = Info(parameter.shape, "F32")
    return found


def logical() -> dict[Key, np.ndarray]:
    """Bits of each tensor; a moment of one never equals another's."""
    chance = np.random.default_rng(5)
    return {
        key: chance.integers(0, 2 ** (8 * bits(info.dtype).itemsize), info.shape, bits(info.dtype))
        for key, info in infos().items()
    }


INFOS, VALUES = infos(), logical()

# --- what a rank holds ----------------------------------------------------------------------


@dataclass(frozen=True)
class Topology:
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int = 0
    uneven: bool = False  # widths as a framework that balances has them, not as torch.chunk

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline


Held = list[tuple[Key, Box]]


def edges(size: int, parts: int, uneven: bool) -> list[int]:
    if uneven:  # 10 over 4: 3, 3, 2, 2
        widths = [size // parts + (i < size % parts) for i in range(parts)]
        return [sum(widths[:i]) for i in range(parts + 1)]
    step = -(-size // parts)  # 10 over 4: 3, 3, 3, 1
    return [min(size, step * i) for i in range(parts + 1)]


def local_box(parameter: Parameter, topology: Topology, rank: int) -> Box:
    """The box that tensor parallelism leaves to a rank."""
    box = list(whole(parameter.shape))
    if parameter.split is None:
        return tuple(box)
    size, ranks = parameter.shape[parameter.split], topology.tensor
    if parameter.heads and parameter.heads < ranks:  # copies of a head on several ranks
        head, width = rank * parameter.heads // ranks, size // parameter.heads
        box[parameter.split] = (head * width, (head + 1) * width)
    else:
        units = parameter.heads or size
        cut = edges(units, ranks, topology.uneven)
        width = size // units
        box[parameter.split] = (cut[rank] * width, cut[rank + 1] * width)
    return tuple(box)


def flat_share(local: dict[str, Box], data: int, index: int) -> Iterator[tuple[str, list[Box]]]:
    """What one of `data` ranks has of the boxes' elements, laid end to end and padded."""
    total = sum(volume(box) for box in local.values())
    share = -(-total // data)
    low, high, at = share * index, share * (index + 1), 0
    for name, box in local.items():
        first, last = max(low, at) - at, min(high, at + volume(box)) - at
        at += volume(box)
        if 0 in MODEL[name].shape:
            yield name, [box]
        elif first < last:
            parts = flat_range(extents(box), first, last)
            yield name, [moved(part, box) for part in parts]


def held(topology: Topology, rank: int, given: bool = False) -> Held:
    """Keys and boxes of one rank.

    given: without flat shards of what another rank of tensor parallelism, or the other end of the
    pipeline, has too. Their ranges begin elsewhere, since the flat buffers hold other things, so
    they would overlap in part, which is refused.
    """
    stage, rest = divmod(rank, topology.data * topology.tensor)
    index, tensor = divmod(rest, topology.tensor)
    local = {
        name: local_box(parameter, topology, tensor)
        for name, parameter in MODEL.items()
        if topology.pipeline == 1 or parameter.stage == stage or name == "embed"
    }
    trained = {name: box for name, box in local.items() if not MODEL[name].buffer}
    found: Held = [((name, "step"), ()) for name in trained]
    sharded = dict(flat_share(trained, topology.data, index))
    for name, box in local.items():
        parameter, everything = MODEL[name], [box]
        parts = sharded.get(name, []) if topology.zero else everything
        before = [local_box(parameter, topology, other) for other in range(tensor)]
        if topology.zero and given and (box in before or stage > parameter.stage) and volume(box):
            parts = []
        flat_weights = topology.zero == 3 and not parameter.buffer
        found += [((name, WEIGHT), each) for each in (parts if flat_weights else everything)]
        for state in (*MOMENTS, "master"):
            if (name, state) in INFOS:
                found += [((name, state), each) for each in parts]
    return found


# --- saving and loading as its ranks do -----------------------------------------------------


def bits_of(everyone: list[Held]) -> list[list[np.ndarray]]:
    return [
        [VALUES[key][within(box, whole(VALUES[key].shape))] for key, box in rank]
        for rank in everyone
    ]


def save(
    root: Path, everyone: list[Held], values: list[list[np.ndarray]], step: int = 1
) -> Manifest:
    pieces = [tuple((key, INFOS[key], box) for key, box in rank) for rank in everyone]
    shares = assign(pieces)
    record = {
        "scalars": [],
        "groups": [[{"lr": 0.1}, sorted(MODEL)]],
        "optimizer": "AdamW",
        "tied": [["embed", "head"]],
        "extra": None,
        "own": None,
        "origin": {},
    }
    requests = [
        Request(
            str(root),
            step,
            f"{step:032x}",
            rank,
            len(pieces),
            pieces[rank],
            tuple(shares[rank]),
            record,
            timeout=60,
        )
        for rank in range(len(pieces))
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        calls = [pool.submit(carry_out, *each) for each in zip(requests, values, strict=True)]
        errors = [error for call in calls if (error := call.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, OSError)):
        raise error
    return open_stored(root).manifest


def load(root: Path, everyone: list[Held]) -> list[list[np.ndarray]]:
    stored = open_stored(root)
    found = []
    for rank in everyone:
        arrays = [np.zeros(extents(box), bits(INFOS[key].dtype)) for key, box in rank]
        wanted = [(key, box, array) for (key, box), array in zip(rank, arrays, strict=True)]
        read_all(stored, wanted, workers=1)
        found.append(arrays)
    return found


def everyone(topology: Topology) -> list[Held]:
    return [held(topology, rank) for rank in range(topology.world)]


def givers(everyone: list[Held], values: list[list[np.ndarray]], topology: Topology) -> Any:
    """What the ranks hand to a save, of all that they hold."""
    parts, bits_of_parts = [], []
    for rank, (mine, arrays) in enumerate(zip(everyone, values, strict=True)):
        given = held(topology, rank, given=True)
        chosen = [i for i, part in enumerate(mine) if part in given]
        parts.append([mine[i] for i in chosen])
        bits_of_parts.append([arrays[i] for i in chosen])
    return parts, bits_of_parts


TOPOLOGIES = [
    Topology(data, tensor, pipeline, zero)
    for data, tensor, pipeline, zero in itertools.product((1, 2, 4), (1, 2), (1, 2), range(4))
]
MORE = [
    Topology(1, 4),
    Topology(1, 4, uneven=True),
    Topology(2, 4, zero=1, uneven=True),
    Topology(3, 4, 2, 3),
    Topology(5, 3, zero=2, uneven=True),
]
PAIRS = list(itertools.product([*TOPOLOGIES, *MORE], repeat=2))
EXPECTED = {key: hexadecimal(content(value, whole(value.shape))) for key, value in VALUES.items()}


@pytest.fixture(autouse=True)
def quick():
    """Nothing is cut off here, so nothing has to be on the disk."""
    with patch.object(storage.os, "fsync"):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a topology, saved once."""
    roots: dict[Topology, Path] = {}

    def of(topology: Topology) -> Path:
        if topology not in roots:
            roots[topology] = tmp_path_factory.mktemp("saved")
            ranks = everyone(topology)
            parts = givers(ranks, bits_of(ranks), topology)
            assert save(roots[topology], *parts).contents == EXPECTED
        return roots[topology]

    return of


def identical(root: Path, there: Topology, again: Path) -> None:
    ranks = everyone(there)
    values = load(root, ranks)
    for found, expected in zip(values, bits_of(ranks), strict=True):
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert save(again, *givers(ranks, values, there)).contents == EXPECTED


def test_topologies_are_what_they_are_meant_to_be():
    """Copies, empty shards, uneven widths and flat ranges are all among them."""
    everything = [held(t, r) for t in [*TOPOLOGIES, *MORE] for r in range(t.world)]
    assert len(TOPOLOGIES) == 48
    assert max(len(extents(box)) for rank in everything for _, box in rank) == 3
    assert any(0 in extents(box) for rank in everything for _, box in rank)
    widths = {extents(box)[1] for key, box in held(Topology(1, 4), 3) if key == ("o", WEIGHT)}
    assert widths == {3}
    four = [dict(held(Topology(1, 4, uneven=uneven), 3)) for uneven in (False, True)]
    assert [extents(each["gate", WEIGHT]) for each in four] == [(1, 13), (2, 13)]
    heads = [dict(held(Topology(1, 4), rank))["k", WEIGHT] for rank in range(4)]
    assert heads[0] == heads[1] != heads[2] == heads[3]


@pytest.mark.parametrize("number", range(12))
def test_contents_are_the_same_on_any_topology(saved, tmp_path, number):
    chosen = random.Random(number).sample(PAIRS, 5)
    for i, (here, there) in enumerate(chosen):
        identical(saved(here), there, tmp_path / str(i))


@pytest.mark.slow
@pytest.mark.parametrize("here", [*TOPOLOGIES, *MORE], ids=str)
def test_contents_are_the_same_on_all_topologies(saved, tmp_path, here):
    for i, there in enumerate([*TOPOLOGIES, *MORE]):
        identical(saved(here), there, tmp_path / str(i))


def test_a_chain_of_topologies_ends_where_it_began(tmp_path):
    topology = Topology()
    values = bits_of(everyone(topology))
    for step, there in enumerate(random.Random(0).sample([*TOPOLOGIES, *MORE], 8)):
        save(tmp_path, *givers(everyone(topology), values, topology), step)
        topology = there
        values = load(tmp_path, everyone(topology))
    assert save(tmp_path, *givers(everyone(topology), values, topology), 8).contents == EXPECTED


def test_every_byte_is_written_once_and_by_all(tmp_path):
    """Copies are shared out: the files hold what the logical tensors hold, and headers."""
    ranks = everyone(Topology(4, 2))
    found = save(tmp_path, ranks, bits_of(ranks))
    data = sum(stored.bytes - stored.header for stored in found.files.values())
    assert data == sum(value.nbytes for value in VALUES.values())
    assert len(found.files) == 8


def test_flat_pieces_are_the_flat_ranges(tmp_path):
    """The public function gives what the simulation cuts by itself."""
    shape = (3, 7, 10)
    tensor = torch.arange(prod(shape), dtype=torch.float32)
    for start, stop in [(0, 210), (1, 2), (69, 71), (13, 187), (70, 140), (5, 5)]:
        pieces = flat_pieces(("experts", "exp_avg"), shape, start, tensor[start:stop].clone())
        assert [p.box for p in pieces] == flat_range(shape, start, stop)
        for piece in pieces:
            place = within(piece.box, whole(shape))
            assert torch.equal(piece.tensor, tensor.view(shape)[place])
            piece.tensor.zero_()  # a view of what the process holds
        assert sum(piece.tensor.numel() for piece in pieces) == stop - start
        assert as_bits(tensor).size == 210


# --- mutants --------------------------------------------------------------------------------


def shifted(box: Box, by: int) -> Box:
    return ((box[0][0] + by, box[0][1] + by), *box[1:])


@pytest.mark.parametrize("topology", [Topology(2, zero=1), Topology(1, 2), Topology(2, 2, 2, 3)])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_box_that_is_off_by_one_is_refused(tmp_path, topology, by):
    ranks = [held(topology, rank, given=True) for rank in range(topology.world)]
    moved_ones = 0
    for rank, parts in enumerate(ranks):
        for index, (key, box) in enumerate(parts):
            if not box or 0 in extents(box) or box == whole(INFOS[key].shape):
                continue
            others = [key for other in ranks[:rank] + ranks[rank + 1 :] for key in other]
            if (key, box) in others:  # a copy: then the box itself is still held
                continue
            wrong = [list(each) for each in ranks]
            wrong[rank][index] = (key, shifted(box, by))
            with pytest.raises(
                ValueError, match=rf"{key[0]} \({key[1]}\).*(overlap|outside|holds)"
            ):
                assign([[(k, INFOS[k], b) for k, b in each] for each in wrong])
            moved_ones += 1
    assert moved_ones >= 6


def test_a_box_that_is_off_by_one_while_loading_changes_the_contents(saved, tmp_path):
    there = Topology(2, zero=1)
    ranks = everyone(there)
    wrong = [list(each) for each in ranks]
    index = next(i for i, (key, box) in enumerate(wrong[1]) if key[1] == "exp_avg" and box[0][0])
    key, box = wrong[1][index]
    wrong[1][index] = (key, shifted(box, -1))
    values = load(saved(Topology()), wrong)
    found = save(tmp_path, ranks, values).contents
    assert {each for each in found if found[each] != EXPECTED[each]} == {key}


def test_a_state_that_is_forgotten_is_noticed(saved, tmp_path):
    ranks = [
        [part for part in rank if part[0] != ("q", "exp_avg")] for rank in everyone(Topology())
    ]
    found = save(tmp_path, ranks, load(saved(Topology(2, 2)), ranks)).contents
    assert set(EXPECTED) - set(found) == {("q", "exp_avg")}
    one = everyone(Topology(2, zero=2))
    key = next(key for key, box in one[1] if key[1] == "exp_avg" and box[0][0])
    one[1] = [part for part in one[1] if part[0] != key]
    with pytest.raises(ValueError, match=rf"{key[0]} \(exp_avg\) \[.*\]: nothing holds \["):
        save(tmp_path / "one", one, bits_of(one))


def test_states_that_are_exchanged_are_noticed(saved, tmp_path):
    other = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
    ranks = everyone(Topology(2, zero=1))
    crossed = [[((k[0], other.get(k[1], k[1])), box) for k, box in rank] for rank in ranks]
    found = save(tmp_path, ranks, load(saved(Topology()), crossed)).contents
    changed = {key for key in found if found[key] != EXPECTED[key]}
    assert changed == {key for key in EXPECTED if key[1] in MOMENTS and INFOS[key].bytes}


def test_copies_that_drifted_are_refused_or_the_first_is_taken(tmp_path):
    ranks = everyone(Topology(1, 4))
    values = bits_of(ranks)
    index = next(i for i, (key, _) in enumerate(ranks[3]) if key == ("k", "exp_avg"))
    values[3][index] = values[3][index].copy()
    values[3][index][1, 2] ^= 1
    with pytest.raises(
        ValueError,
        match=r"ranks 2 and 3 hold different values of k \(exp_avg\) \[2:4, 0:10\].*nothing was",
    ):
        save(tmp_path, ranks, values)
    assert open_failed(tmp_path)


def open_failed(root: Path) -> bool:
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        open_stored(root)
    return True


def test_ranks_that_disagree_on_a_shape_are_named():
    first = [(("q", WEIGHT), INFOS["q", WEIGHT], whole((12, 10)))]
    second = [(("q", WEIGHT), replace(INFOS["q", WEIGHT], shape=(12, 11)), whole((12, 11)))]
    with pytest.raises(
        ValueError, match=r"q \(weight\) is BF16 \[12, 10\] on rank 0 and BF16 \[12, 11\] on rank 1"
    ):
        assign([first, second])
