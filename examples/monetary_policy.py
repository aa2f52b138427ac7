"""Responses to monetary policy (Gertler and Karadi, 2015), by least squares and by LP-IV.

    python examples/monetary_policy.py gk.csv.gz FOLDER

The table: their monthly data, 1979:7 to 2012:6 (doi 10.3886/E114082V1), with columns year, month,
logip and logcpi (100 logs), ebp (excess bond premium), gs1 (one-year rate, the policy indicator)
and ff4_tc (surprises in three-month fed funds futures, the instrument). Responses are to a rise
of gs1 by one percentage point: (a) the part of gs1 that logip and logcpi of the same month and
twelve months of everything do not predict; (b) gs1 moved by the surprises; (c) as (a), on the
months of (b), since otherwise two things differ between them, the shock and the sample.

The surprises start in 1990:1, and with twelve lags and 48 horizons a common sample would end in
2008:6. `sample="available"` uses at each horizon the months that it has: from 1990:1 to 2012:6
less the horizon. Instruments that enter only where they overlap are the reason for the smaller
sample of (b); the lags reach back to 1989. Bands are calibrated, and Anderson-Rubin sets, which
hold however weak the surprises are, stand beside those of (b).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import hakari.inference as hi
from hakari.inference.projection_calibration import Rate

RESPONSES = ["logip", "logcpi", "ebp"]
ASKED = {"lags": 12, "horizons": 48, "time": ["year", "month"]}
RECURSIVE = ["l(logip, 0)", "l(logcpi, 0)"]  # they do not react within the month
SELECTED = [0, 12, 24, 36, 48]
PUZZLES = {"logip": "output puzzle", "logcpi": "price puzzle"}  # where these rise
LOOK = {
    "unit": "months",
    "units": {"logip": "%", "logcpi": "%", "ebp": "points"},
    "impulses": {"gs1": "a rise of gs1 by 1 point"},
    "sets_level": 0.9,
}


def main(path: str, folder: str) -> None:
    """Estimate three ways, write figures and tables, print what they say."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    data = pd.read_csv(path)

    a = hi.LocalProjection(data, RESPONSES, "gs1", controls=RECURSIVE, **ASKED)
    report("monetary_policy_lp", a, out, "least squares")

    b = hi.LocalProjection(data, RESPONSES, "gs1", "ff4_tc", sample="available", **ASKED)
    report("monetary_policy_iv", b, out, "two-stage least squares")
    print(strength(b.first_stage()))

    later = data[data["year"] >= 1989]  # twelve lags before 1990:1
    c = hi.LocalProjection(later, RESPONSES, "gs1", controls=RECURSIVE, sample="available", **ASKED)
    report("monetary_policy_lp_1990", c, out, "least squares")
    print(f"\n{samples(a, b, c)}")


def report(name: str, lp: hi.LocalProjection, out: Path, estimator: str) -> None:
    """Sample, calibrate, draw: figure and table into the folder, what they say onto the screen."""
    posterior = lp.posterior(hi.RoughnessPenalty()).calibrate(level=0.9, seed=1)
    irf = lp.impulse_response(hi.sample(posterior, seed=1))
    irf.plot(level=0.9, estimator=estimator, **LOOK).savefig(out / f"{name}.png", dpi=200)
    table = irf.to_dataframe(level=0.9)
    table.to_csv(out / f"{name}.csv", index=False)
    most, least = max(lp.rows_used), min(lp.rows_used)
    counted = f"{most}" if most == least else f"{least} to {most}"
    print(f"\n{name}: {dates(lp)}, {counted} rows, ", end="")
    print(f"{lp.coefficients} coefficients a regression")
    for note in irf.notes:
        print(note)
    print(calibration(posterior.calibration))
    ends = ["lower_pointwise", "upper_pointwise", "lower_joint", "upper_joint"]
    shown = table[table["horizon"].isin(SELECTED)]
    print(
        shown[["response", "horizon", "estimate", "mean", *ends]].to_string(
            index=False, float_format="{:z.2f}".format
        )
    )
    for response in RESPONSES:
        print(finding(table[table["response"] == response], response))


# --- sentences ----------------------------------------------------------------------------


