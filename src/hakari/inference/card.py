"""The demo's chapters on instruments: returns to schooling, Card (1995)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from linearmodels.datasets import card
from rich.console import Console

from hakari.inference.iv import Analysis, Question, analyse
from hakari.inference.iv_command import show
from hakari.inference.iv_record import config, record
from hakari.inference.iv_report import iv_chapter
from hakari.inference.iv_tables import number
from hakari.inference.modes import Mode, modes
from hakari.inference.patience import patience
from hakari.inference.result import save
from hakari.report import Part, Section, Table, Text
from hakari.terminal import grid

DRAWS = 5_000
SCHOOLING = "lwage ~ 1 + exper + expersq + black + south + smsa + [educ ~ {}]"


def just_identified(folder: Path) -> Part:
    """Growing up near a four-year college as the instrument for schooling."""
    return _card(
        folder,
        "Card: one instrument",
        "nearc4",
        "Card (1995) asks what a year of schooling adds to log hourly wages, with having grown up "
        "near a four-year college (nearc4) as the instrument: 3,010 men of the National "
        "Longitudinal Survey of Young Men, interviewed in 1976.",
    )


def over_identified(folder: Path) -> Part:
    """Two-year and four-year colleges as instruments."""
    return _card(
        folder,
        "Card: two instruments",
        "nearc2 + nearc4",
        "The same question with a two-year college nearby (nearc2) as a second instrument: now "
        "the instruments can contradict each other, and GMM and CUE differ.",
    )


def _card(folder: Path, title: str, instruments: str, intro: str) -> Part:
    formula, label = SCHOOLING.format(instruments), "Card's data in linearmodels"
    question = Question(formula, card.load(), draws=DRAWS, data_name=label)
    with patience():
        analysis = analyse(question, progress=True)
        found = modes(analysis.moments)
    name = "card-" + instruments.replace(" + ", "-")
    _save(analysis, name, folder)
    chapter = iv_chapter(analysis, title, intro, "hakari demo")
    table = _modes_table(found, analysis)
    section = Section("Three forms of the target", [table, Text(_modes_say(found, analysis))])
    at = next(i for i, s in enumerate(chapter.sections) if s.title == "Posterior and GMM")
    sections = [*chapter.sections[: at + 1], section, *chapter.sections[at + 1 :]]
    return Part(
        name,
        replace(chapter, sections=sections),
        partial(_show, analysis, table, _modes_say(found, analysis)),
        record(analysis) | {"modes": [_mode_record(m, analysis) for m in found]},
        config(analysis),
        analysis.interrupted,
    )


def _show(analysis: Analysis, table: Table, sentence: str, console: Console) -> None:
    show(analysis, console)
    console.print(grid(table))
    console.print(f"{sentence}\n")


def _save(analysis: Analysis, name: str, folder: Path) -> None:
    save(analysis.result, folder / f"{name}.nc")
    analysis.summary.to_csv(folder / f"{name}.csv")


# --- three forms --------------------------------------------------------------------------


def _modes_table(found: list[Mode], analysis: Analysis) -> Table:
    name = analysis.of_interest[0]
    k = analysis.moments.names.parameters.index(name)
    rows = [
        [
            m.form,
            number(m.theta[k], 6),
            f"{m.shift[k]:+.3f}".replace("-0.000", "0").replace("+0.000", "0"),
        ]
        for m in found
    ]
    for one in analysis.estimates:
        rows.append([f"{one.label}, {one.source}", number(one.theta[k], 6), ""])
    head = ["", name, "less CUE, in s.e."]
    return Table(head, rows, "Modes under a flat prior, and the estimates they should equal.")


def _modes_say(found: list[Mode], analysis: Analysis) -> str:
    k = analysis.moments.names.parameters.index(analysis.of_interest[0])
    full, without, fixed = (m.shift[k] for m in found)
    just = "the same, since as many instruments as coefficients leave no choice"
    gap = just if abs(fixed) < 1e-6 else f"{fixed:+.2g} standard errors from CUE"
    return (
        f"With a flat prior, the mode without the determinant is CUE (to {_power(without)} "
        f"standard errors), the mode with fixed weighting is two-step GMM ({gap}). The full "
        f"target's mode is neither: {full:+.2g} standard errors from CUE, since the determinant "
        "favours coefficients at which the moments vary less."
    )


def _power(value: float) -> str:
    """The power of ten above a small number, at least what double precision can tell."""
    return f"1e{max(int(np.ceil(np.log10(abs(value) or 1e-15))), -12):d}"


def _mode_record(mode: Mode, analysis: Analysis) -> dict[str, Any]:
    names = analysis.moments.names.parameters
    return {
        "form": mode.form,
        "mode": dict(zip(names, map(float, mode.theta), strict=True)),
        "less_cue_in_standard_errors": dict(zip(names, map(float, mode.shift), strict=True)),
    }
