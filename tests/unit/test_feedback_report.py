"""What `hakari feedback` says of its findings, and which rows it reads."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from hakari.inference.bidirectional.drift import Alarm
from hakari.inference.bidirectional.report import (
    cares,
    effects_table,
    feedback_chapter,
    identification_table,
    said,
    verdict,
)
from hakari.inference.bidirectional.study import SAMPLE, Study, find
from hakari.inference.sampling import generator
from hakari.report import Picture, Text


def outcomes(n, strength, seed, a=0.5, b=0.4, shared=0.0):
    """Outcomes whose log variances are ± strength (2x - 1); a common shock of some rows."""
    draw = generator(seed, "feedback")
    x, z = draw.uniform(size=(2, n))
    e1, e2 = draw.standard_normal((2, n)) * np.exp(strength / 2 * np.stack([2 * x - 1, 1 - 2 * x]))
    common = shared * (np.abs(2 * x - 1) < 0.5) * draw.standard_normal(n)
    e1, e2, d = e1 + common, e2 + common, 1 - a * b
    return {"p": (e1 + a * e2) / d + x, "q": (e2 + b * e1) / d - x, "x": x, "z": z}


def asked(data, **more):
    return find(Study(data, "p", "q", ("x", "z"), features=20, **more))


@pytest.fixture(scope="module")
def strong():
    return asked(outcomes(4000, 1.5, 1))


def told(found, part):
    return [sentence for sentence in verdict(found) if part in sentence]


def test_the_answer_names_cause_and_outcome(strong):
    one, two, rule, kept, alone = verdict(strong)
    row = strong.table.loc["q on p"]
    assert one.startswith(f"One more of q moves p by {row['estimate']:.3f}, 95% interval 0.4")
    assert two.startswith("One more of p moves q by 0.4")
    other = " and ".join(f"{v:.2f}" for v in strong.effects.other_root)
    assert rule == (
        f"Reported by rule: |ab| < 1: feedback dies out. The other root, {other}, fits the data "
        "as well."
    )
    assert "95% Anderson-Rubin set holds q on p from 0.4" in kept
    assert alone.startswith("Least squares of each equation alone gives 0.")
    assert cares(strong) == []


def test_the_other_root_of_a_triangular_system_is_infinite():
    found = asked(outcomes(3000, 1.5, 2, b=0.0), restrict="b=0")
    assert told(found, "The other root is infinite.")
    (kept,) = told(found, "Anderson-Rubin set holds q on p from")
    assert "p on q" not in kept


def test_disagreeing_instruments_are_a_warning():
    """A common shock whose variance moves with x in a way of its own."""
    found = asked(outcomes(8000, 1.5, 3, shared=1.0))
    assert found.effects.instruments_agree[2] < 1e-3
    (care,) = cares(found)
    assert care.startswith("The instruments disagree (J ")
    assert care in [b.text for b in said(found) if isinstance(b, Text) and b.style == "warning"]


def test_an_alarm_is_a_warning(strong):
    model = SimpleNamespace(alarm=Alarm(70_000, 0.01))
    assert cares(replace(strong, model=model)) == [
        "Along the stream the effects, or what is held against them, changed before row 70,000 "
        "(false alarms in a whole stream: 1%)."
    ]


def test_least_squares_alone_is_called_a_baseline():
    found = asked(outcomes(3000, 1.5, 1), method="single-equation")
    np.testing.assert_array_equal(found.table["estimate"], found.table["single_equation"])
    assert cares(found)[0].startswith("These estimates are least squares of each equation alone")


def test_an_estimate_that_was_asked_for_is_marked():
    found = asked(outcomes(1500, 0.12, 5), anyway=True)
    assert not found.identification.identified
    assert np.isfinite(found.table["estimate"]).all()
    assert "shown because it was asked for" in cares(found)[0]
    none = asked(outcomes(1500, 0.12, 5))
    assert np.isnan(none.table[["estimate", "std_error", "other_root"]]).all(axis=None)
    assert np.isfinite(none.table["single_equation"]).all()
    assert verdict(none)[0].startswith("The data cannot tell the effect of q on p from that of p")
    assert verdict(none)[0].endswith("So there is no point estimate.")


def test_tables_say_what_the_numbers_are(strong):
    first, second = effects_table(strong).rows
    row = strong.table.loc["p on q"]
    assert first[0] == "q on p"
    assert second[1:3] == [f"{row['estimate']:.3f}", f"{row['std_error']:.4f}"]
    assert second[5] == f"{row['single_equation']:.3f} ({row['single_equation_std_error']:.3f})"
    names = [name for name, *_ in identification_table(strong).rows]
    assert names == [*strong.identification.tests, "all instruments agree (J)"]


def test_a_chapter_has_sections_and_pictures_with_words(strong):
    chapter = feedback_chapter(strong, "p and q", command="hakari feedback")
    titles = [section.title for section in chapter.sections]
    assert titles == [
        "Question", "What the data say", "Both effects", "Can the data tell?", "Diagnostics",
        "How to repeat",
    ]  # fmt: skip
    pictures = [b for s in chapter.sections for b in s.blocks if isinstance(b, Picture)]
    assert [bool(p.alt and p.caption) for p in pictures] == [True, True]
    assert "x moves the log of the ratio most" in pictures[1].caption


# --- rows -----------------------------------------------------------------------------------


def test_the_sample_is_drawn_from_all_rows():
    """Over blocks too, which a sample by block would restart in."""
    data = pd.DataFrame(outcomes(70_001, 1.0, 5)).assign(z=np.arange(70_001.0))
    found = find(Study(data, "p", "q", ("x", "z"), features=10, length_scale="2"))
    z = found.sample.X[:, 1]
    assert len(z) == SAMPLE
    assert (np.diff(z) > 0).all()
    counts = np.histogram(z, bins=10, range=(0, 70_000))[0]
    assert np.abs(counts / SAMPLE - 0.1).max() < 0.04


def test_a_stream_is_the_library_s():
    data = outcomes(25_000, 1.5, 6)
    one = asked(data, one_pass=True)
    same = one.model.fit(iter([pd.DataFrame(data)])).effects()
    assert one.effects.estimate == pytest.approx(same.estimate, rel=1e-12)
    assert (one.read, len(one.model.path) > 1) == (25_000, True)
    assert one.speed == pytest.approx(25_000 / one.seconds)


@pytest.mark.parametrize("option", [{"half_life": 5e3}, {"window": 5e3}])
def test_forgetting_reads_once(option):
    found = asked(outcomes(22_000, 1.5, 6), **option)
    assert found.study.streamed
    assert len(found.model.path) > 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"level": 1.0}, "level 1 must lie between 0 and 1"),
        ({"seed": -2}, "seed -2: a whole number"),
        ({"polynomial": 2, "length_scale": "1"}, "polynomial 2 with features 20, length scale 1"),
    ],
)
def test_studies_that_make_no_sense(option, message):
    with pytest.raises(ValueError, match=message):
        Study({}, "p", "q", ("x",), features=20, **option)
