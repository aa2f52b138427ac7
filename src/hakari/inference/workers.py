"""How many jobs run side by side."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

import joblib
from joblib.parallel import get_active_backend


def workers(jobs: int | None = None) -> int:
    """As many as `joblib.parallel_config(n_jobs=...)` says, else one a core; at most `jobs`.

    >>> with joblib.parallel_config(n_jobs=1):
    ...     workers(8)
    1
    """
    asked = get_active_backend()[1]
    count = max(1, int(joblib.effective_n_jobs(-1 if asked is None else asked)))
    return count if jobs is None else max(1, min(jobs, count))


def in_order(jobs: Iterable[Any]) -> Generator[Any]:
    """Results of `joblib.delayed` jobs in their order, as they come; threads unless joblib is told.

    jobs: taken as others end, so that they need not all fit in memory. Backends that only
    return lists (multiprocessing, Ray) get some at a time. What is not finished when the iterator
    is closed, as by Ctrl-C, is dropped.
    """
    count = workers()
    backend = get_active_backend(prefer="threads")[0]
    if not backend.supports_return_generator:
        jobs = iter(jobs)
        while some := list(islice(jobs, 2 * count)):
            yield from joblib.Parallel(n_jobs=count, prefer="threads")(some)
        return
    found = joblib.Parallel(n_jobs=count, prefer="threads", return_as="generator")(jobs)
    try:
        yield from found
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that jobs were dropped
            found.close()
