"""Which experts a token visits, with what probability, and at what scale.

mixture-of-experts.md sections 2.1 and 2.2. Shapes: T tokens, E experts, K experts per token.
A sampled router draws slot by slot: mask the logits, draw, ban what was drawn. The draws and
coins enter as stated tensors below `route`, so every estimator can be tested on given ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from hakari.training.moe.estimators import Estimator
from hakari.training.noise import uniforms

Mask = Literal["code", "paper"]
Choose = Callable[[int, Tensor, Tensor], Tensor]
"""(slot, open logits [T, E], weights [T, E]) -> experts [T, 1]."""

_COINS = 2**20  # slot of the noise that tosses the coins; the draws use slots 0 .. K - 1


@dataclass(frozen=True)
class Routing:
    """Where the tokens go, for `estimators.combine`, the experts and the balance."""

    expert: Int64[Tensor, "T K"]
    gate: Float[Tensor, "T K"]
    """Differentiable probability, or weight, of the chosen expert."""
    scale: Float[Tensor, "T K"]
    """s: 1, or the estimator's shrunk scale."""
    probability: Float[Tensor, "T E"]
    """Softmax over all experts without mask and temperature; sigmoids over their sum (aux_free)."""
    singleton: Bool[Tensor, "T K"]
    """No other candidate had a chance, so that the loss says nothing to the router here."""
    sampled: bool
    """Experts were drawn, so that `combine` applies the estimator; not in inference."""


def route(
    logits: Float[Tensor, "T E"],
    estimator: Estimator,
    *,
    top_k: int,
    jitter: float,
    mask: Mask,
    noise: Int64[Tensor, " T"] | None,
    layer: int | Int64[Tensor, ""],
    bias: Float[Tensor, " E"] | None = None,
) -> Routing:
    """Choose `top_k` experts for each token.

    logits: float32 or float64, from which all results have their dtype. Values that are not
    finite do not raise here, and name valid experts: the layer checks the logits.
    jitter, mask: width and formula of the mask of a sampled estimator, in inference too; see
    `mask_ratio`. Others ignore them.
    noise: keys from `noise.token_keys`; None is inference: the best experts, s = 1.
    layer: which of the layers this is, part of the noise's key.
    bias: added to the sigmoids of aux_free when experts are selected, not in the gate.

    Raises ValueError as `check_routing` does, for logits narrower than float32, and for noise or
    bias of a wrong shape.

    >>> from hakari.training.moe.estimators import ESTIMATORS
    >>> options = {"top_k": 2, "jitter": 0.1, "mask": "code", "noise": None, "layer": 0}
    >>> r = route(torch.tensor([[2.0, 1.9, -1.0]]), ESTIMATORS["grin"], **options)
    >>> r.expert.tolist(), r.singleton.tolist()
    ([[0, 1]], [[False, True]])
    """
    check_routing(estimator, top_k=top_k, experts=logits.shape[-1], jitter=jitter, mask=mask)
    _check_tensors(logits, estimator, noise, bias)
    if not estimator.sampled:
        return _best(logits, estimator, top_k, bias)
    ratio = mask_ratio(jitter, mask)
    if noise is None:
        return routing_at(logits, estimator, ratio, top_k, lambda slot, z, weight: _argmax(z), None)
    tosses = uniforms(noise, layer, _COINS, 1 if estimator.joint else top_k)

    def drawn(slot: int, z: Tensor, weight: Tensor) -> Tensor:
        return draw(weight, uniforms(noise, layer, slot, z.shape[-1]))

    return routing_at(logits, estimator, ratio, top_k, drawn, tosses < estimator.coin)


def check_routing(
    estimator: Estimator, *, top_k: int, experts: int, jitter: float, mask: Mask
) -> None:
    """Refuse a combination that makes no sense.

    Raises ValueError if top_k is not in 1 .. experts; if it is 1 where the gate would then be
    constant, or more than 1 for switch; or if `mask_ratio` refuses the jitter or the mask.
    """
    name = estimator.name
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}: with {experts} experts it must be in 1 .. {experts}")
    if estimator.gate == "full" and top_k > 1:
        raise ValueError(f"top_k is {top_k}: {name} uses one expert per token; try gshard or grin")
    if estimator.gate in ("renormalised", "sigmoid") and top_k == 1 < experts:
        raise ValueError(
            f"top_k is 1: {name} divides by the sum over the chosen, so that one expert's gate "
            "is always 1 and the router never learns; take top_k = 2, or switch or grin"
        )
    if estimator.sampled:
        mask_ratio(jitter, mask)


