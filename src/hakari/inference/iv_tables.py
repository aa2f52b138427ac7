"""The tables of an analysis, as text: one source for the terminal and the report."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from hakari.inference.gmm import Statistic
from hakari.inference.iv import Analysis
from hakari.report import Facts, Table


def number(value: Any, digits: int = 3) -> str:
    """A number to a few significant digits, `–` where there is none."""
    value = float(value)
    if not isfinite(value):
        return "–" if np.isnan(value) else ("∞" if value > 0 else "-∞")
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - int(np.floor(np.log10(abs(value) or 1))), 0)}f}"


def posterior_table(analysis: Analysis) -> Table:
    """Mean, spread, interval and chain diagnostics of each coefficient."""
    frame = analysis.summary
    head = ["", "mean", "sd", "median", *frame.columns[3:5], "ESS", "R-hat"]
    rows = [
        [
            str(name),
            *(number(row.iloc[column]) for column in range(5)),
            f"{min(row['ess_bulk'], row['ess_tail']):.0f}" if isfinite(row["ess_bulk"]) else "–",
            f"{row['r_hat']:.3f}" if isfinite(row["r_hat"]) else "–",
        ]
        for name, row in frame.iterrows()
    ]
    return Table(head, rows, "Quasi-posterior. ESS: the lower of bulk and tail.")


def estimates_table(analysis: Analysis) -> Table:
    """The posterior beside each point estimate, standard errors in parentheses."""
    frame = analysis.summary
    columns = sorted(analysis.estimates, key=lambda e: ("2SLS", "IV-GMM", "CUE").index(e.label))
    head = ["", "posterior", *(f"{e.label}\n{_narrow(e.source)}" for e in columns)]
    rows = []
    for k, name in enumerate(analysis.moments.names.parameters):
        row = frame.loc[name]
        cells = [f"{number(e.theta[k])}\n({number(e.std_error[k])})" for e in columns]
        rows.append([name, f"{number(row['mean'])}\n({number(row['sd'])})", *cells])
    J = [f"{number(e.J.value)}\np {number(e.J.p_value, 2)}" for e in columns]
    rows.append(["J", "", *("–" if cell.startswith("–") else cell for cell in J)])
    return Table(head, rows, "Posterior mean (sd) beside point estimates (standard errors).")


def strength_table(analysis: Analysis) -> Table | None:
    """First-stage statistics, a row an endogenous variable."""
    stages = analysis.stages.stages
    if not stages:
        return None
    head = ["endogenous", "partial R²", "F", "robust F", "effective F", "critical", "conditional F"]
    rows = [
        [
            stage.name,
            number(stage.partial_r2),
            _statistic(stage.F),
            _statistic(stage.F_robust),
            _statistic(stage.F_effective),
            number(stage.F_effective.critical),
            _statistic(stage.F_conditional),
        ]
        for stage in stages
    ]
    excluded = ", ".join(analysis.stages.instruments)
    caption = (
        f"First stage (instruments: {excluded}). Effective F of Montiel Olea and Pflueger (2013), "
        "below critical: weak; conditional F of Sanderson and Windmeijer (2016)."
    )
    return Table(head, rows, caption)


def sensitivity_table(analysis: Analysis, name: str) -> Table | None:
    """One coefficient by the scale of its prior."""
    if not analysis.sensitivity:
        return None
    k = analysis.moments.names.parameters.index(name)
    level = f"{analysis.question.level:.0%}"
    rows = []
    for one in analysis.sensitivity:
        kernel = one.without or one.method + " (!)" * bool(one.notes)
        numbers = [number(v[k]) for v in (one.mean, one.lower, one.upper)]
        rows.append([one.label + " (asked)" * one.asked, *numbers, kernel])
    caption = f"Coefficient of {name} by the scale of the prior; (!): chains need care."
    return Table(["prior", "mean", f"lower {level}", f"upper {level}", "kernel"], rows, caption)


def chains_table(analysis: Analysis) -> Table:
    """What each chain did, and the whole."""
    checks = analysis.result["checks"].dataset
    rows = [
        [
            f"chain {chain}",
            f"{float(checks['first_stage'][chain]):.3f}",
            f"{float(checks['acceptance'][chain]):.3f}",
            f"{int(checks['singular_proposals'][chain])}",
        ]
        for chain in range(checks.sizes["chain"])
    ]
    head = ["", "passed first stage", "accepted", "singular proposals"]
    return Table(head, rows, "Shares of the proposals, and proposals at which Ω was singular.")


def facts(analysis: Analysis) -> Facts:
    """What the sampler was, and what its diagnostics say."""
    attributes, checks = analysis.result.attrs, analysis.result["checks"].dataset
    ess = analysis.ess
    shown = number(ess.value, 4) if isfinite(ess.value) else f"not available, {ess.note}"
    enough = "enough" if ess.enough else "fewer than needed"
    draws, warm = analysis.result["posterior"].sizes["draw"], attributes["warmup_seconds"]
    rows = [
        ("kernel", f"{attributes['method']}: {attributes['why']}"),
        ("draws", f"{draws} in each of {attributes['chains']} chains"),
        (
            "multivariate ESS",
            f"{shown} ({ess.needed:.0f} for {ess.precision:.0%} precision: {enough})",
        ),
        ("largest R-hat", number(analysis.summary["r_hat"].max(), 4)),
        ("evaluations", f"{attributes['evaluations']} for {attributes['iterations']} kept draws"),
        ("seconds", f"{warm:.2f} to warm up, {attributes['sampling_seconds']:.2f} to draw"),
    ]
    for name, label in (("pilot_k_hat", "Pareto k-hat, pilot"), ("k_hat", "Pareto k-hat, run")):
        if name in checks:
            rows.append((label, f"{float(checks[name]):.2f} (trusted under 0.7)"))
    return Facts(rows)


def _statistic(found: Statistic) -> str:
    return number(found.value)


def _narrow(source: str) -> str:
    """A package's name without its version, to be broken where columns are narrow."""
    return source.split()[0].replace("linearmodels", "linear\N{SOFT HYPHEN}models")
