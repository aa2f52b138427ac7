"""Losses in JAX: the numbers of NumPy in double precision, exact derivatives, the law of NUTS."""

from __future__ import annotations

import subprocess
import sys

import arviz_stats as az
import jax.numpy as jnp
import joblib
import numpy as np
import pytest
from scipy.stats import loggamma, norm, t

import hakari.inference as hi
from hakari.inference.gibbs import jax_loss, samplers
from hakari.inference.gibbs.risk import CustomRisk
from hakari.inference.gibbs.sandwich import CubeRootError, sandwich
from hakari.inference.gibbs.target import target_of

WORST = 4.5  # Monte Carlo errors, of some 30 comparisons
RNG = np.random.default_rng(3)
X = np.column_stack([np.ones(90), RNG.standard_normal((90, 2)) + 1])
MEAN = X @ [0.5, 0.3, -0.2]
Y = MEAN + RNG.standard_t(4, 90)
CLASSES = (RNG.random(90) < 1 / (1 + np.exp(-MEAN))) * 1.0


def log_cosh(theta, rows):
    y, X = rows
    return jnp.log(jnp.cosh(y - X @ theta))


def squared(theta, rows):
    return (rows[0] - rows[1] @ theta) ** 2 / 2


def logistic(theta, rows):
    f = rows[1] @ theta
    return jnp.logaddexp(0, f) - rows[0] * f


def check(theta, rows):
    gap = rows[0] - rows[1] @ theta
    return gap * (0.5 - (gap < 0))


def pair(function, named, y=Y):
    """The posterior of a loss in JAX, and of the compiled one of the same formula."""
    loss = hi.losses.from_jax(function)
    return hi.GibbsPosterior(loss, (y, X), start=np.zeros(3)), hi.GibbsPosterior(named, (y, X))


# --- the same numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 64, 130])
def test_values_are_those_of_numpy(count):
    theta = np.random.default_rng(count).standard_normal((count, 3))
    found = hi.losses.from_jax(log_cosh).values(theta, (Y, X))
    expected = np.log(np.cosh(Y - theta @ X.T))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_derivatives_are_the_closed_ones():
    loss, theta = hi.losses.from_jax(log_cosh), np.array([0.2, -0.4, 0.7])
    gap = Y - X @ theta
    slopes = -np.tanh(gap)[:, None] * X
    np.testing.assert_allclose(loss.gradient(theta, (Y, X)), slopes, rtol=1e-12)
    few = loss.gradient(theta, (Y[:2], X[:2]))  # by reverse mode: fewer rows than coefficients
    np.testing.assert_allclose(few, slopes[:2], rtol=1e-12)
    bend = (X.T / np.cosh(gap) ** 2) @ X
    np.testing.assert_allclose(loss.curvature(theta, (Y, X)), bend, rtol=1e-12)


@pytest.mark.parametrize(
    ("function", "named", "y"),
    [(squared, hi.losses.squared(), Y), (logistic, hi.losses.logistic(), CLASSES)],
)
def test_minimiser_sandwich_and_rate_are_those_of_the_compiled_loss(function, named, y):
    ours, theirs = pair(function, named, y)
    np.testing.assert_allclose(ours.minimiser, theirs.minimiser, rtol=1e-12)
    for name in ("curvature", "score_variance", "covariance"):
        one, other = getattr(ours.sandwich, name), getattr(theirs.sandwich, name)
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12 * np.abs(other).max())
    rates = [hi.calibrate(p, replicates=200, seed=1).rates for p in (ours, theirs)]
    np.testing.assert_allclose(rates[0]["rate"], rates[1]["rate"], rtol=1e-12)


def test_at_kinks_and_jumps_differences_hold_and_not_the_second_derivative():
    loss = hi.losses.from_jax(check)
    plain = hi.Loss(loss.function, batched=True, name="check")
    start = np.zeros(3)
    with_it, without = (CustomRisk(one, (Y, X), ("a", "b", "c"), start) for one in (loss, plain))
    theta = with_it.minimiser
    assert np.abs(with_it.curvature(theta)).max() == 0
    found, expected = sandwich(with_it, theta), sandwich(without, theta)
    np.testing.assert_array_equal(found.curvature, expected.curvature)
    np.testing.assert_array_equal(found.score_variance, expected.score_variance)
    wrong_side = hi.losses.from_jax(lambda theta, x: jnp.sign(x - theta[0]) * jnp.sign(x))
    risk = CustomRisk(wrong_side, X[:, 1], ("a",), np.array([0.3]))
    with pytest.raises(CubeRootError, match="jumps"):
        sandwich(risk, np.array([0.3]))


