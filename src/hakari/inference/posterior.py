"""The quasi-posterior of linear moment conditions: moments and a prior.

π(θ) ∝ |Ω(θ)|^(−1/2) exp{−(n/2) m(θ)'Ω(θ)⁻¹m(θ)} p(θ): arXiv 2504.11761 and 2511.17117;
without the determinant, Chernozhukov and Hong (2003) with continuous updating; with
`weighting="two-step"`, the quadratic Laplace-type form. quasi-posteriors.md 'Target'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import cho_solve, solve_triangular

from hakari.inference.covariance import pack, products, transform, unpack
from hakari.inference.density import Target, log_density_batch
from hakari.inference.moments import LinearMoments
from hakari.inference.prior import Flat, Prior, PriorBlock, prior_blocks, prior_log_density

Weighting = Literal["continuous", "two-step"]


@dataclass(frozen=True)
class Whitened:
    """The posterior in coordinates θ = centre + factor u in which it is about N(0, I)."""

    target: Target
    centre: Float[ndarray, " K"]
    factor: Float[ndarray, "K K"]
    constant: float  # log density of θ = that of u + constant

    def theta(self, u: Float[ndarray, "*batch K"]) -> Float[ndarray, "*batch K"]:
        """θ of u."""
        return np.asarray(self.centre + u @ self.factor.T)

    def u(self, theta: Float[ndarray, "*batch K"]) -> Float[ndarray, "*batch K"]:
        """U of θ."""
        return np.linalg.solve(self.factor, (theta - self.centre)[..., None])[..., 0]


@dataclass(frozen=True)
class QuasiPosterior:
    """Quasi-posterior of `moments` under `prior`, a prior or a list of priors on subsets.

    weighting: `continuous` updates Ω with θ; `two-step` freezes it at two-stage least squares.
    determinant: include |Ω(θ)|^(−1/2), as the papers do; without effect when frozen.
    Raises ValueError where the moments cannot identify θ or the prior does not fit them.

    >>> import numpy as np
    >>> X = np.random.default_rng(1).standard_normal((100, 2))
    >>> moments = LinearMoments.from_arrays(X @ [1.0, 2.0] + X[:, 0] ** 2, X)
    >>> QuasiPosterior(moments, Flat()).log_density(np.array([[1.0, 2.0], [0.0, 0.0]])).shape
    (2,)
    """

    moments: LinearMoments
    prior: Prior | Sequence[Prior] = Flat()  # noqa: RUF009 - frozen
    weighting: Weighting = "continuous"
    determinant: bool = True

    def __post_init__(self) -> None:
        if self.weighting not in ("continuous", "two-step"):
            raise ValueError(f"weighting {self.weighting!r}: use 'continuous' or 'two-step'")
        self.moments.check()
        _ = self.blocks

    @cached_property
    def blocks(self) -> tuple[PriorBlock, ...]:
        """The prior's proper factors."""
        return prior_blocks(self.prior, self.moments.names.parameters)

    def log_prior(self, theta: Float[ndarray, "*batch K"]) -> Float[ndarray, "*batch"]:
        """Log prior density of θ (..., K), normalised where it is proper."""
        return prior_log_density(self.blocks, np.asarray(theta, dtype=float))

    def log_density(self, theta: Float[ndarray, "*batch K"]) -> Float[ndarray, "*batch"]:
        """Log π(θ) of θ (..., K), up to the data's constant; −inf where Ω(θ) is singular."""
        theta = np.asarray(theta, dtype=float)
        if theta.shape[-1:] != (self.moments.K,):
            raise ValueError(
                f"theta has shape {theta.shape}: its last axis must be {self.moments.K}"
            )
        white = self.whitened
        us = np.ascontiguousarray(white.u(theta).reshape(-1, self.moments.K))
        density: ndarray = log_density_batch(white.target, us) + white.constant
        return density.reshape(theta.shape[:-1])

    def log_density_and_gradient(
        self, theta: Float[ndarray, " K"]
    ) -> tuple[float, Float[ndarray, " K"]]:
        """Log π and its gradient at one θ (K,), for samplers that want gradients."""
        white = self.whitened
        value, slope = value_and_gradient(white.target, white.u(np.asarray(theta, dtype=float)))
        return value + white.constant, np.linalg.solve(white.factor.T, slope)

    @cached_property
    def whitened(self) -> Whitened:
        """Coordinates around the estimate that the prior and the frozen weighting imply."""
        moments = self.moments
        first, scale = first_step(moments), moments.scale
        bend, tilt = self._prior_form()
        q, omega = first, covariance_of(moments, first)
        if self.weighting == "continuous":
            q, omega = _iterated(moments, q, bend, tilt)
        root = np.linalg.cholesky(omega)
        C = solve_triangular(root, moments.mean_C, lower=True)
        spread = _factor_of_inverse(moments.n * C[:, 1:].T @ C[:, 1:] + bend.T @ bend)
        q = solve(moments, omega, bend, tilt)
        p = np.concatenate([[head(moments)], q])
        Q = np.zeros((moments.K + 1, moments.K + 1))  # p̃ = Q (1, u)
        Q[:, 0], Q[1:, 1:] = p, spread
        turn = _turn_to_lower(C[:, 1:] @ spread)
        C = turn @ C @ Q
        whiten = turn @ solve_triangular(root, np.eye(moments.L), lower=True)
        tensor, rows_z, rows_w = np.empty((0, 0)), np.empty((0, 0)), np.empty((0, 0))
        if self.weighting == "continuous" and moments.prefers_rows and moments.rows is not None:
            rows_z, rows_w = moments.rows[0] @ whiten.T, moments.rows[1] @ Q
        elif self.weighting == "continuous":
            tensor = transform(moments.tensor, whiten, Q)
        continuous = self.weighting == "continuous"
        stack = [np.atleast_2d(block.root @ -scale.right[1:]) for block in self.blocks]
        sizes = [len(block.centre) for block in self.blocks]
        target = Target(
            float(moments.n),
            C[:, 0].copy(),
            np.tril(C[:, 1:]),
            np.ascontiguousarray(tensor),
            np.ascontiguousarray(rows_z),
            np.ascontiguousarray(rows_w),
            continuous,
            self.determinant and continuous,
            np.array([block.df for block in self.blocks], dtype=float),
            np.cumsum([0, *sizes]).astype(np.int64),
            np.concatenate([s @ p - b.centre for s, b in zip(stack, self.blocks, strict=True)])
            if stack
            else np.empty(0),
            np.vstack([s[:, 1:] @ spread for s in stack]) if stack else np.empty((0, moments.K)),
        )
        constant = sum(block.constant for block in self.blocks)
        if target.determinant:
            constant -= float(np.log(np.diag(root)).sum() - np.linalg.slogdet(scale.left)[1])
        return Whitened(target, -scale.right[1:] @ p, -scale.right[1:, 1:] @ spread, constant)

    def _prior_form(self) -> tuple[Float[ndarray, "D K"], Float[ndarray, " D"]]:
        """(B, b): the Gaussian of the prior's scale is exp(−½|B q + b|²) in working columns."""
        right = self.moments.scale.right
        if not self.blocks:
            return np.empty((0, self.moments.K)), np.empty(0)
        root = np.vstack([block.root for block in self.blocks])
        centre = np.concatenate([block.centre for block in self.blocks])
        return -root @ right[1:, 1:], -root @ right[1:, 0] * head(self.moments) - centre


