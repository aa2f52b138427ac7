"""How moments covary: iid, heteroskedastic, clustered or serially correlated.

For linear moments m_i(θ) = C_i p with p = (1, -θ), every one of these covariances is a
quadratic polynomial in θ. Each kind here is a mergeable sum from which its coefficients,
the packed tensor of quasi-posteriors.md 'Cost', are made.

Packing, used everywhere in the half: an L×L symmetric matrix is the vector of its lower
triangle by rows, index(l, m) = l(l+1)/2 + m for m ≤ l, of length L(L+1)/2; products of
parameters p_j p_k likewise. A packed tensor T has shape (L(L+1)/2, P(P+1)/2), and
pack(Ω(θ)) = T @ pack'(p p'), where pack' counts each product once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped
from numba import njit
from numpy import ndarray
from scipy.signal import fftconvolve

Kernel = Literal["bartlett", "parzen", "quadratic-spectral"]
_RULES: dict[str, tuple[int, float, float]] = {  # exponent q, constant, rate of the pilot lags
    "bartlett": (1, 1.1447, 2 / 9),
    "parzen": (2, 2.6614, 4 / 25),
    "quadratic-spectral": (2, 1.3221, 2 / 25),
}
GRAMMAR = "iid, robust, cluster:COLUMN or hac:BANDWIDTH|auto[:bartlett|parzen|quadratic-spectral]"


@dataclass(frozen=True)
class Covariance:
    """The estimator of the moments' covariance; make one with `parse_covariance`.

    `bandwidth` is the number of lags (Bartlett and Parzen, weights reach zero at
    bandwidth + 1) or the scale of the quadratic-spectral kernel; None: chosen from the data.
    `centred` subtracts the moments' mean; the papers' form, the default, does not.
    """

    kind: Literal["iid", "robust", "cluster", "hac"] = "robust"
    centred: bool = False
    column: str | None = None
    kernel: Kernel = "bartlett"
    bandwidth: float | None = None

    def __str__(self) -> str:
        detail = {"cluster": f":{self.column or '(array)'}"}.get(self.kind, "")
        if self.kind == "hac":
            detail = f":{'auto' if self.bandwidth is None else f'{self.bandwidth:g}'}:{self.kernel}"
        return f"{self.kind}{detail}{', centred' if self.centred else ''}"


def parse_covariance(text: str | Covariance, centred: bool = False) -> Covariance:
    """Read `iid`, `robust`, `cluster:COLUMN`, `hac`, `hac:BANDWIDTH` or `hac:auto:KERNEL`.

    Raises ValueError, naming the grammar, for anything else.

    >>> parse_covariance("hac:4")
    Covariance(kind='hac', centred=False, column=None, kernel='bartlett', bandwidth=4.0)
    """
    if isinstance(text, Covariance):
        return replace(text, centred=text.centred or centred)
    if text.endswith(", centred"):  # as `str` writes it
        text, centred = text.removesuffix(", centred"), True
    kind, _, rest = text.strip().partition(":")
    if kind in ("iid", "robust") and not rest:
        return Covariance(kind, centred)  # type: ignore[arg-type]
    if kind == "cluster":
        return Covariance("cluster", centred, column=rest or None)
    if kind == "hac":
        bandwidth, _, kernel = rest.partition(":")
        kernel = {"": "bartlett", "qs": "quadratic-spectral"}.get(kernel, kernel)
        if kernel in _RULES:
            return Covariance(
                "hac",
                centred,
                kernel=kernel,  # type: ignore[arg-type]
                bandwidth=_read_bandwidth(bandwidth, text),
            )
    raise ValueError(f"unknown covariance {text!r}: write {GRAMMAR}")


def _read_bandwidth(text: str, whole: str) -> float | None:
    if text in ("", "auto"):
        return None
    try:
        bandwidth = float(text)
    except ValueError:
        raise ValueError(
            f"bandwidth {text!r} in {whole!r} is not a number: write {GRAMMAR}"
        ) from None
    if not (np.isfinite(bandwidth) and bandwidth >= 0):
        raise ValueError(f"bandwidth {bandwidth:g} in {whole!r} must be finite and at least 0")
    return bandwidth


def kernel_weights(kernel: Kernel, bandwidth: float, lags: int) -> Float[ndarray, " lags1"]:
    """Weights of lags 0..`lags`; Newey-West (1987), Gallant (1987), Andrews (1991)."""
    lag = np.arange(lags + 1)
    if kernel == "quadratic-spectral":
        if bandwidth == 0:
            return np.asarray(lag == 0, dtype=float)
        angle = 6 * np.pi * lag[1:] / bandwidth / 5
        tail = 3 / angle**2 * (np.sin(angle) / angle - np.cos(angle))
        return np.concatenate([[1.0], tail])
    x = lag / (int(bandwidth) + 1)
    if kernel == "bartlett":
        return np.asarray(np.clip(1 - x, 0, None))
    return np.asarray(np.where(x <= 0.5, 1 - 6 * x**2 + 6 * x**3, 2 * np.clip(1 - x, 0, None) ** 3))


def automatic_bandwidth(moments: Float[ndarray, "n L"], kernel: Kernel) -> float:
    """Newey and West's (1994) rule on the sum of the standardised moments, in rows of time.

    The same rule as linearmodels' `kernel_optimal_bandwidth`, so that the two packages agree.
    Raises ValueError when there are too few rows for the rule's pilot lags.
    """
    n = len(moments)
    q, constant, rate = _RULES[kernel]
    pilot = int(np.ceil(4 * (n / 100) ** rate))
    if pilot >= n - 1:
        raise ValueError(f"{n} rows are too few for an automatic bandwidth: give hac:BANDWIDTH")
    spread = moments.std(axis=0)
    series = (moments[:, spread > 0] / spread[spread > 0]).sum(axis=1)
    acf = np.array([series[h:] @ series[: n - h] / n for h in range(pilot + 1)])
    level = acf[0] + 2 * acf[1:].sum()
    slope = 2 * (acf[1:] * np.arange(1, pilot + 1) ** q).sum()
    if level == 0:
        return 0.0
    width = constant * ((slope / level) ** 2) ** (1 / (2 * q + 1)) * n ** (1 / (2 * q + 1))
    return float(min(np.ceil(width), n - 1))


# --- packing ---------------------------------------------------------------------------


def packed_size(size: int) -> int:
    """Number of entries of a packed symmetric matrix."""
    return size * (size + 1) // 2


def pack(matrix: Float[ndarray, "*batch S S"]) -> Float[ndarray, "*batch packed"]:
    """Lower triangle by rows."""
    rows, columns = np.tril_indices(matrix.shape[-1])
    return matrix[..., rows, columns]


def unpack(packed: Float[ndarray, "*batch packed"], size: int) -> Float[ndarray, "*batch S S"]:
    """Undo `pack`."""
    rows, columns = np.tril_indices(size)
    matrix = np.empty((*packed.shape[:-1], size, size))
    matrix[..., rows, columns] = packed
    matrix[..., columns, rows] = packed
    return matrix


def products(p: Float[ndarray, "*batch P"]) -> Float[ndarray, "*batch packed"]:
    """Each product p_j p_k, j ≥ k, once, in packing order."""
    rows, columns = np.tril_indices(p.shape[-1])
    once: ndarray = p[..., rows] * p[..., columns]
    return once


def fold(cross: Float[ndarray, "L P L P"]) -> Float[ndarray, "packedL packedP"]:
    """Packed tensor of Ω(p)_lm = Σ_jk p_j p_k (cross[l,j,m,k] + cross[m,j,l,k]) / 2."""
    L, P = cross.shape[:2]
    left, right = np.tril_indices(P)
    off = np.where(left == right, 0.5, 1.0)
    out = np.empty((packed_size(L), packed_size(P)))
    for row in range(L):
        block = 0.5 * (cross[row].transpose(1, 0, 2) + cross[:, :, row])[: row + 1]
        start = packed_size(row)
        out[start : start + row + 1] = off * (block[:, left, right] + block[:, right, left])
    return out


def transform(
    tensor: Float[ndarray, "packedL packedP"],
    left: Float[ndarray, "L2 L"],
    right: Float[ndarray, "P P2"],
) -> Float[ndarray, "packedL2 packedP2"]:
    """The tensor of left Ω(right p) left'."""
    L, P = left.shape[1], right.shape[0]
    rows, columns = np.tril_indices(P)
    halves = tensor * np.where(rows == columns, 1.0, 0.5)
    by_product = left @ unpack(halves.T, L) @ left.T  # (packedP, L2, L2)
    by_entry = right.T @ unpack(pack(by_product).T, P) @ right  # (packedL2, P2, P2)
    out = pack(by_entry)
    rows, columns = np.tril_indices(right.shape[1])
    out *= np.where(rows == columns, 1.0, 2.0)
    return out


