"""Frequentist coverage of credible intervals, heteroskedastic linear regression, z = x, flat prior.

Binomial error is asserted where theory promises nominal coverage (n/K ≥ 100); the uncentred
form is conservative when n/K is small, and there the sign of the deviation is asserted.
quasi-posteriors.md, 'Coverage of the target itself'.
"""

from __future__ import annotations

import joblib
import numpy as np
import pytest

import hakari.inference as hi

LEVELS = np.array([0.5, 0.8, 0.95])
REPLICATIONS = 400


def design(n, K, seed):
    rng = np.random.default_rng(seed)
    corr = 0.5 ** np.abs(np.subtract.outer(np.arange(K - 1), np.arange(K - 1)))
    X = np.column_stack([np.ones(n), rng.standard_normal((n, K - 1)) @ np.linalg.cholesky(corr).T])
    return X @ np.ones(K) + (0.5 + np.abs(X[:, 1])) * rng.standard_normal(n), X


def covered(n, K, centred, seed):
    """Which of the K true ones lie in the equal-tailed interval of each level: (3, K)."""
    y, X = design(n, K, seed)
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, centred=centred))
    theta = hi.sample(posterior, "independence", draws=1500, chains=2, seed=seed)
    draws = theta["posterior"]["theta"].values.reshape(-1, K)
    tails = (1 - LEVELS) / 2
    return (np.quantile(draws, tails, axis=0) < 1) & (np.quantile(draws, 1 - tails, axis=0) > 1)


def coverage(n, K, centred):
    """Average coverage (3,) and its standard error, replications being independent."""
    jobs = (joblib.delayed(covered)(n, K, centred, 10_000 * K + r) for r in range(REPLICATIONS))
    inside = np.array(joblib.Parallel(n_jobs=2)(jobs)).mean(axis=2)
    return inside.mean(axis=0), inside.std(axis=0, ddof=1) / np.sqrt(REPLICATIONS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("n", "K"), [(1000, 5), (4000, 20)])
def test_coverage_is_nominal_with_many_rows(n, K, centred, record_property):
    share, error = coverage(n, K, centred)
    record_property("coverage", share.round(3).tolist())
    assert (np.abs(share - LEVELS) < 4 * error).all(), share


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_uncentred_form_is_conservative_with_few_rows(record_property):
    uncentred, error = coverage(500, 20, False)
    centred, _ = coverage(500, 20, True)
    record_property("coverage", [uncentred.round(3).tolist(), centred.round(3).tolist()])
    assert (uncentred > LEVELS - 3 * error).all(), uncentred
    assert (uncentred[:2] > centred[:2]).all()
