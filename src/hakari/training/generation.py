"""Text from a model, a token at a time.

The whole context is computed again for each token: there is no cache of keys and values, so that
attention stays one function. Fine for samples of a run; not a way to serve a model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hakari.training.model import Transformer


def generate(
    model: Transformer,
    tokens: list[int],
    count: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    context: int = 0,
    stop: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """The `count` tokens that follow `tokens`, or fewer if `stop` comes first; it is left out.

    temperature: divides the logits; 0: always the most likely token. top_p: tokens are drawn from
    the smallest set whose probabilities reach it (Holtzman et al. 2020). seed: fixes the draws.
    context: last tokens that the model sees, its length in training; 0: all. on_token: told each
    token as it comes.
    Raises ValueError for an empty prompt, a token outside the vocabulary, a parameter out of
    range, or logits that are not finite.
    """
    _check(model, tokens, count, temperature, top_p, context)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found: list[int] = []
    try:
        while len(found) < count:
            seen = (tokens + found)[-context:]  # -0: all
            with torch.no_grad():
                logits = model(torch.tensor([seen], device=device))[0, -1]
            if not bool(logits.isfinite().all()):
                raise ValueError(f"the logits after {len(tokens + found)} tokens are not finite")
            coin = float(torch.rand((), generator=generator, dtype=torch.float64))
            token = pick(logits, coin, temperature, top_p)
            if token == stop:
                break
            found.append(token)
            if on_token is not None:
                on_token(token)
    finally:
        model.train(training)
    return found


def pick(logits: Float[Tensor, " V"], coin: float, temperature: float, top_p: float) -> int:
    """The token at `coin`, in [0, 1), of the nucleus' distribution, likeliest tokens first.

    >>> pick(torch.tensor([0.0, 1.0, 2.0]), 0.99, temperature=1.0, top_p=0.5)
    2
    """
    if temperature == 0:
        return int(logits.argmax())
    below = logits.double().cpu() - logits.max().double().cpu()  # a tiny temperature: no overflow
    scaled, order = (below / temperature).sort(descending=True, stable=True)
    reached = scaled.softmax(-1).cumsum(-1)
    # up to and with the first token at which top_p is reached
    size = min(int((reached < top_p).sum()) + 1, len(reached))
    place = int((reached[:size] <= coin * reached[size - 1]).sum())
    return int(order[min(place, size - 1)])


def _check(
    model: Transformer,
    tokens: list[int],
    count: int,
    temperature: float,
    top_p: float,
    context: int,
) -> None:
    if not tokens:
        raise ValueError("the prompt has no tokens: give it at least one")
    outside = [token for token in tokens if not 0 <= token < model.config.vocabulary]
    if outside:
        raise ValueError(f"tokens {outside[:5]} are not in 0 .. {model.config.vocabulary - 1}")
    for name, value in (("count", count), ("temperature", temperature), ("context", context)):
        if not value >= 0:
            raise ValueError(f"{name} = {value} is below 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} is not in (0, 1]")
