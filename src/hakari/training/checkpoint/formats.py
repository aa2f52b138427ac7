"""Which format a folder has, and opening and writing any of them.

hakari                  manifest.json and COMMIT; or a folder of such, step-N and LATEST
hugging-face            model.safetensors, or model.safetensors.index.json and its shards
dcp                     .metadata and *.distcp of torch.distributed.checkpoint (FSDP2, titan);
                        or its safetensors, which say so in their headers
megatron                metadata.json beside common.pt or .metadata; or a folder of iter_N
deepspeed               latest and a folder with *_model_states.pt; or that folder
deepspeed-universal     latest_universal and a folder with zero/; or that folder
atoms                   atoms-00000.safetensors, ..., or NAME/STATE.safetensors; `export` writes it
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hakari.training.checkpoint.boxes import Box, extents
from hakari.training.checkpoint.conversion import Progress, convert, converted, opened
from hakari.training.checkpoint.dtypes import bits
from hakari.training.checkpoint.foreign.atoms import holds_atoms, open_atoms
from hakari.training.checkpoint.foreign.hugging_face_folder import (
    FLOATS,
    INDEX,
    SINGLE,
    metadata,
    open_hugging_face,
    read_config,
    write_hugging_face,
)
from hakari.training.checkpoint.manifest import COMMIT, MANIFEST
from hakari.training.checkpoint.retention import LATEST, leftovers, located, steps
from hakari.training.checkpoint.source import WEIGHT, Info, Key, Source
from hakari.training.checkpoint.storage import Folder, Location, ObjectFolder, open_folder, small
from hakari.training.checkpoint.stored import open_checkpoint

if TYPE_CHECKING:
    from hakari.training.checkpoint.language.rules import Program

WRITTEN = ("hakari", "hugging-face", "dcp", "megatron", "deepspeed", "deepspeed-universal")
FORMATS = (*WRITTEN, "atoms")
ROOT = "hakari-root"
LOOKED_FOR = (
    f"{COMMIT} or {LATEST} (hakari), {SINGLE} or {INDEX} (hugging-face), .metadata (dcp), "
    "metadata.json with common.pt (megatron), latest with *_model_states.pt (deepspeed), "
    "latest_universal (deepspeed-universal), atoms-00000.safetensors or NAME/STATE.safetensors "
    "(atoms)"
)
ITERATION = "latest_checkpointed_iteration.txt"
MODEL_STATES = re.compile(r".*model_states\.pt")
STEP_OF_DEEPSPEED = re.compile(r"global_step\d+")


def detect(where: Location, tag: str | None = None) -> str:
    """The format of a folder: one of FORMATS, or 'hakari-root' for a folder of our checkpoints.

    tag: of a DeepSpeed save, where `where` holds several. Raises FileNotFoundError for a folder
    that is not there or is empty, ValueError, listing what was looked for, if it is none of them.
    """
    found = _detected(where, tag)
    _refuse_tag(found, tag)
    return found


@dataclass(frozen=True)
class Target:
    """How a checkpoint is written, where its format leaves a choice.

    dtype: safetensors name, such as 'BF16', that floating-point weights are rounded to. config:
    folder of a model's configuration, or, for DeepSpeed's formats, a save of the run that shall
    load. rules: a rule file, or the name of one that comes with hakari, inverted, for the target's
    names and layout. values: for its expressions; what they and the file lack is taken from
    config's config.json. stage, processes: of DeepSpeed.
    """

    form: str
    dtype: str | None = None
    config: Location | None = None
    rules: str | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    stage: int = 1
    processes: int = 1


def open_any(
    where: Location,
    form: str | None = None,
    *,
    tag: str | None = None,
    rules: str | None = None,
    values: Mapping[str, int] | None = None,
    stages: int = 1,
    config: Location | None = None,
) -> Source:
    """Open a checkpoint of any format; form: its format, instead of the one that is detected.

    tag: of a DeepSpeed save. rules: a rule file, or the name of one that comes with hakari, that
    makes whole tensors, or other names, of what the checkpoint holds. values: for its expressions.
    stages: pipeline stages of a DeepSpeed save. config: folder of a model, whose config.json has
    the numbers that neither values nor the rules have. Raises ValueError or FileNotFoundError, as
    the format's own function does.
    """
    form = form or detect(where, tag)
    _refuse_tag(form, tag)
    if rules is not None:
        return _ruled(where, form, tag, _program(rules, values or {}, config), stages)
    return _opened(where, form, tag)


def write_any(
    source: Source,
    where: Location,
    target: Target,
    *,
    budget: int = 2**29,
    workers: int = 4,
    fingerprint: str = "",
    progress: Progress = None,
) -> str:
    """Write a source in any format; returns where it is. Other arguments: as of `convert`.

    Raises FileExistsError for a folder that is not empty (hakari: that has the step), ValueError
    for what the format cannot hold.
    """
    opened(source)
    form = target.form
    if form not in WRITTEN:
        way = " (atoms: by hakari checkpoint export)" if form == "atoms" else ""
        raise ValueError(f"format {form!r} is none of {', '.join(WRITTEN)}{way}")
    if target.rules is not None and form != "megatron":
        source = _inverted(source, target)
    if target.dtype is not None and form != "hugging-face":
        source = cast(source, target.dtype)
    both = {"budget": budget, "workers": workers}
    if form == "hakari":
        return convert(source, where, fingerprint=fingerprint, progress=progress, **both)
    if form == "hugging-face":
        config, dtype = target.config, target.dtype
        write_hugging_face(source, where, config=config, dtype=dtype, progress=progress, **both)
    elif form in ("deepspeed", "deepspeed-universal"):
        _write_deepspeed(source, where, target, budget, progress)
    elif form == "dcp":
        from hakari.training.checkpoint.foreign.dcp_writing import write_dcp

        write_dcp(source, where, budget=budget, progress=progress)
    else:
        _write_megatron(source, where, target, budget, progress)
    return str(where)


def cast(source: Source, dtype: str) -> Source:
    """A source whose floating-point weights are rounded to a type, such as 'BF16', when read."""
    if dtype not in FLOATS:
        raise ValueError(f"weights cannot be rounded to {dtype!r}: use one of {', '.join(FLOATS)}")
    chosen = {
        key: Info(info.shape, dtype)
        for key, info in source.tensors.items()
        if key[1] == WEIGHT and info.dtype in FLOATS and info.dtype != dtype
    }

    def read(key: Key, box: Box, out: np.ndarray) -> None:
        if key not in chosen:
            source.read(key, box, out)
            return
        old = source.tensors[key].dtype
        values = np.empty(extents(box), bits(old))
        source.read(key, box, values)
        out[...] = converted(values, old, dtype)

    return replace(source, tensors={**source.tensors, **chosen}, read=read)


def fingerprint(where: Location, form: str, rules: Sequence[str], more: str) -> str:
    """One text for the files of a checkpoint (names, sizes, times), rule files, and `more`."""
    folder = located(where) if form in ("hakari", ROOT) else open_folder(where)
    told = [folder.where, more, *((name, *_stamp(folder, name)) for name in folder.names())]
    told += [Path(file).read_bytes() for file in rules if Path(file).is_file()]
    return sha256(repr(told).encode()).hexdigest()


# --- finding out --------------------------------------------------------------------------


def _detected(where: Location, tag: str | None) -> str:
    folder = open_folder(where)
    names = set(folder.entries())
    if not names:
        raise FileNotFoundError(f"{folder.where} is not a folder, or there is nothing in it")
    if COMMIT in names or MANIFEST in names:
        return "hakari"
    if LATEST in names or steps(where) or leftovers(where):
        return ROOT
    found = (
        _megatron(names)
        or _deepspeed(folder, names, tag)
        or _safetensors(folder, names)
        or ("dcp" if ".metadata" in names else "")
        or ("atoms" if holds_atoms(folder, names) else "")
    )
    if found:
        return found
    hint = f"; give {folder.where.rstrip('/')}/checkpoints" if "checkpoints" in names else ""
    raise ValueError(
        f"{folder.where} is no checkpoint that is known: it has none of {LOOKED_FOR}{hint}"
    )


def _refuse_tag(form: str, tag: str | None) -> None:
    if tag is not None and not form.startswith("deepspeed"):
        raise ValueError(f"tag {tag!r}: only DeepSpeed's checkpoints have tags, and this is {form}")


def _stamp(folder: Folder, name: str) -> tuple[object, ...]:
    if isinstance(folder, ObjectFolder):
        said = folder.system.info(f"{folder.path}/{name}")
        times = ("ETag", "etag", "mtime", "LastModified", "updated", "created")
        return said["size"], *(str(said[key]) for key in times if key in said)
    found = (Path(folder.where) / name).stat()
    return found.st_size, found.st_mtime_ns


def _megatron(names: set[str]) -> str:
    inside = "metadata.json" in names and {"common.pt", ".metadata"} & names
    return "megatron" if inside or ITERATION in names else ""


def _safetensors(folder: Folder, names: set[str]) -> str:
    """Hugging Face's, or DCP's, whose headers say which part of its tensor each one is."""
    if SINGLE in names or INDEX in names:
        return "hugging-face"
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    return "dcp" if shards and "DCP_SHARDING_INFO" in metadata(folder, shards[0]) else ""


def _deepspeed(folder: Folder, names: set[str], tag: str | None) -> str:
    """A save in a folder, or the folder of saves, of which a universal one is not the first choice.

    Where both `latest` and `latest_universal` are there, the save is what was trained, and its
    conversion may be of another day.
    """
    if any(MODEL_STATES.fullmatch(name) for name in names):
        return "deepspeed-universal" if "zero" in names else "deepspeed"
    if tag is None:
        for file in ("latest", "latest_universal"):
            if file in names:
                tag = small(folder, file, 4096).decode(errors="replace").strip()
                break
    saves = [tag] if tag is not None else [n for n in names if STEP_OF_DEEPSPEED.fullmatch(n)]
    for save in saves:
        if save in names and (found := _deepspeed_save(folder.child(save))):
            return found
    return ""


def _deepspeed_save(folder: Folder) -> str:
    names = folder.entries()
    if not any(MODEL_STATES.fullmatch(name) for name in names):
        return ""
    return "deepspeed-universal" if "zero" in names else "deepspeed"


# --- opening and writing ------------------------------------------------------------------


def _opened(where: Location, form: str, tag: str | None) -> Source:
    if form in ("hakari", ROOT):
        return open_checkpoint(where)
    if form == "hugging-face":
        return open_hugging_face(where)
    if form == "dcp":
        from hakari.training.checkpoint.foreign.dcp import open_dcp

        return open_dcp(where)
    if form == "megatron":
        from hakari.training.checkpoint.foreign.megatron import open_megatron

        return open_megatron(_iteration(where))
    if form == "deepspeed":
        from hakari.training.checkpoint.foreign.deepspeed import open_deepspeed

        return open_deepspeed(where, tag)
    if form == "deepspeed-universal":
        from hakari.training.checkpoint.foreign.deepspeed_universal import open_universal

        return open_universal(where, tag)
    if form == "atoms":
        return open_atoms(where)
    raise ValueError(f"format {form!r} is none of {', '.join(FORMATS)}")


def _iteration(where: Location) -> Location:
    """The newest of Megatron's iterations, where a folder holds several."""
    folder = open_folder(where)
    if ITERATION not in folder.entries():
        return where
    said = small(folder, ITERATION, 4096).decode(errors="replace").strip()
    if not said.isdecimal():
        raise ValueError(f"{folder.where}/{ITERATION} says {said[:80]!r}, which is no iteration")
    return f"{folder.where.rstrip('/')}/iter_{int(said):07d}"


