"""A writer process that is stopped, as by a disk that hangs, or whose program is gone."""

from __future__ import annotations

import tempfile
import time

import pytest

from hakari.training import checkpoint
from hakari.training.checkpoint import snapshot
from hakari.training.checkpoint.commit import Request
from hakari.training.checkpoint.writer import to_json
from tests.distributed.faults import in_memory
from tests.unit.checkpoint.test_writer import program


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


FROZEN = """
from hakari.training.checkpoint import snapshot
snapshot.GRACE = 0.2
frozen, begun = writer(), time.monotonic()
os.kill(frozen, signal.SIGSTOP)
found = save(2, timeout=0.3, extra_state="x" * 500_000)  # more than a pipe holds
print("skipped", save(3, when_busy="skip"))
try:
    {ask}
except checkpoint.SaveError as error:
    print(error)
print("soon", time.monotonic() - begun < 10)
print("another", save(4).wait() and writer() != frozen)
"""
ASKED = {
    "found.wait()": "saving in the background failed",
    "time.sleep(0.6); found.poll()": "saving in the background failed",
    "save(3)": "the last save failed on rank 0",
}


@pytest.mark.parametrize("ask", ASKED)
def test_a_frozen_writer_is_killed_after_the_timeout_and_the_next_save_has_another(folder, ask):
    with program(folder, FROZEN.replace("{ask}", ask.replace("; ", "\n    "))) as process:
        output, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
    assert output == (
        f"skipped None\n{ASKED[ask]}: the writer process of rank 0 did not answer within 0.3 s "
        "(timeout) and 0.2 s: it was stopped, or its disk hangs; it was killed\n"
        "soon True\nanother True\n"
    )
    assert checkpoint.steps(folder) == [1, 4]


@pytest.mark.parametrize("busy", [True, False])
def test_a_frozen_writer_does_not_keep_a_program_from_its_end(folder, busy):
    text = FROZEN.partition("found =")[0] + ("save(2, timeout=0.3)" if busy else "")
    with program(folder, text) as process:
        _, said = process.communicate(timeout=60)
        assert process.returncode == int(busy)
    assert ("writer process of rank 0 did not answer" in said) is busy


def test_a_writer_whose_program_is_gone_ends_without_a_word(folder, capfd):
    with tempfile.TemporaryFile() as memory:
        memory.truncate(64)
        process = snapshot._process(memory.fileno())
        request = Request(str(folder), 1, "a" * 32, 0, 2, (), (), {"extra": None})
        process.stdin.write(to_json(request))
        process.stdin.flush()
        until = time.monotonic() + 30
        while not list(folder.glob(".tmp-*/ready-00000.json")) and time.monotonic() < until:
            time.sleep(0.01)  # then it waits for rank 1
        process.stdout.close()
        process.stdin.close()
        assert process.wait(30) == 0
    assert capfd.readouterr() == ("", "")
    assert list(folder.glob(".tmp-*/failed-00000.txt"))
