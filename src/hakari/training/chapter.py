"""The demo's chapter on training: a tiny mixture of experts on Python's own library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hakari import run
from hakari.report import Chapter, Facts, Part, Picture, Section, Table, Text
from hakari.terminal import grid
from hakari.training.config import Config, from_dict, to_dict
from hakari.training.generate_command import open_run, write
from hakari.training.metrics import read
from hakari.training.parallel import alone
from hakari.training.plots import expert_loads, loss, save_plots
from hakari.training.shards import read_index
from hakari.training.sizing import size
from hakari.training.train_command import run_training, store_of

TINY: dict[str, Any] = {  # as examples/moe_tiny.toml
    "steps": 400,
    "batch": 16,
    "length": 128,
    "model": {
        "dim": 128,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "moe": {"experts": 8, "top_k": 2, "hidden": 128, "router": "grin"},
    },
    "data": {"text": ["stdlib:**/*.py"], "vocabulary": 2048},
    "optimizer": {"learning_rate": 3e-3, "warmup": 40},
}
PROMPTS = ("def ", "class ", '"""Return ')
INTRO = (
    "A transformer whose every layer has eight experts, two of which see each token, learns the "
    "source code of Python's standard library for about a minute. Its router is GRIN's (arXiv "
    "2409.12136): experts are sampled, and the gradient sees what the others would have done."
)


def train_tiny(folder: Path) -> Part:
    """A tiny mixture of experts learns Python's own library: about a minute."""
    place = folder / "moe"
    place.mkdir()
    with alone():
        finished = run_training(from_dict(TINY), place, torch.device("cpu"))
    save_plots(place)
    writer = open_run(place)
    texts = {prompt: write(writer, prompt, 80) for prompt in PROMPTS} if finished else {}
    config, rows = from_dict(run.read_config(place)), read(place)
    facts = _facts(config, rows, place)
    return Part(
        "moe",
        _chapter(rows, facts, texts),
        partial(_show, facts, _routers(rows[-1]), texts),
        _record(config, rows),
        to_dict(config),
        interrupted=not finished,
    )


def _chapter(
    rows: Sequence[Mapping[str, Any]], facts: list[tuple[str, str]], texts: Mapping[str, str]
) -> Chapter:
    last = rows[-1]
    curve = Picture(
        loss(rows),
        f"training and validation loss over {last['step']} steps, from {rows[0]['loss']:.2f} to "
        f"{last['loss']:.2f} nats a token",
        "A model that knew nothing would lose the logarithm of the vocabulary.",
    )
    loads = Picture(
        expert_loads(rows),
        "load of each expert over the mean load, by layer and step",
        "White: the mean load. The balancing loss counts over the whole step.",
    )
    samples = [Text(prompt + text, "code") for prompt, text in texts.items()]
    sections = [
        Section("The run", [Facts(facts), curve]),
        Section("Experts", [loads, _routers(last)]),
    ]
    if samples:
        sections.append(Section("What it writes", samples))
    return Chapter("Training: a mixture of experts", sections, INTRO)


def _facts(config: Config, rows: Sequence[Mapping[str, Any]], place: Path) -> list[tuple[str, str]]:
    found, last = size(config), rows[-1]
    index = read_index(store_of(place))
    seconds = sum(row["seconds"] for row in rows)
    held = [r["validation_loss"] for r in rows if r["validation_loss"] is not None]
    total = sum(shard.tokens for shards in index.splits.values() for shard in shards)
    facts = [
        ("parameters", f"{found.total:,}, of which {found.active:,} act on a token"),
        ("text", f"{index.documents:,} files, {index.text_bytes / 1e6:.1f} MB, {total:,} tokens"),
        ("training", f"{last['tokens']:,} tokens in {last['step']} steps, {seconds:.0f} s"),
        ("loss at the end", f"{last['loss']:.3f} nats a token"),
    ]
    if held:
        bits = held[-1] / math.log(2) * total / index.text_bytes
        facts.append(("validation loss", f"{held[-1]:.3f} nats a token, {bits:.2f} bits a byte"))
    return [*facts, ("run folder", str(place))]


def _routers(row: Mapping[str, Any]) -> Table:
    lines = [
        [
            f"layer {layer}",
            *(f"{n / (sum(load) / len(load)):.2f}" for n in (min(load), max(load))),
            f"{entropy:.2f}",
            f"{single:.0%}",
        ]
        for layer, load, entropy, single in zip(
            row["layer"], row["load"], row["entropy"], row["singletons"], strict=True
        )
    ]
    head = ["", "smallest load", "largest load", "entropy", "one candidate"]
    caption = "Routers at the last step: load over the mean load; entropy in nats; share of choices"
    return Table(head, lines, caption + " that had a single candidate and gave no gradient.")


def _record(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = rows[-1]
    held = [r["validation_loss"] for r in rows if r["validation_loss"] is not None]
    return {
        "parameters": size(config).total,
        "active": size(config).active,
        "steps": last["step"],
        "loss": last["loss"],
        "validation_loss": held[-1] if held else None,
        "seconds": sum(row["seconds"] for row in rows),
        "load": last["load"],
    }


def _show(
    facts: list[tuple[str, str]], routers: Table, texts: Mapping[str, str], console: Console
) -> None:
    for name, value in facts:
        console.print(f"{name}: {value}")
    console.print(grid(routers))
    for prompt, text in texts.items():
        console.print(f"\n{prompt}{text}")
    console.print()