# --- mergeable sums ---------------------------------------------------------------------
# C: (n, L, P), one matrix a row, m_i = C_i p. Instrumental variables have C_i = z_i w_i',
# and are passed as the pair (Z, W) so that the outer products need not be written out.


@dataclass(frozen=True)
class RobustSums:
    """Σ_i over rows of the packed tensor of C_i ⊗ C_i."""

    tensor: Float[ndarray, "packedL packedP"]

    def __add__(self, other: RobustSums) -> RobustSums:
        return RobustSums(self.tensor + other.tensor)

    def mapped(self, left: ndarray, right: ndarray) -> RobustSums:
        """The sums of left C_i right."""
        return RobustSums(transform(self.tensor, left, right))

    def mean_tensor(self, n: int, mean: Float[ndarray, "L P"], centred: bool) -> ndarray:
        """Ω's packed tensor; `mean` is the mean of C_i."""
        tensor = self.tensor / n
        return tensor - fold(np.multiply.outer(mean, mean)) if centred else tensor


@dataclass(frozen=True)
class ClusterSums:
    """Σ of C_i within each cluster; clusters that span two shards are joined by label."""

    labels: Shaped[ndarray, " G"]
    sums: Float[ndarray, "G L P"]
    counts: Float[ndarray, " G"]

    def __add__(self, other: ClusterSums) -> ClusterSums:
        labels, where = np.unique(np.concatenate([self.labels, other.labels]), return_inverse=True)
        sums = np.zeros((len(labels), *self.sums.shape[1:]))
        np.add.at(sums, where, np.concatenate([self.sums, other.sums]))
        counts = np.bincount(where, np.concatenate([self.counts, other.counts]))
        return ClusterSums(labels, sums, counts)

    def mapped(self, left: ndarray, right: ndarray) -> ClusterSums:
        """The sums of left C_i right."""
        return replace(self, sums=left @ self.sums @ right)

    def mean_tensor(self, n: int, mean: Float[ndarray, "L P"], centred: bool) -> ndarray:
        """Ω's packed tensor: outer products of the cluster sums over n."""
        sums = self.sums - self.counts[:, None, None] * mean if centred else self.sums
        return fold(_cross(sums, sums)) / n


