"""Is the quasi-posterior proper, and how far does its tail hang on the prior?

Continuous updating bounds the criterion along a ray θ̂ + s d, while a shell's volume grows:
without a proper prior the mass may be infinite, or hang on a barrier of few log units when
instruments are weak. quasi-posteriors.md 'Weak identification and misuse'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.density import log_density_batch
from hakari.inference.posterior import QuasiPosterior

BARRIER = 15.0  # log units: a million draws do not see what lies behind
RADII = np.logspace(-1, 6, 57)


@dataclass(frozen=True)
class Tail:
    """The worst ray of a quasi-posterior, and what it says.

    barrier: log units between the mode's shell and the lowest shell beyond it, inf where the
    shells' mass falls for ever; decay: power of the radius by which their mass falls far out
    (d log mass / d log s; not below 0: improper); direction: (K,) in θ, per unit of s.
    """

    barrier: float
    decay: float
    depth: float  # log units between the mode's shell and the highest one far out
    direction: Float[ndarray, " K"]
    coefficient: str

    @property
    def improper(self) -> bool:
        """The shells' mass does not fall far out."""
        return self.decay > -0.05

    @property
    def moments_missing(self) -> str:
        """Which of mean and variance the tail leaves without a value, if it is within reach."""
        if self.depth > BARRIER or self.decay < -2.05:
            return ""
        if self.decay < -1.05:
            return f"the variance of {self.coefficient} does not exist"
        return f"neither mean nor variance of {self.coefficient} exists"

    @property
    def acceptable(self) -> bool:
        """Proper, or improper behind a barrier so high that no sampler ever sees it."""
        return not self.improper or self.barrier >= BARRIER


def tail(posterior: QuasiPosterior) -> Tail:
    """The ray along which the posterior's mass falls least; costs a few thousand evaluations."""
    white = posterior.whitened
    target = white.target
    names, endogenous = posterior.moments.names.parameters, posterior.moments.names.endogenous
    worst: Tail | None = None
    rays = _directions(white.factor)
    points = np.concatenate([RADII[:, None] * d for d in rays])
    densities = log_density_batch(target, points).reshape(len(rays), -1)
    for d, density in zip(rays, densities, strict=True):
        mass = density + len(d) * np.log(RADII)
        found = shell_barrier(mass, 4 + 4 * np.sqrt(len(d)))
        if worst is None or found < (worst.barrier, -worst.decay, worst.depth):
            ray = white.factor @ d
            share = np.abs(ray) / np.sqrt((white.factor**2).sum(axis=1))
            worst = Tail(
                found[0], -found[1], found[2], ray, names[_named(share, names, endogenous)]
            )
    assert worst is not None
    return worst


def refuse_improper(posterior: QuasiPosterior) -> Tail:
    """Raise ValueError, with the way out, where the posterior is improper within reach."""
    worst = tail(posterior)
    if worst.acceptable:
        return worst
    name = worst.coefficient
    form = "continuously updated" + ("" if posterior.determinant else ", without the determinant")
    raise ValueError(
        f"the quasi-posterior ({form}) is improper under this prior: along {name} its mass falls "
        f"by only {max(worst.barrier, 0.0):.1f} log units (at least {BARRIER:g} are needed) before "
        f"it stops falling. The data identify {name} weakly, or there are too few rows. Give a "
        f"proper prior on it ({_way_out(posterior, name)}), or use weighting='two-step'"
    )


def _way_out(posterior: QuasiPosterior, name: str) -> str:
    if name in posterior.moments.names.endogenous and posterior.moments.grams is not None:
        return "such as weak_prior(moments), --prior weak"
    return f"such as Normal(mean, variance, names=[{name!r}]), --prior '{name}=normal(MEAN, SD)'"


def _named(share: Float[ndarray, " K"], names: tuple[str, ...], endogenous: tuple[str, ...]) -> int:
    """The coefficient to name: an endogenous one if it takes part, since others follow it."""
    weak = [k for k, name in enumerate(names) if name in endogenous and share[k] > share.max() / 3]
    return max(weak, key=lambda k: share[k]) if weak else int(share.argmax())


def shell_barrier(mass: Float[ndarray, " S"], inside: float) -> tuple[float, float, float]:
    """(barrier, −decay, depth) of log shell masses on `RADII`; the mode's shell is `inside`."""
    span = np.log(RADII[-1] / RADII[-5])
    decay = float((mass[-1] - mass[-5]) / span) if np.isfinite(mass[-1]) else -np.inf
    near = int(mass[inside > RADII].argmax())
    peak = mass[near]
    if near == 0 or not np.isfinite(peak):
        return 0.0, -decay, 0.0
    depth = float(peak - mass[RADII > 100].max())
    if decay <= -0.05:
        return np.inf, -decay, depth
    return float(peak - mass[near:].min()), -decay, depth


def _directions(factor: Float[ndarray, "K K"]) -> list[Float[ndarray, " K"]]:
    """Unit rays of u, both ways, along which each coefficient moves and the others follow."""
    own = factor / np.sqrt((factor**2).sum(axis=1))[:, None]
    return [sign * d for d in own for sign in (1.0, -1.0)]
