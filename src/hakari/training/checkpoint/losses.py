"""What a checkpoint has, and another format has no place for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hakari.training.checkpoint.foreign.optimizer_class import class_by_states
from hakari.training.checkpoint.formats import Target
from hakari.training.checkpoint.source import WEIGHT, Source


def told(source: Source, target: Target) -> list[str]:
    """Lines that say what will be lost, or lies where one may not look for it."""
    if target.form == "hugging-face":
        return _by_hugging_face(source, target)
    if target.form == "dcp":
        return _left_out([*_own_class(source), *_of_processes(source)], "DCP's folders")
    if target.form == "megatron":
        lost = [*_own_class(source), *_extra_of_others(source), *_of_processes(source)]
        return _left_out(lost, "Megatron-core's folders")
    if target.form in ("deepspeed", "deepspeed-universal"):
        return _by_deepspeed(source, target)
    return []


def left_by_atoms(source: Source) -> list[str]:
    """What is no tensor."""
    numbers = dict.fromkeys(state for _, state in source.scalars)
    return [
        said
        for there, said in (
            (source.step is not None, f"step {source.step}"),
            (numbers, f"plain numbers ({', '.join(numbers)})"),
            (source.optimizer, f"optimizer {source.optimizer}"),
            (source.groups, "the optimizer's options"),
            (source.tied, f"ties ({'; '.join(' = '.join(names) for names in source.tied)})"),
            (_there(source.extra), "extra state"),
        )
        if there
    ] + _of_processes(source)


def _left_out(lost: Iterable[str], where: str) -> list[str]:
    said = ", ".join(lost)
    return [f"left out: {said} ({where} have no place for it)"] if said else []


def _there(extra: Any) -> bool:
    return bool(extra) if isinstance(extra, Mapping) else extra is not None


def _of_processes(source: Source) -> list[str]:
    ranks = ["rank states"] if any(own is not None for own in source.ranks) else []
    return ranks + (["what modules keep"] if source.modules else [])


def _own_class(source: Source) -> list[str]:
    """An optimizer's class that its states do not tell."""
    found = class_by_states((*source.tensors, *source.scalars), source.groups)
    return [f"optimizer {source.optimizer}"] if source.optimizer not in ("", found) else []


def _extra_of_others(source: Source) -> list[str]:
    """Extra state that did not come from Megatron."""
    extra = source.extra
    if not _there(extra) or (isinstance(extra, Mapping) and "common" in extra):
        return []
    return (
        [f"extra_state/{key}" for key in extra] if isinstance(extra, Mapping) else ["extra_state"]
    )


def _by_hugging_face(source: Source, target: Target) -> list[str]:
    lines = []
    if lost := dict.fromkeys(state for _, state in source.tensors if state != WEIGHT):
        lines.append(f"left out: {', '.join(lost)} (Hugging Face folders hold weights alone)")
    if target.config is None:
        lines.append("no config.json: give --config FOLDER for transformers to open it")
    return lines


def _by_deepspeed(source: Source, target: Target) -> list[str]:
    from hakari.training.checkpoint.foreign.deepspeed_plan import client_extra, misfit

    schedule = misfit(source, target.config)
    lines = [f"left out: lr_scheduler ({schedule})"] if schedule else []
    lines += _left_out(_of_processes(source), "DeepSpeed's folders")
    if names := client_extra(source):
        lines.append(
            f"extra state ({', '.join(names)}) is in the client state, under 'extra'; the schedule "
            "is taken from extra_state['lr_scheduler']"
        )
    return lines
