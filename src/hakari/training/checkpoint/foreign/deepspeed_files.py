"""Files of a DeepSpeed checkpoint: which there must be, and what their pickles say.

Nothing is executed: objects of DeepSpeed's and Megatron's classes are read as inert records.
Names: `mp_rank_MM_model_states.pt` (ZeRO 0, 1, 2), `zero_pp_rank_D_mp_rank_MM_model_states.pt`
(ZeRO 3) and `[bf16_|fp16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt`, for the data-parallel rank
D and the model-parallel rank MM. `latest`, beside the folders of the saves, names one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from hakari.training.checkpoint.foreign.checked_folder import checked
from hakari.training.checkpoint.foreign.torch_files import read_torch
from hakari.training.checkpoint.foreign.torch_values import Record, Stored
from hakari.training.checkpoint.storage import Folder, Location, open_folder, small

INERT = ("deepspeed.*", "megatron.*")
MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
OPTIMIZER = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt"
)
REFUSED = {
    r"(layer_\d+_)?expert_\d+_mp_rank_.*|expp_rank_.*": "experts (MoE) in files of their own",
    r"offloaded_tensors": "optimizer states that were offloaded to NVMe",
}


@dataclass(frozen=True)
class Rank:
    """A file of one rank, and the tree in it, whose tensors are `Stored`."""

    file: str
    tree: Mapping[str, Any]

    def get(self, *path: str) -> Any:
        """What lies at a path of keys. Raises ValueError, naming the file, if nothing does."""
        found: Any = self.tree
        for depth, key in enumerate(path):
            if not isinstance(found, Mapping) or key not in found:
                where = " / ".join(path[: depth + 1])
                raise ValueError(f"{self.file} has no {where!r}: not a file that DeepSpeed saved")
            found = found[key]
        return found


@dataclass(frozen=True)
class Slice:
    """One model-parallel rank: its model files (one, or with ZeRO-3 each data-parallel rank's)
    and its optimizer files by data-parallel rank (none without ZeRO).
    """

    index: int
    models: tuple[Rank, ...]
    optimizers: tuple[Rank, ...]


@dataclass(frozen=True)
class Save:
    """All files of a save, read and found complete."""

    folder: Folder
    tag: str
    dp: int
    stage: int
    slices: tuple[Slice, ...]


@contextmanager
def laid_out(where: Location) -> Iterator[None]:
    """Say of trees that are not as DeepSpeed makes them that they are not, by a ValueError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{where} is not laid out as DeepSpeed's saves are: {type(error).__name__}, {error}"
        ) from error


def open_save(where: Location, tag: str | None, latest: str = "latest") -> Save:
    """Find and read the files of a save; tensors stay where they are.

    Raises ValueError for files that miss, are too many, or contradict one another.
    """
    folder, tag = tagged(where, tag, latest)
    names = folder.entries()
    refuse(folder, names)
    models, optimizers = by_rank(folder, names, MODEL), by_rank(folder, names, OPTIMIZER)
    if not models:
        raise ValueError(
            f"{folder.where} has no model_states.pt file: give the folder that DeepSpeed saved to, "
            f"with its '{latest}' file, or a tag (found: {', '.join(names[:8]) or 'nothing'})"
        )
    first = read_rank(folder, models[min(models)])
    dp, mp = world(first)
    sharded = any(dp_rank is not None for dp_rank, _ in models)
    _complete(folder, models, dp if sharded else None, mp, first.file)
    if optimizers or first.tree.get("param_shapes") is not None:
        _complete(folder, optimizers, dp, mp, first.file, "optim_states")
    slices = tuple(_slice(folder, m, dp, sharded, models, optimizers) for m in range(mp))
    stage = 3 if sharded else _stage(slices[0])
    return Save(folder, tag, dp, stage, slices)


def tagged(where: Location, tag: str | None, latest: str) -> tuple[Folder, str]:
    """The folder of a save, and its tag: the one asked for, else what the `latest` file says.

    A folder that itself holds the files will do. Raises ValueError for a tag that is no name of
    a folder in it.
    """
    folder = checked(open_folder(where))
    if tag is None and latest in folder.entries():
        tag = small(folder, latest, 4096).decode(errors="replace").strip()
    if tag is None:
        return folder, str(where).rstrip("/").rpartition("/")[2]
    if not tag or tag.startswith(".") or tag not in folder.entries():
        there = ", ".join(folder.entries()[:8]) or "nothing"
        raise ValueError(f"{folder.where} has no folder {tag!r}, the tag to open; it has {there}")
    return checked(folder.child(tag)), tag


def refuse(folder: Folder, names: Iterable[str]) -> None:
    """Raise ValueError for a save that holds parts which are not read."""
    for name in names:
        for pattern, what in REFUSED.items():
            if re.fullmatch(pattern, name):
                raise ValueError(f"{folder.where}/{name}: {what} cannot be read")


