"""Long runs of every kernel against quadrature, for one and two parameters and three priors."""

from __future__ import annotations

import numpy as np
import pytest
from arviz_stats.base import array_stats

import hakari.inference as hi
from hakari.inference.kernels.independence import accept, log_weights
from hakari.inference.reference import fit_reference
from tests.designs import direct_log_density, iv_design

METHODS = ["mh", "da", "da-exact", "da-approx", "independence", "preconditioned"]
PRIORS = {
    "flat": hi.Flat(),
    "gaussian": hi.Normal(0.7, 0.02),
    "student": hi.StudentT(4, 1.3, 0.02),
}


def problem(K, prior):
    y, X, Z = iv_design(150, K, K + 1, seed=K)
    return hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X, Z), prior), (y, X, Z)


def quadrature(posterior, data):
    """Mean, sd and P(θ_K < truth) of the last parameter, by the rule of rectangles."""
    K, white = posterior.moments.K, posterior.whitened
    line = np.linspace(-9, 9, 20001 if K == 1 else 601)
    u = np.stack(np.meshgrid(*[line] * K, indexing="ij"), axis=-1).reshape(-1, K)
    theta = white.theta(u)
    if K == 1:  # row by row, without the library
        log_p = np.array([direct_log_density(t, *data) for t in theta[::20]])
        ours = posterior.log_density(theta[::20]) - posterior.log_prior(theta[::20])
        assert np.ptp(log_p - ours) < 1e-9
    log_p = posterior.log_density(theta)
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    last = theta[:, -1]
    mean = weight @ last
    return mean, np.sqrt(weight @ (last - mean) ** 2), weight @ (last < mean)


def z_scores(draws, expected):
    """Distances of mean, second moment and one probability in Monte Carlo standard errors."""
    mean, sd, below = expected
    columns = [draws, (draws - mean) ** 2, (draws < mean).astype(float)]
    scores = []
    for column, truth in zip(columns, (mean, sd**2, below), strict=True):
        error = array_stats.mcse(column, method="mean", chain_axis=0, draw_axis=1)
        scores.append(abs(column.mean() - truth) / error)
    return np.array(scores, dtype=float)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("K", [1, 2])
def test_all_kernels_agree_with_quadrature(K, prior):
    posterior, data = problem(K, PRIORS[prior])
    expected = quadrature(posterior, data)
    for method in METHODS:
        if method == "da-exact" and prior == "student":
            continue  # refused by `sample`, tested with the bad inputs
        result = hi.sample(posterior, method, draws=12_000, chains=4, seed=11)
        draws = result["posterior"]["theta"].values[:, :, -1]
        assert z_scores(draws, expected).max() < 4, method


def test_independence_without_hastings_term_is_noticed():
    """The same loop fed with densities in place of weights draws from another law."""
    posterior, data = problem(1, PRIORS["flat"])
    target, expected = posterior.whitened.target, quadrature(posterior, data)
    rng = np.random.default_rng(2)
    reference = fit_reference(target, rng).reference._replace(share=0.0)
    scales = reference.df / rng.chisquare(reference.df, 40_000)
    u, density, weight = log_weights(target, reference, rng.standard_normal((40_000, 1)), scales)
    coins = rng.random(40_000)

    def scores(log_ratio):
        where = np.maximum(accept(log_ratio[0], log_ratio, coins), 0)
        draws = posterior.whitened.theta(u[where])[:, 0].reshape(4, -1)
        return z_scores(draws, expected).max()

    assert scores(weight) < 4
    assert scores(density) > 6
