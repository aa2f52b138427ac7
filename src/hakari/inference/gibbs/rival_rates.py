"""Other learning rates, side by side: none of them aims at coverage.

Lyddon, Holmes and Walker (2019); Holmes and Walker (2017), in its large-sample form; SafeBayes
(Grünwald and van Ommen, 2017), which predicts each row from those before it. Wu and Martin (2023)
compare them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs import loss_kernels as kernels
from hakari.inference.gibbs import pareto
from hakari.inference.gibbs.importance import LEAST
from hakari.inference.gibbs.losses import Loss
from hakari.inference.gibbs.particles import effective, normalised
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.risk import CustomRisk, LinearRisk, Risk
from hakari.inference.gibbs.sandwich import CubeRootError, Sandwich
from hakari.inference.sampling import generator

NAMES = ("Lyddon-Holmes-Walker", "Holmes-Walker", "SafeBayes")
LIKELIHOODS = (kernels.LOGISTIC, kernels.POISSON)
SAFE_PARTICLES = 1024
SAFE_ROWS = 1000  # rows that are predicted, at most
HALVINGS = 8  # of the largest rate that SafeBayes tries
ATTEMPTS = 2  # to place the particles of a stretch of rows


def rival_rates(posterior: GibbsPosterior, seed: int = 0) -> dict[str, float]:
    """The rates of Lyddon-Holmes-Walker, of Holmes-Walker and of SafeBayes.

    NaN where a rate does not apply: all three for a loss that jumps, SafeBayes as in `safe_bayes`.
    seed: of SafeBayes's order of rows and its particles.

    >>> import hakari.inference as hi
    >>> y = np.random.default_rng(1).standard_normal(100) * 2
    >>> found = rival_rates(hi.GibbsPosterior(hi.losses.squared(), (y, np.ones(100))))
    >>> {name: round(rate, 1) for name, rate in found.items()}
    {'Lyddon-Holmes-Walker': 0.3, 'Holmes-Walker': 0.6, 'SafeBayes': 0.3}
    """
    loss = posterior.risk.loss
    unknown = dict.fromkeys(NAMES, float("nan"))
    if isinstance(loss, Loss) and loss.jumps:
        return unknown
    try:
        found = posterior.sandwich
    except CubeRootError:
        return unknown
    safe = safe_bayes(posterior, generator(seed, "SafeBayes"))
    return dict(zip(NAMES, (lyddon_holmes_walker(found), holmes_walker(found), safe), strict=True))


def lyddon_holmes_walker(found: Sandwich) -> float:
    """tr(J K⁻¹ J)/tr(J): the information of the loss-likelihood bootstrap is matched.

    Rows count as independent. Four times the loss has a quarter of the rate: the same posterior.
    """
    J, K = found.curvature, found.score_variance
    return float(np.trace(J @ np.linalg.solve(K, J)) / np.trace(J))


def holmes_walker(found: Sandwich) -> float:
    """(tr J/tr K)^(1/2): expected information of the model over that of the data.

    It does not scale with the loss: four times the loss has half the rate, and so another
    posterior, twice as informative. It means something for log-likelihoods, whose scale is given.
    """
    return float(np.sqrt(np.trace(found.curvature) / np.trace(found.score_variance)))


def safe_bayes(
    posterior: GibbsPosterior, generator: Generator, grid: Float[ndarray, " G"] | None = None
) -> float:
    """The rate whose posteriors predict best: least Σ_i E[l(θ; z_i)] given the rows before i.

    Rows in random order, at most 1,000; the first twentieth (at least 5 a coefficient) only warms
    up. grid: default 1, 1/2, ..., 2^(−8) times the largest rate, which is that of the likelihood
    for the logistic and Poisson losses, 1, and for losses without a scale of their own the
    Lyddon-Holmes-Walker rate. A ceiling is needed: narrower posteriors have the smaller expected
    loss, and under a flat prior, which no rate can outweigh, SafeBayes is mostly that ceiling.

    NaN where the particles of the best rate, or of one next to it, do not reach its posteriors
    (effective size or k-hat), and where the rows of a function cannot be taken one by one (other
    than arrays, tables, or tuples of them).
    """
    n, d = posterior.risk.n, len(posterior.parameters)
    rates = _rates(posterior) if grid is None else np.asarray(grid, dtype=float)
    first = min(n - 1, max(5 * d, n // 20))
    order = generator.permutation(n)[: max(SAFE_ROWS, 2 * first)]
    noise = clouds.uniforms(SAFE_PARTICLES, d, int(generator.integers(2**31)))
    risk = _ordered(posterior, order)
    if risk is None:
        return float("nan")
    losses = np.array([_predicted(posterior, risk, first, noise, float(rate)) for rate in rates])
    if np.isnan(losses).all():
        return float("nan")
    best = int(np.nanargmin(losses))
    near = losses[max(0, best - 1) : best + 2]
    return float("nan") if np.isnan(near).any() else float(rates[best])


def _rates(posterior: GibbsPosterior) -> Float[ndarray, " G"]:
    risk = posterior.risk
    likelihood = isinstance(risk, LinearRisk) and risk.loss.kind in LIKELIHOODS
    largest = 1.0 if likelihood else lyddon_holmes_walker(posterior.sandwich)
    return largest * 0.5 ** np.arange(HALVINGS + 1)


def _predicted(
    posterior: GibbsPosterior, risk: Risk, first: int, noise: ndarray, rate: float
) -> float:
    """Σ_i E[l(θ; z_i) − l(θ̂; z_i)] over the rows from `first` on; NaN where particles fail.

    Posteriors of neighbouring rows are alike and share particles: stretch by stretch of rows.
    """
    total = 0.0
    for begin, end in _stretches(first, risk.n, len(posterior.parameters)):
        total += _stretch(posterior, risk, (begin, end), noise, rate)
        if np.isnan(total):
            break
    return total


def _stretches(first: int, n: int, d: int) -> Iterator[tuple[int, int]]:
    """Rows from, up to: the shorter the more coefficients, as posteriors narrow in each."""
    begin = first
    while begin < n:
        end = min(n, max(begin + 1, int(begin * (1 + 2 / (d + 1)))))
        yield begin, end
        begin = end


def _stretch(
    posterior: GibbsPosterior, risk: Risk, rows: tuple[int, int], noise: ndarray, rate: float
) -> float:
    """The part of a stretch of rows; of its halves where one set of particles is not enough."""
    found = _sampled(posterior, risk, rows, noise, rate)
    begin, end = rows
    if not np.isnan(found) or end - begin == 1:
        return found
    middle = (begin + end) // 2
    left = _stretch(posterior, risk, (begin, middle), noise, rate)
    if np.isnan(left):
        return left
    return left + _stretch(posterior, risk, (middle, end), noise, rate)


def _sampled(
    posterior: GibbsPosterior, risk: Risk, rows: tuple[int, int], noise: ndarray, rate: float
) -> float:
    """Importance sampling of the posteriors of a stretch of rows."""
    begin, end = rows
    n, d = posterior.risk.n, len(posterior.parameters)
    mean, covariance = _form(posterior, risk, rows, rate)
    covariance = covariance + n * (1 / begin - 1 / end) * posterior.sandwich.covariance
    for _ in range(ATTEMPTS):
        root = np.linalg.cholesky(covariance)
        offsets, log_proposal = clouds.student(noise, root, clouds.degrees(d))
        theta = mean + offsets
        rise = _excess(risk, theta, posterior.minimiser, end)
        before = rise[:, :begin].sum(axis=1)[:, None] + np.zeros((1, end - begin))
        before[:, 1:] += np.cumsum(rise[:, begin:-1], axis=1)
        fixed = (posterior.log_prior(theta) - log_proposal)[:, None]
        log_weight = np.ascontiguousarray((fixed - rate * before).T)
        w = normalised(log_weight)
        shapes = pareto.smooth(log_weight[[0, -1]])[1]
        if effective(w).min() >= LEAST and shapes.max() <= pareto.threshold(len(noise)):
            some = w > 0  # the others may lie outside the loss's domain
            return float((w[some] * rise[:, begin:].T[some]).sum())
        both = w[[0, -1]].mean(axis=0)  # again, around where the weight lies
        mean = (both @ theta)[None]
        covariance = 1.5 * ((theta - mean).T * both) @ (theta - mean)
        if not np.linalg.eigvalsh(covariance)[0] > 0:
            break
    return float("nan")


def _form(
    posterior: GibbsPosterior, risk: Risk, rows: tuple[int, int], rate: float
) -> tuple[ndarray, ndarray]:
    """Mean (1, d) amid the stretch and covariance at its begin, to first order.

    Mostly by the rows' own curvature where the loss is smooth: a few of them are unlike all.
    """
    begin, middle = rows[0], int(np.sqrt(rows[0] * rows[1]))
    at, found = posterior.minimiser, posterior.sandwich
    curvature = begin / posterior.risk.n * found.curvature
    pull = risk.scores(at)[:middle].sum(axis=0) * begin / middle
    if isinstance(risk, LinearRisk) and risk.loss.smooth:
        curvature = 0.1 * curvature + 0.9 * np.asarray(_first(risk, begin).curvature(at))
    precision, weighted = rate * curvature, rate * (curvature @ at - pull)
    for block in posterior.blocks:
        precision = precision + block.root.T @ block.root
        weighted = weighted + block.root.T @ block.centre
    covariance = np.linalg.inv(precision)
    return (covariance @ weighted)[None], covariance


# --- rows in another order ----------------------------------------------------------------


def _ordered(posterior: GibbsPosterior, order: ndarray) -> Risk | None:
    """The risk of some rows in an order of their own, or None where they cannot be told apart."""
    risk = posterior.risk
    if isinstance(risk, LinearRisk):
        weights = None if risk.weights is None else risk.weights[order]
        return LinearRisk(risk.loss, risk.y[order], risk.X[order], risk.names, weights)
    try:
        part = CustomRisk(risk.loss, _taken(risk.rows, order, risk.n), risk.names, risk.start)
        here = part.loss.values(risk.minimiser[None], part.rows)
    except (ValueError, TypeError, IndexError, KeyError):
        return None
    whole = risk.loss.values(risk.minimiser[None], risk.rows)[:, order]
    same = here.shape == whole.shape and np.allclose(here, whole, rtol=1e-5, atol=1e-12)
    return part if same else None


def _taken(rows: Any, order: ndarray, n: int) -> Any:
    """Those rows of an array, a table, or a tuple or list of them; what has no rows stays."""
    if isinstance(rows, tuple | list) and not (len(rows) == n and np.ndim(rows[0]) == 0):
        return type(rows)([_taken(part, order, n) for part in rows])
    if not hasattr(rows, "__len__") or len(rows) != n:
        return rows
    return rows.iloc[order] if hasattr(rows, "iloc") else np.asarray(rows)[order]


def _first(risk: LinearRisk, end: int) -> LinearRisk:
    weights = None if risk.weights is None else risk.weights[:end]
    return LinearRisk(risk.loss, risk.y[:end], risk.X[:end], risk.names, weights)


def _excess(risk: Risk, theta: ndarray, at: ndarray, end: int) -> ndarray:
    """Of the first rows; a function computes all, as each number of rows may compile anew."""
    if isinstance(risk, CustomRisk):
        return np.asarray(risk.excess(theta, at)[:, :end], dtype=float)
    return np.asarray(_first(risk, end).excess(theta, at), dtype=float)
