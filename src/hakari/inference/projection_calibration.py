"""Learning rates that make joint bands cover, by a wild bootstrap of the fitted VAR.

Each bootstrap sample comes from the VAR of all variables with the same lags: the part of its
residuals that the shock (or instrument) explains keeps its size and takes an independent sign,
the rest another (Rademacher), so that the scores are drawn anew. In each, the posterior of the
same kind is found in closed form; the quantile of max_h |mean* − truth*|/sd* over that of the
posterior's own draws is the factor by which bands are too narrow, and its square is one over the
rate.
local-projections.md 'Calibrated joint bands'; Gonçalves and Kilian (2004) for the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator
from scipy.linalg import solve_discrete_lyapunov
from scipy.stats import binom
from threadpoolctl import threadpool_limits

from hakari.inference.frisch_waugh import concentrate
from hakari.inference.series import Series

if TYPE_CHECKING:
    from hakari.inference.local_projections import LocalProjection
    from hakari.inference.projection_posterior import ProjectionPosterior


@dataclass(frozen=True)
class Rate:
    """Learning rate of one response, with a 90 % interval from the bootstrap's own error.

    A rate above 1, which would narrow bands, is cut to 1: the bootstrap's world is a fitted one.
    covered: share of bootstrap samples whose joint band at `level` held the truth before.
    """

    response: str
    rate: float
    interval: tuple[float, float]
    covered: float
    level: float
    replications: int


@dataclass(frozen=True)
class VectorAutoregression:
    """x_t = D_t intercepts + Σ A_l x_{t−l} + e_t on rows `first`, ..., of the table."""

    names: tuple[str, ...]
    lags: Float[ndarray, "p k k"]
    deterministic: Float[ndarray, "T k"]  # fitted, of each row
    residual: Float[ndarray, "T k"]
    start: Float[ndarray, "p k"]
    first: int  # row of the table at which `start` begins

    def responses(self, horizon: int) -> Float[ndarray, "h k k"]:
        """Θ_0 = I, ..., Θ_horizon: responses to residuals."""
        p, k, _ = self.lags.shape
        out = np.zeros((horizon + 1, k, k))
        out[0] = np.eye(k)
        for h in range(1, horizon + 1):
            out[h] = sum(self.lags[i] @ out[h - 1 - i] for i in range(min(p, h)))
        return out

    def simulate(self, shocks: Float[ndarray, "B T k"]) -> Float[ndarray, "B pT k"]:
        """Paths with these residuals, all at once, from the data's first rows."""
        p = len(self.start)
        B, T, k = shocks.shape
        out = np.empty((B, p + T, k))
        out[:, :p] = self.start
        flat = self.lags[::-1].transpose(0, 2, 1).reshape(p * k, k)  # oldest lag first
        for t in range(T):
            past = out[:, t : t + p].reshape(B, p * k)
            out[:, p + t] = self.deterministic[t] + past @ flat + shocks[:, t]
        return out


def fit_var(lp: LocalProjection) -> VectorAutoregression:
    """Least squares with the projection's own lags and deterministic terms, at least one lag.

    Raises ValueError where the rows are too few for it.
    """
    names = lp.question.system
    whole = np.column_stack([lp.series.columns[name] for name in names])
    known = np.flatnonzero(np.isfinite(whole).all(axis=1))
    x = whole[known]
    p = max([1, *(max(term.lags) for term in lp.question.terms)])
    time = np.linspace(-1, 1, len(x))[p:]
    powers = {"n": 0, "c": 1, "ct": 2, "ctt": 3}[lp.question.trend]
    D = np.column_stack([time**i for i in range(powers)]) if powers else np.empty((len(time), 0))
    lagged = [max((0, *t.lags)) > 0 for t in lp.question.terms]
    own = {t.column for t, some in zip(lp.question.terms, lagged, strict=True) if some}
    past = np.column_stack([x[p - lag : len(x) - lag] for lag in range(1, p + 1)])
    kept = np.tile([name in own or not own for name in names], p)  # others have no lags
    design = np.column_stack([D, past * kept])
    if len(design) < powers + kept.sum() + 10:
        raise ValueError(
            f"{len(design)} rows for the {powers + kept.sum()} coefficients of the VAR that "
            "calibrate() draws samples from: use fewer lags or controls"
        )
    coefficients, k = np.linalg.lstsq(design, x[p:], rcond=None)[0], x.shape[1]
    lags = coefficients[powers:].reshape(p, k, k).transpose(0, 2, 1)
    lags = without_bias(lags, x[p:] - design @ coefficients, kept[:k])
    rest = x[p:] - past @ lags.transpose(0, 2, 1).reshape(p * k, k)
    level = D @ np.linalg.lstsq(D, rest, rcond=None)[0] if powers else np.zeros_like(rest)
    return VectorAutoregression(names, lags, level, rest - level, x[:p], int(known[0]))


