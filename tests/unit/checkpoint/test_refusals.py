"""What is refused names the thing, its value and the way out; what is claimed is so."""

from __future__ import annotations

import itertools
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp

from hakari.training import checkpoint
from hakari.training.checkpoint import DamageError, Loaded, convert, open_checkpoint
from hakari.training.checkpoint.retention import named
from hakari.training.checkpoint.stored import open_stored
from tests.distributed.faults import in_memory

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# --- optimizers -----------------------------------------------------------------------------


def test_a_checkpoint_without_an_optimizer_says_so(folder):
    model, other = net(0), net(1)
    checkpoint.save(folder, model, step=1)
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(
        ValueError,
        match=r"step-00000001 has no optimizer state; pass optimizer=None for the weights alone, "
        r"or strict=False$",
    ):
        checkpoint.load(folder, other, optimizer)
    assert not optimizer.state
    other = net(1)
    found = checkpoint.load(folder, other, torch.optim.AdamW(other.parameters()), strict=False)
    assert (found.verified, found.missing, found.unused) == (4, (), ())
    assert equal(other, model)
    other = net(1)
    checkpoint.load(folder, other)
    assert equal(other, model)


def without_a_class(folder: Path, optimizer: Any, **changes: Any) -> Path:
    """A checkpoint that does not say which class its optimizer was, as others write them."""
    model = net(0)
    checkpoint.save(folder / "whole", model, stepped(model, optimizer(model.parameters())), step=1)
    source = open_checkpoint(folder / "whole")
    groups = tuple(replace(g, options={**g.options, **changes}) for g in source.groups)
    convert(replace(source, optimizer="", groups=groups), folder / "other")
    return folder / "other"


@pytest.mark.parametrize(("saved", "wrong"), [("AdamW", "Adam"), ("Adam", "AdamW")])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_class_that_was_not_said_is_told_from_states_and_options(folder, saved, wrong, amsgrad):
    kinds = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
    path = without_a_class(folder, lambda p: kinds[saved](p, amsgrad=amsgrad))
    model = net(1)
    with pytest.raises(ValueError, match=rf"optimizer is {saved}, and this is {wrong}: use the s"):
        checkpoint.load(path, model, kinds[wrong](model.parameters()))
    found = checkpoint.load(path, model, kinds[saved](model.parameters()))
    assert found.verified == found.tensors == (20 if amsgrad else 16)


@pytest.mark.parametrize("case", ["states of another kind", "options that do not tell"])
def test_a_class_that_cannot_be_told_has_a_way_out(folder, case):
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, momentum=0.9)

    optimizer = sgd if case == "states of another kind" else torch.optim.AdamW
    changes = {} if optimizer is sgd else {"decoupled_weight_decay": None}
    path = without_a_class(folder, optimizer, **changes)
    model = net(1)
    mine = optimizer(model.parameters())
    kind = type(mine).__name__
    with pytest.raises(
        ValueError,
        match=rf"other/step-00000001 does not say of which class its optimizer was: pass "
        rf"strict=False if it was {kind} too",
    ):
        checkpoint.load(path, model, mine)
    found = checkpoint.load(path, model, mine, strict=False)
    assert found.verified == found.tensors
    assert len(mine.state) == 4
    assert (found.missing, found.unused) == ((), ())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("side", ["this", "the saved"])
def test_a_parameter_of_one_optimizer_alone_is_named(folder, side, momentum):
    def sgd(model: nn.Module, parts: slice) -> torch.optim.Optimizer:
        return torch.optim.SGD(model[parts].parameters(), lr=0.1, momentum=momentum)

    mine, saved = [slice(0, 2), slice(0, 1)][:: 1 if side == "this" else -1]
    model, other = net(0), net(1)
    checkpoint.save(folder, model, stepped(model, sgd(model, saved)), step=1)
    if side == "this":
        expected = r"^2 parameters are in this optimizer and not in the saved one, such as 1\.bias;"
    elif momentum:
        expected = r"only in the checkpoint \(2\): 1\.bias \(momentum_buffer\);"
    else:
        expected = r"^2 parameters are in the saved optimizer and not in this one, such as 1\.bias;"
    with pytest.raises(ValueError, match=expected + r".* strict=False"):
        checkpoint.load(folder, other, sgd(other, mine))
    checkpoint.load(folder, other, sgd(other, mine), strict=False)
    assert equal(other, model)


# --- what is claimed ------------------------------------------------------------------------

LOST = list(itertools.product([(), (("a", "weight"),)], repeat=3))


@pytest.mark.parametrize(("missing", "unused", "zeroed"), LOST)
def test_verified_is_never_said_of_a_part(missing, unused, zeroed):
    lost = dict(zip(("missing", "unused", "zeroed"), (missing, unused, zeroed), strict=True))
    for verified in (3, 4):
        said = str(Loaded("run", 1, None, (), **lost, tensors=4, verified=verified, bytes=1,
                          seconds=1.0))  # fmt: skip
        whole = verified == 4 and not any(lost.values())
        assert ("loaded state verified" in said) is whole
        assert ("of 4 tensors verified" in said) is not whole
        for word in ("missing", "unused", "set to zero"):
            assert (f", 1 {word}" in said) is bool(lost[word.replace("set to zero", "zeroed")])


