"""Learning rates by importance sampling: particles made once, the root found in cached numbers.

Particles are made for a first guess of the rate, the large-sample one. Where the root lies far
from it, or the weights' tail says that the particles do not reach (k-hat, effective size), they
are made anew at the root, and data sets out of the cloud's reach are given their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import chi2

from hakari.inference.gibbs import cloud as clouds
from hakari.inference.gibbs import pareto, rate_equation
from hakari.inference.gibbs.cached_losses import Cache
from hakari.inference.gibbs.cloud import Centres
from hakari.inference.gibbs.particles import Particles, effective, normalised
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.regions import Region, ranks
from hakari.inference.gibbs.sandwich import Sandwich
from hakari.inference.sampling import generator

LEAST = 50  # effective particles of a data set
REACH = 1.5  # factor between the root and the rate that particles were made for
ROUNDS = 4  # of making particles
LOWEST = 2.0**-10  # of a first guess: no rate is looked for below
CONFIDENCE = 0.9  # of the interval of a rate
BEYOND = 0.05  # share of data sets whose particles may fail before `auto` simulates
SPREAD = 1.5  # ratio of directions' rates from which no single one is said to calibrate
WIDE = 1.6  # ratio of the ends of a rate's interval from which it is said to be wide
FAR = 2.0  # standard deviations of the prior between it and an estimate that it may keep away
LOW = 1 / 64  # of the large-sample rate: there a prior that is far away decides


@dataclass(frozen=True)
class Found:
    """A calibrated rate and how well it is known.

    interval: 90 %, from the number of data sets and the Monte Carlo error together.
    monte_carlo: standard deviation of log rate by the particles alone. ranks, k_hat, effective
    (B,): of each data set at the rate; lost (B,): whether they say that its particles do not
    reach. asymptotic: the large-sample rate. solved:
    whether the equation holds there. simulations: how often particles were
    made; evaluations: losses of single rows that were computed.
    """

    region: Region
    rate: float
    interval: tuple[float, float]
    monte_carlo: float
    ranks: Float[ndarray, " B"]
    k_hat: Float[ndarray, " B"]
    effective: Float[ndarray, " B"]
    lost: ndarray
    asymptotic: float
    solved: bool
    simulations: int
    evaluations: int

    def scaled(self, factor: float) -> Found:
        """The same at a rate times a factor, for data of another size."""
        low, high = self.interval
        return replace(self, rate=self.rate * factor, interval=(low * factor, high * factor))

    def without_rate(self) -> Found:
        """The same with NaN for the rate and its interval: the equation does not hold there."""
        return replace(self, rate=float("nan"), interval=(float("nan"), float("nan")))


@dataclass(frozen=True)
class Made:
    """Particles of all data sets for rates near one: groups of data sets (indices, particles)."""

    rate: float
    groups: tuple[tuple[ndarray, Particles], ...]
    evaluations: int

    def ranks(self, region: Region, rate: float) -> Float[ndarray, " B"]:
        """Credibility ranks of all data sets."""
        parts = [(index, ranks(particles, region, rate)) for index, particles in self.groups]
        return _joined(parts)

    def quality(self, rate: float) -> tuple[Float[ndarray, " B"], Float[ndarray, " B"]]:
        """k-hat and effective size of each data set's weights."""
        shapes, sizes = [], []
        for index, particles in self.groups:
            log_weight, k = pareto.smooth(particles.log_weights(rate))
            shapes.append((index, k))
            sizes.append((index, effective(normalised(log_weight))))
        return _joined(shapes), _joined(sizes)

    def batch(self, number: int, of: int) -> Made:
        """As of `Particles`."""
        groups = tuple((index, p.batch(number, of)) for index, p in self.groups)
        return Made(self.rate, groups, 0)


