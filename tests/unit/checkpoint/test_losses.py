"""What a conversion leaves out is said, and what another format can hold gets there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hakari.training.checkpoint import Target, convert, load, open_checkpoint, save
from hakari.training.checkpoint.foreign.deepspeed import open_deepspeed
from hakari.training.checkpoint.foreign.deepspeed_universal import open_universal
from hakari.training.checkpoint.foreign.deepspeed_write import write_universal, write_zero
from hakari.training.checkpoint.foreign.megatron import open_megatron, write_megatron
from hakari.training.checkpoint.foreign.torch_files import read_torch
from hakari.training.checkpoint.language.rules import Program, Rule
from hakari.training.checkpoint.losses import told
from hakari.training.checkpoint.source import Source
from hakari.training.checkpoint.storage import open_folder
from tests.unit.checkpoint.deepspeed_cases import FIXTURES, TAG, copy_of, rewrite

SCHEDULE = {"T_max": 100, "last_epoch": 4, "base_lrs": [0.1, 0.2]}


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3), nn.LayerNorm(3))

    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        pass


def program(kind: type = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net()
    decayed = {"params": [model[0].weight], "lr": 0.2}
    others = {"params": [model[0].bias, *model[1].parameters()], "lr": 0.3}
    optimizer = kind([decayed, others])
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def source(tmp_path: Path) -> Source:
    extra = {"lr_scheduler": SCHEDULE, "cursor": 3}
    save(tmp_path / "own", *program(), extra, step=4, rank_state={"seed": 1})
    return open_checkpoint(tmp_path / "own")


KEEPS = Program((Rule(match=r"(?P<name>.+)", to="{name}"),))


# --- what is said -------------------------------------------------------------------------


def test_what_no_other_format_holds_is_said(source: Source) -> None:
    lost = "rank states, what modules keep"
    assert told(source, Target("dcp")) == [f"left out: {lost} (DCP's folders have no place for it)"]
    assert told(source, Target("megatron")) == [
        f"left out: extra_state/lr_scheduler, extra_state/cursor, {lost} (Megatron-core's folders "
        "have no place for it)"
    ]
    assert told(source, Target("deepspeed-universal")) == [
        f"left out: {lost} (DeepSpeed's folders have no place for it)",
        "extra state (cursor) is in the client state, under 'extra'; the schedule is taken from "
        "extra_state['lr_scheduler']",
    ]
    assert told(source, Target("hakari")) == []


def test_nothing_is_said_where_nothing_is_lost(source: Source) -> None:
    small = replace(source, extra=None, ranks=(None,), modules={})
    for form in ("dcp", "megatron", "deepspeed", "deepspeed-universal"):
        assert told(small, Target(form)) == []
    of_megatron = replace(small, extra={"common": {}, "objects": []})
    assert told(of_megatron, Target("megatron")) == []


def test_a_class_that_states_do_not_tell_is_lost(tmp_path: Path) -> None:
    save(tmp_path, *program(torch.optim.Adagrad), step=1)
    source = replace(open_checkpoint(tmp_path), modules={})
    assert told(source, Target("dcp")) == [
        "left out: optimizer Adagrad (DCP's folders have no place for it)"
    ]


# --- what gets there ----------------------------------------------------------------------


def test_groups_go_to_megatron_and_back(source: Source, tmp_path: Path) -> None:
    write_megatron(source, tmp_path / "megatron", KEEPS)
    back = open_megatron(tmp_path / "megatron", KEEPS)
    assert [(g.options["lr"], g.members) for g in back.groups] == [
        (g.options["lr"], g.members) for g in source.groups
    ]
    assert [group.options.keys() for group in back.groups] == [
        group.options.keys() for group in source.groups
    ]
    convert(back, tmp_path / "back")
    model, optimizer = program()
    load(tmp_path / "back", nn.Sequential(*model), optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.3]


def test_groups_that_changed_since_megatron_are_those_that_are_written(
    source: Source, tmp_path: Path
) -> None:
    write_megatron(source, tmp_path / "a", KEEPS)
    back = open_megatron(tmp_path / "a", KEEPS)
    turned = replace(back, groups=back.groups[::-1])
    write_megatron(turned, tmp_path / "b", KEEPS)
    assert open_megatron(tmp_path / "b", KEEPS).groups == turned.groups
    write_megatron(replace(back, groups=()), tmp_path / "c", KEEPS)
    assert open_megatron(tmp_path / "c", KEEPS).groups == ()
    tree: Any = read_torch(open_folder(tmp_path / "c"), "common.pt")
    assert "param_names" not in tree["optimizer"]["optimizer"]["param_groups"][0]


def own_run(**extra: Any) -> Source:
    """A run that was not DeepSpeed's."""
    found = open_deepspeed(FIXTURES / "zero1-fp32")
    return replace(found, extra={"lr_scheduler": SCHEDULE, **extra}, origin={}, step=4)


def test_the_schedule_of_ones_own_run_is_deepspeeds(tmp_path: Path) -> None:
    write_universal(own_run(), tmp_path / "a")
    extra = open_universal(tmp_path / "a").extra
    assert (extra["lr_scheduler"], extra["client"]) == (SCHEDULE, {})
    write_universal(own_run(cursor=3), tmp_path / "b")
    extra = open_universal(tmp_path / "b").extra
    assert (extra["lr_scheduler"], extra["client"]) == (SCHEDULE, {"extra": {"cursor": 3}})
    none = replace(own_run(), extra={"lr_scheduler": None})
    write_universal(none, tmp_path / "c")
    assert open_universal(tmp_path / "c").extra["client"] == {"extra": {"lr_scheduler": None}}


@pytest.mark.parametrize("has", [None, {**SCHEDULE, "last_epoch": 1}])
def test_the_schedule_goes_to_a_run_that_has_one_alike_or_none(has: Any, tmp_path: Path) -> None:
    template = copy_of("zero1-fp32", tmp_path)
    rewrite(template / TAG, "mp_rank_00_model_states.pt", lambda tree: tree | {"lr_scheduler": has})
    write_zero(own_run(), tmp_path / "z", template=template)
    assert open_deepspeed(tmp_path / "z").extra["lr_scheduler"] == SCHEDULE
    assert told(own_run(), Target("deepspeed", config=template)) == []


def test_another_kind_of_schedule_is_left_out_and_said(tmp_path: Path) -> None:
    template = FIXTURES / "zero1-fp32"
    write_zero(own_run(), tmp_path / "z", template=template)
    assert open_deepspeed(tmp_path / "z").extra["lr_scheduler"].keys() == {"last_batch_iteration"}
    assert told(own_run(), Target("deepspeed", config=template)) == [
        "left out: lr_scheduler (it has T_max, last_epoch, base_lrs; that of "
        f"{template} last_batch_iteration)"
    ]
