"""How the risk curves and how its scores vary: J, K, and V = J⁻¹ K J⁻¹ of the minimiser.

All of it comes from the losses of single rows, so that any loss has it. Steps of the differences
are the sampling error itself, found without knowing the loss's scale: along a direction, the mean
rise of the risk is half as large as the standard deviation of the rows' rise when the step is one
sampling standard deviation (derived in design note gibbs-calibration, section 1.11).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs import loss_kernels as kernels
from hakari.inference.gibbs.risk import CustomRisk, LinearRisk, Risk

OF_RESIDUALS = (kernels.SQUARED, kernels.HUBER, kernels.EXPECTILE)
JUMPS = 1.5  # growth below it: between a loss that jumps (1) and one that is Lipschitz (2)
ALIKE = 0.1  # an error of J that matters less than that of 500 data sets in a rate
SMALL = 0.01  # sampling errors: a step at which few rows pass a kink
WRONG = 0.2  # of the rows' changes: a gradient that is off by more is another function's
ROUNDS = 2  # of differences: by coordinate, then along the axes of the sampling error


class GradientError(ValueError):
    """A loss whose own gradient is not that of its values."""


class CubeRootError(ValueError):
    """A loss that jumps: J and K do not describe its minimiser."""


@dataclass(frozen=True)
class Sandwich:
    """curvature J (d, d) of the total risk and variance K (d, d) of its score, at the minimiser.

    Both are totals over the rows, n J and n K of the note.
    """

    curvature: Float[ndarray, "d d"]
    score_variance: Float[ndarray, "d d"]

    @cached_property
    def bread(self) -> Float[ndarray, "d d"]:
        """J⁻¹: the Gibbs posterior's covariance at learning rate 1, in large samples."""
        return np.linalg.inv(self.curvature)

    @cached_property
    def covariance(self) -> Float[ndarray, "d d"]:
        """Covariance of the minimiser, J⁻¹ K J⁻¹."""
        return np.asarray(self.bread @ self.score_variance @ self.bread)

    @cached_property
    def spectrum(self) -> Float[ndarray, " d"]:
        """Eigenvalues of J^(−1/2) K J^(−1/2): one over the learning rate of each direction."""
        root = np.linalg.cholesky(self.curvature)
        half = np.linalg.solve(root, np.linalg.solve(root, self.score_variance).T)
        values = np.linalg.eigvalsh((half + half.T) / 2)
        least = np.finfo(float).eps * values[-1]  # K of few clusters is singular
        return np.asarray(np.maximum(values, least))


def sandwich(risk: Risk, theta: Float[ndarray, " d"]) -> Sandwich:
    """J and K at the minimiser.

    A function's own curvature is taken if the risk curves as much over one sampling error: where
    single rows have kinks or jumps it is wrong, and differences hold.
    Raises CubeRootError for a loss that jumps, GradientError for a gradient that is wrong, and
    ValueError where the risk does not curve upward, the sampling error leaves the loss's domain, or
    the predictor gives y without error.
    """
    curvature = risk.curvature(theta)
    if isinstance(risk, CustomRisk):
        coarse = _by_differences(risk, theta)
        if curvature is None or not _alike(curvature, coarse.curvature):
            return coarse
    assert curvature is not None
    _refuse_perfect_fit(risk, theta)
    _check(curvature, risk.names)
    scores = risk.scores(theta)
    centred = scores - scores.mean(axis=0)
    return Sandwich(curvature, centred.T @ centred)


def _refuse_perfect_fit(risk: Risk, theta: ndarray) -> None:
    """Raise ValueError where no row differs from what the predictor says: then K is 0."""
    if not isinstance(risk, LinearRisk) or risk.loss.kind not in OF_RESIDUALS:
        return
    if np.abs(risk.y - risk.X @ theta).max() <= 1e-13 * np.abs(risk.y).max():
        raise ValueError(
            f"{', '.join(risk.names)} give y without error in all {risk.n} rows: the loss has no "
            "sampling error and no learning rate; is y the column that you meant?"
        )


def _alike(one: ndarray, other: ndarray) -> bool:
    """Whether two curvatures are within `ALIKE` of each other in every direction."""
    if not np.isfinite(one).all():
        return False
    root = np.linalg.cholesky(other)
    ratios = np.linalg.eigvalsh(np.linalg.solve(root, np.linalg.solve(root, one).T))
    return bool(np.abs(ratios - 1).max() <= ALIKE)


