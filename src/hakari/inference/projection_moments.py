"""Local projections as `LinearMoments`, for every kernel of quasi-posteriors.

Concentrated, a response's S·H coefficients have as many moments; stacked, its S·H responses
and H times K control coefficients do, which is the paper's own system and only fits a table with
more rows than that. local-projections.md 'System'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hakari.inference.moments import LinearMoments
from hakari.inference.prior import Normal
from hakari.inference.projection_design import near

if TYPE_CHECKING:
    from hakari.inference.local_projections import LocalProjection
    from hakari.inference.projection_posterior import ProjectionPosterior


def concentrated_moments(lp: LocalProjection, response: str, covariance: str) -> LinearMoments:
    """Moments z̃_t(ỹ_{t+h} − β_h's̃_t) of one response; rows that no horizon uses are left out."""
    j = _place(lp, response)
    a, b = lp.moment_rows(j)
    used = np.flatnonzero((a != 0).any(axis=1) | (b != 0).any(axis=(1, 2)))
    used = np.arange(used[0], used[-1] + 1)  # serial correlation counts rows between
    S, q = b.shape[2], a.shape[1]
    H = q // S
    G = np.zeros((len(used), S, H, S, H))
    h = np.arange(H)
    G[:, :, h, :, h] = b[used].reshape(-1, S, H, S).transpose(2, 0, 1, 3)
    names = lp.names[j * q : (j + 1) * q]
    return LinearMoments.from_moments(
        G.reshape(len(used), q, q),
        a[used],
        names=names,
        moment_names=[f"g({name})" for name in names],
        covariance=covariance,
    )


def stacked_moments(lp: LocalProjection, response: str, covariance: str) -> LinearMoments:
    """Moments w_t(y_{t+h} − β_h's_t − γ_h'c_t) of one response, nothing concentrated out.

    Raises ValueError for samples that differ between horizons, more instruments than shocks,
    panels with effects, and tables with fewer rows than coefficients.
    """
    j = _place(lp, response)
    design, rows = lp.design, lp.parts[0].rows
    if len(lp.parts) > 1 or design.unit is not None:
        raise ValueError("stacked moments need sample='common' and no effects of units")
    if design.right.shape[1] != design.shocks.shape[1]:
        raise ValueError("stacked moments need as many instruments as shocks")
    x = np.column_stack([design.shocks[rows], design.controls[rows]])
    w = np.column_stack([design.right[rows], design.controls[rows]])
    H, L = lp.shape[2], x.shape[1]
    if len(rows) <= H * L:
        raise ValueError(
            f"the stacked system has {H * L} coefficients for {len(rows)} rows: its Ω is "
            "singular; use lp.posterior(), which concentrates the controls out"
        )
    G = np.zeros((len(rows), H, L, H, L))
    h = np.arange(H)
    G[:, h, :, h, :] = w[:, :, None] * x[:, None, :]
    y = design.outcomes[rows, j]
    g = y[:, :, None] * w[:, None, :]
    labels = [*lp.shocks, *design.control_names]
    names = [f"{response}.{label}.h{step}" for step in lp.question.horizons for label in labels]
    return LinearMoments.from_moments(
        G.reshape(len(rows), H * L, H * L),
        g.reshape(len(rows), H * L),
        names=names,
        moment_names=[f"g({name})" for name in names],
        covariance=covariance,
    )


def gaussian_prior(posterior: ProjectionPosterior, response: str) -> Normal:
    """A response's prior at its chosen smoothness as a `Normal`, to go with `concentrated_moments`.

    Raises ValueError where it is flat, improper or has a smoothness that is sampled.
    """
    j = _place(posterior.projection, response)
    form = posterior.paths[j].form
    if form is None or not form.proper or form.sampled:
        raise ValueError(
            f"the prior of {response} is flat, improper or has a sampled smoothness: give a "
            "number, 'gcv' or 'marginal' as its smoothness"
        )
    tau = np.exp(posterior.paths[j].chosen)
    precision = form.root.T @ form.root / tau**2 + form.fixed
    q = len(form.mean)
    cov = np.linalg.inv(precision)
    return Normal(form.mean, (cov + cov.T) / 2, list(posterior.names[j * q : (j + 1) * q]))


def _place(lp: LocalProjection, response: str) -> int:
    known = lp.question.response
    if response not in known:
        raise ValueError(
            f"no response {response!r}{near(response, known)} (responses: {', '.join(known)})"
        )
    return known.index(response)
