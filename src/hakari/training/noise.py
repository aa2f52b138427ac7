"""Counter-based noise: every number is a hash of where it is used, so no generator has a state.

mixture-of-experts.md section 3. The noise of a token depends on (seed, step, global token index)
and on (layer, slot, column) only: it is the same under any split of the batch over ranks,
micro-batches or sequence chunks, when a layer is recomputed, and after a resume.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014; constants of Stafford's mix 13),
chained once per word, in int64 arithmetic that wraps: the same bits on every device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

_START = 0x243F6A8885A308D3  # fraction of pi: an all-zero counter must not hash to zero
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def token_keys(seed: int, step: int, index: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """One key per token of a step, from which every layer draws its `uniforms`.

    `index` is the token's place in the global batch of this step (all ranks and all accumulation
    steps), `seed` the run's and `step` the optimizer step's number, both in 0 .. 2**63 - 1.

    Raises ValueError for a seed or step out of range, or an index that is not int64.

    >>> token_keys(0, 7, torch.arange(4)).shape
    torch.Size([4])
    """
    for name, number in (("seed", seed), ("step", step)):
        if not 0 <= number < 2**63:
            raise ValueError(f"{name} is {number}: it must be in 0 .. 2**63 - 1")
    if index.dtype != torch.int64:
        raise ValueError(f"index has dtype {index.dtype}: token indices must be torch.int64")
    start = torch.full((), _START, dtype=torch.int64, device=index.device)
    return _absorb(_absorb(_absorb(start, seed), step), index)


def uniforms(
    keys: Int64[Tensor, " T"], layer: int | Int64[Tensor, ""], slot: int, width: int
) -> Float32[Tensor, "T width"]:
    """Independent uniforms for each token, a row a token: multiples of 2**-24 inside (0, 1).

    The values are (k + 1/2) 2**-23 for k in 0 .. 2**23 - 1, all exact in float32: neither 0 nor 1
    is possible, u and 1 - u have the same law, and P(u < c) is exactly c for any c that is a
    multiple of 2**-23. (With 24 bits the largest value would round to 1.)

    `layer` and `slot` tell apart the draws of one token. A layer's number may be a tensor, so
    that one compiled block serves all layers.

    >>> uniforms(token_keys(0, 7, torch.arange(4)), layer=0, slot=0, width=8).shape
    torch.Size([4, 8])
    """
    state = _absorb(_absorb(keys, layer), slot)
    words = _mix(state[:, None] ^ torch.arange(width, device=keys.device))
    # an arithmetic shift keeps the sign: words >> 41 lies in -2**22 .. 2**22 - 1
    return (words >> 41).to(torch.float32).add_(2**22 + 0.5).mul_(2**-23)


def _absorb(state: Tensor, word: int | Tensor) -> Tensor:
    """Hash one more word into the state."""
    mixed = _mix(state ^ word)
    return mixed.bitwise_xor_(_shifted(mixed, 31))


def _mix(word: Tensor) -> Tensor:
    """Spread `word` over 64 bits, in place; its last xor-shift, of 31, leaves the upper 31 alone.

    The counter is xored into a hashed state before it is multiplied: Inductor folds a constant
    times an `arange` into the loop's index, whose overflow the C++ compiler may take not to happen.
    """
    word.mul_(_GOLDEN)
    word.bitwise_xor_(_shifted(word, 30)).mul_(_FIRST)
    return word.bitwise_xor_(_shifted(word, 27)).mul_(_SECOND)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's keeps the sign, so its copies are masked away."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)