def mask_ratio(jitter: float, mask: Mask) -> float:
    """The share of the largest logit that a candidate must reach, from the jitter r.

    Noise z_i U(1 - r, 1 + r) can make expert i the largest if z* - z_i <= r (|z_i| + |z*|), Eq 2
    of GRIN ("paper"); the released code has (z* - z_i) / max(|z_i|, z*) <= 2 r ("code"). Either
    keeps z_i >= a z* if z* > 0 and z_i >= z* / a if not, with a = (1 - r) / (1 + r) or 1 - 2 r.

    Raises ValueError for an unknown mask, or a jitter below 0 or so large that a would not
    be positive.

    >>> mask_ratio(0.25, "code"), mask_ratio(0.25, "paper")
    (0.5, 0.6)
    """
    if mask not in ("code", "paper"):
        raise ValueError(f"mask is {mask!r}: it must be 'code' or 'paper'")
    most = 0.5 if mask == "code" else 1.0
    if not 0 <= jitter < most:
        raise ValueError(
            f"jitter is {jitter}: with mask {mask!r} it must be at least 0 and below {most}"
        )
    return 1 - 2 * jitter if mask == "code" else (1 - jitter) / (1 + jitter)


def routing_at(
    logits: Float[Tensor, "T E"],
    estimator: Estimator,
    ratio: float,
    top_k: int,
    choose: Choose,
    coins: Bool[Tensor, "T _"] | None,
) -> Routing:
    """The routing of a sampled estimator at stated draws and coins.

    ratio: from `mask_ratio`. choose: names the experts of a slot, given its open logits (minus
    infinity where banned) and its weights from `masked_weights`. coins: true for the full scale,
    a column per slot, or one in all for a joint estimator; None in inference.
    """
    open_logits = logits.detach()
    experts: list[Tensor] = []
    weights: list[Tensor] = []
    best: list[Tensor] = []
    alone: list[Tensor] = []
    for slot in range(top_k):
        if slot:
            open_logits = open_logits.scatter(-1, experts[-1], -torch.inf)
        weight, top, candidates = masked_weights(open_logits, ratio, estimator.temperature)
        experts.append(choose(slot, open_logits, weight))
        weights.append(weight)
        best.append(open_logits.gather(-1, experts[-1]) == top)
        alone.append(candidates == 1)
    expert = torch.cat(experts, -1)
    return Routing(
        expert,
        _Gates.apply(logits, expert, estimator.temperature, *weights),
        scales(torch.cat(best, -1), coins, estimator, logits.dtype),
        _softmax(logits.detach()),
        torch.cat(alone, -1),
        sampled=coins is not None,
    )


