"""Bands of local projections by the methods that are in use, to be compared with ours.

All take the same rows: leads y (n, Q) with Q = H + 1 columns y_{t+h}, the shock s (n,) and controls
C (n, k) with the constant among them. Joint bands are sup-t: estimate ± c · standard errors with c
the quantile of max_h |N(0, correlation)_h| (Montiel Olea and Plagborg-Møller 2019); pointwise ones
take the normal quantile. `noise` is a generator, or standard normals (B, Q): the draws behind c.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

Noise = Generator | Float[ndarray, "B Q"]

DRAWS = 4_000  # behind a critical value: its error is then about 1% of it
PENALTIES = tuple(float(x) for x in np.logspace(-3, 6, 19))


@dataclass(frozen=True)
class Answer:
    """Responses by horizon and their band, all (Q,), in units of y per unit of s."""

    mean: Float[ndarray, " Q"]
    lower: Float[ndarray, " Q"]
    upper: Float[ndarray, " Q"]


def frequentist(
    y: Float[ndarray, "n Q"],
    s: Float[ndarray, " n"],
    C: Float[ndarray, "n k"],
    level: float,
    noise: Noise,
    kind: Literal["hac", "hc3"] = "hac",
    pointwise: bool = False,
) -> Answer:
    """Least squares horizon by horizon.

    hac: Newey and West with h + 1 lags at horizon h, since projection errors are MA(h); the
    correlation over horizons is that of one joint matrix with H + 1 lags. hc3: residuals over
    (1 − leverage), no lags, and the cross products of those.
    """
    fit = _fit(y, s, C)
    if kind == "hac":
        Q = y.shape[1]
        lagged = _lagged_products(fit.influence, min(Q, len(s) - 1))
        joint = _bartlett(lagged)
        own = np.array([_bartlett(lagged[: h + 2, h, h]) for h in range(Q)])
        error = np.sqrt(np.maximum(own, 0))
        return _band(fit.estimate, joint, level, noise, pointwise, error)
    if kind == "hc3":
        rows = fit.influence / np.maximum(1 - fit.leverage, 1e-9)[:, None]
        return _band(fit.estimate, rows.T @ rows, level, noise, pointwise)
    raise ValueError(f"kind {kind!r}: write 'hac' or 'hc3'")


def smooth(
    y: Float[ndarray, "n Q"],
    s: Float[ndarray, " n"],
    C: Float[ndarray, "n k"],
    level: float,
    noise: Noise,
    order: int = 3,
    penalties: tuple[float, ...] = PENALTIES,
    folds: int = 5,
    pointwise: bool = False,
) -> Answer:
    """Smooth local projections: Barnichon and Brownlees (2019).

    β(h) is a cubic B-spline with a knot a horizon, its differences of `order` penalised, so that
    order 3 tends to a parabola and 2 to a line; coefficients of controls are free at each horizon.
    Penalties are in units of the partialled shock's sum of squares; one of several is chosen by
    cross-validation over `folds` blocks of dates. The variance is the sandwich at the chosen
    penalty, Newey and West with H lags: as in the paper it leaves the penalty's bias out.
    """
    fit = _fit(y, s, C)
    smoothers = _smoothers(y.shape[1], order, tuple(penalties))
    smoother = smoothers[0]
    if len(smoothers) > 1:
        smoother = smoothers[np.argmin(_missed(y, s, C, smoothers, folds))]
    estimate = smoother @ fit.estimate
    score = fit.weight[:, None] * (fit.y - np.multiply.outer(fit.s, estimate))
    covariance = _bartlett(_lagged_products(score, min(y.shape[1] - 1, len(s) - 1)))
    return _band(estimate, smoother @ covariance @ smoother.T, level, noise, pointwise)


def pseudo_likelihood(
    y: Float[ndarray, "n Q"],
    s: Float[ndarray, " n"],
    C: Float[ndarray, "n k"],
    level: float,
    pointwise: bool = False,
) -> Answer:
    """Gaussian likelihoods, flat priors, horizons taken for independent: not calibrated.

    The posterior of β_h is normal around least squares with its classical standard error, the
    residual variance u'u / (n − k − 1) taken for known. Of Q independent normals the sup-t
    critical value is exact: Φ⁻¹((1 + level^(1/Q)) / 2).
    """
    _refuse_level(level)
    fit = _fit(y, s, C)
    variance = (fit.residual**2).sum(axis=0) / (len(s) - C.shape[1] - 1)
    error = np.sqrt(variance / (fit.s @ fit.s))
    share = level if pointwise else level ** (1 / y.shape[1])
    return _around(fit.estimate, _normal_quantile(share) * error)


def sandwich(
    y: Float[ndarray, "n Q"],
    s: Float[ndarray, " n"],
    C: Float[ndarray, "n k"],
    level: float,
    noise: Noise,
    pointwise: bool = False,
) -> Answer:
    """The pseudo-posterior with its covariance replaced by the sandwich: Müller (2013).

    Joint over horizons, Newey and West with H + 1 lags at all of them.
    """
    fit = _fit(y, s, C)
    covariance = _bartlett(_lagged_products(fit.influence, min(y.shape[1], len(s) - 1)))
    return _band(fit.estimate, covariance, level, noise, pointwise)


# --- least squares given controls ---------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """y and s less what C explains; leverage: of C and s together; weight: s / s's."""

    y: Float[ndarray, "n Q"]
    s: Float[ndarray, " n"]
    leverage: Float[ndarray, " n"]
    weight: Float[ndarray, " n"]
    estimate: Float[ndarray, " Q"]
    residual: Float[ndarray, "n Q"]

    @property
    def influence(self) -> Float[ndarray, "n Q"]:
        """What each row adds to the estimate's error."""
        return np.asarray(self.weight[:, None] * self.residual)


