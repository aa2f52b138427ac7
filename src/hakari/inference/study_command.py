"""What the commands of a study do around it: the run folder, Ctrl-C, printing, the exit status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hakari import run
from hakari.inference.patience import COMPILING, patience
from hakari.inference.result import save
from hakari.terminal import INTERRUPTED, terminal, to_json

Keep = Callable[[Any], None]


@dataclass(frozen=True)
class Kept:
    """What is written before the report, so that Ctrl-C does not lose it.

    file: in the run folder; what: it is called; write: it to a path; then: what a person is told
    of an answer that was cut short, with {folder}.
    """

    file: str
    what: str
    write: Callable[[Any, Path], None]
    then: str


class Unfinished(KeyboardInterrupt):
    """Ctrl-C cut short what goes on from what was kept."""


DRAWS = Kept("posterior.nc", "draws are", save, "the draws so far were written")


def answer_study(
    name: str,
    out: Path | None,
    json: bool,
    find: Callable[[Keep], Any],
    write_run: Callable[[Any, Path], Path],
    record: Callable[[Any], dict[str, Any]],
    show: Callable[[Any, Console], None],
    waiting: str = COMPILING,
    kept: Kept = DRAWS,
) -> int:
    """Find, write and print; returns the exit status. A refusal leaves no folder behind.

    find: gets what keeps the draws (or `kept`) as soon as they are there, and returns the findings,
    which say whether they were `interrupted`, or raises `Unfinished`. write_run: returns the
    report's path. waiting: what a person reads when it takes long.
    """
    folder = run.new_run(name, out)
    file = folder / kept.file
    try:
        with patience(waiting):
            found = find(lambda result: kept.write(result, file))
        report = write_run(found, folder)
    except KeyboardInterrupt as stop:
        if not file.exists():
            raise
        then = f"; {kept.then.format(folder=folder)}" if isinstance(stop, Unfinished) else ""
        _say(f"interrupted; the {kept.what} in {file}, without a report{then}")
        return INTERRUPTED
    except (ValueError, TypeError):
        file.unlink(missing_ok=True)  # what cannot be shown is refused like any other
        raise
    finally:
        run.discard(folder)
    if json:
        print(to_json(record(found) | {"run": str(folder), "report": str(report)}))
    else:
        show(found, terminal())
        print(report)
    if found.interrupted:
        _say(f"interrupted; {kept.then.format(folder=folder)}")
        return INTERRUPTED
    return 0


def _say(text: str) -> None:
    Console(stderr=True).print(f"hakari: {text}", soft_wrap=True)
