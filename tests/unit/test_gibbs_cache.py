"""Interrupted calibrations lose little, caches tell losses apart, workers are as joblib says."""

from __future__ import annotations

import threading

import joblib
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_array_equal

import hakari.inference as hi
from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs.cached_losses import Cache, cache_for
from hakari.inference.sampling import generator

B, PARTICLES = 50, 256
Y = generator(43, "y").standard_normal(60)


class Counted:
    """|y − θ|, which counts its θ and is interrupted after the last."""

    __name__ = "counted"

    def __init__(self):
        self.calls, self.last = 0, np.inf

    def __call__(self, theta, y):
        if self.calls + len(theta) > self.last:
            raise KeyboardInterrupt
        self.calls += len(theta)
        return abs(y - theta)

    def calibrated(self, method, cache, last=np.inf):
        """A calibration up to `last` calls, and how many it took."""
        self.calls, self.last = 0, last
        posterior = hi.GibbsPosterior(hi.Loss(self, batched=True), Y, start=[0.0])
        settings = {"replicates": B, "particles": PARTICLES, "seed": 4, "cache": cache}
        with joblib.parallel_config(n_jobs=1):
            found = hi.calibrate(posterior, 0.8, "marginal", method=method, **settings)
        return found.found[0], self.calls


LOST = {  # θ, at most: each call is of some more, at which losses are relative to θ̂'s
    "cloud": clouds.POINTS + 1,
    "shift": PARTICLES + 1,
    "gpc": 33 * (B + 1),
    "gpc-wp": 33 * (B + 1),
    "gpc-smc": 24 * (PARTICLES + 1),  # moves of one data set's particles
}


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("method", LOST)
def test_an_interruption_loses_one_piece(method, share, tmp_path):
    loss = Counted()
    whole, _ = loss.calibrated(method, None)
    _, needed = loss.calibrated(method, tmp_path / "whole")
    again, setup = loss.calibrated(method, tmp_path / "whole")  # the search for θ̂, and the key
    assert needed > setup + 3 * LOST[method]
    last = setup + int(share * (needed - setup))
    with pytest.raises(KeyboardInterrupt):
        loss.calibrated(method, tmp_path / "part", last)
    done = loss.calls
    resumed, more = loss.calibrated(method, tmp_path / "part")
    assert (done - setup) + (more - setup) <= (needed - setup) + LOST[method]
    for other in (again, resumed):
        assert other.rate == whole.rate
        assert other.interval == whole.interval
        assert_array_equal(other.ranks, whole.ranks)
    files = [sorted(f.name for f in (tmp_path / run).iterdir()) for run in ("whole", "part")]
    assert files[0] == files[1]  # steps on the way are gone


def test_tasks_are_of_all_data_sets_once_and_small_where_losses_are_dear():
    short = hi.GibbsPosterior(hi.losses.squared(), (Y, np.ones(60)))
    assert clouds.tasks(short, 50, 2048) == [slice(i, min(i + 16, 50)) for i in (0, 16, 32, 48)]
    long = hi.GibbsPosterior(hi.losses.squared(), (np.tile(Y, 1000), np.ones(60_000)))
    assert clouds.tasks(long, 50, 2048) == [slice(i, i + 2) for i in range(0, 50, 2)]
    custom = hi.GibbsPosterior(lambda theta, y: (y - theta) ** 2, Y, start=[0.0])
    assert clouds.tasks(custom, 3, 2048) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_data_sets_that_are_alike_are_written_at_once(tmp_path, monkeypatch):
    """Few clusters make the same data set twice: two workers write one file."""
    both = threading.Barrier(2, timeout=20)
    save = np.save

    def saved(*args, **options):
        save(*args, **options)
        both.wait()

    monkeypatch.setattr(np, "save", saved)
    store = Cache(tmp_path, "problem")
    jobs = [joblib.delayed(store.kept)("same", lambda: np.ones(3)) for _ in range(2)]
    joblib.Parallel(n_jobs=2, prefer="threads")(jobs)
    assert len([*tmp_path.iterdir()]) == 1


# --- what a cache is of ----------------------------------------------------------------------


