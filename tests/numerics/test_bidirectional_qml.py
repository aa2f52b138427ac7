"""Online quasi-maximum likelihood: gradients, stationary points, the mirror, steps, efficiency."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hakari.inference.bidirectional import online_steps
from hakari.inference.bidirectional.features import RandomFourier
from hakari.inference.bidirectional.nuisance import warmed_up
from hakari.inference.bidirectional.online_steps import (
    OnlineSettings,
    efficient_score,
    gradients,
    residuals,
    step,
)
from hakari.inference.bidirectional.rows import Rows
from hakari.inference.bidirectional.structure import log_likelihood
from hakari.inference.sampling import generator
from tests.bidirectional_designs import EFFECTS, system

PLACES = ((0.0, 0.0), (0.5, 0.4), (-0.7, 0.9), (3.0, 0.2))
FEATURES = RandomFourier(60, seed=1, length_scale=1.5)
SETTINGS = OnlineSettings()


def table(n, law="normal", seed=0, strength=1.0):
    """Rows with nonlinear means and variances in both covariates, and what they were made from."""
    known = system(n, strength=strength, law=law, seed=seed)
    means = np.column_stack([np.sin(2 * known.x[:, 0]), known.x[:, 0] * known.x[:, 1]])
    return Rows(np.column_stack([known.W1, known.W2]) + means, known.x), known


def begun(rows, settings=SETTINGS):
    nuisance = warmed_up(FEATURES, rows, ("x1", "x2"))
    return online_steps.begin(nuisance, rows, settings)


def random_point(seed, n=7):
    draw = generator(seed, "a point")
    return draw.standard_normal((n, 2)), draw.standard_normal((n, 2)), draw.standard_normal((n, 2))


def weighted_loss(y, m, h, effects, weight):
    """Minus the log-likelihood with the terms of each equation times a weight."""
    a, b = effects
    eps = np.column_stack([y[:, 0] - a * y[:, 1], y[:, 1] - b * y[:, 0]])
    eps -= np.column_stack([m[:, 0] - a * m[:, 1], m[:, 1] - b * m[:, 0]])
    return 0.5 * (weight * (h + eps**2 * np.exp(-h))).sum(axis=1) - np.log(abs(1 - a * b))


def loss(y, m, h, effects):
    a, b = effects
    f1, f2 = m[:, 0] - a * m[:, 1], m[:, 1] - b * m[:, 0]
    return -log_likelihood(y[:, 0], y[:, 1], f1, f2, h[:, 0], h[:, 1], a, b)


def differences(function, at, place, size=1e-5):
    """Central differences by one coordinate."""
    up, down = at.copy(), at.copy()
    up[..., place] += size
    down[..., place] -= size
    return (function(up) - function(down)) / (2 * size)


def truth(n, law="chi2", strength=1.0):
    known = system(n, strength, law, seed=3)
    W = np.column_stack([known.W1, known.W2])
    return W, 2 * np.log(np.column_stack([known.s1, known.s2])), np.array(EFFECTS)


def z_score(values):
    return values.mean(axis=0) / (values.std(axis=0) / np.sqrt(len(values)))


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("effects", PLACES)
def test_gradients_are_those_of_the_likelihood(effects):
    y, m, h = random_point(1)
    effects = np.array(effects)
    by_head, by_effect = gradients(y - m, h, effects)
    for j in range(2):
        wanted = differences(lambda moved: loss(y, moved, h, effects), m, j)
        assert_allclose(by_head[:, j], wanted, atol=1e-6)
        wanted = differences(lambda moved: loss(y, m, moved, effects), h, j)
        assert_allclose(by_head[:, 2 + j], wanted, atol=1e-6)
        wanted = differences(lambda moved: loss(y, m, h, moved), effects, j)
        assert_allclose(by_effect[:, j], wanted, atol=1e-6)


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
def test_beta_weighs_the_heads_and_not_the_effects(beta):
    y, m, h = random_point(2)
    effects, weight = np.array([0.5, 0.4]), np.exp(beta * h)
    by_head, by_effect = gradients(y - m, h, effects, beta)
    for j in range(2):
        wanted = differences(lambda moved: weighted_loss(y, moved, h, effects, weight), m, j)
        assert_allclose(by_head[:, j], wanted, atol=1e-6)
        wanted = differences(lambda moved: weighted_loss(y, m, moved, effects, weight), h, j)
        assert_allclose(by_head[:, 2 + j], wanted, atol=1e-6)
    assert_array_equal(by_effect, gradients(y - m, h, effects)[1])


@pytest.mark.parametrize("effects", PLACES)
def test_efficient_score_is_the_likelihoods_less_its_part_along_the_variances(effects):
    y, m, h = random_point(3)
    a, b = effects
    by_head, by_effect = gradients(y - m, h, np.array(effects))
    wanted = by_effect - 2 * np.array([b, a]) / (1 - a * b) * by_head[:, 2:]
    assert_allclose(efficient_score(y - m, h, np.array(effects)), wanted, atol=1e-12)


# --- what is stationary at the truth ------------------------------------------------------------


@pytest.mark.parametrize("law", ["normal", "chi2"])
def test_gradient_is_zero_at_the_truth_and_not_with_the_jacobian_turned(law):
    W, h, effects = truth(100_000, law)
    by_head, by_effect = gradients(W, h, effects)
    assert (np.abs(z_score(np.hstack([by_head, by_effect]))) < 4).all()
    turned = by_effect - 2 * effects[::-1] / (1 - effects.prod())
    assert (z_score(turned) < -50).all()


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_weighted_residuals_with_the_plain_jacobian_move_from_the_truth(beta):
    W, h, effects = truth(400_000, strength=2.0)
    jacobian = effects[::-1] / (1 - effects.prod())
    pull = jacobian - gradients(W, h, effects)[1]
    mixed = jacobian - np.exp(beta * h) * pull
    predicted = jacobian * (1 - np.exp(beta * h))
    assert (np.abs(z_score(mixed - predicted)) < 4).all()
    assert (np.abs(z_score(mixed)) > 5).all()
    assert (np.abs(z_score(gradients(W, h, effects, beta)[1])) < 4).all()


def test_only_the_efficient_score_does_not_mind_wrong_variances():
    W, h, effects = truth(100_000)
    wrong = h + 0.3 + 0.3 * np.sin(np.arange(len(W)))[:, None]
    assert (np.abs(z_score(efficient_score(W, wrong, effects))) < 4).all()
    assert (np.abs(z_score(gradients(W, wrong, effects)[1])) > 10).all()


# --- steps ------------------------------------------------------------------------------------


def test_one_newton_step_from_nothing_is_ridge_regression():
    """Constant variances, no effects: the means' step of full length ends at the ridge heads."""
    rows, _ = table(4000)
    full = replace(SETTINGS, head_rate=1.0, decay=0.0)
    nuisance, state = begun(rows, full)
    phi, y = nuisance.matrix(rows), nuisance.outcomes(rows)
    after = step(state, phi, y, full)
    reach = 1 + state.coordinates.freedom / len(rows)
    coefficients = state.coordinates.vectors @ (state.coordinates.scale * reach * after.heads)
    wanted = nuisance.means.coefficients[-1]
    difference = phi @ (coefficients[:, :2] - wanted)
    assert np.abs(difference).max() < 1e-3 * np.abs(phi @ wanted).max()


