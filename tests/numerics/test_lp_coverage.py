"""Joint bands of impulse responses hold as often as they say, in samples with known responses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import lp_coverage
import lp_designs as designs

REPLICATIONS = 240
FLAT, LOG = "flat, calibrated", "roughness, log, calibrated"
CELLS = [
    (designs.var1(0.9, 24), 200, (FLAT, LOG)),
    (designs.lp_iv(0.9, 24, 0.4), 200, (FLAT, LOG)),
    (lp_coverage.late_hump(24), 200, (FLAT,)),
    (designs.var1(0.5, 24), 500, ("flat", FLAT)),
    (designs.lp_iv(0.9, 24, 0.4), 500, ("flat", FLAT)),
]


def short_of(found: dict, level: float) -> float:
    """Nominal less simulated joint coverage, in binomial standard errors."""
    error = np.sqrt(level * (1 - level) / REPLICATIONS)
    return (level - found["joint"][f"{level:g}"]) / error


@pytest.mark.slow
@pytest.mark.parametrize(("design", "T", "methods"), CELLS, ids=lambda v: getattr(v, "name", None))
def test_joint_bands_cover(design, T, methods):
    """At least as often as they say, within binomial error: calibration only widens."""
    for name, found in lp_coverage.study(design, T, REPLICATIONS, methods).items():
        for level in lp_coverage.LEVELS:
            assert short_of(found, level) < 3, (name, level, found["joint"])


@pytest.mark.slow
def test_a_prior_that_denies_the_response_is_seen_to_fail():
    """A hump late in log horizons; by evidence (the default) the even spacing is found."""
    found = lp_coverage.study(
        lp_coverage.late_hump(24), 200, REPLICATIONS, ("roughness", "roughness, log, calibrated")
    )
    assert short_of(found["roughness, log, calibrated"], 0.9) > 20
    assert found["roughness"]["rmse"] < 0.8 * found["roughness, log, calibrated"]["rmse"]


@pytest.mark.slow
def test_what_does_not_hold_jointly_fails():
    """Pointwise quantiles in place of sup-t, and a HAC with as many lags as horizons."""
    found = lp_coverage.study(
        designs.var1(0.9, 24), 200, REPLICATIONS, ("flat, pointwise", "flat, hac:25", "flat")
    )
    assert short_of(found["flat, pointwise"], 0.9) > 10
    assert short_of(found["flat, hac:25"], 0.9) > 10
    assert short_of(found["flat"], 0.9) > 3  # 200 dates: what `calibrate` is for


def test_a_quick_study_has_every_method_and_ordered_widths(monkeypatch, tmp_path, capsys):
    design = designs.var1(0.9, 4)
    monkeypatch.setattr(lp_coverage, "cells", lambda quick: [(design, 120)])
    monkeypatch.setattr(
        sys, "argv", ["lp_coverage.py", "--replications", "3", "--out", str(tmp_path)]
    )
    lp_coverage.main()
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "lp_coverage.json").read_text())
    (cell,) = record["cells"]
    assert set(cell["methods"]) == set(lp_coverage.methods(design))
    assert all(name in shown for name in cell["methods"])
    for found in cell["methods"].values():
        widths = [found["width"][f"{level:g}"] for level in lp_coverage.LEVELS]
        assert widths == sorted(widths)
        assert 0 < found["rmse"] < 1
    assert (tmp_path / "lp_coverage.png").stat().st_size > 10_000