@dataclass(frozen=True)
class HacSums:
    """Σ_{t,s} w(t-s) C_t ⊗ C_s of one stretch of time; `a + b`: b follows a.

    `head` and `tail` are the first and last rows, as many as the kernel reaches, which is
    all that a neighbour can correlate with; the quadratic-spectral kernel reaches every row.
    """

    spec: Covariance
    tensor: Float[ndarray, "packedL packedP"]
    smoothed: Float[ndarray, "L P"]  # Σ_{t,s} w(t-s) C_t
    pairs: float  # Σ_{t,s} w(t-s)
    head: Float[ndarray, "h L P"]
    tail: Float[ndarray, "h L P"]
    rows: int

    def __add__(self, other: HacSums) -> HacSums:
        # other's head after self's tail, as seen from the tail: one more smoothing, no lag matrix
        after = np.concatenate([np.zeros_like(self.tail), other.head])
        before = np.concatenate([self.tail, np.zeros_like(other.head)])
        weights = _lag_weights(self.spec, max(len(after) - 1, 0))
        partner = _smooth(after, weights)[: len(self.tail)]
        cross = partner.sum(axis=0) + _smooth(before, weights)[len(self.tail) :].sum(axis=0)
        lags = np.arange(1, len(weights))  # how many pairs of tail and head are so far apart
        apart = np.minimum.reduce(
            [
                lags,
                np.full_like(lags, len(self.tail)),
                np.full_like(lags, len(other.head)),
                len(after) - lags,
            ]
        )
        pairs = float((weights[1:] * apart).sum())
        reach = _reach(self.spec, self.rows + other.rows)
        return HacSums(
            self.spec,
            self.tensor + other.tensor + 2 * fold(_cross(self.tail, partner)),
            self.smoothed + other.smoothed + cross,
            self.pairs + other.pairs + 2 * pairs,
            np.concatenate([self.head, other.head])[:reach],
            np.concatenate([self.tail, other.tail])[-reach:] if reach else self.tail[:0],
            self.rows + other.rows,
        )

    def mapped(self, left: ndarray, right: ndarray) -> HacSums:
        """The sums of left C_t right."""
        return replace(
            self,
            tensor=transform(self.tensor, left, right),
            smoothed=left @ self.smoothed @ right,
            head=left @ self.head @ right,
            tail=left @ self.tail @ right,
        )

    def mean_tensor(self, n: int, mean: Float[ndarray, "L P"], centred: bool) -> ndarray:
        """Ω's packed tensor."""
        tensor = self.tensor / n
        if centred:
            shift = -2 * self.smoothed + self.pairs * mean
            tensor = tensor + fold(np.multiply.outer(mean, shift)) / n
        return tensor


