"""The expected gradient of an estimator by enumeration, and the objectives by their definition.

Expectations run over every ordered tuple of experts and every pattern of coins, through the
shipped `routing_at` and `combine`; their probabilities, the masks and the objectives are written
out here from the equations of mixture-of-experts.md section 2, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hakari.training.moe.estimators import ESTIMATORS, Estimator, combine
from hakari.training.moe.router import Routing, mask_ratio, routing_at

WIDTH = 6
GRIN, STAR, MIDPOINT, JOINT = (ESTIMATORS[n] for n in ("grin", "grin_star", "sparsemixer", "joint"))
Loss = Callable[[Tensor], Tensor]
Combine = Callable[[Tensor, Routing, Estimator], Tensor]


@dataclass(frozen=True)
class Problem:
    """One token: its logits [E], its experts' outputs [E, D], the loss of a sum of outputs."""

    logits: Tensor
    outputs: Tensor
    loss: Loss
    top_k: int = 1
    jitter: float = 0.3
    mask: str = "paper"


def problem(kind: str, seed: int = 0, experts: int = 6, **options) -> Problem:
    """Random logits, most of which survive the mask, random experts and loss."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    logits = 2.5 + 0.8 * normal(experts)
    return Problem(logits, normal(experts, WIDTH), LOSSES[kind](normal), **options)


def linear(normal) -> Loss:
    a = normal(WIDTH)
    return lambda h: 0.7 + h @ a


def quadratic(normal) -> Loss:
    a, b = normal(2, WIDTH)
    return lambda h: 0.7 + h @ a + (h @ b) ** 2


def cubic(normal) -> Loss:
    a, b, c = normal(3, WIDTH)
    return lambda h: 0.7 + h @ a + (h @ b) ** 2 + (h @ c) ** 3


def tanh(normal) -> Loss:
    inner, a = normal(WIDTH, WIDTH), normal(WIDTH)
    return lambda h: torch.tanh(h @ inner) @ a


def cross_entropy(normal) -> Loss:
    x, head = normal(WIDTH), normal(WIDTH, 10)

    def loss(h: Tensor) -> Tensor:
        stream = x + h
        normed = stream * (stream.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return -(normed @ head).log_softmax(-1)[:, 0]

    return loss


LOSSES = {f.__name__: f for f in (linear, quadratic, cubic, tanh, cross_entropy)}


def kept(logits: list[float], banned: tuple[int, ...], jitter: float, mask: str) -> list[bool]:
    """The mask, candidate by candidate: Eq 2 of GRIN, or the released code's inequality."""
    top = max(z for i, z in enumerate(logits) if i not in banned)

    def near(z: float) -> bool:
        if mask == "paper":
            return top - z <= jitter * (abs(z) + abs(top))
        size = max(abs(z), top)
        return size == 0 or (top - z) / size <= 2 * jitter

    return [i not in banned and near(z) for i, z in enumerate(logits)]


def slot_probabilities(logits: Tensor, banned: tuple[int, ...], p: Problem, t: float) -> Tensor:
    """Softmax over the kept candidates, differentiable."""
    keep = torch.tensor(kept(p.logits.tolist(), banned, p.jitter, p.mask))
    return (logits / t).masked_fill(~keep, -torch.inf).softmax(-1)


def gates(logits: Tensor, experts: tuple[int, ...], p: Problem, t: float) -> Tensor:
    """Probability of each expert of a tuple, given those before it: [K]."""
    slots = [slot_probabilities(logits, experts[:k], p, t)[e] for k, e in enumerate(experts)]
    return torch.stack(slots)


def all_gates(logits: Tensor, expert: Tensor, t: float) -> Tensor:
    """`gates` of many tokens, with the mask of a `Problem` as it comes."""
    rows = zip(logits, map(tuple, expert.tolist()), strict=True)
    blank = Problem(logits, logits, torch.sum)
    return torch.stack([gates(z, chosen, replace(blank, logits=z), t) for z, chosen in rows])


def tuples(p: Problem) -> list[tuple[int, ...]]:
    """Ordered tuples of experts that can be drawn."""
    every = itertools.permutations(range(len(p.logits)), p.top_k)
    return [e for e in every if bool((gates(p.logits, e, p, 1.0) > 0).all())]


def objective_gradient(p: Problem, objective: str, temperature: float = 1.0) -> Tensor:
    """Gradient of L ("L", Eq 4) or of L-hat ("L-hat", Eq 7, gate's value fixed) by definition."""
    logits = p.logits.clone().requires_grad_()
    total = logits.new_zeros(())
    for experts in tuples(p):
        gate = gates(logits, experts, p, temperature)
        value = gate.detach() if objective == "L-hat" else gate
        total = total + gate.prod() * p.loss((value @ p.outputs[list(experts)])[None])[0]
    return torch.autograd.grad(total, logits)[0]


