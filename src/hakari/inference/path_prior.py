"""Priors over a response as a path across horizons: roughness penalties and Gaussian processes.

Given its smoothness τ a path is Gaussian, β ~ N(mean, (structure/τ² + fixed)⁻¹); `structure` has
rank r and `fixed` makes the rest proper. τ is in units of the response's standard deviation over
the shock's. local-projections.md 'Priors'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gamma as gamma_function
from math import lgamma, log, pi, sqrt
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import null_space
from scipy.special import kv

from hakari.inference.prior import Flat, Normal, prior_blocks
from hakari.inference.projection_design import near

Smoothness = float | Literal["half-cauchy", "gamma", "gcv", "marginal"]
RULES = ("half-cauchy", "gamma", "gcv", "marginal")
SPACINGS = ("even", "log", "marginal")
LENGTHS = 12  # candidates for a process's length, from the horizons' spacing to their span


@dataclass(frozen=True)
class RoughnessPenalty:
    """Gaussian Markov random field of `order` 1 to 3: differences of the path are N(0, τ²).

    smoothness: τ itself; `half-cauchy` or `gamma`: sampled; `gcv` or `marginal`: chosen by
    generalised cross-validation or the marginal quasi-likelihood. scale: of the half-Cauchy on τ.
    shape, rate: of the gamma on 1/τ². level: standard deviation of the height of what the
    differences leave free (constant, line, parabola). spacing: distances of horizons, `even` as
    they are, in `log`(1 + h), for responses that bend early and then flatten, or the likelier
    of the two by the marginal quasi-likelihood (`marginal`). τ, scale and level are in units of the
    response's standard deviation over the shock's, given the controls.

    >>> RoughnessPenalty(order=2)  # doctest: +ELLIPSIS
    RoughnessPenalty(order=2, ..., spacing='marginal')
    """

    order: int = 2
    smoothness: Smoothness = "half-cauchy"
    scale: float = 0.5
    shape: float = 1.0
    rate: float = 0.01
    level: float = 10.0
    spacing: Literal["even", "log", "marginal"] = "marginal"


@dataclass(frozen=True)
class GaussianProcess:
    """Matérn process over horizons with mean zero and standard deviation τ.

    nu: 0.5, 1.5 or 2.5; length: in horizons, or `marginal`, chosen by the marginal
    quasi-likelihood. smoothness, scale, shape, rate: of τ, as in `RoughnessPenalty`.
    """

    nu: float = 1.5
    length: float | Literal["marginal"] = "marginal"
    smoothness: Smoothness = "half-cauchy"
    scale: float = 1.0
    shape: float = 1.0
    rate: float = 0.01


PathPrior = Flat | Normal | RoughnessPenalty | GaussianProcess


@dataclass(frozen=True)
class PathForm:
    """A prior on q coefficients of one response: precision root'root/τ² + fixed, and the mean."""

    root: Float[ndarray, "r q"]
    fixed: Float[ndarray, "q q"]
    mean: Float[ndarray, " q"]
    smoothness: Smoothness | None  # None: nothing to smooth
    scale: float
    shape: float
    rate: float
    label: str
    log_structure: float  # log of the pseudo-determinant of root'root
    log_fixed: float  # and of fixed

    @property
    def sampled(self) -> bool:
        """Whether τ has a prior of its own."""
        return self.smoothness in ("half-cauchy", "gamma")

    @property
    def proper(self) -> bool:
        """Whether the path has a proper prior in every direction."""
        precision = self.root.T @ self.root + self.fixed
        return bool(np.linalg.matrix_rank(precision) == len(precision))

    def log_hyper(self, log_tau: Float[ndarray, "*batch"]) -> Float[ndarray, "*batch"]:
        """Log density of log τ under its prior; 0 where τ is not sampled."""
        log_tau = np.asarray(log_tau, dtype=float)
        if self.smoothness == "half-cauchy":  # Polson and Scott (2012)
            shifted = 2 * (log_tau - log(self.scale))
            return np.asarray(log(2 / pi) - np.logaddexp(0, shifted) + shifted / 2)
        if self.smoothness == "gamma":
            a, b = self.shape, self.rate
            inverse = -2 * log_tau  # log of the precision
            density = a * (log(b) + inverse) - b * np.exp(np.minimum(inverse, 500)) - lgamma(a)
            return np.asarray(density + log(2))
        return np.zeros_like(log_tau)

    def log_path(
        self, path: Float[ndarray, "N q"], log_tau: Float[ndarray, " N"]
    ) -> Float[ndarray, " N"]:
        """Log density of paths given τ, over the directions where it is proper."""
        gap = path - self.mean
        rough = ((gap @ self.root.T) ** 2).sum(axis=1)
        held = np.einsum("nq,qp,np->n", gap, self.fixed, gap)
        rank = len(self.root)
        constant = 0.5 * (self.log_structure + self.log_fixed) - 0.5 * len(self.mean) * log(2 * pi)
        return np.asarray(constant - rank * log_tau - 0.5 * (rough * np.exp(-2 * log_tau) + held))


