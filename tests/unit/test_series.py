"""Dates of every kind become consecutive numbers; what cannot is refused by name."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from statsmodels.datasets import macrodata

from hakari.inference.series import (
    Series,
    Term,
    lagged,
    parse_term,
    read_series,
    refuse_interior_gaps,
    term_names,
)


def read(dates, **more):
    """A series y = 0, 1, ... on these dates."""
    return read_series({"y": np.arange(float(len(dates))), "date": dates, **more}, ["y"], "date")


def refused(dates, message, **more):
    with pytest.raises(ValueError, match=message):
        read(dates, **more)


def panel(units="AAABBBB", years=(1990, 1991, 1992, 1991, 1992, 1993, 1994)):
    y = np.arange(float(len(units)))
    return pd.DataFrame({"y": y, "year": list(years), "state": list(units)})


@pytest.fixture(scope="module")
def macro():
    return macrodata.load_pandas().data


QUARTERS = pd.date_range("1959-01-01", periods=203, freq="QS")
AS_QUARTERS = {
    "starts": QUARTERS,
    "ends": pd.date_range("1959-01-01", periods=203, freq="QE"),
    "middles": QUARTERS + pd.DateOffset(days=45),
    "periods": QUARTERS.to_period("Q"),
    "decimals": 1959 + np.arange(203) / 4,
    "1959Q1": [f"{d.year}Q{d.quarter}" for d in QUARTERS],
    "1959-q1": [f"{d.year}-q{d.quarter}" for d in QUARTERS],
    "1/1/1959": [f"{d.month}/{d.day}/{d.year}" for d in QUARTERS],
    "1.1.1959, day first": [f"{d.day}.{d.month}.{d.year}" for d in QUARTERS],
    "1959-01": QUARTERS.strftime("%Y-%m"),
    "1959-01-01": QUARTERS.strftime("%Y-%m-%d"),
    "195901": QUARTERS.strftime("%Y%m").astype(int),
    "Jan 1959": QUARTERS.strftime("%b %Y"),
    "1959m1": [f"{d.year}m{d.month}" for d in QUARTERS],
    "dates": [d.date() for d in QUARTERS],
    "zone": QUARTERS.tz_localize("US/Eastern"),
    "categories": pd.Categorical(QUARTERS.strftime("%Y-%m")),
}


@pytest.mark.parametrize("written", AS_QUARTERS)
def test_every_way_of_writing_quarters_is_the_same_series(macro, written):
    known = read_series(macro, ["realgdp", "infl"], ("year", "quarter"))
    frame = macro[["realgdp", "infl"]].assign(date=AS_QUARTERS[written])
    other = read_series(frame, ["realgdp", "infl"], "date")
    assert other.labels == known.labels == tuple(f"{d.year}Q{d.quarter}" for d in QUARTERS)
    np.testing.assert_array_equal(np.diff(other.period), 1)
    for name in ("realgdp", "infl"):
        np.testing.assert_array_equal(other.columns[name], macro[name])
        np.testing.assert_array_equal(known.columns[name], macro[name])
    if written != "periods":  # pandas counts from 1970
        np.testing.assert_array_equal(other.period, known.period)
    assert known.notes == ()


@pytest.mark.parametrize(
    ("dates", "labels"),
    [
        (["1990-11", "1990-12", "1991-01"], "1990-11 1990-12 1991-01"),
        ([1990.0, 1990.083, 1990.17, 1990.25], "1990-01 1990-02 1990-03 1990-04"),
        (["1990-01-31", "1990-02-28", "1990-03-30"], "1990-01 1990-02 1990-03"),
        (["2000-12-31", "2001-12-31"], "2000 2001"),
        ([2000, 2001], "2000 2001"),
        (["2000", "2001"], "2000 2001"),
        ([17, 18, 19], "17 18 19"),
        ([-1, 0, 1], "-1 0 1"),
        ([2000, 2002, 2004], "2000 2002 2004"),
        (["1969-12-31", "1970-01-01", "1970-01-02", "1970-01-05"], None),
        (["2024-02-28", "2024-02-29", "2024-03-01", "2024-03-02"], None),
        (["2024-01-05", "2024-01-12", "2024-01-19"], None),
        (["2024-01-05", "2024-01-19", "2024-02-02"], None),
    ],
)
def test_frequency_is_the_most_frequent_step(dates, labels):
    series = read(dates)
    assert series.labels == tuple(labels.split() if labels else dates)
    np.testing.assert_array_equal(np.diff(series.period), 1)


def test_a_week_moved_by_a_holiday_is_still_a_week():
    thursdays = list(pd.date_range("2024-01-04", periods=10, freq="7D"))
    thursdays[4] -= pd.Timedelta(days=1)
    series = read(thursdays)
    np.testing.assert_array_equal(np.diff(series.period), 1)
    assert series.labels[4] == "2024-01-31"
    fortnight = read([*thursdays[0:4:2], thursdays[4], *thursdays[6::2]])
    np.testing.assert_array_equal(np.diff(fortnight.period), 1)


def test_long_business_and_calendar_days_have_steps_of_one():
    for freq in "BD":
        days = pd.date_range("1965-03-01", "1975-03-01", freq=freq)
        assert np.all(np.diff(read(days).period) == 1)


def test_year_and_month_columns(macro):
    table = {"y": [1.0, 2.0], "year": [1999.0, 2000.0], "month": ["12", "1"]}
    with pytest.raises(ValueError, match=r"month holds .* \('12'\), not numbers: .*to_numeric"):
        read_series(table, ["y"], ("year", "month"))
    table["month"] = [12, 1]
    assert read_series(table, ["y"], ["year", "month"]).labels == ("1999-12", "2000-01")
    first = read_series({**table, "month": [1, 1]}, ["y"], ("year", "month"))
    assert first.labels == ("1999", "2000")  # January of each year: annual
    table["part"] = [4, 1]
    series = read_series(table, ["y"], ("year", "part"))
    assert series.labels == ("1999Q4", "2000Q1")
    assert series.notes == ("part is read as a quarter",)
    renamed = macro.rename(columns={"year": "quarter", "quarter": "year"})
    with pytest.raises(
        ValueError, match=r"quarter is 1959 in row 1 .*a year and its quarter, 1 to"
    ):
        read_series(renamed, ["infl"], ("year", "quarter"))
    with pytest.raises(ValueError, match="name one column, or year and quarter, or year and month"):
        read_series({**table, "day": [1, 1]}, ["y"], ("year", "month", "day"))


def test_no_dates_take_the_rows_in_order():
    series = read_series({"y": [3.0, 1.0]}, ["y"])
    assert series.labels == ("1", "2")
    assert series.units == ("",)
    assert series.notes == (
        "no dates are given: the rows are taken in order as consecutive periods",
    )
    series = read_series(panel("ABABBAB"), ["y"], unit="state")
    assert series.labels == ("1", "2", "3", "1", "2", "3", "4")
    np.testing.assert_array_equal(series.columns["y"], [0, 2, 5, 1, 3, 4, 6])
    assert "all units from the same first one" in series.notes[0]


def test_an_index_of_dates_serves_as_time():
    index = pd.date_range("1990-01-01", periods=3, freq="MS")
    frame = pd.DataFrame({"y": [1.0, 2, 3]}, index=index)
    months = ("1990-01", "1990-02", "1990-03")
    assert read_series(frame, ["y"]).labels == months
    assert read_series(frame.to_period("M"), ["y"]).labels == months
    assert read_series(frame.rename_axis("when"), ["y"], "when").labels == months
    assert read_series({"y": frame["y"]}, ["y"]).labels == months
    assert read_series(frame.assign(t=[7, 8, 9]), ["y"], "t").labels == ("7", "8", "9")
    with pytest.raises(
        ValueError, match=r"the index: 1990-01-01 stands after 1990-02-01, .*data\.sort_index\(\)"
    ):
        read_series(frame[::-1][1:], ["y"])
    both = pd.MultiIndex.from_product([["A", "B"], index], names=["state", "when"])
    series = read_series(pd.DataFrame({"y": np.arange(6.0)}, both), ["y"], unit="state")
    assert series.units == ("A", "B")
    assert series.labels == months * 2
    with pytest.raises(ValueError, match="name the column of units: unit="):
        read_series(pd.DataFrame({"y": np.arange(6.0)}, both), ["y"])


def test_every_kind_of_table(macro, tmp_path):
    table = macro[["realgdp"]].assign(date=AS_QUARTERS["1/1/1959"])
    indexed = table.assign(date=QUARTERS).set_index("date")
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "b.csv.gz", index=False)
    table.to_parquet(tmp_path / "c.parquet")
    indexed.to_parquet(tmp_path / "d.parquet")
    arrow = [pa.Table.from_pandas(frame) for frame in (table, indexed)]
    names = ("a.csv", "b.csv.gz", "c.parquet", "d.parquet")
    for data in (*[tmp_path / name for name in names], *arrow, table.to_dict("list"), indexed):
        series = read_series(data, ["realgdp"], "date")
        np.testing.assert_array_equal(series.columns["realgdp"], macro["realgdp"])
        assert series.labels[:2] == ("1959Q1", "1959Q2")
    assert read_series(arrow[1], ["realgdp"]).labels[-1] == "2009Q3"


def test_units_may_come_in_any_order_with_different_stretches():
    frame = panel()
    known = read_series(frame, ["y"], "year", "state")
    mixed = read_series(frame.iloc[[3, 0, 4, 1, 5, 2, 6]], ["y"], "year", "state")
    assert (known.units, mixed.units) == (("A", "B"), ("B", "A"))
    np.testing.assert_array_equal(known.unit, [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(known.period, frame["year"])
    np.testing.assert_array_equal(mixed.period, [1991, 1992, 1993, 1994, 1990, 1991, 1992])
    np.testing.assert_array_equal(mixed.columns["y"], [3, 4, 5, 6, 0, 1, 2])


def test_dates_are_the_same_in_all_units():
    days = ["1990-01-01", "1990-02-01", "1990-03-01", "1990-02-28", "1990-03-31"]
    frame = pd.DataFrame({"y": 1.0, "date": days, "state": list("AAABB")})
    series = read_series(frame, ["y"], "date", "state")
    assert series.labels[1:3] == series.labels[3:]
    np.testing.assert_array_equal(series.period[1:3], series.period[3:])


@pytest.mark.parametrize("lag", [-9, -2, -1, 0, 1, 2, 7])
def test_lags_within_units_never_cross_units(lag):
    series = read_series(panel("ABABBAB", (1, 1, 2, 2, 3, 3, 4)), ["y"], "year", "state")
    y = series.columns["y"]
    known = {(u, p): v for u, p, v in zip(series.unit, series.period, y, strict=True)}
    pairs = zip(series.unit, series.period - lag, strict=True)
    wanted = [known.get(pair, np.nan) for pair in pairs]
    np.testing.assert_array_equal(lagged(series, y, lag), wanted)


def test_lags_agree_with_pandas(macro):
    series = read_series(macro, ["infl"], ("year", "quarter"))
    for lag in (-3, 1, 4):
        wanted = macro["infl"].shift(lag)
        np.testing.assert_array_equal(lagged(series, series.columns["infl"], lag), wanted)


def test_numbers_of_every_kind():
    frame = pd.DataFrame(
        {
            "whole": [1, 2],
            "flag": [True, False],
            "nullable": pd.array([1, None], dtype="Int64"),
            "decimal": [Decimal("1.5"), None],
            "none": np.array([None, 2.0], dtype=object),
            "empty": [None, None],
        }
    )
    columns = read_series(frame, list(frame)).columns
    wanted = [[1, 2], [1, 0], [1, np.nan], [1.5, np.nan], [np.nan, 2], [np.nan, np.nan]]
    np.testing.assert_array_equal(np.array(list(columns.values())), wanted)


def test_what_is_refused_about_columns():
    with pytest.raises(ValueError, match=r"no column 'gpd' in the data; did you mean 'gdp'\?"):
        read_series({"gdp": [1.0]}, ["gpd"])
    with pytest.raises(ValueError, match=r"no column 'when'"):
        read_series({"gdp": [1.0]}, ["gdp"], "when")
    with pytest.raises(TypeError, match=r"columns='gdp' is one text: give a list, \['gdp'\]"):
        read_series({"gdp": [1.0]}, "gdp")
    with pytest.raises(ValueError, match=r"gdp holds .* \('a'\), not numbers: .*pd.to_numeric"):
        read_series({"gdp": ["a", "b"]}, ["gdp"])
    with pytest.raises(ValueError, match=r"gdp holds datetime64.*, not numbers"):
        read_series({"gdp": QUARTERS}, ["gdp"])
    with pytest.raises(
        ValueError, match=r"gdp is -inf in row 2 \(counting from 1\), one of 1 such"
    ):
        read_series({"gdp": [1.0, -np.inf]}, ["gdp"])
    with pytest.raises(ValueError, match="the data have no rows: gdp are to be read"):
        read_series({"gdp": []}, ["gdp"])
    with pytest.raises(ValueError, match="2 columns are called 'gdp': rename all but one"):
        read_series(pd.DataFrame([[1.0, 2.0]], columns=["gdp", "gdp"]), ["gdp"])


def test_missing_dates_and_units():
    refused(["1990-01", None, "1990-03"], r"date is missing in row 2 .* one of 1 such rows: fill")
    refused([1990, np.nan], "date is missing in row 2")
    refused(pd.to_datetime(["1990-01-01", None]), "date is missing in row 2")
    with pytest.raises(ValueError, match="state is missing in row 1"):
        read_series(panel().assign(state=[None, *"ABCDEF"]), ["y"], "year", "state")


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (["1990-01", "foo"], r"date is 'foo' in row 2 .*: write dates as 1990, 1990Q1, 1990-02"),
        (["1/1/59", "4/1/59"], r"date is '1/1/59' in row 1 .*: write dates as"),
        (["2/13/1990", "13/2/1990"], r"date is '13/2/1990' in row 2 .*: write dates as"),
        (
            [1990.1, 1990.2],
            r"date is 1990\.1: write whole numbers, or years .* quarter \(1990\.25\)",
        ),
        ([1.0, 1e300], r"date is 1e\+300: write whole numbers"),
        ([1.0, np.inf], "date is inf in row 2"),
        (
            pd.date_range("1990-01-01", periods=3, freq="h"),
            r"date is 1990-01-01 01:00:00 in row 2 .* another time of day .*dt\.normalize",
        ),
    ],
)
def test_dates_that_are_not_understood(dates, message):
    refused(dates, message)


def test_duplicates_and_disorder():
    refused(
        ["1990-01", "1990-02", "1990-02"], "date: 1990-02 is there more than once, one of 1 rows"
    )
    refused(
        ["1990-02", "1990-03", "1990-01"],
        r"date: 1990-01 stands after 1990-03, in row 3 .*data\.sort_values\(\['date'\]\)",
    )
    with pytest.raises(ValueError, match="year: 1991 of 'A' is there more than once"):
        read_series(panel("AAA", (1990, 1991, 1991)), ["y"], "year", "state")
    with pytest.raises(
        ValueError, match=r"1992 of 'B' .* row 5 .*sort_values\(\['state', 'year'\]"
    ):
        read_series(panel("AABAB", (1990, 1991, 1993, 1992, 1992)), ["y"], "year", "state")


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (
            ["1991-01", "1991-02", "1991-04", "1991-05", "1991-08"],
            "date: 1991-03 is missing after 1991-02, the first of 2 gaps with 3 months in all: "
            "cut the table to a stretch without gaps, add the rows with values, or",
        ),
        (["1990Q1", "1990Q2", "1990Q4", "1991Q1"], "1990Q3 is missing after 1990Q2"),
        ([1, 2, 4], "3 is missing after 2, the first of 1 gaps with 1 steps"),
        ([2000, 2002, 2006, 2008], "2004 is missing after 2002"),
        (
            ["2024-12-23", "2024-12-24", "2024-12-26", "2024-12-27"],
            "2024-12-25 is missing after 2024-12-24, .* 1 business days .* column of whole numbers",
        ),
        (
            ["2024-03-01", "2024-03-02", "2024-03-04", "2024-03-05"],  # Saturdays are in it
            "2024-03-03 is missing after 2024-03-02, the first of 1 gaps with 1 days",
        ),
        (
            ["2024-01-05", "2024-01-12", "2024-01-26", "2024-02-02"],
            "2024-01-19 is missing after 2024-01-12, the first of 1 gaps with 1 weeks",
        ),
        (
            ["1990-03", "1990-06", "1990-10", "1991-01", "1991-04"],
            "1990-10 is off the usual step of 3 months that starts at 1990-03: correct the date",
        ),
    ],
)
def test_gaps(dates, message):
    refused(dates, message)


def test_advice_on_gaps_works():
    frame = pd.DataFrame({"date": [1, 2, 3, 5, 6], "y": [1.0, 2.0, 3.0, 5.0, 6.0]})
    with pytest.raises(ValueError, match="4 is missing after 3"):
        read_series(frame, ["y"], "date")
    whole = pd.concat([frame, pd.DataFrame({"date": [4], "y": [4.0]})]).sort_values("date")
    for table in (frame[frame["date"] <= 3], frame[frame["date"] > 3], whole):
        assert refuse_interior_gaps(read_series(table, ["y"], "date"), ["y"]) == ()


def test_gaps_of_units():
    with pytest.raises(ValueError, match="year: 1993 of 'B' is missing after 1992"):
        read_series(panel(years=(1990, 1991, 1992, 1991, 1992, 1994, 1995)), ["y"], "year", "state")
    with pytest.raises(ValueError, match="1991 of 'B' is off the usual step of 2 steps"):
        read_series(panel("AABB", (1990, 1992, 1991, 1993)), ["y"], "year", "state")


def test_a_slashed_date_that_can_be_read_two_ways_says_how():
    assert read(AS_QUARTERS["1/1/1959"]).notes == (
        "date: 4/1/1959 is read month first, as 1959-04-01",
    )
    assert read(AS_QUARTERS["1.1.1959, day first"]).notes == (
        "date: 1.4.1959 is read day first, as 1959-04-01",
    )
    assert read(["1/1/1990", "2/2/1990"]).notes == ()
    assert read(AS_QUARTERS["195901"]).notes == ("date: 195901 is read as year 1959, month 1",)


def test_missing_values_inside_are_refused_and_edges_noted():
    nan = np.nan
    table = {
        "full": [1.0, 2, 3, 4, 5],
        "late": [nan, nan, 3, 4, 5],
        "early": [1, 2, 3, 4, nan],
        "hole": [1, nan, nan, 4, nan],
        "none": [nan] * 5,
        "date": [dt.date(1973, month, 1) for month in range(1, 6)],
    }
    series = read_series(table, ["full", "late", "early", "hole", "none"], "date")
    assert refuse_interior_gaps(series, ["full"]) == ()
    assert refuse_interior_gaps(series, ["full", "late", "early", "late"]) == (
        "late starts at 1973-03",
        "early ends at 1973-04",
    )
    with pytest.raises(
        ValueError, match=r"hole is missing at 1973-02, one of 2 .*: cut the table to a stretch"
    ):
        refuse_interior_gaps(series, ["hole"])
    with pytest.raises(ValueError, match="none has no values in 5 rows: drop it"):
        refuse_interior_gaps(series, ["none"])


def test_missing_values_of_units():
    frame = panel("AAABBBCC", (1990, 1991, 1992, 1991, 1992, 1993, 1990, 1991))
    frame["x"] = [np.nan, 1, np.nan, np.nan, 2, 3, np.nan, np.nan]
    frame["hole"] = [1, 2, 3, 4, np.nan, 5, 6, 7]
    series = read_series(frame, ["x", "hole"], "year", "state")
    assert refuse_interior_gaps(series, ["x"]) == (
        "x starts at 1991 of 'A', and inside the table in 1 more units",
        "x ends at 1991 of 'A'",
        "x has no values in 1 of 3 units",
    )
    with pytest.raises(ValueError, match="hole is missing at 1992 of 'B', one of 1 missing"):
        refuse_interior_gaps(series, ["hole"])


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("x", None),
        ("log(x)", None),
        ("lag", None),
        ("l(x)", Term("x", (1,))),
        ("f(x)", Term("x", (-1,))),
        ("l(x, 0)", Term("x", (0,))),
        ("l(x, 3)", Term("x", (3,))),
        (" l( x ,1 : 4 ) ", Term("x", (1, 2, 3, 4))),
        ("l(x, 0:2)", Term("x", (0, 1, 2))),
        ("f(x, 0:2)", Term("x", (0, -1, -2))),
        ("l(log(x), 2)", Term("log(x)", (2,))),
        ("l(oil price, 2)", Term("oil price", (2,))),
    ],
)
def test_terms(text, term):
    assert parse_term(text) == term


@pytest.mark.parametrize("text", ["l(x, 4:1)", "l(x, -1)", "l(x, a)", "l(x", "l()", "f(x, 1, 2)"])
def test_terms_that_are_not_understood(text):
    with pytest.raises(ValueError, match=r"term '.*' is not understood: write l\(x\), l\(x, 2\)"):
        parse_term(text)


def test_term_names_are_read_back():
    term = Term("x", (2, 1, 0, -1))
    assert term_names(term) == ("l(x, 2)", "l(x, 1)", "x", "f(x, 1)")
    back = [parse_term(name) or Term(name, (0,)) for name in term_names(term)]
    assert [t.lags[0] for t in back] == list(term.lags)


def test_a_series_is_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        read([1, 2]).labels = ()
    assert isinstance(read([1, 2]), Series)
