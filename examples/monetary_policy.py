"""Responses to monetary policy (Gertler and Karadi, 2015), by least squares and by LP-IV.

    python examples/monetary_policy.py gk.csv.gz FOLDER

The table: their monthly data, 1979:7 to 2012:6 (doi 10.3886/E114082V1), with columns year, month,
logip and logcpi (100 logs), ebp (excess bond premium), gs1 (one-year rate, the policy indicator)
and ff4_tc (surprises in three-month fed funds futures, the instrument). Responses are to a rise
of gs1 by one percentage point: (a) the part of gs1 that logip and logcpi of the same month and
twelve months of everything do not predict; (b) gs1 moved by the surprises.

The surprises start in 1990:1, and with twelve lags and 48 horizons a common sample would end in
2008:6. `sample="available"` uses at each horizon the months that it has: from 1990:1 to 2012:6
less the horizon. Instruments that enter only where they overlap are the reason for the smaller
sample of (b); the lags reach back to 1989.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

import hakari.inference as hi

RESPONSES = ["logip", "logcpi", "ebp"]
ASKED = {"lags": 12, "horizons": 48, "time": ["year", "month"]}
SELECTED = [0, 12, 24, 36, 48]


def main(path: str, folder: str) -> None:
    """Estimate both ways, write figures and tables, print what they say."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)

    # (a) recursive: industrial production and prices do not react within the month
    recursive = ["l(logip, 0)", "l(logcpi, 0)"]
    lp = hi.LocalProjection(path, RESPONSES, "gs1", controls=recursive, **ASKED)
    result = hi.sample(lp.posterior(hi.RoughnessPenalty()), seed=1)
    irf = lp.impulse_response(result)
    report("monetary_policy_lp", lp, irf, out)

    # (b) LP-IV: the surprises as instrument, twelve lags as controls
    iv = hi.LocalProjection(path, RESPONSES, "gs1", "ff4_tc", sample="available", **ASKED)
    result = hi.sample(iv.posterior(hi.RoughnessPenalty()), seed=1)
    irf = replace(iv.impulse_response(result), anderson_rubin=iv.anderson_rubin(0.9))
    report("monetary_policy_iv", iv, irf, out)
    print(strength(iv.first_stage()))


def report(name: str, lp: hi.LocalProjection, irf: hi.ImpulseResponse, out: Path) -> None:
    """Figure and table into the folder; sample and selected horizons onto the screen."""
    irf.plot(level=0.9, unit="months").savefig(out / f"{name}.png", dpi=200)
    table = irf.to_dataframe(level=0.9)
    table.to_csv(out / f"{name}.csv", index=False)
    rows = sorted(set(lp.rows_used))
    print(f"\n{name}: {rows[0]} to {rows[-1]} rows, {lp.coefficients} coefficients a regression")
    for note in lp.notes:
        print(note)
    ends = ["lower_pointwise", "upper_pointwise", "lower_joint", "upper_joint"]
    shown = table[table["horizon"].isin(SELECTED)]
    print(
        shown[["response", "horizon", "mean", *ends]].to_string(
            index=False, float_format="{:z.2f}".format
        )
    )
    for response in RESPONSES:
        print(finding(table[table["response"] == response], response))


def finding(table: pd.DataFrame, response: str) -> str:
    """Where the simultaneous band excludes 0, or that it does not."""
    table = table[table["sd"] > 1e-6]  # what is 0 by assumption is no finding
    out = table[(table["lower_joint"] > 0) | (table["upper_joint"] < 0)]
    if out.empty:
        return f"{response}: the simultaneous 90% band contains 0 at every horizon."
    top = out.loc[out["mean"].abs().idxmax()]
    months = ", ".join(map(str, out["horizon"]))
    return (
        f"{response}: the simultaneous 90% band excludes 0 at months {months}; the largest mean "
        f"response there is {top['mean']:.2f}, after {top['horizon']:.0f} months."
    )


def strength(stages: pd.DataFrame) -> str:
    """The effective F over horizons beside its critical value."""
    f, critical = stages["effective_f"], stages["critical"].iloc[0]
    text = f"First stage of ff4_tc: effective F {f.min():.1f} to {f.max():.1f} over horizons, "
    text += f"critical value {critical:.1f} (bias of 10%): "
    if f.min() < critical:
        return text + "weak; read the Anderson-Rubin sets (dotted), which cover nevertheless."
    return text + "strong."


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python examples/monetary_policy.py TABLE FOLDER")
    main(*sys.argv[1:])
