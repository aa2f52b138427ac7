"""Steps of online quasi-maximum likelihood: Gaussian gradients of effects and heads by batch.

Means and log variances are linear in the features; effects and heads move together after each
batch. Written in residuals W_j = y_j − E[y_j|x] of the reduced form, with ε1 = W1 − a W2 and
ε2 = W2 − b W1, the objective keeps errors in the means out of the effects to first order. Steps
are scaled by the information: heads by the features' second moments and the mean precision,
effects by the variances' ratio, so that one rate serves all. Estimates are averages of what the
steps pass once they have become stationary.

Source: the estimator of arXiv 2511.05050 in the form of the design note bidirectional-effects,
sections 2.4 and 2.6 A, which is not the paper's own code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32
from numpy import ndarray

from hakari.inference.bidirectional.heads import Grams, folds_of, ridge
from hakari.inference.bidirectional.nuisance import FOLDS, Nuisance
from hakari.inference.bidirectional.rows import Rows

SETTLING = 100  # steps after which rates begin to fall
MEMORY = 0.05  # weight of a batch in the running curvature of the effects
LEAST_D = 0.02  # 1 − ab is taken for at least this in gradients, where the likelihood has its pole
LONGEST = 0.1  # change of an effect in one step, in units of the outcomes
OUTLYING = 30.0  # pull of one row on a head, in units of its curvature, beyond which it is cut
FIRST = 20  # steps before which the test of stationarity is not asked
RECENT = 0.95  # what is left after a step of the products that the test adds


@dataclass(frozen=True)
class OnlineSettings:
    """How steps are made.

    batch: rows of a step. epochs: passes over data that can be read again. head_rate, effect_rate:
    first step as a share of a Newton step; decay: rates fall as (1 + steps/100)^−decay. beta: heads
    weigh rows by s_j^(2 beta) (Seitzer, Tavakoli, Antic and Martius, 2022); the effects' score is
    never weighted, since its Jacobian then would have to be. reach: how far log variances may go
    from that of the residuals. orthogonal: effects move by the efficient score, to which errors in
    the variances do not matter; else by the derivative of the likelihood. Raises ValueError for
    numbers out of range.

    >>> OnlineSettings(beta=0.5).batch
    256
    """

    batch: int = 256
    epochs: int = 20
    head_rate: float = 0.2
    effect_rate: float = 0.2
    decay: float = 0.6
    beta: float = 0.0
    reach: float = 5.0
    orthogonal: bool = True

    def __post_init__(self) -> None:
        ranges = {
            "batch": (16, 65_536),
            "epochs": (1, 10_000),
            "head_rate": (1e-6, 1.0),
            "effect_rate": (1e-6, 1.0),
            "decay": (0.0, 1.0),
            "beta": (0.0, 1.0),
            "reach": (0.5, 20.0),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} {value!r}: give a number from {low:g} to {high:g}")


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Directions of the features in which all curvatures are alike, from warm-up rows.

    A head's coefficients are vectors @ (scale · its coordinates). shrink: what the head's ridge
    penalty adds to its gradient in a coordinate when it has learned from `rows` rows, those of the
    warm-up; with more it counts less. low, high: bounds of log variances.
    """

    vectors: Float32[ndarray, "P P"]
    scale: Float[ndarray, "P 4"]
    shrink: Float[ndarray, "P 4"]
    rows: int
    low: float
    high: float

    @cached_property
    def freedom(self) -> float:
        """Effective number of coefficients of a head, the most of the four."""
        return float((1 - self.shrink).sum(axis=0).max())


@dataclass(frozen=True, eq=False)
class OnlineState:
    """All that the next step needs, in the nuisance's units.

    heads: coordinates of both means and both log variances. curvature: running E s2²/s1² and
    E s1²/s2², as predicted. mean_heads, mean_effects: averages of `averaged` steps, since they
    became stationary. gradient: the last one; agreement: sum of the products of successive
    gradients. rows: that were read for the first time.
    """

    coordinates: Coordinates
    heads: Float[ndarray, "P 4"]
    effects: Float[ndarray, " 2"]
    curvature: Float[ndarray, " 2"]
    mean_heads: Float[ndarray, "P 4"]
    mean_effects: Float[ndarray, " 2"]
    gradient: Float[ndarray, " g"]
    agreement: float = 0.0
    steps: int = 0
    averaged: int = 0
    rows: int = 0

    @property
    def best(self) -> tuple[Float[ndarray, "P 4"], Float[ndarray, " 2"]]:
        """Heads and effects to go by: the averages, or the last ones while there are none."""
        if self.averaged:
            return self.mean_heads, self.mean_effects
        return self.heads, self.effects