@dataclass(frozen=True)
class Problem:
    """What is calibrated: the posterior, the data sets, how particles are made and of what size.

    placed: to first order; None for losses that jump, which have none. start: the rate at which
    `gpc` and `gpc-wp` begin; None for the large-sample one.
    """

    posterior: GibbsPosterior
    weights: Float[ndarray, "B n"]
    placed: Centres | None
    method: str
    particles: int
    seed: int
    cache: Cache
    start: float | None = None

    @property
    def centres(self) -> Centres:
        """Where the posteriors lie, to first order. Raises ValueError for losses that jump."""
        if self.placed is None:
            raise ValueError("a loss that jumps has no large-sample form")
        return self.placed


def calibrate_regions(
    problem: Problem, regions: Sequence[Region], level: float, tell: Callable[[str], None]
) -> list[Found]:
    """The rate of each region; particles that one region needed serve the others too."""
    made: list[Made] = []
    return [_calibrate(problem, region, level, made, tell) for region in regions]


def default_particles(method: str, d: int) -> int:
    """Particles of the cloud, or of each data set; a power of 2."""
    if method == "cloud":
        return {1: 4096, 2: 4096, 3: 8192}.get(d, 16384)
    return 2048


def asymptotic_rate(problem: Problem, region: Region, level: float) -> float:
    """The rate that calibrates the region in large samples (note, section 1.11)."""
    found, spread = problem.posterior.sandwich, problem.centres.spread
    bread = found.bread / problem.centres.share
    if region.kind in ("ellipse", "hpd"):
        root = np.linalg.cholesky(found.curvature * problem.centres.share)
        spectrum = np.linalg.eigvalsh(root.T @ spread @ root)
        z = generator(0, "asymptotic rate").standard_normal((20_000, len(spectrum)))
        reached = np.quantile((z**2) @ spectrum, level)
        return float(chi2.ppf(level, len(spectrum)) / reached)
    along = np.eye(len(bread))[region.column]
    if region.function is not None:
        along = _gradient(region.function, problem.posterior.minimiser, spread)
    return float(along @ bread @ along / (along @ spread @ along))


def failed(found: Found) -> float:
    """Share of data sets whose particles do not reach."""
    return float(found.lost.mean())


def sound(found: Sequence[Found]) -> bool:
    """Whether every region has a rate and particles that reach nearly all data sets."""
    return all(f.solved and failed(f) <= BEYOND for f in found)


def worst(found: Sequence[Found]) -> str:
    """The region that is least sound, in words."""
    one = max(found, key=lambda f: (not f.solved, failed(f)))
    if not one.solved:
        return f"no rate was found for {one.region.label}"
    return f"{failed(one):.0%} of the data sets for {one.region.label}"


def conflicts(found: Found, posterior: GibbsPosterior, level: float) -> bool:
    """Whether a proper prior keeps the region's sets away from θ̂ down to the lowest rates."""
    low = found.rate < LOW * found.asymptotic and (found.ranks <= level).mean() < level
    return bool(not found.solved and posterior.blocks and low)


def shortfall(found: Found, posterior: GibbsPosterior, level: float) -> str:
    """That no rate was found for a region, and why."""
    share, rate = (found.ranks <= level).mean(), f"{found.rate:.3g}"
    said = f"no rate was found for {found.region.label} at which {level:.0%} sets cover"
    if conflicts(found, posterior, level):
        said += f": even at {rate}, where little but the prior counts, {share:.1%} do"
    else:
        said += f"; {share:.1%} do at the last one tried, {rate}"
    name, away, estimate = _furthest(posterior, found.region)
    if away < FAR:
        return said
    return (
        f"{said}. The prior on {name} is centred {away:.1f} of its standard deviations from the "
        f"estimate {estimate:.3g}: give a wider one, or one that is nearer"
    )


