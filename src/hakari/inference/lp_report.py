"""The chapter of a report that local projections fill, its tables, and its sentences."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import isfinite

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hakari.inference.iv_tables import number
from hakari.inference.lp_study import NARROW, Findings
from hakari.report import Block, Chapter, Facts, Picture, Section, Table, Text
from hakari.run import versions

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
    said = [answer_of(found, r, s) for r, s, _ in _pairs(found)]
    return [*said, *prior_says(found), *instruments_say(found), *rates_say(found), draws_say(found)]


def answer_of(found: Findings, r: int, s: int) -> str:
    """What the shock does to one response; said plainly only where the joint band excludes 0."""
    irf, free = found.irf, ~found.known[r, s]
    if not free.any():
        return f"The response of {irf.responses[r]} to {irf.shocks[s]} is known without data."
    out = _excluded(found, r, s) & free
    mean = np.where(out if out.any() else free, irf.draws[:, r, s].mean(axis=0), 0.0)
    at = int(np.abs(mean).argmax())
    size, sign, interval, sure = _moment(found, r, s, at)
    when, band = _when(found, irf.horizons[at]), f"the {_band(found).partition(' (')[0]} band"
    if not out.any():
        return (
            f"What {_lower(impulse(found, s))} does to {_what(found, r)} is not clear: the largest "
            f"mean response, {size} {when} ({interval}), is {sign} {sure}, and {band} contains 0 "
            "at every horizon."
        )
    where = f"at {found.grain}s {_runs(np.array(irf.horizons)[out].tolist())}"
    return (
        f"{impulse(found, s)} {'raises' if mean[at] > 0 else 'lowers'} {_what(found, r)}: by "
        f"{size.removeprefix('-')} {when} in the posterior mean ({interval}), {sign} {sure}. "
        f"{band.capitalize()} excludes 0 {where if not out[free].all() else 'at every horizon'}."
    )


def impulse(found: Findings, s: int) -> str:
    """`A rise of gs1 by 1`, with the unit where it is known."""
    shock, size = found.irf.shocks[s], float(found.size[s])
    unit = found.study.units.get(shock, "")
    name = shock.replace(" | not ", " outside ").replace(" | ", " in ")
    by = f"{number(abs(size))} {unit}".strip() if found.study.scale == "sd" else f"{abs(size):g}"
    by = f"{by} {unit}".strip() if found.study.scale != "sd" else f"one standard deviation ({by})"
    return f"A {'rise' if size > 0 else 'fall'} of {name} by {by}"


def prior_says(found: Findings) -> list[str]:
    """By how much the prior narrowed the responses."""
    kinds, parts = found.priors, []
    if found.irf.narrowed is None:
        return ["Priors are flat: the bands are those of the estimates."]
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
    """What calibration did to each response."""
    parts = []
    for rate in found.posterior.calibration:
        factor = rate.rate**-0.5 - 1
        word = "wider" if factor >= 0 else "narrower"
        parts.append(f"those of {rate.response} are {abs(factor):.0%} {word}")
    if not parts:
        return []
    return [f"Bands are calibrated by a bootstrap: {', '.join(parts)} than without."]


def draws_say(found: Findings) -> str:
    """Whether the draws can be trusted."""
    if found.notes:
        return f"The draws need care: {'; '.join(found.notes)}."
    worst, least = found.summary["r_hat"].max(), found.summary[["ess_bulk", "ess_tail"]].min().min()
    return f"The draws are sound: R-hat at most {worst:.3f}, effective sizes at least {least:.0f}."


# --- tables -------------------------------------------------------------------------------


def horizon_tables(found: Findings) -> list[Table]:
    """Mean, spread and both bands at selected horizons, a table a response and shock."""
    level, out = found.study.level, []
    head = [f"{found.grain}s after", "mean", "sd", f"{level:.0%} pointwise", _band(found)]
    for r, s, name in _pairs(found):
        frame = _of(found.table, found, r, s)
        rows = [
            [
                str(row["horizon"]),
                number(row["mean"]),
                "known" if found.known[r, s, place] else number(row["sd"]),
                _interval(row["lower_pointwise"], row["upper_pointwise"]),
                _interval(row["lower_joint"], row["upper_joint"]),
            ]
            for place, row in frame.iterrows()
            if row["horizon"] in found.selected
        ]
        unit = found.study.units.get(found.irf.responses[r], "")
        what = f"{name} ({unit})" if unit else name
        out.append(Table(head, rows, f"Response of {what}: {_lower(impulse(found, s))}."))
    return out


def shape_table(found: Findings) -> Table:
    """Peak, when it is, half-life and one sign throughout, of the draws themselves."""
    level, what = f"{found.study.level:.0%}", f"{found.grain}s"
    head = [
        "",
        f"peak ({level})",
        f"at, {what}",
        f"half-life, {what}",
        "P(never < 0)",
        "P(never > 0)",
    ]
    rows = []
    for (r, s, name), (_, row) in zip(_pairs(found), found.shape.iterrows(), strict=True):
        draws = found.irf.draws[:, r, s][:, ~found.known[r, s]]
        rows.append(
            [
                name,
                f"{number(row['peak'])}\n{_interval(row['peak_lower'], row['peak_upper'])}",
                _whole(row, "peak_horizon"),
                _whole(row, "half_life"),
                f"{(draws >= 0).all(axis=1).mean():.2f}",
                f"{(draws <= 0).all(axis=1).mean():.2f}",
            ]
        )
    caption = (
        f"Largest response of each draw, whichever its sign: median and {level} interval. "
        f"Half-life: {what} until under half the peak; ∞: not within {found.irf.horizons[-1]}."
    )
    return Table(head, rows, caption)


def narrowed_table(found: Findings) -> Table | None:
    """Share by which the prior narrowed the standard deviation, at selected horizons."""
    if found.irf.narrowed is None:
        return None
    places = [found.irf.horizons.index(h) for h in found.selected]
    rows = []
    for r, s, name in _pairs(found):
        share = found.irf.narrowed[r, s]
        mean = np.nanmean(share) if np.isfinite(share).any() else np.nan
        rows.append([name, *(_share(share[p]) for p in places), _share(mean)])
    head = [f"{found.grain}s after", *map(str, found.selected), "mean"]
    caption = "Share by which the prior narrowed the standard deviation; negative: widened."
    return Table(head, rows, caption)


def strength_table(found: Findings) -> Table | None:
    """The first stage, a row for horizons on the same rows of the table."""
    if found.first_stage is None:
        return None
    columns = ["rows", "partial_r2", "effective_f", "critical"]
    groups = found.first_stage.groupby(columns, sort=False)["horizon"].agg(["min", "max"])
    if len(groups) > len(found.selected):
        frame = found.first_stage[found.first_stage["horizon"].isin(found.selected)]
        groups = frame.groupby(columns, sort=False)["horizon"].agg(["min", "max"])
    rows = [
        [f"{low}" if low == high else f"{low} to {high}", f"{key[0]:.0f}", *map(number, key[1:])]
        for key, (low, high) in zip(groups.index, groups.to_numpy(), strict=True)
    ]
    caption = (
        f"First stage (instruments: {', '.join(found.study.instrument)}). Effective F of Montiel "
        "Olea and Pflueger (2013), below critical: weak."
    )
    return Table(
        [f"{found.grain}s after", "rows", "partial R²", "effective F", "critical"], rows, caption
    )


# --- sections -----------------------------------------------------------------------------


def _question(found: Findings) -> Section:
    study, lp = found.study, found.projection
    rows = sorted(set(lp.rows_used))
    used = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}, by horizon,"
    controls = lp.coefficients - len(lp.shocks)
    way = (
        f"by {', '.join(study.instrument)} as instruments"
        if study.instrument
        else "by least squares"
    )
    asked = "cumulated responses" if study.cumulative else "responses"
    facts = [
        ("responses", ", ".join(study.response) + " (cumulated)" * study.cumulative),
        ("shock", ", ".join(lp.shocks)),
        *[("instruments", ", ".join(study.instrument))] * bool(study.instrument),
        ("horizons", f"0 to {study.horizons} {found.grain}s"),
        ("sample", f"{used} rows of {study.source}, {_dates(found)}"),
        ("lags", f"{lp.question.lag_order} of each variable"),
        ("controls", ", ".join(study.control) or "only those lags and the trend"),
        ("concentrated out", f"{controls} coefficients in each horizon's regression"),
        ("covariance", f"{found.posterior.covariance}, joint over horizons"),
        ("prior", "; ".join(f"{name}: {prior}" for name, prior in found.priors.items())),
    ]
    text = (
        f"The {asked} of {', '.join(study.response)} to {_lower(impulse(found, 0))}, {way}: a "
        "local projection at each horizon, all of them in one posterior."
    )
    notes = [Text(f"{note[0].upper()}{note[1:]}.", "note") for note in lp.notes]
    return Section("Question", [Text(text), Facts(facts), *notes])


def _verdict(found: Findings) -> Section:
    blocks: list[Block] = []
    if found.interrupted:
        blocks.append(Text("Interrupted by hand: these are the draws until then.", "warning"))
    first, *rest = verdict(found)
    blocks.append(Text(first, "lead"))
    for sentence in rest:
        care = sentence.startswith("The draws need care") or " weak: " in sentence
        blocks.append(Text(sentence, "warning" if care else "plain"))
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
                "Pointwise bands of the prior behind those of the posterior",
                "The prior's band (hatched) beside the posterior's. It leaves the panel where it "
                "says little about the level and only asks for a smooth path.",
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
            "without a prior, beside the posterior. Where they leave the panel they may be "
            "unbounded.",
        )
    )
    return [Section("Strength of the instruments", blocks)]


def _rates(found: Findings) -> list[Section]:
    rates = found.posterior.calibration
    if not rates:
        return []
    rows = [
        [
            one.response,
            number(one.rate),
            _interval(*one.interval),
            f"{one.covered:.0%}",
            f"{one.rate**-0.5 - 1:+.0%}",
        ]
        for one in rates
    ]
    head = ["", "learning rate", "90% interval", "covered before", "width"]
    caption = (
        "Each posterior to the power of its rate. Covered before: share of "
        f"{rates[0].replications} bootstrap samples whose {rates[0].level:.0%} joint band held the "
        "truth without it."
    )
    return [Section("Learning rates", [Table(head, rows, caption), *map(Text, rates_say(found))])]


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


# --- words --------------------------------------------------------------------------------


def _pairs(found: Findings) -> list[tuple[int, int, str]]:
    """Places and name of each response and shock; the shock's name only where there are several."""
    irf = found.irf
    several = len(irf.shocks) > 1
    return [
        (r, s, f"{irf.responses[r]} to {irf.shocks[s]}" if several else irf.responses[r])
        for r, s in product(range(len(irf.responses)), range(len(irf.shocks)))
    ]


