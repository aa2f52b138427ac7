"""How strong the instruments of LP-IV are at each horizon, and bands that hold if they are weak."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import chi2

from hakari.inference.anderson_rubin import anderson_rubin
from hakari.inference.influence import ScoreCovariance, lags, parse_scores, score_rows
from hakari.inference.instruments import Strength, first_stage_arrays
from hakari.inference.moments import LinearMoments

if TYPE_CHECKING:
    from hakari.inference.local_projections import LocalProjection
    from hakari.inference.projection_parts import Part


def first_stages(lp: LocalProjection, covariance: str | ScoreCovariance = "hc3") -> pd.DataFrame:
    """Effective F (Montiel Olea and Pflueger, 2013) of each horizon's first stage.

    A row a horizon: rows used, partial R², effective F and its critical value for a bias of 10 %.
    NaN where there are several shocks. Raises ValueError without instruments.
    """
    _refuse_without(lp)
    spec = parse_scores(covariance)
    table = []
    for part in lp.parts:
        stage = _stage(lp, part, spec) if lp.shape[1] == 1 else None
        for h in part.horizons:
            row: dict[str, float] = {"horizon": lp.question.horizons[h], "rows": len(part.rows)}
            row["partial_r2"] = stage.partial_r2 if stage else np.nan
            row["effective_f"] = stage.F_effective.value if stage else np.nan
            row["critical"] = stage.F_effective.critical if stage else np.nan
            table.append(row)
    return pd.DataFrame(table).sort_values("horizon", ignore_index=True)


def anderson_rubin_bands(
    lp: LocalProjection, level: float = 0.9, covariance: str | ScoreCovariance = "hc3"
) -> pd.DataFrame:
    """Anderson and Rubin's (1949) set at each horizon: it covers however weak the instruments.

    Columns response, shock, horizon, lower, upper and pieces; the ends are those of the whole set,
    which may be infinite, or have a hole (pieces 2). Raises ValueError without instruments or
    with several shocks.
    """
    _refuse_without(lp)
    if lp.shape[1] > 1:
        raise ValueError(f"Anderson-Rubin bands need one shock, there are {', '.join(lp.shocks)}")
    spec = parse_scores(covariance)
    if lp.design.right.shape[1] == 1:
        return _one_instrument(lp, level, spec)
    table = []
    for part in lp.parts:
        y = part.fit.y.reshape(len(part.rows), lp.shape[0], -1)
        text, clusters = _equation(lp, part, spec)
        for j, response in enumerate(lp.question.response):
            for place, h in enumerate(part.horizons):
                ends = _ends(y[:, j, place], part, text, clusters, level)
                table.append((response, lp.shocks[0], lp.question.horizons[h], *ends))
    columns = ["response", "shock", "horizon", "lower", "upper", "pieces"]
    frame = pd.DataFrame(table, columns=columns)
    order = {name: i for i, name in enumerate(lp.question.response)}
    return frame.sort_values(
        ["response", "horizon"], key=lambda c: c.map(order) if c.name == "response" else c,
        ignore_index=True,
    )  # fmt: skip


def _one_instrument(lp: LocalProjection, level: float, spec: ScoreCovariance) -> pd.DataFrame:
    """(Σz(y − βs))² ≤ c Ω(β) in closed form, Ω of the projection's own covariance."""
    critical, frames = float(chi2.ppf(level, 1)), []
    for j, response in enumerate(lp.question.response):
        a, b = lp.moment_rows(j)
        H = a.shape[1]
        both = np.concatenate([a, b[:, :, 0]], axis=1)
        leverage = np.tile(lp.leverage_of(j), (1, 2))
        counts = np.tile(lp.coefficients_by_horizon, 2)
        rows = score_rows(both, leverage, counts, spec, lp.series)
        y, s = both[:, :H].sum(axis=0), both[:, H:].sum(axis=0)
        ra, rb = rows[:, :H], rows[:, H:]
        A, C, D = ((u * v).sum(axis=0) for u, v in ((ra, ra), (ra, rb), (rb, rb)))
        ends = _quadratic(s**2 - critical * D, y * s - critical * C, y**2 - critical * A)
        frame = pd.DataFrame({"horizon": lp.question.horizons} | ends)
        frame.insert(0, "shock", lp.shocks[0])
        frame.insert(0, "response", response)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _quadratic(
    p: Float[ndarray, " H"], q: Float[ndarray, " H"], r: Float[ndarray, " H"]
) -> dict[str, ndarray]:
    """Where pβ² − 2qβ + r ≤ 0: an interval, the line, or the line less an interval (2 pieces)."""
    root = np.sqrt(np.maximum(q**2 - p * r, 0.0))
    bounded = p > 0
    scale = np.where(bounded, p, 1.0)
    return {
        "lower": np.where(bounded, (q - root) / scale, -np.inf),
        "upper": np.where(bounded, (q + root) / scale, np.inf),
        "pieces": np.where(bounded | (root == 0), 1, 2),
    }


# --- parts --------------------------------------------------------------------------------


def _refuse_without(lp: LocalProjection) -> None:
    if not lp.question.instruments:
        raise ValueError("there are no instruments: this is a projection on the shock itself")


def _ends(
    y: Float[ndarray, " n"], part: Part, covariance: str, clusters: ndarray | None, level: float
) -> tuple[float, float, int]:
    if not y.any():  # a control at once
        return 0.0, 0.0, 1
    names = [f"z{m}" for m in range(part.fit.every.shape[1])]
    moments = LinearMoments.from_arrays(
        y,
        part.fit.s,
        part.fit.every,
        names=["shock"],
        instrument_names=names,
        covariance=covariance,
        clusters=clusters,
    )
    found = anderson_rubin(moments, level)
    if not found.intervals:
        return np.nan, np.nan, 0
    return found.intervals[0][0], found.intervals[-1][1], len(found.intervals)


def _stage(lp: LocalProjection, part: Part, spec: ScoreCovariance) -> Strength:
    names = lp.design.instrument_names
    text, clusters = _equation(lp, part, spec)
    found = first_stage_arrays(
        part.fit.s,
        part.fit.every,
        names=[lp.shocks[0]],
        instrument_names=names,
        covariance=text,
        clusters=clusters,
    )
    return found.stages[0]


def _equation(lp: LocalProjection, part: Part, spec: ScoreCovariance) -> tuple[str, ndarray | None]:
    """The covariance of a single equation that comes closest: White's, HAC, or by unit."""
    if spec.kind == "cluster":
        return "cluster", lp.series.unit[part.rows]
    if spec.kind == "driscoll-kraay":  # dates as clusters: no lags
        return "cluster", lp.series.period[part.rows]
    if spec.kind == "hac":
        return f"hac:{lags(spec, part.fit.every)}", None
    return "robust", None
