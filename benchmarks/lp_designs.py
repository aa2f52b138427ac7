"""Simulated series whose response to a shock is known: what local projections must cover.

Each law is linear given its shocks, so that the response follows by recursion. Designs of
local-projections.md 'Coverage designs with known responses'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

Columns = dict[str, ndarray]
Shape = int | tuple[int, ...]

BURN = 500  # dates dropped: a start at zero is then forgotten to 0.97^500 = 2e-7
GARCH = (0.15, 0.8)  # answer to the last squared shock, persistence: kurtosis 5.6
STAY = 0.9  # probability that a regime lasts another date


@dataclass(frozen=True)
class Design:
    """A law of series, and the response of "y" to one unit of its shock.

    Attributes:
        name: with its parameters.
        make: (generator, T) to columns (T,). T may be a shape (R, T), as NumPy's `size`: then
            columns are R independent samples, (R, T).
        truth: (H + 1,), or (2, H + 1) by the regime of the date before the shock.
        series: columns whose lags are the controls.
        lags: of `series` in the law; lag augmentation takes one more.
        shock: column whose unit the truth is about.
        instrument: column that stands for the shock, or None where the shock is observed.
        regime: column that switches the response, or None.
    """

    name: str
    make: Callable[[Generator, Shape], Columns]
    truth: Float[ndarray, "*states horizons"]
    series: tuple[str, ...]
    lags: int
    shock: str = "shock"
    instrument: str | None = None
    regime: str | None = None


def var1(rho: float, horizons: int = 24, heteroskedastic: bool = False) -> Design:
    """VAR(1) of y, x1, x2 with largest root rho and its first structural shock observed.

    heteroskedastic: one GARCH(1, 1) scale, moved by the observed shock, multiplies all shocks;
    variances stay 1 and the response stays what it is.

    >>> var1(0.9, horizons=2).truth.round(3)
    array([1.   , 1.06 , 1.036])
    """
    name = f"VAR(1), rho {rho:g}" + (", GARCH" if heteroskedastic else "")
    lags = _triangular(_refuse_root(rho))[None]
    return _observed_var(name, lags, horizons, heteroskedastic)


def var4(root: float, horizons: int = 24) -> Design:
    """VAR(4) of y, x1, x2 with that largest root and its first structural shock observed.

    y has a complex pair of roots too (0.7 root, a cycle of six dates).
    """
    _refuse_root(root)
    cycle = 0.7 * np.exp(1j * np.pi / 3)
    roots = [(1, cycle, cycle.conj(), -0.4), (0.8, -0.5, 0.3, -0.2), (0.6, 0.4, -0.3, 0.1)]
    lags = np.zeros((4, 3, 3))
    for k, own in enumerate(roots):
        lags[:, k, k] = -np.poly(root * np.array(own))[1:].real
    spill = np.array([0.15, 0.1, 0.05, -0.05])
    lags[:, 0, 1], lags[:, 0, 2], lags[:, 1, 2] = spill, -spill / 2, spill[::-1]
    return _observed_var(f"VAR(4), root {root:g}", lags, horizons, heteroskedastic=False)


def lp_iv(
    rho: float,
    horizons: int = 24,
    strength: float = 0.3,
    noise: float = 1.0,
    contaminated: bool = False,
) -> Design:
    """Output y, a policy rate r that answers all shocks, a price p, and an instrument z for r.

    z = strength · policy shock + noise · N(0, 1). The unpredicted part of r has variance 1.34, so
    that the first stage's expected F is about 1 + T strength² / (1.34 (strength² + noise²) −
    strength²): 14 at T = 200 and the defaults, 24 with strength 0.4. contaminated: z also
    loads on the last date's series, so that it is valid only given their lags. The truth is the
    response of y to a policy shock that moves r by one.
    """
    _refuse_root(rho)
    if not (strength > 0 and noise > 0):
        raise ValueError(f"strength {strength} and noise {noise}: both must be positive")
    lags = _triangular(rho, spill=-0.2)  # a dearer rate lowers the next date's output
    shocks = np.array([[-0.3, 1.0, -0.3], [1.0, 0.5, 0.3], [-0.1, 0.2, 1.0]])  # of policy, y, p
    loading = np.array([0.2, 0.3, -0.2]) if contaminated else np.zeros(3)

    def make(generator: Generator, T: Shape) -> Columns:
        normals = _normals(generator, T, 4)
        path = accumulate(lags, normals[..., :3] @ shocks.T)
        z = strength * normals[..., 0] + noise * normals[..., 3]
        z[..., 1:] += path[..., :-1, :] @ loading
        columns = np.concatenate([path, z[..., None]], axis=-1)
        return _columns(columns, ("y", "r", "p", "z"))

    truth = _responses(lags, shocks[:, 0], horizons)
    name = f"LP-IV, rho {rho:g}, strength {strength:g}" + contaminated * ", contaminated"
    series = ("y", "r", "p")
    return Design(name, make, truth[:, 0] / truth[0, 1], series, 1, shock="r", instrument="z")


def arma(q: int, phi: float = 0.5, horizons: int = 24) -> Design:
    """y_t = phi y_{t−1} + Σ_{j ≤ q} θ_j shock_{t−j} + u_t, θ a bell around q / 2: a hump.

    The ARMA(1, q) designs of papers on smooth local projections. u is N(0, 1), as the shock is.
    """
    _refuse_root(phi, "phi")
    if q < 0:
        raise ValueError(f"q {q}: an order of moving average must be at least 0")
    theta = np.exp(-0.5 * ((np.arange(q + 1) - q / 2) / max(q / 4, 1)) ** 2)

    def make(generator: Generator, T: Shape) -> Columns:
        normals = _normals(generator, T, 2)
        drive = normals[..., 1].copy()
        for j, weight in enumerate(theta):
            drive[..., j:] += weight * normals[..., : drive.shape[-1] - j, 0]
        y = accumulate(np.array([[phi]]), drive[..., None])
        return _columns(np.concatenate([y, normals[..., :1]], axis=-1), ("y", "shock"))

    impulse = np.zeros((horizons + 1, 1))
    impulse[: q + 1, 0] = theta[: horizons + 1]
    truth = accumulate(np.array([[phi]]), impulse)[:, 0]
    return Design(f"ARMA(1,{q}), phi {phi:g}", make, truth, ("y", "shock"), max(q, 1))


def states(a: float = 0.8, impacts: tuple[float, float] = (0.5, 1.5), horizons: int = 24) -> Design:
    """y_t = a y_{t−1} + impacts[regime_{t−1}] shock_t + u_t, regime an exogenous Markov chain.

    Only the impact switches, so that the response to a shock at t is impacts[regime_{t−1}] a^h,
    whatever the regimes of later dates: a truth by state that local projections estimate.
    """
    _refuse_root(a, "a")

    def make(generator: Generator, T: Shape) -> Columns:
        normals = _normals(generator, T, 2)
        switches = generator.random(normals.shape[:-1]) > STAY
        switches[..., 0] = generator.random(normals.shape[:-2]) > 0.5
        regime = switches.cumsum(axis=-1) % 2
        before = np.concatenate([regime[..., :1], regime[..., :-1]], axis=-1)
        drive = np.asarray(impacts)[before] * normals[..., 0] + normals[..., 1]
        y = accumulate(np.array([[a]]), drive[..., None])[..., 0]
        columns = np.stack([y, normals[..., 0], regime.astype(float)], axis=-1)
        return _columns(columns, ("y", "shock", "regime"))

    truth = np.multiply.outer(np.asarray(impacts), a ** np.arange(horizons + 1.0))
    return Design(f"states, a {a:g}", make, truth, ("y",), 1, regime="regime")


def accumulate(
    matrix: Float[ndarray, "K K"], errors: Float[ndarray, "*batch T K"]
) -> Float[ndarray, "*batch T K"]:
    """x_t = matrix x_{t−1} + errors_t from x before the first date at zero.

    By doubling: after pass k each date holds its own and the 2^k − 1 dates' errors before it, so
    that log2 T products replace a loop over dates.
    """
    x, reach, power = errors, 1, matrix
    while reach < errors.shape[-2]:
        later = x[..., reach:, :] + x[..., :-reach, :] @ power.T
        x = np.concatenate([x[..., :reach, :], later], axis=-2)
        reach, power = 2 * reach, power @ power
    return x


# --- parts --------------------------------------------------------------------------------


def _observed_var(
    name: str, lags: Float[ndarray, "p K K"], horizons: int, heteroskedastic: bool
) -> Design:
    """A VAR of y, x1, x2 whose shocks are impact @ N(0, 1), the first of them a column."""
    # y feels all shocks at once: with the first alone it would have no error at h = 0
    impact = np.array([[1.0, 0.5, 0.3], [0.5, 1.0, 0.0], [0.3, 0.3, 1.0]])
    companion = _companion(lags)
    names = ("y", "x1", "x2")

    def make(generator: Generator, T: Shape) -> Columns:
        shocks = _normals(generator, T, 3)
        if heteroskedastic:
            shocks = shocks * _garch_scale(shocks[..., 0])[..., None]
        errors = np.zeros((*shocks.shape[:-1], len(companion)))
        errors[..., :3] = shocks @ impact.T
        path = accumulate(companion, errors)[..., :3]
        return _columns(np.concatenate([path, shocks[..., :1]], axis=-1), (*names, "shock"))

    first = np.zeros(len(companion))
    first[:3] = impact[:, 0]
    return Design(name, make, _responses(companion, first, horizons)[:, 0], names, len(lags))


def _triangular(rho: float, spill: float = 0.2) -> Float[ndarray, "3 3"]:
    """Upper triangular: the roots are the diagonal, and only the first feels all the others."""
    return np.array([[rho, spill, 0.2], [0.0, 0.6 * rho, 0.1], [0.0, 0.0, 0.4 * rho]])


def _companion(lags: Float[ndarray, "p K K"]) -> Float[ndarray, "pK pK"]:
    p, K = lags.shape[:2]
    companion = np.eye(p * K, k=-K)
    companion[:K] = lags.transpose(1, 0, 2).reshape(K, p * K)
    return companion


def _responses(
    matrix: Float[ndarray, "K K"], impact: Float[ndarray, " K"], horizons: int
) -> Float[ndarray, "horizons K"]:
    path = [impact]
    for _ in range(horizons):
        path.append(matrix @ path[-1])
    return np.array(path)


def _garch_scale(normals: Float[ndarray, "*batch T"]) -> Float[ndarray, "*batch T"]:
    """σ_t with σ²_t = 1 − a − b + (a normal²_{t−1} + b) σ²_{t−1}: mean of squares 1."""
    a, b = GARCH
    growth = a * normals**2 + b
    variance = np.ones_like(normals)
    for t in range(1, normals.shape[-1]):
        variance[..., t] = 1 - a - b + growth[..., t - 1] * variance[..., t - 1]
    return np.asarray(np.sqrt(variance))


def _normals(generator: Generator, T: Shape, count: int) -> ndarray:
    """Standard normals (*batch, BURN + T, count)."""
    shape = tuple(int(size) for size in np.atleast_1d(T))
    if not shape or min(shape) < 1:
        raise ValueError(f"T {T}: give at least one date, as T or (replications, T)")
    return generator.standard_normal((*shape[:-1], BURN + shape[-1], count))


def _columns(values: ndarray, names: tuple[str, ...]) -> Columns:
    """Columns (*batch, T) of values (*batch, BURN + T, K), the burn-in dropped."""
    return {name: values[..., BURN:, k].copy() for k, name in enumerate(names)}


def _refuse_root(root: float, name: str = "rho") -> float:
    if not 0 < root < 1:
        raise ValueError(f"{name} {root}: must be between 0 and 1, else no series is stationary")
    return root
