"""A fit in five passes that Ctrl-C stops goes on where it was, and ends at the same bits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hakari.inference import tables
from hakari.inference.bidirectional import batch
from hakari.inference.bidirectional.features import RandomFourier
from hakari.inference.bidirectional.model import BidirectionalEffects
from hakari.inference.bidirectional.online_steps import OnlineSettings
from hakari.inference.bidirectional.readings import Readings
from tests.bidirectional_designs import table

BLOCK = 1500
DATA = pd.DataFrame(table(6000, 5))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", BLOCK)


def model(**settings):
    features = RandomFourier(20, seed=1, length_scale=1.0)
    settings = {"bootstraps": 3, "warm_up": 2000} | settings
    return BidirectionalEffects("p", "q", ["u", "v"], features, **settings)


def stopping(monkeypatch, done, blocks):
    """Ctrl-C when so many readings are done, and so many blocks of the next."""
    after = Readings.after

    def stopped(readings, *more):
        if (readings.done, readings.blocks) == (done, blocks):
            raise KeyboardInterrupt
        return after(readings, *more)

    monkeypatch.setattr(Readings, "after", stopped)


@pytest.mark.parametrize(
    ("done", "blocks", "told"),
    [
        (0, 0, "reading 1 of 5, after 0 rows"),
        (0, 2, "reading 1 of 5, after 3,000 rows"),
        (1, 3, "reading 2 of 5, after 4,500 rows"),
        (4, 1, "reading 5 of 5, after 1,500 rows"),
    ],
)
def test_interrupted_and_gone_on_is_as_if_it_had_not_been(
    done, blocks, told, monkeypatch, tmp_path
):
    whole = model().fit(DATA).effects()
    with monkeypatch.context() as patch:
        stopping(patch, done, blocks)
        cut = model().fit(DATA)
    assert cut.interrupted
    assert not cut.finished
    with pytest.raises(ValueError, match=f"{told}: go on with"):
        cut.effects()
    cut.save(tmp_path / "cut.npz")
    for begun in (cut, BidirectionalEffects.load(tmp_path / "cut.npz")):
        assert begun.interrupted
        found = begun.fit(DATA, resume=True).effects()
        assert not begun.interrupted
        assert begun.finished
        assert found.estimate == whole.estimate
        np.testing.assert_array_equal(found.covariance, whole.covariance)
        np.testing.assert_array_equal(found.evidence.draws, whole.evidence.draws)


@pytest.mark.parametrize(("done", "blocks"), [(0, 2), (1, 3), (2, 1)])
def test_epochs_of_the_likelihood_go_on_too(done, blocks, monkeypatch, tmp_path):
    """In the steps of either epoch, and among the evidence."""
    settings = {"method": "online-qml", "online": OnlineSettings(epochs=2)}
    whole = model(**settings).fit(DATA).effects(anyway=True)
    with monkeypatch.context() as patch:
        stopping(patch, done, blocks)
        cut = model(**settings).fit(DATA)
    where = f"reading {done + 1} of 3, after {blocks * BLOCK:,} rows"
    with pytest.raises(ValueError, match=where):
        cut.effects()
    cut.save(tmp_path / "cut.npz")
    for begun in (cut, BidirectionalEffects.load(tmp_path / "cut.npz")):
        found = begun.fit(DATA, resume=True).effects(anyway=True)
        assert found.estimate == whole.estimate
        np.testing.assert_array_equal(found.covariance, whole.covariance)
        np.testing.assert_array_equal(found.evidence.draws, whole.evidence.draws)


def test_only_rows_that_are_not_in_the_sums_are_worked_on(monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, 1, 3)
        cut = model().fit(DATA)
    worked = []
    count = batch._counted

    def counted(work, rows, k):
        worked.append((work.func.__name__, k))
        return count(work, rows, k)

    monkeypatch.setattr(batch, "_counted", counted)
    cut.fit(DATA, resume=True)
    assert worked[0] == ("_log_squares", 3)
    assert len(worked) == 1 + 3 * 4


def test_what_does_not_go_on(monkeypatch):
    with pytest.raises(ValueError, match="no fit of this model was interrupted"):
        model().fit(DATA, resume=True)
    stopping(monkeypatch, 1, 3)
    cut = model().fit(DATA)
    monkeypatch.undo()
    monkeypatch.setattr(tables, "BLOCK_ROWS", BLOCK)
    other = DATA.assign(p=DATA["p"] + (np.arange(len(DATA)) == 7))
    with pytest.raises(ValueError, match="the first rows are not those"):
        cut.fit(other, resume=True)
    with pytest.raises(ValueError, match=r"3 blocks had 4,500 rows .* and have 4,400 now"):
        cut.fit(DATA[:4400], resume=True)
    with pytest.raises(ValueError, match="had 6,000 rows when they were first read and 5,000"):
        cut.fit(DATA[:5000], resume=True)
    whole = model().fit(DATA)
    for one, two in ((cut, whole), (whole, cut)):
        with pytest.raises(ValueError, match="the fit was interrupted in reading 2 of 5"):
            one.merge(two)
    with pytest.raises(ValueError, match="fit has read its data more than once"):
        cut.partial_fit(DATA)
    assert model().fit(DATA).effects().estimate == cut.fit(DATA, resume=True).effects().estimate


def test_data_that_change_between_passes_are_refused():
    class Growing:
        """More rows at each reading, in small frames."""

        reads = 0

        def __iter__(self):
            self.reads += 1
            return (DATA[i : i + 500] for i in range(0, 4000 + 500 * self.reads, 500))

    with pytest.raises(ValueError, match="had 5,000 rows when they were first read and 5,500 now"):
        model().fit(Growing())


def test_how_the_data_are_cut_is_of_no_consequence(tmp_path):
    """Frames of 500 rows, in which not every fold has rows, and files of 700."""
    whole = model().fit(DATA).effects()
    parts = [DATA[i : i + 700] for i in range(0, len(DATA), 700)]
    for k, part in enumerate(parts):
        part.to_csv(tmp_path / f"{k}.csv", index=False)
    for data in ([DATA[i : i + 500] for i in range(0, len(DATA), 500)], tmp_path):
        found = model().fit(data).effects()
        assert found.estimate == whole.estimate
        np.testing.assert_array_equal(found.evidence.draws, whole.evidence.draws)
