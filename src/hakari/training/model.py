"""The transformer: pre-norm, rotary positions, grouped queries, SwiGLU, dense or sparse.

    tokens -> embed -> [x + attention(norm(x)), x + mlp(norm(x))] per layer -> norm -> head

Shapes: B batch, S sequence, D width, H query heads, G key and value heads, C width of a head,
V vocabulary. `Transformer(config)` is a plain module; parallelism, recomputation and compilation
are applied to it from outside, and any of its parts may be missing (a pipeline stage).
"""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from hakari.training.config import Model
from hakari.training.moe.balance import recompute_contexts
from hakari.training.moe.layer import MixtureOfExperts
from hakari.training.rotary import angles, rotate


class Context(NamedTuple):
    """What every block needs beside its input."""

    cosine: Float[Tensor, "S C"]
    sine: Float[Tensor, "S C"]
    mask: Bool[Tensor, "B 1 S S"] | None  # None: causal
    noise: Int64[Tensor, "B S"] | None  # routing noise keys; None: no sampling
    valid: Bool[Tensor, "B S"] | None  # None: no padding


class Transformer(nn.Module):
    """A decoder; raises ValueError if `config.vocabulary` is still 0.

    With `recompute` set, blocks keep only their input for the backward pass and run again there
    (activation checkpointing); the routing noise is keyed, so that they choose the same experts.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        if not config.vocabulary:
            raise ValueError("model.vocabulary = 0: it is the tokenizer's to fill in")
        angles(config, 1, torch.device("meta"))  # refuses what it cannot turn
        self.config, self.recompute = config, False
        self.embed: nn.Embedding | None = nn.Embedding(config.vocabulary, config.dim)
        # a dictionary, so that a pipeline stage keeps the names of the layers it has
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.layers)})
        self.norm: nn.Module | None = _norm(config)
        self.head: nn.Linear | None = nn.Linear(
            config.dim, config.vocabulary, bias=config.head_bias
        )
        tie(self)

    def forward(
        self,
        x: Int64[Tensor, "B S"] | Float[Tensor, "B S D"],
        documents: Int64[Tensor, "B S"] | None = None,
        noise: Int64[Tensor, "B S"] | None = None,
        targets: Int64[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B S V"] | Float[Tensor, "B S D"] | Float[Tensor, ""]:
        """Logits of the next token at each position, or the summed loss if there are targets.

        x: token ids, or, in a later pipeline stage, the hidden states of the one before.
        documents: number of the document each token belongs to, -1 for padding; a token attends
        only to its own. None: one document, no padding.
        noise: keys of the routing noise (`noise.token_keys`); None: experts by argmax.
        targets: the next tokens, -100 where there is nothing to predict.
        """
        context = make_context(self.config, x, documents, noise)
        if self.embed is not None:
            x = self.embed(x)
        for block in self.layers.values():
            if self.recompute and self.training:
                x = checkpoint(
                    block,
                    x,
                    context,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=partial(recompute_contexts, block),
                )
            else:
                x = block(x, context)
        if self.norm is not None:
            x = self.norm(x)
        if self.head is None:
            return x
        logits = self.head(x)
        return logits if targets is None else summed_loss(logits, targets)


class Block(nn.Module):
    """Attention, then a dense or sparse MLP, each added to the residual stream."""

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = (
            MixtureOfExperts(config.dim, config.moe, layer)
            if config.sparse(layer)
            else SwiGLU(config.dim, config.hidden)
        )

    def forward(self, x: Float[Tensor, "B S D"], context: Context) -> Float[Tensor, "B S D"]:
        """One layer."""
        x = x + self.attention(self.attention_norm(x), context)
        normed = self.mlp_norm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            return x + self.mlp(normed, context.noise, context.valid)
        return x + self.mlp(normed)


class Attention(nn.Module):
    """Causal attention with rotary positions; H query heads share G keys and values."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.width = config.head_dim
        queries, keys = config.heads * self.width, config.kv_heads * self.width
        self.query = nn.Linear(config.dim, queries, bias=config.attention_bias)
        self.key = nn.Linear(config.dim, keys, bias=config.attention_bias)
        self.value = nn.Linear(config.dim, keys, bias=config.attention_bias)
        self.output = nn.Linear(queries, config.dim, bias=config.attention_bias)

    def forward(self, x: Float[Tensor, "B S D"], context: Context) -> Float[Tensor, "B S D"]:
        """Attend within `context.mask`; under tensor parallelism each rank has some heads."""
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, -1, self.width).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        q, k = rotate(q, context.cosine, context.sine), rotate(k, context.cosine, context.sine)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=context.mask,
            is_causal=context.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """The dense MLP."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def make_context(
    config: Model,
    x: Tensor,
    documents: Int64[Tensor, "B S"] | None,
    noise: Int64[Tensor, "B S"] | None,
) -> Context:
    """Angles and masks of one forward pass, shared by its layers."""
    length = x.shape[1]
    cosine, sine = angles(config, length, x.device)
    mask = valid = None
    if documents is not None:
        mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        valid = documents >= 0
    if config.window and config.window < length:
        near = torch.ones(length, length, dtype=torch.bool, device=x.device)
        near = near.tril().triu(1 - config.window)
        mask = near.expand(x.shape[0], 1, length, length) if mask is None else mask & near
    return Context(cosine, sine, mask, noise, valid)


def summed_loss(logits: Float[Tensor, "B S V"], targets: Int64[Tensor, "B S"]) -> Float[Tensor, ""]:
    """Cross-entropy in nats, summed over targets that are not -100; float32 at least.

    Logits may be split over the vocabulary; then call it, and backward, in `loss_parallel()`.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    flat = logits.to(wide).flatten(0, 1)
    loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def tie(model: Transformer) -> None:
    """Let head and embedding share one weight again, where the model ties them and has both."""
    if model.config.tied and model.head is not None and model.embed is not None:
        model.head.weight = model.embed.weight


def initialise(model: Transformer, seed: int) -> None:
    """Fill every weight: normal, residual outputs scaled by 1 / sqrt(2 layers), norms at one.

    Each weight has its own stream, keyed by (seed, name): the values do not depend on how the
    model is split, on what device it is, or on which other layers there are.
    """
    config = model.config
    with torch.no_grad():
        for name, weight in model.named_parameters():
            full = torch.empty(weight.shape, dtype=torch.float32)
            if "norm" in name or name.endswith("bias"):
                full.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                residual = name.endswith(("attention.output.weight", "mlp.down.weight", "mlp.down"))
                scale = 1 / math.sqrt(2 * config.layers) if residual else 1.0
                full.normal_(0, config.initial_std * scale, generator=_stream(seed, name))
            put(weight, full)
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.clear()


def put(weight: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into a weight that may be a shard; every rank has the whole."""
    full = full.to(weight.device, weight.dtype)
    if isinstance(weight, DTensor):
        full = distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(full)


def _stream(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _norm(config: Model) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.dim, eps=config.norm_eps)
