"""First stages and Anderson-Rubin sets against linearmodels, plain numpy on rows, closed forms."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from linearmodels.datasets import card
from linearmodels.iv import IV2SLS
from numpy.testing import assert_allclose
from scipy.stats import chi2
from threadpoolctl import threadpool_limits

from hakari.inference.anderson_rubin import anderson_rubin
from hakari.inference.instruments import (
    effective_critical_value,
    first_stage,
    first_stage_arrays,
    weakness,
)
from hakari.inference.moments import LinearMoments

CONTROLS = "1 + exper + expersq + black + south + smsa"
ONE = f"lwage ~ {CONTROLS} + [educ ~ nearc4]"
OVER = f"lwage ~ {CONTROLS} + [educ ~ nearc2 + nearc4]"
TWO = "lwage ~ 1 + black + south + smsa + [educ + exper ~ nearc2 + nearc4 + age]"
KINDS = ["iid", "robust", "cluster:age", "hac:4"]
INF = np.inf


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring in matrices of this size, above all on shared cores."""
    with threadpool_limits(1):
        yield


@cache
def data():
    return card.load()


def options(kind):
    return {
        "iid": {"cov_type": "unadjusted"},
        "robust": {"cov_type": "robust"},
        "cluster:age": {"cov_type": "clustered", "clusters": data()["age"]},
        "hac:4": {"cov_type": "kernel", "kernel": "bartlett", "bandwidth": 4},
    }[kind]


# --- first stages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "kind", "weights"),
    [*((OVER, kind, None) for kind in KINDS), (TWO, "robust", None), (OVER, "robust", "exper")],
)
def test_first_stage_equals_linearmodels(formula, kind, weights):
    frame = data().assign(exper=data()["exper"] + 1) if weights else data()
    model = IV2SLS.from_formula(formula, frame, weights=frame[weights] if weights else None)
    theirs = model.fit(**options(kind)).first_stage.diagnostics
    textbook = model.fit(cov_type="unadjusted", debiased=True).first_stage.diagnostics
    ours = first_stage(formula, frame, kind, weights=weights)
    for stage in ours.stages:
        q = stage.F_robust.df
        wald = theirs.loc[stage.name, "f.stat"] * (q if kind == "iid" else 1)
        assert stage.partial_r2 == pytest.approx(theirs.loc[stage.name, "partial.rsquared"], 1e-8)
        assert stage.F_robust.value * q == pytest.approx(wald, 1e-8)
        assert stage.F.value == pytest.approx(textbook.loc[stage.name, "f.stat"], 1e-8)
        assert stage.F.p_value == pytest.approx(textbook.loc[stage.name, "f.pval"], 1e-6)
        if kind != "iid":
            assert stage.F_robust.p_value == pytest.approx(theirs.loc[stage.name, "f.pval"], 1e-6)


def residuals(columns, on):
    return columns - on @ np.linalg.lstsq(on, columns, rcond=None)[0]


def rows(formula, endogenous, excluded):
    """y, endogenous and excluded instruments, partialled of the formula's controls by rows."""
    names = formula.split("~")[1].split("[")[0].replace("1 +", "").strip(" +").split(" + ")
    controls = np.column_stack([np.ones(len(data())), data()[names]])
    y, X, Z = (data()[c].to_numpy(float) for c in (["lwage"], endogenous, excluded))
    return *(residuals(a, controls) for a in (y, X, Z)), controls