def test_double_precision_whatever_the_process_has_and_it_keeps_that():
    assert jnp.ones(1).dtype == jnp.float32
    seen = []

    def tiny(theta, rows):
        seen.append((theta.dtype, rows["x"].dtype, rows["count"].dtype))
        return (1 + rows["x"] * theta[0]) - 1 + 0 * rows["count"]

    loss = hi.losses.from_jax(tiny)
    rows = {"x": np.full(5, 2.0**-40, dtype=np.float32), "count": np.arange(5)}
    np.testing.assert_array_equal(loss.values(np.ones((1, 1)), rows), np.full((1, 5), 2.0**-40))
    assert seen == [(np.float64, np.float64, np.int64)]
    assert jnp.ones(1).dtype == jnp.float32


def test_few_shapes_are_compiled_and_rows_are_converted_once(monkeypatch):
    traced, converted = [], []
    honest = jax_loss._array
    monkeypatch.setattr(jax_loss, "_array", lambda leaf: converted.append(1) or honest(leaf))

    def counted(theta, rows):
        traced.append(1)
        return squared(theta, rows)

    loss, rows = hi.losses.from_jax(counted), (Y, X)
    for count in (*range(1, 70), 1000, 1001):
        assert loss.values(np.zeros((count, 3)), rows).shape == (count, 90)
    assert len(traced) <= 7  # 1, 2, 4, ..., 64
    assert len(converted) == 2
    np.testing.assert_allclose(loss.values(np.zeros((1, 3)), (2 * Y, X))[0], 2 * Y**2)


# --- NUTS -----------------------------------------------------------------------------------

RATE = 0.4
SMALL = np.random.default_rng(8).normal([0.5, 2.0, -1.0], 1.0, (12, 3))
COUNTS = np.array([0.0, 1, 0, 2, 1, 0, 0, 3, 0, 1, 0, 0])
NAMES = ["normal", "student", "flat", "gamma"]


def product(theta, rows):
    """A loss whose posterior is a product of four known laws."""
    y, counts = rows
    skewed = jnp.exp(theta[3]) - counts * theta[3]
    return ((y - theta[:3]) ** 2).sum(axis=1) / 2 + skewed


@pytest.fixture(scope="module")
def posterior():
    prior = [hi.Normal(0.2, 0.3, names=["normal"]), hi.StudentT(3, 0.0, 0.1, names=["student"])]
    loss = hi.losses.from_jax(product)
    return hi.GibbsPosterior(loss, (SMALL, COUNTS), prior, RATE, names=NAMES, start=[0, 0, 0, 0])


def theta(result):
    return result["posterior"]["theta"].values


def quantiles(shares):
    """Of each coefficient's exact law: closed forms, and a sum over a grid for the Student's."""
    P, mean = RATE * 12, SMALL.mean(axis=0)
    centre, grid = (P * mean[0] + 0.2 / 0.3) / (P + 1 / 0.3), np.linspace(-1, 4, 20_001)
    density = np.exp(-P * (grid - mean[1]) ** 2 / 2) * t(3).pdf(grid / 0.1**0.5)
    return np.stack(
        [
            norm(centre, (P + 1 / 0.3) ** -0.5).ppf(shares),
            np.interp(shares, np.cumsum(density) / density.sum(), grid),
            norm(mean[2], P**-0.5).ppf(shares),
            loggamma(RATE * COUNTS.sum()).ppf(shares) - np.log(P),
        ]
    )


def test_nuts_has_the_law_of_the_posterior(posterior):
    shares = [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98]
    result = hi.sample(posterior, "nuts", draws=2000, seed=2)
    gaps = []
    for draws, cuts in zip(np.moveaxis(theta(result), 2, 0), quantiles(shares), strict=True):
        for share, cut in zip(shares, cuts, strict=True):
            below = (draws < cut) * 1.0
            error = below.std() / np.sqrt(float(az.ess(below, method="mean")))
            gaps.append(abs(below.mean() - share) / error)
    assert max(gaps) < WORST
    lp = result["sample_stats"]["lp"].values
    np.testing.assert_allclose(lp, posterior.log_density(theta(result)), rtol=1e-11)
    assert hi.convergence_notes(result) == []
    assert result.attrs["method"] == "nuts"
    assert result["checks"]["divergences"].values.tolist() == [0, 0, 0, 0]
    assert result.attrs["evaluations"] == result["sample_stats"]["n_steps"].sum()
    assert 0.75 < result["checks"]["acceptance"].values.mean() < 0.97