def without_bias(
    lags: Float[ndarray, "p k k"], residual: Float[ndarray, "T k"], own: ndarray
) -> Float[ndarray, "p k k"]:
    """Lags less their bias in short samples, which shortens responses; Pope (1990).

    own (k,): variables whose lags enter. The correction is cut where it would leave the
    stationary region (Kilian, 1998), and left out where the estimate already has.
    """
    p, k, T = len(lags), int(own.sum()), len(residual)
    inner = lags[:, own][:, :, own]
    A = np.eye(p * k, k=-k)
    A[:k] = inner.transpose(1, 0, 2).reshape(k, p * k)
    roots = np.linalg.eigvals(A)
    if np.abs(roots).max() >= 1:
        return lags
    noise = np.zeros_like(A)
    noise[:k, :k] = np.cov(residual[:, own].T).reshape(k, k)
    variance = solve_discrete_lyapunov(A, noise, method="bilinear")
    one = np.eye(p * k)
    total = np.linalg.inv(one - A.T) + A.T @ np.linalg.inv(one - A.T @ A.T)
    total = total + sum(r * np.linalg.inv(one - r * A.T) for r in roots).real
    bias = -np.linalg.solve(variance, (noise @ total).T).T[:k] / T
    out, step = lags.copy(), bias.reshape(k, p, k).transpose(1, 0, 2)
    for share in np.arange(1.0, 0.0, -0.05):
        A[:k] = (inner - share * step).transpose(1, 0, 2).reshape(k, p * k)
        if np.abs(np.linalg.eigvals(A)).max() < 1:
            out[np.ix_(np.arange(p), own, own)] = inner - share * step
            return out
    return lags


def calibrate(
    posterior: ProjectionPosterior, level: float, replications: int, seed: int, progress: bool
) -> tuple[Rate, ...]:
    """The learning rate of each response; raises ValueError where the bootstrap has no meaning."""
    from hakari.inference.sampling import generator, sample

    _check(posterior, level, replications)
    lp = posterior.projection
    plain = replace(posterior, calibration=())
    chance = generator(seed, "calibration")
    truth, samples = _bootstrap(lp, chance, replications)
    statistic = np.empty((replications, lp.shape[0]))
    with _bar(progress, replications) as tick, threadpool_limits(1, user_api="blas"):
        for b, series in enumerate(samples):
            statistic[b] = _distance(_again(plain, series), truth)
            tick()
    draws = sample(plain, draws=1000, seed=seed)["posterior"].dataset["theta"].values
    draws = draws.reshape(len(draws) * draws.shape[1], lp.shape[0], -1)
    spread = draws.std(axis=0)
    own = np.abs(draws - draws.mean(axis=0)) / np.where(spread > 0, spread, 1)
    critical = np.quantile(own.max(axis=2), level, axis=0)
    return tuple(
        _rate(name, statistic[:, j], float(critical[j]), level)
        for j, name in enumerate(lp.question.response)
    )


# --- parts --------------------------------------------------------------------------------


def _check(posterior: ProjectionPosterior, level: float, replications: int) -> None:
    lp = posterior.projection
    if not 0 < level < 1:
        raise ValueError(f"level {level!r}: a probability between 0 and 1 is needed")
    if not isinstance(replications, int | np.integer) or replications < 20:
        raise ValueError(f"replications {replications!r}: at least 20 bootstrap samples are needed")
    needed = int(np.ceil(10 / (1 - level) - 1e-9))
    if replications < needed:
        raise ValueError(
            f"replications {replications}: at least {needed} are needed for level {level:g}"
        )
    for what, found in (
        ("a panel", len(lp.series.units) > 1),
        ("state-dependent projections", lp.question.state is not None),
        ("shrunk controls", lp.controls_prior is not None),
        ("continuous weighting", posterior.weighting == "continuous"),
        ("controls that lead", any(min(t.lags) < 0 for t in lp.question.terms if t.lags)),
    ):
        if found:
            raise ValueError(
                f"calibrate() draws bootstrap samples from one VAR and is not for {what}"
            )


