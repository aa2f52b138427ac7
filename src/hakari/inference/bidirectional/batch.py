"""Both effects from data that can be read again: five passes of sums that add.

Rows spread over all of them fix the features. Then (1) heads of the outcomes' means; (2) heads of
the log squares of what they leave; (3) first effects, with the inverse variances of (2) as
instruments; (4) heads of the log variances of the structural shocks at those; (5) the orthogonal
moments with their inverses, which are the efficient instruments. Rows are always met by heads that
did not see their fold. Design note bidirectional-effects, sections 2.3 and 2.6 C.

A pass gives each block to a worker and adds the sums in the order of the blocks: the result is the
same for any number of workers, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

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
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.sampling import generator
from hakari.inference.workers import workers

T = TypeVar("T")
Blocks = Callable[[], Iterator[Rows]]
Tell = Callable[[str, int], None]


def fit(
    nuisance: Nuisance,
    assumptions: Assumptions,
    blocks: Blocks,
    bootstraps: int,
    seed: int,
    tell: Tell,
) -> tuple[Nuisance, Evidence]:
    """All passes over blocks that can be read again.

    nuisance: with features only; tell: called with a pass and the rows that it has read.
    Returns the nuisance with its heads, and the evidence about the effects.
    """
    run = partial(_reduced, blocks, tell)
    nuisance = replace(nuisance, means=ridge(run("means", partial(_means, nuisance))))
    if not assumptions.regimes:
        logs = run("reduced-form variances", partial(_log_squares, nuisance))
        nuisance = replace(nuisance, variances=ridge(logs))
        first = run("first effects", partial(_evidence, nuisance, 0, seed))
        nuisance = replace(nuisance, start=first_effects(nuisance, assumptions, first))
        logs = run("variances", partial(_log_squares, nuisance))
        nuisance = replace(nuisance, variances=ridge(logs))
    return nuisance, run("effects", partial(_evidence, nuisance, bootstraps, seed))


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


def _reduced(blocks: Blocks, tell: Tell, name: str, work: Callable[[Rows, int], T]) -> T:
    """The sum over blocks, in their order; blocks run side by side through joblib."""
    total: Any = None
    done = 0
    pool = joblib.Parallel(n_jobs=workers(), prefer="threads", return_as="generator")
    with threadpool_limits(1, user_api="blas"):
        jobs = (joblib.delayed(_counted)(work, rows, k) for k, rows in enumerate(blocks()))
        for part, rows in pool(jobs):
            total = part if total is None else total + part
            done += rows
            tell(name, done)
    if total is None:
        raise ValueError("the data have no rows")
    found: T = total
    return found


def _counted(work: Callable[[Rows, int], T], rows: Rows, block: int) -> tuple[T, int]:
    return work(rows, block), len(rows)
