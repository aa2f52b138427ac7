"""Both effects from a stream: its law, forgetting, the alarm, merging, going on after a save."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2

from hakari.inference.bidirectional import stream as streams
from hakari.inference.bidirectional.drift import LEVEL, Monitor
from hakari.inference.bidirectional.evidence import Assumptions
from hakari.inference.bidirectional.features import RandomFourier
from hakari.inference.bidirectional.model import BidirectionalEffects
from hakari.inference.bidirectional.rows import Columns, read
from tests.bidirectional_designs import EFFECTS, table

FEATURES = RandomFourier(40, seed=1, length_scale=1.0)


def model(**settings):
    settings = {"features": FEATURES, "warm_up": 2000} | settings
    return BidirectionalEffects("p", "q", ("u", "v"), **settings)


def batches(data, rows=1000):
    frame = pd.DataFrame(data)
    return (frame[i : i + rows] for i in range(0, len(frame), rows))


def joined(*tables):
    return {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}


def test_errors_have_the_law_that_the_standard_errors_say():
    distances = []
    for seed in range(24):
        found = model().fit(batches(table(6000, seed))).effects()
        gap = np.array(found.estimate) - EFFECTS
        distances.append(gap @ np.linalg.solve(found.covariance, gap))
    assert chi2.ppf(1e-3, 48) < np.sum(distances) < chi2.ppf(1 - 1e-3, 48)


def test_one_pass_comes_to_what_five_passes_find():
    """The gap is less than a standard error, and falls faster than one."""
    sizes = []
    for n in (5000, 20_000):
        gaps = []
        for seed in range(30, 35):
            data = table(n, seed)
            at_rest, once = model().fit(data).effects(), model().fit(batches(data)).effects()
            gaps.append((np.array(once.estimate) - at_rest.estimate) / at_rest.std_error)
        sizes.append(np.sqrt(np.mean(np.square(gaps))))
    assert sizes[1] < sizes[0] < 1


def test_heads_come_to_those_of_all_rows():
    data = table(20_000, 32)
    once = model().fit(batches(data))
    heads = once.nuisance
    whole = model().fit(data)

    rows = next(read(table(4000, 33), Columns("p", "q", ("u", "v"))))
    here = heads.means.predict(heads.matrix(rows)) * heads.unit + heads.centre
    there = whole.nuisance.means.predict(whole.nuisance.matrix(rows)) * whole.nuisance.unit
    there = there + whole.nuisance.centre
    error = ((here - there) ** 2).mean(axis=0) / (there.var(axis=0))
    assert (error < 0.01).all()


def test_a_row_is_met_by_heads_of_earlier_rows_alone():
    """What enters the sums for a batch does not change with its own rows' part in learning."""
    start = model().fit(batches(table(4000, 34)))._stream
    later = table(1024, 35)

    rows = next(read(later, Columns("p", "q", ("u", "v"))))
    settings = (Assumptions(), streams.Forgetting(), rows, 0, 0)
    after = streams.advance(start, *settings)
    frozen = replace(start, inverse=0 * start.inverse)
    apart = streams.advance(frozen, *settings)
    assert after.evidence.sums.first.tobytes() == apart.evidence.sums.first.tobytes()
    assert not np.allclose(after.heads, start.heads, atol=1e-6)


# --- change -----------------------------------------------------------------------------------


CHANGED = joined(table(15_000, 40), table(15_000, 41, effects=(-0.3, 0.4)))


def test_forgetting_follows_a_change_and_remembering_does_not():
    errors = {}
    for name, settings in (
        ("all", {}),
        ("half-life", {"half_life": 2000}),
        ("window", {"window": 5000}),
    ):
        found = model(**settings).fit(batches(CHANGED)).effects()
        errors[name] = abs(found.estimate[0] + 0.3)
        assert name == "all" or errors[name] < 4 * found.std_error[0]
    assert errors["all"] > 0.2


def test_a_window_is_the_rows_in_it():
    data = table(20_000, 42)
    whole = model(window=5000).fit(batches(data, 1000))
    count = whole._stream.evidence.rows
    assert 5000 <= count <= 5000 * (1 + 2 / streams.PIECES) + 1024
    assert whole.rows == 20_000


