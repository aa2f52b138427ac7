"""What `sample` promises of Gibbs posteriors: seeds, interruption, saving, choosing, refusing."""

from __future__ import annotations

import jax.numpy as jnp
import joblib
import numpy as np
import pytest
import xarray as xr

import hakari.inference as hi
from hakari.inference.gibbs import samplers, smc

METHODS = ["mh", "smc", "pcn", "mala"]
PRIOR = hi.Normal([0.5, 0.0], [[1.0, 0.3], [0.3, 0.5]])
RNG = np.random.default_rng(3)
X = np.column_stack([np.ones(60), RNG.standard_normal((60, 9))])
Y = X @ np.linspace(0.5, 0.2, 10) + RNG.standard_normal(60)
FEW = X[:, :2]
CLASSES = np.where(X[:, 1] + RNG.standard_normal(60) > 0, 1.0, 0.0)
APART = np.where(X[:, 1] > 0, 1.0, 0.0)  # classes that X separates


@pytest.fixture(scope="module")
def posterior():
    return hi.GibbsPosterior(hi.losses.squared(), (Y, FEW), PRIOR, 0.3)


def squared(theta, rows):
    return (rows[0] - rows[1] @ theta) ** 2 / 2


def squared_slope(theta, rows):
    return -(rows[0] - rows[1] @ theta)[:, None] * rows[1]


def theta(result):
    return result["posterior"]["theta"].values


@pytest.mark.parametrize("method", METHODS)
def test_draws_are_those_of_the_seed_whatever_the_workers_and_blocks(
    posterior, method, monkeypatch
):
    found = []
    for workers, block in ((1, 1000), (3, 37)):
        monkeypatch.setattr(joblib, "effective_n_jobs", lambda n, w=workers: w)
        monkeypatch.setattr(samplers, "BLOCK", block)
        monkeypatch.setattr(samplers, "BLOCK_LOCKSTEP", block)
        monkeypatch.setattr(smc, "WORTH", 0)
        found.append(theta(hi.sample(posterior, method, draws=300, chains=3, seed=5)))
    np.testing.assert_array_equal(*found)
    other = theta(hi.sample(posterior, method, draws=300, chains=3, seed=6))
    assert not np.isin(other, found[0]).any()
    assert not np.isin(found[0][0], found[0][1]).any()


@pytest.mark.parametrize(
    ("method", "at", "name", "shape"),
    [("mh", samplers, "advance", (2, 2000, 2)), ("smc", smc, "temper", (2, 3000, 2))],
)
def test_interrupted_keeps_its_draws(posterior, method, at, name, shape, monkeypatch):
    whole = hi.sample(posterior, method, draws=3000, chains=shape[0], seed=9)
    honest, calls = getattr(at, name), []

    def impatient(*arguments):
        calls.append(1)
        if len(calls) > allowed:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(at, name, impatient)
    allowed = 2
    part = hi.sample(posterior, method, draws=3000, chains=3 if method == "smc" else 2, seed=9)
    assert part.attrs["interrupted"] == 1
    assert theta(part).shape == shape
    if method == "mh":
        np.testing.assert_array_equal(theta(part), theta(whole)[:, :2000])
    assert any("interrupted" in note for note in hi.summary(part).attrs["notes"])
    calls, allowed = [], 0
    with pytest.raises(KeyboardInterrupt):
        hi.sample(posterior, method, draws=3000, seed=9)


@pytest.mark.parametrize("method", METHODS)
def test_result_is_whole_after_saving_and_loading(posterior, method, tmp_path):
    result = hi.sample(posterior, method, draws=1500, seed=1, progress=True)
    hi.save(result, tmp_path / "r.nc")
    back = hi.load(tmp_path / "r.nc")
    for group in ("posterior", "sample_stats", "checks", "prior"):
        xr.testing.assert_identical(back[group].dataset, result[group].dataset)
    assert dict(back.attrs) == dict(result.attrs)
    known = {"method": method, "seed": 1, "learning_rate": 0.3, "loss": "squared"}
    assert {k: back.attrs[k] for k in known} == known
    stats = back["sample_stats"]
    np.testing.assert_allclose(stats["lp"], posterior.log_density(theta(back)), atol=1e-9)
    rate = stats["accepted"].values.mean()
    assert abs(rate - {"pcn": 1, "mala": 0.574}.get(method, 0.234)) < 0.06
    assert hi.summary(back)["ess_bulk"].min() > 800
    assert hi.convergence_notes(back) == []
    prior = back["prior"]["theta"].values[0]
    assert np.abs(np.cov(prior.T) - PRIOR.cov).max() < 0.15


