"""The demo's chapter on losses: Engel's food expenditure by income, median and 0.9 quantile."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from statsmodels.datasets import engel  # type: ignore[import-untyped]
from statsmodels.regression.quantile_regression import QuantReg  # type: ignore[import-untyped]

from hakari.inference.gibbs.command import config, record, show
from hakari.inference.gibbs.report import (
    calibration_blocks,
    diagnostics,
    posterior_blocks,
    repeat,
    said,
)
from hakari.inference.gibbs.rival_intervals import Rival
from hakari.inference.gibbs.study import Findings, Study, find
from hakari.inference.patience import patience
from hakari.inference.result import save
from hakari.report import Block, Chapter, Part, Section, Text

NAME = "engel"
QUANTILES = {0.5: "The median", 0.9: "The 0.9 quantile"}
FORMULA = "foodexp ~ 1 + income"
INTRO = (
    "How does spending on food rise with income? Engel's 235 Belgian working-class households of "
    "1857, in francs (statsmodels' engel), by the check loss of quantile regression (Koenker and "
    "Bassett, 1978). A Gibbs posterior takes the loss in the place of a log-likelihood, and how "
    "wide it is depends on the units of the loss: at learning rate 1 it is many times too sure. "
    "Calibrated, its intervals cover in bootstrap data as often as they say. Beside them: "
    "Koenker's intervals by statsmodels' QuantReg (robust kernel standard errors: Powell's "
    "sandwich with an Epanechnikov kernel and the bandwidth of Hall and Sheather), and our own "
    "sandwich, with Powell's uniform kernel over a fixed share of the rows."
)


def food_and_income(folder: Path) -> Part:
    """How food expenditure rises with income: quantile regression whose intervals cover."""
    data, found = engel.load_pandas().data, {}
    for tau in QUANTILES:
        with patience():
            found[tau] = _quantile(data, tau)
        save(found[tau].result, folder / f"{NAME}-{tau:g}.nc")
        found[tau].table.to_csv(folder / f"{NAME}-{tau:g}.csv")
        if found[tau].interrupted:
            break
    return Part(
        NAME,
        Chapter("Engel: food and income", _sections(found), INTRO),
        partial(_show, found),
        {f"{tau:g}": record(one) for tau, one in found.items()},
        {f"{tau:g}": config(one) for tau, one in found.items()},
        any(one.interrupted for one in found.values()),
    )


def koenker(data: pd.DataFrame, tau: float, level: float) -> Rival:
    """Intervals of statsmodels' QuantReg by its robust kernel standard errors."""
    X = pd.DataFrame({"Intercept": 1.0, "income": data["income"]})
    fitted = QuantReg(data["foodexp"], X).fit(
        tau, vcov="robust", kernel="epa", bandwidth="hsheather"
    )
    lower, upper = fitted.conf_int(1 - level).to_numpy().T
    return Rival("Koenker", tuple(X.columns), fitted.params.to_numpy(), lower, upper)


def _quantile(data: pd.DataFrame, tau: float) -> Findings:
    study = Study(FORMULA, data, f"quantile:{tau:g}", data_name="statsmodels' engel")
    found = find(study, progress=True)
    return replace(found, rivals=(*found.rivals, koenker(data, tau, study.level)))


def _sections(found: dict[float, Findings]) -> list[Section]:
    """Both answers, then what they rest on."""
    out = []
    for tau, one in found.items():
        blocks = [*said(one), *posterior_blocks(one)]
        out.append(Section(QUANTILES[tau], blocks))
    checks: list[Block] = []
    for tau, one in found.items():
        checks += [Text(f"{QUANTILES[tau]}:"), *calibration_blocks(one), *diagnostics(one)]
    first: Any = next(iter(found.values()))
    return [
        *out,
        Section("Calibration and draws", checks),
        Section("How to repeat", repeat(first, "hakari demo")),
    ]


def _show(found: dict[float, Findings], console: Console) -> None:
    for tau, one in found.items():
        console.print(f"{QUANTILES[tau]}\n", style="bold")
        show(one, console)
