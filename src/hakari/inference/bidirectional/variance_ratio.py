"""How the shocks' variances move against each other: log ρ = log s1² − log s2², by covariates.

Heads predict log variances up to a constant each, since the mean log of a squared shock depends on
its law. The constants are those with E[k_j ε_j²] = 1, for k_j = 1/s_j². Design note
bidirectional-effects, sections 2.2 and 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.bidirectional.nuisance import Nuisance
from hakari.inference.bidirectional.orthogonal_moments import MomentSums
from hakari.inference.bidirectional.rows import Rows

POINTS = 41  # of a curve
AVERAGED = 200  # rows over whose other covariates a curve is the mean
FEW = 10  # values up to which a covariate is not put on a grid
TAILS = (0.01, 0.99)  # quantiles between which the grid lies
SPREAD = (0.1, 0.9)  # quantiles over rows that stand beside the mean


@dataclass(frozen=True)
class RatioCurve:
    """Mean of log ρ over rows, with one covariate set to each of `values` in all of them.

    low, high: quantiles over the rows, so that a covariate that matters for some shows.
    """

    covariate: str
    values: Float[ndarray, " m"]
    log_ratio: Float[ndarray, " m"]
    low: Float[ndarray, " m"]
    high: Float[ndarray, " m"]

    @property
    def range(self) -> float:
        """How far log ρ moves along the curve."""
        return float(np.ptp(self.log_ratio))


@dataclass(frozen=True)
class RegimeRatios:
    """log ρ in each regime, and its standard error for given effects."""

    labels: tuple[Any, ...]
    log_ratio: Float[ndarray, " R"]
    std_error: Float[ndarray, " R"]


def ratio_curves(
    nuisance: Nuisance,
    sums: MomentSums,
    effects: tuple[float, float],
    rows: Rows,
    names: Sequence[str],
) -> tuple[RatioCurve, ...]:
    """A curve a covariate, the one along which log ρ moves most first.

    sums: of all evidence, whose first instrument is the constant; effects: (a, b) at which the
    shocks are taken; rows: a sample that stands for all; names: of its covariates. Raises
    ValueError for rows without covariates.
    """
    if not names or not len(rows):
        raise ValueError("no covariates or no rows: a variance ratio needs some to move along")
    averaged = rows.X[np.linspace(0, len(rows) - 1, min(AVERAGED, len(rows))).astype(int)]
    shift = level(sums, effects)
    curves = []
    for j, name in enumerate(names):
        values = _grid(rows.X[:, j])
        found = np.stack([_log_ratio(nuisance, _with(averaged, j, v)) for v in values]) + shift
        low, high = np.quantile(found, SPREAD, axis=1)
        curves.append(RatioCurve(name, values, found.mean(axis=1), low, high))
    return tuple(sorted(curves, key=lambda curve: -curve.range))


def level(sums: MomentSums, effects: tuple[float, float]) -> float:
    """What to add to log k2 − log k1 for log ρ: the log of E[k1 ε1²]/E[k2 ε2²].

    >>> W, k = np.array([1.0, -1.0]), np.array([[1.0, 2.0, 4.0]] * 2)
    >>> round(level(MomentSums.of(W, W, k, constant_covariance=True), (0.0, 0.0)) / np.log(2), 12)
    -1.0
    """
    first, second = _squares(sums, effects)
    return float(np.log(first[1] / second[2]))


def regime_ratios(
    labels: Sequence[Any], sums: MomentSums, effects: tuple[float, float]
) -> RegimeRatios:
    """Log ρ of each regime, whose dummies are the instruments after the constant."""
    q, (a, b) = sums.instruments, effects
    first, second = _squares(sums, effects)
    errors = []
    for r in range(1, q):
        # ε² in terms of W1W2, W1², W2²
        slope = (
            np.array([-2 * a, 1.0, a * a]) / first[r] - np.array([-2 * b, b * b, 1.0]) / (second[r])
        )
        at = r + q * np.arange(3)
        errors.append(np.sqrt(slope @ sums.second[np.ix_(at, at)] @ slope))
    ratio = np.log(first[1:] / second[1:])
    return RegimeRatios(tuple(labels), ratio, np.array(errors))


# --- parts ------------------------------------------------------------------------------------


def _squares(
    sums: MomentSums, effects: tuple[float, float]
) -> tuple[Float[ndarray, " q"], Float[ndarray, " q"]]:
    """Sums of k ε1² and of k ε2², for each instrument."""
    cross, one, two = sums.first.reshape(sums.blocks, sums.instruments)[:3]
    a, b = effects
    return one - 2 * a * cross + a * a * two, two - 2 * b * cross + b * b * one


def _log_ratio(nuisance: Nuisance, X: Float[ndarray, "n p"]) -> Float[ndarray, " n"]:
    heads = nuisance.variances
    if heads is None:
        raise ValueError("regimes have no curve: take `regime_ratios`")
    phi = nuisance.matrix(Rows(np.zeros((len(X), 2)), X))
    k = nuisance.instruments(heads.predict(phi).astype(float))
    return np.asarray(np.log(k[:, 1] / k[:, 0]))


def _with(X: Float[ndarray, "n p"], column: int, value: float) -> Float[ndarray, "n p"]:
    out = X.copy()
    out[:, column] = value
    return out


def _grid(values: Float[ndarray, " n"]) -> Float[ndarray, " m"]:
    kinds = np.unique(values)
    if len(kinds) <= FEW:
        return kinds
    low, high = np.quantile(values, TAILS)
    return np.linspace(low, high, POINTS) if high > low else kinds[[0, -1]]
