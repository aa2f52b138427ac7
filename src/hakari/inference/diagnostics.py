"""Diagnostics that ArviZ lacks, and a guard before those it has.

Multivariate effective sample size: Vats, Flegal and Jones (2019), with replicated batch
means over chains (Gupta and Vats, 2020). Stuck chains are found before ArviZ is asked: it
gives four chains of equal draws an effective sample size of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import exp, lgamma, log, pi
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from numpy import ndarray
from scipy.special import digamma
from scipy.stats import chi2

LEAST_ACCEPTANCE = 0.01
LEAST_DISTINCT = 20


@dataclass(frozen=True)
class MultivariateESS:
    """`value` of total draws, NaN with the reason in `note`; `needed` for `precision`."""

    value: float
    needed: float
    precision: float
    note: str = ""

    @property
    def enough(self) -> bool:
        """Whether the confidence region of the means is within the precision."""
        return bool(self.value >= self.needed)


def stuck_chains(theta: Float[ndarray, "chains draws K"]) -> list[str]:
    """One sentence a chain that does not move enough to be judged; empty when all do."""
    notes = []
    for chain, draws in enumerate(theta):
        moved = (np.diff(draws, axis=0) != 0).any(axis=1)
        acceptance = moved.mean() if len(moved) else 0.0
        distinct = int(moved.sum()) + 1
        if acceptance < LEAST_ACCEPTANCE or distinct < LEAST_DISTINCT:
            notes.append(
                f"chain {chain} is stuck: {distinct} distinct draws of {len(draws)} "
                f"({100 * acceptance:.1f} % of moves accepted)"
            )
    return notes


def multivariate_ess(
    result: xr.DataTree | Float[ndarray, "chains draws K"],
    precision: float = 0.05,
    level: float = 0.95,
) -> MultivariateESS:
    """MESS = N (|Λ| / |Σ|)^(1/K), Λ the sample covariance, Σ by batch means of size ⌊√draws⌋.

    The mean of log|Σ| over samples of few batches is corrected (Wishart), and chains whose batches
    are short against their autocorrelation get a note and no number.

    `needed` is the least mESS for which the volume of the means' `level` confidence region,
    to the power 1/K, is `precision` of the posterior's (Vats, Flegal and Jones, 2019, eq. 9).
    """
    theta = draws_of(result) if isinstance(result, xr.DataTree) else np.asarray(result, float)
    chains, draws, K = theta.shape
    needed = minimum_ess(K, precision, level)

    def without(note: str) -> MultivariateESS:
        return MultivariateESS(np.nan, needed, precision, note)

    notes = stuck_chains(theta)
    if notes:
        return without("; ".join(notes))
    size = int(np.sqrt(draws))
    batches = draws // size
    if chains * batches <= K + 1:
        return without(f"{chains * batches} batches are too few for {K} parameters: draw more")
    kept = theta[:, draws - size * batches :]
    means = kept.reshape(chains * batches, size, K).mean(axis=1)
    spread = np.atleast_2d(np.cov(theta.reshape(-1, K).T))
    long_run = size * np.atleast_2d(np.cov(means.T))
    unit = np.sqrt(np.diag(spread))
    if not (unit > 0).all():
        return without("a parameter does not vary")
    signs, logs = np.linalg.slogdet(np.stack([spread, long_run]) / np.multiply.outer(unit, unit))
    if (signs <= 0).any():
        return without("the batch means' covariance is singular: draw more")
    time = chains * draws / np.nanmin(_arviz(theta)["ess_mean"])  # integrated autocorrelation
    if size < 2 * time:
        return without(
            f"batches of {size} draws are short against an autocorrelation time of {time:.0f}: "
            f"draw at least {int(4 * time**2):,} a chain"
        )
    free = chains * batches - 1  # log|Wishart| is low on average: take the expectation away
    low = digamma((free - np.arange(K)) / 2).sum() + K * np.log(2 / free)
    value = chains * draws * np.exp((logs[0] - logs[1] + low) / K)
    return MultivariateESS(float(value), needed, precision)


def minimum_ess(K: int, precision: float = 0.05, level: float = 0.95) -> float:
    """Least mESS for K means: 2^(2/K) π / (K Γ(K/2))^(2/K) · χ²_K(level) / precision²."""
    constant = exp((2 / K) * (log(2 / K) - lgamma(K / 2)))
    return float(constant * pi * chi2.ppf(level, K) / precision**2)


def pareto_k(log_weight: ndarray) -> float:
    """Pareto shape of the weights' upper tail; under 0.7 their averages can be trusted."""
    from arviz_stats.base import array_stats

    _, k_hat = array_stats.psislw(-log_weight)
    return float(np.asarray(k_hat))


