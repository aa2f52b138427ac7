"""Draws of local projections as a DataTree, and their impulse responses."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.bands import sup_t
from hakari.inference.diagnostics import stuck_chains
from hakari.inference.impulse_response import ImpulseResponse
from hakari.inference.projection_posterior import ProjectionPosterior
from hakari.inference.projection_sampling import PathDraws, slices

if TYPE_CHECKING:
    from hakari.inference.local_projections import LocalProjection

PRIOR_DRAWS = 1000


def to_datatree(
    posterior: ProjectionPosterior,
    method: str,
    chains: Sequence[PathDraws],
    generator: Generator,
    settings: dict[str, Any],
    interrupted: bool,
) -> xr.DataTree:
    """Groups posterior (theta, tau), sample_stats, checks, and prior where all are proper."""
    theta = powered(posterior, np.stack([c.theta for c in chains]))
    tau = np.exp(np.stack([c.log_tau for c in chains]))
    responses = list(posterior.projection.question.response)
    coords = {"chain": np.arange(len(theta)), "draw": np.arange(theta.shape[1])}
    axes = ("chain", "draw")
    group: dict[str, Any] = {"theta": ((*axes, "coefficient"), theta)}
    sampled = [p.name for p in posterior.paths if p.form is not None and p.form.sampled]
    if sampled:
        keep = [responses.index(name) for name in sampled]
        group["tau"] = ((*axes, "smoothed"), tau[:, :, keep])
        coords |= {"smoothed": np.array(sampled, dtype=object)}
    names = {"coefficient": list(posterior.names)}
    stats = {
        "lp": ((*axes, "response"), np.stack([c.log_density for c in chains])),
        "accepted": ((*axes, "response"), np.stack([c.accepted for c in chains])),
    }
    notes = stuck_chains(theta)
    acceptance = ("chain", np.stack([c.accepted for c in chains]).mean(axis=(1, 2)))
    tree = {
        "/posterior": xr.Dataset(group, coords | names),
        "/sample_stats": xr.Dataset(
            stats, {"chain": coords["chain"], "draw": coords["draw"], "response": responses}
        ),
        "/checks": xr.Dataset(
            {"acceptance": acceptance, "stuck": len(notes)}, attrs={"notes": "; ".join(notes)}
        ),
    }
    prior = prior_paths(posterior, generator)
    if prior is not None:
        tree["/prior"] = xr.Dataset(
            {"theta": ((*axes, "coefficient"), prior[None])},
            {"chain": [0], "draw": np.arange(len(prior))} | names,
        )
    result = xr.DataTree.from_dict(tree)
    result.attrs = _attributes(posterior, method, settings, theta, interrupted)
    return result


def powered(
    posterior: ProjectionPosterior, theta: Float[ndarray, "chains draws Q"]
) -> Float[ndarray, "chains draws Q"]:
    """Draws of the posterior to the power of the learning rates: about the mean, over √rate."""
    out = theta.copy()
    for j, part in enumerate(slices(posterior)):
        if posterior.rates[j] != 1.0:
            mean = posterior.paths[j].moments[0]
            out[..., part] = mean + (theta[..., part] - mean) / np.sqrt(posterior.rates[j])
    return out


def prior_paths(posterior: ProjectionPosterior, generator: Generator) -> ndarray | None:
    """Draws of the prior (N, Q), NaN for responses without a proper one; None where none has."""
    out = np.full((PRIOR_DRAWS, len(posterior.names)), np.nan)
    for j, part in enumerate(slices(posterior)):
        path = posterior.paths[j]
        form = path.form
        if form is None or not form.proper:
            continue
        log_tau = np.full(PRIOR_DRAWS, path.chosen if not form.sampled else 0.0)
        if form.smoothness == "half-cauchy":
            log_tau = np.log(form.scale * np.abs(generator.standard_cauchy(PRIOR_DRAWS)))
        elif form.smoothness == "gamma":
            log_tau = -0.5 * np.log(generator.gamma(form.shape, 1 / form.rate, PRIOR_DRAWS))
        rough = form.root.T @ form.root
        values, vectors = np.linalg.eigh(rough)
        rank = len(form.root)
        noise = generator.standard_normal((PRIOR_DRAWS, len(form.mean)))
        if rank < len(form.mean):  # structure and fixed act on spaces at right angles
            held, axes = np.linalg.eigh(form.fixed)
            own = held > 1e-10 * held[-1]
            out[:, part] = form.mean + (noise[:, : own.sum()] / np.sqrt(held[own])) @ axes[:, own].T
        else:
            out[:, part] = form.mean
        free = values[len(values) - rank :]
        bend = noise[:, len(values) - rank :] / np.sqrt(free) if rank else noise[:, :0]
        out[:, part] += np.exp(log_tau)[:, None] * (bend @ vectors[:, len(values) - rank :].T)
    return None if np.isnan(out).all() else out


def impulse_response(
    lp: LocalProjection, result: xr.DataTree, scale: float | Literal["sd"], level: float
) -> ImpulseResponse:
    """See `LocalProjection.impulse_response`; raises ValueError for draws of something else."""
    found = tuple(str(n) for n in result["posterior"].dataset["coefficient"].values)
    if found != lp.names:
        raise ValueError(
            f"the result has coefficients {', '.join(found[:3])}, ..., this projection "
            f"{', '.join(lp.names[:3])}, ...: pass a result of its own posterior"
        )
    factor = _factor(lp, scale)
    theta = result["posterior"].dataset["theta"].transpose("chain", "draw", "coefficient").values
    stats = result["sample_stats"].dataset
    flat_sd = np.array(json.loads(result.attrs["flat_sd"])).reshape(lp.shape)
    known = flat_sd == 0  # a control's response at once is 0, a shock's own is 1
    draws = np.where(known, lp.estimate, theta.reshape(-1, *lp.shape))
    prior = None
    if "prior" in result.children:
        prior = result["prior"].dataset["theta"].values.reshape(-1, *lp.shape) * factor
    density = stats["lp"].values.reshape(len(draws), -1) if lp.shape[1] == 1 else None
    rates = np.array(json.loads(result.attrs["rates"]))[:, None, None]
    spread = draws.std(axis=0, ddof=1) * np.sqrt(rates)  # the rate's widening is not the prior's
    smoothed = np.isin(lp.question.response, json.loads(result.attrs["smoothed"]))[:, None, None]
    narrowed = np.where(known | ~smoothed, np.nan, 1 - spread / np.where(known, 1, flat_sd))
    q, notes = lp.question, _contradicted(lp, draws) if len(draws) >= 40 else []
    return ImpulseResponse(
        draws * factor,
        q.response,
        lp.shocks,
        q.horizons,
        estimate=lp.estimate * factor,
        log_density=density,
        prior_draws=prior,
        narrowed=narrowed if smoothed.any() else None,
        title="cumulative" if q.cumulative else "",
        cumulated=q.cumulative,
        coupled=bool(result.attrs["coupled"]),
        anderson_rubin=_sets(lp, str(result.attrs["covariance"]), factor, level),
        notes=(*json.loads(result.attrs["notes"]), *(notes if smoothed.any() else ())),
    )


def _sets(
    lp: LocalProjection, covariance: str, factor: Float[ndarray, "S 1"], level: float
) -> pd.DataFrame | None:
    """Anderson-Rubin sets in the responses' scale, where there are instruments and one shock."""
    if not lp.question.instruments or lp.shape[1] > 1:
        return None
    sets = lp.anderson_rubin(level, covariance)
    ends = np.sort(sets[["lower", "upper"]].to_numpy(dtype=float) * factor[0], axis=1)
    return sets.assign(lower=ends[:, 0], upper=ends[:, 1])


