"""The tables, sentences and chapter of a calibrated Gibbs posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from scipy.stats import kstest

from hakari.inference.gibbs.plots import before_and_after, coverage
from hakari.inference.gibbs.study import Findings
from hakari.inference.iv_tables import number
from hakari.inference.prior_text import describe_prior
from hakari.report import Block, Chapter, Facts, Picture, Section, Table, Text
from hakari.run import versions

SHOWN = 6  # coefficients in a figure
UNEVEN = 0.01  # p-value of Kolmogorov and Smirnov's test that credibility ranks are uniform
PACKAGES = ("numpy", "scipy", "numba", "pandas", "xarray", "arviz-stats", "matplotlib")
TABLES = "the intervals, coverage by level and the data sets' credibility ranks"
REGIONS = {
    "marginal": "each coefficient's equal-tailed interval, at a rate of its own",
    "ellipse": "the ellipse of all coefficients, in the posterior's metric",
    "hpd": "the highest-density region of all coefficients",
}


def gibbs_chapter(found: Findings, title: str, intro: str = "", command: str = "") -> Chapter:
    """Question, verdict, posterior, calibration, diagnostics, how to repeat.

    command: what repeats it, not shown when empty.
    """
    sections = [
        Section("Question", question(found)),
        Section("What the data say", said(found)),
        Section("Before and after calibration", posterior_blocks(found)),
        Section("Calibration", calibration_blocks(found)),
        Section("Diagnostics", diagnostics(found)),
        Section("How to repeat", repeat(found, command, TABLES)),
    ]
    return Chapter(title, sections, intro)


# --- tables ---------------------------------------------------------------------------------


def intervals_table(found: Findings) -> Table:
    """The calibrated interval of each coefficient beside the others."""
    frame, level = found.table, f"{found.study.level:.0%}"
    ways = ["", "_uncalibrated", *(f"_{rival.label}" for rival in found.rivals)]
    head = ["", "estimate", "calibrated", f"at rate {found.study.rate:g}"]
    rows = [
        [str(name), number(row["estimate"], 4)]
        + [_interval(row[f"lower{way}"], row[f"upper{way}"]) for way in ways]
        for name, row in frame.iterrows()
    ]
    caption = f"{level} intervals; the estimate minimises the loss."
    return Table([*head, *(rival.label for rival in found.rivals)], rows, caption)


def rates_table(found: Findings) -> Table:
    """The rate of each region, how well it is known, and what large samples would have."""
    rows = [
        [
            one.region.label,
            number(one.rate),
            _interval(*one.interval),
            number(one.asymptotic),
            f"{(one.ranks <= found.study.level).mean():.1%}" if one.solved else "–",
            number(one.k_hat.max(), 2),
            f"{one.effective.min():.0f}",
        ]
        for one in found.calibration.found
    ]
    caption = (
        f"Learning rates at which {found.study.level:.0%} regions cover the estimate that often in "
        f"{found.study.replicates} bootstrap data sets."
    )
    head = ["", "rate", "90% interval", "large samples", "covers", "worst k-hat", "least ESS"]
    return Table(head, rows, caption)


def rivals_table(found: Findings) -> Table:
    """Learning rates by rules that do not aim at coverage, beside the calibrated one."""
    cal = found.calibration
    rates = {"calibrated": cal.learning_rate} | cal.rival_rates
    rows = [[name, number(rate)] for name, rate in rates.items()]
    return Table(["", "rate"], rows, "Learning rates by other rules, which do not aim at coverage.")


# --- sentences ------------------------------------------------------------------------------


def verdict(found: Findings) -> list[str]:
    """Sentences in the order in which a reader wants them; what was not found comes first."""
    answers = [_answer(found, name) for name in found.of_interest[:SHOWN]]
    lacking = sum(not f.solved for f in found.calibration.found)
    first, others = cares(found)[:lacking], cares(found)[lacking:]
    return [*first, *answers, _rate_says(found), *_levels_say(found), *others]


def cares(found: Findings) -> list[str]:
    """The notes of calibration and draws, as sentences; rates that were not found come first."""
    return [f"{note[0].upper()}{note[1:]}." for note in found.notes]


def _answer(found: Findings, name: str) -> str:
    row, level = found.table.loc[name], f"{found.study.level:.0%}"
    if np.isnan(found.rates[name]):
        return f"{name}: {number(row['estimate'])}, without a calibrated interval."
    width = row["upper"] - row["lower"]
    plain = width / (row["upper_uncalibrated"] - row["lower_uncalibrated"])
    parts = [f"{_times(plain)} that at learning rate {found.study.rate:g}"] * bool(plain > 0)
    for rival in found.rivals:
        lower, upper = rival.ends(name)
        parts.append(f"{_times(width / (upper - lower))} {rival.whose}")
    listed = " and ".join(", ".join(parts).rsplit(", ", 1))
    ends = _interval(row["lower"], row["upper"])
    return f"{name}: {number(row['estimate'])}, calibrated {level} interval {ends}, {listed}."


def _rate_says(found: Findings) -> str:
    cal = found.calibration
    low, high = cal.interval
    several = " (the smallest; each coefficient has its own)" * (
        sum(f.solved for f in cal.found) > 1
    )
    return (
        f"Learning rate {number(cal.learning_rate)}{several}, 90% interval {number(low)} to "
        f"{number(high)}, by {cal.method}: {cal.why}."
    )


def _levels_say(found: Findings) -> list[str]:
    """Where the posterior is calibrated at the level asked for and not at the others."""
    level, cal = f"{found.study.level:.0%}", found.calibration
    solved = [f for f in cal.found if f.solved]
    uneven = [f.region.label for f in solved if kstest(f.ranks, "uniform").pvalue < UNEVEN]
    if not uneven:
        return []
    return [
        f"Calibrated at {level} alone: at other levels the sets of {', '.join(uneven)} cover more "
        "or less often than they say (see the coverage curve)."
    ]


def _times(ratio: float) -> str:
    if 0.95 <= ratio < 1.05:
        return "about as wide as"
    return f"{number(ratio, 2)} times as wide as"


# --- what sections hold ---------------------------------------------------------------------


def question(found: Findings) -> list[Block]:
    """What was asked of which data."""
    study, plain = found.study, found.plain
    of = f"whole clusters of {study.clusters}" if study.clusters else study.bootstrap
    facts = [
        ("loss", str(plain.risk.loss.name)),
        ("data", f"{plain.risk.n} rows of {study.source}"),
        ("prior", describe_prior(plain.prior)),
        ("to cover", f"{REGIONS[study.region]}, with {study.level:.0%}"),
        ("bootstrap", f"{of}, {study.replicates} data sets"),
    ]
    return [Text(study.formula, "code"), Facts(facts)]


def said(found: Findings) -> list[Block]:
    """The verdict, what needs care marked."""
    sentences, care = verdict(found), set(cares(found))
    lead = next(one for one in sentences if one not in care)
    blocks: list[Block] = []
    if found.interrupted:
        blocks.append(Text("Interrupted by hand: these are the draws until then.", "warning"))
    for one in sentences:
        style = "warning" if one in care else ("lead" if one == lead else "plain")
        blocks.append(Text(one, cast(Any, style)))
    return blocks


def posterior_blocks(found: Findings, names: Sequence[str] | None = None) -> list[Block]:
    """Densities before and after, and the intervals."""
    study = found.study
    wanted = list(names or found.of_interest)[:SHOWN]
    shown = [name for name in wanted if not np.isnan(found.rates[name])]
    table = intervals_table(found)
    if not shown:
        return [table]
    if not {study.rate, *map(found.rates.get, shown)} <= set(found.draws):
        return [table]  # Ctrl-C came before some of them
    figure = before_and_after(
        {name: found.of(name, study.rate) for name in shown},
        {name: found.of(name, found.rates[name]) for name in shown},
        shown,
        study.level,
        found.rivals,
        labels=(f"learning rate {study.rate:g}", "calibrated"),
    )
    picture = Picture(
        figure,
        f"Posterior densities of {', '.join(shown)} before and after calibration",
        f"The Gibbs posterior at learning rate {study.rate:g} and calibrated, each to its "
        f"own height; below, {study.level:.0%} intervals.",
    )
    return [picture, table]


def calibration_blocks(found: Findings) -> list[Block]:
    """Coverage at every level, and the rates."""
    picture = Picture(
        coverage(found.calibration),
        "Share of bootstrap data sets whose region covers the estimate, by level, and a histogram "
        "of credibility ranks",
        "Left: how often regions cover the estimate in bootstrap data, by level. Right: the "
        "smallest level at which they do. Inside the bands, 95% of what chance alone does, the "
        "posterior is calibrated at all levels, not only at the one asked.",
    )
    return [picture, rates_table(found), rivals_table(found)]


def diagnostics(found: Findings) -> list[Block]:
    """The sampler, and what calibration cost."""
    cal, attributes, frame = found.calibration, found.result.attrs, found.table
    size = found.result["posterior"].sizes
    ess = frame[["ess_bulk", "ess_tail"]].min(axis=None)
    rows = [
        ("sampler", f"{attributes['method']}: {attributes.get('why', '')}".rstrip(": ")),
        ("draws", f"{size['draw']} in each of {size['chain']} chains, at each rate"),
        ("largest R-hat", number(frame["r_hat"].max(), 4)),
        ("least ESS", f"{ess:.0f}" if np.isfinite(ess) else "–"),
        ("calibration", f"{cal.method}: {cal.why}; {cal.seconds:.1f} seconds"),
        ("losses of single rows", f"{max(f.evaluations for f in cal.found):.3g}"),
    ]
    if len(cal.spectrum) > 1:
        low, high = 1 / cal.spectrum.max(), 1 / cal.spectrum.min()
        rows.append(("large-sample rates of directions", f"{number(low)} to {number(high)}"))
    return [Facts(rows)]


def repeat(found: Findings, command: str, tables: str = "the intervals") -> list[Block]:
    """The command, seed and versions. tables: what the .csv files of the folder hold."""
    installed = ", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items())
    told = (
        f"Seed {found.study.seed}; {installed}. The draws (.nc), {tables} (.csv) and the "
        "settings (config.toml) lie in this folder."
    )
    blocks: list[Block] = [Text(command, "code")] if command else []
    return [*blocks, Text(told, "note")]


def _interval(low: float, high: float) -> str:
    """Two ends to the digits that their distance deserves."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return "–"
    digits = max(2 - int(np.floor(np.log10(max(high - low, 1e-300)))), 0)
    if digits > 6 or max(abs(low), abs(high)) >= 1e6:
        return f"{number(low)} to {number(high)}"
    return f"{low:.{digits}f} to {high:.{digits}f}"
