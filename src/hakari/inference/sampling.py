"""`sample`: draws from a quasi-posterior, as an ArviZ DataTree.

The one owner of chance: a seed spawns one stream a chain and purpose, so that draws depend
neither on the number of workers nor on how the work is cut into blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import joblib
import numpy as np
import xarray as xr
from numpy import ndarray
from numpy.random import Generator, SeedSequence, default_rng
from threadpoolctl import threadpool_limits

from hakari.inference.density import Target, evaluate
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.identification import refuse_improper
from hakari.inference.kernels.independence import Reference
from hakari.inference.posterior import QuasiPosterior
from hakari.inference.projection_posterior import ProjectionPosterior
from hakari.inference.projection_sampling import METHODS as PROJECTION_METHODS
from hakari.inference.projection_sampling import Chain, PathDraws, begin
from hakari.inference.projection_sampling import advance as step
from hakari.inference.result import Draws, Plan, read_positions, to_datatree
from hakari.inference.workers import workers

Method = Literal[
    "auto", "mh", "da", "da-exact", "da-approx", "independence", "preconditioned", "concentrated",
    "gibbs", "smc", "pcn", "mala", "nuts",
]  # fmt: skip
METHODS = ("auto", "mh", "da", "da-exact", "da-approx", "independence", "preconditioned")
MIX = 0.05  # share of random-walk steps that keeps da-exact and da-approx ergodic
PROJECTION_BLOCK = 1000  # draws of local projections at a time
SUB_BLOCK = 4096  # proposals evaluated at a time: features and covariances stay in cache


def sample(
    posterior: QuasiPosterior | ProjectionPosterior | GibbsPosterior,
    method: Method = "auto",
    draws: int = 2000,
    chains: int = 4,
    seed: int | None = None,
    *,
    warmup: int | None = None,
    progress: bool = False,
    resume: xr.DataTree | None = None,
) -> xr.DataTree:
    """Draw from the quasi-posterior, or the Gibbs posterior of a loss.

    method: a kernel, or `auto`, which picks one (by a pilot, where there are pilots) and says why.
        Gibbs posteriors have `mh`, `smc`, `pcn`, `mala` and, of losses in JAX, `nuts`.
    draws, chains: kept draws a chain, and chains; any number. Of `smc`: particles and runs.
    seed: whole number; the same draws for the same seed, whatever the workers. None takes
        one from the system and records it.
    warmup: iterations a chain that tune the proposal and are not kept; default 1,000 or 40 K;
        not read by `smc`, which tunes as it tempers.
    progress: a progress bar on the error stream.
    resume: an earlier result of the same posterior; its draws are kept, and its chains continue
        with their kernel and streams (method, chains, seed and warmup are not read).

    Chains run through joblib (threads here; inside `joblib.parallel_config(backend=...)`
    wherever that says). Ctrl-C returns the draws so far, `attrs["interrupted"]` is 1.
    Raises ValueError for unknown methods, an improper posterior, or a kernel that does not
    fit the prior, before any draw.

    >>> X = np.random.default_rng(1).standard_normal((400, 2))
    >>> from hakari.inference import LinearMoments
    >>> moments = LinearMoments.from_arrays(X @ [1.0, 2.0] + X[:, 0] ** 2, X)
    >>> sample(QuasiPosterior(moments), draws=100, chains=2, seed=1)["posterior"]["theta"].shape
    (2, 100, 2)
    """
    began = time.perf_counter()
    if isinstance(posterior, ProjectionPosterior):
        return _sample_projection(posterior, method, draws, chains, seed, warmup, progress, resume)
    if isinstance(posterior, GibbsPosterior):
        return _sample_gibbs(posterior, method, draws, chains, seed, warmup, progress, resume)
    _check(posterior, method, draws, chains, seed, warmup)
    seed = _seeded(seed)
    with threadpool_limits(1, user_api="blas"):  # small matrices; and sums in one order
        worst = refuse_improper(posterior)
        target = posterior.whitened.target
        if resume is None:
            roots = SeedSequence(seed).spawn(chains + 1)
            plan = _plan(target, method, default_rng(roots[-1]))
            length = warmup if warmup is not None else max(1000, 40 * target.slope.shape[1])
            groups = _start(target, plan, [_streams(root) for root in roots[:-1]], length)
            earlier: Draws | None = None
        else:
            plan, groups, earlier, seed = read_positions(resume, posterior)
            chains = sum(len(g.streams) for g in groups)
        warm = time.perf_counter()
        kept, interrupted = _draw(target, plan, groups, draws, progress)
    if earlier is not None:
        kept = earlier.followed_by(kept)
    times = {"warmup_seconds": warm - began, "sampling_seconds": time.perf_counter() - warm}
    settings = {
        "seed": seed,
        "draws": draws,
        "chains": chains,
        "tail_barrier": worst.barrier,
        "moments_missing": worst.moments_missing,
    }
    return to_datatree(posterior, plan, groups, kept, settings | times, interrupted)


def _sample_projection(
    posterior: ProjectionPosterior,
    method: str,
    draws: int,
    chains: int,
    seed: int | None,
    warmup: int | None,
    progress: bool,
    resume: xr.DataTree | None,
) -> xr.DataTree:
    """As `sample`, of local projections, whose own kernels take blocks of draws at a time."""
    from hakari.inference.projection_result import to_datatree as projection_tree

    _check_numbers(draws, chains, seed, warmup)
    if method not in PROJECTION_METHODS:
        raise ValueError(
            f"method {method!r} is unknown: local projections have "
            f"{', '.join(PROJECTION_METHODS)}; other kernels sample "
            "QuasiPosterior(lp.moments(RESPONSE))"
        )
    if resume is not None:
        raise ValueError("resume: draws of local projections are not continued; ask for more draws")
    method, seed = "concentrated" if method == "auto" else method, _seeded(seed)
    roots = SeedSequence(seed).spawn(chains + 1)
    length, began = 2000 if warmup is None else warmup, time.perf_counter()
    with threadpool_limits(1, user_api="blas"):
        started = [begin(posterior, method, _streams(root), length) for root in roots[:-1]]
        warm = time.perf_counter()
        kept, interrupted = _rounds(posterior, method, started, draws, progress)
        settings = {
            "seed": seed,
            "draws": draws,
            "chains": chains,
            "warmup_seconds": warm - began,
            "sampling_seconds": time.perf_counter() - warm,
        }
        prior = default_rng(roots[-1])
        return projection_tree(posterior, method, kept, prior, settings, interrupted)


def _sample_gibbs(
    posterior: GibbsPosterior,
    method: str,
    draws: int,
    chains: int,
    seed: int | None,
    warmup: int | None,
    progress: bool,
    resume: xr.DataTree | None,
) -> xr.DataTree:
    """As `sample`, of Gibbs posteriors: their kernels are in gibbs/samplers.py."""
    from hakari.inference.gibbs import samplers
    from hakari.inference.gibbs.result import to_datatree as gibbs_tree

    _check_numbers(draws, chains, seed, warmup)
    if resume is not None:
        raise ValueError("resume: draws of Gibbs posteriors are not continued; ask for more draws")
    seed, began = _seeded(seed), time.perf_counter()
    roots = SeedSequence(seed).spawn(chains + 1)
    with threadpool_limits(1, user_api="blas"):
        plan = samplers.plan(posterior, method)
        started = samplers.begin(plan, [_streams(root) for root in roots[:-1]], warmup)
        warm = time.perf_counter()
        with _bar(progress, draws, plan.method) as tick:
            kept, interrupted = samplers.draw(plan, started, draws, tick)
    times = {"warmup_seconds": warm - began, "sampling_seconds": time.perf_counter() - warm}
    return gibbs_tree(plan, kept, default_rng(roots[-1]), {"seed": seed} | times, interrupted)


def _rounds(
    posterior: ProjectionPosterior, method: str, started: list[Chain], draws: int, progress: bool
) -> tuple[list[PathDraws], bool]:
    """All chains in rounds of blocks; Ctrl-C drops the round it falls into."""
    kept: list[PathDraws] = []
    with _bar(progress, draws, method) as tick:
        try:
            for done in range(0, draws, PROJECTION_BLOCK):
                size = min(PROJECTION_BLOCK, draws - done)
                moved = [step(posterior, method, chain, size) for chain in started]
                started = [chain for chain, _ in moved]
                new = [found for _, found in moved]
                kept = [a.followed_by(b) for a, b in zip(kept, new, strict=True)] if kept else new
                tick(size)
        except KeyboardInterrupt:
            if not kept:
                raise
            return kept, True
    return kept, False


# --- choosing -----------------------------------------------------------------------------


def _check(
    posterior: QuasiPosterior,
    method: str,
    draws: int,
    chains: int,
    seed: int | None,
    warmup: int | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    _check_numbers(draws, chains, seed, warmup)
    if method == "da-exact" and any(np.isfinite(b.df) for b in posterior.blocks):
        raise ValueError(
            "da-exact proposes from a Gaussian conditional and cannot take a Student prior: "
            "use method='da-approx' or 'auto', or a Normal prior"
        )


def generator(seed: int, purpose: str) -> Generator:
    """The stream of a seed for a purpose outside chains, such as a bootstrap."""
    return default_rng(SeedSequence([seed, *purpose.encode()]))


def _seeded(seed: int | None) -> int:
    return int(SeedSequence().entropy) % 2**63 if seed is None else seed  # type: ignore[arg-type]


def _check_numbers(draws: int, chains: int, seed: int | None, warmup: int | None) -> None:
    for name, value, least in (
        ("draws", draws, 1),
        ("chains", chains, 1),
        ("seed", 0 if seed is None else seed, 0),
        ("warmup", 0 if warmup is None else warmup, 0),
    ):
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} {value!r}: a whole number of at least {least} is needed")


def _plan(target: Target, method: str, generator: Generator) -> Plan:
    """The kernel to run; `auto` fits the reference first and goes by what its pilot shows."""
    if method not in ("auto", "independence", "preconditioned"):
        return Plan(method, "as asked", None)
    from hakari.inference.reference import fit_reference

    fit = fit_reference(target, generator)
    if method != "auto":
        return Plan(method, "as asked", fit)
    pilot = (
        f"pilot: k-hat {fit.k_hat:.2f}, acceptance {fit.acceptance:.2f}, "
        f"effective share {fit.efficiency:.2f}"
    )
    if fit.k_hat < 0.7 and fit.acceptance > 0.1:
        return Plan("independence", f"the reference fits ({pilot})", fit)
    if fit.acceptance > 0.005:
        cause = "accepted too seldom" if fit.acceptance <= 0.1 else "short of the tails"
        return Plan("preconditioned", f"independent proposals are {cause} ({pilot})", fit)
    return Plan("da", f"no reference fits, so a local walk ({pilot})", None)


# --- positions ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Chains that advance together and what they need to go on.

    point: (C, M), u or, for `preconditioned`, latent normals; tuning: (K, K) or (1, 1) ρ;
    scale: (K, K) of the mixed-in walk.
    """

    point: ndarray
    tuning: ndarray
    scale: ndarray
    streams: tuple[dict[str, Generator], ...]


