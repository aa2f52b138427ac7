"""Many controls, few that matter: a horseshoe prior on their coefficients, by Gibbs sampling.

y ~ N(C β, σ² I), β_k ~ N(0, σ² τ² λ_k²), λ_k and τ half-Cauchy, p(σ²) ∝ 1/σ²: Carvalho, Polson
and Scott (2010). λ² and τ² are inverse-gamma given auxiliary ν and ξ (Makalic and Schmidt, 2016,
eqs. 8 to 12); here σ² is drawn with β integrated out, so the pair (σ², β) is one block.
With D = diag(τλ), A = C'C + D⁻² and M = I + C D² C': given D, β ~ N(A⁻¹C'y, σ² A⁻¹) and
σ² ~ IG(n/2, y'M⁻¹y/2), from (K, K) if K ≤ n, else from (n, n) (Bhattacharya et al., 2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numba import njit
from numpy import ndarray
from numpy.random import Generator
from threadpoolctl import threadpool_limits

from hakari.inference.design import refuse_collinear

SPANNED = 1e-10  # share of a column's length under which the free columns explain it
# Scales τλ at which a coefficient is shrunk by 1e-10 are cut there: M would lose its I to rounding.
LEAST_SHRINKAGE = 1e-10


@dataclass(frozen=True)
class Horseshoe:
    """Global-local shrinkage of many controls (Carvalho, Polson and Scott, 2010).

    Sampled in the auxiliary form of Makalic and Schmidt (2016). sweeps: kept, after `warmup`
    sweeps that are not; means are averages of conditional means, so a few hundred do. seed: of
    the noise.

    >>> Horseshoe(sweeps=1000)
    Horseshoe(sweeps=1000, warmup=200, seed=0)
    """

    sweeps: int = 600
    warmup: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Shrunk:
    """Posterior means and standard deviations of K coefficients in m regressions.

    kept: of the penalised coefficients, the number that is not shrunk away, mean of Σ(1 − κ_k)
    with κ_k = 1/(1 + |c_k|² τ² λ_k²). More than there are rows: with far more controls than rows
    the chain has gone where β interpolates and σ is small; the means are then not sparse.
    """

    coefficients: Float[ndarray, "K m"]
    sd: Float[ndarray, "K m"]
    kept: Float[ndarray, " m"]


def horseshoe_means(
    Y: Float[ndarray, "n m"],
    C: Float[ndarray, "n K"],
    generator: Generator,
    sweeps: int = 600,
    warmup: int = 200,
    free: int = 0,
) -> Shrunk:
    """Regressions of the columns of Y on C, each under a horseshoe prior of its own.

    free: the first `free` columns of C have flat priors instead; so has a constant, in C or not
    (its coefficient is returned if it is in C). The prior is on coefficients in units of σ over
    the column's standard deviation, given the free ones. Noise is drawn regression by regression:
    those that follow change nothing. Raises ValueError for shapes that don't fit, values that are
    not finite, collinear free columns, and columns that the free ones explain.
    """
    _check(Y, C, sweeps, warmup, free)
    with threadpool_limits(1, user_api="blas"):  # small matrices, and sums in one order
        basis = _basis(C[:, :free])
        problem = _partial_out(Y, C, basis, free)
        found = [
            _regression(problem, j, generator, sweeps, warmup, problem.wide)
            for j in range(Y.shape[1])
        ]
    coefficients, sd, kept = (np.stack(part, axis=-1) for part in zip(*found, strict=True))
    if free:
        coefficients[:free] += np.linalg.lstsq(basis, Y, rcond=None)[0][-free:]
    return Shrunk(coefficients, sd, kept)


# --- one regression -----------------------------------------------------------------------


class Problem(NamedTuple):
    """m regressions on P penalised columns of unit variance, free columns partialled out.

    Rows are rotated to r = min(n, P); what the rotation leaves of an outcome is in `rest`.
    """

    X: ndarray  # (r, P)
    y: ndarray  # (r, m)
    rest: ndarray  # (m,) sums of squares
    rows: float  # n less the number of free columns
    wide: bool  # more columns than rows
    unit_x: ndarray  # (P,) standard deviations taken out
    unit_y: ndarray  # (m,)
    onto: ndarray  # (free, P) -(B'B)⁻¹B'X: free coefficients, per penalised one
    spread: ndarray  # (free,) diagonal of (B'B)⁻¹


class Local(NamedTuple):
    """What the next sweep needs: the scales λ² (P,), τ², and their auxiliary ν (P,), ξ."""

    lam2: ndarray
    tau2: float
    nu: ndarray
    xi: float


class Sweep(NamedTuple):
    """What one sweep found: β = mean + deviation (P,), given the scales d (P,) = τλ before it."""

    state: Local
    mean: ndarray
    deviation: ndarray
    sigma2: float
    d: ndarray


def _regression(
    problem: Problem, j: int, generator: Generator, sweeps: int, warmup: int, wide: bool
) -> tuple[ndarray, ndarray, float]:
    """Means (K,), sds (K,), and coefficients kept; free columns' means without their own fit."""
    total, P = sweeps + warmup, problem.X.shape[1]
    noise = _noise(generator, total, len(problem.X) if wide else 0, P, problem.rows)
    y = np.ascontiguousarray(problem.y[:, j])
    gram = np.empty((0, 0)) if wide else problem.X.T @ problem.X
    chain = _run(problem.X, gram, y, problem.rest[j], problem.rows, wide, *noise)
    means, deviations, sigma2, kept = (part[warmup:] for part in chain)
    to_all = np.vstack([problem.onto, np.eye(P)])  # free coefficients move with the penalised
    middles, gaps = means @ to_all.T, deviations @ to_all.T
    variance = middles.var(axis=0) + (gaps**2).mean(axis=0)  # law of total variance
    variance[: len(problem.spread)] += sigma2.mean() * problem.spread
    unit = np.concatenate([np.ones(len(problem.spread)), 1 / problem.unit_x]) * problem.unit_y[j]
    return middles.mean(axis=0) * unit, np.sqrt(variance) * unit, float(kept.mean())


