"""How many jobs run side by side."""

from __future__ import annotations

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
