"""A few steps of the router benchmark: every arm runs, and the report holds what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "routers.py"


def test_a_few_steps_of_every_arm(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--steps", "2", "--seeds", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "routers.json").read_text())
    arms = report["arms"]
    assert list(arms) == ["dense", "gshard", "aux_free", "grin", "grin_star"]
    active = {found["active"] for found in arms.values()}
    assert max(active) / min(active) < 1.01  # the comparison is at equal active parameters
    for name, found in arms.items():
        assert 6.5 < found["validation_loss"] < 7.7  # near the log of the vocabulary
        assert (found["largest_load"] is None) == (name == "dense")
    assert (tmp_path / "routers.png").stat().st_size > 10_000
