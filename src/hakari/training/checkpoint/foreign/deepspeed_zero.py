"""Where ZeRO-1, 2 and 3 put the elements of parameters, frozen ones and optimizer states.

ZeRO-1 and 2 lay the parameters of an optimizer group end to end, cut that into equal partitions
and drop the padding at its end. ZeRO-3 cuts each parameter into equal partitions, padded, and
lays those of a sub-group end to end. The order is that of `param_shapes` in the model's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from hakari.training.checkpoint.foreign.deepspeed_files import Rank, Slice, numel, row_major
from hakari.training.checkpoint.foreign.deepspeed_model import STATE, options, shapes
from hakari.training.checkpoint.foreign.deepspeed_parts import Parts, Span, place, place_states
from hakari.training.checkpoint.foreign.torch_values import Record, Stored
from hakari.training.checkpoint.source import WEIGHT, Group


def flat(parts: Parts, part: Slice) -> tuple[Group, ...]:
    """Place what ZeRO-1 or 2 sharded; the optimizer groups' options and members."""
    groups = []
    ranks = part.optimizers
    named = shapes(part.models[0])
    for rank in ranks:
        count = len(rank.get(STATE, "single_partition_of_fp32_groups"))
        if count != len(named):
            raise ValueError(f"{rank.file} has {count} groups, {part.models[0].file} {len(named)}")
    for group, names in enumerate(named):
        flats = [
            row_major(r.get(STATE, "single_partition_of_fp32_groups")[group], r.file) for r in ranks
        ]
        paddings = [r.get(STATE, "group_paddings")[group] for r in ranks]
        spans = flat_spans(names, _partition(group, names, flats, paddings, ranks))
        if not round_robin(ranks[0].tree.get("ds_config")):
            _agree_with_mappings(spans, group, ranks)
        for span in spans:
            place(parts, WEIGHT, span, flats[span.rank])
        states = [_base_state(rank, group) for rank in ranks]
        sizes = _state_sizes(names, flats, paddings, ranks[0])
        place_states(parts, spans, states, sizes, [rank.file for rank in ranks])
        members = in_order(list(names), ranks[0].tree.get("ds_config"), len(ranks))
        groups.append(Group(_options(ranks[0], group), tuple(members)))
    return tuple(groups)


def _partition(
    group: int,
    names: Mapping[str, tuple[int, ...]],
    flats: Sequence[Stored],
    paddings: Sequence[int],
    ranks: Sequence[Rank],
) -> int:
    """Elements in a partition, once each rank's is found to be as long as it must."""
    total, chunk = sum(map(prod, names.values())), numel(flats[0])
    for index, (flat, rank) in enumerate(zip(flats, ranks, strict=True)):
        held = min(chunk, max(0, total - index * chunk))
        if numel(flat) not in (held, chunk):
            raise ValueError(
                f"{rank.file}: group {group} has {numel(flat):,} elements, but of {total:,} in "
                f"partitions of {chunk:,} it should hold {held:,}"
            )
    spare = len(flats) * chunk - total
    padded = all(numel(flat) == chunk for flat in flats)
    if spare < 0 or (padded and spare and spare != paddings[-1]):
        raise ValueError(
            f"group {group} has {total:,} elements in {len(flats)} partitions of {chunk:,}, the "
            f"last with {paddings[-1]:,} of padding: they do not fit ({ranks[-1].file})"
        )
    return chunk


def _state_sizes(
    names: Mapping[str, tuple[int, ...]],
    flats: Sequence[Stored],
    paddings: Sequence[int],
    rank: Rank,
) -> list[int]:
    """Elements of each rank's optimizer states: as many as its weights, and the padding.

    With elastic_checkpoint neither has padding; the BF16 optimizer's weights have it already.
    """
    sizes = [numel(flat) for flat in flats]
    padded = sum(sizes) > sum(map(prod, names.values()))
    if padded or isinstance(rank.get(STATE, "base_optimizer_state"), list):
        return sizes
    return [size + padding for size, padding in zip(sizes, paddings, strict=True)]


def flat_spans(names: Mapping[str, tuple[int, ...]], chunk: int) -> list[Span]:
    """Where each parameter of a group lies in the partitions of it."""
    spans, at = [], 0
    for name, shape in names.items():
        stop = at + prod(shape)
        place_in = at
        while place_in < stop:
            rank, start = divmod(place_in, chunk)
            count = min(stop - place_in, chunk - start)
            spans.append(Span(name, shape, rank, start, place_in - at, count))
            place_in += count
        at = stop
    return spans


def round_robin(config: Any) -> bool:
    """Whether ZeRO-1 or 2 deals the parameters of a group out: its mappings are wrong then."""
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    return bool(isinstance(zero, Mapping) and zero.get("round_robin_gradients"))


def dealt(names: Sequence[str], config: Any, dp: int) -> list[str]:
    """A group's parameters in the order in which ZeRO-1 or 2 lays them out on dp ranks."""
    hands = dp if round_robin(config) else 1
    return [name for hand in range(hands) for name in names[hand::hands]]


