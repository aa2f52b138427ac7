"""Other intervals, to lay beside a calibrated posterior's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import norm

from hakari.inference.gibbs.bootstrap import default_block
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.sandwich import Sandwich


@dataclass(frozen=True)
class Rival:
    """Intervals of coefficients by another method. label: short, for a legend."""

    label: str
    names: Sequence[str]
    estimate: Float[ndarray, " d"]
    lower: Float[ndarray, " d"]
    upper: Float[ndarray, " d"]

    @property
    def whose(self) -> str:
        """Of whom the intervals are, in a sentence."""
        return f"{self.label}'s" if self.label[:1].isupper() else f"the {self.label}'s"

    def ends(self, name: str) -> tuple[float, float]:
        """The interval of one coefficient."""
        k = list(self.names).index(name)
        return float(self.lower[k]), float(self.upper[k])


def sandwich_rival(
    posterior: GibbsPosterior,
    level: float = 0.95,
    bootstrap: str = "multinomial",
    block: int | None = None,
) -> Rival:
    """θ̂ ± z √V, with V = J⁻¹ K J⁻¹ and K as a bootstrap of this scheme has it.

    bootstrap: with `cluster` scores are summed over the posterior's clusters; with `block` their
    autocovariances count as in the stationary bootstrap of blocks of `block` rows.
    """
    theta = posterior.minimiser
    spread = np.sqrt(np.diag(sandwich_under(posterior, bootstrap, block).covariance))
    half = norm.ppf(0.5 + level / 2) * spread
    return Rival("sandwich", posterior.parameters, theta, theta - half, theta + half)


def sandwich_under(
    posterior: GibbsPosterior, bootstrap: str = "multinomial", block: int | None = None
) -> Sandwich:
    """J, and K as a bootstrap of this scheme has it: what it resamples whole, varies whole.

    bootstrap, block: as of `sandwich_rival`. Both are for all n rows, whatever m of m-out-of-n.
    Raises CubeRootError for a loss that jumps.
    """
    found = posterior.sandwich
    if bootstrap not in ("cluster", "block"):
        return found
    clusters = posterior.clusters if bootstrap == "cluster" else None
    scores = posterior.risk.scores(posterior.minimiser)
    K = dependent_variance(scores, clusters, block or default_block(posterior.risk.n))
    return Sandwich(found.curvature, K)


def dependent_variance(
    scores: Float[ndarray, "n d"], clusters: ndarray | None, block: int
) -> Float[ndarray, "d d"]:
    """Variance of the scores' sum over resampled clusters or, without any, blocks.

    Of blocks with geometric lengths: Σ_k (1 − k/n)(1 − 1/block)^k of the circular
    autocovariances, both ways (Politis and Romano, 1994, Lemma 1).
    """
    centred = scores - scores.mean(axis=0)
    if clusters is not None:
        _, group = np.unique(clusters, return_inverse=True)
        sums = np.zeros((group.max() + 1, scores.shape[1]))
        np.add.at(sums, group, centred)
        return np.asarray(sums.T @ sums)
    n = len(scores)
    lags = np.arange(n)
    weight = (1 - lags / n) * (1 - 1 / block) ** lags
    weight[1:] += weight[1:][::-1]  # lag k and lag k − n are the same in a circle
    waves = np.fft.fft(centred, axis=0)
    filtered = np.fft.ifft(waves * np.fft.fft(weight).real[:, None], axis=0).real
    return np.asarray(centred.T @ filtered)
