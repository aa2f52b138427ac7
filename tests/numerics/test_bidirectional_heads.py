"""Heads from sums: ridge regression by another route, and penalties by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from hakari.inference.bidirectional.heads import CHUNK, PENALTIES, Grams, folds_of, ridge

FOLDS = 4


def data(n=2000, P=12, t=2, seed=0):
    draw = np.random.default_rng(seed)
    phi = np.column_stack(
        [np.ones(n), draw.standard_normal((n, P - 1)) @ np.diag(0.9 ** np.arange(P - 1))]
    )
    slopes = draw.standard_normal((P, t)) / np.arange(1, P + 1)[:, None]
    return phi.astype(np.float32), phi @ slopes + 3 * draw.standard_normal((n, t)) + [5.0, -2.0]


def by_hand(phi, y, penalty):
    """Ridge with a free constant: least squares on rows that the penalty adds."""
    phi = phi.astype(float)
    centred = phi[:, 1:] - phi[:, 1:].mean(axis=0)
    size = (centred**2).sum() / centred.shape[1]
    extra = np.sqrt(penalty * size) * np.eye(centred.shape[1])
    lhs = np.vstack([centred, extra])
    rhs = np.concatenate([y - y.mean(), np.zeros(len(extra))])
    slopes = np.linalg.lstsq(lhs, rhs, rcond=None)[0]
    return np.concatenate([[y.mean() - phi[:, 1:].mean(axis=0) @ slopes], slopes])


def test_heads_are_ridge_regressions_of_the_other_folds_and_of_all():
    phi, y = data()
    fold = folds_of(len(y), FOLDS)
    heads = ridge(Grams.of(phi, y, fold, FOLDS))
    for t in range(2):
        for k in range(FOLDS):
            wanted = by_hand(phi[fold != k], y[fold != k, t], heads.penalty[t])
            np.testing.assert_allclose(heads.coefficients[k, :, t], wanted, rtol=2e-4, atol=2e-4)
        wanted = by_hand(phi, y[:, t], heads.penalty[t])
        np.testing.assert_allclose(heads.coefficients[-1, :, t], wanted, rtol=2e-4, atol=2e-4)


def test_the_penalty_predicts_left_out_folds_best():
    phi, y = data(n=1200, P=60, seed=1)
    fold = folds_of(len(y), FOLDS)
    heads = ridge(Grams.of(phi, y, fold, FOLDS))
    errors = np.zeros((len(PENALTIES), 2))
    for k in range(FOLDS):
        inside, outside = fold != k, fold == k
        for i, penalty in enumerate(PENALTIES):
            for t in range(2):
                w = by_hand(phi[inside], y[inside, t], penalty)
                errors[i, t] += ((y[outside, t] - phi[outside].astype(float) @ w) ** 2).sum()
    assert heads.penalty.tolist() == PENALTIES[errors.argmin(axis=0)].tolist()
    np.testing.assert_allclose(heads.error, errors.min(axis=0) / len(y), rtol=1e-4)
    gap = y - heads.left_out(phi, fold)
    np.testing.assert_allclose((gap**2).mean(axis=0), heads.error, rtol=1e-4)
    np.testing.assert_allclose(heads.explained, 1 - heads.error / y.var(axis=0), rtol=1e-3)


def test_sums_of_blocks_are_those_of_the_whole():
    phi, y = data(n=3000)
    cut = CHUNK * FOLDS  # folds begin again with each block
    fold = folds_of(len(y), FOLDS)
    whole = Grams.of(phi, y, fold, FOLDS)
    parts = Grams.of(phi[:cut], y[:cut], folds_of(cut, FOLDS), FOLDS) + Grams.of(
        phi[cut:], y[cut:], folds_of(len(y) - cut, FOLDS), FOLDS
    )
    for name in ("gram", "cross", "squares", "rows"):
        # products are in single precision, over pieces that differ
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-4)


def test_rows_that_are_near_each_other_share_a_fold():
    fold = folds_of(3000, FOLDS)
    assert (np.bincount(fold) > 0).all()
    assert (np.diff(fold) != 0).sum() == (3000 - 1) // CHUNK
    small = folds_of(800, FOLDS)
    assert np.bincount(small).tolist() == [200] * FOLDS


def test_too_few_rows_are_refused():
    phi, y = data(n=300)
    with pytest.raises(ValueError, match="a fold has 1 rows, too few to learn from"):
        ridge(Grams.of(phi[:FOLDS], y[:FOLDS], folds_of(FOLDS, FOLDS), FOLDS))
