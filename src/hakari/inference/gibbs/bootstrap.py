"""Bootstrap data as weights of rows: a matrix (B, n), drawn once and used at every learning rate.

Row b is how often each row of the data stands in data set b. All schemes but m-out-of-n have the
weight n in all, in the mean over data sets.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

Scheme = Literal["multinomial", "bayesian", "block", "cluster", "m-out-of-n"]
SCHEMES = ("multinomial", "bayesian", "block", "cluster", "m-out-of-n")


def draw_weights(
    scheme: Scheme,
    n: int,
    replicates: int,
    generator: Generator,
    *,
    clusters: ndarray | None = None,
    block: int | None = None,
    m: int | None = None,
) -> Float[ndarray, "B n"]:
    """Weights (B, n), single precision.

    multinomial: n rows with replacement (Efron, 1979). bayesian: exponential weights with the sum
    n (Rubin, 1981): smoother, no row is left out. block: the stationary bootstrap of rows in the
    order of time, blocks of `block` rows in the mean (Politis and Romano, 1994; default
    n^(1/3) rounded up). cluster: whole clusters with replacement. m-out-of-n: m rows with
    replacement (default n^(2/3)). Raises ValueError for settings that do not fit the scheme.
    """
    check_scheme(scheme, n, clusters, block, m)
    if scheme == "bayesian":
        w = generator.standard_exponential((replicates, n), dtype=np.float32)
        return np.asarray(w * (n / w.sum(axis=1, keepdims=True)), dtype=np.float32)
    if scheme == "block":
        return _stationary(n, replicates, generator, block or default_block(n))
    if clusters is not None:
        names, group = np.unique(clusters, return_inverse=True)
        return _counts(len(names), replicates, len(names), generator)[:, group]
    size = n if scheme == "multinomial" else (m or default_m(n))
    return _counts(n, replicates, size, generator)


def default_block(n: int) -> int:
    """Mean length of a block: n^(1/3), rounded up."""
    return max(1, int(np.ceil(n ** (1 / 3))))


def default_m(n: int) -> int:
    """Rows of an m-out-of-n data set: n^(2/3), rounded up, at least 20 where there are."""
    return min(n, max(20, int(np.ceil(n ** (2 / 3)))))


def check_scheme(
    scheme: str, n: int, clusters: ndarray | None, block: int | None, m: int | None
) -> None:
    """Raise ValueError for an unknown scheme, or settings that do not fit it."""
    if scheme not in SCHEMES:
        raise ValueError(f"bootstrap {scheme!r} is unknown: use one of {', '.join(SCHEMES)}")
    if scheme == "cluster" and clusters is None:
        raise ValueError(
            "bootstrap 'cluster' needs clusters: give the posterior clusters=[...], a label a row"
        )
    if scheme != "cluster" and clusters is not None:
        raise ValueError(f"clusters are for bootstrap='cluster', not {scheme!r}")
    if clusters is not None and len(clusters) != n:
        raise ValueError(f"{len(clusters)} cluster labels for {n} rows")
    if clusters is not None and len(np.unique(clusters)) < 10:
        raise ValueError(
            f"{len(np.unique(clusters))} clusters: at least 10 are needed to draw from"
        )
    for name, value, owner in (("block", block, "block"), ("m", m, "m-out-of-n")):
        if value is not None and scheme != owner:
            raise ValueError(f"{name}={value} is only for bootstrap={owner!r}")
        if value is not None and not 1 <= value <= n:
            raise ValueError(f"{name}={value}: give a number of rows from 1 to {n}")


def _counts(n: int, replicates: int, size: int, generator: Generator) -> ndarray:
    out = np.empty((replicates, n), dtype=np.float32)
    for row in out:
        row[:] = np.bincount(generator.integers(0, n, size), minlength=n)
    return out


def _stationary(n: int, replicates: int, generator: Generator, block: int) -> ndarray:
    out = np.empty((replicates, n), dtype=np.float32)
    for row in out:
        new = generator.random(n) < 1 / block
        new[0] = True
        begin = np.flatnonzero(new)
        first = generator.integers(0, n, len(begin))
        at = first[np.cumsum(new) - 1] + np.arange(n) - begin[np.cumsum(new) - 1]
        row[:] = np.bincount(at % n, minlength=n)
    return out