def test_a_half_life_halves():
    evidence = model().fit(batches(table(3000, 43)))._stream.evidence
    forgetting = streams.Forgetting(half_life=1500)
    half = evidence.scaled(forgetting.factor(1500))
    assert half.sums.weight == pytest.approx(evidence.sums.weight / 2)
    np.testing.assert_allclose(half.sums.first, evidence.sums.first / 2)
    np.testing.assert_allclose(half.sums.second, evidence.sums.second / 4)  # squared weights


def test_a_change_raises_the_alarm_and_no_change_none():
    changed = model().fit(batches(CHANGED))
    assert changed.alarm is not None
    assert 15_000 < changed.alarm.row < 20_000
    assert f"before row {changed.alarm.row:,}" in str(changed.alarm)
    quiet = [model().fit(batches(table(12_000, seed))).alarm for seed in range(50, 62)]
    assert quiet == [None] * 12


def test_the_alarms_bound_holds_for_a_walk():
    """Ville: a random walk without change crosses with probability below the level, and near it."""
    draw, crossed, count = np.random.default_rng(1), 0, 4000
    steps = 10.0 * draw.standard_normal((count, 2000, 2))  # batches of 100 rows
    walk = steps.cumsum(axis=1)
    for path in walk:
        monitor = Monitor(np.zeros(2), 0.0, 2000.0)
        rows = 100.0 * np.arange(1, 2001)
        bound = np.array([replace(monitor, rows=n).bound for n in rows[[0, 999]]])
        n, m = rows, 2000.0
        line = 2 * (n + m) * (np.log(1 / LEVEL) + np.log(1 + n / m))
        np.testing.assert_allclose(bound, line[[0, 999]])
        crossed += bool(((path**2).sum(axis=1) >= line).any())
    assert 0.3 * LEVEL * count < crossed < (LEVEL + 3 * np.sqrt(LEVEL / count)) * count


# --- merging, saving, stopping ----------------------------------------------------------------


def test_merged_shards_are_the_pooled_sums():
    data = [table(10_000, seed) for seed in (60, 61)]
    one, two = (model().fit(batches(part)) for part in data)
    sums = one._stream.evidence.sums + two._stream.evidence.sums
    wanted = Assumptions().solve(sums).estimate
    both = one.merge(two)
    assert both.effects().estimate == wanted
    assert both.rows == 20_000
    single = model().fit(batches(joined(*data))).effects()
    gap = np.abs(np.array(single.estimate) - both.effects().estimate)
    assert (gap < single.std_error).all()
    assert (gap > 0).any()  # heads met the rows otherwise: not the same number, and not said to be


def test_shards_of_the_same_features_go_on_with_both_heads():
    first = model().fit(batches(table(2000, 62)))
    shards = []
    for seed in (63, 64):
        shard = BidirectionalEffects("p", "q", ["u", "v"], FEATURES, warm_up=2000)
        shard._stream = first._stream
        shards.append(shard.partial_fit(table(4000, seed)))
    one, two = (shard._stream.heads for shard in shards)
    merged = shards[0].merge(shards[1])._stream.heads
    np.testing.assert_allclose(merged, (one + two) / 2, rtol=1e-6)


def test_a_saved_model_goes_on_to_the_bit(tmp_path):
    parts = list(batches(table(9000, 65), 1500))
    through, before = model(), model()
    for part in parts:
        through.partial_fit(part)
    for part in parts[:3]:
        before.partial_fit(part)
    before.save(tmp_path / "model.npz")
    after = BidirectionalEffects.load(tmp_path / "model.npz")
    assert after.get_params() == before.get_params()
    for part in parts[3:]:
        after.partial_fit(part)
    assert after.effects().estimate == through.effects().estimate
    assert after.path.equals(through.path)
    waiting = model().partial_fit(parts[0])
    waiting.save(tmp_path / "waiting.npz")
    assert BidirectionalEffects.load(tmp_path / "waiting.npz").rows == 1500


def test_ctrl_c_keeps_the_rows_so_far():
    def stopped():
        for k, part in enumerate(batches(table(9000, 66), 1500)):
            if k == 4:
                raise KeyboardInterrupt
            yield part

    found = model().fit(stopped())
    assert found.interrupted
    assert found.rows == 6000
    assert np.isfinite(found.effects().estimate).all()


def test_the_path_is_thinned_and_ends_where_the_stream_does(monkeypatch):
    monkeypatch.setattr(streams, "LONGEST", 8)
    found = model().fit(batches(table(20_000, 67)))
    assert len(found.path) <= 8
    assert found.path["rows"].iloc[-1] == 20_000
    assert found.path["a"].iloc[-1] == found.effects().estimate[0]