def forms(
    prior: PathPrior, names: Sequence[str], horizons: Sequence[int], units: Float[ndarray, " S"]
) -> list[PathForm]:
    """The prior on one response's paths to each shock; several where a length is to be chosen.

    names: of its S·H coefficients, shock by shock; units (S,): the response's standard deviation
    over the shock's. None for `Flat`. Raises ValueError for what a prior cannot be.
    """
    if isinstance(prior, Flat):
        return []
    if isinstance(prior, Normal):
        return [_normal(prior, names)]
    _check_smoothness(prior)
    if isinstance(prior, RoughnessPenalty):
        return _roughness(prior, horizons, units)
    if isinstance(prior, GaussianProcess):
        return _processes(prior, horizons, units)
    raise TypeError(
        f"prior {prior!r}: use Flat, Normal, RoughnessPenalty or GaussianProcess, or a dict of "
        "them by response"
    )


def by_response(
    prior: PathPrior | Mapping[str, PathPrior], responses: Sequence[str]
) -> dict[str, PathPrior]:
    """The prior of each response; those that a mapping leaves out are flat."""
    if not isinstance(prior, Mapping):
        return dict.fromkeys(responses, prior)
    for name in prior:
        if name not in responses:
            raise ValueError(
                f"prior for unknown response {name!r}{near(name, responses)} "
                f"(responses: {', '.join(responses)})"
            )
    return {name: prior.get(name, Flat()) for name in responses}


def differences(horizons: Sequence[float] | ndarray, order: int) -> Float[ndarray, "d H"]:
    """Differences of `order`, divided where horizons are unevenly spaced; of 1 if spaced by 1."""
    h = np.asarray(horizons, dtype=float)
    operator = np.eye(len(h))
    for step in range(1, order + 1):
        operator = np.diff(operator, axis=0) * (step / (h[step:] - h[:-step]))[:, None]
    return operator


def matern(horizons: Sequence[int], nu: float, length: float) -> Float[ndarray, "H H"]:
    """Matérn correlation; Rasmussen and Williams (2006), eq. 4.14."""
    h = np.asarray(horizons, dtype=float)
    x = sqrt(2 * nu) * np.abs(h[:, None] - h) / length
    with np.errstate(invalid="ignore"):
        found = 2 ** (1 - nu) / gamma_function(nu) * x**nu * kv(nu, x)
    return np.where(x == 0, 1.0, found)


# --- parts --------------------------------------------------------------------------------


def _normal(prior: Normal, names: Sequence[str]) -> PathForm:
    (block,) = prior_blocks(prior, names)
    fixed = block.root.T @ block.root
    mean = np.zeros(len(names))
    mean[list(block.positions)] = block.mean
    return PathForm(
        np.empty((0, len(names))),
        fixed,
        mean,
        None,
        1.0,
        1.0,
        1.0,
        "normal",
        0.0,
        _log_pseudo_determinant(fixed),
    )


