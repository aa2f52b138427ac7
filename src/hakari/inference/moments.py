"""Linear moment conditions as sufficient statistics: after one pass, n no longer matters.

Moments are m_i(θ) = a_i − B_i θ = C_i p with C_i = [a_i, B_i] (L, K+1) and p = (1, −θ);
instrumental variables have C_i = z_i (y_i, x_i'). What a quasi-posterior needs of the data is
the mean of C_i and the packed tensor of covariance.py. Sums are kept in scaled columns
(centred where there is a constant), which the first block of data fixes, so that
conditioning does not eat digits; `a + b` carries b's sums into a's columns exactly.
quasi-posteriors.md 'Cost'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular
from threadpoolctl import threadpool_limits

from hakari.inference.covariance import (
    ClusterSums,
    Covariance,
    HacSums,
    RobustSums,
    automatic_bandwidth,
    cluster_sums,
    hac_sums,
    packed_size,
    parse_covariance,
    products,
    robust_sums,
    robust_sums_general,
    unpack,
)
from hakari.inference.design import (
    Block,
    Names,
    array_names,
    check_counts,
    checked_weights,
    cut,
    involved,
    refuse_collinear,
    refuse_not_finite,
    stack_blocks,
)
from hakari.inference.formula import parse_formula, read_blocks
from hakari.inference.scaling import Scale, first_scale, or_one
from hakari.inference.tables import BLOCK_ROWS, Missing

Sums = RobustSums | ClusterSums | HacSums | None


@dataclass(frozen=True)
class Grams:
    """Second moments that only instrumental variables have, in working columns."""

    instruments: Float[ndarray, "L L"]  # Σ z z'
    regression: Float[ndarray, "P P"]  # Σ w w', w = (y, x)
    regression_sum: Float[ndarray, " P"]  # Σ w

    def __add__(self, other: Grams) -> Grams:
        return Grams(
            self.instruments + other.instruments,
            self.regression + other.regression,
            self.regression_sum + other.regression_sum,
        )


@dataclass(frozen=True)
class LinearMoments:
    """Sufficient statistics of L linear moment conditions in K parameters.

    Make one with `from_formula`, `from_arrays` or `from_moments`; add two with `+`. With
    clusters, shards may cut a cluster; with HAC, `a + b` means that b follows a in time.

    >>> import numpy as np
    >>> X = np.random.default_rng(1).standard_normal((100, 2))
    >>> moments = LinearMoments.from_arrays(X @ [1.0, 2.0] + 0.1 * X[:, 0] ** 2, X)
    >>> moments.n, moments.K, moments.L
    (100, 2, 2)
    """

    names: Names
    covariance: Covariance
    scale: Scale
    n: int
    total: Float[ndarray, "L P"]  # Σ C̃_i
    sums: Sums  # None: iid, whose tensor comes from `grams`
    grams: Grams | None  # None: general moments
    rows: tuple[Float[ndarray, "n L"], Float[ndarray, "n P"]] | None
    digest: str

    # --- making ------------------------------------------------------------------------

    @classmethod
    def from_formula(
        cls,
        formula: str,
        data: Any,
        covariance: str | Covariance = "robust",
        *,
        centred: bool = False,
        weights: str | None = None,
        missing: Missing = "raise",
    ) -> LinearMoments:
        """One pass over a table of any size.

        formula: `y ~ 1 + x1 + [x2 ~ z1 + z2]`, as in linearmodels.
        data: pandas or polars frame, anything Arrow or narwhals knows, dict of arrays, path
            of a CSV or Parquet file or folder, iterable of record batches.
        covariance: `iid`, `robust`, `cluster:COLUMN`, `hac:BANDWIDTH`, `hac:auto`.
        weights: column of observation weights, at least 0; their scale does not matter.
        missing: `raise`, or `drop` the rows in which a used column is missing.

        Raises ValueError for unknown columns, missing or infinite values, or fewer
        instruments than parameters; TypeError for data of unknown kind.
        """
        spec = parse_covariance(covariance, centred)
        parsed = parse_formula(formula)
        if spec.kind == "hac" and spec.bandwidth is None:
            blocks = list(read_blocks(parsed, data, weights, None, missing))
            design = stack_blocks([block for _, block in blocks])
            return cls._from_blocks([(blocks[0][0], design)], spec)
        if spec.kind == "cluster" and spec.column is None:
            raise ValueError("covariance 'cluster' without a column: write 'cluster:COLUMN'")
        return cls._from_blocks(read_blocks(parsed, data, weights, spec.column, missing), spec)

    @classmethod
    def from_arrays(
        cls,
        y: ArrayLike,
        X: ArrayLike,
        Z: ArrayLike | None = None,
        *,
        names: Sequence[str] | None = None,
        instrument_names: Sequence[str] | None = None,
        covariance: str | Covariance = "robust",
        centred: bool = False,
        weights: ArrayLike | None = None,
        clusters: Sequence[Any] | ndarray | None = None,
    ) -> LinearMoments:
        """Moments z_i (y_i − x_i'θ); without Z, of the regression itself, Z = X.

        y (n,), X (n, K), Z (n, L), weights (n,) and clusters (n,), one row an observation.
        names: of the K parameters; instrument_names: of the L instruments. An instrument
        that bears a regressor's name is that regressor (exogenous).
        Raises as `from_formula`.
        """
        spec = parse_covariance(covariance, centred)
        y, X = np.asarray(y, dtype=float), np.asarray(X, dtype=float)
        Z = X if Z is None else np.asarray(Z, dtype=float)
        X, Z = (a[:, None] if a.ndim == 1 else a for a in (X, Z))
        weights = None if weights is None else np.asarray(weights, dtype=float)
        for label, a in (("X", X), ("Z", Z), ("weights", weights), ("clusters", clusters)):
            if a is not None and len(a) != len(y):
                raise ValueError(f"{label} has {len(a)} rows, y has {len(y)}")
        if spec.kind == "cluster" and clusters is None:
            raise ValueError("covariance 'cluster' needs clusters=, one label a row")
        labels = array_names(X, Z, names, instrument_names)
        block = Block(
            y,
            X,
            Z,
            weights,
            None if clusters is None else np.asarray(clusters),
        )
        refuse_not_finite(labels, block)
        if spec.kind == "hac" and spec.bandwidth is None:  # chosen from all rows at once
            return cls._from_blocks([(labels, block)], spec)
        return cls._from_blocks(((labels, part) for part in cut(block, BLOCK_ROWS)), spec)

    @classmethod
    def from_moments(
        cls,
        G: ArrayLike,
        g: ArrayLike,
        *,
        names: Sequence[str] | None = None,
        moment_names: Sequence[str] | None = None,
        covariance: str | Covariance = "robust",
        centred: bool = False,
        clusters: Sequence[Any] | ndarray | None = None,
    ) -> LinearMoments:
        """Any linear moments m_i(θ) = g_i − G_i θ, one row an observation: G (n, L, K), g (n, L).

        Raises ValueError for `iid` (general moments have no homoskedastic form), wrong
        shapes, values that are not finite, or L < K.
        """
        spec = parse_covariance(covariance, centred)
        G, g = np.asarray(G, dtype=float), np.asarray(g, dtype=float)
        if G.ndim != 3 or g.shape != G.shape[:2]:
            raise ValueError(f"G has shape {G.shape} and g {g.shape}: need (n, L, K) and (n, L)")
        if spec.kind == "iid":
            raise ValueError("covariance 'iid' needs instruments and residuals: use 'robust'")
        if not (np.isfinite(G).all() and np.isfinite(g).all()):
            raise ValueError("G and g must be finite: drop or fill missing rows first")
        _, L, K = G.shape
        label = Names(
            tuple(names or (f"theta{k}" for k in range(K))),
            tuple(moment_names or (f"moment{m}" for m in range(L))),
        )
        check_counts(label, L, K)
        C = np.concatenate([g[:, :, None], G], axis=2)
        size = np.sqrt((C**2).mean(axis=0))
        right = 1 / or_one(size.max(axis=0))
        left = 1 / or_one((size * right).max(axis=1))
        scale = Scale(np.diag(left), np.diag(right))
        C = scale.left @ C @ scale.right
        if spec.kind == "hac" and spec.bandwidth is None:
            estimate = np.linalg.lstsq(C.mean(axis=0)[:, 1:], -C.mean(axis=0)[:, 0], rcond=None)[0]
            series = C @ np.concatenate([[1.0], estimate]) / left
            spec = replace(spec, bandwidth=automatic_bandwidth(series, spec.kernel))
        sums = _sums(C, spec, None if clusters is None else np.asarray(clusters))
        digest = hashlib.sha256(G.tobytes() + g.tobytes()).hexdigest()
        return cls(label, spec, scale, len(C), C.sum(axis=0), sums, None, None, digest)

    @classmethod
    def _from_blocks(cls, blocks: Iterable[tuple[Names, Block]], spec: Covariance) -> LinearMoments:
        """Sum the blocks in order; rows are handed to two threads, sums stay in order.

        One BLAS thread each: on a busy machine BLAS's own threads wait for one another.
        """
        whole: LinearMoments | None = None
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(2) as pool:
            pending: list[Any] = []
            for names, block in blocks:
                if whole is None and not pending:
                    check_counts(names, block.Z.shape[1], block.X.shape[1])
                    scale = first_scale(block)
                pending.append(pool.submit(_block_moments, names, spec, scale, block))
                if len(pending) > 2:
                    first = pending.pop(0).result()
                    whole = first if whole is None else whole + first
            for last in pending:
                whole = last.result() if whole is None else whole + last.result()
        if whole is None:
            raise ValueError("no rows of data")
        if whole.grams is not None and not whole.grams.instruments.any():
            raise ValueError("weights sum to 0: at least one must be positive")
        return whole

    # --- merging -----------------------------------------------------------------------

    def __add__(self, other: LinearMoments) -> LinearMoments:
        """Moments of both samples; raises ValueError when they are not of the same kind."""
        if self.names != other.names:
            raise ValueError(f"moments of different models: {self.names} and {other.names}")
        if self.covariance != other.covariance:
            raise ValueError(
                f"covariances differ: {self.covariance} and {other.covariance}"
                + (
                    "; give hac:BANDWIDTH, the same for each"
                    if self.covariance.kind == "hac"
                    else ""
                )
            )
        other = other._in_scale(self.scale)
        rows = None
        if self.rows and other.rows and _prefer_rows(self.n + other.n, self.L, self.K + 1):
            Z, W = (np.concatenate(pair) for pair in zip(self.rows, other.rows, strict=True))
            rows = (Z, W)
        return replace(
            self,
            n=self.n + other.n,
            total=self.total + other.total,
            sums=None if self.sums is None else self.sums + other.sums,  # type: ignore[operator]
            grams=None if self.grams is None else self.grams + other.grams,  # type: ignore[operator]
            rows=rows,
            digest=hashlib.sha256((self.digest + other.digest).encode()).hexdigest(),
        )

    def _in_scale(self, scale: Scale) -> LinearMoments:
        if scale is self.scale:
            return self
        left = scale.left @ np.linalg.inv(self.scale.left)
        right = np.linalg.solve(self.scale.right, scale.right)
        grams = self.grams and Grams(
            left @ self.grams.instruments @ left.T,
            right.T @ self.grams.regression @ right,
            self.grams.regression_sum @ right,
        )
        return replace(
            self,
            scale=scale,
            total=left @ self.total @ right,
            sums=self.sums and self.sums.mapped(left, right),
            grams=grams,
            rows=self.rows and (self.rows[0] @ left.T, self.rows[1] @ right),
        )

    # --- reading -----------------------------------------------------------------------

    @property
    def K(self) -> int:
        """Number of parameters."""
        return len(self.names.parameters)

    @property
    def L(self) -> int:
        """Number of moments."""
        return len(self.names.moments)

    @cached_property
    def mean_C(self) -> Float[ndarray, "L P"]:
        """Mean of C̃_i in working columns."""
        return self.total / self.n

    @cached_property
    def tensor(self) -> Float[ndarray, "packedL packedP"]:
        """Packed tensor of Ω in working columns: pack(Ω) = tensor @ products(p̃)."""
        if self.sums is not None:
            return self.sums.mean_tensor(self.n, self.mean_C, self.covariance.centred)
        if self.grams is None:
            raise ValueError("iid moments without instruments")  # cannot be made
        variance = self.grams.regression / self.n
        if self.covariance.centred:
            mean = self.grams.regression_sum / self.n
            variance = variance - np.multiply.outer(mean, mean)
        once, doubled = np.tril_indices(self.K + 1), np.tril_indices(self.K + 1)
        weights = np.where(once[0] == once[1], 1.0, 2.0) * variance[doubled]
        rows, columns = np.tril_indices(self.L)
        return np.multiply.outer(self.grams.instruments[rows, columns] / self.n, weights)

    def working(self, theta: Float[ndarray, "*batch K"]) -> Float[ndarray, "*batch P"]:
        """p̃ = right⁻¹ (1, −θ): the parameters in working columns."""
        theta = np.asarray(theta, dtype=float)
        if theta.shape[-1:] != (self.K,):
            raise ValueError(f"theta has shape {theta.shape}: its last axis must be {self.K}")
        p = np.concatenate([np.ones((*theta.shape[:-1], 1)), -theta], axis=-1)
        return np.linalg.solve(self.scale.right, p[..., None])[..., 0]

    def mean(self, theta: Float[ndarray, "*batch K"]) -> Float[ndarray, "*batch L"]:
        """The moments' mean at θ, in the data's units."""
        return np.asarray(self.working(theta) @ self.mean_C.T @ np.linalg.inv(self.scale.left).T)

    def covariance_at(self, theta: Float[ndarray, "*batch K"]) -> Float[ndarray, "*batch L L"]:
        """Ω(θ), in the data's units."""
        omega = unpack(products(self.working(theta)) @ self.tensor.T, self.L)
        back = np.linalg.inv(self.scale.left)
        return np.asarray(back @ omega @ back.T)

    @property
    def prefers_rows(self) -> bool:
        """Whether Ω(θ) is cheaper from the n rows than from the tensor."""
        return self.rows is not None and _prefer_rows(self.n, self.L, self.K + 1)

    def check(self) -> None:
        """Raise ValueError if the moments cannot identify θ, naming what is redundant."""
        names = self.names
        if self.n <= self.L:
            raise ValueError(f"{self.n} rows for {self.L} moments: Ω is singular; need n > L")
        if self.grams is not None:
            refuse_collinear(self.grams.regression[1:, 1:], names.parameters, "regressors (X)")
            refuse_collinear(self.grams.instruments, names.moments, "instruments (Z)")
        slope = self.mean_C[:, 1:]
        if self.grams is not None:
            for side, gram in ((0, self.grams.instruments), (1, self.grams.regression[1:, 1:])):
                root = np.linalg.cholesky(gram / self.n)
                slope = solve_triangular(root, slope if side == 0 else slope.T, lower=True)
            slope = slope.T
        strength = np.linalg.svd(slope, compute_uv=False)
        if strength[-1] <= 1e-9 * max(strength[0], 1e-300):
            _, _, axes = np.linalg.svd(slope)
            raise ValueError(
                f"the moments do not identify {involved(axes[-1], names.parameters)}: the rank of "
                f"Z'X is {int((strength > 1e-9 * strength[0]).sum())}, {self.K} is needed"
            )


# --- one block --------------------------------------------------------------------------


def _block_moments(names: Names, spec: Covariance, scale: Scale, block: Block) -> LinearMoments:
    n, L, P = len(block.y), len(names.moments), len(names.parameters) + 1
    columns = _working_columns(scale, block)  # (L + P, n): contiguous along the rows of data
    Z, W = columns[:L].T, columns[L:].T
    gram = columns @ columns.T
    total = gram[:L, L:].copy()
    if spec.kind == "hac" and spec.bandwidth is None:
        residual = W @ _two_stage(total, gram[:L, :L])
        series = np.linalg.solve(scale.left, (Z * residual[:, None]).T).T  # in the data's units
        spec = replace(spec, bandwidth=automatic_bandwidth(series, spec.kernel))
    sums: Sums = None
    if spec.kind == "robust":
        sums = robust_sums(Z, W)
    elif spec.kind != "iid":
        Z, W = np.ascontiguousarray(Z), np.ascontiguousarray(W)
        sums = _sums(Z[:, :, None] * W[:, None, :], spec, block.clusters)
    keep = spec.kind == "robust" and not spec.centred and _prefer_rows(n, L, P)
    return LinearMoments(
        names,
        spec,
        scale,
        n,
        total,
        sums,
        Grams(gram[:L, :L].copy(), gram[L:, L:].copy(), W.sum(axis=0)),
        (np.ascontiguousarray(Z), np.ascontiguousarray(W)) if keep else None,
        _digest(names, block),
    )


def _working_columns(scale: Scale, block: Block) -> Float[ndarray, "S n"]:
    """Rows Z then (y, X) of working columns, times the root of the weights."""
    L, P = len(scale.left), len(scale.right)
    out = np.empty((L + P, len(block.y)))
    np.matmul(scale.left, block.Z.T, out=out[:L])
    np.matmul(scale.right.T, np.vstack([block.y, block.X.T]), out=out[L:])
    if block.weights is not None:
        out *= np.sqrt(checked_weights(block.weights))
    return out


def _digest(names: Names, block: Block) -> str:
    """Hash of the data, column by column; an instrument that is a regressor counts once."""
    digest = hashlib.sha256()
    own = [name not in names.parameters for name in names.moments]
    for part in (block.y, *block.X.T, *block.Z.T[own], block.weights):
        digest.update(b"" if part is None else np.ascontiguousarray(part).data)
    if block.clusters is not None:
        digest.update("\x1f".join(map(str, block.clusters)).encode())
    return digest.hexdigest()


def _sums(C: ndarray, spec: Covariance, clusters: ndarray | None) -> Sums:
    if spec.kind == "robust":
        return robust_sums_general(C)
    if spec.kind == "hac":
        return hac_sums(C, spec)
    if clusters is None or len(clusters) != len(C):
        raise ValueError(f"covariance {spec} needs one cluster label a row ({len(C)} rows)")
    return cluster_sums(C, clusters)


def _prefer_rows(n: int, L: int, P: int) -> bool:
    """Flops of Σ z z' e² against those of tensor @ products."""
    return n * L * L < packed_size(L) * packed_size(P)


def _two_stage(total: ndarray, gram: ndarray) -> Float[ndarray, " P"]:
    """(1, −θ) of two-stage least squares, as a direction in working columns."""
    root = np.linalg.cholesky(gram)
    moved = solve_triangular(root, total, lower=True)
    theta = np.linalg.lstsq(moved[:, 1:], -moved[:, 0], rcond=None)[0]
    return np.concatenate([[1.0], theta])
