"""Priors as a person types them: `weak`, `flat`, `educ=normal(0.1, 0.15)`.

Here the second number of `normal` and the scale of `student` are standard deviations, in the
coefficient's unit; the classes of prior.py take variances.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite, sqrt
from typing import Any

import numpy as np

from hakari.inference.moments import LinearMoments
from hakari.inference.prior import Flat, Normal, Prior, StudentT
from hakari.inference.weak_prior import weak_prior

GRAMMAR = (
    "write weak, flat, normal(MEAN, SD) or student(DF, MEAN, SCALE), "
    "for one coefficient NAME=normal(MEAN, SD)"
)
_FORM = re.compile(
    r"(?:(?P<name>.+)=)?\s*(?P<kind>[a-z]+)\s*(?:\((?P<numbers>[^()]*)\))?\s*", re.IGNORECASE
)
_COUNTS = {"flat": 0, "weak": 0, "normal": 2, "student": 3}


def parse_prior(texts: Sequence[str], moments: LinearMoments) -> Prior | list[Prior]:
    """The prior that these texts describe; `weak` when there are none.

    A text with a name holds for that coefficient, one without for all that are not named;
    coefficients that no text reaches stay flat.
    Raises ValueError for what the grammar does not know, unknown or repeated names.
    """
    parsed = [_parse(text, moments.names.parameters) for text in texts or ("weak",)]
    own = [name for name, _, _ in parsed if name is not None]
    if len(parsed) - len(own) > 1:
        raise ValueError(f"two priors for all coefficients ({', '.join(texts)}): give one")
    for twice in own:
        if own.count(twice) > 1:
            raise ValueError(f"two priors on {twice!r}: give each coefficient one")
    priors: list[Prior] = []
    for name, kind, numbers in parsed:
        left = [k for k in moments.names.parameters if k not in own]
        priors += _made(kind, numbers, left if name is None else [name], moments)
    return priors if priors else Flat()


def describe_prior(prior: Prior | Sequence[Prior]) -> str:
    """The prior in words, with standard deviations.

    >>> describe_prior(Normal(0, 0.25, names=["educ"]))
    'educ ~ normal(0, sd 0.5); all others flat'
    """
    parts = [p for p in ([prior] if isinstance(prior, Prior) else prior) if not isinstance(p, Flat)]
    if not parts:
        return "flat on all coefficients"
    everything = any(p.names is None for p in parts)
    return "; ".join(map(_describe, parts)) + ("" if everything else "; all others flat")


def scaled_prior(prior: Prior | Sequence[Prior], factor: float) -> Prior | list[Prior]:
    """The same prior with standard deviations `factor` times as large."""
    if isinstance(prior, Normal):
        return replace(prior, cov=np.asarray(prior.cov) * factor**2)
    if isinstance(prior, StudentT):
        return replace(prior, scale=np.asarray(prior.scale) * factor**2)
    if isinstance(prior, Flat):
        return prior
    scaled: list[Prior] = []
    for part in prior:
        one = scaled_prior(part, factor)
        scaled += one if isinstance(one, list) else [one]
    return scaled


def _parse(text: str, names: Sequence[str]) -> tuple[str | None, str, list[float]]:
    form = _FORM.fullmatch(text.strip())
    kind = form["kind"].lower() if form else ""
    if form is None or kind not in _COUNTS:
        raise ValueError(f"prior {text!r} is not understood: {GRAMMAR}")
    name = form["name"].strip() if form["name"] else None
    if name is not None and name not in names:
        raise ValueError(f"prior on unknown coefficient {name!r} (have {', '.join(names)})")
    try:
        numbers = [float(part) for part in (form["numbers"] or "").split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"prior {text!r} has something that is no number: {GRAMMAR}") from None
    if len(numbers) != _COUNTS[kind] or not all(map(isfinite, numbers)):
        raise ValueError(
            f"prior {text!r}: {kind} takes {_COUNTS[kind]} finite numbers, here are "
            f"{len(numbers)}: {GRAMMAR}"
        )
    if kind in ("normal", "student") and not numbers[-1] > 0:
        raise ValueError(f"prior {text!r}: the spread {numbers[-1]:g} must be positive")
    if kind == "student" and not numbers[0] > 0:
        raise ValueError(f"prior {text!r}: the degrees of freedom {numbers[0]:g} must be positive")
    return name, kind, numbers


def _made(
    kind: str, numbers: list[float], names: list[str], moments: LinearMoments
) -> Sequence[Prior]:
    if kind == "flat" or not names:
        return []
    if kind == "weak":
        found = weak_prior(moments)
        weak = found if isinstance(found, list) else []
        chosen = [p for p in weak if p.names is not None and p.names[0] in names]
        if len(names) == 1 and not chosen:
            raise ValueError(
                f"{names[0]}=weak: {names[0]} is not endogenous, so weak is flat on it"
            )
        return chosen
    if kind == "normal":
        return [Normal(numbers[0], numbers[1] ** 2, names=names)]
    # independent Student priors: one block a coefficient, not one multivariate
    return [StudentT(numbers[0], numbers[1], numbers[2] ** 2, names=[name]) for name in names]


def _describe(prior: Normal | StudentT) -> str:
    where = "each coefficient" if prior.names is None else ", ".join(prior.names)
    if isinstance(prior, Normal):
        return f"{where} ~ normal({_numbers(prior.mean)}, sd {_spread(prior.cov)})"
    return (
        f"{where} ~ student({prior.df:g} df, {_numbers(prior.mean)}, scale {_spread(prior.scale)})"
    )


def _spread(scale: Any) -> str:
    scale = np.asarray(scale, dtype=float)
    if scale.ndim == 0:
        return f"{sqrt(float(scale)):.3g}"
    return "(" + ", ".join(f"{sqrt(v):.3g}" for v in np.diag(scale)) + ")"


def _numbers(mean: Any) -> str:
    mean = np.asarray(mean, dtype=float)
    if mean.ndim == 0:
        return f"{float(mean):.3g}"
    return "(" + ", ".join(f"{v:.3g}" for v in mean) + ")"
