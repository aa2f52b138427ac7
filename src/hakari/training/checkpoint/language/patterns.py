r"""Names of tensors as text and groups, both ways: a name gives its groups, groups give the name.

pattern = read_match(r"layers\.(\d+)\.weight")
pattern.solve("layers.3.weight")  # {'1': '3'}
read_template("h.{1 + 1}.weight", pattern.groups).fill({"1": "3"})  # 'h.4.weight'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Bindings = Mapping[str, str]


@dataclass(frozen=True)
class Pattern:
    """Text and groups (name, number added to it), and what each group's text is like."""

    text: str
    parts: tuple[str | tuple[str, int], ...]
    groups: Mapping[str, str]

    def fill(self, bindings: Bindings) -> str:
        """The name that has these groups."""
        return "".join(
            part if isinstance(part, str) else _shifted(bindings[part[0]], part[1])
            for part in self.parts
        )

    def solve(self, name: str) -> dict[str, str] | None:
        """The groups of a name, or None if it is another."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        bindings: dict[str, str] = {}
        for index, (group, shift) in enumerate(self._holes):
            value = _shifted(found[f"_{index}"], -shift)
            if bindings.setdefault(group, value) != value or value.startswith("-"):
                return None
            if shift and not re.fullmatch(self.groups[group], value):
                return None
        return bindings

    @cached_property
    def _holes(self) -> list[tuple[str, int]]:
        return [part for part in self.parts if not isinstance(part, str)]

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        text, index = "", 0
        for part in self.parts:
            if isinstance(part, str):
                text += re.escape(part)
            else:
                inner = r"\d+" if part[1] else self.groups[part[0]]
                text, index = text + f"(?P<_{index}>{inner})", index + 1
        return re.compile(text)


_PIECE = re.compile(r"\\(?P<escaped>\W)|\((?P<open>(\?P<(?P<name>\w+)>)?)|(?P<other>.)", re.S)
_HOLE = re.compile(r"\{(\w+)(?:\s*([+-])\s*(\d+))?\}")


def read_match(text: str) -> Pattern:
    """A regular expression as text and groups. Raises ValueError where it cannot be undone."""
    parts: list[str | tuple[str, int]] = []
    groups: dict[str, str] = {}
    at = 0
    while at < len(text):
        found = _PIECE.match(text, at)
        if found is None or (found["other"] or "") in {*".^$*+?{}[]|)\\"} - {""}:
            raise ValueError(f"{text[at]!r} at {at}: escape it, or put it into a group")
        if found["open"] is None:
            parts.append(found["escaped"] or found["other"])
            at = found.end()
            continue
        stop = _closing(text, found.end())
        name = found["name"] or str(len(groups) + 1)
        groups[name] = text[found.end() : stop]
        if re.compile(groups[name]).groups:
            raise ValueError(f"group {name} holds a group: write (?:...) in it")
        parts, at = [*parts, (name, 0)], stop + 1
    return Pattern(text, tuple(parts), groups)


def read_template(text: str, groups: Mapping[str, str]) -> Pattern:
    """A name with groups in braces. Raises ValueError for groups that do not exist."""
    parts: list[str | tuple[str, int]] = []
    at = 0
    for hole in _HOLE.finditer(text):
        if hole[1] not in groups:
            raise ValueError(f"to = {text!r} names {hole[1]}; the groups are {[*groups]}")
        shift = int((hole[2] or "") + (hole[3] or "0"))
        parts += [text[at : hole.start()], (hole[1], shift)]
        at = hole.end()
    return Pattern(text, (*parts, text[at:]), groups)


def _closing(text: str, at: int) -> int:
    """Where the group ends whose content starts at `at`."""
    depth, inside = 1, False
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif inside:
            inside = text[at] != "]"
        elif text[at] in "[()":
            inside = text[at] == "["
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            if not depth:
                return at
        at += 1
    raise ValueError("a group is not closed")


def _shifted(text: str, shift: int) -> str:
    return str(int(text) + shift) if shift else text


def outline(name: str) -> str:
    """A name, or a pattern, without what differs from layer to layer."""
    return re.sub(r"\\|\((?:[^()]|\([^()]*\))*\)|\{[^}]*\}|\d+", "", name)