def notes(
    posterior: GibbsPosterior, found: Sequence[Found], bootstrap: str, sandwich: Sandwich | None
) -> Iterator[str]:
    """What to know before trusting the rates that were found."""
    if posterior.clusters is not None and bootstrap != "cluster":
        yield (
            f"the posterior's clusters are ignored: bootstrap={bootstrap!r} takes rows, while "
            "'cluster' draws whole clusters"
        )
    solved = [f for f in found if f.solved]
    for f in solved:
        if failed(f) > 0:
            yield (
                f"the particles of {failed(f):.1%} of the data sets do not reach for "
                f"{f.region.label} (k-hat or effective size); method gpc simulates them instead"
            )
    spectrum = np.empty(0) if sandwich is None else sandwich.spectrum
    if len(spectrum) > 1 and spectrum.max() > SPREAD * spectrum.min():
        marginal = solved[0].region.kind == "marginal"
        own = "the coefficients' intervals have" if marginal else "marginal regions have"
        yield (
            f"no single rate calibrates all directions: in large samples their rates run from "
            f"{1 / spectrum.max():.3g} to {1 / spectrum.min():.3g}; {own} their own, and "
            "sandwich_adjusted, in Python, gives every direction its own"
        )
    width = max(f.interval[1] / max(f.interval[0], 1e-300) for f in solved)
    if width > WIDE:
        yield (
            f"the rate is known within a factor of {width:.2f} (90% interval): give more "
            f"replicates than {len(solved[0].ranks)}"
        )


# --- parts --------------------------------------------------------------------------------


def _furthest(posterior: GibbsPosterior, region: Region) -> tuple[str, float, float]:
    """A coefficient, how many scales of its prior its minimiser is from that, and the minimiser.

    The region's own where its prior is far, else the one that is furthest.
    """
    theta, rows = posterior.minimiser, [(False, 0.0, 0)]
    for block in posterior.blocks:
        scale = np.sqrt((block.factor**2).sum(axis=1))
        away = np.abs(theta[list(block.positions)] - block.mean) / scale
        for k, far in zip(block.positions, away.tolist(), strict=True):
            own = region.kind == "marginal" and k == region.column
            rows.append((own and far >= FAR, far, k))
    _, far, k = max(rows)
    return posterior.parameters[k], far, float(theta[k])


def _calibrate(
    problem: Problem, region: Region, level: float, made: list[Made], tell: Callable[[str], None]
) -> Found:
    start = asymptotic_rate(problem, region, level)
    degrees = region.degrees(len(problem.posterior.parameters))
    aim, near = start, _nearest(made, start)
    for _ in range(ROUNDS):
        if near is None:
            tell(f"particles for {region.label} at rate {aim:.3g}")
            near = _make(problem, aim)
            made.append(near)
        current = near
        root = rate_equation.solve(lambda r: current.ranks(region, r), level, aim, degrees)  # noqa: B023
        aim, near = root.rate, _nearest(made, root.rate)
        hopeless = not root.found and current.rate < start * LOWEST
        if near is current or hopeless:
            break
    k_hat, size = current.quality(root.rate)
    lost = (k_hat > pareto.threshold(problem.particles)) | (size < LEAST)
    return Found(
        region,
        root.rate,
        *_error(current, region, level, root, degrees),
        root.ranks,
        k_hat,
        size,
        lost,
        start,
        root.found and near is current,
        len(made),
        sum(each.evaluations for each in made),
    )


def _nearest(made: Sequence[Made], rate: float) -> Made | None:
    near = [each for each in made if abs(np.log(each.rate / rate)) < np.log(REACH)]
    return min(near, key=lambda each: abs(np.log(each.rate / rate))) if near else None