def _bootstrap(
    lp: LocalProjection, chance: Generator, replications: int
) -> tuple[Float[ndarray, "J S H"], Iterator[Series]]:
    """The bootstrap world's responses, and its samples, one at a time."""
    var = fit_var(lp)
    design, T = lp.design, len(var.residual)
    at = np.arange(T) + var.first + len(var.start)  # rows of the table that residuals belong to
    parts = (design.shocks, design.right, design.controls)
    known = np.all([np.isfinite(part[at]).all(axis=1) for part in parts], axis=0)
    rows = at[known]
    z = None if design.instruments is None else design.instruments[rows]
    fit = concentrate(var.residual[known], design.shocks[rows], z, design.controls[rows])
    explained = np.zeros_like(var.residual)
    impact = np.linalg.lstsq(fit.z, fit.y, rcond=None)[0]  # (S, k)
    explained[known] = fit.z @ impact
    truth = _truth(lp, var, impact)
    signs = 2.0 * chance.integers(0, 2, (2, replications, T)) - 1
    rest = var.residual - explained
    paths = var.simulate(signs[0][:, :, None] * explained + signs[1][:, :, None] * rest)
    every = np.full((T, design.right.shape[1]), np.nan)
    every[known] = fit.every
    return truth, _samples(lp, var, paths, signs[0][:, :, None] * every)


def _truth(
    lp: LocalProjection, var: VectorAutoregression, impact: Float[ndarray, "S k"]
) -> Float[ndarray, "J S H"]:
    """Responses to a unit of each shock by the VAR's recursion."""
    q = lp.question
    unit = np.linalg.solve(impact[:, [var.names.index(s) for s in q.shock]], impact)
    whole = var.responses(q.horizons[-1]) @ unit.T  # (h, k, S)
    if q.cumulative:
        whole = whole.cumsum(axis=0)
    chosen = whole[list(q.horizons)][:, [var.names.index(y) for y in q.response]]
    return np.asarray(chosen.transpose(1, 2, 0))


def _samples(
    lp: LocalProjection,
    var: VectorAutoregression,
    paths: Float[ndarray, "B pT k"],
    instruments: Float[ndarray, "B T M"],
) -> Iterator[Series]:
    series, p = lp.series, len(var.start)
    window = slice(var.first, var.first + paths.shape[1])
    for path, z in zip(paths, instruments, strict=True):
        columns = dict(zip(var.names, path.T, strict=True))
        for m, name in enumerate(lp.question.instruments):
            columns[name] = np.concatenate([np.full(p, np.nan), z[:, m]])
        yield Series(
            columns, series.unit[window], series.units, series.period[window], series.labels[window]
        )


def _again(posterior: ProjectionPosterior, series: Series) -> ProjectionPosterior:
    return replace(posterior, projection=posterior.projection.on(series))


def _distance(
    posterior: ProjectionPosterior, truth: Float[ndarray, "J S H"]
) -> Float[ndarray, " J"]:
    """max_h |mean − truth|/sd of each response."""
    out = []
    varies = (np.diag(posterior.joint_covariance) > 0).reshape(len(posterior.paths), -1)
    for path, real, moves in zip(posterior.paths, truth, varies, strict=True):
        mean, sd = path.moments
        out.append(np.abs((mean - real.ravel())[moves] / sd[moves]).max())
    return np.array(out)


def _rate(name: str, statistic: Float[ndarray, " B"], critical: float, level: float) -> Rate:
    """Order statistics of the bootstrap; their binomial interval at 90 %."""
    B, ordered = len(statistic), np.sort(statistic)
    low, high = binom.ppf([0.05, 0.95], B, level)
    places = [int(np.ceil(level * (B + 1))) - 1, int(low) - 1, int(high)]
    middle, lower, upper = (ordered[min(max(i, 0), B - 1)] for i in places)
    rates = [float((critical / q) ** 2) for q in (middle, upper, lower)]
    covered = float((statistic <= critical).mean())
    return Rate(name, min(rates[0], 1.0), (rates[1], rates[2]), covered, level, B)


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Any]:
    if not progress:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("bootstrap samples", total=total)
        yield lambda: bar.advance(task)
