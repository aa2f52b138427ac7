"""What a row is met with before the effects: features, heads of means and of log variances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from hakari.inference.bidirectional.features import Basis, Features
from hakari.inference.bidirectional.heads import Grams, Heads, folds_of, ridge
from hakari.inference.bidirectional.rows import Rows, regimes_of

FOLDS = 5
FLOOR = 1e-4  # share of the mean square that is added to a square before its log
REACH = 2.0  # standard deviations of predicted log variances beyond which they are cut
FEWEST = 1000  # rows that features and heads can be made from


@dataclass(frozen=True)
class Nuisance:
    """Features and heads. Outcomes are in units of their own: (y − centre)/unit.

    basis: None without covariates. regimes: labels whose dummies join the features, or (). start:
    effects, in those units, at which the shocks of `variances` are taken; (0, 0) says that these
    are the residuals themselves. means, variances: None before their pass; with regimes the
    variances stay None, since the dummies are the instruments.
    """

    basis: Basis | None
    centre: Float[ndarray, " 2"]
    unit: Float[ndarray, " 2"]
    regimes: tuple[Any, ...] = ()
    means: Heads | None = None
    variances: Heads | None = None
    start: tuple[float, float] = (0.0, 0.0)

    @property
    def size(self) -> int:
        """Number of features, dummies included."""
        return (self.basis.size if self.basis else 1) + max(len(self.regimes) - 1, 0)

    def matrix(self, rows: Rows) -> Float[ndarray, "n P"]:
        """Features of rows, then the dummies of all regimes but the first."""
        one = np.ones((len(rows), 1), dtype=np.float32)
        phi = self.basis.transform(rows.X) if self.basis else one
        if not self.regimes:
            return phi
        return np.hstack([phi, self.dummies(rows)[:, 1:].astype(np.float32)])

    def dummies(self, rows: Rows) -> Float[ndarray, "n R"]:
        """1 for the regime of each row. Raises ValueError for one that the warm-up did not have."""
        which = np.empty(0) if rows.regimes is None else rows.regimes
        out = np.stack([which == label for label in self.regimes], axis=1).astype(float)
        if not out.any(axis=1).all():
            label = which[~out.any(axis=1)].tolist()[0]
            raise ValueError(
                f"regime {label!r} is not among those of the rows that were learned from first "
                f"({', '.join(map(str, self.regimes))}): give a longer warm_up, or other rows first"
            )
        return out

    def outcomes(self, rows: Rows) -> Float[ndarray, "n 2"]:
        """Outcomes in their own units."""
        return np.asarray((rows.y - self.centre) / self.unit)

    def instruments(self, log_variances: Float[ndarray, "n 2"]) -> Float[ndarray, "n 3"]:
        """(k1, k2, √(k1 k2)), k_j = 1/s_j² in the units of the data, from predicted log s_j².

        Predictions are cut `REACH` standard deviations from their mean, so that no row rules.
        """
        heads = _known(self.variances, "log variances")
        middle = heads.mean
        room = REACH * np.sqrt(np.maximum(heads.variance - heads.error, 0.05))
        h = np.clip(log_variances, middle - room, middle + room)
        k = np.exp(-h) / self.unit**2
        return np.column_stack([k, np.sqrt(k[:, 0] * k[:, 1])])

    def log_squares(self, shocks: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
        """Logs of squares, with a floor that keeps single zeros from ruling (Harvey, 1976)."""
        floor = FLOOR * _known(self.means, "means").error
        return np.asarray(np.log(shocks**2 + floor))


def shocks(W: Float[ndarray, "n 2"], effects: tuple[float, float]) -> Float[ndarray, "n 2"]:
    """ε1 = W1 − a W2 and ε2 = W2 − b W1."""
    a, b = effects
    return np.column_stack([W[:, 0] - a * W[:, 1], W[:, 1] - b * W[:, 0]])


def warmed_up(
    features: Features | None,
    rows: Rows,
    names: Sequence[str],
    regimes: Sequence[Any] | None = None,
) -> Nuisance:
    """Features and units from some rows: means and log variances say what features matter.

    regimes: their labels, those of the rows by default. Raises ValueError for fewer than 1,000
    rows, and an outcome that is constant.
    """
    if len(rows) < FEWEST:
        raise ValueError(f"{len(rows)} rows: at least {FEWEST:,} are needed to learn features from")
    centre, unit = rows.y.mean(axis=0), rows.y.std(axis=0)
    for j in range(2):
        if not unit[j] > 1e-12 * abs(centre[j]):
            raise ValueError(f"y{j + 1} is {centre[j]:g} in all rows: it has no effect to find")
    labels = tuple(regimes_of(rows) if regimes is None else regimes)
    if not rows.X.shape[1] or features is None:
        return Nuisance(None, centre, unit, labels)
    y = (rows.y - centre) / unit
    first = Nuisance(features.fit(rows.X, y, names), centre, unit, labels)
    if getattr(features, "length_scale", None) != "relevance":
        return first
    phi, fold = first.matrix(rows), folds_of(len(rows), FOLDS)
    first = replace(first, means=ridge(Grams.of(phi, y, fold, FOLDS)))
    W = y - _known(first.means, "means").left_out(phi, fold)
    targets = np.column_stack([y, first.log_squares(W)])
    return replace(first, basis=features.fit(rows.X, targets, names), means=None)


def left_out(nuisance: Nuisance, rows: Rows) -> tuple[ndarray, ndarray, Int[ndarray, " n"]]:
    """Residuals W (n, 2) by heads that did not see the row, features, and folds."""
    phi, fold = nuisance.matrix(rows), folds_of(len(rows), FOLDS)
    W = nuisance.outcomes(rows) - _known(nuisance.means, "means").left_out(phi, fold)
    return W, phi, fold


def _known(heads: Heads | None, what: str) -> Heads:
    if heads is None:
        raise ValueError(f"the heads of {what} have not been fitted")
    return heads
