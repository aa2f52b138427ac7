"""A self-contained HTML report: chapters of sections of text, tables and pictures.

Knows nothing of what is reported and belongs to neither half; what `write_report` writes needs
no network to be read. Whoever adds a chapter writes a function that returns a `Chapter`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console


@dataclass(frozen=True)
class Text:
    """A paragraph; `lead` is large, `note` small, `warning` marked, `code` as typed."""

    text: str
    style: Literal["plain", "lead", "note", "warning", "code"] = "plain"
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the first column names the row, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Facts:
    """Labels and what they stand for, of any length."""

    rows: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Picture:
    """A figure with the words that stand for it (`alt`) and under it (`caption`)."""

    figure: Figure
    alt: str
    caption: str = ""
    kind: str = "picture"

    @property
    def source(self) -> str:
        """The figure as a data address, so that the page loads nothing."""
        return "data:image/svg+xml;base64," + base64.b64encode(svg(self.figure)).decode()


Block = Text | Table | Facts | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Chapter:
    """One question and its answer."""

    title: str
    sections: Sequence[Section]
    intro: str = ""


@dataclass(frozen=True)
class Part:
    """What a chapter contributes to `hakari demo`, beside the files that it wrote.

    name: its key in `--json` (`record`) and in config.toml (`config`), and of its files.
    show: prints the chapter on a terminal.
    interrupted: whether Ctrl-C cut it short; no chapter follows one that was.
    """

    name: str
    chapter: Chapter
    show: Callable[[Console], None]
    record: dict[str, Any]
    config: dict[str, Any]
    interrupted: bool = False


def write_report(path: Path, title: str, chapters: Sequence[Chapter], subtitle: str = "") -> Path:
    """Render chapters to one HTML file; raises FileExistsError rather than overwrite."""
    if path.exists():
        raise FileExistsError(f"{path} exists: give another name, or remove it first")
    environment = Environment(
        loader=PackageLoader("hakari"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["anchor"] = anchor
    page = environment.get_template("report.html").render(
        title=title, subtitle=subtitle, chapters=chapters
    )
    path.write_text(page, encoding="utf-8")
    return path


def svg(figure: Figure) -> bytes:
    """A figure as SVG, the same bytes for the same figure."""
    target = io.BytesIO()
    with rc_context({"svg.hashsalt": "hakari"}):
        figure.savefig(target, format="svg", metadata={"Date": None}, dpi=150)
    return target.getvalue()


def anchor(text: str) -> Markup:
    """A heading's address within the page."""
    return Markup("-".join("".join(c if c.isalnum() else " " for c in text.lower()).split()))
