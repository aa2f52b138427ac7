"""Figures say what the numbers say."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import norm

import hakari.inference as hi
from hakari.inference import plots
from hakari.inference.anderson_rubin import anderson_rubin
from hakari.inference.comparison import disagreement, linearmodels_estimates, point_estimates
from hakari.inference.sensitivity import prior_sensitivity
from hakari.report import Chapter, Picture, Section, Text, svg, write_report

FORMULA = "y ~ 1 + w + [x ~ z1 + z2]"


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(2)
    z1, z2, w, e = rng.standard_normal((4, 300))
    x = z1 + 0.5 * z2 + e + rng.standard_normal(300)
    return {"y": 1 + 2 * x + w + e, "x": x, "w": w, "z1": z1, "z2": z2, "g": np.arange(300) // 6}


@pytest.fixture(scope="module")
def moments(table):
    return hi.LinearMoments.from_formula(FORMULA, table)


@pytest.fixture(scope="module")
def posterior(moments):
    return hi.QuasiPosterior(moments, hi.Normal(2.0, 1.0, names=["x"]))


@pytest.fixture(scope="module")
def result(posterior):
    return hi.sample(posterior, draws=1000, chains=3, seed=4)


@pytest.fixture(scope="module")
def sensitivity(posterior, result):
    return prior_sensitivity(posterior, result)


def labels(axis):
    return axis.get_legend_handles_labels()[1]


def test_posterior_densities(result, posterior, moments):
    estimates = point_estimates(moments)
    figure = plots.posterior_densities(result, posterior, estimates, ["x", "w"], level=0.8)
    x, w = figure.axes
    assert labels(x) == [
        "posterior",
        "80% interval",
        "prior",
        "IV-GMM ± 1.28 s.e.",
        "CUE ± 1.28 s.e.",
    ]
    assert "prior" not in labels(w)
    assert x.get_xlabel() == "coefficient of x"
    bar = x.containers[0].lines[2][0].get_segments()[0][:, 0]
    half = norm.ppf(0.9) * estimates[0].std_error[-1]
    assert bar == pytest.approx([estimates[0].theta[-1] - half, estimates[0].theta[-1] + half])


def test_all_coefficients_when_none_are_named(result):
    figure = plots.posterior_densities(result)
    assert [a.get_xlabel()[15:] for a in figure.axes if a.axison] == ["Intercept", "w", "x"]


def test_density_integrates_to_one_and_is_the_truth():
    draws = np.random.default_rng(1).standard_normal(20_000)
    grid = np.linspace(-6, 6, 601)
    density = plots.kernel_density(draws, grid)
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1, abs=1e-3)
    assert np.abs(density - norm.pdf(grid)).max() < 0.02


def test_repeated_draws_do_not_look_like_modes():
    few = np.random.default_rng(1).standard_normal(200)
    grid = np.linspace(-3, 3, 200)
    once, often = (
        plots.kernel_density(few, grid),
        plots.kernel_density(np.repeat(few, 100), grid, 200),
    )
    assert often == pytest.approx(once, rel=0.1, abs=0.02)


def test_a_stuck_chain_can_be_drawn(result):
    stuck = result.copy(deep=True)
    stuck["posterior"]["theta"][:] = 1.0
    for figure in (plots.posterior_densities(stuck), plots.traces(stuck, ["x"])):
        assert svg(figure)


def test_prior_marginals(moments):
    def marginal(*priors, name="x"):
        return plots.prior_marginal(hi.QuasiPosterior(moments, list(priors)), name)

    cov = np.array([[4.0, 1.0], [1.0, 9.0]])
    joint = hi.Normal([0, 1], cov, names=["w", "x"])
    grid = np.linspace(-5, 5, 11)
    assert marginal(joint)(grid) == pytest.approx(norm(1, 3).pdf(grid))
    assert marginal(joint, name="Intercept") is None
    narrow = hi.StudentT(1, 0, 4.0, names=["x"])
    assert marginal(narrow)(0.0) == pytest.approx(1 / (np.pi * 2))


def test_prior_sensitivity(sensitivity, moments, result):
    figure = plots.prior_sensitivity_plot(sensitivity, moments.names.parameters, "x")
    (axis,) = figure.axes
    shown = [t.get_text() for t in axis.get_yticklabels()]
    assert shown == ["¼ ×", "½ ×", "1 ×  (asked)", "2 ×", "4 ×", "flat"]
    asked = next(s for s in sensitivity if s.asked)
    mean = float(result["posterior"]["theta"].sel(coefficient="x").mean())
    assert asked.mean[-1] == pytest.approx(mean, rel=1e-12)


def test_a_narrow_prior_pulls(posterior, result, moments):
    far = hi.QuasiPosterior(moments, hi.Normal(5.0, 0.1, names=["x"]))
    found = prior_sensitivity(far, hi.sample(far, draws=500, chains=2, seed=1))
    means = [s.mean[-1] for s in found]
    assert means == sorted(means, reverse=True)


def test_flat_varies_the_weak_prior(moments):
    flat = hi.QuasiPosterior(moments)
    found = prior_sensitivity(flat, hi.sample(flat, draws=300, chains=2, seed=1))
    assert [s.asked for s in found] == [False] * 5 + [True]


def test_a_regression_has_no_prior_to_vary(table):
    plain = hi.QuasiPosterior(hi.LinearMoments.from_formula("y ~ 1 + w + x", table))
    assert prior_sensitivity(plain, hi.sample(plain, draws=100, seed=1)) == []


def test_traces(result):
    figure = plots.traces(result, ["x", "w"])
    trace, ranks = figure.axes[:2]
    assert len(trace.lines) == 3
    assert len(ranks.patches) == 3
    assert np.mean([p.get_data().values.mean() for p in ranks.patches]) == pytest.approx(1)


def test_anderson_rubin_curve(moments, result):
    found = anderson_rubin(moments, 0.9)
    above, below = plots.anderson_rubin_curve(found, result).axes
    curve, critical = above.lines
    beta, statistic = curve.get_data()
    inside = beta[statistic <= critical.get_ydata()[0]]
    ((low, high),) = found.intervals
    assert (inside.min(), inside.max()) == pytest.approx((low, high), abs=np.diff(beta)[0])
    assert below.get_xlim() == pytest.approx((beta[0], beta[-1]))


def test_no_anderson_rubin_curve_without_a_set(table, result):
    plain = hi.LinearMoments.from_formula("y ~ 1 + w + x", table)
    with pytest.raises(
        ValueError, match="no Anderson-Rubin set: it is for one endogenous variable"
    ):
        plots.anderson_rubin_curve(anderson_rubin(plain), result)


@pytest.mark.parametrize("covariance", ["iid", "robust", "cluster:g", "hac:3", "hac:auto:parzen"])
@pytest.mark.parametrize("centred", [False, True])
def test_linearmodels_agrees(table, covariance, centred):
    moments = hi.LinearMoments.from_formula(FORMULA, table, covariance, centred=centred)
    theirs = linearmodels_estimates(FORMULA, table, moments)
    assert [e.label for e in theirs] == ["2SLS", "IV-GMM", "CUE"]
    assert disagreement([*point_estimates(moments), *theirs[:2]]) < 1e-8
    # its CUE stops early, and leaves the mean in the errors when centred
    assert disagreement([*point_estimates(moments), *theirs]) < 0.02


def test_figures_leave_no_global_state(result):
    assert isinstance(plots.traces(result, ["x"]), Figure)
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_a_report_escapes_and_refuses_to_overwrite(tmp_path, result):
    picture = Picture(plots.traces(result, ["x"]), "a <trace>", "caption & more")
    chapter = Chapter("Title <b>", [Section("First", [Text("1 < 2"), picture])])
    path = write_report(tmp_path / "report.html", "A & B", [chapter])
    text = path.read_text()
    for escaped in (
        "A &amp; B",
        "Title &lt;b&gt;",
        "1 &lt; 2",
        "a &lt;trace&gt;",
        "caption &amp; more",
    ):
        assert escaped in text
    with pytest.raises(FileExistsError, match="exists: give another name"):
        write_report(path, "A", [chapter])


def test_the_same_figure_gives_the_same_bytes(result):
    assert svg(plots.traces(result, ["x"])) == svg(plots.traces(result, ["x"]))
