"""The quasi-posterior of local projections: responses of all horizons at once.

Each response has its own quasi-posterior: its Gaussian quasi-likelihood with the joint covariance
over horizons and shocks, times its prior. Draws of different responses share the joint noise
of the whole system, so that functionals of several responses have the right spread; with flat
priors this is exactly N(β̂, V) of the stacked system. docs/decisions: 'Responses one by one'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.continuous_updating import (
    ByRows,
    Updating,
    rank_one,
    refuse_unbounded,
)
from hakari.inference.influence import ScoreCovariance, independent_rows, score_rows
from hakari.inference.path_prior import PathForm, PathPrior, by_response, forms
from hakari.inference.prior import Flat
from hakari.inference.quasi_path import QuasiPath

if TYPE_CHECKING:
    from hakari.inference.local_projections import LocalProjection
    from hakari.inference.projection_calibration import Rate

Weighting = Literal["frozen", "continuous"]
Shrinkage = Literal["auto", "none", "ledoit-wolf"]
EXACT = 1e-5  # of the median deviation: what is known exactly gets this one under a prior


@dataclass(frozen=True)
class ProjectionPosterior:
    """Quasi-posterior of a `LocalProjection`; make one with its method `posterior`.

    calibration: what `calibrate` found; the posterior is taken to the power of its rates.
    """

    projection: LocalProjection
    covariance: ScoreCovariance
    prior: PathPrior | Mapping[str, PathPrior] = Flat()  # noqa: RUF009 - frozen
    weighting: Weighting = "frozen"
    determinant: bool = True
    shrinkage: Shrinkage = "auto"
    calibration: tuple[Rate, ...] = ()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("weighting", self.weighting, ("frozen", "continuous")),
            ("shrinkage", self.shrinkage, ("auto", "none", "ledoit-wolf")),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r}: use {' or '.join(map(repr, known))}")
        if self.weighting == "continuous" and self.shrinkage == "ledoit-wolf":
            raise ValueError(
                "shrinkage 'ledoit-wolf' is of a frozen covariance: with weighting='continuous' "
                "use shrinkage='none'"
            )
        _ = self.paths
        if self.weighting == "continuous":
            self._check_updating()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the J·S·H coefficients, response by response and shock by shock."""
        return self.projection.names

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided for the user, and what weakens the answer, in sentences."""
        lp, out = self.projection, []
        m = len(self.rows) - int(np.ptp(lp.series.period)) - 1
        lagged = self.covariance.kind in ("hac", "driscoll-kraay")
        if lagged and 4 * m * lp.shape[2] > max(lp.rows_used):
            out.append(
                f"covariance {self.covariance} takes in {m} lags over {lp.shape[2]} horizons from "
                f"{max(lp.rows_used)} rows: its joint bands are too narrow in short samples; with "
                "one lag more than the dynamics need, hc3 has no need of lags"
            )
        return (*lp.notes, *out, *self._weakness)

    @cached_property
    def _weakness(self) -> tuple[str, ...]:
        """Few rows, and instruments that are weak at some horizon."""
        lp, out = self.projection, []
        rows, free = min(lp.rows_used), min(lp.rows_used) - max(lp.coefficients_by_horizon)
        if free < 2 * lp.shape[2]:
            out.append(
                f"{rows} rows leave {free} degrees of freedom for {lp.shape[2]} horizons: joint "
                "bands from so few are not to be trusted; fewer lags or horizons"
            )
        if lp.question.instruments and lp.shape[1] == 1:
            stages = lp.first_stage(self.covariance)
            weak = stages[stages["effective_f"] < stages["critical"]]
            if len(weak):
                out.append(
                    f"the instruments are weak: effective F {weak['effective_f'].min():.1f}, below "
                    f"{weak['critical'].max():.1f} (Montiel Olea and Pflueger, 2013): read the "
                    "Anderson-Rubin sets beside the posterior"
                )
        return tuple(out)

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rate of each response; 1 before `calibrate`."""
        found = tuple(one.rate for one in self.calibration)
        return found or (1.0,) * len(self.projection.question.response)

    @cached_property
    def rows(self) -> Float[ndarray, "R Q"]:
        """Ψ with V = Ψ'Ψ the joint covariance of all Q = J·S·H estimates."""
        return self.projection.score_rows(self.covariance)

    @property
    def shrunk(self) -> bool:
        """Whether the correlation is shrunk; `auto`: where a prior needs its frozen inverse."""
        priors = by_response(self.prior, self.projection.question.response).values()
        informed = any(not isinstance(prior, Flat) for prior in priors)
        frozen = self.weighting == "frozen"
        return self.shrinkage == "ledoit-wolf" or (self.shrinkage == "auto" and informed and frozen)

    @cached_property
    def joint_covariance(self) -> Float[ndarray, "Q Q"]:
        """V, its correlation shrunk where `shrunk` says so."""
        V = np.asarray(self.rows.T @ self.rows)
        if not self.shrunk:
            return V
        size, keep = np.sqrt(np.diag(V)), 1 - self.intensity
        out = V * keep
        out[np.diag_indices(len(V))] = size**2
        return np.asarray(out)

    @cached_property
    def intensity(self) -> float:
        """Weight of the identity in the shrunk correlation; 0 where it is not shrunk."""
        return ledoit_wolf(self.rows) if self.shrunk else 0.0

    @cached_property
    def noise_root(self) -> Float[ndarray, "r Q"]:
        """ξ @ noise_root ~ N(0, V) for ξ standard normal, r at most Q (twice Q when shrunk)."""
        root = np.asarray(np.linalg.qr(self.rows, mode="r"))
        if not self.intensity:
            return root
        own = np.diag(np.sqrt(self.intensity * np.diag(self.joint_covariance)))
        return np.vstack([np.sqrt(1 - self.intensity) * root, own])

    @cached_property
    def paths(self) -> tuple[QuasiPath, ...]:
        """The quasi-posterior of each response; a process's length is chosen here."""
        lp = self.projection
        priors = by_response(self.prior, lp.question.response)
        q = len(self.names) // len(priors)
        found = []
        for j, (name, prior) in enumerate(priors.items()):
            part = slice(j * q, (j + 1) * q)
            candidates = forms(prior, self.names[part], lp.question.horizons, lp.units[j])
            found.append(self._path(name, part, candidates))
        return tuple(found)

    def _path(self, name: str, part: slice, candidates: list[PathForm]) -> QuasiPath:
        estimate, V = self.projection.estimate.ravel()[part], self.joint_covariance[part, part]
        if not candidates:
            return QuasiPath(name, estimate, V, 1.0, None)
        h, V = self._hartlap(name, len(estimate)), _with_floor(V)
        paths = [QuasiPath(name, estimate, V, h, form) for form in candidates]
        return max(paths, key=lambda p: p.log_evidence) if len(paths) > 1 else paths[0]

    def _hartlap(self, name: str, q: int) -> float:
        """(n − q − 2)/n, n the independent rows that V was estimated from."""
        if self.shrunk:
            return 1.0
        n = independent_rows(self.rows, self.covariance, self.projection.series)
        if n < q + 3:
            raise ValueError(
                f"a prior on {name} needs the inverse of a covariance of {q} estimates, from "
                f"{n:.0f} independent rows ({self.covariance}): use shrinkage='ledoit-wolf', "
                "covariance='hc3', fewer horizons, or a flat prior"
            )
        return (n - q - 2) / n

    # --- continuous updating ------------------------------------------------------------

    @cached_property
    def updating(self) -> tuple[Updating, ...]:
        """The continuously updated quasi-likelihood of each response."""
        lp, S = self.projection, len(self.projection.shocks)
        q = len(self.names) // len(self.paths)
        out: list[Updating] = []
        for j, path in enumerate(self.paths):
            a, b = lp.moment_rows(j)  # (N, q) and (N, q, S): z y and z s
            rows = self._updated_rows(np.concatenate([a, b.reshape(len(b), -1)], axis=1), j)
            row_a, row_b = rows[:, :q], rows[:, q:].reshape(-1, q, S)
            if S == 1 and lp.question.sample == "common":
                form = rank_one(
                    a.sum(axis=0),
                    float(b[:, 0, 0].sum()),
                    row_a,
                    row_b[:, 0, 0],
                    path.precision,
                    self.determinant,
                )
                out.append(form)
                continue
            slope = _by_horizon(b.sum(axis=0), S)
            whole = ByRows(a.sum(axis=0), slope, row_a, row_b, path.precision, self.determinant)
            out.append(whole)
        return tuple(out)

    def _updated_rows(self, moments: Float[ndarray, "N C"], j: int) -> Float[ndarray, "R C"]:
        """Rows of Ω: of the moments as of the influence, so that Ω(β̂) is the frozen one."""
        lp = self.projection
        leverage = lp.leverage_of(j)
        columns = moments.shape[1] // leverage.shape[1]
        wide = np.concatenate(
            [leverage, np.repeat(leverage, columns - 1, axis=1)], axis=1
        )  # z y for each moment, then z s for each moment and shock
        own = np.tile(lp.coefficients_by_horizon, len(lp.shocks))
        counts = np.concatenate([own, np.repeat(own, columns - 1)])
        return score_rows(moments, wide, counts, self.covariance, lp.series)

    def _check_updating(self) -> None:
        for path, updating in zip(self.paths, self.updating, strict=True):
            if path.form is None or not path.form.proper:
                refuse_unbounded(updating, path.name, path.estimate, path.covariance)

    # --- learning rate ----------------------------------------------------------------------

    def calibrate(
        self, level: float = 0.9, replications: int = 200, seed: int = 0, progress: bool = False
    ) -> ProjectionPosterior:
        """The posterior to the power at which its joint bands cover in bootstrap samples.

        See `hakari.inference.projection_calibration.calibrate`.
        """
        from hakari.inference.projection_calibration import calibrate

        found = calibrate(self, level, replications, seed, progress)
        return replace(self, calibration=found)


