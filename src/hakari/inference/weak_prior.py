"""A weakly informative default prior, scaled by the data's own spread.

As rstanarm's autoscaled default: N(0, (2.5 sd(y) / sd(x))²), which says that one standard
deviation of x moves y by fewer than five of its own. Only endogenous coefficients get one:
theirs are what weak instruments leave undetermined.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.moments import LinearMoments
from hakari.inference.prior import Flat, Normal

WIDTH = 2.5  # of sd(y) / sd(x), Gelman et al. (2008), rstanarm


def weak_prior(moments: LinearMoments) -> list[Normal] | Flat:
    """N(0, (2.5 sd(y) / sd(x_k))²) on each endogenous coefficient; `Flat()` if there are none.

    From the sufficient statistics: the data are not read again.
    Raises ValueError for general moments, which have no y and x, or a constant column.

    >>> rng = np.random.default_rng(1)
    >>> z = rng.standard_normal(500)
    >>> moments = LinearMoments.from_arrays(4 * z, 2 * z, z, names=["x"])
    >>> [round(float(p.cov), 6) for p in weak_prior(moments)]
    [25.0]
    """
    names = moments.names
    if not names.endogenous:
        return Flat()
    spread = column_spread(moments)
    priors = []
    for name in names.endogenous:
        sd = spread[1 + names.parameters.index(name)]
        if not (sd > 0 and spread[0] > 0):
            flat = name if not sd > 0 else names.dependent
            raise ValueError(f"{flat} does not vary: the weak prior has no scale; give --prior")
        priors.append(Normal(0.0, float((WIDTH * spread[0] / sd) ** 2), names=[name]))
    return priors


def column_spread(moments: LinearMoments) -> Float[ndarray, " P"]:
    """Standard deviations of y and the K regressors (weighted, if there is an intercept)."""
    grams = moments.grams
    if grams is None:
        raise ValueError("general moments have no y and x to scale a weak prior by: give a prior")
    # in working columns, which are centred, so that subtracting the mean keeps its digits
    back = np.linalg.inv(moments.scale.right)
    mean = grams.regression_sum / moments.n
    square = grams.regression / moments.n
    if "Intercept" in moments.names.parameters:
        one = back[:, 1 + moments.names.parameters.index("Intercept")]
        mean, total = square @ one, one @ square @ one
        mean, square = mean / total, square / total
    variance = ((square - np.outer(mean, mean)) @ back * back).sum(axis=0)
    spread: ndarray = np.sqrt(np.clip(variance, 0, None))
    return spread
