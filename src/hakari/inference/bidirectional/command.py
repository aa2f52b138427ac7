"""`hakari feedback`: ask, write the run folder, print the answer."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from hakari import run
from hakari.inference.bidirectional.report import (
    PACKAGES,
    cares,
    effects_table,
    feedback_chapter,
    identification_table,
    verdict,
)
from hakari.inference.bidirectional.study import MODEL, Findings, Study, find
from hakari.inference.result import save
from hakari.inference.study_command import Keep, Kept, answer_study
from hakari.report import write_report
from hakari.run import versions
from hakari.terminal import grid

KEPT = Kept(MODEL, "model is", lambda model, path: model.save(path), "go on with --resume {folder}")


def answer(study: Study, out: Path | None, resume: Path | None, json: bool) -> int:
    """Find, write and print; returns the exit status. A refusal leaves no folder behind."""

    def finding(keep: Keep) -> Findings:
        return find(study, resume, progress=True, keep=keep)

    return answer_study("feedback", out, json, finding, write_run, record, show, kept=KEPT)


def write_run(found: Findings, folder: Path) -> Path:
    """config.toml, tables, draws and report.html beside model.npz; the report's path."""
    study = found.study
    write_tables(found, folder)
    run.write_config(folder, config(found))
    title = f"{study.y1} and {study.y2}"
    command = command_line(study) if isinstance(study.data, str | Path) else ""
    chapter = feedback_chapter(found, title, command=command)
    return write_report(folder / "report.html", f"{title}: effects on each other", [chapter])


def write_tables(found: Findings, folder: Path, prefix: str = "") -> None:
    """effects.csv, and where there are any path.csv (a stream) and posterior.nc (bootstraps)."""
    found.table.to_csv(folder / f"{prefix}effects.csv")
    if len(found.model.path):
        found.model.path.to_csv(folder / f"{prefix}path.csv", index=False)
    if len(found.effects.draws):
        save(found.effects.to_datatree(), folder / f"{prefix}posterior.nc")


def show(found: Findings, console: Console) -> None:
    """The tables and the sentences, to a terminal."""
    for table in (effects_table(found), identification_table(found)):
        console.print(grid(table))
    for sentence in verdict(found):
        console.print(f"• {sentence}")
    console.print()


def command_line(study: Study) -> str:
    """The command that asks this question; options at their defaults are left out."""
    words = ["hakari", "feedback", "--data", study.source, "--y1", study.y1, "--y2", study.y2]
    default = Study("", "", "")
    for name in (f.name for f in fields(Study) if f.name not in ("data", "y1", "y2", "data_name")):
        value = getattr(study, name)
        if value == getattr(default, name):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else (value,))
    return shlex.join(words)


# --- as plain data ------------------------------------------------------------------------


def record(found: Findings) -> dict[str, Any]:
    """Everything that the tables show, as numbers; NaN and infinity where there is none."""
    study, effects, kept = found.study, found.effects, found.set
    told, alarm = found.identification, found.model.alarm
    inside = effects.set_intervals(study.level)
    return {
        "data": study.source,
        "rows": effects.evidence.rows,
        "seconds": found.seconds,
        "rows_per_second": found.speed,
        "method": effects.method,
        "covariance": study.covariance,
        "level": study.level,
        "interrupted": found.interrupted,
        "verdict": verdict(found),
        "effects": found.table.reset_index().to_dict("records"),
        "root": study.root,
        "rule": effects.rule,
        "set": {
            "kind": kept.kind,
            "df": kept.df,
            "a": inside[0],
            "b": inside[1],
            "reaches": kept.edges,
            "text": effects.set_text(study.level),
        },
        "identification": {
            "identified": told.identified,
            "reasons": told.reasons,
            "tests": {name: _test(test) for name, test in told.tests.items()},
            "strength": told.strength,
        },
        "J": _test(effects.instruments_agree),
        "multipliers": effects.multipliers.reset_index().to_dict("records"),
        "alarm": None if alarm is None else {"row": alarm.row, "level": alarm.level},
        "seed": study.seed,
        "notes": cares(found),
    }


def _test(test: tuple[float, int, float]) -> dict[str, float]:
    return dict(zip(("statistic", "df", "p_value"), test, strict=True))


def config(found: Findings) -> dict[str, Any]:
    """Everything that repeats the run, resolved."""
    study = found.study
    asked = {f.name: getattr(study, f.name) for f in fields(Study)}
    del asked["data_name"]
    rows = {name: asked.pop(name) for name in ("data", "missing", "half_life", "window")}
    del asked["one_pass"]
    return {
        "command": "feedback",
        "model": asked,
        "rows": rows | {"data": study.source, "rows": found.model.rows, "streamed": study.streamed},
        "output": {"interrupted": found.interrupted},
        "versions": versions(*PACKAGES),
    }
