"""Simulated responses are what long samples estimate; rival bands are what their papers say."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import statsmodels.api as sm
from jaxtyping import install_import_hook
from numpy import ndarray
from scipy.interpolate import BSpline
from scipy.linalg import sqrtm

import tests.typechecker  # noqa: F401 - the hook finds it as an attribute of `tests`

with install_import_hook(
    ["benchmarks.lp_designs", "benchmarks.lp_rivals"], "tests.typechecker.check"
):
    from benchmarks import lp_designs as designs
    from benchmarks import lp_rivals as rivals

H = 8
LONG = 50_000
LEVEL = 0.9
OBSERVED = [
    designs.var1(0.5, H),
    designs.var1(0.9, H),
    designs.var1(0.97, H),
    designs.var1(0.9, H, heteroskedastic=True),
    designs.var4(0.9, H),
    designs.var4(0.97, H),
    designs.arma(0, horizons=H),
    designs.arma(6, horizons=H),
]
INSTRUMENTED = [designs.lp_iv(0.9, H), designs.lp_iv(0.5, H, contaminated=True)]


def projected(design: designs.Design, columns: designs.Columns, lags: int) -> tuple[ndarray, ...]:
    """Leads (n, H+1), shock, controls and rows of dates, with `lags` lags of the series."""
    first, n = max(lags, 1), len(columns["y"]) - max(lags, 1) - H
    rows = np.arange(first, first + n)
    y = np.column_stack([columns["y"][rows + h] for h in range(H + 1)])
    past = [columns[name][rows - lag] for name in design.series for lag in range(1, lags + 1)]
    return y, columns[design.shock][rows], np.column_stack([np.ones(n), *past]), rows


def two_stage(y: ndarray, s: ndarray, C: ndarray, z: ndarray) -> tuple[ndarray, ndarray, float]:
    """Estimates and robust errors of instrumental variables, and the first stage's robust F."""
    y, s, z = (v - C @ np.linalg.lstsq(C, v, rcond=None)[0] for v in (y, s, z))
    estimate = z @ y / (z @ s)
    score = z[:, None] * (y - np.multiply.outer(s, estimate))
    first = z @ s / (z @ z)
    F = (z @ s) ** 2 / ((z * (s - first * z)) ** 2).sum()
    return estimate, np.sqrt((score**2).sum(axis=0)) / abs(z @ s), float(F)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- designs ------------------------------------------------------------------------------


@pytest.mark.parametrize("design", OBSERVED, ids=lambda d: d.name)
def test_a_long_sample_estimates_the_truth(design):
    y, s, C, _ = projected(design, design.make(generator(1), LONG), design.lags)
    found = rivals.frequentist(y, s, C, LEVEL, generator(), kind="hc3", pointwise=True)
    error = (found.upper - found.mean) / NormalDist().inv_cdf((1 + LEVEL) / 2)
    assert ((error > 1e-3) & (error < 0.05)).all()  # no horizon without error
    assert (np.abs(found.mean - design.truth) < 4 * error).all()


@pytest.mark.parametrize("design", INSTRUMENTED, ids=lambda d: d.name)
def test_the_instrument_estimates_the_truth_and_least_squares_does_not(design):
    columns = design.make(generator(2), LONG)
    y, r, C, rows = projected(design, columns, design.lags)
    estimate, error, _ = two_stage(y, r, C, columns["z"][rows])
    assert (np.abs(estimate - design.truth) < 4 * error).all()
    ols = rivals.pseudo_likelihood(y, r, C, LEVEL, pointwise=True)
    assert ols.lower[0] > design.truth[0] + 0.2  # demand moves output and the rate together


@pytest.mark.parametrize("contaminated", [False, True])
def test_only_a_contaminated_instrument_needs_lags(contaminated):
    design = designs.lp_iv(0.9, H, contaminated=contaminated)
    columns = design.make(generator(3), LONG)
    y, r, _, rows = projected(design, columns, 0)
    estimate, error, _ = two_stage(y, r, np.ones((len(r), 1)), columns["z"][rows])
    far = np.abs(estimate - design.truth).max() > 5 * error.max()
    assert far == contaminated