def begin(nuisance: Nuisance, rows: Rows, settings: OnlineSettings) -> tuple[Nuisance, OnlineState]:
    """The state before the first step: means 0, variances constant, no effects.

    rows: of the warm-up, at least 1,280; they say what the directions and penalties are, and the
    nuisance gets their heads for its floor of squares. Raises ValueError for fewer rows, and a
    nuisance with regimes, whose dummies need no likelihood.
    """
    if nuisance.regimes:
        raise ValueError(
            f"regimes {', '.join(map(str, nuisance.regimes))} with online likelihood: their "
            "dummies are instruments, fit by moments, or make them covariates"
        )
    phi, y, fold = nuisance.matrix(rows), nuisance.outcomes(rows), folds_of(len(rows), FOLDS)
    means = ridge(Grams.of(phi, y, fold, FOLDS))
    nuisance = replace(nuisance, means=means)
    logs = nuisance.log_squares(y - means.left_out(phi, fold))
    variances = ridge(Grams.of(phi, logs, fold, FOLDS))
    nuisance = replace(nuisance, variances=variances)
    middle = np.log(means.error)
    penalty = np.concatenate([means.penalty, variances.penalty])
    coordinates = _coordinates(phi, penalty, middle, settings.reach)
    heads = np.zeros((phi.shape[1], 4))
    heads[0, 2:] = middle
    none = np.zeros(2)
    gradient = np.zeros(heads.size + 2)
    return nuisance, OnlineState(coordinates, heads, none, np.ones(2), heads, none, gradient)


def step(
    state: OnlineState,
    phi: Float32[ndarray, "n P"],
    y: Float[ndarray, "n 2"],
    settings: OnlineSettings,
) -> OnlineState:
    """The state after a step towards a batch's features and outcomes, these in their own units.

    The efficient score is taken at the heads' averages once there are any: the last heads' noise
    is alike in both equations, so that its product would bias the effects. Where a step would
    leave |ab| < 1, the same point is written with its equations swapped.
    """
    W, h = residuals(state.coordinates, state.heads, phi, y)
    by_head, by_effect = gradients(W, h, state.effects, settings.beta)
    pull = by_head / _curvature(h, state.effects, settings.beta)
    to_heads = _in_coordinates(state, phi, np.clip(pull, -OUTLYING, OUTLYING))
    if settings.orthogonal:
        if state.averaged:
            W, h = residuals(state.coordinates, state.mean_heads, phi, y)
        by_effect = efficient_score(W, h, state.effects)
    curvature = (1 - MEMORY) * state.curvature + MEMORY * _ratios(h)
    to_effects = by_effect.mean(axis=0) * _distance(state.effects) ** 2 / curvature
    fall = float((1 + state.steps / SETTLING) ** -settings.decay)
    safe = settings.head_rate * fall / (1 + state.coordinates.freedom / len(phi))
    moved = replace(
        state,
        heads=state.heads - safe * to_heads,
        effects=state.effects
        - np.clip(settings.effect_rate * fall * to_effects, -LONGEST, LONGEST),
        curvature=curvature,
        steps=state.steps + 1,
    )
    return _averaged(_inside(moved), np.append(to_heads.ravel(), to_effects))


def residuals(
    coordinates: Coordinates,
    heads: Float[ndarray, "P 4"],
    phi: Float32[ndarray, "n P"],
    y: Float[ndarray, "n 2"],
) -> tuple[Float[ndarray, "n 2"], Float[ndarray, "n 2"]]:
    """Reduced-form residuals W and log variances h of the shocks, by heads in coordinates."""
    c = coordinates
    predicted = phi @ (c.vectors @ (c.scale * heads).astype(np.float32))
    h = np.clip(predicted[:, 2:].astype(float), c.low, c.high)
    return y - predicted[:, :2], h


def gradients(
    W: Float[ndarray, "n 2"],
    h: Float[ndarray, "n 2"],
    effects: Float[ndarray, " 2"],
    beta: float = 0.0,
) -> tuple[Float[ndarray, "n 4"], Float[ndarray, "n 2"]]:
    """Derivatives of each row's −log-likelihood, by (E[y1|x], E[y2|x], h1, h2) and by (a, b).

    beta: those by heads with the terms of equation j times s_j^(2 beta), taken as given. Source:
    design note bidirectional-effects, section 2.4; `structure.log_likelihood`.
    """
    a, b = effects
    eps = W - W[:, ::-1] * effects
    pull = eps * np.exp(-h)
    by_effect = np.array([b, a]) / _distance(effects) - pull * W[:, ::-1]
    weight = np.exp(beta * h)
    weighted = weight * pull
    by_head = np.empty((len(W), 4))
    by_head[:, 0] = b * weighted[:, 1] - weighted[:, 0]
    by_head[:, 1] = a * weighted[:, 0] - weighted[:, 1]
    by_head[:, 2:] = 0.5 * (weight - weighted * eps)
    return by_head, by_effect