def _streams(root: SeedSequence) -> dict[str, Generator]:
    names = ("start", "noise", "coins", "tail", "wide", "wide tail")
    return {name: default_rng(s) for name, s in zip(names, root.spawn(6), strict=True)}


def _start(
    target: Target, plan: Plan, streams: list[dict[str, Generator]], warmup: int
) -> list[Group]:
    """Overdispersed starts, tuned by warm-up; one group a chain but for lock-step kernels."""
    from hakari.inference.warmup import tune_rho

    if plan.method == "preconditioned":
        from hakari.inference.kernels.preconditioned import latent_size

        reference = plan.reference
        size = latent_size(reference)
        start = np.stack([s["start"].standard_normal(size) for s in streams])
        latent, rho = tune_rho(target, reference, start, warmup, streams)
        return [Group(latent, np.full((1, 1), rho), np.empty((0, 0)), tuple(streams))]
    work = joblib.delayed(_start_one)
    jobs = (work(target, plan, s, warmup) for s in streams)
    return list(joblib.Parallel(n_jobs=workers(len(streams)), prefer="threads")(jobs))


def _start_one(target: Target, plan: Plan, streams: dict[str, Generator], warmup: int) -> Group:
    from hakari.inference.warmup import tune_walk

    point = _start_point(target, plan, streams["start"])
    if plan.method == "independence":
        return Group(point[None], np.empty((0, 0)), np.empty((0, 0)), (streams,))
    kernel = _kernel(plan.method)
    walk = _kernel("da" if plan.method == "da" else "mh")
    point, scale = tune_walk(target, walk, point, warmup, streams)
    tuning = scale
    if kernel.name == "da-approx" and target.slope.shape[0] == target.slope.shape[1]:
        tuning = np.ascontiguousarray(np.linalg.inv(target.slope) / np.sqrt(target.n))
    return Group(point[None], tuning, scale, (streams,))


