"""A question on a loss answered: its calibrated Gibbs posterior and what stands beside it.

`find` goes from a table to everything that the report, the terminal and `--json` show; losses are
read as a person types them: `quantile:0.9`, `huber`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.diagnostics import convergence_notes, draws_of, summary
from hakari.inference.gibbs import losses
from hakari.inference.gibbs.bootstrap import SCHEMES
from hakari.inference.gibbs.calibration import METHODS, Calibration, calibrate
from hakari.inference.gibbs.losses import LinearLoss
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.regions import REGIONS
from hakari.inference.gibbs.rival_intervals import Rival, sandwich_rival
from hakari.inference.prior import Prior
from hakari.inference.prior_text import parse_prior
from hakari.inference.sampling import sample

LOSSES: dict[str, tuple[Callable[..., LinearLoss], str]] = {
    "squared": (losses.squared, ""),
    "quantile": (losses.quantile, "TAU"),
    "expectile": (losses.expectile, "TAU"),
    "huber": (losses.huber, "DELTA"),
    "logistic": (losses.logistic, ""),
    "poisson": (losses.poisson, ""),
    "hinge": (losses.hinge, ""),
}


@dataclass(frozen=True)
class Study:
    """What is asked of which data, as typed; `data` may also be a frame in memory, with a name.

    rate: the learning rate that the calibrated one is compared with. coefficients: those that
    `marginal` regions are of; all when empty. block, m: None for the scheme's own. cache: a folder,
    as of `calibrate`.
    """

    formula: str
    data: Any
    loss: str
    prior: tuple[str, ...] = ()
    rate: float = 1.0
    weights: str | None = None
    missing: str = "raise"
    region: str = "marginal"
    coefficients: tuple[str, ...] = ()
    bootstrap: str = "multinomial"
    clusters: str | None = None
    block: int | None = None
    m: int | None = None
    replicates: int = 500
    method: str = "auto"
    draws: int = 2000
    chains: int = 4
    seed: int = 1
    level: float = 0.95
    data_name: str = ""
    cache: str | None = None

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        if not 0 < self.level < 1:
            raise ValueError(f"level {self.level:g} must lie between 0 and 1, such as 0.95")
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"rate {self.rate:g}: a learning rate above 0 is needed")
        for name, known in (("region", REGIONS), ("bootstrap", SCHEMES), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown: use one of {', '.join(known)}"
                )
        if (self.clusters is None) == (self.bootstrap == "cluster"):
            raise ValueError(
                f"bootstrap {self.bootstrap} with "
                f"{'no clusters' if self.clusters is None else f'clusters {self.clusters!r}'}: "
                "--bootstrap cluster and --clusters COLUMN go together"
            )
        for name in ("draws", "chains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")
        if self.draws < 4:
            raise ValueError(f"draws {self.draws}: at least 4 of each chain are needed to judge it")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: a whole number of at least 0 is needed")

    @property
    def source(self) -> str:
        """What the data are called: a path as typed, a given name, or the kind of object."""
        kind = f"a {type(self.data).__name__} in memory"
        return str(self.data) if isinstance(self.data, str | Path) else self.data_name or kind


@dataclass(frozen=True)
class Findings:
    """The answer. draws: results of `sample` by learning rate; `result` is that of `calibration`.

    plain: the posterior at the rate that was asked to compare with. rivals: other intervals, the
    sandwich's first. notes: what speaks against calibration or draws.
    """

    study: Study
    plain: GibbsPosterior
    calibration: Calibration
    draws: Mapping[float, xr.DataTree]
    rivals: tuple[Rival, ...]
    notes: tuple[str, ...]

    @property
    def result(self) -> xr.DataTree:
        """Draws of the calibrated posterior."""
        return self.draws[self.calibration.learning_rate]

    @property
    def interrupted(self) -> bool:
        """Whether sampling was stopped by hand."""
        return any(bool(one.attrs["interrupted"]) for one in self.draws.values())

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each coefficient that is shown; NaN where none was found."""
        cal = self.calibration
        if self.study.region != "marginal":
            return dict.fromkeys(self.plain.parameters, cal.learning_rate)
        return {f.region.label: f.rate for f in cal.found}

    @property
    def of_interest(self) -> list[str]:
        """Coefficients to show first: all but the intercept."""
        return [name for name in self.rates if name != "Intercept"] or list(self.rates)

    def of(self, name: str, rate: float) -> Float[ndarray, "chains draws"]:
        """Draws of one coefficient at a rate; NaN where Ctrl-C came before them."""
        if rate not in self.draws:
            return np.full((1, 1), np.nan)
        column = list(self.plain.parameters).index(name)
        return np.asarray(draws_of(self.draws[rate])[:, :, column])

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a coefficient: its estimate and rate, and its interval by each way."""
        frames = {rate: summary(tree) for rate, tree in self.draws.items()}
        rows = {name: self._row(name, rate, frames.get(rate)) for name, rate in self.rates.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("coefficient")

    def _row(self, name: str, rate: float, frame: pd.DataFrame | None) -> dict[str, float]:
        draws, level = self.of(name, rate), self.study.level
        row = {"estimate": float(self.plain.minimiser[self.plain.parameters.index(name)])}
        row |= {"learning_rate": rate, "mean": float(draws.mean()), "sd": float(draws.std())}
        ends = {"": _ends(draws, level)}
        ends["_uncalibrated"] = _ends(self.of(name, self.study.rate), level)
        for way, (low, high) in (ends | {f"_{r.label}": r.ends(name) for r in self.rivals}).items():
            row |= {f"lower{way}": low, f"upper{way}": high}
        for column in ("ess_bulk", "ess_tail", "r_hat"):
            row[column] = np.nan if frame is None else float(frame.loc[name, column])
        return row


def find(
    study: Study, *, progress: bool = False, keep: Callable[[xr.DataTree], None] | None = None
) -> Findings:
    """Answer a question: posterior, calibrated rates, draws at them and at the rate to compare.

    progress: bars on the error stream; keep: called with the calibrated posterior's draws as soon
    as they are there. Each coefficient has draws at its own rate.
    Raises ValueError or FileNotFoundError for bad input, before anything that takes long.

    >>> rng = np.random.default_rng(1)
    >>> table = {"x": rng.standard_normal(100), "y": rng.standard_normal(100)}
    >>> found = find(Study("y ~ 1 + x", table, "squared", replicates=200, draws=200))
    >>> list(found.rates)
    ['Intercept', 'x']
    """
    plain = _posterior(study)
    cal = calibrate(
        plain,
        study.level,
        study.region,
        cast(Any, study.bootstrap),
        study.replicates,
        cast(Any, study.method),
        study.seed,
        coefficients=study.coefficients or None,
        block=study.block,
        m=study.m,
        cache=study.cache,
        progress=progress,
    )
    draws = _drawn(study, cal, progress, keep)
    rival = sandwich_rival(plain, study.level, study.bootstrap, study.block)
    notes = (*cal.notes, *convergence_notes(draws[cal.learning_rate]))
    return Findings(study, plain, cal, draws, (rival,), notes)


def parse_loss(text: str) -> LinearLoss:
    """The loss that a text names: NAME, or NAME:NUMBER where it takes one.

    Raises ValueError for what is not understood.

    >>> parse_loss("quantile:0.9").name
    'quantile(0.9)'
    """
    name, colon, given = (part.strip() for part in text.partition(":"))
    make, takes = LOSSES.get(name.lower(), (None, ""))
    if make is None:
        every = ", ".join(f"{n}:{t}" if t else n for n, (_, t) in LOSSES.items())
        raise ValueError(f"loss {text!r} is unknown: use one of {every}")
    if not colon:
        return make()
    if not takes:
        raise ValueError(f"loss {text!r}: {name} takes no number")
    try:
        return make(float(given))
    except ValueError as error:
        reason = f"{given!r} is no number" if "could not convert" in str(error) else str(error)
        raise ValueError(f"loss {text!r}: {reason}") from None


# --- parts --------------------------------------------------------------------------------


def _posterior(study: Study) -> GibbsPosterior:
    found = GibbsPosterior.from_formula(
        parse_loss(study.loss),
        study.formula,
        study.data,
        learning_rate=study.rate,
        weights=study.weights,
        clusters=study.clusters,
        missing=cast(Any, study.missing),
    )
    if not study.prior:
        return found
    return replace(found, prior=_prior(study.prior, found.parameters))


def _prior(texts: Sequence[str], names: Sequence[str]) -> Prior | list[Prior]:
    for text in texts:
        if re.search(r"(^|=)\s*weak\s*$", text, re.IGNORECASE):
            raise ValueError(f"prior {text!r}: weak is for instruments; use flat, or give a scale")
    # of moments, `parse_prior` reads the names alone unless a prior is weak
    named = cast(Any, SimpleNamespace(names=SimpleNamespace(parameters=names)))
    return parse_prior(texts, named)


def _drawn(
    study: Study,
    cal: Calibration,
    progress: bool,
    keep: Callable[[xr.DataTree], None] | None,
) -> dict[float, xr.DataTree]:
    """Draws at the smallest rate, the other coefficients' rates, and the rate to compare with."""
    out: dict[float, xr.DataTree] = {}
    own = [f.rate for f in cal.found if f.solved]
    for rate in dict.fromkeys([cal.learning_rate, *own, study.rate]):
        one = cal.posterior.at_rate(rate)
        out[rate] = sample(one, "auto", study.draws, study.chains, study.seed, progress=progress)
        if keep is not None and len(out) == 1:
            keep(out[rate])
        if out[rate].attrs["interrupted"]:
            break
    return out


def _ends(draws: ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
