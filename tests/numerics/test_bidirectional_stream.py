"""Both effects from a stream: its law, forgetting, the alarm, merging, going on after a save."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2

from hakari.inference.bidirectional import drift
from hakari.inference.bidirectional import stream as streams
from hakari.inference.bidirectional.drift import LEVEL, Monitor
from hakari.inference.bidirectional.evidence import Assumptions, Evidence
from hakari.inference.bidirectional.features import Polynomial, RandomFourier
from hakari.inference.bidirectional.identification import RatioSums
from hakari.inference.bidirectional.model import BidirectionalEffects
from hakari.inference.bidirectional.rows import Columns, read
from tests.bidirectional_designs import EFFECTS, table

FEATURES = RandomFourier(40, seed=1, length_scale=1.0)
NO_RATIO = RatioSums.of(np.ones((1, 2)), np.zeros(1))


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
    shut = replace(start, penalties=start.penalties + 1e12)
    apart = streams.advance(shut, *settings)
    assert after.evidence.sums.first.tobytes() == apart.evidence.sums.first.tobytes()
    assert not np.allclose(after.heads, start.heads, atol=1e-6)


def test_heads_of_means_are_the_ridge_regression_of_all_rows():
    """Recursive and at once, with the penalties that the warm-up chose; G is exact at first."""
    data = table(8000, 36)
    data["u"][5000] = 4.0  # a row with no neighbour
    found = model().fit(batches(data))._stream
    rows = next(read(data, Columns("p", "q", ("u", "v"))))
    phi, y = found.nuisance.matrix(rows).astype(float), found.nuisance.outcomes(rows)
    slopes = np.diag(np.append(0.0, np.ones(phi.shape[1] - 1)))
    for j in range(2):
        ridge = np.linalg.solve(phi.T @ phi + found.penalties[j] * slopes, phi.T @ y[:, j])
        gap = phi @ (found.heads[:, j] - ridge)
        assert np.sqrt((gap**2).mean()) < 5e-5
        assert np.abs(gap).max() < 5e-4  # also at the lone row


def test_rows_unlike_all_before_do_not_throw_the_heads():
    """A far row among many, after G is known: a step by the old G would overshoot a hundredfold."""
    features = RandomFourier(2, seed=1, length_scale=1.0)
    start = model(features=features).fit(batches(table(6000, 37)))._stream
    assert start.gram_rows > streams.KNOWN * len(start.gram)
    everywhere = {"low": np.full(2, -np.inf), "high": np.full(2, np.inf)}  # nothing is cut
    basis = replace(start.nuisance.basis, **everywhere)
    start = replace(start, nuisance=replace(start.nuisance, basis=basis))
    later = table(1024, 38)
    later["v"][500] = 3000.0
    rows = next(read(later, Columns("p", "q", ("u", "v"))))
    phi, y = start.nuisance.matrix(rows).astype(float), start.nuisance.outcomes(rows)
    for batches_before in (1, 8):  # of which one in 8 adds to G anyway
        begun = replace(start, batches=batches_before)
        after = streams.advance(begun, Assumptions(), streams.Forgetting(), rows, 0, 0)
        lost = [np.abs(y[500] - phi[500] @ s.heads[:, :2]) for s in (begun, after)]
        assert (lost[1] < lost[0]).all()


STRONG = RandomFourier(20, seed=1)


def strong(n, seed, strength=1.0):
    """Log variances that are ±strength x at normal x: a few rows weigh much."""
    draw = np.random.default_rng(seed)
    x, z, e1, e2 = draw.standard_normal((4, n))
    shift = np.exp(strength * x / 2)
    W1, W2 = np.sin(x) + shift * e1, z / 2 + e2 / shift
    p, q = np.linalg.solve([[1.0, -0.3], [0.8, 1.0]], [W1, W2])
    return {"p": p, "q": q, "u": x, "v": z}


def strong_errors(seeds, n, **settings):
    """(seeds, 2) errors and standard errors, and how many alarms there were."""
    errors, said, alarms = [], [], 0
    for seed in seeds:
        found = model(features=STRONG, **settings).fit(batches(strong(n, seed)))
        effects = found.effects(anyway=True)
        errors.append(np.array(effects.estimate) - (0.3, -0.8))
        said.append(effects.std_error)
        alarms += found.alarm is not None
    return np.array(errors), np.array(said), alarms


def test_a_short_warm_up_and_strong_variances_keep_the_law_of_errors():
    """Where a row in thousands threw the heads, errors were thrice the usual standard error."""
    errors, said, alarms = strong_errors(range(5000, 5030), 6000, warm_up=1500)
    usual = np.median(said, axis=0)
    assert (np.sqrt((errors**2).mean(axis=0)) < 1.5 * usual).all()
    assert said.max() < 3 * usual.max()
    assert alarms <= 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (6000, {"warm_up": 1500}),
        (12_000, {"warm_up": 1500, "half_life": 1024}),
        (12_000, {"warm_up": 1500, "window": 4000}),
    ],
)
def test_intervals_and_alarms_are_what_they_say(n, settings, record_property):
    errors, said, alarms = strong_errors(range(1000, 1300), n, **settings)
    covered = (np.abs(errors) < 1.96 * said).mean(axis=0)
    record_property("covered", covered.tolist())
    record_property("alarms", alarms)
    assert (covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 300)).all()
    assert alarms <= 9  # of 300 at 1 %: more have a chance of 0.1 %


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_few_rows_at_rest_are_covered_by_the_set_and_nearly_by_intervals(record_property):
    """1,500 rows whose variances swing: intervals are a little short, the set is not."""
    covered, inside = [], []
    for seed in range(300):
        found = model(features=STRONG).fit(strong(1500, seed)).effects(anyway=True)
        low, high = found.interval(0.95).T
        covered.append((low < (0.3, -0.8)) & (high > (0.3, -0.8)))
        inside.append(bool(found.confidence_set(0.95).contains(0.3, -0.8)))
    record_property("intervals", np.mean(covered, axis=0).tolist())
    record_property("set", float(np.mean(inside)))
    error = 3 * np.sqrt(0.95 * 0.05 / 300)
    assert (np.mean(covered, axis=0) > 0.9 - error).all()
    assert np.mean(inside) > 0.95 - error


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


def quiet_walk(seed, count=25, rows=100):
    """A monitor after batches of one system, with shocks whose squares have no variance."""
    draw = np.random.default_rng(seed)
    monitor = None
    for size in (4 * rows, *count * [rows]):
        s = np.exp(draw.uniform(-1, 1, (size, 2)))
        W = np.linalg.solve([[1.0, -0.5], [-0.4, 1.0]], (s * draw.standard_t(3.5, (size, 2))).T)
        new = Evidence.of(W.T, np.column_stack([s**-2.0, 1 / s.prod(axis=1)]), NO_RATIO).sums
        monitor = monitor.after(Assumptions(), new, 0) if monitor else Monitor.starting(new)
    return monitor


def test_streams_without_a_change_cross_the_bound_as_often_as_they_may(monkeypatch):
    """Ville's inequality, through the monitor itself; not by far less either."""
    monkeypatch.setattr(drift, "LEVEL", 0.2)
    ratios = np.array([quiet_walk(seed).ratio for seed in range(400)])
    crossed = (ratios >= 1).mean()
    assert 0.02 < crossed < 0.2 + 3 * np.sqrt(0.2 * 0.8 / 400)