def test_draws_are_those_of_the_seed_whatever_the_workers_and_blocks(posterior, monkeypatch):
    found = []
    for workers, block in ((1, 50), (3, 37)):
        monkeypatch.setattr(joblib, "effective_n_jobs", lambda n, w=workers: w)
        monkeypatch.setattr(samplers, "BLOCK_LOCKSTEP", block)
        found.append(theta(hi.sample(posterior, "nuts", draws=120, chains=3, seed=5)))
    np.testing.assert_allclose(*found, rtol=1e-12)
    other = theta(hi.sample(posterior, "nuts", draws=120, chains=3, seed=6))
    assert not np.isin(other, found[0]).any()
    assert not np.isin(found[0][0], found[0][1]).any()


def test_interrupted_keeps_its_blocks(posterior, monkeypatch):
    honest, calls = samplers.advance, []

    def impatient(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return honest(*arguments)

    whole = hi.sample(posterior, "nuts", draws=150, chains=2, seed=5)
    monkeypatch.setattr(samplers, "advance", impatient)
    part = hi.sample(posterior, "nuts", draws=150, chains=2, seed=5)
    assert part.attrs["interrupted"] == 1
    np.testing.assert_array_equal(theta(part), theta(whole)[:, :100])


def test_trajectories_that_leave_their_energy_count_as_divergent(posterior):
    plan = samplers.plan(posterior, "nuts")
    streams = [
        {"start": np.random.default_rng(c), "noise": np.random.default_rng(9 + c)} for c in (0, 1)
    ]
    chains = samplers.begin(plan, streams, 1000)
    good, _ = samplers.draw(plan, chains, 120, float)
    assert good.stats["diverging"].sum() == 0
    assert (good.stats["n_steps"] >= np.ones((2, 120))).all()
    long = chains.tuning._replace(size=np.full(2, 1e4))
    keys = np.arange(40, dtype=np.uint32).reshape(2, 10, 2)
    u, _, accepted, diverging, steps = jax_loss.moves(plan.target, chains.u, long, keys)
    assert (diverging & (steps == 1) & (accepted == 0)).all()
    np.testing.assert_array_equal(u, np.repeat(chains.u[:, None], 10, axis=1))


def test_log_density_is_the_targets_also_where_the_loss_overflows(posterior):
    target = target_of(posterior)
    function, problem = jax_loss._problem(target)
    u = np.random.default_rng(1).standard_normal((20, 4))
    u[0, 3] = 1e6
    with function.double():
        found = [float(jax_loss._log_density(function, problem, one)) for one in u]
    np.testing.assert_allclose(found, target.log_density(u), rtol=1e-12)
    assert found[0] == -np.inf


# --- refusals -------------------------------------------------------------------------------

WRONG = {
    "NumPy": (
        lambda t, r: np.log(np.cosh(r[0] - r[1] @ t)),
        (Y, X),
        "compiled by JAX: write it in",
    ),
    "branch": (lambda t, r: r[0] * t[0] if t[0] > 0 else r[0], (Y, X), "jnp.where for `if`"),
    "mask": (lambda t, r: (r[0] - t[0])[r[0] > t[0]], (Y, X), "for masks of rows"),
    "one number": (lambda t, r: squared(t, r).sum(), (Y, X), r"gave \(\): it must return \(n,\)"),
    "single": (lambda t, r: squared(t, r).astype("float32"), (Y, X), "computes in float32"),
    "words": (squared, (np.array(["a", "b"]), X), "rows hold ndarray of dtype <U1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_functions_and_rows_that_jax_cannot_take_are_named(case):
    function, rows, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        hi.GibbsPosterior(hi.losses.from_jax(function), rows, start=np.zeros(3))


def test_nuts_refuses_other_losses_and_gradients_that_are_no_numbers():
    for loss in (squared, hi.losses.squared()):
        start = [0.0, 0.0, 0.0] if loss is squared else None
        other = hi.GibbsPosterior(loss, (Y, X), start=start)
        with pytest.raises(ValueError, match=r"jax.numpy and 'squared' is not: give losses.from_j"):
            hi.sample(other, "nuts", draws=10, seed=1)

    def masked(theta, y):
        gap = y - theta[0]
        return jnp.where(gap > 0, jnp.sqrt(gap), -gap) + gap**2

    posterior = hi.GibbsPosterior(hi.losses.from_jax(masked), Y, start=[0.0])
    with pytest.raises(ValueError, match=r"gradient of loss 'masked' along theta\[0\] is nan at"):
        hi.sample(posterior, "nuts", draws=10, seed=1)


def test_without_jax_it_says_what_to_install(monkeypatch):
    for package in ("jax", "blackjax"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ModuleNotFoundError, match=rf"{package} .* 'hakari\[jax\]'"):
                hi.losses.from_jax(squared)
    code = (
        "import sys, hakari.inference; print([m for m in ('jax', 'blackjax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