def robust_sums(Z: Float[ndarray, "n L"], W: Float[ndarray, "n P"]) -> RobustSums:
    """Sums for moments z_i (w_i'p); fastest when Z and W are transposes of contiguous rows."""
    L, P = Z.shape[1], W.shape[1]
    tensor = np.zeros((packed_size(L), packed_size(P)))
    _add_products(np.ascontiguousarray(Z.T), np.ascontiguousarray(W.T), tensor)
    return RobustSums(_double_off_diagonal(tensor, P))


def robust_sums_general(C: Float[ndarray, "n L P"]) -> RobustSums:
    """Sums for any linear moments C_i p."""
    return RobustSums(fold(_cross(C, C)))


def cluster_sums(C: Float[ndarray, "n L P"], labels: Shaped[ndarray, " n"]) -> ClusterSums:
    """Sums within clusters."""
    names, where = np.unique(labels, return_inverse=True)
    order = np.argsort(where, kind="stable")
    starts = np.searchsorted(where[order], np.arange(len(names)))
    sums = np.add.reduceat(C[order], starts, axis=0)
    return ClusterSums(names, sums, np.bincount(where).astype(float))


def hac_sums(C: Float[ndarray, "n L P"], spec: Covariance) -> HacSums:
    """Sums over lags of one stretch of time, rows in order."""
    n = len(C)
    reach = _reach(spec, n)
    weights = _lag_weights(spec, max(min(reach, n - 1), 0))
    smooth = _smooth(C, weights)
    lag = np.arange(1, len(weights))
    pairs = float(n + 2 * (weights[1:] * (n - lag)).sum())
    tail = C[-reach:] if reach else C[:0]
    return HacSums(
        spec, fold(_cross(C, smooth)), smooth.sum(axis=0), pairs, C[:reach].copy(), tail.copy(), n
    )


def _smooth(C: Float[ndarray, "n L P"], weights: ndarray) -> Float[ndarray, "n L P"]:
    """Σ_s w(|t − s|) C_s of each row t."""
    if not len(C):
        return C
    window = np.concatenate([weights[:0:-1], weights])
    full = fftconvolve(C, window[:, None, None], mode="full", axes=0)
    return np.asarray(full[len(weights) - 1 : len(weights) - 1 + len(C)])


def _reach(spec: Covariance, rows: int) -> int:
    if spec.kernel == "quadratic-spectral":
        return rows
    return min(int(spec.bandwidth or 0), rows)


def _lag_weights(spec: Covariance, lags: int) -> ndarray:
    return kernel_weights(spec.kernel, float(spec.bandwidth or 0), lags)


def _cross(A: ndarray, B: ndarray) -> ndarray:
    shape = A.shape[1:] * 2
    product: ndarray = A.reshape(len(A), -1).T @ B.reshape(len(B), -1)
    return product.reshape(shape)


def _double_off_diagonal(tensor: ndarray, size: int) -> ndarray:
    rows, columns = np.tril_indices(size)
    tensor *= np.where(rows == columns, 1.0, 2.0)
    return tensor


@njit(cache=True, nogil=True)
def _add_products(Z, W, tensor):  # type: ignore[no-untyped-def]
    """Add Σ_i products(z_i) products(w_i)' to `tensor`, Z (L, n), W (P, n), by chunks in cache.

    All in one function without the interpreter's lock: a thread that asks for the lock between
    small products waits for the thread that reads the file.
    """
    chunk = 512
    left, right = np.empty((tensor.shape[0], chunk)), np.empty((tensor.shape[1], chunk))
    part = np.empty_like(tensor)
    for start in range(0, Z.shape[1], chunk):
        _row_products(Z, start, left)
        _row_products(W, start, right)
        np.dot(left, right.T, part)
        tensor += part


@njit(cache=True, nogil=True)
def _row_products(columns, start, out):  # type: ignore[no-untyped-def]
    """out[index(j, k), i] = columns[j, start + i] columns[k, start + i], zero beyond the end."""
    size = min(out.shape[1], columns.shape[1] - start)
    out[:, size:] = 0.0
    index = 0
    for j in range(columns.shape[0]):
        a = columns[j, start : start + size]
        for k in range(j + 1):
            b = columns[k, start : start + size]
            row = out[index]
            for i in range(size):
                row[i] = a[i] * b[i]
            index += 1
