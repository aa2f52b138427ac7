"""Losses: of a linear predictor by name, or any function of θ and rows.

A loss is not a likelihood: only its minimiser and how it rises around it matter, and multiplying
it by a constant divides the calibrated learning rate by that constant (gibbs-calibration.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.special import expit

from hakari.inference.gibbs import loss_kernels as kernels

ONE = Lock()


@dataclass(frozen=True)
class LinearLoss:
    """l(θ; y, x) = ρ(y, x'θ). Made by `quantile`, `huber`, `hinge` and the like.

    smooth: whether the second derivative of ρ says how the risk curves (at kinks it does not).
    """

    name: str
    kind: int
    shape: float = 1.0
    smooth: bool = True


@dataclass(frozen=True)
class Loss:
    """Any loss: function(theta (d,), rows) -> losses (n,), one a row; rows are what you pass.

    np.inf says that theta is outside the loss's domain: the search for the minimum stays inside
    and the posterior has no mass there. nan is an error.

    batched: the function takes theta (M, d) and returns (M, n). gradient(theta (d,), rows) ->
    (n, d), if there is one: gradient samplers use it, the search for the minimum, and the sandwich
    if there is a curvature(theta (d,), rows) -> (d, d) too, of the total loss. jumps: whether the
    loss jumps, as 0-1 losses do, so that minimisers converge at the rate n^(−1/3). jax: what
    `from_jax` keeps for `nuts`.
    Negative log-likelihoods, composite and pseudo-likelihoods are losses as they are: one value
    for each row (or cluster) that a bootstrap may draw.
    """

    function: Callable[[ndarray, Any], Any]
    gradient: Callable[[ndarray, Any], Any] | None = None
    batched: bool = False
    name: str = "custom"
    jumps: bool = False
    curvature: Callable[[ndarray, Any], Any] | None = None
    jax: Any = field(default=None, repr=False)

    def values(self, theta: ndarray, rows: Any) -> ndarray:
        """Losses (M, n) of theta (M, d). Raises ValueError for another shape, or no numbers."""
        with _turn(self.function):
            if self.batched:
                found = np.asarray(self.function(theta, rows), dtype=float)
            else:
                found = np.stack([np.asarray(self.function(t, rows), dtype=float) for t in theta])
        if found.ndim != 2 or len(found) != len(theta):
            one = "(M, n) for theta (M, d)" if self.batched else "(n,) for theta (d,)"
            raise ValueError(f"loss {self.name!r} gave {found.shape}: it must return {one}")
        return found


def from_jax(function: Callable[[Any, Any], Any], name: str | None = None) -> Loss:
    """The loss of function(theta (d,), rows) -> losses (n,) written in jax.numpy.

    It is compiled, in double precision, and its gradient and curvature are exact; `nuts` takes no
    other. rows: an array, or tuples, lists and dicts of arrays; a DataFrame is the dict of its
    columns. They are copied when they are first used, so don't change them in place. name: by which
    messages know it, default the function's.
    Bradbury et al. (2018). Raises ModuleNotFoundError without the extra `jax`, and, when the loss
    is first used, ValueError for a function that JAX cannot compile or that computes in float32.

    >>> import jax.numpy as jnp
    >>> loss = from_jax(lambda theta, y: jnp.log(jnp.cosh(y - theta[0])), "log cosh")
    >>> loss.gradient(np.array([0.0]), np.array([0.0, 30.0])).ravel() + 0.0
    array([ 0., -1.])
    """
    _require("jax", "blackjax")
    from hakari.inference.gibbs.jax_loss import loss_of

    return loss_of(function, name)


def squared() -> LinearLoss:
    """(y − f)²/2: least squares, and minus the Gaussian log-likelihood of unit variance."""
    return LinearLoss("squared", kernels.SQUARED)


def quantile(tau: float = 0.5) -> LinearLoss:
    """(y − f)(τ − 1{y < f}): the conditional quantile (Koenker and Bassett, 1978)."""
    return LinearLoss(f"quantile({tau:g})", kernels.QUANTILE, _share("tau", tau), smooth=False)


def expectile(tau: float = 0.5) -> LinearLoss:
    """|τ − 1{y < f}| (y − f)²: the conditional expectile (Newey and Powell, 1987)."""
    return LinearLoss(f"expectile({tau:g})", kernels.EXPECTILE, _share("tau", tau))


def huber(delta: float = 1.345) -> LinearLoss:
    """r²/2 up to |r| = delta, linear beyond, with r = y − f in the units of y (Huber, 1964)."""
    return LinearLoss(f"huber({delta:g})", kernels.HUBER, _positive("delta", delta))


def logistic() -> LinearLoss:
    """log(1 + exp f) − y f of y in {0, 1}."""
    return LinearLoss("logistic", kernels.LOGISTIC)


def poisson() -> LinearLoss:
    """exp(f) − y f of counts, or of anything not negative whose mean is exp(f)."""
    return LinearLoss("poisson", kernels.POISSON)


def hinge() -> LinearLoss:
    """max(0, 1 − y f) of classes −1 and 1 (or 0 and 1): the support vector machine's."""
    return LinearLoss("hinge", kernels.HINGE, smooth=False)


def threshold() -> Loss:
    """1{y ≠ sign(x − θ)} of rows (x, y), y in {−1, 1}: the minimum clinically important difference.

    It jumps, so that its minimiser has a cube-root rate (Syring and Martin, 2017).
    """
    return Loss(_wrong_side, batched=True, name="threshold", jumps=True)


def smooth_threshold(bandwidth: float) -> Loss:
    """1/(1 + exp(y (x − θ)/bandwidth)): `threshold`, smoothed; bandwidth in the units of x."""
    width = _positive("bandwidth", bandwidth)

    def value(theta: ndarray, rows: Any) -> ndarray:
        x, y = rows
        return np.asarray(expit(-y * (x - theta) / width))

    return Loss(value, batched=True, name=f"smooth_threshold({bandwidth:g})")


def _turn(function: Any) -> AbstractContextManager[Any]:
    """Lets one thread at a time into a parallel function of Numba, which uses all cores itself.

    Two at once end the process where Numba's pool of threads is the portable one, `workqueue`.
    """
    options = getattr(function, "targetoptions", {})
    return ONE if options.get("parallel") else nullcontext()


def _require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(
                f"{package} is not installed: pip install 'hakari[jax]'", name=package
            )


def _wrong_side(theta: ndarray, rows: Any) -> ndarray:
    x, y = rows
    return np.asarray(y * (x - theta) <= 0, dtype=float)


def classes(loss: LinearLoss, y: ndarray) -> ndarray:
    """Y as the loss wants it: −1 and 1 for classes. Raises ValueError for values it cannot take."""
    if loss.kind in (kernels.HINGE, kernels.LOGISTIC):
        found = np.unique(y)
        if len(found) > 2 or not ({*found} <= {0.0, 1.0} or {*found} <= {-1.0, 1.0}):
            raise ValueError(
                f"{loss.name} needs two classes, 0 and 1 or -1 and 1; y has {_shown(found)}"
            )
        positive = (y > 0).astype(float)
        return 2 * positive - 1 if loss.kind == kernels.HINGE else positive
    if loss.kind == kernels.POISSON and (y < 0).any():
        raise ValueError(f"poisson needs y of at least 0; it has {y.min():g}")
    return y


def _shown(values: Sequence[float] | ndarray) -> str:
    few = ", ".join(f"{v:g}" for v in values[:4])
    return few + (", ..." if len(values) > 4 else "")


def _share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} {value}: give a share between 0 and 1")
    return float(value)


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} {value}: give a number above 0")
    return float(value)
