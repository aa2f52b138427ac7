"""Local projections against regressions by hand, statsmodels, linearmodels and known responses."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from linearmodels.iv import IV2SLS
from numpy.testing import assert_allclose
from statsmodels.datasets import macrodata
from statsmodels.tsa.api import VAR

import hakari.inference as hi

GK = Path(__file__).parents[3] / "shared" / "data" / "gk.csv.gz"
H = 6
LAGS = 3
NAMES = ["gdp", "cpi", "bill"]


@cache
def macro():
    raw = macrodata.load_pandas().data
    logs = 100 * np.log(raw[["realgdp", "cpi", "m1"]]).set_axis(["gdp", "cpi", "m1"], axis=1)
    flags = {"bill": raw["tbilrate"], "unemp": raw["unemp"], "slack": (raw["unemp"] > 6) * 1.0}
    return raw[["year", "quarter"]].astype(int).join(logs).assign(**flags)


@cache
def simulated(n=400, seed=3):
    """x_t = A x_{t-1} + B e_t; the first shock is observed, with an instrument and a rival."""
    rng = np.random.default_rng(seed)
    A = np.array([[0.5, 0.1, 0.0], [0.2, 0.6, 0.1], [0.0, -0.1, 0.4]])
    B = np.array([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.3, 0.2, 1.0]])
    e, x = rng.standard_normal((n, 3)), np.zeros((n, 3))
    for t in range(1, n):
        x[t] = A @ x[t - 1] + B @ e[t] * (1 + 0.5 * abs(x[t - 1, 0]))
    noise = rng.standard_normal((n, 2))
    z = e[:, [0]] + noise
    return pd.DataFrame(
        np.column_stack([x, e[:, 0], z]), columns=["gdp", "gov", "rate", "shock", "z1", "z2"]
    )


# --- by hand --------------------------------------------------------------------------------


def term_columns(frame, terms):
    """Columns x lagged: (name, lag), lag below 0 a lead."""
    columns = {f"{name}.{lag}": frame[name].shift(lag) for name, lag in terms}
    return pd.DataFrame(columns, index=frame.index)


def lags_of(names, order, shock=("bill",), shock_order=None):
    out = [(n, lag) for n in names if n not in shock for lag in range(1, order + 1)]
    own = order if shock_order is None else shock_order
    return out + [(s, lag) for s in shock for lag in range(1, own + 1)]


def by_hand(
    frame,
    response,
    terms,
    shock=("bill",),
    trend="c",
    sample="common",
    cumulative=False,
    horizons=H,
):
    """(y, shocks, controls) of each horizon, on the rows that a user would keep."""
    controls = term_columns(frame, terms)
    for power in range({"n": 0, "c": 1, "ct": 2, "ctt": 3}[trend]):
        controls[f"t^{power}"] = np.arange(float(len(frame))) ** power / 100.0**power
    leads = {h: frame[response].shift(-h) for h in range(horizons + 1)}
    if cumulative:
        leads = {h: sum(leads[k] for k in range(h + 1)) for h in leads}
    whole = pd.concat([frame[list(shock)], controls, *leads.values()], axis=1).notna().all(axis=1)
    out = []
    for y in leads.values():
        if sample != "common":
            whole = pd.concat([frame[list(shock)], controls, y], axis=1).notna().all(axis=1)
        out.append((y[whole], frame.loc[whole, list(shock)], controls[whole]))
    return out


def ols(parts, **options):
    return [sm.OLS(y, pd.concat([s, c], axis=1)).fit(**options) for y, s, c in parts]


def paths(fits, field="params", shocks=1):
    """(S, H) of a field of the fits, for the shocks alone: they stand first."""
    return np.column_stack([np.asarray(getattr(fit, field))[:shocks] for fit in fits])


CASES = {
    "common": ({}, {}),
    "available": ({"sample": "available"}, {"sample": "available"}),
    "cumulative": ({"cumulative": True}, {"cumulative": True}),
    "trend": ({"trend": "ct"}, {"trend": "ct"}),
    "curved trend": ({"trend": "ctt", "sample": "available"},) * 2,
    "augmented": ({"augment": True}, {"terms": lags_of(NAMES, LAGS + 1)}),
    "lags of the shock": ({"shock_lags": 1}, {"terms": lags_of(NAMES, LAGS, shock_order=1)}),
    "terms": (
        {"controls": ["l(m1, 0:2)", "f(unemp, 1)"]},
        {"terms": [*lags_of(NAMES, LAGS), ("m1", 0), ("m1", 1), ("m1", 2), ("unemp", -1)]},
    ),
    "bare control": (
        {"controls": ["m1", "l(gdp, 2)"]},
        {"terms": lags_of([*NAMES, "m1"], LAGS)},
    ),
    "no constant": ({"trend": "n"}, {"trend": "n"}),
}


@pytest.mark.parametrize("case", CASES)
def test_estimates_and_white_errors_are_those_of_regressions_by_hand(case):
    ours, theirs = CASES[case]
    lp = hi.LocalProjection(
        macro(), ["gdp", "cpi"], "bill", lags=LAGS, horizons=H, time=["year", "quarter"], **ours
    )
    for j, response in enumerate(["gdp", "cpi"]):
        parts = by_hand(macro(), response, **{"terms": lags_of(NAMES, LAGS)} | theirs)
        fits = ols(parts)
        assert_allclose(lp.estimate[j], paths(fits), rtol=1e-8)
        assert list(lp.rows_used) == [int(fit.nobs) for fit in fits]
        for kind in ("HC0", "HC1", "HC3"):
            expected = [fit.get_robustcov_results(kind).bse[0] for fit in fits]
            assert_allclose(lp.standard_errors(kind.lower())[j, 0], expected, rtol=1e-8)


@pytest.mark.parametrize("sample", ["common", "available"])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_hac_errors_are_those_of_statsmodels(m, sample):
    lp = hi.LocalProjection(macro(), "gdp", "bill", lags=LAGS, horizons=H, sample=sample)
    options = {"maxlags": m, "use_correction": False}
    parts = by_hand(macro(), "gdp", lags_of(["gdp", "bill"], LAGS), sample=sample)
    fits = ols(parts, cov_type="HAC", cov_kwds=options)
    assert_allclose(lp.standard_errors(f"hac:{m}")[0], paths(fits, "bse"), rtol=1e-8)


def test_a_smooth_level_as_control_is_not_collinear():
    """Lags of log population differ by 1e-5 of themselves: near, and yet independent."""
    raw = macrodata.load_pandas().data
    frame = macro().assign(people=np.log(raw["pop"]), shifted=macro()["unemp"] * 1e-3 + 1000)
    lp = hi.LocalProjection(
        frame, "gdp", "bill", controls=["people", "shifted"], lags=LAGS, horizons=2
    )
    plain = frame.assign(people=np.log(raw["pop"]) - 12, shifted=macro()["unemp"])
    terms = lags_of(["gdp", "people", "shifted", "bill"], LAGS)
    fits = ols(by_hand(plain, "gdp", terms, horizons=2))
    assert_allclose(lp.estimate[0], paths(fits), rtol=1e-6)


def test_a_shock_s_level_and_unit_change_nothing():
    frame = macro().assign(moved=1000 + macro()["bill"] / 1000)
    moved = hi.LocalProjection(frame, "gdp", "moved", lags=LAGS, horizons=3)
    plain = hi.LocalProjection(frame, "gdp", "bill", lags=LAGS, horizons=3)
    assert_allclose(moved.estimate / 1000, plain.estimate, rtol=1e-6)


def test_a_row_of_no_influence_counts_as_a_row():
    """Without controls a shock that is often exactly 0 leaves rows without any influence."""
    frame = simulated().assign(news=np.where(np.arange(400) % 3 == 0, simulated()["shock"], 0.0))
    lp = hi.LocalProjection(frame, "gdp", "news", lags=0, trend="n", horizons=2)
    fits = ols(by_hand(frame, "gdp", [], ("news",), "n", horizons=2))
    expected = [fit.get_robustcov_results("HC1").bse[0] for fit in fits]
    assert_allclose(lp.standard_errors("hc1")[0, 0], expected, rtol=1e-10)


# --- instruments ----------------------------------------------------------------------------


@pytest.mark.parametrize("instruments", [["z1"], ["z1", "z2"]])
@pytest.mark.parametrize("covariance", ["hc0", "hc1", "hac:3"])
def test_lp_iv_is_two_stage_least_squares_of_linearmodels(instruments, covariance):
    frame = simulated()
    lp = hi.LocalProjection(frame, "gdp", "rate", instruments, controls=["gov"], lags=2, horizons=4)
    options = {
        "hc0": {"cov_type": "robust", "debiased": False},
        "hc1": {"cov_type": "robust", "debiased": True},
        "hac:3": {"cov_type": "kernel", "kernel": "bartlett", "bandwidth": 3, "debiased": False},
    }[covariance]
    terms = lags_of(["gdp", "gov", "rate"], 2, ("rate",))
    for h, (y, s, c) in enumerate(by_hand(frame, "gdp", terms, ("rate",), horizons=4)):
        fit = IV2SLS(y, c, s, frame.loc[y.index, instruments]).fit(**options)
        assert_allclose(lp.estimate[0, 0, h], fit.params["rate"], rtol=1e-8)
        errors = lp.standard_errors(covariance)[0, 0, h]
        assert_allclose(errors, fit.std_errors["rate"], rtol=1e-8)


def test_two_shocks_with_three_instruments():
    frame = simulated()
    lp = hi.LocalProjection(
        frame, ["gdp"], ["rate", "gov"], ["z1", "z2", "shock"], lags=1, horizons=3
    )
    terms = lags_of(["gdp"], 1, ("rate", "gov"))
    for h, (y, s, c) in enumerate(by_hand(frame, "gdp", terms, ("rate", "gov"), horizons=3)):
        fit = IV2SLS(y, c, s, frame.loc[y.index, ["z1", "z2", "shock"]]).fit(debiased=False)
        assert_allclose(lp.estimate[0, :, h], fit.params[["rate", "gov"]], rtol=1e-8)
        errors = lp.standard_errors("hc0")[0, :, h]
        assert_allclose(errors, fit.std_errors[["rate", "gov"]], rtol=1e-8)


def test_instruments_scale_does_not_matter():
    frame = simulated().assign(z1=1e9 * simulated()["z1"], z2=1e-9 * simulated()["z2"])
    options = {"lags": 2, "horizons": 3}
    scaled = hi.LocalProjection(frame, "gdp", "rate", ["z1", "z2"], **options)
    plain = hi.LocalProjection(simulated(), "gdp", "rate", ["z1", "z2"], **options)
    assert_allclose(scaled.estimate, plain.estimate, rtol=1e-10)


def test_an_instrument_with_missing_spells_uses_the_rows_where_it_is():
    frame = simulated().assign(
        z1=simulated()["z1"].where(lambda z: (z.index < 90) | (z.index > 99))
    )
    lp = hi.LocalProjection(frame, "gdp", "rate", "z1", lags=1, horizons=2)
    for h, (y, s, c) in enumerate(
        by_hand(frame, "gdp", lags_of(["gdp"], 1, ("rate",)), ("rate",), horizons=2)
    ):
        rows = frame.index.isin(y.index) & frame["z1"].notna()
        keep = frame.index[rows]
        fit = IV2SLS(y[keep], c.loc[keep], s.loc[keep], frame.loc[keep, "z1"]).fit()
        assert_allclose(lp.estimate[0, 0, h], fit.params["rate"], rtol=1e-8)
        assert lp.rows_used[h] == len(keep)


# --- other programs -------------------------------------------------------------------------


@pytest.mark.parametrize(("trend", "shocks"), [("c", [2]), ("ct", [2]), ("n", [2]), ("c", [2, 0])])
def test_agrees_with_statsmodels_local_projections(trend, shocks):
    rival = pytest.importorskip("statsmodels.tsa.vector_ar.local_proj")
    endog = macro()[NAMES]
    theirs = rival.LocalProjections(endog, shocks, LAGS, H, trend=trend, nw_lags=4).fit()
    lp = hi.LocalProjection(
        macro(), NAMES, [NAMES[s] for s in shocks], lags=LAGS, horizons=H, trend=trend
    )
    assert_allclose(lp.estimate, theirs.irfs.transpose(1, 2, 0), rtol=1e-7, atol=1e-10)
    assert_allclose(
        lp.standard_errors("hac:4"), theirs.stderr.transpose(1, 2, 0), rtol=1e-7, atol=1e-10
    )


@pytest.mark.skipif(not GK.exists(), reason="the Gertler and Karadi data are not here")
def test_gertler_and_karadi_with_statsmodels():
    frame = pd.read_csv(GK)
    system = ["logcpi", "logip", "gs1", "ebp"]
    lp = hi.LocalProjection(
        frame, ["logip", "logcpi"], "gs1", controls=["ebp"], lags=12, horizons=range(25),
        time=["year", "month"],
    )  # fmt: skip
    for j, response in enumerate(["logip", "logcpi"]):
        parts = by_hand(frame, response, lags_of(system, 12, ("gs1",)), ("gs1",), horizons=24)
        fits = ols(parts)
        assert_allclose(lp.estimate[j], paths(fits), rtol=1e-8, atol=1e-10)
        errors = [fit.get_robustcov_results("HC0").bse[0] for fit in fits]
        assert_allclose(lp.standard_errors("hc0")[j, 0], errors, rtol=1e-8)


@pytest.mark.skipif(not GK.exists(), reason="the Gertler and Karadi data are not here")
def test_gertler_and_karadi_with_their_instrument():
    frame = pd.read_csv(GK)
    lp = hi.LocalProjection(
        frame, "logip", "gs1", "ff4_tc", controls=["logcpi", "ebp"], lags=12, horizons=[0, 12, 24],
        time=["year", "month"],
    )  # fmt: skip
    terms = lags_of(["logip", "gs1", "logcpi", "ebp"], 12, ("gs1",))
    parts = by_hand(frame, "logip", terms, ("gs1",), horizons=24)
    for place, h in enumerate([0, 12, 24]):
        y, s, c = parts[h]
        keep = y.index[frame.loc[y.index, "ff4_tc"].notna()]
        # in deviations, and the control's scale taken out: 49 lags of levels near 450
        c = (c - c.loc[keep].mean()).assign(one=1.0).drop(columns="t^0")
        fit = IV2SLS(y[keep], c.loc[keep], s.loc[keep], frame.loc[keep, "ff4_tc"]).fit()
        assert_allclose(lp.estimate[0, 0, place], fit.params["gs1"], rtol=1e-7)
        errors = lp.standard_errors("hc0")[0, 0, place]
        assert_allclose(errors, fit.std_errors["gs1"], rtol=1e-7)
    assert any("1990-01 to 2010-06" in note for note in lp.notes), lp.notes


# --- one system -----------------------------------------------------------------------------


def joint(lp, covariance):
    rows = lp.score_rows(covariance)
    return rows.T @ rows


@pytest.mark.parametrize("instruments", [None, ["z1"]])
def test_concentrated_block_is_that_of_the_whole_system(instruments):
    """Frisch, Waugh and Lovell: R⁻¹ Ω R⁻ᵀ / n of all coefficients, its block of responses."""
    lp = hi.LocalProjection(simulated(), "gdp", "rate", instruments, lags=2, horizons=4)
    moments = lp.moments(concentrated=False)
    K = moments.K
    origin = moments.mean(np.zeros(K))
    R = np.column_stack([origin - moments.mean(row) for row in np.eye(K)])
    theta = np.linalg.solve(R, origin)
    own = [k for k, name in enumerate(moments.names.parameters) if ".rate." in name]
    assert_allclose(theta[own], lp.estimate[0, 0], rtol=1e-10)
    half = np.linalg.solve(R, moments.covariance_at(theta))
    V = np.linalg.solve(R, half.T).T / moments.n
    assert_allclose(V[np.ix_(own, own)], joint(lp, "hc0"), rtol=1e-9)


def test_sampled_whole_system_has_the_concentrated_marginal():
    lp = hi.LocalProjection(simulated(), "gdp", "shock", lags=1, shock_lags=0, horizons=2)
    posterior = hi.QuasiPosterior(lp.moments(concentrated=False), weighting="two-step")
    result = hi.sample(posterior, draws=4000, chains=2, seed=4)
    theta = result["posterior"].dataset["theta"]
    names = [str(n) for n in theta.coords[theta.dims[-1]].values]
    own = [k for k, name in enumerate(names) if ".shock." in name]
    draws = theta.values.reshape(-1, len(names))[:, own]
    V, n = joint(lp, "hc0"), len(draws)
    sd = np.sqrt(np.diag(V))
    assert (np.abs(draws.mean(axis=0) - lp.estimate[0, 0]) < 5 * sd / np.sqrt(n / 3)).all()
    z = (draws - lp.estimate[0, 0]) @ np.linalg.inv(np.linalg.cholesky(V)).T
    assert np.abs(z.T @ z / n - np.eye(len(sd))).max() < 5 * np.sqrt(2 * 3 / n)


@pytest.mark.parametrize("n", [150, 1500])
def test_a_flat_prior_s_spread_is_the_standard_error(n):
    lp = hi.LocalProjection(simulated(n), ["gdp", "gov"], "shock", lags=2, shock_lags=0, horizons=8)
    result = hi.sample(lp.posterior(), draws=2000, chains=2, seed=2)
    irf = lp.impulse_response(result)
    ratio = irf.draws.std(axis=0)[1:] / lp.standard_errors("hc3")[1:]
    assert np.abs(ratio - 1).max() < 5 / np.sqrt(2 * 4000)
    gap = (irf.draws.mean(axis=0) - lp.estimate) / lp.standard_errors("hc3")
    assert np.abs(gap).max() < 5 / np.sqrt(4000)
    raw = lp.standard_errors("hc3")[1] / lp.standard_errors("hc0")[1]
    assert np.abs(raw - 1).max() < 20 / n  # the correction for leverage goes as k/n


# --- designs --------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["slack", "l(slack, 1)"])
def test_states_are_two_regressions(state):
    """All coefficients differ by regime, so each regime is a regression of its own."""
    frame = macro().assign(now=macro()["slack"].shift(1 if "l(" in state else 0))
    lp = hi.LocalProjection(frame, "gdp", "bill", lags=2, horizons=4, state=state)
    assert lp.shocks == (f"bill | {state}", f"bill | not {state}")
    for h, (y, s, c) in enumerate(by_hand(frame, "gdp", lags_of(["gdp", "bill"], 2), horizons=4)):
        for place, regime in enumerate((1.0, 0.0)):
            keep = y.index[frame.loc[y.index, "now"] == regime]
            fit = sm.OLS(y[keep], pd.concat([s, c], axis=1).loc[keep]).fit()
            assert_allclose(lp.estimate[0, place, h], fit.params["bill"], rtol=1e-8)
            for kind in ("HC0", "HC3"):
                errors = lp.standard_errors(kind.lower())[0, place, h]
                assert_allclose(errors, fit.get_robustcov_results(kind).bse[0], rtol=1e-8)


def test_states_with_instruments_are_two_regressions():
    frame = simulated().assign(calm=(simulated()["gov"].shift(1) > 0) * 1.0)
    lp = hi.LocalProjection(frame, "gdp", "rate", ["z1", "z2"], lags=1, horizons=2, state="calm")
    terms = lags_of(["gdp"], 1, ("rate",))
    for h, (y, s, c) in enumerate(by_hand(frame, "gdp", terms, ("rate",), horizons=2)):
        for place, regime in enumerate((1.0, 0.0)):
            keep = y.index[frame.loc[y.index, "calm"] == regime]
            z = frame.loc[keep, ["z1", "z2"]]
            fit = IV2SLS(y[keep], c.loc[keep], s.loc[keep], z).fit(debiased=False)
            assert_allclose(lp.estimate[0, place, h], fit.params["rate"], rtol=1e-8)
            errors = lp.standard_errors("hc0")[0, place, h]
            assert_allclose(errors, fit.std_errors["rate"], rtol=1e-8)


def test_several_shocks_are_regressors_of_one_regression():
    lp = hi.LocalProjection(
        simulated(), ["gdp", "gov"], ["shock", "z1"], lags=2, horizons=3, shock_lags=1
    )
    assert lp.names[3:5] == ("gdp.shock.h3", "gdp.z1.h0")
    terms = lags_of(["gdp", "gov"], 2, ("shock", "z1"), 1)
    for j, response in enumerate(["gdp", "gov"]):
        fits = ols(by_hand(simulated(), response, terms, ("shock", "z1"), horizons=3))
        assert_allclose(lp.estimate[j], paths(fits, shocks=2), rtol=1e-8)
        errors = np.column_stack([f.get_robustcov_results("HC3").bse[:2] for f in fits])
        assert_allclose(lp.standard_errors("hc3")[j], errors, rtol=1e-8)


def test_horizons_may_be_any_ascending_numbers():
    whole = hi.LocalProjection(macro(), "gdp", "bill", lags=2, horizons=8, cumulative=True)
    part = hi.LocalProjection(macro(), "gdp", "bill", lags=2, horizons=[2, 5, 8], cumulative=True)
    assert_allclose(part.estimate, whole.estimate[:, :, [2, 5, 8]], rtol=1e-10)
    assert_allclose(part.standard_errors(), whole.standard_errors()[:, :, [2, 5, 8]], rtol=1e-10)


def test_multiplier_is_one_step_lp_iv_of_cumulated_variables():
    """Ramey and Zubairy (2018): Σy on Σg with the shock as instrument, on a common sample."""
    frame = simulated()
    options = {"lags": 2, "shock_lags": 0, "horizons": 5}
    lp = hi.LocalProjection(frame, ["gdp", "gov"], "shock", **options)
    irf = lp.impulse_response(hi.sample(lp.posterior(), draws=200, chains=1, seed=1))
    found = irf.multiplier("gdp", "gov").estimate[0, 0]
    terms = lags_of(["gdp", "gov"], 2, ("shock",), 0)
    outcomes = by_hand(frame, "gdp", terms, ("shock",), cumulative=True, horizons=5)
    spending = by_hand(frame, "gov", terms, ("shock",), cumulative=True, horizons=5)
    for h, ((y, s, c), (g, _, _)) in enumerate(zip(outcomes, spending, strict=True)):
        fit = IV2SLS(y, c, g.rename("g"), s).fit()
        assert_allclose(found[h], fit.params["g"], rtol=1e-8)


def test_projection_of_order_p_has_the_var_s_responses_up_to_p():
    """Plagborg-Møller and Wolf (2021): no VAR is right here, so that beyond p they part."""
    n, p, rng = 20_000, 3, np.random.default_rng(8)
    e, x = rng.standard_normal((n, 2)), np.zeros((n, 2))
    for t in range(2, n):
        x[t] = [[0.7, 0.2], [-0.1, 0.5]] @ x[t - 1] + e[t] + 0.9 * e[t - 1, ::-1]
    x[5:] += 0.8 * e[:-5, [0]]  # an echo after five periods
    frame = pd.DataFrame(np.column_stack([e[:, 0], x]), columns=["shock", "a", "b"])
    lp = hi.LocalProjection(frame, ["a", "b"], "shock", lags=p, horizons=8)
    var = VAR(frame).fit(p)
    sigma = np.asarray(var.sigma_u)
    impulse = (var.ma_rep(8) @ (sigma[:, 0] / sigma[0, 0]))[:, 1:].T
    gap = np.abs(lp.estimate[:, 0] - impulse) / lp.standard_errors()[:, 0]
    assert gap[:, : p + 1].max() < 3, gap
    assert gap[:, 5].min() > 30, gap
