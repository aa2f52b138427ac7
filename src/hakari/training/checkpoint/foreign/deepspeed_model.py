"""What DeepSpeed's model file holds beside the trained parameters: frozen ones, buffers, ties,
options, and the values of the engine, the schedule and the client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hakari.training.checkpoint.foreign.deepspeed_files import Rank, numel, row_major
from hakari.training.checkpoint.foreign.deepspeed_parts import Parts, place_whole
from hakari.training.checkpoint.foreign.optimizer_class import class_by_states
from hakari.training.checkpoint.foreign.torch_values import Stored, plain
from hakari.training.checkpoint.source import WEIGHT, Group, Key
from hakari.training.checkpoint.storage import Folder

STATE, SHARDED = "optimizer_state_dict", ("module", "optimizer", "buffer_names", "param_shapes")
FROM_MODULE = ("frozen_param_shapes", "frozen_param_fragments", "shared_params", "lr_scheduler")
ENGINE = (
    *("data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps", "global_steps"),
    *("global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version"),
    *("universal_checkpoint_info", "num_experts", "autoep_layers"),
)
TENSORS = (
    *("base_optimizer_state", "single_partition_of_fp32_groups", "fp32_flat_groups"),
    *("param_slice_mappings", STATE, "fp32_groups", "fp32_groups_flat", "param_groups"),
    "state",
)
HOW = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")
"""Options of torch's optimizers that name parameters, or how, not what, is computed."""


def place_module(parts: Parts, model: Rank, aliases: set[str]) -> None:
    """Place frozen parameters and buffers, and, without ZeRO or masters, all parameters."""
    module, buffers = model.get("module"), model.tree.get("buffer_names") or ()
    if module is None:  # a pipeline keeps its module in layer files
        if buffers:
            raise ValueError(
                f"{model.file}: the buffers {', '.join(buffers)} lie in layer files, which are "
                "not read"
            )
        return
    for name, stored in module.items():
        if (name, WEIGHT) in parts.infos or name in aliases or not isinstance(stored, Stored):
            continue
        if not numel(stored) and name not in buffers and len(stored.shape) == 1:
            raise ValueError(f"{model.file}: {name} was saved without values, and no file has them")
        place_whole(parts, name, WEIGHT, row_major(stored, f"{model.file}: {name}"))


def shapes(model: Rank) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the trained parameters, by group or sub-group, in the order they are laid out."""
    found = model.get("param_shapes")
    if not isinstance(found, list) or not all(isinstance(group, Mapping) for group in found):
        raise ValueError(f"{model.file}: param_shapes is {type(found).__name__}, not by groups")
    return [{name: tuple(shape) for name, shape in group.items()} for group in found]


def ties(model: Rank) -> tuple[tuple[str, ...], ...]:
    """Tied parameters: the name that holds the values, then the others."""
    shared = model.tree.get("shared_params")
    if shared is None:
        shared = tied_in_module(model)
    found: dict[str, list[str]] = {}
    for alias, name in shared.items():
        found.setdefault(name, []).append(alias)
    return tuple((name, *aliases) for name, aliases in found.items())


def tied_in_module(model: Rank) -> dict[str, str]:
    """Names that share the memory of an earlier one -> that one."""
    seen: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, stored in (model.get("module") or {}).items():
        if not isinstance(stored, Stored) or 0 in stored.shape:
            continue
        place = (stored.file, stored.offset, stored.dtype, tuple(stored.shape))
        first = seen.setdefault(place, name)
        if first != name:
            shared[name] = first
    return shared


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer group's options, without its parameters and how torch computes."""
    return {key: value for key, value in group.items() if key not in HOW}


def optimizer_class(config: Any, keys: Iterable[Key], groups: Sequence[Group]) -> str:
    """Name of the optimizer's class: as the engine's configuration or, else, its states say."""
    named = config.get("optimizer") if isinstance(config, Mapping) else None
    if isinstance(named, Mapping) and named.get("type"):
        return str(named["type"])
    return class_by_states(keys, groups)


def extra(folder: Folder, model: Rank, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What else was saved: the schedule, the engine's and the optimizer's values, the client's.

    saved: the optimizer's dictionary, of which the tensors are left out.
    """
    tree, known = model.tree, {*SHARDED, *FROM_MODULE, *ENGINE}
    own = {key: value for key, value in saved.items() if key not in TENSORS}
    return {
        "lr_scheduler": plain(folder, tree.get("lr_scheduler")),
        "engine": plain(folder, {key: tree[key] for key in ENGINE if key in tree}),
        "optimizer": plain(folder, own),
        "buffers": list(tree.get("buffer_names") or ()),
        "client": plain(folder, {key: value for key, value in tree.items() if key not in known}),
    }