@pytest.mark.parametrize(("strength", "expected"), [(0.3, 14.1), (0.4, 23.9)])
def test_first_stage_is_between_weak_and_strong_at_200_dates(strength, expected):
    design = designs.lp_iv(0.9, 0, strength)
    samples = design.make(generator(4), (200, 200))
    found = []
    for k in range(200):
        columns = {name: values[k] for name, values in samples.items()}
        y, r, C, rows = projected(design, columns, 1)
        found.append(two_stage(y, r, C, columns["z"][rows])[2])
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / 200**0.5 + 1
    assert 10 < np.mean(found) < 30


def test_each_state_has_its_response_and_the_pooled_one_is_neither():
    design = designs.states(horizons=H)
    columns = design.make(generator(5), LONG)
    y, s, C, rows = projected(design, columns, 1)
    before = columns["regime"][rows - 1]
    C = np.column_stack([C, before])
    for state in (0, 1):
        chosen = s * (before == state)
        other = np.column_stack([C, s * (before != state)])
        found = rivals.frequentist(y, chosen, other, LEVEL, generator(), "hc3", pointwise=True)
        error = (found.upper - found.mean) / NormalDist().inv_cdf((1 + LEVEL) / 2)
        assert (np.abs(found.mean - design.truth[state]) < 4 * error).all()
    pooled = rivals.pseudo_likelihood(y, s, C, LEVEL).mean[0]
    assert design.truth[0, 0] + 0.3 < pooled < design.truth[1, 0] - 0.3
    assert abs(np.mean(np.diff(columns["regime"]) != 0) - (1 - designs.STAY)) < 0.01


