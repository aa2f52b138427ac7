"""From slices of a set in the plane of effects to its pieces: polygons and their projections.

A slice is a value of t with the intervals of S = sin s inside the set; the chart (s, t) is that of
`confidence_set`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf, isfinite, log10, pi

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Interval = tuple[float, float]
Slice = tuple[float, list[Interval]]


@dataclass(frozen=True)
class Piece:
    """A part of the set with one interval in each slice: its polygon, and its range of a and b."""

    polygon: Float[ndarray, "m 2"]
    a: Interval
    b: Interval


def pieces_of(runs: Sequence[Sequence[Slice]], scale: float) -> tuple[int, list[Piece]]:
    """How many connected pieces slices form, and parts of them that have polygons.

    runs: slices that follow each other in t, one sequence for each range of t; scale: σ of the
    chart. A piece that branches is in several parts.
    """
    count, parts = 0, []
    for run in runs:
        owners, chains = _chains(run)
        count += len(set(owners))
        parts += [_piece(np.array(chain), scale) for chain in chains]
    return count, parts


def merged(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """The union of intervals, in order."""
    found: list[Interval] = []
    for lo, hi in sorted(intervals):
        if found and lo <= found[-1][1]:
            found[-1] = (found[-1][0], max(hi, found[-1][1]))
        else:
            found.append((lo, hi))
    return tuple(found)


def percent(level: float) -> str:
    """A level in percent, whole where it is.

    >>> percent(0.95), percent(0.999)
    ('95%', '99.9%')
    """
    return f"{100 * level:.6g}%"


def interval_text(intervals: Sequence[Interval]) -> str:
    """Intervals in words, such as '0.3 to 0.5 and 2 to ∞', with digits that tell the ends apart.

    >>> interval_text([(-inf, -2.0), (300.0001, 300.00023)])
    '-∞ to -2 and 300.0001 to 300.00023'
    """
    words = []
    for lo, hi in intervals:
        size, width = max(abs(lo), abs(hi)), hi - lo
        lost = floor(log10(size / width)) if 0 < width < size < inf else 0
        words.append(f"{_number(lo, 3 + lost)} to {_number(hi, 3 + lost)}")
    return " and ".join(words)


Chains = list[list[tuple[float, float, float]]]


def _chains(run: Sequence[Slice]) -> tuple[list[int], Chains]:
    """Follow intervals from slice to slice: (t, low, high) of each part, and whose part it is."""
    chains: Chains = []
    owners: list[int] = []
    past = 0.0
    before: list[Interval] = []
    held: list[int] = []
    for t, spans in run:
        links = _links(before, spans)
        now = []
        for j, span in enumerate(spans):
            origins = [i for i, to in links if to == j]
            if len(origins) == 1 and sum(i == origins[0] for i, _ in links) == 1:
                part = held[origins[0]]
            else:
                part = len(chains)
                chains.append([(past, *span)] if len(origins) == 1 else [])
                joined = {owners[held[i]] for i in origins} | {part}
                owners = [min(joined) if owner in joined else owner for owner in [*owners, part]]
                if len(origins) > 1:
                    for i in origins:
                        chains[held[i]].append((t, *before[i]))
            chains[part].append((t, *span))
            now.append(part)
        past, before, held = t, spans, now
    return owners, chains


def _links(before: list[Interval], spans: list[Interval]) -> list[tuple[int, int]]:
    """Which intervals of neighbouring slices go on: in order, or those that overlap."""
    if len(before) == len(spans):
        return [(i, i) for i in range(len(spans))]
    return [
        (i, j)
        for i, (lo, hi) in enumerate(before)
        for j, (low, high) in enumerate(spans)
        if low <= hi and lo <= high
    ]


def _piece(chain: Float[ndarray, "nodes 3"], scale: float) -> Piece:
    """The polygon around a part, low ends forward and high ends back."""
    t = np.concatenate([chain[:, 0], chain[::-1, 0]])
    s = np.arcsin(np.concatenate([chain[:, 1], chain[::-1, 2]]))
    a, b = scale * _tangent((s + t) / 2), _tangent((s - t) / 2) / scale
    return Piece(
        np.column_stack([a, b]), (float(a.min()), float(a.max())), (float(b.min()), float(b.max()))
    )


def _tangent(angle: Float[ndarray, " m"]) -> Float[ndarray, " m"]:
    """The tangent, infinite at ±π/2."""
    far = np.abs(angle) >= pi / 2 - 1e-14
    return np.asarray(np.where(far, np.copysign(inf, angle), np.tan(angle)))


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}g}" if isfinite(value) else ("-" * (value < 0) + "∞")
