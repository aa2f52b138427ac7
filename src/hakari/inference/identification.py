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

from hakari.inference.covariance import products, unpack
from hakari.inference.density import Target, log_density_batch
from hakari.inference.posterior import QuasiPosterior

BARRIER = 20.0  # log units that make an improper tail invisible
_RADII = np.logspace(-1, 6, 281)


@dataclass(frozen=True)
class Tail:
    """The worst ray of a quasi-posterior, and what it says.

    barrier: log units between the mode's shell and the lowest shell beyond it, inf where the
    shells' mass falls for ever; decay: power of the radius by which their mass falls far out
    (d log mass / d log s; not below 0: improper); direction: (K,) in θ, per unit of s.
    """

    barrier: float
    decay: float
    direction: Float[ndarray, "K"]
    coefficient: str

    @property
    def improper(self) -> bool:
        """The shells' mass does not fall far out."""
        return self.decay > -0.05

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
    for d in _directions(target, white.factor):
        density = log_density_batch(target, _RADII[:, None] * d)
        mass = density + len(d) * np.log(_RADII)
        found = _read(mass, 4 + 4 * np.sqrt(len(d)))
        if worst is None or found < (worst.barrier, -worst.decay):
            ray = white.factor @ d
            share = np.abs(ray) / np.sqrt((white.factor**2).sum(axis=1))
            worst = Tail(found[0], -found[1], ray, names[_named(share, names, endogenous)])
    assert worst is not None  # noqa: S101 - there is at least one direction
    return worst


def refuse_improper(posterior: QuasiPosterior) -> Tail:
    """Raise ValueError, with the way out, where the posterior is improper within reach."""
    worst = tail(posterior)
    if worst.acceptable:
        return worst
    name = worst.coefficient
    form = "continuously updated" + ("" if posterior.determinant else ", without the determinant")
    raise ValueError(
        f"the quasi-posterior ({form}) is improper under this prior: along {name} its mass falls by "
        f"only {max(worst.barrier, 0.0):.1f} log units (at least {BARRIER:g} are needed) before it "
        f"stops falling. The data identify {name} weakly, or there are too few rows. Give a proper "
        f"prior, such as Normal(0, 1, names=[{name!r}]) (--prior '{name}=normal(0, 1)'), or use "
        "weighting='two-step'"
    )


def _named(share: Float[ndarray, "K"], names: tuple[str, ...], endogenous: tuple[str, ...]) -> int:
    """The coefficient to name: an endogenous one if it takes part, since others follow it."""
    weak = [k for k, name in enumerate(names) if name in endogenous and share[k] > share.max() / 3]
    return max(weak, key=lambda k: share[k]) if weak else int(share.argmax())


def _read(mass: Float[ndarray, "S"], inside: float) -> tuple[float, float]:
    """(barrier, −decay) of log shell masses on log-spaced radii; the mode's shell is `inside`."""
    span = np.log(_RADII[-1] / _RADII[-21])
    decay = float((mass[-1] - mass[-21]) / span) if np.isfinite(mass[-1]) else -np.inf
    near = int(mass[_RADII < inside].argmax())
    peak = mass[near]
    if near == 0 or not np.isfinite(peak):
        return 0.0, -decay
    if decay <= -0.05:
        return np.inf, -decay
    return float(peak - mass[near:].min()), -decay


def _directions(target: Target, factor: Float[ndarray, "K K"]) -> list[Float[ndarray, "K"]]:
    """Unit rays of u, both ways: each coefficient's own, and from there to the weakest limit."""
    K = len(factor)
    own = factor / np.sqrt((factor**2).sum(axis=1))[:, None]
    rays = [*own, *np.eye(K)]
    if target.continuous:
        limits = [_limit(target, d) for d in own]
        for index in np.argsort(limits)[:3]:
            rays.append(_weakest(target, own[index]))
    return [sign * d for d in rays for sign in (1.0, -1.0)]


def _far_covariance(target: Target, d: Float[ndarray, "K"]) -> Float[ndarray, "L L"]:
    """Ω(s d)/s² as s → ∞."""
    p = np.concatenate([[0.0], d])
    if len(target.rows_z):
        weighted = target.rows_z * (target.rows_w @ p)[:, None]
        return weighted.T @ weighted / target.n  # type: ignore[no-any-return]
    return unpack(target.tensor @ products(p), target.slope.shape[0])


def _limit(target: Target, d: Float[ndarray, "K"]) -> float:
    """n (R d)'[E zz'(x'd)²]⁻¹(R d): the criterion far out along d."""
    move = target.slope @ d
    return float(target.n * move @ np.linalg.lstsq(_far_covariance(target, d), move, rcond=None)[0])


def _weakest(target: Target, d: Float[ndarray, "K"]) -> Float[ndarray, "K"]:
    """Follow d to a ray of lower limit: the least eigenvector with the covariance held, in turn."""
    best, least = d, _limit(target, d)
    for _ in range(15):
        inverse = np.linalg.pinv(_far_covariance(target, d))
        d = np.linalg.eigh(target.slope.T @ inverse @ target.slope)[1][:, 0]
        limit = _limit(target, d)
        if limit < least:
            best, least = d, limit
    return best
