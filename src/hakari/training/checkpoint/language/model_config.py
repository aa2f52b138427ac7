"""Numbers for the expressions of rules, from a model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOLD = {
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
}
"""Names in the rules that come with hakari, and where config.json has them: the first that is."""


def numbers_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers of a configuration by their own names, and by those that rules use.

    Without `head_dim` it is hidden_size / num_attention_heads, where that is whole.
    """
    own = {name: value for name, value in config.items() if type(value) is int}
    found = {
        name: next(own[place] for place in places if place in own)
        for name, places in TOLD.items()
        if any(place in own for place in places)
    }
    width, heads = own.get("hidden_size", 0), own.get("num_attention_heads", 0)
    if "head_dim" not in found and heads > 0 and width % heads == 0 and width:
        found["head_dim"] = width // heads
    return own | found
