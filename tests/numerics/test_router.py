"""Estimators by exact enumeration against the gradients of their stated objectives (T1 to T10)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from hakari.training.moe import router
from hakari.training.moe.estimators import ESTIMATORS, combine
from hakari.training.moe.router import (
    Routing,
    check_routing,
    mask_ratio,
    masked_weights,
    route,
    routing_at,
)
from hakari.training.noise import token_keys
from tests.numerics import enumerate_router as by_hand
from tests.numerics.enumerate_router import GRIN, JOINT, MIDPOINT, STAR, bias, problem

SAMPLED = [e for e in ESTIMATORS.values() if e.sampled]
FIXED = [e for e in ESTIMATORS.values() if not e.sampled]
SETTINGS = {"jitter": 0.3, "mask": "paper", "layer": 3}


torch.set_num_threads(1)  # small tensors: threads would wait for each other


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensor(*shape, seed=0):
    return random(*shape, seed=seed).requires_grad_()


def weighted(gate, outputs):
    return (gate[..., None] * outputs).sum(1)


def same_gradients(found, wanted, inputs):
    one, other = (torch.autograd.grad(z.tanh().sum(), inputs) for z in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def keys(tokens):
    return token_keys(1, 5, torch.arange(tokens))


@pytest.mark.parametrize("mask", ["paper", "code"])
@pytest.mark.parametrize("case", by_hand.EXACT.values(), ids=by_hand.EXACT)
def test_expected_gradient_is_the_gradient_of_the_stated_objective(case, mask):
    estimator, loss, top_k, objective = case
    p = problem(loss, seed=9, top_k=top_k, mask=mask)
    assert abs(by_hand.every_draw(p, estimator).weight.sum() - 1) < 1e-12
    assert len(by_hand.tuples(p)) > 3
    assert bias(p, estimator, objective) < 1e-12


@pytest.mark.parametrize("case", by_hand.MUTANTS.values(), ids=by_hand.MUTANTS)
def test_a_wrong_constant_is_caught(case):
    estimator, loss, top_k, objective = case
    assert bias(problem(loss, seed=9, top_k=top_k), estimator, objective) > 0.05


@pytest.mark.parametrize("estimator", [GRIN, JOINT, STAR], ids=lambda e: e.name)
def test_a_router_gradient_scaled_by_s_is_caught(estimator):
    p, objective = problem("linear", seed=9), "L" if estimator is STAR else "L-hat"
    assert bias(p, estimator, objective) < 1e-12
    assert bias(p, estimator, objective, by_hand.plain_derivative) > 0.05


@pytest.mark.parametrize(
    ("estimator", "loss", "objective"),
    [(GRIN, "cubic", "L-hat"), (STAR, "cubic", "L"), (MIDPOINT, "quadratic", "L")],
    ids=["grin", "grin_star", "sparsemixer"],
)
def test_the_argmax_rule_is_biased_by_the_predicted_amount(estimator, loss, objective):
    """T3: p_a (<f'(h_a), E_a> - [f(h_a) - f(0)] / p_a) dp_a."""
    p = problem(loss, seed=9)
    t = estimator.temperature
    prob = by_hand.slot_probabilities(p.logits, (), p, t)
    best = int(prob.argmax())
    h = (prob[best] * p.outputs[best]).requires_grad_()
    value = p.loss(h[None])[0]
    slope = torch.autograd.grad(value, h)[0] @ p.outputs[best]
    step = (value - p.loss(torch.zeros_like(h)[None])[0]) / prob[best]
    score = prob[best] * (torch.eye(len(prob))[best] - prob) / t
    predicted = prob[best] * (slope - step) * score
    found = by_hand.every_draw(p, estimator).mean() - by_hand.objective_gradient(p, objective, t)
    assert by_hand.distance(found, predicted) < 1e-10
    assert bias(p, estimator, objective) > 0.05


def test_grin_sees_half_of_the_gradient_of_L_if_the_loss_is_linear():
    p = problem("linear", seed=9)
    assert (
        by_hand.distance(2 * by_hand.every_draw(p, GRIN).mean(), by_hand.objective_gradient(p, "L"))
        < 1e-12
    )


def test_two_slots_alone_miss_the_predicted_term():
    """T5: sum_i dp_i E_{j|i} f(q_j E_j), what choosing i does to the second expert."""
    p = problem("linear", seed=9, top_k=2)
    logits = p.logits.clone().requires_grad_()
    first = by_hand.slot_probabilities(logits, (), p, 1.0)
    after = []
    for i in range(len(first)):
        q = by_hand.slot_probabilities(p.logits, (i,), p, 1.0)
        after.append(q @ p.loss(q[:, None] * p.outputs))
    missing = torch.autograd.grad(first @ torch.stack(after), logits)[0]
    wanted = by_hand.objective_gradient(p, "L-hat")
    assert missing.norm() > 0.05 * wanted.norm()
    assert by_hand.distance(by_hand.every_draw(p, GRIN).mean(), wanted - missing) < 1e-12


def test_heun_without_the_argmax_rule_is_nearly_exact_where_it_is_not_exact():
    """The table of section 2.3, by its ordering: median over six random problems."""

    def median(estimator, loss, objective):
        problems = [problem(loss, seed, experts=8, jitter=0.5) for seed in range(6)]
        return float(np.median([bias(p, estimator, objective) for p in problems]))

    euler = replace(GRIN, coin=1.0, shrunk=1.0, delta=False)
    for loss in ("tanh", "cross_entropy"):
        plain, released = median(euler, loss, "L-hat"), median(GRIN, loss, "L-hat")
        heun, star = (
            median(by_hand.no_delta(GRIN), loss, "L-hat"),
            median(by_hand.no_delta(STAR), loss, "L"),
        )
        assert heun < 0.2 * released < released < plain
        assert star < 0.2 * median(STAR, loss, "L")
        assert 0.4 < median(GRIN, loss, "L") < 0.6


@pytest.mark.parametrize("estimator", [GRIN, STAR, JOINT], ids=lambda e: e.name)
def test_the_sampler_has_the_enumerated_mean(estimator):
    """T6: 20,000 tokens through `route`, within 5 standard errors."""
    p = problem("cross_entropy", seed=9, top_k=2)
    draws, n = by_hand.every_draw(p, estimator), 20_000
    logits = p.logits.expand(n, -1).clone().requires_grad_()
    r = route(logits, estimator, top_k=2, noise=keys(n), **SETTINGS)
    p.loss(combine(p.outputs[r.expert], r, estimator)).sum().backward()
    mean = draws.mean()
    variance = draws.weight @ (draws.logits - mean).square()
    assert ((logits.grad.mean(0) - mean).abs() <= 5 * (variance / n).sqrt() + 1e-15).all()
    assert (variance / n).sqrt().norm() < 0.1 * mean.norm()


def pair_counts(estimator):
    """Chi-square of the pairs drawn over its 99.99 % point."""
    p, n, t = problem("linear", seed=1, top_k=2), 40_000, estimator.temperature
    r = route(p.logits.expand(n, -1), estimator, top_k=2, noise=keys(n), **SETTINGS)
    pairs = by_hand.tuples(p)
    wanted = torch.stack([by_hand.gates(p.logits, e, p, t).prod() for e in pairs]) * n
    found = torch.tensor([float((r.expert == torch.tensor(e)).all(-1).sum()) for e in pairs])
    assert found.sum() == n
    return ((found - wanted) ** 2 / wanted).sum() / chi2.ppf(0.9999, len(pairs) - 1)


@pytest.mark.parametrize("estimator", [GRIN, STAR], ids=lambda e: e.name)
def test_pairs_are_drawn_with_their_probabilities(estimator, monkeypatch):
    """T7, and a race of uniforms instead of exponentials is caught."""
    assert pair_counts(estimator) < 1
    monkeypatch.setattr(router, "draw", lambda w, u: (w / u).max(-1, keepdim=True).indices)
    assert pair_counts(estimator) > 1


@pytest.mark.parametrize("mask", ["paper", "code"])
def test_no_masked_expert_is_drawn_and_none_twice(mask):
    """T7."""
    logits = random(3000, 8)
    r = route(logits, GRIN, top_k=3, jitter=0.3, mask=mask, noise=keys(3000), layer=0)
    assert (r.gate > 0).all()
    assert all(len(set(e)) == 3 for e in r.expert.tolist())
    for z, e in list(zip(logits.tolist(), r.expert.tolist(), strict=True))[:500]:
        assert all(by_hand.kept(z, tuple(e[:k]), 0.3, mask)[e[k]] for k in range(3))


def test_coins_have_the_estimators_probability():
    n, logits = 40_000, torch.zeros(40_000, 4)
    for estimator in (by_hand.no_delta(e) for e in SAMPLED):
        r = route(logits, estimator, top_k=2, noise=keys(n), **SETTINGS)
        full = (r.scale == 1).double().mean(0)
        error = (estimator.coin * (1 - estimator.coin) / n) ** 0.5
        assert ((full - estimator.coin).abs() < 5 * error).all()
        assert set(r.scale.unique().tolist()) == {1.0, float(torch.tensor(estimator.shrunk))}
        same = (r.scale[:, 0] == r.scale[:, 1]).all()
        assert bool(same) == estimator.joint


@pytest.mark.parametrize("estimator", SAMPLED, ids=lambda e: e.name)
def test_gradients_at_given_draws_are_the_formulas(estimator):
    """T8 and T10: routers get c <g, E_D> p_D (e_D - p) / t, experts p g or s p g."""
    p = problem("cross_entropy", seed=2, top_k=2)
    draws, t = by_hand.every_draw(p, estimator), estimator.temperature
    r = draws.routing
    for row in range(0, len(draws.weight), 5):
        experts = tuple(r.expert[row].tolist())
        logits = p.logits.clone().requires_grad_()
        gate = by_hand.gates(logits, experts, p, t)
        outputs, s = p.outputs[list(experts)], r.scale[row]
        y = ((s * gate.detach()) @ outputs).requires_grad_()
        g = torch.autograd.grad(p.loss(y[None])[0], y)[0]
        if estimator.joint:
            seen = (g @ (gate.detach() @ outputs)) * gate.log().sum()
        else:
            seen = estimator.factor * (outputs @ g) @ gate
        wanted = torch.autograd.grad(seen, logits)[0]
        torch.testing.assert_close(draws.logits[row], wanted, rtol=1e-12, atol=1e-13)
        weight = gate if estimator.expert_gradient == "paper" else s * gate
        wanted = weight.detach()[:, None] * g
        torch.testing.assert_close(draws.outputs[row], wanted, rtol=1e-12, atol=1e-14)
    assert (r.scale != 1).any()


def test_only_the_expert_gradient_tells_algorithm_1_from_the_released_code():
    p = problem("cross_entropy", seed=2, top_k=2)
    code, paper = by_hand.every_draw(p, GRIN), by_hand.every_draw(p, ESTIMATORS["grin_paper"])
    assert torch.equal(code.logits, paper.logits)
    torch.testing.assert_close(code.outputs, paper.outputs * code.routing.scale[..., None])


@pytest.mark.parametrize("estimator", SAMPLED, ids=lambda e: e.name)
def test_inference_takes_the_best_and_draws_nothing(estimator):
    """T9."""
    logits, state = random(200, 8), torch.get_rng_state()
    r, again = (route(logits, estimator, top_k=2, noise=None, **SETTINGS) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(r.expert, logits.topk(2).indices)
    assert torch.equal(r.expert, again.expert)
    assert torch.equal(r.gate, again.gate)
    coins = torch.ones(200, 1, dtype=torch.bool)
    ratio, best = mask_ratio(0.3, "paper"), lambda slot, z, w: z.argmax(-1, keepdim=True)
    assert torch.equal(routing_at(logits, estimator, ratio, 2, best, coins).gate, r.gate)
    assert (r.scale == 1).all()


@pytest.mark.parametrize("estimator", SAMPLED, ids=lambda e: e.name)
def test_inference_keeps_the_mask_and_has_the_plain_derivative(estimator):
    """T9."""
    inputs = logits, outputs = tensor(200, 8), tensor(200, 2, 5, seed=1)
    r = route(logits, estimator, top_k=2, noise=None, **SETTINGS)
    literal = by_hand.all_gates(logits, r.expert, estimator.temperature)
    torch.testing.assert_close(r.gate, literal, rtol=1e-13, atol=1e-15)
    same_gradients(combine(outputs, r, estimator), weighted(literal, outputs), inputs)


def test_training_leaves_torchs_generator_alone_and_does_not_depend_on_the_split():
    logits, state = random(300, 8), torch.get_rng_state()
    for estimator in SAMPLED:
        whole = route(logits, estimator, top_k=2, noise=keys(300), **SETTINGS)
        for part in (slice(0, 100), slice(100, 300)):
            r = route(logits[part], estimator, top_k=2, noise=keys(300)[part], **SETTINGS)
            assert torch.equal(r.expert, whole.expert[part])
            assert torch.equal(r.scale, whole.scale[part])
            assert torch.equal(r.gate, whole.gate[part])
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_slots_and_steps_draw_differently():
    logits, route_at = torch.zeros(500, 8), {"jitter": 0.1, "mask": "code", "top_k": 2}
    noise = [keys(500), keys(500), token_keys(1, 6, torch.arange(500))]
    a, b, c = (
        route(logits, GRIN, noise=n, layer=layer, **route_at).expert
        for n, layer in zip(noise, (0, 1, 0), strict=True)
    )
    for x, y in itertools.combinations((a, b, c), 2):
        assert 0.06 < (x == y).double().mean() < 0.19


FORMULAS = {
    "gshard": lambda z, e: z.softmax(-1).gather(-1, e),
    "aux_free": lambda z, e: z.sigmoid().gather(-1, e),
    "switch": lambda z, e: z.softmax(-1).gather(-1, e),
}


@pytest.mark.parametrize("estimator", FIXED, ids=lambda e: e.name)
@pytest.mark.parametrize("noise", [None, keys(60)], ids=["inference", "training"])
def test_routers_that_do_not_sample_are_their_formulas(estimator, noise):
    logits, outputs = tensor(60, 8), random(60, 8, 5, seed=1)
    top_k = 1 if estimator.name == "switch" else 3
    added = random(8, seed=2) if estimator.name == "aux_free" else None
    r = route(logits, estimator, top_k=top_k, noise=noise, bias=added, **SETTINGS)
    scores = logits.detach() if added is None else logits.detach().sigmoid() + added
    assert torch.equal(r.expert, scores.topk(top_k).indices)
    gate = FORMULAS[estimator.name](logits, r.expert)
    gate = gate if estimator.name == "switch" else gate / gate.sum(-1, keepdim=True)
    p = logits.sigmoid() if added is not None else logits.softmax(-1)
    torch.testing.assert_close(r.probability, (p / p.sum(-1, keepdim=True)).detach())
    torch.testing.assert_close(r.gate, gate)
    assert (r.scale == 1).all()
    assert not r.singleton.any()
    chosen = outputs.gather(1, r.expert[..., None].expand(-1, -1, 5))
    same_gradients(combine(chosen, r, estimator), weighted(gate, chosen), (logits,))


@pytest.mark.parametrize("training", [True, False])
def test_grin_is_the_code_released_with_phi_moe(training):
    """transformers' own draws and scales, stated to our router; it writes 1/3 as 0.3333f."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    released = replace(GRIN, shrunk=float(torch.tensor(0.3333)))
    inputs = logits, outputs = tensor(2000, 8), tensor(2000, 2, 5, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight, expert = sparsemixer(logits, 0.1, training)
    ratio, choose = mask_ratio(0.1, "code"), lambda slot, *_: expert[:, slot, None]
    if training:
        none = torch.zeros(2000, 2, dtype=torch.bool)
        coins = weight > 0.5 * routing_at(logits, released, ratio, 2, choose, none).gate
        r = routing_at(logits, released, ratio, 2, choose, coins)
        assert (r.scale != 1).double().mean() > 0.05
    else:
        r = route(logits, released, top_k=2, jitter=0.1, mask="code", noise=None, layer=0)
        assert torch.equal(r.expert, expert)
    torch.testing.assert_close(r.gate * r.scale, weight, rtol=1e-12, atol=0)
    same_gradients(combine(outputs, r, released), weighted(weight, outputs), inputs)


@pytest.mark.parametrize("mask", ["paper", "code"])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_the_mask_is_its_inequality(mask, shift):
    logits = random(400, 8) + shift
    for jitter in (0.0, 0.01, 0.1, 0.4):
        weight, top, count = masked_weights(logits, mask_ratio(jitter, mask), 1.0)
        literal = torch.tensor([by_hand.kept(z, (), jitter, mask) for z in logits.tolist()])
        assert torch.equal(weight > 0, literal)
        assert torch.equal(top[:, 0], logits.max(-1).values)
        assert torch.equal(count[:, 0], literal.double().sum(-1))


def test_equal_logits_are_all_candidates_and_a_largest_logit_of_zero_is_alone():
    logits = torch.tensor([[0.0, 0, 0, 0], [0, -1, -2, -1e-9], [2, 2, 2, 2], [-2, -2, -2, -2]])
    r = route(logits, GRIN, top_k=2, noise=keys(4), **SETTINGS)
    torch.testing.assert_close(r.gate[[0, 2, 3]], torch.tensor([[1 / 4, 1 / 3]] * 3))
    assert r.gate[1].tolist() == [1, 1]
    assert r.singleton.tolist() == [[False, False], [True, True], [False, False], [False, False]]
    assert r.expert[1].tolist() == [0, 3]


@pytest.mark.parametrize("estimator", SAMPLED, ids=lambda e: e.name)
def test_a_token_with_one_candidate_sends_nothing_to_its_router(estimator):
    logits = random(500, 8).requires_grad_()
    r = route(logits, estimator, top_k=1, jitter=0.05, mask="code", noise=keys(500), layer=0)
    combine(random(500, 1, 5, seed=1), r, estimator).square().sum().backward()
    silent = (logits.grad == 0).all(-1)
    assert torch.equal(silent, r.singleton[:, 0])
    assert 0.2 < silent.double().mean() < 0.95


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=lambda e: e.name)
def test_one_expert_is_a_dense_layer_in_inference(estimator):
    output = random(7, 1, 5)
    for noise in (None, keys(7)):
        r = route(random(7, 1), estimator, top_k=1, noise=noise, **SETTINGS)
        assert r.singleton.all()
        assert (r.gate == 1).all()
        if noise is None or estimator.name != "joint":  # no argmax rule: its coin still shrinks
            assert torch.equal(combine(output, r, estimator), output[:, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=lambda e: e.name)
def test_a_value_that_is_not_finite_stays_with_its_token_and_names_valid_experts(estimator, value):
    """The layer's finite check finds it in the logits."""
    logits = random(6, 4)
    logits[2, 1] = value
    top_k = 1 if estimator.name == "switch" else 2
    r = route(logits, estimator, top_k=top_k, noise=keys(6), **SETTINGS)
    assert ((r.expert >= 0) & (r.expert < 4)).all()
    assert r.gate.isfinite().all(-1).tolist() != [True] * 6 or estimator.name == "aux_free"
    assert r.gate[[0, 1, 3, 4, 5]].isfinite().all()


def test_combine_keeps_the_dtype_of_the_experts_and_sums_the_gates_gradient_in_float32():
    logits = random(50, 8, dtype=torch.float32).requires_grad_()
    output = random(50, 2, 64, dtype=torch.bfloat16).requires_grad_()
    r = route(logits, GRIN, top_k=2, noise=keys(50), **SETTINGS)
    assert r.gate.dtype == r.scale.dtype == r.probability.dtype == torch.float32
    y = combine(output, r, GRIN)
    g = random(50, 64, seed=1, dtype=torch.bfloat16)
    found, experts = torch.autograd.grad(y, (r.gate, output), g)
    assert (y.dtype, found.dtype, experts.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    wanted = (output.double() * g[:, None].double()).sum(-1)
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


REFUSED = {
    "top_k is 0: with 4 experts it must be in 1 .. 4": {"top_k": 0},
    "top_k is 5: with 4 experts it must be in 1 .. 4": {"top_k": 5},
    "top_k is 2: switch uses one expert per token": {"name": "switch"},
    "top_k is 1: gshard divides by the sum": {"name": "gshard", "top_k": 1},
    "top_k is 1: aux_free divides by the sum": {"name": "aux_free", "top_k": 1},
    "mask is 'eq2': it must be 'code' or 'paper'": {"mask": "eq2"},
    "jitter is -0.1: with mask 'code' it must be at least 0 and below 0.5": {"jitter": -0.1},
    "jitter is 0.5: with mask 'code'": {"jitter": 0.5},
    "jitter is 1.0: with mask 'paper'": {"jitter": 1.0, "mask": "paper"},
    "jitter is nan": {"jitter": float("nan")},
    "logits have dtype torch.bfloat16": {"logits": torch.zeros(3, 4, dtype=torch.bfloat16)},
    r"noise has shape \(2,\): 3 tokens need \(3,\)": {"noise": keys(2)},
    "grin got a selection bias": {"bias": torch.zeros(4)},
    r"bias has shape \(3,\): 4 experts": {"name": "aux_free", "bias": torch.zeros(3)},
}


@pytest.mark.parametrize(("message", "change"), REFUSED.items())
def test_what_makes_no_sense_is_refused(message, change):
    options = {"top_k": 2, "jitter": 0.1, "mask": "code", "noise": keys(3), "layer": 0} | change
    estimator = ESTIMATORS[options.pop("name", "grin")]
    with pytest.raises(ValueError, match=message):
        route(options.pop("logits", torch.zeros(3, 4)), estimator, **options)


def test_a_config_can_be_checked_before_there_are_logits():
    check_routing(GRIN, top_k=2, experts=8, jitter=0.1, mask="code")
    with pytest.raises(ValueError, match="jitter is 2"):
        check_routing(GRIN, top_k=2, experts=8, jitter=2, mask="code")
    with pytest.raises(ValueError, match=r"mine: coin is 1\.5"):
        replace(GRIN, name="mine", coin=1.5)


def routed(logits, output, noise, layer) -> tuple[torch.Tensor, Routing]:
    r = route(logits, GRIN, top_k=2, jitter=0.3, mask="code", noise=noise, layer=layer)
    return combine(output, r, GRIN), r


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's and Inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_routing_compiles_without_a_break(backend):
    compiled = torch.compile(routed, backend=backend, fullgraph=True)
    inputs = tensor(64, 8), tensor(64, 2, 5, seed=1)
    for noise, layer in ((keys(64), torch.tensor(3)), (None, torch.tensor(0))):
        (y, r), (z, s) = (f(*inputs, noise, layer) for f in (routed, compiled))
        assert torch.equal(r.expert, s.expert)
        assert torch.equal(r.scale, s.scale)
        torch.testing.assert_close(y, z)
        same_gradients(y, z, inputs)
