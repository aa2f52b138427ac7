"""What this process holds of a model and its optimizer: pieces, each a box of a logical tensor.

DTensors say by their placements where they lie (FSDP2, tensor parallelism, both, uneven, empty).
Plain tensors are whole. Flat shards, as ZeRO keeps them, are given by `flat_pieces`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Shard, _StridedShard
from torch.nn.parallel import DistributedDataParallel

from hakari.training.checkpoint.boxes import Box, flat_range, whole
from hakari.training.checkpoint.source import WEIGHT, Group, Info, Key
from hakari.training.checkpoint.tensors import name_of

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
HOW = ("foreach", "fused", "capturable", "differentiable")
"""Options of torch's optimizers that say how it computes, not what: they are not saved."""

Models = nn.Module | Sequence[nn.Module]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Piece:
    """A box of a logical tensor, in this process's memory.

    tensor: of the box's shape; writing to it changes what the process holds.
    """

    key: Key
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor

    @property
    def info(self) -> Info:
        """Shape and element type of the logical tensor."""
        return Info(self.shape, name_of(self.tensor.dtype))


@dataclass(frozen=True)
class Holdings:
    """All that a process holds: pieces, plain states, groups of options, ties."""

    pieces: tuple[Piece, ...]
    scalars: Mapping[Key, Any]
    groups: tuple[Group, ...]
    optimizer: str
    tied: tuple[tuple[str, ...], ...]
    mesh: Mapping[str, int]
    buffers: tuple[str, ...] = ()
    broadcast: tuple[str, ...] = ()  # buffers of which DDP gives all ranks the first one's


def holdings(model: Models, optimizer: Optimizers | None, more: Iterable[Piece] = ()) -> Holdings:
    """What a process holds of a model (or parts of one) and its optimizer (or several).

    more: pieces that neither knows, such as flat shards.
    Raises ValueError for a state that has no known place in a logical tensor, naming it.
    """
    models, optimizers = several(model), several(optimizer)
    for each in optimizers:
        if isinstance(each, Mapping):
            raise TypeError(f"optimizer is a {type(each).__name__}: pass the optimizer itself")
        if type(each).__name__ == "ZeroRedundancyOptimizer":  # its own states are none
            raise ValueError(
                "a ZeroRedundancyOptimizer keeps its states in the optimizer within: pass "
                "optimizer.optim"
            )
    values, tied, buffers = named_values(models)
    pieces = [p for name, value in values.items() for p in tensor_pieces((name, WEIGHT), value)]
    names = parameter_names(models)
    scalars: dict[Key, Any] = {}
    for name, parameter, state in _states(optimizers, names):
        for key, value in flatten(state):
            if isinstance(value, Tensor):
                pieces += _state_pieces((name, key), value, parameter)
            else:
                scalars[name, key] = value
    kinds = sorted({type(each).__name__ for each in optimizers})
    return Holdings(
        (*pieces, *more),
        scalars,
        _groups(optimizers, names),
        "+".join(kinds),
        tied,
        _mesh(values.values()),
        buffers,
        named_values(filter(_broadcasts, models))[2],
    )


Ties = tuple[tuple[str, ...], ...]


def named_values(
    models: Iterable[nn.Module],
) -> tuple[dict[str, Tensor], Ties, tuple[str, ...]]:
    """Parameters and persistent buffers by plain names, tied ones once; ties; names of buffers.

    The modules' own tensors: a state_dict may hold copies.
    """
    values: dict[str, Tensor] = {}
    alike: dict[int, list[str]] = {}
    buffers: list[str] = []
    for model in map(unwrapped, models):
        _resharded(model)
        for raw, value, kept in _own_tensors(model):
            names = alike.setdefault(id(value), [])
            names.append(plain(raw))
            if len(names) > 1:
                continue
            if names[0] in values:
                raise ValueError(f"two parts of the model have a {names[0]}")
            values[names[0]] = value
            if kept:
                buffers.append(names[0])
    ties = tuple(tuple(names) for names in alike.values() if len(names) > 1)
    return values, ties, tuple(buffers)


