"""An instrumental-variables question answered: the posterior and what stands beside it.

`analyse` goes from a table to everything that the report, the terminal and `--json` show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import xarray as xr
from threadpoolctl import threadpool_limits

from hakari.inference.anderson_rubin import AndersonRubin, anderson_rubin
from hakari.inference.comparison import PointEstimate, linearmodels_estimates, point_estimates
from hakari.inference.diagnostics import (
    MultivariateESS,
    convergence_notes,
    multivariate_ess,
    summary,
)
from hakari.inference.instruments import FirstStage, first_stage
from hakari.inference.moments import LinearMoments
from hakari.inference.posterior import QuasiPosterior, Weighting
from hakari.inference.prior_text import parse_prior
from hakari.inference.sampling import METHODS, Method, sample
from hakari.inference.sensitivity import INTERRUPTED, ScaledPrior, prior_sensitivity
from hakari.inference.tables import Missing


@dataclass(frozen=True)
class Question:
    """What is asked of which data, as typed; `data` may also be a frame in memory, with a name."""

    formula: str
    data: Any
    prior: tuple[str, ...] = ()
    covariance: str = "robust"
    centred: bool = False
    weights: str | None = None
    missing: str = "raise"
    weighting: str = "continuous"
    determinant: bool = True
    method: str = "auto"
    draws: int = 2000
    chains: int = 4
    seed: int = 1
    level: float = 0.9
    data_name: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level {self.level:g} must lie between 0 and 1, such as 0.9")
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown: use one of {', '.join(METHODS)}")
        for name in ("draws", "chains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: a whole number of at least 0 is needed")


@dataclass(frozen=True)
class Analysis:
    """The answer; `estimates` are ours and linearmodels', `sensitivity` over the prior's scale."""

    question: Question
    moments: LinearMoments
    posterior: QuasiPosterior
    result: xr.DataTree
    summary: pd.DataFrame
    ess: MultivariateESS
    notes: list[str]
    stages: FirstStage
    anderson_rubin: AndersonRubin
    estimates: list[PointEstimate]
    sensitivity: list[ScaledPrior]

    @property
    def of_interest(self) -> list[str]:
        """Coefficients to show first: the endogenous, or all but the intercept."""
        names = self.moments.names
        rest = [name for name in names.parameters if name != "Intercept"]
        return list(names.endogenous) or rest or list(names.parameters)

    @property
    def interrupted(self) -> bool:
        """Whether sampling, or the sensitivity after it, was stopped by hand."""
        cut = any(one.refused == INTERRUPTED for one in self.sensitivity)
        return bool(self.result.attrs["interrupted"]) or cut


def analyse(
    question: Question,
    *,
    progress: bool = False,
    resume: xr.DataTree | None = None,
    keep: Callable[[xr.DataTree], None] | None = None,
) -> Analysis:
    """Answer a question: moments, instruments, estimates, draws, sensitivity to the prior.

    progress: a bar on the error stream; resume: an earlier result, whose draws are continued;
    keep: called with the draws as soon as they are there, before what may take longer.
    Raises ValueError or FileNotFoundError for bad input, before any draw.

    >>> import numpy as np
    >>> rng = np.random.default_rng(1)
    >>> table = {"z": rng.standard_normal(300), "e": rng.standard_normal(300)}
    >>> table["x"] = table["z"] + table["e"]
    >>> table["y"] = 2 * table["x"] + table["e"]
    >>> answer = analyse(Question("y ~ 1 + [x ~ z]", table, draws=200))
    >>> round(float(answer.summary.loc["x", "mean"]))
    2
    """
    with threadpool_limits(1, user_api="blas"):  # small matrices: BLAS threads only wait
        return _analyse(question, progress, resume, keep)


def _analyse(
    question: Question,
    progress: bool,
    resume: xr.DataTree | None,
    keep: Callable[[xr.DataTree], None] | None,
) -> Analysis:
    missing = cast(Missing, question.missing)
    moments = LinearMoments.from_formula(
        question.formula,
        question.data,
        question.covariance,
        centred=question.centred,
        weights=question.weights,
        missing=missing,
    )
    prior = parse_prior(question.prior, moments)
    posterior = QuasiPosterior(
        moments, prior, cast(Weighting, question.weighting), question.determinant
    )
    stages = first_stage(
        question.formula,
        question.data,
        moments.covariance,
        weights=question.weights,
        missing=missing,
    )
    result = sample(
        posterior,
        cast(Method, question.method),
        question.draws,
        question.chains,
        question.seed,
        progress=progress,
        resume=resume,
    )
    if keep is not None:
        keep(result)
    stopped = bool(result.attrs["interrupted"])
    return Analysis(
        question,
        moments,
        posterior,
        result,
        summary(result, question.level),
        multivariate_ess(result),
        convergence_notes(result),
        stages,
        anderson_rubin(moments, question.level),
        _estimates(question, moments),
        [] if stopped else prior_sensitivity(posterior, result, question.level, question.method),
    )


def _estimates(question: Question, moments: LinearMoments) -> list[PointEstimate]:
    found: Sequence[PointEstimate] = linearmodels_estimates(
        question.formula,
        question.data,
        moments,
        weights=question.weights,
        missing=cast(Missing, question.missing),
    )
    return [*point_estimates(moments), *found]
