"""The Gibbs posterior of a loss: π_η(θ | data) ∝ exp{−η Σ_i l(θ; z_i)} p(θ).

Bissiri, Holmes and Walker (2016); the learning rate η is what `calibrate` finds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike

from hakari.inference.design import refuse_collinear, stack_blocks
from hakari.inference.formula import parse_formula, read_blocks
from hakari.inference.gibbs import losses
from hakari.inference.gibbs.losses import LinearLoss, Loss, classes
from hakari.inference.gibbs.risk import CustomRisk, LinearRisk, Risk, default_names
from hakari.inference.gibbs.sandwich import Sandwich, sandwich
from hakari.inference.prior import Flat, Prior, PriorBlock, prior_blocks, prior_log_density
from hakari.inference.tables import Missing


@dataclass(frozen=True)
class GibbsPosterior:
    """Gibbs posterior of a loss on rows, under a prior or a list of priors on subsets.

    loss: one of `losses`, or any function of theta (d,) and rows that returns (n,).
    rows: for a loss of a linear predictor the pair (y (n,), X (n, d)); for a function whatever it
    takes. learning_rate: η > 0. names: of the coefficients; X may be a frame that has them. start
    (d,): where to look for the minimum of a function (needed for functions), inside its domain.
    clusters (n,): labels, kept for the bootstrap.

    Raises ValueError for shapes that do not fit, values that are not finite, collinear columns or
    a loss that y cannot have.

    >>> import hakari.inference as hi
    >>> y = np.random.default_rng(1).standard_normal(50)
    >>> hi.GibbsPosterior(lambda theta, y: (y - theta) ** 2 / 2, y, start=[0.0]).minimiser.shape
    (1,)
    """

    loss: LinearLoss | Loss | Callable[[ndarray, Any], Any]
    rows: Any = field(repr=False)
    prior: Prior | Sequence[Prior] = Flat()  # noqa: RUF009 - frozen
    learning_rate: float = 1.0
    names: Sequence[str] | None = None
    start: ArrayLike | None = field(default=None, repr=False)
    clusters: ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate {self.learning_rate}: give a number above 0")
        _ = self.risk, self.blocks
        if self.clusters is not None and len(self.clusters) != self.risk.n:
            raise ValueError(f"{len(self.clusters)} cluster labels for {self.risk.n} rows")

    @classmethod
    def from_formula(
        cls,
        loss: LinearLoss | Loss | Callable[[ndarray, Any], Any],
        formula: str,
        data: Any,
        prior: Prior | Sequence[Prior] = Flat(),  # noqa: B008 - frozen
        learning_rate: float = 1.0,
        *,
        weights: str | None = None,
        clusters: str | None = None,
        missing: Missing = "raise",
        start: ArrayLike | None = None,
    ) -> GibbsPosterior:
        """From `y ~ 1 + x` and a table, as `LinearMoments.from_formula` reads them.

        No intercept unless written as 1. weights, clusters: names of columns. A function of your
        own is given the rows (y, X), or (y, X, weights), and needs start. Raises ValueError for a
        formula with instruments, a y of text, and as the class does.
        """
        parsed = parse_formula(formula)
        if parsed.instruments != "0":
            raise ValueError(f"formula {formula!r} has instruments: a loss of y and x has none")
        parts = list(read_blocks(parsed, data, weights, clusters, missing))
        names, block = parts[0][0], stack_blocks([b for _, b in parts])
        _refuse_text(names.dependent, parsed.dependent.removeprefix("0 + "))
        labels = [b.clusters for _, b in parts if b.clusters is not None]
        rows = (block.y, block.X) if block.weights is None else (block.y, block.X, block.weights)
        return cls(
            loss,
            rows,
            prior,
            learning_rate,
            names.parameters,
            start,
            clusters=np.concatenate(labels) if labels else None,
        )

    @cached_property
    def risk(self) -> Risk:
        """The loss on the rows."""
        if isinstance(self.loss, LinearLoss):
            return _linear(self.loss, self.rows, self.names)
        _refuse_unmade(self.loss)
        if self.start is None:
            raise ValueError(
                "start is missing: for a function give start=[...], a value of theta (d,) near "
                "the minimum"
            )
        start = np.atleast_1d(np.asarray(self.start, dtype=float))
        loss = self.loss if isinstance(self.loss, Loss) else Loss(self.loss, name=_name(self.loss))
        found = CustomRisk(loss, self.rows, default_names(len(start), self.names), start)
        found.refuse_outside()  # shapes and values are told before anything long
        return found

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the coefficients."""
        return self.risk.names

    @cached_property
    def blocks(self) -> tuple[PriorBlock, ...]:
        """The prior's proper factors."""
        return prior_blocks(self.prior, self.risk.names)

    @property
    def minimiser(self) -> Float[ndarray, " d"]:
        """θ̂, the minimiser of the loss alone: what calibrated sets are to cover."""
        return self.risk.minimiser

    @cached_property
    def sandwich(self) -> Sandwich:
        """J and K at the minimiser."""
        return sandwich(self.risk, self.minimiser)

    def log_prior(self, theta: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch"]:
        """Log prior density of θ (..., d), normalised where it is proper."""
        return prior_log_density(self.blocks, np.asarray(theta, dtype=float))

    def log_density(self, theta: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch"]:
        """Log π_η(θ) of θ (..., d), up to a constant."""
        theta = np.asarray(theta, dtype=float)
        d = len(self.parameters)
        if theta.shape[-1:] != (d,):
            raise ValueError(f"theta has shape {theta.shape}: its last axis must be {d}")
        flat = np.ascontiguousarray(theta.reshape(-1, d))
        found = -self.learning_rate * self.risk.totals(flat) + self.log_prior(flat)
        return np.asarray(found.reshape(theta.shape[:-1]))

    def at_rate(self, learning_rate: float) -> GibbsPosterior:
        """The same posterior at another learning rate; what is known of the risk is kept."""
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate {learning_rate}: give a number above 0")
        other = copy.copy(self)
        object.__setattr__(other, "learning_rate", float(learning_rate))
        return other


def _refuse_unmade(loss: Any) -> None:
    """Raise ValueError for the name of a loss, and for a maker of losses that was not called."""
    known = getattr(losses, loss, None) if isinstance(loss, str) else loss
    if getattr(known, "__module__", None) == losses.__name__ and hasattr(known, "__name__"):
        raise ValueError(f"loss {_name(known)} is not made: call it, as hi.losses.{_name(known)}()")
    if not callable(loss) and not isinstance(loss, Loss):
        raise ValueError(
            f"loss {loss!r}: give one of hi.losses, such as hi.losses.huber(), or a function of "
            "theta and rows"
        )


def _refuse_text(column: str, term: str) -> None:
    """Raise ValueError where the left side is coded as levels: formulaic names them term[level]."""
    if column.startswith(f"{term}["):
        raise ValueError(f"{term} is text or a category: a y of numbers is needed")


def _linear(loss: LinearLoss, rows: Any, names: Sequence[str] | None) -> LinearRisk:
    if not isinstance(rows, tuple | list) or len(rows) not in (2, 3):
        raise ValueError(f"rows for {loss.name} must be (y, X) or (y, X, weights)")
    y = np.asarray(rows[0], dtype=float)
    if names is None and hasattr(rows[1], "columns"):
        names = [str(name) for name in rows[1].columns]
    X = np.asarray(rows[1], dtype=float)
    X = X[:, None] if X.ndim == 1 else X
    weights = np.asarray(rows[2], dtype=float) if len(rows) == 3 else None
    if y.ndim != 1 or X.ndim != 2 or len(y) != len(X):
        raise ValueError(f"y has shape {y.shape} and X {X.shape}: (n,) and (n, d) are needed")
    for name, part in (("y", y), ("X", X), ("weights", weights)):
        if part is not None and not np.isfinite(part).all():
            row = int(np.argwhere(~np.isfinite(part))[0][0])
            raise ValueError(f"{name} is not finite in row {row + 1}: drop or fill it first")
    if weights is not None and (weights.shape != y.shape or (weights < 0).any()):
        raise ValueError(f"weights of shape {weights.shape}: {y.shape} and at least 0 are needed")
    if len(y) <= X.shape[1]:
        raise ValueError(f"{len(y)} rows for {X.shape[1]} coefficients: more rows are needed")
    labels = default_names(X.shape[1], names)
    refuse_collinear(X.T @ X, labels, "regressors")
    return LinearRisk(loss, classes(loss, y), X, labels, weights)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
