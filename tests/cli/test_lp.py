"""`hakari lp` from a file to numbers, priors as typed, and what a user's mistakes look like."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hakari.inference as hi
from hakari import cli
from hakari.inference import sampling
from hakari.inference.bands import KINDS
from hakari.inference.lp_command import command_line
from hakari.inference.lp_report import answer_of, cost_says, instruments_say, prior_says, rates_say
from hakari.inference.lp_study import Study, find, parse_path_priors

from .conftest import hakari

ASKED = ["--response", "y", "r", "--shock", "e", "--shock-lags", "0", "--lags", "2"]
FILES = ["config.toml", "irf.csv", "posterior.nc", "prior.pdf", "prior.png", "report.html"]
FILES += ["responses.pdf", "responses.png"]
H = 6


def table(strength=1.0, n=300):
    """y answers a shock e by 0.8^h; policy x = e + noise, z an instrument; quarterly dates."""
    rng = np.random.default_rng(3)
    e, noise, u = rng.standard_normal((3, n))
    y, r = np.zeros(n), np.zeros(n)
    for t in range(1, n):
        y[t] = 0.8 * y[t - 1] + e[t] + 0.5 * u[t]
        r[t] = 0.5 * r[t - 1] - 0.5 * e[t] + 0.5 * noise[t]
    dates = {"year": 1950 + np.arange(n) // 4, "quarter": 1 + np.arange(n) % 4}
    z = strength * e + rng.standard_normal(n)
    return pd.DataFrame(dates | {"y": y, "r": r, "e": e, "x": e + 0.2 * noise, "z": z})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("series")
    table().to_csv(place / "q.csv", index=False)
    table(0.0).to_csv(place / "weak.csv", index=False)
    table().assign(y=lambda t: t["y"].where(t.index != 150)).to_csv(place / "gap.csv", index=False)
    return place


def strict(text):
    """Parsed JSON; NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture(scope="module")
def from_csv(folder):
    words = ["--data", "q.csv", *ASKED, "--time", "year", "quarter", "--horizons", H]
    return hakari("lp", *words, "--out", "text", cwd=folder)


# --- the command --------------------------------------------------------------------------


def test_the_last_line_is_the_report_and_the_folder_is_whole(from_csv, folder):
    assert from_csv.returncode == 0, from_csv.stderr
    assert from_csv.stdout.splitlines()[-1] == "text/report.html"
    assert sorted(p.name for p in (folder / "text").iterdir()) == FILES
    assert "Traceback" not in from_csv.stderr


def test_text_says_what_the_process_does(from_csv):
    said = " ".join(from_csv.stdout.split())
    assert "• A rise of e by 1 raises y: by" in said
    assert "in the same quarter in the posterior mean" in said
    assert "• A rise of e by 1 lowers r: by" in said
    assert "The 90% simultaneous band excludes 0 at quarters 0" in said
    assert "Prior: roughness of order 2 in log horizons on every response" in said
    assert "Bands are calibrated by a bootstrap, which never narrows: those of y are" in said
    assert "The draws are sound" in said


def test_numbers_are_those_of_the_library_and_of_the_truth(from_csv, folder):
    assert from_csv.returncode == 0
    frame = pd.read_csv(folder / "text" / "irf.csv")
    lp = hi.LocalProjection(
        table(), ["y", "r"], "e", lags=2, horizons=H, shock_lags=0, time=["year", "quarter"]
    )
    posterior = lp.posterior(hi.RoughnessPenalty()).calibrate(0.9, seed=1)
    result = hi.sample(posterior, seed=1)
    ours = lp.impulse_response(result).to_dataframe()
    for column in ("mean", "sd", "lower_joint", "upper_pointwise", "estimate", "narrowed"):
        np.testing.assert_allclose(frame[column], ours[column], rtol=1e-9, atol=1e-12)
    kept = hi.load(folder / "text" / "posterior.nc")
    np.testing.assert_array_equal(kept["posterior"]["theta"], result["posterior"]["theta"])
    y = frame[frame["response"] == "y"]
    truth = 0.8 ** y["horizon"]
    assert ((y["lower_joint"] < truth) & (truth < y["upper_joint"])).all()


