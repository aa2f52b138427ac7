"""`hakari demo`: each system of this half on real data, a chapter each, in one report.

To add a chapter, write a function that returns a `Part` and put it in `CHAPTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hakari import run
from hakari.inference.iv import Analysis, Question, analyse
from hakari.inference.iv_command import INTERRUPTED, grid, show, terminal
from hakari.inference.iv_record import config, record, to_json
from hakari.inference.iv_report import iv_chapter
from hakari.inference.iv_tables import number
from hakari.inference.modes import Mode, modes
from hakari.inference.patience import patience
from hakari.inference.report import Chapter, Section, Table, Text, write_report
from hakari.inference.result import save

DRAWS = 5_000
SCHOOLING = "lwage ~ 1 + exper + expersq + black + south + smsa + [educ ~ {}]"


@dataclass(frozen=True)
class Part:
    """What a chapter contributes: to the report, the terminal, `--json`, and the run folder."""

    name: str
    chapter: Chapter
    show: Callable[[Console], None]
    record: dict[str, Any]
    config: dict[str, Any]
    save: Callable[[Path], None]
    interrupted: bool = False


def card_just_identified() -> Part:
    """Growing up near a four-year college as the instrument for schooling."""
    return _card(
        "Card: one instrument",
        "nearc4",
        "Card (1995) asks what a year of schooling adds to log hourly wages, with having grown up "
        "near a four-year college (nearc4) as the instrument: 3,010 men of the National "
        "Longitudinal Survey of Young Men, interviewed in 1976.",
    )


def card_over_identified() -> Part:
    """Two-year and four-year colleges as instruments."""
    return _card(
        "Card: two instruments",
        "nearc2 + nearc4",
        "The same question with a two-year college nearby (nearc2) as a second instrument: now "
        "the instruments can contradict each other, and GMM and CUE differ.",
    )


CHAPTERS: Sequence[Callable[[], Part]] = (card_just_identified, card_over_identified)


def answer(out: Path | None, json: bool) -> int:
    """Run every chapter, write one report and print; returns the exit status."""
    folder = run.new_run("demo", out)
    console, errors = terminal(), Console(stderr=True, highlight=False)
    parts = []
    try:
        for build in CHAPTERS:
            errors.print(f"hakari: {(build.__doc__ or '').strip()}")
            with patience():
                parts.append(build())
            if not json:
                console.rule(parts[-1].chapter.title)
                parts[-1].show(console)
            if parts[-1].interrupted:
                break
        report = _write(parts, folder)
    finally:
        run.discard(folder)
    if json:
        found = {part.name: part.record for part in parts}
        print(to_json({"chapters": found, "run": str(folder), "report": str(report)}))
    else:
        print(report)
    return INTERRUPTED if any(part.interrupted for part in parts) else 0


def _write(parts: Sequence[Part], folder: Path) -> Path:
    settings = {part.name: part.config for part in parts}
    run.write_config(folder, {"command": "demo", "chapters": settings})
    for part in parts:
        part.save(folder)
    return write_report(
        folder / "report.html",
        "hakari demo: returns to schooling",
        [part.chapter for part in parts],
        "Quasi-posteriors from moment conditions on data that come with linearmodels.",
    )


def _card(title: str, instruments: str, intro: str) -> Part:
    from linearmodels.datasets import card

    data = card.load()
    formula, label = SCHOOLING.format(instruments), "Card's data in linearmodels"
    question = Question(formula, data, draws=DRAWS, data_name=label)
    analysis = analyse(question, progress=True)
    name = "card-" + instruments.replace(" + ", "-")
    found = modes(analysis.moments)
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
        partial(_save, analysis, name),
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