def test_the_statistic_is_that_of_the_batches_scores():
    """By hand from two batches: sums of the scores, of their squares, and the mixture's bound."""
    draw = np.random.default_rng(3)
    s = np.exp(draw.uniform(-1, 1, (900, 2)))
    W = np.linalg.solve([[1.0, -0.5], [-0.4, 1.0]], (s * draw.standard_normal((900, 2))).T).T
    k = np.column_stack([s**-2.0, 1 / s.prod(axis=1)])
    past, new = (
        Evidence.of(W[part], k[part], NO_RATIO).sums for part in (slice(600), slice(600, 900))
    )
    found = Monitor.starting(past).after(Assumptions(), new, 900)

    a, b = Assumptions().solve(past).estimate
    g = k[:, :2] * ((W[:, 0] - a * W[:, 1]) * (W[:, 1] - b * W[:, 0]))[:, None] / (1 + a * b)
    root = np.linalg.cholesky(np.linalg.inv(g[:600].T @ g[:600] / 600))
    z = g[600:] @ root / np.sqrt(1.5)
    total = z.T @ z + 600 * np.eye(2)
    statistic = z.sum(axis=0) @ np.linalg.solve(total, z.sum(axis=0))
    bound = 2 * np.log(1 / LEVEL) + np.log(np.linalg.det(total / 600))
    np.testing.assert_allclose(found.heights, (statistic, bound), rtol=1e-9)


