"""Docstrings of the house style as Markdown: argument lines become a list, doctests code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ARGUMENT = re.compile(r"^(`?[A-Za-z_]\w*`?(?:,? (?:and )?`?[A-Za-z_]\w*`?)*)(:) (?=\S)")
_WORDS = ("Raises ", "Returns ")


def to_markdown(text: str) -> str:
    """The docstring with `name: what it is` lines as a list and doctests in fences."""
    lines: list[str] = []
    code = listed = False
    for line in text.splitlines():
        if line.startswith(">>> ") and not code:
            code = True
            lines += ["", "```python"]
        elif code and not line.strip():
            code = False
            lines.append("```")
        if code:
            lines.append(line)
            continue
        if _ARGUMENT.match(line):
            lines += [] if listed else [""]
            listed = True
            line = _ARGUMENT.sub(r"- **\1** – ", line)
        elif not line.strip():
            listed = False
        elif listed and not line.startswith(" "):
            listed = False
            lines.append("")
        lines.append(line)
    return "\n".join(lines + ["```"] * code)


class HouseDocstrings(Extension):
    """Rewrite each docstring before the handler parses it."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """One object of the package."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