def rounded(delta):
    """Huber's loss, as a user writes it: in a function whose name does not tell which."""

    def loss(theta, rows):
        y, x = rows
        r = abs(y - theta[:, :1] - theta[:, 1:] * x)
        return np.where(r < delta, r**2 / 2, delta * (r - delta / 2))

    return hi.Loss(loss, batched=True)


def clipped(n=150):
    x, u = generator(43, "clipped").standard_normal((2, n))
    return 1 + x + np.clip(2 * u, -2, 2), x


@pytest.mark.parametrize("form", ["compiled", "own"])
def test_losses_that_differ_far_from_the_minimum_alone_do_not_share_a_cache(form, tmp_path):
    y, x = clipped()
    found = []
    for delta in (2.5, 3.0, 1000.0):
        if form == "own":
            posterior = hi.GibbsPosterior(rounded(delta), (y, x), start=[1.0, 1.0])
        else:
            X = np.column_stack([np.ones_like(x), x])
            posterior = hi.GibbsPosterior(hi.losses.huber(delta), (y, X))
        apart, kept = (
            hi.calibrate(posterior, 0.8, replicates=B, method="cloud", cache=cache).found[0]
            for cache in (None, tmp_path)
        )
        assert kept.rate == apart.rate
        assert_array_equal(kept.ranks, apart.ranks)
        found.append(apart.rate)
    assert len({*found}) > 1


def keys(tmp_path, *posteriors):
    weights = np.ones((2, posteriors[0].risk.n), dtype=np.float32)
    return [cache_for(tmp_path, p, weights).problem for p in posteriors]


def test_a_cache_knows_the_shape_and_all_rows_of_a_compiled_loss(tmp_path):
    y, x = np.append(Y, 500.0), np.ones(61)  # the last row is far beyond the kink
    far = np.append(Y, 501.0)
    rows = [(y, x), (y, x), (far, x), (y, x, np.ones(61))]
    quantiles = [hi.GibbsPosterior(hi.losses.quantile(0.5), each) for each in rows]
    same, again, *others = keys(tmp_path, *quantiles)
    assert same == again
    assert len({same, *others}) == 3
    wide = [hi.GibbsPosterior(hi.losses.huber(d), (Y, np.ones(60))) for d in (500.0, 1000.0)]
    assert len({*keys(tmp_path, *wide)}) == 2


def test_a_cache_knows_the_name_and_rows_of_an_own_loss(tmp_path):
    def loss(theta, rows):
        return (rows["y"] - theta) ** 2

    frame = pd.DataFrame({"y": Y, "unused": 1.0})
    variants = {
        "same": (hi.Loss(loss), frame),
        "copied": (hi.Loss(loss), frame.copy()),
        "renamed": (hi.Loss(loss, name="other"), frame),
        "rows": (hi.Loss(loss), frame.assign(unused=2.0)),
        "rows that cannot be pickled": (hi.Loss(loss), {"y": Y, "more": lambda: 0}),
    }
    made = [hi.GibbsPosterior(one, rows, start=[0.0]) for one, rows in variants.values()]
    same, copied, *others = keys(tmp_path, *made)
    assert same == copied
    assert len({same, *others}) == 4


def test_a_cache_can_be_of_a_loss_that_is_not_defined_everywhere(tmp_path):
    def up_to(end):
        def loss(theta, y):
            hole = 1 < abs(theta[0]) < end
            return np.full(len(y), np.nan) if hole else (y - theta[0]) ** 2

        return hi.GibbsPosterior(loss, Y, start=[0.0])

    same, again, other = keys(tmp_path, up_to(1.5), up_to(1.5), up_to(2.0))
    assert same == again != other


# --- workers ---------------------------------------------------------------------------------


def test_workers_are_as_many_as_joblib_is_told():
    assert clouds.workers(10**6) == joblib.effective_n_jobs(-1)
    threads = set()

    def loss(theta, y):
        threads.add(threading.current_thread())
        return abs(y - theta)

    def seen(workers):
        threads.clear()
        with joblib.parallel_config(n_jobs=workers):
            assert clouds.workers(10**6) == workers
            assert clouds.workers(1) == 1
            posterior = hi.GibbsPosterior(hi.Loss(loss, batched=True), Y, start=[0.0])
            hi.calibrate(posterior, 0.8, replicates=B, method="shift", particles=PARTICLES)
        return threads - {threading.main_thread()}

    assert not seen(1)
    assert seen(2)
