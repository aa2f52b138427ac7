"""`hakari feedback`: its options. Help imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

MODEL = Group.create_ordered(
    "Model",
    help="For example: hakari feedback --data sales.parquet --y1 price --y2 quantity "
    "--covariates week store income",
)
ASSUMPTIONS = Group.create_ordered(
    "Assumptions", help="For example: --covariance constant --root mirror"
)
ROWS = Group.create_ordered("Rows", help="For example: --one-pass --half-life 1000000")
OUTPUT = Group.create_ordered("Output", help="For example: --out runs/prices --json > answer.json")

Flag = Parameter(negative="")
Method = Literal["moments", "online-qml", "single-equation"]


def feedback(
    *,
    data: Annotated[Path, Parameter(group=MODEL)],
    y1: Annotated[str, Parameter(group=MODEL)],
    y2: Annotated[str, Parameter(group=MODEL)],
    covariates: Annotated[
        tuple[str, ...],
        Parameter(group=MODEL, negative="", consume_multiple=True, show_default=False),
    ] = (),
    regimes: Annotated[str | None, Parameter(group=MODEL)] = None,
    features: Annotated[int, Parameter(group=MODEL)] = 200,
    length_scale: Annotated[str, Parameter(group=MODEL)] = "relevance",
    polynomial: Annotated[int | None, Parameter(group=MODEL)] = None,
    method: Annotated[Method, Parameter(group=MODEL)] = "moments",
    covariance: Annotated[Literal["zero", "constant"], Parameter(group=ASSUMPTIONS)] = "zero",
    restrict: Annotated[Literal["a=0", "b=0"] | None, Parameter(group=ASSUMPTIONS)] = None,
    root: Annotated[Literal["stable", "mirror"], Parameter(group=ASSUMPTIONS)] = "stable",
    missing: Annotated[Literal["raise", "drop"], Parameter(group=ROWS)] = "raise",
    one_pass: Annotated[bool, Flag, Parameter(group=ROWS)] = False,
    half_life: Annotated[float | None, Parameter(group=ROWS)] = None,
    window: Annotated[float | None, Parameter(group=ROWS)] = None,
    resume: Annotated[Path | None, Parameter(group=ROWS)] = None,
    bootstraps: Annotated[int, Parameter(group=OUTPUT)] = 0,
    level: Annotated[float, Parameter(group=OUTPUT)] = 0.95,
    anyway: Annotated[bool, Flag, Parameter(group=OUTPUT)] = False,
    seed: Annotated[int, Parameter(group=OUTPUT)] = 1,
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    json: Annotated[bool, Parameter(name="--json", negative="", group=OUTPUT)] = False,
) -> int:
    """Effects of two outcomes on each other, without instruments, in a report.

    y1 = a y2 + f1(x) + s1(x) e1 and y2 = b y1 + f2(x) + s2(x) e2: both effects follow from how
    the variances of the shocks move apart with the covariates x. Where they do not, the command
    says that the data cannot tell, and which pairs of effects remain. Writes a run folder:
    effects.csv, path.csv (one pass), model.npz. The last line printed is the path of its
    report.html.

    Parameters
    ----------
    data: Path
        CSV (.csv, .csv.gz) or Parquet file, or a folder of them, of any size.
    y1: str
        Column of the outcome that a, the effect of y2, is on.
    y2: str
        Column of the outcome that b, the effect of y1, is on.
    covariates: tuple
        Columns of numbers that means and variances move with: --covariates week store.
    regimes: str
        Column whose values are the regimes of the variances, instead of the covariates.
    features: int
        Random Fourier features of the covariates, an even number.
    length_scale: str
        Over which functions of the covariates bend, in standard deviations: relevance (one a
        covariate, learned), median (the median distance of two rows), or a number.
    polynomial: int
        Degree of a polynomial in the covariates, instead of Fourier features.
    method: str
        moments (closed form), online-qml (the likelihood by steps, slower), or single-equation
        (least squares of each alone, which feedback biases: to compare with).
    covariance: str
        Of the shocks given the covariates: zero, or constant and unknown (a common shock whose
        variance does not move).
    restrict: str
        An effect that is known to be 0.
    root: str
        Two points always fit equally, (a, b) and (1/b, 1/a): stable reports the one at which
        feedback dies out, |ab| < 1, mirror the other.
    missing: str
        Rows in which a used column is missing: raise (an error that counts them) or drop.
    one_pass: bool
        Read rows once, in order, instead of six times: Ctrl-C then keeps the rows so far, and
        changes of the effects are watched for.
    half_life: float
        Rows after which a row counts half; in one pass.
    window: float
        Rows after which a row does not count; in one pass.
    resume: Path
        Folder of an earlier run with the same options: one that Ctrl-C stopped goes on where it
        was, one in one pass goes on after its rows.
    bootstraps: int
        Multiplier bootstraps of the estimates, written to posterior.nc.
    level: float
        Probability of the intervals and of the Anderson-Rubin set.
    anyway: bool
        Show a point estimate even where the data cannot tell.
    seed: int
        Of features and bootstraps, recorded in the run folder; the same seed, the same numbers.
    out: Path
        Run folder to make; an existing one must be empty. Without it, a free name in runs/.
    json: bool
        Print one JSON object and nothing else on stdout (null: not available or unbounded);
        the run folder is written as well.
    """
    from hakari.inference.bidirectional.command import answer
    from hakari.inference.bidirectional.study import Study

    study = Study(
        data,
        y1,
        y2,
        covariates,
        regimes,
        features,
        length_scale,
        polynomial,
        method,
        covariance,
        restrict,
        root,
        one_pass,
        half_life,
        window,
        bootstraps,
        level,
        anyway,
        missing,
        seed,
    )
    return answer(study, out, resume, json)
