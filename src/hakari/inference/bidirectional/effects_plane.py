"""The plane of both effects: the confidence set, its mirror and both roots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import ndarray

from hakari.inference.bidirectional.confidence_set import ConfidenceSet
from hakari.inference.bidirectional.effects import Effects
from hakari.inference.bidirectional.set_pieces import percent
from hakari.inference.plots import BLUE, GREY, INK, ORANGE, PALE, WIDTH

MARGIN = 0.12  # of the set's size, around it
NARROW = 0.05  # share of a frame under which a set is too small to see beside its mirror
ROOM = 3.0  # half the frame of an unbounded set, in sizes of one residual by the other
BEYOND = 1e3  # frames to which an infinite piece is drawn
HEIGHT = 3.7

Polygon = Float[ndarray, "m 2"]


@dataclass(frozen=True)
class Frame:
    """What a panel shows: the ends of a and of b."""

    low: Float[ndarray, " 2"]
    high: Float[ndarray, " 2"]

    @property
    def size(self) -> Float[ndarray, " 2"]:
        """Width and height."""
        return np.asarray(self.high - self.low)


def effects_plane(effects: Effects, level: float = 0.95) -> Figure:
    """The confidence set with both roots, each piece and its mirror shaded.

    Two panels where the set would be too small to see in one with its mirror. A set that does not
    end in a frame is cut there, and the title says so.
    """
    found = effects.confidence_set(level)
    frames = _frames(found, effects)
    width = WIDTH if len(frames) > 1 else 0.75 * WIDTH
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots(1, len(frames), squeeze=False).ravel()
    titles = ("|ab| < 1", "its mirror, which fits as well") if len(frames) > 1 else ("",)
    for axis, frame, title in zip(axes, frames, titles, strict=True):
        _shade(axis, found, frame)
        _roots(axis, effects)
        _edge(axis, frame)
        _framed(axis, frame, effects.names, title, _cut(found, frame))
    shown: dict[str, Any] = {}
    for axis in axes:
        shown |= {name: mark for mark, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(shown.values()), list(shown), loc="outside upper center", ncols=3, frameon=False,
        fontsize=8.5,
    )  # fmt: skip
    return figure


# --- what is drawn ----------------------------------------------------------------------------


def mirrored(polygon: Polygon, least: Float[ndarray, " 2"]) -> list[Polygon]:
    """A piece's mirror, (1/b, 1/a) of each point, in the quadrants that it has parts in.

    Where a piece meets an axis its mirror is infinite: parts nearer to the axes than `least`, a
    small size of a and of b, are left out, so that the mirror ends at 1/least.
    """
    out = []
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        part = polygon
        for column in range(2):
            part = _clipped(part, column, signs[column], least[column])
        if len(part) > 2:
            out.append(1 / part[:, ::-1])
    return out


def _clipped(polygon: Polygon, column: int, sign: int, least: float) -> Polygon:
    """The part with sign · coordinate ≥ least (Sutherland and Hodgman, 1974)."""
    depth = sign * polygon[:, column] - least
    out = []
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        if depth[i] >= 0:
            out.append(polygon[i])
        if (depth[i] >= 0) != (depth[j] >= 0):
            share = depth[i] / (depth[i] - depth[j])
            out.append(polygon[i] + share * (polygon[j] - polygon[i]))
    return np.array(out).reshape(-1, 2)


def _shade(axis: Axes, found: ConfidenceSet, frame: Frame) -> None:
    """Pieces, and their mirrors; the set of a triangular system is a line."""
    text = f"{percent(found.level)} Anderson-Rubin set"
    far = BEYOND * (frame.size + abs(frame.low))
    if found.restrict:
        for place, span in enumerate(found.a if found.restrict == "b=0" else found.b):
            line = np.zeros((2, 2))
            line[:, 0 if found.restrict == "b=0" else 1] = np.clip(span, -far.max(), far.max())
            label = text if place == 0 else "_"
            axis.plot(*line.T, color=BLUE, lw=6, alpha=0.35, solid_capstyle="butt", label=label)
        return
    for place, piece in enumerate(found.pieces):
        polygon = np.clip(piece, -far, far)
        axis.fill(*polygon.T, color=BLUE, alpha=0.35, lw=0, label="_" if place else text)
        axis.plot(*np.vstack([polygon, polygon[:1]]).T, color=BLUE, lw=0.8)
        for k, other in enumerate(mirrored(polygon, 1 / far[::-1])):
            label = "_" if place or k else "its mirror"
            axis.fill(*other.T, facecolor=ORANGE, alpha=0.45, lw=0, hatch="///", label=label)


def _roots(axis: Axes, effects: Effects) -> None:
    """The point that is reported and the other one."""
    if not effects.given:
        return
    axis.plot(*effects.estimate, "o", color=INK, ms=6, label=f"reported: {_short(effects)}")
    if np.isfinite(effects.other_root).all():
        axis.plot(*effects.other_root, "D", mfc="white", mec=INK, ms=6, label="the other root")


def _short(effects: Effects) -> str:
    return "|ab| < 1" if effects.root == "stable" else "|ab| > 1"


def _edge(axis: Axes, frame: Frame) -> None:
    """|ab| = 1, where a point is its own mirror or feedback never ends, if the frame has some."""
    size = np.abs([frame.low, frame.high]).max(axis=0)
    nearest = np.maximum(np.maximum(frame.low, -frame.high), 0.0)
    if not nearest.prod() < 1 < size.prod():
        return
    for sign in (1, -1):
        for side in (1, -1):
            a = side * np.geomspace(min(1 / (2 * size[1]), size[0]), 2 * size[0], 400)
            label = "|ab| = 1" if sign == side == 1 else "_"
            axis.plot(a, sign / a, color=GREY, lw=0.9, ls=":", label=label)


def _framed(axis: Axes, frame: Frame, names: tuple[str, str], title: str, cut: bool) -> None:
    axis.set_xlim(frame.low[0], frame.high[0])
    axis.set_ylim(frame.low[1], frame.high[1])
    axis.set_xlabel(f"a: effect of {names[1]} on {names[0]}")
    axis.set_ylabel(f"b: effect of {names[0]} on {names[1]}")
    axis.axhline(0, color=PALE, zorder=0)
    axis.axvline(0, color=PALE, zorder=0)
    words = [title] if title else []
    axis.set_title("; ".join([*words, *(["cut at the frame"] if cut else [])]), fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_locator(MaxNLocator(6))


def _frames(found: ConfidenceSet, effects: Effects) -> list[Frame]:
    """One frame for set and mirror, or one each where the set would be a dot."""
    stable, other = effects.solution.estimate, None
    given = effects.given
    points = [np.array([stable])] if given else []
    if found.kind in ("unbounded", "all", "empty") or not (found.pieces or found.restrict):
        unit = _unit(found)
        room = ROOM * np.array([unit, 1 / unit])
        return [_around([*points, room[None], -room[None]])]
    if found.restrict:
        return [_around([*points, *_ends(found)])]
    own = _around([*points, *found.pieces])
    pieces = [m for piece in found.pieces for m in mirrored(piece, 1e-3 * own.size)]
    other = _around([*pieces, *([1 / points[0][:, ::-1]] if given else [])])
    both = _around([np.stack([f.low, f.high]) for f in (own, other)])
    if (own.size > NARROW * both.size).all():
        return [both]
    if given and not _finite_mirror(found):
        middle = 1 / np.array(stable)[::-1]
        other = Frame(middle - np.abs(middle), middle + np.abs(middle))
    return [own, other]


def _finite_mirror(found: ConfidenceSet) -> bool:
    """Whether no piece meets an axis."""
    return all(lo * hi > 0 for lo, hi in (*found.a, *found.b))


def _unit(found: ConfidenceSet) -> float:
    """Size of y1 over that of y2, from the residuals."""
    return float(found.sums.standard.scale)


def _ends(found: ConfidenceSet) -> list[Polygon]:
    """Ends of a triangular system's set, with some width across."""
    free = 0 if found.restrict == "b=0" else 1
    unit = _unit(found) if free == 0 else 1 / _unit(found)
    points = []
    for span in found.a if free == 0 else found.b:
        for end in span:
            point = np.zeros(2)
            point[free], point[1 - free] = np.clip(end, -ROOM * unit, ROOM * unit), 0.1 / unit
            points += [point, point * np.where(np.arange(2) == free, 1, -1)]
    return [np.array(points)]


def _around(parts: list[Polygon]) -> Frame:
    points = np.concatenate([part for part in parts if len(part)])
    low, high = points.min(axis=0), points.max(axis=0)
    room = MARGIN * np.maximum(high - low, 1e-9 + 1e-3 * np.abs(high))
    return Frame(low - room, high + room)


def _cut(found: ConfidenceSet, frame: Frame) -> bool:
    """Whether some of the set or its mirror that a panel shows goes on beyond it."""
    if found.kind in ("unbounded", "all"):
        return True
    if found.restrict or not found.pieces:
        return False
    far = BEYOND * (frame.size + abs(frame.low))
    for piece in found.pieces:
        for part in [piece, *mirrored(piece, 1 / far[::-1])]:
            inside = ((part >= frame.low) & (part <= frame.high)).all(axis=1)
            if inside.any() and not inside.all():
                return True
    return False