def _noise(
    generator: Generator, total: int, rows: int, P: int, freedom: float
) -> tuple[ndarray, ndarray, ndarray]:
    """Standard normals (N, P + rows), exponentials (N, 2P + 1) and gammas (N, 2) of N sweeps."""
    normals = generator.standard_normal((total, P + rows))
    waits = generator.standard_exponential((total, 2 * P + 1))
    gammas = generator.standard_gamma([freedom / 2, (P + 1) / 2], (total, 2))
    return normals, waits, gammas


@njit(cache=True, nogil=True)
def _run(X, gram, y, rest, freedom, wide, normals, waits, gammas):  # type: ignore[no-untyped-def]
    """All sweeps: conditional means (N, P), deviations (N, P), σ² (N,), coefficients kept (N,)."""
    N, P = len(normals), X.shape[1]
    means, deviations, sigma2, kept = np.empty((N, P)), np.empty((N, P)), np.empty(N), np.empty(N)
    state = Local(np.ones(P), 1.0 / freedom, np.ones(P), 1.0)
    for i in range(N):
        found = sweep(X, gram, y, rest, freedom, wide, state, normals[i], waits[i], gammas[i])
        state = found.state
        means[i], deviations[i], sigma2[i] = found.mean, found.deviation, found.sigma2
        strength = freedom * found.d**2
        kept[i] = (strength / (1.0 + strength)).sum()
    return means, deviations, sigma2, kept


@njit(cache=True, nogil=True)
def sweep(X, gram, y, rest, freedom, wide, state, normals, waits, gammas):  # type: ignore[no-untyped-def]
    """(σ², β), then λ², τ², ν and ξ, each given all else.

    gram: X'X, read unless `wide`. normals (P, or P + r if wide), waits (2P + 1) exponential,
    gammas (2,) of shapes freedom/2 and (P + 1)/2: an inverse-gamma of rate b is b over a gamma.
    """
    P = X.shape[1]
    widest = np.sqrt((1.0 / LEAST_SHRINKAGE - 1.0) / freedom)
    d = np.minimum(np.sqrt(state.lam2 * state.tau2), widest)
    if wide:
        mean, left, deviation = by_rows(X, y, d, normals)
    else:
        mean, left, deviation = by_columns(X, gram, y, d, normals)
    sigma2 = 0.5 * (left + rest) / gammas[0]
    deviation *= np.sqrt(sigma2)
    size = (mean + deviation) ** 2 / (2.0 * sigma2)
    lam2 = (1.0 / state.nu + size / state.tau2) / waits[:P]
    tau2 = (1.0 / state.xi + (size / lam2).sum()) / gammas[1]
    nu = (1.0 + 1.0 / lam2) / waits[P : 2 * P]
    xi = (1.0 + 1.0 / tau2) / waits[2 * P]
    return Sweep(Local(lam2, tau2, nu, xi), mean, deviation, sigma2, d)


@njit(cache=True, nogil=True)
def by_columns(X, gram, y, d, normals):  # type: ignore[no-untyped-def]
    """A⁻¹X'y, y'M⁻¹y and a draw of N(0, A⁻¹) from P normals, by a (P, P) Cholesky factor.

    A = D⁻¹ (I + D X'X D) D⁻¹, and the matrix in the middle has no eigenvalue under 1.
    """
    middle = gram * d
    for k in range(len(d)):
        middle[k] *= d[k]
        middle[k, k] += 1.0
    L = np.linalg.cholesky(middle)
    half = d * np.dot(y, X)
    _forward(L, half)
    _backward(L, half)
    mean = d * half
    left = y - np.dot(X, mean)  # y'M⁻¹y without a difference of large numbers
    drawn = normals[: len(d)].copy()
    _backward(L, drawn)
    return mean, (left**2).sum() + (half**2).sum(), d * drawn