def test_verified_is_not_said_after_a_load_of_what_both_have(folder):
    checkpoint.save(folder, net(0), step=1)
    assert "loaded state verified" in str(checkpoint.load(folder, net(1)))
    said = str(checkpoint.load(folder, net(1)[:1], strict=False))
    assert said.endswith(", 2 of 2 tensors verified, 2 unused")
    more = nn.Sequential(*net(1), nn.Linear(1, 1))
    assert str(checkpoint.load(folder, more, strict=False)).endswith(
        "4 tensors verified, 2 missing"
    )


# --- damage ---------------------------------------------------------------------------------


def flip(step: Path, name: str) -> None:
    """One byte: of a parameter, of the extra state, or in the middle of a file."""
    found = open_stored(step).manifest.fragments
    keys = {"a weight": ("0.weight", "weight"), "the extra state": ("extra_state/x", "extra")}
    part = found[keys[name]][0] if name in keys else None
    path = step / (part.file if part else name)
    data = bytearray(path.read_bytes())
    data[part.offset if part else len(data) // 2] ^= 16
    path.write_bytes(data)


PARTS = ["a weight", "the extra state", "manifest.json", "COMMIT"]


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_newest_names_the_one_before(folder, part):
    for step in (3, 5, 8):
        checkpoint.save(folder, net(step), None, {"x": torch.ones(3)}, step=step)
    flip(folder / named(8), part)
    kind = DamageError if part in PARTS[:2] else ValueError
    way = rf"is damaged.*; the one before is {folder}/step-00000005$"
    with pytest.raises(kind, match=way):
        checkpoint.load(folder, net(0))
    assert checkpoint.load(folder / named(5), net(0)).step == 5
    with pytest.raises(kind, match=r"is damaged") as caught:
        checkpoint.load(folder / named(8), net(0))
    assert "the one before" not in str(caught.value)


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_byte_in_the_newest_keeps_the_one_before(folder, part):
    for step in (3, 5, 8):
        checkpoint.save(folder, net(step), None, {"x": torch.ones(3)}, step=step)
    whole = shutil.copytree(folder, folder / "whole")
    flip(folder / named(8), part)
    assert checkpoint.prune(folder, 1) == [named(3)]
    assert checkpoint.steps(folder) == [5, 8]
    assert checkpoint.prune(whole, 1) == [named(5), named(3)]


# --- arguments ------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_is_told_what_to_do(folder):
    checkpoint.save(folder, net(0), step=1)
    with torch.device("meta"):
        model = net(1)
    with pytest.raises(
        ValueError,
        match=r"^0\.weight \(weight\) is on the meta device: call model\.to_empty\(device=\.\.\.\)",
    ):
        checkpoint.load(folder, model)
    checkpoint.load(folder, model.to_empty(device="cpu"))
    assert equal(model, net(0))


@pytest.mark.parametrize(
    "step", [0, 7, np.int64(7), torch.tensor(7), torch.tensor(7).int()], ids=repr
)
def test_a_step_is_a_whole_number(folder, step):
    checkpoint.save(folder, net(0), step=step)
    assert checkpoint.steps(folder) == [int(step)]
    found = checkpoint.load(folder, net(1)).step
    assert (type(found), found) == (int, int(step))


@pytest.mark.parametrize("step", [1.5, 2.0, -1, True, "3", None, torch.tensor(1.0)], ids=repr)
def test_a_step_that_is_no_whole_number_is_refused(folder, step):
    with pytest.raises(ValueError, match=r"^step is .*: a whole number, 0 or more") as caught:
        checkpoint.save(folder, net(0), step=step)
    assert repr(step) in str(caught.value)
    assert not [*folder.iterdir()]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"copies": "all"}, "copies is 'all': 'equal' or 'first'"),
        ({"when_busy": "raise"}, "when_busy is 'raise': 'wait' or 'skip'"),
        ({"keep": -1}, "keep is -1: a whole number, 0 or more"),
        ({"keep": 1.5}, "keep is 1.5: a whole number, 0 or more"),
    ],
)
def test_unknown_words_and_numbers_are_refused_before_anything_is_written(folder, option, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        checkpoint.save(folder, net(0), step=1, **option)
    assert not [*folder.iterdir()]


def foreign(form: str, folder: Path) -> Path:
    if form == "hugging-face":
        save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    elif form == "dcp":
        dcp.save({"a": torch.zeros(2)}, checkpoint_id=folder, no_dist=True)
    else:
        return (
            FIXTURES / {"deepspeed": "deepspeed/zero1-fp32", "megatron": "megatron/layered"}[form]
        )
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["deepspeed", "hugging-face", "dcp", "megatron"])
def test_a_checkpoint_of_another_framework_is_named(folder, form):
    path = foreign(form, folder)
    with pytest.raises(
        ValueError, match=rf"^{path} is a checkpoint of {form}: hakari checkpoint convert first"
    ):
        checkpoint.load(path, net(0))


def test_memory_is_saved_to_at_once_alone(folder):
    url = f"memory://{uuid.uuid4().hex}/run"
    with pytest.raises(ValueError, match=rf"^{url} would be in the .*: pass asynchronous=False"):
        checkpoint.save(url, net(0), step=1, asynchronous=True)
    assert checkpoint.steps(url) == []
    checkpoint.save(url, net(0), step=1)
    model = net(1)
    assert checkpoint.load(url, model).step == 1
    assert equal(model, net(0))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
