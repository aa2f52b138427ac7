"""General samplers on a quasi-posterior, each in the fastest fair set-up found for two cores.

Target, for y (n,), X (n, K), Z (n, L), moments m_i = z_i (y_i - x_i'theta) and a flat prior:
log pi(theta) = -1/2 log|Omega| - n/2 mbar' Omega^-1 mbar, Omega = (1/n) sum m_i m_i', uncentred.

Everybody samples x in theta = centre + factor @ x, with the centre at the two-step GMM estimate and
the factor from its variance, on instruments rotated so that Omega(centre) = 1: the target is then
close to N(0, 1). Everybody works in float64, on two cores, with one BLAS thread a core.

What is timed: `seconds` is sampling alone, after compilation and adaptation. NumPyro's `MCMC.run`
compiles anew at each call, also after `warmup` (1.4 s a run at K = L = 5, against 0.05 s of
sampling), so both NUTS are compiled here ahead of time, from their libraries' kernels.

Set-ups that were measured (microseconds, or minimum bulk ESS per second, on two cores; n, K, L =
500, 5, 5 / 500, 10, 10 / 500, 20, 20 / 2000, 20, 30):
- Omega and gradient, sequential: products of rows 9 / 19 / 34 / 138, symmetric tensor 2.6 / 4.4 /
  13 / 28, tensor with the gradient written out 1.8 / 3.1 / 11 / 24. At K = 50, L = 60 the tensor
  takes 577 against 2,197 for n = 5000, and 532 against 178 for n = 500: rows win once the pairs
  (K+1)(K+2)/2 outnumber them (a tie at 500, 30, 30), and that is the rule.
- Chains (NumPyro): vectorized 63k / 63k / 17k / 10k, one device a core with its chains vectorized
  74k / 83k / 9k / 13k, one device a core with its chains one after the other 89k / 78k / 20k / 16k:
  the last, since chains in lock-step wait for the longest trajectory.
- Target acceptance 0.6 / 0.7 / 0.75 / 0.8: K = 5 199k / 80k / 79k / 71k, K = 10 63k / 63k / 79k /
  84k, K = 20 28k / 33k / 29k / 24k (n = 500) and 14k / 19k / 19k / 16k: `_target_acceptance`.
- emcee's moves: differential evolution beats stretch by 3 to 5 times; kernel density wins only at
  K = 5 and fails at K = 20.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Array = NDArray[np.float64]

CORES = 2
JITTER = 0.1  # spread of the NUTS chains' starts, in posterior standard deviations


@dataclass(frozen=True)
class Run:
    """Draws of one sampler, and what they cost.

    Attributes:
        name: the library.
        draws: (chains, draws, K), of theta.
        seconds: sampling, after adaptation (burn-in for emcee) and compilation.
        warmup_seconds: adaptation or burn-in, compiled.
        total_seconds: the whole call: set-up, compilation, adaptation and sampling.
        version: of the library.
        setup: what was chosen, in words.
    """

    name: str
    draws: Array
    seconds: float
    warmup_seconds: float
    total_seconds: float
    version: str
    setup: str


def numpyro_nuts(
    y: Array, X: Array, Z: Array, *, chains: int, warmup: int, draws: int, seed: int
) -> Run:
    """Sample the quasi-posterior by NumPyro's NUTS with a dense mass matrix.

    Call it before any other JAX operation in the process: it sets the number of CPU devices.

    Args:
        y: outcome (n,).
        X: regressors (n, K).
        Z: instruments (n, L), L >= K.
        chains: chains; a multiple of two keeps both cores busy.
        warmup: iterations of adaptation for each chain.
        draws: draws kept for each chain.
        seed: of starts and chains.

    Returns:
        The run, draws (chains, draws, K).

    Source: Phan, Pradhan and Jankowiak (2019), arXiv 1912.11554.
    """
    return _nuts("numpyro", _numpyro, _whiten(y, X, Z), (chains, warmup, draws), seed)


def numpyro_as_written(
    y: Array, X: Array, Z: Array, *, chains: int, warmup: int, draws: int, seed: int
) -> Run:
    """Sample by NumPyro's NUTS, dense mass matrix, with the density as its definition reads.

    Rows, automatic differentiation, the data's own coordinates, started at the estimate, and the
    library's own settings (target acceptance 0.8): what a careful user writes. `numpyro_nuts`
    is the same sampler on hakari's tensor and whitening, with the gradient written out.
    Arguments as there.
    """
    estimate = _whiten(y, X, Z)
    plain = _Whitened(y, X, Z, np.zeros(X.shape[1]), np.eye(X.shape[1]))
    lengths = (chains, warmup, draws)
    return _nuts("numpyro", _numpyro, plain, lengths, seed, _as_written(plain), estimate)


def numpyro_run(
    y: Array, X: Array, Z: Array, *, chains: int, warmup: int, draws: int, seed: int
) -> Run:
    """The same as `numpyro_as_written`, through the public `MCMC.warmup` and `MCMC.run`.

    What a user waits for: `run` compiles anew at each call, also after `warmup`, and that is in
    `seconds`. Two chains, one a core (`chains` is not read: `parallel` takes one a device).
    """
    began = perf_counter()
    _start_jax()
    import jax
    from numpyro.infer import MCMC, NUTS

    estimate = _whiten(y, X, Z)
    density = _as_written(_Whitened(y, X, Z, np.zeros(X.shape[1]), np.eye(X.shape[1])))
    noise = np.random.default_rng(seed).standard_normal((CORES, X.shape[1]))
    kernel = NUTS(potential_fn=lambda theta: -density(theta), dense_mass=True)
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=CORES,
        chain_method="parallel",
        progress_bar=False,
    )
    with threadpool_limits(1):
        starts = jax.numpy.asarray(estimate.theta(JITTER * noise))
        mcmc.warmup(jax.random.PRNGKey(seed), init_params=starts)
        warm = perf_counter()
        mcmc.run(mcmc.post_warmup_state.rng_key)
        theta = np.asarray(jax.block_until_ready(mcmc.get_samples(group_by_chain=True)))
    end = perf_counter()
    setup = f"as written, MCMC.run, {CORES} parallel chains, target acceptance 0.8"
    return Run("numpyro", theta, end - warm, warm - began, end - began, version("numpyro"), setup)


def blackjax_nuts(
    y: Array, X: Array, Z: Array, *, chains: int, warmup: int, draws: int, seed: int
) -> Run:
    """Sample the quasi-posterior by BlackJAX's NUTS, dense mass matrix by window adaptation.

    Arguments, and the place among JAX operations, as for `numpyro_nuts`.

    Returns:
        The run, draws (chains, draws, K).

    Source: Cabezas et al. (2024), arXiv 2402.10797.
    """
    return _nuts("blackjax", _blackjax, _whiten(y, X, Z), (chains, warmup, draws), seed)


def emcee_ensemble(
    y: Array, X: Array, Z: Array, *, walkers: int | None = None, warmup: int, draws: int, seed: int
) -> Run:
    """Sample the quasi-posterior by emcee: one ensemble a core, differential-evolution moves.

    The ensembles run in processes of their own, which import the caller's main module: a script
    that calls this needs `if __name__ == "__main__":`. Walkers of one ensemble are not independent,
    and need draws >> 50 autocorrelation times (about 15 at K = 5, 60 at K = 20).

    Args:
        y: outcome (n,).
        X: regressors (n, K).
        Z: instruments (n, L), L >= K.
        walkers: in all, a multiple of four and at least 4 K an ensemble; by default the larger of
            16 K and 320 for each ensemble, where NumPy's overhead no longer dominates.
        warmup: iterations dropped.
        draws: draws kept for each walker.
        seed: of starts and walkers.

    Returns:
        The run, draws (walkers, draws, K).

    Source: Foreman-Mackey et al. (2013), arXiv 1202.3665; ter Braak (2006) for the move.
    """
    began = perf_counter()
    K = X.shape[1]
    walkers = CORES * max(16 * K, 320) if walkers is None else walkers
    if walkers % (2 * CORES) or walkers < 4 * K * CORES:
        raise ValueError(
            f"{walkers} walkers for {K} parameters: take a multiple of {2 * CORES}, "
            f"at least {4 * K * CORES}"
        )
    target = _whiten(y, X, Z)
    context = multiprocessing.get_context("spawn")  # a fork after JAX has started may hang
    barrier = context.Barrier(CORES, timeout=600)  # so that one failure does not hang the other
    work = partial(_ensemble, target, walkers // CORES, warmup, draws)
    seeds = np.random.SeedSequence(seed).spawn(CORES)
    with ProcessPoolExecutor(CORES, context, initializer=_meet, initargs=(barrier,)) as pool:
        parts, burn_ins, seconds = zip(*pool.map(work, seeds), strict=True)
    return Run(
        "emcee",
        target.theta(np.concatenate(parts)),
        max(seconds),
        max(burn_ins),
        perf_counter() - began,
        version("emcee"),
        f"{CORES} ensembles of {walkers // CORES} walkers, differential evolution, tensor form",
    )


class _Whitened(NamedTuple):
    """Data in coordinates where the estimate is 0, its variance 1 and Omega there 1."""

    residual: Array  # (n,): y - X centre
    X: Array  # (n, K): X factor
    Z: Array  # (n, L)
    centre: Array  # (K,)
    factor: Array  # (K, K)

    def theta(self, x: Array) -> Array:
        """Parameters (..., K) at whitened coordinates x (..., K)."""
        return x @ self.factor.T + self.centre

    def mean_moments(self) -> tuple[Array, Array]:
        """Intercept r (L,) and slope R (L, K): the mean moments at x are r - R x."""
        n = len(self.residual)
        return self.Z.T @ self.residual / n, self.Z.T @ self.X / n


def _whiten(y: Array, X: Array, Z: Array) -> _Whitened:
    """Centre at the two-step GMM estimate; rotating Z moves log pi by a constant only."""
    n = len(y)
    R, r = Z.T @ X / n, Z.T @ y / n
    omega = Z.T @ Z / n  # two-stage least squares first
    for _ in range(2):
        weighted = np.linalg.solve(omega, R)
        variance = np.linalg.inv(R.T @ weighted)
        centre = variance @ (weighted.T @ r)
        moments = Z * (y - X @ centre)[:, None]
        omega = moments.T @ moments / n
    factor = np.linalg.cholesky(np.linalg.inv(R.T @ np.linalg.solve(omega, R)) / n)
    rotated = np.linalg.solve(np.linalg.cholesky(omega), Z.T).T
    return _Whitened(y - X @ centre, X @ factor, rotated, centre, factor)


def _tensor(target: _Whitened) -> tuple[tuple[NDArray[np.intp], NDArray[np.intp]], Array]:
    """Pairs j <= k of p = (1, x), and the table T: Omega's lower triangle = (p_j p_k) @ T.

    T (pairs, L(L+1)/2) sums a_ij a_ik z_i z_i' / n over rows, a = (residual, -X), twice if j < k.
    """
    a = np.column_stack([target.residual, -target.X])
    j, k = np.triu_indices(a.shape[1])
    rows, columns = np.tril_indices(target.Z.shape[1])
    instruments = target.Z[:, rows] * target.Z[:, columns] / len(a)
    return (j, k), (a[:, j] * a[:, k] * np.where(j == k, 1.0, 2.0)).T @ instruments


# --- NUTS -----------------------------------------------------------------------------------------


def _start_jax() -> None:
    """One CPU device a core and float64, which JAX takes only before its first operation."""
    import jax

    if jax.config.jax_num_cpu_devices != CORES:
        jax.config.update("jax_num_cpu_devices", CORES)
    jax.config.update("jax_enable_x64", True)


def _nuts(
    name: str,
    kernels: Any,
    target: _Whitened,
    lengths: tuple[int, int, int],
    seed: int,
    density: Callable[[Any], Any] | None = None,
    starting: _Whitened | None = None,
) -> Run:
    """Adapt and sample with `kernels`, compiled ahead, on one device a core.

    density: in the target's coordinates, and `starting` the whitening to start in; by default
    the faster form of the density, and the target's own coordinates.
    """
    began = perf_counter()
    _start_jax()
    import jax

    chains, warmup, draws = lengths
    K = target.X.shape[1]
    acceptance = _target_acceptance(K) if density is None else 0.8
    starts = JITTER * np.random.default_rng(seed).standard_normal((chains, K))
    if starting is not None:
        starts = starting.theta(starts)
    keys = jax.random.split(jax.random.PRNGKey(seed), chains)
    with threadpool_limits(1):  # JAX's Cholesky is SciPy's LAPACK
        begin, adapt, sample = kernels(density or _log_density(target), acceptance, warmup, draws)
        states, warmup_seconds = _timed(_spread(adapt, chains), begin(keys, starts))
        x, seconds = _timed(_spread(sample, chains), states)
    theta = target.theta(np.asarray(x))
    total = perf_counter() - began
    form = f"whitened, {_form(target)} form" if density is None else "as written"
    setup = f"{form}, {_devices(chains)} devices, target acceptance {acceptance}"
    return Run(name, theta, seconds, warmup_seconds, total, version(name), setup)


def _target_acceptance(K: int) -> float:
    """Target of the step size: short trajectories pay off in few dimensions, as measured above."""
    return 0.6 if K < 8 else 0.75


def _numpyro(log_density: Callable[..., Any], target: float, warmup: int, draws: int) -> Any:
    """Begin (all chains), adapt and sample (one chain) by `numpyro.infer.NUTS`."""
    import jax.numpy as jnp
    from jax import lax
    from numpyro.infer import NUTS

    nuts = NUTS(potential_fn=lambda x: -log_density(x), dense_mass=True, target_accept_prob=target)

    def begin(keys: Any, starts: Array) -> Any:
        nuts.init(keys[0], warmup, jnp.asarray(starts[0]), (), {})  # builds `nuts.sample`
        return keys, jnp.asarray(starts)

    def adapt(state: Any) -> Any:
        state = nuts.init(state[0], warmup, state[1], (), {})
        return lax.fori_loop(0, warmup, lambda _, s: nuts.sample(s, (), {}), state)

    def sample(state: Any) -> Any:
        def step(state: Any, _: None) -> Any:
            state = nuts.sample(state, (), {})
            return state, state.z

        return lax.scan(step, state, length=draws)[1]

    return begin, adapt, sample


def _blackjax(log_density: Callable[..., Any], target: float, warmup: int, draws: int) -> Any:
    """Begin (all chains), adapt and sample (one chain) by `blackjax.nuts`."""
    import blackjax
    import jax

    adaptation = blackjax.window_adaptation(
        blackjax.nuts,
        log_density,
        is_mass_matrix_diagonal=False,
        target_acceptance_rate=target,
        adaptation_info_fn=lambda *_: None,
    )

    def begin(keys: Any, starts: Array) -> Any:
        return keys, jax.numpy.asarray(starts)

    def adapt(state: Any) -> Any:
        now, later = jax.random.split(state[0])
        return later, adaptation.run(now, state[1], warmup)[0]

    def sample(state: Any) -> Any:
        key, (state, parameters) = state
        nuts = blackjax.nuts(log_density, **parameters)

        def step(state: Any, key: Any) -> Any:
            state, _ = nuts.step(key, state)
            return state, state.position

        return jax.lax.scan(step, state, jax.random.split(key, draws))[1]

    return begin, adapt, sample


def _devices(chains: int) -> int:
    """Devices that share the chains evenly."""
    return max(count for count in range(1, CORES + 1) if chains % count == 0)


def _spread(work: Callable[..., Any], chains: int) -> Any:
    """Map `work` of one chain over states with a leading axis of chains.

    Each device takes its chains one after the other: none waits for another's trajectory.
    """
    import jax
    from jax.sharding import Mesh, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[: _devices(chains)]), ("chains",))
    share = PartitionSpec("chains")
    here = partial(jax.lax.map, work)
    return jax.jit(jax.shard_map(here, mesh=mesh, in_specs=share, out_specs=share, check_vma=False))


def _timed(call: Any, *arguments: Any) -> tuple[Any, float]:
    """Result and seconds of a jitted call, compiled before the clock starts."""
    import jax

    compiled = call.lower(*arguments).compile()
    jax.block_until_ready(arguments)
    began = perf_counter()
    result = jax.block_until_ready(compiled(*arguments))
    return result, perf_counter() - began


def _form(target: _Whitened) -> str:
    """The faster form of Omega: the tensor's pairs, or the rows when they are fewer."""
    n, K = target.X.shape
    pairs = (K + 1) * (K + 2) // 2
    return "rows" if n < pairs else "tensor"


