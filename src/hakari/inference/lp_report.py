"""The chapter of a report that local projections fill, and its sentences."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hakari.inference.iv_tables import number
from hakari.inference.lp_study import NARROW, Findings
from hakari.inference.lp_tables import (
    band_name,
    horizon_tables,
    impulse,
    interval,
    lowered,
    narrowed_table,
    pairs,
    rates_table,
    rows_of,
    shape_table,
    strength_table,
)
from hakari.report import Block, Chapter, Facts, Picture, Section, Text
from hakari.run import versions

UNCALIBRATED = "Bands are not calibrated"
DEAR = "The prior costs more than it gives"
PACKAGES = ("numpy", "scipy", "numba", "pandas", "xarray", "arviz-stats", "matplotlib")


def lp_chapter(
    found: Findings, figures: Mapping[str, Figure], title: str, intro: str = "", command: str = ""
) -> Chapter:
    """Question, verdict, responses, prior, instruments, learning rates, diagnostics, repeat.

    figures: those of `lp_command.figures`; command: what repeats it, not shown when empty.
    """
    sections = [
        _question(found),
        _verdict(found),
        _responses(found, figures["responses"]),
        *_prior(found, figures.get("prior")),
        *_instruments(found, figures.get("instruments")),
        *_rates(found),
        _diagnostics(found),
        _repeat(found, command),
    ]
    return Chapter(title, sections, intro)


# --- sentences ----------------------------------------------------------------------------


def verdict(found: Findings) -> list[str]:
    """Sentences in the order in which a reader wants them."""
    said = [answer_of(found, r, s) for r, s, _ in pairs(found)]
    rest = [instruments_say, rates_say, cost_says]
    return [*said, *prior_says(found), *(s for say in rest for s in say(found)), draws_say(found)]


def answer_of(found: Findings, r: int, s: int) -> str:
    """What the shock does to one response; said plainly only where the joint band excludes 0."""
    irf, free = found.irf, ~found.known[r, s]
    if not free.any():
        return f"The response of {irf.responses[r]} to {irf.shocks[s]} is known without data."
    out = _excluded(found, r, s) & free
    mean = np.where(out if out.any() else free, irf.draws[:, r, s].mean(axis=0), 0.0)
    at = int(np.abs(mean).argmax())
    size, sign, ends, sure = _moment(found, r, s, at)
    when, band = _when(found, irf.horizons[at]), f"the {band_name(found).partition(' (')[0]} band"
    if not out.any():
        return (
            f"What {lowered(impulse(found, s))} does to {_what(found, r)} is not clear: the "
            f"largest mean response, {size} {when} ({ends}), is {sign} {sure}, and {band} "
            "contains 0 at every horizon."
        )
    where = f"at {found.grain}s {_runs(np.array(irf.horizons)[out].tolist())}"
    return (
        f"{impulse(found, s)} {'raises' if mean[at] > 0 else 'lowers'} {_what(found, r)}: by "
        f"{size.removeprefix('-')} {when} in the posterior mean ({ends}), {sign} {sure}. "
        f"{band.capitalize()} excludes 0 {where if not out[free].all() else 'at every horizon'}."
    )


def prior_says(found: Findings) -> list[str]:
    """By how much the prior narrowed the responses."""
    kinds, parts = found.priors, []
    if found.irf.narrowed is None:
        return ["Priors are flat: the posterior is that of the estimates alone."]
    for name, share in zip(kinds, found.irf.narrowed, strict=True):
        share = share[np.isfinite(share)]
        if len(share):
            word = "smaller" if share.mean() >= 0 else "larger"
            ends = f"{share.min():.0%} to {share.max():.0%} by horizon"
            parts.append(f"of {name} {abs(share.mean()):.0%} {word} ({ends})")
    alike = len(set(kinds.values())) == 1
    each = "; ".join(f"{name} {prior}" for name, prior in kinds.items())
    told = f"{next(iter(kinds.values()))} on every response" if alike else each
    effect = f" It makes the posterior standard deviation {', '.join(parts)}." * bool(parts)
    return [f"Prior: {told}.{effect}"]


def instruments_say(found: Findings) -> list[str]:
    """Whether the instruments are strong, in plain words."""
    stage = found.first_stage
    if stage is None:
        return []
    low = stage.loc[(stage["effective_f"] / stage["critical"]).idxmin()]
    f, critical = number(low["effective_f"]), number(low["critical"])
    names = ", ".join(found.study.instrument)
    least = ", at its least over horizons," if stage["effective_f"].nunique() > 1 else ""
    one = len(found.study.instrument) == 1
    if low["effective_f"] < low["critical"]:
        return [
            f"The instrument{'' if one else 's'} {names} {'is' if one else 'are'} weak: the "
            f"effective F{least} is {f}, under the critical value {critical}, so a bias of more "
            "than 10% of the worst case cannot be excluded. Read the Anderson-Rubin sets, which "
            "cover however weak the instruments are."
        ]
    return [
        f"The instrument{'' if one else 's'} {names} {'is' if one else 'are'} strong: the "
        f"effective F{least} is {f}, over the critical value {critical}."
    ]


def rates_say(found: Findings) -> list[str]:
    """What calibration did to each response, or why there is none."""
    if found.uncalibrated:
        return [f"{UNCALIBRATED}: {found.uncalibrated}."]
    parts = []
    for one in found.posterior.calibration:
        factor = one.rate**-0.5 - 1
        same = factor < 0.005
        change = "as they were" if same else f"{factor:.0%} wider than without"
        parts.append(f"those of {one.response} are {change}")
    if all(one.rate == 1 for one in found.posterior.calibration):
        return ["Calibration: the bands already cover in the bootstrap: nothing was widened."]
    return [f"Bands are calibrated by a bootstrap, which never narrows: {', '.join(parts)}."]


def cost_says(found: Findings) -> list[str]:
    """Where smoothing and calibration together widened the bands, and the way out."""
    every = _widened(found)
    dear = {name: share for name, share in every.items() if share > 0}
    if not dear:
        return []
    listed = ", ".join(f"{name} (by {share:.0%})" for name, share in dear.items())
    some = " ".join(quote(f"{name}=flat") for name in dear)
    return [
        f"{DEAR} for {listed}: smoothed and then calibrated, the bands are on average wider than "
        f"those of the estimates alone. Try --prior {'flat' if dear == every else some}; "
        "calibration widens flat bands too, but usually by less."
    ]


def draws_say(found: Findings) -> str:
    """Whether the draws can be trusted."""
    if found.notes:
        return f"The draws need care: {'; '.join(found.notes)}."
    worst, least = found.summary["r_hat"].max(), found.summary[["ess_bulk", "ess_tail"]].min().min()
    return f"The draws are sound: R-hat at most {worst:.3f}, effective sizes at least {least:.0f}."


# --- sections -----------------------------------------------------------------------------


def _question(found: Findings) -> Section:
    study, lp = found.study, found.projection
    rows = sorted(set(lp.rows_used))
    used = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}, by horizon,"
    controls = lp.coefficients - len(lp.shocks)
    shrunk = ", its correlation shrunk (Ledoit and Wolf, 2004)" * found.posterior.shrunk
    many = "s" * (len(study.instrument) > 1)
    by = f"by {', '.join(study.instrument)} as instrument{many}"
    way = by if study.instrument else "by least squares"
    asked = "cumulated responses" if study.cumulative else "responses"
    facts = [
        ("responses", ", ".join(study.response) + " (cumulated)" * study.cumulative),
        ("shock", ", ".join(lp.shocks)),
        *[("instruments", ", ".join(study.instrument))] * bool(study.instrument),
        ("horizons", f"0 to {study.horizons} {found.grain}s"),
        ("sample", f"{used} rows of {study.source}, {_dates(found)}"),
        ("lags", f"{lp.question.lag_order} of each variable"),
        ("controls", ", ".join(study.control) or "only those lags and the trend"),
        (
            "shrunk by a horseshoe" if lp.controls_prior else "concentrated out",
            f"{controls} coefficients in each horizon's regression",
        ),
        ("covariance", f"{found.posterior.covariance}, joint over horizons{shrunk}"),
        ("prior", "; ".join(f"{name}: {prior}" for name, prior in found.priors.items())),
    ]
    text = (
        f"The {asked} of {', '.join(study.response)} to {lowered(impulse(found, 0))}, {way}: a "
        "local projection at each horizon, all of them in one posterior."
    )
    notes = [Text(f"{note[0].upper()}{note[1:]}.", "note") for note in found.irf.notes]
    return Section("Question", [Text(text), Facts(facts), *notes])


def _verdict(found: Findings) -> Section:
    blocks: list[Block] = []
    if found.interrupted:
        blocks.append(Text("Interrupted by hand: these are the draws until then.", "warning"))
    first, *rest = verdict(found)
    blocks.append(Text(first, "lead"))
    for sentence in rest:
        blocks.append(_styled(sentence))
    return Section("What the data say", blocks)


def _responses(found: Findings, figure: Figure) -> Section:
    names, level = ", ".join(found.study.response), found.study.level
    picture = Picture(
        figure,
        f"Responses of {names} over horizons with pointwise and simultaneous bands",
        f"{impulse(found, 0)}: posterior mean, the estimates without a prior (dashed), pointwise "
        f"bands at {NARROW:.0%} and {level:.0%}, and the band that holds the whole path with "
        f"probability {level:.0%}.",
    )
    return Section("Responses", [picture, *horizon_tables(found), shape_table(found)])


def _prior(found: Findings, figure: Figure | None) -> list[Section]:
    table = narrowed_table(found)
    if table is None:
        return []
    blocks: list[Block] = [*map(Text, prior_says(found)), table]
    if figure is not None:
        blocks.append(
            Picture(
                figure,
                "Pointwise bands and paths of the prior beside the bands of the posterior",
                "The prior's band and some of its paths (orange) around the posterior's, on the "
                "prior's scale. A wide band of smooth paths says little about the level and "
                "only asks that the response bend slowly.",
            )
        )
    return [Section("The prior's share", blocks)]


def _instruments(found: Findings, figure: Figure | None) -> list[Section]:
    table = strength_table(found)
    if table is None or figure is None:
        told = "With several shocks neither first-stage F nor Anderson-Rubin sets are given."
        several = bool(found.study.instrument)
        return [Section("Strength of the instruments", [Text(told, "note")])] * several
    blocks: list[Block] = [table, *map(Text, instruments_say(found))]
    blocks.append(
        Picture(
            figure,
            "Anderson-Rubin sets beside the posterior's pointwise bands",
            f"Anderson-Rubin sets (dotted) at {found.study.level:.0%}, horizon by horizon and "
            "without a prior, beside the posterior. Where a set is unbounded "
            "the panel says so.",
        )
    )
    return [Section("Strength of the instruments", blocks)]


def _rates(found: Findings) -> list[Section]:
    table = rates_table(found)
    said = map(_styled, (*rates_say(found), *cost_says(found)))
    return [Section("Learning rates", [table, *said])] if table is not None else []


def _diagnostics(found: Findings) -> Section:
    attributes, frame = found.result.attrs, found.summary
    draws = found.result["posterior"].sizes["draw"]
    rows = [
        ("kernel", f"{attributes['method']}"),
        ("draws", f"{draws} in each of {attributes['chains']} chains"),
        ("largest R-hat", _worst(frame["r_hat"], 4)),
        ("least bulk ESS", _worst(-frame["ess_bulk"])),
        ("least tail ESS", _worst(-frame["ess_tail"])),
        (
            "accepted",
            f"{float(found.result['checks'].dataset['acceptance'].mean()):.1%} of the proposals",
        ),
        ("known exactly", f"{int(found.known.sum())} of {found.known.size} coefficients"),
    ]
    blocks: list[Block] = [Text(note, "warning") for note in found.notes]
    return Section("Diagnostics", [*blocks, Facts(rows)])


def _repeat(found: Findings, command: str) -> Section:
    installed = ", ".join(f"{name} {number}" for name, number in versions(*PACKAGES).items())
    blocks: list[Block] = [Text(command, "code")] if command else []
    told = (
        f"Seed {found.result.attrs['seed']}; {installed}. The draws (.nc), the responses (.csv), "
        "the figures (.png, .pdf) and the settings (config.toml) lie in this folder."
    )
    return Section("How to repeat", [*blocks, Text(told, "note")])


def _styled(sentence: str) -> Text:
    """A paragraph, marked where a reader should take care."""
    care = sentence.startswith(("The draws need care", DEAR)) or " weak: " in sentence
    note = sentence.startswith(UNCALIBRATED)
    return Text(sentence, "warning" if care else "note" if note else "plain")


# --- words --------------------------------------------------------------------------------


def _moment(found: Findings, r: int, s: int, at: int) -> tuple[str, str, str, str]:
    """Mean, sign, interval and certainty of a response at one horizon, in words."""
    draws, level = found.irf.draws[:, r, s, at], found.study.level
    mean = float(draws.mean())
    share = float(((draws > 0) == (mean > 0)).mean())
    sure = "almost surely" if share > 0.9995 else f"with probability {share:.2f}"
    size = f"{number(mean)}\N{NO-BREAK SPACE}{found.study.units.get(found.irf.responses[r], '')}"
    ends = interval(*np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    return (
        size.strip(),
        "positive" if mean > 0 else "negative",
        f"{level:.0%} interval {ends}",
        sure,
    )


def _widened(found: Findings) -> dict[str, float]:
    """Deviation with prior and calibration over that of the estimates, less 1; mean over horizons.

    Without calibration nothing is said.
    """
    rates, narrowed, out = found.posterior.calibration, found.irf.narrowed, {}
    for one, share in zip(rates, () if narrowed is None else narrowed, strict=False):
        if np.isfinite(share).any():
            out[one.response] = float(np.nanmean((1 - share) / one.rate**0.5)) - 1
    return out


def _excluded(found: Findings, r: int, s: int) -> np.ndarray:
    """(H,) where the joint band does not hold 0."""
    frame = rows_of(found.table, found, r, s)
    out: np.ndarray = ((frame["lower_joint"] > 0) | (frame["upper_joint"] < 0)).to_numpy()
    return out


def _runs(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for one in numbers:
        if runs and one == runs[-1][-1] + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def _dates(found: Findings) -> str:
    """First and last date of the shock, and of the outcomes."""
    lp = found.projection
    rows = np.unique(np.concatenate([part.rows for part in lp.parts]))
    period, label = lp.series.period[rows], lp.series.labels
    first, last = label[rows[period.argmin()]], label[rows[period.argmax()]]
    units = len(lp.series.units)
    panel = f" of {units} units" if units > 1 else ""
    return f"the shock from {first} to {last}{panel}"


def _worst(column: pd.Series, digits: int = 5) -> str:
    """The largest value and whose it is; a single chain has none."""
    known = column.dropna()
    return f"{number(abs(known.max()), digits)} ({known.idxmax()})" if len(known) else "–"


def _when(found: Findings, horizon: int) -> str:
    word = found.grain
    return f"in the same {word}" if horizon == 0 else f"after {horizon} {word}{'s' * (horizon > 1)}"


def _what(found: Findings, r: int) -> str:
    name = found.irf.responses[r]
    return f"the sum of {name} since the shock" if found.study.cumulative else name
