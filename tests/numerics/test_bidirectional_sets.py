"""Anderson-Rubin sets of both effects: coverage, closed forms, brute force, units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.path import Path
from numpy.testing import assert_allclose
from scipy.stats import chi2

from hakari.inference.bidirectional.confidence_set import confidence_set
from hakari.inference.bidirectional.orthogonal_moments import MomentSums, anderson_rubin
from hakari.inference.bidirectional.structure import reduced_covariance
from hakari.inference.sampling import generator
from tests.bidirectional_designs import (
    EFFECTS,
    blurred,
    reduced,
    shocks,
    sums_of,
    system,
    two_regimes,
)

# --- the set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["normal", "chi-square"])
@pytest.mark.parametrize("strength", [1.0, 0.15, 0.0])
def test_coverage_is_nominal_however_weak(strength, law):
    """400 samples at 90%: the truth and its mirror, within three binomial errors."""
    n, repeats = 1000, 400
    rows = system(n, strength=strength, law=law)
    k, draw = blurred(rows), generator(9, f"{law} {strength}")
    critical, covered = chi2.ppf(0.9, 2), 0
    for _ in range(repeats):
        eps = np.stack([rows.s1, rows.s2]) * shocks(law, n, draw)
        sums = sums_of(reduced(eps, rows.s1, rows.s2, rows.x), k)
        covered += anderson_rubin(sums, *EFFECTS) <= critical
    assert abs(covered / repeats - 0.9) < 3 * np.sqrt(0.09 / repeats)


def test_projections_are_those_of_a_fine_grid():
    own = sums_of(system(400, strength=0.7))
    found = confidence_set(own, 0.9)
    assert found.kind == "bounded"
    (a,), (b,) = found.a, found.b

    def around(lo, hi):
        """Dense at both ends, to 5e-4 of the width."""
        near = (hi - lo) * np.linspace(-0.02, 0.02, 81)
        return np.concatenate([lo + near, np.linspace(lo, hi, 201), hi + near])

    grid = np.meshgrid(around(*a), around(*b))
    inside = anderson_rubin(own, *grid) <= chi2.ppf(0.9, 2)
    for (lo, hi), values in zip((a, b), grid, strict=True):
        assert_allclose(
            (values[inside].min(), values[inside].max()), (lo, hi), atol=1e-3 * (hi - lo)
        )


def test_vertices_are_critical_and_membership_is_exact():
    own = sums_of(system(400, strength=0.7))
    found = confidence_set(own)
    (polygon,) = found.pieces
    assert_allclose(anderson_rubin(own, *polygon.T), found.critical, rtol=1e-6)
    a, b = polygon.mean(axis=0)
    assert found.contains(a, b)
    assert found.contains(1 / b, 1 / a)
    assert not found.contains(a + 1, b)
    assert found.text.startswith("95% Anderson-Rubin set with |ab| ≤ 1: a from 0.")


@pytest.mark.parametrize("copies", [10**p for p in range(8, 15)])
def test_a_narrow_set_is_the_ellipse_of_wald(copies):
    """Exact regimes, every row many times: the projections are a ± √χ² times the standard error."""
    one = MomentSums.of(*two_regimes())
    own = MomentSums(8 * copies, 8.0 * copies, one.first * copies, one.second * copies)
    found, solution = confidence_set(own), own.solve()
    assert found.kind == "bounded"
    reach = np.sqrt(found.critical) * np.array(solution.std_error)
    for (lo, hi), centre, half in zip((*found.a, *found.b), EFFECTS, reach, strict=True):
        assert_allclose((lo, hi), (centre - half, centre + half), atol=3e-4 * half, rtol=0)


def test_a_constant_ratio_leaves_a_curve_without_end():
    """(1 + ab) w12 = b w11 + a w22: moments that move together hold on all of it."""
    rows = system(500, strength=0.0)
    own = sums_of(rows)
    w12, w11, w22 = own.first.reshape(3, 2)[:, 0]
    a = np.concatenate([-np.logspace(6, -3, 60), np.logspace(-3, 6, 60)])
    b = (a * w22 - w12) / (a * w12 - w11)
    found = confidence_set(own)
    assert found.df == 1
    assert found.contains(a, b).all()
    assert (anderson_rubin(own, a, b) < 1e-6).all()
    assert (found.kind, found.edges) == ("unbounded", ("ab = -1",))
    end = np.sqrt(w11 / w22)  # where the curve meets ab = −1
    assert found.a[0][0] < -end < end < found.a[0][1]
    assert "it reaches ab = -1" in found.text


def test_the_curve_of_the_population_stays_in_the_set_with_estimated_instruments():
    """Pointwise the statistic is chi-square on the curve: 90% of samples cover each point."""
    n, repeats = 500, 300
    rows = system(n, strength=0.0)
    k, draw = blurred(rows), generator(10, "curve")
    (w11, w12), (_, w22) = reduced_covariance(*EFFECTS, 1.0, 1.0)
    a = np.array([-1e3, -0.6, 0.1, 0.9, 50.0])
    b = (a * w22 - w12) / (a * w12 - w11)
    covered = np.zeros(5)
    for _ in range(repeats):
        eps = np.stack([rows.s1, rows.s2]) * draw.standard_normal((2, n))
        sums = sums_of(reduced(eps, rows.s1, rows.s2, rows.x), k)
        covered += anderson_rubin(sums, a, b) <= chi2.ppf(0.9, 2)
    assert (np.abs(covered / repeats - 0.9) < 3.5 * np.sqrt(0.09 / repeats)).all()


CASES = [  # n, strength, effects, a common shock that is centred away, seed
    (400, 1.0, EFFECTS, False, 1),
    (60, 0.1, EFFECTS, False, 2),
    (60, 1.5, (-0.7, 0.3), True, 3),
    (150, 0.5, (1.2, 0.5), True, 4),
    (30, 1.5, (3.0, -0.3), False, 5),
    (30, 0.1, (0.2, 0.1), True, 6),
]


@pytest.mark.parametrize(("n", "strength", "effects", "centred", "seed"), CASES)
def test_polygons_hold_what_the_statistic_accepts(n, strength, effects, centred, seed):
    """Points all over |ab| ≤ 1: in a polygon if and only if not rejected, but for its edges."""
    rows = system(n, strength, effects=effects, seed=seed)
    own = sums_of(rows, blurred(rows, seed=seed), constant_covariance=centred)
    own = own.centred() if centred else own
    found = confidence_set(own, 0.9)
    scale = own.standard.scale
    s, t = generator(seed, "points").uniform(-np.pi / 2, np.pi / 2, (2, 4000))
    angles = np.column_stack([(s + t) / 2, (s - t) / 2])
    a, b = scale * np.tan(angles[:, 0]), np.tan(angles[:, 1]) / scale
    drawn = np.zeros(4000, dtype=bool)
    for polygon in found.pieces:
        corners = np.arctan(polygon * [1 / scale, scale])
        drawn |= Path(corners).contains_points(angles)
    accepted = found.contains(a, b)
    clear = np.abs(anderson_rubin(own, a, b) / found.critical - 1) > 0.03
    assert (drawn == accepted)[clear].all()
    for value, intervals in ((a, found.a), (b, found.b)):
        inside = np.any([(lo <= value) & (value <= hi) for lo, hi in intervals], axis=0)
        assert inside[accepted & clear].all()


@pytest.mark.parametrize("c", [1e-5, 40.0])
def test_units_move_the_set_with_the_effects(c):
    rows = system(200, strength=0.4)
    own, other = (
        confidence_set(MomentSums.of(f * rows.W1, rows.W2, blurred(rows))) for f in (1.0, c)
    )
    assert own.kind == other.kind
    assert_allclose(other.a, np.multiply(own.a, c), rtol=1e-6)
    assert_allclose(other.b, np.divide(own.b, c), rtol=1e-6)


def test_a_set_across_minus_one_shows_its_mirror_on_the_other_side():
    """(3, −0.3) is near ab = −1: what lies beyond is the mirror of what lies across."""
    found = confidence_set(sums_of(system(2000, effects=(3.0, -0.3))))
    assert (found.kind, found.edges) == ("unbounded", ("ab = -1",))
    assert len(found.a) == 2
    (low, _), (_, high) = found.a
    assert found.contains(*found.sums.solve().estimate)
    assert low < 0 < high


def test_instruments_that_disagree_leave_an_empty_set():
    rows = system(3000, seed=3)
    tilt = np.sign(rows.x[:, 1])
    shared = generator(3, "shared").standard_normal(3000)
    wrong = replace(rows, W1=rows.W1 + 2 * shared, W2=rows.W2 + 2 * tilt * shared)
    found = confidence_set(sums_of(wrong, np.column_stack([rows.k, rows.x])))
    assert (found.kind, found.a, found.pieces) == ("empty", (), ())
    assert "no effects agree with all instruments" in found.text
    assert not found.contains(*EFFECTS)


def signed_sums(size):
    """Two instruments whose products with W1 W2 have the mean size, with W1² and W2² none."""
    mean = np.array([size, size, 0.0, 0.0, 0.0, 0.0])
    return MomentSums(100, 100.0, 100 * mean, 100 * (np.eye(6) + np.outer(mean, mean)))


def test_a_set_around_infinity_is_the_outside_of_a_circle():
    """n 2m²/(1 + u² + v² + 2m²) ≤ c: small effects are rejected, infinite ones are not."""
    own = signed_sums(0.5)
    found = confidence_set(own)
    assert found.kind == "unbounded"
    assert found.edges == ("ab = 1", "ab = -1", "infinite effects")
    assert found.a == found.b == ((-np.inf, np.inf),)
    a, b = generator(14, "circle").normal(0, 2, (2, 500))
    u, v = b / (1 + a * b), a / (1 + a * b)
    outside = 1 + u**2 + v**2 >= 0.5 * (100 / found.critical - 1)
    assert (found.contains(a, b) == outside).all()
    assert 0.2 < outside.mean() < 0.9


def test_moments_that_say_nothing_leave_everything():
    found = confidence_set(signed_sums(0.01))
    assert (found.kind, found.a, found.b) == ("all", ((-np.inf, np.inf),), ((-np.inf, np.inf),))
    assert "everything, the variances say nothing" in found.text


# --- a triangular system: Fieller's quadratic ------------------------------------------------


def of_one_instrument(top, bottom, spread):
    """Sums in which k W1 W2 has the mean top, k W2² bottom, and their errors the spread."""
    mean = np.array([top, 1.0, bottom])
    second = np.eye(3) + np.outer(mean, mean)
    second[0, 0], second[2, 2] = top**2 + spread, bottom**2 + spread
    return MomentSums(100, 100.0, 100 * mean, 100 * second)


@pytest.mark.parametrize(
    ("top", "bottom", "kind"),
    [(1.0, 2.0, "bounded"), (1.0, 0.05, "unbounded"), (0.05, 0.05, "all")],
)
def test_one_instrument_solves_the_quadratic(top, bottom, kind):
    own = of_one_instrument(top, bottom, 1.0)
    found = confidence_set(own, restrict="b=0")
    assert found.kind == kind
    # n (top − a bottom)² ≤ c ((top − a bottom)² + 1 + a²), a quadratic in a
    share = 100 - found.critical
    level, slope, bend = (
        share * top**2 - found.critical,
        -2 * share * top * bottom,
        share * bottom**2 - found.critical,
    )
    ends = np.sort(np.roots([bend, slope, level]))
    if kind == "bounded":
        assert_allclose(found.a, [ends], rtol=1e-9)
    elif kind == "unbounded":
        assert_allclose(found.a, [(-np.inf, ends[0]), (ends[1], np.inf)], rtol=1e-9)
    else:
        assert np.iscomplexobj(ends)
        assert found.a == ((-np.inf, np.inf),)
    assert found.contains(top / bottom, 0.0)
    assert not found.contains(top / bottom, 0.1)


def test_the_other_restriction_is_the_other_effect():
    rows = system(300, effects=(0.0, 0.6))
    found = confidence_set(sums_of(rows), restrict="a=0")
    turned = confidence_set(MomentSums.of(rows.W2, rows.W1, rows.k), restrict="b=0")
    assert_allclose(found.b, turned.a, rtol=1e-9)
    assert found.a == ((0.0, 0.0),)
    assert found.text.startswith("95% Anderson-Rubin set given a=0: b from 0.")


def test_a_level_outside_its_range_is_named():
    with pytest.raises(ValueError, match="level 95 must lie between 0 and 1"):
        confidence_set(sums_of(system(50)), level=95)
