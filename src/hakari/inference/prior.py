"""Priors over the parameters: flat, Gaussian, Student; over all coefficients or some.

Each proper prior is, to the sampler, a function of one quadratic form |root (θ − mean)|²,
and a product of them is a stack of such blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma, log, pi
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import solve_triangular


@dataclass(frozen=True)
class Flat:
    """p(θ) ∝ 1. Improper: `QuasiPosterior` refuses it where the posterior would be."""


@dataclass(frozen=True)
class Normal:
    """N(mean, cov) over the coefficients `names` (all of them when None).

    mean: number or (d,); cov: variance or (d, d) covariance, in the coefficients' units.

    >>> Normal(0.1, 0.15**2, names=["educ"])
    Normal(mean=0.1, cov=0.0225, names=['educ'])
    """

    mean: Any
    cov: Any
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class StudentT:
    """Multivariate Student t with `df` degrees of freedom and scale matrix `scale` (d, d).

    `scale` is squared, as a covariance is: the covariance is scale · df / (df − 2).
    With `names`, over those coefficients only.
    """

    df: float
    mean: Any
    scale: Any
    names: Sequence[str] | None = None


Prior = Flat | Normal | StudentT


@dataclass(frozen=True)
class PriorBlock:
    """One proper factor: −log p = const + f(|root θ − centre|²); df = inf is Gaussian."""

    df: float
    root: Float[ndarray, "d K"]
    centre: Float[ndarray, " d"]
    constant: float
    positions: tuple[int, ...]
    mean: Float[ndarray, " d"]
    factor: Float[ndarray, "d d"]  # scale = factor factor'

    def log_density(self, theta: Float[ndarray, "*batch K"]) -> Float[ndarray, "*batch"]:
        """Normalised log density of θ (..., K)."""
        q = ((theta @ self.root.T - self.centre) ** 2).sum(axis=-1)
        if np.isinf(self.df):
            return np.asarray(self.constant - 0.5 * q)
        d = len(self.centre)
        return np.asarray(self.constant - 0.5 * (self.df + d) * np.log1p(q / self.df))


def prior_blocks(prior: Prior | Sequence[Prior], names: Sequence[str]) -> tuple[PriorBlock, ...]:
    """The proper factors of a prior, or of a product of priors; none for `Flat`.

    Raises ValueError for unknown or repeated names, wrong shapes or a covariance that is
    not positive definite; TypeError for what is not a prior.
    """
    priors = [prior] if isinstance(prior, Flat | Normal | StudentT) else list(prior)
    blocks = [_block(p, list(names)) for p in priors if not isinstance(p, Flat)]
    seen: set[int] = set()
    for block in blocks:
        twice = seen & set(block.positions)
        if twice:
            raise ValueError(f"two priors on {names[min(twice)]!r}: give each coefficient one")
        seen |= set(block.positions)
    return tuple(blocks)


def _block(prior: Prior, names: list[str]) -> PriorBlock:
    if isinstance(prior, Normal):
        df, scale, label = float("inf"), prior.cov, "cov"
    elif isinstance(prior, StudentT):
        df, scale, label = float(prior.df), prior.scale, "scale"
        if not df > 0:
            raise ValueError(f"StudentT df {prior.df}: degrees of freedom must be positive")
    else:
        raise TypeError(f"{prior!r} is not a prior: use Flat, Normal or StudentT")
    chosen = names if prior.names is None else list(prior.names)
    for name in chosen:
        if name not in names:
            raise ValueError(f"prior on unknown coefficient {name!r} (have {', '.join(names)})")
    d = len(chosen)
    mean = np.asarray(prior.mean, dtype=float)
    scale = np.asarray(scale, dtype=float)
    if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
        raise ValueError(
            f"prior mean and {label} must be finite (leave a coefficient flat by names=)"
        )
    if mean.ndim == 0:
        mean = np.full(d, float(mean))
    if scale.ndim == 0:
        scale = np.eye(d) * scale
    if mean.shape != (d,) or scale.shape != (d, d):
        raise ValueError(
            f"prior mean has shape {mean.shape} and {label} {scale.shape}: need ({d},) and "
            f"({d}, {d}) for {', '.join(chosen)}"
        )
    if not np.allclose(scale, scale.T, rtol=1e-10, atol=0):
        raise ValueError(f"prior {label} is not symmetric")
    try:
        factor = np.linalg.cholesky(scale)
    except np.linalg.LinAlgError:
        smallest = np.linalg.eigvalsh(scale)[0]
        raise ValueError(
            f"prior {label} is not positive definite (smallest eigenvalue {smallest:.3g})"
        ) from None
    positions = tuple(names.index(name) for name in chosen)
    root = np.zeros((d, len(names)))
    root[:, positions] = solve_triangular(factor, np.eye(d), lower=True)
    log_det = log(np.prod(np.diag(factor))) if d < 50 else float(np.log(np.diag(factor)).sum())
    if np.isinf(df):
        constant = -0.5 * d * log(2 * pi) - log_det
    else:
        constant = lgamma((df + d) / 2) - lgamma(df / 2) - 0.5 * d * log(df * pi) - log_det
    return PriorBlock(df, root, root[:, positions] @ mean, constant, positions, mean, factor)


def prior_log_density(
    blocks: Sequence[PriorBlock], theta: Float[ndarray, "*batch K"]
) -> Float[ndarray, "*batch"]:
    """Sum of the factors' log densities; 0 for a flat prior."""
    total = np.zeros(np.shape(theta)[:-1])
    for block in blocks:
        total = total + block.log_density(theta)
    return np.asarray(total)


def prior_draws(
    blocks: Sequence[PriorBlock], noise: Float[ndarray, "N K"], chi2: Float[ndarray, "N B"]
) -> Float[ndarray, "N K"]:
    """Draws by standard normals and chi-squares over df; NaN where a coefficient is flat."""
    out = np.full(noise.shape, np.nan)
    for index, block in enumerate(blocks):
        z = noise[:, block.positions]
        if np.isfinite(block.df):
            z = z / np.sqrt(chi2[:, index : index + 1])
        out[:, block.positions] = block.mean + z @ block.factor.T
    return out
