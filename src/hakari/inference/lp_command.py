"""`hakari lp`: ask, write the run folder, print the answer."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from hakari import run
from hakari.inference.lp_report import PACKAGES, lp_chapter, verdict
from hakari.inference.lp_study import NARROW, Findings, Study, find
from hakari.inference.lp_tables import (
    horizon_tables,
    impulse,
    lowered,
    narrowed_table,
    shape_table,
    strength_table,
)
from hakari.inference.study_command import Keep, answer_study
from hakari.report import write_report
from hakari.run import versions
from hakari.terminal import grid


def answer(study: Study, out: Path | None, json: bool) -> int:
    """Find, write and print; returns the exit status. A refusal leaves no folder behind."""

    def finding(keep: Keep) -> Findings:
        return find(study, progress=True, keep=keep)

    return answer_study("lp", out, json, finding, write_run, record, show, "hakari: still at work")


def write_run(found: Findings, folder: Path) -> Path:
    """config.toml, irf.csv, figures and report.html beside posterior.nc; the report's path."""
    study = found.study
    run.write_config(folder, config(found))
    found.table.to_csv(folder / "irf.csv", index=False)
    made = figures(found)
    for name, figure in made.items():
        save_figure(figure, folder / name)
    title = f"Responses of {', '.join(study.response[:3])} to {', '.join(study.shock[:2])}"
    command = command_line(study) if isinstance(study.data, str | Path) else ""
    chapter = lp_chapter(found, made, title, command=command)
    return write_report(folder / "report.html", f"{title}: quasi-posterior", [chapter])


def figures(found: Findings) -> dict[str, Figure]:
    """The figures by the name of their files: responses, prior, instruments."""
    study = found.study
    estimator = "two-stage least squares" if study.instrument else "least squares"
    names: dict[str, Any] = {
        "unit": f"{found.grain}s",
        "units": {y: study.units[y] for y in found.irf.responses if y in study.units},
        "impulses": {e: lowered(impulse(found, s)) for s, e in enumerate(found.irf.shocks)},
        "estimator": f"{estimator}, controls shrunk"
        if found.projection.controls_prior
        else estimator,
    }
    bare = replace(found.irf, anderson_rubin=None)  # the sets have a figure of their own
    out = {"responses": bare.plot(study.level, study.band, narrow=NARROW, **names)}
    if bare.prior_draws is not None:
        prior = bare.plot(study.level, "pointwise", narrow=None, prior=True, **names)
        out["prior"] = prior
    if found.irf.anderson_rubin is not None:
        sets = found.irf.plot(
            study.level, "pointwise", narrow=None, sets_level=study.level, **names
        )
        out["instruments"] = sets
    return out


def save_figure(figure: Figure, path: Path) -> None:
    """A figure as PNG and as PDF, the same bytes for the same figure."""
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=200)
    figure.savefig(path.with_name(f"{path.name}.pdf"), metadata={"CreationDate": None})


def show(found: Findings, console: Console) -> None:
    """The tables and the sentences, to a terminal."""
    tables = [*horizon_tables(found), shape_table(found), narrowed_table(found)]
    for table in (*tables, strength_table(found)):
        if table is not None:
            console.print(grid(table))
    for note in found.irf.notes:
        console.print(f"{note}.", style="dim")
    for sentence in verdict(found):
        console.print(f"• {sentence}")
    console.print()


def command_line(study: Study) -> str:
    """The command that asks this question; options at their defaults are left out."""
    words, default = ["hakari", "lp", "--data", study.source], Study("", ("",), ("",))
    for name in ("response", "shock", "instrument", "control", "time", "prior"):
        if getattr(study, name):
            words += [f"--{name}", *getattr(study, name)]
    for name in (
        "lags", "horizons", "unit", "trend", "sample", "shock_lags", "state", "effects",
        "covariance", "weighting", "shrinkage", "controls_prior", "band", "scale", "draws",
        "chains",
    ):  # fmt: skip
        value = getattr(study, name)
        if value != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("cumulative", "augment"):
        words += [f"--{name}"] * getattr(study, name)
    if study.calibrate is not None:
        words.append("--calibrate" if study.calibrate else "--no-calibrate")
    words += ["--seed", str(study.seed), "--level", f"{study.level:g}"]
    return shlex.join(words)


# --- as plain data ------------------------------------------------------------------------


def record(found: Findings) -> dict[str, Any]:
    """Everything that the tables show, as numbers; NaN and infinity where there is none."""
    study, lp, stage = found.study, found.projection, found.first_stage
    return {
        "data": study.source,
        "rows": list(lp.rows_used),
        "coefficients": lp.coefficients,
        "level": study.level,
        "covariance": str(found.posterior.covariance),
        "prior": found.priors,
        "interrupted": found.interrupted,
        "verdict": verdict(found),
        "size": dict(zip(lp.shocks, found.size.tolist(), strict=True)),
        "responses": found.table.to_dict("records"),
        "shape": found.shape.to_dict("records"),
        "first_stage": [] if stage is None else stage.to_dict("records"),
        "calibration": [asdict(rate) for rate in found.posterior.calibration],
        "sampler": _sampler(found),
        "uncalibrated": found.uncalibrated or None,
        "notes": [*found.irf.notes, *found.notes],
    }


def config(found: Findings) -> dict[str, Any]:
    """Everything that repeats the run, resolved."""
    asked = {k: v for k, v in vars(found.study).items() if k not in ("data", "data_name", "units")}
    sampler = {name: asked.pop(name) for name in ("draws", "chains", "seed")}
    output = {name: asked.pop(name) for name in ("level", "band", "scale")}
    named = ("prior", "covariance", "weighting", "shrinkage", "controls_prior", "calibrate")
    posterior = {name: asked.pop(name) for name in named}
    return {
        "command": "lp",
        "model": {"data": found.study.source} | asked | {"rows": list(found.projection.rows_used)},
        "posterior": posterior
        | {
            "calibrate": not found.uncalibrated,
            "prior_resolved": found.priors,
            "covariance_resolved": str(found.posterior.covariance),
            "shrinkage_resolved": "ledoit-wolf" if found.posterior.shrunk else "none",
            "learning_rates": list(found.posterior.rates),
        },
        "sampler": sampler | {"method_resolved": str(found.result.attrs["method"])},
        "output": output | {"interrupted": found.interrupted},
        "versions": versions(*PACKAGES),
    }


def _sampler(found: Findings) -> dict[str, Any]:
    attributes, frame = found.result.attrs, found.summary
    kept = ("method", "seed", "chains", "weighting", "warmup_seconds", "sampling_seconds")
    return {name: attributes[name] for name in kept} | {
        "draws": found.result["posterior"].sizes["draw"],
        "acceptance": found.result["checks"].dataset["acceptance"].values.tolist(),
        "r_hat": float(frame["r_hat"].max()),
        "ess_bulk": float(frame["ess_bulk"].min()),
        "ess_tail": float(frame["ess_tail"].min()),
        "known_exactly": int(found.known.sum()),
    }
