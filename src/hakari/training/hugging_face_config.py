"""config.json and tensor names of Hugging Face's Llama and Phi-MoE, and `config.Model`'s.

What has no counterpart is refused: a model that is not the same still gives logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hakari.training.config import Model, MoE
from hakari.training.moe.estimators import ESTIMATORS

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM",),
    "phimoe": ("PhimoeForCausalLM", "PhiMoEForCausalLM"),
}
_FIELDS = {  # of Model, and their keys
    "vocabulary": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "attention_bias": "attention_bias",
    "tied": "tie_word_embeddings",
    "initial_std": "initializer_range",
}
_PHIMOE_FIELDS = {"head_bias": "lm_head_bias", "window": "sliding_window"}
_MOE_FIELDS = {
    "experts": "num_local_experts",
    "hidden": "intermediate_size",
    "jitter": "router_jitter_noise",
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # transformers' own
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "phimoe": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
        "lm_head_bias": False,
        "sliding_window": 0,
    },
}
_COMMON_DEFAULTS = {
    "head_dim": 0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_PARTS = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.router": "block_sparse_moe.gate",
}
_EXPERTS = {"mlp.gate": "w1", "mlp.up": "w3", "mlp.down": "w2"}
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "num_experts_per_tok": (2,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
_ROPE = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def from_table(table: Mapping[str, Any]) -> Model:
    """The model of a config.json; raises ValueError that names the key."""
    kind = _kind(table)
    table = {key: value for key, value in table.items() if value is not None}
    for key, possible in _ONLY.items():
        if table.get(key, possible[0]) not in possible:
            raise ValueError(f"{key} = {table[key]!r} is not supported, only {possible[0]!r} is")
    heads = {"num_key_value_heads": table.get("num_attention_heads")}
    table = _COMMON_DEFAULTS | _DEFAULTS[kind] | heads | table
    base, scaling = _rope(table, kind)
    model = Model(
        **_values(table, _FIELDS),
        **(_values(table, _PHIMOE_FIELDS) if kind == "phimoe" else {}),
        norm="layer" if kind == "phimoe" else "rms",
        rope_base=base,
        rope_scaling=scaling,
        moe=MoE(**_values(table, _MOE_FIELDS), top_k=2) if kind == "phimoe" else MoE(),
    )
    for name in ("short_factor", "long_factor"):
        if (size := len(scaling.get(name, "")) or model.head_dim // 2) != model.head_dim // 2:
            raise ValueError(f"{name} has {size} numbers: a head has {model.head_dim // 2} angles")
    return model


def to_table(config: Model) -> dict[str, Any]:
    """config.json of a model; raises ValueError that lists what neither architecture can express.

    Experts make it a Phi-MoE, none a Llama. Rotary angles are written in the layout of
    transformers 4, which 5 reads as well.
    """
    kind = "phimoe" if config.moe.experts else "llama"
    if faults := _faults(config, kind):
        raise ValueError(f"{_ARCHITECTURES[kind][0]} cannot express {'; '.join(faults)}")
    table = {
        "architectures": [_ARCHITECTURES[kind][0]],
        "model_type": kind,
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        "hidden_act": "silu",
        "rope_theta": config.rope_base,
        "rope_scaling": _rope_table(config, kind),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "phimoe":
        table |= {key: getattr(config, field) for field, key in _PHIMOE_FIELDS.items()}
        table |= {key: getattr(config.moe, field) for field, key in _MOE_FIELDS.items()}
        table |= {"num_experts_per_tok": 2, "sliding_window": config.window or None}
    return table


def places(name: str, config: Model) -> list[str]:
    """Names in files of a parameter; experts, which are stacked here, have one each."""
    prefix, part = "", name
    if name.startswith("layers."):
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
    if part in _EXPERTS:
        middle, experts = f"{prefix}block_sparse_moe.experts", range(config.moe.experts)
        return [f"{middle}.{expert}.{_EXPERTS[part]}.weight" for expert in experts]
    stem, _, kind = part.rpartition(".")
    return [f"{prefix}{_PARTS[stem]}.{kind}"]


def stacked(name: str) -> bool:
    """Whether a parameter here is several tensors in files, one for each expert."""
    return name.split(".", 2)[-1] in _EXPERTS


# --- reading ------------------------------------------------------------------------------


def _kind(table: Mapping[str, Any]) -> str:
    kind, named = table.get("model_type"), table.get("architectures")
    if kind not in _ARCHITECTURES:
        raise ValueError(f"model_type = {kind!r}: known are {', '.join(_ARCHITECTURES)}")
    if named and named[0] not in _ARCHITECTURES[kind]:
        raise ValueError(f"architectures = {named}: known is {_ARCHITECTURES[kind][0]}")
    return str(kind)


def _values(table: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    return {field: _need(table, key) for field, key in fields.items()}


def _need(table: Mapping[str, Any], key: str) -> Any:
    if table.get(key) is None:
        raise ValueError(f"{key} is missing")
    return table[key]


def _rope(table: Mapping[str, Any], kind: str) -> tuple[float, dict[str, Any]]:
    """Base and scaling, from the layout of transformers 5 or of the versions before."""
    rope = {"rope_theta": table["rope_theta"]} | {
        key: value
        for key, value in (table.get("rope_scaling") or table.get("rope_parameters") or {}).items()
        if value is not None
    }
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']} is not supported, only 1 is"
        )
    if scaling == "default":
        return float(rope["rope_theta"]), {}
    if scaling not in _ROPE:
        raise ValueError(f"rope_type = {scaling!r}: known are default, {', '.join(_ROPE)}")
    whole = {"original_max_position_embeddings": table.get("max_position_embeddings")} | rope
    if "original_max_position_embeddings" in table:
        whole |= {"original_max_position_embeddings": table["original_max_position_embeddings"]}
    names = ("original_max_position_embeddings", *_ROPE[scaling])
    found = {"rope_type": scaling, **{name: _need(whole, name) for name in names}}
    if scaling == "longrope" and kind == "phimoe":
        found |= {name: _need(rope, name) for name in ("short_mscale", "long_mscale")}
    elif scaling == "longrope":
        found["attention_factor"] = _attention_factor(whole, table)
    return float(rope["rope_theta"]), found


def _attention_factor(rope: Mapping[str, Any], table: Mapping[str, Any]) -> float:
    """As written, or LongRoPE's sqrt(1 + ln(stretch) / ln(original length)), arXiv 2402.13753."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    stretch = rope.get("factor") or _need(table, "max_position_embeddings") / original
    return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))


