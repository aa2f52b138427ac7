"""GMM estimates against linearmodels, which works on the rows, and against closed forms."""

from functools import cache

import jaxtyping
import numpy as np
import pytest
from linearmodels.datasets import card, mroz
from linearmodels.iv import IVGMM, IVGMMCUE
from numpy.testing import assert_allclose
from threadpoolctl import threadpool_limits

from hakari.inference.covariance import Covariance
from hakari.inference.gmm import estimate
from hakari.inference.moments import LinearMoments
from hakari.inference.posterior import QuasiPosterior
from hakari.inference.prior import Flat

FORMULAS = {
    "card": "lwage ~ 1 + exper + expersq + black + south + smsa + [educ ~ nearc2 + nearc4]",
    "mroz": "lwage ~ 1 + exper + expersq + [educ ~ motheduc + fatheduc]",
}
LINEARMODELS = {  # ours -> weight_type and its options; theirs centres the residuals of iid
    ("robust", False): ("robust", {}),
    ("robust", True): ("robust", {"center": True}),
    ("iid", True): ("unadjusted", {}),
    ("cluster:age", False): ("clustered", {"clusters": "age"}),
    ("hac:4", False): ("kernel", {"bandwidth": 4, "kernel": "bartlett"}),
    ("hac:6:parzen", True): ("kernel", {"bandwidth": 6, "kernel": "parzen", "center": True}),
}
CASES = [(data, kind, centred) for data in FORMULAS for kind, centred in LINEARMODELS]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring in matrices of this size, above all on shared cores."""
    with threadpool_limits(1):
        yield


@cache
def table(data, standardised=False):
    frame = card.load() if data == "card" else mroz.load().dropna(subset=["lwage"])
    frame = frame.reset_index(drop=True)
    if standardised:
        used = [name for name in frame if name in FORMULAS[data]]
        frame[used] = (frame[used] - frame[used].mean()) / frame[used].std()
    return frame


def reference(model, data, kind, centred, standardised=False, **fit):
    frame = table(data, standardised)
    weight, options = LINEARMODELS[kind, centred]
    options = {"center": False, **options}  # IVGMMCUE would centre
    options = {k: frame[v] if k == "clusters" else v for k, v in options.items()}
    fitted = model.from_formula(FORMULAS[data], frame, weight_type=weight, **options)
    return fitted.fit(cov_type=weight, **options, **fit)


def moments(data, kind, centred, standardised=False):
    return LinearMoments.from_formula(
        FORMULAS[data], table(data, standardised), kind, centred=centred
    )


@pytest.mark.parametrize(("data", "kind", "centred"), CASES)
@pytest.mark.parametrize(("method", "rounds"), [("two-step", 2), ("iterated", 1000)])
def test_equals_linearmodels(data, kind, centred, method, rounds):
    ours = estimate(moments(data, kind, centred), method)
    theirs = reference(IVGMM, data, kind, centred, iter_limit=rounds, tol=1e-26)
    names = list(ours.names)
    assert ours.converged
    assert_allclose(ours.theta, theirs.params[names], rtol=1e-8)
    assert_allclose(ours.std_error, theirs.std_errors[names], rtol=1e-8)
    assert_allclose(ours.covariance, theirs.cov.loc[names, names], rtol=1e-6, atol=1e-14)
    assert ours.J.value == pytest.approx(theirs.j_stat.stat, rel=1e-8)
    assert ours.J.p_value == pytest.approx(theirs.j_stat.pval, rel=1e-7)
    assert ours.J.df == theirs.j_stat.df


def test_default_errors_of_linearmodels_are_those_of_robust():
    ours = estimate(moments("card", "robust", False))
    theirs = IVGMM.from_formula(FORMULAS["card"], table("card")).fit()
    assert_allclose(ours.std_error, theirs.std_errors[list(ours.names)], rtol=1e-8)


@pytest.mark.parametrize(("data", "kind", "centred"), CASES)
def test_cue_equals_linearmodels_and_lies_lower(data, kind, centred):
    ours = estimate(moments(data, kind, centred, standardised=True), "cue")
    theirs = reference(IVGMMCUE, data, kind, centred, True, opt_options={"options": {"gtol": 1e-8}})
    names = list(ours.names)
    error = theirs.std_errors[names].to_numpy()
    assert ours.converged
    assert ours.note is None
    assert_allclose(ours.theta / error, theirs.params[names] / error, atol=5e-5)  # theirs is loose
    assert_allclose(ours.std_error, error, rtol=1e-5)
    assert theirs.j_stat.stat - 1e-6 < ours.J.value < theirs.j_stat.stat + 1e-12


@pytest.mark.parametrize("data", FORMULAS)
def test_cue_is_the_same_in_other_units(data):
    frame = table(data)
    scaled = estimate(moments(data, "robust", False, standardised=True), "cue")
    plain = estimate(moments(data, "robust", False), "cue")
    k = plain.names.index("educ")
    back = frame["lwage"].std() / frame["educ"].std()
    assert plain.theta[k] == pytest.approx(scaled.theta[k] * back, rel=1e-8)
    assert plain.std_error[k] == pytest.approx(scaled.std_error[k] * back, rel=1e-8)
    assert plain.J.value == pytest.approx(scaled.J.value, rel=1e-10)


def test_centring_bends_the_criterion_but_keeps_its_minimum():
    plain = estimate(moments("card", "robust", False), "cue")
    centred = estimate(moments("card", "robust", True), "cue")
    n = len(table("card"))
    assert_allclose(plain.theta, centred.theta, rtol=1e-7)
    assert plain.J.value == pytest.approx(centred.J.value / (1 + centred.J.value / n), rel=1e-9)


def draws(seed, strength, n=200, excluded=3):
    rng = np.random.default_rng(seed)
    Z = np.column_stack([np.ones(n), rng.standard_normal((n, excluded))])
    error = rng.standard_normal(n)
    x = strength * Z[:, 1] + 0.8 * error + 0.6 * rng.standard_normal(n)
    return x + error, np.column_stack([np.ones(n), x]), Z


@pytest.mark.parametrize("method", ["two-step", "iterated", "cue"])
def test_just_identified_is_instrumental_variables_without_J(method):
    y, X, Z = draws(1, 1.0, excluded=1)
    found = estimate(LinearMoments.from_arrays(y, X, Z), method)
    assert_allclose(found.theta, np.linalg.solve(Z.T @ X, Z.T @ y), rtol=1e-10)
    assert np.isnan(found.J.value)
    assert np.isnan(found.J.p_value)
    assert found.J.df == 0
    assert "as many moments as parameters (2)" in found.J.note


@pytest.mark.parametrize("method", ["two-step", "iterated", "cue"])
def test_general_moments_and_shards(method):
    y, X, Z = draws(2, 1.0)
    G, g = Z[:, :, None] * X[:, None, :], Z * y[:, None]
    whole = LinearMoments.from_moments(G, g)
    shards = LinearMoments.from_moments(G[:90], g[:90]) + LinearMoments.from_moments(G[90:], g[90:])
    found = estimate(whole, method)
    assert found.theta[1] == pytest.approx(1.0, abs=5 * found.std_error[1])
    if method == "two-step":  # the first step weighs the moments by their size in the first shard
        return
    assert_allclose(estimate(shards, method).theta, found.theta, rtol=1e-9)
    instruments = estimate(LinearMoments.from_arrays(y, X, Z), method)
    assert_allclose(instruments.theta, found.theta, rtol=1e-9)
    assert_allclose(instruments.covariance, found.covariance, rtol=1e-8)


def test_cue_that_runs_off_says_so():
    y, X, Z = draws(36, 0.0)  # a flat criterion: 4.383 at its lowest, 4.393 at infinity
    found = estimate(LinearMoments.from_arrays(y, X, Z), "cue")
    assert not found.converged
    assert "did not converge" in found.note
    assert "instruments are weak" in found.note


def test_iterations_that_cycle_say_so(monkeypatch):
    monkeypatch.setattr("hakari.inference.gmm.ROUNDS", 2)
    found = estimate(moments("card", "robust", False), "iterated")
    assert not found.converged
    assert "after 2 rounds" in found.note


def test_bad_input_is_named(monkeypatch):
    y, X, Z = draws(3, 1.0)
    good = LinearMoments.from_arrays(y, X, Z)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user's process
    with pytest.raises(ValueError, match=r"GMM method 'liml': use one of two-step, iterated, cue"):
        estimate(good, "liml")
    few = LinearMoments.from_arrays(
        y, X, Z, covariance=Covariance("cluster"), clusters=np.arange(200) % 3
    )
    with pytest.raises(ValueError, match="singular at the estimate: rank 3 for 4 moments"):
        estimate(few)


@pytest.mark.parametrize(("method", "whole"), [("cue", 1.086), ("two-step", 1.004)])
def test_curvature_of_the_modes_on_card(method, whole):
    """CUE's variance is the curvature with the weighting held; Ω's own bending adds 8.6 %.

    Two-step GMM's variance has Ω at the second step, its criterion at the first: 0.4 %.
    """
    options = {"determinant": False} if method == "cue" else {"weighting": "two-step"}
    stats = moments("card", "robust", False)
    found = estimate(stats, method)
    posterior = QuasiPosterior(stats, Flat(), **options)

    def gradient(theta):
        return posterior.log_density_and_gradient(theta)[1]

    assert np.abs(gradient(found.theta) * found.std_error).max() < 1e-4, "the mode"
    omega = stats.covariance_at(found.theta)
    back = np.linalg.inv(stats.scale.left)
    slope = (back @ stats.mean_C @ np.linalg.inv(stats.scale.right))[:, 1:]  # of m in −θ
    held = np.linalg.inv(stats.n * slope.T @ np.linalg.solve(omega, slope))
    assert_allclose(np.sqrt(np.diag(held)), found.std_error, rtol=1e-6)
    step, axes = 1e-3, posterior.whitened.factor.T
    rows = [gradient(found.theta + step * a) - gradient(found.theta - step * a) for a in axes]
    hessian = np.array(rows) @ axes.T / (2 * step)
    spread = axes.T @ np.linalg.inv(-hessian) @ axes
    ratio = np.sqrt(np.diag(spread)) / found.std_error
    assert ratio[-1] == pytest.approx(whole, abs=2e-3)
