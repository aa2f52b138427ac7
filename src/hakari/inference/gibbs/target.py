"""The Gibbs posterior around its Gaussian form, for samplers: θ = centre + factor u.

In u the posterior is about N(0, I): precision η J of the loss (sandwich.py) plus that of the
prior. A Student prior counts by its curvature where the form's centre is. Where the loss has no J,
because it jumps, does not curve or has no minimum, the form is a diagonal one around the minimiser
or the mode, as wide as the log density takes to fall by 1/2.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import solve_triangular
from scipy.optimize import minimize

from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.risk import LinearRisk
from hakari.inference.gibbs.sandwich import GradientError
from hakari.inference.prior import PriorBlock

ROUNDS = 100  # of the form's centre under a Student prior, and of the search for widths


@dataclass(frozen=True)
class Target:
    """A posterior in coordinates u. curved: whether its loss has a curvature J there."""

    posterior: GibbsPosterior
    centre: Float[ndarray, " d"]
    factor: Float[ndarray, "d d"]
    curved: bool

    @property
    def d(self) -> int:
        """Number of coefficients."""
        return len(self.centre)

    def theta(self, u: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch d"]:
        """θ of u."""
        return np.asarray(self.centre + u @ self.factor.T)

    def log_density(self, u: Float[ndarray, "M d"]) -> Float[ndarray, " M"]:
        """Log π_η at θ(u), as `GibbsPosterior.log_density`; −inf where the loss overflows."""
        return density_at(self.posterior, self.theta(u))


def density_at(posterior: GibbsPosterior, theta: Float[ndarray, "M d"]) -> Float[ndarray, " M"]:
    """Log π_η at θ (M, d), −inf where the loss is too large for a number."""
    with np.errstate(over="ignore", invalid="ignore"):
        value = -posterior.learning_rate * posterior.risk.totals(theta)
    return np.asarray(np.where(np.isnan(value), -np.inf, value) + posterior.log_prior(theta))


def target_of(posterior: GibbsPosterior) -> Target:
    """The posterior in the coordinates of its Gaussian form.

    Raises ValueError where the density does not fall along a coefficient.
    """
    with np.errstate(all="ignore"):
        try:
            curvature = posterior.sandwich.curvature
            centre = _centre(posterior, curvature)
            return Target(posterior, centre, _factor(posterior, curvature, centre), True)
        except GradientError:
            raise
        except ValueError:  # the loss jumps, or has no minimum that it curves at
            centre, risk = _mode(posterior), posterior.risk
        if isinstance(risk, LinearRisk) and risk.loss.smooth and not free_positions(posterior):
            factor = _factor(posterior, risk.curvature(centre), centre)
            return Target(posterior, centre, factor, True)
        return Target(posterior, centre, np.diag(_widths(posterior, centre)), False)


def free_positions(posterior: GibbsPosterior) -> list[int]:
    """Coefficients without a proper prior."""
    closed = {k for block in posterior.blocks for k in block.positions}
    return [k for k in range(len(posterior.parameters)) if k not in closed]


def prior_target(posterior: GibbsPosterior) -> Target:
    """The posterior in coordinates in which a prior of all coefficients is N(0, I), if Gaussian."""
    d = len(posterior.parameters)
    centre, factor = np.zeros(d), np.zeros((d, d))
    for block in posterior.blocks:
        chosen = np.array(block.positions)
        centre[chosen], factor[np.ix_(chosen, chosen)] = block.mean, block.factor
    return Target(posterior, centre, factor, False)


# --- parts --------------------------------------------------------------------------------


def _centre(posterior: GibbsPosterior, curvature: ndarray) -> Float[ndarray, " d"]:
    """The mode of the prior times the Gaussian with the loss's minimiser and curvature."""
    J, theta = posterior.learning_rate * curvature, posterior.minimiser
    centre = theta
    for _ in range(ROUNDS if posterior.blocks else 0):
        pull = J @ theta
        for block in posterior.blocks:
            pull = pull + _steepness(block, centre) * block.root.T @ block.centre
        last, centre = centre, np.linalg.solve(_precision(posterior, curvature, centre), pull)
        if np.allclose(centre, last, rtol=1e-10, atol=0):
            break
    return centre