def _log_density(target: _Whitened) -> Callable[[Any], Any]:
    """Log density of x (K,), to be traced by JAX, in the form that `_form` names."""
    import jax.numpy as jnp

    n, L = target.Z.shape
    residual, X, Z = (jnp.asarray(part) for part in target[:3])
    r, R = (jnp.asarray(part) for part in target.mean_moments())
    criterion = _criterion(n, L)

    def from_rows(x: Any) -> Any:
        moments = Z * (residual - X @ x)[:, None]
        return criterion((moments.T @ moments / n)[np.tril_indices(L)], r - R @ x)

    if _form(target) == "rows":
        return from_rows
    (j, k), tensor = _tensor(target)
    table = jnp.asarray(tensor)

    def from_tensor(x: Any) -> Any:
        p = jnp.concatenate([jnp.ones(1), x])
        return criterion((p[j] * p[k]) @ table, r - R @ x)

    return from_tensor


def _as_written(data: _Whitened) -> Callable[[Any], Any]:
    """Log density of theta (K,), row by row from its definition, gradient by JAX."""

    def log_density(theta: Any) -> Any:
        import jax.numpy as jnp
        from jax.scipy.linalg import solve_triangular

        y, X, Z = (jnp.asarray(part) for part in data[:3])
        moments = Z * (y - X @ theta)[:, None]
        factor = jnp.linalg.cholesky(moments.T @ moments / len(y))
        s = solve_triangular(factor, moments.mean(axis=0), lower=True)
        return -jnp.log(jnp.diag(factor)).sum() - 0.5 * len(y) * (s @ s)

    return log_density


