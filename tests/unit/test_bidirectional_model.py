"""`BidirectionalEffects` as a user meets it: modes, roots, settings, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures

import hakari.inference as hi
from hakari.inference.bidirectional.confidence_set import confidence_set
from hakari.inference.bidirectional.effects import _inverted
from hakari.inference.bidirectional.identification import identification
from hakari.inference.bidirectional.rows import Columns, read, sampled
from hakari.inference.bidirectional.structure import mirror
from tests.bidirectional_designs import EFFECTS, system, table

FEATURES = hi.RandomFourier(40, seed=1, length_scale=1.0)
DATA = table(6000, 1)


def model(**settings):
    settings = {"features": FEATURES, "warm_up": 2000} | settings
    return hi.BidirectionalEffects("p", "q", ["u", "v"], **settings)


def refused(message):
    return pytest.raises(ValueError, match=message)


def near(found, errors=4.0):
    gap = np.abs(np.array(found.estimate) - EFFECTS)
    return bool((gap < errors * np.array(found.std_error)).all())


# --- methods and modes ------------------------------------------------------------------------


def test_every_method_answers_in_the_same_form():
    for method in ("moments", "online-qml"):
        found = model(method=method).fit(DATA).effects()
        assert near(found), method
        assert found.identification.identified
    alone = model(method="single-equation").fit(DATA).effects()
    assert alone.estimate[0] - EFFECTS[0] > 5 * alone.std_error[0]  # what feedback does
    assert "single-equation" in str(alone)


def test_a_regressor_of_scikit_learn_does_as_nuisance():
    smooth = make_pipeline(PolynomialFeatures(5), Ridge(1e-3))
    found = model(regressor=smooth).fit(DATA).effects()
    assert near(found, 5)
    with refused("regressor needs all rows in memory"):
        model(regressor=smooth).partial_fit(DATA)


def test_regimes_are_rigobons():
    draw = np.random.default_rng(2)
    n = 8000
    regime = draw.integers(0, 2, n)
    s1, s2 = np.where(regime, 3.0, 1.0) ** 0.5, np.where(regime, 0.5, 2.0) ** 0.5
    eps = np.stack([s1, s2]) * draw.standard_normal((2, n))
    p, q = np.linalg.solve([[1, -0.5], [-0.4, 1]], eps)
    data = pd.DataFrame({"p": p, "q": q, "when": np.where(regime, "late", "early")})
    found = hi.BidirectionalEffects("p", "q", regimes="when").fit(data).effects()
    assert near(found)
    products = np.stack([p * q, p * p, q * q]) - 0.0
    W = [products[:, regime == k].mean(axis=1) for k in (0, 1)]
    u, v = np.linalg.solve([[w[1], w[2]] for w in W], [w[0] for w in W])
    assert found.solution.uv == pytest.approx((u, v), abs=5e-3)  # means are taken off there


def test_a_common_shock_of_constant_covariance_is_allowed_for():
    rows = system(20_000, strength=1.5, covariance=0.6, seed=3)
    data = {"p": rows.W1, "q": rows.W2, "u": rows.x[:, 0], "v": rows.x[:, 1]}
    lewbel = model(covariance="constant").fit(data).effects()
    plain = model().fit(data).effects()
    assert near(lewbel)
    assert not near(plain, 8)


def test_an_effect_that_is_known_to_be_none_sharpens_the_other():
    data = table(6000, 4, effects=(0.5, 0.0))
    both, one = model().fit(data).effects(), model(restrict="b=0").fit(data).effects()
    assert one.estimate[1] == 0
    assert one.std_error[1] == 0
    assert one.std_error[0] < both.std_error[0]
    assert abs(one.estimate[0] - 0.5) < 4 * one.std_error[0]


# --- roots, errors, the set -------------------------------------------------------------------


def test_both_roots_are_told_and_either_may_be_asked_for():
    stable, other = model().fit(DATA).effects(), model(root="mirror").fit(DATA).effects()
    assert abs(stable.estimate[0] * stable.estimate[1]) < 1
    assert stable.other_root == pytest.approx(tuple(map(float, mirror(*stable.estimate))))
    assert other.estimate == stable.other_root
    assert other.other_root == stable.estimate
    assert "|ab| < 1" in stable.rule
    assert "|ab| > 1" in other.rule
    step, (a, b) = 1e-6, stable.estimate
    slope = np.array(
        [
            (np.array(mirror(*(np.array([a, b]) + step * e))) - mirror(a, b)) / step
            for e in np.eye(2)
        ]
    ).T
    np.testing.assert_allclose(other.covariance, slope @ stable.covariance @ slope.T, rtol=1e-4)


def test_interval_set_and_table_agree():
    found = model().fit(DATA).effects()
    ends, area = found.interval(0.95), found.confidence_set(0.95)
    assert ends[0] == pytest.approx(
        [
            found.estimate[0] - 1.95996 * found.std_error[0],
            found.estimate[0] + 1.95996 * found.std_error[0],
        ]
    )
    assert area.kind == "bounded"
    assert area.contains(*found.estimate)
    assert area.contains(*found.other_root)
    assert found.table.loc["q on p", "set_lower"] == area.a[0][0]
    half = np.sqrt(5.9915) * np.array(found.std_error)  # the ellipse's shadow
    np.testing.assert_allclose(np.diff([area.a[0], area.b[0]])[:, 0], 2 * half, rtol=0.1)
    shock = found.multipliers.loc[("shock to p", "q"), "effect"]
    a, b = found.estimate
    assert shock == pytest.approx(b / (1 - a * b))


def test_where_the_ratio_is_constant_no_point_is_given_without_asking():
    data = table(6000, 5, strength=0.0) | {"v": table(6000, 6)["v"]}
    found = model().fit(data).effects()
    assert not found.identification.identified
    assert np.isnan(found.estimate).all()
    assert np.isnan(found.interval()).all()
    text = str(found)
    assert "no point estimate" in text
    assert "not identified" in text
    anyway = (
        model().fit(table(6000, 5, strength=0.0) | {"v": table(6000, 6)["v"]}).effects(anyway=True)
    )
    assert np.isfinite(anyway.estimate).all() or not anyway.solution.roots.exists


def test_a_root_that_the_set_cannot_tell_from_its_mirror_is_not_picked():
    """A common shock whose variance moves too: strong moments, and a set that reaches ab = 1."""
    draw, n = np.random.default_rng(3), 4000
    season, warmth = np.sin(draw.uniform(0, 2 * np.pi, n)), draw.standard_normal(n)
    cost, taste, both = 0.2 * draw.standard_normal((3, n))
    both = 4 * both * np.exp(season)
    u = np.stack([cost * np.exp(-0.6 * season), taste * np.exp(0.4 * warmth)]) + both
    p, q = np.linalg.solve([[1, -0.3], [0.8, 1]], u)
    data = {"p": p, "q": q, "u": season, "v": warmth}
    found = model(covariance="constant").fit(data)
    moments = found._assumptions.moments(found._summed.sums)
    assert identification(moments, index=found._summed.ratio).identified
    assert confidence_set(moments).edges == ("ab = 1",)
    told = found.identification()
    assert not told.identified
    assert told.reasons == ("the 95% set reaches ab = 1: the rule |ab| < 1 does not pick a root",)
    assert np.isnan(found.effects().estimate).all()


def test_a_triangular_system_needs_no_ratio_that_moves():
    draw = np.random.default_rng(8)
    u, v, p, q = draw.standard_normal((4, 6000))
    data = {"p": 0.5 * q + p, "q": q, "u": u, "v": v}
    found = model(restrict="b=0").fit(data)
    assert not model().fit(data).identification().identified
    assert found.identification().identified
    gap = found.effects().estimate[0] - 0.5
    assert abs(gap) < 4 * found.effects().std_error[0]


def test_at_the_mirror_the_table_shows_the_set_on_its_side():
    row = model(root="mirror").fit(DATA).effects().table.loc["q on p"]
    assert row["set_lower"] < row["lower"] < row["estimate"] < row["upper"] < row["set_upper"]
    assert _inverted(((-0.5, 0.25),)) == ((-np.inf, -2.0), (4.0, np.inf))
    assert _inverted(((0.0, 0.5), (-1.0, -0.5))) == ((-2.0, -1.0), (2.0, np.inf))


def test_figures():
    fitted = model().fit(DATA)
    axis = fitted.plot_ratio(DATA).axes[0]
    assert axis.get_xlabel() == "u"  # 3 sin 2u - v: u moves it more
    line = max(axis.lines, key=lambda one: len(one.get_xdata()))
    truth = 3 * np.sin(2 * line.get_xdata())
    shape = np.asarray(line.get_ydata()) - np.mean(line.get_ydata())
    assert np.abs(shape - (truth - truth.mean())).max() < 0.6
    once = model().fit(pa.table(DATA).to_reader(max_chunksize=1000))
    drawn = once.plot_path().axes[0].lines[0]
    np.testing.assert_array_equal(drawn.get_ydata(), once.path["a"])
    assert len(fitted.effects().plot().axes) == 2


# --- data and conventions ---------------------------------------------------------------------


def test_all_kinds_of_tables_give_the_same(tmp_path):
    frame = pd.DataFrame(DATA)
    frame.to_parquet(tmp_path / "table.parquet")
    frame.to_csv(tmp_path / "table.csv", index=False)
    wanted = model().fit(frame).effects().estimate
    for data in (DATA, pa.table(DATA), tmp_path / "table.parquet"):
        assert model().fit(data).effects().estimate == wanted
    assert model().fit(tmp_path / "table.csv").effects().estimate == pytest.approx(wanted)
    once = pa.table(DATA).to_reader(max_chunksize=1000)
    assert model().fit(once).rows == 6000


def test_scikit_learns_conventions():
    first = model(bootstraps=5, seed=3)
    again = clone(first)
    assert again.get_params() == first.get_params()
    assert again is not first
    assert first.set_params(seed=4) is first
    assert first.seed == 4
    with refused("no setting 'speed': known are y1, y2"):
        first.set_params(speed=1)
    fitted = first.fit(DATA)
    assert fitted is first
    assert "rows=6,000" in repr(fitted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covariance": "free"}, "covariance 'free': use one of"),
        ({"restrict": "a=1"}, "restrict 'a=1': use one of"),
        ({"root": "both"}, "root 'both': use one of"),
        ({"method": "ols"}, "method 'ols': use one of"),
        ({"warm_up": 10}, "warm_up 10: a whole number of at least 1,000"),
        ({"bootstraps": -1}, "bootstraps -1: a whole number of at least 0"),
        ({"restrict": "b=0", "root": "mirror"}, "root 'mirror' with restrict 'b=0'"),
        ({"half_life": 10}, "half_life 10: at least 1,024 rows"),
        ({"half_life": 5000, "window": 5000}, "half_life and window together"),
        ({"method": "online-qml", "restrict": "b=0"}, "method 'online-qml' with restrict"),
        ({"method": "online-qml", "covariance": "constant"}, "with covariance 'constant'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with refused(message):
        model(**settings).fit(DATA)


def test_data_that_do_not_fit():
    with refused("no column 'w' in the data"):
        hi.BidirectionalEffects("p", "q", ["w"]).fit(DATA)
    with refused("p named twice"):
        hi.BidirectionalEffects("p", "p", ["u"]).fit(DATA)
    with refused("no covariates and no regimes"):
        hi.BidirectionalEffects("p", "q").fit(DATA)
    with refused("covariates 'u': give a list of names"):
        hi.BidirectionalEffects("p", "q", "u").fit(DATA)
    with refused("p is inf in row 3"):
        model().fit(DATA | {"p": np.where(np.arange(6000) == 2, np.inf, DATA["p"])})
    holes = pd.DataFrame(DATA)
    holes.loc[5, "u"] = np.nan
    with refused("1 rows with missing values, the first is row 6"):
        model().fit(holes)
    assert model(missing="drop").fit(holes).rows == 5999
    with refused("u does not hold numbers"):
        model().fit(pd.DataFrame(DATA).assign(u="x"))
    with refused("900 rows: at least 1,000 are needed"):
        model().fit(pd.DataFrame(DATA)[:900])
    with refused("y1 is 2 in all rows"):
        model().fit(DATA | {"p": np.full(6000, 2.0)})
    with refused("0 rows so far, and 1,000 are needed"):
        model().effects()


@pytest.mark.parametrize("rows", [1000, 3000, 7001])
def test_rows_are_drawn_from_all_blocks_however_they_are_cut(rows):
    numbers = np.arange(7001.0)
    data = {"p": numbers, "q": numbers, "u": numbers % 2}
    whole = next(read(data, Columns("p", "q", ("u",))))
    kept = [
        sampled([whole.cut(i, i + size) for i in range(0, 7001, size)], rows).rows
        for size in (501, 64, 7001)
    ]
    assert len(kept[0]) == rows
    for other in kept[1:]:
        np.testing.assert_array_equal(kept[0].y, other.y)
    assert (np.diff(kept[0].y[:, 0]) > 0).all()
    counts = np.histogram(kept[0].y[:, 0], bins=10, range=(0, 7000))[0]
    assert np.abs(counts / rows - 0.1).max() < 0.04
    assert abs(kept[0].X.mean() - 0.5) < 0.05  # of rows that alternate
    assert rows == 7001 or sampled([whole], rows, seed=1).rows.y[0, 0] != kept[0].y[0, 0]
    with refused("the data have no rows"):
        sampled(iter([]), rows)


def test_an_empty_model_takes_what_another_has_learned():
    fitted, empty = model().fit(DATA), model()
    assert fitted.merge(model()) is fitted
    assert empty.merge(fitted).effects().estimate == fitted.effects().estimate
    half = model().partial_fit({name: column[:1500] for name, column in DATA.items()})
    once = model().fit(pa.table(DATA).to_reader(max_chunksize=1000))
    assert half.merge(once).rows == 7500
    assert half._waiting == []
    with refused("does not merge with itself"):
        half.merge(half)


def test_a_method_that_is_set_later_is_not_what_was_learned():
    with refused("method was 'moments' when this model learned and is 'online-qml' now"):
        model().fit(DATA).set_params(method="online-qml").effects()
    alone = model(method="single-equation").fit(DATA).effects()  # of the same sums
    assert (
        model().fit(DATA).set_params(method="single-equation").effects().estimate == alone.estimate
    )


@pytest.mark.parametrize(
    "change", [{"y1": "q", "y2": "p"}, {"covariates": ["u"]}, {"features": hi.Polynomial(3)}]
)
def test_what_was_learned_is_not_given_other_names(change, tmp_path):
    """A stream would take columns for others; `fit` begins anew."""
    begun = model(warm_up=2000).partial_fit(DATA)
    begun.save(tmp_path / "model.npz")
    for found in (begun, hi.BidirectionalEffects.load(tmp_path / "model.npz")):
        found.set_params(**change)
        for learn in (
            lambda m: m.partial_fit(DATA),
            lambda m: m.effects(),
            lambda m: model().merge(m),
        ):
            with refused("when this model learned and is .* now: set it back, or fit again"):
                learn(found)
        assert found.fit(DATA).effects().evidence.rows == 6000


def test_what_may_not_follow_what():
    fitted = model().fit(DATA)
    with refused("fit has read its data more than once"):
        fitted.partial_fit(DATA)
    with refused("models with restrict None and 'b=0' do not merge"):
        fitted.merge(model(restrict="b=0").fit(DATA))
    with refused("models with covariates .* and .* do not merge"):
        fitted.merge(model().set_params(covariates=["u"]).fit(DATA))
    with refused("do not merge: their steps do not add"):
        model(method="online-qml").fit(DATA).merge(fitted)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "model.npz"
    with pytest.raises(FileNotFoundError, match="no model at"):
        hi.BidirectionalEffects.load(path)
    path.write_bytes(b"nothing")
    with refused("is not a saved model"):
        hi.BidirectionalEffects.load(path)
    np.savez(path, text=np.array('{"format": "other"}'))
    with refused("has the format 'other'"):
        hi.BidirectionalEffects.load(path)