def _start_point(target: Target, plan: Plan, generator: Generator) -> ndarray:
    """A point with positive density, spread wider than the Gaussian approximation."""
    K = target.slope.shape[1]
    for _ in range(200):
        noise = generator.standard_normal(K)
        u: ndarray = noise * np.sqrt(5 / generator.chisquare(5))
        if plan.fit is not None:
            u = plan.reference.mean + plan.reference.factor @ u
        if np.isfinite(evaluate(target, u).log_density):
            return u
    raise ValueError("no point with positive density near the estimate: Ω(θ) is singular around it")


def _kernel(name: str) -> Any:
    from hakari.inference.kernels.approximate import approximate
    from hakari.inference.kernels.delayed import delayed
    from hakari.inference.kernels.exact import exact
    from hakari.inference.kernels.metropolis import metropolis

    return {k.name: k for k in (metropolis, delayed, exact, approximate)}[name]


# --- drawing ------------------------------------------------------------------------------


def _draw(
    target: Target, plan: Plan, groups: list[Group], draws: int, progress: bool
) -> tuple[Draws, bool]:
    """All chains, in rounds of blocks; groups[:] moves on in place. Ctrl-C drops the round."""
    parts: list[list[Draws]] = []
    done, interrupted = 0, False
    block = min(draws, 2000)
    jobs = workers(len(groups))
    with (
        _bar(progress, draws, plan.method) as tick,
        joblib.Parallel(jobs, prefer="threads") as pool,
    ):
        try:
            while done < draws:
                size = min(block, draws - done)
                began = time.perf_counter()
                tasks = (joblib.delayed(advance)(target, plan, g, size) for g in groups)
                moved, new = zip(*pool(tasks), strict=True)
                groups[:] = moved
                parts.append(list(new))
                done += size
                tick(size)
                if time.perf_counter() - began < 0.25:
                    block *= 2
        except KeyboardInterrupt:
            interrupted = True
    if not parts:
        raise KeyboardInterrupt("interrupted before the first block of draws")
    return Draws.join(parts), interrupted


