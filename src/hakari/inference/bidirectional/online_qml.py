"""Both effects by online quasi-maximum likelihood, with evidence from rows that steps had not met.

Data that can be read again are cut in folds. Each fold has a run of steps over the rows of all
others, epoch by epoch, and its own rows are evidence at what that run ends with: the orthogonal
moments, from which standard errors, sets and tests are made as for every other method. The
estimate is the mean of the runs'. A stream has one run; a batch is evidence before its step, from
when the steps are stationary: earlier heads would bias the moments by their errors' product.

So the estimate is the likelihood's, and the sets are those of the moments: they agree to first
order, and the moments' own solution is at hand from the same sums. Features, directions and
penalties alone are chosen with all rows of the warm-up, as in `batch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from threadpoolctl import threadpool_limits

from hakari.inference.bidirectional.batch import BEGUN, Tell, evidence_of
from hakari.inference.bidirectional.evidence import Assumptions, Evidence
from hakari.inference.bidirectional.heads import folds_of
from hakari.inference.bidirectional.nuisance import FOLDS, Nuisance, left_out
from hakari.inference.bidirectional.online_steps import (
    OnlineSettings,
    OnlineState,
    begin,
    residuals,
    step,
)
from hakari.inference.bidirectional.orthogonal_moments import DEPENDENT
from hakari.inference.bidirectional.readings import Blocks, Readings, digest
from hakari.inference.bidirectional.rows import Rows, sampled
from hakari.inference.bidirectional.structure import effects_jacobian, to_uv
from hakari.inference.sampling import generator

WARM_UP = 20_000  # rows over all data, which say what directions and penalties are


@dataclass(frozen=True, eq=False)
class OnlineFit:
    """Runs of steps, and the evidence; None before a stream has become stationary.

    states: one a fold, or the one of a stream.
    """

    nuisance: Nuisance
    states: tuple[OnlineState, ...]
    evidence: Evidence | None

    @property
    def stationary(self) -> bool:
        """Whether every run has ended where its steps turn about."""
        return all(state.averaged for state in self.states)

    @property
    def estimate(self) -> tuple[float, float]:
        """(a, b) in the units of the data: the mean over the runs' averages."""
        a, b = self.effects
        ratio = float(self.nuisance.unit[1] / self.nuisance.unit[0])
        return float(a / ratio), float(b * ratio)

    @property
    def covariance(self) -> Float[ndarray, "2 2"]:
        """Sandwich of the efficient scores at the estimate; NaN without evidence.

        For the rows that are evidence and steps that have arrived: what is left of their way and
        their noise, which a single pass over few rows still has, is not in it.
        """
        if self.evidence is None:
            return np.full((2, 2), np.nan)
        return sandwich(self.evidence, *self.estimate)

    @property
    def effects(self) -> Float[ndarray, " 2"]:
        """(a, b) in the units of the nuisance."""
        return np.asarray(np.mean([state.best[1] for state in self.states], axis=0))


def sandwich(evidence: Evidence, a: float, b: float) -> Float[ndarray, "2 2"]:
    """Covariance of estimates that solve the two efficient moments, taken at (a, b).

    NaN where both instruments move together, so that the moments do not tell the effects apart.
    Source: design note bidirectional-effects, section 2.3.
    """
    sums = Assumptions().moments(evidence.sums)
    u, v = (float(x) for x in to_uv(a, b))
    slope = sums.first.reshape(3, 2)[1:].T / sums.weight
    sizes = np.linalg.norm(slope, axis=1)
    if abs(np.linalg.det(slope)) < DEPENDENT * sizes.prod():
        return np.full((2, 2), np.nan)
    bread = effects_jacobian(a, b) @ np.linalg.inv(slope)
    return np.asarray(bread @ sums.score_covariance(u, v) @ bread.T / sums.weight)


@dataclass(frozen=True)
class OnlinePasses:
    """Epochs over data at rest as far as they have come, then a reading for the evidence.

    found: the runs so far; its evidence is of the blocks that `readings` counts.
    """

    found: OnlineFit
    epochs: int
    readings: Readings = BEGUN

    @property
    def where(self) -> str:
        """How far it has come, in words."""
        return self.readings.where(self.epochs + 1)

    @property
    def finished(self) -> bool:
        """Whether all readings are done."""
        return self.readings.done == self.epochs + 1


def at_rest(nuisance: Nuisance, blocks: Blocks, settings: OnlineSettings) -> OnlinePasses:
    """Runs, one a fold, before their first step. nuisance: with features only.

    Raises ValueError for fewer rows than `begin` needs.
    """
    nuisance, state = begin(nuisance, sampled(blocks(), WARM_UP).rows, settings)
    return OnlinePasses(OnlineFit(nuisance, (state,) * FOLDS, None), settings.epochs)


