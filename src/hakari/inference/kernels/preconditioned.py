"""`preconditioned`: the autoregressive form of `independence`, for when that gets stuck.

The reference's draw is u(v) = mean + factor z √(df/|c|²) of latent standard normals
v = (z, c) (K + df entries; z alone when the reference is Gaussian). The proposal
v' = ρ v + √(1 − ρ²) ξ leaves N(0, I) invariant, so with the target w(u(v)) N(v; 0, I), whose
marginal in u is π, α = min{1, w(u')/w(u)}, w = π/r. ρ = 0 is `independence`; ρ → 1 is local.
Chains advance in lock-step, so that an evaluation stays a matrix product.
Neal (1998); Cotter et al. (2013); the latent scale is derived here.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hakari.inference.density import log_density_batch
from hakari.inference.kernels.independence import Reference


def latent_size(reference: Reference) -> int:
    """Number of latent normals: K, and df more for a Student reference (df a whole number)."""
    extra = 0 if np.isinf(reference.df) else int(reference.df)
    return len(reference.mean) + extra


@njit(cache=True, nogil=True)
def place(mean, factor, df, v):  # type: ignore[no-untyped-def]
    """Points u (C, K) of latent normals v (C, M), and their log reference densities (C,)."""
    C, K = len(v), len(mean)
    u, log_r = np.empty((C, K)), np.empty(C)
    for c in range(C):
        scale, q = 1.0, 0.0
        if not np.isinf(df):
            chi2 = 0.0
            for k in range(K, v.shape[1]):
                chi2 += v[c, k] ** 2
            scale = np.sqrt(df / chi2)
        for i in range(K):
            z = v[c, i] * scale
            q += z * z
            value = mean[i]
            for j in range(i + 1):
                value += factor[i, j] * v[c, j] * scale
            u[c, i] = value
        log_r[c] = -0.5 * q if np.isinf(df) else -0.5 * (df + K) * np.log1p(q / df)
    return u, log_r


@njit(cache=True, nogil=True)
def run(target, mean, factor, df, rho, start, noise, coins):  # type: ignore[no-untyped-def]
    """C chains for N steps. start (C, M) latent; noise (N, C, M) normal; coins (N, C) uniform.

    Returns latent draws' end (C, M), draws (N, C, K), log densities (N, C), accepted (N, C).
    """
    N, C = noise.shape[:2]
    K = len(mean)
    draws, densities = np.empty((N, C, K)), np.empty((N, C))
    accepted = np.zeros((N, C), dtype=np.bool_)
    v = start.copy()
    u, log_r = place(mean, factor, df, v)
    density = log_density_batch(target, u)
    fresh = np.sqrt(1.0 - rho * rho)
    for i in range(N):
        moved = rho * v + fresh * noise[i]
        new_u, new_r = place(mean, factor, df, moved)
        new_density = log_density_batch(target, new_u)
        for c in range(C):
            gain = (new_density[c] - new_r[c]) - (density[c] - log_r[c])
            if gain >= 0.0 or coins[i, c] < np.exp(gain):
                v[c], u[c] = moved[c], new_u[c]
                density[c], log_r[c] = new_density[c], new_r[c]
                accepted[i, c] = True
            draws[i, c] = u[c]
            densities[i, c] = density[c]
    return v, draws, densities, accepted
