"""Continuous updating of local projections, against the density row by row and quadrature."""

from __future__ import annotations

from dataclasses import replace

import arviz_stats as az
import numpy as np
import pytest

import hakari.inference as hi
from benchmarks.lp_designs import var1
from hakari.inference import continuous_updating, projection_sampling
from hakari.inference.continuous_updating import ByRows, rank_one
from hakari.inference.influence import moving_sums
from hakari.inference.projection_moments import gaussian_prior

NAMES = {False: "without the determinant", True: "with the determinant"}


def projection(T=250, H=3, seed=0, **options):
    design = var1(0.9, H)
    table = design.make(np.random.default_rng(seed), T)
    options = {"lags": 2, "shock_lags": 0, "controls": ["x1", "x2"]} | options
    return hi.LocalProjection(table, "y", "shock", horizons=H, **options)


def by_rows(lp, covariance, precision, determinant):
    """The log density from its rows: each β its own Ω, inverse and determinant."""
    a, b = lp.moment_rows(0)
    left = 1 - lp.leverage if covariance == "hc3" else 1.0

    def density(beta):
        g = a - b[:, :, 0] * beta
        rows = g / left
        if covariance.startswith("hac"):
            rows = moving_sums(g[lp.parts[0].rows], int(covariance[4:]))
        omega = rows.T @ rows / len(a)
        m = g.sum(axis=0) / len(a)
        value = -0.5 * len(a) * precision * m @ np.linalg.inv(omega) @ m
        return value - 0.5 * determinant * np.linalg.slogdet(omega)[1]

    return density


def points(lp, N=6):
    sd = lp.standard_errors()[0, 0]
    return lp.estimate[0, 0] + sd * 2 * np.random.default_rng(1).standard_normal((N, len(sd)))


# --- the density ----------------------------------------------------------------------------


@pytest.mark.parametrize("determinant", [False, True], ids=NAMES.get)
@pytest.mark.parametrize(
    ("covariance", "sample"),
    [(c, "common") for c in ("hc0", "hc3", "hac:3")] + [(c, "available") for c in ("hc0", "hc3")],
)
def test_both_forms_are_the_density_row_by_row(covariance, sample, determinant):
    lp = projection(sample=sample)
    posterior = lp.posterior(
        hi.RoughnessPenalty(1, 0.3),
        covariance=covariance,
        weighting="continuous",
        determinant=determinant,
    )
    form = posterior.updating[0]
    assert isinstance(form, ByRows) == (sample == "available")
    direct = by_rows(lp, covariance, posterior.paths[0].precision, determinant)
    at = points(lp)
    found, expected = form.log_likelihood(at), np.array([direct(beta) for beta in at])
    np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-8, atol=1e-8)


def test_the_frozen_curvature_is_that_of_the_updated_criterion():
    """At the estimate the moments vanish: the Hessian of the criterion is hV⁻¹ exactly."""
    posterior = projection().posterior(
        hi.RoughnessPenalty(1, 0.3), weighting="continuous", determinant=False
    )
    path, form = posterior.paths[0], posterior.updating[0]
    step = 1e-4 * np.sqrt(np.diag(path.covariance))
    for move in np.random.default_rng(2).standard_normal((4, len(step))) * step:
        both = path.estimate + np.stack([move, -move])
        curve = -form.log_likelihood(both).sum()
        assert curve == pytest.approx(move @ path.weight @ move, rel=1e-5)


def test_it_is_the_general_quasi_posterior_of_the_concentrated_moments():
    lp = projection()
    posterior = lp.posterior(hi.RoughnessPenalty(1, 0.3), covariance="hc0", weighting="continuous")
    form = replace(posterior.updating[0], precision=1.0)
    general = hi.QuasiPosterior(lp.moments("y", "robust"))
    at = points(lp)
    gap = form.log_likelihood(at) - general.log_density(at)
    np.testing.assert_allclose(gap, gap[0], atol=1e-8)


def test_a_wrong_sign_in_sherman_and_morrison_would_be_seen():
    lp = projection()
    posterior = lp.posterior(hi.RoughnessPenalty(1, 0.3), covariance="hc0", weighting="continuous")
    direct = by_rows(lp, "hc0", posterior.paths[0].precision, True)
    right = posterior.updating[0]
    at = points(lp)
    expected = np.array([direct(beta) for beta in at])
    for mutant in (
        replace(right, d=-right.d * 1e-3),
        replace(right, d=2 * right.d),
        replace(right, slope=-right.slope),
        replace(right, determinant=False),
        replace(right, centre=right.centre * 1.05),
    ):
        found = mutant.log_likelihood(at)
        assert np.abs((found - found[0]) - (expected - expected[0])).max() > 1e-3


