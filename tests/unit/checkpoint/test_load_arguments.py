"""What cannot be had, of a checkpoint or an argument of `load`, is said with a way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hakari.training import checkpoint

OPTIONS = {"lr": 0.123, "betas": (0.5, 0.6), "weight_decay": 0.7}


def program(**options) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 3)
    return model, torch.optim.AdamW(model.parameters(), **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer = program(**OPTIONS)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer, step=1)
    return tmp_path


@pytest.fixture
def bare(saved: Path) -> Path:
    """The same without options, as other formats have it."""
    source = replace(checkpoint.open_checkpoint(saved), groups=())
    checkpoint.convert(source, saved / "bare")
    return saved / "bare"


@pytest.mark.parametrize("groups", ["none", "empty"])
def test_states_without_options_are_not_taken_for_all(bare, saved, groups):
    """The learning rate would be that of this program, and nobody would know."""
    if groups == "empty":
        source = checkpoint.open_checkpoint(saved)
        empty = tuple(replace(group, options={}) for group in source.groups)
        checkpoint.convert(replace(source, groups=empty), bare / "empty")
        bare = bare / "empty"
    model, optimizer = program(lr=0.5)
    told = r"has the optimizer's states but not its options \(learning rate, .* options=False to "
    with pytest.raises(ValueError, match=told):
        checkpoint.load(bare, model, optimizer)
    assert not optimizer.state
    loaded = checkpoint.load(bare, model, optimizer, options=False)
    assert str(loaded).endswith("loaded state verified")
    loaded = checkpoint.load(bare, model, optimizer, strict=False)
    assert str(loaded).endswith("8 of 8 tensors verified, the optimizer's options are not in it")
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(optimizer.state) == 2


def test_options_are_restored_where_they_are(saved):
    model, optimizer = program()
    assert not checkpoint.load(saved, model, optimizer).options_missing
    assert OPTIONS.items() <= optimizer.param_groups[0].items()


def test_states_to_zero_are_a_list(saved):
    told = r"zero_damaged is the text 'exp_avg_sq': pass a list of states, \['exp_avg_sq'\]"
    with pytest.raises(TypeError, match=told):
        checkpoint.load(saved, *program(), zero_damaged="exp_avg_sq")


def test_an_expanded_buffer_cannot_be_filled(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.arange(4.0))
    checkpoint.save(tmp_path, model, step=1)
    model.register_buffer("scale", torch.zeros(1).expand(4))
    told = r"scale \(weight\) \[4\] is expanded, so .* make it a tensor of its own \(\.clone\(\)\)"
    with pytest.raises(ValueError, match=told):
        checkpoint.load(tmp_path, model)


@pytest.mark.parametrize(
    ("start", "count", "told"),
    [(15, 10, "elements 15 to 25 are not within the 20 of"), (-1, 3, "elements -1 to 2 are not")],
)
def test_a_flat_shard_lies_within_its_tensor(start, count, told):
    with pytest.raises(ValueError, match=rf"w \(exp_avg\): {told}"):
        checkpoint.flat_pieces(("w", "exp_avg"), (4, 5), start, torch.ones(count))
    with pytest.raises(ValueError, match=r"elements 0 to 2 are not within the 0 of \[0, 5\]"):
        checkpoint.flat_pieces(("w", "exp_avg"), (0, 5), 0, torch.ones(2))
    whole = checkpoint.flat_pieces(("w", "exp_avg"), (4, 5), 15, torch.ones(5))
    assert [piece.box for piece in whole] == [((3, 4), (0, 5))]


@pytest.mark.parametrize(
    "write",
    [
        checkpoint.convert,
        checkpoint.export_atoms,
        lambda source, where: checkpoint.write_any(source, where, checkpoint.Target("dcp")),
    ],
)
def test_a_path_is_no_opened_checkpoint(tmp_path, write):
    told = r"'a' is a str, where an opened checkpoint is needed: pass open_any\(PATH\), or use the"
    with pytest.raises(TypeError, match=told):
        write("a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
