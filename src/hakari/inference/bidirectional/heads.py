"""Heads: ridge regressions on features, from sums that add over blocks and shards.

A head's penalty is the one whose predictions of the rows left out are best; both need no other
pass, since sums are kept for each fold, and those of the other folds are the total less its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

PENALTIES = 10.0 ** np.arange(-6, 1.1, 0.5)  # times the mean diagonal of the features' Gram
CHUNK = 256  # rows that lie one after the other in a fold
PIECE = 8192  # rows of one product in single precision


@dataclass(frozen=True)
class Grams:
    """Sums over the rows of each fold: φφ' (K, P, P), φt' (K, P, t), t² (K, t), rows (K,)."""

    gram: Float[ndarray, "K P P"]
    cross: Float[ndarray, "K P t"]
    squares: Float[ndarray, "K t"]
    rows: Float[ndarray, " K"]

    @classmethod
    def of(
        cls,
        features: Float[ndarray, "n P"],
        targets: Float[ndarray, "n t"],
        fold: Int[ndarray, " n"],
        folds: int,
    ) -> Grams:
        """Sums of one block, products in single precision over at most `PIECE` rows."""
        P, t = features.shape[1], targets.shape[1]
        out = cls(
            np.zeros((folds, P, P)), np.zeros((folds, P, t)), np.zeros((folds, t)), np.zeros(folds)
        )
        for k in range(folds):
            at = np.flatnonzero(fold == k)
            phi, y = features[at], targets[at]
            out.gram[k] = product(phi)
            out.cross[k] = phi.T.astype(float) @ y
            out.squares[k] = (y**2).sum(axis=0)
            out.rows[k] = len(at)
        return out

    def __add__(self, other: Grams) -> Grams:
        return Grams(
            self.gram + other.gram,
            self.cross + other.cross,
            self.squares + other.squares,
            self.rows + other.rows,
        )


@dataclass(frozen=True)
class Heads:
    """Coefficients (K + 1, P, t): without each of K folds, and of all rows last.

    penalty (t,): relative to the mean diagonal of the Gram; error (t,): mean square of the errors
    of rows left out; mean, variance (t,): of the targets.
    """

    coefficients: Float[ndarray, "folds P t"]
    penalty: Float[ndarray, " t"]
    error: Float[ndarray, " t"]
    mean: Float[ndarray, " t"]
    variance: Float[ndarray, " t"]

    @property
    def explained(self) -> Float[ndarray, " t"]:
        """Share of each target's variance that predictions of rows left out explain."""
        return np.asarray(1 - self.error / self.variance)

    def left_out(
        self, features: Float[ndarray, "n P"], fold: Int[ndarray, " n"]
    ) -> Float[ndarray, "n t"]:
        """Predictions of rows by the heads that did not see their fold."""
        out = np.empty((len(features), self.coefficients.shape[2]))
        single = self.coefficients.astype(np.float32)
        for k in range(len(single) - 1):
            at = fold == k
            out[at] = features[at] @ single[k]
        return out

    def predict(self, features: Float[ndarray, "n P"]) -> Float[ndarray, "n t"]:
        """Predictions by the heads of all rows."""
        return np.asarray(features @ self.coefficients[-1])


def product(phi: Float[ndarray, "n P"]) -> Float[ndarray, "P P"]:
    """φ'φ, in single precision over at most `PIECE` rows."""
    out = np.zeros((phi.shape[1], phi.shape[1]))
    for i in range(0, len(phi), PIECE):
        part = phi[i : i + PIECE]
        out += part.T @ part
    return out


def folds_of(rows: int, folds: int) -> Int[ndarray, " n"]:
    """Fold of each row of a block: chunks of `CHUNK` in turn, so that neighbours stay together.

    Chunks of a small block are smaller, so that every fold has some of it.
    """
    return np.asarray(np.arange(rows) // max(1, min(CHUNK, rows // folds)) % folds)


def ridge(sums: Grams) -> Heads:
    """Heads of the targets, each with the penalty whose predictions of left-out folds are best.

    The first feature is the constant, which is not penalised. Raises ValueError for fewer rows in
    a fold than 2. Source: design note bidirectional-effects, section 2.6 C.
    """
    folds = len(sums.gram)
    if sums.rows.min() < 2:
        raise ValueError(
            f"a fold has {sums.rows.min():.0f} rows, too few to learn from: give more rows"
        )
    gram, cross = sums.gram.sum(axis=0), sums.cross.sum(axis=0)
    paths = [_path(gram - g, cross - c) for g, c in zip(sums.gram, sums.cross, strict=True)]
    paths.append(_path(gram, cross))
    errors = np.sum([_errors(sums, k, paths[k]) for k in range(folds)], axis=0)
    best = errors.argmin(axis=0)
    coefficients = np.stack([path[best, :, range(len(best))].T for path in paths])
    n = sums.rows.sum()
    mean = cross[0] / n
    variance = sums.squares.sum(axis=0) / n - mean**2
    return Heads(coefficients, PENALTIES[best], errors.min(axis=0) / n, mean, variance)


def _path(gram: Float[ndarray, "P P"], cross: Float[ndarray, "P t"]) -> ndarray:
    """Ridge coefficients at each penalty (penalties, P, t), the constant not penalised.

    By the eigenvectors of the centred Gram, whose negative eigenvalues are its rounding.
    """
    n, mean = gram[0, 0], gram[0] / gram[0, 0]
    values, vectors = np.linalg.eigh(_centred(gram))
    values = np.maximum(values, 0.0)
    turned = vectors.T @ (cross[1:] - np.outer(mean[1:], cross[0]))
    size = mean_size(gram)
    shrunk = turned / (values[:, None] + size * PENALTIES[:, None, None])
    slopes = vectors @ shrunk
    constant = cross[0] / n - mean[1:] @ slopes
    return np.concatenate([constant[:, None], slopes], axis=1)


def mean_size(gram: Float[ndarray, "P P"]) -> float:
    """Mean diagonal of the centred Gram, which penalties are relative to."""
    return max(float(np.diag(_centred(gram)).mean()) if len(gram) > 1 else 0.0, 1e-300)


def _centred(gram: Float[ndarray, "P P"]) -> Float[ndarray, "Q Q"]:
    return np.asarray(gram[1:, 1:] - np.outer(gram[0, 1:], gram[0, 1:]) / gram[0, 0])


def _errors(sums: Grams, k: int, path: ndarray) -> Float[ndarray, "penalties t"]:
    """Sums of squared errors of each penalty's coefficients on a fold's rows, from its sums."""
    inner = 2 * sums.cross[k] - sums.gram[k] @ path
    return np.asarray(sums.squares[k] - (path * inner).sum(axis=1))
