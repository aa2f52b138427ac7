"""Horizons that share their rows, with the controls taken out of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from hakari.inference.frisch_waugh import Concentrated, concentrate, refuse_dependent
from hakari.inference.horseshoe import Horseshoe
from hakari.inference.projection_design import (
    Design,
    Question,
    controls_on,
    rows_by_horizon,
)
from hakari.inference.series import Series

DETERMINISTIC = ("constant", "trend")  # how names of columns begin that are never shrunk


@dataclass(frozen=True)
class Part:
    """Horizons that share their rows, and their concentrated columns, responses side by side."""

    horizons: tuple[int, ...]  # positions among the horizons
    rows: ndarray  # (n,) positions in the table
    fit: Concentrated  # y holds (response, horizon), response by response


def concentrated_parts(
    question: Question, design: Design, series: Series, prior: Horseshoe | None
) -> tuple[Part, ...]:
    """The horizons in groups that share rows, their controls concentrated out or shrunk.

    Raises ValueError as `refuse_dependent`, and for rows too few to shrink with.
    """
    used = rows_by_horizon(design, question.sample)
    groups: dict[bytes, list[int]] = {}
    for h in range(used.shape[1]):
        groups.setdefault(used[:, h].tobytes(), []).append(h)
    out = []
    for horizons in groups.values():
        rows = np.flatnonzero(used[:, horizons[0]])
        unit = None if design.unit is None else _compact(design.unit[rows])
        s, (c, controls) = design.shocks[rows], controls_on(design, rows, series)
        z = None if design.instruments is None else design.instruments[rows]
        names = (design.shock_names, design.instrument_names, controls)
        if prior is None:
            refuse_dependent(s, z, c, unit, names)
        y = design.outcomes[np.ix_(rows, np.arange(design.outcomes.shape[1]), np.array(horizons))]
        wide = y.reshape(len(rows), -1)
        fit = (
            concentrate(wide, s, z, c, unit)
            if prior is None
            else _shrunk(wide, s, z, c, design, prior)
        )
        out.append(Part(tuple(horizons), rows, fit))
    return tuple(out)


def overlap_notes(question: Question, series: Series, parts: Sequence[Part]) -> tuple[str, ...]:
    """Says which dates are used where instruments have missing spells."""
    gone = [
        f"{name} ({int(np.isnan(series.columns[name]).sum())} rows)"
        for name in question.instruments
        if np.isnan(series.columns[name]).any()
    ]
    if not gone:
        return ()
    rows = np.unique(np.concatenate([part.rows for part in parts]))
    first, last = series.labels[rows[0]], series.labels[rows[-1]]
    return (
        f"instruments are missing in {', '.join(gone)}: the sample is where they overlap, "
        f"{first} to {last}, {len(rows)} rows",
    )


# --- parts --------------------------------------------------------------------------------


def _shrunk(
    y: ndarray, s: ndarray, z: ndarray | None, c: ndarray, design: Design, prior: Horseshoe
) -> Concentrated:
    from hakari.inference.projection_controls import concentrate_shrunk

    if design.unit is not None:
        raise ValueError("controls_prior is for one series, not for effects of a panel's units")
    if len(y) < 2 * s.shape[1] + 10:
        raise ValueError(f"{len(y)} rows are left: controls_prior needs ten and two a shock")
    first = [k for k, name in enumerate(design.control_names) if name.startswith(DETERMINISTIC)]
    rest = [k for k in range(c.shape[1]) if k not in first]
    return concentrate_shrunk(y, s, z, c[:, first + rest], len(first), prior)


def _compact(unit: ndarray) -> ndarray:
    """Numbers of the units that are there, from 0 up."""
    found: ndarray = np.unique(unit, return_inverse=True)[1]
    return found