# --- the trap -------------------------------------------------------------------------------


def test_the_criterion_is_bounded_by_the_shocks_own_moments():
    """−2 log L/h → b̄²/d far out along f, and |f|² more across it; about n/3 of a Gaussian shock."""
    posterior = projection(T=3000).posterior(
        hi.RoughnessPenalty(1, 0.3), "hc0", weighting="continuous", determinant=False
    )
    form = posterior.updating[0]
    n = posterior.projection.rows_used[0]
    size, bound = form.f @ form.f, form.slope**2 / form.d
    across = np.linalg.svd(form.f[None])[2][1:]
    rays = np.concatenate([form.f[None] / np.sqrt(size), across]) @ form.root.T
    far = -2 * form.log_likelihood(form.centre + 1e8 * rays) / form.precision
    np.testing.assert_allclose(far, [bound, *[bound + size] * 3], rtol=1e-6)
    assert bound == pytest.approx(n / 3, rel=0.1)
    assert size < 20


@pytest.mark.parametrize("H", [12, 24])
@pytest.mark.parametrize("determinant", [False, True], ids=NAMES.get)
def test_a_flat_prior_over_many_horizons_is_refused(H, determinant):
    lp = projection(T=200, H=H)
    with pytest.raises(
        ValueError,
        match=rf"quasi-posterior of y over {H + 1} coefficients is improper under a flat prior: "
        r"its criterion is bounded, .* falls by only \d+\.\d log units \(at least 15 are "
        r"needed\) before it grows like r\^\d+\. Give a proper prior",
    ):
        lp.posterior(weighting="continuous", determinant=determinant)
    lp.posterior(hi.RoughnessPenalty(), weighting="continuous", determinant=determinant)


def test_a_flat_prior_over_few_horizons_of_many_dates_is_not():
    projection(T=1000, H=3).posterior(weighting="continuous")


def test_a_walk_leaves_what_is_refused_and_stays_in_what_is_not():
    """What the refusal claims: where it is refused, a random walk drifts off for good."""
    moved = {}
    for T, H in ((200, 24), (1000, 3)):
        lp = projection(T=T, H=H)
        proper = lp.posterior(hi.RoughnessPenalty(), "hc0", weighting="continuous")
        form = replace(proper.updating[0], precision=1.0)
        root = np.linalg.cholesky(lp.score_rows("hc0").T @ lp.score_rows("hc0"))
        rng, z = np.random.default_rng(5), np.zeros(H + 1)
        value = form.log_likelihood(lp.estimate[0, 0][None])[0]
        for _ in range(4000):
            there = z + rng.standard_normal(H + 1) * 2.38 / np.sqrt(H + 1)
            new = form.log_likelihood((lp.estimate[0, 0] + root @ there)[None])[0]
            if np.log(rng.random()) < new - value:
                z, value = there, new
        moved[H] = np.sqrt(z @ z)
    assert moved[24] > 40
    assert moved[3] < 6


# --- what cannot be -------------------------------------------------------------------------


def test_rows_must_outnumber_horizons():
    rows = np.random.default_rng(0).standard_normal((4, 6))
    with pytest.raises(ValueError, match="Ω of 6 horizons is singular with 4 rows: continuous"):
        rank_one(rows.sum(axis=0), 3.0, rows, rows[:, 0] + 1, 1.0, True)


def test_a_response_to_itself_at_once_has_no_weighting():
    """Its moment is zero at every date: rounding errors must not be factored as a variance."""
    table = var1(0.9, 4).make(np.random.default_rng(0), 250)
    lp = hi.LocalProjection(table, "y", "y", controls=["x1", "x2"], lags=2, horizons=4)
    with pytest.raises(ValueError, match="leave out 0 of a shock's response to itself"):
        lp.posterior(hi.RoughnessPenalty(), weighting="continuous")
    later = hi.LocalProjection(table, "y", "y", controls=["x1", "x2"], lags=2, horizons=range(1, 5))
    later.posterior(hi.RoughnessPenalty(), weighting="continuous")


@pytest.mark.parametrize("method", ["da-approx", "mh"])
def test_kernels_for_frozen_weighting_say_so(method):
    posterior = projection().posterior(hi.RoughnessPenalty(1, 0.3), weighting="continuous")
    with pytest.raises(ValueError, match=f"method '{method}' is for weighting='frozen'"):
        hi.sample(posterior, method, draws=10, chains=1, seed=1)


# --- its samplers ---------------------------------------------------------------------------


