"""Hugging Face folders, Llama's and Phi-MoE's (GRIN's own): read, and written for transformers.

    model = Transformer(read_config(folder))
    load(folder, model)
    save(model, another_folder)

Logits equal those of transformers' LlamaForCausalLM and PhimoeForCausalLM. What only training
knows (dropout, noise on the inputs, weight of the balancing loss) is neither read nor written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from hakari.training.config import Model
from hakari.training.hugging_face_config import from_table, places, stacked, to_table
from hakari.training.model import Transformer, put
from hakari.training.tokenizer import Tokenizer
from hakari.training.tokenizer import save as save_tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def read_config(folder: str | Path) -> Model:
    """The model that a folder's config.json describes.

    Phi-MoE's router becomes `grin` with the released code's mask and its `router_jitter_noise`.
    Raises FileNotFoundError, or ValueError that names the key whose value has no counterpart here.
    """
    file = Path(folder) / CONFIG
    table = _json(file)
    try:
        return from_table(table)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load(folder: str | Path, model: Transformer, strict: bool = True) -> list[str]:
    """Fill `model` from a folder, tensor by tensor, and return the names it had nothing for.

    The model may be a part (a pipeline stage) and its weights may be shards. Values are converted
    to the dtype of the weight they fill. Nothing is changed unless everything fits.
    strict: a weight without a tensor, or a tensor without a weight, is an error.
    Raises FileNotFoundError; ValueError that lists missing or unexpected names and wrong shapes.
    """
    weights = Weights(folder)
    missing = weights.check(model, strict)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in missing:
                put(weight, weights[name])
    return missing


def save(
    model: Transformer,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    length: int = 2048,
    shard_bytes: int = 4 * 10**9,
) -> None:
    """Write a folder that transformers' `AutoModelForCausalLM.from_pretrained` opens.

    tokenizer: written beside it. dtype: of the file; None: as the weights are. length: tokens of
    the longest text, a note to other programs. shard_bytes: most in one file.
    The folder appears whole or not at all.
    Raises FileExistsError if it holds anything; ValueError, before anything is written, if
    neither architecture can express the model, or the model is a part or has sharded weights.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: name another")
    dtype = dtype or next(model.parameters()).dtype
    table = to_table(model.config) | {
        "dtype": str(dtype).removeprefix("torch."),
        "max_position_embeddings": length,
    }
    tensors = _pieces(model)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, tensors, dtype, shard_bytes)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
            table["eos_token_id"] = tokenizer.end_of_text
        _write_json(partial / CONFIG, table)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Weights(Mapping[str, Tensor]):
    """A folder's tensors by hakari's names, each read when it is asked for.

    Experts, which files hold one by one, come stacked. A tied head is the embedding.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.config = Path(folder), read_config(folder)
        self.found = {
            name: (file, tuple(part.get_slice(name).get_shape()))
            for file in _files(self.folder)
            for part in [_open(file)]
            for name in part.keys()  # noqa: SIM118 - not a mapping
        }
        self.names = {name: places(name, self.config) for name in _parameters(self.config)}
        if self.config.tied:
            self.names["head.weight"] = self.names["embed.weight"]

    def __getitem__(self, name: str) -> Tensor:
        tensors = [self._read(place) for place in self.names[name]]
        return torch.stack(tensors) if stacked(name) else tensors[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def check(self, model: Transformer, strict: bool = True) -> list[str]:
        """The model's names that the folder lacks; raises ValueError as `load` says."""
        config = model.config
        if config.tied and not self.config.tied:
            raise ValueError(f"{self.folder} has a head of its own: set model.tied = false")
        known = {place for name in _parameters(config) for place in places(name, config)}
        unexpected = [name for name in self.found if name not in known and not self._idle(name)]
        missing: dict[str, list[str]] = {}
        wrong: list[str] = []
        for name, weight in model.named_parameters():
            if weight.is_meta:
                raise ValueError(f"{name} is on the meta device: call model.to_empty first")
            own = self.names.get(name, [])  # none: not in the model that config.json describes
            absent = [place for place in own or places(name, config) if place not in self.found]
            if absent or not own:
                missing[name] = absent or places(name, config)
            else:
                wrong += self._unlike(name, tuple(weight.shape))
        absent = [place for lost in missing.values() for place in lost]
        faults = {"wrong shape": wrong}
        if strict:
            faults |= {"missing": absent, "unexpected": unexpected}
        if any(faults.values()):
            raise ValueError(f"{self.folder} does not fit the model: {_listed(faults)}")
        return list(missing)

    def complete(self) -> None:
        """Raise ValueError if the files do not hold just what config.json implies."""
        known = dict.fromkeys(place for own in self.names.values() for place in own)
        faults = {
            "missing": [place for place in known if place not in self.found],
            "unexpected": [p for p in self.found if p not in known and not self._idle(p)],
        }
        if any(faults.values()):
            raise ValueError(f"{self.folder} is not what its {CONFIG} says: {_listed(faults)}")

    def _unlike(self, name: str, shape: tuple[int, ...]) -> list[str]:
        own = self.names[name]
        if stacked(name):
            if len(own) != shape[0]:
                return [f"{name} has {len(own)} experts, the model {shape[0]}"]
            shape = shape[1:]
        found = {place: self.found[place][1] for place in own}
        return [f"{p} is {has}, the model has {shape}" for p, has in found.items() if has != shape]

    def _idle(self, name: str) -> bool:
        """Old files repeat the tied head and hold the rotary frequencies."""
        return (self.config.tied and name == "lm_head.weight") or name.endswith(
            "rotary_emb.inv_freq"
        )

    def _read(self, place: str) -> Tensor:
        if place not in self.found:
            raise ValueError(f"{self.folder} has no tensor {place}")
        tensor: Tensor = _open(self.found[place][0]).get_tensor(place)
        return tensor


def _parameters(config: Model) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Transformer(config).named_parameters()]


def _listed(faults: dict[str, list[str]]) -> str:
    lines = []
    for fault, names in faults.items():
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        if names:
            lines.append(f"{fault} ({len(names)}): {', '.join(names[:10])}{more}")
    return "; ".join(lines)


# --- files --------------------------------------------------------------------------------


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: a Hugging Face model is a folder that has one")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{file} holds a {type(table).__name__}, not an object")
    return table


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}: pickled weights (.bin) are not read"
        )
    files = [folder / name for name in sorted(set(_json(folder / INDEX)["weight_map"].values()))]
    if lost := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder / INDEX} names files that are not there: {lost}")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def _pieces(model: Transformer) -> list[tuple[str, Tensor]]:
    """(name in files, tensor) of everything, experts apart."""
    own = {name: weight.detach() for name, weight in model.named_parameters()}
    if absent := [name for name in _parameters(model.config) if name not in own]:
        raise ValueError(f"the model is a part: {_listed({'missing': absent})}")
    pieces = []
    for name, weight in own.items():
        if isinstance(weight, DTensor):
            raise ValueError(f"{name} is a shard: load the run's checkpoint in one process first")
        parts = weight.unbind(0) if stacked(name) else [weight]
        pieces += list(zip(places(name, model.config), parts, strict=True))
    return pieces


def _write_weights(
    folder: Path, pieces: list[tuple[str, Tensor]], dtype: torch.dtype, limit: int
) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    total = size = 0
    for name, piece in pieces:
        own = piece.numel() * dtype.itemsize
        if size + own > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = piece
        size, total = size + own, total + own
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [WEIGHTS]
    for file, shard in zip(names, shards, strict=True):
        whole = {name: piece.to(dtype).contiguous() for name, piece in shard.items()}
        save_file(whole, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_json(file: Path, table: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