def finding(table: pd.DataFrame, response: str) -> str:
    """Where band and Anderson-Rubin sets exclude 0, where they disagree, and puzzles."""
    table = table[table["sd"] > 1e-6]  # what is 0 by assumption is no finding
    month = table["horizon"]
    band = excludes(table, "joint")
    if band.any():
        top = table.loc[table["mean"].where(band, 0).abs().idxmax()]
        said = [
            f"{response}: the simultaneous 90% band excludes 0 at months {runs(month[band])}; the "
            f"largest mean response there is {top['mean']:.2f}, after {top['horizon']:.0f} months."
        ]
    else:
        said = [f"{response}: the simultaneous 90% band contains 0 at every horizon."]
    if "lower_ar" in table:
        sets = excludes(table, "ar")
        if (sets & ~band).any():
            nowhere = "" if band.any() else f"{response}: "
            said = said if band.any() else []
            said.append(
                f"{nowhere}Anderson-Rubin sets (90%, month by month) exclude 0 at months "
                f"{runs(month[sets & ~band])}, where the simultaneous band contains it"
                f"{pointwise(table, sets & ~band)}."
            )
        if (band & ~sets).any():
            said.append(
                "Anderson-Rubin sets contain 0, although the simultaneous band does not, at "
                f"months {runs(month[band & ~sets])}."
            )
    return " ".join([*said, *puzzle(table, response)])


def pointwise(table: pd.DataFrame, where: pd.Series) -> str:
    """What the pointwise band, which promises as little as the sets, says in these months."""
    holds = where & ~excludes(table, "pointwise")
    if not holds.any():
        return "; the pointwise band excludes it there too"
    months = "" if holds.sum() == where.sum() else f" at months {runs(table['horizon'][holds])}"
    return f", as the pointwise band does{months}"


def puzzle(table: pd.DataFrame, response: str) -> list[str]:
    """A sentence where what a tightening should lower rises."""
    kinds = {"joint": "simultaneous band", "pointwise": "pointwise band", "ar": "sets"}
    up = {
        words: table["horizon"][table[f"lower_{kind}"] > 0]
        for kind, words in kinds.items()
        if f"lower_{kind}" in table
    }
    found = [f"{words}: months {runs(months)}" for words, months in up.items() if len(months)]
    if response not in PUZZLES or not found:
        return []
    return [
        f"It rises ({'; '.join(found)}), where theory has a tightening lower it: the "
        f"{PUZZLES[response]}, a reason to doubt that the shock is policy alone."
    ]


def calibration(rates: Sequence[Rate]) -> str:
    """What the bootstrap found, and what it changed."""
    if all(rate.rate == 1 for rate in rates):
        return "The bands already cover in the bootstrap: nothing was widened."
    parts = [
        f"{r.response} {r.covered:.0%} "
        + (f"(now {r.rate**-0.5 - 1:.0%} wider)" if r.rate < 1 else "(left as it was)")
        for r in rates
    ]
    return f"Simultaneous 90% bands covered in the bootstrap before: {', '.join(parts)}."


def samples(a: hi.LocalProjection, b: hi.LocalProjection, c: hi.LocalProjection) -> str:
    """The months of each, and what may be compared."""
    told = f"Samples differ: (a) is {dates(a)}, (b) {dates(b)}. Compare (b) with (c), "
    return told + f"{dates(c)}: only the identification differs between them."


def strength(stages: pd.DataFrame) -> str:
    """The effective F over horizons beside its critical value."""
    f, critical = stages["effective_f"], stages["critical"].iloc[0]
    text = f"First stage of ff4_tc: effective F {f.min():.1f} to {f.max():.1f} over horizons, "
    text += f"critical value {critical:.1f} (bias of 10%): "
    if f.min() < critical:
        return text + "weak; read the Anderson-Rubin sets (dotted), which cover nevertheless."
    return text + "strong."


def excludes(table: pd.DataFrame, kind: str) -> pd.Series:
    """Where 0 is not between the ends."""
    return (table[f"lower_{kind}"] > 0) | (table[f"upper_{kind}"] < 0)


def dates(lp: hi.LocalProjection) -> str:
    """First and last month of the shock, over all horizons."""
    rows = np.concatenate([part.rows for part in lp.parts])
    return f"{lp.series.labels[rows.min()]} to {lp.series.labels[rows.max()]}"


def runs(months: pd.Series) -> str:
    """Months as text, those that follow each other as `3 to 5`."""
    values = months.to_numpy()
    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python examples/monetary_policy.py TABLE FOLDER")
    main(*sys.argv[1:])
