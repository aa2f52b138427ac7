"""Point estimates to lay beside a posterior: our GMM, and linearmodels' on the same rows.

linearmodels needs every row in memory and shares no code with this package, so that
agreement to many digits says that both read the data and the formula alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.covariance import Covariance
from hakari.inference.formula import parse_formula, read_blocks
from hakari.inference.gmm import Estimate, Statistic, estimate
from hakari.inference.moments import LinearMoments
from hakari.inference.tables import Missing

MOST_ROWS = 1_000_000
MOST_WORK = 50_000_000  # rows · moments · parameters: linearmodels' CUE passes over rows often
SOURCE = "hakari"


@dataclass(frozen=True)
class PointEstimate:
    """A named estimate with standard errors; NaN with the reason in `note` where there is none."""

    label: str
    source: str
    names: tuple[str, ...]
    theta: Float[ndarray, " K"]
    std_error: Float[ndarray, " K"]
    J: Statistic
    note: str | None = None


def point_estimates(moments: LinearMoments) -> list[PointEstimate]:
    """Two-step and continuously updated GMM, from the sufficient statistics."""
    found = []
    for label, method in (("IV-GMM", "two-step"), ("CUE", "cue")):
        one: Estimate = estimate(moments, method)  # type: ignore[arg-type]
        found.append(
            PointEstimate(label, SOURCE, one.names, one.theta, one.std_error, one.J, one.note)
        )
    return found


def linearmodels_estimates(
    formula: str,
    data: Any,
    moments: LinearMoments,
    *,
    weights: str | None = None,
    missing: Missing = "raise",
) -> list[PointEstimate]:
    """Two-stage least squares, IVGMM and IVGMMCUE by linearmodels; none beyond a million rows.

    The covariance is that of `moments`, a bandwidth chosen from the data included.
    """
    if moments.n > MOST_ROWS:
        return []
    from linearmodels.iv import IV2SLS, IVGMM, IVGMMCUE

    spec = moments.covariance
    table, clusters = _tables(formula, data, spec, weights, missing)
    kind, options = _options(spec, clusters)
    weighting = options | ({} if kind == "unadjusted" else {"center": spec.centred})
    if kind == "unadjusted":
        weighting = {"center": spec.centred}
    models: dict[str, Callable[[], Any]] = {
        "2SLS": lambda: IV2SLS(**table).fit(cov_type=kind, **options),
        "IV-GMM": lambda: IVGMM(**table, weight_type=kind, **weighting).fit(
            cov_type=kind, **options
        ),
        "CUE": lambda: IVGMMCUE(**table, weight_type=kind, **weighting).fit(
            cov_type=kind, **options
        ),
    }
    if _work(moments) > MOST_WORK:
        del models["CUE"]
    return [_fitted(label, fit, moments) for label, fit in models.items()]


def _work(moments: LinearMoments) -> float:
    """Multiply-adds of one of linearmodels' criteria, which CUE asks for again and again."""
    spec, lags = moments.covariance, 1.0
    if spec.kind == "hac":
        whole = spec.kernel == "quadratic-spectral"
        lags = moments.n if whole else 1 + (spec.bandwidth or 0)
    return moments.n * moments.L * moments.K * lags


def disagreement(estimates: list[PointEstimate]) -> float:
    """Largest difference of ours from linearmodels' estimates and errors, in standard errors.

    NaN where there is nothing to compare.
    """
    ours = {e.label: e for e in estimates if e.source == SOURCE}
    gaps = [
        np.abs(values) / ours[e.label].std_error
        for e in estimates
        if e.source != SOURCE and e.label in ours
        for values in (e.theta - ours[e.label].theta, e.std_error - ours[e.label].std_error)
    ]
    return float(np.max(gaps)) if gaps else float("nan")


def _fitted(label: str, fit: Callable[[], Any], moments: LinearMoments) -> PointEstimate:
    from importlib.metadata import version

    source, names = f"linearmodels {version('linearmodels')}", moments.names.parameters
    nothing = np.full(len(names), np.nan)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = fit()
        except (ValueError, np.linalg.LinAlgError) as error:
            reason = Statistic.unavailable(str(error))
            return PointEstimate(label, source, names, nothing, nothing, reason, str(error))
    note = "; ".join(sorted({str(w.message).strip().splitlines()[0] for w in said})) or None
    return PointEstimate(
        label,
        source,
        names,
        found.params.loc[list(names)].to_numpy(),
        found.std_errors.loc[list(names)].to_numpy(),
        _hansen(label, found, moments.L - moments.K),
        note,
    )


def _hansen(label: str, found: Any, df: int) -> Statistic:
    if label == "2SLS":
        return Statistic.unavailable("two-stage least squares has no J", df)
    if df == 0:
        return Statistic.unavailable("no restriction to test", 0)
    return Statistic(float(found.j_stat.stat), df, float(found.j_stat.pval))


def _tables(
    formula: str, data: Any, spec: Covariance, weights: str | None, missing: Missing
) -> tuple[dict[str, Any], ndarray | None]:
    """Arguments of linearmodels: frames of y, exogenous, endogenous and instruments."""
    read = read_blocks(parse_formula(formula), data, weights, spec.column, missing)
    whole = list(read)
    columns, blocks = whole[0][0], [block for _, block in whole]
    exogenous = len(columns.parameters) - len(columns.endogenous)
    X, Z = np.vstack([b.X for b in blocks]), np.vstack([b.Z for b in blocks])
    parts = {
        "exog": (X[:, :exogenous], columns.parameters[:exogenous]),
        "endog": (X[:, exogenous:], columns.endogenous),
        "instruments": (Z[:, exogenous:], columns.moments[exogenous:]),
    }
    table: dict[str, Any] = {
        name: pd.DataFrame(values, columns=labels) if labels else None
        for name, (values, labels) in parts.items()
    }
    table["dependent"] = pd.Series(np.concatenate([b.y for b in blocks]), name="dependent")
    if weights is not None:
        table["weights"] = np.concatenate([b.weights for b in blocks])
    if spec.kind != "cluster":
        return table, None
    labels = np.concatenate([b.clusters for b in blocks])
    return table, np.unique(labels, return_inverse=True)[1]


def _options(spec: Covariance, clusters: ndarray | None) -> tuple[str, dict[str, Any]]:
    """What linearmodels calls a covariance."""
    if spec.kind == "cluster":
        return "clustered", {"clusters": clusters}
    if spec.kind == "hac":
        kernel = "qs" if spec.kernel == "quadratic-spectral" else spec.kernel
        return "kernel", {"kernel": kernel, "bandwidth": spec.bandwidth}
    return {"iid": "unadjusted", "robust": "robust"}[spec.kind], {}
