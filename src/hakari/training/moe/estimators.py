"""Gradient estimators of a router, as data, and the combination of experts that applies them.

mixture-of-experts.md section 2. Shapes: T tokens, K experts per token, E experts, D width.

A token draws experts D_k with probabilities p_k and adds h_k = p_k E_k(x), shrunk by s. With
f the rest of the network down to the loss, two objectives are told apart (GRIN, App. A.2):

    L     = sum_i p_i f(p_i E_i)          Eq 4, the expected loss itself
    L-hat = sum_i p_i f(sg(p_i) E_i)      Eq 7, the gate's value held fixed

where i runs over experts, or over ordered tuples of experts if K > 1. The router sees
c <g, E_D> dp_D/dz with g = f'(s h) taken at the shrunk point: quadrature of f along the ray from
0 to h. Exact means: its mean over draws and coins is the gradient of the named objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from hakari.training.moe.router import Routing


@dataclass(frozen=True)
class Estimator:
    """How experts are chosen in training, and what the router and the experts get in return.

    Any field can be changed with `dataclasses.replace`, for research.
    """

    name: str
    objective: str
    """The objective whose gradient the router gets, and with what bias."""
    gate: Literal["masked", "full", "renormalised", "sigmoid"] = "masked"
    """Softmax over the unmasked candidates, one of which is drawn. Or the best are taken, with a
    softmax over all experts, a softmax over the chosen, or sigmoids over the sum of the chosen."""
    temperature: float = 1.0
    """Divides the logits in the gate's softmax (not in the mask)."""
    coin: float = 1.0
    """Probability of the full scale, s = 1."""
    shrunk: float = 1.0
    """The scale s otherwise."""
    factor: float = 1.0
    """c, which multiplies the router's gradient."""
    delta: bool = False
    """The most probable expert always has s = 1: it trains at full scale, at the price of bias."""
    joint: bool = False
    """One coin per token, and the score of the whole tuple of experts times its whole output."""
    expert_gradient: Literal["code", "paper"] = "code"
    """Experts get s p g (the derivative, as in the released code) or p g (Algorithm 1)."""

    def __post_init__(self) -> None:
        if not (0 <= self.coin <= 1 and 0 < self.shrunk <= 1 and self.temperature > 0):
            raise ValueError(
                f"{self.name}: coin is {self.coin}, shrunk {self.shrunk}, temperature "
                f"{self.temperature}: they must be in 0 .. 1, above 0 up to 1, and above 0"
            )

    @property
    def sampled(self) -> bool:
        """Experts are drawn in training."""
        return self.gate == "masked"


_ROWS = (
    Estimator(
        "gshard",
        "Its own: f(sum_k w_k E_k) over the best K, w their softmax. Exact almost everywhere, "
        "but blind to what the experts not chosen would do: it is neither L nor L-hat.",
        gate="renormalised",
    ),
    Estimator(
        "switch",
        "Its own: f(p_a E_a) for the best expert a, p the full softmax. Exact almost everywhere, "
        "but blind to what the experts not chosen would do: it is neither L nor L-hat.",
        gate="full",
    ),
    Estimator(
        "aux_free",
        "Its own: f(sum_k w_k E_k) over the K best sigmoids plus selection bias, w the sigmoids "
        "over their sum. Exact almost everywhere; the bias gets no gradient (DeepSeek-V3).",
        gate="sigmoid",
    ),
    Estimator(
        "sparsemixer",
        "L, by the mid-point rule: exact for linear f; the argmax rule makes it biased from "
        "quadratic f on. Released for K = 1; with more, each slot as if it were alone "
        "(arXiv 2310.00811; without its output scale omega).",
        coin=1 / 2,
        shrunk=1 / 2,
        factor=2.0,
        delta=True,
    ),
    Estimator(
        "grin",
        "L-hat, by Heun's rule: with K = 1 exact for linear f; the argmax rule makes it biased "
        "from quadratic f on. With K > 1 also biased for linear f: a slot ignores how its choice "
        "changes the later slots. SparseMixer-v2 as released.",
        coin=1 / 4,
        shrunk=1 / 3,
        delta=True,
    ),
    Estimator(
        "grin_paper",
        "L-hat, as `grin`: the router's gradient is the same at the same point. Experts are not "
        "damped by s (GRIN, Algorithm 1).",
        coin=1 / 4,
        shrunk=1 / 3,
        delta=True,
        expert_gradient="paper",
    ),
    Estimator(
        "grin_star",
        "L, by Heun's rule: with K = 1 exact for linear f; the argmax rule makes it biased from "
        "quadratic f on. With K > 1 as `grin`. GRIN's corrected v2* (Eq 6, Algorithm 2).",
        temperature=2.0,
        coin=5 / 8,
        shrunk=1 / 3,
        factor=2.0,
        delta=True,
        expert_gradient="paper",
    ),
    Estimator(
        "joint",
        "L-hat of the ordered tuple of experts, by Heun's rule: exact up to cubic f for any K. "
        "More variance; experts train on damped outputs (mixture-of-experts.md section 2.4).",
        coin=1 / 4,
        shrunk=1 / 3,
        joint=True,
        expert_gradient="paper",
    ),
)

