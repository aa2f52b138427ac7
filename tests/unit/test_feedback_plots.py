"""Figures of two effects draw what their numbers say; ratios of variances have a level."""

import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.path import Path as Outline
from scipy.stats import norm

from hakari.inference.bidirectional.drift import Alarm
from hakari.inference.bidirectional.effects_plane import effects_plane, mirrored
from hakari.inference.bidirectional.orthogonal_moments import MomentSums
from hakari.inference.bidirectional.plots import estimates_path, variance_ratio
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.bidirectional.study import Study, find
from hakari.inference.bidirectional.variance_ratio import (
    RatioCurve,
    level,
    ratio_curves,
    regime_ratios,
)
from hakari.inference.sampling import generator
from hakari.report import svg


def outcomes(n, strength, seed, a=0.5, b=0.4, names=("p", "q")):
    """Outcomes whose log variances are ± strength (2x - 1), and covariates x, and z without use."""
    draw = generator(seed, "feedback")
    x, z = draw.uniform(size=(2, n))
    e1, e2 = draw.standard_normal((2, n)) * np.exp(strength / 2 * np.stack([2 * x - 1, 1 - 2 * x]))
    d = 1 - a * b
    return dict(zip(names, ((e1 + a * e2) / d + x, (e2 + b * e1) / d - x), strict=True)) | {
        "x": x,
        "z": z,
    }


def asked(data, **more):
    return find(Study(data, "p", "q", ("x", "z"), features=20, **more))


@pytest.fixture(scope="module")
def strong():
    return asked(outcomes(4000, 1.5, 1))


@pytest.fixture(scope="module")
def flat():
    found = asked(outcomes(2000, 0.0, 9))
    assert not found.identification.identified
    assert found.set.kind == "unbounded"
    return found


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def polygons(axis):
    return [patch.get_xy() for patch in axis.patches]


# --- the plane ------------------------------------------------------------------------------


def test_roots_and_set_are_drawn_where_they_are(strong):
    left, right = effects_plane(strong.effects).axes
    assert left.get_xlabel() == "a: effect of q on p"
    assert left.get_ylabel() == "b: effect of p on q"
    points = {line.get_label(): line.get_xydata() for line in left.lines if len(line.get_xydata())}
    assert points["reported: |ab| < 1"][0] == pytest.approx(strong.effects.estimate)
    assert points["the other root"][0] == pytest.approx(strong.effects.other_root)
    (low, high), (below, above) = left.get_xlim(), left.get_ylim()
    (a_low, a_high), (b_low, b_high) = strong.set.a[0], strong.set.b[0]
    assert low < a_low < a_high < high
    assert below < b_low < b_high < above
    assert "mirror" in right.get_title()
    assert right.get_xlim()[0] < strong.effects.other_root[0] < right.get_xlim()[1]


@pytest.mark.parametrize("name", ["strong", "flat"])
def test_shaded_is_what_the_statistic_does_not_reject(name, request):
    """In every panel, by the exact membership of points that are not on an edge."""
    found = request.getfixturevalue(name)
    draw = generator(3, "points")
    for axis in effects_plane(found.effects).axes:
        low, high = np.transpose([axis.get_xlim(), axis.get_ylim()])
        points = low + draw.uniform(0.01, 0.99, (4000, 2)) * (high - low)
        near = (high - low) * 3e-3
        grid = [points + near * step for step in [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]]
        inside = np.array([found.set.contains(*at.T) for at in grid])
        sure = inside.all(axis=0) | ~inside.any(axis=0)
        drawn = np.any([Outline(xy).contains_points(points) for xy in polygons(axis)], axis=0)
        assert sure.mean() > 0.8
        assert inside[0][sure].any()
        np.testing.assert_array_equal(drawn[sure], inside[0][sure])


def test_without_an_answer_no_root_is_drawn_and_the_cut_is_told(flat):
    figure = effects_plane(flat.effects)
    (axis,) = figure.axes
    assert axis.get_title() == "cut at the frame"
    assert "|ab| = 1" in labels(figure)
    assert not any("root" in text or "reported" in text for text in labels(figure))


