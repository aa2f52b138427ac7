"""Rows of a design and the names of its columns, and what is refused about either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray


@dataclass(frozen=True)
class Names:
    """Names of the parameters (K) and the moments (L); `endogenous` are parameters."""

    parameters: tuple[str, ...]
    moments: tuple[str, ...]
    endogenous: tuple[str, ...] = ()
    dependent: str = "y"

    @property
    def excluded(self) -> tuple[str, ...]:
        """Instruments that are not regressors."""
        return tuple(name for name in self.moments if name not in self.parameters)


@dataclass(frozen=True)
class Block:
    """Rows of a design: y (n,), X (n, K), Z (n, L), weights (n,) and clusters (n,) or None."""

    y: ndarray
    X: ndarray
    Z: ndarray
    weights: ndarray | None
    clusters: ndarray | None


def cut(block: Block, rows: int) -> Iterator[Block]:
    """The block in pieces of at most `rows` rows."""
    parts = (block.y, block.X, block.Z, block.weights, block.clusters)
    for start in range(0, len(block.y), rows):
        yield Block(*(None if p is None else p[start : start + rows] for p in parts))  # type: ignore[arg-type]


def stack_blocks(blocks: list[Block]) -> Block:
    """One block of all rows, without cluster labels."""
    weights = [b.weights for b in blocks if b.weights is not None]
    return Block(
        np.concatenate([b.y for b in blocks]),
        np.vstack([b.X for b in blocks]),
        np.vstack([b.Z for b in blocks]),
        np.concatenate(weights) if weights else None,
        None,
    )


def array_names(
    X: ndarray, Z: ndarray, names: Sequence[str] | None, instruments: Sequence[str] | None
) -> Names:
    """Names of arrays' columns; an instrument equal to a regressor bears its name."""
    regressors = list(names) if names is not None else [f"x{k}" for k in range(X.shape[1])]
    if len(regressors) != X.shape[1]:
        raise ValueError(f"{len(regressors)} names for {X.shape[1]} columns of X")
    if instruments is None:
        instruments = []
        for index in range(Z.shape[1]):
            same = [k for k in range(X.shape[1]) if np.array_equal(Z[:, index], X[:, k])]
            instruments.append(regressors[same[0]] if same else f"z{index}")
    endogenous = [name for name in regressors if name not in instruments]
    return Names(tuple(regressors), tuple(instruments), tuple(endogenous))


def check_counts(names: Names, L: int, K: int) -> None:
    """Raise ValueError unless K distinct parameters have at least as many moments."""
    if len(names.parameters) != K or len(names.moments) != L:
        raise ValueError(
            f"{len(names.parameters)} names for {K} parameters and {len(names.moments)} for {L} "
            "moments"
        )
    for label in (names.parameters, names.moments):
        twice = {name for name in label if label.count(name) > 1}
        if twice:
            raise ValueError(f"name {sorted(twice)[0]!r} appears twice: {', '.join(label)}")
    if L < K:
        raise ValueError(
            f"{L} instruments for {K} parameters: add {K - L} instrument{'s' * (K - L > 1)} or "
            f"drop a regressor (instruments: {', '.join(names.moments)}; "
            f"regressors: {', '.join(names.parameters)})"
        )


def refuse_not_finite(names: Names, block: Block, first_row: int = 0) -> None:
    """Raise ValueError that names the first column and row with a value that is not finite."""
    parts = [
        ((names.dependent,), block.y[:, None]),
        (names.parameters, block.X),
        (names.moments, block.Z),
    ]
    for labels, matrix in parts:
        bad = ~np.isfinite(matrix)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise ValueError(
                f"{labels[column]} is {matrix[row, column]} in row {first_row + int(row) + 1} "
                f"(counting from 1), one of {int(bad[:, column].sum())} rows where it is not "
                "finite: drop or fill them first"
            )


def checked_weights(weights: ndarray) -> ndarray:
    """The weights; raises ValueError unless they are finite and at least 0."""
    if not np.isfinite(weights).all() or (weights < 0).any():
        worst = weights[~(np.isfinite(weights) & (weights >= 0))][0]
        raise ValueError(f"weight {worst}: weights must be finite and at least 0")
    return weights


def refuse_collinear(gram: ndarray, names: Sequence[str], what: str) -> None:
    """Raise ValueError that names the columns of `what` that depend on each other."""
    size = np.sqrt(np.diag(gram))
    for name, value in zip(names, size, strict=True):
        if value == 0:
            raise ValueError(f"{name} is zero in every row: drop it from the {what}")
    values, vectors = np.linalg.eigh(gram / np.multiply.outer(size, size))
    if values[0] <= 1e-11 * len(names):
        raise ValueError(
            f"collinear {what}: {involved(vectors[:, 0], names)} are linearly dependent "
            f"(condition number {np.sqrt(values[-1] / max(values[0], 1e-300)):.1e}); drop one"
        )


def involved(vector: ndarray, names: Sequence[str]) -> str:
    """Names of the entries that matter in a vector."""
    weight = np.abs(vector)
    return ", ".join(n for n, w in zip(names, weight, strict=True) if w > 1e-3 * weight.max())
