"""Other learning rates, side by side: none of them aims at coverage.

Lyddon, Holmes and Walker (2019); Holmes and Walker (2017), in its large-sample form; SafeBayes
(Grünwald, 2012), which predicts each row from those before it. Wu and Martin (2023) compare them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.sandwich import Sandwich

SAFE_PARTICLES = 2048
SAFE_ROWS = 2000  # rows that are predicted, at most


def lyddon_holmes_walker(found: Sandwich) -> float:
    """tr(J K⁻¹ J)/tr(J): the information of the loss-likelihood bootstrap is matched."""
    J, K = found.curvature, found.score_variance
    return float(np.trace(J @ np.linalg.solve(K, J)) / np.trace(J))


def holmes_walker(found: Sandwich) -> float:
    """(tr J/tr K)^(1/2): expected information of the model over that of the data."""
    return float(np.sqrt(np.trace(found.curvature) / np.trace(found.score_variance)))


def safe_bayes(
    posterior: GibbsPosterior, generator: Generator, grid: Float[ndarray, " G"] | None = None
) -> float:
    """The rate whose posteriors predict best: least Σ_i E[l(θ; z_i)] given the rows before i.

    Rows in random order; the first twentieth (at least 5 a coefficient) only warms up. grid:
    default 2^(−10), ..., 2^10 times the Lyddon-Holmes-Walker rate. Particles cover the posteriors
    of a twentieth of the rows and of all.
    """
    n, d = posterior.risk.n, len(posterior.parameters)
    base = lyddon_holmes_walker(posterior.sandwich)
    rates = base * 2.0 ** np.arange(-10, 11) if grid is None else np.asarray(grid, dtype=float)
    first = min(n - 1, max(5 * d, n // 20))
    order = generator.permutation(n)[: max(SAFE_ROWS, 2 * first)]
    noise = clouds.uniforms(SAFE_PARTICLES, d, int(generator.integers(2**31)))
    covariance = posterior.sandwich.covariance * n / first * 2
    root = np.linalg.cholesky(covariance)
    offsets, log_proposal = clouds.student(noise, root, clouds.degrees(d))
    theta = posterior.minimiser + offsets
    rows = posterior.risk.excess(theta, posterior.minimiser)[:, order].astype(float)
    before = np.cumsum(rows, axis=1) - rows
    fixed = (posterior.log_prior(theta) - log_proposal)[:, None]
    losses = [_predicted(fixed - rate * before[:, first:], rows[:, first:]) for rate in rates]
    return float(rates[int(np.argmin(losses))])


def _predicted(log_weight: ndarray, rows: ndarray) -> float:
    w = np.exp(log_weight - log_weight.max(axis=0))
    return float(((w * rows).sum(axis=0) / w.sum(axis=0)).sum())
