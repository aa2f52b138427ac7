"""Tails of importance weights, many sets at a time: Pareto shape k-hat and smoothed weights.

Zhang and Stephens (2009) as in Vehtari et al., Pareto smoothed importance sampling (2024); equal
to ArviZ's for each row, which takes one set at a time.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def tail_size(N: int) -> int:
    """Number of largest weights that a Pareto distribution is fitted to."""
    return int(np.ceil(min(N / 5, 3 * np.sqrt(N))))


def threshold(N: int) -> float:
    """k-hat up to which averages over N weighted particles can be trusted."""
    return float(min(1 - 1 / np.log10(N), 0.7))


def smooth(
    log_weight: Float[ndarray, "B N"],
) -> tuple[Float[ndarray, "B N"], Float[ndarray, " B"]]:
    """Log weights with their largest replaced by what a Pareto tail expects, and each k-hat.

    Weights come back with maximum 0, not normalised. Raises ValueError under 25 particles.
    """
    N = log_weight.shape[1]
    M = tail_size(N)
    if M < 5:
        raise ValueError(f"{N} particles: at least 25 are needed to judge their weights")
    out = log_weight - log_weight.max(axis=1, keepdims=True)
    place = np.argpartition(out, N - M - 1, axis=1)[:, N - M - 1 :]
    values = np.take_along_axis(out, place, axis=1)
    order = np.argsort(values, axis=1, kind="stable")
    place, values = (np.take_along_axis(a, order, axis=1) for a in (place, values))
    cutoff = np.maximum(values[:, :1], np.log(np.finfo(float).tiny)).astype(float)
    tail = np.exp(values[:, 1:].astype(float)) - np.exp(cutoff)
    k, sigma = fit(np.maximum(tail, 0))
    p = (np.arange(1, M + 1) - 0.5) / M
    flat = ~(np.abs(k) > 1e-12) | np.isinf(k)
    safe = np.where(flat, 1.0, k)[:, None]
    quantiles = np.where(flat[:, None], -np.log1p(-p), np.expm1(-safe * np.log1p(-p)) / safe)
    smoothed = np.log(sigma[:, None] * quantiles + np.exp(cutoff))
    good = np.isfinite(k)[:, None] & np.isfinite(smoothed)
    smoothed = np.minimum(np.where(good, smoothed, values[:, 1:]), 0)
    np.put_along_axis(out, place[:, 1:], smoothed.astype(out.dtype), axis=1)
    return out, k


def fit(tail: Float[ndarray, "B M"]) -> tuple[Float[ndarray, " B"], Float[ndarray, " B"]]:
    """(k, σ) of a generalised Pareto distribution for each row of sorted exceedances.

    With the weak prior of k around 0.5 worth ten observations. k is inf where a row is constant.
    """
    M = tail.shape[1]
    grid = 30 + int(np.sqrt(M))
    quartile, largest = tail[:, int(M / 4 + 0.5) - 1], tail[:, -1]
    some = (quartile > 0) & (largest > 0)
    tail = np.where(some[:, None], tail, np.arange(1, M + 1) / M)
    quartile, largest = np.where(some, quartile, 0.25), np.where(some, largest, 1)
    b = 1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    b = b / (3 * quartile[:, None]) + 1 / largest[:, None]
    k = np.stack([np.log1p(-b[:, [g]] * tail).mean(axis=1) for g in range(grid)], axis=1)
    profile = M * (np.log(-b / k) - k - 1)
    weight = np.exp(profile - profile.max(axis=1, keepdims=True))
    weight = np.where(weight < 10 * np.finfo(float).eps * weight.sum(1, keepdims=True), 0, weight)
    b_mean = (b * weight).sum(axis=1) / weight.sum(axis=1)
    k_hat = np.log1p(-b_mean[:, None] * tail).mean(axis=1)
    sigma = -k_hat / b_mean
    k_hat = (M * k_hat + 5) / (M + 10)
    return np.where(some, k_hat, np.inf), sigma
