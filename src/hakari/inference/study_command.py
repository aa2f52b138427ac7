"""What the commands of a study do around it: the run folder, Ctrl-C, printing, the exit status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr
from rich.console import Console

from hakari import run
from hakari.inference.patience import COMPILING, patience
from hakari.inference.result import save
from hakari.terminal import INTERRUPTED, terminal, to_json

Keep = Callable[[xr.DataTree], None]


def answer_study(
    name: str,
    out: Path | None,
    json: bool,
    find: Callable[[Keep], Any],
    write_run: Callable[[Any, Path], Path],
    record: Callable[[Any], dict[str, Any]],
    show: Callable[[Any, Console], None],
    waiting: str = COMPILING,
) -> int:
    """Find, write and print; returns the exit status. A refusal leaves no folder behind.

    find: gets what keeps the draws as soon as they are there, and returns the findings, which say
    whether they were `interrupted`. write_run: returns the report's path. waiting: what a person
    reads when it takes long.
    """
    folder = run.new_run(name, out)
    draws = folder / "posterior.nc"
    try:
        with patience(waiting):
            found = find(lambda result: save(result, draws))
        report = write_run(found, folder)
    except KeyboardInterrupt:
        if not draws.exists():
            raise
        _say(f"interrupted; the draws are in {draws}, without a report")
        return INTERRUPTED
    except (ValueError, TypeError):
        draws.unlink(missing_ok=True)  # what cannot be shown is refused like any other
        raise
    finally:
        run.discard(folder)
    if json:
        print(to_json(record(found) | {"run": str(folder), "report": str(report)}))
    else:
        show(found, terminal())
        print(report)
    if found.interrupted:
        _say("interrupted; the draws so far were written")
        return INTERRUPTED
    return 0


def _say(text: str) -> None:
    Console(stderr=True).print(f"hakari: {text}", soft_wrap=True)