def advance(target: Target, plan: Plan, group: Group, size: int) -> tuple[Group, Draws]:
    """`size` more draws of one group. The group that comes back is where they ended.

    The one that was passed stays as it was, its streams too: an interrupted round leaves no trace.
    """
    group = replace(group, streams=deepcopy(group.streams))
    if plan.method == "independence":
        return _advance_independence(target, plan, group, size)
    if plan.method == "preconditioned":
        return _advance_preconditioned(target, plan, group, size)
    from hakari.inference.kernels.metropolis import metropolis as walk
    from hakari.inference.transition import run

    kernel = _kernel(plan.method)
    K = group.point.shape[1]
    noise = group.streams[0]["noise"].standard_normal((size, K))
    coins = group.streams[0]["coins"].random((size, 3))
    mix = MIX if kernel.name in ("da-exact", "da-approx") else 0.0
    u, density, outcome = run(
        target,
        kernel.place,
        kernel.log_screen,
        walk.place,
        walk.log_screen,
        mix,
        group.point[0],
        group.tuning,
        group.scale,
        noise,
        coins,
    )
    return replace(group, point=u[-1:].copy()), Draws(u[None], density[None], outcome[None])


def _advance_independence(
    target: Target, plan: Plan, group: Group, size: int
) -> tuple[Group, Draws]:
    from hakari.inference.density import log_density_batch
    from hakari.inference.kernels.independence import accept, log_reference, log_weights
    from hakari.inference.transition import ACCEPTED, REJECTED, SINGULAR

    reference, streams = plan.reference, group.streams[0]
    here, K = group.point, group.point.shape[1]
    here_density = log_density_batch(target, here)
    here_weight = float((here_density - log_reference(reference, here))[0])
    u, density, weight = np.empty((size, K)), np.empty(size), np.empty(size)
    outcome = np.empty(size, dtype=np.int8)
    for start in range(0, size, SUB_BLOCK):
        stop = min(start + SUB_BLOCK, size)
        n, block = stop - start, slice(start, stop)
        noise = streams["noise"].standard_normal((n, K))
        scales = _scales(reference, streams, n)
        new, new_density, weight[block] = log_weights(target, reference, noise, scales)
        where = accept(here_weight, weight[block], streams["coins"].random(n))
        stay = int(np.searchsorted(where, 0))  # before the first accepted proposal: −1
        new.take(where[stay:], axis=0, out=u[start + stay : stop])
        new_density.take(where[stay:], out=density[start + stay : stop])
        u[start : start + stay], density[start : start + stay] = here, here_density
        outcome[block] = np.where(np.isfinite(new_density), REJECTED, SINGULAR)
        outcome[block][where == np.arange(n)] = ACCEPTED
        here, here_density = u[stop - 1 : stop], density[stop - 1 : stop]
        here_weight = here_weight if where[-1] < 0 else float(weight[start + where[-1]])
    draws = Draws(u[None], density[None], outcome[None], weight[None])
    return replace(group, point=here.copy()), draws


