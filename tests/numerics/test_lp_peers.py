"""Local projections of two other packages, to the last digits: estimates, errors, joint covariance.

Their numbers are in lp_peers.json, made by benchmarks/lp_peers_reference.py with localproj 0.1.0
(on pyfixest 0.60.0) and localprojections 0.2.1 (on statsmodels 0.15.0 and linearmodels 7.1). With n
rows, k coefficients, G units, and ours as the base, their squared standard errors are
- localproj: hc1 the same; hc3 and hac times n/(n − k), on top of the leverages and lags, the joint
  ones too; clusters times (n − 1)/(n − k'), k' counting the units' effects as one coefficient;
- localprojections: hac of a series the same; Driscoll and Kraay's and White's of a panel times
  n/(n − k), k counting the units' effects.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.datasets import macrodata

from hakari.inference.local_projections import LocalProjection
from hakari.inference.path_prior import RoughnessPenalty

PEERS = json.loads(Path(__file__).with_name("lp_peers.json").read_text())
FORMULA, JORDA = PEERS["localproj"], PEERS["localprojections"]
TIGHT = {"rtol": 1e-8, "atol": 1e-10}
NO_FACTOR = {"hc1"}  # of the covariances by localproj


@pytest.fixture(scope="module")
def macro():
    """Log output (percent), its growth, inflation, the bill rate and whether prices rise fast."""
    read = macrodata.load_pandas().data
    output = 100 * np.log(read["realgdp"])
    table = {"output": output, "gdp": output.diff(), "infl": read["infl"], "rate": read["tbilrate"]}
    return pd.DataFrame(table).assign(fast=(read["infl"] > 4).astype(float))


@pytest.fixture(scope="module")
def differences(macro):
    """What localprojections makes of a table: its first differences, and what it leaves alone."""
    changes = macro[["output", "infl", "rate"]].diff()
    return changes.assign(level=macro["infl"], fast=macro["fast"])


def table(name):
    return pd.DataFrame(PEERS["tables"][name])


def of_gdp(macro, **more):
    return LocalProjection(macro, "gdp", "rate", controls=["infl"], lags=4, horizons=8, **more)


def of_panel(effects="unit", **more):
    data = table("panel")
    given = {"lags": 2, "horizons": 4, "sample": "available", "time": "year", "unit": "unit"}
    return LocalProjection(data, "y", "s", effects=effects, **given | more)


def series(macro, name):
    if name == "ols":
        return of_gdp(macro, sample="available")
    if name == "common":
        return of_gdp(macro, sample="common")
    return of_gdp(macro, sample="available", cumulative=True)


def factor(lp):
    """√(n/(n − k)) of each horizon."""
    rows = np.array(lp.rows_used)
    return np.sqrt(rows / (rows - lp.coefficients))


# --- localproj ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ols", "common", "cumulative"])
def test_a_series_is_that_of_localproj(macro, name):
    lp, peer = series(macro, name), FORMULA[name]
    np.testing.assert_allclose(lp.estimate[0, 0], peer["estimate"], **TIGHT)
    assert list(lp.rows_used) == peer["rows"]
    assert {lp.coefficients} == set(peer["coefficients"])
    for covariance, errors in peer["errors"].items():
        ours = lp.standard_errors(covariance)[0, 0]
        scale = 1.0 if covariance in NO_FACTOR else factor(lp)
        np.testing.assert_allclose(ours * scale, errors, err_msg=covariance, **TIGHT)


def test_the_same_formula_is_the_same_projection(macro):
    formula = "gdp ~ rate + l(gdp, 1:4) + l(rate, 1:4) + l(infl, 1:4)"
    lp = LocalProjection.from_formula(formula, macro, "rate", 8, sample="available")
    np.testing.assert_allclose(lp.estimate[0, 0], FORMULA["ols"]["estimate"], **TIGHT)
    np.testing.assert_allclose(
        lp.standard_errors("hc1")[0, 0], FORMULA["ols"]["errors"]["hc1"], **TIGHT
    )


@pytest.mark.parametrize("covariance", FORMULA["common"]["joint"])
def test_the_joint_covariance_of_horizons_is_that_of_localproj(macro, covariance):
    lp = series(macro, "common")
    rows = lp.score_rows(covariance)
    scale = 1.0 if covariance in NO_FACTOR else factor(lp)[0] ** 2
    np.testing.assert_allclose(
        scale * rows.T @ rows, FORMULA["common"]["joint"][covariance], rtol=1e-8, atol=1e-11
    )


@pytest.mark.parametrize(("name", "instruments"), [("iv", 1), ("two instruments", 2)])
def test_instruments_are_those_of_localproj(name, instruments):
    peer = FORMULA[name]
    lp = LocalProjection(
        table("iv"), "y", "s", ["z1", "z2"][:instruments], lags=2, horizons=6, sample="available"
    )
    np.testing.assert_allclose(lp.estimate[0, 0], peer["estimate"], **TIGHT)
    assert list(lp.rows_used) == peer["rows"]
    np.testing.assert_allclose(lp.standard_errors("hc1")[0, 0], peer["errors"]["hc1"], **TIGHT)


def test_the_effective_f_of_one_instrument_is_the_square_of_its_t():
    lp = LocalProjection(table("iv"), "y", "s", "z1", lags=2, horizons=6, sample="available")
    F = lp.first_stage("hc0")["effective_f"] / factor(lp) ** 2  # their t is by hc1
    np.testing.assert_allclose(F, np.square(FORMULA["iv"]["first stage t"]), **TIGHT)


@pytest.mark.parametrize(("name", "effects"), [("units", "unit"), ("units and dates", "unit+time")])
def test_a_panel_is_that_of_localproj(name, effects):
    lp, peer = of_panel(effects), FORMULA[name]
    np.testing.assert_allclose(lp.estimate[0, 0], peer["estimate"], **TIGHT)
    assert list(lp.rows_used) == peer["rows"]
    rows = np.array(lp.rows_used)
    used = 28 - np.arange(5) if effects == "unit+time" else 1  # dates at a horizon, or a constant
    scale = np.sqrt((rows - 1) / (rows - 5 - used))
    np.testing.assert_allclose(
        lp.standard_errors("cluster")[0, 0] * scale, peer["errors"]["cluster"], **TIGHT
    )
    np.testing.assert_allclose(lp.standard_errors("hc1")[0, 0], peer["errors"]["hc1"], **TIGHT)


@pytest.mark.parametrize("penalty", FORMULA["smooth"])
def test_equal_weights_and_a_penalty_are_the_smooth_projection(macro, penalty):
    """Least squares over all horizons is the quasi-posterior with V = 1/(s's), τ² = 1/penalty."""
    lp = series(macro, "common")
    (path,) = lp.posterior(RoughnessPenalty(order=2)).paths
    D = np.diff(np.eye(9), n=2, axis=0)
    form = replace(path.form, root=D, fixed=np.zeros((9, 9)))
    size = float((lp.parts[0].fit.s ** 2).sum())
    plain = replace(path, covariance=np.eye(9) / size, precision=1.0, form=form)
    ours = plain.conditional_mean(np.array([-0.5 * np.log(float(penalty))]))[0]
    np.testing.assert_allclose(ours, FORMULA["smooth"][penalty], **TIGHT)


# --- localprojections ---------------------------------------------------------------------


def same_path(lp, peer, covariance, scale=1.0, shock=0):
    np.testing.assert_allclose(lp.estimate[0, shock], peer["estimate"], **TIGHT)
    ours = lp.standard_errors(covariance)[0, shock] * scale
    np.testing.assert_allclose(ours, peer["error"], **TIGHT)


@pytest.mark.parametrize("shock", JORDA["series"])
def test_a_series_is_that_of_localprojections(differences, shock):
    """Ordered output, inflation, rate: shocks of output at once, of the rate a quarter later."""
    data = differences.assign(before=differences["rate"].shift(1))
    question = {
        "output": ("output", ["l(rate, 1:3)"]),
        "infl": ("infl", ["l(output, 0:3)", "l(rate, 1:3)"]),
        "rate": ("before", ["l(output, 0:3)", "l(rate, 2:3)"]),
    }
    name, controls = question[shock]
    lp = LocalProjection(
        data, "infl", name, controls=controls, lags=3, horizons=8, cumulative=True,
        sample="available", shock_lags=0 if name == "before" else None,
    )  # fmt: skip
    same_path(lp, JORDA["series"][shock], "hac:4")


@pytest.mark.parametrize("shock", ["output", "rate"])
@pytest.mark.parametrize(("regime", "place"), [("on", 0), ("off", 1)])
def test_regimes_are_those_of_localprojections(differences, regime, place, shock):
    """It lags the state after dropping rows with gaps, and so loses the first row."""
    controls = ["l(level, 0)", *(["l(output, 0:2)"] if shock == "rate" else [])]
    lp = LocalProjection(
        differences.iloc[2:], "rate", shock, controls=controls, lags=2, horizons=6,
        cumulative=True, sample="available", state="l(fast, 1)",
    )  # fmt: skip
    same_path(lp, JORDA[regime][shock], "hac:4", shock=place)


@pytest.mark.parametrize("shock", ["s", "y"])
def test_a_panel_is_that_of_localprojections(shock):
    data = table("panel")
    data[["s", "y"]] = data.groupby("unit")[["s", "y"]].diff()
    lp = LocalProjection(
        data, "y", shock, controls=["l(s, 0:2)"] if shock == "y" else (), lags=2, horizons=4,
        cumulative=True, sample="available", time="year", unit="unit",
    )  # fmt: skip
    for name, covariance in (("kernel", "driscoll-kraay:2"), ("robust", "hc0")):
        same_path(lp, JORDA["panel"][name][shock], covariance, factor(lp))


# --- mutants ------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"lags": 3}, {"trend": "ct"}, {"shock_lags": 3}])
def test_the_tolerance_tells_another_projection(macro, change):
    given = {"lags": 4, "controls": ["infl"], "horizons": 8, "sample": "available"} | change
    lp = LocalProjection(macro, "gdp", "rate", **given)
    assert np.abs(lp.estimate[0, 0] - FORMULA["ols"]["estimate"]).max() > 1e-3
