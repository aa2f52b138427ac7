"""Systems of two equations with known effects, and slow formulas that sums are held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hakari.inference.bidirectional.orthogonal_moments import MomentSums
from hakari.inference.sampling import generator

EFFECTS = (0.5, 0.4)


@dataclass(frozen=True)
class Rows:
    """Residuals as they would be with known means, shocks' standard deviations, covariates."""

    W1: np.ndarray
    W2: np.ndarray
    s1: np.ndarray
    s2: np.ndarray
    x: np.ndarray

    @property
    def k(self):
        """The efficient instruments."""
        return np.column_stack([self.s1**-2, self.s2**-2])

    @property
    def rho(self):
        return self.s1**2 / self.s2**2


def shocks(law, n, draw):
    """(2, n) independent shocks with mean 0 and variance 1."""
    if law == "normal":
        return draw.standard_normal((2, n))
    return (draw.chisquare(4, (2, n)) - 4) / np.sqrt(8)


def system(n, strength=1.0, law="normal", seed=0, effects=EFFECTS, common=0.3, covariance=0.0):
    """Rows of the reduced form: log s1² and log s2² move apart by `strength` in x.

    common: how far both move together; covariance: of a common shock that x leaves alone.
    """
    draw = generator(seed, f"system {law}")
    x = draw.uniform(-1, 1, (n, 2))
    together = common * np.sin(np.pi * x[:, 1])
    s1 = np.exp((together + strength * np.sin(np.pi * x[:, 0])) / 2)
    s2 = np.exp((together - strength * x[:, 0] * x[:, 1]) / 2)
    eps = np.stack([s1, s2]) * shocks(law, n, draw)
    shared = np.sqrt(abs(covariance)) * draw.standard_normal(n)
    common_shock = np.stack([shared, np.sign(covariance) * shared])
    return reduced(eps + common_shock, s1, s2, x, effects)


def reduced(eps, s1, s2, x, effects=EFFECTS):
    a, b = effects
    W1, W2 = np.linalg.solve([[1.0, -a], [-b, 1.0]], eps)
    return Rows(W1, W2, s1, s2, x)


def two_regimes():
    """Ω of both regimes of (0.5, 0.4) with variances (1, 2) and (3, 0.5), as printed in the note.

    Returns rows whose products in each regime have those means exactly, and regime dummies.
    """
    omegas = [
        [[2.34375, 2.1875], [2.1875, 3.375]],
        [[4.8828125, 2.265625], [2.265625, 1.53125]],
    ]
    signs = np.array([[1, 1, -1, -1], [1, -1, 1, -1]])
    W = np.concatenate([np.linalg.cholesky(omega) @ signs for omega in omegas], axis=1)
    return W[0], W[1], np.repeat(np.eye(2), 4, axis=0)


def sums_of(rows, k=None, **options):
    return MomentSums.of(rows.W1, rows.W2, rows.k if k is None else k, **options)


def blurred(rows, size=0.3, seed=0):
    """Instruments as heads would estimate them, with errors of their own."""
    noise = generator(seed, "heads").standard_normal(rows.k.shape)
    return rows.k * np.exp(size * noise)


def scores(W1, W2, k, u, v):
    """Rows of g(u, v), from its definition."""
    return k * (W1 * W2 - u * W1**2 - v * W2**2)[:, None]


def direct_anderson_rubin(W1, W2, k, a, b):
    """The statistic at effects (a, b), row by row."""
    g = scores(W1, W2, k, b / (1 + a * b), a / (1 + a * b))
    total = g.sum(axis=0)
    return total @ np.linalg.solve(g.T @ g, total)


def table(n, seed=0, law="normal", effects=EFFECTS, strength=1.5, scale=(1.0, 1.0)):
    """Outcomes p and q and covariates u, v as columns: nonlinear means, variances that part."""
    draw = generator(seed, "table")
    u, v = draw.uniform(-1, 1, (2, n))
    f1, f2 = np.sin(3 * u) + v**2, np.cos(3 * v) - u * v
    s1, s2 = np.exp(strength * np.sin(2 * u) / 2), np.exp((v - strength * np.sin(2 * u)) / 2)
    eps = np.stack([s1, s2]) * shocks(law, n, draw)
    a, b = effects
    p, q = np.linalg.solve([[1.0, -a], [-b, 1.0]], eps + np.stack([f1, f2]))
    return {"p": scale[0] * p, "q": scale[1] * q, "u": u, "v": v}