def in_order(laid: Sequence[str], config: Any, dp: int) -> list[str]:
    """A group's parameters in the optimizer's order, from that in which they are laid out."""
    places = dealt([str(i) for i in range(len(laid))], config, dp)
    found = dict(zip(map(int, places), laid, strict=True))
    return [found[i] for i in range(len(laid))]


def _agree_with_mappings(spans: Sequence[Span], group: int, ranks: Sequence[Rank]) -> None:
    """Raise ValueError if a rank's own note of where parameters start says something else."""
    ours: list[dict[str, tuple[int, int]]] = [{} for _ in ranks]
    for span in spans:
        ours[span.rank][span.name] = (span.start, span.count)
    for rank, mine in zip(ranks, ours, strict=True):
        noted = rank.tree[STATE].get("param_slice_mappings")
        if noted is None:
            continue
        theirs = {name: _address(address, rank) for name, address in noted[group].items()}
        for name in mine | theirs:
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"{rank.file}: {name} lies at (start, count) {theirs.get(name)} by "
                    f"param_slice_mappings and at {mine.get(name)} by param_shapes"
                )


def _address(record: Any, rank: Rank) -> tuple[int, int]:
    state = record.state if isinstance(record, Record) else getattr(record, "__dict__", None)
    if not isinstance(state, Mapping) or not {"start", "numel"} <= set(state):
        raise ValueError(f"{rank.file}: param_slice_mappings holds {record!r}, not addresses")
    return state["start"], state["numel"]


def _base_state(rank: Rank, group: int) -> Mapping[str, Any]:
    base = rank.get(STATE, "base_optimizer_state")
    if isinstance(base, list):  # elastic_checkpoint: one state for each group, without padding
        return base[group]
    return base["state"].get(base["param_groups"][group]["params"][0], {})


def _options(rank: Rank, group: int) -> dict[str, Any]:
    base = rank.get(STATE, "base_optimizer_state")
    return {} if isinstance(base, list) else options(base["param_groups"][group])


# --- ZeRO-3 -------------------------------------------------------------------------------


def partitioned(parts: Parts, part: Slice) -> tuple[Group, ...]:
    """Place what ZeRO-3 sharded; the optimizer groups' options and members."""
    named, ranks = shapes(part.models[0]), part.optimizers
    bases = [rank.get(STATE, STATE) for rank in ranks]
    members: list[list[str]] = [[] for _ in bases[0]["param_groups"]]
    for sub, names in enumerate(named):
        flats = [_sub_group(rank, sub, len(named)) for rank in ranks]
        spans, length = partition_spans(names, len(ranks))
        for flat, rank in zip(flats, ranks, strict=True):
            if numel(flat) != length:
                raise ValueError(
                    f"{rank.file}: sub-group {sub} has {numel(flat):,} elements, but {len(ranks)} "
                    f"partitions of {', '.join(names)} have {length:,} each"
                )
        for span in spans:
            place(parts, WEIGHT, span, flats[span.rank])
        states = [base["state"].get(sub, {}) for base in bases]
        place_states(parts, spans, states, [length] * len(ranks), [rank.file for rank in ranks])
        group = [i for i, g in enumerate(bases[0]["param_groups"]) if sub in g["params"]]
        if len(group) != 1:
            raise ValueError(f"{ranks[0].file}: sub-group {sub} is in groups {group}, not in one")
        members[group[0]] += names
    found = zip(bases[0]["param_groups"], members, strict=True)
    return tuple(Group(options(group), tuple(names)) for group, names in found)


def _sub_group(rank: Rank, sub: int, count: int) -> Stored:
    flats = rank.get(STATE, "fp32_flat_groups")
    if len(flats) != count:
        raise ValueError(f"{rank.file} has {len(flats)} sub-groups, param_shapes has {count}")
    return row_major(flats[sub], f"{rank.file}: sub-group {sub}")


def partition_spans(names: Mapping[str, tuple[int, ...]], dp: int) -> tuple[list[Span], int]:
    """Where each parameter of a sub-group lies, and how long the sub-group is on each rank."""
    spans, at = [], 0
    for name, shape in names.items():
        total = prod(shape)
        size = -(-total // dp)
        for rank in range(dp):
            count = min(size, max(0, total - rank * size))
            if count:
                spans.append(Span(name, shape, rank, at, rank * size, count))
        at += size
    return spans, at


def frozen_partitions(parts: Parts, part: Slice) -> None:
    """Place the frozen parameters, which ZeRO-3 shards as it does the others."""
    frozen = part.models[0].tree.get("frozen_param_shapes") or {}
    for name, shape in frozen.items():
        spans, length = partition_spans({name: tuple(shape)}, len(part.models))
        for span in spans:
            rank = part.models[span.rank]
            held = row_major(rank.get("frozen_param_fragments", name), f"{rank.file}: {name}")
            if numel(held) != length:
                raise ValueError(
                    f"{rank.file}: {name} has {numel(held):,} elements, its partition {length:,}"
                )
            place(parts, WEIGHT, span, held)
