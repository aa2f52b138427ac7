"""Weighted particles of many bootstrap posteriors, good at any learning rate near their own.

A particle's weight at rate η is exp(−η L) times prior over proposal: L does not depend on η, so
that another rate costs one pass over cached numbers and no evaluation of the loss (arXiv
2405.04845, the reweighting step; gibbs-calibration.md sections 1.4 and 1.10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs import pareto


@dataclass(frozen=True)
class Particles:
    """Particles θ_bi = centre_b + offset_i of B data sets, and where θ̂ stands among them.

    losses (B, N): L_b(θ_bi) − L_b(θ̂). log_prior: of θ_bi less that of θ̂, (B, N), or (1, N) where
    it is the same for all, as are offsets (1, N, d). log_proposal: of the density that the
    particles were drawn from, up to a constant of each b.
    """

    centres: Float[ndarray, "B d"]
    offsets: Float[ndarray, "b N d"]
    losses: Float[ndarray, "B N"]
    log_prior: Float[ndarray, "c N"]
    log_proposal: Float[ndarray, "e N"]
    estimate: Float[ndarray, " d"]

    @property
    def gap(self) -> Float[ndarray, "B d"]:
        """θ̂ − centre_b: compared with an offset, it says on which side of θ̂ a particle is."""
        return np.asarray(self.estimate - self.centres)

    def log_weights(self, rate: float) -> Float[ndarray, "B N"]:
        """Log weights at a learning rate, not normalised."""
        fixed = np.asarray(self.log_prior - self.log_proposal, dtype=np.float32)
        return np.asarray(fixed - np.float32(rate) * self.losses)

    def weights(self, rate: float) -> Float[ndarray, "B N"]:
        """Pareto smoothed weights at a learning rate; each row sums to 1."""
        return normalised(pareto.smooth(self.log_weights(rate))[0])

    def some(self, chosen: slice | ndarray) -> Particles:
        """Those of some data sets; what all share stays shared."""
        return Particles(
            self.centres[chosen],
            self.offsets if len(self.offsets) == 1 else self.offsets[chosen],
            self.losses[chosen],
            self.log_prior if len(self.log_prior) == 1 else self.log_prior[chosen],
            self.log_proposal if len(self.log_proposal) == 1 else self.log_proposal[chosen],
            self.estimate,
        )

    def batch(self, number: int, of: int) -> Particles:
        """Batch `number` of the `of` that lie one after the other: a smaller set of its own."""
        size = self.losses.shape[1] // of
        chosen = slice(number * size, (number + 1) * size)
        return Particles(
            self.centres,
            self.offsets[:, chosen],
            self.losses[:, chosen],
            self.log_prior[:, chosen],
            self.log_proposal[:, chosen],
            self.estimate,
        )


def normalised(log_weight: Float[ndarray, "B N"]) -> Float[ndarray, "B N"]:
    """Weights whose rows sum to 1."""
    w = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
    return np.asarray(w / w.sum(axis=1, keepdims=True))


def effective(weights: Float[ndarray, "B N"]) -> Float[ndarray, " B"]:
    """Effective sample size 1/Σ w² of each row, whose sum is 1."""
    return np.asarray(1 / (weights.astype(float) ** 2).sum(axis=1))
