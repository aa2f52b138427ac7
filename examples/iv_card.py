"""Returns to schooling (Card, 1995): a quasi-posterior, its checks, and GMM beside it.

python examples/iv_card.py
"""

from __future__ import annotations

from linearmodels.datasets import card

import hakari.inference as hi
from hakari.inference.instruments import weakness

FORMULA = "lwage ~ 1 + exper + expersq + black + south + smsa + [educ ~ nearc4]"
PRIOR = hi.Normal(0.1, 0.1**2, names=["educ"])  # mean and variance


def main() -> None:
    """Estimate and print."""
    data = card.load()
    moments = hi.LinearMoments.from_formula(FORMULA, data)
    result = hi.sample(hi.QuasiPosterior(moments, PRIOR), draws=5000, seed=1)
    print(hi.summary(result)[["mean", "sd", "lower 90%", "upper 90%", "ess_bulk", "r_hat"]])
    print("against the draws:", hi.convergence_notes(result) or "nothing")
    gmm = hi.estimate(moments)
    print(f"GMM: educ {gmm.theta[-1]:.3f}, standard error {gmm.std_error[-1]:.3f}")
    print(weakness(hi.first_stage(FORMULA, data)) or "The instruments are strong.")
    print(hi.anderson_rubin(moments, level=0.9).describe())


if __name__ == "__main__":
    main()
