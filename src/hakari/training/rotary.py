"""Rotary positions (Su et al. 2021), with the two scalings that published models use.

Halves are rotated, as in Hugging Face's Llama: component i pairs with i + C / 2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hakari.training.config import Model


def angles(
    config: Model, length: int, device: torch.device
) -> tuple[Float[Tensor, "S C"], Float[Tensor, "S C"]]:
    """Cosine and sine of position times frequency, times the scaling's attention factor.

    Raises ValueError for a kind of `rope_scaling` that is not known, or lacks a value.
    """
    try:
        frequency, factor = _frequencies(config, length, device)
    except KeyError as error:
        raise ValueError(f"model.rope_scaling lacks {error}: {dict(config.rope_scaling)}") from None
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * factor, angle.sin() * factor


def rotate(
    x: Float[Tensor, "B H S C"], cosine: Float[Tensor, "S C"], sine: Float[Tensor, "S C"]
) -> Float[Tensor, "B H S C"]:
    """Turn each pair of components by its position's angle."""
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def _frequencies(
    config: Model, length: int, device: torch.device
) -> tuple[Float[Tensor, " half"], float]:
    # the order of operations is transformers', so that its models run here with the same bits
    index = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    wavelength = config.rope_base ** (index / config.head_dim)
    scaling = config.rope_scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return 1.0 / wavelength, 1.0
    if kind == "llama3":
        return _llama3(1.0 / wavelength, dict(scaling)), 1.0
    if kind == "longrope":
        return _longrope(wavelength, dict(scaling), length)
    raise ValueError(f"model.rope_scaling has type {kind!r}: known are default, llama3, longrope")


def _llama3(plain: Tensor, scaling: dict[str, float]) -> Tensor:
    """Slow components are stretched, fast ones kept, those between blended (Llama 3.1)."""
    needed = ("low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings")
    lacking = [name for name in needed if name not in scaling]
    if lacking:
        raise ValueError(f"model.rope_scaling of type llama3 lacks {', '.join(lacking)}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / scaling["factor"] + blend * plain


def _longrope(
    wavelength: Tensor, scaling: dict[str, list[float] | float], length: int
) -> tuple[Tensor, float]:
    """Each component has its own stretch, one set for short texts and one for long (Phi-3)."""
    original = scaling["original_max_position_embeddings"]
    if not isinstance(original, int | float):
        raise ValueError(f"rope_scaling.original_max_position_embeddings = {original!r}")
    kind = "long" if length > original else "short"
    stretch = torch.tensor(scaling[f"{kind}_factor"], dtype=torch.float32, device=wavelength.device)
    factor = scaling.get(f"{kind}_mscale", scaling.get("attention_factor", 1.0))
    frequency = 1.0 / (stretch * wavelength)
    return frequency, float(factor) if isinstance(factor, int | float) else 1.0