# --- generalised method of moments in working columns: p̃ = (head, q) ---------------------


def head(moments: LinearMoments) -> float:
    """The first entry of p̃, the same for every θ."""
    return float(1 / moments.scale.right[0, 0])


def covariance_of(moments: LinearMoments, q: Float[ndarray, " K"]) -> Float[ndarray, "L L"]:
    """Ω in working columns; raises ValueError, saying why, where it is singular."""
    p = np.concatenate([[head(moments)], q])
    omega = unpack(moments.tensor @ products(p), moments.L)
    at_zero = unpack(moments.tensor @ products(moments.working(np.zeros(moments.K))), moments.L)
    size = np.sqrt(np.diag(omega))
    if not (size > 1e-10 * np.sqrt(np.diag(at_zero))).all():
        raise ValueError("Ω is singular at the estimate: a perfect fit leaves nothing to weigh")
    spectrum = np.linalg.eigvalsh(omega / np.multiply.outer(size, size))
    rank = int((spectrum > 1e-13 * moments.L).sum())
    if rank < moments.L:
        raise ValueError(
            f"Ω is singular at the estimate: rank {rank} for {moments.L} moments; drop duplicate "
            "instruments, or use a covariance with more independent rows or clusters"
        )
    return omega


def first_step(moments: LinearMoments) -> Float[ndarray, " K"]:
    """Two-stage least squares, or equally weighted for general moments."""
    weight = np.eye(moments.L) if moments.grams is None else moments.grams.instruments / moments.n
    return solve(moments, weight, np.empty((0, moments.K)), np.empty(0))