@pytest.mark.parametrize(
    ("labels", "restrict"), [(2, "a=0"), (2, "b=0"), (5, None), (5, "a=0"), (5, "b=0")]
)
def test_the_alarm_takes_regimes_and_restrictions(labels, restrict):
    """Also instruments that are one too many, as dummies with a constant covariance are."""
    data = table(6000, 44)
    regime = np.minimum(labels - 1, ((data["u"] + 1) / 2 * labels).astype(int))
    found = model(regimes="r", covariance="constant", restrict=restrict)
    found.fit(batches(data | {"r": regime}))
    assert found.alarm is None
    assert 0 < found._stream.monitor.ratio < 1


def test_the_alarm_is_at_the_row_that_was_read_also_after_a_merge():
    quiet, changed = table(30_000, 45), table(20_000, 46, effects=(-0.3, 0.4))
    halves = [
        {name: column[part] for name, column in quiet.items()}
        for part in (slice(15_000), slice(15_000, 30_000))
    ]
    one, two = (model().fit(batches(half)) for half in halves)
    both = one.merge(two).partial_fit(changed)
    assert 30_000 < both.alarm.row < 45_000


def test_a_window_that_is_taken_away_keeps_what_was_in_it():
    data = table(20_000, 47)
    begun = model(window=5000).fit(batches(data))
    before = begun._stream.evidence
    for later in ({"window": None}, {"window": None, "half_life": 5000}):
        begun.set_params(**later).partial_fit(
            {name: column[:1000] for name, column in data.items()}
        )
        assert begun._stream.evidence.rows >= before.rows + 1000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_learning_does_not_raise_the_alarm_where_the_shocks_share_a_part(record_property):
    """A constant covariance: its moments hang on how far instruments move, which is learned."""
    alarms, errors = 0, []
    for seed in range(300):
        draw = np.random.default_rng(seed)
        u, v, e1, e2, common = draw.standard_normal((5, 12_000))
        W1 = np.sin(u) + np.exp(0.4 * u) * e1 + 0.6 * common
        W2 = v / 2 + np.exp(-0.3 * u + 0.2 * v) * e2 + 0.6 * common
        p, q = np.linalg.solve([[1.0, -0.4], [0.5, 1.0]], [W1, W2])
        found = model(features=Polynomial(3), warm_up=1500, covariance="constant")
        found.fit(batches({"p": p, "q": q, "u": u, "v": v}))
        effects = found.effects(anyway=True)
        errors.append((np.array(effects.estimate) - (0.4, -0.5)) / effects.std_error)
        alarms += found.alarm is not None
    covered = (np.abs(errors) < 1.96).mean(axis=0)
    record_property("alarms", alarms)
    record_property("covered", covered.tolist())
    assert alarms <= 9
    assert (covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 300)).all()


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


def test_shards_of_other_units_go_on_with_the_weight_of_their_own_heads():
    """Else the heads of one would take the steps of both, which are small."""
    one, two = (model().fit(batches(table(6000, seed))) for seed in (68, 69))
    weight = one._stream.weight
    both = one.merge(two)._stream
    assert (both.weight, both.rows, both.evidence.rows) == (weight, 12_000, 12_000)


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