def test_config_repeats_the_run(from_csv, folder):
    assert from_csv.returncode == 0
    config = tomllib.loads((folder / "text" / "config.toml").read_text())
    assert config["model"]["response"] == ["y", "r"]
    assert config["model"]["time"] == ["year", "quarter"]
    prior = dict.fromkeys("yr", "roughness of order 2 in log horizons")
    assert config["posterior"]["prior_resolved"] == prior
    assert config["posterior"]["shrinkage_resolved"] == "ledoit-wolf"
    assert config["posterior"]["covariance_resolved"] == "hc3"
    assert config["posterior"]["calibrate"] is True
    assert len(config["posterior"]["learning_rates"]) == 2
    assert config["sampler"]["seed"] == 1
    assert {"hakari", "python", "scipy"} <= set(config["versions"])
    report = (folder / "text" / "report.html").read_text()
    shown = ("Question", "What the data say", "Responses", "Learning rates", "How to repeat")
    for heading in shown:
        assert f"{heading}</h3>" in report
    assert "joint over horizons, its correlation shrunk" in report
    assert "hakari lp --data q.csv --response y r --shock e" in report
    assert "Strength of the instruments" not in report


def test_the_command_in_the_report_gives_the_same_numbers(from_csv, folder, type_in, monkeypatch):
    assert from_csv.returncode == 0
    study = Study(
        "q.csv", ("y", "r"), ("e",), shock_lags=0, lags=2, horizons=H, time=("year", "quarter")
    )
    monkeypatch.chdir(folder)
    words = command_line(study).split()
    assert type_in(*words[1:], "--out", "again")[0] == 0
    again, first = (pd.read_csv(folder / name / "irf.csv") for name in ("again", "text"))
    pd.testing.assert_frame_equal(again, first, rtol=1e-12)


def test_instruments_priors_calibration_and_scale_as_json(type_in, folder):
    words = ["--response", "y", "r", "--shock", "x", "--instrument", "z", "--lags", "2"]
    more = [
        "--prior",
        "flat",
        "--prior",
        "y=process(1.5, length=2)",
        "--scale",
        "-2",
    ]
    words += ["--data", folder / "q.csv", "--horizons", 4, *more, "--json", "--out", "iv"]
    status, out, err = type_in("lp", *words)
    assert status == 0, err
    assert out.count("\n") == 1
    found = strict(out)
    assert found["prior"] == {
        "y": "Gaussian process (Matérn 1.5, length 2)",
        "r": "flat",
    }
    assert found["size"] == {"x": -2.0}
    assert [one["response"] for one in found["calibration"]] == ["y", "r"]
    assert all(stage["effective_f"] > stage["critical"] for stage in found["first_stage"])
    at_once = next(row for row in found["responses"] if row["response"] == "y")
    assert at_once["lower_ar"] < at_once["mean"] < at_once["upper_ar"] < 0
    assert any("The instrument z is strong" in sentence for sentence in found["verdict"])
    assert any(one.startswith("A fall of x by 2 lowers y") for one in found["verdict"])


def test_weak_instruments_are_told_and_unbounded_sets_are_null(type_in, folder):
    words = ["--response", "y", "--shock", "x", "--instrument", "z", "--horizons", 3]
    more = ["--data", folder / "weak.csv", "--no-calibrate", "--json"]
    found = strict(type_in("lp", *words, *more)[1])
    (told,) = [s for s in found["verdict"] if "is weak" in s]
    assert "Read the Anderson-Rubin sets, which cover however weak the instruments are." in told
    assert any(row["upper_ar"] is None for row in found["responses"])


NOT_CALIBRATED = {
    "a state": ["--state", "s"],
    "leads": ["--control", "f(r, 1)"],
    "continuous weighting": ["--weighting", "continuous"],
    "shrunk controls": ["--controls-prior", "horseshoe"],
    "turned off": ["--no-calibrate"],
}


