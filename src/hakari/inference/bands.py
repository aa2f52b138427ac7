"""Simultaneous bands of draws: sup-t and its quantile form, Bonferroni, Šidák, highest density.

Montiel Olea and Plagborg-Møller (2019), 'Simultaneous confidence bands'; Inoue and Kilian
(2013) for the draws of highest density. A draw is inside a band if all its coordinates are.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from math import ceil

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import norm, rankdata

KINDS = ("pointwise", "sup-t", "quantile", "bonferroni", "sidak", "highest-density")
ROUNDING = 1e-13  # a spread smaller than this share of the draws is that of rounding: x / x = 1


@dataclass(frozen=True)
class Band:
    """`lower` and `upper` (q,), and `inside`, the share of the draws wholly between them.

    critical: standard deviations that the band reaches on either side, NaN where it is not
    made so.
    """

    lower: Float[ndarray, " q"]
    upper: Float[ndarray, " q"]
    level: float
    kind: str
    critical: float
    inside: float


def band(
    draws: Float[ndarray, "N q"],
    level: float,
    kind: str = "sup-t",
    log_density: Float[ndarray, " N"] | None = None,
) -> Band:
    """The band of one of `KINDS`; log_density is read by 'highest-density' only.

    Raises ValueError for an unknown kind, a level outside (0, 1), fewer than 2 / (1 − level)
    draws, and draws that are not finite.

    >>> draws = np.linspace(-1.0, 1.0, 201)[:, None]
    >>> band(draws, 0.9, "pointwise").upper
    array([0.9])
    """
    if kind == "pointwise":
        lower, upper = pointwise(draws, level)
        return _band(draws, lower, upper, level, kind)
    if kind == "highest-density":
        return highest_density(draws, level, log_density)
    routes = {"sup-t": sup_t, "quantile": sup_t_quantile, "bonferroni": bonferroni, "sidak": sidak}
    if kind not in routes:
        near = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no band of kind {kind!r}{hint} (kinds: {', '.join(KINDS)})")
    return routes[kind](draws, level)


def pointwise(
    draws: Float[ndarray, "N q"], level: float
) -> tuple[Float[ndarray, " q"], Float[ndarray, " q"]]:
    """Equal-tailed quantiles of each coordinate by itself: no joint statement."""
    _check(draws, level)
    lower, upper = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return lower, upper


def sup_t(
    draws: Float[ndarray, "N q"],
    level: float,
    centre: Float[ndarray, " q"] | None = None,
    spread: Float[ndarray, " q"] | None = None,
) -> Band:
    """Mean ± c sd, c the level quantile over draws of max_h |draw_h − mean_h| / sd_h.

    c is the ⌈level N⌉-th smallest of them, so that exactly so many draws are inside (more only
    where draws repeat). centre, spread: in place of mean and sd. Coordinates that do not vary
    are left out of the maximum and get the draws' range. Montiel Olea and Plagborg-Møller
    (2019), algorithm 1.
    """
    _check(draws, level)
    middle = draws.mean(axis=0) if centre is None else centre
    scale = draws.std(axis=0, ddof=1) if spread is None else spread
    moves = _moves(draws, scale)
    far = np.abs(draws[:, moves] - middle[moves]) / scale[moves]
    distance = far.max(axis=1, initial=0.0)
    critical = _order_statistic(distance, level)
    # rounding of mean ± c sd must not push out the very draws that set it
    kept = draws[distance <= critical]
    reach = critical * scale[moves]
    lower, upper = draws.min(axis=0), draws.max(axis=0)
    lower[moves] = np.minimum(middle[moves] - reach, kept[:, moves].min(axis=0))
    upper[moves] = np.maximum(middle[moves] + reach, kept[:, moves].max(axis=0))
    return _band(draws, lower, upper, level, "sup-t", critical)


def sup_t_quantile(draws: Float[ndarray, "N q"], level: float) -> Band:
    """Pointwise quantiles, widened until a share `level` of the draws is wholly inside.

    The ends are the k-th smallest and largest of each coordinate, for the largest k that keeps
    enough; one step of k costs up to 2q draws, so `inside` can be above the level by 2q / N.
    Follows skewed draws, needs no moments. Montiel Olea and Plagborg-Møller (2019), algorithm 2.
    """
    _check(draws, level)
    below = rankdata(draws, method="max", axis=0)
    above = len(draws) + 1 - rankdata(draws, method="min", axis=0)
    depth = np.minimum(below, above).min(axis=1).astype(int)
    k = int(np.sort(depth)[len(draws) - _count(level, len(draws))])
    ordered = np.sort(draws, axis=0)
    return _band(draws, ordered[k - 1], ordered[len(draws) - k], level, "quantile")


def bonferroni(draws: Float[ndarray, "N q"], level: float) -> Band:
    """Mean ± z sd, z of level 1 − (1 − level) / q: Gaussian, whatever the correlation."""
    _check(draws, level)
    spread = draws.std(axis=0, ddof=1)
    tail = (1 - level) / (2 * max(int(_moves(draws, spread).sum()), 1))
    return _around(draws, spread, level, "bonferroni", float(norm.isf(tail)))


def sidak(draws: Float[ndarray, "N q"], level: float) -> Band:
    """Mean ± z sd, z of level^(1/q): exact for independent Gaussians, else wider than needed."""
    _check(draws, level)
    spread = draws.std(axis=0, ddof=1)
    each = level ** (1 / max(int(_moves(draws, spread).sum()), 1))
    return _around(draws, spread, level, "sidak", float(norm.isf((1 - each) / 2)))


def highest_density(
    draws: Float[ndarray, "N q"], level: float, log_density: Float[ndarray, " N"] | None = None
) -> Band:
    """Envelope of the ⌈level N⌉ draws of highest density (Inoue and Kilian, 2013).

    log_density: of each draw, up to a constant; None: Gaussian with the draws' covariance. Draws
    that come to lie in the envelope without being kept count in `inside`, so it is above level.
    Raises ValueError where so few draws span the covariance that all are equally far.
    """
    _check(draws, level)
    density = _gaussian(draws) if log_density is None else np.asarray(log_density, dtype=float)
    if density.shape != (len(draws),) or np.isnan(density).any():
        raise ValueError(
            f"log_density of shape {density.shape} with {int(np.isnan(density).sum())} NaN: need "
            f"a number for each of {len(draws)} draws"
        )
    kept = draws[-density <= _order_statistic(-density, level)]
    return _band(draws, kept.min(axis=0), kept.max(axis=0), level, "highest-density")


def critical_value(
    correlation: Float[ndarray, "q q"], level: float, noise: Float[ndarray, "N q"]
) -> float:
    """The sup-t critical value of N(0, correlation), by N rows of standard normal noise.

    The correlation may be singular. Raises ValueError for what is not a correlation.
    """
    _check(noise, level)
    values, vectors = np.linalg.eigh(correlation)
    unit = np.abs(np.diag(correlation) - 1).max()
    skew = np.abs(correlation - correlation.T).max()
    if max(unit, skew, -values[0]) > 1e-8:
        raise ValueError(
            f"not a correlation: its diagonal is off 1 by {unit:.3g}, its symmetry by {skew:.3g}, "
            f"its smallest eigenvalue is {values[0]:.3g}; divide a covariance by its deviations"
        )
    factor = vectors * np.sqrt(values.clip(min=0))
    return _order_statistic(np.abs(noise @ factor.T).max(axis=1), level)


# --- parts --------------------------------------------------------------------------------


def _check(draws: Float[ndarray, "N q"], level: float) -> None:
    """Raise ValueError unless level, number and values of the draws allow a band."""
    if not 0 < level < 1:
        raise ValueError(f"level {level}: a share between 0 and 1 is needed, such as 0.9")
    if draws.ndim != 2 or draws.shape[1] == 0:
        raise ValueError(f"draws of shape {draws.shape}: need (draws, coordinates)")
    least = ceil(2 / (1 - level) - 1e-9)
    if len(draws) < least:
        raise ValueError(
            f"{len(draws)} draws for a band of level {level:g}: at least {least} are needed, one "
            "in each tail; draw more or lower the level"
        )
    bad = ~np.isfinite(draws)
    if bad.any():
        column = int(bad.any(axis=0).argmax())
        raise ValueError(
            f"{int(bad[:, column].sum())} of {len(draws)} draws of coordinate {column} are not "
            "finite: leave the coordinate or those draws out"
        )


def _count(level: float, draws: int) -> int:
    """⌈level · draws⌉, where the product's rounding is no draw more."""
    return ceil(level * draws - 1e-9)


