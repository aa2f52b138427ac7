"""A sampler's result: draws on their way to a DataTree in ArviZ's schema, and back to go on.

Groups: posterior (theta), sample_stats (lp, acceptance by stage), prior where it is proper,
checks (what speaks against the chains), and position (where each chain stands, so that
`sample(..., resume=result)` continues as if it had not stopped).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy import ndarray
from numpy.random import SeedSequence, default_rng

from hakari.inference.diagnostics import pareto_k, stuck_chains
from hakari.inference.kernels.independence import Reference
from hakari.inference.posterior import QuasiPosterior
from hakari.inference.prior import prior_draws

PRIOR_STREAM = 2**31  # far from the chains' spawn keys, which count up from 0

if TYPE_CHECKING:
    from hakari.inference.reference import Fit
    from hakari.inference.sampling import Group


@dataclass(frozen=True)
class Plan:
    """The kernel that runs, why, and the fitted reference where it uses one."""

    method: str
    why: str
    fit: Fit | None

    @property
    def reference(self) -> Reference:
        """The fitted reference; raises ValueError where the kernel has none."""
        if self.fit is None:
            raise ValueError(f"kernel {self.method} has no reference")
        return self.fit.reference


@dataclass(frozen=True)
class Draws:
    """u (C, N, K), log density (C, N), outcome (C, N), log importance weight (C, N) or None."""

    u: ndarray
    log_density: ndarray
    outcome: ndarray
    log_weight: ndarray | None = None

    @staticmethod
    def join(rounds: list[list[Draws]]) -> Draws:
        """Rounds one after the other, groups of chains side by side."""
        whole = [_stack(groups, axis=0) for groups in rounds]
        return _stack(whole, axis=1)

    def followed_by(self, later: Draws) -> Draws:
        """These draws and then those."""
        return _stack([self, later], axis=1)


def _stack(parts: Sequence[Draws], axis: int) -> Draws:
    weights = [p.log_weight for p in parts]
    return Draws(
        np.concatenate([p.u for p in parts], axis),
        np.concatenate([p.log_density for p in parts], axis),
        np.concatenate([p.outcome for p in parts], axis),
        None if any(w is None for w in weights) else np.concatenate(weights, axis),  # type: ignore[arg-type]
    )


def to_datatree(
    posterior: QuasiPosterior,
    plan: Plan,
    groups: list[Group],
    draws: Draws,
    settings: dict[str, Any],
    interrupted: bool,
) -> xr.DataTree:
    """The DataTree of a run; its `attrs` hold what is needed to repeat it."""
    white, names = posterior.whitened, list(posterior.moments.names.parameters)
    theta = white.theta(draws.u)
    notes = stuck_chains(theta)
    stats: dict[str, Any] = {
        "lp": (("chain", "draw"), draws.log_density + white.constant),
        "accepted": (("chain", "draw"), draws.outcome == 2),
        "screened": (("chain", "draw"), draws.outcome == 0),
        "singular": (("chain", "draw"), draws.outcome == 3),
    }
    if draws.log_weight is not None:
        stats["log_weight"] = (("chain", "draw"), draws.log_weight)
    coords = {"coefficient": names}
    tree = {
        "posterior": xr.Dataset({"theta": (("chain", "draw", "coefficient"), theta)}, coords),
        "sample_stats": xr.Dataset(stats),
        "checks": _checks(draws, notes, plan),
        "position": _position(plan, groups),
    }
    if posterior.blocks:
        tree["prior"] = _prior(posterior, settings["seed"])
    for group in ("posterior", "sample_stats"):
        tree[group] = tree[group].assign_coords(
            chain=np.arange(theta.shape[0]), draw=np.arange(theta.shape[1])
        )
    result = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in tree.items()})
    result.attrs = _attributes(posterior, plan, draws, settings, interrupted)
    return result


def _checks(draws: Draws, notes: list[str], plan: Plan) -> xr.Dataset:
    second = (draws.outcome != 0).mean(axis=1)
    checks: dict[str, Any] = {
        "acceptance": ("chain", (draws.outcome == 2).mean(axis=1)),
        "first_stage": ("chain", second),
        "singular_proposals": ("chain", (draws.outcome == 3).sum(axis=1)),
        "stuck": len(notes),
    }
    if plan.fit is not None:
        checks["pilot_k_hat"] = plan.fit.k_hat
    if draws.log_weight is not None:
        checks["k_hat"] = _k_hat(draws.log_weight)
    return xr.Dataset(checks, attrs={"notes": "; ".join(notes)})


def _k_hat(log_weight: ndarray) -> float:
    """Pareto shape of a run's importance weights; NaN for a handful of draws."""
    finite = log_weight[np.isfinite(log_weight)]
    if len(finite) < 50 or np.ptp(finite) == 0:
        return np.nan
    return pareto_k(finite)


