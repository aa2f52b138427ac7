"""The quasi-posterior of one response's path, with frozen weighting: all of it in closed form.

N(β̂, V/h) times a prior that is Gaussian given its smoothness τ. One eigenproblem turns every
value of τ into a diagonal: precision hV⁻¹ + fixed + structure/τ² = B⁻ᵀ(1 + D/τ²)B⁻¹, so that
conditional draws, the marginal of τ and the means given τ cost O(q) each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from hakari.inference.path_prior import PathForm

GRID = 400
LOWEST, HIGHEST = np.log(1e-6), np.log(1e6)  # of τ, in its units


@dataclass(frozen=True)
class QuasiPath:
    """One response: estimate (q,), covariance (q, q) of its sampling error, and the prior.

    precision: h, by which V⁻¹ is multiplied, since the inverse of an estimated covariance is too
    large on average (Hartlap, Simon and Schneider, 2007); 1 where there is no prior, and no
    inverse. form: None for a flat prior.
    """

    name: str
    estimate: Float[ndarray, " q"]
    covariance: Float[ndarray, "q q"]
    precision: float
    form: PathForm | None

    @cached_property
    def weight(self) -> Float[ndarray, "q q"]:
        """hV⁻¹; by a generalised inverse where rows are fewer than coefficients.

        Of the correlation: what is known almost exactly is not cut off beside what is not.
        """
        size = np.sqrt(np.diag(self.covariance))
        size = np.where(size > 0, size, 1.0)
        scale = np.multiply.outer(size, size)
        inverse: ndarray = np.linalg.pinv(self.covariance / scale, rcond=1e-12, hermitian=True)
        return self.precision * inverse / scale

    def log_likelihood(self, path: Float[ndarray, "N q"]) -> Float[ndarray, " N"]:
        """−½ (β − β̂)'hV⁻¹(β − β̂): the frozen quasi-likelihood, 0 at the estimate."""
        gap = path - self.estimate
        return np.asarray(-0.5 * np.einsum("nq,qp,np->n", gap, self.weight, gap))

    # --- given τ -----------------------------------------------------------------------

    @cached_property
    def _diagonal(self) -> tuple[ndarray, ndarray, ndarray]:
        """B (q, q), D (q,) and B'(hV⁻¹β̂ + fixed·mean + ...), the precision's eigenproblem."""
        form = self._form
        base = self.weight + form.fixed
        factor = np.linalg.cholesky(base)
        half = np.linalg.solve(factor, form.root.T)  # L⁻¹ root'
        values, vectors = np.linalg.eigh(half @ half.T)
        B = np.linalg.solve(factor.T, vectors)
        return B, np.maximum(values, 0.0), B.T @ (self.weight @ (self.estimate - form.mean))

    @property
    def _form(self) -> PathForm:
        if self.form is None:
            raise ValueError(f"{self.name} has a flat prior: there is no smoothness")
        return self.form

    def shrinkage(self, log_tau: Float[ndarray, " N"]) -> Float[ndarray, "N q"]:
        """1/(1 + D/τ²) of each direction: 1 leaves the data alone, 0 follows the prior."""
        rough = np.exp(np.minimum(-2 * np.asarray(log_tau), 600.0))[:, None]
        return np.asarray(1 / (1 + self._diagonal[1] * rough))

    def conditional_mean(self, log_tau: Float[ndarray, " N"]) -> Float[ndarray, "N q"]:
        """E[β | τ]."""
        B, _, c = self._diagonal
        return np.asarray(self._form.mean + (self.shrinkage(log_tau) * c) @ B.T)

    def conditional_variance(self, log_tau: Float[ndarray, " N"]) -> Float[ndarray, "N q"]:
        """Var[β_h | τ] of each coefficient."""
        B, _, _ = self._diagonal
        return np.asarray(self.shrinkage(log_tau) @ (B**2).T)

    def posterior_step(
        self,
        log_tau: Float[ndarray, " N"],
        estimate_noise: Float[ndarray, "N q"],
        prior_noise: Float[ndarray, "N r"],
        fixed_noise: Float[ndarray, "N q"],
    ) -> Float[ndarray, "N q"]:
        """Draws of β | τ by perturbing what is smoothed: Σ(hV⁻¹(β̂ + e) + fixed·m + prior noise).

        estimate_noise: e ~ N(0, V/h), which may be shared with other responses and then
        carries their dependence; prior_noise, fixed_noise: standard normal. Papandreou and
        Yuille (2010).
        """
        form = self._form
        B, _, c = self._diagonal
        values, vectors = np.linalg.eigh(form.fixed)
        held = (fixed_noise * np.sqrt(np.maximum(values, 0))) @ vectors.T
        rough = np.exp(np.minimum(-np.asarray(log_tau), 300.0))[:, None] * (prior_noise @ form.root)
        pushed = c + (estimate_noise @ self.weight + held + rough) @ B
        return np.asarray(form.mean + (self.shrinkage(log_tau) * pushed) @ B.T)

    def log_conditional(
        self, path: Float[ndarray, "N q"], log_tau: Float[ndarray, " N"]
    ) -> tuple[Float[ndarray, " N"], Float[ndarray, " N"]]:
        """(squared distance from E[β | τ] in Var[β | τ], ½ log of the precision's determinant)."""
        B, _, _ = self._diagonal
        gap = np.linalg.solve(B, (path - self.conditional_mean(log_tau)).T).T
        scale = self.shrinkage(log_tau)
        distance = (gap**2 / scale).sum(axis=1)
        log_det = -0.5 * np.log(scale).sum(axis=1) - float(np.linalg.slogdet(B)[1])
        return distance, log_det

    # --- τ ------------------------------------------------------------------------------

    def log_marginal(self, log_tau: Float[ndarray, " N"]) -> Float[ndarray, " N"]:
        """Log marginal quasi-likelihood of τ: ∫ exp(log_likelihood) p(β | τ) dβ."""
        form, (B, _, c) = self._form, self._diagonal
        log_tau = np.asarray(log_tau, dtype=float)
        scale = self.shrinkage(log_tau)
        gap = self.estimate - form.mean
        explained = 0.5 * (scale * c**2).sum(axis=1) - 0.5 * float(gap @ self.weight @ gap)
        prior = 0.5 * (form.log_structure + form.log_fixed) - len(form.root) * log_tau
        log_det = 0.5 * np.log(scale).sum(axis=1) + float(np.linalg.slogdet(B)[1])
        return np.asarray(explained + prior + log_det)

    def log_tau_density(self, log_tau: Float[ndarray, " N"]) -> Float[ndarray, " N"]:
        """Log density of log τ given the data, not normalised, β integrated out."""
        return np.asarray(self.log_marginal(log_tau) + self._form.log_hyper(log_tau))

    @cached_property
    def chosen(self) -> float:
        """Log τ where it is not sampled: as given, or by GCV or the marginal quasi-likelihood."""
        rule = self._form.smoothness
        if rule is None:
            return 0.0
        if not isinstance(rule, str):
            return float(np.log(rule))
        criterion = self._gcv if rule == "gcv" else (lambda t: -self.log_marginal(t))
        grid = np.linspace(LOWEST, HIGHEST, 241)
        values = criterion(grid)
        best = int(np.nanargmin(values))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        found = minimize_scalar(
            lambda t: float(criterion(np.array([t]))[0]), bounds=(low, high), method="bounded"
        )
        return float(found.x)

    def _gcv(self, log_tau: Float[ndarray, " N"]) -> Float[ndarray, " N"]:
        """Craven and Wahba (1979), of the estimates weighted by their covariance.

        Loss and residual degrees of freedom both vanish as τ grows, so neither may be a
        difference: residual β̂ − E[β | τ] = B(cut·c + B'fixed(β̂ − mean)), cut = 1 − shrinkage,
        and B'(hV⁻¹ + fixed)B = I.
        """
        form, (B, D, c) = self._form, self._diagonal
        cut = D / (D + np.exp(np.minimum(2 * np.asarray(log_tau), 600.0))[:, None])
        residual = cut * c + B.T @ (form.fixed @ (self.estimate - form.mean))
        loss = np.einsum("nk,kl,nl->n", residual, B.T @ self.weight @ B, residual)
        share = np.einsum("qk,qp,pk->k", B, self.weight, B)  # trace of the smoother, by direction
        held = np.einsum("qk,qp,pk->k", B, form.fixed, B)
        freedom = cut @ share + held.sum()
        return np.asarray(len(form.mean) * loss / freedom**2)

    @cached_property
    def tau_grid(self) -> tuple[Float[ndarray, " G"], Float[ndarray, " G"]]:
        """(nodes of log τ, their log density, normalised by the trapezoid rule)."""
        coarse = np.linspace(LOWEST, HIGHEST, GRID)
        density = self.log_tau_density(coarse)
        near = coarse[density > density.max() - 25]
        step = coarse[1] - coarse[0]
        nodes = np.linspace(near[0] - step, near[-1] + step, GRID)
        density = self.log_tau_density(nodes)
        width = np.log(nodes[1] - nodes[0])
        return nodes, density - (logsumexp(density) + width)

    @cached_property
    def log_evidence(self) -> float:
        """Log of the marginal quasi-likelihood, τ integrated or at its chosen value."""
        if not self._form.sampled:
            return float(self.log_marginal(np.array([self.chosen]))[0])
        nodes, density = self.tau_grid
        return float(self.log_tau_density(nodes[:1])[0] - density[0])

    def draw_log_tau(self, coins: Float[ndarray, " N"]) -> tuple[ndarray, ndarray]:
        """(log τ, log density it was drawn with) from coins uniform in (0, 1), cell by cell."""
        if not self._form.sampled:
            return np.full(len(coins), self.chosen), np.zeros(len(coins))
        nodes, density = self.tau_grid
        step = nodes[1] - nodes[0]
        mass = np.exp(np.logaddexp(density[:-1], density[1:]) - np.log(2)) * step
        edges = np.concatenate([[0.0], np.cumsum(mass)])
        place = coins * edges[-1]
        cell = np.clip(np.searchsorted(edges, place, side="right") - 1, 0, len(mass) - 1)
        inside = (place - edges[cell]) / mass[cell]
        return nodes[cell] + inside * step, np.log(mass[cell] / edges[-1] / step)

    # --- the whole path -------------------------------------------------------------------

    @cached_property
    def moments(self) -> tuple[Float[ndarray, " q"], Float[ndarray, " q"]]:
        """(mean, standard deviation) of β, τ integrated out on its grid: no draws."""
        if self.form is None:
            return self.estimate, np.sqrt(np.diag(self.covariance))
        if not self.form.sampled:
            at = np.array([self.chosen])
            return self.conditional_mean(at)[0], np.sqrt(self.conditional_variance(at)[0])
        nodes, density = self.tau_grid
        share = np.exp(density) * (nodes[1] - nodes[0])
        means = self.conditional_mean(nodes)
        mean = share @ means
        spread = share @ (self.conditional_variance(nodes) + (means - mean) ** 2)
        return np.asarray(mean), np.sqrt(spread)

    def log_path_posterior(self, path: Float[ndarray, "N q"]) -> Float[ndarray, " N"]:
        """Log density of β, τ integrated out, up to the data's constant."""
        likelihood = self.log_likelihood(path)
        if self.form is None:
            return likelihood
        if not self.form.sampled:
            own = self.form.log_path(path, np.full(len(path), self.chosen))
            return np.asarray(likelihood + own)
        rank, gap = len(self.form.root), path - self.form.mean
        nodes = self.tau_grid[0]
        peaked = rank + (2 * self.form.shape if self.form.smoothness == "gamma" else 1)
        width = 0.7 / np.sqrt(peaked)  # sd of log τ given a path: trapezoids need no finer nodes
        nodes = nodes[:: max(1, int(width / (nodes[1] - nodes[0])))]
        hyper = self.form.log_hyper(nodes)
        rough = ((gap @ self.form.root.T) ** 2).sum(axis=1)
        held = np.einsum("nq,qp,np->n", gap, self.form.fixed, gap)
        by_node = hyper - rank * nodes - 0.5 * rough[:, None] * np.exp(-2 * nodes)
        return np.asarray(likelihood - 0.5 * held + logsumexp(by_node, axis=1))
