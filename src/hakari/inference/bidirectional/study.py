"""A question on two outcomes answered: both effects, their set, and whether the data can tell.

`find` goes from a table to everything that the report, the terminal and `--json` show. A stream is
read here block by block, so that Ctrl-C keeps the rows so far and a later run goes on after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import pandas as pd

from hakari.inference.bidirectional.confidence_set import ConfidenceSet
from hakari.inference.bidirectional.effects import Effects
from hakari.inference.bidirectional.features import Features, Polynomial, RandomFourier
from hakari.inference.bidirectional.identification import Identification
from hakari.inference.bidirectional.model import BidirectionalEffects
from hakari.inference.bidirectional.nuisance import FEWEST
from hakari.inference.bidirectional.rows import Columns, Rows, read, sampled
from hakari.inference.bidirectional.single_equation import SingleEquation, single_equation
from hakari.inference.bidirectional.variance_ratio import (
    RatioCurve,
    RegimeRatios,
    ratio_curves,
    regime_ratios,
)
from hakari.inference.patience import told
from hakari.inference.study_command import Unfinished

MODEL = "model.npz"  # in the folder of a run
SAMPLE = 2000  # rows, drawn from all, that curves are drawn from
SETTINGS = (  # of the model, by the same names
    "y1", "y2", "covariates", "method", "regimes", "covariance", "restrict", "root", "half_life",
    "window", "bootstraps", "missing", "seed",
)  # fmt: skip
FREE = ("root", "missing")  # settings that a resumed run may change

Keep = Callable[[BidirectionalEffects], None]


@dataclass(frozen=True)
class Study:
    """What is asked of which data, as typed; `data` may also be a frame in memory, with a name.

    features, length_scale: of `RandomFourier`; polynomial: a degree, for polynomials instead. The
    others are those of `BidirectionalEffects`. one_pass: read the rows once, in order; so it is
    with a half-life or a window. anyway: a point estimate even where the data cannot tell.
    """

    data: Any
    y1: str
    y2: str
    covariates: tuple[str, ...] = ()
    regimes: str | None = None
    features: int = 200
    length_scale: str = "relevance"
    polynomial: int | None = None
    method: str = "moments"
    covariance: str = "zero"
    restrict: str | None = None
    root: str = "stable"
    one_pass: bool = False
    half_life: float | None = None
    window: float | None = None
    bootstraps: int = 0
    level: float = 0.95
    anyway: bool = False
    missing: str = "raise"
    seed: int = 1
    data_name: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level {self.level:g} must lie between 0 and 1, such as 0.95")
        if self.polynomial is not None and (self.features, self.length_scale) != (200, "relevance"):
            raise ValueError(
                f"polynomial {self.polynomial} with features {self.features}, length scale "
                f"{self.length_scale}: a polynomial has neither, give one or the other"
            )
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: a whole number of at least 0 is needed")

    @property
    def source(self) -> str:
        """What the data are called: a path as typed, a given name, or the kind of object."""
        kind = f"a {type(self.data).__name__} in memory"
        return str(self.data) if isinstance(self.data, str | Path) else self.data_name or kind

    @property
    def streamed(self) -> bool:
        """Whether rows are read once."""
        return self.one_pass or self.half_life is not None or self.window is not None

    @property
    def feature_map(self) -> Features:
        """The features as a specification. Raises ValueError for a length scale that is none."""
        if self.polynomial is not None:
            return Polynomial(self.polynomial)
        return RandomFourier(self.features, self.seed, _length_scale(self.length_scale))


@dataclass(frozen=True)
class Findings:
    """The answer. model: as learned; seconds: it took to read and learn; read: rows read in them.

    sample: rows drawn from all of the data. interrupted: whether Ctrl-C cut a stream short.
    """

    study: Study
    model: BidirectionalEffects
    effects: Effects
    sample: Rows
    read: int
    seconds: float
    interrupted: bool = False

    @property
    def identification(self) -> Identification:
        """Whether the variances move apart enough, and the tests."""
        return self.effects.identification

    @property
    def set(self) -> ConfidenceSet:
        """The Anderson-Rubin set at the level asked for."""
        return self.effects.confidence_set(self.study.level)

    @cached_property
    def alone(self) -> SingleEquation:
        """Least squares of each equation alone, which feedback biases."""
        return single_equation(self.effects.evidence.sums)

    @property
    def labels(self) -> tuple[str, str]:
        """Of the effects a and b."""
        return self.effects.labels

    @property
    def speed(self) -> float:
        """Rows a second, warm-up and every pass included."""
        return self.read / max(self.seconds, 1e-9)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row an effect: estimate, its error and interval, the set's ends, the other root."""
        alone = {
            "single_equation": self.alone.estimate,
            "single_equation_std_error": self.alone.std_error,
        }
        return self.effects.table_at(self.study.level).assign(**alone)

    @cached_property
    def ratios(self) -> tuple[RatioCurve, ...] | RegimeRatios:
        """How log s1²/s2² moves: along each covariate, the one that moves it most first.

        At the estimate with |ab| < 1, or of the residuals where there is none.
        """
        sums, nuisance = self.effects.evidence.sums, self.model.nuisance
        roots = self.effects.solution.roots
        at = (roots.a, roots.b) if roots.exists else (0.0, 0.0)
        if self.study.regimes:
            return regime_ratios(nuisance.regimes, sums, at)
        return ratio_curves(nuisance, sums, at, self.sample, self.study.covariates)