@dataclass(frozen=True)
class Draws:
    """Every draw, a row each: probability [N], routing, gradients of logits and of outputs."""

    weight: Tensor
    routing: Routing
    logits: Tensor
    outputs: Tensor

    def mean(self) -> Tensor:
        """Expected gradient of the logits."""
        return self.weight @ self.logits


def every_draw(p: Problem, estimator: Estimator, combine: Combine = combine) -> Draws:
    """The estimator's gradient at every draw and coin, by the shipped functions."""
    coins = list(itertools.product((True, False), repeat=1 if estimator.joint else p.top_k))
    rows = list(itertools.product(tuples(p), coins))
    expert = torch.tensor([row[0] for row in rows])
    toss = torch.tensor([row[1] for row in rows])
    weight = torch.stack(
        [
            gates(p.logits, e, p, estimator.temperature).prod() * chance(c, estimator)
            for e, c in rows
        ]
    )
    logits = p.logits.expand(len(rows), -1).clone().requires_grad_()
    outputs = p.outputs[expert].requires_grad_()
    routing = stated(logits, estimator, p, expert, toss)
    loss = p.loss(combine(outputs, routing, estimator)).sum()
    return Draws(weight, routing, *torch.autograd.grad(loss, (logits, outputs)))


def stated(logits: Tensor, estimator: Estimator, p: Problem, expert: Tensor, toss: Tensor):
    """The shipped routing at stated experts and coins."""
    ratio = mask_ratio(p.jitter, p.mask)
    return routing_at(
        logits, estimator, ratio, p.top_k, lambda slot, *_: expert[:, slot, None], toss
    )


def chance(coins: tuple[bool, ...], estimator: Estimator) -> float:
    """Probability of a pattern of coins."""
    return math.prod(estimator.coin if coin else 1 - estimator.coin for coin in coins)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to the wanted gradient's norm."""
    return float(((found - wanted).norm() / wanted.norm()).detach())


def bias(p: Problem, estimator: Estimator, objective: str, combine: Combine = combine) -> float:
    """Relative error of the expected gradient."""
    wanted = objective_gradient(p, objective, estimator.temperature)
    return distance(every_draw(p, estimator, combine).mean(), wanted)


def no_delta(estimator: Estimator) -> Estimator:
    return replace(estimator, delta=False)


def plain_derivative(output, routing, estimator):
    """Autograd's: the router's gradient is scaled by s."""
    return ((routing.scale * routing.gate)[..., None] * output).sum(1)


# estimator, loss, top_k, objective: exact in theory
EXACT = {  # T1, T2, T4, and the joint half of T5
    "grin, linear": (GRIN, "linear", 1, "L-hat"),
    "grin_paper, linear": (ESTIMATORS["grin_paper"], "linear", 1, "L-hat"),
    "grin without the argmax rule, cubic": (no_delta(GRIN), "cubic", 1, "L-hat"),
    "sparsemixer, linear": (MIDPOINT, "linear", 1, "L"),
    "sparsemixer without the argmax rule, quadratic": (no_delta(MIDPOINT), "quadratic", 1, "L"),
    "grin_star, linear": (STAR, "linear", 1, "L"),
    "grin_star without the argmax rule, cubic": (no_delta(STAR), "cubic", 1, "L"),
    "joint, one expert, cubic": (JOINT, "cubic", 1, "L-hat"),
    "joint, pairs, linear": (JOINT, "linear", 2, "L-hat"),
    "joint, pairs, cubic": (JOINT, "cubic", 2, "L-hat"),
    "joint, triples, cubic": (JOINT, "cubic", 3, "L-hat"),
}

# the same with something wrong
MUTANTS = {
    "fair coin": (replace(no_delta(GRIN), coin=1 / 2), "cubic", 1, "L-hat"),
    "half scale": (replace(no_delta(GRIN), shrunk=1 / 2), "cubic", 1, "L-hat"),
    "factor on L-hat": (replace(GRIN, factor=2.0), "linear", 1, "L-hat"),
    "temperature without factor": (replace(STAR, factor=1.0), "linear", 1, "L"),
    "coin of L-hat for L": (replace(no_delta(STAR), coin=1 / 4), "cubic", 1, "L"),
    "no factor at the mid-point": (replace(MIDPOINT, factor=1.0), "linear", 1, "L"),
    "wrong objective": (no_delta(GRIN), "cubic", 1, "L"),
    "slots each alone": (replace(JOINT, joint=False), "cubic", 2, "L-hat"),
    "argmax rule on pairs": (replace(JOINT, delta=True), "cubic", 2, "L-hat"),
}
