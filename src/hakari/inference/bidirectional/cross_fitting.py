"""Both effects with any scikit-learn regressor for the means and the log variances.

The order is that of `batch`: means; log squares of what they leave, for first effects; log squares
of the shocks at those, for the instruments; evidence. Predictions of a fold are those of a
regressor that was fitted to the others. All rows are in memory, and a regressor is fitted
3 x folds x 2 times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.bidirectional.batch import Tell, evidence_of, first_effects
from hakari.inference.bidirectional.evidence import Assumptions, Evidence
from hakari.inference.bidirectional.heads import Heads, folds_of
from hakari.inference.bidirectional.nuisance import FEWEST, FOLDS, Nuisance, shocks
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.sampling import generator

Learn = Callable[[str, Float[ndarray, "n 2"]], Float[ndarray, "n 2"]]


def fit(
    nuisance: Nuisance,
    regressor: Any,
    rows: Rows,
    assumptions: Assumptions,
    bootstraps: int,
    seed: int,
    tell: Tell,
) -> tuple[Evidence, dict[str, float]]:
    """Evidence about the effects, and the share of variance that each prediction explains.

    nuisance: its units and regimes alone are used, since the regressor sees the covariates (and
    dummies of regimes) as they are. regressor: with `fit` and `predict`, cloned for each fold and
    target; a `random_state` of None is drawn from seed. Shares are of rows left out, and 0 or less
    where a target is not predicted. Raises ValueError for other regressors, predictions that are
    not one finite number a row, and fewer rows than folds take; ImportError without scikit-learn.

    Source: Chernozhukov, Chetverikov, Demirer, Duflo, Hansen, Newey and Robins (2018), for design
    note bidirectional-effects, section 2.3.
    """
    if len(rows) < FEWEST:
        raise ValueError(f"{len(rows)} rows: at least {FEWEST:,} are needed for all folds")
    learn = _learner(nuisance, regressor, rows, seed, tell)
    y = nuisance.outcomes(rows)
    W = y - learn("means", y)
    nuisance = replace(nuisance, means=_errors(y, W))
    explained = _named("mean of y", nuisance.means)
    chance = generator(seed, "bootstrap of block 0") if bootstraps else None
    if assumptions.regimes:
        return evidence_of(nuisance, rows, W, None, bootstraps, chance), explained
    nuisance, h = _variances(nuisance, learn, "reduced-form variances", W)
    first = evidence_of(nuisance, rows, W, h)
    nuisance = replace(nuisance, start=first_effects(nuisance, assumptions, first))
    nuisance, h = _variances(nuisance, learn, "variances", W)
    explained |= _named("log variance of shock ", nuisance.variances)
    return evidence_of(nuisance, rows, W, h, bootstraps, chance), explained


def _variances(
    nuisance: Nuisance, learn: Learn, name: str, W: Float[ndarray, "n 2"]
) -> tuple[Nuisance, Float[ndarray, "n 2"]]:
    """Predicted log variances of the shocks at the nuisance's effects, and how good they are."""
    seen = nuisance.log_squares(shocks(W, nuisance.start))
    h = learn(name, seen)
    return replace(nuisance, variances=_errors(seen, seen - h)), h


def _learner(nuisance: Nuisance, regressor: Any, rows: Rows, seed: int, tell: Tell) -> Learn:
    """What predicts two targets of each row, by regressors that did not see its fold."""
    clone = _cloning(regressor)
    dummies = nuisance.dummies(rows)[:, 1:] if nuisance.regimes else np.empty((len(rows), 0))
    X, fold = np.hstack([rows.X, dummies]), folds_of(len(rows), FOLDS)
    if not X.shape[1]:
        raise ValueError("no covariates for the regressor to learn from: give some")

    def learn(name: str, targets: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
        out = np.empty(targets.shape)
        for k in range(FOLDS):
            for j in range(2):
                made = _seeded(clone(regressor), generator(seed, f"{name} {j}, fold {k}"))
                made.fit(X[fold != k], targets[fold != k, j])
                out[fold == k, j] = _predicted(made, X[fold == k])
        tell(name, len(rows))
        return out

    return learn


def _cloning(regressor: Any) -> Callable[[Any], Any]:
    for name in ("fit", "predict", "get_params"):
        if not callable(getattr(regressor, name, None)) or isinstance(regressor, type):
            raise ValueError(
                f"regressor {regressor!r} is no estimator with {name}(): give an instance of a "
                "scikit-learn regressor, such as RandomForestRegressor()"
            )
    try:
        base: Any = import_module("sklearn.base")
    except ImportError as error:
        raise ImportError(
            "regressors need scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    if hasattr(regressor, "__sklearn_tags__") and base.is_classifier(regressor):
        raise ValueError(f"regressor {regressor!r} is a classifier: give one that predicts numbers")
    return lambda estimator: base.clone(estimator)


def _seeded(made: Any, chance: np.random.Generator) -> Any:
    """The regressor with a number for each `random_state` that is None."""
    states = sorted(
        name
        for name, value in made.get_params().items()
        if name.split("__")[-1] == "random_state" and value is None
    )
    drawn = {name: int(chance.integers(2**31)) for name in states}
    return made.set_params(**drawn) if drawn else made


def _predicted(made: Any, X: Float[ndarray, "m p"]) -> Float[ndarray, " m"]:
    found = np.asarray(made.predict(X), dtype=float)
    if found.size != len(X):
        raise ValueError(f"{made!r} predicts {found.shape} for {len(X)} rows: one each is needed")
    if not np.isfinite(found).all():
        raise ValueError(
            f"{made!r} predicts {found[~np.isfinite(found)][0]}: use one that does not"
        )
    return found.reshape(-1)


def _errors(targets: Float[ndarray, "n 2"], gaps: Float[ndarray, "n 2"]) -> Heads:
    """How large targets and errors are, as heads say it, without coefficients."""
    return Heads(
        np.empty((FOLDS + 1, 0, 2)),
        np.full(2, np.nan),
        (gaps**2).mean(axis=0),
        targets.mean(axis=0),
        targets.var(axis=0),
    )


def _named(what: str, heads: Heads | None) -> dict[str, float]:
    shares = () if heads is None else heads.explained
    return {f"{what}{j + 1}": float(share) for j, share in enumerate(shares)}