def _criterion(n: int, L: int) -> Any:
    """-1/2 log|Omega| - n/2 m'Wm of Omega's lower triangle and m (L,), gradient written out.

    d/dOmega = 1/2 (n v v' - W), d/dm = -n v, with W = Omega^-1, v = W m: one inverse of the
    Cholesky factor, where reverse mode differentiates through the factorisation.
    """
    import jax
    import jax.numpy as jnp
    from jax.lax import linalg

    rows, columns = np.tril_indices(L)
    place = np.zeros((L, L), dtype=int)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    scale = np.where(rows == columns, 0.5, 1.0)  # off the diagonal, a packed entry is two

    def forward(packed: Any, m: Any) -> Any:
        factor = linalg.cholesky(packed[place], symmetrize_input=False)
        inverse = linalg.triangular_solve(factor, jnp.eye(L), left_side=True, lower=True)
        s = inverse @ m
        value = -jnp.log(jnp.diag(factor)).sum() - 0.5 * n * (s @ s)
        return value, (inverse, s @ inverse)

    def backward(kept: Any, slope: Any) -> Any:
        inverse, v = kept
        by_omega = n * jnp.outer(v, v) - inverse.T @ inverse
        return slope * scale * by_omega[rows, columns], -slope * n * v

    criterion = jax.custom_vjp(lambda packed, m: forward(packed, m)[0])
    criterion.defvjp(forward, backward)
    return criterion


