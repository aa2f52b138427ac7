"""Losses written in jax.numpy: compiled, with exact derivatives, and NUTS for their posteriors.

All in double precision, whatever the process has set: JAX runs under `jax.enable_x64` here, and
what else the process does with JAX keeps its own precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import joblib
import numpy as np
import pandas as pd
from blackjax.adaptation.base import get_filter_adapt_info_fn
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.gibbs.lockstep import Tuning
from hakari.inference.gibbs.losses import Loss
from hakari.inference.gibbs.risk import CustomRisk
from hakari.inference.gibbs.target import Target
from hakari.inference.workers import workers

AT_ONCE = 64  # values of θ in one call: a power of two, so that few shapes are compiled
ROOM = 64  # draws of NUTS that a compiled block has room for, or a multiple of it
GOAL = 0.8  # acceptance that step sizes are tuned for (Hoffman and Gelman, 2014, section 4)


def loss_of(function: Callable[[Any, Any], Any], name: str | None = None) -> Loss:
    """The loss of a function in jax.numpy; see `losses.from_jax`."""
    named = str(getattr(function, "__name__", "custom")) if name is None else name
    made = JaxFunction(function, named)
    return Loss(
        made.values, made.scores, batched=True, name=named, curvature=made.hessian, jax=made
    )


@dataclass(frozen=True, eq=False)
class JaxFunction:
    """A loss function(theta (d,), rows) -> (n,) in jax.numpy, and all that is compiled of it."""

    function: Callable[[Any, Any], Any]
    name: str
    held: list[tuple[Any, Any]] = field(default_factory=list, repr=False)  # the last rows

    def values(self, theta: Float[ndarray, "M d"], rows: Any) -> Float[ndarray, "M n"]:
        """Losses of each θ. Raises ValueError for what JAX cannot trace, or another shape."""
        with self.double():
            arrays = self.arrays(rows)
            blocks = (theta[i : i + AT_ONCE] for i in range(0, len(theta), AT_ONCE))
            found = [np.asarray(self._each(_padded(b), arrays))[: len(b)] for b in blocks]
        return np.concatenate(found)

    def scores(self, theta: Float[ndarray, " d"], rows: Any) -> Float[ndarray, "n d"]:
        """Gradient of each row's loss."""
        with self.double():
            return np.array(self._slopes(theta, self.arrays(rows)))

    def hessian(self, theta: Float[ndarray, " d"], rows: Any) -> Float[ndarray, "d d"]:
        """Second derivative of the total."""
        with self.double():
            return np.array(self._bend(theta, self.arrays(rows)))

    def arrays(self, rows: Any) -> Any:
        """Rows as JAX's arrays, converted once as long as the same rows are asked for."""
        for known, arrays in self.held[-1:]:
            if known is rows:
                return arrays
        with self.double():
            arrays = jax.tree.map(_array, rows)
        self.held[:] = [(rows, arrays)]
        return arrays

    def each(self, theta: Any, rows: Any) -> Any:
        """The function, traced and checked."""
        found = jnp.asarray(self.function(theta, rows))
        if found.ndim != 1:
            raise ValueError(
                f"loss {self.name!r} gave {found.shape}: it must return (n,) for theta (d,)"
            )
        if found.dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
            raise ValueError(
                f"loss {self.name!r} computes in {found.dtype}: leave out its casts, so that it "
                "stays in float64"
            )
        return found.astype(float)

    def total(self, theta: Any, rows: Any) -> Any:
        """Sum over the rows."""
        return self.each(theta, rows).sum()

    @contextmanager
    def double(self) -> Iterator[None]:
        """Double precision, and JAX's complaints about a function that it cannot trace in short."""
        try:
            with jax.enable_x64(True):
                yield
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
            raise ValueError(
                f"loss {self.name!r} cannot be compiled by JAX: write it in jax.numpy, with "
                f"jnp.where for `if` and for masks of rows ({str(error).splitlines()[0]})"
            ) from error

    @cached_property
    def _each(self) -> Any:
        return jax.jit(jax.vmap(self.each, in_axes=(0, None)))

    @cached_property
    def _slopes(self) -> Any:
        def slopes(theta: Any, rows: Any) -> Any:
            n = jax.eval_shape(self.each, theta, rows).shape[0]
            by = jax.jacfwd if len(theta) <= n else jax.jacrev  # passes: d forward, n back
            return by(self.each)(theta, rows)

        return jax.jit(slopes)

    @cached_property
    def _bend(self) -> Any:
        return jax.jit(jax.hessian(self.total))

    @cached_property
    def slope(self) -> Any:
        """Gradient (d,) of the total, in one pass back, as NUTS takes it."""
        return jax.jit(jax.grad(self.total))

    @cached_property
    def warm_up(self) -> Any:
        """`_warm_up`, compiled for each length."""
        return jax.jit(partial(_warm_up, self), static_argnums=0)

    @cached_property
    def moves(self) -> Any:
        """`_moves`, compiled for each room."""
        return jax.jit(partial(_moves, self))


