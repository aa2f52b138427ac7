"""Load balancing over the whole step, from the experts that were sampled.

The loss of one layer is alpha E sum_i f_i P_i: f the share of routed slots that expert i got,
P_i the mean over tokens of the full softmax (GRIN section 3.3; mixture-of-experts.md section 3).
It is 1 alpha at a uniform load. Its gradient joins the router's logits in the backward pass,
where f may be counted over all ranks and micro-batches of the step: a mean of local losses
would punish an expert for liking the text of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

FACTS = ("tokens", "entropy", "singletons", "z_squared")


class Ledger(nn.Module):
    """What one layer's router did since `begin`: counts, and what its balance loss needs."""

    counts: Tensor  # [E], tokens sent to each expert
    chance: Tensor  # [E], sum over tokens of the full probabilities
    facts: Tensor  # [4], sums over tokens, named in FACTS; singletons over tokens and slots
    peak: Tensor  # [], largest |logit|; not finite if any logit is not
    fraction: Tensor  # [E], share of the load over the step, set by `settle`
    per_token: Tensor  # [], 1 / tokens of the step, set by `begin`
    repeated: Tensor  # [], 1 while the layer is recomputed, so as not to count it again; else 0

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.managed = False
        # where the host can read it without waiting for a device
        self.ready = torch.zeros((), dtype=torch.bool, device="cpu")
        for name, (size, dtype) in self._layout().items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype), persistent=False)

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        wide = torch.float64
        return {
            "counts": ((self.experts,), torch.int64),
            "chance": ((self.experts,), wide),
            "facts": ((len(FACTS),), wide),
            "peak": ((), wide),
            "fraction": ((self.experts,), wide),
            "per_token": ((), wide),
            "repeated": ((), torch.int64),
        }

    def clear(self) -> None:
        """Forget what was counted; the load that `settle` found stays."""
        for name in ("counts", "chance", "facts", "peak"):
            getattr(self, name).zero_()

    def _apply(self, move: Any, recurse: bool = True) -> Ledger:
        # sums stay in float64 and int64 whatever the model is cast to
        super()._apply(move, recurse)
        for name, (_, dtype) in self._layout().items():
            setattr(self, name, getattr(self, name).to(dtype))
        return self


def ledgers(model: nn.Module) -> list[Ledger]:
    """The ledgers of a model's layers, in order."""
    return [module for module in model.modules() if isinstance(module, Ledger)]


def begin(
    model: nn.Module, tokens: int | Tensor, *, settled: bool = False, scale: float | Tensor = 1.0
) -> None:
    """Start a step in which `tokens` tokens are routed over all ranks and micro-batches.

    settled: keep the load that `settle` found in a pass that only counted.
    scale: what gradients are multiplied by, if not 1: the scale of a GradScaler; the number of
    ranks where gradients are averaged over them (DDP) instead of summed.
    """
    for ledger in ledgers(model):
        ledger.clear()
        count = torch.as_tensor(tokens, device=ledger.per_token.device).double()
        ledger.per_token.copy_(torch.as_tensor(scale, device=count.device) / count)
        ledger.managed = True
        ledger.ready.fill_(settled)


