"""Generalized posterior calibration by posterior simulation.

`gpc`: stochastic approximation, simulated anew at each rate (Syring and Martin, 2019). `gpc-wp`:
weighted particles in between (arXiv 2405.04845). `gpc-smc`: one climb from the prior upward
(2404.16528). All three stop by the coverage of θ̂ in bootstrap posteriors (gibbs-calibration.md
sections 1.2 to 1.6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import chi2

from hakari.inference.gibbs import pareto, rate_equation
from hakari.inference.gibbs.importance import (
    CONFIDENCE,
    LEAST,
    LOWEST,
    Found,
    Made,
    Problem,
    asymptotic_rate,
)
from hakari.inference.gibbs.particles import effective, normalised
from hakari.inference.gibbs.rate_equation import Root
from hakari.inference.gibbs.regions import Region
from hakari.inference.gibbs.simulation import Simulated, simulate
from hakari.inference.gibbs.tempered_clouds import climb, proper

TOLERANCE = 0.005  # of coverage
ITERATIONS = 100  # of stochastic approximation
RHO = 0.25  # effective over actual size of weights, below which particles are exhausted
MOVED = 0.05  # of log rate: less is not worth a simulation
OUTER = 20  # simulations for a region by `gpc-wp`
FIRST = 16  # of the large-sample rate: one over the rate at which `gpc-smc` starts, flat priors
GROUPS = 8  # of draws, each left out once for the Monte Carlo error
DEEPER = 4  # starts that are tried, each `FIRST` times lower
RUNGS = 60  # after which `gpc-smc` gives up
HIGHEST = 100.0  # of the large-sample rate: the same
Tell = Callable[[str], None]
Solver = Callable[[Problem, Sequence[Region], float, Tell], list[Found]]


@dataclass(frozen=True)
class Kesten:
    """Kesten's (1958) rule: steps become shorter only when they turn.

    rate; last: the step that led there; turns: one more than those so far; unit: of rates, so that
    the scale of the loss does not matter (the paper's is 1).
    """

    unit: float
    rate: float
    last: float = 0.0
    turns: int = 1

    def after(self, excess: float) -> Kesten:
        """The rule after a coverage that is `excess` above the level; rates at most halve."""
        rate = max(self.rate + self.unit * self.turns**-0.51 * excess, self.rate / 2)
        step = rate - self.rate
        return Kesten(self.unit, rate, step, self.turns + (step * self.last < 0))

    def sunk(self, excess: float) -> bool:
        """Whether sets cover too rarely at rates so low that the prior must be the cause."""
        return excess < 0 and self.rate < LOWEST * self.unit


def gpc(problem: Problem, regions: Sequence[Region], level: float, tell: Tell) -> list[Found]:
    """Each region's rate by chains that are simulated anew at each rate."""
    return [_simulating(problem, region, level, tell) for region in regions]


def gpc_wp(problem: Problem, regions: Sequence[Region], level: float, tell: Tell) -> list[Found]:
    """Each region's rate by chains, reweighted until they are exhausted; regions share them."""
    made: list[Simulated] = []
    return [_weighting(problem, region, level, made, tell) for region in regions]


def gpc_smc(problem: Problem, regions: Sequence[Region], level: float, tell: Tell) -> list[Found]:
    """Each region's rate where its coverage falls below the level on the way up from the prior.

    Found in the cloud before, reweighted. A flat prior is replaced by a start low enough that the
    regions cover, whose particles are a Student sample that is divided out.
    """
    starts = [_start(problem, region, level) for region in regions]
    low, high = min(starts) / FIRST, max(starts) * HIGHEST
    for _ in range(DEEPER):
        found = _climbing(problem, regions, level, (low, high), tell)
        if proper(problem) or all(f.solved for f in found):
            break
        low /= FIRST
    return found


SOLVERS: dict[str, Solver] = {"gpc": gpc, "gpc-wp": gpc_wp, "gpc-smc": gpc_smc}


# --- gpc ----------------------------------------------------------------------------------


def _simulating(problem: Problem, region: Region, level: float, tell: Tell) -> Found:
    rule, evaluations = _rule(problem, region, level), 0
    for count in range(1, ITERATIONS + 1):
        tell(f"simulation {count} for {region.label} at rate {rule.rate:.3g}")
        made, rate = simulate(problem, rule.rate, problem.particles), rule.rate
        evaluations += made.evaluations
        excess = _coverage(made, region, level, rate) - level
        if _close(excess, problem) or rule.sunk(excess):
            break
        rule = rule.after(excess)
    root = Root(rate, made.ranks(region, rate), _close(excess, problem), count)
    return _found(problem, region, level, made, root, count, evaluations)


# --- gpc-wp -------------------------------------------------------------------------------


def _weighting(
    problem: Problem, region: Region, level: float, made: list[Simulated], tell: Tell
) -> Found:
    rule, done = _rule(problem, region, level), False
    rate = rule.rate
    near = next((each for each in made if reaches(each, rate)), None)
    for _ in range(OUTER):
        if near is None:
            tell(f"simulation {len(made) + 1} for {region.label} at rate {rate:.3g}")
            near = simulate(problem, rate, problem.particles)
            made.append(near)
        base, near = near, None
        rate, done = _reweighted(problem, base, region, level, Kesten(rule.unit, rate))
        if done or rate < LOWEST * rule.unit:
            break
    root = Root(rate, base.ranks(region, rate), done, len(made))
    return _found(
        problem, region, level, base, root, len(made), sum(each.evaluations for each in made)
    )


def _reweighted(
    problem: Problem, base: Simulated, region: Region, level: float, rule: Kesten
) -> tuple[float, bool]:
    """Where Kesten's rule comes to with the weights of one simulation, and whether it is done.

    Exhausted weights: the rate before, unless that is the simulation's own; then the rule's next.
    """
    for _ in range(ITERATIONS):
        excess = _coverage(base, region, level, rule.rate) - level
        if _close(excess, problem):
            return rule.rate, True
        if rule.sunk(excess):
            return rule.rate, False
        after = rule.after(excess)
        if not reaches(base, after.rate):
            moved = abs(np.log(rule.rate / base.rate)) > MOVED
            return rule.rate if moved else after.rate, False
        rule = after
    return rule.rate, False


def reaches(made: Simulated, rate: float) -> bool:
    """Whether weights at a rate leave enough of each data set's particles, and of their tail."""
    for _, particles in made.groups:
        N = particles.losses.shape[1]
        log_weight = particles.log_weights(rate)
        if effective(normalised(log_weight)).min() < RHO * N:
            return False
    return bool(made.quality(rate)[0].max() <= pareto.threshold(N))


# --- gpc-smc ------------------------------------------------------------------------------


def _climbing(
    problem: Problem,
    regions: Sequence[Region],
    level: float,
    bounds: tuple[float, float],
    tell: Tell,
) -> list[Found]:
    """Climb until the coverage of each region has fallen from above the level to below it."""
    found: dict[int, Found] = {}
    rungs, evaluations, above = 0, 0, [False] * len(regions)
    before: Simulated | None = None
    for made in climb(problem, bounds[0], tell):
        rungs, evaluations = rungs + 1, evaluations + made.evaluations
        covers = [_coverage(made, region, level, made.rate) >= level for region in regions]
        for k, region in enumerate(regions):
            if before is not None and k not in found and above[k] and not covers[k]:
                root = _bisected(problem, before, made.rate, region, level)
                found[k] = _found(problem, region, level, before, root, rungs, evaluations)
        hopeless = rungs == 1 and not proper(problem) and not all(covers)
        hopeless |= rungs == RUNGS or (problem.placed is not None and made.rate > bounds[1])
        if len(found) == len(regions) or hopeless:
            break
        before, above = made, covers
    for k in set(range(len(regions))) - set(found):
        root = Root(made.rate, made.ranks(regions[k], made.rate), False, 0)
        found[k] = _found(problem, regions[k], level, made, root, rungs, evaluations)
    return [found[k] for k in range(len(regions))]


def _bisected(problem: Problem, before: Made, above: float, region: Region, level: float) -> Root:
    """The rate below that of a rung, by the weights of the particles of the rung before it."""
    degrees = region.degrees(len(problem.posterior.parameters))
    return rate_equation.solve(lambda r: before.ranks(region, r), level, above, degrees)


# --- parts --------------------------------------------------------------------------------


def _rule(problem: Problem, region: Region, level: float) -> Kesten:
    """Kesten's, at its start: 0.5 and steps of 1 in the paper, so that the unit is twice that."""
    if problem.start is not None:
        return Kesten(2 * problem.start, problem.start)
    start = _start(problem, region, level)
    return Kesten(start, start)


def _start(problem: Problem, region: Region, level: float) -> float:
    """The large-sample rate; the posterior's own for a loss that jumps, which has none."""
    if problem.placed is None:
        return problem.posterior.learning_rate
    return asymptotic_rate(problem, region, level)


def _coverage(made: Made, region: Region, level: float, rate: float) -> float:
    return float((made.ranks(region, rate) <= level).mean())


def _close(excess: float, problem: Problem) -> bool:
    """Whether coverage is the level, as near as so many data sets can tell."""
    return abs(excess) <= max(TOLERANCE, 0.5 / len(problem.weights)) + 1e-9


def _found(
    problem: Problem,
    region: Region,
    level: float,
    made: Simulated,
    root: Root,
    simulations: int,
    evaluations: int,
) -> Found:
    k_hat, size = made.quality(root.rate)
    start = _start(problem, region, level)
    return Found(
        region,
        root.rate,
        *_error(made, root, region, level, region.degrees(len(problem.posterior.parameters))),
        root.ranks,
        k_hat,
        size,
        (k_hat > pareto.threshold(problem.particles)) | (size < LEAST),
        np.nan if problem.placed is None else start,
        root.found,
        simulations,
        evaluations,
    )


def _error(
    made: Made, root: Root, region: Region, level: float, degrees: int
) -> tuple[tuple[float, float], float]:
    """Interval of the rate, and the Monte Carlo standard deviation of its logarithm.

    The latter from a jackknife over groups of draws, at the rate itself: a few draws, weighted
    for a rate where their own regions cover, would be loosened beyond what they reach.
    """
    wanted = chi2.ppf(level, degrees)

    def step(ranks: Float[ndarray, " B"], share: float) -> float:
        """Of log rate, to where the share covers, as of Gaussian posteriors."""
        at = min(float(np.quantile(ranks, share)), 1 - 1e-9)
        return -float(np.log(max(chi2.ppf(at, degrees), 1e-9) / wanted))

    left = [_without(made, group).ranks(region, root.rate) for group in range(GROUPS)]
    steps = [step(ranks, level) for ranks in left]
    monte_carlo = float(np.std(steps) * np.sqrt(GROUPS - 1))
    ends = []
    for share in rate_equation.binomial_shares(level, len(root.ranks), CONFIDENCE):
        share = min(share, 1 - 0.5 / len(root.ranks))
        end = rate_equation.solve(lambda r: made.ranks(region, r), level, root.rate, degrees, share)
        ends.append(np.log(end.rate / root.rate) if end.found else step(root.ranks, share))
    low, high = min(*ends, 0.0), max(*ends, 0.0)  # the rate itself is inside
    low, high = -np.hypot(low, 1.645 * monte_carlo), np.hypot(high, 1.645 * monte_carlo)
    return (float(root.rate * np.exp(low)), float(root.rate * np.exp(high))), monte_carlo


def _without(made: Made, group: int) -> Made:
    """The same without one of `GROUPS` groups of draws that lie one after the other."""
    groups = []
    for index, particles in made.groups:
        N = particles.losses.shape[1]
        kept = np.arange(N) * GROUPS // N != group
        parts = {
            name: getattr(particles, name)[:, kept]
            for name in ("offsets", "losses", "log_prior", "log_proposal")
        }
        groups.append((index, replace(particles, **parts)))
    return Made(made.rate, tuple(groups), 0)
