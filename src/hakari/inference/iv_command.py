"""`hakari iv`: ask, write the run folder, print the answer."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from hakari import run
from hakari.inference.iv import Analysis, Question, analyse
from hakari.inference.iv_record import config, record
from hakari.inference.iv_report import iv_chapter
from hakari.inference.iv_tables import estimates_table, posterior_table, strength_table
from hakari.inference.patience import patience
from hakari.inference.result import load, save
from hakari.inference.verdict import agreement, verdict
from hakari.report import write_report
from hakari.terminal import INTERRUPTED, grid, terminal, to_json


def answer(question: Question, out: Path | None, resume: Path | None, json: bool) -> int:
    """Analyse, write and print; returns the exit status. A refusal leaves no folder behind."""
    earlier = load(_posterior_of(resume)) if resume is not None else None
    folder = run.new_run("iv", out)
    try:
        with patience():
            analysis = analyse(
                question,
                progress=True,
                resume=earlier,
                keep=lambda result: save(result, folder / "posterior.nc"),
            )
        report = write_run(analysis, folder, resume)
    except KeyboardInterrupt:
        if not (folder / "posterior.nc").exists():
            raise
        Console(stderr=True).print(
            f"hakari: interrupted; the draws are in {folder / 'posterior.nc'}, without a report; "
            f"go on with --resume {folder}",
            soft_wrap=True,
        )
        return INTERRUPTED
    finally:
        run.discard(folder)
    if json:
        print(to_json(record(analysis) | {"run": str(folder), "report": str(report)}))
    else:
        show(analysis, terminal())
        print(report)
    if analysis.interrupted:
        Console(stderr=True).print("hakari: interrupted; the draws so far were written")
        return INTERRUPTED
    return 0


def write_run(analysis: Analysis, folder: Path, resume: Path | None = None) -> Path:
    """config.toml, summary.csv and report.html beside posterior.nc; returns the report's path."""
    resumed = {"resumed": str(resume)} if resume is not None else {}
    run.write_config(folder, resumed | config(analysis))
    analysis.summary.to_csv(folder / "summary.csv")
    names = analysis.moments.names
    title = f"{names.dependent} on {', '.join(analysis.of_interest[:3])}"
    return write_report(
        folder / "report.html", f"{title}: quasi-posterior", [iv_chapter(analysis, title)]
    )


def show(analysis: Analysis, console: Console) -> None:
    """The tables and the sentences, to a terminal."""
    for table in (posterior_table(analysis), estimates_table(analysis), strength_table(analysis)):
        if table is not None:
            console.print(grid(table))
    console.print(agreement(analysis), style="dim")
    attributes = analysis.result.attrs
    console.print(f"Kernel {attributes['method']}: {attributes['why']}.\n", style="dim")
    for sentence in verdict(analysis):
        console.print(f"• {sentence}")
    console.print()


def _posterior_of(folder: Path) -> Path:
    path = folder / "posterior.nc"
    if not path.is_file():
        raise FileNotFoundError(
            f"no posterior.nc in {folder}: --resume takes an earlier run's folder"
        )
    return path
