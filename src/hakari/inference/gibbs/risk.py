"""The empirical risk Σ_i w_i l(θ; z_i): its values, its scores, its minimiser.

Two kinds: of a linear predictor, compiled, and of any function. Both have the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import differential_evolution, linprog, minimize

from hakari.inference.gibbs import loss_kernels as kernels
from hakari.inference.gibbs.losses import LinearLoss, Loss

FLAT = 1e-9  # curvature a row, in orthonormal columns, of a minimum that is infinitely far
THIN = 8  # one row of so many says where the others lie
AT_ONCE = 2**25  # losses of a custom function that are held at once: 256 MB
LARGEST = 1e30  # stands for inf in single precision: no weight is left, and 0 times it is 0


@dataclass(frozen=True)
class LinearRisk:
    """Risk of l = ρ(y, x'θ): y (n,), X (n, d), weights (n,) of rows or None."""

    loss: LinearLoss
    y: Float[ndarray, " n"]
    X: Float[ndarray, "n d"]
    names: tuple[str, ...]
    weights: ndarray | None = None

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.y)

    @cached_property
    def columns(self) -> Float[ndarray, "d n"]:
        """X', column by column in memory."""
        return np.ascontiguousarray(self.X.T)

    def totals(
        self, theta: Float[ndarray, "M d"], weights: ndarray | None = None
    ) -> Float[ndarray, " M"]:
        """Σ_i w_i l(θ_m; z_i) for each θ; weights (n,), such as a bootstrap's counts."""
        w = self._both(weights)
        y, columns = self.y, self.columns
        if weights is not None and (w == 0).mean() > 0.2:  # rows that a bootstrap left out
            kept = np.flatnonzero(w)
            y, columns, w = y[kept], np.ascontiguousarray(columns[:, kept]), w[kept]
        found: ndarray = kernels.totals(self.loss.kind, self.loss.shape, y, columns, w, theta)
        return found

    def excess(self, theta: Float[ndarray, "M d"], at: Float[ndarray, " d"]) -> ndarray:
        """l(θ_m; z_i) − l(at; z_i), (M, n) in single precision."""
        out = np.empty((len(theta), self.n), dtype=np.float32)
        base = np.zeros((1, self.n))
        empty = np.zeros(self.n)
        kernels.excess(self.loss.kind, self.loss.shape, self.y, self.columns, at[None], empty, base)
        kernels.excess(self.loss.kind, self.loss.shape, self.y, self.columns, theta, base[0], out)
        return out if self.weights is None else out * self.weights.astype(np.float32)

    def scores(self, theta: Float[ndarray, " d"]) -> Float[ndarray, "n d"]:
        """Gradient of each row's loss at θ; rows at a kink but for rounding count as at it."""
        f = self.X @ theta
        if not self.loss.smooth:
            unit = np.abs(self.y).mean()
            f = np.where(np.abs(_from_kink(self, theta)) <= 1e-10 * unit, self.y, f)
        slope = kernels.slopes(self.loss.kind, self.loss.shape, self.y, f)
        slope = slope if self.weights is None else slope * self.weights
        return np.asarray(self.X * slope[:, None])

    def curvature(self, theta: Float[ndarray, " d"]) -> Float[ndarray, "d d"]:
        """Second derivative of the total at θ; where ρ has a kink, a kernel estimate of its mean.

        The kernel (Powell, 1991) is as wide as 1.5 n^(2/3) + 5 d rows nearest to the kink.
        """
        f = self.X @ theta
        if self.loss.smooth:
            bend = kernels.curvatures(self.loss.kind, self.loss.shape, self.y, f)
        else:
            quantile = self.loss.kind == kernels.QUANTILE
            distance = np.abs(self.y - f if quantile else 1 - self.y * f)
            count = min(self.n, int(1.5 * self.n ** (2 / 3)) + 5 * len(theta))
            width = float(np.partition(distance, count - 1)[count - 1])
            if width == 0:
                raise ValueError(
                    f"{count} rows or more lie exactly at the kink of the {self.loss.name} loss at "
                    "its minimum: its risk has a kink there and no curvature; take a smooth loss"
                    + (", or add noise of half a unit to y" if quantile else "")
                )
            bend = (distance <= width) / (2 * width)
        bend = bend * self._both(None, fill=True)
        return np.asarray((self.X * bend[:, None]).T @ self.X)

    @cached_property
    def minimiser(self) -> Float[ndarray, " d"]:
        """The θ with the least total. Raises ValueError where there is none."""
        if self.loss.smooth:
            return _newton(self)
        theta = _lp(self)
        if self.loss.kind == kernels.HINGE and self.totals(theta[None])[0] < FLAT * self.n:
            raise ValueError(
                "the hinge loss has no single minimum: some combination of "
                f"{', '.join(self.names)} separates the classes; drop a regressor"
            )
        return theta

    def _both(self, weights: ndarray | None, fill: bool = False) -> ndarray:
        if weights is None and self.weights is None:
            return np.ones(self.n) if fill else np.empty(0)
        if weights is None or self.weights is None:
            found = self.weights if weights is None else weights
            return np.asarray(found, dtype=float)
        return np.asarray(weights * self.weights)