@pytest.mark.parametrize("what", NOT_CALIBRATED)
def test_what_is_not_calibrated_says_why(what, type_in, folder):
    table().assign(s=lambda t: t.index % 2).to_csv(folder / "state.csv", index=False)
    words = ["--data", folder / "state.csv", "--response", "y", "--shock", "e", "--shock-lags", 0]
    words += ["--lags", 2, "--horizons", 2, "--draws", 100, *NOT_CALIBRATED[what]]
    status, out, err = type_in("lp", *words, "--out", "plain")
    assert status == 0, err
    reason = "calibration was turned off" if what == "turned off" else "calibration draws bootstrap"
    assert f"• Bands are not calibrated: {reason}" in out
    config = tomllib.loads(Path("plain/config.toml").read_text())["posterior"]
    assert (config["calibrate"], config["learning_rates"][0]) == (False, 1.0)
    report = Path("plain/report.html").read_text()
    assert f"Bands are not calibrated: {reason}" in report
    assert "Learning rates" not in report
    found = strict(type_in("lp", *words, "--json", "--out", "again")[1])
    assert found["uncalibrated"].startswith(reason)
    if what == "turned off":
        assert "--no-calibrate --seed" in report
        return
    status, out, err = type_in("lp", *words, "--calibrate", "--out", "asked")
    assert (status, out) == (2, "")
    assert "calibrate() draws bootstrap samples from one VAR and is not for" in err


