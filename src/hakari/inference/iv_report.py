"""The chapter of a report that an instrumental-variables analysis fills."""

from __future__ import annotations

import shlex
from pathlib import Path

from hakari.inference.comparison import SOURCE
from hakari.inference.iv import Analysis, Question
from hakari.inference.iv_record import PACKAGES, source
from hakari.inference.iv_tables import (
    chains_table,
    estimates_table,
    facts,
    posterior_table,
    sensitivity_table,
    strength_table,
)
from hakari.inference.plots import (
    anderson_rubin_curve,
    posterior_densities,
    prior_sensitivity_plot,
    traces,
)
from hakari.inference.prior_text import describe_prior
from hakari.inference.verdict import agreement, verdict
from hakari.report import Block, Chapter, Picture, Section, Text
from hakari.run import versions

SHOWN = 8  # coefficients in a figure


def iv_chapter(analysis: Analysis, title: str, intro: str = "", command: str = "") -> Chapter:
    """Question, verdict, estimates, instruments, prior, diagnostics, how to repeat.

    command: what repeats it; made from the question when empty and the data are a file.
    """
    return Chapter(
        title,
        [
            _question(analysis),
            _verdict(analysis),
            _estimates(analysis),
            *_instruments(analysis),
            *_prior(analysis),
            _diagnostics(analysis),
            _repeat(analysis, command),
        ],
        intro,
    )


def command_line(question: Question) -> str:
    """The command that asks this question; options at their defaults are left out."""
    words = ["hakari", "iv", question.formula, "--data", source(question)]
    default = Question("", "")
    for prior in question.prior:
        words += ["--prior", prior]
    for name in ("covariance", "weights", "missing", "weighting", "method", "draws", "chains"):
        value = getattr(question, name)
        if value != getattr(default, name):
            words += [f"--{name}", str(value)]
    words += ["--centred"] * question.centred + ["--no-determinant"] * (not question.determinant)
    words += ["--seed", str(question.seed), "--level", f"{question.level:g}"]
    return shlex.join(words)


def _question(analysis: Analysis) -> Section:
    question, names = analysis.question, analysis.moments.names
    form = (
        "Continuously updated weighting"
        if question.weighting == "continuous"
        else "Fixed weighting"
    )
    if question.weighting == "continuous":
        form += " with its determinant" if question.determinant else " without the determinant"
    return Section(
        "Question",
        [
            Text(question.formula, "code"),
            Text(
                f"{analysis.moments.n} rows of {source(question)}; {analysis.moments.L} moments, "
                f"{analysis.moments.K} coefficients"
                + (f", of which endogenous: {', '.join(names.endogenous)}" * bool(names.endogenous))
                + f". Covariance of the moments: {analysis.moments.covariance}. {form}. "
                f"Prior: {describe_prior(analysis.posterior.prior)}."
            ),
        ],
    )


def _verdict(analysis: Analysis) -> Section:
    blocks: list[Block] = []
    if analysis.interrupted:
        blocks.append(Text("Interrupted by hand: these are the draws until then.", "warning"))
    first, *rest = verdict(analysis)
    blocks.append(Text(first, "lead"))
    for sentence in rest:
        care = sentence.startswith(("The draws need care", "The instruments are weak"))
        blocks.append(Text(sentence, "warning" if care else "plain"))
    return Section("What the data say", blocks)


def _estimates(analysis: Analysis) -> Section:
    names = analysis.of_interest[:SHOWN]
    ours = [e for e in analysis.estimates if e.source == SOURCE]
    every = list(analysis.moments.names.parameters)
    level = f"{analysis.question.level:.0%}"
    blocks: list[Block] = [
        Picture(
            posterior_densities(
                analysis.result, analysis.posterior, ours, names, analysis.question.level
            ),
            f"Posterior density of {', '.join(names)} with GMM intervals",
            f"Posterior with its {level} interval, the prior where it is not flat, and the normal "
            f"{level} intervals of GMM.",
        ),
        posterior_table(analysis),
        estimates_table(analysis),
        Text(agreement(analysis), "note"),
        *(Text(f"{e.label}, {e.source}: {e.note}", "note") for e in analysis.estimates if e.note),
    ]
    rest = [name for name in every if name not in names][:SHOWN]
    if rest:
        picture = posterior_densities(
            analysis.result, analysis.posterior, ours, rest, analysis.question.level
        )
        blocks.append(
            Picture(picture, f"Posterior density of {', '.join(rest)}", "The other coefficients.")
        )
    return Section("Posterior and GMM", blocks)


def _instruments(analysis: Analysis) -> list[Section]:
    table, found = strength_table(analysis), analysis.anderson_rubin
    if table is None:
        return []
    blocks: list[Block] = [table, Text(found.describe() + ".")]
    if found.note is None:
        blocks.append(
            Picture(
                anderson_rubin_curve(found, analysis.result),
                f"Anderson-Rubin statistic of {found.name} above the posterior density",
                "Values under the critical line are not rejected, whether the instruments are "
                "strong or weak; below, the posterior on the same axis.",
            )
        )
    return [Section("Strength of the instruments", blocks)]


def _prior(analysis: Analysis) -> list[Section]:
    blocks: list[Block] = []
    if not analysis.sensitivity:
        return []
    for name in analysis.of_interest[:3]:
        table = sensitivity_table(analysis, name)
        picture = prior_sensitivity_plot(
            analysis.sensitivity, analysis.moments.names.parameters, name, analysis.question.level
        )
        caption = "The prior's standard deviations times each factor, and no prior at all."
        blocks.append(Picture(picture, f"Interval of {name} by the prior's scale", caption))
        blocks += [table] if table is not None else []
    return [Section("Sensitivity to the prior", blocks)]


def _diagnostics(analysis: Analysis) -> Section:
    names = analysis.of_interest[:3]
    notes = [Text(note, "warning") for note in analysis.notes]
    return Section(
        "Diagnostics",
        [
            *notes,
            facts(analysis),
            chains_table(analysis),
            Picture(
                traces(analysis.result, names),
                f"Trace and ranks of {', '.join(names)}",
                "Chains that agree overlap on the left and are level at 1 on the right.",
            ),
        ],
    )


def _repeat(analysis: Analysis, command: str) -> Section:
    installed = ", ".join(f"{name} {number}" for name, number in versions(*PACKAGES).items())
    question = analysis.question
    if not command and isinstance(question.data, str | Path):
        command = command_line(question)
    blocks: list[Block] = [Text(command, "code")] if command else []
    return Section(
        "How to repeat",
        [
            *blocks,
            Text(
                f"Seed {analysis.result.attrs['seed']}; digest of the design (SHA-256) "
                f"{analysis.moments.digest}; {installed}. The draws (.nc) and the settings "
                "(config.toml) lie in this folder.",
                "note",
            ),
        ],
    )
