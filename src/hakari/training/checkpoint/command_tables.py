"""What `hakari checkpoint` prints: tables, and the plain values of its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from rich.table import Table

from hakari.terminal import terminal
from hakari.training.checkpoint.inspection import Difference, Inspection, Root
from hakari.training.checkpoint.retention import named
from hakari.training.checkpoint.source import Info
from hakari.training.checkpoint.verification import Report, size_text

SHOWN = 20
"""Rows of a long table that are shown without --all."""


def show_root(root: Root) -> None:
    """The checkpoints in a folder, and what is left of others."""
    table = _table(root.where, "step", "size", "made", "")
    for each in root.steps:
        newest = root.latest is not None and root.latest.endswith(named(each.step))
        said = ("" if each.whole else "damaged ") + ("latest" if newest else "")
        table.add_row(f"{each.step:,}", size_text(each.bytes), each.made or "", said)
    out = terminal()
    out.print(table)
    for name in root.leftovers:
        out.print(f"never completed: {name} (hakari checkpoint prune --leftovers removes it)")
    if root.problem:
        out.print(root.problem)
    out.print()


def show_checkpoint(found: Inspection, pattern: str | None, every: bool) -> None:
    """What one holds; parameters that match `pattern`, or the first, or every one."""
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
        listed.add_row(
            p.name, "x".join(map(str, p.shape)) or "-", p.dtype, size_text(p.bytes), states
        )
    out.print(listed)
    if most is not None and len(rows) > most:
        out.print(f"and {len(rows) - most} more: --all lists them, --filter 'layers.0.*' some")


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    elements = sum(prod(p.shape) for p in found.parameters)
    files = "" if found.files is None else f" in files: {found.files}"
    yield "format", found.form
    yield "step", "unknown" if found.step is None else f"{found.step:,}"
    yield "size", f"{size_text(found.bytes)}{files}, tensors: {found.tensors}"
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


def show_report(report: Report) -> None:
    """All damage, and the verdict."""
    out = terminal()
    for damage in report.damage:
        out.print(str(damage), soft_wrap=True)
    for name in report.unlisted:
        out.print(f"{name}: belongs to no tensor (not of this checkpoint)", soft_wrap=True)
    out.print(f"{report.where}: {report}", soft_wrap=True)


def show_difference(found: Difference, first: str, second: str, most: int | None) -> None:
    """In what two differ, up to `most` rows of each kind."""
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
    _list("states of ranks", ["", first, second], found.ranks, most)
    said = "; no difference" if found.same else ""
    if found.same and found.ranks:
        said = "; no difference but in what each rank keeps of its own"
    out.print(f"{found.equal} tensors are equal{said}")


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


def inspected(found: Inspection, pattern: str | None) -> dict[str, Any]:
    """`plain`, with the parameters that match `pattern`."""
    table: dict[str, Any] = plain(found)
    return table | {
        "parameters": [
            row
            for row in table["parameters"]
            if pattern is None or fnmatchcase(row["name"], pattern)
        ]
    }


def plain(value: Any) -> Any:
    """Dataclasses and trees as what JSON has; anything else as its text."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
