"""`hakari generate`: text from a run's newest checkpoint, as it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hakari import run
from hakari.training import checkpoint, config, tokenizer
from hakari.training.generation import generate
from hakari.training.hardware import pick_device
from hakari.training.model import Transformer, initialise, tie
from hakari.training.tokenizer import Tokenizer
from hakari.training.trainer import CHECKPOINTS


@dataclass(frozen=True)
class Writer:
    """A trained model with its tokenizer; `length` is the number of tokens it was trained on."""

    model: Transformer
    tokenizer: Tokenizer
    length: int


def answer(
    folder: Path, prompt: str, count: int, temperature: float, top_p: float, seed: int
) -> int:
    """Print the prompt and what follows; returns the exit status."""
    writer = open_run(folder)
    print(prompt, end="", flush=True)
    write(
        writer,
        prompt,
        count,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        tell=lambda text: print(text, end="", flush=True),
    )
    print()
    return 0


def open_run(folder: Path) -> Writer:
    """The model of a run's newest checkpoint, whole, on this process's device.

    Raises FileNotFoundError or ValueError if the folder is not of a run, or has no checkpoint.
    """
    stored = config.from_dict(run.read_config(folder))
    found = checkpoint.latest(folder / CHECKPOINTS)
    if not found:
        raise ValueError(f"{folder} has no complete checkpoint: train it for some steps first")
    with torch.device("meta"):
        model = Transformer(stored.model)
    model.to_empty(device=pick_device())
    tie(model)
    initialise(model, 0)
    checkpoint.load(found, model)
    return Writer(model.eval(), tokenizer.load(folder), stored.length)


def write(
    writer: Writer,
    prompt: str,
    count: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> str:
    """What follows a prompt at the start of a document; `tell` hears it piece by piece."""
    words = writer.tokenizer
    start = [words.end_of_text, *(int(i) for i in tokenizer.encode(words, prompt))]
    found: list[int] = []
    told = ""

    def hear(token: int) -> None:
        nonlocal told
        found.append(token)
        text = tokenizer.decode(words, found)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
            tell(text[len(told) :])
            told = text

    generate(
        writer.model,
        start,
        count,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        context=writer.length,
        stop=words.end_of_text,
        on_token=hear,
    )
    return tokenizer.decode(words, found)