@dataclass(frozen=True)
class CustomRisk:
    """Risk of any function of θ and rows. start (d,): where the search for the minimum begins.

    A loss of inf says that θ is outside the domain: its total is inf, its excess `LARGEST`.
    """

    loss: Loss
    rows: Any
    names: tuple[str, ...]
    start: Float[ndarray, " d"]

    @cached_property
    def n(self) -> int:
        """Number of losses."""
        return int(self.loss.values(self.start[None], self.rows).shape[1])

    def totals(
        self, theta: Float[ndarray, "M d"], weights: ndarray | None = None
    ) -> Float[ndarray, " M"]:
        """As of `LinearRisk`."""
        step = max(1, AT_ONCE // self.n)
        parts = (self._values(theta[i : i + step]) for i in range(0, len(theta), step))
        return np.concatenate([_sums(part, weights) for part in parts])

    def excess(self, theta: Float[ndarray, "M d"], at: Float[ndarray, " d"]) -> ndarray:
        """As of `LinearRisk`."""
        return np.asarray(self._values(theta) - self._values(at[None]), dtype=np.float32)

    def scores(self, theta: Float[ndarray, " d"]) -> Float[ndarray, "n d"]:
        """Gradients by the loss's own function, else by central differences."""
        if self.loss.gradient is not None:
            found = np.asarray(self.loss.gradient(theta, self.rows), dtype=float)
            return self._shaped("gradient", found, self.n, ", a row for each loss")
        step = np.diag(1e-5 * (1e-3 + np.abs(theta)))
        values = self._values(np.concatenate([theta + step, theta - step]))
        d = len(theta)
        return np.asarray(((values[:d] - values[d:]) / (2 * np.diag(step)[:, None])).T)

    def curvature(self, theta: Float[ndarray, " d"]) -> Float[ndarray, "d d"] | None:
        """Second derivative of the total by the loss's own function, or None."""
        if self.loss.curvature is None:
            return None
        found = np.asarray(self.loss.curvature(theta, self.rows), dtype=float)
        return self._shaped("curvature", found, len(theta), ", of the total loss")

    @cached_property
    def minimiser(self) -> Float[ndarray, " d"]:
        """The best point of a search from `start`: global if the loss jumps."""
        return _global_search(self) if self.loss.jumps else _search(self)

    def _shaped(self, what: str, found: ndarray, rows: int, said: str) -> ndarray:
        wanted = (rows, len(self.start))
        if found.shape != wanted:
            raise ValueError(
                f"the {what} of loss {self.loss.name!r} gave {found.shape}: it must return "
                f"{wanted}{said}"
            )
        return found

    def _values(self, theta: ndarray) -> ndarray:
        values = self.loss.values(theta, self.rows)
        if not values.size or (np.isfinite(values.min()) and values.max() < LARGEST):
            return values
        bad = np.isnan(values) | (values == -np.inf)
        if bad.any():
            m, i = np.argwhere(bad)[0]
            raise ValueError(
                f"loss {self.loss.name!r} is {values[m, i]} in row {i + 1} at theta "
                f"{_shown(theta[m])}: {_cause(values[m, i])}"
            )
        return np.asarray(np.minimum(values, LARGEST))

    def refuse_outside(self) -> None:
        """Raise ValueError where the loss is inf at `start`."""
        outside = np.flatnonzero(self._values(self.start[None])[0] >= LARGEST)
        if len(outside):
            raise ValueError(
                f"loss {self.loss.name!r} is inf in row {outside[0] + 1} at start "
                f"{_shown(self.start)}: start inside its domain; if it overflows, write it so that "
                "it does not (np.logaddexp(r, -r) for the logarithm of exp(r) + exp(-r))"
            )


def _sums(values: Float[ndarray, "M n"], weights: ndarray | None) -> Float[ndarray, " M"]:
    total = np.asarray(values.sum(axis=1) if weights is None else values @ weights)
    if values.size and values.max() >= LARGEST:
        drawn = slice(None) if weights is None else weights > 0
        total[(values[:, drawn] >= LARGEST).any(axis=1)] = np.inf
    return total


def _cause(value: float) -> str:
    if np.isnan(value):
        return (
            "is it outside the loss's domain? Return np.inf there, or parametrise so that every "
            "theta is inside (a scale by its logarithm)"
        )
    return "a loss that falls without end has no minimum; is its sign right? " + SIGN


def _shown(theta: ndarray) -> str:
    return np.array2string(theta, precision=4)


SIGN = "A log-likelihood is a loss with a minus before it"
Risk = LinearRisk | CustomRisk


# --- minimisers ---------------------------------------------------------------------------


def _newton(risk: LinearRisk) -> ndarray:
    """Trust-region Newton in orthonormal columns, of convex smooth losses."""
    q, r = np.linalg.qr(risk.X)
    turned = LinearRisk(risk.loss, risk.y, q * np.sqrt(risk.n), risk.names, risk.weights)
    start = np.zeros(q.shape[1])
    if risk.loss.kind in (kernels.SQUARED, kernels.HUBER, kernels.EXPECTILE):
        start = q.T @ risk.y / np.sqrt(risk.n)
    size = 1.0 / risk.n
    found = minimize(
        lambda t: size * turned.totals(t[None])[0],
        start,
        jac=lambda t: size * turned.scores(t).sum(axis=0),
        hess=lambda t: size * np.asarray(turned.curvature(t)),
        method="trust-exact",
        options={"gtol": 1e-12, "maxiter": 500},
    )
    theta = _polished(turned, found.x)
    if risk.loss.kind in (kernels.LOGISTIC, kernels.POISSON):
        _refuse_separated(turned, theta)
    return np.linalg.solve(r, theta * np.sqrt(risk.n))


def _refuse_separated(risk: LinearRisk, theta: ndarray) -> None:
    """Raise ValueError where a risk in orthonormal columns has gone flat: θ̂ is infinite."""
    w = risk._both(None, fill=True)
    size = w.sum() if risk.loss.kind == kernels.LOGISTIC else (w @ risk.y or w.sum())
    if np.linalg.eigvalsh(np.asarray(risk.curvature(theta)))[0] < FLAT * size:
        raise ValueError(
            f"the {risk.loss.name} loss has no finite minimum: some combination of "
            f"{', '.join(risk.names)} predicts perfectly; drop a regressor"
        )


def _polished(risk: Risk, theta: ndarray) -> ndarray:
    """A few plain Newton steps, each taken only if the gradient becomes smaller."""
    for _ in range(5):
        gradient, bend = risk.scores(theta).sum(axis=0), np.asarray(risk.curvature(theta))
        if not np.isfinite(bend).all():
            break
        step = np.linalg.lstsq(bend, gradient, rcond=None)[0]
        if np.abs(risk.scores(theta - step).sum(axis=0)).max() >= np.abs(gradient).max():
            break
        theta = theta - step
    return theta


def _lp(risk: LinearRisk) -> ndarray:
    """Minimiser of check and hinge loss: the linear program of the rows near the kink.

    Which side of the kink the others lie on is known from the minimiser of every eighth row
    (Portnoy and Koenker, 1997, section 5); if one of them turns out to change sides, more rows
    enter. The result is that of the whole program.
    """
    n, d = risk.X.shape
    near = int(20 * np.sqrt(n * d))
    if 2 * near < n:
        some = slice(None, None, THIN)
        weights = None if risk.weights is None else risk.weights[some]
        theta = _lp(LinearRisk(risk.loss, risk.y[some], risk.X[some], risk.names, weights))
    while 2 * near < n:
        kink = _from_kink(risk, theta)
        away = np.abs(kink) > np.partition(np.abs(kink), near)[near]
        with suppress(ValueError):  # sides that were wrong may leave no solution
            theta = _dual(risk, ~away, away & (kink > 0))
            if not ((_from_kink(risk, theta) > 0) != (kink > 0))[away].any():
                return theta
        near *= 2
    return _dual(risk, np.ones(n, dtype=bool), np.zeros(n, dtype=bool))


def _from_kink(risk: LinearRisk, theta: ndarray) -> ndarray:
    f = risk.X @ theta
    return np.asarray(risk.y - f if risk.loss.kind == kernels.QUANTILE else 1 - risk.y * f)


def _dual(risk: LinearRisk, kept: ndarray, above: ndarray) -> ndarray:
    """The dual linear program, whose multipliers are θ, with a = w for the rows above the kink.

    Koenker and Bassett (1978): max y'a, X'a = (1 − τ) X'w, 0 ≤ a ≤ w; of the hinge
    max 1'a, (yX)'a = 0.
    """
    w = np.ones(risk.n) if risk.weights is None else risk.weights
    scale = np.sqrt((risk.X**2).mean(axis=0))
    X = risk.X / scale
    unit = 1.0
    if risk.loss.kind == kernels.QUANTILE:
        unit = float(np.abs(risk.y).mean()) or 1.0
        gain, A, b = risk.y / unit, X, (1 - risk.loss.shape) * X.T @ w
    else:
        gain, A = np.ones(risk.n), X * risk.y[:, None]
        b = np.zeros(X.shape[1])
    b = b - w[above] @ A[above]
    bounds = np.column_stack([np.zeros(kept.sum()), w[kept]])
    found = linprog(-gain[kept], A_eq=A[kept].T, b_eq=b, bounds=bounds, method="highs")
    if found.status != 0:
        raise ValueError(
            f"the {risk.loss.name} loss has no minimum that was found: {found.message}"
        )
    return np.asarray(-unit * found.eqlin.marginals / scale)


def _search(risk: CustomRisk) -> ndarray:
    """The best point that is found from `start`. Raises ValueError if it is no minimum."""
    size = 1.0 / risk.n

    def value(theta: ndarray) -> float:
        return min(float(size * risk.totals(theta[None])[0]), LARGEST)

    with np.errstate(over="ignore", invalid="ignore"):  # of losses far out
        best = _descended(risk, value)
        _refuse_flat(risk, value, best)
        _refuse_fall(risk, value, best)
    return best


def _descended(risk: CustomRisk, value: Callable[[ndarray], float]) -> ndarray:
    jac = None
    if risk.loss.gradient is not None:
        jac = lambda t: risk.scores(t).sum(axis=0) / risk.n  # noqa: E731
    d = len(risk.start)
    best = minimize(value, risk.start, jac=jac, method="BFGS", options={"gtol": 1e-9}).x
    best = best if value(best) <= value(risk.start) else risk.start
    for _ in range(3):
        begin = best
        options = {"xatol": 1e-9, "fatol": 1e-14, "maxfev": 2000 * d, "adaptive": d > 3}
        best = minimize(value, best, method="Nelder-Mead", options=options).x
        if np.abs(best - begin).max() <= 1e-7 * (1e-3 + np.abs(best).max()):
            break
    if risk.loss.curvature is not None:
        close, least = _polished(risk, best), value(best)
        best = close if value(close) <= least + 1e-12 * abs(least) else best  # but for rounding
    return best if value(best) <= value(risk.start) else risk.start


def _refuse_flat(risk: CustomRisk, value: Callable[[ndarray], float], best: ndarray) -> None:
    """Raise ValueError where the search saw nothing but the value at `start`."""
    start = risk.start
    if (best != start).any():
        return
    moves = np.diag(np.where(start == 0, 2.5e-4, 0.05 * start))  # the first of Nelder and Mead
    if all(value(start + sign * move) == value(start) for move in moves for sign in (1, -1)):
        raise ValueError(
            f"loss {risk.loss.name!r} is the same all around start {_shown(start)}: start nearer "
            "to its minimum; if it jumps, give Loss(..., jumps=True), and bootstrap='m-out-of-n' "
            "to calibrate"
        )


def _refuse_fall(risk: CustomRisk, value: Callable[[ndarray], float], best: ndarray) -> None:
    """Raise ValueError where the loss goes on falling on the way from `start` to its best point."""
    way = best - risk.start
    if (np.abs(way) <= 1e-3 * np.abs(best)).all():
        return
    begin, here, far, further = (value(risk.start + by * way) for by in (0, 1, 10, 100))
    if here >= far >= further and begin - further > 1e-9 * abs(begin):
        raise ValueError(
            f"loss {risk.loss.name!r} has no minimum that was found from start "
            f"{_shown(risk.start)}: it does not rise at theta {_shown(best)} and beyond; is its "
            f"sign right? {SIGN}"
        )


def _global_search(risk: CustomRisk) -> ndarray:
    """The minimiser of a loss that jumps, by evolution in a box that moves until it holds it."""
    centre, width = risk.start, 1 + np.abs(risk.start)
    for _ in range(20):
        box = list(zip(centre - width, centre + width, strict=True))
        found = differential_evolution(
            lambda t: float(risk.totals(t[None])[0]), box, rng=0, tol=0, maxiter=200, popsize=30
        ).x
        inside = np.abs(found - centre) < 0.9 * width
        centre = np.asarray(found)
        if inside.all():
            break
        width = np.where(inside, width, 2 * width)
    return centre


def default_names(d: int, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names given, else theta[0], theta[1], ... Raises ValueError if their number is wrong."""
    if names is None:
        return tuple(f"theta[{k}]" for k in range(d))
    if len(names) != d:
        raise ValueError(f"{len(names)} names for {d} coefficients: {', '.join(names)}")
    return tuple(names)