def gibbs(loss, y=Y, X=FEW, prior=hi.Flat(), **more):  # noqa: B008
    return hi.GibbsPosterior(loss, (y, X), prior, **more)


SLOPE = hi.Loss(squared, gradient=squared_slope)
START = {"start": [0.0, 0.0]}
AUTO = [
    (gibbs(hi.losses.quantile(0.3)), "mh", "the quantile(0.3) loss is compiled"),
    (gibbs(hi.losses.squared(), X=X), "mala", "slopes, which pay with 10 coefficients"),
    (gibbs(SLOPE, **START), "mala", "comes with its gradient"),
    (gibbs(squared, **START), "mh", "the loss 'squared' comes without a gradient"),
    (
        hi.GibbsPosterior(
            hi.losses.threshold(), (X[:, 1], 2 * CLASSES - 1), hi.Normal(0, 1), start=[0.0]
        ),
        "smc",
        "jumps and may have several modes",
    ),
]


@pytest.mark.parametrize(("posterior", "method", "why"), AUTO)
def test_auto_says_what_it_chose_and_why(posterior, method, why):
    result = hi.sample(posterior, draws=20, chains=2, warmup=20, seed=1)
    assert result.attrs["method"] == method
    assert why in result.attrs["why"]


# --- refusals -------------------------------------------------------------------------------

REFUSED = [
    ("hmc", gibbs(squared, **START), "'hmc' is unknown: Gibbs posteriors have auto, mh, smc, pcn"),
    ("nuts", gibbs(squared, **START), "needs a loss written in jax.numpy and 'squared' is not"),
    ("mala", gibbs(hi.losses.hinge(), CLASSES), "needs a gradient and the hinge loss has kinks"),
    ("mala", gibbs(squared, **START), r"the loss 'squared' comes without one: give Loss\("),
    ("pcn", gibbs(hi.losses.squared()), r"theta\[0\] has a flat prior: give Normal\(mean"),
    (
        "pcn",
        gibbs(
            hi.losses.squared(),
            prior=[hi.Normal(0, 1, ["theta[0]"]), hi.StudentT(3, 0, 1, ["theta[1]"])],
        ),
        r"theta\[1\] has a Student prior",
    ),
]


@pytest.mark.parametrize(("method", "posterior", "message"), REFUSED)
def test_methods_that_do_not_fit_are_refused(method, posterior, message):
    with pytest.raises(ValueError, match=message):
        hi.sample(posterior, method, draws=10, seed=1)


def test_resuming_is_refused(posterior):
    result = hi.sample(posterior, draws=10, chains=1, warmup=10, seed=1)
    with pytest.raises(ValueError, match="draws of Gibbs posteriors are not continued"):
        hi.sample(posterior, resume=result)


def log_loss(theta, rows):
    return np.logaddexp(0, -(2 * rows[0] - 1) * (rows[1] @ theta))


COUNTS = np.where(X[:, 1] > 1, 0.0, RNG.poisson(2.0, 60) + 0.0)
RARE = np.column_stack([np.ones(60), X[:, 1] > 1])  # all counts are 0 where it is 1
UNUSED = np.array([*np.ones(57), 0, 0, 0])  # weights, 0 in the only rows with the regressor
HIDDEN = np.column_stack([np.ones(60), UNUSED == 0])
IMPROPER = {
    "logistic": (gibbs(hi.losses.logistic(), APART), "separates the classes"),
    "hinge": (gibbs(hi.losses.hinge(), APART), "separates the classes"),
    "half flat": (
        gibbs(hi.losses.hinge(), APART, prior=hi.Normal(0, 1, ["theta[0]"])),
        "separates",
    ),
    "poisson": (gibbs(hi.losses.poisson(), COUNTS, RARE), r"along theta\[1\] .* rows with y = 0"),
    "weights": (
        hi.GibbsPosterior(hi.losses.quantile(), (Y, HIDDEN, UNUSED)),
        r"along theta\[1\] .* is 0 in every row",
    ),
    "function": (gibbs(log_loss, APART, **START), "the log_loss loss does not grow"),
    "bounded": (
        hi.GibbsPosterior(hi.losses.smooth_threshold(0.1), (X[:, 1], 2 * APART - 1), start=[0.0]),
        r"improper .* along theta\[0\] the smooth_threshold\(0.1\) loss does not grow",
    ),
    "no such row": (
        gibbs(lambda t, rows: (rows[0] - t[0]) ** 2, **START),
        r"fall along theta\[1\]",
    ),
}


