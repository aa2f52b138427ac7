"""The learning rate in closed form, AdamW by hand, clipping against torch's own."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch

from hakari.training.config import Model, MoE, Optimizer, Parallel
from hakari.training.model import Transformer, initialise
from hakari.training.optimizer import clip, gradient_norm, learning_rate, make_optimizer, set_rate
from hakari.training.parallel import alone, make_mesh

torch.set_num_threads(1)

SMALL = {"vocabulary": 64, "dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 24}


def small(**changes) -> Transformer:
    """A float64 model: layer 0 dense, layer 1 sparse."""
    moe = MoE(experts=4, hidden=8, layers=(1,), router=changes.pop("router", "grin"))
    model = Transformer(Model(**SMALL | changes, moe=moe)).double()
    initialise(model, 1)
    return model


def random_gradients(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- the learning rate ----------------------------------------------------------------------


def rates(steps: int, **changes) -> list[float]:
    """The rate of every step, over the highest rate."""
    config = Optimizer(learning_rate=0.5, **changes)
    return [learning_rate(config, step, steps) / 0.5 for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_from_one_part_to_the_whole(schedule):
    found = rates(100, schedule=schedule, warmup=10)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_cosine_falls_by_half_a_turn_from_the_end_of_the_warm_up_to_the_last_step():
    found = rates(101, schedule="cosine", warmup=20, final=0.1)
    assert found[20] == 1
    assert found[60] == pytest.approx(0.1 + 0.9 / 2)  # half the way
    assert found[40] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # a quarter
    assert found[100] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(found[20:]))


def test_wsd_is_flat_and_then_falls_linearly_to_the_last_step():
    found = rates(101, schedule="wsd", warmup=20, decay=0.2, final=0.1)
    assert found[20:81] == [1.0] * 61
    assert found[90] == pytest.approx(0.55)
    assert found[100] == pytest.approx(0.1)
    slopes = {round(b - a, 12) for a, b in pairwise(found[80:])}
    assert slopes == {-0.045}


def test_constant_stays_and_no_warm_up_begins_at_the_whole():
    assert rates(10, schedule="constant", warmup=0) == [1.0] * 10
    assert rates(10, schedule="cosine", warmup=0)[0] == 1


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_runs_shorter_than_the_warm_up_have_a_rate(schedule, steps):
    for rate in rates(steps, schedule=schedule, warmup=50):
        assert 0 < rate <= 1


def test_set_rate_reaches_every_group():
    optimizer = make_optimizer(small(), Optimizer())
    assert len(optimizer.param_groups) == 2
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# --- AdamW ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_norms_biases_and_the_embedding_do_not(tied):
    model = small(tied=tied, norm="layer", attention_bias=True, head_bias=True)
    optimizer = make_optimizer(model, Optimizer(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    expected = {
        name: 0.0 if "norm" in name or name.endswith("bias") or name == "embed.weight" else 0.3
        for name, _ in model.named_parameters()
    }
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == expected
    assert expected["layers.1.mlp.gate"] == expected["layers.1.mlp.router.weight"] == 0.3
    assert ("head.weight" in expected) is not tied
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(expected)


def adamw_by_hand(config, weights, gradients, rates, decays, coupled=False):
    """Loshchilov and Hutter (2019), algorithm 2; coupled: their algorithm with L2 instead."""
    b1, b2 = config.beta1, config.beta2
    found = {name: w.clone() for name, w in weights.items()}
    mean = {name: torch.zeros_like(w) for name, w in weights.items()}
    square = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        for name, w in found.items():
            g = gradient[name] + (decays[name] * w if coupled else 0)
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            step = (mean[name] / (1 - b1**t)) / ((square[name] / (1 - b2**t)).sqrt() + config.eps)
            w -= rate * (step + (0 if coupled else decays[name] * w))
    return found


def largest_gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_a_few_steps_are_adamw_with_decoupled_decay():
    config = Optimizer(learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3)
    model = small()
    optimizer = make_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates, gradients = [0.01, 0.02, 0.005, 0.01], []
    for seed, rate in enumerate(rates):
        gradients.append(random_gradients(model, seed))
        set_rate(optimizer, rate)
        optimizer.step()
    after = {name: p.detach() for name, p in model.named_parameters()}
    decays = {n: 0.3 if p.ndim > 1 and n != "embed.weight" else 0.0 for n, p in before.items()}
    arguments = (config, before, gradients, rates)
    assert largest_gap(after, adamw_by_hand(*arguments, decays)) < 1e-14
    everywhere = dict.fromkeys(decays, 0.3)
    assert largest_gap(after, adamw_by_hand(*arguments, decays, coupled=True)) > 1e-4
    assert largest_gap(after, adamw_by_hand(*arguments, everywhere)) > 1e-4


def test_frozen_parameters_are_left_out():
    model = small()
    model.embed.weight.requires_grad_(False)
    optimizer = make_optimizer(model, Optimizer())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.embed.weight) not in held


# --- clipping -------------------------------------------------------------------------------


def test_norm_and_clipping_are_those_of_torch():
    model = small()
    random_gradients(model, 0)
    twin = copy.deepcopy(model)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = one.grad.clone()
    with alone():
        norm = gradient_norm(model.parameters(), make_mesh(Parallel(), "cpu"))
    theirs = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.7)
    assert norm.item() == pytest.approx(theirs.item(), rel=1e-14)
    clip(model.parameters(), norm, 0.7)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-14, atol=0)
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert total.item() == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("largest", [0.0, 1e6])
def test_a_small_gradient_and_no_limit_are_left_alone(largest):
    model = small()
    before = random_gradients(model, 0)
    clip(model.parameters(), torch.tensor(30.0), largest)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


def test_the_norm_of_float32_gradients_is_summed_in_float64():
    parameter = torch.nn.Parameter(torch.zeros(2**12))
    parameter.grad = torch.full_like(parameter, 1e-30)  # whose square float32 does not hold
    with alone():
        norm = gradient_norm([parameter], make_mesh(Parallel(), "cpu"))
    assert norm.item() == pytest.approx(2**6 * 1e-30, rel=1e-6, abs=0)
