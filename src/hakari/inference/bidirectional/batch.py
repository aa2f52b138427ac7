"""Both effects from data that can be read again: five passes of sums that add.

Rows drawn from all of them fix the features. Then (1) heads of the outcomes' means; (2) heads of
the log squares of what they leave; (3) first effects, with the inverse variances of (2) as
instruments; (4) heads of the log variances of the structural shocks at those; (5) the orthogonal
moments with their inverses, which are the efficient instruments. Rows are always met by heads that
did not see their fold. Design note bidirectional-effects, sections 2.3 and 2.6 C.

A pass gives each block to a worker and adds the sums in the order of the blocks: the result is the
same for any number of workers, to the bit, and for a fit that was interrupted and went on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import joblib
import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator
from threadpoolctl import threadpool_limits

from hakari.inference.bidirectional.evidence import Assumptions, Evidence
from hakari.inference.bidirectional.heads import Grams, folds_of, ridge
from hakari.inference.bidirectional.identification import RatioSums
from hakari.inference.bidirectional.nuisance import FOLDS, Nuisance, left_out, shocks
from hakari.inference.bidirectional.readings import Blocks, Readings, digest
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.sampling import generator
from hakari.inference.workers import in_order

Tell = Callable[[str, int], None]
BEGUN = Readings()
PASSES = ("means", "reduced-form variances", "first effects", "variances", "effects")


@dataclass(frozen=True)
class Passes:
    """Five passes as far as they have come; two with regimes, whose dummies are the instruments.

    nuisance: with the heads of the passes that are done. sums: `Grams` or `Evidence` of the next
    pass, over the blocks that `readings` counts; at the end, the evidence about the effects.
    """

    nuisance: Nuisance
    readings: Readings = BEGUN
    sums: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the passes, in order."""
        return (PASSES[0], PASSES[-1]) if self.nuisance.regimes else PASSES

    @property
    def where(self) -> str:
        """How far it has come, in words."""
        return self.readings.where(len(self.names))

    @property
    def finished(self) -> bool:
        """Whether all passes are done."""
        return self.readings.done == len(self.names)


def fit(
    begun: Passes,
    assumptions: Assumptions,
    blocks: Blocks,
    bootstraps: int,
    seed: int,
    tell: Tell,
) -> Iterator[Passes]:
    """All passes over blocks that can be read again: the passes after each block, the last done.

    begun: a nuisance with features only, or passes that came from here before Ctrl-C, which go on
    with the same blocks. tell: called with a pass and the rows that it has read. Raises ValueError
    for no rows, and for data that change between passes.
    """
    passes = begun
    while not passes.finished:
        name = passes.names[passes.readings.done]
        for more in _read_on(passes, blocks, _work(passes, bootstraps, seed)):
            passes = more
            tell(name, passes.readings.rows)
            yield passes
        passes = _after_pass(passes, assumptions)
        yield passes


def first_effects(
    nuisance: Nuisance, assumptions: Assumptions, evidence: Evidence
) -> tuple[float, float]:
    """Effects in units of the nuisance; (0, 0) where the moments have no solution."""
    a, b = assumptions.solve(evidence.sums).estimate
    ratio = float(nuisance.unit[1] / nuisance.unit[0])
    return (a * ratio, b / ratio) if np.isfinite([a, b]).all() else (0.0, 0.0)


def evidence_of(
    nuisance: Nuisance,
    rows: Rows,
    W: Float[ndarray, "n 2"],
    h: Float[ndarray, "n 2"] | None,
    bootstraps: int = 0,
    chance: Generator | None = None,
) -> Evidence:
    """Evidence of rows with residuals W in the nuisance's units and predicted log variances h.

    Without h, dummies of regimes are the instruments.
    """
    W_ = W * nuisance.unit
    seen = nuisance.log_squares(W if h is None else shocks(W, nuisance.start))
    log_ratio = seen[:, 0] - seen[:, 1]
    one = np.ones((len(W), 1))
    if h is None:
        k = nuisance.dummies(rows)
        ratio = RatioSums.of(np.hstack([one, k[:, 1:]]), log_ratio)
    else:
        k = nuisance.instruments(h)
        ratio = RatioSums.of(np.hstack([one, (h[:, :1] - h[:, 1:])]), log_ratio)
    return Evidence.of(W_, k, ratio, bootstraps, chance)


# --- passes: (rows, number of the block) -> sums ----------------------------------------------


def _work(passes: Passes, bootstraps: int, seed: int) -> Callable[[Rows, int], Any]:
    """What the next pass makes of a block."""
    name = passes.names[passes.readings.done]
    if name == "means":
        return partial(_means, passes.nuisance)
    if name.endswith("variances"):
        return partial(_log_squares, passes.nuisance)
    return partial(_evidence, passes.nuisance, bootstraps if name == "effects" else 0, seed)


def _after_pass(passes: Passes, assumptions: Assumptions) -> Passes:
    """The nuisance with what a whole pass has found."""
    name, readings = passes.names[passes.readings.done], passes.readings.ended()
    nuisance, sums = passes.nuisance, passes.sums
    if name == "means":
        nuisance = replace(nuisance, means=ridge(sums))
    elif name.endswith("variances"):
        nuisance = replace(nuisance, variances=ridge(sums))
    elif name == "first effects":
        nuisance = replace(nuisance, start=first_effects(nuisance, assumptions, sums))
    return Passes(nuisance, readings, sums if name == "effects" else None)


def _means(nuisance: Nuisance, rows: Rows, block: int) -> Grams:
    fold = folds_of(len(rows), FOLDS)
    return Grams.of(nuisance.matrix(rows), nuisance.outcomes(rows), fold, FOLDS)


def _log_squares(nuisance: Nuisance, rows: Rows, block: int) -> Grams:
    W, phi, fold = left_out(nuisance, rows)
    return Grams.of(phi, nuisance.log_squares(shocks(W, nuisance.start)), fold, FOLDS)


def _evidence(nuisance: Nuisance, bootstraps: int, seed: int, rows: Rows, block: int) -> Evidence:
    W, phi, fold = left_out(nuisance, rows)
    chance = generator(seed, f"bootstrap of block {block}") if bootstraps else None
    heads = nuisance.variances
    h = None if heads is None else heads.left_out(phi, fold)
    return evidence_of(nuisance, rows, W, h, bootstraps, chance)


def _read_on(passes: Passes, blocks: Blocks, work: Callable[[Rows, int], Any]) -> Iterator[Passes]:
    """The passes after each further block, in order; blocks run side by side through joblib."""
    with threadpool_limits(1, user_api="blas"):
        jobs = (joblib.delayed(_counted)(work, rows, k) for k, rows in passes.readings.rest(blocks))
        with closing(in_order(jobs)) as parts:
            for part, rows, first in parts:
                sums = part if passes.sums is None else passes.sums + part
                passes = Passes(passes.nuisance, passes.readings.after(rows, first), sums)
                yield passes


def _counted(work: Callable[[Rows, int], Any], rows: Rows, block: int) -> tuple[Any, int, str]:
    return work(rows, block), len(rows), "" if block else digest(rows)