@pytest.mark.parametrize("root", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("make", [designs.var1, designs.var4, designs.lp_iv])
def test_the_largest_root_is_the_one_named(make, root):
    truth = make(root, 300).truth
    assert truth[-1] / truth[-2] == pytest.approx(root, rel=1e-9)


def test_responses_are_humps_or_last():
    for rho in (0.9, 0.97):
        assert designs.var1(rho).truth.argmax() > 0
    for design in (designs.var1(0.5), designs.var4(0.97), designs.arma(6)):
        assert (design.truth > 0).all()
    assert designs.arma(6).truth.argmax() in (3, 4)
    assert (designs.lp_iv(0.9).truth < 0).all()


def test_arma_by_hand():
    theta = np.exp(-0.5 * ((np.arange(4) - 1.5) / 1.0) ** 2)
    by_hand = [sum(theta[j] * 0.5 ** (h - j) for j in range(min(h, 3) + 1)) for h in range(6)]
    np.testing.assert_allclose(designs.arma(3, horizons=5).truth, by_hand, rtol=1e-13)
    np.testing.assert_allclose(designs.arma(3, horizons=1).truth, by_hand[:2], rtol=1e-13)


def test_doubling_is_the_recursion():
    matrix = np.array([[0.9, 0.3], [-0.1, 0.7]])
    errors = generator(6).standard_normal((3, 37, 2))
    x, path = np.zeros((3, 2)), []
    for t in range(37):
        x = x @ matrix.T + errors[:, t]
        path.append(x)
    found = designs.accumulate(matrix, errors)
    np.testing.assert_allclose(found, np.stack(path, axis=1), rtol=0, atol=1e-12)


def test_replications_are_samples_and_begin_in_the_stationary_law():
    design = designs.var1(0.9, 400)
    alone, batch = design.make(generator(7), 30), design.make(generator(7), (1, 30))
    for name in ("y", "x1", "x2", "shock"):
        assert alone[name].shape == (30,)
        np.testing.assert_array_equal(alone[name], batch[name][0])
    arma = designs.arma(0, 0.9)  # y's variance: (1 + 1) / (1 - 0.9^2), also at the first date
    first = arma.make(generator(8), (4_000, 1))["y"][:, 0]
    assert first.var() == pytest.approx(2 / (1 - 0.81), rel=4 * np.sqrt(2 / 4_000))


def test_garch_keeps_the_variance_and_clusters_it():
    plain = designs.var1(0.9, H)
    design = designs.var1(0.9, H, heteroskedastic=True)
    np.testing.assert_array_equal(design.truth, plain.truth)
    squares = [law.make(generator(9), (40, 2_000))["shock"] ** 2 for law in (plain, design)]
    np.testing.assert_allclose([s.mean() for s in squares], 1, rtol=0.05)
    kurtosis = [(s**2).mean() / s.mean() ** 2 for s in squares]
    assert 2.9 < kurtosis[0] < 3.1
    assert kurtosis[1] > 4
    together = [np.corrcoef(s[:, 1:].ravel(), s[:, :-1].ravel())[0, 1] for s in squares]
    assert abs(together[0]) < 0.02
    assert together[1] > 0.15


def test_designs_that_are_refused():
    with pytest.raises(ValueError, match=r"rho 1: must be between 0 and 1"):
        designs.var1(1)
    with pytest.raises(ValueError, match=r"phi -0.2: must be between 0 and 1"):
        designs.arma(2, -0.2)
    with pytest.raises(ValueError, match=r"a 1.5: must be between 0 and 1"):
        designs.states(1.5)
    with pytest.raises(ValueError, match=r"q -1: an order of moving average"):
        designs.arma(-1)
    with pytest.raises(ValueError, match=r"strength 0 and noise 1.0: both must be positive"):
        designs.lp_iv(0.9, strength=0)
    with pytest.raises(ValueError, match=r"T 0: give at least one date"):
        designs.var1(0.9).make(generator(), 0)


# --- rivals -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> tuple[ndarray, ndarray, ndarray]:
    design = designs.var1(0.9, H)
    return projected(design, design.make(generator(10), 160), 2)[:3]


def halves(answer: rivals.Answer) -> ndarray:
    np.testing.assert_allclose(answer.mean - answer.lower, answer.upper - answer.mean, rtol=1e-9)
    return answer.upper - answer.mean


def newey_west(rows: ndarray, lags: int) -> ndarray:
    """By the definition, pair by pair of dates."""
    distance = np.abs(np.subtract.outer(np.arange(len(rows)), np.arange(len(rows))))
    return rows.T @ np.maximum(1 - distance / (lags + 1), 0) @ rows


def influence(y: ndarray, s: ndarray, C: ndarray) -> ndarray:
    """Rows of (X'X)^-1 x_t u_t for the shock, from the whole regression."""
    X = np.column_stack([s, C])
    u = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
    return (X @ np.linalg.inv(X.T @ X)[0])[:, None] * u


def critical(covariance: ndarray, noise: ndarray) -> float:
    """Sup-t by the root of the correlation, which is unique where it is symmetric."""
    size = np.sqrt(np.diag(covariance))
    root = sqrtm(covariance / np.multiply.outer(size, size)).real
    return float(np.quantile(np.abs(root @ noise.T).max(axis=0), LEVEL))


@pytest.mark.parametrize("kind", ["hac", "hc3"])
def test_pointwise_is_statsmodels(sample, kind):
    y, s, C = sample
    found = rivals.frequentist(y, s, C, LEVEL, generator(), kind, pointwise=True)
    for h in range(H + 1):
        model = sm.OLS(y[:, h], np.column_stack([s, C]))
        peer = (
            model.fit(cov_type="HAC", cov_kwds={"maxlags": h + 1}, use_t=False)
            if kind == "hac"
            else model.fit(cov_type="HC3", use_t=False)
        )
        assert found.mean[h] == pytest.approx(peer.params[0], rel=1e-10)
        lower, upper = peer.conf_int(alpha=1 - LEVEL)[0]
        assert found.lower[h] == pytest.approx(lower, rel=1e-9)
        assert found.upper[h] == pytest.approx(upper, rel=1e-9)


def test_pseudo_likelihood_is_the_classical_regression_and_its_band_exact(sample):
    y, s, C = sample
    joint = rivals.pseudo_likelihood(y, s, C, LEVEL)
    one = rivals.pseudo_likelihood(y, s, C, LEVEL, pointwise=True)
    for h in range(H + 1):
        peer = sm.OLS(y[:, h], np.column_stack([s, C])).fit(use_t=False)
        lower, upper = peer.conf_int(alpha=1 - LEVEL)[0]
        assert (one.lower[h], one.upper[h]) == pytest.approx((lower, upper), rel=1e-9)
    c = (halves(joint) / halves(one) * NormalDist().inv_cdf((1 + LEVEL) / 2))[0]
    inside = (2 * NormalDist().cdf(c) - 1) ** (H + 1)  # independent normals
    assert inside == pytest.approx(LEVEL, rel=1e-12)


def test_joint_bands_take_the_correlation_over_horizons(sample):
    y, s, C = sample
    noise, rows = generator(11).standard_normal((3_000, H + 1)), influence(y, s, C)
    joint = newey_west(rows, H + 1)
    X = np.column_stack([s, C])
    left = 1 - np.einsum("ij,jk,ik->i", X, np.linalg.inv(X.T @ X), X)
    corrected = rows / left[:, None]
    own = np.sqrt([newey_west(rows[:, [h]], h + 1)[0, 0] for h in range(H + 1)])
    hc3 = corrected.T @ corrected
    for kind, covariance, error in (("hac", joint, own), ("hc3", hc3, np.sqrt(np.diag(hc3)))):
        found = rivals.frequentist(y, s, C, LEVEL, noise, kind)
        np.testing.assert_allclose(halves(found), critical(covariance, noise) * error, rtol=1e-7)
    found = rivals.sandwich(y, s, C, LEVEL, noise)
    expected = critical(joint, noise) * np.sqrt(np.diag(joint))
    np.testing.assert_allclose(halves(found), expected, rtol=1e-7)
    pointwise = rivals.sandwich(y, s, C, LEVEL, noise, pointwise=True)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    np.testing.assert_allclose(halves(pointwise), z * np.sqrt(np.diag(joint)), rtol=1e-9)


def test_sup_t_holds_its_share_of_draws():
    root = np.tril(np.ones((H + 1, H + 1)))  # a random walk's horizons
    covariance = root @ root.T
    noise = generator(12).standard_normal((5_000, H + 1))
    band = rivals._band(np.zeros(H + 1), covariance, LEVEL, noise, pointwise=False)
    fresh = generator(13).standard_normal((20_000, H + 1)) @ root.T
    inside = (np.abs(fresh) <= band.upper).all(axis=1).mean()
    assert inside == pytest.approx(LEVEL, abs=4 * np.sqrt(0.09 / 5_000))
    independent = rivals._band(np.zeros(H + 1), np.eye(H + 1), LEVEL, noise, pointwise=False)
    exact = NormalDist().inv_cdf((1 + LEVEL ** (1 / (H + 1))) / 2)
    assert independent.upper[0] == pytest.approx(exact, rel=0.02)
    assert band.upper[0] < exact  # correlated horizons need a smaller value
    one = rivals._band(np.zeros(H + 1), np.ones((H + 1, H + 1)), LEVEL, noise, pointwise=False)
    assert one.upper[0] == pytest.approx(NormalDist().inv_cdf((1 + LEVEL) / 2), rel=0.04)


def test_smooth_without_penalty_is_least_squares(sample):
    y, s, C = sample
    noise = generator(14).standard_normal((500, H + 1))
    plain = rivals.sandwich(y, s, C, LEVEL, noise, pointwise=True)
    free = rivals.smooth(y, s, C, LEVEL, noise, penalties=(0.0,), pointwise=True)
    np.testing.assert_allclose(free.mean, plain.mean, rtol=0, atol=1e-12)
    error = np.sqrt(np.diag(newey_west(influence(y, s, C), H)))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    np.testing.assert_allclose(halves(free), z * error, rtol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_smooth_under_a_large_penalty_is_a_polynomial(sample, order):
    y, s, C = sample
    found = rivals.smooth(y, s, C, LEVEL, generator(), order, penalties=(1e9,)).mean
    h = np.arange(H + 1)
    ols = rivals.pseudo_likelihood(y, s, C, LEVEL).mean
    limit = np.polyval(np.polyfit(h, ols, order - 1), h)
    np.testing.assert_allclose(found, limit, rtol=0, atol=1e-5)


def stacked(y: ndarray, s: ndarray, C: ndarray, kappa: float) -> tuple[ndarray, ndarray, ndarray]:
    """Penalised regression of all (t, h) at once: path, controls' coefficients (k, Q), bread.

    Cubic splines come from SciPy's recursion, the penalty from the partialled shock.
    """
    Q, k = y.shape[1], C.shape[1]
    basis = BSpline.design_matrix(np.arange(Q), np.arange(-3, Q + 3.0), 3).toarray()
    differences = np.diff(np.eye(basis.shape[1]), 3, axis=0)
    left = s - C @ np.linalg.lstsq(C, s, rcond=None)[0]
    X = np.column_stack([np.kron(s[:, None], basis), np.kron(C, np.eye(Q))])
    penalty = np.zeros((X.shape[1], X.shape[1]))
    size = basis.shape[1]
    penalty[:size, :size] = kappa * (left @ left) * differences.T @ differences
    bread = np.linalg.inv(X.T @ X + penalty)
    coefficients = bread @ X.T @ y.ravel()
    residual = (y.ravel() - X @ coefficients)[:, None] * X
    meat = newey_west(residual.reshape(len(s), Q, -1).sum(axis=1), Q - 1)
    covariance = basis @ (bread @ meat @ bread)[:size, :size] @ basis.T
    return basis @ coefficients[:size], coefficients[size:].reshape(k, Q), covariance


def test_smooth_is_the_stacked_regression_with_its_sandwich(sample):
    y, s, C = sample
    noise = generator(15).standard_normal((100, H + 1))
    found = rivals.smooth(y, s, C, LEVEL, noise, penalties=(2.0,), pointwise=True)
    path, _, covariance = stacked(y, s, C, 2.0)
    np.testing.assert_allclose(found.mean, path, rtol=0, atol=1e-9)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    np.testing.assert_allclose(halves(found), z * np.sqrt(np.diag(covariance)), rtol=1e-7)


def test_cross_validation_by_refitting(sample):
    y, s, C = sample
    penalties = (0.01, 1.0, 100.0)
    by_hand = np.zeros(3)
    for out in np.array_split(np.arange(len(s)), 4):
        kept = np.setdiff1d(np.arange(len(s)), out)
        for p, kappa in enumerate(penalties):
            path, gamma, _ = stacked(y[kept], s[kept], C[kept], kappa)
            missed = y[out] - np.multiply.outer(s[out], path) - C[out] @ gamma
            by_hand[p] += (missed**2).sum()
    smoothers = rivals._smoothers(H + 1, 3, penalties)
    np.testing.assert_allclose(rivals._missed(y, s, C, smoothers, 4), by_hand, rtol=1e-9)
    chosen = rivals.smooth(y, s, C, LEVEL, generator(), penalties=penalties, folds=4)
    alone = penalties[int(by_hand.argmin())]
    same = rivals.smooth(y, s, C, LEVEL, generator(), penalties=(alone,))
    np.testing.assert_allclose(chosen.mean, same.mean, rtol=0, atol=1e-12)


def test_a_horizon_without_error_has_no_width():
    design = designs.arma(0, horizons=H)
    y, s, C, _ = projected(design, design.make(generator(16), 160), 1)
    y[:, 0] = 2 * s
    for kind in ("hac", "hc3"):
        band = rivals.frequentist(y, s, C, LEVEL, generator(), kind)
        assert band.mean[0] == pytest.approx(2, rel=1e-12)
        assert halves(band)[1:].min() > 0.1
        assert abs(band.upper[0] - band.lower[0]) < 1e-12


def test_what_rivals_refuse(sample):
    y, s, C = sample
    with pytest.raises(ValueError, match=r"level 1: must be between 0 and 1"):
        rivals.sandwich(y, s, C, 1, generator())
    with pytest.raises(ValueError, match=r"kind 'white': write 'hac' or 'hc3'"):
        rivals.frequentist.__wrapped__(y, s, C, LEVEL, generator(), kind="white")
    with pytest.raises(ValueError, match=r"noise of 4 columns for 9 horizons: give \(4000, 9\)"):
        rivals._sup_t.__wrapped__(np.eye(9), LEVEL, np.zeros((10, 4)))
    with pytest.raises(ValueError, match=r"10 rows of leads, 150 of shocks, 150 of controls"):
        rivals._refuse_rows(y[:10], s, C)
    with pytest.raises(ValueError, match=r"8 rows for 8 coefficients a horizon: take fewer lags"):
        rivals.sandwich(y[:8], s[:8], C[:8], LEVEL, generator())
    with pytest.raises(ValueError, match=r"exact function of the controls"):
        rivals.sandwich(y, C[:, 1] - C[:, 2], C, LEVEL, generator())
    with pytest.raises(ValueError, match=r"order 9: differences of 9 horizons need 1 to 8"):
        rivals.smooth(y, s, C, LEVEL, generator(), order=9)
    with pytest.raises(ValueError, match=r"penalties \(-1.0,\): give at least one"):
        rivals.smooth(y, s, C, LEVEL, generator(), penalties=(-1.0,))
    with pytest.raises(ValueError, match=r"folds 1: must be 2 to the number of rows, 150"):
        rivals.smooth(y, s, C, LEVEL, generator(), folds=1)
