"""Search for the covariates that matter: effects of one, and of products of two.

A forward search over the covariates and cosines of their ranks, by score tests on what the effects
before leave over, so that a covariate does not enter on behalf of one that it is correlated with.
Products are searched all at once: the scores of all pairs are a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import chi2, rankdata

COSINES = 6  # of a covariate's ranks: bends as short as a sixth of its range
PRODUCTS = 2  # of them whose products with another covariate's are searched
PRODUCT_ROWS = 10_000  # that this search sees
ERROR = 1e-3  # chance that a search step finds an effect where there is none
CANDIDATES = 20  # products that are looked at before the next search
STEPS = 60  # effects at most
FULL = 4  # rows a column at least
_DEGENERATE = 1e-3  # share of a column's square that others leave: less is rounding, or ties


def matter(X: Float[ndarray, "n p"], targets: Float[ndarray, "n t"]) -> Int[ndarray, " d"]:
    """Indices of covariates that explain a target, alone or in a product of two, in rising order.

    X, targets: of variance 1. Score tests with a covariance robust to heteroskedasticity (White,
    1980), at a family-wise error of 1/1000 a step; effects that later ones make superfluous are
    dropped again.
    """
    targets = np.ascontiguousarray((targets - targets.mean(axis=0)).T)
    columns = _columns(X)
    search = Search(targets, np.empty((0, len(X))), [], [])
    _singles(search, columns)
    _products(search, columns)
    return np.array(sorted({j for owners in _needed(search, targets) for j in owners}), dtype=int)


@dataclass
class Search:
    """Effects found so far: the columns of each, the covariates they are of, what they leave over.

    basis: orthonormal rows that span the effects; residual: of each target.
    """

    residual: Float[ndarray, "t n"]
    basis: Float[ndarray, "m n"]
    columns: list[Float[ndarray, "k n"]]
    owners: list[tuple[int, ...]]

    @property
    def noise(self) -> Float[ndarray, " t"]:
        """Variance of the residual of each target, above 0 where nothing is left."""
        m, n = self.basis.shape
        return np.asarray(np.maximum((self.residual**2).sum(axis=1), 1e-12 * n) / (n - m))

    def add(self, columns: Float[ndarray, "k n"], owners: tuple[int, ...], tests: int) -> ndarray:
        """Take an effect in if it is one, the best of so many tested.

        Returns the new rows of the basis: none if it is not.
        """
        new = columns - (columns @ self.basis.T) @ self.basis
        values, vectors = np.linalg.eigh(new @ new.T)
        kept = values > _DEGENERATE * new.shape[1]
        new = np.asarray((vectors[:, kept] / np.sqrt(values[kept])).T @ new)
        room = new.shape[1] // FULL - len(self.basis)
        if len(new) > room or not _significant(new, self.residual, tests):
            return np.asarray(new[:0])
        self.columns.append(columns)
        self.owners.append(owners)
        self.basis = np.vstack([self.basis, new])
        self.residual = self.residual - (self.residual @ new.T) @ new
        return new


def _significant(columns: Float[ndarray, "k n"], residual: ndarray, tests: int) -> bool:
    """Whether the scores of the columns say so for any target, the best of so many tests."""
    if not len(columns):
        return False
    bound = chi2.isf(ERROR / (tests * len(residual)), len(columns))
    for left in residual:
        scores = columns * left
        total = scores.sum(axis=1)
        if total @ np.linalg.pinv(scores @ scores.T, hermitian=True) @ total > bound:
            return True
    return False


def _columns(X: Float[ndarray, "n p"]) -> Float[ndarray, "p k n"]:
    """Cosines of each covariate's ranks, and last the covariate; orthogonal, mean 0, mean square 1.

    Columns that those before them span are 0, such as where ties leave few ranks. Without ties
    the cosines are orthogonal as they are (the discrete cosine transform).
    """
    n, p = X.shape
    angle = np.pi * (rankdata(X, axis=0).T - 0.5) / n
    first = np.cos(angle).astype(np.float32)
    columns = np.empty((p, COSINES + 1, n), dtype=np.float32)
    columns[:, 0], columns[:, 1] = first, 2 * first * first - 1
    for k in range(2, COSINES):
        columns[:, k] = 2 * first * columns[:, k - 1] - columns[:, k - 2]
    columns[:, COSINES] = X.T
    columns -= columns.mean(axis=2, keepdims=True)
    for k in range(COSINES + 1):
        for earlier in range(k):
            both = (columns[:, k] * columns[:, earlier]).mean(axis=1, keepdims=True)
            columns[:, k] -= both * columns[:, earlier]
        square = (columns[:, k] ** 2).mean(axis=1, keepdims=True)
        columns[:, k] *= np.where(square > _DEGENERATE, 1 / np.sqrt(np.maximum(square, 1e-30)), 0)
    return columns


def _singles(search: Search, columns: Float[ndarray, "p k n"]) -> None:
    """Add covariates by their own effects, the most significant first."""
    p, k, n = columns.shape
    left = np.zeros((p, k, k))  # second moments of what the effects found leave of the columns
    left[:, range(k), range(k)] = columns.any(axis=2)
    for _ in range(STEPS):
        slopes = columns @ search.residual.T.astype(np.float32) / n
        values, vectors = np.linalg.eigh(left)
        kept = values > _DEGENERATE
        squares = (vectors.swapaxes(1, 2) @ slopes) ** 2 / np.where(kept, values, np.inf)[..., None]
        found = n * (squares.sum(axis=1) / search.noise).max(axis=1)
        found /= chi2.isf(ERROR / (p * len(search.residual)), np.maximum(kept.sum(axis=1), 1))
        best = int(found.argmax())
        if found[best] <= 1:
            return
        new = search.add(columns[best].astype(float), (best,), p)
        shared = columns @ new.T.astype(np.float32) / np.sqrt(n)
        left -= shared @ shared.swapaxes(1, 2)
        left[best] = 0


def _products(search: Search, columns: Float[ndarray, "p k n"]) -> None:
    """Add pairs of covariates by products of their cosines, the most significant first."""
    p = len(columns)
    few = columns[:, :PRODUCTS, :PRODUCT_ROWS]
    found = p > 1
    while found and len(search.owners) < STEPS:
        found = False
        pairs = _candidates(search.residual[:, :PRODUCT_ROWS], few)
        products = [_product(columns, pair) for pair in pairs]
        while pairs:
            left = search.residual.T.astype(np.float32)
            scores = np.array([((c @ left) ** 2).sum(axis=0) for c in products])
            best = int((scores / search.noise).max(axis=1).argmax())
            product, pair = products.pop(best).astype(float), pairs.pop(best)
            found |= len(search.add(product, pair, p * (p - 1) // 2)) > 0


def _product(columns: ndarray, pair: tuple[int, int]) -> Float[ndarray, "k n"]:
    """Products of the first three cosines of two covariates, of mean 0."""
    one, other = (columns[j, : PRODUCTS + 1] for j in pair)
    both = (one[:, None] * other[None]).reshape(-1, one.shape[1])
    return np.asarray(both - both.mean(axis=1, keepdims=True))


def _candidates(residual: Float[ndarray, "t n"], columns: ndarray) -> list[tuple[int, int]]:
    """Pairs with a product that is significant alone if the noise has one variance."""
    p, k, n = columns.shape
    flat = columns.reshape(p * k, n)
    square = np.maximum((flat**2) @ (flat**2).T, _DEGENERATE * n)
    score = np.zeros_like(square)
    for left in residual.astype(np.float32):
        noise = max(float((left**2).mean()), 1e-12)
        score = np.maximum(score, ((flat * left) @ flat.T) ** 2 / (square * noise))
    best = score.reshape(p, k, p, k).max(axis=(1, 3))
    best[np.tril_indices(p)] = 0
    bound = chi2.isf(ERROR / (k * k * p * (p - 1) / 2 * len(residual)), 1)
    order = np.argsort(-best, axis=None)[:CANDIDATES]
    one, other = np.unravel_index(order[best.flat[order] > bound], best.shape)
    return [(int(i), int(j)) for i, j in zip(one, other, strict=True)]


def _needed(search: Search, targets: Float[ndarray, "t n"]) -> list[tuple[int, ...]]:
    """Owners of the effects that are still significant when all others are in."""
    if not search.columns:
        return []
    D, n = np.vstack(search.columns), targets.shape[1]
    gram, cross = D @ D.T / n, D @ targets.T / n
    square = (targets**2).mean(axis=1)
    effect = np.repeat(range(len(search.columns)), [len(c) for c in search.columns])
    kept = list(range(len(search.columns)))
    while len(kept) > 1:
        within = np.flatnonzero(np.isin(effect, kept))
        inverse = np.linalg.pinv(gram[np.ix_(within, within)], _DEGENERATE, hermitian=True)
        slopes = inverse @ cross[within]
        noise = np.maximum(square - (cross[within] * slopes).sum(axis=0), 1e-12)
        found = [_ratio(slopes, inverse, effect[within] == e, noise / n) for e in kept]
        if min(found) > 1:
            break
        del kept[int(np.argmin(found))]
    return [search.owners[e] for e in kept]


def _ratio(slopes: ndarray, inverse: ndarray, own: ndarray, noise: ndarray) -> float:
    """Largest Wald statistic of the own slopes among targets, over its critical value."""
    b = slopes[own]
    wald = (b * (np.linalg.pinv(inverse[np.ix_(own, own)], hermitian=True) @ b)).sum(axis=0)
    bound = chi2.isf(ERROR / len(noise), len(b))
    return float((wald / noise).max() / bound)
