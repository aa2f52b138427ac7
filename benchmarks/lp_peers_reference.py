"""Numbers of two other packages for the same local projections, for tests/numerics/lp_peers.json.

They run in an environment of their own, so that the project does not depend on them:

    python -m venv peers && peers/bin/pip install localproj==0.1.0 localprojections==0.2.1
    OPENBLAS_NUM_THREADS=1 peers/bin/python benchmarks/lp_peers_reference.py

Data: US quarters of statsmodels' macrodata; a table for LP-IV and a panel are simulated here from a
fixed seed, rounded, and stored beside the numbers. What each covariance is, and by which factor the
packages differ from each other, stands in tests/numerics/test_lp_peers.py.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import Any

import localproj
import localprojections
import numpy as np
import pandas as pd
from statsmodels.datasets import macrodata

TARGET = Path(__file__).parents[1] / "tests" / "numerics" / "lp_peers.json"
SEED = 20_250_320
LEVEL = 0.95  # of the bands that localprojections gives instead of standard errors

MACRO = "gdp ~ rate + l(gdp, 1:4) + l(rate, 1:4) + l(infl, 1:4)"
IV = "y ~ l(y, 1:2) + l(s, 1:2) | 0 | s ~ "
PANEL = "y ~ s + l(y, 1:2) + l(s, 1:2) | "


def main() -> None:
    tables = {"iv": instrumented(), "panel": panel()}
    packages = ("localproj", "localprojections", "pyfixest", "linearmodels", "statsmodels")
    found = {
        "versions": {name: version(name) for name in packages},
        "tables": {name: table.to_dict("list") for name, table in tables.items()},
        "localproj": localproj_numbers(macro(), **tables),
        "localprojections": localprojections_numbers(macro(), tables["panel"]),
    }
    TARGET.write_text(as_text(found) + "\n")


# --- data ---------------------------------------------------------------------------------


def macro() -> pd.DataFrame:
    """Log output (percent), its growth, inflation, the bill rate and whether prices rise fast."""
    read = macrodata.load_pandas().data
    output = 100 * np.log(read["realgdp"])
    table = {"output": output, "gdp": output.diff(), "infl": read["infl"], "rate": read["tbilrate"]}
    return pd.DataFrame(table).assign(fast=(read["infl"] > 4).astype(float))


def instrumented() -> pd.DataFrame:
    """150 periods of y and s, which errors move together, and two instruments of s."""
    rng = np.random.default_rng(SEED)
    z, e = rng.standard_normal((150, 2)), rng.standard_normal((150, 2))
    s, y = np.zeros(150), np.zeros(150)
    for t in range(1, 150):
        s[t] = 0.3 * s[t - 1] + z[t] @ [0.6, 0.4] + e[t, 0]
        y[t] = 0.7 * y[t - 1] + 0.5 * s[t] + e[t] @ [0.8, 0.6]
    return pd.DataFrame({"y": y, "s": s, "z1": z[:, 0], "z2": z[:, 1]}).round(4)


def panel() -> pd.DataFrame:
    """Eight units over 30 years, one of which starts three years late."""
    rng = np.random.default_rng(SEED + 1)
    years, common = np.arange(1990, 2020), rng.standard_normal(30)
    parts = []
    for unit in "ABCDEFGH":
        s, y, effect = np.zeros(30), np.zeros(30), rng.standard_normal()
        e = rng.standard_normal((30, 2))
        for t in range(1, 30):
            s[t] = 0.5 * s[t - 1] + e[t, 0]
            y[t] = effect + 0.6 * y[t - 1] + 0.4 * s[t] + common[t] + e[t, 1]
        parts.append(pd.DataFrame({"unit": unit, "year": years, "y": y, "s": s}))
    whole = pd.concat(parts, ignore_index=True).round(4)
    return whole[(whole["unit"] != "C") | (whole["year"] >= 1993)].reset_index(drop=True)


# --- localproj ----------------------------------------------------------------------------


def localproj_numbers(macro: pd.DataFrame, iv: pd.DataFrame, panel: pd.DataFrame) -> dict[str, Any]:
    hac = {"type": "hac", "lags": 4}
    proxy = {"hc1": "hc1"}  # with instruments pyfixest 0.60 has no hc3, and its HAC fails
    series = proxy | {"hc3": "hc3", "hac:4": hac}
    units = {"data": panel, "shock": "s", "horizons": 4, "groupby": "unit", "time": "year"}
    rows = {"cluster": {"CRV1": "unit"}, "hc1": "hc1"}
    quarters = {"data": macro, "shock": "rate", "horizons": 8}
    sums = MACRO.replace("gdp ~", "output ~")
    return {
        "ols": fits(MACRO, series, **quarters),
        "common": fits(MACRO, series, sample="common", **quarters),
        "cumulative": fits(sums, series, outcome="cumulative", **quarters),
        "iv": fits(IV + "z1", proxy, data=iv, shock="s", horizons=6),
        "two instruments": fits(IV + "z1 + z2", proxy, data=iv, shock="s", horizons=6),
        "units": fits(PANEL + "unit", rows, **units),
        "units and dates": fits(PANEL + "unit + year", rows, **units),
        "smooth": smooth(macro),
    }


def fits(formula: str, covariances: dict[str, Any], *, shock: str, **more: Any) -> dict[str, Any]:
    """Estimates, rows and coefficients by horizon; standard errors by covariance."""
    out: dict[str, Any] = {"errors": {}, "joint": {}}
    for name, vcov in covariances.items():
        found = localproj.lp(formula, shock=shock, vcov=vcov, **more)
        each = list(found.fits.values())
        out["estimate"] = [fit.params[shock] for fit in each]
        out["rows"] = [fit.nobs for fit in each]
        out["coefficients"] = [fit.nobs - fit.df_resid for fit in each]
        out["errors"][name] = [fit.covariance.loc[shock, shock] ** 0.5 for fit in each]
        if joint := found.metadata.get("joint_covariance"):
            (response,) = joint["by_outcome"].values()
            out["joint"][name] = response[shock]
        stages = found.metadata.get("iv_diagnostics", [])
        if len(stages) == len(each):  # one instrument; the order of several is by chance
            out["first stage t"] = [stage["first_stage_t_statistic"] for stage in stages]
    return out if out["joint"] else {k: v for k, v in out.items() if k != "joint"}


def smooth(macro: pd.DataFrame) -> dict[str, Any]:
    """Splines of degree 1 with a knot a horizon are the path itself; squared differences of it."""
    options = {"degree": 1, "r": 2, "penalty_scale": False}
    out = {}
    for penalty in (1.0, 30.0, 1000.0):
        found = localproj.lp(
            MACRO, macro, shock="rate", horizons=8, sample="common", estimator="smooth",
            smooth={**options, "lambda": penalty},
        )  # fmt: skip
        out[f"{penalty:g}"] = [fit.params["rate"] for fit in found.fits.values()]
    return out


# --- localprojections ---------------------------------------------------------------------


def localprojections_numbers(macro: pd.DataFrame, panel: pd.DataFrame) -> dict[str, Any]:
    """It takes first differences itself: y_{t+h} − y_{t−1} on differences and their lags."""
    table, fast = macro[["output", "infl", "rate"]], macro[["output", "rate", "infl", "fast"]]
    units = panel.set_index(["unit", "year"])
    regimes = localprojections.ThresholdTimeSeriesLPX(
        fast, ["output", "rate"], ["infl"], "fast", ["rate"], 6, 2, newey_lags=4, ci_width=LEVEL
    )
    return {
        "series": paths(localprojections.TimeSeriesLP(
            table, ["output", "infl", "rate"], ["infl"], 8, 3, newey_lags=4, ci_width=LEVEL
        )),
        "on": paths(regimes[0]),
        "off": paths(regimes[1]),
        "panel": {
            name: paths(localprojections.PanelLP(
                units, ["s", "y"], ["y"], 4, 2, varcov=name, ci_width=LEVEL
            ))
            for name in ("kernel", "robust")
        },
    }  # fmt: skip


def paths(table: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """By shock: the estimate, and the standard error behind the band."""
    width = 2 * NormalDist().inv_cdf((1 + LEVEL) / 2)
    return {
        shock: {
            "estimate": one["Mean"].tolist(),
            "error": ((one["UB"] - one["LB"]) / width).tolist(),
        }
        for shock, one in table.groupby("Shock")
    }


# --- parts --------------------------------------------------------------------------------


def as_text(found: Any, depth: int = 0) -> str:
    """JSON with every list of plain values on one line."""
    if not isinstance(found, dict):
        return json.dumps(found, default=float)
    pad, inner = " " * depth, " " * (depth + 1)
    parts = [f"{inner}{json.dumps(k)}: {as_text(v, depth + 1)}" for k, v in found.items()]
    return "{\n" + ",\n".join(parts) + f"\n{pad}}}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the packages
    main()
