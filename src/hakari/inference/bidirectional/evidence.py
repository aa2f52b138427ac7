"""What rows say about the effects: sums of the orthogonal moments, and of the log variances' test.

They add over blocks, shards and streams, and are all that estimates, sets and tests are made from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.bidirectional.identification import RatioSums
from hakari.inference.bidirectional.orthogonal_moments import MomentSums, Restriction, Solution


@dataclass(frozen=True)
class Evidence:
    """sums: with the instruments (1, k_1, ..., k_q) in four blocks, see `MomentSums`.

    ratio: of the log ratio of squared shocks on the one predicted from other rows, or on dummies of
    regimes. draws (R, 4 + 4q): `sums.first` with rows weighted by independent Exp(1) numbers, R
    multiplier bootstraps; R = 0 without.
    """

    sums: MomentSums
    ratio: RatioSums
    draws: Float[ndarray, "R z"]

    @classmethod
    def of(
        cls,
        W: Float[ndarray, "n 2"],
        k: Float[ndarray, "n q"],
        ratio: RatioSums,
        bootstraps: int = 0,
        chance: Generator | None = None,
    ) -> Evidence:
        """Evidence of rows with residuals W and instruments k; chance: of the bootstraps."""
        sums = MomentSums.of(W[:, 0], W[:, 1], k, constant_covariance=True)
        draws = np.zeros((bootstraps, len(sums.first)))
        if bootstraps and chance is not None:
            draws = _weighted(W, k, bootstraps, chance)
        return cls(sums, ratio, draws)

    def __add__(self, other: Evidence) -> Evidence:
        if len(self.draws) != len(other.draws):
            raise ValueError(
                f"{len(self.draws)} and {len(other.draws)} bootstraps do not add: fit with the same"
            )
        return Evidence(self.sums + other.sums, self.ratio + other.ratio, self.draws + other.draws)

    def scaled(self, factor: float) -> Evidence:
        """With every row's weight times factor: forgetting."""
        return Evidence(self.sums.scaled(factor), self.ratio.scaled(factor), factor * self.draws)

    @property
    def rows(self) -> int:
        """Rows that entered."""
        return self.sums.count


@dataclass(frozen=True)
class Assumptions:
    """What is taken as known. covariance: of the shocks given x, `zero`, or `constant` over x.

    restrict: an effect known to be 0. regimes: whether instruments are dummies of regimes; else
    the first two of the three are used to estimate, and all to test.
    """

    covariance: Literal["zero", "constant"] = "zero"
    restrict: Restriction | None = None
    regimes: bool = False

    def moments(self, sums: MomentSums, overidentified: bool = False) -> MomentSums:
        """The sums that the assumptions are about; overidentified: with all instruments."""
        q = sums.instruments
        k = list(range(1, q)) if self.regimes or overidentified else [1, 2]
        if self.covariance == "constant":
            return _chosen(sums, [0, *k], 4).centred()
        return _chosen(sums, k, 3)

    def solve(self, sums: MomentSums, overidentified: bool = False) -> Solution:
        """The estimate from such sums."""
        return self.moments(sums, overidentified).solve(self.restrict)


def _chosen(sums: MomentSums, instruments: list[int], blocks: int) -> MomentSums:
    """The sums of some instruments, by their places, as if the others had not been given."""
    at = (np.arange(blocks)[:, None] * sums.instruments + instruments).ravel()
    return replace(sums, first=sums.first[at], second=sums.second[np.ix_(at, at)], blocks=blocks)


def _weighted(
    W: Float[ndarray, "n 2"], k: Float[ndarray, "n q"], bootstraps: int, chance: Generator
) -> Float[ndarray, "R z"]:
    """Sums of z with exponential weights, one set of weights a bootstrap."""
    one = np.ones(len(W))
    products = np.stack([W[:, 0] * W[:, 1], W[:, 0] ** 2, W[:, 1] ** 2, one], axis=1)
    both = np.column_stack([one, k])
    z = (products[:, :, None] * both[:, None, :]).reshape(len(W), -1).astype(np.float32)
    weights = chance.standard_exponential((bootstraps, len(W)), dtype=np.float32)
    return np.asarray(weights @ z, dtype=float)