def _scales(reference: Reference, streams: dict[str, Generator], size: int) -> ndarray:
    """Squared scales of proposals; each kind of chance has its stream, so blocks do not matter."""
    from hakari.inference.kernels.independence import WIDE_DF, mixed_scales

    wide = np.zeros(size, dtype=bool)
    if reference.share:
        wide = streams["wide"].random(size) < reference.share
    chi2 = np.ones(size)
    if np.isfinite(reference.df):
        chi2 = streams["tail"].chisquare(reference.df, size)
    chi2_wide = streams["wide tail"].chisquare(WIDE_DF, int(wide.sum()))
    return mixed_scales(reference, chi2, wide, chi2_wide)


def _advance_preconditioned(
    target: Target, plan: Plan, group: Group, size: int
) -> tuple[Group, Draws]:
    from hakari.inference.kernels import preconditioned
    from hakari.inference.transition import ACCEPTED, REJECTED

    reference, M = plan.reference, group.point.shape[1]
    noise = np.stack([s["noise"].standard_normal((size, M)) for s in group.streams], axis=1)
    coins = np.stack([s["coins"].random(size) for s in group.streams], axis=1)
    latent, u, density, accepted = preconditioned.run(
        target,
        reference.mean,
        reference.factor,
        reference.df,
        float(group.tuning[0, 0]),
        group.point,
        noise,
        coins,
    )
    outcome = np.where(accepted, ACCEPTED, REJECTED).astype(np.int8)
    return replace(group, point=latent), Draws(u.swapaxes(0, 1).copy(), density.T, outcome.T)


@contextmanager
def _bar(progress: bool, draws: int, method: str) -> Iterator[Callable[[float], Any]]:
    if not progress:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"sampling ({method})", total=draws)
        yield lambda size: bar.advance(task, size)


__all__ = ["METHODS", "Group", "Method", "advance", "generator", "sample"]
