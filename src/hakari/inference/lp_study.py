"""A question on impulse responses answered: local projections, their posterior, its checks.

`find` goes from a table to everything that the report, the terminal and `--json` show; priors
are read as a person types them: `roughness(2)`, `ebp=normal(0, 1)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool
from numpy import ndarray
from threadpoolctl import threadpool_limits

from hakari.inference.bands import KINDS
from hakari.inference.diagnostics import convergence_notes, summary
from hakari.inference.horseshoe import Horseshoe
from hakari.inference.impulse_response import ImpulseResponse
from hakari.inference.local_projections import LocalProjection
from hakari.inference.path_prior import GaussianProcess, PathPrior, RoughnessPenalty
from hakari.inference.prior import Flat, Normal
from hakari.inference.projection_instruments import first_stages
from hakari.inference.projection_posterior import ProjectionPosterior
from hakari.inference.sampling import sample

_GRAINS = ((r"\d{4}-\d{2}", "month"), (r"\d{4}Q\d", "quarter"), (r"\d{4}", "year"))
DEFAULT = RoughnessPenalty()
NARROW = 0.68  # level of the inner band of the figures
GRAMMAR = (
    "write roughness(ORDER), process(NU), normal(MEAN, SD) or flat, with options as in "
    "roughness(order=2, spacing=even), for one response NAME=flat"
)


@dataclass(frozen=True)
class Study:
    """What is asked of which data, as typed; `data` may also be a frame in memory, with a name.

    calibrate: None for where it applies. units: of responses and shocks, to be said in sentences.
    """

    data: Any
    response: tuple[str, ...]
    shock: tuple[str, ...]
    instrument: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    lags: int = 4
    horizons: int = 20
    time: tuple[str, ...] = ()
    unit: str | None = None
    cumulative: bool = False
    trend: str = "c"
    sample: str = "common"
    augment: bool = False
    shock_lags: int | None = None
    state: str | None = None
    effects: str = "unit"
    prior: tuple[str, ...] = ()
    covariance: str = ""
    weighting: str = "frozen"
    shrinkage: str = "auto"
    controls_prior: str = "none"
    calibrate: bool | None = None
    level: float = 0.9
    band: str = "sup-t"
    scale: str = "1"
    draws: int = 2000
    chains: int = 4
    seed: int = 1
    data_name: str = ""
    units: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level {self.level:g} must lie between 0 and 1, such as 0.9")
        if self.band not in KINDS:
            raise ValueError(f"band {self.band!r} is unknown: use one of {', '.join(KINDS)}")
        if self.controls_prior not in ("none", "horseshoe"):
            raise ValueError(f"controls_prior {self.controls_prior!r}: use none or horseshoe")
        for name in ("draws", "chains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: a whole number of at least 0 is needed")
        least = max(ceil(2 / (1 - self.level) - 1e-9), 100)
        if self.draws * self.chains < least:
            raise ValueError(
                f"draws {self.draws} in {self.chains} chains are too few for bands of level "
                f"{self.level:g}: at least {least} in all are needed"
            )
        _ = self.size

    @property
    def size(self) -> float | Literal["sd"]:
        """Size of the shock: a number, or `sd`; raises ValueError for anything else."""
        if self.scale == "sd":
            return "sd"
        try:
            found = float(self.scale)
        except ValueError:
            found = 0.0
        if not isfinite(found) or found == 0:
            raise ValueError(f"scale {self.scale!r}: a number in units of the shock, or sd")
        return found

    @property
    def source(self) -> str:
        """What the data are called: a path as typed, a given name, or the kind of object."""
        kind = f"a {type(self.data).__name__} in memory"
        return str(self.data) if isinstance(self.data, str | Path) else self.data_name or kind


@dataclass(frozen=True)
class Findings:
    """The answer. `table` is irf.csv; `known` (R, S, H) are responses that cannot be otherwise.

    size: of the shocks (S,). summary: ArviZ's diagnostics of what varies. first_stage: None
    without instruments or with several shocks.
    uncalibrated: why bands are not calibrated, empty where they are.
    """

    study: Study
    projection: LocalProjection
    posterior: ProjectionPosterior
    result: xr.DataTree
    irf: ImpulseResponse
    known: Bool[ndarray, "R S H"]
    size: ndarray
    table: pd.DataFrame
    shape: pd.DataFrame
    summary: pd.DataFrame
    notes: list[str]
    first_stage: pd.DataFrame | None
    uncalibrated: str

    @property
    def interrupted(self) -> bool:
        """Whether sampling was stopped by hand."""
        return bool(self.result.attrs["interrupted"])

    @property
    def priors(self) -> dict[str, str]:
        """The prior of each response, in words."""
        paths = self.posterior.paths
        return {p.name: "flat" if p.form is None else p.form.label for p in paths}

    @property
    def grain(self) -> str:
        """What a horizon is: month, quarter, year, or just a period."""
        labels = self.projection.series.labels if self.study.time else ()
        whole = (word for form, word in _GRAINS if all(re.fullmatch(form, t) for t in labels))
        return next(whole, "period") if labels else "period"

    @property
    def selected(self) -> list[int]:
        """At most ten horizons at even steps that end with the last, for tables."""
        span = self.irf.horizons[-1]
        near = [step for step in (1, 2, 3, 4, 5, 6, 8, 10, 12, 24, 60) if span / step <= 9]
        step = next((n for n in near if span % n == 0), near[0] if near else span // 8)
        return [h for h in self.irf.horizons if h == span or (h % step == 0 and h + step <= span)]


def find(
    study: Study, *, progress: bool = False, keep: Callable[[xr.DataTree], None] | None = None
) -> Findings:
    """Answer a question: projection, posterior, learning rates, draws, instruments.

    progress: bars on the error stream; keep: called with the draws as soon as they are there.
    Raises ValueError or FileNotFoundError for bad input, before any draw.

    >>> rng = np.random.default_rng(1)
    >>> e, y = rng.standard_normal((2, 200))
    >>> found = find(Study({"y": y + e, "e": e}, ("y",), ("e",), lags=1, horizons=4, draws=200))
    >>> round(float(found.irf.draws[:, 0, 0, 0].mean()))
    1
    """
    with threadpool_limits(1, user_api="blas"):  # small matrices: BLAS threads only wait
        projection = _projection(study)
        prior, fallen = _priors(study, len(projection.question.horizons))
        posterior = projection.posterior(
            prior,
            study.covariance,
            weighting=cast(Any, study.weighting),
            shrinkage=cast(Any, study.shrinkage),
        )
        if _known(posterior).all():
            raise ValueError(
                f"the responses of {', '.join(study.response)} are known at every horizon "
                f"(0 to {study.horizons}): drop controls at once, or add horizons"
            )
        posterior, uncalibrated = _calibrated(study, posterior, progress)
        result = sample(posterior, "auto", study.draws, study.chains, study.seed, progress=progress)
        if keep is not None:
            keep(result)
        found = _findings(study, posterior, result, uncalibrated)
        return replace(found, irf=replace(found.irf, notes=(*found.irf.notes, *fallen)))


# --- priors as typed ----------------------------------------------------------------------

_FORM = re.compile(r"(?:(?P<name>.+)=)?\s*(?P<kind>[a-z]+)\s*(?:\((?P<given>[^()]*)\))?\s*", re.I)
_OPTIONS = {
    "roughness": tuple(f.name for f in fields(RoughnessPenalty)),
    "process": tuple(f.name for f in fields(GaussianProcess)),
    "normal": ("mean", "sd"),
    "flat": (),
}


def parse_path_priors(
    texts: Sequence[str], responses: Sequence[str], default: PathPrior = DEFAULT
) -> PathPrior | dict[str, PathPrior]:
    """The priors that these texts describe; the default for responses that none reaches.

    A text with a name holds for that response. Numbers without a name come in the order of the
    options; the second one of `normal` is a standard deviation.
    Raises ValueError for what the grammar does not know, and for unknown or repeated names.

    >>> parse_path_priors(["process(2.5)", "y=normal(0, 2)"], ["y", "x"])["y"]
    Normal(mean=0.0, cov=4.0, names=None)
    """
    given = [_parse(text) for text in texts]
    named = [name for name, _ in given if name is not None]
    for name in named:
        if name not in responses:
            raise ValueError(f"prior on unknown response {name!r} (have {', '.join(responses)})")
        if named.count(name) > 1:
            raise ValueError(f"two priors on {name!r}: give each response one")
    general = [prior for name, prior in given if name is None]
    if len(general) > 1:
        raise ValueError(f"two priors for all responses ({', '.join(texts)}): give one")
    every: PathPrior = general[0] if general else default
    own = {name: prior for name, prior in given if name is not None}
    return {y: own.get(y, every) for y in responses} if own else every


def _parse(text: str) -> tuple[str | None, PathPrior]:
    form = _FORM.fullmatch(text.strip())
    kind = form["kind"].lower() if form else ""
    if form is None or kind not in _OPTIONS:
        raise ValueError(f"prior {text!r} is not understood: {GRAMMAR}")
    options = _options(text, kind, form["given"] or "")
    name = form["name"].strip() if form["name"] else None
    if kind == "flat":
        return name, Flat()
    if kind == "roughness":
        return name, RoughnessPenalty(**options)
    if kind == "process":
        return name, GaussianProcess(**options)
    if set(options) != {"mean", "sd"} or not all(isinstance(v, float) for v in options.values()):
        raise ValueError(f"prior {text!r}: normal takes a mean and a standard deviation: {GRAMMAR}")
    if not options["sd"] > 0:
        raise ValueError(f"prior {text!r}: the spread {options['sd']:g} must be positive")
    return name, Normal(options["mean"], options["sd"] ** 2)


def _options(text: str, kind: str, given: str) -> dict[str, Any]:
    """Options by name: words stay words, an order becomes whole."""
    out: dict[str, Any] = {}
    known = _OPTIONS[kind]
    parts = [part.strip() for part in given.split(",") if part.strip()]
    for place, part in enumerate(parts):
        label, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            label, value = known[place] if place < len(known) else "", label
        if label not in known or label in out:
            takes = f"takes {', '.join(known)}, each once" if known else "takes nothing"
            raise ValueError(f"prior {text!r}: {kind} {takes}, not {part!r}: {GRAMMAR}")
        out[label] = _value(text, label, value)
    return out


def _value(text: str, label: str, value: str) -> Any:
    try:
        number = float(value)
    except ValueError:
        if label in ("smoothness", "length", "spacing"):
            return value.lower()
        raise ValueError(f"prior {text!r}: {label} {value!r} is no number: {GRAMMAR}") from None
    if not isfinite(number):
        raise ValueError(f"prior {text!r}: {label} {value} must be finite")
    return int(number) if label == "order" and number == int(number) else number


# --- parts --------------------------------------------------------------------------------


def _priors(
    study: Study, horizons: int
) -> tuple[PathPrior | dict[str, PathPrior], tuple[str, ...]]:
    """The priors, and a note where horizons are too few for the default: it is flat there."""
    usual = parse_path_priors(study.prior, study.response)
    if horizons > DEFAULT.order:
        return usual, ()
    found = parse_path_priors(study.prior, study.response, Flat())
    note = (
        f"the default prior, a roughness of order {DEFAULT.order}, needs more than "
        f"{DEFAULT.order} horizons, not {horizons}: priors that were not given are flat"
    )
    return found, () if found == usual else (note,)


def _projection(study: Study) -> LocalProjection:
    return LocalProjection(
        study.data,
        study.response,
        study.shock,
        study.instrument,
        study.control,
        study.lags,
        study.horizons,
        cumulative=study.cumulative,
        trend=cast(Any, study.trend),
        sample=cast(Any, study.sample),
        augment=study.augment,
        state=study.state,
        time=study.time if len(study.time) > 1 else (study.time or (None,))[0],
        unit=study.unit,
        effects=cast(Any, study.effects),
        shock_lags=study.shock_lags,
        controls_prior=Horseshoe(seed=study.seed) if study.controls_prior == "horseshoe" else None,
    )


def _calibrated(
    study: Study, posterior: ProjectionPosterior, progress: bool
) -> tuple[ProjectionPosterior, str]:
    """The posterior with its learning rates, or as it is and why; raises where they were asked for.

    What calibration is not for it refuses itself, so that its reasons stand in one place.
    """
    if study.calibrate is False:
        return posterior, "calibration was turned off"
    try:
        if _known(posterior).all(axis=(1, 2)).any():
            raise ValueError("calibrate() needs responses that are not known at every horizon")
        return posterior.calibrate(study.level, seed=study.seed, progress=progress), ""
    except ValueError as error:
        if study.calibrate or isinstance(error, np.linalg.LinAlgError):
            raise
        return posterior, str(error).replace("calibrate()", "calibration")


def _findings(
    study: Study, posterior: ProjectionPosterior, result: xr.DataTree, uncalibrated: str
) -> Findings:
    lp = posterior.projection
    irf = lp.impulse_response(result, study.size, anderson_rubin=study.level)
    size = _size(lp, cast(ndarray, irf.estimate))
    known = _known(posterior)
    moving = _without(result, known)
    one = bool(study.instrument) and lp.shape[1] == 1
    return Findings(
        study,
        lp,
        posterior,
        result,
        irf,
        known,
        size,
        irf.to_dataframe(study.level, study.band),
        irf.shape(study.level),
        summary(moving, study.level),
        convergence_notes(moving),
        first_stages(lp, posterior.covariance) if one else None,
        uncalibrated,
    )


def _size(lp: LocalProjection, scaled: ndarray) -> ndarray:
    """(S,) what the estimates were multiplied by."""
    plain = lp.estimate.transpose(1, 0, 2).reshape(lp.shape[1], -1)
    best = np.abs(plain).argmax(axis=1)[:, None]
    above = np.take_along_axis(scaled.transpose(1, 0, 2).reshape(plain.shape), best, axis=1)
    found: ndarray = (above / np.take_along_axis(plain, best, axis=1))[:, 0]
    return found


def _known(posterior: ProjectionPosterior) -> Bool[ndarray, "R S H"]:
    """Responses without sampling error, as of a control to the shock at once."""
    exact = np.diag(posterior.joint_covariance) == 0
    return np.asarray(exact.reshape(posterior.projection.shape))


def _without(result: xr.DataTree, known: ndarray) -> xr.DataTree:
    """The draws of what varies: what is known would count as chains that do not move."""
    theta = result["posterior"].dataset[["theta"]].isel(coefficient=np.flatnonzero(~known.ravel()))
    found = xr.DataTree.from_dict({"/posterior": theta, "/checks": result["checks"].dataset})
    found.attrs = dict(result.attrs)
    return found