def _by_differences(risk: Risk, theta: ndarray) -> Sandwich:
    """J and K over steps of one sampling error, along the axes of the sampling error itself."""
    axes = np.diag(sampling_steps(risk, theta, np.eye(len(theta))))
    growth = _growth(risk, theta, axes)
    if growth < JUMPS:
        raise CubeRootError(
            f"loss {risk.loss.name!r} jumps (the variance of a row's rise grows as the step to the "
            f"{growth:.2f}), so that its minimiser converges at the rate n^(-1/3) and no ordinary "
            "bootstrap mimics it: give Loss(..., jumps=True) and bootstrap='m-out-of-n', or smooth "
            "the loss"
        )
    _refuse_wrong_gradient(risk, theta, axes)
    for _ in range(ROUNDS):
        curvature, score_variance = _curvature_by(risk, theta, axes), _scores_by(risk, theta, axes)
        _check(curvature, risk.names)
        _check(score_variance, risk.names)  # what is not identified has neither
        axes = _error_axes(curvature, score_variance)
    curvature, score_variance = _curvature_by(risk, theta, axes), _scores_by(risk, theta, axes)
    _check(curvature, risk.names)
    return Sandwich(curvature, score_variance)


def _refuse_wrong_gradient(risk: Risk, theta: ndarray, axes: ndarray) -> None:
    """Raise GradientError where a loss's own gradient is not how its losses change.

    Half a sampling error away from the minimum, where fewer rows have a kink than at it.
    """
    if not isinstance(risk, CustomRisk) or risk.loss.gradient is None or risk.loss.jax is not None:
        return
    for name, axis in zip(risk.names, axes.T, strict=True):
        at, step = theta + axis / 2, SMALL * axis
        up, down = risk.loss.values(np.stack([at + step, at - step]), risk.rows)
        with np.errstate(invalid="ignore"):  # outside the domain nothing is compared
            said, seen = risk.scores(at) @ axis, (up - down) / (2 * SMALL)
        off, size = np.abs(said - seen).sum(), np.maximum(np.abs(said), np.abs(seen)).sum()
        if off > WRONG * size:
            i = int(np.argmax(np.abs(said - seen)))
            said, seen = said / np.linalg.norm(axis), seen / np.linalg.norm(axis)
            raise GradientError(
                f"the gradient of loss {risk.loss.name!r} along {name} is {said[i]:.4g} in row "
                f"{i + 1} at theta {np.array2string(at, precision=4)}, where its losses change by "
                f"{seen[i]:.4g} a unit: correct it, or leave it out"
            )


def sampling_steps(
    risk: Risk, theta: Float[ndarray, " d"], axes: Float[ndarray, "d a"]
) -> Float[ndarray, " a"]:
    """The step along each axis that is one sampling standard deviation."""
    steps = 1e-3 * (np.abs(axes).T @ np.abs(theta) + 1e-6) / np.linalg.norm(axes, axis=0)
    low, high = np.zeros_like(steps), np.full_like(steps, np.inf)
    for _ in range(60):
        ratio = _rise_ratio(risk, theta, axes, steps)
        small = ratio < 0.5
        low, high = np.where(small, steps, low), np.where(small, high, steps)
        both = np.isfinite(high) & (low > 0)
        middle = np.sqrt(np.where(both, low, 1) * np.where(both, high, 1))
        steps = np.where(both, middle, np.where(small, steps * 4, steps / 4))
        if both.all() and (high < 1.2 * low).all():
            break
    return np.asarray(steps)


def _rise_ratio(risk: Risk, theta: ndarray, axes: ndarray, steps: ndarray) -> ndarray:
    move = (axes * steps).T
    up = risk.excess(theta + move, theta).astype(float)
    down = risk.excess(theta - move, theta).astype(float)
    mean = (up.sum(axis=1) + down.sum(axis=1)) / 2
    spread = np.sqrt(risk.n) * (up - down).std(axis=1) / 2
    alike = spread <= 1e-12 * np.abs(mean)  # every row rises as much: the step is too long
    found = mean / np.where(alike, 1.0, spread)
    return np.asarray(np.where(alike, np.where(mean > 0, np.inf, 0.0), found))


