"""Which covariates matter, and a length scale for each of them.

The covariates are found by `effect_search`. Ridge fits of random features on these few then give
the mean squares of the partial derivatives, the diagonal of the average gradient outer product:
these are the inverse squared length scales up to a bandwidth (Radhakrishnan, Beaglehole, Pandit
and Belkin, 2024), which generalized cross-validation chooses (Golub, Heath and Wahba, 1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.spatial.distance import pdist
from threadpoolctl import threadpool_limits

from hakari.inference.bidirectional.effect_search import matter
from hakari.inference.bidirectional.feature_kernels import fill_fourier, spectrum
from hakari.inference.sampling import generator

FEWEST = 100  # rows
ROWS = 20_000  # of the sample that are searched
MEDIAN_ROWS = 2000
FIT_ROWS = 6000  # of them that ridge fits see
PAIRS = 100  # frequencies of the ridge fits
ROUNDS = 2  # of gradients
MULTIPLES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # of the bandwidth
PENALTIES = np.logspace(-6, 1, 22)  # a row, where features have second moments of at most 1


def relevance(
    X: Float[ndarray, "n p"], targets: Float[ndarray, "n t"], seed: int = 0
) -> Float[ndarray, " p"]:
    """Length scale (p,) of each covariate, in its standard deviations; inf: it does not matter.

    X: covariates, none of them constant. targets: what they may explain, such as the outcomes and
    the logarithms of squared residuals, one a column. seed: of the frequencies, and of the rows
    where there are more than are needed. Effects that no covariate has alone are searched in
    products of two, not of three. Raises ValueError for fewer than 100 rows, and for columns that
    are constant or not finite.

    Source: design note bidirectional-effects, section 2.5.

    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(size=(1000, 3))
    >>> y = np.sin(6 * X[:, [1]]) + 0.3 * rng.standard_normal((1000, 1))
    >>> np.isfinite(relevance(X, y)).tolist()
    [False, True, False]
    """
    X, targets = np.asarray(X, dtype=float), np.asarray(targets, dtype=float)
    targets = targets[:, None] if targets.ndim == 1 else targets
    _refuse(X, targets)
    kept = generator(seed, "relevance rows").permutation(len(X))[:ROWS]  # so that any part is fair
    X, targets = _standard(X[kept]), _standard(targets[kept])
    scales = np.full(X.shape[1], np.inf)
    with threadpool_limits(1, "blas"):  # small products wait for each other's threads
        found = matter(X, targets)
        if len(found):
            scales[found] = _learned(X[:FIT_ROWS, found], targets[:FIT_ROWS], seed)
    return scales


def median_distance(Z: Float[ndarray, "n p"], seed: int = 0) -> float:
    """Median distance of two different rows, standardised, among at most 2,000 drawn by the seed.

    The root mean square distance of all rows where those drawn are all the same.

    Source: the median heuristic (Garreau, Jitkrittum and Kanagawa, 2018).
    """
    if len(Z) > MEDIAN_ROWS:
        kept = generator(seed, "median distance").choice(len(Z), MEDIAN_ROWS, replace=False)
        drawn = Z[kept]
    else:
        drawn = Z
    distances = pdist(drawn)
    distances = distances[distances > 0]
    return float(np.median(distances)) if len(distances) else float(np.sqrt(2 * Z.shape[1]))


def _refuse(X: ndarray, targets: ndarray) -> None:
    if len(X) < FEWEST:
        raise ValueError(
            f"{len(X)} rows are too few to learn which covariates matter: give {FEWEST} or more, "
            "or a length_scale, such as 'median'"
        )
    if len(targets) != len(X):
        raise ValueError(f"targets have {len(targets)} rows, covariates {len(X)}: give as many")
    for what, columns in (("covariate", X), ("target", targets)):
        for k in np.flatnonzero(~np.isfinite(columns).all(axis=0)):
            raise ValueError(f"{what} {k} has values that are not finite: drop their rows")
        for k in np.flatnonzero(np.ptp(columns, axis=0) == 0):
            raise ValueError(f"{what} {k} is {columns[0, k]:g} in all rows: leave it out")


def _standard(columns: ndarray) -> ndarray:
    return np.asarray((columns - columns.mean(axis=0)) / columns.std(axis=0))


def _learned(X: Float[ndarray, "n d"], targets: Float[ndarray, "n t"], seed: int) -> ndarray:
    """Length scales of covariates that matter: gradients give their shape, the data their size."""
    d = X.shape[1]
    unit = spectrum(d, PAIRS, seed)
    best, score = np.ones(d), np.inf
    shape = np.full(d, median_distance(X, seed))
    for _ in range(ROUNDS + 1):
        fits = [_ridge(X, targets, unit / (m * shape)[:, None]) for m in MULTIPLES]
        chosen = int(np.argmin([fit.score for fit in fits]))
        scales = MULTIPLES[chosen] * shape
        if fits[chosen].score < score:
            best, score = scales, fits[chosen].score
        steep = _mean_square_gradient(X, unit / scales[:, None], fits[chosen].slopes)
        shape = 1 / np.sqrt(np.maximum(steep, 1e-4 * steep.max()))
        shape *= np.exp(np.log(scales).mean() - np.log(shape).mean())
    return best


@dataclass(frozen=True)
class Ridge:
    """Slopes (P, t) of the features of `_features`, and the sum of log GCV over targets."""

    slopes: Float[ndarray, "P t"]
    score: float


def _features(X: ndarray, frequencies: ndarray) -> Float[ndarray, "n P"]:
    """[z, cos, sin], without a constant."""
    n, d = X.shape
    out = np.empty((n, 1 + d + 2 * frequencies.shape[1]), dtype=np.float32)
    names = tuple(str(k) for k in range(d))
    fill_fourier(X, np.arange(d), np.zeros(d), np.ones(d), frequencies, out, names)
    return out[:, 1:]


def _ridge(X: ndarray, targets: ndarray, frequencies: ndarray) -> Ridge:
    """Ridge fit of each target at the penalty that generalized cross-validation picks."""
    n = len(X)
    features = _features(X, frequencies)
    centred = features - features.mean(axis=0)
    values, vectors = np.linalg.eigh((centred.T @ centred).astype(float) / n)
    values = np.maximum(values, 0)[:, None]
    response = targets - targets.mean(axis=0)
    turned = vectors.T @ (centred.T @ response.astype(np.float32)) / n  # (P, t)
    slopes, score = np.empty_like(turned), 0.0
    for t in range(turned.shape[1]):
        shrunk = 1 / (values + PENALTIES)  # (P, penalties)
        fitted = turned[:, [t]] ** 2 * shrunk * (2 - values * shrunk)
        square = (response[:, t] ** 2).mean()
        rest = np.maximum(square - fitted.sum(axis=0), 1e-12 * square)
        gcv = rest / (1 - (1 + (values * shrunk).sum(axis=0)) / n) ** 2
        at = int(np.argmin(gcv))
        slopes[:, t] = vectors @ (turned[:, t] * shrunk[:, at])
        score += float(np.log(gcv[at]))
    return Ridge(slopes, score)


def _mean_square_gradient(X: ndarray, frequencies: ndarray, slopes: ndarray) -> ndarray:
    """Mean square of the derivative by each covariate, summed over targets."""
    d, half = frequencies.shape
    waves = _features(X, frequencies)[:, d:].astype(float)
    linear, cosine, sine = np.split(slopes, [d, d + half])
    total = np.zeros(d)
    for t in range(slopes.shape[1]):
        by_wave = waves[:, :half] * sine[:, t] - waves[:, half:] * cosine[:, t]
        total += ((by_wave @ frequencies.T + linear[:, t]) ** 2).mean(axis=0)
    return total
