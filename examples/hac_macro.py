"""A forward-looking interest-rate rule by instrumental variables, with a HAC covariance.

    rate(t) = c + ρ rate(t−1) + a inflation(t+1 .. t+4) + b unemployment(t) + error

Clarida, Galí and Gertler's (2000) regression, on statsmodels' quarterly macrodata, 1960 to 2007:
future inflation and current unemployment are instrumented by what was known before. Errors
overlap by four quarters, so they are serially correlated by construction. Read it with care:
one rule for fifty years, revised data, a Treasury bill for the policy rate.

    python examples/hac_macro.py
"""

from __future__ import annotations

import pandas as pd
import statsmodels.api as sm

import hakari.inference as hi
from hakari.inference.instruments import weakness

FORMULA = "rate ~ 1 + rate1 + [ahead + unemp ~ infl1 + infl2 + unemp1 + unemp2 + rate2]"
PRIOR = [  # persistence well inside the unit circle, responses of a point or so a quarter
    hi.Normal(0.8, 0.2**2, names=["rate1"]),
    hi.Normal(0.0, 0.5**2, names=["ahead", "unemp"]),
]


def quarters() -> pd.DataFrame:
    """The sample, with lags, and inflation as the mean over four quarters (per cent a year)."""
    raw = sm.datasets.macrodata.load_pandas().data
    table = pd.DataFrame(
        {"rate": raw["tbilrate"], "infl": raw["infl"].rolling(4).mean(), "unemp": raw["unemp"]}
    )
    for lag in (1, 2):
        for name in ("rate", "infl", "unemp"):
            table[f"{name}{lag}"] = table[name].shift(lag)
    table["ahead"] = table["infl"].shift(-4)
    return table[raw["year"].between(1960, 2007)].dropna()


def main() -> None:
    """Estimate with the covariance centred, as short series want it, and without."""
    data = quarters()
    for centred in (True, False):
        moments = hi.LinearMoments.from_formula(
            FORMULA, data, covariance="hac:auto", centred=centred
        )
        result = hi.sample(hi.QuasiPosterior(moments, PRIOR), draws=5000, seed=1)
        print(f"\n{moments.n} quarters, covariance {moments.covariance}")
        columns = ["median", "lower 90%", "upper 90%", "ess_bulk", "r_hat"]
        print(hi.summary(result)[columns].round(3).to_string())
        print("against the draws:", hi.convergence_notes(result) or "nothing")
        gmm = hi.estimate(moments)
        shown = (f"{name} {value:.3f} ({error:.3f})" for name, value, error in _rows(gmm))
        print("GMM:", ", ".join(shown), f"| J {gmm.J.value:.2f}, p {gmm.J.p_value:.2f}")
    print()
    print(weakness(hi.first_stage(FORMULA, data, "hac:auto")) or "The instruments are strong.")


def _rows(gmm: object) -> zip:
    return zip(gmm.names, gmm.theta, gmm.std_error, strict=True)


if __name__ == "__main__":
    main()
