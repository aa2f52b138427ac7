"""The `hakari` command. A half of the package is imported only when its subcommand runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from hakari import __version__, checkpoint_cli, feedback_cli, gibbs_cli

app = App(
    name="hakari",
    version=__version__,
    help="""Weigh evidence without a likelihood: posteriors from moment conditions.

Start with `hakari demo`, then try `hakari iv --help`, `hakari lp --help`, `hakari gibbs --help` or
`hakari feedback --help` on your own data.""",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
app.command(checkpoint_cli.app)
app.command(gibbs_cli.gibbs)
app.command(feedback_cli.feedback)

MODEL = Group.create_ordered(
    "Model",
    help="For example: hakari iv 'lwage ~ 1 + exper + [educ ~ nearc4]' --data card.csv "
    "--covariance cluster:state",
)
PRIOR = Group.create_ordered(
    "Prior and form of the posterior",
    help="For example: --prior 'educ=normal(0.1, 0.15)' --prior 'exper=student(4, 0, 0.1)'",
)
SAMPLER = Group.create_ordered(
    "Sampler", help="For example: --draws 20000 --chains 8 --seed 7 --method preconditioned"
)
PROJECTION = Group.create_ordered(
    "Projection",
    help="For example: hakari lp --data gk.csv --time year month --response logip ebp --shock gs1 "
    "--instrument ff4_tc --lags 12 --horizons 48",
)
PATHS = Group.create_ordered(
    "Prior and form of the posterior of responses",
    help="For example: --prior 'roughness(order=2, smoothness=gcv)' --prior 'ebp=flat'",
)
OUTPUT = Group.create_ordered(
    "Output", help="For example: --out runs/schooling --json > answer.json"
)
RUN = Group.create_ordered("Run", help="For example: hakari train examples/moe_tiny.toml")

Method = Literal["auto", "mh", "da", "da-exact", "da-approx", "independence", "preconditioned"]
Out = Annotated[Path | None, Parameter(group=OUTPUT)]
Columns = Annotated[
    tuple[str, ...],
    Parameter(group=PROJECTION, negative="", consume_multiple=True, show_default=False),
]
Band = Literal["pointwise", "sup-t", "quantile", "bonferroni", "sidak", "highest-density"]
Json = Annotated[bool, Parameter(name="--json", negative="", group=OUTPUT)]

TRAINING = {"safetensors", "tensorboard", "tokenizers", "torch"}  # modules of that extra alone


@app.command
def iv(
    formula: Annotated[str, Parameter(group=MODEL)],
    /,
    *,
    data: Annotated[Path, Parameter(group=MODEL)],
    covariance: Annotated[str, Parameter(group=MODEL)] = "robust",
    centred: Annotated[bool, Parameter(group=MODEL, negative="")] = False,
    weights: Annotated[str | None, Parameter(group=MODEL)] = None,
    missing: Annotated[Literal["raise", "drop"], Parameter(group=MODEL)] = "raise",
    prior: Annotated[tuple[str, ...], Parameter(group=PRIOR, negative="", show_default=False)] = (),
    weighting: Annotated[Literal["continuous", "two-step"], Parameter(group=PRIOR)] = "continuous",
    determinant: Annotated[bool, Parameter(group=PRIOR)] = True,
    method: Annotated[Method, Parameter(group=SAMPLER)] = "auto",
    draws: Annotated[int, Parameter(group=SAMPLER)] = 2000,
    chains: Annotated[int, Parameter(group=SAMPLER)] = 4,
    seed: Annotated[int, Parameter(group=SAMPLER)] = 1,
    resume: Annotated[Path | None, Parameter(group=SAMPLER)] = None,
    level: Annotated[float, Parameter(group=OUTPUT)] = 0.9,
    out: Out = None,
    json: Json = False,
) -> int:
    """Instrumental variables with a prior: the quasi-posterior beside GMM, in a report.

    Reads a table once, draws from the quasi-posterior of the moments z(y - x'b), compares with
    GMM and continuously updated GMM, checks the instruments and the prior's weight, and writes
    a run folder. The last line printed is the path of its report.html.

    Parameters
    ----------
    formula: str
        As in linearmodels: 'y ~ 1 + x1 + [endogenous ~ instrument1 + instrument2]'.
        Without a bracket it is a regression. Terms may be transformed: 'np.log(wage) ~ ...'.
    data: Path
        CSV (.csv, .csv.gz) or Parquet file, or a folder of them, of any size.
    covariance: str
        Of the moments: iid, robust, cluster:COLUMN, hac:BANDWIDTH or hac:auto.
    centred: bool
        Subtract the moments' mean in their covariance.
    weights: str
        Column of observation weights, at least 0.
    missing: str
        Rows in which a used column is missing: raise (an error that counts them) or drop.
    prior: tuple
        Repeatable. weak (the default: N(0, (2.5 sd(y) / sd(x))^2) on each endogenous
        coefficient, the others flat), flat, normal(MEAN, SD) or student(DF, MEAN, SCALE) on all
        coefficients, or on one: 'educ=normal(0.1, 0.15)'. What is not named stays flat.
        The second number is a standard deviation, not a variance.
    weighting: str
        Weighting matrix: continuous (updated with the coefficients) or two-step (fixed).
    determinant: bool
        Include the determinant of the weighting; without it and with a flat prior, the
        mode is continuously updated GMM.
    method: str
        Kernel; auto runs a pilot, picks one and says why.
    draws: int
        Kept draws of each chain.
    chains: int
        Independent chains.
    seed: int
        Of all randomness, recorded in the run folder; the same seed gives the same numbers.
    resume: Path
        Folder of an earlier run with the same question, whose draws are kept and continued.
    level: float
        Probability of the intervals and of the Anderson-Rubin set.
    out: Path
        Run folder to make; an existing one must be empty. Without it, a free name in runs/.
    json: bool
        Print one JSON object and nothing else on stdout (null: not available or unbounded);
        the run folder is written as well.
    """
    from hakari.inference.iv import Question
    from hakari.inference.iv_command import answer

    question = Question(
        formula,
        data,
        prior,
        covariance,
        centred,
        weights,
        missing,
        weighting,
        determinant,
        method,
        draws,
        chains,
        seed,
        level,
    )
    return answer(question, out, resume, json)


@app.command
def lp(
    *,
    data: Annotated[Path, Parameter(group=PROJECTION)],
    response: Columns,
    shock: Columns,
    instrument: Columns = (),
    control: Columns = (),
    lags: Annotated[int, Parameter(group=PROJECTION)] = 4,
    horizons: Annotated[int, Parameter(group=PROJECTION)] = 20,
    time: Columns = (),
    unit: Annotated[str | None, Parameter(group=PROJECTION)] = None,
    cumulative: Annotated[bool, Parameter(group=PROJECTION, negative="")] = False,
    trend: Annotated[Literal["n", "c", "ct", "ctt"], Parameter(group=PROJECTION)] = "c",
    sample: Annotated[Literal["common", "available"], Parameter(group=PROJECTION)] = "common",
    augment: Annotated[bool, Parameter(group=PROJECTION, negative="")] = False,
    shock_lags: Annotated[int | None, Parameter(group=PROJECTION)] = None,
    state: Annotated[str | None, Parameter(group=PROJECTION)] = None,
    effects: Annotated[Literal["unit", "unit+time", "none"], Parameter(group=PROJECTION)] = "unit",
    prior: Annotated[
        tuple[str, ...],
        Parameter(group=PATHS, negative="", consume_multiple=True, show_default=False),
    ] = (),
    covariance: Annotated[str, Parameter(group=PATHS, show_default=False)] = "",
    weighting: Annotated[Literal["frozen", "continuous"], Parameter(group=PATHS)] = "frozen",
    shrinkage: Annotated[Literal["auto", "none", "ledoit-wolf"], Parameter(group=PATHS)] = "auto",
    controls_prior: Annotated[Literal["none", "horseshoe"], Parameter(group=PATHS)] = "none",
    calibrate: Annotated[bool | None, Parameter(group=PATHS, show_default=False)] = None,
    draws: Annotated[int, Parameter(group=SAMPLER)] = 2000,
    chains: Annotated[int, Parameter(group=SAMPLER)] = 4,
    seed: Annotated[int, Parameter(group=SAMPLER)] = 1,
    level: Annotated[float, Parameter(group=OUTPUT)] = 0.9,
    band: Annotated[Band, Parameter(group=OUTPUT)] = "sup-t",
    scale: Annotated[str, Parameter(group=OUTPUT)] = "1",
    out: Out = None,
    json: Json = False,
) -> int:
    """Impulse responses by local projections, with instruments and priors, in a report.

    Reads a table of time series or a panel, projects every response on the shock at every
    horizon, draws from the joint quasi-posterior of all horizons, and writes a run folder:
    irf.csv, figures, posterior.nc. The last line printed is the path of its report.html.

    Parameters
    ----------
    data: Path
        CSV (.csv, .csv.gz) or Parquet file, rows in order of time.
    response: tuple
        One or several columns: --response logip ebp.
    shock: tuple
        Columns of the shock or policy variable.
    instrument: tuple
        Columns that replace the shock in the moments (LP-IV).
    control: tuple
        Columns whose lags enter, or terms as they enter: 'l(cpi, 0)', 'l(x, 1:4)', 'f(x, 1)'.
        Lags of responses and shocks always enter.
    lags: int
        Of each of those; count one more than the dynamics need, or add --augment.
    horizons: int
        Responses at 0, 1, ..., this many periods.
    time: tuple
        Column of dates, or two: --time year month. Without it, rows are consecutive periods.
    unit: str
        Column of a panel's units.
    cumulative: bool
        Respond by the sum since the shock.
    trend: str
        n (none), c (constant), ct or ctt (with its powers).
    sample: str
        Rows common to all horizons, or those available at each.
    augment: bool
        One lag more, so that scores are uncorrelated over time (lag augmentation).
    shock_lags: int
        Lags of the shock alone; 0 where it is an innovation.
    state: str
        Column of zeros and ones, or 'l(COLUMN, 1)': responses by regime.
    effects: str
        Of a panel: unit, unit+time or none.
    prior: tuple
        Repeatable. roughness (the default: differences of order 2 in log horizons shrunk, their
        scale half-Cauchy), process (Matérn), normal(MEAN, SD), flat; with options as in
        'roughness(order=2, smoothness=gcv, spacing=even)', or on one response: 'ebp=flat'.
        Responses that none names have the default.
    covariance: str
        Over horizons: hc3 (the default for one series), hc0, hc1, hac, hac:BANDWIDTH; in
        panels cluster (the default) or driscoll-kraay.
    weighting: str
        frozen at the estimate, or continuous (updated with the responses).
    shrinkage: str
        ledoit-wolf shrinks the correlation of the estimates towards none; auto does so where a
        prior needs its inverse.
    controls_prior: str
        horseshoe shrinks the controls, of which there may be more than rows.
    calibrate: bool
        Scale the posterior until its joint bands cover in bootstrap samples: the default where
        it applies (one series, no state, leads or shrunk controls, frozen weighting).
    draws: int
        Kept draws of each chain.
    chains: int
        Independent chains.
    seed: int
        Of all randomness, recorded in the run folder; the same seed gives the same numbers.
    level: float
        Probability of the bands and of the Anderson-Rubin sets.
    band: str
        Kind of the joint band.
    scale: str
        Size of the shock: a number in its units, or sd, one standard deviation of what the
        controls do not predict.
    out: Path
        Run folder to make; an existing one must be empty. Without it, a free name in runs/.
    json: bool
        Print one JSON object and nothing else on stdout (null: not available or unbounded);
        the run folder is written as well.
    """
    from hakari.inference.lp_command import answer
    from hakari.inference.lp_study import Study

    study = Study(
        data,
        response,
        shock,
        instrument,
        control,
        lags,
        horizons,
        time,
        unit,
        cumulative,
        trend,
        sample,
        augment,
        shock_lags,
        state,
        effects,
        prior,
        covariance,
        weighting,
        shrinkage,
        controls_prior,
        calibrate,
        level,
        band,
        scale,
        draws,
        chains,
        seed,
    )
    return answer(study, out, json)


@app.command
def train(
    config: Annotated[Path | None, Parameter(group=RUN)] = None,
    /,
    *,
    set_: Annotated[
        tuple[str, ...], Parameter(name="--set", group=RUN, negative="", show_default=False)
    ] = (),
    out: Annotated[Path | None, Parameter(group=RUN)] = None,
    resume: Annotated[Path | None, Parameter(group=RUN)] = None,
    fields: Annotated[bool, Parameter(negative="", group=RUN)] = False,
) -> int:
    """Train a language model, dense or mixture of experts, from one TOML file.

    On several processes or machines: torchrun --nproc-per-node 2 -m hakari.training CONFIG ...
    takes the same arguments. Ctrl-C and SIGTERM finish the step, save a checkpoint and stop.
    The last line printed is the run folder: config.toml, metrics.parquet, loss.png, experts.png,
    tensorboard/, checkpoints/.

    Parameters
    ----------
    config: Path
        TOML file; `hakari train --fields` lists what may stand in it.
    set_: tuple
        Repeatable. Change one field: --set steps=20 --set model.dim=256.
    out: Path
        Run folder to make; an existing one must be empty. Without it, a free name in runs/.
    resume: Path
        Folder of a run to carry on from its newest checkpoint, on any number of processes.
    fields: bool
        List every field with its type, default and meaning, and stop.
    """
    if fields:
        from hakari.training.config import explain

        for name, kind, default, text in explain():
            print(f"{name} = {default}  ({kind})\n    {text}")
        return 0
    from hakari.training.train_command import answer

    return answer(config, set_, out, resume)


@app.command
def generate(
    run: Annotated[Path, Parameter(group=RUN)],
    prompt: Annotated[str, Parameter(group=RUN)] = "",
    /,
    *,
    tokens: Annotated[int, Parameter(group=RUN)] = 200,
    temperature: Annotated[float, Parameter(group=RUN)] = 0.8,
    top_p: Annotated[float, Parameter(group=RUN)] = 0.95,
    seed: Annotated[int, Parameter(group=RUN)] = 1,
) -> int:
    """Write text with a trained model, continuing a prompt.

    Parameters
    ----------
    run: Path
        Run folder that `hakari train` made; its newest checkpoint is used.
    prompt: str
        Text to continue; without it, the model starts a document.
    tokens: int
        Tokens to write at most; it stops earlier where the model ends the document.
    temperature: float
        Below 1: closer to the likeliest text; 0: always the likeliest token.
    top_p: float
        Draw from the likeliest tokens that together have this probability.
    seed: int
        The same seed writes the same text.
    """
    from hakari.training.generate_command import answer

    return answer(run, prompt, tokens, temperature, top_p, seed)


@app.command
def export(
    run: Annotated[Path, Parameter(group=RUN)], folder: Annotated[Path, Parameter(group=RUN)], /
) -> int:
    """Write a trained model as a Hugging Face folder, which transformers opens.

    Dense models become Llama, sparse ones Phi-MoE (GRIN's own form: norm = "layer", every layer
    sparse, two experts a token).

    Parameters
    ----------
    run: Path
        Run folder that `hakari train` made; its newest checkpoint is used.
    folder: Path
        Folder to make; an existing one must be empty.
    """
    from hakari.training.generate_command import open_run
    from hakari.training.hugging_face import save

    writer = open_run(run)
    save(writer.model, folder, writer.tokenizer, length=writer.length)
    print(folder)
    return 0


@app.command
def demo(*, out: Out = None, json: Json = False) -> int:
    """Each system on real data, from data to one report; needs no download.

    Returns to schooling (Card, 1995), with one instrument and with two; what a rise of the
    interest rate does to output, prices and unemployment; food expenditure by income (Engel),
    median and 0.9 quantile; delays of flights and the time made up in the air, which may cause each
    other; training of a small language model.

    Parameters
    ----------
    out: Path
        Run folder to make; an existing one must be empty. Without it, a free name in runs/.
    json: bool
        Print one JSON object and nothing else on stdout; the run folder is written as well.
    """
    from hakari.demo import answer

    return answer(out, json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one line on stderr and exit status 2."""
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        sys.exit(_complain(f"{error} (see hakari --help)"))
    except ModuleNotFoundError as error:
        if (error.name or "hakari").partition(".")[0] == "hakari":
            raise
        sys.exit(_complain(f'{error.name} is not installed: pip install "hakari[{_extra(error)}]"'))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _extra(error: ModuleNotFoundError) -> str:
    """The extra that has a missing module: where both have it, that of the half that asked."""
    asking = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    only = (error.name or "").partition(".")[0] in TRAINING
    return (
        "training" if only or any(n.startswith("hakari.training") for n in asking) else "inference"
    )


def _complain(message: str) -> int:
    print("hakari:", " ".join(message.split()), file=sys.stderr)
    return 2
