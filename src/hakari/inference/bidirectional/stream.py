"""Both effects from rows that come once: orthogonal moments, each met by what came before.

A batch is predicted by heads that learned from earlier rows alone; its moments enter the sums;
then the heads learn from it. At the truth the moments of a batch have mean 0 given the past, so
that the sums have the law that independent rows would give, without folds. Design note
bidirectional-effects, section 2.6 B.

The heads learn by w += (N G + Λ)⁻¹ φ'(t − φw), with N the rows so far, G the mean of φφ' and Λ the
penalties that the warm-up chose: recursive ridge regression with G known. Rows of few neighbours,
whose predicted variances would swing without Λ, are those that weigh most where these are small. G
is learned from all rows at first and from one batch in `SPARSE` later, since its error matters less
than that of φ't and costs P times as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.bidirectional.batch import Passes, evidence_of, fit
from hakari.inference.bidirectional.drift import Monitor
from hakari.inference.bidirectional.evidence import Assumptions, Evidence
from hakari.inference.bidirectional.heads import mean_size, product
from hakari.inference.bidirectional.nuisance import Nuisance, left_out, shocks
from hakari.inference.bidirectional.orthogonal_moments import MomentSums
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.sampling import generator

LEAST, MOST = 1024, 65_536  # rows of a batch that is met with the same heads
SHARE = 8  # one over the share of the rows so far that the next batch may be
KNOWN = 256  # rows a feature from which G counts as known
SPARSE = 8  # batches of which one is added to G then
UNLIKE = 0.5  # share of a batch's gain that its own rows lose again; n/N for rows like the others
AGAIN = 1.5  # growth of G's rows after which its inverse is taken again
HAIR = 1e-5  # of G's mean diagonal: sums in single precision do not know less
PIECES = 16  # of a window: the oldest is dropped as a whole
LONGEST = 2048  # points of the path; more are thinned by two


@dataclass(frozen=True)
class Forgetting:
    """How old rows leave. half_life: rows after which a row counts half; window: rows after which
    it does not count at all, dropped in sixteenths. None: never.
    """

    half_life: float | None = None
    window: float | None = None

    def __post_init__(self) -> None:
        for name in ("half_life", "window"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not LEAST <= value < float("inf"):
                raise ValueError(
                    f"{name} {value!r}: at least {LEAST:,} rows are needed; leave it out to "
                    "forget nothing"
                )
        if self.half_life and self.window:
            raise ValueError("half_life and window together: give one of them")

    def factor(self, rows: int) -> float:
        """What is left of the weight of a row after so many."""
        return 1.0 if self.half_life is None else float(0.5 ** (rows / self.half_life))

    @property
    def memory(self) -> float:
        """Rows that count at most."""
        if self.window is not None:
            return self.window
        return float("inf") if self.half_life is None else self.half_life / np.log(2)


@dataclass(frozen=True)
class Stream:
    """What the next row needs.

    nuisance: features, units and the warm-up's heads. heads (P, 4): of both means, then of both
    log variances. gram (P, P) and gram_rows: φφ' summed and its rows; inverse: of their ratio, at
    `inverse_rows`. rows: that were read. weight: rows that count. effects: in the nuisance's
    units. pieces: evidence of parts of the window, the newest last. path (m, 5): rows, a, b and
    their standard errors, in the data's units.
    """

    nuisance: Nuisance
    heads: Float[ndarray, "P 4"]
    penalties: Float[ndarray, " 4"]
    gram: Float[ndarray, "P P"]
    gram_rows: float
    inverses: Float[ndarray, "4 P P"]
    inverse_weight: float
    rows: int
    weight: float
    batches: int
    effects: tuple[float, float]
    pieces: tuple[Evidence, ...]
    path: Float[ndarray, "m 5"]
    monitor: Monitor

    @property
    def evidence(self) -> Evidence:
        """Of all rows that count."""
        return _total(self.pieces)


def begin(
    nuisance: Nuisance, assumptions: Assumptions, rows: Rows, bootstraps: int, seed: int
) -> Stream:
    """A stream whose first rows were met by heads of the other folds, as `batch.fit` does."""
    quiet = lambda name, done: None  # noqa: E731
    *_, passes = fit(Passes(nuisance), assumptions, lambda: iter([rows]), bootstraps, seed, quiet)
    fitted, evidence = passes.nuisance, passes.sums
    W, phi, _ = left_out(fitted, rows)
    heads = [h for h in (fitted.means, fitted.variances) if h is not None]
    gram, n = product(phi), float(len(rows))
    penalties = np.concatenate([h.penalty for h in heads]) * mean_size(gram)
    stream = Stream(
        fitted,
        np.hstack([h.coefficients[-1] for h in heads]),
        penalties,
        gram,
        n,
        _inverses(gram / n, penalties / n),
        n,
        len(rows),
        n,
        0,
        fitted.start,
        (evidence,),
        np.empty((0, 5)),
        Monitor.starting(watched(fitted, assumptions, phi, W, evidence)),
    )
    return _looked(stream, assumptions)


def advance(
    stream: Stream,
    assumptions: Assumptions,
    forgetting: Forgetting,
    rows: Rows,
    bootstraps: int,
    seed: int,
) -> Stream:
    """The stream after some more rows."""
    for part in _cut(stream, forgetting, rows):
        stream = _batch(stream, assumptions, forgetting, part, bootstraps, seed)
    return stream


def _batch(
    stream: Stream,
    assumptions: Assumptions,
    forgetting: Forgetting,
    rows: Rows,
    bootstraps: int,
    seed: int,
) -> Stream:
    nuisance, n = stream.nuisance, len(rows)
    phi = nuisance.matrix(rows)
    predicted = phi @ stream.heads.astype(np.float32)
    W = nuisance.outcomes(rows) - predicted[:, :2]
    chance = generator(seed, f"bootstrap of rows {stream.rows}") if bootstraps else None
    here = replace(nuisance, start=stream.effects)
    h = None if nuisance.variances is None else predicted[:, 2:].astype(float)
    new = evidence_of(here, rows, W, h, bootstraps, chance)
    gap = W if h is None else np.hstack([W, nuisance.log_squares(shocks(W, stream.effects)) - h])
    seen = watched(nuisance, assumptions, phi, W, new)
    monitor = stream.monitor.after(assumptions, seen, stream.rows + n)
    stream = _learned(stream, forgetting, phi, gap)
    stream = replace(
        stream,
        pieces=_entered(stream.pieces, new, forgetting),
        rows=stream.rows + n,
        batches=stream.batches + 1,
        monitor=monitor,
    )
    return _looked(stream, assumptions)


def watched(
    nuisance: Nuisance,
    assumptions: Assumptions,
    phi: Float[ndarray, "n P"],
    W: Float[ndarray, "n 2"],
    evidence: Evidence,
) -> MomentSums:
    """The moments that the alarm listens to, of residuals in the nuisance's units.

    Those of the evidence, but with a constant covariance: how much a row says of the effects then
    hangs on how far the instruments move, which grows as heads learn, so that a batch is no longer
    to the rows before as n to N. There the warm-up's heads make the instruments.
    """
    heads = nuisance.variances
    if heads is None or assumptions.covariance == "zero":
        return evidence.sums
    h = phi @ heads.coefficients[-1].astype(np.float32)
    k = nuisance.instruments(h.astype(float))[:, :2]
    W = W * nuisance.unit
    return MomentSums.of(W[:, 0], W[:, 1], k, constant_covariance=True)


def _learned(
    stream: Stream, forgetting: Forgetting, phi: Float[ndarray, "n P"], gap: Float[ndarray, "n t"]
) -> Stream:
    """The heads after a step towards the rows, and G.

    Rows unlike those in G are taken into it before the step, which would else overshoot.
    """
    n = len(phi)
    weight = min(forgetting.factor(n) * stream.weight + n, max(forgetting.memory, n))
    kept = (weight - n) / stream.weight  # of the weight of each row before, and of Λ
    slope = (phi.T @ gap.astype(np.float32)).astype(float)
    slope[1:] -= (1 - kept) * stream.penalties * stream.heads[1:]
    early = stream.gram_rows < KNOWN * len(stream.gram)
    taken = early or stream.batches % SPARSE == 0
    stream = replace(
        stream, gram=kept * stream.gram, gram_rows=kept * stream.gram_rows, weight=weight
    )
    stream = _known_with(stream, phi) if taken else stream
    fresh = early or weight > AGAIN * stream.inverse_weight
    stream = _inverted(stream) if fresh else stream
    step = _step(stream, slope)
    lost_again = ((phi @ step.astype(np.float32)) ** 2).sum()
    if not (taken and fresh) and lost_again > UNLIKE * (slope * step).sum():
        stream = _inverted(stream if taken else _known_with(stream, phi))
        step = _step(stream, slope)
    return replace(stream, heads=stream.heads + step)


def _known_with(stream: Stream, phi: Float[ndarray, "n P"]) -> Stream:
    """G with the rows."""
    return replace(stream, gram=stream.gram + product(phi), gram_rows=stream.gram_rows + len(phi))


def _step(stream: Stream, slope: Float[ndarray, "P t"]) -> Float[ndarray, "P t"]:
    return np.asarray(np.einsum("tpq,qt->pt", stream.inverses, slope) / stream.weight)


def _looked(stream: Stream, assumptions: Assumptions) -> Stream:
    """The effects from all that counts, for the next batch and the path."""
    found = assumptions.solve(stream.evidence.sums)
    a, b = found.estimate
    point = np.array([[stream.rows, a, b, *found.std_error]])
    path = np.vstack([stream.path, point])
    path = path[::-2][::-1] if len(path) > LONGEST else path  # the last point stays
    ratio = float(stream.nuisance.unit[1] / stream.nuisance.unit[0])
    effects = (a * ratio, b / ratio) if np.isfinite([a, b]).all() else stream.effects
    return replace(stream, effects=effects, path=path)


def merged(one: Stream, other: Stream, assumptions: Assumptions) -> Stream:
    """One stream of both: the sums add exactly, so that the estimate is that of the pooled sums.

    It is not the number of a single pass over both, in which the heads would have met each row
    with more behind them. Heads of the same features and units are averaged by rows; else those
    of the stream with more rows go on.
    """
    first, second = (one, other) if one.weight >= other.weight else (other, one)
    heads, gram, rows = first.heads, first.gram, first.gram_rows
    penalties, weight = first.penalties, first.weight
    if _alike(first.nuisance, second.nuisance):
        weight += second.weight
        share = second.weight / weight
        heads = (1 - share) * first.heads + share * second.heads
        gram, rows = gram + second.gram, rows + second.gram_rows
        penalties = penalties + second.penalties
    stream = replace(
        first,
        heads=heads,
        penalties=penalties,
        gram=gram,
        gram_rows=rows,
        rows=one.rows + other.rows,
        weight=weight,
        pieces=(one.evidence + other.evidence,),
        path=one.path,
        monitor=one.monitor.beside(other.monitor),
    )
    return _looked(_inverted(stream), assumptions)


def as_nuisance(stream: Stream) -> Nuisance:
    """The warm-up's nuisance with the heads as they are now, for predictions by all rows."""
    nuisance, at = stream.nuisance, 0
    out: dict[str, Any] = {"start": stream.effects}
    for name in ("means", "variances"):
        heads = getattr(nuisance, name)
        if heads is not None:
            part = np.repeat(stream.heads[None, :, at : at + 2], len(heads.coefficients), axis=0)
            out[name], at = replace(heads, coefficients=part), at + 2
    return replace(nuisance, **out)