def _of(table: pd.DataFrame, found: Findings, r: int, s: int) -> pd.DataFrame:
    mine = (table["response"] == found.irf.responses[r]) & (table["shock"] == found.irf.shocks[s])
    return table[mine].reset_index(drop=True)


def _moment(found: Findings, r: int, s: int, at: int) -> tuple[str, str, str, str]:
    """Mean, sign, interval and certainty of a response at one horizon, in words."""
    draws, level = found.irf.draws[:, r, s, at], found.study.level
    mean = float(draws.mean())
    share = float(((draws > 0) == (mean > 0)).mean())
    sure = "almost surely" if share > 0.9995 else f"with probability {share:.2f}"
    size = f"{number(mean)}\N{NO-BREAK SPACE}{found.study.units.get(found.irf.responses[r], '')}"
    ends = _interval(*np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    return (
        size.strip(),
        "positive" if mean > 0 else "negative",
        f"{level:.0%} interval {ends}",
        sure,
    )


def _excluded(found: Findings, r: int, s: int) -> np.ndarray:
    """(H,) where the joint band does not hold 0."""
    frame = _of(found.table, found, r, s)
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


def _band(found: Findings) -> str:
    kind, level = found.study.band, f"{found.study.level:.0%}"
    return f"{level} pointwise" if kind == "pointwise" else f"{level} simultaneous ({kind})"


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


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _interval(lower: float, upper: float) -> str:
    return f"{number(lower)} to {number(upper)}"


def _whole(row: pd.Series, name: str) -> str:
    ends = (row[name], row[f"{name}_lower"], row[f"{name}_upper"])
    middle, low, high = ("∞" if np.isposinf(end) else f"{end:.0f}" for end in ends)
    return f"{middle}\n{low} to {high}"


def _share(value: float) -> str:
    return f"{value:.0%}".replace("-0%", "0%") if isfinite(value) else "–"
