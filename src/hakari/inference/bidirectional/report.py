"""The tables, sentences and chapter of two effects on each other."""

from __future__ import annotations

import numpy as np

from hakari.inference.bidirectional.effects_plane import effects_plane
from hakari.inference.bidirectional.plots import estimates_path, variance_ratio
from hakari.inference.bidirectional.set_pieces import interval_text, percent
from hakari.inference.bidirectional.study import Findings
from hakari.inference.bidirectional.variance_ratio import RatioCurve
from hakari.inference.iv_tables import number
from hakari.report import Block, Chapter, Facts, Picture, Section, Table, Text
from hakari.run import versions

PACKAGES = ("numpy", "scipy", "numba", "pandas", "xarray", "joblib", "matplotlib")
SHOCKS = {
    "zero": "uncorrelated given the covariates",
    "constant": "correlated, by a covariance that the covariates leave alone",
}
METHODS = {
    "moments": "orthogonal moments, in closed form",
    "online-qml": "quasi-maximum likelihood by online steps; set and tests by moments",
    "single-equation": "least squares of each equation alone; set and tests by moments",
}
DISAGREE = 0.05  # p-value of Hansen's J under which the reader is warned


def feedback_chapter(found: Findings, title: str, intro: str = "", command: str = "") -> Chapter:
    """Question, verdict, effects, identification, stream, diagnostics, how to repeat.

    command: what repeats it, not shown when empty.
    """
    sections = [
        Section("Question", question(found)),
        Section("What the data say", said(found)),
        Section("Both effects", effects_blocks(found)),
        Section("Can the data tell?", identification_blocks(found)),
        Section("Along the stream", stream_blocks(found)),
        Section("Diagnostics", diagnostics(found)),
        Section("How to repeat", repeat(found, command)),
    ]
    return Chapter(title, [section for section in sections if section.blocks], intro)


# --- tables ---------------------------------------------------------------------------------


def effects_table(found: Findings) -> Table:
    """Both effects with their errors and intervals, beside the other root and least squares."""
    level = percent(found.study.level)
    head = ["effect of", "estimate", "std. error", f"{level} interval", "other root", "alone"]
    rows = [
        [
            str(label),
            number(row["estimate"]),
            number(row["std_error"], 2),
            _interval(row["lower"], row["upper"]),
            number(row["other_root"]),
            f"{number(row['single_equation'])} ({number(row['single_equation_std_error'], 2)})",
        ]
        for label, row in found.table.iterrows()
    ]
    caption = "Both effects. Alone: least squares of one equation, which feedback biases."
    return Table(head, rows, caption)


def multipliers_table(found: Findings) -> Table | None:
    """What a shock moves after all feedback; None without an estimate."""
    if not found.effects.given:
        return None
    frame = found.effects.multipliers
    rows = [
        [f"{shock}, {outcome}", number(row["effect"]), number(row["std_error"], 2)]
        for (shock, outcome), row in frame.iterrows()
    ]
    return Table(["", "effect", "std. error"], rows, "After all feedback.")


def identification_table(found: Findings) -> Table:
    """The tests that an answer rests on."""
    rows = [
        [name, number(statistic, 4), str(df), _p(p)]
        for name, (statistic, df, p) in found.identification.tests.items()
    ]
    statistic, df, p = found.effects.instruments_agree
    if df and "instruments agree" not in found.identification.tests:  # regimes: the same
        rows.append(["all instruments agree (J)", number(statistic, 4), str(df), _p(p)])
    return Table(["", "statistic", "df", "p"], rows, "Tests of identification.")


# --- sentences ------------------------------------------------------------------------------


def verdict(found: Findings) -> list[str]:
    """Sentences in the order in which a reader wants them."""
    return [*_answers(found), *_set_says(found), *_alone_says(found), *cares(found)]