def test_the_level_is_in_the_legend_and_widens_the_set(strong):
    wide, narrow = (effects_plane(strong.effects, share) for share in (0.99, 0.5))
    assert "99% Anderson-Rubin set" in labels(wide)
    outer, inner = (np.ptp(polygons(figure.axes[0])[0], axis=0) for figure in (wide, narrow))
    assert (outer > 2 * inner).all()


def test_a_triangular_set_is_a_line(strong):
    found = asked(outcomes(3000, 1.5, 2, b=0.0), restrict="b=0")
    (axis,) = effects_plane(found.effects).axes
    line = next(one for one in axis.lines if "set" in one.get_label())
    assert line.get_xdata() == pytest.approx(found.set.a[0])
    assert list(line.get_ydata()) == [0.0, 0.0]


def test_the_mirror_as_answer_is_marked_in_its_panel():
    found = asked(outcomes(3000, 1.5, 1), root="mirror")
    figure = effects_plane(found.effects)
    assert "reported: |ab| > 1" in labels(figure)
    at = next(x for x in figure.axes[1].lines if x.get_label().startswith("reported"))
    assert at.get_xydata()[0] == pytest.approx(found.effects.estimate)
    assert np.prod(found.effects.estimate) > 1


def test_a_mirror_of_a_mirror_is_the_piece():
    square = np.array([[0.5, 0.2], [0.6, 0.2], [0.6, 0.3], [0.5, 0.3]])
    (once,) = mirrored(square, np.array([1e-3, 1e-3]))
    np.testing.assert_allclose(once, 1 / square[:, ::-1])
    (twice,) = mirrored(once, np.array([1e-3, 1e-3]))
    np.testing.assert_allclose(twice, square, rtol=1e-12)


def test_a_piece_over_an_axis_has_its_mirror_on_both_sides_of_infinity():
    piece = np.array([[0.5, -0.1], [0.6, -0.1], [0.6, 0.2], [0.5, 0.2]])
    above, below = mirrored(piece, np.array([1e-3, 1e-2]))
    assert (above[:, 0].min(), above[:, 0].max()) == pytest.approx((5, 100))
    assert (below[:, 0].min(), below[:, 0].max()) == pytest.approx((-100, -10))
    for part in (above, below):
        assert (part[:, 1].min(), part[:, 1].max()) == pytest.approx((1 / 0.6, 2))


# --- the variances' ratio -------------------------------------------------------------------


def test_the_curve_is_the_ratio_that_the_shocks_were_drawn_with():
    """log s1² - log s2² = 2 · 1.5 (2x - 1), level included."""
    found = asked(outcomes(30_000, 1.5, 4))
    curve, other = found.ratios
    assert (curve.covariate, other.covariate) == ("x", "z")
    assert other.range < 0.2
    truth = 3 * (2 * curve.values - 1)
    assert np.abs(curve.log_ratio - truth).max() < 0.2
    for side in (curve.low, curve.high):  # z is left out of the features: all rows are alike
        np.testing.assert_allclose(side, curve.log_ratio, atol=1e-9)


def test_a_curve_is_the_mean_over_rows_with_one_covariate_set():
    found = asked(outcomes(3000, 1.0, 4), length_scale="1.5")
    nuisance, sums = found.model.nuisance, found.effects.evidence.sums
    rows = found.sample.cut(0, 150)
    curves = {c.covariate: c for c in ratio_curves(nuisance, sums, (0.5, 0.4), rows, ("x", "z"))}
    curve = curves["z"]
    X = rows.X.copy()
    X[:, 1] = curve.values[7]
    phi = nuisance.basis.transform(X).astype(float)
    one, two = (phi @ nuisance.variances.coefficients[-1]).T
    h = one - two + np.log(nuisance.unit[0] ** 2 / nuisance.unit[1] ** 2)
    wanted = h + level(sums, (0.5, 0.4))
    assert curve.log_ratio[7] == pytest.approx(wanted.mean(), abs=1e-4)
    assert curve.low[7] == pytest.approx(np.quantile(wanted, 0.1), abs=1e-4)
    assert curve.high[7] == pytest.approx(np.quantile(wanted, 0.9), abs=1e-4)
    assert curves["x"].range > curve.range