def settle(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make the counts so far, summed over `group`, the load that backward passes balance.

    Call it between the forward and the backward pass; with several micro-batches, after a pass
    over all of them without gradients (`begin(..., settled=True)` then starts the real one).
    """
    found = ledgers(model)
    if not found:
        return
    counts = torch.cat([ledger.counts for ledger in found])
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(counts, group=group)
    for ledger, count in zip(found, counts.split([x.experts for x in found]), strict=True):
        # .data: the backward pass is meant to see the new values
        ledger.fraction.data.copy_(count.double() / count.sum().clamp(min=1))
        ledger.ready.data.fill_(True)


def inject(
    gate: Float[Tensor, "T K"],
    logits: Float[Tensor, "T E"],
    ledger: Ledger,
    counts: Int64[Tensor, " E"],
    valid: Bool[Tensor, " T"] | None,
    *,
    balance: float,
    z_loss: float,
    scope: str,
) -> Float[Tensor, "T K"]:
    """The gates, unchanged; their backward pass adds balance and z-loss to the logits' gradient.

    counts: what `record` returned. scope "step": the load is `settle`'s; "rank", or a layer that
    no `begin` manages: that of `counts`.
    Source: derived; d/dz_t of alpha E f.P is alpha E p * (f - f.p) / tokens.
    """
    if not balance and not z_loss:
        return gate
    own = scope == "rank" or not ledger.managed
    load = counts.double() / counts.sum().clamp(min=1) if own else ledger.fraction
    tokens = torch.tensor(len(logits)) if valid is None else valid.sum()
    each = ledger.per_token if ledger.managed else tokens.clamp(min=1).double().reciprocal()
    ready = None if own else ledger.ready
    return cast(Tensor, _inject(gate, logits, valid, load, each, ready, balance, z_loss))


@torch.no_grad()
def record(
    ledger: Ledger,
    logits: Float[Tensor, "T E"],
    probability: Float[Tensor, "T E"],
    expert: Int64[Tensor, "T K"],
    singleton: Bool[Tensor, "T K"],
    valid: Bool[Tensor, " T"] | None,
) -> Int64[Tensor, " E"]:
    """Add one call of the router to the ledger, unless it only recomputes; returns its counts."""
    if not ledger.managed:  # without `begin`, the ledger is of the latest call
        for book in (ledger.counts, ledger.chance, ledger.facts, ledger.peak):
            book.copy_(torch.where(ledger.repeated.bool(), book, torch.zeros_like(book)))
    one = torch.ones_like(expert) if valid is None else valid[:, None].expand_as(expert).long()
    counts = torch.zeros_like(ledger.counts).scatter_add_(0, expert.flatten(), one.flatten())
    weight = one[:, 0].to(probability.dtype)
    entropy = -(torch.xlogy(probability, probability).sum(-1) * weight).sum()
    squared = (torch.logsumexp(logits, -1).square() * weight).sum()
    single = (singleton * one).sum()
    once = 1 - ledger.repeated
    ledger.counts += once * counts
    ledger.chance += once * (probability * weight[:, None]).sum(0)
    ledger.facts += once * torch.stack([weight.sum(), entropy, single.to(entropy.dtype), squared])
    ledger.peak.copy_(torch.maximum(ledger.peak, logits.abs().amax()))
    return counts


def recompute_contexts(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: a recomputed router is not counted again."""
    return nullcontext(), _repeating(model)


@contextmanager
def _repeating(model: nn.Module) -> Iterator[None]:
    # a tensor, since a compiled block must be the same graph when it is recomputed
    found = ledgers(model)
    for ledger in found:
        ledger.repeated.fill_(1)
    try:
        yield
    finally:
        for ledger in found:
            ledger.repeated.zero_()


# --- operators, so that a compiler neither looks inside nor takes the load before it is settled ---


@torch.library.custom_op("hakari::inject_balance", mutates_args=())
def _inject(
    gate: Tensor,
    logits: Tensor,
    valid: Tensor | None,
    load: Tensor,
    each: Tensor,
    ready: Tensor | None,
    balance: float,
    z_loss: float,
) -> Tensor:
    return gate.clone()


@torch.library.custom_op("hakari::balance_gradient", mutates_args=())
def _gradient(
    grad: Tensor,  # not used: it keeps the operator in the backward pass
    logits: Tensor,
    valid: Tensor | None,
    load: Tensor,
    each: Tensor,
    ready: Tensor | None,
    balance: float,
    z_loss: float,
) -> Tensor:
    if balance and ready is not None and not ready:
        raise RuntimeError(
            "the load of the step is not known yet: call balance.settle(model, group) between "
            "forward and backward, or choose balance_scope = 'rank'"
        )
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    p = (logits - log_sum).exp()
    load = load.to(p.dtype)
    extra = balance * len(load) * p * (load - (p @ load)[:, None])
    if z_loss:
        extra = extra + 2 * z_loss * log_sum * p
    each = each.to(p.dtype)
    return extra * (each if valid is None else (valid * each)[:, None])


@_inject.register_fake
def _(gate: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gate)


@_gradient.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.weights = inputs[6:]


def _pass_on(ctx: Any, grad: Tensor) -> Any:
    return grad, _gradient(grad, *ctx.saved_tensors, *ctx.weights), *[None] * 6


_inject.register_autograd(_pass_on, setup_context=_keep)
