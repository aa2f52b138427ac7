"""Each example runs as a user runs it, in a process of its own, without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "own_loop": [
        "gshard     640 tokens made 1280 visits",
        "grin       640 tokens made 1280 visits",
    ],
    "iv_card": ["against the draws: nothing", "The instruments are weak for educ"],
    "shards_and_streams": ["folder   20000 rows", "batches  20000 rows", "after  20000 rows"],
    "hac_macro": ["191 quarters, covariance hac:", "The instruments are strong."],
}


ELSEWHERE = {"monetary_policy"}  # takes arguments: test_monetary_policy.py


def test_every_example_has_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SAYS.keys() | ELSEWHERE
    for name in ELSEWHERE:
        assert f'"{name}.py"' in (Path(__file__).parent / f"test_{name}.py").read_text()


@pytest.mark.parametrize("script", [EXAMPLES / f"{name}.py" for name in SAYS], ids=list(SAYS))
def test_example_runs_and_says(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line in SAYS[script.stem]:
        assert line in done.stdout
    if script.stem == "shards_and_streams":
        routes = [line.split()[-1] for line in done.stdout.splitlines()[:3]]
        assert len({round(float(value), 6) for value in routes}) == 1
