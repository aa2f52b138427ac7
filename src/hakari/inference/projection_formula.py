"""Formulas of local projections: `y ~ shock + l(y, 1:4) + x`, or with instruments in brackets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hakari.inference.projection_design import near
from hakari.inference.series import parse_term

FORM = "write 'y ~ shock + l(y, 1:4) + x' with shock='shock', or 'y ~ l(y, 1:4) + [shock ~ z]'"


@dataclass(frozen=True)
class Words:
    """What a formula says; `bare`: without a constant."""

    response: tuple[str, ...]
    shock: tuple[str, ...]
    instruments: tuple[str, ...]
    controls: tuple[str, ...]
    bare: bool


def parse_projection(formula: str, shock: Sequence[str]) -> Words:
    """Read a formula; raises ValueError that shows the form where it is not one.

    >>> parse_projection("y ~ e + l(y, 1:2) + x", ("e",)).controls
    ('l(y, 1:2)', 'l(x, 0)')
    """
    found = re.fullmatch(r"([^~\[]+)~([^\[\]]*)(?:\[([^~\]]+)~([^\]]+)\]([^\[\]]*))?", formula)
    if found is None:
        raise ValueError(f"formula {formula!r} is not understood: {FORM}")
    left, before, shocks, instruments, after = (part or "" for part in found.groups())
    terms = _terms(f"{before}+{after}")
    bare = any(term in ("0", "-1") for term in terms)
    terms = [term for term in terms if term not in ("0", "1", "-1")]
    if shocks and shock:
        raise ValueError(f"formula {formula!r} names its shock in brackets: leave shock= out")
    names = tuple(_terms(shocks)) or tuple(shock)
    if not names:
        raise ValueError(f"formula {formula!r} without shock=: {FORM}")
    for name in names:
        if not shocks and name not in terms:
            raise ValueError(f"shock {name!r} is not in {formula!r}{near(name, terms)}")
    rest = [term for term in terms if term not in names]
    controls = tuple(term if parse_term(term) else f"l({term}, 0)" for term in rest)
    return Words(tuple(_terms(left)), names, tuple(_terms(instruments)), controls, bare)


def _terms(text: str) -> list[str]:
    return [term.strip() for term in re.sub(r"-\s*1", "+ -1", text).split("+") if term.strip()]
