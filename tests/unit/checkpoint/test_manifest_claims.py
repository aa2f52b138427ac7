"""A manifest that its COMMIT vouches for is still a stranger's: `verify` says what is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from torch import nn

from hakari.training.checkpoint import inspect, load, save, verify
from hakari.training.checkpoint.verification import Damage, Report


@pytest.fixture
def step(tmp_path: Path) -> Path:
    save(tmp_path, nn.Linear(3, 2), step=4)
    return tmp_path / "step-00000004"


def claim(step: Path, data: bytes) -> None:
    """A manifest, and a COMMIT with its hash."""
    (step / "manifest.json").write_bytes(data)
    commit = json.loads((step / "COMMIT").read_text())
    commit |= {"manifest_sha256": hashlib.sha256(data).hexdigest(), "manifest_bytes": len(data)}
    (step / "COMMIT").write_text(json.dumps(commit))


def wide(step: Path) -> bytes:
    table = json.loads((step / "manifest.json").read_text())
    row = table["tensors"]["weight"]["weight"]
    row["shape"] = [1] * 100_000
    row["fragments"][0][2] = [[0, 1]] * 100_000
    return json.dumps(table).encode()


def named_twice(step: Path) -> bytes:
    return (step / "manifest.json").read_bytes()[:-1] + b',"step":4}'


CLAIMS = {
    "a list": (lambda step: b"[]", "list instead of an object"),
    "brackets": (lambda step: b"[" * 200_000, "not JSON"),
    "dimensions": (wide, r"shape \[1, 1, .*\.\.\. \(\d+,\d+ characters\)$"),
    "a name twice": (named_twice, "not JSON .'step' stands twice in one object"),
    "a number": (lambda step: b'{"step":' + b"9" * 10_000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("use", [verify, inspect, lambda where: load(where, nn.Linear(3, 2))])
def test_what_cannot_be_is_said_in_a_few_words(step, name, use):
    data, told = CLAIMS[name]
    claim(step, data(step))
    with pytest.raises(ValueError, match=told) as raised:
        use(step)
    assert len(str(raised.value)) < 1000


def test_a_step_under_another_name_is_damage(step):
    """Whoever goes on from it would count from the wrong step."""
    other = step.with_name("step-00000009")
    shutil.copytree(step, other)
    told = r"the folder's name says step 9, and its manifest\.json step 4"
    report = verify(other)
    (damage,) = report.damage
    assert damage.file == "manifest.json"
    assert "damaged: 1 place; " in str(report)
    with pytest.raises(ValueError, match=told):
        raise ValueError(damage.what)
    for where in (other, other.parent):
        with pytest.raises(ValueError, match=told):
            load(where, nn.Linear(3, 2))
    step.rename(step.with_name("best"))
    assert verify(step.with_name("best")).whole
    assert load(step.with_name("best"), nn.Linear(3, 2)).step == 4


def test_a_verdict_has_units_that_suit_it():
    report = Report("run", "hakari", 1, 3, 56_400, 0.01)
    assert str(report).startswith("whole: 3 tensors, 56.40 kB in 0.01 s (")
    two = (Damage("a", "weight", "f", 0, 1, "lost"),) * 2
    assert str(Report("run", "hakari", 1, 3, 5, 0.01, two)).startswith("damaged: 2 places; ")
