"""One TOML file and `--set name=value` -> frozen dataclasses, every field documented.

`Config` is what a run needs and what its folder records. `load` reads it, `explain` prints it.
"""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Router = Literal[
    "gshard", "switch", "sparsemixer", "grin", "grin_paper", "grin_star", "aux_free", "joint"
]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _section(kind: type, text: str) -> Any:
    return field(default_factory=kind, metadata={"help": text})


@dataclass(frozen=True)
class MoE:
    """Mixture-of-experts layers (`[model.moe]`); `experts = 0` makes every layer dense."""

    experts: int = _option(0, "experts in a layer; 0: dense")
    top_k: int = _option(2, "experts that each token visits")
    hidden: int = _option(256, "width of one expert's SwiGLU")
    layers: tuple[int, ...] = _option((), "which layers are sparse, from 0; empty: all")
    router: Router = _option("grin", "gradient estimator of the router; see the docs' table")
    jitter: float = _option(
        0.1, "relative width of the sampling mask; part of the model, at inference too"
    )
    mask: Literal["code", "paper"] = _option(
        "code", "mask as in the released code, or Eq 2 of the paper (same to second order)"
    )
    balance: float = _option(0.01, "weight of the load balancing loss")
    balance_scope: Literal["step", "rank"] = _option(
        "step",
        "counts over which the load is balanced: the whole step (all ranks, all micro-batches: "
        "experts may specialise) or each rank's micro-batch (GShard)",
    )
    z_loss: float = _option(0.0, "weight of the mean squared log-sum-exp of the router's logits")
    bias_rate: float = _option(0.001, "step of the selection bias; router = 'aux_free' only")
    dead_steps: int = _option(
        500, "stop with an error if an expert got no token for so many steps; 0: never"
    )

    def __post_init__(self) -> None:
        _at_least("model.moe", self, experts=0, top_k=1, hidden=1, jitter=0, balance=0, z_loss=0)
        if self.experts and self.top_k > self.experts:
            raise ValueError(
                f"model.moe.top_k = {self.top_k} exceeds model.moe.experts = {self.experts}"
            )
        if self.experts and self.router == "switch" and self.top_k != 1:
            raise ValueError(f"router 'switch' sends a token to 1 expert; top_k = {self.top_k}")


