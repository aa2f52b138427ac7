"""Gibbs posteriors whose bootstrap posteriors have closed forms, and these."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import gamma, norm

import hakari.inference as hi
from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs.bootstrap import draw_weights
from hakari.inference.gibbs.cached_losses import Cache
from hakari.inference.gibbs.importance import Problem
from hakari.inference.gibbs.particles import normalised
from hakari.inference.gibbs.regions import Region
from hakari.inference.sampling import generator

LEVEL = 0.9
MARGINAL = Region("marginal", "mean")
TRUTH = 0.7  # of the location; the mean of Y lies two standard errors above
Y = TRUTH + 0.6 + 2 * np.random.default_rng(3).standard_normal(60)
COUNTS = np.random.default_rng(4).poisson(0.7, 25).astype(float)
PRIORS = {"flat": hi.Flat(), "normal": hi.Normal(Y.mean() + 0.3, 0.25)}


def location(prior="flat"):
    return hi.GibbsPosterior(hi.losses.squared(), (Y, np.ones(len(Y))), PRIORS[prior])


def counts():
    return hi.GibbsPosterior(hi.losses.poisson(), (COUNTS, np.ones(len(COUNTS))))


def line(d=2, n=40):
    rng = np.random.default_rng(d)
    X = rng.standard_normal((n, d))
    return hi.GibbsPosterior(hi.losses.squared(), (X.sum(axis=1) + rng.standard_normal(n), X))


def threshold(prior=hi.Normal(0, 1.0)):  # noqa: B008 - frozen
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, 200)
    y = np.where(rng.random(200) < 1 / (1 + np.exp(-8 * (x - 0.2))), 1, -1)
    return hi.GibbsPosterior(hi.losses.threshold(), (x, y), prior, 1.3, start=[0.0])


def problem_of(posterior, B=100, N=512, seed=1):
    jumps = isinstance(posterior.loss, hi.Loss)
    scheme = "m-out-of-n" if jumps else "multinomial"
    weights = draw_weights(scheme, posterior.risk.n, B, generator(seed, "bootstrap"))
    placed = None if jumps else clouds.first_order(posterior, weights)
    return Problem(posterior, weights, placed, "gpc", N, seed, Cache(None, ""))


def below(posterior, weights, rate):
    """Exact probability below θ̂ in each data set's posterior."""
    if isinstance(posterior.loss, hi.Loss):  # piecewise constant: on a grid
        grid = np.linspace(-5, 5, 20_001)[:, None]
        loss = posterior.risk.excess(grid, posterior.minimiser) @ weights.T
        w = normalised((posterior.log_prior(grid)[:, None] - rate * loss).T)
        return w @ (grid[:, 0] <= posterior.minimiser)
    w, y = weights.astype(float), posterior.risk.y
    if posterior.loss.name == "poisson":  # exp θ is gamma
        return gamma.cdf(
            np.exp(posterior.minimiser[0]), rate * (w @ y), scale=1 / (rate * w.sum(1))
        )
    precision, pull = rate * w.sum(axis=1), rate * w @ y
    for block in posterior.blocks:
        precision, pull = precision + block.root[0, 0] ** 2, pull + block.root[0, 0] * block.centre
    return norm.cdf((y.mean() - pull / precision) * np.sqrt(precision))


def exact_coverage(posterior, weights, rate, level=LEVEL):
    return (np.abs(2 * below(posterior, weights, rate) - 1) <= level).mean()


def exact_rate(posterior, weights, level=LEVEL):
    """Where the level's share of the data sets covers, by the closed form of each."""

    def gap(log_rate):
        ranks = np.abs(2 * below(posterior, weights, np.exp(log_rate)) - 1)
        return np.quantile(ranks, level) - level

    return float(np.exp(brentq(gap, np.log(0.05), np.log(2.0))))
