"""Saves in the background: a copy of the state in shared memory, and a process that writes it.

The process is not forked (threads and CUDA would not survive it) and does not run the user's
script again. It shares one nameless memory file with the training process, which is gone when
both are, however they end. It speaks to others through the checkpoint's folder alone.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from hakari.training.checkpoint.boxes import extents
from hakari.training.checkpoint.commit import Request, SaveError, report
from hakari.training.checkpoint.tensors import TORCH
from hakari.training.checkpoint.writer import layout, to_json

GRACE = 5.0
"""Seconds that a writer has beyond a save's `timeout` to say that it ran out."""


@dataclass
class Save:
    """A save that is under way, or over."""

    path: str | None = None
    _writer: Writer | None = field(default=None, repr=False)
    _error: str | None = None
    _shown: str = field(default="", repr=False)
    _told: bool = field(default=False, repr=False)  # whether the program has seen that it failed

    def done(self) -> bool:
        """Whether it is over, well or not."""
        self._look(wait=False)
        return self._writer is None

    def poll(self) -> bool:
        """Whether it is complete. Raises SaveError if it failed; call it once a step."""
        error = self.failure() if self.done() else None
        if error:
            raise SaveError(f"saving in the background failed: {error}")
        return self.done()

    def wait(self) -> str:
        """Wait until it is complete; returns where it is. Raises SaveError if it failed."""
        error = self.failure(wait=True)
        if error:
            raise SaveError(f"saving in the background failed: {error}")
        return str(self.path)

    def failure(self, wait: bool = False) -> str | None:
        """What went wrong, if it is over."""
        self._look(wait)
        self._told = self._error is not None
        return self._error

    @property
    def told(self) -> bool:
        """Whether the program has seen that it failed."""
        return self._told

    def untold(self, wait: bool = True) -> str | None:
        """What went wrong, once it is over, unless the program has seen it."""
        return None if self._told else self.failure(wait)

    def _look(self, wait: bool) -> None:
        """Ask the writer, unless it is over, or another thread waits for the answer."""
        writer = self._writer
        if writer is None:
            return
        writer.check_owner()
        if not writer.lock.acquire(blocking=wait):
            return
        try:
            answer = writer.answer(wait) if self._writer else None
            if answer is not None:
                self._error = answer.get("error")
                self.path = None if self._error else self._shown
                self._writer = None
        finally:
            writer.lock.release()
        for note in (answer or {}).get("notes", ()):
            warnings.warn(note, stacklevel=3)


def finished(path: str) -> Save:
    """A save that is complete."""
    return Save(path)


@dataclass
class Writer:
    """The process that writes, and the memory that it shares with this one."""

    process: subprocess.Popen[bytes]
    memory: int  # file descriptor
    view: mmap.mmap | None = None
    request: Request | None = None
    last: Save | None = None
    owner: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)  # one thread reads an answer
    until: float = 0.0  # when the save under way has run out of time
    given_up: bool = False

    def check_owner(self) -> None:
        """Raise RuntimeError in a forked child: it shares the pipe, and would take answers."""
        if os.getpid() != self.owner:
            raise RuntimeError(
                f"this process ({os.getpid()}) was forked from {self.owner}, whose writer process "
                "it shares: save in that one, or start this one by 'spawn'"
            )

    def save(self, request: Request, tensors: Sequence[Tensor], shown: str) -> Save:
        """Copy the tensors and have them written; returns when they are copied.

        shown: where the checkpoint is, as the user says it.
        """
        try:
            self._copy(request, tensors)
            self._send(request)
        except Exception as error:  # nothing was sent, and the other processes would wait for it
            report(request, f"{type(error).__name__}: {error}")
            raise
        self.last = Save(_writer=self, _shown=shown)
        return self.last

    def _copy(self, request: Request, tensors: Sequence[Tensor]) -> None:
        if self.given_up or self.process.poll() is not None:
            _close(self.process)
            self.process, self.given_up = _process(self.memory), False
        places, size = layout(request)
        if self.view is None or len(self.view) < size:
            os.ftruncate(self.memory, size)
            self.view = mmap.mmap(self.memory, size)
        for tensor, (_, info, box), place in zip(tensors, request.pieces, places, strict=True):
            count = prod(extents(box))
            if count:
                flat = torch.frombuffer(
                    self.view, dtype=TORCH[info.dtype], count=count, offset=place
                )
                flat.view(extents(box)).copy_(tensor)

    def answer(self, wait: bool) -> dict[str, Any] | None:
        """What the process said of its last save, or None if it has not yet."""
        out = self.process.stdout
        if out is None:
            return {"error": "the writer process was not started"}
        left = max(0.0, self.until - time.monotonic())
        ready = select.poll()
        ready.register(out, select.POLLIN)
        if ready.poll(left * 1000 if wait else 0):
            line = out.readline()
            return dict(json.loads(line)) if line.endswith(b"\n") else self._died()
        return self._give_up() if time.monotonic() >= self.until else None

    def _died(self) -> dict[str, str]:
        said = f"the writer process ended with status {self.process.wait()}"
        if self.request:  # it cannot tell the others any more
            report(self.request, said)
        return {"error": said}

    def _give_up(self) -> dict[str, str]:
        """End a process that does not answer: it was stopped, or its file system hangs."""
        self.process.kill()
        self.given_up, request = True, self.request
        if request is None:
            return {"error": "the writer process was given up"}
        said = (
            f"the writer process of rank {request.rank} did not answer within {request.timeout:g} "
            f"s (timeout) and {GRACE:g} s: it was stopped, or its disk hangs; it was killed"
        )
        teller = threading.Thread(target=report, args=(request, said), daemon=True)
        teller.start()  # the disk may hang here too
        teller.join(GRACE)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        return {"error": said}

    def _send(self, request: Request) -> None:
        if self.process.stdin is None:
            raise RuntimeError("the writer process was not started")
        self.request, self.until = request, time.monotonic() + request.timeout + GRACE
        data = to_json(request)
        if len(data) <= select.PIPE_BUF:
            _write(self.process.stdin, data)
        else:  # more than a pipe holds: a process that is stopped would stop this one
            threading.Thread(target=_write, args=(self.process.stdin, data), daemon=True).start()


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            if pipe:
                pipe.close()


def _write(pipe: Any, data: bytes) -> None:
    with suppress(BrokenPipeError):  # it has died, as its answer will say
        pipe.write(data)
        pipe.flush()


def start() -> Writer:
    """Start the process that writes; it ends with this one, having finished its save."""
    memory = _shared_memory()
    writer = Writer(_process(memory), memory)
    atexit.register(_drain, writer, os.getpid())
    return writer


def _shared_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("hakari-snapshot")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _process(memory: int) -> subprocess.Popen[bytes]:
    me = str(os.getpid())
    return subprocess.Popen(
        [sys.executable, "-m", "hakari.training.checkpoint.writer", str(memory), me],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(memory,),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for the training process
    )


def _drain(writer: Writer, owner: int) -> None:
    """At exit: let the process finish what it has. If that fails, so does the program."""
    if os.getpid() != owner:  # a forked child
        return
    error = writer.last.untold() if writer.last else None
    process = writer.process
    if process.stdin and process.poll() is None:
        _write(process.stdin, b"end\n")
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:  # it has nothing to do any more, and may be stopped
        process.kill()
    _close(process)
    if error:
        print(f"hakari: saving in the background failed: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # no other way to a status, this late