def _broadcasts(model: nn.Module) -> bool:
    """Whether DDP gives all ranks the first one's buffers before the next step."""
    each = model.modules()
    return any(isinstance(one, DistributedDataParallel) and one.broadcast_buffers for one in each)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DDP, DataParallel and torch.compile.

    Raises TypeError for what is no module, ValueError for one whose shards cannot be told.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the module, not its state_dict")
    if any(isinstance(each, FullyShardedDataParallel) for each in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) keeps flat shards whose place is not told: shard "
            "with torch.distributed.fsdp.fully_shard, or, with FSDP.state_dict_type(model, "
            "StateDictType.FULL_STATE_DICT), pass pieces=[piece for name, value in "
            "model.state_dict().items() for piece in tensor_pieces((name, 'weight'), value)] "
            "instead of the model"
        )
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def stateful_modules(models: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Modules that keep more than tensors (`get_extra_state`), by plain names."""
    return {
        plain(name): module
        for model in map(unwrapped, models)
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def parameter_names(models: Iterable[nn.Module]) -> dict[int, str]:
    """Plain name of each parameter, the first where it is tied."""
    names: dict[int, str] = {}
    for model in map(unwrapped, models):
        for raw, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), plain(raw))
    return names


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is a buffer) in the order of a state_dict."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield start + name, parameter, False
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield start + name, buffer, True


def _resharded(model: nn.Module) -> None:
    """FSDP2 may still hold whole parameters after a forward pass without a backward one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plain(name: str) -> str:
    """A parameter's name without what wrappers of modules (compile, recomputation) put in it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def tensor_pieces(key: Key, tensor: Tensor) -> list[Piece]:
    """The pieces of a logical tensor: one, or none of an empty shard, or several."""
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{key[0]} ({key[1]}) is a sparse tensor ({tensor.layout}): make it dense (to_dense)"
        )
    if not isinstance(tensor, DTensor):
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise ValueError(
                f"{key[0]} ({key[1]}) is a {type(tensor).__name__}: only plain tensors and "
                "DTensors have a known place"
            )
        return [Piece(key, tuple(tensor.shape), whole(tensor.shape), tensor.detach())]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    local, shape = tensor.to_local().detach(), tuple(tensor.shape)
    if 0 in shape:  # has no part, yet has to be known
        return [Piece(key, shape, whole(shape), local.new_empty(shape))]
    parts = placed(shape, tensor.device_mesh.shape, tensor.placements, coordinate, str(key[0]))
    return [Piece(key, shape, box, local[here] if shape else local) for here, box in parts]


def flat_pieces(key: Key, shape: Sequence[int], start: int, flat: Tensor) -> list[Piece]:
    """Pieces of a flat shard: elements from `start` of the flattened tensor, in one dimension.

    Raises ValueError for a range that is not within the tensor.
    """
    total, stop = torch.Size(shape).numel(), start + flat.numel()
    if not 0 <= start <= stop <= total:
        raise ValueError(
            f"{key[0]} ({key[1]}): elements {start:,} to {stop:,} are not within the "
            f"{total:,} of {[*shape]}"
        )
    if 0 in shape:
        return [Piece(key, tuple(shape), whole(shape), flat.view(tuple(shape)))]
    pieces, at = [], 0
    for box in flat_range(shape, start, start + flat.numel()):
        extents = [stop - begin for begin, stop in box]
        size = int(torch.Size(extents).numel())
        pieces.append(Piece(key, tuple(shape), box, flat[at : at + size].view(extents)))
        at += size
    return pieces


def placed(
    shape: Sequence[int],
    mesh: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
    name: str = "tensor",
) -> list[tuple[tuple[slice, ...], Box]]:
    """(place in the local tensor, box of the logical one) for each part that a rank holds.

    mesh, coordinate: its sizes, and the rank's place on it. Split as torch does it, so a shard may
    be shorter or empty. Raises ValueError for a partial sum.
    """
    runs: list[list[tuple[int, int]]] = [[(0, n)] for n in shape]
    for size, placement, rank in zip(mesh, placements, coordinate, strict=True):
        if isinstance(placement, Partial):
            raise ValueError(f"{name} is a partial sum ({placement}): redistribute it first")
        if isinstance(placement, _StridedShard):
            parts = [
                _chunk(runs[placement.dim], int(placement.split_factor), i)
                for i in range(int(placement.split_factor))
            ]
            runs[placement.dim] = _merged(run for part in parts for run in _chunk(part, size, rank))
        elif isinstance(placement, Shard):
            dim = placement.dim % len(shape)
            runs[dim] = _chunk(runs[dim], size, rank)
    return list(_product(runs))


def _chunk(runs: Sequence[tuple[int, int]], parts: int, index: int) -> list[tuple[int, int]]:
    """Part `index` of the rows in `runs`, cut as torch.chunk does."""
    total = sum(stop - start for start, stop in runs)
    step = -(-total // parts)
    low, high = min(total, index * step), min(total, (index + 1) * step)
    found, at = [], 0
    for start, stop in runs:
        first, last = max(low, at), min(high, at + stop - start)
        if first < last:
            found.append((start + first - at, start + last - at))
        at += stop - start
    return found


def _merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _product(
    runs: Sequence[Sequence[tuple[int, int]]],
) -> Iterator[tuple[tuple[slice, ...], Box]]:
    if not runs:
        yield (), ()
        return
    for here, box in _product(runs[:-1]):
        at = 0
        for start, stop in runs[-1]:
            yield (*here, slice(at, at + stop - start)), (*box, (start, stop))
            at += stop - start


# --- optimizers ---------------------------------------------------------------------------


def flatten(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested optimizer state by their path, such as 'history/0'."""
    if isinstance(state, Mapping | list | tuple) and (state or not path):
        pairs = state.items() if isinstance(state, Mapping) else enumerate(state)
        for name, value in pairs:
            yield from flatten(value, f"{path}/{name}" if path else str(name))
    else:
        yield path, state


def _states(
    optimizers: Iterable[torch.optim.Optimizer], names: Mapping[int, str]
) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    seen: set[str] = set()
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            name = name_in(names, parameter)
            if name in seen:
                raise ValueError(f"two optimizers keep states of {name}")
            seen.add(name)
            yield name, parameter, state


def name_in(names: Mapping[int, str], parameter: Tensor) -> str:
    """The name of an optimizer's parameter. Raises ValueError if the model does not have it."""
    if id(parameter) not in names:
        raise ValueError(
            f"the optimizer has a parameter of shape {[*parameter.shape]} that the model does not "
            "have: make the optimizer after the model is wrapped, from model.parameters()"
        )
    return names[id(parameter)]


def _state_pieces(key: Key, value: Tensor, parameter: Tensor) -> list[Piece]:
    """Pieces of a state: placed as it says itself, as its parameter, or whole."""
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor) or not value.ndim:
        return tensor_pieces(key, value)
    if value.shape == parameter.to_local().shape:  # an optimizer that works on local shards
        return tensor_pieces(key, like(parameter, value))
    raise ValueError(
        f"{key[0]} ({key[1]}) is a plain tensor {[*value.shape]} of a sharded parameter "
        f"{[*parameter.shape]}: its place is unknown; keep it as a DTensor"
    )


def like(parameter: DTensor, local: Tensor) -> DTensor:
    """A local tensor as the shard of a DTensor that is placed as the parameter."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _groups(
    optimizers: Iterable[torch.optim.Optimizer], names: Mapping[int, str]
) -> tuple[Group, ...]:
    return tuple(
        Group(options(group), tuple(name_in(names, parameter) for parameter in group["params"]))
        for optimizer in optimizers
        for group in optimizer.param_groups
    )


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group of an optimizer says, but for its parameters and for how it computes."""
    return {
        name: value.item() if isinstance(value, Tensor) and not value.ndim else value
        for name, value in group.items()
        if name not in ("params", "param_names", *HOW)
    }


def _mesh(values: Iterable[Tensor]) -> dict[str, int]:
    """Sizes of the meshes that tensors lie on, by name."""
    found: dict[str, int] = {}
    for value in values:
        if isinstance(value, DTensor):
            names = value.device_mesh.mesh_dim_names or ()
            found |= dict(zip(names, value.device_mesh.shape, strict=False))
    return found


def several(thing: Any) -> list[Any]:
    """One or many, as a list."""
    if thing is None:
        return []
    return list(thing) if isinstance(thing, list | tuple) else [thing]
