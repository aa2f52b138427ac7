"""The demo's chapter on impulse responses: a recursive monetary policy shock in the US."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.datasets import macrodata  # type: ignore[import-untyped]

from hakari.inference.lp_command import config, figures, record, save_figure, show
from hakari.inference.lp_report import lp_chapter
from hakari.inference.lp_study import Study, find
from hakari.inference.patience import patience
from hakari.inference.result import save
from hakari.report import Part

NAME = "monetary-policy"
SLOW = ("output", "prices", "unemployment")
UNITS = {"output": "%", "prices": "%", "unemployment": "points", "tbill": "point"}
INTRO = (
    "What follows a rise of the US Treasury bill rate by one point? Quarterly data from 1959 to "
    "2009 (statsmodels' macrodata). The shock is recursive, as in Christiano, Eichenbaum and Evans "
    "(1999): the part of the rate that output, prices and unemployment of the same quarter and "
    "four quarters of all of them do not predict, so that these three cannot move at once. This is "
    "an assumption, and that the estimates of prices rise at first, the price puzzle, is a reason "
    "to doubt it."
)


def monetary_policy(folder: Path) -> Part:
    """What a rise of the interest rate does to output, prices and unemployment."""
    study = Study(
        quarters(),
        SLOW,
        ("tbill",),
        control=tuple(f"l({name}, 0)" for name in SLOW),
        time=("year", "quarter"),
        calibrate=True,
        data_name="statsmodels' macrodata",
        units=UNITS,
    )
    with patience("hakari: still at work"):
        found = find(study, progress=True)
    save(found.result, folder / f"{NAME}.nc")
    found.table.to_csv(folder / f"{NAME}.csv", index=False)
    made, title = figures(found), "Monetary policy: responses to a rate rise"
    save_figure(made["responses"], folder / NAME)
    chapter = lp_chapter(found, made, title, INTRO, "hakari demo")
    settings, shown = config(found), partial(show, found)
    return Part(NAME, chapter, shown, record(found), settings, found.interrupted)


def quarters() -> pd.DataFrame:
    """Output and prices in 100 logs, so that responses are per cent; rates in points."""
    raw = macrodata.load_pandas().data
    return pd.DataFrame(
        {
            "year": raw["year"].astype(int),
            "quarter": raw["quarter"].astype(int),
            "output": 100 * np.log(raw["realgdp"]),
            "prices": 100 * np.log(raw["cpi"]),
            "unemployment": raw["unemp"],
            "tbill": raw["tbilrate"],
        }
    )