def test_the_level_makes_both_standardised_shocks_one():
    draw = generator(5, "level")
    W, k = draw.standard_normal((500, 2)) * [1, 3], np.exp(draw.standard_normal((500, 2)))
    sums = MomentSums.of(*W.T, np.column_stack([k, k[:, 0]]), constant_covariance=True)
    a, b = 0.3, -0.7
    first, second = W[:, 0] - a * W[:, 1], W[:, 1] - b * W[:, 0]
    wanted = np.log(np.mean(k[:, 0] * first**2) / np.mean(k[:, 1] * second**2))
    assert level(sums, (a, b)) == pytest.approx(wanted, rel=1e-10)


def test_regimes_are_their_mean_squares():
    draw = generator(6, "regimes")
    W, g = draw.standard_normal((300, 2)), draw.integers(0, 2, 300)
    W[g == 1] *= [3, 1]
    sums = MomentSums.of(*W.T, np.eye(2)[g], constant_covariance=True)
    a, b = 0.2, 0.1
    found = regime_ratios(("calm", "wild"), sums, (a, b))
    e1, e2 = W[:, 0] - a * W[:, 1], W[:, 1] - b * W[:, 0]
    for r in range(2):
        one, two = e1[g == r] ** 2, e2[g == r] ** 2
        assert found.log_ratio[r] == pytest.approx(np.log(one.mean() / two.mean()), rel=1e-10)
        score = one / one.mean() - two / two.mean()
        error = np.sqrt((score**2).sum()) / len(score)
        assert found.std_error[r] == pytest.approx(error, rel=1e-10)
    (axis,) = variance_ratio(found, ("p", "q")).axes
    assert axis.containers[0].lines[0].get_ydata() == pytest.approx(found.log_ratio)
    assert [t.get_text() for t in axis.get_xticklabels()] == ["calm", "wild"]


def test_the_figure_draws_the_curve():
    at = np.linspace(0, 1, 20)
    (axis,) = variance_ratio(RatioCurve("x", at, at**2, at - 1, at + 1), ("p", "q")).axes
    np.testing.assert_array_equal(axis.lines[0].get_xydata(), np.stack([at, at**2], axis=1))
    assert axis.get_xlabel() == "x"
    assert axis.get_ylabel() == "log variance, shocks of p\nless that of q"
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (-1, 2)


# --- along the stream -----------------------------------------------------------------------


def test_the_path_has_estimates_intervals_and_the_alarm():
    rows = np.array([1e3, 2e3, 4e3])
    path = pd.DataFrame({"rows": rows, "a": [0.4, 0.5, 0.5], "b": [-0.2, -0.1, -0.1]})
    path = path.assign(std_error_a=[0.1, 0.05, 0.02], std_error_b=[0.1, 0.1, 0.1])
    panels = estimates_path(path, ("p", "q"), Alarm(2500, 0.01), 0.9).axes
    for axis, name, label in zip(panels, "ab", ("q\non p", "p\non q"), strict=True):
        np.testing.assert_array_equal(axis.lines[0].get_xydata(), path[["rows", name]])
        assert list(axis.lines[1].get_xdata()) == [2500, 2500]
        assert axis.get_ylabel() == f"effect of {label}"
        band = axis.collections[0].get_paths()[0].vertices
        half = norm.ppf(0.95) * path[f"std_error_{name}"]
        assert band[:, 1].min() == pytest.approx((path[name] - half).min())
        assert band[:, 1].max() == pytest.approx((path[name] + half).max())
    assert "alarm, row 2,500" in panels[0].get_legend_handles_labels()[1]


def test_figures_are_drawn_without_a_window(strong):
    assert svg(effects_plane(strong.effects)).startswith(b"<?xml")
    assert "matplotlib.pyplot" not in sys.modules


def test_curves_need_rows(strong):
    none = Rows(np.empty((0, 2)), np.empty((0, 2)))
    sums = strong.effects.evidence.sums
    with pytest.raises(ValueError, match="no covariates or no rows"):
        ratio_curves(strong.model.nuisance, sums, (0.0, 0.0), none, ("x", "z"))