def _fit(y: ndarray, s: ndarray, C: ndarray) -> _Fit:
    """One QR for all horizons: Frisch, Waugh and Lovell."""
    _refuse_rows(y, s, C)
    q, _ = np.linalg.qr(C)
    y, left = y - q @ (q.T @ y), s - q @ (q.T @ s)
    size = left @ left
    if not size > 1e-18 * (s @ s):
        raise ValueError("the shock is an exact function of the controls: drop what repeats it")
    weight = left / size
    estimate = weight @ y
    leverage = (q**2).sum(axis=1) + left * weight
    return _Fit(y, left, leverage, weight, estimate, y - np.multiply.outer(left, estimate))


def _refuse_rows(y: ndarray, s: ndarray, C: ndarray) -> None:
    if not len(y) == len(s) == len(C):
        raise ValueError(f"{len(y)} rows of leads, {len(s)} of shocks, {len(C)} of controls")
    if len(s) <= C.shape[1] + 1:
        raise ValueError(
            f"{len(s)} rows for {C.shape[1] + 1} coefficients a horizon: take fewer lags"
        )


# --- covariances --------------------------------------------------------------------------


def _lagged_products(rows: Float[ndarray, "n Q"], lags: int) -> Float[ndarray, "lags1 Q Q"]:
    """Γ_l = Σ_t rows_t rows_{t−l}' for l = 0 to `lags`."""
    return np.array([rows[lag:].T @ rows[: len(rows) - lag] for lag in range(lags + 1)])


def _bartlett(lagged: ndarray) -> ndarray:
    """Newey and West (1987): Γ_0 + Σ (1 − l/(m+1)) (Γ_l + Γ_l'), m the last lag given."""
    weights = 1 - np.arange(1, len(lagged)) / len(lagged)
    half = 0.5 * lagged[0] + np.tensordot(weights, lagged[1:], axes=1)
    return np.asarray(half + half.T)


