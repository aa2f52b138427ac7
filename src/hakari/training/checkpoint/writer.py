"""The process that writes in the background: requests on standard input, answers on output.

    python -m hakari.training.checkpoint.writer FILE_DESCRIPTOR_OF_SHARED_MEMORY

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
from math import prod
from typing import Any

import numpy as np

from hakari.training.checkpoint.boxes import extents
from hakari.training.checkpoint.commit import Request, carry_out
from hakari.training.checkpoint.dtypes import BYTES, bits
from hakari.training.checkpoint.source import Info

ALIGN = 64


def main(memory: int) -> None:
    """Answer requests until the input ends."""
    lines: queue.Queue[bytes] = queue.Queue()
    gone = threading.Event()
    threading.Thread(target=_listen, args=(lines, gone), daemon=True).start()
    os.nice(5)  # training comes first
    while (line := lines.get()) and line != b"end\n":
        print(json.dumps(_answer(json.loads(line), memory, gone)), flush=True)


def layout(request: Request) -> tuple[list[int], int]:
    """Where each piece lies in the shared memory, and how large that is, in bytes."""
    places, at = [], 0
    for _, info, box in request.pieces:
        places.append(at)
        at += -(-prod(extents(box)) * BYTES[info.dtype] // ALIGN) * ALIGN
    return places, max(at, ALIGN)


def request_from(table: dict[str, Any]) -> Request:
    """A request as it was before it was sent."""

    def box(rows: Any) -> tuple[tuple[int, int], ...]:
        return tuple((start, stop) for start, stop in rows)

    pieces = tuple(
        ((name, state), Info(tuple(info["shape"]), info["dtype"]), box(place))
        for (name, state), info, place in table["pieces"]
    )
    mine = tuple((index, box(place)) for index, place in table["mine"])
    return Request(**{**table, "pieces": pieces, "mine": mine})


def _listen(lines: queue.Queue[bytes], gone: threading.Event) -> None:
    ended = False
    for line in sys.stdin.buffer:
        lines.put(line)
        ended = ended or line == b"end\n"
    if not ended:
        gone.set()
    lines.put(b"")


def _answer(table: dict[str, Any], memory: int, gone: threading.Event) -> dict[str, str]:
    request = request_from(table)
    try:
        return {"path": carry_out(request, _values(request, memory), gone.is_set)}
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
    main(int(sys.argv[1]))