def masked_weights(
    logits: Float[Tensor, "T E"], ratio: float, temperature: float
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T 1"], Float[Tensor, "T 1"]]:
    """MaskedSoftmax: exp((z - z*) / temperature), 0 where masked; z*; the number of candidates.

    Divide the weights by their sum for the probabilities. The best is always a candidate; equal
    logits all are. Against the released code, equal but for logits within rounding of the mask.
    """
    top = logits.amax(-1, keepdim=True)
    # the smaller is top * ratio if top > 0, top / ratio if not
    kept = logits.clone().ge_(torch.minimum(top * ratio, top / ratio))
    weight = logits - top
    if temperature != 1.0:
        weight.div_(temperature)
    return weight.exp_().mul_(kept), top, kept.sum(-1, keepdim=True)


def draw(weight: Float[Tensor, "T E"], uniform: Float[Tensor, "T E"]) -> Int64[Tensor, "T 1"]:
    """Draw an expert per token, each with probability in proportion to its weight.

    Gumbel-max, argmax(log w - log(-log u)), with one logarithm less: the race argmax(w / -log u).
    A weight of 0 is never drawn.
    """
    return (weight / uniform.to(weight.dtype).log()).min(-1, keepdim=True).indices


def scales(
    best: Bool[Tensor, "T K"],
    coins: Bool[Tensor, "T _"] | None,
    estimator: Estimator,
    dtype: torch.dtype,
) -> Float[Tensor, "T K"]:
    """The scales s at stated coins. best: whether a slot drew its most probable expert."""
    scale = torch.full(best.shape, estimator.shrunk, dtype=dtype, device=best.device)
    if coins is None:
        return scale.fill_(1.0)
    if estimator.delta:
        coins = coins | (best.all(-1, keepdim=True) if estimator.joint else best)
    return scale.masked_fill_(coins, 1.0)


class _Gates(torch.autograd.Function):
    """The probabilities of the chosen, from the weights of each slot's softmax.

    Backward: dp_D/dz = p_D (e_D - p) / temperature, summed over the slots. Autograd through the
    masks would keep and pass over several [T, E] tensors more.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, expert: Tensor, temperature: float, *weights: Tensor
    ) -> Tensor:
        total = torch.cat([weight.sum(-1, keepdim=True) for weight in weights], -1)
        drawn = [w.gather(-1, expert[:, k, None]) for k, w in enumerate(weights)]
        gate = torch.cat(drawn, -1) / total
        ctx.save_for_backward(expert, total, gate, *weights)
        ctx.temperature = temperature
        return gate

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        expert, total, gate, *weights = ctx.saved_tensors
        score = gradients[0] * gate / ctx.temperature
        share = -score / total
        result = weights[0] * share[:, :1]
        for k, weight in enumerate(weights[1:], start=1):
            result.addcmul_(weight, share[:, k, None])
        return result.scatter_add_(-1, expert, score), None, None, *[None] * len(weights)


def _best(
    logits: Float[Tensor, "T E"],
    estimator: Estimator,
    top_k: int,
    bias: Float[Tensor, " E"] | None,
) -> Routing:
    """The routing of an estimator that does not sample: the K largest, no mask, s = 1."""
    scores = fixed = logits.detach()
    if estimator.gate == "sigmoid":
        scores = fixed.sigmoid() if bias is None else fixed.sigmoid() + bias
        fixed = F.logsigmoid(fixed)
    expert, probability = _largest(scores, top_k), _softmax(fixed)
    if estimator.gate == "full":
        gate: Tensor = _Gates.apply(logits, expert, 1.0, probability)
    else:
        chosen = logits.gather(-1, expert)
        gate = (F.logsigmoid(chosen) if estimator.gate == "sigmoid" else chosen).softmax(-1)
    alone = torch.full(expert.shape, logits.shape[-1] == 1, device=logits.device)
    return Routing(expert, gate, torch.ones_like(gate), probability, alone, sampled=False)


def _largest(scores: Float[Tensor, "T E"], top_k: int) -> Int64[Tensor, "T K"]:
    """Indices of the K largest, largest first: torch's topk is 3 to 4 times slower on a CPU."""
    found = [_argmax(scores)]
    while len(found) < top_k:
        scores = scores.scatter(-1, found[-1], -torch.inf)
        found.append(_argmax(scores))
    return torch.cat(found, -1)


def _argmax(scores: Float[Tensor, "T E"]) -> Int64[Tensor, "T 1"]:
    return scores.max(-1, keepdim=True).indices


def _softmax(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Softmax of a tensor without gradient: torch's is 7 times slower on a CPU if E = 8."""
    weight = (logits - logits.amax(-1, keepdim=True)).exp_()
    return weight.div_(weight.sum(-1, keepdim=True))


def _check_tensors(
    logits: Tensor, estimator: Estimator, noise: Tensor | None, bias: Tensor | None
) -> None:
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logits have dtype {logits.dtype}: near-ties flip below float32, so compute the "
            "router in float32 (or float64), under autocast too"
        )
    tokens, experts = logits.shape
    if noise is not None and noise.shape != (tokens,):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}: {tokens} tokens need {(tokens,)}, one key each"
        )
    if bias is not None and estimator.gate != "sigmoid":
        raise ValueError(f"{estimator.name} got a selection bias: only aux_free has one")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: {experts} experts need {(experts,)}")
