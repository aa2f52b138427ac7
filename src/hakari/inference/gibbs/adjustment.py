"""Draws moved so that their covariance is the sandwich's, where no single rate calibrates.

θ → θ̂ + A (θ − θ̂), with A A' in the posterior's metric the sandwich: the open-faced sandwich of
Shaby (2014), from the square roots of both covariances.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs.calibration import Calibration
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.rival_intervals import sandwich_under


def sandwich_adjusted(
    result: xr.DataTree,
    of: Calibration | GibbsPosterior,
    spread: Float[ndarray, "d d"] | None = None,
) -> xr.DataTree:
    """The result with its draws moved around θ̂; other groups stay as they are.

    of: the calibration, whose bootstrap says how scores vary in J⁻¹ K J⁻¹; or a posterior, whose
    rows count as independent, or its clusters if it has them. spread (d, d): another covariance of
    the minimiser. The posterior's own covariance is that of the draws.
    Raises ValueError for another posterior's draws, and for a loss that jumps without a spread.
    """
    posterior = of.posterior if isinstance(of, Calibration) else of
    theta: ndarray = result["posterior"].dataset["theta"].values
    if theta.shape[-1] != len(posterior.parameters):
        raise ValueError(
            f"the draws have {theta.shape[-1]} coefficients and the posterior "
            f"{len(posterior.parameters)}"
        )
    wanted = _spread(of) if spread is None else spread
    own = np.cov(theta.reshape(-1, theta.shape[-1]).T).reshape(wanted.shape)
    moved = posterior.minimiser + (theta - posterior.minimiser) @ transport(own, wanted).T
    out = result.copy()
    dataset = result["posterior"].to_dataset()
    dataset["theta"] = (dataset["theta"].dims, moved)
    out["posterior"] = xr.DataTree(dataset)
    return out


def _spread(of: Calibration | GibbsPosterior) -> Float[ndarray, "d d"]:
    if isinstance(of, GibbsPosterior):
        scheme = "multinomial" if of.clusters is None else "cluster"
        return sandwich_under(of, scheme).covariance
    if of.sandwich is None:
        raise ValueError(
            f"loss {of.posterior.risk.loss.name!r} jumps, so that J⁻¹ K J⁻¹ does not describe its "
            "minimiser: give spread=, the covariance (d, d) of minimisers by another route"
        )
    return of.sandwich.covariance


def transport(own: Float[ndarray, "d d"], wanted: Float[ndarray, "d d"]) -> Float[ndarray, "d d"]:
    """The symmetric A with A own A' = wanted: the least move between two Gaussians."""
    values, vectors = np.linalg.eigh(own)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    inner, turn = np.linalg.eigh(root @ wanted @ root)
    half = (turn * np.sqrt(np.maximum(inner, 0))) @ turn.T
    return np.asarray(inverse @ half @ inverse)
