"""Writing checkpoints that DeepSpeed loads: ZeRO-1, 2, 3 for a number of processes, universal.

Tensors are read from the source as they are written, a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hakari.training.checkpoint.foreign.deepspeed_elements import exact
from hakari.training.checkpoint.foreign.deepspeed_model import STATE
from hakari.training.checkpoint.foreign.deepspeed_plan import (
    TEMPLATE,
    Plan,
    from_deepspeed,
    make_plan,
)
from hakari.training.checkpoint.foreign.deepspeed_trees import (
    counted,
    flat_state,
    model_tree,
    partitioned_state,
    states_of,
    universal_options,
)
from hakari.training.checkpoint.foreign.torch_writing import write_torch
from hakari.training.checkpoint.source import WEIGHT, Source
from hakari.training.checkpoint.storage import Folder, Location, open_folder

Progress = Callable[[int], None] | None


def write_zero(
    source: Source,
    where: Location,
    stage: int = 1,
    processes: int = 1,
    template: Location | None = None,
    tag: str | None = None,
    precision: str | None = None,
    frozen: Sequence[str] | None = None,
    budget: int = 2**29,
    progress: Progress = None,
) -> None:
    """Write a ZeRO checkpoint that load_checkpoint takes on that many processes.

    stage: 1, 2 or 3. template: a ZeRO save of the run that shall load, for the order of
    parameters, configuration and loss scaler; needless for a source that DeepSpeed saved in that
    configuration. A schedule that is not DeepSpeed's own is not made up: load without it.
    precision: of the module's copies ('F32', 'BF16', 'F16'), from the configuration if None.
    frozen: untrained parameters, to tell them from buffers, where neither the source nor the
    template does. budget: bytes of tensors held at once. Raises ValueError
    for what cannot be written so, FileExistsError for a folder that is not empty.
    """
    if stage not in (1, 2, 3) or processes < 1:
        raise ValueError(f"stage {stage}, {processes} processes: stage is 1, 2 or 3")
    _check_order(source, template)
    root, plan = _empty(where), make_plan(source, template, precision, frozen)
    tag = tag or f"global_step{source.step or 0}"
    folder = root.child(tag)
    prefix = {"BF16": "bf16_"}.get(plan.precision, "")
    for rank in range(processes):
        file = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        state = (partitioned_state if stage == 3 else flat_state)(
            source, plan, stage, processes, rank
        )
        tree = {
            STATE: state,
            "ds_config": dict(plan.config),
            "ds_version": plan.version,
        }
        write_torch(folder, file, tree, budget, progress)
    for rank in range(processes if stage == 3 else 1):
        start = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        tree = model_tree(source, plan, stage, processes, rank)
        write_torch(folder, f"{start}mp_rank_00_model_states.pt", tree, budget, progress)
    _finish(root, folder, "latest", tag)


def write_universal(
    source: Source,
    where: Location,
    stage: int = 1,
    template: Location | None = None,
    tag: str | None = None,
    precision: str | None = None,
    frozen: Sequence[str] | None = None,
    budget: int = 2**29,
    progress: Progress = None,
) -> None:
    """Write a checkpoint in the universal format, which DeepSpeed loads on any process count.

    stage: of the run that shall load, as DeepSpeed reads another form of atoms for ZeRO-3 than
    for 1 and 2. It loads neither frozen parameters nor buffers from this format, and for ZeRO-3
    it gives all groups the options of the first. Other arguments and errors: as write_zero's.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"stage {stage}: give 1, 2 or 3, that of the run that shall load")
    root, plan = _empty(where), make_plan(source, template, precision, frozen)
    if stage < 3 and plan.dealt:
        raise ValueError(
            "with round_robin_gradients, DeepSpeed loads universal checkpoints into the wrong "
            "parameters: switch that off in the run that shall load and give a save of it as "
            "template= (--config), or use write_zero (--to deepspeed)"
        )
    tag = tag or f"global_step{source.step or 0}_universal"
    folder = root.child(tag)
    _write_atoms(source, plan, folder, stage, budget, progress)
    options = universal_options(source, plan, stage)
    write_torch(folder, "zero/optimizer_state.pt", options, budget, progress)
    start = "zero_pp_rank_0_" if stage == 3 else ""
    tree = model_tree(source, plan, stage, 1, 0, universal=True)
    write_torch(folder, f"{start}mp_rank_00_model_states.pt", tree, budget, progress)
    _finish(root, folder, "latest_universal", tag)


def _empty(where: Location) -> Folder:
    folder = open_folder(where)
    if folder.entries():
        raise FileExistsError(f"{folder.where} is not empty: choose a new folder to write to")
    return folder


def _write_atoms(
    source: Source, plan: Plan, folder: Folder, stage: int, budget: int, progress: Progress
) -> None:
    for group in plan.groups:
        states, scalars = states_of(source, group.members)
        for name in group.members:
            _check_name(name, *states, *scalars)
            for state in (WEIGHT, *states):
                atom = exact(source, (name, state))
                file = f"zero/{name}/{'fp32' if state == WEIGHT else state}.pt"
                tree = atom if stage == 3 else {"cat_dim": 0, "param": atom}
                write_torch(folder, file, tree, budget, progress)
            for key, value in scalars.items() if stage < 3 else ():
                number = counted(plan, key, value)
                write_torch(folder, f"zero/{name}/{key}.pt", number, budget)


def _check_name(*names: str) -> None:
    """Names become names of folders and files: none may lead out of the folder."""
    for name in names:
        if not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
            raise ValueError(f"{name!r} cannot be the name of a folder, as that format needs it")


def _check_order(source: Source, template: Location | None) -> None:
    if template is None and not from_deepspeed(source):
        raise ValueError(
            "DeepSpeed loads ZeRO files by position, not by name, and this source does not say in "
            f"which order its run has parameters: give {TEMPLATE}, or use write_universal (--to "
            "deepspeed-universal)"
        )


def _finish(root: Folder, folder: Folder, latest: str, tag: str) -> None:
    """Name the save in the file that DeepSpeed looks at, once all else is on disk."""
    folder.sync()
    root.write(latest, tag.encode())
    root.sync()