# --- writing ------------------------------------------------------------------------------


def _faults(config: Model, kind: str) -> list[str]:
    moe, estimator = config.moe, ESTIMATORS[config.moe.router]
    dense = [layer for layer in range(config.layers) if not config.sparse(layer)]
    whole, scales = config.dim % config.heads == 0, {"short_mscale", "long_mscale"}
    gates = estimator.gate == "masked" and estimator.temperature == 1
    fits = {
        "llama": {
            f"model.norm = {config.norm!r}": config.norm == "rms",
            f"model.head_bias = {config.head_bias}": not config.head_bias,
            f"model.window = {config.window}": not config.window,
            f"model.heads = {config.heads} in model.dim = {config.dim}": whole,
            "short_mscale and long_mscale": not scales & set(config.rope_scaling),
        },
        "phimoe": {
            f"model.norm = {config.norm!r} with experts": config.norm == "layer",
            f"dense layers {dense} among sparse ones": not dense,
            f"model.moe.top_k = {moe.top_k}": moe.top_k == 2,
            f"model.moe.mask = {moe.mask!r}": moe.mask == "code",
            f"the gates of model.moe.router = {moe.router!r}": gates,
        },
    }
    return [fault for fault, fit in fits[kind].items() if not fit]


def _rope_table(config: Model, kind: str) -> dict[str, Any] | None:
    scaling = dict(config.rope_scaling)
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
    if scaling["rope_type"] == "default":
        return None
    if scaling["rope_type"] == "longrope":
        factor = scaling.setdefault("attention_factor", 1.0)
        if kind == "phimoe":
            scaling = {"short_mscale": factor, "long_mscale": factor} | scaling
    return scaling