def _ruled(where: Location, form: str, tag: str | None, program: Program, stages: int) -> Source:
    """What rules make of a checkpoint, and of its slices where tensors were split."""
    from hakari.training.checkpoint.language.assembly import apply

    if form == "megatron":
        from hakari.training.checkpoint.foreign.megatron import open_megatron

        return open_megatron(_iteration(where), program)
    if form == "deepspeed":
        from hakari.training.checkpoint.foreign.deepspeed import open_slices

        return apply(program, open_slices(where, tag, stages))
    return apply(program, {(0, 0, 0): _opened(where, form, tag)})


def _inverted(source: Source, target: Target) -> Source:
    from hakari.training.checkpoint.language.assembly import invert

    return invert(_target_program(target), source)[0, 0, 0]


def _target_program(target: Target) -> Program:
    from hakari.training.checkpoint.language.rules import shipped_names

    if target.rules is None:
        raise ValueError(
            f"{target.form} is written by rules: give some (--target-rules), such as megatron-gpt; "
            f"with hakari come {', '.join(shipped_names())}"
        )
    config = None if target.form.startswith("deepspeed") else target.config
    return _program(target.rules, target.values, config)


def _program(rules: str, values: Mapping[str, int], config: Location | None) -> Program:
    """The program in a file, or the one of that name that comes with hakari."""
    from hakari.training.checkpoint.language.model_config import numbers_of
    from hakari.training.checkpoint.language.rules import load_rules, shipped

    own_file = Path(rules).suffix == ".toml" or Path(rules).is_file()
    program = load_rules(rules, values) if own_file else shipped(rules, values)
    if config is None:
        return program
    return replace(program, config=numbers_of(read_config(config)) | dict(program.config))


def _write_deepspeed(
    source: Source, where: Location, target: Target, budget: int, progress: Progress
) -> None:
    if target.form == "deepspeed":
        from hakari.training.checkpoint.foreign.deepspeed_write import write_zero

        write_zero(
            source,
            where,
            target.stage,
            target.processes,
            target.config,
            budget=budget,
            progress=progress,
        )
        return
    from hakari.training.checkpoint.foreign.deepspeed_write import write_universal

    write_universal(source, where, target.stage, target.config, budget=budget, progress=progress)


def _write_megatron(
    source: Source, where: Location, target: Target, budget: int, progress: Progress
) -> None:
    from hakari.training.checkpoint.foreign.megatron import write_megatron

    write_megatron(source, where, _target_program(target), budget=budget, progress=progress)
