"""What a local projection says of itself, and what it refuses, by name."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

import hakari.inference as hi


@cache
def table(n=120):
    rng = np.random.default_rng(1)
    e, x = rng.standard_normal((n, 2)), np.zeros((n, 2))
    for t in range(1, n):
        x[t] = [[0.5, 0.1], [0.2, 0.6]] @ x[t - 1] + [[1, 0], [0.5, 1]] @ e[t]
    news, z = e[:, 0] + 0.3 * rng.standard_normal(n), e[:, 0] + rng.standard_normal(n)
    months = pd.period_range("1990-01", periods=n, freq="M").astype(str)
    return pd.DataFrame(
        {"month": months, "gdp": x[:, 0], "cpi": x[:, 1], "news": news, "z": z}
        | {"exact": e[:, 0], "calm": (rng.random(n) > 0.5) * 1.0}
    )


@cache
def panel(units=6, n=30):
    parts = [table().iloc[4 * g : 4 * g + n].assign(unit=f"u{g}", year=range(n)) for g in
             range(units)]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def project(frame=None, response="gdp", shock="news", **options):
    frame = table() if frame is None else frame
    options = {"lags": 2, "horizons": 4, "time": "month"} | options
    return hi.LocalProjection(frame, response, shock, **options)


def on_panel(frame=None, **options):
    frame = panel() if frame is None else frame
    return project(frame, **{"time": "year", "unit": "unit"} | options)


def refused(message, frame=None, kind=ValueError, **options):
    with pytest.raises(kind, match=message):
        project(frame, **options)


# --- what it says ---------------------------------------------------------------------------


def test_shapes_names_and_rows():
    lp = project(response=["gdp", "cpi"], shock=["news", "z"], horizons=[0, 3], shock_lags=0)
    assert lp.shape == (2, 2, 2)
    assert lp.estimate.shape == lp.standard_errors().shape == (2, 2, 2)
    assert lp.names[:3] == ("gdp.news.h0", "gdp.news.h3", "gdp.z.h0")
    assert project().names == tuple(f"gdp.h{h}" for h in range(5))
    assert lp.shocks == ("news", "z")
    assert lp.rows_used == (115, 115)
    assert lp.coefficients == 2 + 1 + 4
    assert project(sample="available").rows_used == (118, 117, 116, 115, 114)
    assert project(augment=True).coefficients == project().coefficients + 2


def test_units_are_of_response_over_shock():
    lp = project(lags=0, shock_lags=0, trend="c", horizons=0)
    frame = table()
    assert_allclose(lp.units[0, 0], frame["gdp"].std() / frame["news"].std(), rtol=1e-10)


def test_a_response_to_itself_is_one_at_once():
    lp = project(response=["gdp", "cpi"], shock="gdp")
    assert lp.estimate[0, 0, 0] == pytest.approx(1, abs=1e-12)
    for covariance in ("hc0", "hc1", "hc3", "hac:2"):
        assert lp.standard_errors(covariance)[0, 0, 0] < 1e-12


def test_other_tables_give_the_same_numbers():
    plain = project().estimate
    reordered = table()[["z", "exact", "calm", "cpi", "news", "month", "gdp"]]
    assert_allclose(project(reordered).estimate, plain, rtol=1e-12)
    as_dict = {name: list(table()[name]) for name in table()}
    assert_allclose(project(as_dict).estimate, plain, rtol=1e-12)
    indexed = table().set_index(pd.PeriodIndex(table()["month"], freq="M")).drop(columns="month")
    assert_allclose(project(indexed, time=None).estimate, plain, rtol=1e-12)


def test_names_may_come_in_any_collection():
    plain = project(instruments=["z"], controls=["cpi"]).estimate
    for kind in (tuple, pd.Index, np.array):
        same = project(instruments=kind(["z"]), controls=kind(["cpi"]), horizons=np.arange(5))
        assert_allclose(same.estimate, plain, rtol=1e-12)
    assert_allclose(project(controls=None).estimate, project().estimate, rtol=1e-12)


def test_the_same_question_of_another_table():
    lp = project(controls=["cpi", "l(z, 1:2)"], trend="ct", cumulative=True, augment=True)
    again = lp.on(lp.series)
    assert again.question == lp.question
    assert_allclose(again.estimate, lp.estimate, rtol=1e-12)


def test_a_formula_says_the_same():
    direct = project(controls=["l(gdp, 1:2)", "l(cpi, 0)"], lags=0)
    written = hi.LocalProjection.from_formula(
        "gdp ~ news + l(gdp, 1:2) + cpi", table(), "news", horizons=4, time="month"
    )
    assert_allclose(written.estimate, direct.estimate, rtol=1e-12)
    iv = hi.LocalProjection.from_formula(
        "gdp + cpi ~ 0 + l(gdp, 1:2) + [news ~ z]", table(), horizons=4, time="month"
    )
    same = project(
        response=["gdp", "cpi"], instruments="z", controls=["l(gdp, 1:2)"], lags=0, trend="n"
    )
    assert_allclose(iv.estimate, same.estimate, rtol=1e-12)


def test_missing_spells_of_instruments_are_told_with_dates():
    frame = table().assign(z=table()["z"].where((table().index < 20) | (table().index > 30)))
    lp = project(frame, instruments="z")
    assert lp.notes == (
        "instruments are missing in z (11 rows): the sample is where they overlap, "
        "1990-03 to 1999-08, 103 rows",
    )
    assert project(instruments="z").notes == ()


def test_columns_that_start_late_are_told():
    frame = table().assign(cpi=table()["cpi"].where(table().index >= 10))
    assert any("cpi starts at 1990-11" in note for note in project(frame, controls=["cpi"]).notes)


# --- what it refuses ------------------------------------------------------------------------

LONG = list(range(120))
BAD_TABLES = {
    "a date is missing": (lambda t: t.drop(index=50), "1994-03 is missing after 1994-02"),
    "a date is twice": (lambda t: t.iloc[[*LONG[:60], 59, *LONG[60:]]], "1994-12 is there more"),
    "disorder": (lambda t: t.iloc[[*LONG[:50], 51, 50, *LONG[52:]]], "sort the rows first"),
    "no rows": (lambda t: t.iloc[:0], "the data have no rows"),
    "a hole in a column": (
        lambda t: t.assign(gdp=t["gdp"].where(t.index != 60)),
        "gdp is missing at 1995-01, one of 1 missing values between",
    ),
    "an empty column": (lambda t: t.assign(gdp=np.nan), "gdp has no values in 120 rows"),
    "infinity": (lambda t: t.assign(gdp=t["gdp"].where(t.index != 60, np.inf)), "gdp is inf in r"),
    "text": (lambda t: t.assign(gdp="high"), "gdp holds .* not numbers"),
    "too short": (lambda t: t.iloc[:8], r"needed; no horizon fits: use fewer lags"),
    "a constant shock": (lambda t: t.assign(news=2.0), r"shock 'news' is 2 in all 114 rows"),
    "a shock of zeros": (lambda t: t.assign(news=0.0), r"shock 'news' is 0 in all 114 rows"),
    "a constant response": (lambda t: t.assign(gdp=2.0), r"collinear controls: .*l\(gdp, 1\)"),
    "a response of zeros": (lambda t: t.assign(gdp=0.0), r"l\(gdp, 1\) is zero in every row"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables_are_refused(case):
    spoil, message = BAD_TABLES[case]
    refused(message, spoil(table()))


def test_too_few_rows_name_the_largest_horizon_that_fits():
    message = r"6 rows are left for 6 coefficients at horizon 112 .* horizon that fits is 110 "
    refused(message + r"\(horizons=range\(111\)\)", horizons=112)
    assert project(horizons=range(111)).rows_used[0] == 8
    refused(r"7 rows .* at horizon 111 .* fits is 110 \(", horizons=111, sample="available")
    refused(r"0 rows are left for .* no horizon fits", lags=500)
    refused(r"0 rows are left for .* horizon that fits is 110", horizons=5000)


CHOICES = {
    "horizons": (-1, 2.5, None, "4", [3, 1], [0, 0], [0, 1.5], [-1, 0], []),
    "lags": (-1, 2.0, None, [1, 2], "2"),
    "shock_lags": (-1, 1.5, "2"),
    "trend": ("q", None, ["c"], ""),
    "sample": ("all", None),
    "effects": ("twoway", None),
}


@pytest.mark.parametrize(("option", "value"), [(k, v) for k, all_ in CHOICES.items() for v in all_])
def test_options_are_refused_with_their_value(option, value):
    refused(re.escape(f"{option} {value!r}: "), **{option: value})


WRONG = {
    "no response": ({"response": []}, "no response: name at least one column"),
    "no shock": ({"shock": []}, "no shock: name at least one column"),
    "a response twice": ({"response": ["gdp", "gdp"]}, "response 'gdp' is given twice"),
    "a shock twice": ({"shock": ["news", "news"]}, "shock 'news' is given twice"),
    "unknown response": ({"response": "gpd"}, r"no column 'gpd' in the data; did you mean 'gdp'"),
    "unknown shock": ({"shock": "new"}, r"no column 'new' in the data; did you mean 'news'"),
    "unknown control": ({"controls": ["l(q, 1)"]}, r"no column 'q' in the data"),
    "unknown instrument": ({"instruments": "zz"}, r"no column 'zz' in the data"),
    "unknown dates": ({"time": "week"}, r"no column 'week' in the data"),
    "unknown unit": ({"unit": "firm"}, r"no column 'firm' in the data"),
    "not a term": ({"controls": ["l(cpi, 3:1)"]}, r"term 'l\(cpi, 3:1\)' is not understood"),
    "few instruments": (
        {"shock": ["news", "cpi"], "instruments": "z"},
        "1 instruments for 2 shocks: add 1, or drop a shock",
    ),
    "shock as instrument": ({"instruments": "news"}, "'news' is both shock and instrument"),
    "the shock as control": (
        {"controls": ["l(news, 0)"]},
        r"shock 'news' is an exact function of the controls",
    ),
    "the instrument as control": (
        {"instruments": "z", "controls": ["l(z, 0)"]},
        r"instrument 'z' is an exact function of the controls",
    ),
    "lags spanned": (
        {"response": ["gdp", "cpi"], "shock": "exact"},
        r"collinear controls: .*l\(exact, 1\).*shock_lags=0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_questions_are_refused(case):
    options, message = WRONG[case]
    refused(message, **options)


NOT_TEXT = {"response": 5, "shock": None, "instruments": [1], "controls": 3.0, "state": 1}


@pytest.mark.parametrize("option", NOT_TEXT)
def test_names_are_text(option):
    value = NOT_TEXT[option]
    shown = value[0] if isinstance(value, list) else value
    refused(re.escape(f"{option} {shown!r} is not text"), kind=TypeError, **{option: value})


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_a_shock_that_controls_repeat_is_refused_at_any_level(mean):
    frame = table().assign(news=table()["news"] + mean, twice=2 * table()["news"] - mean)
    refused("shock 'news' is an exact function", frame, controls=["l(twice, 0)"])


def test_instruments_that_repeat_each_other_are_refused():
    frame = table().assign(z2=3 * table()["z"] + 1)
    message = "collinear instruments, given the controls: z, z2"
    refused(message, frame, instruments=["z", "z2"])


def test_instruments_that_never_meet_are_refused():
    early = table().assign(z=table()["z"].where(table().index < 60))
    both = early.assign(z2=table()["z"].where(table().index > 60))
    refused("all of z, z2 are there in 0 rows only", both, instruments=["z", "z2"])
    refused("all of z are there in 0 rows only", table().assign(z=np.nan), instruments="z")


def test_states_are_refused():
    refused("state 'gdp' lies between .* zeros and ones", state="gdp")
    refused("state 'calm' is 1 in every row", table().assign(calm=1.0), state="calm")
    refused("state 'calm' is 0 in every row", table().assign(calm=0.0), state="calm")
    refused(r"state 'l\(calm, 1:2\)' is 2 columns: name one", state="l(calm, 1:2)")
    hole = table().assign(calm=table()["calm"].where(table().index != 60))
    refused("calm is missing at 1995-01", hole, state="calm")
    early = table().assign(calm=(table().index < 1) * 1.0)
    refused(r"shock 'news \| calm' is 0 in all 114 rows", early, state="calm")


GRAMMAR = ("hc2", "", "hac:-1", "hac:x", "hac:2.5", "hac:²", "hc3:1", "cluster:2", "newey-west")


@pytest.mark.parametrize("text", GRAMMAR)
def test_covariances_are_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match=re.escape(f"unknown covariance {text!r}: write hc3, hc1")):
        project().standard_errors(text)


@pytest.mark.parametrize("value", [None, 3])
def test_covariances_are_text(value):
    with pytest.raises(TypeError, match=f"covariance {value} is not text: write hc3"):
        project().standard_errors(value)


@pytest.mark.parametrize("text", ["cluster", "driscoll-kraay", "dk:3"])
def test_covariances_of_panels_need_one(text):
    with pytest.raises(ValueError, match="needs a panel: give unit=COLUMN"):
        project().standard_errors(text)


def test_more_lags_than_dates_are_refused():
    with pytest.raises(ValueError, match=r"takes in 120 lags of 120 dates: use fewer, or 'hac'"):
        project().standard_errors("hac:120")


def test_spellings_of_covariances():
    lp = project()
    for text, same in (("HC3 ", "hc3"), ("robust", "hc0"), ("EHW", "hc0"), ("hac:auto", "hac")):
        assert_allclose(lp.standard_errors(text), lp.standard_errors(same), rtol=0)
    assert_allclose(on_panel().standard_errors("dk:2"),
                    on_panel().standard_errors("driscoll-kraay:2"), rtol=0)  # fmt: skip


# --- panels ---------------------------------------------------------------------------------


def test_covariances_of_one_series_are_refused_in_panels():
    with pytest.raises(ValueError, match="'hac' is for one series: use driscoll-kraay"):
        on_panel().standard_errors("hac")
    with pytest.raises(ValueError, match="'cluster' with 4 units: use driscoll-kraay"):
        on_panel(panel(4)).standard_errors("cluster")


def test_default_covariance_of_a_panel_goes_by_its_units():
    for units, kind in ((9, "driscoll-kraay:auto"), (10, "cluster")):
        assert str(on_panel(panel(units)).posterior().covariance) == kind


def test_what_effects_of_units_hold_is_refused():
    fixed = panel().assign(size=panel()["unit"].str[1:].astype(float) / 10)
    with pytest.raises(ValueError, match=r"l\(size, 1\) is constant within every unit"):
        on_panel(fixed, controls=["size"])
    with pytest.raises(ValueError, match="shock 'size' is an exact function of the controls"):
        on_panel(fixed, shock="size", shock_lags=0)
    assert on_panel(fixed, controls=["l(size, 0)"], effects="none").coefficients == 2 + 2 + 3


def test_a_trend_is_held_by_effects_of_dates():
    with pytest.raises(ValueError, match=r"collinear controls: .*trend"):
        on_panel(effects="unit+time", trend="ct")


def test_dates_twice_without_a_unit_ask_for_one():
    with pytest.raises(ValueError, match=r"of a panel, name the column of units: unit=\.\.\."):
        project(panel(), time="year")


# --- what is asked of it --------------------------------------------------------------------


def test_what_instruments_are_for_is_refused_without_them():
    for ask in (project().first_stage, project().anderson_rubin):
        with pytest.raises(ValueError, match="there are no instruments"):
            ask()
    two = project(shock=["news", "cpi"], instruments=["z", "calm"])
    with pytest.raises(ValueError, match="Anderson-Rubin bands need one shock"):
        two.anderson_rubin()


def test_moments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"no response 'gpd'; did you mean 'gdp'"):
        project().moments("gpd")
    with pytest.raises(ValueError, match="30 coefficients for 24 rows: its Ω is singular"):
        project(table().iloc[:30]).moments(concentrated=False)
    with pytest.raises(ValueError, match="need as many instruments as shocks"):
        project(instruments=["z", "calm"]).moments(concentrated=False)
    with pytest.raises(ValueError, match="stacked moments need sample='common' and no effects"):
        project(sample="available").moments(concentrated=False)
    with pytest.raises(ValueError, match="stacked moments need sample='common' and no effects"):
        on_panel().moments(concentrated=False)


def test_draws_of_another_projection_are_refused():
    result = hi.sample(project().posterior(), draws=50, chains=1)
    with pytest.raises(ValueError, match=r"coefficients gdp\.h0.*this projection cpi\.h0"):
        project(response="cpi").impulse_response(result)
    for scale in (0.0, np.inf, "unit"):
        with pytest.raises(ValueError, match=re.escape(f"scale {scale!r}: a number in units")):
            project().impulse_response(result, scale)


def test_scale_of_one_deviation_is_that_of_the_unpredicted_shock():
    lp = project()
    result = hi.sample(lp.posterior(), draws=50, chains=1)
    sd = np.sqrt((lp.parts[0].fit.s ** 2).mean())
    own, unit = lp.impulse_response(result, "sd"), lp.impulse_response(result)
    assert_allclose(own.draws, sd * unit.draws, rtol=1e-12)
    assert_allclose(own.estimate, sd * lp.estimate, rtol=1e-12)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("gdp news", "is not understood: write"),
        ("gdp ~ cpi", "shock 'news' is not in"),
        ("gdp ~ ", "shock 'news' is not in"),
        ("gdp ~ cpi + [news ~ z]", r"names its shock in brackets: leave shock= out"),
        ("gdp ~ new", "; did you mean 'new'"),
    ],
)
def test_formulas_are_refused(formula, message):
    with pytest.raises(ValueError, match=message):
        hi.LocalProjection.from_formula(formula, table(), "news")
    with pytest.raises(ValueError, match="without shock="):
        hi.LocalProjection.from_formula("gdp ~ news", table())
