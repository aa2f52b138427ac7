"""The process that writes in the background: requests on standard input, answers on output.

    python -m hakari.training.checkpoint.writer SHARED_MEMORY PARENT

(a file descriptor and a process)

If the training process dies, what it had not acknowledged is given up. Nothing here needs
torch, so the process is small.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np

from hakari.training.checkpoint.boxes import extents
from hakari.training.checkpoint.commit import Request, carry_out
from hakari.training.checkpoint.dtypes import BYTES, bits
from hakari.training.checkpoint.source import Info

ALIGN = 64


def main(memory: int, parent: int) -> None:
    """Answer requests until the input ends, or the process that started this one has."""
    lines: queue.Queue[bytes] = queue.Queue()
    closed = threading.Event()
    threading.Thread(target=_listen, args=(lines, closed), daemon=True).start()
    os.nice(5)  # training comes first

    def gone() -> bool:  # a forked child of the training process may still hold the pipe
        return closed.is_set() or os.getppid() != parent

    while not gone():
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            continue
        if line == b"end":
            break
        answer = json.dumps(_answer(json.loads(line), memory, gone))
        with suppress(BrokenPipeError):  # nobody is there to hear it
            os.write(sys.stdout.fileno(), answer.encode() + b"\n")
    os._exit(0)  # the thread may hold the input's lock


def layout(request: Request) -> tuple[list[int], int]:
    """Where each piece lies in the shared memory, and how large that is, in bytes."""
    places, at = [], 0
    for _, info, box in request.pieces:
        places.append(at)
        at += -(-prod(extents(box)) * BYTES[info.dtype] // ALIGN) * ALIGN
    return places, max(at, ALIGN)


def to_json(request: Request) -> bytes:
    """A request as one line."""
    table = {
        **vars(request),
        "pieces": [(*key, info.dtype, info.shape, box) for key, info, box in request.pieces],
    }
    return json.dumps(table, separators=(",", ":")).encode() + b"\n"


def request_from(table: dict[str, Any]) -> Request:
    """A request as it was before it was sent."""

    def box(rows: Any) -> tuple[tuple[int, int], ...]:
        return tuple((start, stop) for start, stop in rows)

    pieces = tuple(
        ((name, state), Info(tuple(shape), dtype), box(place))
        for name, state, dtype, shape, place in table["pieces"]
    )
    mine = tuple((index, box(place)) for index, place in table["mine"])
    return Request(**{**table, "pieces": pieces, "mine": mine})


def _listen(lines: queue.Queue[bytes], closed: threading.Event) -> None:
    rest = b""
    while data := os.read(sys.stdin.fileno(), 2**20):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            lines.put(line)
            if line == b"end":
                return
    closed.set()


def _answer(table: dict[str, Any], memory: int, gone: Callable[[], bool]) -> dict[str, Any]:
    request, notes = request_from(table), list[str]()
    try:
        path = carry_out(request, _values(request, memory), gone, notes.append)
        return {"path": path, "notes": notes}
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _values(request: Request, memory: int) -> list[np.ndarray]:
    places, size = layout(request)
    view = mmap.mmap(memory, size, prot=mmap.PROT_READ)
    values = []
    for (_, info, box), place in zip(request.pieces, places, strict=True):
        shape = extents(box)
        count = int(np.prod(shape, dtype=np.int64))
        values.append(np.frombuffer(view, bits(info.dtype), count, place).reshape(shape))
    return values


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
