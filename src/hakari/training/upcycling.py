"""A dense model's weights as the start of a sparse one (Komatsuzaki et al., arXiv 2212.05055).

Every expert begins as the dense MLP, or as one of G parts of it, and the router as small noise.
With equal experts a layer gives c MLP(x), c the sum of a token's gates. How near the start is to
the dense model is therefore how constant c is:

- gshard, aux_free: c = 1, and the start is the dense model itself.
- grin and the other masked gates: a slot's gate is about 1 over the number of its candidates,
  however small the logits, because the mask is free of scale (mixture-of-experts.md section 0,
  finding 5). c is K where every slot has one candidate, as at jitter 0; a wide mask varies it.
- switch: c is near 1 / E for small logits, and grows as the router learns.

`down` is multiplied by a constant that makes the mean square of (c - 1) least. Loss of
SmolLM2-135M (2.551; 256 tokens of English) as 8 experts: gshard, aux_free and grin at jitter 0
2.551, at 0.01 2.576, at 0.05 2.841, at 0.1 2.975 (3.104 with 1 / K, 4.794 with nothing); switch
2.598. A router of zeros would make grin exact too, c = 1 / E + 1 / (E - 1); but noise of 1e-6,
less than one step of an optimizer, then ends at 10.379.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hakari.training.config import Model
from hakari.training.hugging_face import Weights
from hakari.training.model import Transformer, put
from hakari.training.moe.estimators import ESTIMATORS
from hakari.training.moe.router import route
from hakari.training.noise import token_keys, uniforms

_SLOT = 2**21  # of the noise; draws and coins of routing have smaller ones
_SAMPLE = 20_000
_SAME = (  # what experts do not change
    *("vocabulary", "dim", "layers", "heads", "kv_heads", "head_dim", "window"),
    *("rope_base", "rope_scaling", "norm", "norm_eps", "attention_bias", "head_bias"),
)


def start(model: Transformer, folder: str | Path, seed: int) -> None:
    """Fill `model` from a Hugging Face folder; layers that are dense there and sparse here grow.

    The model may be a part, and its weights shards.
    Raises ValueError that lists where the two differ in anything but the experts, or as `load`
    and `upcycle` do.
    """
    weights = Weights(folder)
    differences = _differences(weights.config, model.config)
    if differences:
        raise ValueError(
            f"[model] is not the model in {folder}: {'; '.join(differences)}; "
            "write its values into the configuration"
        )
    weights.complete()
    upcycle(weights, model, seed)


@torch.no_grad()
def upcycle(dense: Transformer | Mapping[str, Tensor], target: Transformer, seed: int) -> None:
    """Fill `target` from a dense model, or from tensors under hakari's names.

    Layers that are dense in both are copied. An expert as wide as the dense MLP is a copy of it.
    One G times narrower is one of its G parts: routers that renormalise their gates then start
    with one row for each group of G experts, so that a token finds all the parts (He et al.,
    arXiv 2410.07524, virtual groups).
    seed: of the routers, whose standard deviation is `model.initial_std`.
    Raises ValueError if the widths, or the router, do not allow it, or a tensor does not fit.
    """
    source = dense if isinstance(dense, Mapping) else _named(dense)
    for name, weight in target.named_parameters():
        value = _value(name, source, target.config, seed)
        if value.shape != weight.shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)} in the dense model, {tuple(weight.shape)} here"
            )
        put(weight, value)


def gate_factor(config: Model, spread: float) -> float:
    """What to multiply equal experts by, so that a layer of them is nearest to one expert.

    E[c] / E[c^2], c the sum of a token's gates in inference, over logits drawn from
    N(0, spread^2). Source: least squares.
    """
    moe = config.moe
    estimator = ESTIMATORS[moe.router]
    logits = _normal(0, 0, _SAMPLE, moe.experts).double() * spread
    routing = route(
        logits,
        estimator,
        top_k=moe.top_k,
        jitter=moe.jitter,
        mask=moe.mask,
        noise=None,
        layer=0,
        bias=logits.new_zeros(moe.experts) if estimator.gate == "sigmoid" else None,
    )
    total = routing.gate.sum(-1)
    return float(total.mean() / total.square().mean())


def _named(model: Transformer) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _differences(there: Model, here: Model) -> list[str]:
    names = list(_SAME)
    if any(not here.sparse(layer) for layer in range(here.layers)):
        names.append("hidden")
    found = [
        f"model.{name} = {getattr(here, name)!r}, there {getattr(there, name)!r}"
        for name in names
        if getattr(here, name) != getattr(there, name)
    ]
    if here.tied and not there.tied:
        found.append("model.tied = True, there False")
    return found


def _value(name: str, source: Mapping[str, Tensor], config: Model, seed: int) -> Tensor:
    if name in source:
        return source[name]
    place, _, part = name.rpartition(".")
    if part in ("gate", "up", "down") and f"{name}.weight" in source:
        return _experts(name, source, config)
    gate = f"{place.removesuffix('.router')}.gate.weight"
    if place.endswith(".router") and gate in source:
        layer, groups = int(name.split(".")[1]), config.moe.experts // _parts(source[gate], config)
        rows = _normal(seed, layer, config.dim, groups).T * config.initial_std
        return rows.repeat_interleave(config.moe.experts // groups, 0)
    raise ValueError(f"the dense model has no {name}")


def _experts(name: str, source: Mapping[str, Tensor], config: Model) -> Float[Tensor, "E O A"]:
    """Expert e is part e mod G of the dense matrix."""
    layer, part = name.rsplit(".mlp.", 1)
    whole = source[f"{name}.weight"]
    parts = _parts(source[f"{layer}.mlp.gate.weight"], config)
    if part == "down":
        spread = config.initial_std * float(source[f"{layer}.mlp_norm.weight"].norm())
        whole = whole * (parts * gate_factor(config, spread))
    pieces = torch.stack(whole.chunk(parts, dim=1 if part == "down" else 0))
    return pieces.repeat(config.moe.experts // parts, 1, 1)


def _parts(gate: Float[Tensor, "H D"], config: Model) -> int:
    """G, how many experts share the dense MLP whose gate this is."""
    moe, hidden = config.moe, gate.shape[0]
    if hidden % moe.hidden:
        raise ValueError(
            f"model.moe.hidden = {moe.hidden} does not divide the dense MLP's width {hidden}"
        )
    parts = hidden // moe.hidden
    if parts > 1 and ESTIMATORS[moe.router].gate not in ("renormalised", "sigmoid"):
        raise ValueError(
            f"router {moe.router!r} would not choose all {parts} parts of the dense MLP for a "
            f"token: set model.moe.hidden = {hidden}, or take gshard or aux_free"
        )
    for key, value in (("experts", moe.experts), ("top_k", moe.top_k)):
        if value % parts:
            raise ValueError(
                f"model.moe.{key} = {value} is not a multiple of {parts}, the parts of width "
                f"{moe.hidden} in the dense MLP's {hidden}"
            )
    return parts


def _normal(seed: int, layer: int, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Standard normal numbers that depend on nothing else than seed, layer, row and column."""
    keys = token_keys(seed, 0, torch.arange(rows))
    return torch.special.ndtri(uniforms(keys, layer, _SLOT, columns).double())
