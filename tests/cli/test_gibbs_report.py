"""What `hakari gibbs` says of its findings, losses as typed, and the demo's chapter on Engel."""

from dataclasses import replace

import numpy as np
import pytest
from statsmodels.datasets import engel as food
from statsmodels.regression.quantile_regression import QuantReg

import hakari.inference as hi
from hakari.inference import engel
from hakari.inference.gibbs import losses
from hakari.inference.gibbs.report import gibbs_chapter, intervals_table, rates_table, verdict
from hakari.inference.gibbs.rival_intervals import Rival
from hakari.inference.gibbs.study import Study, find, parse_loss
from hakari.report import Picture, Text


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(3)
    x, e = rng.standard_normal((2, 150))
    table = {"x": x, "y": 1 + 2 * x + (1 + np.abs(x)) * e}
    return find(Study("y ~ 1 + x", table, "squared", replicates=200, draws=500, level=0.9))


def told(found, start):
    return [sentence for sentence in verdict(found) if sentence.startswith(start)]


def test_the_answer_compares_widths(found):
    width = found.table.loc["x", "upper"] - found.table.loc["x", "lower"]
    middle = found.plain.minimiser
    rival = Rival("Koenker", ("Intercept", "x"), middle, middle - width / 4, middle + width / 4)
    same = replace(rival, label="sandwich", lower=middle - width / 2, upper=middle + width / 2)
    (said,) = told(replace(found, rivals=(same, rival)), "x: ")
    assert said.endswith("about as wide as the sandwich's and 2.0 times as wide as Koenker's.")
    plain = found.table.loc["x", "upper_uncalibrated"] - found.table.loc["x", "lower_uncalibrated"]
    assert f"{width / plain:.1f} times as wide as that at learning rate 1" in said
    assert "calibrated 90% interval 1." in said


def test_each_coefficient_has_draws_at_its_own_rate(found):
    assert set(found.draws) == {*found.rates.values(), 1.0}
    x = found.of("x", found.rates["x"])
    ends = np.quantile(x, [0.05, 0.95])
    assert tuple(found.table.loc["x", ["lower", "upper"]]) == pytest.approx(tuple(ends))
    cells = intervals_table(found).rows[1]
    assert cells[0] == "x"
    assert [float(end) for end in cells[2].split(" to ")] == pytest.approx(list(ends), rel=0.01)
    rates = [row[1] for row in rates_table(found).rows]
    assert [float(rate) for rate in rates] == pytest.approx(list(found.rates.values()), rel=0.005)


def test_intervals_cover_what_the_bootstrap_says(found):
    """The calibrated sd is near the sandwich's, which is near the truth at any scale of y."""
    ratio = (found.table["upper"] - found.table["lower"]) / (
        found.table["upper_sandwich"] - found.table["lower_sandwich"]
    )
    assert ratio.between(0.8, 1.3).all()


def test_levels_other_than_the_one_asked_are_told(found):
    start = "Calibrated at 90% alone: at other levels the sets of"
    B = len(found.calibration.found[0].ranks)
    even = np.random.default_rng(1).permutation((np.arange(B) + 0.5) / B)

    def ranked(*ranks):
        pairs = zip(found.calibration.found, ranks, strict=True)
        new = tuple(replace(f, ranks=r) for f, r in pairs)
        return replace(found, calibration=replace(found.calibration, found=new))

    assert told(ranked(even, even), start) == []
    (said,) = told(ranked(even, even**2), start)
    assert said.startswith(f"{start} x cover")


def test_notes_are_marked(found):
    noted = replace(found, notes=("no single rate calibrates all directions: so", "draw more"))
    assert told(noted, "No single rate calibrates all directions: so.")
    chapter = gibbs_chapter(noted, "title", command="hakari gibbs")
    blocks = [b for s in chapter.sections for b in s.blocks]
    warned = [b.text for b in blocks if isinstance(b, Text) and b.style == "warning"]
    assert warned == ["No single rate calibrates all directions: so.", "Draw more."]
    assert len([b for b in blocks if isinstance(b, Picture)]) == 2


