"""`hakari gibbs`: ask, write the run folder, print the answer."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from hakari import run
from hakari.inference.gibbs.report import (
    PACKAGES,
    gibbs_chapter,
    intervals_table,
    rates_table,
    rivals_table,
    verdict,
)
from hakari.inference.gibbs.study import Findings, Study, find
from hakari.inference.prior_text import describe_prior
from hakari.inference.study_command import Keep, answer_study
from hakari.report import write_report
from hakari.run import versions
from hakari.terminal import grid


def answer(study: Study, out: Path | None, json: bool) -> int:
    """Find, write and print; returns the exit status. A refusal leaves no folder behind."""

    def finding(keep: Keep) -> Findings:
        return find(study, progress=True, keep=keep)

    return answer_study("gibbs", out, json, finding, write_run, record, show)


def write_run(found: Findings, folder: Path) -> Path:
    """config.toml, report.html and three .csv files beside posterior.nc; the report's path."""
    study = found.study
    run.write_config(folder, config(found))
    found.table.to_csv(folder / "summary.csv")
    found.calibration.coverage_curve.to_csv(folder / "coverage.csv", index=False)
    ranks = {one.region.label: one.ranks for one in found.calibration.found}
    pd.DataFrame(ranks).to_csv(folder / "ranks.csv", index=False)
    title = f"{study.formula.partition('~')[0].strip()}: {found.plain.risk.loss.name}"
    command = command_line(study) if isinstance(study.data, str | Path) else ""
    chapter = gibbs_chapter(found, title, command=command)
    return write_report(folder / "report.html", f"{title}, calibrated Gibbs posterior", [chapter])


def show(found: Findings, console: Console) -> None:
    """The tables and the sentences, to a terminal."""
    for table in (rates_table(found), rivals_table(found), intervals_table(found)):
        console.print(grid(table))
    for sentence in verdict(found):
        console.print(f"• {sentence}")
    console.print()


def command_line(study: Study) -> str:
    """The command that asks this question; options at their defaults are left out."""
    words = ["hakari", "gibbs", study.formula, "--data", study.source, "--loss", study.loss]
    default = Study("", "", study.loss)
    kept = ("formula", "data", "loss", "seed", "level", "data_name")
    for name in (f.name for f in fields(Study) if f.name not in kept):
        value = getattr(study, name)
        if value == getattr(default, name):
            continue
        several = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *map(str, several)]
    words += ["--seed", str(study.seed), "--level", f"{study.level:g}"]
    return shlex.join(words)


# --- as plain data ------------------------------------------------------------------------


def record(found: Findings) -> dict[str, Any]:
    """Everything that the tables show, as numbers; NaN and infinity where there is none."""
    study, cal = found.study, found.calibration
    return {
        "data": study.source,
        "rows": found.plain.risk.n,
        "loss": str(found.plain.risk.loss.name),
        "level": study.level,
        "region": study.region,
        "bootstrap": study.bootstrap,
        "prior": describe_prior(found.plain.prior),
        "interrupted": found.interrupted,
        "verdict": verdict(found),
        "learning_rate": cal.learning_rate,
        "calibration": [
            {
                "of": one.region.label,
                "rate": one.rate,
                "interval": list(one.interval),
                "large_samples": one.asymptotic,
                "covers": float((one.ranks <= study.level).mean()),
                "solved": one.solved,
                "worst_k_hat": float(one.k_hat.max()),
                "least_effective": float(one.effective.min()),
                "simulations": one.simulations,
                "evaluations": one.evaluations,
            }
            for one in cal.found
        ],
        "method": {"name": cal.method, "why": cal.why, "seconds": cal.seconds},
        "rival_rates": cal.rival_rates,
        "spectrum": cal.spectrum.tolist(),
        "coverage": cal.coverage_curve.to_dict("list"),
        "coefficients": found.table.reset_index().to_dict("records"),
        "sampler": {"name": str(found.result.attrs["method"]), "seed": study.seed},
        "notes": list(found.notes),
    }


def config(found: Findings) -> dict[str, Any]:
    """Everything that repeats the run, resolved."""
    study, cal = found.study, found.calibration
    asked = {f.name: getattr(study, f.name) for f in fields(Study)}
    del asked["data_name"]
    sampler = {name: asked.pop(name) for name in ("draws", "chains", "seed")}
    named = ("formula", "data", "loss", "weights", "missing", "clusters")
    model = {name: asked.pop(name) for name in named}
    prior = {"prior": asked.pop("prior"), "prior_resolved": describe_prior(found.plain.prior)}
    return {
        "command": "gibbs",
        "model": model | {"data": study.source, "rows": found.plain.risk.n} | prior,
        "calibration": asked
        | {
            "method_resolved": cal.method,
            "learning_rates": {one.region.label: one.rate for one in cal.found if one.solved},
        },
        "sampler": sampler | {"method_resolved": str(found.result.attrs["method"])},
        "output": {"interrupted": found.interrupted},
        "versions": versions(*PACKAGES),
    }