def ledoit_wolf(rows: Float[ndarray, "R Q"]) -> float:
    """Weight of the identity in the correlation of Ψ'Ψ, rows taken as independent.

    Ledoit and Wolf (2004), of standardised columns.
    """
    n = len(rows)
    size = np.sqrt((rows**2).sum(axis=0))
    p = rows / np.where(size > 0, size, 1) * np.sqrt(n)
    R = p.T @ p / n
    distance = float(((R - np.eye(len(R))) ** 2).sum())
    noise = float(((p**2).sum(axis=1) ** 2).sum() / n - (R**2).sum()) / n
    return float(min(1.0, max(0.0, noise / distance))) if distance > 0 else 1.0


def _with_floor(V: Float[ndarray, "q q"]) -> Float[ndarray, "q q"]:
    """V with a small variance where there is none: a variable's response to itself at once is 1."""
    size = np.sqrt(np.diag(V))
    floor = EXACT * float(np.median(size[size > 0])) if (size > 0).any() else EXACT
    return V + np.diag(np.where(size < floor, floor, 0.0) ** 2)


def _by_horizon(b: Float[ndarray, "q S"], S: int) -> Float[ndarray, "q q"]:
    """Σ z s' as a matrix on the path: moment (s, h) reads coefficients (s', h)."""
    H = len(b) // S
    out = np.zeros((S, H, S, H))
    h = np.arange(H)
    out[:, h, :, h] = b.reshape(S, H, S).transpose(1, 0, 2)
    return out.reshape(len(b), len(b))