def test_draws_that_are_missing_are_left_out(found):
    rate = found.calibration.learning_rate
    cut = replace(found, draws={rate: found.draws[rate]})
    (said,) = told(cut, "x: ")
    assert "learning rate" not in said
    pictures = [b for s in gibbs_chapter(cut, "t").sections for b in s.blocks]
    assert len([b for b in pictures if isinstance(b, Picture)]) == 1


# --- losses as typed ------------------------------------------------------------------------


def test_losses_as_typed():
    assert parse_loss("quantile:0.9") == losses.quantile(0.9)
    assert parse_loss(" Quantile ") == losses.quantile(0.5)
    assert parse_loss("expectile: 0.1") == losses.expectile(0.1)
    assert parse_loss("huber:2") == losses.huber(2.0)
    plain = {"squared", "logistic", "poisson", "hinge"}
    assert {parse_loss(name).name for name in plain} == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("median", "loss 'median' is unknown: use one of squared, quantile:TAU, expectile:TAU, hu"),
        ("squared:2", "loss 'squared:2': squared takes no number"),
        ("huber:wide", "loss 'huber:wide': 'wide' is no number"),
        ("huber:", "loss 'huber:': '' is no number"),
        ("huber:-1", "loss 'huber:-1': delta -1.0: give a number above 0"),
        ("quantile:1", "tau 1.0: give a share between 0 and 1"),
    ],
)
def test_mistakes_in_losses(text, message):
    with pytest.raises(ValueError, match=message):
        parse_loss(text)


# --- Engel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engel")
    return engel.food_and_income(folder), folder


def test_engel_estimates_are_koenkers(chapter):
    """Koenker and Bassett's own numbers at the median, as in the literature."""
    part, _ = chapter
    first, income = part.record["0.5"]["coefficients"]
    assert first["estimate"] == pytest.approx(81.48226, abs=1e-3)
    assert income["estimate"] == pytest.approx(0.56018054, abs=1e-6)
    data = food.load_pandas().data
    X = data[["income"]].assign(Intercept=1.0)[["Intercept", "income"]]
    for tau in ("0.5", "0.9"):
        fitted = QuantReg(data["foodexp"], X).fit(float(tau))
        theirs, shown = fitted.conf_int(0.05).loc["income"], part.record[tau]["coefficients"][1]
        assert shown["estimate"] == pytest.approx(fitted.params["income"], abs=1e-5)
        assert [shown["lower_Koenker"], shown["upper_Koenker"]] == pytest.approx(list(theirs))


def test_engel_at_rate_one_is_too_sure(chapter):
    part, _ = chapter
    for one in part.record.values():
        assert one["learning_rate"] < 0.1
        for row in one["coefficients"]:
            calibrated = row["upper"] - row["lower"]
            assert calibrated > 3 * (row["upper_uncalibrated"] - row["lower_uncalibrated"])
            assert 0.7 < calibrated / (row["upper_sandwich"] - row["lower_sandwich"]) < 2


def test_engel_writes_its_draws_and_says_what_it_did(chapter):
    part, folder = chapter
    assert sorted(p.name for p in folder.iterdir()) == [
        f"engel-{tau}.{end}" for tau in ("0.5", "0.9") for end in ("csv", "nc")
    ]
    draws = hi.load(folder / "engel-0.9.nc")["posterior"]["theta"]
    assert list(draws["coefficient"].values) == ["Intercept", "income"]
    assert [s.title for s in part.chapter.sections] == [
        "The median", "The 0.9 quantile", "Calibration and draws", "How to repeat",
    ]  # fmt: skip
    assert "QuantReg" in part.chapter.intro
    assert part.config["0.5"]["model"]["data"] == "statsmodels' engel"
    assert not part.interrupted