@pytest.mark.parametrize("case", IMPROPER)
@pytest.mark.parametrize("method", ["auto", "smc"])
def test_improper_posteriors_are_refused(case, method):
    posterior, message = IMPROPER[case]
    with pytest.raises(ValueError, match=message):
        hi.sample(posterior, method, draws=10, seed=1)


PROPER = {
    "overlapping classes": gibbs(hi.losses.hinge(), CLASSES),
    "overlapping, logistic": gibbs(hi.losses.logistic(), CLASSES),
    "counts": gibbs(hi.losses.poisson(), COUNTS),
    "closed by a prior": gibbs(hi.losses.poisson(), COUNTS, RARE, hi.Normal(0, 1, ["theta[1]"])),
    "apart, under a prior": gibbs(hi.losses.logistic(), APART, prior=PRIOR),
    "apart, hinge": gibbs(hi.losses.hinge(), APART, prior=hi.StudentT(3, 0, 1)),
    "a function": gibbs(log_loss, CLASSES, **START),
    "a function, apart": gibbs(log_loss, APART, prior=PRIOR, **START),
    "a flat floor": gibbs(lambda t, r: np.maximum(np.abs(r[0] - r[1] @ t) - 3, 0), **START),
}


@pytest.mark.parametrize("case", PROPER)
def test_proper_posteriors_are_sampled(case):
    """And the walk and tempering agree, roughly, on where they are."""
    one, two = (hi.sample(PROPER[case], m, draws=500, chains=2, seed=1) for m in ("mh", "smc"))
    a, b = theta(one).reshape(-1, 2), theta(two).reshape(-1, 2)
    assert (np.abs(a.mean(0) - b.mean(0)) < 0.4 * b.std(0)).all()
    np.testing.assert_allclose(a.std(0), b.std(0), rtol=0.3)


def test_divergences_of_nuts_are_counted_and_noted():
    """In a funnel whose neck no step size fits."""
    loss = hi.losses.from_jax(
        lambda t, y: t[0] ** 2 / 18 + t[0] / 2 + t[1] ** 2 * jnp.exp(-t[0]) / 2 + 0 * y
    )
    funnel = hi.GibbsPosterior(loss, np.zeros(1), hi.Normal(0, 100.0), start=[0.5, 0.1])
    result = hi.sample(funnel, "nuts", draws=500, chains=2, seed=1)
    counts = result["checks"]["divergences"].values
    assert counts.sum() > 0
    np.testing.assert_array_equal(counts, result["sample_stats"]["diverging"].values.sum(axis=1))
    assert "trajectories diverged" in result["checks"].attrs["notes"]


def test_a_loss_that_overflows_far_away_is_not_taken_there():
    """Draws of a wide prior meet exp of thousands; a loss without a value is an error."""

    def counts(theta, rows):
        f = rows[1] @ theta
        return np.exp(f) - rows[0] * f

    wide = hi.StudentT(1, 0, 100.0)
    result = hi.sample(
        gibbs(counts, COUNTS, prior=wide, **START), "smc", draws=200, chains=2, seed=1
    )
    assert np.isfinite(result["sample_stats"]["lp"].values).all()
    nothing = gibbs(
        lambda t, r: np.where(t[0] > 1, np.nan, (r[0] - r[1] @ t) ** 2), prior=wide, **START
    )
    with pytest.raises(ValueError, match="is nan in row 1 at theta"):
        hi.sample(nothing, "smc", draws=200, seed=1)


def test_pcn_falls_back_on_the_prior_where_the_loss_has_no_curvature():
    loss, rows = hi.losses.threshold(), (X[:, 1], 2 * CLASSES - 1)
    posterior = hi.GibbsPosterior(loss, rows, hi.Normal(0.5, 4.0), start=[0.0])
    target = samplers.plan(posterior, "pcn").target
    assert (target.centre[0], target.factor[0, 0]) == (0.5, 2.0)
