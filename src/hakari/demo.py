"""`hakari demo`: each system on real data, a chapter each, in one report.

To add a chapter, write a function from the run's folder to a `Part`, and add its address to
`CHAPTERS`. It writes what it keeps into the folder while it runs; the first line of its docstring
is what a person reads meanwhile. Its module imports at the top all that its half needs: then a
half that is not installed is known, and told, before its chapter starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name

from hakari import run
from hakari.report import Part, write_report
from hakari.terminal import INTERRUPTED, terminal, to_json

CHAPTERS = (  # by address: a half is imported only when its chapter's turn comes
    "hakari.inference.card:just_identified",
    "hakari.inference.card:over_identified",
    "hakari.inference.macro:monetary_policy",
    "hakari.inference.engel:food_and_income",
    "hakari.inference.bidirectional.flights:delays",
    "hakari.training.chapter:train_tiny",
)


def answer(out: Path | None, json: bool) -> int:
    """Run every chapter, write one report and print; returns the exit status."""
    folder = run.new_run("demo", out)
    try:
        parts, interrupted = _build(folder, quiet=json)
        report = _write(parts, folder)
    finally:
        run.discard(folder)
    if json:
        found = {part.name: part.record for part in parts}
        print(to_json({"chapters": found, "run": str(folder), "report": str(report)}))
    else:
        print(report)
    return INTERRUPTED if interrupted else 0


def _build(folder: Path, quiet: bool) -> tuple[list[Part], bool]:
    """The chapters, shown as they come, and whether Ctrl-C left some out or cut one short."""
    parts: list[Part] = []
    console = terminal()
    for build in _builders():
        _say((build.__doc__ or build.__name__).strip().partition("\n")[0])
        try:
            parts.append(build(folder))
        except KeyboardInterrupt:
            if not parts:
                raise
            _say("interrupted; the report holds the chapters before this one")
            return parts, True
        if not quiet:
            console.rule(parts[-1].chapter.title)
            parts[-1].show(console)
        if parts[-1].interrupted:
            return parts, True
    return parts, False


def _builders() -> Iterator[Callable[[Path], Part]]:
    """The chapters of the halves that are installed; of another, one line says what it lacks."""
    lacking: set[str] = set()
    halves = [address.split(".")[1] for address in CHAPTERS]
    for half, address in zip(halves, CHAPTERS, strict=True):
        if half in lacking:
            continue
        try:
            build = resolve_name(address)
        except ModuleNotFoundError as error:
            package = (error.name or "hakari").partition(".")[0]
            if package == "hakari":
                raise
            lacking.add(half)
            _say(f'no {half}: {package} is not installed: pip install "hakari[{half}]"')
            continue
        yield build
    if lacking.issuperset(halves):
        raise ValueError('no chapter to show: pip install "hakari[all]"')


def _write(parts: Sequence[Part], folder: Path) -> Path:
    settings = {part.name: part.config for part in parts}
    run.write_config(folder, {"command": "demo", "chapters": settings})
    return write_report(
        folder / "report.html",
        "hakari demo: each system on real data",
        [part.chapter for part in parts],
        "Calibrated inference without a likelihood, and training of language models, on data that "
        "come with installed packages: nothing is downloaded.",
    )


def _say(text: str) -> None:
    print(f"hakari: {text}", file=sys.stderr, flush=True)
