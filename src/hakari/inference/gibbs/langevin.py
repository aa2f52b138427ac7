"""`mala`: Metropolis-adjusted Langevin moves, preconditioned by the Gaussian form.

In u: u' = u + ½ s² ∇log π(u) + s ξ, which in θ is the drift by (η J + prior precision)⁻¹.
Roberts and Tweedie (1996); a drift is cut to a length of 10 √d in u (their truncated form), so that
slopes that explode, as those of exp, do not throw a chain away.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs import loss_kernels as kernels
from hakari.inference.gibbs.lockstep import Kernel, State
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.risk import LinearRisk, Risk
from hakari.inference.gibbs.target import Target

LONGEST = 10.0  # drift over √d


def slope(target: Target, u: Float[ndarray, "C d"]) -> Float[ndarray, "C d"]:
    """Gradient of the log density in u, cut to its longest."""
    posterior, theta = target.posterior, target.theta(u)
    with np.errstate(over="ignore", invalid="ignore"):
        loss = np.stack([_gradient(posterior.risk, t) for t in theta])
        found = (prior_slope(posterior, theta) - posterior.learning_rate * loss) @ target.factor
        length = np.linalg.norm(found, axis=1, keepdims=True) / (LONGEST * np.sqrt(target.d))
    found = np.where(np.isfinite(length), found / np.maximum(length, 1.0), 0.0)
    return np.asarray(found)


def prior_slope(posterior: GibbsPosterior, theta: Float[ndarray, "C d"]) -> Float[ndarray, "C d"]:
    """Gradient of the log prior in θ."""
    total = np.zeros_like(theta)
    for block in posterior.blocks:
        gap = theta @ block.root.T - block.centre
        if np.isfinite(block.df):
            gap = gap * (block.df + gap.shape[1]) / (block.df + (gap**2).sum(1, keepdims=True))
        total -= gap @ block.root
    return total


def has_slope(risk: Risk) -> bool:
    """Whether the loss has a gradient everywhere that is known."""
    return risk.loss.smooth if isinstance(risk, LinearRisk) else risk.loss.gradient is not None


def refuse_without_slope(posterior: GibbsPosterior) -> None:
    """Raise ValueError for a loss with kinks, or a function without a gradient."""
    risk = posterior.risk
    if has_slope(risk):
        return
    if isinstance(risk, LinearRisk):
        what, way = f"the {risk.loss.name} loss has kinks", "use method='mh' or 'smc'"
    else:
        what = f"the loss {risk.loss.name!r} comes without one"
        way = "give Loss(function, gradient=...), or use method='mh' or 'smc'"
    raise ValueError(f"method 'mala' needs a gradient and {what}: {way}")


def _place(state: State, size: Float[ndarray, " C"]) -> Float[ndarray, "C d"]:
    return np.asarray(state.u + 0.5 * size[:, None] ** 2 * state.slope)


def _gradient(risk: Risk, theta: Float[ndarray, " d"]) -> Float[ndarray, " d"]:
    """Of the total loss."""
    if not isinstance(risk, LinearRisk):
        return np.asarray(risk.scores(theta).sum(axis=0))
    found = kernels.slopes(risk.loss.kind, risk.loss.shape, risk.y, risk.X @ theta)
    weighted = found if risk.weights is None else found * risk.weights
    return np.asarray(weighted @ risk.X)


langevin = Kernel(
    "mala",
    place=_place,
    spread=lambda size: size,
    first=lambda d: 1.65 / d ** (1 / 6),
    goal=lambda d: 0.574,  # Roberts and Rosenthal (1998)
    slope=slope,
)
