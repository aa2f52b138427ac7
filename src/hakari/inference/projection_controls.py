"""The controls' coefficients: drawn afterwards in one solve, or shrunk beforehand.

Given a response's path its controls' coefficients are Gaussian under frozen weighting. Draws come
by conditioning a joint draw (Matheron's rule), so that 3,000 coefficients cost one solve of the
size of the path. Shrinkage is for controls that are many against the rows: both the outcomes and
the shocks are cleared of what a horseshoe keeps of the controls, which makes the moments
orthogonal to errors in either (Chernozhukov et al., 2018), so that shrinking biases the response
at second order only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.frisch_waugh import Concentrated
from hakari.inference.horseshoe import Horseshoe, horseshoe_means
from hakari.inference.influence import parse_scores, score_rows
from hakari.inference.projection_design import near

if TYPE_CHECKING:
    from hakari.inference.local_projections import LocalProjection


def control_draws(
    lp: LocalProjection, result: xr.DataTree, response: str, draws: int, chance: Generator
) -> xr.Dataset:
    """γ of one response given its sampled path: `gamma` (draw, horizon, control).

    draws: how many of the result's draws, spread evenly. Targets N(θ̂, V) of the stacked system,
    given β; raises ValueError for panels with effects, shrunk controls and continuous weighting.
    """
    if response not in lp.question.response:
        known = lp.question.response
        raise ValueError(f"no response {response!r}{near(response, known)}")
    if lp.design.unit is not None or lp.controls_prior is not None:
        raise ValueError("the controls are shrunk or hold effects of units: there are no draws")
    if result.attrs["weighting"] != "frozen":
        raise ValueError("control coefficients are Gaussian for weighting='frozen' only")
    j, (_, S, H) = lp.question.response.index(response), lp.shape
    theta = result["posterior"].dataset["theta"].transpose("chain", "draw", "coefficient").values
    theta = theta.reshape(len(theta) * theta.shape[1], -1, S * H)[:, j]
    theta = theta[np.linspace(0, len(theta) - 1, min(draws, len(theta))).astype(int)]
    mean, influence = _stacked(lp, j)
    spec = parse_scores(str(result.attrs["covariance"]))
    wide = np.repeat(lp.leverage, influence.shape[2], axis=1)
    flat = influence.reshape(len(influence), -1)
    rows = score_rows(
        flat, wide, lp.coefficients_by_horizon.repeat(influence.shape[2]), spec, lp.series
    )
    own = lp.score_rows(spec)[:, j * S * H : (j + 1) * S * H]
    noise = chance.standard_normal((len(theta), len(rows)))
    gap = theta - lp.estimate[j].ravel() - noise @ own
    inverse = np.linalg.pinv(own.T @ own, rcond=1e-12, hermitian=True)
    gamma = mean.ravel() + noise @ rows + gap @ inverse @ (own.T @ rows)
    axes = ("draw", "horizon", "control")
    return xr.Dataset(
        {"gamma": (axes, gamma.reshape(len(theta), H, -1))},
        {"horizon": list(lp.question.horizons), "control": list(lp.design.control_names)},
    )


def _stacked(lp: LocalProjection, j: int) -> tuple[Float[ndarray, "H K"], Float[ndarray, "N H K"]]:
    """Control coefficients of each horizon, and what each row adds to them."""
    H, K = lp.shape[2], lp.design.controls.shape[1]
    mean, influence = np.empty((H, K)), np.zeros((len(lp.series.period), H, K))
    for part in lp.parts:
        rows, h = part.rows, list(part.horizons)
        c, s = lp.design.controls[rows], lp.design.shocks[rows]
        y = lp.design.outcomes[np.ix_(rows, np.array([j]), np.array(h))][:, 0]
        z = lp.design.right[rows]
        if z.shape[1] > s.shape[1]:  # the combination that the estimate uses
            both = np.column_stack([z, c])
            z = both @ np.linalg.lstsq(both, s, rcond=None)[0]
        R = np.column_stack([z, c]).T @ np.column_stack([s, c])
        inverse = np.linalg.inv(R)[s.shape[1] :]  # rows of the controls
        weights = np.column_stack([z, c]) @ inverse.T  # (n, K)
        mean[h] = (weights.T @ y).T
        residual = y - s @ lp.estimate[j][:, h] - c @ mean[h].T
        influence[np.ix_(rows, np.array(h))] = weights[:, None, :] * residual[:, :, None]
    return mean, influence


def concentrate_shrunk(
    y: Float[ndarray, "n Q"],
    s: Float[ndarray, "n S"],
    z: Float[ndarray, "n M"] | None,
    c: Float[ndarray, "n K"],
    free: int,
    prior: Horseshoe,
) -> Concentrated:
    """As `concentrate`, of what a horseshoe keeps of the controls; K may exceed n.

    free: the first columns of c, which are not shrunk. The leverage counts the coefficients that
    are kept, evenly over the rows.
    """
    from hakari.inference.sampling import generator

    every = s if z is None else z
    both = np.column_stack([s, y]) if z is None else np.column_stack([s, z, y])
    chance = generator(prior.seed, "horseshoe")
    found = horseshoe_means(both, c, chance, prior.sweeps, prior.warmup, free)
    left = both - c @ found.coefficients
    left = left - left.mean(axis=0)
    S, M = s.shape[1], every.shape[1]
    s, every = left[:, :S], left[:, :M] if z is None else left[:, S : S + M]
    y = left[:, S if z is None else S + M :]
    first = every
    if M > S:
        first = every @ np.linalg.lstsq(every, s, rcond=None)[0]
    q, _ = np.linalg.qr(first)
    kept = (free + float(found.kept.mean())) / len(y)
    return Concentrated(y, s, first, every, np.minimum(kept + (q**2).sum(axis=1), 1.0))
