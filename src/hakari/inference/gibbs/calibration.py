"""`calibrate`: the learning rate at which credible sets cover as often as they say.

Syring and Martin (2019) ask that sets of bootstrap posteriors cover the full data's θ̂ at their
nominal level. The methods differ in how they know those posteriors: by simulating them again at
each rate (`gpc`), by reweighting particles (`gpc-wp`, arXiv 2405.04845), by tempering them
(`gpc-smc`, 2404.16528), or by importance sampling (`cloud`, `shift`; design note
gibbs-calibration, section 1.10).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import binom

from hakari.inference.diagnostics import draws_of
from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs.bootstrap import Scheme, check_scheme, default_m, draw_weights
from hakari.inference.gibbs.cached_losses import cache_for
from hakari.inference.gibbs.importance import (
    Found,
    Problem,
    calibrate_regions,
    conflicts,
    default_particles,
    notes,
    shortfall,
    sound,
    worst,
)
from hakari.inference.gibbs.losses import Loss
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.propriety import refuse_bounded, refuse_without_growth
from hakari.inference.gibbs.regions import Region, check_functions, regions_of
from hakari.inference.gibbs.risk import LinearRisk
from hakari.inference.gibbs.rival_intervals import sandwich_under
from hakari.inference.gibbs.sandwich import CubeRootError, Sandwich
from hakari.inference.gibbs.target import free_positions, target_of
from hakari.inference.sampling import generator, sample

Method = Literal["auto", "cloud", "shift", "gpc", "gpc-wp", "gpc-smc"]
METHODS = ("auto", "cloud", "shift", "gpc", "gpc-wp", "gpc-smc")
CLOUD_UP_TO = 5  # coefficients
POWERS_OF_2 = ("auto", "cloud", "shift")  # methods whose particles are points of Sobol
Solver = Callable[[Problem, Sequence[Region], float, Callable[[str], None]], list[Found]]


class NoRateError(ValueError):
    """No learning rate calibrates any region. found: what was tried, one a region."""

    def __init__(self, message: str, found: tuple[Found, ...]) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class Calibration:
    """A calibrated learning rate, and what speaks for and against it.

    posterior: the Gibbs posterior at `learning_rate`, the smallest of the regions' rates, so that
    every region that has one covers at least at the level. found: one a region, each at its own
    rate, NaN where none was found.
    why: of the method. notes: what to know before trusting it. sandwich: J, and K as the bootstrap
    has it; None for losses that jump.
    """

    posterior: GibbsPosterior
    level: float
    bootstrap: str
    method: str
    why: str
    found: tuple[Found, ...]
    seconds: float
    notes: tuple[str, ...] = field(default=())
    sandwich: Sandwich | None = None

    @property
    def learning_rate(self) -> float:
        """The rate of `posterior`."""
        return self.posterior.learning_rate

    @property
    def interval(self) -> tuple[float, float]:
        """90 % interval of the learning rate: bootstrap and Monte Carlo error together."""
        return min((f for f in self.found if f.solved), key=lambda each: each.rate).interval

    @property
    def spectrum(self) -> Float[ndarray, " d"]:
        """Eigenvalues of J^(−1/2) K J^(−1/2), one over the large-sample rate of each direction.

        Empty for losses that jump.
        """
        return np.empty(0) if self.sandwich is None else self.sandwich.spectrum

    @property
    def rates(self) -> pd.DataFrame:
        """A row a region: rate, its interval, the large-sample rate, particles' quality."""
        rows = {
            f.region.label: {
                "rate": f.rate,
                "lower 90%": f.interval[0],
                "upper 90%": f.interval[1],
                "monte carlo": f.monte_carlo,
                "asymptotic": f.asymptotic,
                "worst k-hat": float(f.k_hat.max()),
                "fewest effective": float(f.effective.min()),
            }
            for f in self.found
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    @property
    def coverage_curve(self) -> pd.DataFrame:
        """Share of data sets whose region covers θ̂, at every level, each region at its own rate.

        Regions without a rate are left out. `lower`, `upper`: where 95 % of such shares fall if
        the levels are right.
        """
        levels = np.linspace(0.01, 0.99, 99)
        frame = pd.DataFrame({"level": levels})
        for f in (f for f in self.found if f.solved):
            frame[f.region.label] = [(f.ranks <= c).mean() for c in levels]
        B = len(self.found[0].ranks)
        frame["lower"], frame["upper"] = (binom.ppf(q, B, levels) / B for q in (0.025, 0.975))
        return frame

    @cached_property
    def rival_rates(self) -> dict[str, float]:
        """Rates by rules that do not aim at coverage; NaN where one does not apply."""
        from hakari.inference.gibbs.rival_rates import rival_rates

        return rival_rates(self.posterior)

    def intervals(self, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
        """A row a region: estimate, rate, and the equal-tailed interval at that rate and `level`.

        Sampled as by `hi.sample(cal.posterior.at_rate(rate))`. draws: of each of 4 chains.
        Raises ValueError for `ellipse` and `hpd`: sets of all coefficients, not intervals.
        """
        rows = {}
        for f in self.found:
            if f.region.kind in ("ellipse", "hpd"):
                raise ValueError(f"region {f.region.kind!r} is no interval: use region='marginal'")
            ends = np.full(2, np.nan)
            if f.solved:
                result = sample(self.posterior.at_rate(f.rate), draws=draws, seed=seed)
                tails = [(1 - self.level) / 2, (1 + self.level) / 2]
                ends = np.quantile(f.region.values(draws_of(result)), tails)
            estimate = float(f.region.values(self.posterior.minimiser))
            rows[f.region.label] = (estimate, f.rate, *ends)
        columns = ["estimate", "rate", "lower", "upper"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns)

    def plot(self) -> Any:
        """A matplotlib `Figure`: the coverage curve, and the credibility ranks."""
        from hakari.inference.gibbs.plots import coverage

        return coverage(self)

    def __str__(self) -> str:
        B, loss = len(self.found[0].ranks), self.posterior.risk.loss.name
        columns = ["rate", "lower 90%", "upper 90%", "asymptotic"]
        lines = [
            f"{loss}: {self.level:.0%} regions cover in {B} {self.bootstrap} data sets at",
            self.rates[columns].to_string(float_format="{:.3g}".format),
            f"method {self.method}: {self.why}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def calibrate(
    posterior: GibbsPosterior,
    level: float = 0.95,
    region: str | Callable[[ndarray], ndarray] = "marginal",
    bootstrap: Scheme = "multinomial",
    replicates: int = 500,
    method: Method = "auto",
    seed: int = 0,
    *,
    coefficients: Sequence[str] | None = None,
    particles: int | None = None,
    start: float | None = None,
    block: int | None = None,
    m: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Calibration:
    """Find the learning rate at which credible sets of `level` cover that often.

    Data sets are drawn by a bootstrap; in each, the posterior's region is asked whether it covers
    the minimiser θ̂ of the full data. The rate is where the share that does is the level.

    region: `marginal`, an equal-tailed interval of each of `coefficients` (default all), each with
    its own rate; `ellipse`, all coefficients at once in the posterior's metric; `hpd`, highest
    posterior density; or a function of theta (..., d) that returns (...).
    bootstrap, block, m: as of `draw_weights`; `cluster` needs a posterior with clusters.
    replicates: data sets; the rate's standard error is about 8.5 % with 500 (note, section 1.7).
    method: `cloud` and `shift` (importance sampling: one set of particles, or one a data set),
    `gpc`, `gpc-wp`, `gpc-smc` (posterior simulation), or `auto`, which says why in `why`.
    particles: of the cloud, or of each data set; a power of 2 for `auto`, `cloud` and `shift`.
    start: the rate at which `gpc` and `gpc-wp` begin (0.5 in the papers, whose steps are twice as
    long); the large-sample rate unless given.
    cache: folder in which losses are kept, so that an interrupted call goes on from there.
    seed: the same result for the same seed, whatever the workers. progress: a line on stderr.

    Raises ValueError for settings that do not fit and losses without a posterior, NoRateError
    where no rate calibrates any region, as under a prior far from θ̂, and CubeRootError for a loss
    that jumps unless bootstrap is 'm-out-of-n' (then the rate is scaled to n rows by (m/n)^(1/3)).

    >>> import hakari.inference as hi
    >>> y = np.random.default_rng(1).standard_normal(100) * 2
    >>> gibbs = hi.GibbsPosterior(hi.losses.squared(), (y, np.ones(100)))
    >>> round(hi.calibrate(gibbs, seed=1).learning_rate, 1)
    0.3
    """
    began = time.perf_counter()
    regions = regions_of(region, posterior.parameters, coefficients)
    clusters = posterior.clusters if bootstrap == "cluster" else None
    n, d = posterior.risk.n, len(posterior.parameters)
    _check(level, replicates, method, particles, seed)
    _check_start(start, method)
    check_scheme(bootstrap, n, clusters, block, m)
    refuse_bounded(posterior)
    check_functions(regions, posterior.minimiser)
    jumps = _jumps(posterior, bootstrap)
    chosen, why = _chosen(method, d, jumps)
    chance = generator(seed, "bootstrap")
    settings: dict[str, Any] = {"clusters": clusters, "block": block, "m": m}
    weights = draw_weights(bootstrap, n, replicates, chance, **settings)
    problem = Problem(
        posterior,
        weights,
        None if jumps else clouds.first_order(posterior, weights),
        chosen,
        particles or default_particles(chosen, d),
        seed,
        cache_for(cache, posterior, weights),
        start,
    )
    with told(progress) as tell:
        found = tuple(_solver(chosen)(problem, regions, level, tell))
        open_ones = [f for f in found if not conflicts(f, posterior, level)]
        if method == "auto" and not sound(open_ones):
            why = f"{chosen} does not reach these posteriors ({worst(open_ones)})"
            chosen = "gpc-wp"
            problem = replace(problem, method=chosen, particles=default_particles(chosen, d))
            again = _solver(chosen)(problem, [f.region for f in open_ones], level, tell)
            found = tuple({f.region: f for f in (*found, *again)}.values())
    lacking = tuple(shortfall(f, posterior, level) for f in found if not f.solved)
    if len(lacking) == len(found):
        raise NoRateError("; ".join(lacking), found)
    found = tuple(f if f.solved else f.without_rate() for f in found)
    if jumps:
        size = (m or default_m(n)) / n
        found = tuple(f.scaled(size ** (1 / 3)) for f in found)
    sandwich = None if jumps else sandwich_under(posterior, bootstrap, block)
    return Calibration(
        posterior.at_rate(min(f.rate for f in found if f.solved)),
        level,
        bootstrap,
        chosen,
        why,
        found,
        time.perf_counter() - began,
        (*lacking, *notes(posterior, found, bootstrap, sandwich)),
        sandwich,
    )


# --- parts --------------------------------------------------------------------------------


def _check(level: float, replicates: int, method: str, particles: int | None, seed: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level!r}: a probability between 0 and 1 is needed")
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    needed = max(50, int(np.ceil(10 / min(level, 1 - level) - 1e-9)))
    if not isinstance(replicates, int | np.integer):
        raise ValueError(f"replicates {replicates!r}: a whole number is needed")
    if replicates < needed:
        raise ValueError(
            f"replicates {replicates!r}: at least {needed} data sets are needed for level {level:g}"
        )
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed {seed!r}: a whole number of at least 0 is needed")
    if particles is None:
        return
    power = method in POWERS_OF_2
    whole = isinstance(particles, int | np.integer) and particles >= 256
    if not whole or (power and particles & (particles - 1)):
        kind = f"a power of 2 of at least 256 is needed by {method}" if power else "at least 256"
        raise ValueError(f"particles {particles!r}: {kind}")


def _check_start(start: float | None, method: str) -> None:
    if start is None:
        return
    if method not in ("gpc", "gpc-wp"):
        raise ValueError(f"start {start!r} with method {method!r}: only gpc and gpc-wp begin there")
    if not 0 < start < float("inf"):
        raise ValueError(f"start {start!r}: a learning rate above 0 is needed")


def _jumps(posterior: GibbsPosterior, bootstrap: str) -> bool:
    """Whether the loss jumps. Raises CubeRootError where the bootstrap does not allow for it."""
    if isinstance(posterior.risk.loss, Loss) and posterior.risk.loss.jumps:
        if bootstrap == "m-out-of-n":
            _refuse_flat(posterior)
            return True
        raise CubeRootError(
            f"loss {posterior.risk.loss.name!r} jumps, so that its minimiser converges at the rate "
            f"n^(-1/3) and bootstrap={bootstrap!r} does not mimic it: use bootstrap='m-out-of-n', "
            "or smooth the loss"
        )
    _ = posterior.sandwich
    if not isinstance(posterior.risk, LinearRisk) and free_positions(posterior):
        refuse_without_growth(target_of(posterior))
    return False


def _refuse_flat(posterior: GibbsPosterior) -> None:
    """Losses that jump are bounded: a flat prior would leave no posterior to calibrate."""
    free = [posterior.parameters[k] for k in free_positions(posterior)]
    if free:
        raise ValueError(
            f"loss {posterior.risk.loss.name!r} jumps and is bounded: under a flat prior on "
            f"{', '.join(free)} it has no posterior; give a Normal or StudentT prior"
        )


def _chosen(method: str, d: int, jumps: bool) -> tuple[str, str]:
    if jumps:
        if method in ("cloud", "shift"):
            raise ValueError(f"method {method!r} is not for losses that jump: use 'gpc-wp'")
        return (
            "gpc-wp" if method == "auto" else method
        ), "the loss jumps: posteriors are simulated"
    if method != "auto":
        return method, "as asked"
    if d <= CLOUD_UP_TO:
        return (
            "cloud",
            f"one set of particles reaches all data sets with {d} coefficient{'s' * (d > 1)}",
        )
    return "shift", f"with {d} coefficients each data set needs particles of its own"


def _solver(method: str) -> Solver:
    if method in ("cloud", "shift"):
        return calibrate_regions
    from hakari.inference.gibbs import gpc

    solver: Solver = gpc.SOLVERS[method]
    return solver


@contextmanager
def told(progress: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done."""
    if not progress:
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("calibrating") as status:
        yield lambda text: status.update(f"calibrating: {text}")