def cares(found: Findings) -> list[str]:
    """What speaks against the numbers, as sentences."""
    out = []
    if found.study.method == "single-equation" and found.effects.given:
        out.append(
            "These estimates are least squares of each equation alone, which takes feedback for "
            "effect: a baseline, not an answer. The set is that of the moments."
        )
    if not found.identification.identified and found.effects.given:
        out.append(
            "The point estimate is shown because it was asked for: the data cannot tell "
            f"({'; '.join(found.identification.reasons)}). Use the set."
        )
    statistic, df, p = found.effects.instruments_agree
    if df and p < DISAGREE:
        out.append(
            f"The instruments disagree (J {number(statistic)}, p {_p(p)}): the shocks are "
            "correlated in a way that moves with the covariates, or an effect is not linear. The "
            "numbers then mix both, and standard errors do not say by how much."
        )
    if found.model.alarm is not None:
        out.append(f"Along the stream {found.model.alarm}.")
    return out


def _answers(found: Findings) -> list[str]:
    study, table = found.study, found.table
    if not found.effects.given:
        reasons = "; ".join(found.identification.reasons) or found.effects.solution.roots.reason
        return [
            f"The data cannot tell the effect of {found.labels[0]} from that of "
            f"{found.labels[1]}: {reasons}. So there is no point estimate."
        ]
    lines = []
    for label, (cause, outcome) in zip(
        found.labels, ((study.y2, study.y1), (study.y1, study.y2)), strict=True
    ):
        row = table.loc[label]
        lines.append(
            f"One more of {cause} moves {outcome} by {number(row['estimate'])}, "
            f"{percent(study.level)} interval {_interval(row['lower'], row['upper'])}."
        )
    rule = f"Reported by rule: {found.effects.rule}"
    if not np.isfinite(found.effects.other_root).all():
        return [*lines, f"{rule}. The other root is infinite."]
    other = " and ".join(number(v) for v in found.effects.other_root)
    return [*lines, f"{rule}. The other root, {other}, fits the data as well."]


def _set_says(found: Findings) -> list[str]:
    """The Anderson-Rubin set, with the names of the columns."""
    kept, level = found.set, percent(found.study.level)
    if kept.kind == "empty":
        return [f"No pair of effects agrees with all moments at {level}: the model is rejected."]
    if kept.kind == "all":
        return [f"At {level} no pair of effects is ruled out: the variances say nothing."]
    inside = found.effects.set_intervals(found.study.level)
    spans = [
        f"{label} from {interval_text(ends)}"
        for label, ends in zip(found.labels, inside, strict=True)
        if not (kept.restrict and ends == ((0.0, 0.0),))
    ]
    ends = f"; it reaches {' and '.join(kept.edges)}" if kept.edges else ""
    return [
        f"Whatever the strength of the variances, the {level} Anderson-Rubin set holds "
        f"{' and '.join(spans)}{ends}."
    ]


def _alone_says(found: Findings) -> list[str]:
    one, two = (number(v) for v in found.alone.estimate)
    return [f"Least squares of each equation alone gives {one} and {two}: it takes feedback for "
            "effect."]  # fmt: skip


# --- what sections hold ---------------------------------------------------------------------


def question(found: Findings) -> list[Block]:
    """What was asked of which data."""
    study = found.study
    facts = [
        ("data", f"{found.effects.evidence.rows:,} rows of {study.source}"),
        ("a", f"effect of {study.y2} on {study.y1}"),
        ("b", f"effect of {study.y1} on {study.y2}"),
        ("variances move with", study.regimes or ", ".join(study.covariates)),
        ("shocks", SHOCKS[study.covariance]),
        ("method", METHODS[study.method]),
        ("root", found.effects.rule),
    ]
    if study.restrict:
        facts.append(("known", study.restrict))
    equations = f"{study.y1} = a {study.y2} + f1 + s1 e1,  {study.y2} = b {study.y1} + f2 + s2 e2"
    return [Text(equations, "code"), Facts(facts)]


