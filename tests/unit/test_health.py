"""Sick routers are named by layer and step, before the optimizer has seen them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hakari.training.config import MoE, from_dict
from hakari.training.moe import balance, health
from hakari.training.moe.health import CollapseError, LayerHealth, examine, problems
from hakari.training.moe.layer import MixtureOfExperts
from hakari.training.noise import token_keys
from hakari.training.parallel import alone, make_mesh
from hakari.training.step import Trainer, make_work, prepare, train_step
from tests.distributed.ranks import ranks
from tests.distributed.steps import batch, table

torch.set_num_threads(1)

WELL = LayerHealth(3, (5, 3, 4, 4), 1.25, 0.75, 1.2, 0.5, 1.0, 0.1, 2.0)


def routed(weight: torch.Tensor, **changes) -> LayerHealth:
    """The health of a layer with this router over 64 tokens, whose first component is 1."""
    experts, dim = weight.shape
    layer = MixtureOfExperts(dim, MoE(**{"experts": experts, "hidden": 8} | changes), layer=2)
    layer.double().router.weight.data.copy_(weight)
    x = torch.randn(4, 16, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., 0] = 1
    balance.begin(layer, 64)
    layer(x, token_keys(1, 0, torch.arange(64).view(4, 16)))
    (found,) = examine(layer)
    return found


# --- what is measured -----------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_router_without_opinion_has_balance_one_and_full_entropy(top_k):
    found = routed(torch.zeros(8, 4), top_k=top_k)
    assert found.layer == 2
    assert sum(found.load) == 64 * top_k
    assert found.balance == pytest.approx(1)
    assert found.entropy == pytest.approx(math.log(8))
    assert found.z_squared == pytest.approx(math.log(8) ** 2)
    assert (found.singletons, found.peak) == (0, 0)


@pytest.mark.parametrize(("top_k", "balanced"), [(1, 8.0), (2, 4.0)])
def test_a_collapsed_router_has_balance_of_experts_over_top_k(top_k, balanced):
    # all tokens go to expert 5, and with two slots also to another
    weight = torch.zeros(8, 4)
    weight[5, 0] = 50
    found = routed(weight, top_k=top_k, jitter=0.1)
    assert found.balance == pytest.approx(balanced)
    assert found.load[5] == 64
    assert found.largest == pytest.approx(8 / top_k)
    assert found.entropy == pytest.approx(0, abs=1e-12)
    assert found.peak == 50
    assert found.singletons == pytest.approx(1 / top_k)  # the first slot has one candidate


def test_loads_over_the_mean_are_those_of_the_counts():
    found = routed(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), top_k=2)
    assert found.largest == max(found.load) / 16
    assert found.smallest == min(found.load) / 16


def test_without_jitter_every_choice_has_one_candidate():
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    shares = [routed(weight, jitter=jitter).singletons for jitter in (0, 0.1, 0.4)]
    assert shares[0] == 1
    assert shares[0] > shares[1] > shares[2]


def test_a_single_expert_is_always_a_singleton():
    assert routed(torch.ones(1, 4), top_k=1).singletons == 1


def test_nothing_routed_is_nothing_wrong():
    layer = MixtureOfExperts(4, MoE(experts=2, hidden=8))
    balance.begin(layer, 1)
    (found,) = examine(layer)
    assert found.load == (0, 0)
    assert all(health.finite(value) for value in (found.balance, found.entropy, found.largest))


# --- what is said ---------------------------------------------------------------------------


def test_a_healthy_layer_is_not_mentioned():
    assert problems([WELL], 7, {}, 500) == []
    assert problems([replace(WELL, largest=2.0, singletons=0.95)], 7, {}, 500) == []


def test_an_overloaded_expert_and_silent_gradients_are_warnings_that_name_the_layer():
    sick = replace(WELL, largest=2.34, singletons=0.962)
    assert problems([WELL, sick], 7, {}, 500) == [
        "layer 3: the fullest expert has 2.3 times the mean load",
        "layer 3: 96% of choices have one candidate and give the router no gradient: raise "
        "model.moe.jitter",
    ]


def lived(loads: list[tuple[int, ...]], dead_steps: int) -> int:
    """Steps that pass before `problems` raises; the number of loads if it does not."""
    silent: dict[str, int] = {}
    for step, load in enumerate(loads, 1):
        try:
            problems([replace(WELL, load=load)], step, silent, dead_steps)
        except CollapseError:
            return step - 1
    return len(loads)


def test_an_expert_without_tokens_for_dead_steps_ends_the_run():
    alive, dead = (5, 3, 4, 4), (8, 0, 4, 4)
    assert lived([dead] * 10, 4) == 3
    assert lived([alive, *[dead] * 10], 4) == 4
    assert lived([*[dead] * 3, alive, *[dead] * 3], 4) == 7  # a token begins the count anew
    assert lived([dead] * 10, 0) == 10


def test_a_collapse_names_step_layer_and_experts():
    silent = {"3.1": 4, "3.2": 4, "3.0": 4}
    with pytest.raises(CollapseError) as caught:
        problems([replace(WELL, load=(8, 0, 0, 4))], 12, silent, 5)
    assert str(caught.value) == (
        "step 12: layer 3 has collapsed: no token reached expert 1, 2 for 5 steps; raise "
        "model.moe.balance, or set model.moe.dead_steps = 0 to go on"
    )
    assert silent == {"3.1": 5, "3.2": 5}


# --- a step is refused ----------------------------------------------------------------------


@pytest.fixture
def trainer():
    """A trainer of sparse layers 1 and 3 that has done one step."""
    config = from_dict(table(model__moe__layers=[1, 3]))
    with alone():
        made = prepare(config, make_mesh(config.parallel, "cpu"))
        train_step(made, make_work(made, batch(), 0), 0)
        yield made


def bits(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of weights and optimizer state, as whole numbers: NaN is equal to itself."""
    named = dict(trainer.model.named_parameters())
    found = {name: p.detach().clone().view(torch.int64) for name, p in named.items()}
    for name, parameter in named.items():
        for key, value in trainer.optimizer.state[parameter].items():
            found[f"{name} {key}"] = value.clone()
    return found


