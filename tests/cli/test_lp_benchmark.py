"""The quick run of the local projections benchmark without peers: routes agree, goals are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "local_projections.py"


def test_a_few_steps_of_what_needs_no_peer(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--peers", "none", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "left out: numpyro, localproj" in done.stderr
    report = json.loads((tmp_path / "local_projections.json").read_text())
    one, several = report["cases"]
    assert one["regressors"] == 62  # the shock, 12 lags of 5 variables, a constant
    assert one["coefficients"] == 62 * 9
    assert several["coefficients"] == 2 * one["coefficients"]
    assert list(one["routes"]) == ["concentrated", "gibbs", "da-approx", "mh"]
    assert list(several["routes"]) == ["concentrated", "gibbs", "da-approx"]
    for case in report["cases"]:
        assert case["from_table"]["ess"] >= 2000
        for name in ("concentrated", "gibbs"):
            found = case["routes"][name]
            assert found["mean_gap_in_sd"] < 5 / found["ess"] ** 0.5  # the closed form's means
    assert "upper bound" in one["routes"]["mh"]["note"]  # 200 draws are too few, and it says so
    ratios = report["goals"]["ess_per_second_over_mh"]["H8"]
    assert set(ratios) == {"ratio", "ratio_moves", "ratio_strictest", "mh_note"}
    assert (tmp_path / "local_projections.png").stat().st_size > 10_000
