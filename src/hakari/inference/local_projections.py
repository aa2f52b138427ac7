"""Local projections and LP-IV as one system of moment conditions.

y_{j,t+h} = β_{j,h}'s_t + γ_{j,h}'c_t + u: all horizons, responses and shocks at once, with the
joint covariance of their estimates (arXiv 2503.20249; Jordà, 2005). The controls are concentrated
out exactly: what is sampled is the response. local-projections.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from numpy import ndarray

from hakari.inference.influence import ScoreCovariance, parse_scores, refuse_unfit, score_rows
from hakari.inference.moments import LinearMoments
from hakari.inference.path_prior import PathPrior
from hakari.inference.prior import Flat
from hakari.inference.projection_design import (
    Design,
    Effects,
    Question,
    SampleRule,
    Trend,
    build,
    coefficients,
    refuse_few_rows,
    rows_by_horizon,
)
from hakari.inference.projection_formula import parse_projection
from hakari.inference.projection_parts import Part, concentrated_parts, overlap_notes
from hakari.inference.projection_posterior import ProjectionPosterior, Shrinkage, Weighting
from hakari.inference.series import Series, read_series, refuse_interior_gaps

if TYPE_CHECKING:
    from hakari.inference.horseshoe import Horseshoe
    from hakari.inference.impulse_response import ImpulseResponse

MOST_HORIZONS = 100_000  # a number beyond it is a slip
FEW_UNITS = 10  # below, clusters are too few to tell a variance from


class LocalProjection:
    """Responses of variables to a shock over horizons, from a table of time series or a panel.

    data: pandas or polars frame, Arrow, dict of arrays, or the path of a CSV or Parquet file, in
        order of time. time: its column of dates (or two: year and quarter, year and month);
        without it, an index of dates, or the rows' order. unit: column of a panel's units.
    response, shock: columns, one or several. instruments: columns that replace the shocks in
        the moments (LP-IV); more than shocks are combined by the first stage.
    controls: columns whose lags enter, or terms exactly as they enter: `l(x, 0)`, `l(x, 1:4)`,
        leads `f(x, 1:2)`. Lags of responses and shocks always enter.
    lags: of each of those (shock_lags: of the shocks alone, 0 where they are innovations that
        other lags already span); count one more than the dynamics need, or set `augment`, which
        adds it (Montiel Olea and Plagborg-Møller, 2021): then scores are uncorrelated over time.
    horizons: whole numbers from 0 up; a number H stands for 0, ..., H.
    cumulative: respond by the sum of y_t, ..., y_{t+h}.
    trend: `n`, `c`, `ct` or `ctt`. sample: `common` to all horizons, or `available` at each.
    state: a column of zeros and ones (or weights), or `l(column, 1)`: responses by regime.
    effects: of a panel, `unit`, `unit+time` or `none`.
    controls_prior: `Horseshoe()` shrinks the controls, of which there may be more than rows.

    Raises ValueError for gaps, duplicates or disorder of dates, missing values inside a
    column, too few rows (naming the largest horizon that fits), constant shocks and
    collinear controls.

    >>> rng = np.random.default_rng(1)
    >>> e, y = rng.standard_normal(200), np.zeros(200)
    >>> for t in range(1, 200):
    ...     y[t] = 0.8 * y[t - 1] + e[t] + rng.standard_normal()
    >>> lp = LocalProjection({"y": y, "e": e}, response="y", shock="e", lags=2, horizons=8)
    >>> lp.estimate.shape
    (1, 1, 9)
    """

    def __init__(
        self,
        data: Any,
        response: str | Sequence[str],
        shock: str | Sequence[str],
        instruments: str | Sequence[str] | None = None,
        controls: str | Sequence[str] = (),
        lags: int = 4,
        horizons: int | Iterable[int] = 20,
        *,
        cumulative: bool = False,
        trend: Trend = "c",
        sample: SampleRule = "common",
        augment: bool = False,
        state: str | None = None,
        time: str | Sequence[str] | None = None,
        unit: str | None = None,
        effects: Effects = "unit",
        shock_lags: int | None = None,
        controls_prior: Horseshoe | None = None,
    ) -> None:
        self.question = question = Question(
            _names("response", response),
            _names("shock", shock),
            _names("instruments", () if instruments is None else instruments),
            _names("controls", () if controls is None else controls),
            lags,
            augment,
            _horizons(horizons),
            cumulative,
            trend,
            sample,
            state,
            effects,
            shock_lags,
        )
        _check(question)
        read = isinstance(data, Series)
        series = data if read else read_series(data, question.columns, time, unit)
        whole = [name for name in question.columns if name not in question.instruments]
        gaps = refuse_interior_gaps(series, whole)
        self.series: Series = series
        if question.horizons[-1] >= len(series.period):
            within = replace(question, horizons=tuple(range(len(series.period))))
            refuse_few_rows(within, build(within, series), series)  # before memory runs out
        self.design: Design = build(question, series)
        self.controls_prior = controls_prior
        if controls_prior is None:
            refuse_few_rows(question, self.design, series)
        self.parts: tuple[Part, ...] = concentrated_parts(
            question, self.design, series, controls_prior
        )
        self.notes = (*series.notes, *gaps, *overlap_notes(question, series, self.parts))

    @classmethod
    def from_formula(
        cls,
        formula: str,
        data: Any,
        shock: str | Sequence[str] = (),
        horizons: int | Iterable[int] = 20,
        **options: Any,
    ) -> LocalProjection:
        """The controls as written: `y ~ shock + l(y, 1:4) + x`, or `y ~ l(y, 1:4) + [s ~ z]`.

        Several responses on the left, joined by +. l(x, a:b) are lags, f(x, a:b) leads, a bare
        column itself at t. shock: which regressors the responses are to; a bracket names them
        and their instruments, as in linearmodels. options: as above.

        Raises ValueError for a formula that is not of this form.
        """
        read = parse_projection(formula, (shock,) if isinstance(shock, str) else tuple(shock))
        return cls(
            data, read.response, read.shock, read.instruments, read.controls, 0, horizons,
            **({"trend": "n"} if read.bare else {}) | options,
        )  # fmt: skip

    # --- what is estimated -----------------------------------------------------------------

    @property
    def shocks(self) -> tuple[str, ...]:
        """Names of the S shocks, by regime where there is a state."""
        return self.design.shock_names

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the J·S·H coefficients: `logip.h12`, or `logip.gs1.h12` of several shocks."""
        q, several = self.question, len(self.shocks) > 1
        return tuple(
            f"{y}.{s}.h{h}" if several else f"{y}.h{h}"
            for y in q.response
            for s in self.shocks
            for h in q.horizons
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(responses J, shocks S, horizons H)."""
        return len(self.question.response), len(self.shocks), len(self.question.horizons)

    @property
    def coefficients(self) -> int:
        """Coefficients of one horizon's regression, the shocks and all effects included."""
        return int(self.coefficients_by_horizon.max())

    @cached_property
    def coefficients_by_horizon(self) -> Int[ndarray, " H"]:
        """The same at each horizon: later ones may have fewer dates, and fewer effects of them."""
        used = rows_by_horizon(self.design, self.question.sample).T
        return np.array([coefficients(self.design, rows) for rows in used])

    @property
    def rows_used(self) -> tuple[int, ...]:
        """Rows of each horizon's regression."""
        counts = dict.fromkeys(range(self.shape[2]), 0)
        for part in self.parts:
            counts |= dict.fromkeys(part.horizons, len(part.rows))
        return tuple(counts.values())

    @cached_property
    def estimate(self) -> Float[ndarray, "J S H"]:
        """Least squares, or two-stage least squares, at each horizon."""
        out = np.empty(self.shape)
        for part in self.parts:
            found = part.fit.estimate.reshape(self.shape[1], self.shape[0], -1)
            out[:, :, list(part.horizons)] = found.transpose(1, 0, 2)
        return out

    @cached_property
    def influence(self) -> Float[ndarray, "N Q"]:
        """What each row of the table adds to each estimate; 0 where a row is not used."""
        J, S, H = self.shape
        out = np.zeros((len(self.series.period), J, S, H))
        for part in self.parts:
            psi = part.fit.influence.reshape(len(part.rows), S, J, -1).transpose(0, 2, 1, 3)
            out[np.ix_(part.rows, np.arange(J), np.arange(S), np.array(part.horizons))] = psi
        return out.reshape(len(out), -1)

    @cached_property
    def leverage(self) -> Float[ndarray, "N H"]:
        """Leverage of the rows at each horizon; 0 where a row is not used, and only there."""
        out = np.zeros((len(self.series.period), self.shape[2]))
        for part in self.parts:
            found = np.maximum(part.fit.leverage, np.finfo(float).tiny)
            out[np.ix_(part.rows, np.array(part.horizons))] = found[:, None]
        return out

    @cached_property
    def units(self) -> Float[ndarray, "J S"]:
        """Standard deviation of each response over that of each shock, given the controls."""
        J, S, _ = self.shape
        total, sizes, count = np.zeros(J), np.zeros(S), 0
        for part in self.parts:
            y = part.fit.y.reshape(len(part.rows), J, -1)
            total += (y**2).sum(axis=(0, 2))
            sizes += (part.fit.s**2).sum(axis=0) * len(part.horizons)
            count += len(part.rows) * len(part.horizons)
        return np.sqrt(total / count)[:, None] / np.sqrt(sizes / count)

    def score_rows(self, covariance: str | ScoreCovariance = "hc3") -> Float[ndarray, "R Q"]:
        """Ψ with Ψ'Ψ the joint covariance of all estimates."""
        spec = parse_scores(covariance)
        refuse_unfit(spec, self.series)
        J, S, _ = self.shape
        leverage = np.tile(self.leverage, (1, J * S))
        counts = np.tile(self.coefficients_by_horizon, J * S)
        return score_rows(self.influence, leverage, counts, spec, self.series)

    def standard_errors(self, covariance: str | ScoreCovariance = "hc3") -> Float[ndarray, "J S H"]:
        """Of each estimate."""
        rows = self.score_rows(covariance)
        return np.asarray(np.sqrt((rows**2).sum(axis=0)).reshape(self.shape))

    def moment_rows(self, j: int) -> tuple[Float[ndarray, "N q"], Float[ndarray, "N q S"]]:
        """(z ỹ, z s̃') of response j's concentrated moments g_t = z_t(ỹ_t − s̃_t'β), row by row."""
        J, S, H = self.shape
        a, b = (
            np.zeros((len(self.series.period), S, H)),
            np.zeros((len(self.series.period), S, H, S)),
        )
        for part in self.parts:
            y = part.fit.y.reshape(len(part.rows), J, -1)[:, j]
            z = part.fit.z
            at = np.ix_(part.rows, np.arange(S), np.array(part.horizons))
            a[at] = z[:, :, None] * y[:, None, :]
            b[at] = (z[:, :, None] * part.fit.s[:, None, :])[:, :, None, :]
        return a.reshape(len(a), -1), b.reshape(len(b), -1, S)

    def leverage_of(self, j: int) -> Float[ndarray, "N q"]:
        """Leverage of each row in each of a response's S·H moments."""
        return np.tile(self.leverage, (1, self.shape[1]))

    def on(self, series: Series) -> LocalProjection:
        """The same question of another table with the same columns."""
        q = self.question
        return LocalProjection(
            series, q.response, q.shock, q.instruments, q.controls, q.lags, q.horizons,
            cumulative=q.cumulative, trend=q.trend, sample=q.sample, augment=q.augment,
            state=q.state, effects=q.effects, shock_lags=q.shock_lags,
            controls_prior=self.controls_prior,
        )  # fmt: skip

    # --- what is asked ----------------------------------------------------------------------

    def posterior(
        self,
        prior: PathPrior | Mapping[str, PathPrior] = Flat(),  # noqa: B008 - frozen
        covariance: str = "",
        *,
        weighting: Weighting = "frozen",
        determinant: bool = True,
        shrinkage: Shrinkage = "auto",
    ) -> ProjectionPosterior:
        """The quasi-posterior of the responses.

        prior: `Flat()`, `Normal`, `RoughnessPenalty`, `GaussianProcess`, or a dict by response.
        covariance: `hc3` (the default for one series: White's with leverages), `hc1`, `hc0`,
            `hac`, `hac:BANDWIDTH`; in panels `cluster` (the default from 10 units on),
            `driscoll-kraay` (with fewer).
        weighting: `frozen` at the estimate, or `continuous`. determinant: of continuous weighting.
        shrinkage: `ledoit-wolf` shrinks the correlation of the estimates towards none; `auto` does
            so under a prior, which needs its inverse, with frozen weighting; `none` corrects the
            inverse by a factor.
        """
        units = len(self.series.units)
        default = "hc3" if units == 1 else "cluster" if units >= FEW_UNITS else "driscoll-kraay"
        spec = parse_scores(covariance or default)
        return ProjectionPosterior(self, spec, prior, weighting, determinant, shrinkage)

    def moments(
        self, response: str = "", covariance: str = "robust", *, concentrated: bool = True
    ) -> LinearMoments:
        """One response's moments, for `QuasiPosterior` and any of its kernels.

        response: the first when empty. covariance: of `LinearMoments.from_moments`. concentrated:
        of the responses alone; otherwise stacked with the controls, where the rows allow it.
        """
        from hakari.inference.projection_moments import concentrated_moments, stacked_moments

        make = concentrated_moments if concentrated else stacked_moments
        return make(self, response or self.question.response[0], covariance)

    def first_stage(self, covariance: str | ScoreCovariance = "hc3") -> pd.DataFrame:
        """Effective F of the instruments at each horizon."""
        from hakari.inference.projection_instruments import first_stages

        return first_stages(self, covariance)

    def anderson_rubin(
        self, level: float = 0.9, covariance: str | ScoreCovariance = "hc3"
    ) -> pd.DataFrame:
        """Anderson-Rubin set at each horizon: it covers however weak the instruments are."""
        from hakari.inference.projection_instruments import anderson_rubin_bands

        return anderson_rubin_bands(self, level, covariance)

    def control_draws(
        self, result: xr.DataTree, response: str = "", draws: int = 500, seed: int = 0
    ) -> xr.Dataset:
        """The controls' coefficients given the sampled path of one response, in one solve."""
        from hakari.inference.projection_controls import control_draws
        from hakari.inference.sampling import generator

        chance = generator(seed, "controls")
        return control_draws(self, result, response or self.question.response[0], draws, chance)

    def impulse_response(
        self,
        result: xr.DataTree,
        scale: float | Literal["sd"] = 1.0,
        *,
        anderson_rubin: float = 0.9,
    ) -> ImpulseResponse:
        """Impulse responses of a sampled posterior.

        scale: size of the shock, in its units; `sd`: one standard deviation of what the
        controls do not predict of it. anderson_rubin: level of the Anderson-Rubin sets beside
        the posterior, where there are instruments and one shock.
        """
        from hakari.inference.projection_result import impulse_response

        return impulse_response(self, result, scale, anderson_rubin)


# --- parts --------------------------------------------------------------------------------


def _names(what: str, given: str | Sequence[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{what} {name!r} is not text: name a column, or a list of columns")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{what} {sorted(twice)[0]!r} is given twice: {', '.join(names)}")
    return names


def _horizons(given: int | Iterable[int]) -> tuple[int, ...]:
    found: tuple[int, ...] = ()
    if isinstance(given, Iterable):
        found = tuple(given)
    elif isinstance(given, int | np.integer) and given < MOST_HORIZONS:
        found = tuple(range(given + 1))
    whole = all(isinstance(h, int | np.integer) for h in found)
    if not found or not whole or min(found) < 0 or list(found) != sorted(set(found)):
        raise ValueError(f"horizons {given!r}: need whole numbers from 0 up, in ascending order")
    return tuple(int(h) for h in found)


def _check(question: Question) -> None:
    for what, names in (("response", question.response), ("shock", question.shock)):
        if not names:
            raise ValueError(f"no {what}: name at least one column")
    if question.state is not None and not isinstance(question.state, str):
        raise TypeError(f"state {question.state!r} is not text: name a column")
    for what, lags in (("lags", question.lags), ("shock_lags", question.shock_lags or 0)):
        if not isinstance(lags, int | np.integer) or lags < 0:
            raise ValueError(f"{what} {lags!r}: a whole number from 0 up is needed")
    for what, value, known in (
        ("trend", question.trend, ("n", "c", "ct", "ctt")),
        ("sample", question.sample, ("common", "available")),
        ("effects", question.effects, ("unit", "unit+time", "none")),
    ):
        if value not in known:
            raise ValueError(f"{what} {value!r}: use one of {', '.join(known)}")
    few = len(question.instruments)
    if few and few < len(question.shock):
        raise ValueError(
            f"{few} instruments for {len(question.shock)} shocks: add "
            f"{len(question.shock) - few}, or drop a shock"
        )
    for name in question.instruments:
        if name in question.shock:
            raise ValueError(f"{name!r} is both shock and instrument: drop it from the instruments")