def _padded(theta: Float[ndarray, "M d"]) -> Float[ndarray, "P d"]:
    """θ up to the next power of two, by repeating the last."""
    missing = (1 << (len(theta) - 1).bit_length()) - len(theta)
    return np.concatenate([theta, np.repeat(theta[-1:], missing, axis=0)])


def _array(leaf: Any) -> Any:
    if isinstance(leaf, pd.DataFrame):
        return {name: _array(leaf[name]) for name in leaf}
    found = np.asarray(leaf)
    if found.dtype.kind not in "biuf":
        raise ValueError(
            f"rows hold {type(leaf).__name__} of dtype {found.dtype}: a JAX loss takes arrays of "
            "numbers, one or in a tuple, list or dict"
        )
    return jnp.array(found, dtype=float if found.dtype.kind == "f" else None)


# --- NUTS ---------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A target as JAX's arrays: θ = centre + factor u, and the blocks of its prior."""

    rows: Any
    centre: Any  # (d,)
    factor: Any  # (d, d)
    rate: Any
    normal: list[tuple[Any, ...]]  # root, centre, constant
    student: list[tuple[Any, ...]]  # and degrees of freedom


def warm_up(
    target: Target, start: Float[ndarray, "C d"], keys: ndarray, length: int
) -> tuple[Float[ndarray, "C d"], Tuning]:
    """Points and tuning after Stan's window adaptation; keys (C, 2) of uint32.

    tuning: size of the leapfrog steps, covariance (diagonal) the inverse masses.
    Raises ValueError for a loss whose gradient is no number at the target's centre.
    """
    _refuse_without_slope(target)
    chains, d = start.shape
    unit = np.repeat(np.eye(d)[None], chains, axis=0)
    if length == 0:
        return start, Tuning(np.full(chains, d**-0.25), unit, np.zeros_like(start), unit)
    function, problem = _problem(target)
    run = partial(function.warm_up, length, problem)
    u, size, inverse_mass = _of_chains(function, run, start, keys)
    return u, Tuning(size, unit, np.zeros_like(start), inverse_mass[:, :, None] * unit)


def moves(
    target: Target, u: Float[ndarray, "C d"], tuning: Tuning, keys: ndarray
) -> tuple[ndarray, ...]:
    """Points (C, N, d), log density, acceptance, divergence and leapfrog steps (C, N) of moves.

    keys (C, N, 2) of uint32: one for each move, so that draws do not depend on blocks.
    """
    (function, problem), count = _problem(target), keys.shape[1]
    inverse_mass = np.diagonal(tuning.covariance, axis1=1, axis2=2)
    room = np.pad(keys, ((0, 0), (0, -count % ROOM), (0, 0)))
    run = partial(function.moves, count, problem)
    found = _of_chains(function, run, u, tuning.size, inverse_mass, room)
    return tuple(part[:, :count] for part in found)