def _error(
    made: Made, region: Region, level: float, root: rate_equation.Root, degrees: int
) -> tuple[tuple[float, float], float]:
    """Interval of the rate, and the Monte Carlo standard deviation of its logarithm."""

    def solved(part: Made, share: float) -> float:
        found = rate_equation.solve(
            lambda r: part.ranks(region, r), level, root.rate, degrees, share
        )
        return float(np.log(found.rate / root.rate)) if found.found else np.nan

    batches = [solved(made.batch(i, clouds.BATCHES), level) for i in range(clouds.BATCHES)]
    monte_carlo = float(np.std(batches, ddof=1) / np.sqrt(clouds.BATCHES))
    if np.isnan(monte_carlo):  # the equation has no root in a part of the particles
        return (0.0, float("inf")), float("inf")
    few, many = rate_equation.binomial_shares(level, len(root.ranks), CONFIDENCE)
    low = min(np.nan_to_num(solved(made, min(many, 1 - 0.5 / len(root.ranks))), nan=-np.inf), 0)
    high = max(np.nan_to_num(solved(made, few), nan=np.inf), 0)
    extra = 1.645 * monte_carlo
    ends = np.exp([-np.hypot(low, extra), np.hypot(high, extra)])
    return (float(root.rate * ends[0]), float(root.rate * ends[1])), monte_carlo


def _make(problem: Problem, rate: float) -> Made:
    posterior, N, B = problem.posterior, problem.particles, len(problem.weights)
    everyone, n, d = np.arange(B), posterior.risk.n, len(posterior.parameters)
    if problem.method == "shift":
        particles, count = _shifted(problem, everyone, rate, N)
        return Made(rate, ((everyone, particles),), count)
    noise = clouds.uniforms(N, d, problem.seed)
    shared = clouds.cloud(posterior, problem.weights, problem.centres, rate, noise, problem.cache)
    log_weight, k = pareto.smooth(shared.log_weights(rate))
    lost = (k > pareto.threshold(N)) | (effective(normalised(log_weight)) < LEAST)
    if not lost.any():
        return Made(rate, ((everyone, shared),), N * n)
    kept = shared.some(~lost)
    own, count = _shifted(problem, everyone[lost], rate, default_particles("shift", d))
    groups = ((everyone[~lost], kept), (everyone[lost], own))
    return Made(rate, tuple(g for g in groups if len(g[0])), N * n + count)


def _shifted(problem: Problem, chosen: ndarray, rate: float, N: int) -> tuple[Particles, int]:
    """Own particles of some data sets; once more around their weighted means where they fail."""
    posterior, weights = problem.posterior, problem.weights[chosen]
    noise = clouds.uniforms(N, len(posterior.parameters), problem.seed + 1)
    mean, covariance = clouds.posterior_form(
        posterior, rate, problem.centres.share, problem.centres.minimisers[chosen]
    )
    found = clouds.shift(posterior, weights, mean, covariance, noise, problem.cache)
    count = N * len(chosen) * posterior.risk.n
    log_weight, k = pareto.smooth(found.log_weights(rate))
    w = normalised(log_weight).astype(float)
    if (k <= pareto.threshold(N)).all() and (effective(w) >= LEAST).all():
        return found, count
    offsets = found.offsets[0]
    mean = found.centres + w @ offsets
    away = offsets - (w @ offsets)[:, None]
    spread = np.einsum("bn,bnd,bne->de", w, away, away, optimize=True) / len(chosen)
    return clouds.shift(posterior, weights, mean, spread, noise, problem.cache), 2 * count


def _joined(parts: Sequence[tuple[ndarray, ndarray]]) -> ndarray:
    out = np.empty(sum(len(index) for index, _ in parts))
    for index, values in parts:
        out[index] = values
    return out


def _gradient(
    function: Callable[[ndarray], ndarray], theta: ndarray, spread: ndarray
) -> Float[ndarray, " d"]:
    step = np.diag(0.5 * np.sqrt(np.diag(spread)))
    up, down = (np.asarray(function(theta + s * step), dtype=float) for s in (1, -1))
    if up.shape != (len(theta),):
        raise ValueError(
            f"the function of theta gave {up.shape} for theta {step.shape}: it must take (..., d) "
            "and return (...), as theta[..., 0] does"
        )
    gradient: ndarray = (up - down) / (2 * np.diag(step))
    if not gradient.any():
        raise ValueError("the function of theta does not change around the minimiser")
    return gradient
