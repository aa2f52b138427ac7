"""What does not fit is refused by name; what may differ, may."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from hakari.training import checkpoint
from hakari.training.checkpoint.retention import named, prune
from tests.distributed.faults import in_memory


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


class Net(nn.Module):
    def __init__(
        self, seed: int, tied: bool = False, hidden: int = 4, **changes: nn.Module
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(6, hidden)
        self.norm, self.other = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for name, module in changes.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self.other(self.norm(self.embed(x))))


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.arange(6)).square().sum().mul(step + 1).backward()
        optimizer.step()


def adam(net: nn.Module, **options: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), **({"lr": 0.1} | options))


@pytest.fixture
def saved(folder):
    net = Net(0)
    optimizer = adam(net, weight_decay=0.3)
    trained(net, optimizer)
    checkpoint.save(folder, net, optimizer, step=2)
    return folder, net, optimizer


def equal(a: nn.Module, b: nn.Module) -> None:
    theirs = b.state_dict()
    for name, value in a.state_dict().items():
        assert torch.equal(value, theirs[name]), name


# --- names ----------------------------------------------------------------------------------


def test_missing_and_unused_are_listed_with_the_nearest_name(saved):
    net = Net(1, embedding=nn.Embedding(6, 4))
    del net.embed
    with pytest.raises(
        ValueError,
        match=r"only here \(1\): embedding\.weight \(weight\), like embed\.weight\. "
        r"only in the checkpoint \(1\): embed\.weight \(weight\), like embedding\.weight\. "
        r"Pass strict=False",
    ):
        checkpoint.load(saved[0], net)
    before = net.embedding.weight.clone()
    found = checkpoint.load(saved[0], net, strict=False)
    assert found.missing == (("embedding.weight", "weight"),)
    assert found.unused == (("embed.weight", "weight"),)
    assert torch.equal(net.embedding.weight, before)
    assert torch.equal(net.norm.weight, saved[1].norm.weight)


def test_a_tensor_that_equals_another_by_chance_is_missed_too(folder):
    """Norms that were never trained are all ones, and biases all zeros."""
    checkpoint.save(folder, Net(0, extra=nn.LayerNorm(4)), step=1)
    with pytest.raises(ValueError, match=r"only in the checkpoint \(2\): extra\.bias \(weight\)"):
        checkpoint.load(folder, Net(1))


def test_many_names_are_cut_short(folder):
    checkpoint.save(folder, nn.Sequential(*(nn.Linear(1, 1) for _ in range(20))), step=1)
    with pytest.raises(ValueError, match=r"only in the checkpoint \(40\): .* and 32 more"):
        checkpoint.load(folder, nn.Module())


# --- shapes, types, classes -----------------------------------------------------------------


def test_another_shape_is_refused_even_if_not_strict(saved):
    for strict in (True, False):
        with pytest.raises(
            ValueError,
            match=r"embed\.weight \(weight\) is \[6, 4\] in the checkpoint and \[6, 5\] here",
        ):
            checkpoint.load(saved[0], Net(1, hidden=5), strict=strict)


def test_another_type_is_refused_or_cast(saved):
    net = Net(1).bfloat16()
    with pytest.raises(
        ValueError,
        match=r"is F32 in the checkpoint and BF16 here: make it the same, or pass cast=True",
    ):
        checkpoint.load(saved[0], net)
    found = checkpoint.load(saved[0], net, cast=True)
    equal(net, saved[1].bfloat16())
    assert (found.verified, found.tensors) == (0, 6)
    assert "0 of 6 tensors verified" in str(found)


def test_another_optimizer_is_refused(saved):
    net = Net(1)
    with pytest.raises(
        ValueError,
        match=r"the checkpoint's optimizer is AdamW, and this is SGD: use the same class, or",
    ):
        checkpoint.load(saved[0], net, torch.optim.SGD(net.parameters()))
    checkpoint.load(saved[0], net)
    equal(net, saved[1])


def test_two_optimizers_come_back_in_any_order(folder):
    def two(net: Net) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(net.embed.parameters(), lr=0.1, momentum=0.9),
            torch.optim.AdamW([*net.norm.parameters(), *net.other.parameters()], lr=0.2),
        ]

    net = Net(0)
    optimizers = two(net)
    net(torch.arange(6)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    checkpoint.save(folder, net, optimizers, step=1)
    again = Net(1)
    others = two(again)
    found = checkpoint.load(folder, again, others[::-1])
    assert found.verified == found.tensors
    assert torch.equal(
        others[0].state[again.embed.weight]["momentum_buffer"],
        optimizers[0].state[net.embed.weight]["momentum_buffer"],
    )
    with pytest.raises(ValueError, match=r"optimizer is AdamW\+SGD, and this is AdamW"):
        checkpoint.load(folder, again, others[1])


# --- ties -----------------------------------------------------------------------------------


def test_tied_weights_are_loaded_apart_with_their_moments(folder):
    net = Net(0, tied=True)
    optimizer = adam(net)
    trained(net, optimizer)
    checkpoint.save(folder, net, optimizer, step=1)
    apart = Net(1)
    other = adam(apart)
    found = checkpoint.load(folder, apart, other)
    assert found.verified == found.tensors
    equal(apart, net)
    for parameter in (apart.embed.weight, apart.head.weight):
        mine, theirs = other.state[parameter], optimizer.state[net.embed.weight]
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_equal_weights_are_loaded_tied_and_others_are_not(folder):
    apart = Net(0)
    with torch.no_grad():
        apart.head.weight.copy_(apart.embed.weight)
    checkpoint.save(folder, apart, step=1)
    net = Net(1, tied=True)
    found = checkpoint.load(folder, net)
    assert found.unused == ()
    assert torch.equal(net.head.weight, apart.embed.weight)
    with torch.no_grad():
        apart.head.weight[0, 0] += 1
    checkpoint.save(folder, apart, step=2)
    with pytest.raises(ValueError, match=r"only in the checkpoint \(1\): head\.weight \(weight\)"):
        checkpoint.load(folder, net)


# --- options --------------------------------------------------------------------------------


def test_options_are_restored_by_parameter_or_kept(saved):
    net = Net(1)
    optimizer = adam(net, weight_decay=0.7, lr=0.5)
    checkpoint.load(saved[0], net, optimizer, options=False)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (
        0.5,
        0.7,
    )
    checkpoint.load(saved[0], net, optimizer)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (
        0.1,
        0.3,
    )


def test_options_that_conflict_are_said(folder):
    net = Net(0)
    groups = [
        {"params": [*net.embed.parameters()], "lr": 0.1},
        {"params": [*net.norm.parameters()]},
    ]
    checkpoint.save(folder, net, torch.optim.AdamW(groups, lr=0.2), step=1)
    other = Net(1)
    with pytest.raises(
        ValueError,
        match=r"group 0 of the optimizer holds embed\.weight and norm\.weight, which were saved "
        r"with different options .*\"lr\": 0\.1.*\"lr\": 0\.2.*options=False",
    ):
        checkpoint.load(folder, other, adam(other), strict=False)
    split = [{"params": [p]} for p in [*other.norm.parameters(), *other.embed.parameters()]]
    optimizer = torch.optim.AdamW(split, lr=0.9)
    checkpoint.load(folder, other, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2, 0.1]


def test_a_failed_load_leaves_the_optimizer_without_states(saved):
    net = Net(1, extra=nn.Linear(1, 1))
    optimizer = adam(net)
    with pytest.raises(ValueError, match="only here"):
        checkpoint.load(saved[0], net, optimizer)
    assert not optimizer.state


# --- folders --------------------------------------------------------------------------------


def test_there_is_nothing_to_load(folder):
    with pytest.raises(FileNotFoundError, match=r"holds no complete checkpoint$"):
        checkpoint.load(folder, Net(0))
    (folder / ".tmp-step-00000001-abc").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"\(1 incomplete save, such as \.tmp-step-00000001-abc"
    ):
        checkpoint.load(folder / ".", Net(0))
    assert checkpoint.clear_leftovers(folder) == [".tmp-step-00000001-abc"]


def test_steps_of_any_length_are_ordered_by_number(folder):
    net = nn.Linear(1, 1)
    for step in (5, 99_999_999, 100_000_000):
        checkpoint.save(folder, net, step=step)
    assert checkpoint.latest(folder) == f"{folder}/step-100000000"
    assert (folder / "LATEST").read_text() == "step-100000000\n"


def test_what_was_just_saved_stays_though_there_are_newer_ones(folder):
    net = nn.Linear(1, 1)
    for step in (4, 8, 9):
        checkpoint.save(folder, net, step=step)
    assert prune(folder, 2, fresh=named(4)) == []
    assert prune(folder, 2) == [named(4)]


def test_damaged_ones_do_not_count_when_old_ones_go(folder):
    net = nn.Linear(1, 1)
    for step in range(1, 5):
        checkpoint.save(folder, net, step=step)
    next((folder / named(4)).glob("data/*")).unlink()
    (folder / named(3) / "manifest.json").write_text("{}")
    assert prune(folder, 1) == [named(1)]
    assert checkpoint.steps(folder) == [2, 3, 4]


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_removal_may_be_cut_off_and_repeated(folder, cut, monkeypatch):
    net = nn.Linear(1, 1)
    for step in (1, 2):
        checkpoint.save(folder, net, step=step)
    calls = itertools.count(1)
    import os

    real = os.unlink

    def unlink(*arguments, **options):
        if next(calls) == cut:
            raise KeyboardInterrupt
        real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        try:
            prune(folder, 1)
        except KeyboardInterrupt:
            assert checkpoint.leftovers(folder) == [".old-step-00000001"]
    assert checkpoint.steps(folder) == [2]
    checkpoint.save(folder / "other", net, step=1)
    (folder / "other" / named(1)).rename(folder / named(1))
    assert prune(folder, 1) == [named(1)]
    assert checkpoint.steps(folder) == [2]


def test_a_checkpoint_may_be_moved(saved):
    folder, net, _ = saved
    (folder / named(2)).rename(folder / "best")
    again = Net(1)
    assert checkpoint.load(folder / "best", again).step == 2
    equal(again, net)


@pytest.mark.parametrize("value", ["two", -1])
def test_a_step_that_is_no_count_is_refused(folder, value):
    with pytest.raises((ValueError, TypeError)):
        checkpoint.save(folder, nn.Linear(1, 1), step=value)
    assert checkpoint.steps(folder) == []


def test_names_that_are_kept_for_extra_states_are_refused(folder):
    net = nn.Module()
    net.register_parameter("a", nn.Parameter(torch.ones(1)))
    piece = checkpoint.tensor_pieces(("extra_state/a", "weight"), torch.ones(1))
    with pytest.raises(ValueError, match=r"extra_state/a is a name that is kept for extra states"):
        checkpoint.save(folder, net, step=1, pieces=piece)
    assert not Path(folder / named(1)).exists()
