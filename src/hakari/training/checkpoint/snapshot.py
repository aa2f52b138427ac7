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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from hakari.training.checkpoint.boxes import extents
from hakari.training.checkpoint.commit import Request, SaveError, report
from hakari.training.checkpoint.tensors import TORCH
from hakari.training.checkpoint.writer import layout, to_json


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
        if self._writer and self.path is None and self._error is None:
            self._take(self._writer.answer(wait=False))
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
        if wait and not self.done() and self._writer:
            self._take(self._writer.answer(wait=True))
        self._told = self._error is not None
        return self._error

    def untold(self) -> str | None:
        """What went wrong, once it is over, unless the program has seen it."""
        return None if self._told else self.failure(wait=True)

    def _take(self, answer: dict[str, str] | None) -> None:
        if answer is not None:
            self._error = answer.get("error")
            self.path = None if self._error else self._shown
            self._writer = None


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
        if self.process.poll() is not None:
            self._start_again()
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

    def answer(self, wait: bool) -> dict[str, str] | None:
        """What the process said of its last save, or None if it has not yet."""
        out = self.process.stdout
        if out is None:
            return {"error": "the writer process was not started"}
        os.set_blocking(out.fileno(), wait)
        line = out.readline()
        if line:
            os.set_blocking(out.fileno(), True)
            line = line if line.endswith(b"\n") else line + out.readline()  # of a long message
            return dict(json.loads(line))
        status = self.process.wait() if wait else self.process.poll()
        if status is None:
            return None
        said = f"the writer process ended with status {status}"
        if self.request:  # it cannot tell the others any more
            report(self.request, said)
        return {"error": said}

    def _send(self, request: Request) -> None:
        if self.process.stdin is None:
            raise RuntimeError("the writer process was not started")
        self.request = request
        self.process.stdin.write(to_json(request))
        self.process.stdin.flush()

    def _start_again(self) -> None:
        self.process = _process(self.memory)


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
    process = writer.process
    if os.getpid() != owner:  # a forked child
        return
    if process.stdin and process.poll() is None:
        with suppress(BrokenPipeError):
            process.stdin.write(b"end\n")
            process.stdin.close()
    error = writer.last.untold() if writer.last else None
    if process.stdout:
        process.stdout.close()
    process.wait()
    if error:
        print(f"hakari: saving in the background failed: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # no other way to a status, this late
