"""`BidirectionalEffects`: two outcomes that cause each other, from data at rest or a stream.

fit -> `batch.fit` (data that can be read again) or `stream.advance` (data that come once);
effects -> `Effects` from the sums alone. The conventions are scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from hakari.inference.bidirectional import batch, cross_fitting, online_qml, saved, stream
from hakari.inference.bidirectional.batch import Passes
from hakari.inference.bidirectional.drift import Alarm
from hakari.inference.bidirectional.effects import Effects, Root, judged
from hakari.inference.bidirectional.evidence import Assumptions, Evidence
from hakari.inference.bidirectional.features import Features, RandomFourier
from hakari.inference.bidirectional.identification import Identification
from hakari.inference.bidirectional.nuisance import FEWEST, Nuisance, warmed_up
from hakari.inference.bidirectional.online_qml import OnlineFit, OnlinePasses
from hakari.inference.bidirectional.online_steps import OnlineSettings
from hakari.inference.bidirectional.orthogonal_moments import Restriction, Solution
from hakari.inference.bidirectional.readings import Blocks
from hakari.inference.bidirectional.rows import (
    Columns,
    Rows,
    is_stream,
    read,
    recut,
    refuse_rare,
    refuse_two,
    sampled,
    stacked,
)
from hakari.inference.bidirectional.settings import (
    Parameters,
    checked,
    learned_with,
    refuse_changed,
    refuse_other,
)
from hakari.inference.bidirectional.single_equation import single_equation
from hakari.inference.bidirectional.stream import Forgetting, Stream
from hakari.inference.patience import told
from hakari.inference.tables import Missing

Covariance = Literal["zero", "constant"]
Method = Literal["moments", "online-qml", "single-equation"]
FEATURES = RandomFourier(200)
ONLINE = OnlineSettings()


class BidirectionalEffects(Parameters):
    """Effects of y2 on y1 and of y1 on y2, identified by variances that move apart.

    y1 = a y2 + f1(x) + s1(x) e1 and y2 = b y1 + f2(x) + s2(x) e2, with shocks uncorrelated given
    x; identified up to a mirror where s1²/s2² depends on x (arXiv 2511.05050; design note
    bidirectional-effects).

    y1, y2, covariates: names of columns. features: of the covariates, for means and log variances.
    method: "moments", in closed form; "online-qml", the paper's likelihood by steps of `online`;
    "single-equation", least squares of each outcome on the other, which feedback biases.
    regressor: any of scikit-learn's in the place of heads on features, cross-fitted in memory.
    regimes: a column whose values are the regimes of the variances (Rigobon, 2003), instead of
    the covariates. covariance: of the shocks given x, "zero", or "constant" and unknown (Lewbel,
    2012). restrict: "a=0" or "b=0", a triangular system. root: "stable" reports the point with
    |ab| < 1, "mirror" the other. half_life, window: rows after which a row of a stream counts
    half, or not at all. warm_up: rows that fix features and units, drawn from all data at rest, and
    the first of a stream. bootstraps: of the multiplier bootstrap. missing: "raise", or "drop"
    rows. seed: of the drawing and the bootstrap.

    >>> rng = np.random.default_rng(1)
    >>> x = rng.uniform(size=4000)
    >>> e1, e2 = rng.standard_normal((2, 4000)) * np.exp([2 * x - 1, 1 - 2 * x])
    >>> data = {"x": x, "p": (e1 + 0.5 * e2) / 0.8, "q": (e2 + 0.4 * e1) / 0.8}
    >>> model = BidirectionalEffects("p", "q", ["x"], RandomFourier(20, seed=1)).fit(data)
    >>> [round(float(v), 1) for v in model.effects().estimate]
    [0.5, 0.4]
    """

    def __init__(
        self,
        y1: str = "y1",
        y2: str = "y2",
        covariates: Sequence[str] = (),
        features: Features = FEATURES,
        *,
        method: Method = "moments",
        regressor: Any = None,
        online: OnlineSettings = ONLINE,
        regimes: str | None = None,
        covariance: Covariance = "zero",
        restrict: Restriction | None = None,
        root: Root = "stable",
        half_life: float | None = None,
        window: float | None = None,
        warm_up: int = 20_000,
        bootstraps: int = 0,
        missing: Missing = "raise",
        seed: int = 0,
    ) -> None:
        self.y1, self.y2, self.covariates, self.features = y1, y2, covariates, features
        self.method, self.regressor, self.online = method, regressor, online
        self.regimes, self.covariance = regimes, covariance
        self.restrict, self.root = restrict, root
        self.half_life, self.window, self.warm_up = half_life, window, warm_up
        self.bootstraps, self.missing, self.seed = bootstraps, missing, seed
        self._nuisance: Nuisance | None = None
        self._evidence: Evidence | None = None
        self._stream: Stream | None = None
        self._online: OnlineFit | None = None
        self._waiting: list[Rows] = []
        self._passes: Passes | OnlinePasses | None = None
        self._learned: dict[str, Any] | None = None
        self.interrupted = False

    # --- learning -----------------------------------------------------------------------------

    def fit(
        self, data: Any, *, progress: bool = False, resume: bool = False
    ) -> BidirectionalEffects:
        """Learn from all rows, forgetting what was learned before.

        data: a frame, Arrow, a dict of arrays, the path of CSV or Parquet files of any size: read
        six times, in blocks that run side by side through joblib; the result is the same for any
        number of workers. An iterator of batches or a RecordBatchReader is read once, as by
        `partial_fit`, and so are any data with a half-life or a window.

        Ctrl-C keeps what is done, and `interrupted` says so: a stream answers with the rows so far,
        and takes more by `partial_fit`; a fit on data at rest goes on from its last block with
        `resume` and the same data. Before features are chosen it leaves the model as it was, and
        with a regressor it keeps nothing; then it is raised.
        Raises ValueError for columns, values or settings that do not fit, and for a resume of
        what was not interrupted, or with other data.
        """
        columns, forgetting = self._checked()

        def blocks() -> Iterator[Rows]:
            return recut(read(data, columns, self.missing))

        if resume:
            if self._passes is None:
                raise ValueError("no fit of this model was interrupted: fit without resume")
            refuse_changed(self._learned, self.get_params())
            return self._passed(self._passes, blocks, progress)
        if is_stream(data) or forgetting != Forgetting():
            self._refuse_regressor()
            self._forget()
            return self._streamed(read(data, columns, self.missing), progress)
        sample = sampled(blocks(), self.warm_up, self.seed)
        refuse_rare(sample.regimes)
        self._refuse_two(list(sample.regimes))
        nuisance = warmed_up(self.features, sample.rows, self.covariates, list(sample.regimes))
        self._forget()
        self._learned = learned_with(self.get_params())
        if self.regressor is not None:
            return self._cross_fitted(nuisance, blocks, progress)
        if self.method == "online-qml":
            return self._passed(online_qml.at_rest(nuisance, blocks, self.online), blocks, progress)
        return self._passed(batch.Passes(nuisance), blocks, progress)

    def _passed(
        self, passes: Passes | OnlinePasses, blocks: Blocks, progress: bool
    ) -> BidirectionalEffects:
        """All passes, or what is left of them."""
        with told(progress) as tell, suppress(KeyboardInterrupt):
            more = (self.bootstraps, self.seed, tell)
            if isinstance(passes, OnlinePasses):
                for steps in online_qml.fit(passes, blocks, self.online, *more):
                    passes = steps
            else:
                for sums in batch.fit(passes, self._assumptions, blocks, *more):
                    passes = sums
        self._passes = passes  # not where other data are refused
        self.interrupted = not passes.finished
        if passes.finished:
            self._passes = None
            if isinstance(passes, OnlinePasses):
                self._online = passes.found
                self._nuisance, self._evidence = passes.found.nuisance, passes.found.evidence
            else:
                self._nuisance, self._evidence = passes.nuisance, passes.sums
        return self

    def _cross_fitted(
        self, nuisance: Nuisance, blocks: Blocks, progress: bool
    ) -> BidirectionalEffects:
        rows = stacked(list(blocks()))
        with told(progress) as tell:
            more = (self._assumptions, self.bootstraps, self.seed, tell)
            self._evidence, _ = cross_fitting.fit(nuisance, self.regressor, rows, *more)
        self._nuisance = nuisance
        return self

    def partial_fit(self, data: Any) -> BidirectionalEffects:
        """Learn from some more rows, each met by what came before.

        data: as of `fit`, each read once. The first `warm_up` rows are kept until they are all
        there. After `fit` on data at rest, raises ValueError.
        """
        columns, _ = self._checked()
        self._refuse_regressor()
        if self._evidence is not None or self._passes is not None:
            raise ValueError(
                "fit has read its data more than once, which more rows cannot follow: start a new "
                "model with partial_fit, or fit all of the data"
            )
        refuse_changed(self._learned, self.get_params())
        for rows in read(data, columns, self.missing):
            self._take(rows)
        return self

    def merge(self, other: BidirectionalEffects) -> BidirectionalEffects:
        """Add what another model has learned from other rows. Returns this model.

        The sums add exactly: the estimate is that of both models' moments pooled. Raises ValueError
        for models of other outcomes or assumptions.
        """
        if not isinstance(other, BidirectionalEffects):
            raise TypeError(f"{type(other).__name__} is no BidirectionalEffects: merge models")
        self._checked()
        for model in (self, other):
            model._refuse_halfway()
            refuse_changed(model._learned, model.get_params())
        if other is self:
            raise ValueError("a model does not merge with itself: its rows would count twice")
        if not other.rows:
            return self
        mine, theirs = self._identity, other._identity
        for name in [name for name in mine if name in theirs]:
            if mine[name] != theirs[name]:
                raise ValueError(
                    f"models with {name} {mine[name]!r} and {theirs[name]!r} do not merge"
                )
        if not self.rows:
            refuse_other(self.get_params(), other.get_params())
            self._copy(other)
            return self
        if self._online is not None or other._online is not None:
            raise ValueError("models of method 'online-qml' do not merge: their steps do not add")
        if other._evidence is not None or self._evidence is not None:
            self._evidence = self._summed + other._summed
            self._nuisance = self._nuisance or other._nuisance
        elif other._stream is None:
            for rows in other._waiting:
                self._take(rows)
        elif self._stream is None:
            waiting = self._waiting
            self._copy(other)
            for rows in waiting:
                self._take(rows)
        else:
            self._stream = stream.merged(self._stream, other._stream, self._assumptions)
        return self

    # --- answers ------------------------------------------------------------------------------

    def effects(self, anyway: bool = False) -> Effects:
        """Both effects. anyway: a point estimate even where `identification` says no.

        Raises ValueError before there are 1,000 rows.
        """
        told, more = self.identification(), (self.root, anyway, self.method)
        found = self._solution(self._summed)
        return Effects((self.y1, self.y2), found, self._summed, self._assumptions, told, *more)

    def _solution(self, evidence: Evidence) -> Solution:
        """The estimate by the method; sets and tests are those of the moments for all."""
        found = self._assumptions.solve(evidence.sums)
        if self._online is not None:
            return found.moved(self._online.estimate, self._online.covariance)
        if self.method == "single-equation":
            alone = single_equation(evidence.sums)
            return found.moved(alone.estimate, alone.covariance)
        return found

    def identification(self) -> Identification:
        """Whether the variances move apart enough to tell the effects, and the tests."""
        return judged(self._summed, self._assumptions)

    @property
    def path(self) -> pd.DataFrame:
        """The estimates along the stream: rows, a, b and their standard errors."""
        names = ["rows", "a", "b", "std_error_a", "std_error_b"]
        points = np.empty((0, 5)) if self._stream is None else self._stream.path
        return pd.DataFrame(points, columns=names)

    def plot_path(self) -> Any:
        """A matplotlib `Figure`: the estimates along the stream with 95 % bands, and an alarm."""
        from hakari.inference.bidirectional.plots import estimates_path

        return estimates_path(self.path, (self.y1, self.y2), self.alarm)

    def plot_ratio(self, data: Any) -> Any:
        """A matplotlib `Figure`: log s1²/s2² along the covariate that moves it most, or by regime.

        data: a table whose rows, 2,000 of them, the curve is averaged over.
        """
        from hakari.inference.bidirectional.plots import variance_ratio
        from hakari.inference.bidirectional.variance_ratio import ratio_curves, regime_ratios

        columns, _ = self._checked()
        sums, at = self._summed.sums, self._solution(self._summed).estimate
        if self.regimes is not None:
            curve: Any = regime_ratios(self.nuisance.regimes, sums, at)
        else:
            rows = sampled(read(data, columns, self.missing), 2000).rows
            curve = ratio_curves(self.nuisance, sums, at, rows, columns.covariates)[0]
        return variance_ratio(curve, (self.y1, self.y2))

    @property
    def alarm(self) -> Alarm | None:
        """When a change of the effects was noticed along the stream; None if never."""
        return None if self._stream is None else self._stream.monitor.alarm

    @property
    def rows(self) -> int:
        """Rows that were learned from, by a whole fit or a stream."""
        if self._evidence is not None:
            return self._evidence.rows
        if self._online is not None:
            return self._online.states[0].rows
        waiting = sum(len(rows) for rows in self._waiting)
        return waiting if self._stream is None else self._stream.rows

    @property
    def finished(self) -> bool:
        """Whether it has read data at rest as often as it needs, so that no rows can follow."""
        return self._evidence is not None

    @property
    def nuisance(self) -> Nuisance:
        """Features and heads as learned; along a stream, as they are now."""
        self._flushed()
        if self._stream is not None:
            return stream.as_nuisance(self._stream)
        if self._online is not None:
            return self._online.nuisance
        if self._nuisance is None:
            raise ValueError("nothing was learned yet: fit first")
        return self._nuisance

    # --- keeping ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write settings and state to one .npz file, from which `load` goes on."""
        if self.regressor is not None:
            raise ValueError(
                "a model with a regressor of scikit-learn is not saved: keep its effects"
            )
        state = {
            "parameters": self.get_params() | {"covariates": tuple(self.covariates)},
            "nuisance": self._nuisance,
            "evidence": self._evidence,
            "stream": self._stream,
            "online": self._online,
            "waiting": tuple(self._waiting),
            "passes": self._passes,
            "learned": self._learned,
        }
        saved.write(Path(path), state)

    @classmethod
    def load(cls, path: str | Path) -> BidirectionalEffects:
        """A model as it was saved. Raises ValueError for a file that is none."""
        state = saved.read(Path(path))
        model = cls(**state["parameters"])
        model._nuisance, model._evidence = state["nuisance"], state["evidence"]
        model._stream, model._waiting = state["stream"], list(state["waiting"])
        model._online, model._passes = state["online"], state["passes"]
        model._learned = state["learned"]
        model.interrupted = model._passes is not None
        return model

    def __repr__(self) -> str:
        return f"BidirectionalEffects({self.y1!r}, {self.y2!r}, rows={self.rows:,})"

    # --- parts --------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._nuisance, self._evidence = None, None
        self._stream, self._online = None, None
        self._waiting, self._passes, self.interrupted = [], None, False
        self._learned = None

    def _copy(self, other: BidirectionalEffects) -> None:
        """What the other has learned; its settings stay its own."""
        self._nuisance, self._evidence = other._nuisance, other._evidence
        self._stream, self._online = other._stream, other._online
        self._waiting = list(other._waiting)
        self._learned = other._learned

    def _checked(self) -> tuple[Columns, Forgetting]:
        return checked(self.get_params())

    @property
    def _assumptions(self) -> Assumptions:
        return Assumptions(self.covariance, self.restrict, self.regimes is not None)

    @property
    def _identity(self) -> dict[str, Any]:
        """What models must share to be merged."""
        names = ("y1", "y2", "regimes", "covariance", "restrict", "bootstraps")
        found = {name: getattr(self, name) for name in names}
        found |= {"covariates": list(self.covariates)}
        started = self._nuisance is not None or self._stream is not None
        return found | ({"values of the regimes": self.nuisance.regimes} if started else {})

    def _refuse_regressor(self) -> None:
        if self.regressor is not None:
            raise ValueError(
                "regressor needs all rows in memory, and a stream is read once: fit a table "
                "without half_life and window, or use features"
            )

    def _refuse_two(self, regimes: Sequence[Any]) -> None:
        if self.covariance == "constant" and self.restrict is None:
            refuse_two(regimes)

    def _refuse_halfway(self) -> None:
        if self._passes is not None:
            raise ValueError(f"{self._passes.where}: go on with fit(data, resume=True)")

    @property
    def _summed(self) -> Evidence:
        self._checked()
        refuse_changed(self._learned, self.get_params())
        self._refuse_halfway()
        self._flushed()
        if self._evidence is not None:
            return self._evidence
        if self._online is not None and self._online.evidence is not None:
            return self._online.evidence
        if self._online is not None:
            raise ValueError(
                f"the steps have not settled after {self.rows:,} rows: give more rows, or smaller "
                "batches (online=OnlineSettings(batch=64))"
            )
        if self._stream is None:
            raise ValueError(
                f"{self.rows:,} rows so far, and {FEWEST:,} are needed: fit or partial_fit more"
            )
        return self._stream.evidence

    def _streamed(self, blocks: Iterable[Rows], progress: bool) -> BidirectionalEffects:
        with told(progress) as tell:
            try:
                for rows in blocks:
                    self._take(rows)
                    tell("stream", self.rows)
            except KeyboardInterrupt:
                self.interrupted = True
        return self

    def _take(self, rows: Rows) -> None:
        """Rows into the stream; the first wait until there are enough to begin with."""
        self._learned = self._learned or learned_with(self.get_params())
        if self._online is not None:
            more = (self.online, self.bootstraps, self.seed)
            self._online = online_qml.partial(self._online, rows, *more)
            return
        if self._stream is None:
            self._waiting.append(rows)
            if sum(len(waiting) for waiting in self._waiting) >= self.warm_up:
                self._begin()
            return
        self._stream = stream.advance(
            self._stream,
            self._assumptions,
            Forgetting(self.half_life, self.window),
            rows,
            self.bootstraps,
            self.seed,
        )

    def _begin(self) -> None:
        whole = stacked(self._waiting)
        first, rest = whole.cut(0, self.warm_up), whole.cut(self.warm_up, len(whole))
        nuisance = warmed_up(self.features, first, self.covariates)
        self._refuse_two(nuisance.regimes)
        if self.method == "online-qml":
            self._online, self._waiting = online_qml.start(nuisance, first, self.online), []
            self._take(whole)
            return
        begun = stream.begin(nuisance, self._assumptions, first, self.bootstraps, self.seed)
        self._stream, self._waiting = begun, []
        if len(rest):
            self._take(rest)

    def _flushed(self) -> None:
        """Begin with what waits, if an answer is wanted before the warm-up is full."""
        started = self._stream is not None or self._online is not None
        if not started and sum(len(rows) for rows in self._waiting) >= FEWEST:
            self._begin()
