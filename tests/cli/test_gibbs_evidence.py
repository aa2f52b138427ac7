"""What `hakari gibbs` keeps of a calibration, and what it says where no rate was found."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hakari.inference as hi

FEW = ["--replicates", 200, "--draws", 300, "--chains", 2, "--level", 0.9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("evidence")
    x, e = np.random.default_rng(3).standard_normal((2, 200))
    frame = pd.DataFrame({"y": 1 + 2 * x + (1 + 0.5 * np.abs(x)) * e, "x": x})
    frame.to_csv(place / "rows.csv", index=False)
    return place


def strict(text):
    """Parsed JSON; NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_json_holds_the_evidence_and_the_other_rules(type_in, folder):
    words = ["--data", folder / "rows.csv", "--loss", "squared", *FEW]
    found = strict(type_in("gibbs", "y ~ 1 + x", *words, "--json", "--out", "j")[1])
    gibbs = hi.GibbsPosterior.from_formula(hi.losses.squared(), "y ~ 1 + x", folder / "rows.csv")
    cal = hi.calibrate(gibbs, 0.9, replicates=200, seed=1)
    assert found["rival_rates"] == pytest.approx(cal.rival_rates)
    assert found["spectrum"] == pytest.approx(list(cal.spectrum))
    assert found["coverage"]["x"] == pytest.approx(list(cal.coverage_curve["x"]))
    assert found["method"]["seconds"] > 0
    costs = [(one["simulations"], one["evaluations"]) for one in found["calibration"]]
    assert costs == [(f.simulations, f.evaluations) for f in cal.found]
    ranks, curve = (pd.read_csv(f"j/{name}.csv") for name in ("ranks", "coverage"))
    for one in cal.found:
        label = one.region.label
        np.testing.assert_allclose(ranks[label], one.ranks, atol=2e-6)  # single-precision weights
        shares = [(ranks[label] <= level).mean() for level in curve["level"]]
        np.testing.assert_allclose(curve[label], shares, atol=1e-12)
    report = Path("j/report.html").read_text()
    assert all(name in report for name in cal.rival_rates)


def test_a_prior_far_away_is_told_first_and_has_no_interval(type_in, folder):
    words = ["--data", folder / "rows.csv", "--loss", "squared", *FEW, "--json", "--out", "far"]
    status, out, err = type_in("gibbs", "y ~ 1 + x", *words, "--prior", "x=normal(0, 0.05)")
    assert status == 0, err
    found = strict(out)
    first, x = found["calibration"]
    assert (first["solved"], x["solved"]) == (True, False)
    assert (x["rate"], x["interval"]) == (None, [None, None])
    assert found["learning_rate"] == first["rate"]
    assert (found["coefficients"][1]["lower"], found["coefficients"][1]["upper"]) == (None, None)
    assert found["verdict"][0].startswith("No rate was found for x at which 90% sets cover: even")
    assert found["verdict"][1].endswith("without a calibrated interval.")
    report = Path("far/report.html").read_text()
    assert "The prior on x is centred" in report


def test_a_prior_far_from_everything_is_refused(type_in, folder, tmp_path):
    words = ["--data", folder / "rows.csv", "--loss", "squared", *FEW, "--out", "far"]
    status, out, err = type_in("gibbs", "y ~ 1 + x", *words, "--prior", "normal(-9, 0.05)")
    assert (status, out) == (2, "")
    assert "no rate was found for Intercept at which 90% sets cover" in err
    assert not (tmp_path / "far").exists()