def find(
    study: Study,
    resume: Path | None = None,
    *,
    progress: bool = False,
    keep: Keep = lambda model: None,
) -> Findings:
    """Answer a question: learn, then both effects, their set and whether the data can tell.

    resume: folder of an earlier run: in one pass, whose rows are skipped in `data`, or one that
    Ctrl-C stopped. progress: rows so far on the error stream. keep: called with the model when the
    last row is in. Raises ValueError or FileNotFoundError for bad input, before anything that takes
    long, and `Unfinished` for Ctrl-C in data at rest, with the model kept.

    >>> rng = np.random.default_rng(1)
    >>> x = rng.uniform(size=4000)
    >>> e1, e2 = rng.standard_normal((2, 4000)) * np.exp([2 * x - 1, 1 - 2 * x])
    >>> data = {"x": x, "p": (e1 + 0.5 * e2) / 0.8, "q": (e2 + 0.4 * e1) / 0.8}
    >>> found = find(Study(data, "p", "q", ("x",), features=20))
    >>> [round(float(v), 1) for v in found.table["estimate"]]
    [0.5, 0.4]
    """
    begun = perf_counter()
    model = _model(study) if resume is None else _resumed(study, resume)
    before, interrupted = model.rows, False
    if study.streamed or before:
        study = replace(study, one_pass=True)
        interrupted = _streamed(study, model, progress)
        if resume is not None and model.rows == before and not interrupted:
            raise ValueError(
                f"{study.source} has no rows after the {before:,} that {resume} has learned from: "
                "give data that go on after them"
            )
    else:
        model.fit(study.data, progress=progress, resume=resume is not None)
    if model.interrupted:
        keep(model)
        raise Unfinished
    seconds, read_now = perf_counter() - begun, model.rows - before
    if interrupted and model.rows < FEWEST:
        raise KeyboardInterrupt
    keep(model)  # before an answer begins with fewer rows than the warm-up
    effects = model.effects(study.anyway)
    sample = sampled(_learned_from(study, model), SAMPLE).rows
    return Findings(study, model, effects, sample, read_now, seconds, interrupted)


# --- the model ------------------------------------------------------------------------------


def _model(study: Study) -> BidirectionalEffects:
    given = {name: getattr(study, name) for name in SETTINGS}
    return BidirectionalEffects(features=study.feature_map, **cast(Any, given))


def _resumed(study: Study, folder: Path) -> BidirectionalEffects:
    """The model of an earlier run with the same settings."""
    model, wanted = BidirectionalEffects.load(folder / MODEL), _model(study).get_params()
    if model.finished:
        raise ValueError(
            f"{folder} has read its data several times, which more rows cannot follow: start it "
            "with --one-pass, or fit all of the data"
        )
    for name, value in model.get_params().items():
        if name not in FREE and value != wanted[name]:
            raise ValueError(
                f"{name} is {value!r} in {folder} and {wanted[name]!r} here: go on with the same, "
                "or start a new run"
            )
    return model.set_params(root=study.root, missing=study.missing)


def _length_scale(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


# --- rows -----------------------------------------------------------------------------------


def _streamed(study: Study, model: BidirectionalEffects, progress: bool) -> bool:
    """Learn from the rows after those that the model has; whether Ctrl-C stopped it.

    A block enters whole or not at all, so that the model's count of rows says where to go on.
    """
    with told(progress, model.rows) as tell:
        try:
            for rows in _after(_blocks(study), model.rows):
                model.partial_fit(rows)
                tell("one pass", model.rows)
        except KeyboardInterrupt:
            return True
    return False


def _blocks(study: Study) -> Iterator[Rows]:
    columns = Columns(study.y1, study.y2, study.covariates, study.regimes)
    return read(study.data, columns, cast(Any, study.missing))


def _after(blocks: Iterator[Rows], skipped: int) -> Iterator[Rows]:
    """Blocks without the first rows."""
    for rows in blocks:
        if skipped >= len(rows):
            skipped -= len(rows)
            continue
        yield rows.cut(skipped, len(rows)) if skipped else rows
        skipped = 0


def _learned_from(study: Study, model: BidirectionalEffects) -> Iterator[Rows]:
    """The rows that the model has, by one more reading."""
    left = model.rows
    for rows in _blocks(study):
        yield rows.cut(0, left)
        left -= min(left, len(rows))
        if not left:
            return
