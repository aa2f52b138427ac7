"""`pcn`: preconditioned Crank-Nicolson moves, for Gaussian priors.

u' = √(1 − β²) u + β ξ leaves N(0, I) invariant, which in u is the Gaussian form with the prior's
precision and the loss's curvature; the move is accepted with min{1, w(u')/w(u)}, w the posterior
over that form: the move of Rudolf and Sprungk (2018), which does not slow down as data become many
(a Gaussian posterior is drawn independently, β = 1). Where the loss has no curvature the form is
the prior alone, and w is exp(−η loss): the move of Cotter et al. (2013).
"""

from __future__ import annotations

import numpy as np

from hakari.inference.gibbs.lockstep import Kernel
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.target import free_positions

LONGEST = 1.0  # β = 1: independent proposals

crank_nicolson = Kernel(
    "pcn",
    place=lambda state, size: np.sqrt(1 - size**2)[:, None] * state.u,
    spread=lambda size: size,
    first=lambda d: LONGEST,
    goal=lambda d: 0.3,  # Cotter et al. (2013), section 6
    longest=LONGEST,
)


def refuse_other_priors(posterior: GibbsPosterior) -> None:
    """Raise ValueError unless every coefficient has a Gaussian prior."""
    student = {k for block in posterior.blocks if np.isfinite(block.df) for k in block.positions}
    other = sorted(student | set(free_positions(posterior)))
    if other:
        names = [posterior.parameters[k] for k in other]
        kinds = "a Student prior" if other[0] in student else "a flat prior"
        raise ValueError(
            f"method 'pcn' keeps a Gaussian prior of all coefficients, and {names[0]} has {kinds}: "
            f"give Normal(mean, variance, names={names}), or use method='mh' or 'smc'"
        )