def _position(plan: Plan, groups: list[Group]) -> xr.Dataset:
    streams = [
        json.dumps({k: g.bit_generator.state for k, g in s.items()})
        for group in groups
        for s in group.streams
    ]
    data: dict[str, Any] = {
        "point": (("chain", "coordinate"), np.concatenate([g.point for g in groups])),
        "tuning": (("group", "row", "column"), np.stack([g.tuning for g in groups])),
        "scale": (("group", "walk_row", "walk_column"), np.stack([g.scale for g in groups])),
        "streams": ("chain", np.array(streams, dtype=object)),
    }
    if plan.fit is not None:
        data["reference_mean"] = ("k", plan.fit.reference.mean)
        data["reference_factor"] = (("k", "k2"), plan.fit.reference.factor)
        data["reference"] = (
            "fit",
            [
                plan.fit.reference.df,
                plan.fit.reference.share,
                plan.fit.k_hat,
                plan.fit.acceptance,
                plan.fit.efficiency,
            ],
        )
    return xr.Dataset(data)


def read_positions(
    result: xr.DataTree, posterior: QuasiPosterior
) -> tuple[Plan, list[Group], Draws, int]:
    """Undo `_position`; raises ValueError if the result is of another posterior."""
    from hakari.inference.reference import Fit
    from hakari.inference.sampling import Group

    theirs, ours = result.attrs.get("posterior"), fingerprint(posterior)
    if theirs != ours:
        raise ValueError(
            f"the result to resume is of another posterior ({theirs}; this one is {ours}): "
            "sample this one anew"
        )
    held = result["position"].dataset.load()
    fit = None
    if "reference" in held:
        df, share, k_hat, acceptance, efficiency = map(float, held["reference"].values)
        reference = Reference(
            held["reference_mean"].values, held["reference_factor"].values, df, share
        )
        fit = Fit(reference, k_hat, acceptance, efficiency, 0)
    plan = Plan(str(result.attrs["method"]), str(result.attrs["why"]), fit)
    streams = [_generators(str(text)) for text in held["streams"].values]
    together = plan.method == "preconditioned"
    members = [range(len(streams))] if together else [range(c, c + 1) for c in range(len(streams))]
    groups = [
        Group(
            held["point"].values[list(chains)],
            held["tuning"].values[index],
            held["scale"].values[index],
            tuple(streams[c] for c in chains),
        )
        for index, chains in enumerate(members)
    ]
    return plan, groups, _drawn(result, posterior), int(result.attrs["seed"])


def _generators(text: str) -> dict[str, Any]:
    generators = {}
    for name, state in json.loads(text).items():
        generators[name] = default_rng(0)
        generators[name].bit_generator.state = state
    return generators


def _drawn(result: xr.DataTree, posterior: QuasiPosterior) -> Draws:
    stats, white = result["sample_stats"].dataset, posterior.whitened
    outcome = np.ones(stats["lp"].shape, dtype=np.int8)
    for code, name in ((2, "accepted"), (0, "screened"), (3, "singular")):
        outcome[stats[name].values.astype(bool)] = code
    weight = stats["log_weight"].values if "log_weight" in stats else None
    u = white.u(result["posterior"].dataset["theta"].values)
    return Draws(u, stats["lp"].values - white.constant, outcome, weight)


def _prior(posterior: QuasiPosterior, seed: int) -> xr.Dataset:
    generator = default_rng(SeedSequence(seed, spawn_key=(PRIOR_STREAM,)))
    names, blocks, size = posterior.moments.names.parameters, posterior.blocks, 2000
    noise = generator.standard_normal((size, len(names)))
    chi2 = np.column_stack(
        [
            generator.chisquare(b.df, size) / b.df if np.isfinite(b.df) else np.ones(size)
            for b in blocks
        ]
    )
    theta = prior_draws(blocks, noise, chi2)
    return xr.Dataset(
        {"theta": (("chain", "draw", "coefficient"), theta[None])},
        {"chain": [0], "draw": np.arange(size), "coefficient": list(names)},
    )


def fingerprint(posterior: QuasiPosterior) -> str:
    """Short text that differs between posteriors: data, covariance, prior and form."""
    import hashlib

    moments = posterior.moments
    form = f"{posterior.weighting}, {'with' if posterior.determinant else 'no'} determinant"
    text = f"{moments.digest}|{moments.names}|{moments.covariance}|{posterior.prior!r}|{form}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _attributes(
    posterior: QuasiPosterior,
    plan: Plan,
    draws: Draws,
    settings: dict[str, Any],
    interrupted: bool,
) -> dict[str, Any]:
    moments = posterior.moments
    packages = ("hakari", "numpy", "numba", "scipy", "xarray", "arviz-stats")
    return settings | {
        "method": plan.method,
        "why": plan.why,
        "interrupted": int(interrupted),
        "evaluations": int((draws.outcome != 0).sum()),
        "iterations": int(draws.outcome.size),
        "covariance": str(moments.covariance),
        "weighting": posterior.weighting,
        "determinant": int(posterior.determinant),
        "prior": repr(posterior.prior),
        "rows": moments.n,
        "data_digest": moments.digest,
        "posterior": fingerprint(posterior),
        "inference_library": "hakari",
        "versions": json.dumps({p: version(p) for p in packages}),
        "python": platform.python_version(),
    }


def save(result: xr.DataTree, path: Any) -> None:
    """Write a result to a netCDF file; raises FileExistsError rather than overwrite."""
    from pathlib import Path

    if Path(path).exists():
        raise FileExistsError(f"{path} exists: give another name, or remove it first")
    result.to_netcdf(path, engine="h5netcdf")


def load(path: Any) -> xr.DataTree:
    """Read a result that `save` wrote, whole, so that the file can be closed."""
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()
