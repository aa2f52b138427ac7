"""Draws moved so that their covariance is the sandwich's, where no single rate calibrates.

θ → θ̂ + A (θ − θ̂), with A A' in the posterior's metric the sandwich: the open-faced sandwich of
Shaby (2014), from the square roots of both covariances.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs.posterior import GibbsPosterior


def sandwich_adjusted(
    result: xr.DataTree, posterior: GibbsPosterior, spread: Float[ndarray, "d d"] | None = None
) -> xr.DataTree:
    """The result with its draws moved around θ̂; other groups stay as they are.

    spread (d, d): covariance of the minimiser, such as a bootstrap's; default J⁻¹ K J⁻¹. The
    posterior's own covariance is that of the draws. Raises ValueError for another posterior's
    draws.
    """
    theta: ndarray = result["posterior"].dataset["theta"].values
    if theta.shape[-1] != len(posterior.parameters):
        raise ValueError(
            f"the draws have {theta.shape[-1]} coefficients and the posterior "
            f"{len(posterior.parameters)}"
        )
    wanted = posterior.sandwich.covariance if spread is None else spread
    own = np.cov(theta.reshape(-1, theta.shape[-1]).T).reshape(wanted.shape)
    moved = posterior.minimiser + (theta - posterior.minimiser) @ transport(own, wanted).T
    out = result.copy()
    dataset = result["posterior"].to_dataset()
    dataset["theta"] = (dataset["theta"].dims, moved)
    out["posterior"] = xr.DataTree(dataset)
    return out


def transport(own: Float[ndarray, "d d"], wanted: Float[ndarray, "d d"]) -> Float[ndarray, "d d"]:
    """The symmetric A with A own A' = wanted: the least move between two Gaussians."""
    values, vectors = np.linalg.eigh(own)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    inner, turn = np.linalg.eigh(root @ wanted @ root)
    half = (turn * np.sqrt(np.maximum(inner, 0))) @ turn.T
    return np.asarray(inverse @ half @ inverse)
