"""Responses whose peak, half-life and multiplier are known, and figures that show them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

from hakari.inference import bands
from hakari.inference.impulse_response import ImpulseResponse

N, H = 400, 5


@pytest.fixture(scope="module")
def irf():
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((N, 2, 2, H)).cumsum(axis=-1) + np.arange(1, H + 1)
    return ImpulseResponse(
        draws,
        ("gdp", "gov"),
        ("news", "oil"),
        tuple(range(H)),
        estimate=draws.mean(axis=0) + 0.1,
        prior_draws=3 * rng.standard_normal((200, 2, 2, H)),
        narrowed=np.full((2, 2, H), 0.25),
    )


def one(paths, horizons=None, **more):
    """Draws (N, H) of one response to one shock."""
    paths = np.asarray(paths, dtype=float)
    horizons = tuple(range(paths.shape[1])) if horizons is None else horizons
    return ImpulseResponse(paths[:, None, None, :], ("y",), ("e",), horizons, **more)


def sets(irf):
    rows = product(irf.responses, irf.shocks, irf.horizons)
    table = pd.DataFrame(list(rows), columns=["response", "shock", "horizon"])
    return table.assign(lower=-1.0 - table["horizon"], upper=2.0 + table["horizon"])


# --- tables -------------------------------------------------------------------------------


def test_bands_of_each_response_are_bands_over_its_horizons(irf):
    table = irf.bands(0.8)
    assert list(table.columns) == ["response", "shock", "horizon", "lower", "upper"]
    mine = table[(table["response"] == "gov") & (table["shock"] == "news")]
    direct = bands.sup_t(irf.draws[:, 1, 0], 0.8)
    np.testing.assert_allclose(mine["lower"], direct.lower, rtol=1e-12)
    np.testing.assert_allclose(mine["upper"], direct.upper, rtol=1e-12)
    assert list(mine["horizon"]) == list(range(H))
    assert table.attrs["inside"] == [0.8] * 4
    assert table.attrs["critical"][2] == pytest.approx(direct.critical, rel=1e-12)


@pytest.mark.parametrize("kind", bands.KINDS)
def test_bands_over_all_are_one_band(irf, kind):
    table = irf.bands(0.8, kind, over="all")
    direct = bands.band(irf.draws.reshape(N, -1), 0.8, kind)
    np.testing.assert_allclose(table["upper"], direct.upper, rtol=1e-12)
    np.testing.assert_allclose(table["lower"], direct.lower, rtol=1e-12)
    assert table.attrs["inside"] == [direct.inside]


def test_highest_density_reads_the_density_of_each_response(irf):
    density = np.stack([-np.abs(irf.draws[:, r, 0, 2] - 3) for r in range(2)], axis=1)
    alone = irf.select(shock="news")
    table = replace(alone, log_density=density).bands(0.8, "highest-density")
    for r, name in enumerate(irf.responses):
        direct = bands.highest_density(irf.draws[:, r, 0], 0.8, density[:, r])
        np.testing.assert_array_equal(table.loc[table["response"] == name, "upper"], direct.upper)
    two = replace(irf, log_density=density)  # of two shocks at once: of neither by itself
    pd.testing.assert_frame_equal(
        two.bands(0.8, "highest-density"), irf.bands(0.8, "highest-density")
    )
    assert two.select(shock="oil").log_density is None
    whole = two.select("gdp").bands(0.8, "highest-density", over="all")
    direct = bands.highest_density(irf.draws[:, 0].reshape(N, -1), 0.8, density[:, 0])
    np.testing.assert_array_equal(whole["upper"], direct.upper)
    np.testing.assert_array_equal(two.select("gov").log_density[:, 0], density[:, 1])


def test_table(irf):
    table = replace(irf, anderson_rubin=sets(irf).iloc[::-1]).to_dataframe(0.9, "sidak")
    assert list(table.columns) == [
        *("response", "shock", "horizon", "mean", "sd"),
        *("lower_pointwise", "upper_pointwise", "lower_joint", "upper_joint"),
        *("estimate", "narrowed", "lower_ar", "upper_ar"),
    ]
    row = table[(table["response"] == "gov") & (table["shock"] == "oil")].iloc[3]
    draws = irf.draws[:, 1, 1, 3]
    assert row["mean"] == pytest.approx(draws.mean())
    assert row["sd"] == pytest.approx(draws.std(ddof=1))
    assert row["lower_pointwise"] == pytest.approx(np.quantile(draws, 0.05))
    joint = bands.sidak(irf.draws[:, 1, 1], 0.9).upper[3]
    assert row["upper_joint"] == pytest.approx(joint, rel=1e-12)
    assert row["estimate"] == irf.estimate[1, 1, 3]
    assert (row["lower_ar"], row["upper_ar"]) == (-4, 5)
    assert "lower_ar" not in irf.to_dataframe()


def test_horizons_that_are_not_finite_are_left_out(irf):
    draws = irf.draws.copy()
    draws[7, 0, 0, 1] = np.nan
    draws[:, 1, 1] = np.nan
    table = replace(irf, draws=draws).bands()
    first = table.iloc[:H]
    assert list(first["lower"].isna()) == [False, True, False, False, False]
    rest = bands.sup_t(irf.draws[:, 0, 0][:, [0, 2, 3, 4]], 0.9)
    np.testing.assert_allclose(first["upper"].dropna(), rest.upper, rtol=1e-12)
    assert table.iloc[-H:]["upper"].isna().all()
    assert table.iloc[H : 3 * H].notna().all(axis=None)
    assert np.isnan(table.attrs["inside"][3])
    shape = replace(irf, draws=draws).shape()
    assert np.isnan(shape["peak"].iloc[3])
    assert shape["peak"].notna().sum() == 3


# --- other responses ------------------------------------------------------------------------


def test_select(irf):
    found = replace(irf, anderson_rubin=sets(irf)).select("gov", ["oil", "news"])
    assert (found.responses, found.shocks) == (("gov",), ("oil", "news"))
    np.testing.assert_array_equal(found.draws, irf.draws[:, [1]][:, :, [1, 0]])
    np.testing.assert_array_equal(found.prior_draws, irf.prior_draws[:, [1]][:, :, [1, 0]])
    np.testing.assert_array_equal(found.estimate[0], irf.estimate[1, ::-1])
    assert set(found.anderson_rubin["response"]) == {"gov"}


def test_cumulative_sums_over_horizons(irf):
    found = replace(irf, anderson_rubin=sets(irf), title="t").cumulative()
    np.testing.assert_allclose(found.draws[..., 2], irf.draws[..., :3].sum(axis=-1))
    np.testing.assert_allclose(found.estimate[..., -1], irf.estimate.sum(axis=-1))
    assert found.narrowed is None
    assert found.anderson_rubin is None
    assert found.title == "t, cumulated"
    assert found.notes == ()
    later = replace(irf, horizons=(2, 3, 4, 5, 6)).cumulative()
    assert later.notes == ("cumulated from horizon 2 on",)
    with pytest.raises(ValueError, match=r"horizons 0 to 2, 4, 6 have gaps: a sum"):
        replace(irf, horizons=(0, 1, 2, 4, 6)).cumulative()


def test_multiplier_of_known_responses():
    gov = np.ones((300, H)) * np.linspace(1, 2, 300)[:, None]
    gdp = 1.5 * gov * np.arange(1, H + 1)
    draws = np.stack([gdp, gov], axis=1)[:, :, None, :]
    irf = ImpulseResponse(draws, ("gdp", "gov"), ("news",), tuple(range(H)), draws[0])
    found = irf.multiplier("gdp", "gov")
    assert found.responses == ("gdp / gov",)
    assert found.title == "cumulative multiplier"
    assert found.notes == ()
    expected = 1.5 * np.arange(1, H + 1).cumsum() / np.arange(1, H + 1)
    np.testing.assert_allclose(found.draws[:, 0, 0], np.broadcast_to(expected, (300, H)))
    np.testing.assert_allclose(found.estimate[0, 0], expected)
    np.testing.assert_allclose(irf.multiplier("gov", "gov").draws, 1)


def test_a_ratio_is_of_sums_and_not_a_sum_of_ratios(irf):
    found = irf.multiplier("gdp", "gov").draws[:, 0, 1, 2]
    sums = irf.draws[:, :, 1, :3].sum(axis=-1)
    np.testing.assert_allclose(found, sums[:, 0] / sums[:, 1])


def test_multiplier_says_where_its_denominator_is_weak():
    gov = np.tile([0.0, 0.0, 1.0, 1.0, 1.0], (300, 1))
    gov[:, 1] = np.linspace(-1, 1, 300)
    gov[:, 2] += 5
    draws = np.stack([np.ones_like(gov), gov], axis=1)[:, :, None, :]
    found = ImpulseResponse(draws, ("gdp", "gov"), ("news",), tuple(range(H))).multiplier(
        "gdp", "gov"
    )
    assert found.notes == (
        "the 99% interval of the cumulated response of gov to news contains 0 at horizons "
        "0, 1: the multiplier is weakly identified there",
    )
    assert np.isnan(found.draws[..., 0]).all()
    assert np.isfinite(found.draws[..., 1:]).all()
    assert found.bands(kind="quantile")["lower"].isna().sum() == 1
    weak = one(np.linspace(-1, 1, 300)[:, None] * np.ones(3))
    assert "contains 0 at all horizons" in weak.multiplier("y", "y").notes[0]


# --- shapes and chances ---------------------------------------------------------------------


def test_shape_of_a_known_path():
    path = np.array([0, 2, 4, 3, 2.0, 1.9, 3, 1])  # peak 4 at 2; under 2 at 5: half-life 3
    found = one(np.outer(np.linspace(0.9, 1.1, 101), -path)).shape(0.8).iloc[0]
    assert found["peak"] == pytest.approx(-4)
    assert found["peak_lower"] == pytest.approx(-4 * 1.08)
    assert found["peak_upper"] == pytest.approx(-4 * 0.92)
    assert found[["peak_horizon", "peak_horizon_lower", "peak_horizon_upper"]].tolist() == [2] * 3
    assert found[["half_life", "half_life_lower", "half_life_upper"]].tolist() == [3] * 3
    assert found["half_life_beyond"] == 0
    assert (found["positive"], found["negative"]) == (0, 0)  # 0 on impact


def test_half_lives_beyond_the_window_are_infinite_and_counted():
    falls, stays = np.array([4.0, 1, 1, 1]), np.array([4.0, 4, 3, 3])
    paths = np.vstack([np.tile(falls, (60, 1)), np.tile(stays, (40, 1))])
    found = one(paths, (0, 3, 6, 9)).shape(0.9).iloc[0]
    assert (found["half_life"], found["half_life_lower"]) == (3, 3)
    assert found["half_life_upper"] == np.inf
    assert found["half_life_beyond"] == 0.4
    assert found["positive"] == 1
    most = one(paths[::-1][:70]).shape().iloc[0]
    assert most["half_life"] == np.inf
    assert most["half_life_beyond"] == pytest.approx(40 / 70)


def test_probability():
    paths = np.array([[1.0, 1, 1], [1, -1, 1], [-1, -1, -1], [2, 2, -2]])
    found = one(paths)
    assert found.probability("y") == 0.25
    assert found.probability("y", sign="-") == 0.25
    assert found.probability("y", horizons=[0, 2]) == 0.5
    assert found.probability("y", "e", horizons=0) == 0.75
    np.testing.assert_array_equal(found.probability("y", joint=False), [0.75, 0.5, 0.5])
    assert (found.shape()["positive"] == found.probability("y")).all()


# --- refusals -------------------------------------------------------------------------------


def test_refusals_of_questions(irf):
    with pytest.raises(ValueError, match=r"no response 'gdpp'; did you mean 'gdp'\? \(responses: "):
        irf.multiplier("gdpp", "gov")
    with pytest.raises(ValueError, match=r"no shock 'new'; did you mean 'news'\? \(shocks: news, "):
        irf.select(shock="new")
    with pytest.raises(ValueError, match=r"over 'both': 'response' \(each by itself\)"):
        irf.bands(over="both")
    with pytest.raises(ValueError, match="no band of kind 'sup_t'; did you mean 'sup-t'"):
        irf.bands(kind="sup_t")
    with pytest.raises(ValueError, match=r"which of 2 shocks\? \(news, oil\)"):
        irf.probability("gdp")
    with pytest.raises(ValueError, match=r"sign 'positive': '\+' or '-'"):
        irf.probability("gdp", "oil", "positive")
    with pytest.raises(ValueError, match=r"no horizon 9 \(horizons: 0 to 4\)"):
        irf.probability("gdp", "oil", horizons=[1, 9])
    with pytest.raises(ValueError, match="y is not finite at horizons 1: choose others"):
        one([[1.0, np.nan], [1.0, 2.0]]).probability("y")
    with pytest.raises(ValueError, match="line 'mode': 'mean' or 'median'"):
        irf.plot(line="mode")


def test_refusals_of_parts_that_do_not_fit(irf):
    with pytest.raises(ValueError, match=r"estimate of shape \(1, 2, 5\) for 2 responses, 2 sho"):
        replace(irf, estimate=irf.estimate[:1])
    with pytest.raises(ValueError, match="response 'y' appears twice: y, y"):
        replace(irf, responses=("y", "y"))
    with pytest.raises(ValueError, match="horizons 0, 1, 3, 2, 4: need different ones, asc"):
        replace(irf, horizons=(0, 1, 3, 2, 4))
    with pytest.raises(ValueError, match=r"log_density of shape \(3, 2\): need \(400, 2\)"):
        replace(irf, log_density=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"lacks upper \(columns: response, shock, horizon, low"):
        replace(irf, anderson_rubin=sets(irf).drop(columns="upper"))
    with pytest.raises(ValueError, match="anderson_rubin has two rows for gdp, news, 0: give one"):
        replace(irf, anderson_rubin=pd.concat([sets(irf), sets(irf)]))


# --- figures --------------------------------------------------------------------------------


def named(axis):
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def edges(area):
    """Lower and upper ends of a filled band at each horizon."""
    points = area.get_paths()[0].vertices
    return [points[np.isclose(points[:, 0], h), 1][[0, 1]] for h in range(H)]


def test_panels_show_the_numbers(irf):
    words = {"unit": "quarters", "units": {"gov": "%"}, "impulses": {"oil": "dearer oil"}}
    words |= {"estimator": "least squares", "sets_level": 0.8}
    figure = replace(irf, anderson_rubin=sets(irf)).plot(0.9, prior=True, **words)
    panel = figure.axes[2]  # gov to news
    table = irf.select("gov", "news").to_dataframe(0.9)
    there = named(panel)
    assert list(there) == [
        *("prior, 90% pointwise", "paths of the prior"),
        *("90% simultaneous (sup-t)", "90% pointwise", "68% pointwise"),
        *("Anderson-Rubin, 80% pointwise", "posterior mean", "least squares"),
    ]
    np.testing.assert_allclose(there["posterior mean"].get_ydata(), table["mean"])
    np.testing.assert_allclose(there["least squares"].get_ydata(), table["estimate"])
    lower = there["Anderson-Rubin, 80% pointwise"].get_ydata()
    np.testing.assert_allclose(lower, -1 - np.arange(H))
    for label, name in (("90% simultaneous (sup-t)", "joint"), ("90% pointwise", "pointwise")):
        for h, ends in enumerate(edges(there[label])):
            expected = table.loc[h, [f"lower_{name}", f"upper_{name}"]]
            assert sorted(ends) == pytest.approx(expected.tolist())
    low, high = panel.get_ylim()
    assert low < min(0, table["lower_joint"].min())
    assert high > table["upper_joint"].max()
    assert panel.get_xlabel() == "horizon (quarters)"
    assert panel.get_ylabel() == "gov (%)"
    assert figure.axes[1].get_title() == "response to dearer oil"
    assert len(panel.texts) == 0  # the sets are bounded


def test_the_priors_band_is_whole_in_its_panel(irf):
    wide = replace(irf, prior_draws=50 * irf.prior_draws)
    for axis in wide.plot(0.9, "pointwise", narrow=None, prior=True).axes:
        low, high = axis.get_ylim()
        ends = [line.get_ydata() for line in axis.lines if line.get_linewidth() == 1.3]
        assert len(ends) == 2
        assert low < min(map(np.min, ends)) < max(map(np.max, ends)) < high


def test_words_of_what_is_not_in_the_figure_are_refused(irf):
    with pytest.raises(ValueError, match=r"units of 'gdpp', which is not here \(gdp, gov, news"):
        irf.plot(units={"gdpp": "%"})
    with pytest.raises(ValueError, match="impulses of 'gdp', which is not here"):
        irf.plot(impulses={"gdp": "a rise"})


def test_median_and_parts_that_are_not_asked_for(irf):
    alone = replace(irf.select(shock="oil"), estimate=None, title="$ a head")
    figure = alone.plot(0.8, "pointwise", ["gov"], narrow=None, line="median")
    assert len(figure.axes) == 1
    assert list(named(figure.axes[0])) == ["80% pointwise", "posterior median"]
    shown = named(figure.axes[0])["posterior median"].get_ydata()
    np.testing.assert_allclose(shown, np.median(irf.draws[:, 1, 1], axis=0))
    assert figure.get_suptitle() == r"\$ a head: response to oil"
    assert figure.axes[0].get_title() == "gov"


def test_infinite_sets_leave_the_panel_and_are_told(irf):
    infinite = sets(irf).assign(lower=-1e6, upper=np.inf)
    axis = replace(irf, anderson_rubin=infinite).plot().axes[0]
    assert [text.get_text() for text in axis.texts] == ["AR set unbounded"]
    some = sets(irf)
    some.loc[some["horizon"].isin([0, 2, 3]), "lower"] = -np.inf
    told = replace(irf, anderson_rubin=some).plot().axes[0].texts[0].get_text()
    assert told == "AR set unbounded at 0, 2 to 3"
    table = irf.select("gdp", "news").to_dataframe()
    span = table["upper_joint"].max() - min(table["lower_joint"].min(), 0)
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(2 * span * 1.1)  # no finite end is above the bands
    above = max(line.get_ydata().min() for line in axis.lines if line.get_linestyle() == ":")
    assert high < above < np.inf


def test_flat_priors_and_gaps_are_drawn_as_nothing(irf, tmp_path):
    draws = irf.draws.copy()
    draws[..., 2] = np.nan
    flat = np.full((30, 2, 2, H), np.nan)
    figure = replace(irf, draws=draws, prior_draws=flat).plot(prior=True, kind="quantile")
    assert "prior, 90% pointwise" not in named(figure.axes[0])
    assert np.isfinite(figure.axes[0].get_ylim()).all()
    figure.savefig(tmp_path / "gaps.svg")


@pytest.mark.parametrize(
    ("R", "S", "panels"), [(1, 1, 1), (3, 1, 3), (4, 1, 4), (5, 1, 6), (2, 4, 9)]
)
def test_every_number_of_panels_is_drawn(R, S, panels, tmp_path):
    draws = np.random.default_rng(1).standard_normal((60, R, S, 1))
    names = tuple(f"a response of a long name, {r}" for r in range(R))
    found = ImpulseResponse(draws, names, tuple(f"e{s}" for s in range(S)), (0,))
    figure = found.plot(narrow=None)
    assert len(figure.axes) == panels
    assert sum(axis.axison for axis in figure.axes) == R * S
    figure.savefig(tmp_path / "figure.png", dpi=40)


# --- sums, contrasts, coupling ----------------------------------------------------------------


def two_by_two(**fields):
    draws = np.random.default_rng(5).standard_normal((200, 2, 2, 3))
    words = {"responses": ("y", "g"), "shocks": ("a", "b"), "horizons": (0, 1, 2)}
    return ImpulseResponse(draws, **words | fields)


def test_responses_of_sums_are_divided_as_they_are_and_not_summed_again():
    plain = two_by_two()
    summed = plain.cumulative()
    assert summed.cumulated
    np.testing.assert_allclose(
        summed.multiplier("y", "g").draws, plain.multiplier("y", "g").draws, rtol=1e-12
    )
    with pytest.raises(ValueError, match="are of sums already"):
        summed.cumulative()


def test_difference_is_draw_by_draw():
    found = two_by_two()
    gap = found.difference("a", "b")
    assert gap.shocks == ("a less b",)
    np.testing.assert_array_equal(gap.draws[:, :, 0], found.draws[:, :, 0] - found.draws[:, :, 1])
    with pytest.raises(ValueError, match="shock 'c'"):
        found.difference("a", "c")


def test_statements_across_responses_need_coupled_draws():
    found = two_by_two(coupled=False)
    with pytest.raises(ValueError, match="a multiplier needs draws of all responses together"):
        found.multiplier("y", "g")
    with pytest.raises(ValueError, match="a band over all responses needs draws"):
        found.bands(over="all")
    assert len(found.bands()) == 12
