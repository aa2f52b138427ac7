"""`hakari checkpoint`: looking into checkpoints, checking, comparing, converting, pruning them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from hakari.terminal import INTERRUPTED, terminal, to_json
from hakari.training.checkpoint import inspection
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
from hakari.training.checkpoint.inspection import Difference, Inspection, Root
from hakari.training.checkpoint.retention import clear_leftovers, named, removable, remove, steps
from hakari.training.checkpoint.retention import leftovers as leftovers_of
from hakari.training.checkpoint.source import WEIGHT, Info, Source
from hakari.training.checkpoint.storage import open_folder
from hakari.training.checkpoint.verification import Report
from hakari.training.checkpoint.verification import verify as read_all
from hakari.training.interrupt import graceful_stop

SHOWN = 20
"""Rows of a long table that are shown without --all."""


@dataclass(frozen=True)
class Reading:
    """What to read, and how: as of `open_any`."""

    where: str
    form: str | None = None
    tag: str | None = None
    rules: str | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    stages: int = 1

    def open(self) -> Source:
        """The source. Raises as `open_any`."""
        return open_any(
            self.where,
            self.form,
            tag=self.tag,
            rules=self.rules,
            values=self.values,
            stages=self.stages,
        )


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
        print(to_json({"root": _plain(root), "checkpoint": found and _inspected(found, pattern)}))
        return 0
    if root:
        _show_root(root)
    if found:
        _show(found, pattern, every)
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
            _show_report(report)
    return 0 if all(each.whole for each in reports) else 1


def diff(first: str, second: str, every: bool, json: bool) -> int:
    """Print in what two checkpoints differ; returns 1 if they do."""
    with _bar("compare", None) as told:
        found = inspection.diff(first, second, progress=told)
    if json:
        print(to_json({"same": found.same, **_plain(found)}))
    else:
        _show_difference(found, first, second, None if every else SHOWN)
    return 0 if found.same else 1


def convert(reading: Reading, where: str, target: Target, budget: int, workers: int) -> int:
    """Write a checkpoint in another format; returns the exit status."""
    _positive("workers", workers)
    form = _form(reading.where, reading.form, reading.tag)
    source = reading.open()
    config = target.config
    if target.form == "hugging-face":
        config = config or _own_config(reading.where, form)
        _warn_of_losses(source, config)
    target = Target(**{**vars(target), "config": config})
    total = sum(i.bytes for k, i in source.tensors.items() if _is_written(k[1], target.form))
    again = target.form == "hakari"
    rules = [rules for rules in (reading.rules, target.rules) if rules]
    mark = fingerprint(reading.where, form, rules, f"{reading} {target}") if again else ""

    def write(told: Callable[[int], None]) -> str:
        return write_any(
            source, where, target, budget=budget, workers=workers, fingerprint=mark, progress=told
        )

    return _written(write, where, total, again)


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

    def write(told: Callable[[int], None]) -> str:
        export_atoms(source, where, layout=layout, budget=budget, workers=workers, progress=told)
        return where

    return _written(write, where, sum(info.bytes for info in source.tensors.values()), False)


def prune(where: str, keep: int | None, leftovers: bool, dry_run: bool) -> int:
    """Remove old checkpoints and say which; returns the exit status."""
    if keep is None and not leftovers:
        raise ValueError("nothing to do: give --keep N, --leftovers, or both")
    if (form := detect(where)) not in ("hakari", ROOT):
        raise ValueError(f"{where} is {form}: only checkpoints of hakari are pruned")
    root, verb = open_folder(where), "would remove" if dry_run else "removed"
    old = [] if keep is None else removable(where, keep)
    sizes = {named(each.step): each.bytes for each in inspection.inspect_root(where).steps}
    for name in old:
        if not dry_run:
            remove(root, name)
        print(f"{verb} {name} ({_bytes(sizes[name])})")
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


def _own_config(where: str, form: str) -> str | None:
    there = form == "hugging-face" and CONFIG in open_folder(where).entries()
    return where if there else None


def _warn_of_losses(source: Source, config: object) -> None:
    lost = dict.fromkeys(state for _, state in source.tensors if state != WEIGHT)
    if lost:
        said = f"left out: {', '.join(lost)} (Hugging Face folders hold weights alone)"
        print(said, file=sys.stderr)
    if config is None:
        print("no config.json: give --config FOLDER for transformers to open it", file=sys.stderr)


def _size(folders: Sequence[str], form: str) -> int | None:
    """Bytes to read, where that is quickly known."""
    if form not in ("hakari", ROOT):
        return None
    try:
        return sum(inspection.inspect(each, form).bytes for each in folders)
    except (OSError, ValueError):  # it is what `verify` will tell
        return None


# --- showing ------------------------------------------------------------------------------


def _show_root(root: Root) -> None:
    table = _table(root.where, "step", "size", "made", "")
    for each in root.steps:
        newest = root.latest is not None and root.latest.endswith(named(each.step))
        said = ("" if each.whole else "damaged ") + ("latest" if newest else "")
        table.add_row(f"{each.step:,}", _bytes(each.bytes), each.made or "", said)
    out = terminal()
    out.print(table)
    for name in root.leftovers:
        out.print(f"never completed: {name} (hakari checkpoint prune --leftovers removes it)")
    if root.problem:
        out.print(root.problem)
    out.print()


def _show(found: Inspection, pattern: str | None, every: bool) -> None:
    out = terminal()
    table = _table(found.where, "", "")
    for head, text in _facts(found):
        table.add_row(head, text)
    out.print(table)
    for number, group in enumerate(found.groups):
        options = ", ".join(f"{name} {_text(value)}" for name, value in group.options.items())
        out.print(f"group {number}: {len(group.members)} parameters; {options}")
    rows = [p for p in found.parameters if pattern is None or fnmatchcase(p.name, pattern)]
    listed = _table("", "parameter", "shape", "dtype", "size", "states")
    most = None if every or pattern else SHOWN
    for p in rows[:most]:
        states = " ".join(
            s if i.dtype == p.dtype else f"{s}:{i.dtype}" for s, i in p.states.items()
        )
        listed.add_row(p.name, "x".join(map(str, p.shape)) or "-", p.dtype, _bytes(p.bytes), states)
    out.print(listed)
    if most is not None and len(rows) > most:
        out.print(f"and {len(rows) - most} more: --all lists them, --filter 'layers.0.*' some")


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    elements = sum(prod(p.shape) for p in found.parameters)
    files = "" if found.files is None else f" in files: {found.files}"
    yield "format", found.form
    yield "step", "unknown" if found.step is None else f"{found.step:,}"
    yield "size", f"{_bytes(found.bytes)}{files}, tensors: {found.tensors}"
    yield "parameters", f"{len(found.parameters)} with {elements:,} elements"
    if found.made:
        yield "made", f"{found.made} (its newest file)"
    for name, value in found.origin.items():
        if value not in (None, "", {}, []):
            yield name, _text(value)
    if found.optimizer:
        yield "optimizer", found.optimizer
    for names in found.tied:
        yield "tied", ", ".join(names)
    if found.scalars:
        yield "numbers", f"{found.scalars} states that are plain numbers"
    if found.extra:
        yield "extra state", ", ".join(found.extra)
    if any(found.ranks):
        yield "states of ranks", f"{len(found.ranks)}: {', '.join(found.ranks[0]) or 'none'}"


def _show_report(report: Report) -> None:
    out = terminal()
    for damage in report.damage:
        out.print(str(damage), soft_wrap=True)
    for name in report.unlisted:
        out.print(f"{name}: belongs to no tensor (not of this checkpoint)", soft_wrap=True)
    out.print(f"{report.where}: {report}", soft_wrap=True)


def _show_difference(found: Difference, first: str, second: str, most: int | None) -> None:
    out = terminal()
    for title, keys in ((first, found.only_first), (second, found.only_second)):
        _list(f"only in {title}", ["tensor", "state"], keys, most)
    kinds = [(*key, _kind(one), _kind(two)) for key, one, two in found.kinds]
    _list("shape or element type", ["tensor", "state", first, second], kinds, most)
    values = [
        (v.parameter, v.state, f"{v.elements:,}", f"{v.largest:.3g}", f"{v.relative:.3g}")
        for v in found.values
    ]
    heads = ["tensor", "state", "elements", "max |a - b|", "||a - b|| / ||a||"]
    _list("values", heads, values, most)
    _list("what is no tensor", ["", first, second], found.rest, most)
    out.print(f"{found.equal} tensors are equal" + ("; no difference" if found.same else ""))


def _list(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], most: int | None
) -> None:
    rows = list(rows)
    if not rows:
        return
    table = _table(f"{title}: {len(rows)}", *heads)
    for row in rows[:most]:
        table.add_row(*row)
    out = terminal()
    out.print(table)
    if most is not None and len(rows) > most:
        out.print(f"and {len(rows) - most} more: --all lists them")
    out.print()


def _table(title: str, *heads: str) -> Table:
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        show_header=any(heads),
    )
    for head in heads:
        table.add_column(head, overflow="fold", justify="right" if head == "size" else "left")
    return table


def _kind(info: Info) -> str:
    return f"{info.dtype} {[*info.shape]}"


def _text(value: Any) -> str:
    """A tree of plain values on one line."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_text, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


def _inspected(found: Inspection, pattern: str | None) -> dict[str, Any]:
    table: dict[str, Any] = _plain(found)
    return table | {
        "parameters": [
            row
            for row in table["parameters"]
            if pattern is None or fnmatchcase(row["name"], pattern)
        ]
    }


def _plain(value: Any) -> Any:
    """Dataclasses and trees as what JSON has; anything else as its text."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
