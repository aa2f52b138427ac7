"""Priors as typed, and the weak default."""

import numpy as np
import pytest

from hakari.inference import Flat, LinearMoments, Normal, QuasiPosterior, StudentT
from hakari.inference.prior_text import describe_prior, parse_prior, scaled_prior
from hakari.inference.weak_prior import column_spread, weak_prior


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(3)
    z, w, e = rng.standard_normal((3, 400))
    x = 100 + 3 * z + e  # far from zero: the spread must not lose digits
    return {"y": 1000 + 2 * x + w + e, "x": x, "w": w, "z": z, "weight": 1 + rng.random(400)}


@pytest.fixture(scope="module")
def moments(table):
    return LinearMoments.from_formula("y ~ 1 + w + [x ~ z]", table)


def test_weak_is_the_default_and_scaled_by_the_data(moments, table):
    sd = 2.5 * table["y"].std() / table["x"].std()
    (prior,) = parse_prior([], moments)
    assert (prior.mean, prior.names) == (0.0, ["x"])
    assert prior.cov == pytest.approx(sd**2, rel=1e-10)
    assert parse_prior(["weak"], moments) == [prior]


def test_weak_follows_units(table):
    scaled = table | {"x": table["x"] * 1000}
    one, other = (
        weak_prior(LinearMoments.from_formula("y ~ 1 + w + [x ~ z]", t))[0] for t in (table, scaled)
    )
    assert one.cov == pytest.approx(1e6 * other.cov, rel=1e-9)


def test_weak_is_the_same_from_shards_and_without_an_intercept(table):
    for formula in ("y ~ 1 + w + [x ~ z]", "y ~ w + [x ~ z]"):
        whole = LinearMoments.from_formula(formula, table)
        halves = [
            LinearMoments.from_formula(formula, {k: v[part] for k, v in table.items()})
            for part in (slice(0, 150), slice(150, None))
        ]
        expected = [table[name].std() for name in ("y", "x")]
        for one in (whole, halves[0] + halves[1]):
            assert column_spread(one)[[0, -1]] == pytest.approx(expected, rel=1e-9)


def test_weak_takes_weights(table):
    weighted = LinearMoments.from_formula("y ~ 1 + w + [x ~ z]", table, weights="weight")
    mean = np.average(table["x"], weights=table["weight"])
    variance = np.average((table["x"] - mean) ** 2, weights=table["weight"])
    assert column_spread(weighted)[-1] == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_weak_without_endogenous_variables_is_flat(table):
    regression = LinearMoments.from_formula("y ~ 1 + w + x", table)
    assert weak_prior(regression) == Flat()
    assert parse_prior([], regression) == Flat()


def test_weak_needs_regression_moments():
    rng = np.random.default_rng(1)
    general = LinearMoments.from_moments(
        rng.standard_normal((50, 2, 2)), rng.standard_normal((50, 2))
    )
    with pytest.raises(ValueError, match="no y and x to scale"):
        column_spread(general)


def test_normal_takes_a_standard_deviation(moments):
    assert parse_prior(["x=normal(0.1, 0.15)"], moments) == [Normal(0.1, 0.15**2, names=["x"])]
    assert parse_prior(["x = Normal( 0.1,0.15 )"], moments) == [Normal(0.1, 0.15**2, names=["x"])]


def test_student_is_independent_over_coefficients(moments):
    found = parse_prior(["student(4, 0, 2)"], moments)
    assert found == [StudentT(4, 0.0, 4.0, names=[name]) for name in ("Intercept", "w", "x")]


def test_the_general_prior_leaves_the_named_ones_alone(moments):
    found = parse_prior(["normal(0, 10)", "x=student(3, 1, 2)", "w=flat"], moments)
    assert found == [Normal(0.0, 100.0, names=["Intercept"]), StudentT(3, 1.0, 4.0, names=["x"])]
    QuasiPosterior(moments, found)


def test_names_with_signs_in_them(table):
    moments = LinearMoments.from_formula(
        "y ~ 1 + {w == 0} + np.abs(w) + [x ~ z]", table | {"w": np.round(table["w"])}
    )
    name = next(n for n in moments.names.parameters if "abs" in n)
    assert parse_prior([f"{name}=normal(0, 1)"], moments) == [Normal(0.0, 1.0, names=[name])]


def test_flat(moments):
    assert parse_prior(["flat"], moments) == Flat()
    assert parse_prior(["x=flat"], moments) == Flat()


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["gauss(0, 1)"], "is not understood: write weak, flat, normal"),
        (["normal(0)"], "takes 2 finite numbers, here are 1"),
        (["normal(0, inf)"], "takes 2 finite numbers"),
        (["normal(0, b)"], "no number"),
        (["normal(0, 0)"], "the spread 0 must be positive"),
        (["student(0, 0, 1)"], "the degrees of freedom 0 must be positive"),
        (["q=normal(0, 1)"], r"unknown coefficient 'q' \(have Intercept, w, x\)"),
        (["w=weak"], "w is not endogenous"),
        (["flat", "weak"], r"two priors for all coefficients \(flat, weak\)"),
        (["x=flat", "x=weak"], "two priors on 'x'"),
        ([""], "is not understood"),
    ],
)
def test_mistakes(texts, told, moments):
    with pytest.raises(ValueError, match=told):
        parse_prior(texts, moments)


def test_in_words(moments):
    assert describe_prior(Flat()) == "flat on all coefficients"
    assert describe_prior(Normal(0, 4)) == "each coefficient ~ normal(0, sd 2)"
    assert (
        describe_prior(parse_prior(["x=student(4, 1, 2)"], moments))
        == "x ~ student(4 df, 1, scale 2); all others flat"
    )
    matrix = Normal([0, 1], np.diag([1.0, 4.0]), names=["w", "x"])
    assert describe_prior(matrix) == "w, x ~ normal((0, 1), sd (1, 2)); all others flat"


def test_scaling_is_of_standard_deviations():
    assert scaled_prior(Normal(1, 4.0), 3).cov == 36
    assert scaled_prior(StudentT(4, 1, 4.0), 3).scale == 36
    assert scaled_prior(Flat(), 3) == Flat()
    assert scaled_prior([Flat(), Normal(1, 4.0)], 3)[1].cov == 36
