"""Anderson-Rubin sets of LP-IV: the closed form, the general route, and the test they invert."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import chi2

import hakari.inference as hi
from hakari.inference import projection_instruments as instruments


def table(T: int = 150, strength: float = 1.0, seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    z, e, v = rng.standard_normal((3, T))
    r, y = np.zeros(T), np.zeros(T)
    for t in range(1, T):
        r[t] = 0.5 * r[t - 1] + strength * z[t] + e[t]
        y[t] = 0.7 * y[t - 1] + 0.5 * r[t] + e[t] + (1 + 0.5 * abs(z[t])) * v[t]
    return {"y": y, "r": r, "z": z, "z2": z + rng.standard_normal(T)}


def projection(strength: float = 1.0, **options) -> hi.LocalProjection:
    words = {"response": "y", "shock": "r", "instruments": ["z"], "lags": 2, "horizons": 6}
    return hi.LocalProjection(table(strength=strength), **words | options)


@pytest.mark.parametrize("strength", [1.0, 0.15, 0.0])
def test_closed_form_is_the_general_set(strength):
    lp = projection(strength)
    found = lp.anderson_rubin(0.9, "hc0")
    (part,) = lp.parts
    for h in range(7):
        ends = instruments._ends(part.fit.y[:, h], part, "robust", None, 0.9)
        row = found.iloc[h]
        assert row["pieces"] == ends[2]
        assert_allclose(row[["lower", "upper"]].to_numpy(float), ends[:2], rtol=1e-8)


def statistic(beta: float, h: int, covariance: str) -> float:
    """(Σ z̃ e)² over the variance of that sum under the hypothesis, e = ỹ − βr̃, by hand."""
    data, T, H = table(), 150, 6
    at = np.arange(2, T - H)
    c = np.column_stack([np.ones(len(at))] + [data[n][at - k] for n in "yr" for k in (1, 2)])
    out = np.eye(len(at)) - c @ np.linalg.pinv(c)
    y, r, z = out @ data["y"][at + h], out @ data["r"][at], out @ data["z"][at]
    score = z * (y - beta * r)
    if covariance == "hc3":
        both = np.column_stack([c, data["z"][at]])
        scaled = score / (1 - np.diag(both @ np.linalg.pinv(both)))
        return score.sum() ** 2 / (scaled @ scaled)
    lags = 3 if covariance == "hac:3" else 0
    near = np.abs(np.subtract.outer(at, at))
    return score.sum() ** 2 / (score @ np.clip(1 - near / (lags + 1), 0, 1) @ score)


@pytest.mark.parametrize("covariance", ["hc0", "hc3", "hac:3"])
def test_ends_are_where_the_test_turns(covariance):
    sets = projection().anderson_rubin(0.9, covariance)
    for h in (0, 4):
        for beta in sets.loc[h, ["lower", "upper"]]:
            assert statistic(beta, h, covariance) == pytest.approx(chi2.ppf(0.9, 1), rel=1e-8)


def test_a_useless_instrument_leaves_the_line():
    sets = projection(strength=0.0).anderson_rubin(0.99999)
    assert np.isinf(sets[["lower", "upper"]].to_numpy()).all()


def test_sets_stand_beside_the_posterior_in_its_scale():
    lp = projection()
    result = hi.sample(lp.posterior(), draws=200, seed=1)
    plain = lp.anderson_rubin(0.9, "hc3")
    turned = lp.impulse_response(result, scale=-2.0).anderson_rubin
    assert_allclose(turned["lower"], -2 * plain["upper"])
    assert_allclose(turned["upper"], -2 * plain["lower"])
    assert lp.impulse_response(result).to_dataframe()["lower_ar"].notna().all()


def test_two_instruments_take_the_general_route():
    lp = projection(instruments=["z", "z2"])
    sets = lp.anderson_rubin(0.9, "hc0")
    assert (sets["upper"] > sets["lower"]).all()
    stages = lp.first_stage("hc0")
    assert (stages["effective_f"] > 10).all()


def test_no_instruments_no_sets():
    lp = projection(instruments=None)
    with pytest.raises(ValueError, match="there are no instruments"):
        lp.anderson_rubin()
    with pytest.raises(ValueError, match="there are no instruments"):
        lp.first_stage()
    result = hi.sample(lp.posterior(), draws=200, seed=1)
    assert lp.impulse_response(result).anderson_rubin is None