# --- emcee ----------------------------------------------------------------------------------------

_barrier: Any = None  # set in each process of the pool: a barrier cannot be sent with the work


def _meet(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _ensemble(
    target: _Whitened, walkers: int, warmup: int, draws: int, seed: np.random.SeedSequence
) -> tuple[Array, float, float]:
    """Draws (walkers, draws, K) of one ensemble, seconds of burn-in and of sampling."""
    import emcee

    K = target.X.shape[1]
    chance = np.random.RandomState(np.random.MT19937(seed))  # emcee takes no Generator
    sampler = emcee.EnsembleSampler(
        walkers, K, _batched_log_density(target), vectorize=True, moves=emcee.moves.DEMove()
    )
    start = emcee.State(chance.standard_normal((walkers, K)), random_state=chance.get_state())
    with threadpool_limits(1):
        _barrier.wait()
        begun = perf_counter()
        state = sampler.run_mcmc(start, warmup)
        burn_in = perf_counter() - begun
        sampler.reset()
        _barrier.wait()
        begun = perf_counter()
        sampler.run_mcmc(state, draws)
        seconds = perf_counter() - begun
    return np.ascontiguousarray(sampler.get_chain().swapaxes(0, 1)), burn_in, seconds


def _batched_log_density(target: _Whitened) -> Callable[[Array], Array]:
    """Log density (B,) of x (B, K): one matrix product and one batched Cholesky.

    The matrix [[Omega, m], [m', 2]] is positive definite, since m'Wm <= 1 when Omega is uncentred,
    and the last row of its factor is the solution s of factor s = m.
    """
    n, L = target.Z.shape
    (j, k), table = _tensor(target)
    r, R = target.mean_moments()
    borders = np.zeros((len(j), L + 1))
    borders[j == 0, :L] = np.vstack([r, -R.T])  # p_0 p_k = (1, x)
    borders[0, L] = 2.0
    bordered = np.hstack([table, borders])  # a lower triangle of order L + 1, row by row
    rows, columns = np.tril_indices(L + 1)
    place = rows * (L + 1) + columns

    def log_density(x: Array) -> Array:
        p = np.column_stack([np.ones(len(x)), x])
        matrices = np.zeros((len(x), (L + 1) ** 2))
        matrices[:, place] = (p[:, j] * p[:, k]) @ bordered
        factor = np.linalg.cholesky(matrices.reshape(-1, L + 1, L + 1))
        diagonal = np.einsum("bii->bi", factor)[:, :L]
        return -np.log(diagonal).sum(1) - 0.5 * n * (factor[:, L, :L] ** 2).sum(1)

    return log_density
