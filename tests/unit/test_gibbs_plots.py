"""Figures of a calibration say what its numbers say; so do the intervals beside it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
import xarray as xr
from scipy.stats import binom, norm

import hakari.inference as hi
from hakari.inference.gibbs import plots
from hakari.inference.gibbs.bootstrap import draw_weights
from hakari.inference.gibbs.rival_intervals import Rival, dependent_variance, sandwich_rival
from hakari.report import svg

N, REPLICATES = 150, 200


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(4)
    x, e = rng.standard_normal((2, N))
    group = np.repeat(np.arange(30), 5)
    shared = rng.standard_normal(30)[group]
    return {"y": 1 + 2 * x + (1 + 0.5 * np.abs(x)) * e + shared, "x": x + shared, "g": group}


@pytest.fixture(scope="module")
def gibbs(table):
    return hi.GibbsPosterior.from_formula(hi.losses.squared(), "y ~ 1 + x", table, clusters="g")


@pytest.fixture(scope="module")
def cal(gibbs):
    return hi.calibrate(gibbs, 0.9, replicates=REPLICATES, seed=1)


def labels(axis):
    return axis.get_legend_handles_labels()[1]


# --- coverage -------------------------------------------------------------------------------


def test_the_curve_is_the_share_of_data_sets_covered(cal):
    left, _ = plots.coverage(cal).axes
    assert labels(left) == ["95% by chance", "as the level says", "Intercept", "x"]
    for found, line in zip(cal.found, left.lines[1:3], strict=True):
        level, share = line.get_data()
        np.testing.assert_allclose(share, [np.mean(found.ranks <= c) for c in level], atol=1e-12)
        at = np.argmin(np.abs(level - 0.9))
        assert share[at] == pytest.approx(0.9, abs=1.5 / REPLICATES)
    assert list(left.lines[3].get_xdata()) == [0.9, 0.9]


def test_the_bands_hold_95_percent_of_what_chance_does(cal):
    left, right = plots.coverage(cal).axes
    band = left.collections[0].get_paths()[0].vertices
    at = band[np.isclose(band[:, 0], 0.5), 1]
    wanted = binom.ppf([0.025, 0.975], REPLICATES, 0.5) / REPLICATES
    assert (at.min(), at.max()) == pytest.approx(tuple(wanted))
    span = right.patches[0].get_bbox()
    wanted = binom.ppf([0.025, 0.975], REPLICATES, 1 / plots.BINS) * plots.BINS / REPLICATES
    assert (span.y0, span.y1) == pytest.approx(tuple(wanted))


def test_the_histogram_counts_the_ranks(cal):
    _, right = plots.coverage(cal).axes
    for found, steps in zip(cal.found, right.patches[1:], strict=True):
        shown = steps.get_data().values * REPLICATES / plots.BINS
        assert shown.sum() == pytest.approx(REPLICATES)
        assert shown[0] == pytest.approx((found.ranks < 1 / plots.BINS).sum())


def test_regions_past_the_palette_are_one_entry(cal):
    more = tuple(
        replace(cal.found[1], region=replace(cal.found[1].region, label=f"x{k}")) for k in range(8)
    )
    left, _ = plots.coverage(replace(cal, found=more)).axes
    assert labels(left)[2:] == ["x0", "x1", "x2", "x3", "x4", "3 more"]
    assert len(left.lines) == 1 + 8 + 1


def test_plot_of_a_calibration_is_that_figure(cal):
    assert svg(cal.plot()) == svg(plots.coverage(cal))
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_a_calibration_in_words(cal):
    said = str(replace(cal, notes=("look twice",)))
    assert said.startswith("squared: 90% regions cover in 200 multinomial data sets at\n")
    row = next(line for line in said.splitlines() if line.startswith("x"))
    assert float(row.split()[1]) == pytest.approx(cal.rates.loc["x", "rate"], rel=5e-3)
    assert said.endswith(f"method cloud: {cal.why}\nnote: look twice")


# --- before and after -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def draws():
    noise = np.random.default_rng(1).standard_normal((2, 3, 500))
    return {"x": 2 + 0.1 * noise[0]}, {"x": 2.05 + noise[1]}


def bars(axis):
    return [tuple(line.get_xdata()) for line in axis.lines if line.get_linewidth() == 2.2]


def test_densities_and_intervals(draws):
    before, after = draws
    rival = Rival("Koenker", ("a", "x"), np.array([9, 2.0]), np.array([9, 1]), np.array([9, 3.5]))
    figure = plots.before_and_after(before, after, ["x"], 0.8, [rival])
    (axis,) = figure.axes
    assert labels(axis) == ["learning rate 1", "calibrated", "Koenker"]
    assert axis.get_xlabel() == "coefficient of x"
    ends = [tuple(np.quantile(part["x"], [0.1, 0.9])) for part in draws]
    assert bars(axis) == [pytest.approx(ends[0]), pytest.approx(ends[1]), (1, 3.5)]
    heights = [line.get_ydata() for line in axis.lines[:2]]
    assert [h.max() for h in heights] == pytest.approx([1, 1])
    grid, height = axis.lines[1].get_data()
    assert grid[height.argmax()] == pytest.approx(2.05, abs=0.3)
    near = np.abs(grid - 2.05) < 2
    assert height[near] == pytest.approx(np.exp(-((grid[near] - 2.05) ** 2) / 2), abs=0.12)


def test_a_rival_outside_the_densities_is_not_cut_off(draws):
    far = Rival("far", ("x",), np.array([40.0]), np.array([39.0]), np.array([41.0]))
    (axis,) = plots.before_and_after(*draws, ["x"], rivals=[far]).axes
    assert axis.get_xlim()[1] >= 41


def test_results_of_sample_are_drawn_like_arrays(draws):
    trees = []
    for part in draws:
        theta = part["x"][:, :, None]
        dataset = xr.Dataset(
            {"theta": (("chain", "draw", "coefficient"), theta)}, {"coefficient": ["x"]}
        )
        trees.append(xr.DataTree.from_dict({"/posterior": dataset}))
    shown = plots.before_and_after(*trees, ["x"])
    assert svg(shown) == svg(plots.before_and_after(*draws, ["x"]))
    with pytest.raises(ValueError, match="no coefficient 'z': there are x"):
        plots.before_and_after(*trees, ["z"])


def test_draws_that_repeat_do_not_look_like_modes():
    few = np.random.default_rng(1).standard_normal((2, 60))
    (axis,) = plots.before_and_after({"x": few}, {"x": np.repeat(few, 30, axis=1)}, ["x"]).axes
    height = axis.lines[1].get_ydata()
    peaks = (height[1:-1] > height[:-2]) & (height[1:-1] > height[2:])
    assert peaks.sum() <= 2


# --- the sandwich's intervals ---------------------------------------------------------------


def fitted(table, **options):
    X = sm.add_constant(table["x"])
    return sm.OLS(table["y"], X).fit(**options)


@pytest.mark.parametrize("bootstrap", ["multinomial", "cluster"])
def test_sandwich_intervals_are_statsmodels(gibbs, table, bootstrap):
    """HC0; with clusters summed over them and without their small-sample factor."""
    options = {"cov_type": "HC0"}
    if bootstrap == "cluster":
        kinds = {"groups": table["g"], "use_correction": False}
        options = {"cov_type": "cluster", "cov_kwds": kinds}
    theirs = fitted(table, **options)
    ours = sandwich_rival(gibbs, 0.8, bootstrap)
    np.testing.assert_allclose(ours.estimate, theirs.params, rtol=1e-8)
    wanted = theirs.params[1] + norm.ppf([0.1, 0.9]) * theirs.bse[1]
    assert ours.ends("x") == pytest.approx(tuple(wanted), rel=1e-6)


def test_variance_of_blocks_is_that_of_their_bootstrap():
    rng, n, block = np.random.default_rng(3), 60, 6
    scores = np.cumsum(rng.standard_normal((n, 2)), axis=0)
    found = dependent_variance(scores, None, block)
    centred = scores - scores.mean(axis=0)
    direct = np.zeros((2, 2))
    for t in range(n):
        for k in range(n):
            weight = (1 - k / n) * (1 - 1 / block) ** k + (k / n) * (1 - 1 / block) ** (n - k)
            direct += weight * np.outer(centred[t], centred[(t + k) % n])
    np.testing.assert_allclose(found, direct, rtol=1e-10)
    weights = draw_weights("block", n, 20_000, rng, block=block)
    drawn = np.cov((weights.astype(float) @ scores).T)
    np.testing.assert_allclose(np.diag(found), np.diag(drawn), rtol=0.05)


def test_blocks_of_one_row_are_independent_rows(gibbs):
    one = sandwich_rival(gibbs, 0.9, "block", 1)
    np.testing.assert_allclose(one.lower, sandwich_rival(gibbs, 0.9).lower, rtol=1e-10)
