"""Is exp(−η loss) times the prior a density? Where a loss stays bounded, a flat prior is none.

Of convex losses of a linear predictor it is decided: the total loss can be integrated if and only
if its recession function is positive in every direction that no prior closes (Rockafellar, 1970,
section 8), and what a direction v does to each row is known: squared, expectile, Huber's and check
loss grow wherever Xv is not 0, logistic and hinge loss unless v separates the classes, Poisson's
unless v only lowers the means of rows with y = 0. Of any other function rays far out are looked at.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import linprog

from hakari.inference.gibbs import loss_kernels as kernels
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gibbs.risk import LinearRisk
from hakari.inference.gibbs.target import Target, free_positions

RADII = 10.0 ** np.arange(2, 7)  # in standard deviations of the Gaussian form
LEAST = 0.05  # power of the radius by which a shell's mass must fall far out


def refuse_bounded(posterior: GibbsPosterior) -> None:
    """Raise ValueError where a loss of a linear predictor has a direction without growth."""
    risk, free = posterior.risk, free_positions(posterior)
    if not isinstance(risk, LinearRisk) or not free:
        return
    used = slice(None) if risk.weights is None else risk.weights > 0
    X, y = risk.X[used][:, free], risk.y[used]
    size = np.sqrt((X**2).mean(axis=0))
    size[size == 0] = 1.0
    direction = _bounded_direction(risk.loss.kind, X / size, y)
    if direction is not None:
        share = np.abs(direction) / np.abs(direction).max()
        named = [risk.names[k] for k, s in zip(free, share, strict=True) if s > 1e-3]
        raise ValueError(_refusal(posterior, named, f"{_reason(risk.loss.kind)}, so that "))


def refuse_without_growth(target: Target) -> None:
    """Raise ValueError where the mass of a function's posterior does not fall along some ray."""
    posterior = target.posterior
    if isinstance(posterior.risk, LinearRisk) or not free_positions(posterior):
        return
    rays = _rays(target)
    mass = _shell_masses(target, rays)
    if mass.shape[1] < 2:
        return  # the function has no values there
    falls = mass[:, -1] < mass[:, -2] - LEAST * np.log(10)
    falls |= ~np.isfinite(mass[:, -1])
    if not falls.all():
        move = np.abs(target.factor @ rays[int(np.argmin(falls))])
        share = move / np.sqrt((target.factor**2).sum(axis=1))
        named = [n for n, s in zip(posterior.parameters, share, strict=True) if s > 0.1]
        raise ValueError(_refusal(posterior, named, ""))


# --- parts --------------------------------------------------------------------------------


def _bounded_direction(
    kind: int, X: Float[ndarray, "n f"], y: Float[ndarray, " n"]
) -> Float[ndarray, " f"] | None:
    """A direction along which no row's loss grows without end; None if there is none."""
    gone = _null(X)
    if gone.shape[1]:
        return gone[:, 0]
    if kind in (kernels.LOGISTIC, kernels.HINGE):
        return _one_sided(X * np.where(y > 0, 1.0, -1.0)[:, None])
    if kind == kernels.POISSON:
        still = _null(X[y > 0])  # what leaves the rows with counts alone
        found = _one_sided(-X[y == 0] @ still) if still.shape[1] else None
        return None if found is None else still @ found
    return None


def _null(X: Float[ndarray, "n f"]) -> Float[ndarray, "f k"]:
    """Directions that X takes to 0."""
    values, vectors = np.linalg.eigh(X.T @ X)
    return np.asarray(vectors[:, values <= 1e-12 * max(len(X), 1)])


def _one_sided(A: Float[ndarray, "n f"]) -> Float[ndarray, " f"] | None:
    """A direction v with A v ≥ 0 and not 0, by a linear program; None if there is none."""
    gain = A.mean(axis=0)
    f = A.shape[1]
    found = linprog(-gain, A_ub=-A, b_ub=np.zeros(len(A)), bounds=[(-1, 1)] * f, method="highs")
    if found.status != 0:
        return None
    value = A @ found.x
    lost = -np.minimum(value, 0).sum()
    return np.asarray(found.x) if value.sum() > 1e5 * lost and value.max() > 1e-6 else None


def _rays(target: Target) -> Float[ndarray, "R d"]:
    """Unit rays in u, both ways: axes of the form, each coefficient alone and with the others."""
    alone = np.linalg.inv(target.factor).T
    both = np.concatenate([np.eye(target.d), alone, target.factor])
    both = both / np.linalg.norm(both, axis=1)[:, None]
    return np.concatenate([both, -both])


def _shell_masses(target: Target, rays: Float[ndarray, "R d"]) -> Float[ndarray, "R S"]:
    """Log density plus d log radius along each ray, at the radii where the loss has values."""
    found = []
    for radius in RADII:
        try:
            with np.errstate(all="ignore"):
                found.append(target.log_density(radius * rays) + target.d * np.log(radius))
        except (ValueError, ArithmeticError):
            break
    return np.column_stack(found) if found else np.empty((len(rays), 0))


def _reason(kind: int) -> str:
    if kind in (kernels.LOGISTIC, kernels.HINGE):
        return "a combination of them separates the classes"
    if kind == kernels.POISSON:
        return "a combination of them lowers only means of rows with y = 0"
    return "a combination of them is 0 in every row"


def _refusal(posterior: GibbsPosterior, named: list[str], reason: str) -> str:
    return (
        f"the posterior is improper under this prior: along {', '.join(named)} "
        f"{reason}the {posterior.risk.loss.name} loss does not grow and exp(-loss) cannot be "
        f"integrated. Give {', '.join(named)} a proper prior, such as a normal one"
    )
