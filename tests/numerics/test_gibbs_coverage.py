"""Calibrated Gibbs intervals hold the truth as often as they say; the four methods agree."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import hakari.inference as hi

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gibbs_coverage as study

REPLICATIONS = 100
CELLS = [(design, n) for design in study.DESIGNS for n in design.sizes]


def beyond(found: dict, kind: str) -> np.ndarray:
    """Simulated less nominal coverage in binomial standard errors, (levels, coefficients)."""
    shares = np.array([found["coverage"][kind][f"{c:g}"] for c in study.LEVELS])
    levels = np.array(study.LEVELS)[:, None]
    return (shares - levels) / np.sqrt(levels * (1 - levels) / REPLICATIONS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("design", "n"), CELLS, ids=lambda v: getattr(v, "name", v))
def test_calibrated_intervals_cover(design, n, record_property):
    found = study.study(design, n, REPLICATIONS)
    record_property("coverage", str(found["coverage"]))
    assert np.abs(beyond(found, "calibrated")).max() < 3
    if design.name.startswith("least squares"):
        assert beyond(found, "learning rate 1").min() < -4  # the slope's interval is too short


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("design", study.DESIGNS, ids=lambda design: design.name)
def test_the_methods_agree_with_gpc(design):
    """Within the intervals that they state, which are mostly the data sets' that they share."""
    rows = design.draw(400, np.random.default_rng(5))
    settings = {"region": "hpd", "replicates": 300, "seed": 1}
    found = {
        method: hi.calibrate(hi.GibbsPosterior(design.loss, rows), method=method, **settings)
        for method in ("gpc", "gpc-wp", "gpc-smc", "cloud", "shift")
    }
    for name, one in found.items():
        assert one.found[0].solved, name
        assert found["gpc"].interval[0] < one.learning_rate < found["gpc"].interval[1], name
        assert one.interval[0] < found["gpc"].learning_rate < one.interval[1], name