def _precision(
    posterior: GibbsPosterior, curvature: ndarray, centre: ndarray
) -> Float[ndarray, "d d"]:
    """η J and the prior's precision."""
    total = posterior.learning_rate * curvature
    for block in posterior.blocks:
        total = total + _steepness(block, centre) * block.root.T @ block.root
    return np.asarray((total + total.T) / 2)


def _factor(
    posterior: GibbsPosterior, curvature: ndarray, centre: ndarray
) -> Float[ndarray, "d d"]:
    """F with F F' the inverse of the precision."""
    root = np.linalg.cholesky(_precision(posterior, curvature, centre))
    return np.ascontiguousarray(solve_triangular(root, np.eye(len(root)), lower=True).T)


def _steepness(block: PriorBlock, theta: ndarray) -> float:
    """Curvature of −log p in the quadratic form of the block, over that of a Gaussian."""
    if np.isinf(block.df):
        return 1.0
    q = float(((block.root @ theta - block.centre) ** 2).sum())
    return (block.df + len(block.centre)) / (block.df + q)


def _mode(posterior: GibbsPosterior) -> Float[ndarray, " d"]:
    """About where the density is highest: searched from the prior's mean, or the loss's minimum."""
    risk = posterior.risk
    start, unit = np.zeros(len(risk.names)), np.ones(len(risk.names))
    if isinstance(risk, LinearRisk):
        unit = 1 / np.sqrt((risk.X**2).mean(axis=0))
    else:
        start = risk.start.copy()
    for block in posterior.blocks:
        chosen = list(block.positions)
        start[chosen], unit[chosen] = block.mean, np.sqrt((block.factor**2).sum(axis=1))

    def value(z: ndarray) -> float:
        return float(-density_at(posterior, (start + unit * z)[None])[0])

    best = minimize(value, np.zeros(len(start)), method="BFGS").x
    options = {"adaptive": len(start) > 3, "maxfev": 400 * len(start)}
    found = [start + unit * minimize(value, best, method="Nelder-Mead", options=options).x]
    with suppress(ValueError):  # there may be no minimum
        found.append(posterior.minimiser)
    return np.asarray(max(found, key=lambda theta: density_at(posterior, theta[None])[0]))


def _widths(posterior: GibbsPosterior, centre: Float[ndarray, " d"]) -> Float[ndarray, " d"]:
    """Half the step along each coefficient at which the log density has fallen by 2."""
    steps = 1e-3 * (1e-6 + np.abs(centre))
    low, high = np.zeros_like(steps), np.full_like(steps, np.inf)
    base = density_at(posterior, centre[None])[0]
    for _ in range(ROUNDS):
        move = np.diag(steps)
        sides = [density_at(posterior, centre + sign * move) for sign in (1, -1)]
        small = base - (sides[0] + sides[1]) / 2 < 2
        low, high = np.where(small, steps, low), np.where(small, high, steps)
        both = np.isfinite(high) & (low > 0)
        middle = np.sqrt(np.where(both, low, 1) * np.where(both, high, 1))
        steps = np.where(both, middle, np.where(small, steps * 4, steps / 4))
        if both.all() and (high < 1.1 * low).all():
            break
    if np.isfinite(high).all():
        return np.asarray(high / 2)
    name = posterior.parameters[int(np.argmax(~np.isfinite(high)))]
    raise ValueError(
        f"the posterior's density does not fall along {name}: the loss does not depend on it; "
        f"drop it, or give it a proper prior such as Normal(mean, variance, names=[{name!r}])"
    )
