"""Regimes, few rows, huge values and restrictions: refused with the way out, or answered."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import hakari.inference as hi

from .test_bidirectional_model import DATA, model, refused


def regimes(labels):
    return DATA | {"r": np.array(list(labels), dtype=object)[(DATA["u"] > 0).astype(int)]}


def test_shards_with_other_regimes_do_not_merge():
    """Their instruments are dummies of other values, which would be added by place."""
    one, two = (model(regimes="r").fit(regimes(labels)) for labels in ("ab", "bc"))
    with refused(r"values of the regimes \('a', 'b'\) and \('b', 'c'\) do not merge"):
        one.merge(two)
    assert one.merge(model(regimes="r").fit(regimes("ab"))).rows == 2 * len(DATA["u"])


def test_text_regimes_are_saved_while_they_wait(tmp_path):
    frame = pd.DataFrame(regimes("ab")).astype({"r": "category"})
    begun = model(regimes="r", warm_up=5000).partial_fit(frame[:2000])
    begun.save(tmp_path / "model.npz")
    again = hi.BidirectionalEffects.load(tmp_path / "model.npz")
    for found in (begun, again):
        found.partial_fit(frame[2000:])
    assert again.effects().estimate == begun.effects().estimate


def test_a_column_that_is_no_regime_and_values_beyond_squares_are_refused():
    with refused("6,000 regimes in 6,000 rows: at most 200 are taken"):
        model(regimes="r").fit(DATA | {"r": np.arange(6000)})
    huge = DATA | {"p": np.where(np.arange(6000) == 7, 1e300, DATA["p"])}
    with refused("p is 1e.300 in row 8: drop or mend the row"):
        model().fit(huge)


@pytest.mark.parametrize("rows", [1000, 1100])
def test_a_thousand_rows_are_enough_for_every_fold(rows):
    few = {name: column[:rows] for name, column in DATA.items()}
    assert model().fit(few).rows == rows
    assert model(warm_up=1000).partial_fit(few).effects(anyway=True).evidence.rows == rows


def test_a_set_prints_as_a_sentence_and_a_restriction_has_no_other_root():
    found = model(restrict="b=0").fit(DATA).effects()
    assert repr(found.confidence_set(0.95)) == found.confidence_set(0.95).text
    assert "other" not in str(found)
    assert "root: the one with b=0, as assumed" in str(found)


def test_an_empty_model_takes_nothing_of_other_outcomes():
    empty = hi.BidirectionalEffects("q", "p", ["u", "v"])
    with refused("models with y1 'q' and 'p' do not merge"):
        empty.merge(model().fit(DATA))
    assert empty.rows == 0


def test_rows_that_alternate_are_all_seen():
    """Two shops in turn: a covariate and a regime that every second row has."""
    rng = np.random.default_rng(1)
    n = 45_000
    shop = np.arange(n) % 2
    e = rng.standard_normal((2, n)) * np.where(shop, [[2.0], [0.5]], [[1.0], [1.0]])
    p, q = np.linalg.solve([[1.0, -0.5], [-0.4, 1.0]], e)
    data = {"p": p, "q": q, "u": shop.astype(float), "v": rng.uniform(size=n), "r": shop}
    by_covariate, by_regime = model(), model(regimes="r")
    for found in (by_covariate, by_regime):
        effects = found.fit(data).effects()
        np.testing.assert_allclose(effects.estimate, (0.5, 0.4), atol=0.05)


def test_a_rare_regime_has_its_dummy_or_is_refused():
    data = regimes("ab")
    late = np.arange(6000) >= 5960
    labels = np.where(late, "z", data["r"])
    found = model(regimes="r", warm_up=1000).fit(data | {"r": labels})
    assert found.nuisance.regimes == ("a", "b", "z")
    few = np.where(np.arange(6000) >= 5990, "z", data["r"])
    with refused("regime 'z' has 10 rows, and 30 are needed: join it with another, or drop it"):
        model(regimes="r").fit(data | {"r": few})


def test_text_regimes_come_in_a_stream():
    frame = pd.DataFrame(regimes("ab"))
    parts = [frame[i : i + 1500] for i in range(0, 6000, 1500)]
    once = model(regimes="r", warm_up=2000).fit(iter(parts))
    assert once.nuisance.regimes == ("a", "b")
    with refused("regime 'c' is not among those of the rows that were learned from first"):
        once.partial_fit(frame.assign(r="c"))


def test_two_regimes_with_a_constant_covariance_are_refused_with_the_way_out():
    for data in (regimes("ab"), iter([pd.DataFrame(regimes("ab"))])):
        with refused("two regimes .a, b. with covariance 'constant' tell one effect: give three"):
            model(regimes="r", covariance="constant", warm_up=2000).fit(data)


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"regimes": "r"}, regimes([1, "b"]), "regimes of several kinds .int, str.: write all"),
        ({}, DATA | {"p": DATA["p"] + 1j}, "p does not hold numbers"),
        ({"half_life": "a"}, DATA, "half_life 'a': at least 1,024 rows are needed; leave it out"),
        ({"window": 10}, DATA, "window 10: at least 1,024 rows are needed; leave it out"),
        ({"bootstraps": True}, DATA, "bootstraps True: a whole number"),
    ],
)
def test_settings_and_values_that_do_not_fit(settings, data, message):
    with refused(message):
        model(**settings).fit(data)


def test_a_column_that_stands_twice_is_refused():
    frame = pd.DataFrame(DATA)
    frame = pd.concat([frame, frame[["u"]]], axis=1)
    for data in (frame, iter([frame])):
        with refused("column 'u' is in the data 2 times: rename all but one"):
            model().fit(data)


def test_ctrl_c_in_the_first_reading_leaves_the_model_as_it_was(monkeypatch):
    found = model().fit(DATA)
    before = found.effects().estimate

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(hi.bidirectional.model, "sampled", stopped)
    with pytest.raises(KeyboardInterrupt):
        found.fit(DATA)
    assert found.effects().estimate == before


def test_the_set_says_which_root_it_is_about_and_levels_keep_their_digits():
    found = model(root="mirror").fit(DATA).effects()
    assert found.confidence_set(0.999).text.startswith(
        "99.9% Anderson-Rubin set with |ab| ≤ 1: a from "
    )


def test_another_method_says_whose_set_is_shown():
    found = str(model(method="single-equation").fit(DATA).effects())
    said = found.index("by the orthogonal moments, whatever the method:")
    assert said < found.index("Anderson-Rubin set") < found.index("identified")


def test_a_classifier_is_no_regressor():
    ensemble = pytest.importorskip("sklearn.ensemble")
    with refused("is a classifier: give one that predicts numbers"):
        model(regressor=ensemble.RandomForestClassifier()).fit(DATA)


def test_a_regressor_is_not_passed_over_in_a_stream():
    linear = pytest.importorskip("sklearn.linear_model")
    found = model(regressor=linear.Ridge())
    for learn in (found.fit, found.partial_fit):
        with refused("regressor needs all rows in memory, and a stream is read once"):
            learn(iter([pd.DataFrame(DATA)]))
    with refused("regressor needs all rows in memory"):
        found.set_params(half_life=2000).fit(DATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"covariance": "x"}, "covariance 'x': use one of"),
        ({"root": "x"}, "root 'x': use one of"),
        ({"restrict": "c=0"}, "restrict 'c=0': use one of"),
        ({"restrict": "b=0", "root": "mirror"}, "the mirror is infinite"),
    ],
)
def test_settings_are_checked_when_they_are_used(change, message):
    found = model().fit(DATA).set_params(**change)
    for ask in (found.effects, found.identification):
        with refused(message):
            ask()


@pytest.mark.parametrize("features", [hi.Polynomial(3), hi.RandomFourier(20, seed=1)])
def test_one_mistyped_covariate_does_not_move_the_answer(features):
    typed = DATA | {"v": np.where(np.arange(6000) == 4000, -999.0, DATA["v"])}
    for learn in (lambda m, data: m.fit(data), lambda m, data: m.partial_fit(data)):
        found, clean = (
            learn(model(features=features, warm_up=2000), data).effects() for data in (typed, DATA)
        )
        gap = np.abs(np.array(found.estimate) - clean.estimate) / clean.std_error
        assert gap.max() < 0.5
        np.testing.assert_allclose(found.std_error, clean.std_error, rtol=0.1)


def test_covariates_are_cut_a_quarter_beyond_the_range_of_most_rows():
    X = np.stack([np.linspace(0, 1, 1001), np.arange(1001) == 7], axis=1)
    for spec in (hi.Polynomial(2), hi.RandomFourier(10, length_scale=1.0)):
        basis = spec.fit(X)
        np.testing.assert_allclose(basis.low, [0.01 - 0.98 / 4, 0])
        np.testing.assert_allclose(basis.high, [0.99 + 0.98 / 4, 1])  # a rare dummy stays one
        far = basis.transform(np.array([[50.0, 1.0], [0.99 + 0.98 / 4, 1.0], [0.5, 3.0]]))
        np.testing.assert_array_equal(far[0], far[1])
        np.testing.assert_array_equal(far[2], basis.transform(np.array([[0.5, 1.0]]))[0])


def test_regimes_that_are_dates_are_saved_as_text(tmp_path):
    days = np.array(["2024-01-01", "2024-02-01"], dtype="datetime64[D]")
    dates = DATA | {"r": days[(DATA["u"] > 0).astype(int)]}
    found = model(regimes="r").fit(dates)
    found.save(tmp_path / "model.npz")
    assert all(isinstance(label, str) for label in found.nuisance.regimes)
    assert hi.BidirectionalEffects.load(tmp_path / "model.npz").rows == 6000


def test_an_empty_model_takes_no_other_features():
    with refused("an empty model with features .* does not take what one with .* has learned"):
        model(features=hi.Polynomial(3)).merge(model().fit(DATA))
    with pytest.raises(TypeError, match="NoneType is no BidirectionalEffects: merge models"):
        model().merge(None)


def test_rows_that_were_refused_fix_nothing():
    begun = model()
    with refused("no column 'p'"):
        begun.partial_fit({name: column for name, column in DATA.items() if name != "p"})
    renamed = {"cost" if name == "p" else name: column for name, column in DATA.items()}
    assert begun.set_params(y1="cost").partial_fit(renamed).rows == 6000


def test_covariates_may_be_the_columns_of_a_frame(tmp_path):
    names = pd.DataFrame(DATA)[["u", "v"]].columns
    found = hi.BidirectionalEffects("p", "q", names, hi.RandomFourier(20, seed=1)).fit(DATA)
    found.save(tmp_path / "model.npz")
    assert hi.BidirectionalEffects.load(tmp_path / "model.npz").effects() is not None
