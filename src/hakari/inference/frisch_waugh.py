"""Controls concentrated out of linear moments, exactly: Frisch, Waugh and Lovell.

With regressors (s, c) and instruments (z, c), partialling c out of y, s and z leaves the moments
z̃_t (ỹ_{t,h} − β_h's̃_t). Marginalising γ in the quasi-posterior of the stacked system with
frozen weighting gives the quasi-posterior of β from these moments: local-projections.md
'Concentrating out the controls'. More instruments than shocks are combined by the first stage,
as two-stage least squares does, so that the system stays just identified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from hakari.inference.design import involved, refuse_collinear

EXACT = 1e-10  # relative size of what is rounding: an outcome that the regressors are
EXPLAINED = 1e-13  # a shock whose unexplained share is smaller is a function of the controls
DEPENDENT = 1e-11  # smallest singular value of controls of length 1 that still is one
_WAYS = (
    "drop one (fewer lags; shock_lags=0 where the shock is an innovation that the other lags "
    "span; trend='n' where columns sum to a constant)"
)


@dataclass(frozen=True)
class Concentrated:
    """Partialled columns of n rows: y (n, Q), s (n, S), z (n, S); `every` (n, M) instruments.

    leverage (n,): of controls and z together, in [0, 1].
    """

    y: Float[ndarray, "n Q"]
    s: Float[ndarray, "n S"]
    z: Float[ndarray, "n S"]
    every: Float[ndarray, "n M"]
    leverage: Float[ndarray, " n"]

    @cached_property
    def weight(self) -> Float[ndarray, "n S"]:
        """Rows of (z's)⁻¹ z': the estimate is their product with y."""
        return np.asarray(np.linalg.solve(self.z.T @ self.s, self.z.T).T)

    @cached_property
    def estimate(self) -> Float[ndarray, "S Q"]:
        """β̂: ordinary or two-stage least squares."""
        return np.asarray(self.weight.T @ self.y)

    @cached_property
    def residual(self) -> Float[ndarray, "n Q"]:
        """ỹ − s̃'β̂."""
        left = np.asarray(self.y - self.s @ self.estimate)
        size = (self.y**2).sum(axis=0)  # a shock's own response at once leaves nothing
        return np.where((left**2).sum(axis=0) <= EXACT**2 * size, 0.0, left)

    @cached_property
    def influence(self) -> Float[ndarray, "n S Q"]:
        """What each row adds to β̂ − β: (z's)⁻¹ z_t u_t."""
        return np.asarray(self.weight[:, :, None] * self.residual[:, None, :])


def concentrate(
    y: Float[ndarray, "n Q"],
    s: Float[ndarray, "n S"],
    z: Float[ndarray, "n M"] | None,
    c: Float[ndarray, "n K"],
    unit: Int[ndarray, " n"] | None = None,
) -> Concentrated:
    """Partial the controls, and effects of units, out of outcomes, shocks and instruments.

    z: None where the shocks are their own instruments. Columns must be independent; see
    `refuse_dependent`.
    """
    every = s if z is None else z
    leverage, size = np.zeros(len(y)), (y**2).sum(axis=0)
    if unit is not None:
        counts = np.bincount(unit)
        leverage += 1 / counts[unit]
        y, s, every = (_within(p, unit, counts) for p in (y, s, every))
        c = _within(c, unit, counts)
    if c.shape[1]:
        q, _ = np.linalg.qr(c)
        leverage += (q**2).sum(axis=1)
        y, s, every = (p - q @ (q.T @ p) for p in (y, s, every))
    y = np.where((y**2).sum(axis=0) < EXACT**2 * size, 0.0, y)  # a control is its own outcome
    first = every if every.shape[1] == s.shape[1] else s - _left(s, every)
    q, _ = np.linalg.qr(first)
    return Concentrated(y, s, first, every, np.minimum(leverage + (q**2).sum(axis=1), 1.0))


def refuse_dependent(
    s: Float[ndarray, "n S"],
    z: Float[ndarray, "n M"] | None,
    c: Float[ndarray, "n K"],
    unit: Int[ndarray, " n"] | None,
    names: tuple[Sequence[str], Sequence[str], Sequence[str]],
) -> None:
    """Raise ValueError naming constant shocks, collinear controls, or what controls explain.

    names: of shocks, instruments and controls.
    """
    shock_names, instrument_names, control_names = names
    total = {"shock": _variation(s), "instrument": _variation(s if z is None else z)}
    _refuse_constant(s, shock_names, "shock")
    if z is not None:
        _refuse_constant(z, instrument_names, "instrument")
    if unit is not None:
        counts = np.bincount(unit)
        whole = (c**2).sum(axis=0)
        s, c = _within(s, unit, counts), _within(c, unit, counts)
        _refuse_held((c**2).sum(axis=0), whole, control_names)
        z = None if z is None else _within(z, unit, counts)
    if c.shape[1]:
        _refuse_collinear_controls(c, control_names)
    for what, values, labels in (("shock", s, shock_names), ("instrument", z, instrument_names)):
        if values is not None:
            _refuse_explained(values, c, total[what], labels, what)


# --- parts --------------------------------------------------------------------------------


def _refuse_constant(values: Float[ndarray, "n k"], names: Sequence[str], what: str) -> None:
    for column, name in zip(values.T, names, strict=True):
        if np.ptp(column) == 0:
            raise ValueError(
                f"{what} {name!r} is {column[0] + 0.0:g} in all {len(column)} rows that are used: "
                f"a constant {what} moves nothing; drop it or widen the sample"
            )


def _refuse_held(
    left: Float[ndarray, " K"], whole: Float[ndarray, " K"], names: Sequence[str]
) -> None:
    """Raise ValueError for a control that the effects of units hold, but for rounding."""
    for name, part, all_of_it in zip(names, left, whole, strict=True):
        if part <= DEPENDENT**2 * all_of_it:
            raise ValueError(
                f"{name} is constant within every unit, in the rows that are used: the effects "
                "of units hold it; drop it, or use effects='none'"
            )


def _refuse_collinear_controls(c: Float[ndarray, "n K"], names: Sequence[str]) -> None:
    """By singular values of the columns, not of their products: lags of smooth levels are near."""
    size = np.sqrt((c**2).sum(axis=0))
    if (size == 0).any():
        raise ValueError(f"{names[int(size.argmin())]} is zero in every row: {_WAYS}")
    values, axes = np.linalg.svd(np.linalg.qr(c / size, mode="r"))[1:]
    if values[-1] <= DEPENDENT * values[0]:
        raise ValueError(
            f"collinear controls: {involved(axes[-1], names)} are linearly dependent (condition "
            f"number {values[0] / max(values[-1], 1e-300):.1e}): {_WAYS}"
        )


def _refuse_explained(
    values: Float[ndarray, "n k"],
    c: Float[ndarray, "n K"],
    total: Float[ndarray, " k"],
    names: Sequence[str],
    what: str,
) -> None:
    left = _left(values, c)
    share = (left**2).sum(axis=0) / total
    for name, part in zip(names, share, strict=True):
        if part < EXPLAINED:
            raise ValueError(
                f"{what} {name!r} is an exact function of the controls (share left {part:.1e}): "
                f"nothing of it is unpredicted; drop the control that repeats it"
            )
    if values.shape[1] > 1:
        refuse_collinear(left.T @ left, names, f"{what}s, given the controls")


def _left(values: Float[ndarray, "n k"], c: Float[ndarray, "n K"]) -> Float[ndarray, "n k"]:
    """What columns do not explain of values, whatever their units: QR does not see scales."""
    if not c.shape[1]:
        return values
    q, _ = np.linalg.qr(c)
    return np.asarray(values - q @ (q.T @ values))


def _variation(values: Float[ndarray, "n k"]) -> Float[ndarray, " k"]:
    """Sums of squares about the mean, so that a level does not hide what a column does."""
    return np.asarray(((values - values.mean(axis=0)) ** 2).sum(axis=0))


def _within(values: ndarray, unit: ndarray, counts: ndarray) -> ndarray:
    """Values less their unit's mean."""
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, unit, values)
    return np.asarray(values - (sums / np.maximum(counts, 1)[:, None])[unit])
