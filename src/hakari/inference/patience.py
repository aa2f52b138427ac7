"""What a person reads on the error stream while something takes long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COMPILING = "hakari: still at work; the first run compiles its kernels, half a minute, once"


@contextmanager
def patience(text: str = COMPILING, seconds: float = 8.0) -> Iterator[None]:
    """Print `text` if the block takes longer than `seconds`; says nothing otherwise."""
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def told(progress: bool, before: int = 0) -> Iterator[Callable[[str, int], None]]:
    """A line on the error stream: the pass, its rows so far, and rows a second.

    before: rows that a pass which goes on had already.
    """
    if not progress:
        yield lambda name, rows: None
        return
    from rich.console import Console

    began: dict[str, float] = {}
    last = time.perf_counter()
    with Console(stderr=True).status("reading") as status:

        def say(name: str, rows: int) -> None:
            nonlocal last
            start, last = began.setdefault(name, last), time.perf_counter()
            speed = (rows - before) / max(last - start, 1e-9)
            status.update(f"{name}: {rows:,} rows, {speed:,.0f} a second")

        yield say