def _roughness(
    prior: RoughnessPenalty, horizons: Sequence[int], units: Float[ndarray, " S"]
) -> list[PathForm]:
    if prior.order not in (1, 2, 3):
        raise ValueError(f"order {prior.order!r} of a roughness penalty: use 1, 2 or 3")
    if len(horizons) <= prior.order:
        raise ValueError(
            f"a roughness penalty of order {prior.order} needs more than {prior.order} horizons, "
            f"there are {len(horizons)}: lower the order or add horizons"
        )
    _positive("level", prior.level)
    if prior.spacing not in SPACINGS:
        raise ValueError(f"spacing {prior.spacing!r}: use one of {', '.join(SPACINGS)}")
    spacings = ("even", "log") if prior.spacing == "marginal" else (prior.spacing,)
    return [_penalty(prior, horizons, units, spacing) for spacing in spacings]


def _penalty(
    prior: RoughnessPenalty, horizons: Sequence[int], units: Float[ndarray, " S"], spacing: str
) -> PathForm:
    at = np.asarray(horizons, dtype=float)
    if spacing == "log":
        bent = np.log1p(at)
        at = bent * np.ptp(at) / np.ptp(bent)
    D = differences(at, prior.order)
    free = null_space(D)
    root = np.kron(np.diag(1 / units), D)
    fixed = np.kron(np.diag(units**-2.0), free @ free.T) / (len(at) * prior.level**2)
    label = f"roughness of order {prior.order}" + " in log horizons" * (spacing == "log")
    return _form(prior, root, fixed, label)


def _processes(
    prior: GaussianProcess, horizons: Sequence[int], units: Float[ndarray, " S"]
) -> list[PathForm]:
    if prior.nu not in (0.5, 1.5, 2.5):
        raise ValueError(f"nu {prior.nu!r} of a Gaussian process: use 0.5, 1.5 or 2.5")
    span = max(float(horizons[-1] - horizons[0]), 1.0)
    if prior.length == "marginal":
        lengths = np.geomspace(1.0, 2 * span, LENGTHS)
    else:
        _positive("length", prior.length)
        lengths = np.array([float(prior.length)])
    found = []
    for length in lengths:
        correlation = matern(horizons, prior.nu, length) + 1e-8 * np.eye(len(horizons))
        root = np.linalg.inv(np.linalg.cholesky(correlation))
        label = f"Gaussian process (Matérn {prior.nu:g}, length {length:.3g})"
        whole = np.kron(np.diag(1 / units), root)
        found.append(_form(prior, whole, np.zeros((whole.shape[1],) * 2), label))
    return found


def _form(
    prior: RoughnessPenalty | GaussianProcess, root: ndarray, fixed: ndarray, label: str
) -> PathForm:
    return PathForm(
        root,
        fixed,
        np.zeros(root.shape[1]),
        prior.smoothness,
        prior.scale,
        prior.shape,
        prior.rate,
        label,
        # of full row rank, however far apart the units of several shocks are
        float(np.linalg.slogdet(root @ root.T)[1]),
        _log_pseudo_determinant(fixed),
    )


def _log_pseudo_determinant(matrix: ndarray) -> float:
    if not matrix.any():
        return 0.0
    values = np.linalg.eigvalsh(matrix)
    return float(np.log(values[values > 1e-10 * values[-1]]).sum())


def _check_smoothness(prior: Any) -> None:
    rule = getattr(prior, "smoothness", None)
    if isinstance(rule, str) and rule not in RULES:
        raise ValueError(
            f"smoothness {rule!r}: a number (the standard deviation τ) or one of {', '.join(RULES)}"
        )
    if rule is not None and not isinstance(rule, str):
        _positive("smoothness", rule)
    for name in ("scale", "shape", "rate"):
        _positive(name, getattr(prior, name, 1.0))


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float | np.number) or not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} {value!r} of a prior on a path must be a positive number")