def summary(result: xr.DataTree, level: float = 0.9) -> pd.DataFrame:
    """Mean, sd, median, equal-tailed interval; ArviZ's ESS, MCSE and R-hat; a row a coefficient.

    ESS, MCSE and R-hat are NaN when a chain is stuck; `attrs["notes"]` says why.
    """
    theta = draws_of(result)
    tails = (1 - level) / 2
    quantiles = np.quantile(theta, [0.5, tails, 1 - tails], axis=(0, 1))
    table: dict[str, Any] = {
        "mean": theta.mean(axis=(0, 1)),
        "sd": theta.std(axis=(0, 1), ddof=1),
        "median": quantiles[0],
        f"lower {100 * level:g}%": quantiles[1],
        f"upper {100 * level:g}%": quantiles[2],
    }
    names = result["posterior"]["coefficient"].values
    notes = stuck_chains(theta)
    found = dict.fromkeys(_ARVIZ, np.nan) if notes else _arviz(theta)
    table |= {column: found[column] for column in _ARVIZ}
    frame = pd.DataFrame(table, index=pd.Index(names, name="coefficient"))
    if result.attrs.get("interrupted"):
        notes.append("sampling was interrupted: these are the draws until then")
    frame.attrs["notes"] = notes
    return frame


def convergence_notes(result: xr.DataTree) -> list[str]:
    """What speaks against trusting the draws; empty when R-hat, ESS and movement are sound."""
    frame = summary(result)
    notes = list(frame.attrs["notes"])
    moves = frame["sd"] > 1e-12 * frame["mean"].abs()
    frame = frame[moves]  # what is known without error does not move
    if frame["r_hat"].isna().any():
        return notes or ["R-hat could not be computed"]
    if frame["r_hat"].max() > 1.01:
        worst = frame["r_hat"].idxmax()
        notes.append(f"R-hat of {worst} is {frame['r_hat'].max():.3f}, over 1.01: draw more")
    k_hat = float(result["checks"].dataset.get("k_hat", np.nan))
    if k_hat > 0.7:
        notes.append(
            f"Pareto k-hat of the proposals is {k_hat:.2f}, over 0.7: the tails may be "
            "undersampled; try method='preconditioned' or 'da'"
        )
    missing = result.attrs.get("moments_missing", "")
    if missing:
        notes.append(
            f"under this prior {missing}: read median and intervals, or give a proper prior"
        )
    low = frame[["ess_bulk", "ess_tail"]].min(axis=1)
    if low.min() < 400:
        notes.append(f"the effective sample size of {low.idxmin()} is {low.min():.0f}, under 400")
    return notes


_ARVIZ = ("ess_bulk", "ess_tail", "mcse_mean", "r_hat")


def _arviz(theta: Float[ndarray, "chains draws K"]) -> dict[str, ndarray]:
    from arviz_stats.base import array_stats

    axes = {"chain_axis": 0, "draw_axis": 1}
    found = {
        "ess_mean": partial(array_stats.ess, method="mean"),
        "ess_bulk": partial(array_stats.ess, method="bulk"),
        "ess_tail": partial(array_stats.ess, method="tail", prob=(0.05, 0.95)),
        "mcse_mean": partial(array_stats.mcse, method="mean"),
        "r_hat": partial(array_stats.rhat, method="rank"),
    }
    columns = [np.ascontiguousarray(theta[:, :, k]) for k in range(theta.shape[2])]
    moves = [np.ptp(c) > 0 for c in columns]  # what is known without error has no statistics
    return {
        name: np.array(
            [float(f(c, **axes)) if m else np.nan for c, m in zip(columns, moves, strict=True)]
        )
        for name, f in found.items()
    }


def draws_of(result: xr.DataTree) -> Float[ndarray, "chains draws K"]:
    """The posterior's draws of θ as an array."""
    values: ndarray = result["posterior"]["theta"].transpose("chain", "draw", "coefficient").values
    return values