# --- smoothing ----------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _smoothers(Q: int, order: int, penalties: tuple[float, ...]) -> Float[ndarray, "P Q Q"]:
    """Matrices that take least squares β̂ to the penalised spline's values at its horizons.

    With one shock on common rows, Σ_h |y_h − s (Bθ)_h|² + κ s's |Dθ|² is s's (|β̂ − Bθ|² +
    κ |Dθ|²) and a constant: the penalty acts on β̂ alone. Cubic splines are 1/6, 4/6, 1/6 at
    their knots.
    """
    if not 1 <= order < Q:
        raise ValueError(f"order {order}: differences of {Q} horizons need 1 to {Q - 1}")
    if not penalties or not min(penalties) >= 0:
        raise ValueError(f"penalties {penalties}: give at least one, none below 0")
    basis = (np.eye(Q, Q + 2) + 4 * np.eye(Q, Q + 2, k=1) + np.eye(Q, Q + 2, k=2)) / 6
    differences = np.diff(np.eye(Q + 2), order, axis=0)
    stacked = np.array([np.vstack([basis, np.sqrt(k) * differences]) for k in penalties])
    return np.asarray(basis @ np.linalg.pinv(stacked)[:, :, :Q])


def _missed(
    y: ndarray, s: ndarray, C: ndarray, smoothers: Float[ndarray, "P Q Q"], folds: int
) -> Float[ndarray, " P"]:
    """Sum of squared errors on blocks of dates left out, by penalty."""
    if not 2 <= folds <= len(s):
        raise ValueError(f"folds {folds}: must be 2 to the number of rows, {len(s)}")
    total = np.zeros(len(smoothers))
    for out in np.array_split(np.arange(len(s)), folds):
        kept = np.ones(len(s), dtype=bool)
        kept[out] = False
        _refuse_rows(y[kept], s[kept], C[kept])
        both = np.column_stack([y, s])
        error = both[out] - C[out] @ np.linalg.lstsq(C[kept], both[kept], rcond=None)[0]
        paths = smoothers @ _fit(y[kept], s[kept], C[kept]).estimate
        e, x = error[:, :-1], error[:, -1]
        total += (e**2).sum() - 2 * paths @ (x @ e) + (x @ x) * (paths**2).sum(axis=1)
    return total


# --- bands --------------------------------------------------------------------------------


def _band(
    mean: Float[ndarray, " Q"],
    covariance: Float[ndarray, "Q Q"],
    level: float,
    noise: Noise,
    pointwise: bool,
    error: Float[ndarray, " Q"] | None = None,
) -> Answer:
    """Sup-t with the covariance's correlation, and its standard errors where none are given.

    A horizon without error, such as a shock's own response at h = 0, gets a width of zero.
    """
    _refuse_level(level)
    size = np.sqrt(np.maximum(np.diag(covariance), np.finfo(float).tiny))
    error = size if error is None else error
    if pointwise:
        return _around(mean, _normal_quantile(level) * error)
    return _around(mean, _sup_t(covariance / np.multiply.outer(size, size), level, noise) * error)


def _sup_t(correlation: Float[ndarray, "Q Q"], level: float, noise: Noise) -> float:
    """The `level` quantile of max_h |z_h|, by the symmetric root: it exists where R is singular."""
    Q = len(correlation)
    draws = noise.standard_normal((DRAWS, Q)) if isinstance(noise, Generator) else noise
    if draws.shape[1] != Q:
        raise ValueError(f"noise of {draws.shape[1]} columns for {Q} horizons: give ({DRAWS}, {Q})")
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    return float(np.quantile(np.abs(draws @ root).max(axis=1), level))


def _around(mean: Float[ndarray, " Q"], half: Float[ndarray, " Q"]) -> Answer:
    return Answer(mean, mean - half, mean + half)


def _normal_quantile(level: float) -> float:
    """The z with P(|N(0, 1)| < z) = level."""
    return NormalDist().inv_cdf((1 + level) / 2)


def _refuse_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level}: must be between 0 and 1, such as 0.9")
