"""Opening DeepSpeed's checkpoints: ZeRO stages 0 to 3, by box, without DeepSpeed.

The weight of a trained parameter is the optimizer's own (32-bit) copy; the 16-bit copies in the
model's files, which are rounded from it, are left out. Frozen parameters and buffers are as they
were saved. Tied parameters are there once, under the first name. Number of steps: the state
'step' of each parameter, a 0-dim 32-bit float.
"""

from __future__ import annotations

from collections.abc import Sequence

from hakari.training.checkpoint.foreign.deepspeed_files import Save, Slice, laid_out, open_save
from hakari.training.checkpoint.foreign.deepspeed_model import (
    STATE,
    extra,
    optimizer_class,
    place_module,
    ties,
)
from hakari.training.checkpoint.foreign.deepspeed_parts import Parts, close
from hakari.training.checkpoint.foreign.deepspeed_plain import whole_groups
from hakari.training.checkpoint.foreign.deepspeed_zero import flat, frozen_partitions, partitioned
from hakari.training.checkpoint.source import Source
from hakari.training.checkpoint.storage import Location

Coordinate = tuple[int, int, int]
"""Tensor-parallel, pipeline and expert rank."""


def open_deepspeed(
    where: Location, tag: str | None = None, names: Sequence[Sequence[str]] | None = None
) -> Source:
    """Open what DeepSpeed saved without model parallelism.

    where: the folder given to save_checkpoint, or one save in it. tag: the save, instead of the
    one that `latest` names. names: the parameters of each optimizer group in order, where the
    files do not say (ZeRO-0 with several groups whose parameters were given without names).
    Raises ValueError for files that are missing, left over, damaged or contradictory, for pickles
    of foreign classes, and for model-parallel ranks, which only rules can put together.
    """
    with laid_out(where):
        save = open_save(where, tag)
        if len(save.slices) > 1:
            raise ValueError(
                f"{save.folder.where} was saved by {len(save.slices)} model-parallel ranks: open "
                "it with open_slices and put the slices together with rules"
            )
        return _source(save, save.slices[0], names)


def open_slices(
    where: Location,
    tag: str | None = None,
    stages: int = 1,
    names: Sequence[Sequence[str]] | None = None,
) -> dict[Coordinate, Source]:
    """Open each model-parallel rank's part, as (tensor, pipeline, expert) rank -> source.

    stages: pipeline stages; model-parallel rank m is tensor-parallel rank m % tp of stage
    m // tp, as Megatron-DeepSpeed numbers them. Layer files of a pipeline are not read: trained
    weights come from the optimizer. Raises ValueError as open_deepspeed does.
    """
    with laid_out(where):
        save = open_save(where, tag)
        count = len(save.slices)
        if stages < 1 or count % stages:
            raise ValueError(f"{count} model-parallel ranks are not a multiple of {stages} stages")
        tp = count // stages
        sources = [_source(save, part, names) for part in save.slices]
    return {(m % tp, m // tp, 0): source for m, source in enumerate(sources)}


def _source(save: Save, part: Slice, names: Sequence[Sequence[str]] | None) -> Source:
    parts, model = Parts(save.folder), part.models[0]
    if save.stage == 0:
        groups = whole_groups(parts, model, names)
    elif save.stage == 3:
        groups = partitioned(parts, part)
        frozen_partitions(parts, part)
    else:
        groups = flat(parts, part)
    tied = ties(model)
    place_module(parts, model, {alias for _, *aliases in tied for alias in aliases})
    origin = {
        "framework": "deepspeed",
        "version": model.tree.get("ds_version"),
        "zero": save.stage,
        "topology": {"dp": save.dp, "mp": model.get("mp_world_size"), "rank": part.index},
        "tag": save.tag,
    }
    saved = part.optimizers[0].get(STATE) if part.optimizers else model.tree.get("optimizer")
    rest = extra(save.folder, model, saved or {})
    keys = [*parts.infos, *parts.scalars]
    optimizer = optimizer_class(model.tree.get("ds_config"), keys, groups)
    step = model.tree.get("global_steps")
    return close(parts, groups, tied, optimizer, step, rest, origin)
