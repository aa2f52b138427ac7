"""Credible regions of weighted particles, by the smallest level whose region holds θ̂.

That level, the credibility rank p_b, decides for all levels at once: the region of level c of
data set b covers if and only if p_b ≤ c, and p_b is uniform if and only if the posterior is
calibrated at every level (gibbs-calibration.md section 1.7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs import region_kernels
from hakari.inference.gibbs.particles import Particles, normalised

IN_CACHE = 2**20  # weights that are worked on at a time


@dataclass(frozen=True)
class Region:
    """A region to calibrate, by its name and what it is of.

    kind: marginal, ellipse, hpd or functional. label: of the coefficient or function.
    column: of the coefficient. function: θ (..., d) -> (...).
    """

    kind: str
    label: str
    column: int = 0
    function: Callable[[ndarray], ndarray] | None = None

    def degrees(self, d: int) -> int:
        """Dimension of the region."""
        return d if self.kind in ("ellipse", "hpd") else 1

    def values(self, theta: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch"]:
        """What a marginal or functional region is an interval of."""
        return np.asarray(
            theta[..., self.column] if self.function is None else self.function(theta)
        )


REGIONS = ("marginal", "ellipse", "hpd")


def regions_of(
    region: str | Callable[[ndarray], ndarray],
    names: Sequence[str],
    chosen: Sequence[str] | None,
) -> tuple[Region, ...]:
    """The regions meant by a name or a function of θ; marginal: one for each coefficient chosen.

    Raises ValueError for unknown names of regions or coefficients.
    """
    if callable(region):
        name = getattr(region, "__name__", "<lambda>")
        label = "functional" if name == "<lambda>" else name
        return (Region("functional", label, function=region),)
    if region not in REGIONS:
        raise ValueError(
            f"region {region!r} is unknown: use {', '.join(REGIONS)}, or a function of theta"
        )
    if region != "marginal":
        if chosen is not None:
            raise ValueError(f"coefficients= are for region='marginal', not {region!r}")
        return (Region(region, region),)
    wanted = list(names) if chosen is None else list(chosen)
    for name in wanted:
        if name not in names:
            raise ValueError(f"no coefficient {name!r}: there are {', '.join(names)}")
    return tuple(Region("marginal", name, list(names).index(name)) for name in wanted)


def check_functions(regions: Sequence[Region], theta: Float[ndarray, " d"]) -> None:
    """Raise ValueError for functions that do not take θ (..., d) to finite values (...)."""
    many = np.broadcast_to(theta, (3, 2, len(theta)))
    how = "it must take (..., d) and return (...), as theta[..., 0] does"
    for function in (r.function for r in regions if r.function is not None):
        try:
            one, found = (np.asarray(function(t), dtype=float) for t in (theta, many))
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"the function of theta failed for theta {many.shape} ({error}): {how}"
            ) from error
        if found.shape != many.shape[:-1] or one.shape:
            raise ValueError(
                f"the function of theta gave {found.shape} for theta {many.shape}: {how}"
            )
        if not np.isfinite(one):
            raise ValueError(f"the function of theta is {float(one)} at the minimiser {theta}")


def ranks(particles: Particles, region: Region, rate: float) -> Float[ndarray, " B"]:
    """Credibility rank of θ̂ in each data set's posterior at a learning rate."""
    B, N = particles.losses.shape
    step = max(1, IN_CACHE // N)
    parts = [particles.some(slice(b, b + step)) for b in range(0, B, step)]
    return np.concatenate([_ranks(part, region, rate) for part in parts])


def _ranks(particles: Particles, region: Region, rate: float) -> ndarray:
    log_weight = particles.log_weights(rate)
    weights = normalised(log_weight)
    if region.kind == "ellipse":
        return _ellipse(particles, weights)
    if region.kind == "hpd":
        higher = particles.log_prior - np.float32(rate) * particles.losses > 0
        return np.asarray((weights * higher).sum(axis=1), dtype=float)
    below = _below(particles, region, weights)
    return np.asarray(np.abs(2 * below - 1))


def _below(particles: Particles, region: Region, weights: ndarray) -> ndarray:
    """Weight of the particles on one side of θ̂."""
    gap = particles.gap
    if region.kind == "marginal":
        offsets, bound = particles.offsets[..., region.column], gap[:, region.column]
        if len(offsets) == 1 and not np.ptp(bound):
            return np.asarray(weights @ (offsets[0] <= bound[0]).astype(weights.dtype))
        return np.asarray((weights * (offsets <= bound[:, None])).sum(axis=1))
    if region.function is None:
        raise ValueError(f"region {region.kind!r} needs a function")
    at_estimate = float(np.asarray(region.function(particles.estimate)))
    value = region.function(particles.centres[:, None] + particles.offsets)
    return np.asarray((weights * (value <= at_estimate)).sum(axis=1))


def _ellipse(particles: Particles, weights: ndarray) -> ndarray:
    """Weight of the particles nearer to the mean than θ̂ is, in the posterior's own metric."""
    scale = particles.offsets.std(axis=1)
    scale[scale == 0] = 1
    x = np.ascontiguousarray((particles.offsets / scale[:, None]).transpose(0, 2, 1))
    gap = particles.gap / scale
    mean, square = region_kernels.moments(weights, x)
    spread = square - mean[:, :, None] * mean[:, None, :]
    metric = np.linalg.pinv(spread, hermitian=True)
    away = gap - mean
    own = np.einsum("bd,bde,be->b", away, metric, away)
    found: ndarray = region_kernels.nearer(weights, x, mean, metric, own)
    return found