def said(found: Findings) -> list[Block]:
    """The verdict, what needs care marked."""
    first, *rest = verdict(found)
    care = set(cares(found))
    blocks: list[Block] = []
    if found.interrupted:
        blocks.append(Text("Interrupted by hand: these are the rows until then.", "warning"))
    blocks.append(Text(first, "lead"))
    return [*blocks, *(Text(one, "warning" if one in care else "plain") for one in rest)]


def effects_blocks(found: Findings) -> list[Block]:
    """The plane of both effects, and the tables."""
    picture = Picture(
        effects_plane(found.effects, found.study.level),
        f"Confidence set of the effects of {found.labels[0]} and {found.labels[1]}",
        f"The {percent(found.study.level)} Anderson-Rubin set, right however little the variances "
        "move, and its mirror (1/b, 1/a), at which the same distribution is written with the "
        "equations swapped.",
    )
    multipliers = multipliers_table(found)
    return [picture, effects_table(found), *([multipliers] if multipliers else [])]


def identification_blocks(found: Findings) -> list[Block]:
    """How the variances move against each other, and the tests."""
    ratios, names = found.ratios, (found.study.y1, found.study.y2)
    if isinstance(ratios, tuple):
        moved: RatioCurve = ratios[0]
        rest = ", ".join(f"{one.covariate} {number(one.range, 2)}" for one in ratios[1:6])
        figure, along = variance_ratio(moved, names), moved.covariate
        caption = (
            f"{moved.covariate} moves the log of the ratio most, by {number(moved.range, 2)}, "
            f"averaged over the other covariates{f'; the others: {rest}' if rest else ''}."
        )
    else:
        figure, along = variance_ratio(ratios, names), "regimes"
        caption = "The log of the ratio in each regime."
    picture = Picture(
        figure,
        f"Ratio of the shocks' variances along {along}",
        f"{caption} Where it does not move, nothing tells the two effects apart.",
    )
    return [picture, identification_table(found)]


def stream_blocks(found: Findings) -> list[Block]:
    """The path of the estimates; nothing without a stream."""
    path = found.model.path
    if len(path) < 2:
        return []
    figure = estimates_path(
        path, (found.study.y1, found.study.y2), found.model.alarm, found.study.level
    )
    alarm = found.model.alarm
    told = f"Dashed: {alarm}" if alarm else "No change of the effects was noticed"
    words = f"Estimates with |ab| < 1 after so many rows. {told}."
    return [Picture(figure, "Estimates of both effects by the number of rows", words)]


def diagnostics(found: Findings) -> list[Block]:
    """The features, what they explain, and how fast rows were read."""
    nuisance = found.model.nuisance
    note = getattr(nuisance.basis, "note", "")
    facts = [("features", f"{nuisance.size:,}{f'; {note}' if note else ''}")]
    for name, heads in (("means", nuisance.means), ("log variances", nuisance.variances)):
        if heads is not None:
            shares = " and ".join(f"{share:.1%}" for share in heads.explained)
            facts.append((f"{name} explained, rows left out", shares))
    facts += [
        ("strength E ρ E 1/ρ − 1", number(found.identification.strength)),
        ("speed", f"{found.speed:,.0f} rows a second, {found.seconds:.1f} seconds"),
    ]
    return [Facts(facts)]


def repeat(found: Findings, command: str) -> list[Block]:
    """The command, seed and versions."""
    installed = ", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items())
    told = (
        f"Seed {found.study.seed}; {installed}. The effects (.csv) and the settings (config.toml) "
        "lie in this folder."
    )
    blocks: list[Block] = [Text(command, "code")] if command else []
    return [*blocks, Text(told, "note")]


def _p(p: float) -> str:
    return "–" if np.isnan(p) else "< 0.001" if p < 1e-3 else number(p, 2)


def _interval(low: float, high: float) -> str:
    """Two ends to the digits that their distance deserves."""
    return interval_text([(low, high)]) if np.isfinite([low, high]).all() else "–"
