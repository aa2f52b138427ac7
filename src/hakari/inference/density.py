"""The compiled quasi-posterior density, in whitened coordinates, one at a time and in batches.

Whitened: θ = θ̂ + F u with F F' the Gaussian approximation's covariance at θ̂, and moments
multiplied by chol(Ω(θ̂))⁻¹, so that Ω = I and the density's curvature is −I at u = 0.
quasi-posteriors.md 'Target' and 'Cost'.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, types
from numpy import ndarray

LANES = 16  # matrices factored side by side; their entries are the innermost, vectorised index


class Target(NamedTuple):
    """What the density needs, as arrays; u has K entries, P = K + 1, there are L moments.

    Of `tensor` and (`rows_z`, `rows_w`) one has size zero, the costlier form.
    """

    n: float
    offset: ndarray  # (L,)    mean moments at u = 0
    slope: ndarray  # (L, K)  mean moments are offset + slope u
    tensor: ndarray  # (L(L+1)/2, P(P+1)/2) packed, Ω from products of (1, u)
    rows_z: ndarray  # (n, L)  Ω = Σ z z' (w'(1, u))² / n
    rows_w: ndarray  # (n, P)
    continuous: bool  # Ω(u) updated with u; else Ω = I
    determinant: bool  # include |Ω(u)|^(-1/2)
    prior_df: ndarray  # (B,)  of each block; inf is Gaussian
    prior_start: ndarray  # (B + 1,) rows of each block
    prior_offset: ndarray  # (D,)   root (θ̂ − mean)
    prior_slope: ndarray  # (D, K) root F


class State(NamedTuple):
    """A point of the chain and what was computed there."""

    u: ndarray  # (K,)
    factor: ndarray  # (L, L) lower Cholesky factor of Ω(u)
    log_density: float


VECTOR = types.Array(types.float64, 1, "C")
MATRIX = types.Array(types.float64, 2, "C")
INDICES = types.Array(types.int64, 1, "C")
TARGET = types.NamedTuple(
    (
        types.float64,
        VECTOR,
        MATRIX,
        MATRIX,
        MATRIX,
        MATRIX,
        types.boolean,
        types.boolean,
        VECTOR,
        INDICES,
        VECTOR,
        MATRIX,
    ),
    Target,
)
STATE = types.NamedTuple((VECTOR, MATRIX, types.float64), State)


@njit(cache=True, nogil=True)
def log_prior(target, u):  # type: ignore[no-untyped-def]
    """Unnormalised log prior at u (K,)."""
    total = 0.0
    for block in range(len(target.prior_df)):
        start, end = target.prior_start[block], target.prior_start[block + 1]
        q = 0.0
        for row in range(start, end):
            value = target.prior_offset[row]
            for k in range(len(u)):
                value += target.prior_slope[row, k] * u[k]
            q += value * value
        df = target.prior_df[block]
        if np.isinf(df):
            total -= 0.5 * q
        else:
            total -= 0.5 * (df + end - start) * np.log1p(q / df)
    return total


@njit(cache=True, nogil=True)
def log_frozen(target, u, factor):  # type: ignore[no-untyped-def]
    """−(n/2) m(u)'(factor factor')⁻¹ m(u) + log p(u): the weighting is not updated."""
    L = len(target.offset)
    m = target.offset + target.slope @ u
    q = 0.0
    for i in range(L):
        value = m[i]
        for j in range(i):
            value -= factor[i, j] * m[j]
        m[i] = value / factor[i, i]
        q += m[i] * m[i]
    return -0.5 * target.n * q + log_prior(target, u)


@njit(cache=True, nogil=True)
def _packed_covariance(target, u):  # type: ignore[no-untyped-def]
    """Lower triangle of Ω(u) by rows."""
    L, K = target.slope.shape
    p = np.empty(K + 1)
    p[0] = 1.0
    p[1:] = u
    if len(target.rows_z) > 0:
        residual = target.rows_w @ p
        weighted = np.empty((L, len(residual)))
        for i in range(len(residual)):
            for j in range(L):
                weighted[j, i] = target.rows_z[i, j] * residual[i]
        square = weighted @ weighted.T
        packed = np.empty(L * (L + 1) // 2)
        index = 0
        for i in range(L):
            for j in range(i + 1):
                packed[index] = square[i, j] / target.n
                index += 1
        return packed
    features = np.empty((K + 1) * (K + 2) // 2)
    index = 0
    for j in range(K + 1):
        for k in range(j + 1):
            features[index] = p[j] * p[k]
            index += 1
    return target.tensor @ features


@njit(cache=True, nogil=True)
def evaluate(target, u):  # type: ignore[no-untyped-def]
    """The state at u; log density −inf where Ω(u) is not positive definite."""
    L = len(target.offset)
    factor = np.eye(L)
    log_det = 0.0
    if target.continuous:
        packed = _packed_covariance(target, u)
        for i in range(L):
            base = i * (i + 1) // 2
            for j in range(i + 1):
                value = packed[base + j]
                for k in range(j):
                    value -= factor[i, k] * factor[j, k]
                if i > j:
                    factor[i, j] = value / factor[j, j]
                elif value > 1e-13 * packed[base + i]:  # NaN falls through
                    factor[i, i] = np.sqrt(value)
                    log_det += np.log(value)
                else:
                    return State(u, factor, -np.inf)
    density = log_frozen(target, u, factor)
    if target.determinant:
        density -= 0.5 * log_det
    return State(u, factor, density)


@njit(cache=True, nogil=True)
def log_density_batch(target, us):  # type: ignore[no-untyped-def]
    """Log density at each row of us (N, K), by blocks: one matrix product, batched Cholesky."""
    N, K = us.shape
    L = len(target.offset)
    out = np.empty(N)
    if len(target.rows_z) > 0 or not target.continuous:
        for i in range(N):
            out[i] = evaluate(target, us[i].copy()).log_density
        return out
    block = min(512, (N + LANES - 1) // LANES * LANES)
    features = np.empty(((K + 1) * (K + 2) // 2, block))
    omega = np.empty((L * (L + 1) // 2, block))
    moments = np.empty((L, block))
    columns = np.zeros((K + 1, block))
    columns[0] = 1.0
    padded = np.empty(block)
    for start in range(0, N, block):
        size = min(block, N - start)
        for i in range(size):
            for k in range(K):
                columns[k + 1, i] = us[start + i, k]
        for i in range(size, block):
            columns[1:, i] = 0.0
        index = 0
        for j in range(K + 1):
            for k in range(j + 1):
                for i in range(block):
                    features[index, i] = columns[j, i] * columns[k, i]
                index += 1
        np.dot(target.tensor, features, omega)
        np.dot(target.slope, np.ascontiguousarray(columns[1:]), moments)
        _gaussian_batch(target, omega, moments, padded)
        for i in range(size):
            out[start + i] = padded[i] + log_prior(target, us[start + i])
    return out


@njit(cache=True, nogil=True, fastmath={"contract"})
def _gaussian_batch(target, omega, moments, out):  # type: ignore[no-untyped-def]
    """−½ log|Ω| − (n/2) m'Ω⁻¹m of each column, Ω packed (L(L+1)/2, N), m + offset (L, N)."""
    L, N = moments.shape
    factor = np.empty((L * (L + 1) // 2, LANES))
    solved = np.empty((L, LANES))
    value = np.empty(LANES)
    log_det = np.empty(LANES)
    quad = np.empty(LANES)
    good = np.empty(LANES, dtype=np.bool_)
    scale = np.empty(LANES)
    for start in range(0, N, LANES):
        for lane in range(LANES):
            log_det[lane] = 1.0
            quad[lane] = 0.0
            good[lane] = True
        log_sum = np.zeros(LANES)
        for i in range(L):
            row = i * (i + 1) // 2
            for j in range(i):
                column = j * (j + 1) // 2
                for lane in range(LANES):
                    value[lane] = omega[row + j, start + lane]
                for k in range(j):
                    for lane in range(LANES):
                        value[lane] -= factor[row + k, lane] * factor[column + k, lane]
                for lane in range(LANES):
                    factor[row + j, lane] = value[lane] * factor[column + j, lane]
            for lane in range(LANES):
                value[lane] = omega[row + i, start + lane]
                scale[lane] = value[lane]
            for k in range(i):
                for lane in range(LANES):
                    value[lane] -= factor[row + k, lane] * factor[row + k, lane]
            for lane in range(LANES):
                sound = value[lane] > 1e-13 * scale[lane]
                good[lane] = good[lane] and sound
                value[lane] = value[lane] if sound else 1.0
                log_det[lane] *= value[lane]
                factor[row + i, lane] = 1.0 / np.sqrt(value[lane])  # inverse diagonal
            if i % 8 == 7:  # products of eight pivots stay in range; logarithms are dear
                for lane in range(LANES):
                    log_sum[lane] += np.log(log_det[lane])
                    log_det[lane] = 1.0
            for lane in range(LANES):
                value[lane] = moments[i, start + lane] + target.offset[i]
            for k in range(i):
                for lane in range(LANES):
                    value[lane] -= factor[row + k, lane] * solved[k, lane]
            for lane in range(LANES):
                solved[i, lane] = value[lane] * factor[row + i, lane]
                quad[lane] += solved[i, lane] * solved[i, lane]
        for lane in range(LANES):
            density = -0.5 * target.n * quad[lane]
            if target.determinant:
                density -= 0.5 * (log_sum[lane] + np.log(log_det[lane]))
            out[start + lane] = density if good[lane] else -np.inf