def refused(trainer: Trainer, message: str) -> None:
    """Step 2 raises with this message, and changes no bit of weights and optimizer."""
    before = bits(trainer)
    with pytest.raises(FloatingPointError, match=message):
        train_step(trainer, make_work(trainer, batch(), 1), 1)
    after = bits(trainer)
    assert set(before) == set(after)
    assert len(before) > 3 * len(list(trainer.model.parameters()))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [1, 3])
def test_logits_that_are_not_finite_name_layer_and_step(trainer, layer, value):
    with torch.no_grad():
        trainer.model.layers[str(layer)].mlp.router.weight[2, 0] = value
    refused(
        trainer,
        rf"^step 2: router logits of layer {layer} are not finite: lower "
        r"optimizer\.learning_rate, or raise model\.moe\.z_loss$",
    )


def test_the_first_layer_that_goes_wrong_is_named(trainer):
    with torch.no_grad():
        trainer.model.layers["0"].mlp.gate.weight[0, 0] = math.nan
    refused(trainer, r"^step 2: router logits of layer 1 are not finite")


def test_a_weight_that_is_not_finite_is_named(trainer):
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = math.inf
    refused(trainer, r"^step 2: loss nan, gradient norm nan, weight head\.weight is not finite: ")


def test_an_output_that_is_not_finite_is_named(trainer):
    with torch.no_grad():  # the product of two halves is beyond float64
        trainer.model.layers["3"].mlp.router.weight.zero_()
        trainer.model.norm.weight.fill_(1e200)
        trainer.model.head.weight.fill_(1e200)
    refused(trainer, r"^step 2: loss nan, gradient norm nan, first in the output of head: ")


def test_a_gradient_that_is_not_finite_is_refused_although_the_loss_is(trainer):
    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(gradient.numel()) == 3, math.inf, gradient.flatten()).view(
            gradient.shape
        )

    weight = trainer.model.layers["2"].attention.query.weight
    weight.register_hook(spoil)
    refused(
        trainer,
        r"^step 2: loss \d\.\d+, gradient norm inf, in the backward pass: lower "
        r"optimizer\.learning_rate or lengthen optimizer\.warmup$",
    )


def one_sick(sick, changes):
    """What a rank says, and whether its weights stayed, when logits are wrong on one rank only."""
    config = from_dict(table(**changes))
    mesh = make_mesh(config.parallel, "cpu")
    trainer = prepare(config, mesh)
    axis = mesh["data"]
    rank = axis.get_local_rank()

    def spoil(module, inputs, output):
        return output * math.nan

    if torch.distributed.get_rank() == sick and "2" in trainer.model.layers:
        trainer.model.layers["2"].mlp_norm.register_forward_hook(spoil)
    work = make_work(trainer, batch(rank, axis.size()), 0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    try:
        train_step(trainer, work, 0)
    except FloatingPointError as error:
        after = [p.detach() for p in trainer.model.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return str(error).partition(":")[2].partition(" are")[0], same
    return None


def both_splits() -> list:
    by_data, stages = {"parallel__data": 2}, {"parallel__pipeline": 2, "micro_batch": 4}
    return [one_sick(*case) for case in [(0, by_data), (1, by_data), (1, stages)]]


@pytest.mark.xdist_group("gloo")
def test_one_sick_process_stops_them_all_with_the_same_message():
    for seen in ranks(2, both_splits):
        assert seen == [(" router logits of layer 2", True)] * 3