def test_flat_draws_have_the_exact_law_in_two_dimensions():
    """The density depends on x through u = x·f/|f| and r = |x − u f/|f||: volume r^(q−2) du dr."""
    posterior = projection(T=600, H=4).posterior(covariance="hc0", weighting="continuous")
    form, q = posterior.updating[0], 5
    theta = hi.sample(posterior, draws=5000, chains=4, seed=1)["posterior"].dataset["theta"]
    x = np.linalg.solve(form.root, (theta.values - form.centre).reshape(-1, q).T).T
    length = np.sqrt(form.f @ form.f)
    u = x @ form.f / length
    r = np.sqrt((x**2).sum(axis=1) - u**2)
    centre, spread = u.mean(), u.std()
    U, R = np.meshgrid(
        np.linspace(centre - 9 * spread, centre + 9 * spread, 500),
        np.linspace(1e-9, 4 * r.max() / 2, 500),
        indexing="ij",
    )
    across = np.linalg.svd(form.f[None])[2][1]  # a direction at right angles to f
    at = U.ravel()[:, None] * form.f / length + R.ravel()[:, None] * across
    log_mass = form.log_likelihood(form.centre + at @ form.root.T) + (q - 2) * np.log(R.ravel())
    mass = np.exp(log_mass - log_mass.max())
    mass /= mass.sum()
    ess = 4000  # of 20,000 draws, at least
    for draw, node in ((u, U.ravel()), (r, R.ravel())):
        mean = mass @ node
        sd = np.sqrt(mass @ node**2 - mean**2)
        assert draw.mean() == pytest.approx(mean, abs=4 * sd / np.sqrt(ess))
        assert draw.std() == pytest.approx(sd, rel=4 / np.sqrt(2 * ess))


LEVELS = (0.1, 0.5, 0.9)  # tails are long: quantiles say more than standard deviations


@pytest.fixture(scope="module")
def smoothed():
    """A posterior with few rows, where updated and frozen weighting differ visibly."""
    lp = projection(T=120, H=3, seed=2)
    return lp.posterior(hi.RoughnessPenalty(1, 0.5), "hc0", weighting="continuous")


@pytest.fixture(scope="module")
def reference(smoothed):
    """Draws of the same target by a kernel for any moments."""
    lp = smoothed.projection
    general = hi.QuasiPosterior(lp.moments("y", "robust"), gaussian_prior(smoothed, "y"))
    draws = hi.sample(general, "independence", draws=5000, chains=4, seed=3)
    return draws["posterior"].dataset["theta"].values


def unfactored(posterior):
    """The same with precision 1 throughout."""
    copy = replace(posterior)
    paths = tuple(replace(path, precision=1.0) for path in posterior.paths)
    copy.__dict__["paths"] = paths
    copy.__dict__["updating"] = tuple(replace(u, precision=1.0) for u in posterior.updating)
    return copy


def gap(posterior, method, reference):
    """Largest gap of shares below the reference's quantiles, in Monte Carlo errors."""
    draws = hi.sample(posterior, method, draws=5000, chains=4, seed=4)
    mine, found = draws["posterior"].dataset["theta"].values, []
    for k in range(mine.shape[2]):
        for level in LEVELS:
            edge = np.quantile(reference[..., k], level)
            below = [(draws[..., k] < edge).astype(float) for draws in (mine, reference)]
            error = np.sqrt(sum(level * (1 - level) / float(az.ess(b)) for b in below))
            found.append(abs(below[0].mean() - level) / error)
    return max(found)


@pytest.mark.parametrize("method", ["concentrated", "gibbs"])
def test_kernels_agree_with_the_general_one(smoothed, reference, method):
    assert gap(unfactored(smoothed), method, reference) < 4.5


def test_proposals_without_the_student_term_fail(smoothed, reference, monkeypatch):
    monkeypatch.setattr(projection_sampling, "DF", 3.0)  # wide enough to be seen
    assert gap(unfactored(smoothed), "concentrated", reference) < 4.5
    monkeypatch.setattr(
        projection_sampling,
        "_gaussian_over_student",
        lambda path, theta, log_tau: np.zeros(len(theta)),
    )
    assert gap(unfactored(smoothed), "concentrated", reference) > 6


def test_frozen_weighting_is_not_the_same(smoothed, reference):
    frozen = replace(unfactored(smoothed), weighting="frozen")
    frozen.__dict__["paths"] = unfactored(smoothed).paths
    assert gap(frozen, "concentrated", reference) > 6


def test_barrier_is_the_one_of_all_quasi_posteriors():
    assert continuous_updating.BARRIER == 15.0
