"""`hakari checkpoint`: what can be done with checkpoints. Help imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter

app = App(
    name="checkpoint",
    help="""Look into checkpoints of any framework, check, compare, convert and prune them.

PATH is a folder or an fsspec URL (s3://bucket/run): a checkpoint, or a folder of them, of which
the newest is taken; those of `hakari train` lie in RUN/checkpoints.""",
    help_format="markdown",
)

INPUT = Group.create_ordered(
    "Checkpoint", help="For example: hakari checkpoint inspect runs/moe/checkpoints"
)
TARGET = Group.create_ordered(
    "Target",
    help="For example: hakari checkpoint convert global_step900 llama --to hugging-face "
    "--dtype bf16 --config meta-llama",
)
SHOWN = Group.create_ordered("Output", help="For example: --filter 'layers.0.*' --json")

Written = Literal["hakari", "hugging-face", "dcp", "megatron", "deepspeed", "deepspeed-universal"]
Form = Literal[
    "hakari", "hugging-face", "dcp", "megatron", "deepspeed", "deepspeed-universal", "atoms"
]
Path = Annotated[str, Parameter(group=INPUT)]
Where = Annotated[str, Parameter(group=TARGET)]
From = Annotated[Form | None, Parameter(name="--from", group=INPUT)]
Tag = Annotated[str | None, Parameter(group=INPUT)]
All = Annotated[bool, Parameter(name="--all", negative="", group=SHOWN)]
Json = Annotated[bool, Parameter(name="--json", negative="", group=SHOWN)]
Rules = Annotated[str | None, Parameter(group=INPUT)]
Values = Annotated[
    tuple[str, ...],
    Parameter(name="--set", group=INPUT, negative="", consume_multiple=True, show_default=False),
]
Budget = Annotated[str, Parameter(group=TARGET)]
Workers = Annotated[int, Parameter(group=TARGET)]

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64"}
LEAST = 16 * 10**6
"""Bytes of a budget: 16 MB."""


@app.command
def inspect(
    path: Path,
    /,
    *,
    form: From = None,
    tag: Tag = None,
    filter_: Annotated[str | None, Parameter(name="--filter", group=SHOWN)] = None,
    all_: All = False,
    json: Json = False,
) -> int:
    """What a checkpoint holds; reads no tensor, so that it is quick however large it is.

    Step, size, time, versions and processes it comes from, the optimizer's options, parameters
    with their states, extra state; of a folder of checkpoints also its steps and what is left of
    saves that were never completed.

    Parameters
    ----------
    path: str
        Checkpoint of any known format, or a folder of them.
    form: str
        Its format, instead of the one that is detected.
    tag: str
        Of a DeepSpeed save, instead of the one that its file `latest` names.
    filter_: str
        List the parameters whose names match, as file names do in a shell: 'layers.0.*'.
    all_: bool
        List all parameters.
    json: bool
        Print one JSON object, with all parameters that match, and nothing else on stdout.
    """
    from hakari.training.checkpoint import command

    return command.inspect(path, form, tag, filter_, all_, json)


@app.command
def verify(
    path: Path,
    /,
    *,
    form: From = None,
    tag: Tag = None,
    all_: All = False,
    workers: Annotated[int, Parameter(group=INPUT)] = 2,
    json: Json = False,
) -> int:
    """Read every byte of a checkpoint and list all damage; exit status 1 if there is any.

    Compares each 16 MiB with its checksum and each tensor with its content. Of formats that keep
    no checksums it proves that they are complete and can be read.

    Parameters
    ----------
    path: str
        Checkpoint of any known format, or a folder of them: then its newest.
    form: str
        Its format, instead of the one that is detected.
    tag: str
        Of a DeepSpeed save, instead of the one that its file `latest` names.
    all_: bool
        Verify every checkpoint in the folder.
    workers: int
        Threads that read, of 16 MiB each.
    json: bool
        Print one JSON object and nothing else on stdout.
    """
    from hakari.training.checkpoint import command

    return command.verify(path, form, tag, all_, workers, json)


@app.command
def diff(first: Path, second: Path, /, *, all_: All = False, json: Json = False) -> int:
    """In what two checkpoints differ, of any formats; exit status 1 if they do.

    Which tensors only one has, or has with another shape or element type; where values differ, by
    how much: max |a - b| and ||a - b|| / ||a||; the step, options of the optimizer, extra state.
    What each rank keeps of its own (random generators) is shown too, and counts as no difference:
    on another number of processes there is another number of them. Two checkpoints
    of hakari are compared by the contents noted in them, without reading tensors that are equal:
    whether their files still hold that, `verify` tells.

    Parameters
    ----------
    first: str
        Checkpoint, or a folder of them: then its newest.
    second: str
        Checkpoint to compare it with.
    all_: bool
        List all differences, not the first 20 of each kind.
    json: bool
        Print one JSON object and nothing else on stdout.
    """
    from hakari.training.checkpoint import command

    return command.diff(first, second, all_, json)


@app.command
def convert(
    source: Path,
    target: Where,
    /,
    *,
    form: From = None,
    tag: Tag = None,
    rules: Rules = None,
    set_: Values = (),
    pipeline: Annotated[int, Parameter(group=INPUT)] = 1,
    optimizer: Annotated[str | None, Parameter(group=INPUT)] = None,
    to: Annotated[Written, Parameter(group=TARGET)] = "hakari",
    target_rules: Annotated[str | None, Parameter(group=TARGET)] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "fp64"] | None, Parameter(group=TARGET)
    ] = None,
    config: Annotated[str | None, Parameter(group=TARGET)] = None,
    processes: Annotated[int, Parameter(group=TARGET)] = 1,
    stage: Annotated[Literal[1, 2, 3], Parameter(group=TARGET)] = 1,
    budget: Budget = "512MB",
    workers: Workers = 4,
) -> int:
    """Convert a checkpoint from any format to any other, in bounded memory.

    Ctrl-C stops it: a conversion to hakari's own format then goes on where it stopped when the
    same command is given again; of others, what was written is removed. The last line printed is
    where the new checkpoint is; what its format has no place for is said on stderr.

    Parameters
    ----------
    source: str
        Checkpoint, or a folder of them: then its newest.
    target: str
        Folder to make; an existing one must be empty. For --to hakari a folder of checkpoints,
        in which step-N is made.
    form: str
        Format of the source, instead of the one that is detected.
    tag: str
        Of a DeepSpeed save, instead of the one that its file `latest` names.
    rules: str
        File of rules that make whole tensors, or other names, of what the source holds, needed
        for tensor-parallel DeepSpeed saves; or a name of those that come along: hakari,
        llama-fused-qkv, megatron-deepspeed, megatron-gpt, megatron-gpt-layers.
    set_: tuple
        Numbers that the rules need, after the paths: --set heads=32 kv_heads=8, or --set for
        each of them.
    pipeline: int
        Pipeline stages of a DeepSpeed save.
    optimizer: str
        Class of the optimizer, such as AdamW, where the source does not say it.
    to: str
        Format to write; `export` writes atoms.
    target_rules: str
        Rules as for --rules, backwards: from whole tensors to the target's names and layout.
        Needed for megatron.
    dtype: str
        Round floating-point weights to this type; optimizer states stay as they are.
    config: str
        Folder of the model (default: the source, where it is one): its config.json tells the
        numbers that rules need and --set does not give; for hugging-face it and the tokenizer
        are taken over. For deepspeed: a save of the run that shall load.
    processes: int
        Of the run that shall load, for --to deepspeed.
    stage: int
        ZeRO stage of that run.
    budget: str
        Tensor data that are held at once, such as 512MB or 2GB.
    workers: int
        Threads, each of which writes a file.
    """
    from hakari.training.checkpoint import command, formats

    read = command.Reading(source, form, tag, rules, _numbers(set_), pipeline, optimizer)
    target_form = formats.Target(
        to,
        DTYPES[dtype] if dtype else None,
        config,
        target_rules,
        _numbers(set_),
        stage,
        processes,
    )
    return command.convert(read, target, target_form, _size(budget), workers)


@app.command
def export(
    path: Path,
    target: Where,
    /,
    *,
    form: From = None,
    tag: Tag = None,
    layout: Annotated[
        Literal["grouped", "one-file-per-parameter"], Parameter(group=TARGET)
    ] = "grouped",
    budget: Budget = "512MB",
    workers: Workers = 4,
) -> int:
    """Write each tensor whole into plain safetensors files, named STATE/NAME.

    What is no tensor (step, options of the optimizer, extra state) is left out, which a line on
    stderr says. The other commands read the result as the format atoms.

    Parameters
    ----------
    path: str
        Checkpoint of any known format, or a folder of them: then its newest.
    target: str
        Folder to make; an existing one must be empty.
    form: str
        Format of the source, instead of the one that is detected.
    tag: str
        Of a DeepSpeed save, instead of the one that its file `latest` names.
    layout: str
        grouped (files of up to 1 GiB), or one-file-per-parameter: NAME/STATE.safetensors.
    budget: str
        Tensor data that are held at once, such as 512MB or 2GB.
    workers: int
        Threads, each of which writes a file.
    """
    from hakari.training.checkpoint import command

    return command.export(command.Reading(path, form, tag), target, layout, _size(budget), workers)


@app.command
def prune(
    path: Path,
    /,
    *,
    keep: Annotated[int | None, Parameter(group=INPUT)] = None,
    after: Annotated[int | None, Parameter(group=INPUT)] = None,
    leftovers: Annotated[bool, Parameter(negative="", group=INPUT)] = False,
    dry_run: Annotated[bool, Parameter(negative="", group=INPUT)] = False,
) -> int:
    """Remove checkpoints of hakari, and say which; never the last whole one.

    A checkpoint counts as whole if every byte of it is what was written; all of those are read.

    Parameters
    ----------
    path: str
        Folder of checkpoints.
    keep: int
        Whole checkpoints that stay, the newest ones. Nothing newer than these is removed.
    after: int
        Remove those newer than this step instead, to go on from it.
    leftovers: bool
        Also remove what saves and conversions left that were never completed; none may be under
        way.
    dry_run: bool
        Only say what would be removed.
    """
    from hakari.training.checkpoint import command

    return command.prune(path, keep, leftovers, dry_run, after)


def _numbers(settings: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in settings:
        name, _, value = text.partition("=")
        if not name.isidentifier() or not value.isdecimal():
            raise ValueError(f"--set {text}: write NAME=NUMBER, such as kv_heads=8")
        found[name] = int(value)
    return found


def _size(text: str) -> int:
    """Bytes of a size such as 512MB or 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"--budget {text}: write a size, such as 512MB or 2GB")
    power = " kmgt".index(match[2].lower() or " ")
    found = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if found < LEAST:
        raise ValueError(f"--budget {text} is too little: give at least 16MB")
    return found
