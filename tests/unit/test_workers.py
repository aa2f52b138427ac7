"""Jobs side by side: how many, and their results in order."""

from __future__ import annotations

import joblib
import pytest
from joblib.parallel import ThreadingBackend

from hakari.inference.workers import in_order, workers


def square(number):
    return number**2


@pytest.fixture
def lists(monkeypatch):
    """A backend that returns lists only, as those of multiprocessing and Ray."""
    monkeypatch.setattr(ThreadingBackend, "supports_return_generator", False)


def numbers(backend):
    with joblib.parallel_config(backend=backend, n_jobs=2):
        return list(in_order(joblib.delayed(square)(k) for k in range(11)))


@pytest.mark.parametrize("backend", ["threading", "loky", "sequential"])
def test_results_come_in_order_by_any_backend(backend):
    assert numbers(backend) == [k**2 for k in range(11)]


def test_results_come_in_order_by_lists(lists):
    assert numbers("threading") == [k**2 for k in range(11)]


def test_jobs_for_lists_are_taken_a_few_at_a_time(lists):
    taken = []

    def jobs():
        for k in range(100):
            taken.append(k)
            yield joblib.delayed(square)(k)

    with joblib.parallel_config(backend="threading", n_jobs=2):
        parts = in_order(jobs())
        assert next(parts) == 0
        assert taken == [0, 1, 2, 3]
        parts.close()


def test_workers_are_as_joblib_says():
    with joblib.parallel_config(n_jobs=3):
        assert workers() == 3
        assert workers(2) == 2
