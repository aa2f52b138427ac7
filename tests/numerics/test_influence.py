"""Joint covariances of all horizons against sums over all pairs of dates, and linearmodels."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from linearmodels.panel import PanelOLS
from numpy.testing import assert_allclose

import hakari.inference as hi
from hakari.inference import influence

H = 4
RESPONSES = ["a", "b"]


@cache
def table(n=60, seed=5, grain="row"):
    """Two variables moved by an observed shock, whose size moves with the first."""
    rng = np.random.default_rng(seed)
    e, x = rng.standard_normal((n, 2)), np.zeros((n, 2))
    for t in range(1, n):
        x[t] = [[0.6, 0.2], [0.1, 0.5]] @ x[t - 1] + [[1, 0], [0.7, 1]] @ e[t]
        x[t] *= 1 + 0.3 * (x[t - 1, 0] > 0)
    return pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "e": e[:, 0], grain: np.arange(n)})


@cache
def panel(units=7, n=30):
    """Units that start one after the other, with levels and shocks of dates in common."""
    common = np.random.default_rng(9).standard_normal(n)
    parts = []
    for g in range(units):
        one = table(n, seed=g, grain="year")
        one = one.assign(unit=f"u{g}", a=one["a"] + g + common, e=one["e"] + 0.5 * common)
        parts.append(one.iloc[g // 2 :])
    return pd.concat(parts, ignore_index=True)


def regressions(frame, sample, unit=None):
    """(rows, y, X) by response and horizon, the shock first; lags and leads within a unit."""

    def shift(name, by):
        return frame[name].shift(by) if unit is None else frame.groupby(unit)[name].shift(by)

    X = pd.DataFrame({"e": frame["e"], "one": 1.0})
    for name in RESPONSES:
        X[f"{name}.1"] = shift(name, 1)
    leads = {(name, h): shift(name, -h) for name in RESPONSES for h in range(H + 1)}
    common = pd.concat([X, *leads.values()], axis=1).notna().all(axis=1)
    out = []
    for y in leads.values():
        rows = common if sample == "common" else pd.concat([X, y], axis=1).notna().all(axis=1)
        out.append((np.flatnonzero(rows), y[rows].to_numpy(), X[rows]))
    return out


def influences(frame, sample, leverage=False, dummies=()):
    """ψ (N, Q) by the formula of least squares: (X'X)⁻¹ x_t u_t, over 1 − leverage for HC3."""
    psi = np.zeros((len(frame), len(RESPONSES) * (H + 1)))
    unit = "unit" if "unit" in frame else None
    for q, (rows, y, X) in enumerate(regressions(frame, sample, unit)):
        for name in dummies:
            own = pd.get_dummies(frame.loc[X.index, name], dtype=float)
            X = X.join(own.iloc[:, 1:].add_prefix(name))
        bread = np.linalg.inv(X.T.to_numpy() @ X.to_numpy())
        fit = sm.OLS(y, X).fit()
        weight = fit.resid / (1 - fit.get_influence().hat_matrix_diag if leverage else 1)
        psi[rows, q] = (X.to_numpy() @ bread[0]) * weight
    return psi


def pairs(psi, date, m):
    """Σ_t Σ_s k(t − s) ψ_t ψ_s' by two loops over rows, k Bartlett's weight of m lags."""
    V = np.zeros((psi.shape[1],) * 2)
    for t, s in product(range(len(psi)), repeat=2):
        gap = abs(int(date[t]) - int(date[s]))
        if gap <= m:
            V += (1 - gap / (m + 1)) * np.outer(psi[t], psi[s])
    return V


def projection(frame, sample="common", **options):
    options = {"lags": 1, "shock_lags": 0, "horizons": H, "sample": sample} | options
    return hi.LocalProjection(frame, RESPONSES, "e", **options)


def on_panel(frame=None, sample="common", **options):
    frame = panel() if frame is None else frame
    return projection(frame, sample, unit="unit", time="year", **options)


def joint(lp, covariance):
    rows = lp.score_rows(covariance)
    return rows.T @ rows


# --- one series -----------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["common", "available"])
@pytest.mark.parametrize("covariance", ["hc0", "hc3", "hac:0", "hac:1", "hac:4"])
def test_all_pairs_of_dates_horizons_and_responses(covariance, sample):
    kind, _, m = covariance.partition(":")
    psi = influences(table(), sample, leverage=kind == "hc3")
    expected = pairs(psi, np.arange(60), int(m or 0))
    found = joint(projection(table(), sample), covariance)
    assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
    assert_allclose(projection(table(), sample).score_rows("robust"), influences(table(), sample),
                    atol=1e-12)  # fmt: skip


def test_hc1_joins_horizons_by_the_roots_of_their_corrections():
    lp = projection(table(), "available")
    factor = np.tile([n / (n - 4) for n in lp.rows_used], 2)
    expected = joint(lp, "hc0") * np.sqrt(np.outer(factor, factor))
    assert_allclose(joint(lp, "hc1"), expected, rtol=1e-10)


def test_automatic_lags_are_three_quarters_of_the_cube_root():
    lp = projection(table())
    assert lp.rows_used[0] == 60 - 1 - H
    assert_allclose(joint(lp, "hac"), joint(lp, "hac:3"), rtol=1e-12)  # 0.75 · 55^(1/3) = 2.85


def short_window(rows, m):
    """A mutant: m rows in the window instead of m + 1."""
    return influence_sums(rows, max(m - 1, 0)) * np.sqrt(max(m, 1) / (m + 1))


def wide_window(rows, m):
    """A mutant: the right window divided by the root of m."""
    return influence_sums(rows, m) * np.sqrt((m + 1) / max(m, 1))


def cut_window(rows, m):
    """A mutant: the last windows, which reach beyond the table, left out."""
    return influence_sums(rows, m)[: len(rows)]


influence_sums = influence.moving_sums


@pytest.mark.parametrize("mutant", [short_window, wide_window, cut_window])
def test_a_wrong_window_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(influence, "moving_sums", mutant)
    expected = pairs(influences(table(), "available"), np.arange(60), 4)
    found = joint(projection(table(), "available"), "hac:4")
    assert not np.allclose(found, expected, rtol=1e-3, atol=1e-12)


def test_windows_longer_than_the_rows():
    rows = np.random.default_rng(0).standard_normal((5, 2))
    found = influence.moving_sums(rows, 9)
    assert_allclose(found.T @ found, pairs(rows, np.arange(5), 9), rtol=1e-12)


def test_missing_dates_of_an_instrument_keep_their_place_in_time():
    """The rows around a hole are as far apart as their dates, not neighbours."""
    hole = (table().index < 25) | (table().index > 30)
    frame = table().assign(z=(table()["e"] + table()["b"].shift(2) ** 2).where(hole))
    lp = projection(frame, instruments="z")
    psi = lp.influence
    assert (psi[25:31] == 0).all()
    assert (psi[24] != 0).any()
    assert_allclose(joint(lp, "hac:3"), pairs(psi, np.arange(60), 3), rtol=1e-10)


# --- panels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("effects", ["unit", "unit+time", "none"])
@pytest.mark.parametrize("sample", ["common", "available"])
def test_panels_are_regressions_with_dummies(effects, sample):
    dummies = {"unit": ["unit"], "unit+time": ["unit", "year"], "none": []}[effects]
    lp = on_panel(sample=sample, effects=effects)
    for leverage, kind in ((False, "hc0"), (True, "hc3")):
        psi = influences(panel(), sample, leverage, dummies=dummies)
        assert_allclose(lp.score_rows(kind), psi, rtol=1e-6, atol=1e-10)
    estimates, factors = [], []
    for _, y, X in regressions(panel(), sample, "unit"):
        for name in dummies:
            own = pd.get_dummies(panel().loc[X.index, name], dtype=float)
            X = X.join(own.iloc[:, 1:].add_prefix(name))
        fit = sm.OLS(y, X).fit()
        estimates.append(fit.params["e"])
        factors.append(fit.nobs / fit.df_resid)
    assert_allclose(lp.estimate.ravel(), estimates, rtol=1e-8)
    errors = lp.standard_errors("hc0").ravel() * np.sqrt(factors)
    assert_allclose(lp.standard_errors("hc1").ravel(), errors, rtol=1e-8)


@pytest.mark.parametrize("effects", ["unit", "unit+time"])
@pytest.mark.parametrize("covariance", ["cluster", "driscoll-kraay:2", "driscoll-kraay:0"])
def test_panel_errors_are_those_of_linearmodels(effects, covariance):
    lp = on_panel(sample="available", effects=effects)
    options = {"cov_type": "clustered", "cluster_entity": True}
    if covariance != "cluster":
        m = int(covariance[-1])
        options = {"cov_type": "kernel", "kernel": "bartlett", "bandwidth": m}
    factor = np.sqrt(7 / 6) if covariance == "cluster" else 1.0
    for q, (_, y, X) in enumerate(regressions(panel(), "available", "unit")):
        own = X.drop(columns="one").assign(y=y, **panel().loc[X.index, ["unit", "year"]])
        own = own.set_index(["unit", "year"])
        fit = PanelOLS(
            own["y"], own.drop(columns="y"), entity_effects=True, time_effects="time" in effects
        ).fit(debiased=False, auto_df=False, count_effects=False, **options)
        assert_allclose(lp.estimate.ravel()[q], fit.params["e"], rtol=1e-8)
        errors = lp.standard_errors(covariance).ravel()[q]
        assert_allclose(errors, fit.std_errors["e"] * factor, rtol=1e-8)


@pytest.mark.parametrize("sample", ["common", "available"])
def test_clusters_and_dates_by_direct_sums(sample):
    psi = influences(panel(), sample, dummies=["unit"])
    lp = on_panel(sample=sample)
    V = np.zeros((psi.shape[1],) * 2)
    unit, year = panel()["unit"].to_numpy(), panel()["year"].to_numpy()
    for t, s in product(range(len(psi)), repeat=2):
        if unit[t] == unit[s]:
            V += np.outer(psi[t], psi[s])
    assert_allclose(joint(lp, "cluster"), V * 7 / 6, rtol=1e-7, atol=1e-12)
    for m in (0, 3):
        expected = pairs(psi, year, m)
        assert_allclose(joint(lp, f"driscoll-kraay:{m}"), expected, rtol=1e-7, atol=1e-12)


def test_a_unit_without_usable_rows_is_no_cluster():
    gone = panel().assign(a=panel()["a"].where(panel()["unit"] != "u3"))
    left = panel()[panel()["unit"] != "u3"]
    with_it, without = on_panel(gone), on_panel(left)
    assert with_it.coefficients == without.coefficients
    for covariance in ("cluster", "hc1", "driscoll-kraay:2"):
        assert_allclose(joint(with_it, covariance), joint(without, covariance), rtol=1e-10)


def test_lags_and_leads_do_not_cross_units():
    """What stands in another unit's rows changes nothing without effects that are shared."""
    other = panel().copy()
    edge = other["unit"] != "u0"
    other.loc[edge, ["a", "b"]] += 1000.0
    a, b = on_panel(effects="unit"), on_panel(other, effects="unit")
    assert_allclose(a.estimate, b.estimate, rtol=1e-7)
    assert a.rows_used[0] == sum(30 - g // 2 - 1 - H for g in range(7))


def test_states_of_a_panel_have_levels_of_their_own():
    """The state's own level is a control: effects of units do not hold it."""
    frame = panel().assign(calm=(panel()["b"] > 0) * 1.0)
    lp = on_panel(frame, state="calm")
    for q, (_, y, X) in enumerate(regressions(frame, "common", "unit")):
        w = frame.loc[X.index, "calm"].to_numpy()[:, None]
        D = pd.get_dummies(frame.loc[X.index, "unit"], dtype=float).to_numpy()
        x = X.drop(columns="one").to_numpy()
        fit = sm.OLS(y, np.column_stack([x * w, x * (1 - w), w, D])).fit()
        j, h = divmod(q, H + 1)
        assert_allclose(lp.estimate[j, :, h], fit.params[[0, x.shape[1]]], rtol=1e-8)
        expected = fit.get_robustcov_results("HC3").bse[[0, x.shape[1]]]
        assert_allclose(lp.standard_errors("hc3")[j, :, h], expected, rtol=1e-8)


def test_a_state_of_dates_is_held_by_their_effects():
    """With effects of dates a state that all units share has no level left to estimate."""
    frame = panel().assign(calm=(panel()["year"] % 3 == 0) * 1.0)
    lp = on_panel(frame, state="calm", effects="unit+time")
    assert "calm" not in lp.design.control_names
    for q, (_, y, X) in enumerate(regressions(frame, "common", "unit")):
        w = frame.loc[X.index, "calm"].to_numpy()[:, None]
        D = [pd.get_dummies(frame.loc[X.index, n], dtype=float) for n in ("unit", "year")]
        x = X.drop(columns="one").to_numpy()
        fit = sm.OLS(y, np.column_stack([x * w, x * (1 - w), D[0], D[1].iloc[:, 1:]])).fit()
        j, h = divmod(q, H + 1)
        assert_allclose(lp.estimate[j, :, h], fit.params[[0, x.shape[1]]], rtol=1e-8)


def test_more_dates_at_early_horizons_are_counted_by_horizon():
    lp = on_panel(sample="available", effects="unit+time")
    dates = [len(np.unique(panel()["year"].iloc[rows])) for rows in
             (regressions(panel(), "available", "unit")[h][0] for h in range(H + 1))]  # fmt: skip
    assert list(lp.coefficients_by_horizon) == [3 + 7 + d - 1 for d in dates]
    assert lp.coefficients == max(lp.coefficients_by_horizon)
    assert len(set(lp.coefficients_by_horizon)) > 1
