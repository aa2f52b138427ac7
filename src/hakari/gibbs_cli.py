"""`hakari gibbs`: its options. Help imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

MODEL = Group.create_ordered(
    "Model",
    help="For example: hakari gibbs 'foodexp ~ 1 + income' --data engel.csv --loss quantile:0.9",
)
CALIBRATION = Group.create_ordered(
    "Calibration", help="For example: --region ellipse --bootstrap bayesian --replicates 1000"
)
SAMPLER = Group.create_ordered("Sampler", help="For example: --draws 20000 --chains 8 --seed 7")
OUTPUT = Group.create_ordered("Output", help="For example: --out runs/engel --json > answer.json")

Several = Parameter(negative="", consume_multiple=True, show_default=False)
Region = Literal["marginal", "ellipse", "hpd"]
Bootstrap = Literal["multinomial", "bayesian", "block", "cluster", "m-out-of-n"]
Method = Literal["auto", "cloud", "shift", "gpc", "gpc-wp", "gpc-smc"]


def gibbs(
    formula: Annotated[str, Parameter(group=MODEL)],
    /,
    *,
    data: Annotated[Path, Parameter(group=MODEL)],
    loss: Annotated[str, Parameter(group=MODEL)],
    prior: Annotated[tuple[str, ...], Several, Parameter(group=MODEL)] = (),
    weights: Annotated[str | None, Parameter(group=MODEL)] = None,
    missing: Annotated[Literal["raise", "drop"], Parameter(group=MODEL)] = "raise",
    region: Annotated[Region, Parameter(group=CALIBRATION)] = "marginal",
    coefficients: Annotated[tuple[str, ...], Several, Parameter(group=CALIBRATION)] = (),
    bootstrap: Annotated[Bootstrap, Parameter(group=CALIBRATION)] = "multinomial",
    clusters: Annotated[str | None, Parameter(group=CALIBRATION)] = None,
    block: Annotated[int | None, Parameter(group=CALIBRATION)] = None,
    m: Annotated[int | None, Parameter(group=CALIBRATION)] = None,
    replicates: Annotated[int, Parameter(group=CALIBRATION)] = 500,
    method: Annotated[Method, Parameter(group=CALIBRATION)] = "auto",
    rate: Annotated[float, Parameter(group=CALIBRATION)] = 1.0,
    cache: Annotated[Path | None, Parameter(group=CALIBRATION)] = None,
    draws: Annotated[int, Parameter(group=SAMPLER)] = 2000,
    chains: Annotated[int, Parameter(group=SAMPLER)] = 4,
    seed: Annotated[int, Parameter(group=SAMPLER)] = 1,
    level: Annotated[float, Parameter(group=OUTPUT)] = 0.95,
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    json: Annotated[bool, Parameter(name="--json", negative="", group=OUTPUT)] = False,
) -> int:
    """Credible intervals that cover, for a loss instead of a likelihood, in a report.

    Reads a table, finds the learning rate at which credible sets of bootstrap data cover the
    full data's estimate as often as they say, draws from the Gibbs posterior at that rate, and
    writes a run folder: summary.csv, posterior.nc, and the evidence of calibration, coverage.csv
    and ranks.csv. The last line printed is the path of its report.html.

    Parameters
    ----------
    formula: str
        'y ~ 1 + x'; no intercept unless written as 1. Terms may be transformed: 'np.log(y) ~ ...'.
    data: Path
        CSV (.csv, .csv.gz) or Parquet file, or a folder of them.
    loss: str
        squared, quantile:TAU, expectile:TAU, huber:DELTA, logistic, poisson or hinge.
    prior: tuple
        Repeatable. flat (the default), normal(MEAN, SD) or student(DF, MEAN, SCALE) on all
        coefficients, or on one: 'income=normal(0.5, 0.2)'. What is not named stays flat.
        The second number is a standard deviation, not a variance.
    weights: str
        Column of observation weights, at least 0.
    missing: str
        Rows in which a used column is missing: raise (an error that counts them) or drop.
    region: str
        What is to cover: each coefficient's equal-tailed interval (marginal), all coefficients
        at once in the posterior's metric (ellipse), or by highest density (hpd).
    coefficients: tuple
        Those that marginal intervals are of; all without it.
    bootstrap: str
        Rows with replacement (multinomial), exponential weights (bayesian), blocks of rows in
        order of time (block), whole clusters (cluster), or fewer rows (m-out-of-n).
    clusters: str
        Column of cluster labels, with --bootstrap cluster.
    block: int
        Mean number of rows in a block; the cube root of their number without it.
    m: int
        Rows of an m-out-of-n data set; their number to the power 2/3 without it.
    replicates: int
        Bootstrap data sets; the rate's standard error is about 8.5% with 500.
    method: str
        How the posteriors of those data sets are known; auto picks one and says why.
    rate: float
        Learning rate of the posterior that the calibrated one is compared with.
    cache: Path
        Folder, made if there is none, in which losses are kept: an interrupted call, typed again,
        goes on from there.
    draws: int
        Kept draws of each chain.
    chains: int
        Independent chains.
    seed: int
        Of all randomness, recorded in the run folder; the same seed gives the same numbers.
    level: float
        Probability with which regions are to cover.
    out: Path
        Run folder to make; an existing one must be empty. Without it, a free name in runs/.
    json: bool
        Print one JSON object and nothing else on stdout (null: not available); the run folder
        is written as well.
    """
    from hakari.inference.gibbs.command import answer
    from hakari.inference.gibbs.study import Study

    study = Study(
        formula,
        data,
        loss,
        prior,
        rate,
        weights,
        missing,
        region,
        coefficients,
        bootstrap,
        clusters,
        block,
        m,
        replicates,
        method,
        draws,
        chains,
        seed,
        level,
        cache=None if cache is None else str(cache),
    )
    return answer(study, out, json)