@dataclass(frozen=True)
class Model:
    """The transformer (`[model]`)."""

    vocabulary: int = _option(0, "token ids; 0: the tokenizer's size, rounded up to 64")
    dim: int = _option(192, "width of the residual stream")
    layers: int = _option(6, "blocks")
    heads: int = _option(6, "query heads")
    kv_heads: int = _option(2, "key and value heads; a divisor of heads")
    head_dim: int = _option(0, "width of a head, even; 0: dim / heads")
    hidden: int = _option(512, "width of a dense layer's SwiGLU")
    rope_base: float = _option(10000.0, "base of the rotary angles")
    rope_scaling: Mapping[str, Any] = _section(
        dict, "Hugging Face's rope_scaling table: 'llama3' or 'longrope'"
    )
    norm: Literal["rms", "layer"] = _option("rms", "RMSNorm, or LayerNorm with bias (Phi-MoE)")
    norm_eps: float = _option(1e-5, "added to the variance")
    attention_bias: bool = _option(False, "biases of the four attention projections")
    head_bias: bool = _option(False, "bias of the output head")
    tied: bool = _option(True, "share the embedding with the output head")
    window: int = _option(0, "tokens that a token attends to, itself included; 0: all before it")
    initial_std: float = _option(0.02, "of the weights; residual outputs get std / sqrt(2 layers)")
    moe: MoE = _section(MoE, "mixture of experts")

    def __post_init__(self) -> None:
        _at_least("model", self, vocabulary=0, dim=1, layers=1, heads=1, kv_heads=1, hidden=1)
        _at_least("model", self, window=0, norm_eps=0, initial_std=0)
        if not self.head_dim:
            if self.dim % self.heads:
                raise ValueError(
                    f"model.dim = {self.dim} is not a multiple of model.heads = {self.heads}: "
                    "change one, or set model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim = {self.head_dim} is odd: rotary angles need pairs")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}"
            )
        beyond = [layer for layer in self.moe.layers if not 0 <= layer < self.layers]
        if beyond:
            raise ValueError(f"model.moe.layers has {beyond}; layers are 0 to {self.layers - 1}")

    def sparse(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is a mixture of experts."""
        return bool(self.moe.experts) and (not self.moe.layers or layer in self.moe.layers)


@dataclass(frozen=True)
class Data:
    """Text and how it becomes batches (`[data]`)."""

    text: tuple[str, ...] = _option(
        ("stdlib:**/*.py",),
        "files, folders, globs, .jsonl or .parquet; 'stdlib:GLOB' looks in Python's own library",
    )
    column: str = _option("text", "column of .jsonl and .parquet that holds the text")
    documents: Literal["file", "part", "line"] = _option(
        "file", "what a document is in plain text: a file, about 32,000 characters of it, a line"
    )
    tokenizer: str = _option("", "tokenizer.json or a Hugging Face folder; empty: train one")
    vocabulary: int = _option(4096, "size of the tokenizer that is trained")
    validation: float = _option(0.05, "share of the documents kept for validation")
    cache: str = _option("", "where token shards are kept; empty: ~/.cache/hakari/tokens")
    shard_tokens: int = _option(100_000_000, "tokens in a shard file")
    packing: bool = _option(True, "join documents into full rows; false: one document a row")
    isolate: bool = _option(True, "a token attends only to its own document")

    def __post_init__(self) -> None:
        _at_least("data", self, vocabulary=257, shard_tokens=1)
        if not 0 < self.validation < 1:
            raise ValueError(f"data.validation = {self.validation} is not a share between 0 and 1")
        if not self.text:
            raise ValueError("data.text is empty: name a file, a folder or a glob")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled decay, and the learning rate over the run (`[optimizer]`)."""

    learning_rate: float = _option(2e-3, "at its highest")
    beta1: float = _option(0.9, "decay of the mean gradient")
    beta2: float = _option(0.95, "decay of the mean squared gradient")
    eps: float = _option(1e-8, "added to the root of the second")
    weight_decay: float = _option(0.1, "of matrices; norms, biases and embeddings have none")
    clip: float = _option(1.0, "largest norm of the gradient; 0: no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = _option(
        "cosine", "after the warm-up: cosine, or warm-up, stable, decay (linear), or constant"
    )
    warmup: int = _option(50, "steps of linear warm-up")
    decay: float = _option(0.2, "share of the steps in which wsd decays")
    final: float = _option(0.1, "last learning rate as a share of the highest")

    def __post_init__(self) -> None:
        _at_least("optimizer", self, learning_rate=0, weight_decay=0, clip=0, warmup=0, final=0)
        _at_least("optimizer", self, eps=0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)} is not in [0, 1)")
        if not 0 < self.decay <= 1:
            raise ValueError(f"optimizer.decay = {self.decay} is not a share between 0 and 1")


@dataclass(frozen=True)
class Parallel:
    """How the processes divide the work (`[parallel]`); their product is the world's size."""

    data: int = _option(0, "groups that see other sequences, parameters sharded; 0: what is left")
    tensor: int = _option(1, "processes that share every layer's heads, widths and vocabulary")
    pipeline: int = _option(1, "stages of consecutive layers")
    schedule: Literal["1F1B", "GPipe"] = _option("1F1B", "order of micro-batches in the pipeline")

    def __post_init__(self) -> None:
        _at_least("parallel", self, data=0, tensor=1, pipeline=1)


@dataclass(frozen=True)
class Config:
    """A training run."""

    steps: int = _option(1000, "optimizer steps of the whole run")
    seed: int = _option(1, "of initialisation, order of the data, and routing noise")
    batch: int = _option(16, "sequences in a step, over all processes")
    micro_batch: int = _option(0, "sequences in one forward pass of a process; 0: all of its share")
    length: int = _option(256, "tokens in a sequence")
    precision: Literal["float32", "bfloat16", "float64"] = _option(
        "float32", "bfloat16: matrix products in bfloat16 (autocast), state in float32"
    )
    recompute: bool = _option(False, "recompute each block in backward: less memory, more time")
    compile: bool = _option(False, "torch.compile, a block at a time")
    deterministic: bool = _option(False, "refuse operations whose result varies from run to run")
    start: str = _option(
        "", "folder of a Hugging Face model to start from; dense weights are upcycled to experts"
    )
    validate_every: int = _option(100, "steps between validations; 0: only at the end")
    validate_batches: int = _option(20, "batches of a validation; 0: the whole validation split")
    checkpoint_every: int = _option(500, "steps between checkpoints; 0: only at the end")
    keep: int = _option(2, "newest checkpoints to keep; 0: all")
    model: Model = _section(Model, "the transformer")
    data: Data = _section(Data, "text and batches")
    optimizer: Optimizer = _section(Optimizer, "AdamW and the learning rate")
    parallel: Parallel = _section(Parallel, "data, tensor and pipeline parallelism")

    def __post_init__(self) -> None:
        _at_least("", self, steps=1, seed=0, batch=1, micro_batch=0, length=2, keep=0)
        _at_least("", self, validate_every=0, validate_batches=0, checkpoint_every=0)