def by_rank(
    folder: Folder, names: Iterable[str], pattern: re.Pattern[str]
) -> dict[tuple[int | None, int], str]:
    """Files by (data-parallel rank or None, model-parallel rank)."""
    found: dict[tuple[int | None, int], str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if not match:
            continue
        rank = (None if match["dp"] is None else int(match["dp"]), int(match["mp"]))
        if rank in found:
            raise ValueError(
                f"{folder.where} has both {found[rank]} and {name} for the same rank: two saves "
                "are mixed, remove the files of one"
            )
        found[rank] = name
    kinds = {dp is None for dp, _ in found}
    if len(kinds) > 1:
        raise ValueError(f"{folder.where} mixes files of ZeRO-3 and of a lower stage: two saves")
    return found


def read_rank(folder: Folder, name: str) -> Rank:
    """The tree of one file."""
    tree = tensors_of(folder, name)
    if not isinstance(tree, Mapping):
        raise ValueError(f"{folder.where}/{name} holds a {type(tree).__name__}, not a dictionary")
    return Rank(name, tree)


def tensors_of(folder: Folder, name: str) -> Any:
    """What a file holds, with `Stored` for tensors and inert records for objects."""
    return read_torch(folder, name, inert=INERT)


def world(rank: Rank) -> tuple[int, int]:
    """Data-parallel and model-parallel sizes of the run that saved."""
    sizes = rank.get("dp_world_size"), rank.get("mp_world_size")
    for name, size in zip(("dp_world_size", "mp_world_size"), sizes, strict=True):
        if not isinstance(size, int) or not 0 < size < 2**20:
            raise ValueError(f"{rank.file}: {name} is {size!r}, not a number of processes")
    return sizes


def row_major(stored: Any, what: str) -> Stored:
    """A stored tensor whose elements lie in row-major order. Raises ValueError otherwise."""
    if not isinstance(stored, Stored):
        raise ValueError(f"{what} is a {type(stored).__name__}, not a tensor")
    step = 1
    for size, stride in zip(reversed(stored.shape), reversed(stored.strides), strict=True):
        if size > 1 and stride != step:
            raise ValueError(
                f"{what} was saved with strides {tuple(stored.strides)}, which do not lie row by "
                "row: save it again with .contiguous()"
            )
        step *= size
    return stored


def numel(stored: Stored) -> int:
    """Elements of a stored tensor."""
    return prod(stored.shape)


def _slice(
    folder: Folder,
    mp: int,
    dp: int,
    sharded: bool,
    models: Mapping[tuple[int | None, int], str],
    optimizers: Mapping[tuple[int | None, int], str],
) -> Slice:
    ranks: Sequence[int | None] = range(dp) if sharded else [None]
    read = tuple(read_rank(folder, models[rank, mp]) for rank in ranks)
    states = tuple(read_rank(folder, optimizers[d, mp]) for d in range(dp)) if optimizers else ()
    for rank in read:
        if world(rank) != world(read[0]) or rank.tree.get("global_steps") != read[0].tree.get(
            "global_steps"
        ):
            raise ValueError(f"{rank.file} and {read[0].file} are not of the same save")
    return Slice(mp, read, states)


def _complete(
    folder: Folder,
    files: Mapping[tuple[int | None, int], str],
    dp: int | None,
    mp: int,
    says: str,
    kind: str = "model_states",
) -> None:
    """Raise ValueError unless there is a file for each rank, and none more."""
    ranks: Sequence[int | None] = [None] if dp is None else range(dp)
    wanted = {(d, m) for m in range(mp) for d in ranks}
    shape = f"{len(ranks)} data-parallel x {mp} model-parallel"
    missing, more = sorted(wanted - set(files)), sorted(set(files) - wanted)
    if missing:
        d, m = missing[0]
        name = f"{'' if d is None else f'zero_pp_rank_{d}_'}mp_rank_{m:02d}_{kind}.pt"
        raise ValueError(
            f"{folder.where} has no {name}, and {len(missing) - 1} more miss: {says} says that "
            f"{shape} ranks saved"
        )
    if more:
        raise ValueError(
            f"{folder.where}/{files[more[0]]} is of a rank that did not save, as {says} says that "
            f"{shape} ranks did: files of another save are left over"
        )


def _stage(part: Slice) -> int:
    if not part.optimizers:
        return 0
    stage = part.optimizers[0].get("optimizer_state_dict").get("zero_stage", 1)
    stage = stage.args[0] if isinstance(stage, Record) and stage.args else stage
    if stage not in (1, 2):
        raise ValueError(f"{part.optimizers[0].file}: ZeRO stage {stage!r} is not known")
    return int(stage)
