"""`hakari checkpoint`: looking into checkpoints, checking, comparing, converting, pruning them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from hakari.terminal import INTERRUPTED, to_json
from hakari.training.checkpoint import inspection, losses
from hakari.training.checkpoint.command_tables import (
    SHOWN,
    inspected,
    plain,
    show_checkpoint,
    show_difference,
    show_report,
    show_root,
)
from hakari.training.checkpoint.conversion import empty_folder, export_atoms
from hakari.training.checkpoint.foreign.hugging_face_folder import CONFIG
from hakari.training.checkpoint.formats import (
    ROOT,
    Target,
    detect,
    fingerprint,
    open_any,
    write_any,
)
from hakari.training.checkpoint.retention import (
    after,
    clear_leftovers,
    go_back,
    named,
    removable,
    remove,
    steps,
)
from hakari.training.checkpoint.retention import leftovers as leftovers_of
from hakari.training.checkpoint.source import WEIGHT, Source
from hakari.training.checkpoint.storage import open_folder
from hakari.training.checkpoint.verification import size_text
from hakari.training.checkpoint.verification import verify as read_all
from hakari.training.interrupt import graceful_stop


@dataclass(frozen=True)
class Reading:
    """What to read, and how: as of `open_any`. optimizer: its class, where that is known better."""

    where: str
    form: str | None = None
    tag: str | None = None
    rules: str | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    stages: int = 1
    optimizer: str | None = None
    config: str | None = None

    def open(self) -> Source:
        """The source. Raises as `open_any`."""
        source = open_any(
            self.where,
            self.form,
            tag=self.tag,
            rules=self.rules,
            values=self.values,
            stages=self.stages,
            config=self.config,
        )
        return source if self.optimizer is None else _stated(source, self.optimizer)


def inspect(
    where: str, form: str | None, tag: str | None, pattern: str | None, every: bool, json: bool
) -> int:
    """Print what a checkpoint holds; returns the exit status."""
    form = _form(where, form, tag)
    root = inspection.inspect_root(where) if form == ROOT else None
    found = None
    if root is None or root.latest:
        found = inspection.inspect(root.latest if root and root.latest else where, form, tag)
    if found and pattern and not any(fnmatchcase(p.name, pattern) for p in found.parameters):
        raise ValueError(f"no parameter's name matches {pattern!r}")
    if json:
        print(to_json({"root": plain(root), "checkpoint": found and inspected(found, pattern)}))
        return 0
    if root:
        show_root(root)
    if found:
        show_checkpoint(found, pattern, every)
    return 0


def verify(
    where: str, form: str | None, tag: str | None, every: bool, workers: int, json: bool
) -> int:
    """Print all damage; returns 1 if there is any."""
    _positive("workers", workers)
    form = _form(where, form, tag)
    folders = [where]
    if every and form == ROOT:
        folders = [f"{where.rstrip('/')}/{named(step)}" for step in steps(where)]
    if not folders:
        raise FileNotFoundError(f"{where} holds no complete checkpoint")
    with _bar("verify", _size(folders, form)) as told:
        reports = [read_all(each, told, form=form, tag=tag, workers=workers) for each in folders]
    if json:
        print(to_json([{**asdict(each), "whole": each.whole} for each in reports]))
    else:
        for report in reports:
            show_report(report)
    return 0 if all(each.whole for each in reports) else 1


def diff(first: str, second: str, every: bool, json: bool) -> int:
    """Print in what two checkpoints differ; returns 1 if they do."""
    with _bar("compare", None) as told:
        found = inspection.diff(first, second, progress=told)
    if json:
        print(to_json({"same": found.same, **plain(found)}))
    else:
        show_difference(found, first, second, None if every else SHOWN)
    return 0 if found.same else 1


def convert(reading: Reading, where: str, target: Target, budget: int, workers: int) -> int:
    """Write a checkpoint in another format; returns the exit status."""
    _positive("workers", workers)
    form = _form(reading.where, reading.form, reading.tag)
    reading, target = _with_config(reading, form, target)
    source = reading.open()
    lost = losses.told(source, target)
    total = sum(i.bytes for k, i in source.tensors.items() if _is_written(k[1], target.form))
    again = target.form == "hakari"
    rules = [rules for rules in (reading.rules, target.rules) if rules]
    mark = fingerprint(reading.where, form, rules, f"{reading} {target}") if again else ""

    def write(told: Callable[[int], None]) -> str:
        return write_any(
            source, where, target, budget=budget, workers=workers, fingerprint=mark, progress=told
        )

    status = _written(write, where, total, again)
    for line in () if status else lost:
        print(line, file=sys.stderr)
    return status


def export(
    reading: Reading,
    where: str,
    layout: Literal["grouped", "one-file-per-parameter"],
    budget: int,
    workers: int,
) -> int:
    """Write each tensor whole; returns the exit status."""
    _positive("workers", workers)
    source = reading.open()
    if layout == "one-file-per-parameter":
        for name, _ in source.tensors:
            if ".." in name or name.startswith("/") or "\\" in name:
                raise ValueError(f"{name!r} cannot be a file name: use --layout grouped")

    empty_folder(where)
    if lost := losses.left_by_atoms(source):
        print(f"left out: {', '.join(lost)} (atoms are tensors alone)", file=sys.stderr)

    def write(told: Callable[[int], None]) -> str:
        export_atoms(source, where, layout=layout, budget=budget, workers=workers, progress=told)
        return where

    return _written(write, where, sum(info.bytes for info in source.tensors.values()), False)


def prune(
    where: str, keep: int | None, leftovers: bool, dry_run: bool, newer_than: int | None = None
) -> int:
    """Remove checkpoints and say which; returns the exit status."""
    if keep is None and newer_than is None and not leftovers:
        raise ValueError("nothing to do: give --keep N, --after STEP or --leftovers")
    if keep is not None and newer_than is not None:
        raise ValueError("--keep removes old checkpoints and --after new ones: give one of them")
    if (form := detect(where)) not in ("hakari", ROOT):
        raise ValueError(f"{where} is {form}: only checkpoints of hakari are pruned")
    root, verb = open_folder(where), "would remove" if dry_run else "removed"
    old = [] if keep is None else removable(where, keep)
    old += [] if newer_than is None else after(where, newer_than)
    sizes = {named(each.step): each.bytes for each in inspection.inspect_root(where).steps}
    if newer_than is not None and not dry_run:
        go_back(root, newer_than)
    for name in old:
        if not dry_run:
            remove(root, name)
        print(f"{verb} {name} ({size_text(sizes[name])})")
    lost = leftovers_of(where) if leftovers else []
    if not dry_run and leftovers:
        clear_leftovers(where)
    for name in lost:
        print(f"{verb} {name} (never completed)")
    if not old and not lost:
        print("nothing to remove")
    return 0


# --- writing ------------------------------------------------------------------------------


def _written(
    write: Callable[[Callable[[int], None]], str], where: str, total: int, again: bool
) -> int:
    """Write with a bar; what is unfinished is removed, unless the same command goes on with it."""
    try:
        with _bar("write", total) as told:
            if again:
                done = write(told)
            else:
                with _removed_if_unfinished(where):
                    done = write(told)
    except KeyboardInterrupt:
        way = "the same command goes on where it stopped" if again else "what it wrote is removed"
        print(f"hakari: interrupted: {way}", file=sys.stderr)
        return INTERRUPTED
    print(done)
    return 0


@contextmanager
def _removed_if_unfinished(where: str) -> Iterator[None]:
    folder = empty_folder(where)
    there = "://" in where or Path(where).exists()
    try:
        yield
    except BaseException:
        for name in folder.entries():
            folder.remove(name)
        if not there and Path(where).exists():
            Path(where).rmdir()
        raise


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal; Ctrl-C is raised where progress is told, in any thread."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with graceful_stop() as asked, shown:
        task = shown.add_task(title, total=total)

        def told(count: int) -> None:
            if asked.is_set():
                raise KeyboardInterrupt
            shown.advance(task, count)

        yield told


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"--{name} {value}: give at least 1")


def _form(where: str, form: str | None, tag: str | None) -> str:
    """The format; that of hakari may also be a folder of checkpoints."""
    found = detect(where, tag) if form in (None, "hakari") else form
    return "hakari" if form == "hakari" and found != ROOT else found


def _is_written(state: str, form: str) -> bool:
    return form != "hugging-face" or state == WEIGHT


def _stated(source: Source, optimizer: str) -> Source:
    """A source whose optimizer is of the class that the user says."""
    names = sorted({*optimizer.split("+")})
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"--optimizer {optimizer}: write the name of its class, such as AdamW")
    if not source.groups and all(state == WEIGHT for _, state in source.tensors):
        raise ValueError(f"--optimizer {optimizer}: the source has no state of an optimizer")
    if source.optimizer not in ("", "+".join(names)):
        said = f"the source says that its optimizer is {source.optimizer}; now it is {optimizer}"
        print(said, file=sys.stderr)
    return replace(source, optimizer="+".join(names))


def _with_config(reading: Reading, form: str, target: Target) -> tuple[Reading, Target]:
    """Both with the folder that has the model's config.json: the one given, or the source."""
    if target.form.startswith("deepspeed"):  # there it is a save
        return reading, target
    config = str(target.config) if target.config else _own_config(reading.where, form)
    return replace(reading, config=config), replace(target, config=config)


def _own_config(where: str, form: str) -> str | None:
    there = form == "hugging-face" and CONFIG in open_folder(where).entries()
    return where if there else None


def _size(folders: Sequence[str], form: str) -> int | None:
    """Bytes to read, where that is quickly known."""
    if form not in ("hakari", ROOT):
        return None
    try:
        return sum(inspection.inspect(each, form).bytes for each in folders)
    except (OSError, ValueError):  # it is what `verify` will tell
        return None
