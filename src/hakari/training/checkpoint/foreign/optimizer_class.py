"""The class of an optimizer, where a checkpoint does not say it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hakari.training.checkpoint.source import WEIGHT, Group, Key

MOMENTS = {"exp_avg", "exp_avg_sq"}
ADAM = {"step", "max_exp_avg_sq"} | MOMENTS
FLAGS = ("decoupled_weight_decay", "amsgrad")


def class_by_states(keys: Iterable[Key], groups: Sequence[Group]) -> str:
    """'AdamW' or 'Adam' by what torch's own keep, '' for anything else.

    keys: of the tensors and numbers that were saved. RAdam has the same states, and its groups no
    `amsgrad`; other frameworks' Adams do not say whether weight decay is decoupled.
    """
    states = {state for _, state in keys} - {WEIGHT}
    flags = [group.options.get(flag) for group in groups for flag in FLAGS]
    if not MOMENTS <= states <= ADAM or not flags or not all(type(flag) is bool for flag in flags):
        return ""
    decoupled = {group.options["decoupled_weight_decay"] for group in groups}
    return "" if len(decoupled) > 1 else "AdamW" if decoupled.pop() else "Adam"
