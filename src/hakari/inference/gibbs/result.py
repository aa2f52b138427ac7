"""Draws of a Gibbs posterior as a DataTree in ArviZ's schema."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.diagnostics import stuck_chains
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.samplers import Draws, Plan
from hakari.inference.gibbs.smc import SWEEPS
from hakari.inference.prior import prior_draws

PRIOR_DRAWS = 2000
MADE_BY = {"inference_library": "hakari", "python": platform.python_version()}


def to_datatree(
    plan: Plan, draws: Draws, generator: Generator, settings: dict[str, Any], interrupted: bool
) -> xr.DataTree:
    """Groups posterior (theta), sample_stats (lp, accepted; of nuts diverging and n_steps), checks,
    and prior where there is one.

    `attrs` hold what is needed to repeat the run, and of smc `log_normaliser`, that is
    log ∫ exp(−η loss) prior, over all runs; `checks` has each run's.
    """
    posterior, theta = plan.target.posterior, plan.target.theta(draws.u)
    axes, names = ("chain", "draw"), {"coefficient": list(posterior.parameters)}
    coords = {"chain": np.arange(theta.shape[0]), "draw": np.arange(theta.shape[1])}
    stats = {"lp": (axes, draws.log_density), "accepted": (axes, draws.accepted)}
    stats |= {name: (axes, values) for name, values in draws.stats.items()}
    tree = {
        "/posterior": xr.Dataset({"theta": ((*axes, "coefficient"), theta)}, coords | names),
        "/sample_stats": xr.Dataset(stats, coords),
        "/checks": _checks(plan, draws, theta),
    }
    if posterior.blocks:
        prior = _prior(posterior, generator)
        held = {"chain": [0], "draw": np.arange(len(prior))} | names
        tree["/prior"] = xr.Dataset({"theta": ((*axes, "coefficient"), prior[None])}, held)
    result = xr.DataTree.from_dict(tree)
    result.attrs = _attributes(plan, draws, settings, interrupted)
    return result


def _checks(plan: Plan, draws: Draws, theta: ndarray) -> xr.Dataset:
    notes = stuck_chains(theta)
    checks: dict[str, Any] = {
        "acceptance": ("chain", draws.accepted.mean(axis=1)),
        "stuck": len(notes),
    }
    if draws.runs:
        for name in ("log_normaliser", "rungs", "moves"):
            checks[name] = ("chain", [getattr(run, name) for run in draws.runs])
        notes += [
            f"chain {c}: at some rung particles still moved apart after "
            f"{SWEEPS * plan.target.d} moves; compare method='mh'"
            for c, run in enumerate(draws.runs)
            if not run.settled
        ]
    if "diverging" in draws.stats:
        diverging = draws.stats["diverging"].sum(axis=1)
        checks["divergences"] = ("chain", diverging)
        notes += [
            f"chain {c}: {count} of {theta.shape[1]} trajectories diverged: draws may miss where "
            "the posterior is narrow; compare method='mh'"
            for c, count in enumerate(diverging)
            if count
        ]
    return xr.Dataset(checks, attrs={"notes": "; ".join(notes)})


def _prior(posterior: GibbsPosterior, generator: Generator) -> ndarray:
    """Draws of the prior (N, d), NaN where it is flat."""
    noise = generator.standard_normal((PRIOR_DRAWS, len(posterior.parameters)))
    chi2 = [
        generator.chisquare(b.df, PRIOR_DRAWS) / b.df if np.isfinite(b.df) else np.ones(PRIOR_DRAWS)
        for b in posterior.blocks
    ]
    return prior_draws(posterior.blocks, noise, np.column_stack(chi2))


def _attributes(
    plan: Plan, draws: Draws, settings: dict[str, Any], interrupted: bool
) -> dict[str, Any]:
    posterior, (chains, count) = plan.target.posterior, draws.log_density.shape
    packages = ("hakari", "numpy", "numba", "scipy", "xarray", "arviz-stats")
    steps = draws.stats.get("n_steps", np.full((chains, count), plan.moves))
    evaluations, tempered = steps.sum(), {}
    if draws.runs:
        each = np.array([run.log_normaliser for run in draws.runs])
        tempered = {"log_normaliser": float(np.logaddexp.reduce(each) - np.log(len(each)))}
        evaluations = sum(len(run.cloud.u) * (1 + run.moves) for run in draws.runs)
    made = {
        "method": plan.method,
        "why": plan.why,
        "draws": count,
        "chains": chains,
        "interrupted": int(interrupted),
        "evaluations": int(evaluations),
        "iterations": int(chains * count),
        "learning_rate": posterior.learning_rate,
        "loss": posterior.risk.loss.name,
        "prior": repr(posterior.prior),
        "rows": posterior.risk.n,
        "versions": json.dumps({p: version(p) for p in packages}),
    }
    return settings | made | tempered | MADE_BY
