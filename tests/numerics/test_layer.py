"""A mixture-of-experts layer alone: nobody is dropped, nobody's neighbours matter, names do not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hakari.training.config import MoE
from hakari.training.moe.layer import MixtureOfExperts
from hakari.training.noise import token_keys

torch.set_num_threads(1)

D, E, T = 16, 8, 96
ROUTERS = ["gshard", "grin", "grin_paper", "grin_star", "joint", "aux_free"]


def sparse(**changes) -> MixtureOfExperts:
    options = {"experts": E, "hidden": 12, "jitter": 0.4} | changes
    torch.manual_seed(0)
    layer = MixtureOfExperts(D, MoE(**options), layer=3).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return layer


def tokens(skew: float = 0.0) -> torch.Tensor:
    """[1, T, D]; skew: how much all tokens resemble each other."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, T, D, generator=draw, dtype=torch.float64)
    return x + skew * torch.randn(D, generator=draw, dtype=torch.float64)


def noise(step: int = 0) -> torch.Tensor:
    return token_keys(1, step, torch.arange(T)[None])


def by_hand(layer: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Inference of gshard, a token at a time: the best two, softmax over both."""
    rows = []
    for token in x[0]:
        logits = layer.router.weight @ token
        best = logits.topk(layer.config.top_k)
        parts = [
            layer.down[e] @ (F.silu(layer.gate[e] @ token) * (layer.up[e] @ token))
            for e in best.indices
        ]
        rows.append((best.values.softmax(0)[:, None] * torch.stack(parts)).sum(0))
    return torch.stack(rows)[None]


# --- every token, whatever the others -------------------------------------------------------


@pytest.mark.parametrize("top_k", [2, 3, E])
@pytest.mark.parametrize("skew", [0, 3])
def test_a_layer_is_its_definition_token_by_token(top_k, skew):
    layer = sparse(router="gshard", top_k=top_k)
    x = tokens(skew)
    torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=0, atol=1e-12)


def with_capacity(layer: MixtureOfExperts, x: torch.Tensor, factor: float = 1.25) -> torch.Tensor:
    """The foil: an expert takes `factor` times the mean load, and drops the tokens after."""
    routing = layer._route(x.flatten(0, 1), None, None)
    order = F.one_hot(routing.expert.flatten(), E).cumsum(0).gather(1, routing.expert.view(-1, 1))
    most = factor * routing.expert.numel() / E
    kept = (order <= most).view(routing.expert.shape)
    outputs = torch.stack(
        [
            F.linear(
                F.silu(F.linear(x[0], layer.gate[e])) * F.linear(x[0], layer.up[e]), layer.down[e]
            )
            for e in range(E)
        ],
        1,
    )
    chosen = outputs.gather(1, routing.expert[..., None].expand(-1, -1, D))
    return ((routing.gate * kept)[..., None] * chosen).sum(1)[None]


def independent(forward, x: torch.Tensor) -> bool:
    """Whether the last 10 tokens come out the same with 86 before them, and with other ones."""
    other = x.clone()
    other[:, :-10] = -other[:, :-10]
    return torch.allclose(forward(x)[:, -10:], forward(other)[:, -10:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_token_does_not_notice_the_rest_of_the_batch(router):
    layer, x = sparse(router=router), tokens(3)
    with torch.no_grad():
        assert independent(lambda y: layer(y, noise()), x)
        assert independent(layer.eval(), x)


def test_a_capacity_would_be_noticed():
    layer, x = sparse(router="gshard"), tokens(3)
    with torch.no_grad():
        wide = with_capacity(layer, x, 1e9)
        torch.testing.assert_close(wide, layer(x), rtol=0, atol=1e-12)
        assert not independent(lambda y: with_capacity(layer, y), x)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("skew", [0, 30])
def test_no_token_is_lost_under_any_skew(router, skew):
    layer = sparse(router=router)
    y = layer(tokens(skew), noise())
    assert layer.ledger.counts.sum() == 2 * T
    if skew:
        assert layer.ledger.counts.max() > 0.9 * T  # everybody wants the same expert
    assert (y.abs().amax(-1) > 0).all()


# --- order and names ------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_permuted_tokens_with_their_noise_give_permuted_outputs(router):
    layer, x, keys = sparse(router=router), tokens(), noise()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    found = layer(x[:, order], keys[:, order])
    torch.testing.assert_close(found, layer(x, keys)[:, order], rtol=0, atol=1e-12)
    if layer.estimator.sampled:  # the noise belongs to the token, not to the place
        assert not torch.allclose(layer(x[:, order], keys), layer(x, keys)[:, order])


@pytest.mark.parametrize("router", ROUTERS)
def test_relabelled_experts_are_the_same_layer(router):
    layer, other = sparse(router=router), sparse(router=router)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for name in ("router.weight", "gate", "up", "down"):
            other.get_parameter(name).copy_(layer.get_parameter(name)[order])
    torch.testing.assert_close(other(tokens()), layer(tokens()), rtol=0, atol=1e-12)
    assert torch.equal(other.ledger.counts, layer.ledger.counts[order])


def test_equal_experts_are_one_mlp_times_the_sum_of_gates():
    layer = sparse()
    with torch.no_grad():
        for weight in (layer.gate, layer.up, layer.down):
            weight.copy_(weight[:1].expand_as(weight).clone())
    x = tokens()
    routing = layer._route(x.flatten(0, 1), noise().flatten(), None)
    one = F.linear(F.silu(F.linear(x, layer.gate[0])) * F.linear(x, layer.up[0]), layer.down[0])
    total = (routing.scale * routing.gate).sum(-1)[None, :, None]
    torch.testing.assert_close(layer(x, noise()), total * one, rtol=0, atol=1e-12)


# --- chance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["grin", "joint"])
def test_inference_takes_no_noise_and_training_does(router):
    layer, x = sparse(router=router), tokens()
    trained = [layer(x, noise(step=step)) for step in (0, 0, 1)]
    assert torch.equal(trained[0], trained[1])
    assert not torch.allclose(trained[0], trained[2])
    state = torch.get_rng_state()
    best = layer(x)
    layer.eval()
    assert torch.equal(layer(x, noise()), best)
    assert torch.equal(layer(x, noise(step=1)), best)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_is_not_counted():
    layer = sparse().eval()
    layer(tokens(), noise())
    assert layer.ledger.counts.sum() == 0


def test_layers_draw_different_noise():
    one, other = sparse(), sparse()
    assert torch.equal(one(tokens(), noise()), other(tokens(), noise()))
    other.layer = 4
    other.clear()
    assert not torch.allclose(one(tokens(), noise()), other(tokens(), noise()))


# --- precision ------------------------------------------------------------------------------


def test_the_router_is_float32_under_autocast():
    layer, x = sparse(router="gshard").float(), tokens().float()
    with torch.no_grad():
        layer.router.weight[1] = layer.router.weight[0] * (1 + 1e-4)  # a near tie
    routings = [layer._route(x.flatten(0, 1), None, None)]
    with torch.autocast("cpu", torch.bfloat16):
        routings.append(layer._route(x.flatten(0, 1), None, None))
        y = layer(x)
    assert torch.equal(routings[0].expert, routings[1].expert)
    assert torch.equal(routings[0].gate, routings[1].gate)
    assert routings[1].gate.dtype == torch.float32
    assert y.dtype == x.dtype
    exact = by_hand(sparse(router="gshard").float(), x)
    assert (y - layer(x)).norm() < 0.02 * exact.norm()


def test_gradients_are_those_of_finite_differences_in_inference():
    layer = sparse(router="gshard", balance=0, hidden=4).eval()
    x = tokens()[:, :4].requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    weights = list(layer.parameters())

    def of_weights(*values):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x.detach())

    assert torch.autograd.gradcheck(of_weights, weights)


# --- alone ----------------------------------------------------------------------------------


def test_it_trains_in_any_loop():
    layer = sparse(balance=0.01)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    target, losses = tokens().flip(-1), []
    for step in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(tokens(), noise(step=step)), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert math.isfinite(losses[-1])


MISTAKES = {
    r"jitter is 0\.5: with mask 'code' it must be at least 0 and below 0\.5": {"jitter": 0.5},
    r"jitter is 1\.0: with mask 'paper' it must be": {"jitter": 1.0, "mask": "paper"},
    r"top_k is 1: gshard divides by the sum": {"router": "gshard", "top_k": 1},
    r"top_k is 1: aux_free divides by the sum": {"router": "aux_free", "top_k": 1},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_router_that_makes_no_sense_is_refused_when_it_is_made(message):
    with pytest.raises(ValueError, match=message):
        sparse(**MISTAKES[message])