def load(path: str | Path, changes: Sequence[str] = ()) -> Config:
    """Read a TOML file, then apply changes like `model.dim=256`, in order.

    Raises FileNotFoundError, or ValueError that names the key and the nearest known one.
    """
    return from_dict(read(path, changes))


def read(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """What a TOML file and changes say, and nothing else; raises as `load`."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    for change in changes:
        _change(table, change)
    return table


def from_dict(table: Mapping[str, Any]) -> Config:
    """A mapping as TOML gives it -> `Config`; raises ValueError as `load` does."""
    return typing.cast(Config, _build(Config, table, ""))


def to_dict(config: Any) -> dict[str, Any]:
    """Everything resolved, as `hakari.run.write_config` writes it; `from_dict` reads it back."""
    return {
        f.name: to_dict(value)
        if is_dataclass(value := getattr(config, f.name))
        else dict(value)
        if isinstance(value, Mapping)
        else value
        for f in fields(config)
    }


def explain(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of every field, sections in depth."""
    hints = typing.get_type_hints(kind)
    sections = []
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            sections.append((hints[f.name], f"{prefix}{f.name}."))
        else:
            default = {} if f.default is MISSING else f.default
            default = list(default) if isinstance(default, tuple) else default
            yield prefix + f.name, _name(hints[f.name]), repr(default), f.metadata["help"]
    for section, name in sections:
        yield from explain(section, name)


# --- from TOML ----------------------------------------------------------------------------


def _change(table: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"--set {change!r}: write it as name=value, such as model.dim=256")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = name.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {change!r}: {parent} is a value, not a section")
    table[last] = value


def _build(kind: Any, table: Any, path: str) -> Any:
    if not isinstance(table, Mapping):
        raise ValueError(f"{path.rstrip('.')} = {table!r} should be a section")
    hints = typing.get_type_hints(kind)
    for name in table:
        if name not in hints:
            raise ValueError(f"unknown key {path}{name}{_suggestion(path + name)}")
    values = {}
    for f in fields(kind):
        if f.name not in table:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(f"{path}{f.name} is missing")  # pragma: no cover
            continue
        hint, value = hints[f.name], table[f.name]
        values[f.name] = (
            _build(hint, value, f"{path}{f.name}.")
            if is_dataclass(hint)
            else _value(hint, value, path + f.name)
        )
    return kind(**values)


def _suggestion(name: str) -> str:
    known = list(dict.fromkeys(part for field, *_ in explain() for part in _prefixes(field)))
    last = name.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last][:1]
    near = near or difflib.get_close_matches(name, known, 1, 0.6)
    if not near:
        inner = {k.rpartition(".")[2]: k for k in known}
        near = [inner[k] for k in difflib.get_close_matches(last, inner, 1, 0.6)]
    return f": did you mean {near[0]}?" if near else "; `hakari train --fields` lists them all"


def _prefixes(name: str) -> Iterator[str]:
    """The sections around a field, outermost first, and the field."""
    parts = name.split(".")
    return (".".join(parts[: n + 1]) for n in range(len(parts)))


def _value(hint: Any, value: Any, name: str) -> Any:
    right = _converted(hint, value)
    if right is None:
        raise ValueError(f"{name} = {value!r} should be {_name(hint)}{_near_choice(hint, value)}")
    return right


def _converted(hint: Any, value: Any) -> Any:
    """The value in the type of the field, or None."""
    if get_origin(hint) is Literal:
        return value if value in get_args(hint) else None
    if get_origin(hint) is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            return None
        found = [_converted(get_args(hint)[0], item) for item in values]
        return None if None in found else tuple(found)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(hint) is not None:
        return dict(value) if isinstance(value, Mapping) else None
    return value if isinstance(value, hint) and (hint is bool) == isinstance(value, bool) else None


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of " + {int: "whole numbers", str: "strings"}[get_args(hint)[0]]
    plain = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return plain.get(hint, "a table")


def _near_choice(hint: Any, value: Any) -> str:
    if get_origin(hint) is not Literal:
        return ""
    near = difflib.get_close_matches(str(value), get_args(hint), 1)
    return f": did you mean {near[0]!r}?" if near else ""


def _at_least(section: str, config: Any, **least: float) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        if not value >= low:
            prefix = f"{section}." if section else ""
            raise ValueError(f"{prefix}{name} = {value} is below {low}")
