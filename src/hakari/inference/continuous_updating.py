"""Continuously updated weighting of one response's concentrated moments.

With one shock on a common sample Ω(β) = S + d v v', v = β − c/d, is of rank one beyond a constant:
one Cholesky of S ever, and an evaluation is a product with its factor (Sherman and Morrison).
The criterion is bounded, and a flat prior over many horizons improper: `refuse_unbounded` looks
along rays before anything is drawn. local-projections.md 'The trap of this system'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import cho_solve, solve_triangular

from hakari.inference.identification import BARRIER, RADII, shell_barrier


@dataclass(frozen=True)
class RankOne:
    """−h/2 (f − b̄x)'(I + d xx')⁻¹(f − b̄x) − ½ log(1 + d|x|²), x = S^(−1/2)(β − c/d)."""

    centre: Float[ndarray, " q"]  # c/d
    root: Float[ndarray, "q q"]  # lower factor of S
    f: Float[ndarray, " q"]
    slope: float  # b̄
    d: float
    precision: float
    determinant: bool

    def log_likelihood(self, path: Float[ndarray, "N q"]) -> Float[ndarray, " N"]:
        """Log quasi-likelihood of each row, up to a constant."""
        x = solve_triangular(self.root, (path - self.centre).T, lower=True).T
        size = np.sqrt((x**2).sum(axis=1))
        along = x @ self.f / np.where(size > 0, size, 1)
        lift = 1 + self.d * size**2
        # across x nothing is lifted; far out the sum of both parts would cancel
        across = self.f @ self.f - along**2
        found = -0.5 * self.precision * (across + (along - self.slope * size) ** 2 / lift)
        return np.asarray(found - 0.5 * self.determinant * np.log(lift))


@dataclass(frozen=True)
class ByRows:
    """The same of any system: Ω(β) is summed over the rows anew for each β."""

    constant: Float[ndarray, " q"]  # Σ z y
    slope: Float[ndarray, "q q"]  # Σ z s', block by horizon
    rows: Float[ndarray, "R q"]  # of Ω, at β = 0
    row_slopes: Float[ndarray, "R q S"]
    precision: float
    determinant: bool

    def log_likelihood(self, path: Float[ndarray, "N q"]) -> Float[ndarray, " N"]:
        """Log quasi-likelihood of each row; −inf where Ω(β) is singular."""
        return np.array([self._one(beta) for beta in path])

    def _one(self, beta: Float[ndarray, " q"]) -> float:
        shocks = self.row_slopes.shape[2]
        by_shock = np.tile(beta.reshape(shocks, 1, -1), (1, shocks, 1)).reshape(shocks, -1)
        rows = self.rows - np.einsum("rqs,sq->rq", self.row_slopes, by_shock)
        m = self.constant - self.slope @ beta
        try:
            factor = np.linalg.cholesky(rows.T @ rows)
        except np.linalg.LinAlgError:
            return -np.inf
        quad = float(m @ cho_solve((factor, True), m))
        log_det = 2 * float(np.log(np.diag(factor)).sum())
        return -0.5 * self.precision * quad - 0.5 * self.determinant * log_det


Updating = RankOne | ByRows


def rank_one(
    constant: Float[ndarray, " q"],
    slope: float,
    rows: Float[ndarray, "R q"],
    row_slope: Float[ndarray, " R"],
    precision: float,
    determinant: bool,
) -> RankOne:
    """From Σ z y (q,), Σ z s, and the rows of Ω(β): rows − row_slope β.

    Raises ValueError where Ω is singular for want of rows.
    """
    d = float(row_slope @ row_slope)
    centre = rows.T @ row_slope / d
    rest = rows - np.multiply.outer(row_slope, centre)
    try:
        root = np.linalg.cholesky(rest.T @ rest)
        # a variable's response to itself at once leaves rounding errors, which may be factored
        if (np.diag(root) < 1e-10 * np.sqrt((rows**2).sum(axis=0))).any():
            raise np.linalg.LinAlgError
    except np.linalg.LinAlgError:
        R, q = rows.shape
        raise ValueError(
            f"Ω of {q} horizons is singular with {R} rows: continuous updating needs its "
            "inverse; use fewer horizons, leave out 0 of a shock's response to itself, or "
            "take weighting='frozen'"
        ) from None
    f = solve_triangular(root, constant - slope * centre, lower=True)
    return RankOne(centre, root, f, slope, d, precision, determinant)


def refuse_unbounded(
    updating: Updating, name: str, estimate: Float[ndarray, " q"], covariance: Float[ndarray, "q q"]
) -> None:
    """Raise ValueError unless a flat prior leaves a mode behind a barrier that chains respect.

    The mass of shells, exp(log_likelihood) r^q, must fall by `BARRIER` log units along every
    principal axis before it rises again.
    """
    values, vectors = np.linalg.eigh(covariance)
    axes = (vectors * np.sqrt(np.maximum(values, 0))).T
    q = len(estimate)
    worst, at = np.inf, 0.0
    for axis in (*axes, *-axes):
        mass = updating.log_likelihood(estimate + RADII[:, None] * axis) + q * np.log(RADII)
        barrier, minus_decay, _ = shell_barrier(mass, 4 + 4 * np.sqrt(q))
        if barrier < worst:
            worst, at = barrier, -minus_decay
    if worst < BARRIER:
        raise ValueError(
            f"the continuously updated quasi-posterior of {name} over {q} coefficients is improper "
            f"under a flat prior: its criterion is bounded, and the mass of shells falls by only "
            f"{max(worst, 0.0):.1f} log units (at least {BARRIER:g} are needed) before it grows "
            f"like r^{at:.0f}. Give a proper prior (prior=RoughnessPenalty()), fewer horizons, or "
            "weighting='frozen'"
        )
