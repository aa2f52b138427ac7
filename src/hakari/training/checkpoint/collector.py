"""Python's collector of cycles, out of the way while thousands of tensors are listed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection of cycles, which would go through 10,000 tensors' tables again and again.

    They are trees, and gone without it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
