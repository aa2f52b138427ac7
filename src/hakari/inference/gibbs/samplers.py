"""Samplers of Gibbs posteriors: which there are, which fits, and how their chains run.

`mh`: adaptive random-walk Metropolis, compiled for losses of a linear predictor, in lock-step over
chains for functions. `smc`: tempering in the learning rate. `pcn`: preconditioned Crank-Nicolson.
`mala`: Langevin moves. `nuts`: the No-U-Turn sampler, of losses in JAX. Arrays of chance come from
the streams that sampling.py makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import joblib
import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from hakari.inference.gibbs import compiled_walk, lockstep, smc
from hakari.inference.gibbs.crank_nicolson import crank_nicolson, refuse_other_priors
from hakari.inference.gibbs.langevin import has_slope, langevin, refuse_without_slope
from hakari.inference.gibbs.lockstep import Tuning
from hakari.inference.gibbs.losses import Loss
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.propriety import refuse_bounded, refuse_without_growth
from hakari.inference.gibbs.risk import LinearRisk
from hakari.inference.gibbs.target import Target, free_positions, prior_target, target_of
from hakari.inference.workers import workers

METHODS = ("auto", "mh", "smc", "pcn", "mala", "nuts")
KERNELS = {kernel.name: kernel for kernel in (lockstep.walk, crank_nicolson, langevin)}
SLOPES_FROM = 10  # coefficients from which slopes beat the compiled walk
BLOCK = 1000  # draws of compiled chains at a time
BLOCK_LOCKSTEP = 50
NUMBERS = 2**22  # of noise that are held at once: 32 MB
Streams = list[dict[str, Generator]]


@dataclass(frozen=True)
class Plan:
    """The method that runs, why, and the posterior in its coordinates."""

    method: str
    why: str
    target: Target

    @property
    def moves(self) -> int:
        """Moves a draw, more in more dimensions, so that draws are worth as much there."""
        d = self.target.d
        return {"mh": d, "mala": int(np.ceil(d ** (1 / 3)))}.get(self.method, 1)

    @property
    def compiled(self) -> LinearRisk | None:
        """The risk, where the walk is compiled."""
        risk = self.target.posterior.risk
        return risk if self.method == "mh" and isinstance(risk, LinearRisk) else None


@dataclass(frozen=True)
class Chains:
    """Where C chains stand, with their steps and streams. smc: streams alone.

    done, warmup: moves made, and those that the steps are learned in.
    """

    u: Float[ndarray, "C d"]
    tuning: Tuning
    streams: Streams
    done: int
    warmup: int


@dataclass(frozen=True)
class Draws:
    """u (C, N, d), log density and acceptance (C, N); runs: of smc, one a chain.

    stats: (C, N) of nuts, as ArviZ names them: `diverging`, and leapfrog steps `n_steps`.
    """

    u: Float[ndarray, "C N d"]
    log_density: Float[ndarray, "C N"]
    accepted: ndarray
    runs: tuple[smc.Run, ...] = field(default=())
    stats: dict[str, ndarray] = field(default_factory=dict)

    def followed_by(self, later: Draws) -> Draws:
        """These draws and then those."""
        return Draws(
            np.concatenate([self.u, later.u], axis=1),
            np.concatenate([self.log_density, later.log_density], axis=1),
            np.concatenate([self.accepted, later.accepted], axis=1),
            stats={k: np.concatenate([v, later.stats[k]], axis=1) for k, v in self.stats.items()},
        )


def plan(posterior: GibbsPosterior, method: str) -> Plan:
    """What to run. Raises ValueError for methods that do not fit, and improper posteriors."""
    if method not in METHODS:
        raise ValueError(
            f"method {method!r} is unknown: Gibbs posteriors have {', '.join(METHODS)}"
        )
    if method == "pcn":
        refuse_other_priors(posterior)
    if method == "mala":
        refuse_without_slope(posterior)
    if method == "nuts":
        _refuse_without_jax(posterior)
    refuse_bounded(posterior)
    target = target_of(posterior)
    refuse_without_growth(target)
    if method == "pcn" and not target.curved:
        target = prior_target(posterior)
    if method != "auto":
        return Plan(method, "as asked", target)
    return Plan(*_chosen(target), target)


def begin(plan: Plan, streams: Streams, warmup: int | None) -> Chains:
    """Chains at overdispersed points, after a warm-up that tunes their steps."""
    d, count = plan.target.d, len(streams)
    if plan.method == "smc":
        empty = np.empty((count, 0))
        return Chains(empty, Tuning(empty, empty, empty, empty), streams, 0, 0)
    start = np.stack([_start_point(plan.target, s["start"]) for s in streams])
    length = plan.moves * (max(1000, 40 * d) if warmup is None else warmup)
    if plan.method == "nuts":
        from hakari.inference.gibbs import jax_loss

        keys = np.concatenate([_keys(s["start"], 1) for s in streams])
        u, tuning = jax_loss.warm_up(plan.target, start, keys, length)
        return Chains(u, tuning, streams, length, length)
    chains = Chains(start, lockstep.begin(KERNELS[plan.method], count, d), streams, 0, length)
    block = max(1, NUMBERS // start.size)
    while chains.done < length:
        chains, _ = _advance(plan, chains, min(block, length - chains.done))
    return chains


def draw(
    plan: Plan, chains: Chains, draws: int, tick: Callable[[float], Any]
) -> tuple[Draws, bool]:
    """All draws, in rounds of blocks; Ctrl-C drops the round (of smc: the run) it falls into."""
    if plan.method == "smc":
        return _tempered(plan, chains, draws, tick)
    kept: Draws | None = None
    block = BLOCK_LOCKSTEP if plan.compiled is None else BLOCK
    block = max(1, min(block, NUMBERS // (plan.moves * chains.u.size)))
    try:
        for done in range(0, draws, block):
            size = min(block, draws - done)
            chains, new = advance(plan, chains, size)
            kept = new if kept is None else kept.followed_by(new)
            tick(size)
    except KeyboardInterrupt:
        if kept is None:
            raise
        return kept, True
    assert kept is not None
    return kept, False


def advance(plan: Plan, chains: Chains, size: int) -> tuple[Chains, Draws]:
    """`size` more draws of each chain, and where they then stand."""
    if plan.method == "nuts":
        return _trajectories(plan, chains, size)
    chains, (u, density, accepted) = _advance(plan, chains, size * plan.moves)
    kept = slice(plan.moves - 1, None, plan.moves)
    return chains, Draws(u[:, kept], density[:, kept], accepted[:, kept])


# --- parts --------------------------------------------------------------------------------


def _chosen(target: Target) -> tuple[str, str]:
    """The method that `auto` takes, and why."""
    risk, d = target.posterior.risk, target.d
    name = risk.loss.name
    if isinstance(risk, LinearRisk):
        if d >= SLOPES_FROM and target.curved and has_slope(risk):
            return "mala", f"the {name} loss has slopes, which pay with {d} coefficients"
        return "mh", f"the {name} loss is compiled, so that many short steps cost little"
    if risk.loss.jumps and not free_positions(target.posterior):
        return "smc", f"the loss {name!r} jumps and may have several modes; the prior is proper"
    if has_slope(risk) and target.curved:
        return "mala", f"the loss {name!r} comes with its gradient"
    return "mh", f"the loss {name!r} comes without a gradient"


def _start_point(target: Target, generator: Generator) -> Float[ndarray, " d"]:
    """A point with positive density, spread wider than the Gaussian form."""
    for _ in range(200):
        noise = generator.standard_normal(target.d)
        u: ndarray = noise * np.sqrt(5 / generator.chisquare(5))
        if np.isfinite(target.log_density(u[None])[0]):
            return u
    raise ValueError(
        f"the {target.posterior.risk.loss.name} loss has no finite value around its minimum"
    )


def _advance(plan: Plan, chains: Chains, moves: int) -> tuple[Chains, tuple[ndarray, ...]]:
    """(points (C, moves, d), log densities, acceptances) of moves, and the chains after them."""
    streams, d = chains.streams, plan.target.d
    noise = np.stack([s["noise"].standard_normal((moves, d)) for s in streams])
    coins = np.stack([s["coins"].random(moves) for s in streams])
    run = _lockstep if plan.compiled is None else _compiled
    found, tuning = run(plan, chains, noise, coins)
    done = chains.done + moves
    return replace(chains, u=found[0][:, -1].copy(), tuning=tuning, done=done), found


def _compiled(
    plan: Plan, chains: Chains, noise: ndarray, coins: ndarray
) -> tuple[tuple[ndarray, ...], Tuning]:
    assert plan.compiled is not None
    rows = compiled_walk.rows_of(plan.target, plan.compiled)
    schedule = (chains.done, chains.warmup, float(lockstep.walk.goal(plan.target.d)))
    work = joblib.delayed(compiled_walk.walk)
    jobs = [
        work(rows, chains.u[c], tuple(part[c] for part in chains.tuning), schedule, *chance)
        for c, chance in enumerate(zip(noise, coins, strict=True))
    ]
    count = workers(len(jobs))
    found = list(joblib.Parallel(count, prefer="threads")(jobs))
    *draws, tunings = zip(*found, strict=True)
    tuning = Tuning(*(np.stack(part) for part in zip(*tunings, strict=True)))
    return tuple(np.stack(part) for part in draws), tuning


def _lockstep(
    plan: Plan, chains: Chains, noise: ndarray, coins: ndarray
) -> tuple[tuple[ndarray, ...], Tuning]:
    target, kernel, tuning = plan.target, KERNELS[plan.method], chains.tuning
    state, parts = lockstep.evaluate(target, kernel, chains.u), []
    for i in range(coins.shape[1]):
        move = lockstep.step(target, kernel, state, tuning, noise[:, i], coins[:, i])
        state = move.state
        if chains.done + i < chains.warmup:
            tuning = lockstep.learned(kernel, tuning, move, chains.done + i, chains.warmup)
        parts.append((state.u, state.log_density, move.accepted))
    return tuple(np.stack(part, axis=1) for part in zip(*parts, strict=True)), tuning


def _trajectories(plan: Plan, chains: Chains, size: int) -> tuple[Chains, Draws]:
    """As `advance`, of `nuts`."""
    from hakari.inference.gibbs import jax_loss

    keys = np.stack([_keys(s["noise"], size) for s in chains.streams])
    found = jax_loss.moves(plan.target, chains.u, chains.tuning, keys)
    u, density, accepted, diverging, steps = found
    stats = {"diverging": diverging, "n_steps": steps}
    chains = replace(chains, u=u[:, -1].copy(), done=chains.done + size)
    return chains, Draws(u, density, accepted, stats=stats)


def _keys(generator: Generator, count: int) -> ndarray:
    """Keys (count, 2) of JAX's streams."""
    return generator.integers(2**32, size=(count, 2), dtype=np.uint32)


def _refuse_without_jax(posterior: GibbsPosterior) -> None:
    loss = posterior.risk.loss
    if not isinstance(loss, Loss) or loss.jax is None:
        raise ValueError(
            f"method 'nuts' needs a loss written in jax.numpy and {loss.name!r} is not: give "
            "losses.from_jax(function), or use method='mala' or 'mh'"
        )


def _tempered(
    plan: Plan, chains: Chains, draws: int, tick: Callable[[float], Any]
) -> tuple[Draws, bool]:
    runs: list[smc.Run] = []
    share = draws / len(chains.streams)
    interrupted = False
    for streams in chains.streams:
        try:
            runs.append(
                smc.temper(plan.target, max(draws, smc.LEAST), streams, lambda s: tick(share * s))
            )
        except KeyboardInterrupt:
            if not runs:
                raise
            interrupted = True
            break
    return Draws(*smc.joined(runs, draws), tuple(runs)), interrupted