def _growth(risk: Risk, theta: ndarray, axes: ndarray) -> float:
    """Exponent of the variance of a row's rise in the step: the smallest over axes, both ways.

    0 where no row changes over a quarter of the sampling error, though some do further away.
    """

    def rise(share: float) -> ndarray:
        sides = np.concatenate([axes.T, -axes.T])
        moved: ndarray = risk.excess(theta + share * sides, theta).astype(float)
        return np.asarray((moved**2).mean(axis=1))

    quarter = rise(0.25)
    some = quarter > 0
    if not some.all() and (rise(64)[~some] > 0).any():
        return 0.0
    found = np.log(rise(1)[some] / quarter[some]) / np.log(4)
    return float(found.min()) if some.any() else 2.0


def _scores_by(risk: Risk, theta: ndarray, axes: ndarray) -> ndarray:
    """Variance in θ of the rows' scores, each along the axes by half a step either way."""
    half = 0.5 * axes.T
    up, down = risk.excess(theta + half, theta), risk.excess(theta - half, theta)
    along = (up.astype(float) - down.astype(float)).T  # (n, d): x'axes
    scores = along @ np.linalg.inv(axes)
    centred = scores - scores.mean(axis=0)
    return np.asarray(centred.T @ centred)


def _curvature_by(risk: Risk, theta: ndarray, axes: ndarray) -> ndarray:
    """Second differences of the total risk over two steps, as a matrix in θ."""
    d = len(theta)
    pairs = [(j, k) for j in range(d) for k in range(j + 1)]
    sides = [(s, t) for s in (1, -1) for t in (1, -1)]
    moves = np.array([s * axes[:, j] + t * axes[:, k] for j, k in pairs for s, t in sides])
    base = risk.totals(theta[None])[0]
    rise = (risk.totals(theta + moves) - base).reshape(len(pairs), 4)
    if np.isinf(rise).any():
        ends = np.isinf(rise).any(axis=1)
        out = [risk.names[j] for (j, k), end in zip(pairs, ends, strict=True) if end and j == k]
        raise ValueError(
            f"loss {risk.loss.name!r} is inf two sampling errors from its minimum along "
            f"{', '.join(out or risk.names)}: its domain ends there; parametrise so that every "
            "theta is inside (a scale by its logarithm)"
        )
    bend = np.zeros((d, d))
    for (j, k), (pp, pm, mp, mm) in zip(pairs, rise, strict=True):
        bend[j, k] = bend[k, j] = (pp - pm - mp + mm) / 4
    values, vectors = np.linalg.eigh(bend)
    if np.median(values) > 0:  # noise of kinks may turn single directions down
        values = np.maximum(values, 0.02 * np.median(values))
    inverse = np.linalg.inv(axes)
    return np.asarray(inverse.T @ (vectors * values) @ vectors.T @ inverse)


def _error_axes(curvature: ndarray, score_variance: ndarray) -> ndarray:
    """Axes (d, d) of the sampling error, one standard deviation long."""
    values, vectors = np.linalg.eigh(curvature)
    values = np.maximum(values, 1e-8 * values.max())
    bread = (vectors / values) @ vectors.T
    return np.asarray(np.linalg.cholesky(bread @ score_variance @ bread))


def _check(matrix: ndarray, names: tuple[str, ...]) -> None:
    size = np.sqrt(np.abs(np.diag(matrix)))
    size = np.where(size > 0, size, 1.0)
    values, vectors = np.linalg.eigh(matrix / np.multiply.outer(size, size))
    if values[-1] < 0:
        raise ValueError(
            f"the risk curves downward along {', '.join(names)}, from a maximum: is the loss's "
            "sign right? A log-likelihood is a loss with a minus before it"
        )
    if not values[0] > 1e-10:
        worst = np.abs(vectors[:, 0])
        named = ", ".join(n for n, w in zip(names, worst, strict=True) if w > 1e-2 * worst.max())
        raise ValueError(
            f"the risk does not curve upward at its minimum along {named}: the loss does not "
            "identify it, or every row has a kink there; drop a coefficient or change the loss"
        )