def _problem(target: Target) -> tuple[JaxFunction, Problem]:
    posterior, risk = target.posterior, target.posterior.risk
    assert isinstance(risk, CustomRisk)
    assert isinstance(risk.loss.jax, JaxFunction)
    blocks = [(b.root, b.centre, b.constant, b.df) for b in posterior.blocks]
    normal = [block[:3] for block in blocks if np.isinf(block[3])]
    student = [block for block in blocks if np.isfinite(block[3])]
    rows, rate = risk.loss.jax.arrays(risk.rows), posterior.learning_rate
    return risk.loss.jax, Problem(rows, target.centre, target.factor, rate, normal, student)


def _refuse_without_slope(target: Target) -> None:
    function, problem = _problem(target)
    names = target.posterior.parameters
    with function.double():
        slope = np.asarray(function.slope(target.centre, problem.rows))
    for name, value in zip(names, slope, strict=True):
        if not np.isfinite(value):
            raise ValueError(
                f"the gradient of loss {function.name!r} along {name} is {value} at theta "
                f"{np.array2string(target.centre, precision=4)}: where jnp.where leaves out a "
                "value that is not finite, put a jnp.where around its argument too"
            )


def _of_chains(
    function: JaxFunction, run: Callable[..., Any], *chains: ndarray
) -> tuple[ndarray, ...]:
    """What run(*...) gives for each chain: the first compiles it, the others follow in threads."""

    def one(*chain: ndarray) -> list[ndarray]:
        with function.double():
            return [np.asarray(part) for part in run(*chain)]

    first, *others = zip(*chains, strict=True)
    count = workers(len(others))
    found = [one(*first)]
    found += joblib.Parallel(count, prefer="threads")(joblib.delayed(one)(*c) for c in others)
    return tuple(np.stack(part) for part in zip(*found, strict=True))


def _log_density(function: JaxFunction, problem: Problem, u: Any) -> Any:
    """As `Target.log_density`; −inf where the loss is too large for a number, or is none."""
    theta = problem.centre + problem.factor @ u
    total = function.total(theta, problem.rows)
    value = -problem.rate * jnp.where(jnp.isnan(total), jnp.inf, total)
    for root, centre, constant in problem.normal:
        value += constant - 0.5 * ((root @ theta - centre) ** 2).sum()
    for root, centre, constant, df in problem.student:
        q = ((root @ theta - centre) ** 2).sum()
        value += constant - 0.5 * (df + len(centre)) * jnp.log1p(q / df)
    return value


def _warm_up(function: JaxFunction, length: int, problem: Problem, u: Any, key: Any) -> Any:
    """Where a chain stands after its warm-up, its step size and inverse masses."""
    adaptation = blackjax.window_adaptation(
        blackjax.nuts,
        partial(_log_density, function, problem),
        target_acceptance_rate=GOAL,
        adaptation_info_fn=get_filter_adapt_info_fn(),  # keeps nothing of each move
    )
    (state, found), _ = adaptation.run(jax.random.wrap_key_data(key), u, length)
    return state.position, found["step_size"], found["inverse_mass_matrix"]


def _moves(
    function: JaxFunction,
    count: int,
    problem: Problem,
    u: Any,
    size: Any,
    inverse_mass: Any,
    keys: Any,
) -> Any:
    """`count` moves of one chain, in arrays that have room for as many as there are keys."""
    nuts = blackjax.nuts(partial(_log_density, function, problem), size, inverse_mass)

    def move(i: Any, carried: Any) -> Any:
        state, kept = carried
        state, info = nuts.step(jax.random.wrap_key_data(keys[i]), state)
        new = (
            state.position,
            state.logdensity,
            info.acceptance_rate,
            info.is_divergent,
            info.num_integration_steps,
        )
        return state, tuple(part.at[i].set(one) for part, one in zip(kept, new, strict=True))

    kept = (
        jnp.zeros((len(keys), len(u))),
        *(jnp.zeros(len(keys), kind) for kind in (float, float, bool, int)),
    )
    return jax.lax.fori_loop(0, count, move, (nuts.init(u), kept))[1]