def test_help_shows_every_option_and_imports_no_half(tmp_path):
    shown = hakari("lp", "--help", cwd=tmp_path).stdout
    for option in ("response", "shock-lags", "no-calibrate", "controls-prior", "band", "state"):
        assert f"--{option}" in shown
    assert shown.count("For example") == 4
    code = """
import sys
from hakari.cli import app
app(["lp", "--help"], result_action="return_value")
print("HEAVY", sorted({"numpy", "pandas", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_bands_are_those_of_the_library():
    assert cli.Band.__args__ == KINDS


MISTAKES = {
    "no shock": (["--response", "y"], "--shock"),
    "no file": (["--data", "lost.csv"], "no data at lost.csv"),
    "unknown column": (["--control", "w"], "no column 'w'"),
    "bad term": (["--control", "l(y,"], "is not understood: write l(x)"),
    "gap": (["--data", "gap.csv"], "y is missing"),
    "level": (["--level", "90"], "level 90 must lie between 0 and 1"),
    "draws": (["--draws", "0"], "draws 0: at least 1"),
    "few draws": (["--draws", "10", "--chains", "1"], "at least 100 in all are needed"),
    "seed": (["--seed", "-1"], "seed -1"),
    "scale": (["--scale", "two"], "scale 'two': a number in units of the shock, or sd"),
    "no scale": (["--scale", "0"], "scale '0'"),
    "covariance": (["--covariance", "hc9"], "hc9"),
    "prior": (["--prior", "rough"], "'rough' is not understood: write roughness(ORDER)"),
    "horizons": (["--horizons", "290"], "horizon"),
    "band": (["--band", "wide"], "wide"),
    "spacing": (["--prior", "roughness(spacing=far)"], "spacing 'far': use one of even, log"),
    "controls": (["--controls-prior", "ridge"], "ridge"),
    "known": (
        ["--control", "l(y, 0)", "--horizons", "0", "--prior", "flat"],
        "y are known at every horizon (0 to 0)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, type_in, folder, tmp_path):
    for name in ("q.csv", "gap.csv"):
        (tmp_path / name).symlink_to(folder / name)
    words, told = MISTAKES[mistake]
    given = dict(zip(words[::2], words[1::2], strict=True))
    base = {"--data": "q.csv", "--response": "y", "--shock": "e", "--out": "answer"}
    if mistake == "no shock":
        base.pop("--shock")
    status, out, err = type_in("lp", *(w for pair in (base | given).items() for w in pair))
    assert (status, out) == (2, "")
    assert err.startswith("hakari: ")
    assert err.count("\n") == 1
    assert told in err
    assert not (tmp_path / "answer").exists()


def test_what_cannot_be_shown_after_sampling_leaves_nothing(type_in, folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no figure")

    monkeypatch.setattr("hakari.inference.lp_command.write_run", refuse)
    words = ["--data", folder / "q.csv", *ASKED, "--horizons", 2, "--out", "answer"]
    status, out, err = type_in("lp", *words)
    assert (status, out, err.strip()) == (2, "", "hakari: no figure")
    assert not (tmp_path / "answer").exists()


def test_ctrl_c_keeps_the_draws_so_far(type_in, folder, monkeypatch):
    step, calls = sampling.step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(sampling, "step", interrupted)
    words = ["--data", folder / "q.csv", *ASKED, "--horizons", 2, "--chains", 1, "--out", "cut"]
    words.append("--no-calibrate")  # which samples too
    status, out, err = type_in("lp", *words, "--draws", 100_000)
    assert status == 130, err
    assert "interrupted; the draws so far were written" in err
    assert out.splitlines()[-1] == "cut/report.html"
    result = hi.load("cut/posterior.nc")
    assert result.attrs["interrupted"] == 1
    assert 0 < result["posterior"].sizes["draw"] < 100_000


def test_ctrl_c_before_any_draw_leaves_nothing(type_in, folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "step", interrupted)
    words = ["--data", folder / "q.csv", *ASKED, "--horizons", 2, "--out", "cut"]
    status, out, err = type_in("lp", *words)
    assert (status, out) == (130, "")
    assert err.endswith("hakari: interrupted; nothing was written\n")
    assert not (tmp_path / "cut").exists()


def test_ctrl_c_after_the_draws_says_where_they_are(type_in, folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hakari.inference.lp_command.write_run", interrupted)
    words = ["--data", folder / "q.csv", *ASKED, "--horizons", 2, "--out", "cut"]
    status, out, err = type_in("lp", *words)
    assert (status, out) == (130, "")
    assert "interrupted; the draws are in cut/posterior.nc, without a report" in err


# --- priors as typed ----------------------------------------------------------------------


def test_priors_as_typed():
    names = ["ebp", "a=b"]
    assert parse_path_priors([], names) == hi.RoughnessPenalty()
    assert parse_path_priors(["Roughness(3)"], names) == hi.RoughnessPenalty(3)
    assert parse_path_priors(["roughness(order=2, smoothness=gcv)"], names) == hi.RoughnessPenalty(
        2, "gcv"
    )
    assert parse_path_priors(["process(0.5, marginal, 0.2)"], names) == hi.GaussianProcess(
        0.5, "marginal", 0.2
    )
    assert parse_path_priors(["roughness(2, spacing=Even)"], names) == hi.RoughnessPenalty(
        spacing="even"
    )
    assert parse_path_priors(["normal(sd=3, mean=1)"], names) == hi.Normal(1.0, 9.0)
    mixed = parse_path_priors(["a=b=flat", "ebp=roughness(smoothness=marginal)"], names)
    assert mixed == {"ebp": hi.RoughnessPenalty(2, "marginal"), "a=b": hi.Flat()}
    assert parse_path_priors(["ebp=flat"], names)["a=b"] == hi.RoughnessPenalty()


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["x=flat"], r"prior on unknown response 'x' \(have y, r\)"),
        (["y=flat", "y=process"], "two priors on 'y'"),
        (["flat", "process"], r"two priors for all responses \(flat, process\)"),
        (["gauss(0, 1)"], "is not understood: write roughness"),
        (["flat(1)"], "flat takes nothing, not '1'"),
        (["roughness(ordr=2)"], "roughness takes order, smoothness, .* each once, not 'ordr=2'"),
        (["roughness(2, order=3)"], "each once, not 'order=3'"),
        (["roughness(two)"], "order 'two' is no number"),
        (["roughness(2, 0.1, inf)"], "scale inf must be finite"),
        (["roughness(spacing=log, spacing=even)"], "each once, not 'spacing=even'"),
        (["normal(0)"], "normal takes a mean and a standard deviation"),
        (["normal(0, -1)"], "the spread -1 must be positive"),
    ],
)
def test_mistakes_in_priors(texts, told):
    with pytest.raises(ValueError, match=told):
        parse_path_priors(texts, ["y", "r"])


# --- what is found, and the sentences -------------------------------------------------------


@pytest.fixture(scope="module")
def known():
    """y and r do not react at once, by assumption; calibrated."""
    controls = ("l(y, 0)", "l(r, 0)")
    study = Study(
        table(), ("y", "r"), ("x",), control=controls, lags=2, horizons=4, calibrate=True,
        prior=("r=flat",), draws=500,
    )  # fmt: skip
    return find(study)


def test_what_is_known_without_data_is_exact_and_left_out(known):
    assert known.known[:, 0, 0].all()
    assert not known.known[:, 0, 1:].any()
    assert (known.irf.draws[:, :, 0, 0] == 0).all()
    first = known.table[known.table["horizon"] == 0]
    assert (first[["lower_joint", "upper_joint", "mean", "sd"]] == 0).all(axis=None)
    assert known.notes == []
    assert len(known.summary) == 8


def test_the_share_narrowed_is_the_priors_and_not_the_calibrations(known):
    path, posterior = known.posterior.paths[0], rated(known, 0.5, 0.5).posterior
    narrowed = known.projection.impulse_response(hi.sample(posterior, seed=1)).narrowed
    flat = np.sqrt(np.diag(known.posterior.joint_covariance))[1:5]
    np.testing.assert_allclose(narrowed[0, 0, 1:], 1 - path.moments[1][1:] / flat, atol=0.05)
    assert np.isnan(narrowed[1]).all()  # flat
    assert "r flat" in prior_says(known)[0]
    assert "deviation of y" in prior_says(known)[0]
    assert "of r " not in prior_says(known)[0]


def rated(found, *rates):
    """The findings as if calibration had found these rates."""
    one = found.posterior.calibration
    new = tuple(replace(r, rate=rate) for r, rate in zip(one, rates, strict=True))
    return replace(found, posterior=replace(found.posterior, calibration=new))


def test_what_calibration_did_is_said(known):
    (said,) = rates_say(rated(known, 0.25, 1.0))
    assert "those of y are 100% wider than without, those of r are as they were." in said
    (said,) = rates_say(rated(known, 1.0, 1.0))
    assert said.endswith("the bands already cover in the bootstrap: nothing was widened.")
    assert "those of" not in said


def test_a_prior_that_costs_more_than_it_gives_is_told(known):
    """1 - narrowed is the smoothed deviation over the flat one; calibration divides by √rate."""
    kept = 1 - np.nanmean(known.irf.narrowed[0])
    assert 0.1 < kept < 1
    assert cost_says(rated(known, kept**2 * 1.01, 0.01)) == []  # r is flat: no prior, no cost
    (said,) = cost_says(rated(known, (kept / 1.3) ** 2, 1.0))
    assert "for y (by 30%): smoothed and then calibrated" in said
    assert "Try --prior flat;" in said
    both = np.repeat(known.irf.narrowed[:1], 2, axis=0)
    both = replace(known, irf=replace(known.irf, narrowed=both))
    (said,) = cost_says(rated(both, (kept / 1.3) ** 2, 1.0))
    assert "for y (by 30%)" in said
    assert "Try --prior y=flat;" in said


def test_a_first_stage_too_weak_narrows_no_band():
    weak = table(0.2).rename(columns={"z": "w"})
    study = Study(weak, ("y",), ("x",), ("w",), lags=2, horizons=8, draws=200, seed=4)
    found = find(study)
    stage = found.first_stage
    assert (stage["effective_f"] < stage["critical"]).all()
    assert all(rate <= 1 for rate in found.posterior.rates)


def test_horseshoe_on_controls_is_the_librarys():
    data = table()
    study = Study(data, ("y",), ("e",), shock_lags=0, lags=2, horizons=2, draws=200, seed=3,
                  controls_prior="horseshoe")  # fmt: skip
    found = find(study)
    lp = hi.LocalProjection(
        data, "y", "e", lags=2, horizons=2, shock_lags=0, controls_prior=hi.Horseshoe(seed=3)
    )
    np.testing.assert_array_equal(found.projection.estimate, lp.estimate)
    assert "--controls-prior horseshoe" in command_line(study)
    with pytest.raises(ValueError, match="controls_prior 'ridge': use none or horseshoe"):
        replace(study, controls_prior="ridge")


def test_a_response_known_at_every_horizon_leaves_the_others_uncalibrated():
    study = Study(
        table(), ("y", "r"), ("e",), control=("l(y, 0)",), lags=1, shock_lags=0, horizons=0,
        prior=("flat",), draws=200,
    )  # fmt: skip
    found = find(study)
    assert found.uncalibrated == "calibration needs responses that are not known at every horizon"
    with pytest.raises(ValueError, match=r"calibrate\(\) needs responses that are not known"):
        find(replace(study, calibrate=True))


def test_lags_in_the_covariance_are_told(folder, type_in):
    words = ["--data", folder / "q.csv", *ASKED, "--covariance", "hac:6", "--draws", 100]
    status, out, err = type_in("lp", *words, "--out", "hac")
    assert status == 0, err
    assert "covariance hac:6 takes in 6 lags over 21 horizons" in " ".join(out.split())
    assert "Covariance hac:6 takes in 6 lags" in Path("hac/report.html").read_text()


def test_a_response_whose_band_holds_zero_is_not_claimed():
    rng = np.random.default_rng(2)
    nothing = {"y": rng.standard_normal(200), "e": rng.standard_normal(200)}
    found = find(Study(nothing, ("y",), ("e",), lags=1, horizons=3, prior=("flat",), draws=500))
    said = answer_of(found, 0, 0)
    assert said.startswith("What a rise of e by 1 does to y is not clear")
    assert said.endswith("contains 0 at every horizon.")
    assert prior_says(found) == ["Priors are flat: the posterior is that of the estimates alone."]
    assert cost_says(found) == []
    assert instruments_say(found) == []
    assert found.grain == "period"


def test_too_few_horizons_for_the_default_prior_are_flat_and_told():
    note = "priors that were not given are flat"
    study = Study(table(), ("y", "r"), ("e",), lags=1, horizons=1, draws=100, calibrate=False)
    found = find(study)
    assert found.priors == {"y": "flat", "r": "flat"}
    assert sum(note in text for text in found.irf.notes) == 1
    found = find(replace(study, prior=("y=normal(0, 1)",)))
    assert (found.priors["r"], note in found.irf.notes[-1]) == ("flat", True)
    found = find(replace(study, prior=("flat",)))
    assert not any(note in text for text in found.irf.notes)
    with pytest.raises(ValueError, match="order 2 needs more than 2 horizons"):
        find(replace(study, prior=("roughness",)))


def test_scale_sd_is_one_deviation_of_the_shock():
    data = table()
    study = Study(data, ("y",), ("e",), lags=1, shock_lags=0, horizons=2, draws=500, scale="sd")
    found = find(study)
    assert found.size[0] == pytest.approx(data["e"].std(), rel=0.02)
    assert "one standard deviation" in answer_of(found, 0, 0)


def test_states_and_units_are_in_the_sentences():
    data = table().assign(state=lambda t: (t.index % 2).astype(float))
    units = {"y": "%", "e | state": "point"}
    study = Study(
        data, ("y",), ("e",), lags=1, shock_lags=0, horizons=2, state="state", units=units
    )
    found = find(study)
    assert "A rise of e in state by 1 point raises y" in answer_of(found, 0, 0)
    assert "% in the same period" in answer_of(found, 0, 0)
    assert "A rise of e outside state by 1 raises y" in answer_of(found, 0, 1)


def test_dates_name_the_horizons():
    study = Study(
        table(), ("y",), ("e",), shock_lags=0, lags=1, horizons=20, time=("year", "quarter")
    )
    found = find(study)
    assert found.grain == "quarter"
    assert found.selected == [0, 4, 8, 12, 16, 20]