def _iterated(
    moments: LinearMoments, q: ndarray, bend: ndarray, tilt: ndarray
) -> tuple[ndarray, ndarray]:
    """Estimate and weighting in turn until both stand (or 30 times: they need not)."""
    omega = covariance_of(moments, q)
    for _ in range(30):
        new = solve(moments, omega, bend, tilt)
        done = np.abs(new - q).max() <= 1e-10 * max(1.0, np.abs(q).max())
        q, omega = new, covariance_of(moments, new)
        if done:
            break
    return q, omega


def solve(moments: LinearMoments, omega: ndarray, bend: ndarray, tilt: ndarray) -> ndarray:
    """argmin_q n m'Ω⁻¹m + |B q + b|², by least squares."""
    root = np.linalg.cholesky(omega)
    C = solve_triangular(root, moments.mean_C, lower=True) * np.sqrt(moments.n)
    lhs = np.vstack([C[:, 1:], bend])
    rhs = np.concatenate([-C[:, 0] * head(moments), -tilt])
    estimate: ndarray = np.linalg.lstsq(lhs, rhs, rcond=None)[0]
    return estimate


def _factor_of_inverse(precision: Float[ndarray, "K K"]) -> Float[ndarray, "K K"]:
    """Lower F with F F' = precision⁻¹."""
    flipped = np.linalg.cholesky(precision[::-1, ::-1])[::-1, ::-1]  # upper U, U U' = precision
    factor: ndarray = solve_triangular(flipped.T, np.eye(len(precision)), lower=True)
    return factor


def _turn_to_lower(slope: Float[ndarray, "L K"]) -> Float[ndarray, "L L"]:
    """Orthogonal T with T slope lower triangular, its diagonal positive."""
    K = slope.shape[1]
    q, r = np.linalg.qr(slope[:, ::-1], mode="complete")
    turn = q.T
    turn[:K] = (np.sign(np.diag(r))[:, None] * turn[:K])[::-1]
    return turn


# --- gradient -----------------------------------------------------------------------------


def value_and_gradient(
    target: Target, u: Float[ndarray, " K"]
) -> tuple[float, Float[ndarray, " K"]]:
    """Log density and gradient in whitened coordinates; about the price of two evaluations."""
    L, K = target.slope.shape
    p = np.concatenate([[1.0], u])
    m = target.offset + target.slope @ u
    value = float(log_density_batch(target, np.ascontiguousarray(u)[None])[0])
    if not target.continuous:
        return value, -target.n * target.slope.T @ m + _prior_gradient(target, u)
    residual = target.rows_w @ p if len(target.rows_z) else np.empty(0)
    if len(target.rows_z):
        omega = (target.rows_z * residual[:, None] ** 2).T @ target.rows_z / target.n
    else:
        omega = unpack(target.tensor @ products(p), L)
    try:
        chol = np.linalg.cholesky(omega)
    except np.linalg.LinAlgError:
        return -np.inf, np.full(K, np.nan)
    v = cho_solve((chol, True), m)
    S = 0.5 * target.n * np.multiply.outer(v, v)
    if target.determinant:
        S -= 0.5 * cho_solve((chol, True), np.eye(L))
    if len(target.rows_z):
        quad = ((target.rows_z @ S) * target.rows_z).sum(axis=1)
        bend = 2 * target.rows_w[:, 1:].T @ (quad * residual) / target.n
    else:
        off = np.where(np.equal(*np.tril_indices(L)), 1.0, 2.0)
        weights = (pack(S) * off) @ target.tensor
        form = unpack(weights * np.where(np.equal(*np.tril_indices(K + 1)), 1.0, 0.5), K + 1)
        bend = 2 * (form @ p)[1:]
    return value, bend - target.n * target.slope.T @ v + _prior_gradient(target, u)


def _prior_gradient(target: Target, u: ndarray) -> ndarray:
    slope = np.zeros(len(u))
    bounds = zip(target.prior_start[:-1], target.prior_start[1:], target.prior_df, strict=True)
    for start, end, df in bounds:
        root = target.prior_slope[start:end]
        r = target.prior_offset[start:end] + root @ u
        pull = 1.0 if np.isinf(df) else (df + end - start) / (df + r @ r)
        slope -= pull * root.T @ r
    return slope
