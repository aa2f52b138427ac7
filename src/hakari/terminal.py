"""What a command prints: tables, one JSON object, an exit status. Belongs to neither half."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

if TYPE_CHECKING:  # not needed to print, and slow to load
    from hakari.report import Table

INTERRUPTED = 130  # exit status of a command that Ctrl-C stopped


def terminal() -> Console:
    """Standard output, wide enough for the tables when it is a file or a pipe."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=120)


def grid(table: Table) -> Grid:
    """A report's table for a terminal; a soft hyphen in its head breaks the line."""
    shown = Grid(
        title=table.caption,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for place, head in enumerate(table.head):
        left, head = place == 0, head.replace("\N{SOFT HYPHEN}", "-\n")  # 80 columns
        shown.add_column(head, justify="left" if left else "right", no_wrap=not left)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def to_json(found: Any) -> str:
    """Strict JSON: NaN and the infinities are null.

    >>> to_json({"ess": float("nan"), "draws": (1, 2)})
    '{"ess": null, "draws": [1, 2]}'
    """
    return json.dumps(_strict(found), allow_nan=False, ensure_ascii=False)


def _strict(found: Any) -> Any:
    if isinstance(found, dict):
        return {str(name): _strict(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_strict(value) for value in found]
    if hasattr(found, "item"):  # a number of NumPy's or torch's
        found = found.item()
    if isinstance(found, float) and not math.isfinite(found):
        return None
    return found