@njit(cache=True, nogil=True)
def by_rows(X, y, d, normals):  # type: ignore[no-untyped-def]
    """The same by an (r, r) factor and P + r normals; Bhattacharya et al. (2016), algorithm 1."""
    P = len(d)
    spread = X * d
    middle = np.dot(spread, spread.T)
    for i in range(len(y)):
        middle[i, i] += 1.0
    L = np.linalg.cholesky(middle)
    u = normals[:P]
    v = np.dot(spread, u) + normals[P:]
    solved = y.copy()
    for right in (solved, v):
        _forward(L, right)
        _backward(L, right)
    return d * np.dot(solved, spread), (y * solved).sum(), d * (u - np.dot(v, spread))


@njit(cache=True, nogil=True)
def _forward(L, x):  # type: ignore[no-untyped-def]
    """Solve L x = x in place; by columns, in which LAPACK leaves L."""
    for i in range(len(x)):
        x[i] /= L[i, i]
        for k in range(i + 1, len(x)):
            x[k] -= x[i] * L[k, i]


@njit(cache=True, nogil=True)
def _backward(L, x):  # type: ignore[no-untyped-def]
    """Solve L' x = x in place."""
    for i in range(len(x) - 1, -1, -1):
        value = x[i]
        for k in range(i + 1, len(x)):
            value -= L[k, i] * x[k]
        x[i] = value / L[i, i]


# --- what comes before --------------------------------------------------------------------


def _check(Y: ndarray, C: ndarray, sweeps: int, warmup: int, free: int) -> None:
    if Y.ndim != 2 or C.ndim != 2 or len(Y) != len(C) or not Y.shape[1]:
        raise ValueError(
            f"outcomes of shape {Y.shape} and controls of shape {C.shape}: need (n, m) and (n, K), "
            "with n equal and m at least 1"
        )
    if not 0 <= free < C.shape[1]:
        raise ValueError(
            f"{free} free columns of {C.shape[1]} controls: leave at least one to the horseshoe, "
            "or use least squares"
        )
    if sweeps < 2 or warmup < 0:
        raise ValueError(f"{sweeps} sweeps after a warmup of {warmup}: need at least 2 and 0")
    for what, values in (("outcome", Y), ("control", C)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0]
            raise ValueError(
                f"{what} {column} is {values[row, column]} in row {row} (both counted from 0): "
                "drop or fill such rows first"
            )


def _basis(F: Float[ndarray, "n q"]) -> Float[ndarray, "n b"]:
    """The free columns, after a constant if they do not span it."""
    n, q = F.shape
    one = np.ones((n, 1))
    if q:
        refuse_collinear(F.T @ F, [f"control {k}" for k in range(q)], "free controls")
    left = one - F @ np.linalg.lstsq(F, one, rcond=None)[0] if q else one
    return F if (left**2).sum() <= SPANNED**2 * n else np.column_stack([one, F])


def _partial_out(Y: ndarray, C: ndarray, basis: Float[ndarray, "n b"], free: int) -> Problem:
    rows = len(Y) - basis.shape[1]
    if rows < 3:
        raise ValueError(
            f"{len(Y)} rows for {basis.shape[1]} free columns (a constant counted): need 3 more "
            "rows than that"
        )
    Q, R = np.linalg.qr(basis)
    penalised = C[:, free:]
    X, unit_x = _standardised(penalised, Q, rows, "control", free)
    y, unit_y = _standardised(Y, Q, rows, "outcome", 0)
    inverse = np.linalg.inv(R)[len(R) - free :]
    onto = -(inverse @ (Q.T @ (penalised / unit_x)))
    wide = X.shape[1] > rows
    rest = np.zeros(Y.shape[1])
    if not wide:  # a sweep then costs the same whatever the number of rows
        rotation, X = np.linalg.qr(X)
        y, whole = rotation.T @ y, y
        rest = ((whole - rotation @ y) ** 2).sum(axis=0)
    spread = (inverse**2).sum(axis=1)
    X = np.ascontiguousarray(X)
    return Problem(X, y, rest, float(rows), wide, unit_x, unit_y, onto, spread)


def _standardised(
    values: ndarray, Q: ndarray, rows: int, what: str, first: int
) -> tuple[ndarray, ndarray]:
    """Values less what the free columns explain, at unit variance; and the units."""
    left = values - Q @ (Q.T @ values)
    size = np.sqrt((left**2).sum(axis=0))
    share = size / np.maximum(np.sqrt((values**2).sum(axis=0)), 1e-300)
    if share.min() <= SPANNED:
        raise ValueError(
            f"{what} {first + int(share.argmin())} is explained by the free columns (share left "
            f"{share.min():.1e}; a constant is always free): drop it"
        )
    unit = size / np.sqrt(rows)
    return left / unit, unit
