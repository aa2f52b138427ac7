"""What an analysis says, in plain sentences: the answer first, then what to make of it."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from hakari.inference.comparison import SOURCE, PointEstimate, disagreement
from hakari.inference.diagnostics import draws_of
from hakari.inference.instruments import weakness
from hakari.inference.iv import Analysis
from hakari.inference.prior_text import describe_prior
from hakari.inference.sensitivity import ScaledPrior

LEANS = 0.5  # of a posterior sd between the priors' means: worth a word


def verdict(analysis: Analysis) -> list[str]:
    """Sentences in the order in which a reader wants them."""
    said = [answer_of(analysis, name) for name in analysis.of_interest[:3]]
    said += [beside(analysis), *instruments_say(analysis), prior_says(analysis)]
    said += [restrictions_say(analysis), chains_say(analysis)]
    return [sentence for sentence in said if sentence]


def answer_of(analysis: Analysis, name: str) -> str:
    """Mean, interval and sign of one coefficient."""
    row = analysis.summary.loc[name]
    lower, upper = row.iloc[3], row.iloc[4]
    positive = float((_draws(analysis, name) > 0).mean())
    sign = max(positive, 1 - positive)
    word = "positive" if positive >= 0.5 else "negative"
    certain = "almost surely" if sign > 0.9995 else f"with probability {sign:.3g}"
    return (
        f"The coefficient of {name} is {row['mean']:.3g} (posterior mean; median "
        f"{row['median']:.3g}, sd {row['sd']:.3g}); with probability {analysis.question.level:.0%} "
        f"it lies between {lower:.3g} and {upper:.3g}, and it is {word} {certain}."
    )


def beside(analysis: Analysis) -> str:
    """GMM's and CUE's answer for the first coefficient of interest."""
    name = analysis.of_interest[0]
    k = analysis.moments.names.parameters.index(name)
    ours = [e for e in analysis.estimates if e.source == SOURCE]
    parts = [
        f"{_long(e)} gives {e.theta[k]:.3g} (standard error {e.std_error[k]:.3g})" for e in ours
    ]
    notes = "".join(f" {e.label}: {e.note}." for e in ours if e.note)
    return f"For {name}, {' and '.join(parts)}.{notes}"


def agreement(analysis: Analysis) -> str:
    """How far linearmodels' estimates are from ours."""
    gap = disagreement(analysis.estimates)
    theirs = sorted({e.source for e in analysis.estimates if e.source != SOURCE})
    if not theirs:
        return f"linearmodels was not run: {analysis.moments.n} rows would fill memory."
    if np.isnan(gap):
        return f"{theirs[0]} gave no estimate to compare with."
    return (
        f"{theirs[0]}'s and hakari's estimates and standard errors differ by at most "
        f"{gap:.1g} standard errors" + (", where its optimiser stops early." if gap > 1e-6 else ".")
    )


def instruments_say(analysis: Analysis) -> list[str]:
    """Strength of the instruments, and the set that is right however weak they are."""
    stages = analysis.stages.stages
    if not stages:
        return []
    weak = weakness(analysis.stages)
    if weak is None:
        label = "effective" if len(stages) == 1 else "conditional"
        tests = [s.F_effective if len(stages) == 1 else s.F_conditional for s in stages]
        shown = ", ".join(f"{s.name} {t.value:.3g}" for s, t in zip(stages, tests, strict=True))
        weak = f"The instruments are strong ({label} F: {shown})."
    found = analysis.anderson_rubin
    return [weak] if found.note else [weak, _closed(found.describe())]


def prior_says(analysis: Analysis) -> str:
    """How far the answer moves with the prior's scale."""
    prior = describe_prior(analysis.posterior.prior)
    if not analysis.sensitivity:
        return f"Prior: {prior}."
    name = analysis.of_interest[0]
    k = analysis.moments.names.parameters.index(name)
    scaled = [s for s in analysis.sensitivity if np.isfinite(s.factor)]
    means = np.array([s.mean[k] for s in scaled])
    low, high = np.nanmin(means), np.nanmax(means)
    moved = (high - low) / float(analysis.summary.loc[name, "sd"])
    judged = _judged(moved, analysis, scaled)
    base = "the weak prior's" if not analysis.posterior.blocks else "the prior's"
    return (
        f"Prior: {prior}. With {base} scale from a quarter to four times, the mean of {name} runs "
        f"from {low:.3g} to {high:.3g}, {moved:.2g} posterior standard deviations: {judged}."
        f"{_flat(analysis.sensitivity)}"
    )


def restrictions_say(analysis: Analysis) -> str:
    """Hansen's J of two-step GMM."""
    J = next(e for e in analysis.estimates if e.source == SOURCE).J
    if not np.isfinite(J.value):
        return "The model is just identified: nothing tests the instruments' exogeneity."
    against = "speaks against" if J.p_value < 0.05 else "does not speak against"
    return f"Hansen's J is {J.value:.3g} (p = {J.p_value:.2g}), which {against} the instruments."


def chains_say(analysis: Analysis) -> str:
    """Whether the draws can be trusted."""
    if not analysis.notes:
        return "The chains agree (R-hat at most 1.01, effective sample sizes over 400)."
    draws = 10 * analysis.question.draws
    return (
        f"The draws need care: {'; '.join(analysis.notes)}. More draws (--draws {draws}), "
        "another --method or a more informative --prior may settle it."
    )


def _judged(moved: float, analysis: Analysis, scaled: list[ScaledPrior]) -> str:
    if moved > LEANS:
        return "the answer leans on the prior"
    if any(one.notes for one in scaled):
        return "little, but some of these chains need care, so that this is rough"
    if weakness(analysis.stages) is not None:
        return "little, although the instruments are weak"
    return "the data carry the answer"


def _flat(sensitivity: list[ScaledPrior]) -> str:
    flat = next((s for s in sensitivity if np.isinf(s.factor)), None)
    if flat is None or not flat.without.startswith("refused"):
        return ""
    return " A flat prior is refused: the posterior would be improper."


def _long(estimate: PointEstimate) -> str:
    return {"IV-GMM": "two-step GMM", "CUE": "continuously updated GMM"}[estimate.label]


def _closed(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _draws(analysis: Analysis, name: str) -> ndarray:
    k = analysis.moments.names.parameters.index(name)
    draws: ndarray = draws_of(analysis.result)[:, :, k]
    return draws