# --- parts ------------------------------------------------------------------------------------


def _cut(stream: Stream, forgetting: Forgetting, rows: Rows) -> Iterator[Rows]:
    """Batches no larger than a share of what the heads have learned from."""
    at, seen = 0, stream.weight
    room = min(forgetting.memory / SHARE, MOST)
    while at < len(rows):
        size = int(max(LEAST, min(seen / SHARE, room)))
        size = len(rows) - at if len(rows) - at < 2 * size <= 2 * MOST else size
        yield rows.cut(at, at + size)
        at, seen = at + size, seen + size


def _total(pieces: tuple[Evidence, ...]) -> Evidence:
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total


def _entered(
    pieces: tuple[Evidence, ...], new: Evidence, forgetting: Forgetting
) -> tuple[Evidence, ...]:
    """The evidence with a batch more, and without what is too old."""
    if forgetting.window is None:
        return (_total(pieces).scaled(forgetting.factor(new.rows)) + new,)
    if pieces[-1].rows + new.rows <= forgetting.window / PIECES:
        pieces = (*pieces[:-1], pieces[-1] + new)
    else:
        pieces = (*pieces, new)
    while len(pieces) > 1 and sum(p.rows for p in pieces[1:]) >= forgetting.window:
        pieces = pieces[1:]
    return pieces


def _inverted(stream: Stream) -> Stream:
    """The inverses as of now."""
    G, N = stream.gram / stream.gram_rows, stream.weight
    return replace(stream, inverses=_inverses(G, stream.penalties / N), inverse_weight=N)


def _inverses(G: ndarray, penalties: ndarray) -> Float[ndarray, "t P P"]:
    """(G + penalty)⁻¹ for each, the constant not penalised."""
    hair = HAIR * np.trace(G) / len(G)
    slopes = np.diag(np.append(0.0, np.ones(len(G) - 1)))
    return np.stack([np.linalg.inv(G + max(p, hair) * slopes) for p in penalties])


def _alike(one: Nuisance, other: Nuisance) -> bool:
    """Whether heads of both are about the same features and units."""
    same = one.regimes == other.regimes and np.array_equal(one.unit, other.unit)
    same &= np.array_equal(one.centre, other.centre)
    if one.basis is None or other.basis is None:
        return bool(same and one.basis is other.basis)
    return bool(same and one.basis.to_dict() == other.basis.to_dict())
