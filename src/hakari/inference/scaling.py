"""Working columns: centred where there is a constant, scaled, the outcome's fit taken away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.design import Block


@dataclass(frozen=True)
class Scale:
    """The working columns: C̃_i = left C_i right, left (L, L) and right (K+1, K+1) invertible."""

    left: Float[ndarray, "L L"]
    right: Float[ndarray, "P P"]


def first_scale(block: Block) -> Scale:
    """Centre on a constant column where there is one, scale, and take the outcome's fit away.

    The covariance is a difference of outcome and fit: with an R² near one the tensor of the
    outcome itself would lose the residual's digits, so its column holds a first residual.
    """
    W = np.column_stack([block.y, block.X])
    right = _scaling(W, regressors=1).T
    scaled = W @ right
    fit = np.linalg.lstsq(scaled[:, 1:], scaled[:, 0], rcond=1e-10)[0]
    right[:, 0] -= right[:, 1:] @ fit
    right[:, 0] /= max(float((W @ right[:, 0]).std()), 1e-8)
    return Scale(_scaling(block.Z), right)


def _scaling(columns: Float[ndarray, "n S"], regressors: int = 0) -> Float[ndarray, "S S"]:
    """M with M @ row = the row centred and scaled, by a constant column if there is one.

    Only columns from `regressors` on can serve as the constant: the outcome cannot.
    """
    mean, spread = columns.mean(axis=0), columns.std(axis=0)
    flat = spread <= 1e-12 * np.abs(mean)
    constants = np.flatnonzero(flat & (mean != 0) & (np.arange(len(mean)) >= regressors))
    size = or_one(np.sqrt((columns**2).mean(axis=0)))
    if not len(constants):
        return np.diag(1 / size)
    constant = int(constants[0])
    scale = np.where(flat, size, or_one(spread))
    matrix = np.diag(1 / scale)
    move = np.where(flat, 0.0, -mean / (mean[constant] * scale))
    matrix[:, constant] += move
    matrix[constant, constant] = 1 / mean[constant]
    return matrix


def or_one(size: ndarray) -> ndarray:
    """The sizes, one where a size is no divisor."""
    return np.where((size > 0) & np.isfinite(size), size, 1.0)