def _coupled(posterior: ProjectionPosterior, method: str) -> bool:
    """Whether draws of different responses carry the joint noise of the system."""
    flat = all(path.form is None for path in posterior.paths)
    joint = method in ("concentrated", "gibbs") or (method == "da-approx" and flat)
    return posterior.weighting == "frozen" and joint


def _contradicted(lp: LocalProjection, draws: Float[ndarray, "N J S H"]) -> list[str]:
    """A sentence a response whose estimates leave the posterior's joint band at many horizons."""
    out, H = [], lp.shape[2]
    for j, name in enumerate(lp.question.response):
        for s in range(lp.shape[1]):
            found = sup_t(draws[:, j, s], 0.9)
            estimate, slack = lp.estimate[j, s], 1e-9 * np.abs(lp.estimate[j, s]).max()
            gone = (estimate < found.lower - slack) | (estimate > found.upper + slack)
            if gone.sum() > H / 5:
                out.append(
                    f"{name}: estimates lie outside the posterior's 90% joint band at "
                    f"{gone.sum()} of {H} horizons: the prior may not fit its path; compare flat"
                )
    return out


def _factor(lp: LocalProjection, scale: float | Literal["sd"]) -> Float[ndarray, "S 1"]:
    if isinstance(scale, str):
        if scale != "sd":
            raise ValueError(f"scale {scale!r}: a number in units of the shock, or 'sd'")
        part = lp.parts[0].fit
        return np.asarray(np.sqrt((part.s**2).mean(axis=0))[:, None])
    if not np.isfinite(scale) or scale == 0:
        raise ValueError(f"scale {scale!r}: a number in units of the shock, or 'sd'")
    return np.full((lp.shape[1], 1), float(scale))


def _attributes(
    posterior: ProjectionPosterior,
    method: str,
    settings: dict[str, Any],
    theta: ndarray,
    interrupted: bool,
) -> dict[str, Any]:
    lp = posterior.projection
    sd = np.sqrt(np.diag(posterior.joint_covariance))
    packages = ("hakari", "numpy", "numba", "scipy", "xarray", "arviz-stats")
    return settings | {
        "method": method,
        "interrupted": int(interrupted),
        "iterations": int(theta.shape[0] * theta.shape[1]),
        "covariance": str(posterior.covariance),
        "weighting": posterior.weighting,
        "determinant": int(posterior.determinant),
        "shrinkage": posterior.shrinkage,
        "prior": repr(posterior.prior),
        "priors": json.dumps([p.form.label if p.form else "flat" for p in posterior.paths]),
        "smoothed": json.dumps([p.name for p in posterior.paths if p.form is not None]),
        "flat_sd": json.dumps(sd.tolist()),
        "coupled": int(_coupled(posterior, method)),
        "rates": json.dumps(list(posterior.rates)),
        "rows": int(max(lp.rows_used)),
        "notes": json.dumps(list(posterior.notes)),
        "inference_library": "hakari",
        "versions": json.dumps({p: version(p) for p in packages}),
        "python": platform.python_version(),
    }