def test_ridge_heads_are_at_rest_and_penalised_less_with_more_rows():
    rows, _ = table(4000)
    nuisance, state = begun(rows)
    phi, y = nuisance.matrix(rows), nuisance.outcomes(rows)
    c = online_steps._coordinates(phi, np.full(4, 0.1), np.zeros(2), 5.0)
    centred = phi[:, 1:] - phi[:, 1:].mean(axis=0, dtype=float)
    gram = centred.T @ centred / len(rows)
    added = 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram))
    slopes = np.linalg.solve(gram + added, centred.T @ y / len(rows))
    heads = np.zeros_like(state.heads)
    heads[1:, :2] = c.vectors[1:, 1:].T.astype(float) @ slopes / c.scale[1:, :2]
    pull = np.zeros((len(rows), 4))
    pull[:, :2] = centred @ slopes - y
    for seen, left in ((100, 0.0), (4000, 0.0), (8000, 0.5)):
        at = replace(state, heads=heads, rows=seen, coordinates=c)
        found = online_steps._in_coordinates(at, phi, pull)
        assert_allclose(found, -left * c.shrink * heads, atol=1e-5)
    assert np.abs(c.shrink * heads).max() > 1e-2


@pytest.mark.parametrize("averaged", [0, 10])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_effects_step_along_their_score_over_its_information(orthogonal, averaged):
    """The efficient score at the heads' averages once there are any, the likelihood's at heads."""
    rows, _ = table(4000)
    nuisance, state = begun(rows)
    phi, y = nuisance.matrix(rows), nuisance.outcomes(rows)
    state = replace(state, effects=np.array([0.3, 0.2]), curvature=np.array([2.0, 3.0]))
    state = replace(state, averaged=averaged, mean_heads=state.heads + 0.1, steps=300)
    heads = state.mean_heads if orthogonal and averaged else state.heads
    W, h = residuals(state.coordinates, heads, phi, y)
    score = efficient_score(W, h, state.effects)
    score = score if orthogonal else gradients(W, h, state.effects)[1]
    ratio = np.exp(h[:, 1] - h[:, 0])
    information = 0.95 * state.curvature + 0.05 * np.array([ratio.mean(), (1 / ratio).mean()])
    wanted = state.effects - 0.1 * 4**-0.5 * 0.94**2 * score.mean(axis=0) / information
    settings = OnlineSettings(effect_rate=0.1, decay=0.5, orthogonal=orthogonal)
    after = step(state, phi, y, settings)
    assert_allclose(after.effects, wanted, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_curvature_of_means_is_the_gradients_slope(beta):
    y, m, h = random_point(4)
    effects = np.array([0.5, -0.8])
    found = online_steps._curvature(h, effects, beta)
    for j in range(2):
        slope = differences(lambda moved: gradients(y - moved, h, effects, beta)[0], m, j)
        assert_allclose(found[j], slope[:, j].mean(), rtol=1e-6)


def test_averages_weigh_steps_by_their_number():
    rows, _ = table(2560)
    _, state = begun(rows)
    state = replace(state, steps=50, agreement=-1.0)
    draw, seen = generator(0, "steps"), []
    for _ in range(5):
        moved = replace(state, effects=draw.random(2), heads=draw.random(state.heads.shape))
        seen.append(moved)
        state = online_steps._averaged(moved, np.zeros_like(state.gradient))
    weights = np.arange(1.0, 6.0)
    for name in ("effects", "heads"):
        wanted = np.average([getattr(s, name) for s in seen], axis=0, weights=weights)
        assert_allclose(getattr(state, f"mean_{name}"), wanted, rtol=1e-12)


def test_coordinates_have_unit_curvature():
    """Up to single precision, which moves the smallest eigenvalues by a few percent."""
    rows, _ = table(4000)
    nuisance, state = begun(rows)
    c = state.coordinates
    turned = nuisance.matrix(rows).astype(float) @ c.vectors
    curvature = turned.T @ turned / len(rows)
    for j in range(4):
        own = c.scale[:, j, None] * curvature * c.scale[:, j] + np.diag(c.shrink[:, j])
        assert_allclose(own, np.eye(len(own)), atol=0.05)


@pytest.mark.parametrize("effects", [(2.5, 2.0), (-1.6, 0.8), (0.3, 4.0)])
def test_leaving_the_region_writes_the_same_point_with_equations_swapped(effects):
    rows, _ = table(2000)
    nuisance, state = begun(rows, OnlineSettings(reach=20.0))
    heads = state.heads + 0.1 * generator(0, "heads").standard_normal(state.heads.shape)
    outside = replace(state, heads=heads, effects=np.array(effects), averaged=9)
    inside = online_steps._inside(outside)
    assert_allclose(inside.effects, [1 / effects[1], 1 / effects[0]])
    assert inside.averaged == 0
    phi, y = nuisance.matrix(rows), nuisance.outcomes(rows)
    W, h = residuals(state.coordinates, outside.heads, phi, y)
    W_, h_ = residuals(state.coordinates, inside.heads, phi, y)
    assert_array_equal(W, W_)
    one = loss(W, 0 * W, h, outside.effects)
    assert_allclose(loss(W, 0 * W, h_, inside.effects), one, atol=2e-4 * np.abs(one).max())
    ratios = online_steps._ratios(h_)
    outside = replace(outside, curvature=online_steps._ratios(h))
    assert_allclose(online_steps._inside(outside).curvature, ratios, rtol=1e-4)


def test_one_wild_row_moves_nothing_far():
    rows, _ = table(2000)
    nuisance, state = begun(rows)
    phi, y = nuisance.matrix(rows), nuisance.outcomes(rows)
    y[7] = 1e6
    after = step(state, phi, y, SETTINGS)
    assert np.abs(after.effects).max() <= online_steps.LONGEST
    assert np.abs(after.heads - state.heads).max() < 1
    assert np.isfinite(after.heads).all()


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"epochs": 0}, {"head_rate": 0.0}, {"beta": 1.5}, {"decay": -1.0}]
)
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} {value}: give a number from"):
        OnlineSettings(**wrong)


def test_regimes_are_refused():
    rows, _ = table(2560)
    labels = np.where(rows.X[:, 0] > 0, "high", "low")
    with pytest.raises(ValueError, match="regimes high, low with online likelihood"):
        begun(replace(rows, regimes=labels))
