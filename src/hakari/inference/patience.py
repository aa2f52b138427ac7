"""A word on the error stream when a step takes long, such as compiling for the first time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
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