def fit(
    begun: OnlinePasses,
    blocks: Blocks,
    settings: OnlineSettings,
    bootstraps: int,
    seed: int,
    tell: Tell,
) -> Iterator[OnlinePasses]:
    """All epochs, a run a fold, then the evidence of each fold: what is done after each block.

    begun: from `at_rest`, or what came from here before Ctrl-C, which goes on with the same blocks.
    bootstraps: multiplier draws of the evidence. seed: of the order of batches. tell: called with
    a pass and the rows that it has read. Raises ValueError for data that change between passes.
    """
    passes = begun
    while not passes.finished:
        epoch = passes.readings.done
        last = epoch == passes.epochs
        if last:
            found = replace(passes.found, nuisance=_with_heads(passes.found))
            passes = replace(passes, found=found)
        for k, rows in passes.readings.rest(blocks):
            with threadpool_limits(1, user_api="blas"):
                if last:
                    found = _with_evidence(passes.found, rows, k, bootstraps, seed)
                else:
                    found = _epoch(passes.found, rows, k, epoch, settings, seed)
            first = "" if k else digest(rows)
            passes = replace(passes, found=found, readings=passes.readings.after(len(rows), first))
            tell("effects" if last else f"epoch {epoch + 1}", passes.readings.rows)
            yield passes
        passes = replace(passes, readings=passes.readings.ended())
        yield passes


def start(nuisance: Nuisance, rows: Rows, settings: OnlineSettings) -> OnlineFit:
    """A stream before its first step; rows: of the warm-up, which are not yet learned from."""
    nuisance, state = begin(nuisance, rows, settings)
    return OnlineFit(nuisance, (state,), None)


def partial(
    found: OnlineFit, rows: Rows, settings: OnlineSettings, bootstraps: int, seed: int
) -> OnlineFit:
    """The stream after more rows, which come once and in the order of the data.

    Raises ValueError for what `fit` has made: its runs have each left out a fold.
    """
    if len(found.states) != 1:
        raise ValueError(
            f"{len(found.states)} runs of a fit over epochs cannot go on as a stream: start one"
        )
    (state,), nuisance = found.states, found.nuisance
    phi, y = nuisance.matrix(rows), nuisance.outcomes(rows)
    W, h, met = np.empty((len(rows), 2)), np.empty((len(rows), 2)), np.zeros(len(rows), bool)
    first = state.rows
    with threadpool_limits(1, user_api="blas"):
        for at in _batches(np.arange(len(rows)), settings.batch):
            if state.averaged:
                W[at], h[at] = residuals(state.coordinates, state.mean_heads, phi[at], y[at])
                met[at] = True
            state = step(replace(state, rows=state.rows + len(at)), phi[at], y[at], settings)
    after = replace(found, states=(state,))
    if not met.any():
        return after
    chance = generator(seed, f"bootstrap of rows {first}") if bootstraps else None
    new = evidence_of(_with_heads(found), rows, W[met], h[met], bootstraps, chance)
    return replace(after, evidence=new if found.evidence is None else found.evidence + new)


# --- passes -------------------------------------------------------------------------------------


def _epoch(
    found: OnlineFit, rows: Rows, block: int, epoch: int, settings: OnlineSettings, seed: int
) -> OnlineFit:
    """Steps over a block's batches in random order, each of one fold and for the others' runs."""
    nuisance, chance = found.nuisance, generator(seed, f"order of epoch {epoch}, block {block}")
    phi, y, fold = nuisance.matrix(rows), nuisance.outcomes(rows), folds_of(len(rows), FOLDS)
    parts = []
    for k in range(FOLDS):
        at = chance.permutation(np.flatnonzero(fold == k))
        parts += [(k, part) for part in _batches(at, settings.batch)]
    after = list(found.states)
    for i in chance.permutation(len(parts)):
        k, at = parts[i]
        features, outcomes = phi[at], y[at]
        for j in range(FOLDS):
            if j != k:
                seen = after[j].rows + len(at) * (epoch == 0)
                after[j] = step(replace(after[j], rows=seen), features, outcomes, settings)
    return replace(found, states=tuple(after))


def _with_evidence(
    found: OnlineFit, rows: Rows, block: int, bootstraps: int, seed: int
) -> OnlineFit:
    """With the evidence of a block's folds, each at the heads of the run that left it out."""
    W, phi, fold = left_out(found.nuisance, rows)
    heads = found.nuisance.variances
    h = None if heads is None else heads.left_out(phi, fold)
    chance = generator(seed, f"bootstrap of block {block}") if bootstraps else None
    new = evidence_of(found.nuisance, rows, W, h, bootstraps, chance)
    return replace(found, evidence=new if found.evidence is None else found.evidence + new)


def _with_heads(found: OnlineFit) -> Nuisance:
    """The nuisance with coefficients of each run, their mean, and what they say of variances."""
    nuisance, c = found.nuisance, found.states[0].coordinates
    if nuisance.means is None or nuisance.variances is None:
        raise ValueError("a nuisance without heads of a warm-up: make the stream by `start`")
    runs = np.stack([state.best[0] for state in found.states])
    runs = np.concatenate([runs, runs.mean(axis=0, keepdims=True)])
    heads = c.vectors @ (c.scale * runs)
    moved = ((1 - c.shrink[1:, 2:]) * runs[-1, 1:, 2:] ** 2).sum(axis=0)
    variances = replace(
        nuisance.variances,
        coefficients=heads[:, :, 2:],
        mean=runs[-1, 0, 2:],
        variance=nuisance.variances.error + moved,
    )
    means = replace(nuisance.means, coefficients=heads[:, :, :2])
    a, b = found.effects
    return replace(nuisance, means=means, variances=variances, start=(float(a), float(b)))


def _batches(rows: Int[ndarray, " n"], size: int) -> Iterator[Int[ndarray, " m"]]:
    """The rows in batches of about a size, none of them much smaller."""
    return iter(np.array_split(rows, max(round(len(rows) / size), 1)))