ESTIMATORS: dict[str, Estimator] = {row.name: row for row in _ROWS}
"""Every estimator by its name."""


def combine(
    output: Float[Tensor, "T K D"], routing: Routing, estimator: Estimator
) -> Float[Tensor, "T D"]:
    """Sum the experts' outputs times gate times scale; backward, apply the estimator.

    With g the gradient of the result, the gate of slot k gets

        c <g, E_k>                      each slot alone
        c <g, sum_j p_j E_j> / p_k      joint: <g, h> times the score of log(p_1 ... p_K)

    not scaled by s, and expert k gets s p_k g or p_k g. A routing that was not sampled gets the
    plain derivative. The result has the dtype of `output`; gate gradients are summed in the
    gate's.

    Source: GRIN section 3.2, Algorithms 1 and 2; mixture-of-experts.md sections 2.2 and 2.4.

    >>> from hakari.training.moe.router import route
    >>> row, options = ESTIMATORS["gshard"], {"jitter": 0.1, "mask": "code", "layer": 0}
    >>> r = route(torch.zeros(3, 4), row, top_k=2, noise=None, **options)
    >>> combine(torch.ones(3, 2, 1), r, row).tolist()
    [[1.0], [1.0], [1.0]]
    """
    drawn = routing.sampled
    result: Tensor = _Combine.apply(
        output,
        routing.gate,
        routing.scale,
        estimator.factor if drawn else 1.0,
        drawn and estimator.joint,
        drawn and estimator.expert_gradient == "paper",
    )
    return result


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        gate: Tensor,
        scale: Tensor,
        factor: float,
        joint: bool,
        undamped: bool,
    ) -> Tensor:
        ctx.save_for_backward(output, gate, scale)
        ctx.how = factor, joint, undamped
        weight = (scale * gate).to(output.dtype)
        total = weight[:, :1] * output[:, 0]
        for k in range(1, output.shape[1]):
            total = torch.addcmul(total, weight[:, k, None], output[:, k])
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        output, gate, scale = ctx.saved_tensors
        factor, joint, undamped = ctx.how
        along = _along(output, g, gate.dtype)
        if joint:
            along = (along * gate).sum(-1, keepdim=True) / gate
        weight = (gate if undamped else scale * gate).to(g.dtype)
        return weight[..., None] * g[:, None], factor * along, None, None, None, None


def _along(output: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """<g, E_k> for each slot, [T, K], summed in `dtype`."""
    if output.dtype != dtype:  # a bfloat16 product would round the router's gradient
        return torch.sum(output * g[:, None], -1, dtype=dtype)
    with torch.autocast(output.device.type, enabled=False):
        return torch.bmm(g[:, None], output.transpose(1, 2))[:, 0]