@pytest.mark.parametrize("kind", ["robust", "cluster:age"])
def test_effective_F_equals_a_direct_computation(kind):
    _, x, Z, controls = rows(OVER, ["educ"], ["nearc2", "nearc4"])
    n = len(x)
    every = np.column_stack([controls, Z])
    v = residuals(x, every)
    scores = every * v
    if kind != "robust":
        scores = pd.DataFrame(scores).groupby(data()["age"].to_numpy()).sum().to_numpy()
    bread = np.linalg.inv(every.T @ every / n)
    V = (bread @ (scores.T @ scores / n) @ bread)[-2:, -2:]
    Q = Z.T @ Z / n
    pi = np.linalg.solve(Z.T @ Z, Z.T @ x)[:, 0]
    VQ = V @ Q
    stage = first_stage(OVER, data(), kind).stages[0]
    trace = np.trace(VQ)
    assert stage.F_effective.value == pytest.approx(n * pi @ Q @ pi / trace, 1e-8)
    largest = np.linalg.eigvals(VQ).real.max()
    K_eff = trace**2 * 21 / (np.trace(VQ @ VQ) + 20 * trace * largest)
    assert stage.F_effective.df == pytest.approx(K_eff, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_effective_F_with_one_instrument_is_robust_F(kind):
    stage = first_stage(ONE, data(), kind).stages[0]
    assert stage.F_effective.value == pytest.approx(stage.F_robust.value, 1e-10)
    assert stage.F_effective.critical == pytest.approx(23.1, abs=0.05)


@pytest.mark.parametrize(("bias", "critical"), [(0.05, 37.42), (0.10, 23.11), (0.20, 15.06)])
def test_critical_values_of_montiel_olea_and_pflueger(bias, critical):
    K_eff, value = effective_critical_value(np.array([[3.0]]), bias)  # (√(1/τ) + 1.645)²
    assert K_eff == pytest.approx(1)
    assert value == pytest.approx(critical, abs=0.005)


def test_effective_degrees_of_freedom_lie_between_one_and_q():
    assert effective_critical_value(np.eye(4))[0] == pytest.approx(4)
    assert effective_critical_value(np.diag([1.0, 1e-9, 1e-9, 1e-9]))[0] == pytest.approx(1)


def test_conditional_F_equals_a_direct_computation():
    excluded = ["nearc2", "nearc4", "age"]
    _, X, Z, controls = rows(TWO, ["educ", "exper"], excluded)
    found = first_stage(TWO, data())
    fitted = Z @ np.linalg.lstsq(Z, X, rcond=None)[0]
    freedom = len(X) - Z.shape[1] - controls.shape[1]
    cragg_donald = IV2SLS.from_formula(TWO, data()).fit().first_stage.cragg_donald_f
    for j, stage in enumerate(found.stages):
        other = 1 - j
        delta = fitted[:, other] @ X[:, j] / (fitted[:, other] @ X[:, other])
        rho = X[:, j] - delta * X[:, other]
        left = residuals(rho, Z)
        direct = (rho @ rho - left @ left) / 2 / (left @ left / freedom)
        assert stage.F_conditional.value == pytest.approx(direct, 1e-8)
        assert (stage.F_conditional.df, stage.F_conditional.df_residual) == (2, freedom)
        assert stage.F_conditional.value * 2 / 3 > cragg_donald  # the weakest combination
        assert np.isnan(stage.F_effective.value)
        assert "here are 2" in stage.F_effective.note


def test_conditional_F_of_one_variable_is_its_F():
    stage = first_stage(OVER, data()).stages[0]
    assert stage.F_conditional == stage.F


@pytest.mark.parametrize("kind", [*KINDS, "hac:auto"])
def test_streams_equal_the_whole(kind):
    frame = data().sort_values("south", ascending=False)  # constant in the first block
    blocks = (frame[start : start + 700] for start in range(0, len(frame), 700))
    whole, stream = first_stage(OVER, frame, kind), first_stage(OVER, blocks, kind)
    assert stream.n == whole.n == 3010
    for name in ("F", "F_robust", "F_effective"):
        a, b = getattr(whole.stages[0], name), getattr(stream.stages[0], name)
        assert b.value == pytest.approx(a.value, 1e-9)


def test_arrays_equal_the_formula():
    names = ["exper", "expersq", "black", "south", "smsa"]
    frame = data().assign(one=1.0)
    found = first_stage_arrays(
        frame[["one", *names, "educ"]].to_numpy(float),
        frame[["one", *names, "nearc4"]].to_numpy(float),
        names=["one", *names, "educ"],
        instrument_names=["one", *names, "nearc4"],
        covariance="cluster",
        clusters=frame["age"],
    )
    expected = first_stage(ONE, data(), "cluster:age").stages[0]
    assert found.instruments == ("nearc4",)
    assert found.stages[0].F_robust.value == pytest.approx(expected.F_robust.value, 1e-10)


def test_weakness_is_one_plain_sentence():
    weak = weakness(first_stage(OVER, data()))
    assert weak.startswith("The instruments are weak for educ (effective F 9.67, below 19.4)")
    assert "leans on the prior" in weak
    assert "conditional F 5.11, below 10" in weakness(first_stage(TWO, data()))
    assert weakness(first_stage("exper ~ 1 + black + [age ~ educ + exper]", data())) is None
    assert weakness(first_stage("lwage ~ 1 + educ", data())) is None
    assert first_stage("lwage ~ 1 + educ", data()).stages == ()


def test_what_cannot_be_computed_says_why():
    frame = data().assign(copy=2 * data()["nearc4"] + data()["black"], three=data()["id"] % 2)
    exact = first_stage("lwage ~ 1 + black + [copy ~ nearc4]", frame).stages[0]
    for test in (exact.F, exact.F_robust, exact.F_effective):
        assert np.isnan(test.value)
        assert "not endogenous" in test.note
    few = first_stage(OVER.replace("nearc4]", "nearc4 + age]"), frame, "cluster:three").stages[0]
    assert np.isnan(few.F_robust.value)
    assert "too few clusters" in few.F_robust.note
    assert np.isfinite(few.F_effective.value)


# --- Anderson and Rubin --------------------------------------------------------------------


def by_rows(beta, y, x, Z, scores):
    """AR(β) from rows; `scores` sums the moments of each group that may be correlated."""
    e = y - x * beta
    m = (Z * e).mean(axis=0)
    if scores == "iid":
        omega = (e**2).mean() * Z.T @ Z / len(Z)
    else:
        g = Z * e
        if scores == "cluster:age":
            g = pd.DataFrame(g).groupby(data()["age"].to_numpy()).sum().to_numpy()
        omega = g.T @ g / len(Z)
    return len(Z) * m @ np.linalg.solve(omega, m)


@pytest.mark.parametrize("kind", ["iid", "robust", "cluster:age"])
@pytest.mark.parametrize(("formula", "excluded"), [(ONE, ["nearc4"]), (OVER, ["nearc2", "nearc4"])])
def test_statistic_and_set_equal_rows(formula, excluded, kind):
    y, x, Z, _ = rows(formula, ["educ"], excluded)
    found = anderson_rubin(LinearMoments.from_formula(formula, data(), kind))
    grid = np.concatenate([np.linspace(-0.5, 0.8, 131), [-1e3, -30, 30, 1e3]])
    expected = np.array([by_rows(beta, y, x, Z, kind) for beta in grid])
    assert_allclose(found.statistic(grid), expected, rtol=1e-8)
    assert found.statistic(INF) == pytest.approx(by_rows(1e9, y, x, Z, kind), 1e-6)
    assert_allclose(found.p_value(grid), chi2.sf(expected, len(excluded)), rtol=1e-7, atol=1e-300)
    inside = np.any([(a <= grid) & (grid <= b) for a, b in found.intervals], axis=0)
    np.testing.assert_array_equal(inside, expected <= chi2.ppf(0.95, len(excluded)))
    assert_allclose(found.statistic(np.array(found.intervals)), found.critical, rtol=1e-9)


def simulate(seed, strength, n=150, excluded=1, beta=0.7):
    rng = np.random.default_rng(seed)
    Z = rng.standard_normal((n, excluded))
    error = rng.standard_normal(n) * np.exp(0.3 * Z[:, 0])
    x = strength * Z[:, 0] + 0.7 * error + 0.7 * rng.standard_normal(n)
    one = np.ones((n, 1))
    return beta * x + error, np.column_stack([one, x]), np.column_stack([one, Z])


def closed_form(y, X, Z):
    """(z'e)² n ≤ c z'z e'e is a quadratic inequality in β; partialled of the constant."""
    y, x, z = (a - a.mean() for a in (y, X[:, 1], Z[:, 1]))
    n, c = len(y), chi2.ppf(0.95, 1) * (z @ z)
    high, low = n * (z @ x) ** 2 - c * (x @ x), n * (z @ y) ** 2 - c * (y @ y)
    middle = -2 * (n * (z @ x) * (z @ y) - c * (x @ y))
    turn = middle**2 - 4 * high * low
    if turn < 0:
        return () if high > 0 else ((-INF, INF),)
    a, b = sorted((-middle + sign * np.sqrt(turn)) / 2 / high for sign in (-1, 1))
    return ((a, b),) if high > 0 else ((-INF, a), (b, INF))


def test_set_of_one_instrument_equals_its_closed_form_bounded_or_not():
    shapes = set()
    for seed in range(24):
        y, X, Z = simulate(seed, strength=0.15 * (seed % 4))
        found = anderson_rubin(LinearMoments.from_arrays(y, X, Z, covariance="iid"))
        expected = closed_form(y, X, Z)
        assert len(found.intervals) == len(expected)
        assert_allclose(found.intervals, expected, rtol=1e-7)
        shapes.add("whole" if "the whole line" in found.describe() else len(expected))
    assert shapes == {1, 2, "whole"}


@pytest.mark.parametrize("seed", range(12))
def test_set_with_many_weak_instruments_equals_a_scan(seed):
    moments = LinearMoments.from_arrays(*simulate(seed, 0.1, n=100, excluded=4))
    found = anderson_rubin(moments, level=0.6)
    beta = found.centre + found.scale * np.tan(np.linspace(-np.pi / 2, np.pi / 2, 4001)[1:-1])
    pieces = [(a <= beta) & (beta <= b) for a, b in found.intervals]
    inside = np.any([np.zeros_like(beta, bool), *pieces], axis=0)
    np.testing.assert_array_equal(inside, found.statistic(beta) <= found.critical)


def test_useless_instrument_leaves_the_line_unbounded():
    found = anderson_rubin(LinearMoments.from_arrays(*simulate(4, 0.0), names=["1", "x"]))
    assert found.intervals[0][0] == -INF
    assert found.intervals[-1][1] == INF
    assert found.statistic(INF) < found.critical
    assert found.statistic(1e12) == pytest.approx(found.statistic(-INF), 1e-9)


def test_instruments_that_contradict_each_other_leave_nothing():
    y, X, Z = simulate(1, 1.0, excluded=2)
    found = anderson_rubin(LinearMoments.from_arrays(y + 2 * Z[:, 2], X, Z, names=["1", "x"]))
    assert found.intervals == ()
    assert (
        found.describe()
        == "95% Anderson-Rubin set of x: empty, no value agrees with all instruments"
    )


def test_units_and_offsets_do_not_matter():
    y, X, Z = simulate(3, 0.5, excluded=2)
    plain = anderson_rubin(LinearMoments.from_arrays(y, X, Z))
    moved = LinearMoments.from_arrays(
        1e3 * y + 1e5, X @ [[1, 2e4], [0, 10]], Z @ [[1, 5e3, 0], [0, 1, 3], [0, 1, 0]]
    )
    found = anderson_rubin(moved)
    assert_allclose(np.array(found.intervals) / 100, plain.intervals, rtol=1e-7)


@pytest.mark.parametrize("draws", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_set_covers_though_the_instrument_is_weak(draws):
    hits = 0
    for seed in range(draws):
        moments = LinearMoments.from_arrays(*simulate(1000 + seed, 0.1, n=200, excluded=2))
        found = anderson_rubin(moments, level=0.9)
        inside = any(a <= 0.7 <= b for a, b in found.intervals)
        assert inside == (found.p_value(0.7) >= 0.1)
        hits += inside
    assert abs(hits / draws - 0.9) < 3 * np.sqrt(0.9 * 0.1 / draws)


def test_no_set_without_one_endogenous_variable_or_an_inverse():
    two = anderson_rubin(LinearMoments.from_formula(TWO, data()))
    assert np.isnan(two.intervals).all()
    assert np.isnan(two.statistic(0.0))
    assert "not available, it is for one endogenous variable, here are 2" in two.describe()
    none = anderson_rubin(LinearMoments.from_formula("lwage ~ 1 + educ", data()))
    assert "here are 0" in none.note
    frame = data().assign(half=data()["id"] % 2)
    formula = OVER.replace("nearc4]", "nearc4 + age]")
    few = anderson_rubin(LinearMoments.from_formula(formula, frame, "cluster:half"))
    assert "singular" in few.note
    with pytest.raises(ValueError, match=r"level 95 must lie between 0 and 1"):
        anderson_rubin(LinearMoments.from_formula(ONE, data()), level=95)
