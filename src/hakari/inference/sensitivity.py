"""How much the answer hangs on the prior: the same posterior under priors of other scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.diagnostics import convergence_notes, draws_of
from hakari.inference.posterior import QuasiPosterior
from hakari.inference.prior import Flat, Prior
from hakari.inference.prior_text import describe_prior, scaled_prior
from hakari.inference.sampling import Method, sample
from hakari.inference.weak_prior import weak_prior

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class ScaledPrior:
    """The posterior's means and intervals (K,) under a prior `factor` times as wide (inf: flat).

    NaN with the reason in `refused` where that posterior is improper, or sampling it was
    stopped; `notes` are what speaks against its chains; `asked` marks the question's prior.
    """

    factor: float
    prior: str
    mean: Float[ndarray, " K"]
    lower: Float[ndarray, " K"]
    upper: Float[ndarray, " K"]
    method: str
    asked: bool = False
    refused: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def without(self) -> str:
        """Why there are no numbers, in few words; empty where there are."""
        if self.refused is None:
            return ""
        return INTERRUPTED if self.refused == INTERRUPTED else "refused: improper posterior"

    @property
    def label(self) -> str:
        """The prior's scale in words."""
        if np.isinf(self.factor):
            return "flat"
        words = {0.25: "¼", 0.5: "½", 1.0: "1"}
        return f"{words.get(self.factor, f'{self.factor:g}')} ×"


def prior_sensitivity(
    posterior: QuasiPosterior,
    result: xr.DataTree,
    level: float = 0.9,
    method: str = "auto",
    factors: Sequence[float] = FACTORS,
) -> list[ScaledPrior]:
    """Posteriors under the prior's standard deviations times each factor, and under a flat one.

    result: the draws of `posterior`, used where the factor is 1 and for draws, chains, seed.
    A flat prior has no scale: then the weak prior's is varied; without endogenous variables
    there is nothing to vary, and the list is empty.
    """
    base: Prior | Sequence[Prior] = posterior.prior
    flat = not posterior.blocks
    if flat:
        if posterior.moments.grams is None:
            return []
        base = weak_prior(posterior.moments)
        if isinstance(base, Flat):
            return []
    settings: dict[str, Any] = {
        "method": cast(Method, method),
        "draws": result["posterior"].sizes["draw"],
        "chains": result["posterior"].sizes["chain"],
        "seed": int(result.attrs["seed"]),
    }
    found = []
    for factor in (*factors, np.inf):
        asked = np.isinf(factor) if flat else factor == 1
        prior = Flat() if np.isinf(factor) else scaled_prior(base, factor)
        this = replace(posterior, prior=prior)
        found.append(_drawn(this, factor, settings, level, result if asked else None))
        if found[-1].refused == INTERRUPTED:
            break
    return found


def _drawn(
    posterior: QuasiPosterior,
    factor: float,
    settings: dict[str, Any],
    level: float,
    known: xr.DataTree | None,
) -> ScaledPrior:
    prior, refused = describe_prior(posterior.prior), ""
    try:
        result = sample(posterior, **settings) if known is None else known
    except ValueError as error:
        refused = str(error)
    except KeyboardInterrupt:
        refused = INTERRUPTED
    if not refused and result is not known and result.attrs["interrupted"]:
        refused = INTERRUPTED
    if refused:
        nothing = np.full(posterior.moments.K, np.nan)
        return ScaledPrior(factor, prior, nothing, nothing, nothing, "", refused=refused)
    theta = draws_of(result)
    tails = (1 - level) / 2
    lower, upper = np.quantile(theta, [tails, 1 - tails], axis=(0, 1))
    return ScaledPrior(
        factor,
        prior,
        theta.mean(axis=(0, 1)),
        lower,
        upper,
        str(result.attrs["method"]),
        known is not None,
        notes=tuple(convergence_notes(result)),
    )