def _order_statistic(values: Float[ndarray, " N"], level: float) -> float:
    return float(np.sort(values)[_count(level, len(values)) - 1])


def _moves(draws: Float[ndarray, "N q"], spread: Float[ndarray, " q"]) -> ndarray:
    """Which coordinates (q,) vary by more than rounding."""
    moves: ndarray = spread > ROUNDING * np.abs(draws).max(axis=0)
    return moves


def _around(
    draws: Float[ndarray, "N q"],
    spread: Float[ndarray, " q"],
    level: float,
    kind: str,
    critical: float,
) -> Band:
    """Mean ± critical · spread; the draws' range where they do not vary."""
    mean, moves = draws.mean(axis=0), _moves(draws, spread)
    lower = np.where(moves, mean - critical * spread, draws.min(axis=0))
    upper = np.where(moves, mean + critical * spread, draws.max(axis=0))
    return _band(draws, lower, upper, level, kind, critical)


def _band(
    draws: Float[ndarray, "N q"],
    lower: Float[ndarray, " q"],
    upper: Float[ndarray, " q"],
    level: float,
    kind: str,
    critical: float = float("nan"),
) -> Band:
    inside = ((lower <= draws) & (draws <= upper)).all(axis=1).mean()
    return Band(lower, upper, level, kind, critical, float(inside))


def _gaussian(draws: Float[ndarray, "N q"]) -> Float[ndarray, " N"]:
    """−½ Mahalanobis' distance by the draws' covariance, its null space left out."""
    spread = draws.std(axis=0, ddof=1)
    moves = _moves(draws, spread)
    if not moves.any():
        return np.zeros(len(draws))
    unit = (draws[:, moves] - draws[:, moves].mean(axis=0)) / spread[moves]
    values, vectors = np.linalg.eigh(unit.T @ unit / (len(draws) - 1))
    large = values > 1e-10 * values[-1]
    if large.sum() >= len(draws) - 1:
        raise ValueError(
            f"{len(draws)} draws span a covariance of rank {int(large.sum())}, so that all have "
            "the same density: draw more, or give log_density"
        )
    scores = unit @ (vectors[:, large] / np.sqrt(values[large]))
    density: ndarray = -0.5 * (scores**2).sum(axis=1)
    return density
