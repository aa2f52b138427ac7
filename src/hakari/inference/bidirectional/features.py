"""Feature maps φ(x) of covariates: random Fourier features of a Gaussian kernel, and polynomials.

A specification is fitted to a warm-up sample and gives a basis, which maps rows to features. Only
numbers that cannot be drawn again are kept: frequencies follow from the seed. Design note
bidirectional-effects, section 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import combinations_with_replacement
from math import comb, isfinite
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from numpy import ndarray

from hakari.inference.bidirectional.feature_kernels import (
    fill_fourier,
    fill_polynomial,
    spectrum,
)
from hakari.inference.bidirectional.relevance import median_distance, relevance

WIDEST = 5000  # features of a polynomial
FENCE = 0.25  # of the range of 98 % of the warm-up, beyond which covariates are cut
ARRAYS = {"low", "high", "centre", "scale", "length_scales"}  # what a basis has learned


@dataclass(frozen=True)
class RandomFourier:
    """Cosines and sines of random projections: a Gaussian kernel, made linear.

    count: number of cosines and sines together, even; the kernel's error falls as count^(−1/2).
    seed: of the frequencies. length_scale: distance in standard deviations of a covariate over
    which functions bend: "relevance", one a covariate, learned with the targets, and none for
    covariates that do not matter; "median", the median distance of two rows; a number; or a number
    a covariate, inf leaving one out. orthogonal: directions orthogonal in blocks, which lowers
    the error. Raises ValueError for a count, seed or length scale that is none.

    Source: Rahimi and Recht (2007); Yu, Suresh, Choromanski, Holtmann-Rice and Kumar (2016).

    >>> X = np.random.default_rng(0).standard_normal((500, 2))
    >>> RandomFourier(100, length_scale=1.5).fit(X).transform(X).shape
    (500, 103)
    """

    count: int = 200
    seed: int = 0
    length_scale: str | float | tuple[float, ...] = "relevance"
    orthogonal: bool = True

    def __post_init__(self) -> None:
        _whole("count", self.count, 2)
        _whole("seed", self.seed, 0)
        if self.count % 2:
            raise ValueError(f"count {self.count}: cosines and sines come in pairs, give it even")
        given = self.length_scale
        if isinstance(given, str):
            fine = given in ("relevance", "median")
        elif isinstance(given, tuple):
            fine = all(v > 0 for v in given) and any(isfinite(v) for v in given)
        else:
            number = isinstance(given, int | float | np.number)
            fine = number and given > 0 and isfinite(given)
        if not fine:
            raise ValueError(
                f"length_scale {given!r}: give 'relevance', 'median', a number above 0, "
                "or a tuple of them, one a covariate, inf for those to leave out"
            )

    def fit(
        self,
        X: Float[ndarray, "n p"],
        targets: Float[ndarray, "n t"] | None = None,
        names: Sequence[str] | None = None,
    ) -> FourierBasis:
        """Learn centres, scales and length scales from a warm-up sample.

        targets: what the features are to explain, for "relevance" alone. names: of the covariates,
        for messages; None counts them from 0. Raises ValueError for a column that is constant or
        not finite, for targets that are missing, and for length scales that are not p.
        """
        X, names = _warm_up(X, names)
        low, high = fences(X)
        X = np.clip(X, low, high)
        centre, scale = X.mean(axis=0), X.std(axis=0)
        scales, note = _length_scales(self, (X - centre) / scale, targets, names)
        learned = (low, high, centre, scale, scales, note)
        return FourierBasis(self.count, self.seed, self.orthogonal, names, *learned)


@dataclass(frozen=True, eq=False)
class FourierBasis:
    """Features [1, z, sqrt(2/count) cos(z'w), sqrt(2/count) sin(z'w)], z = (x − centre)/scale.

    Only covariates of a finite length scale are in z: the others cost accuracy, as linear terms
    too. low, high: where covariates are cut, see `fences`. length_scales: in standard deviations.
    note: how they were found.
    """

    count: int
    seed: int
    orthogonal: bool
    names: tuple[str, ...]
    low: Float[ndarray, " p"]
    high: Float[ndarray, " p"]
    centre: Float[ndarray, " p"]
    scale: Float[ndarray, " p"]
    length_scales: Float[ndarray, " p"]
    note: str = ""

    @cached_property
    def columns(self) -> Int[ndarray, " d"]:
        """Indices of the covariates that are used."""
        return np.flatnonzero(np.isfinite(self.length_scales))

    @cached_property
    def frequencies(self) -> Float[ndarray, "p half"]:
        """Angles a standard deviation of each covariate; 0 of those that are not used."""
        found = np.zeros((len(self.names), self.count // 2))
        unit = spectrum(len(self.columns), self.count // 2, self.seed, self.orthogonal)
        found[self.columns] = unit / self.length_scales[self.columns, None]
        return found

    @property
    def size(self) -> int:
        """Number of features."""
        return 1 + len(self.columns) + self.count

    def transform(
        self, X: Float[ndarray, "n p"], out: Float32[ndarray, "n size"] | None = None
    ) -> Float32[ndarray, "n size"]:
        """Features of each row, in rows; `out`: where to write them.

        Raises ValueError for another number of columns, and for values that are not finite.
        """
        X, out = _rows(self, X), _room(out, len(X), self.size)
        used = self.columns
        centre, scale, waves = self.centre[used], self.scale[used], self.frequencies[used]
        fill_fourier(X, used, centre, scale, waves, out, self.names)
        return out

    def to_dict(self) -> dict[str, Any]:
        """What `basis_from_dict` makes the basis from again, as JSON takes it (null: left out)."""
        return {"kind": "random-fourier"} | _plain(self)


@dataclass(frozen=True)
class Polynomial:
    """Monomials of standardised covariates up to a degree.

    interactions: whether products of different covariates are among them; with many covariates
    there are too many. Raises ValueError for a degree under 1.

    >>> X = np.random.default_rng(0).standard_normal((500, 2))
    >>> Polynomial(2).fit(X).transform(X).shape  # 1, x, y, xx, xy, yy
    (500, 6)
    """

    degree: int = 2
    interactions: bool = True

    def __post_init__(self) -> None:
        _whole("degree", self.degree, 1)

    def fit(
        self,
        X: Float[ndarray, "n p"],
        targets: Float[ndarray, "n t"] | None = None,
        names: Sequence[str] | None = None,
    ) -> PolynomialBasis:
        """Learn centres and scales from a warm-up sample; the targets are not looked at.

        Raises ValueError for a column that is constant or not finite, and for more than 5,000
        features.
        """
        X, names = _warm_up(X, names)
        p = len(names)
        size = comb(p + self.degree, p) if self.interactions else 1 + p * self.degree
        if size > WIDEST:
            way_out = "set interactions=False" if self.interactions else "lower the degree"
            raise ValueError(
                f"{size} monomials of degree {self.degree} in {p} covariates, more than {WIDEST}: "
                f"{way_out}, or use RandomFourier"
            )
        low, high = fences(X)
        X = np.clip(X, low, high)
        learned = (low, high, X.mean(axis=0), X.std(axis=0))
        return PolynomialBasis(self.degree, self.interactions, names, *learned)


@dataclass(frozen=True, eq=False)
class PolynomialBasis:
    """Features: monomials of z = (x − centre)/scale by rising degree, the first of them 1.

    low, high: where covariates are cut, see `fences`.
    """

    degree: int
    interactions: bool
    names: tuple[str, ...]
    low: Float[ndarray, " p"]
    high: Float[ndarray, " p"]
    centre: Float[ndarray, " p"]
    scale: Float[ndarray, " p"]
    note: str = ""

    @cached_property
    def steps(self) -> Int[ndarray, "size 2"]:
        """(j, k) of each monomial: it is the monomial j before it times z_k."""
        place: dict[tuple[int, ...], int] = {(): 0}
        steps = [(0, 0)]
        for degree in range(1, self.degree + 1):
            for factors in _factors(len(self.names), degree, self.interactions):
                place[factors] = len(steps)
                steps.append((place[factors[:-1]], factors[-1]))
        return np.array(steps, dtype=np.int64)

    @property
    def size(self) -> int:
        """Number of features."""
        return len(self.steps)

    def transform(
        self, X: Float[ndarray, "n p"], out: Float32[ndarray, "n size"] | None = None
    ) -> Float32[ndarray, "n size"]:
        """Features of each row, as `FourierBasis.transform`."""
        X, out = _rows(self, X), _room(out, len(X), self.size)
        used = np.arange(len(self.names))
        fill_polynomial(X, used, self.centre, self.scale, self.steps, out, self.names)
        return out

    def to_dict(self) -> dict[str, Any]:
        """What `basis_from_dict` makes the basis from again, as JSON takes it."""
        return {"kind": "polynomial"} | _plain(self)


Features = RandomFourier | Polynomial
Basis = FourierBasis | PolynomialBasis


def basis_from_dict(record: dict[str, Any]) -> Basis:
    """The basis that `to_dict` of either kind wrote down, equal in every bit.

    Raises ValueError for a kind that is unknown.

    >>> basis = RandomFourier(20, length_scale=1.0).fit(np.arange(8.0).reshape(4, 2) ** 2)
    >>> bool((basis_from_dict(basis.to_dict()).frequencies == basis.frequencies).all())
    True
    """
    kinds: dict[str, type[Basis]] = {"random-fourier": FourierBasis, "polynomial": PolynomialBasis}
    kind = record.get("kind")
    if kind not in kinds:
        raise ValueError(f"a basis of kind {kind!r}: known are {', '.join(kinds)}")
    made = {name: value for name, value in record.items() if name != "kind"}
    made["names"] = tuple(made["names"])
    for name in ARRAYS & made.keys():
        made[name] = np.array([np.inf if v is None else v for v in made[name]], dtype=float)
    return kinds[kind](**made)


def fences(X: Float[ndarray, "n p"]) -> tuple[Float[ndarray, " p"], Float[ndarray, " p"]]:
    """Where covariates are cut, so that a mistyped one, or one far beyond all, is not followed.

    A quarter of the range of 98 % of the rows beyond it; at the extremes, where these rows are
    alike. Functions are flat from there on.
    """
    first, last = np.quantile(X, [0.01, 0.99], axis=0)
    room = FENCE * (last - first)
    low = np.where(room > 0, first - room, X.min(axis=0))
    return low, np.where(room > 0, last + room, X.max(axis=0))


def _plain(basis: Basis) -> dict[str, Any]:
    found = {field.name: getattr(basis, field.name) for field in fields(basis)}
    found["names"] = list(basis.names)
    for name in ARRAYS & found.keys():
        found[name] = [float(v) if isfinite(v) else None for v in found[name]]
    return found


# --- checks, and what is learned ---------------------------------------------------------------


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} {value!r}: a whole number of at least {least} is needed")


def _warm_up(X: ndarray, names: Sequence[str] | None) -> tuple[ndarray, tuple[str, ...]]:
    """X in double precision and names of its columns, or ValueError."""
    X = np.asarray(X, dtype=float)
    if X.ndim != 2 or len(X) < 2 or not X.shape[1]:
        raise ValueError(
            f"a warm-up sample of shape {X.shape}: give (rows, covariates), 2 rows or more"
        )
    names = tuple(str(k) for k in range(X.shape[1])) if names is None else tuple(names)
    if len(names) != X.shape[1]:
        raise ValueError(f"{len(names)} names for {X.shape[1]} covariates: give one for each")
    for k in np.flatnonzero(~np.isfinite(X).all(axis=0)):
        row = int(np.flatnonzero(~np.isfinite(X[:, k]))[0])
        raise ValueError(
            f"covariate {names[k]} is {X[row, k]} in row {row}: drop the row or fill it in"
        )
    for k in np.flatnonzero(np.ptp(X, axis=0) == 0):
        raise ValueError(f"covariate {names[k]} is {X[0, k]:g} in all rows: leave it out")
    return X, names


def _rows(basis: Basis, X: ndarray) -> ndarray:
    """X with covariates cut."""
    X = np.asarray(X)
    if X.ndim != 2 or X.shape[1] != len(basis.names):
        raise ValueError(f"rows of shape {X.shape}: the basis has {len(basis.names)} covariates")
    if (X.min(axis=0, initial=np.inf) >= basis.low).all() and (
        X.max(axis=0, initial=-np.inf) <= basis.high
    ).all():
        return X
    return np.where(np.isfinite(X), np.clip(X, basis.low, basis.high), X)


def _room(out: ndarray | None, n: int, size: int) -> ndarray:
    if out is None:
        return np.empty((n, size), dtype=np.float32)
    if out.shape != (n, size) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out {out.shape} of {out.dtype}: give ({n}, {size}) of float32, in rows")
    return out


def _length_scales(
    spec: RandomFourier, Z: ndarray, targets: ndarray | None, names: tuple[str, ...]
) -> tuple[Float[ndarray, " p"], str]:
    """Length scale of each standardised covariate, and how it was found."""
    given, p = spec.length_scale, len(names)
    if isinstance(given, tuple):
        if len(given) != p:
            raise ValueError(f"{len(given)} length scales for {p} covariates: give one for each")
        return np.array(given, dtype=float), "length scales as given"
    if not isinstance(given, str):
        return np.full(p, float(given)), "length scale as given"
    if given == "relevance":
        if targets is None:
            raise ValueError("length_scale 'relevance' needs targets: give them, or use 'median'")
        scales = relevance(Z, targets, spec.seed)
        used = [name for name, scale in zip(names, scales, strict=True) if np.isfinite(scale)]
        if used:
            return scales, f"{len(used)} of {p} covariates matter: {', '.join(used)}"
    median = np.full(p, median_distance(Z, spec.seed))
    if given == "relevance":
        return median, "no covariate was found to matter: all are kept, at the median distance"
    return median, "length scale: the median distance"


def _factors(p: int, degree: int, interactions: bool) -> list[tuple[int, ...]]:
    if interactions:
        return list(combinations_with_replacement(range(p), degree))
    return [(k,) * degree for k in range(p)]
