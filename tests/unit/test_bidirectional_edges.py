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
    with refused("2,000 regimes in 2,000 rows: at most 200 are taken"):
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