def efficient_score(
    W: Float[ndarray, "n 2"], h: Float[ndarray, "n 2"], effects: Float[ndarray, " 2"]
) -> Float[ndarray, "n 2"]:
    """Minus ε1 ε2 / (d s_j²), d = 1 − ab: the effects' derivative without its part along h.

    Equal to the likelihood's by (a, b) less 2 (b, a)/d times that by (h1, h2). Its mean is 0 at
    the true effects whatever h is. Source: design note bidirectional-effects, section 2.3.
    """
    eps = W - W[:, ::-1] * effects
    product = eps[:, 0] * eps[:, 1] / -_distance(effects)
    return np.asarray(product[:, None] * np.exp(-h))


# --- parts of a step ----------------------------------------------------------------------------


def _distance(effects: Float[ndarray, " 2"]) -> float:
    """The system's determinant d = 1 − ab, at least `LEAST_D`."""
    return max(1 - float(effects[0] * effects[1]), LEAST_D)


def _curvature(
    h: Float[ndarray, "n 2"], effects: Float[ndarray, " 2"], beta: float
) -> Float[ndarray, " 4"]:
    """Mean second derivative by the reduced-form means and the log variances."""
    precision = np.exp((beta - 1) * h).mean(axis=0)
    weight = np.exp(beta * h).mean(axis=0) if beta else np.ones(2)
    squares = effects[::-1] ** 2
    return np.concatenate([precision + squares * precision[::-1], weight / 2])


def _ratios(h: Float[ndarray, "n 2"]) -> Float[ndarray, " 2"]:
    """Mean s2²/s1² and s1²/s2²: the information about a and about b, times d²."""
    ratio = np.exp(h[:, 1] - h[:, 0])
    return np.array([ratio.mean(), (1 / ratio).mean()])


def _in_coordinates(
    state: OnlineState, phi: Float32[ndarray, "n P"], pull: Float[ndarray, "n 4"]
) -> Float[ndarray, "P 4"]:
    """Mean gradient by the heads' coordinates, with the penalty's."""
    c = state.coordinates
    towards = c.vectors.T @ (phi.T @ pull.astype(np.float32)) / len(phi)
    weight = min(1.0, c.rows / max(state.rows, 1))
    return np.asarray(c.scale * towards + weight * c.shrink * state.heads)


def _inside(state: OnlineState) -> OnlineState:
    """The state itself, or its mirror where |ab| > 1: h1' = h2 − 2 log|b|, means as they are."""
    a, b = state.effects
    if abs(a * b) <= 1:
        return state
    heads, scale = state.heads.copy(), state.coordinates.scale
    heads[:, 2:] = heads[:, [3, 2]] * scale[:, [3, 2]] / scale[:, [2, 3]]
    heads[0, 2:] -= 2 * np.log(np.abs([b, a]))
    return replace(
        state,
        heads=heads,
        effects=np.array([1 / b, 1 / a]),
        curvature=state.curvature[::-1] * np.array([(b / a) ** 2, (a / b) ** 2]),
        averaged=0,
        agreement=0.0,
    )


def _averaged(state: OnlineState, gradient: ndarray) -> OnlineState:
    """The averages with a step more, once successive gradients have pointed apart on the whole.

    Far from the end they agree, near it each step overshoots (Pflug, 1990). Later steps weigh
    more, in proportion to their number, so that what was averaged too early fades.
    """
    agreement = RECENT * state.agreement + float(gradient @ state.gradient)
    state = replace(state, gradient=gradient, agreement=agreement)
    if not state.averaged and (agreement > 0 or state.steps < FIRST):
        return state
    share = 2 / (state.averaged + 2)
    return replace(
        state,
        averaged=state.averaged + 1,
        mean_heads=state.mean_heads + share * (state.heads - state.mean_heads),
        mean_effects=state.mean_effects + share * (state.effects - state.mean_effects),
    )


def _coordinates(
    phi: Float32[ndarray, "n P"],
    penalty: Float[ndarray, " 4"],
    middle: Float[ndarray, " 2"],
    reach: float,
) -> Coordinates:
    """By the eigenvectors of the features' covariance, the constant apart and not penalised."""
    n, P = phi.shape
    mean = phi[:, 1:].mean(axis=0, dtype=float)
    gram = Grams.of(phi, np.zeros((n, 1)), np.zeros(n, dtype=int), 1).gram[0] / n
    values, turn = np.linalg.eigh(gram[1:, 1:] - np.outer(mean, mean))
    values = np.maximum(values, 0.0)
    vectors = np.eye(P)
    vectors[0, 1:], vectors[1:, 1:] = -mean @ turn, turn
    added = penalty * max(float(values.mean()) if P > 1 else 0.0, 1e-300)
    scale, shrink = np.ones((P, 4)), np.zeros((P, 4))
    scale[1:] = 1 / np.sqrt(values[:, None] + added)
    shrink[1:] = added / (values[:, None] + added)
    low, high = float(middle.min() - reach), float(middle.max() + reach)
    return Coordinates(vectors.astype(np.float32), scale, shrink, n, low, high)
