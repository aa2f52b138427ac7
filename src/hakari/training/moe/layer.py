"""A mixture-of-experts layer: router, dispatch, experts, combination. No token is dropped.

Can stand in any model: `MixtureOfExperts(dim, config)(x, noise)`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from hakari.training.config import MoE
from hakari.training.moe import balance
from hakari.training.moe.estimators import ESTIMATORS, combine
from hakari.training.moe.experts import expert_mlp
from hakari.training.moe.router import Routing, check_routing, route


class MixtureOfExperts(nn.Module):
    """E SwiGLU experts of which each token visits K (mixture-of-experts.md section 2).

    dim: width of the tokens. layer: number of the layer, part of the key of the routing noise.
    Logits and gates are float32 at least, under autocast too: near-ties must not flip.
    Until `balance.begin` is called on the model, the load is balanced over each call.
    """

    number: Tensor
    selection_bias: Tensor

    def __init__(self, dim: int, config: MoE, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.estimator = ESTIMATORS[config.router]
        experts, hidden = config.experts, config.hidden
        self._check()
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate = nn.Parameter(torch.empty(experts, hidden, dim))
        self.up = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))
        # `layer` as a tensor: a compiled block then serves all layers
        self.register_buffer("number", torch.tensor(layer), persistent=False)
        if config.router == "aux_free":
            self.register_buffer("selection_bias", torch.zeros(experts))
        self.ledger = balance.Ledger(experts)
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=0.02)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        noise: Int64[Tensor, "B S"] | None = None,
        valid: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Send each token through its experts.

        noise: keys from `noise.token_keys`; None, or evaluation mode: experts by argmax.
        valid: false where a token is padding, which is routed but not counted.
        """
        if x.ndim != 3 or x.shape[2] != self.router.in_features:
            raise ValueError(f"x is {[*x.shape]}: [B, S, {self.router.in_features}] is needed")
        for name, given in (("noise", noise), ("valid", valid)):
            if given is not None and given.shape != x.shape[:2]:
                raise ValueError(f"{name} is {[*given.shape]}: {[*x.shape[:2]]} is needed")
        flat = x.flatten(0, 1)
        sampling = noise.flatten() if noise is not None and self.training else None
        routing = self._route(flat, sampling, None if valid is None else valid.flatten())
        output = expert_mlp(flat, routing.expert, self.gate, self.up, self.down)
        return combine(output, routing, self.estimator).to(x.dtype).view_as(x)

    def _check(self) -> None:
        c = self.config
        check_routing(
            self.estimator, top_k=c.top_k, experts=c.experts, jitter=c.jitter, mask=c.mask
        )

    def clear(self) -> None:
        """Fill what is not learnt by gradients: nothing counted, no expert preferred."""
        for buffer in self.buffers():
            buffer.zero_()
        self.number.fill_(self.layer)

    def _route(
        self,
        x: Float[Tensor, "T D"],
        noise: Int64[Tensor, " T"] | None,
        valid: Bool[Tensor, " T"] | None,
    ) -> Routing:
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.router.weight.to(wide))
            routing = route(
                logits,
                self.estimator,
                top_k=c.top_k,
                jitter=c.jitter,
                mask=c.mask,
                noise=noise,
                layer=self.number,
                bias=self.selection_bias if c.router == "aux_free" else None,
            )
        return self._balanced(logits, routing, valid) if self.training else routing

    def _balanced(
        self, logits: Float[Tensor, "T E"], routing: Routing, valid: Bool[Tensor, " T"] | None
    ) -> Routing:
        c, facts = self.config, (routing.probability, routing.expert, routing.singleton)
        counts = balance.record(self.ledger, logits, *facts, valid)
        gate = balance.inject(
            routing.gate,
            logits,
            self.ledger,
            counts,
            valid,
            balance=0.0 if c.router == "aux_free" else c.balance,
            z_loss=c.z_loss,
            scope=c.balance_scope,
        )
        return replace(routing, gate=gate)


@torch.no_grad()
def adjust_bias(model: nn.Module, rate: float) -> None:
    """Raise the selection bias of experts below the mean load by `rate`, lower the others.

    Uses the load that `balance.settle` found; for layers with router 'aux_free'.
    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    for module in model.modules():
        if isinstance(module, MixtureOfExperts) and module.config.router == "aux_free":
            load = module.ledger.fraction
            module.selection_bias += rate * torch.sign(load.mean() - load).float()
