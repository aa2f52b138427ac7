"""`hakari demo` from nothing to a report that a browser opens."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from linearmodels.datasets import card
from linearmodels.iv import IVGMM, IVGMMCUE

import hakari.demo as main
import hakari.inference as hi
from hakari.report import Chapter, Part
from hakari.run import read_config
from hakari.training.chapter import TINY
from hakari.training.config import from_dict, load

from .conftest import hakari

INFERENCE = ["card-nearc4", "card-nearc2-nearc4", "monetary-policy", "engel", "flights"]
CARD = ["Card: one instrument", "Card: two instruments"]
MACRO = [
    "Monetary policy: responses to a rate rise",
    "Question",
    "What the data say",
    "Responses",
    "The prior's share",
    "Learning rates",
    "Diagnostics",
    "How to repeat",
]
ENGEL = [
    "Engel: food and income",
    "The median",
    "The 0.9 quantile",
    "Calibration and draws",
    "How to repeat",
]
FLIGHTS = [
    "Flights: delay and time made up",
    "Shocks uncorrelated given schedule and weather",
    "Shocks correlated, by a constant",
    "Can the data tell?",
    "Known effects",
    "How to repeat",
]
TRAINING = ["Training: a mixture of experts", "The run", "Experts", "What it writes"]
SECTIONS = [
    "Question",
    "What the data say",
    "Posterior and GMM",
    "Three forms of the target",
    "Strength of the instruments",
    "Sensitivity to the prior",
    "Diagnostics",
    "How to repeat",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return hakari("demo", "--json", cwd=folder, timeout=900), folder


def test_numbers_are_linearmodels(demo):
    done, _ = demo
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["chapters"]
    assert list(found) == [*INFERENCE, "moe"]
    for name, excluded in (("card-nearc4", "nearc4"), ("card-nearc2-nearc4", "nearc2 + nearc4")):
        formula = f"lwage ~ 1 + exper + expersq + black + south + smsa + [educ ~ {excluded}]"
        for label, model in (("IV-GMM", IVGMM), ("CUE", IVGMMCUE)):
            theirs = model.from_formula(formula, card.load()).fit()
            for shown in (e for e in found[name]["estimates"] if e["label"] == label):
                educ = shown["coefficients"]["educ"]
                tolerance = 2e-3 * theirs.std_errors["educ"]  # linearmodels' CUE stops early
                assert educ["estimate"] == pytest.approx(theirs.params["educ"], abs=tolerance)
                assert educ["std_error"] == pytest.approx(theirs.std_errors["educ"], abs=tolerance)


def test_modes_of_the_forms(demo):
    found = json.loads(demo[0].stdout)["chapters"]["card-nearc2-nearc4"]
    full, without, fixed = (m["less_cue_in_standard_errors"]["educ"] for m in found["modes"])
    assert abs(without) < 1e-6
    assert fixed == pytest.approx(-0.28, abs=0.01)
    assert full == pytest.approx(-0.65, abs=0.01)
    ours = {e["label"]: e for e in found["estimates"] if e["source"] == "hakari"}
    two_step = found["modes"][2]["mode"]["educ"]
    assert two_step == pytest.approx(ours["IV-GMM"]["coefficients"]["educ"]["estimate"], abs=1e-8)


def test_the_run_folder_loads(demo):
    done, folder = demo
    run = folder / json.loads(done.stdout)["run"]
    for name in ("card-nearc4", "card-nearc2-nearc4"):
        assert hi.load(run / f"{name}.nc").attrs["rows"] == 3010
        assert (run / f"{name}.csv").is_file()
    assert hi.load(run / "monetary-policy.nc").attrs["rows"] == 179
    for tau in ("0.5", "0.9"):
        assert hi.load(run / f"engel-{tau}.nc").attrs["rows"] == 235
    for case in ("zero", "constant", "simulated"):
        assert (run / f"flights-{case}-effects.csv").is_file()
    policy = read_config(run)["chapters"]["monetary-policy"]
    assert policy["posterior"]["calibrate"] is True
    assert len(policy["posterior"]["learning_rates"]) == 3
    for end in ("csv", "png", "pdf"):
        assert (run / f"monetary-policy.{end}").is_file()


def test_the_demo_trains_the_example():
    file = Path(__file__).parents[2] / "examples" / "moe_tiny.toml"
    assert load(file) == from_dict(TINY)


def test_the_model_has_learnt_from_all_its_tokens(demo):
    done, folder = demo
    answer = json.loads(done.stdout)
    found, run = answer["chapters"]["moe"], folder / answer["run"] / "moe"
    config = read_config(run)
    uniform = math.log(config["model"]["vocabulary"])
    assert found["steps"] == config["steps"]
    assert 1 < found["validation_loss"] < 0.65 * uniform
    tokens = config["batch"] * config["length"]
    assert [sum(load) for load in found["load"]] == [2 * tokens] * config["model"]["layers"]
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, found["steps"] + 1))
    assert rows[0]["loss"] == pytest.approx(uniform, abs=0.1)
    assert rows[-1]["tokens"] == found["steps"] * tokens


class Page(HTMLParser):
    """What a page loads, points at, and is made of."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.headings, self.tags = [], [], [], [], []
        self.without_alt, self.title, self.open = 0, "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.open = tag
        self.loads += [found[a] for a in ("src", "srcset", "data", "poster") if a in found]
        self.loads += [found.get("href")] * (tag == "link")
        self.links += [found.get("href")] * (tag == "a")
        self.ids += [found.get("id")] * ("id" in found)
        self.without_alt += tag == "img" and not found.get("alt")

    def handle_data(self, text):
        if self.open == "title":
            self.title += text
        if self.open in ("h2", "h3") and text.strip():
            self.headings.append(text.strip())


@pytest.fixture(scope="module")
def report(demo):
    done, folder = demo
    return folder / json.loads(done.stdout)["report"]


def test_the_report_is_self_contained(report):
    text = report.read_text()
    page = Page(text)
    assert page.title.strip() == "hakari demo: each system on real data"
    cards = [h for chapter in CARD for h in (chapter, *SECTIONS)]
    assert page.headings == cards + MACRO + ENGEL + FLIGHTS + TRAINING
    assert all(address.startswith("data:") for address in page.loads)
    assert page.loads.count("data:,") == 1
    assert len([a for a in page.loads if a.startswith("data:image/svg")]) >= 8
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert page.without_alt == 0
    text = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)  # what the model wrote
    assert "url(" not in text
    assert "@import" not in text
    assert "(DataFrame" not in text
    assert not re.search(r"/(home|root|tmp|work)/", text)


def stand_in(monkeypatch, *builders):
    """Put chapters that take no time after the demo's own of inference."""
    module = ModuleType("hakari.training.stand_in")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update({build.__name__: build for build in builders})
    added = [f"{module.__name__}:{build.__name__}" for build in builders]
    kept = [address for address in main.CHAPTERS if address.startswith("hakari.inference.")]
    monkeypatch.setattr(main, "CHAPTERS", [*kept, *added])


def train(folder):
    """Trains nothing.

    This is not told.
    """
    (folder / "tiny").mkdir()
    chapter = Chapter("Nothing trained", [])
    return Part("tiny", chapter, lambda console: console.print("loss 0"), {"loss": 0}, {"seed": 1})


def cut_short(folder):
    return replace(train(folder), interrupted=True)


def interrupt(folder):
    raise KeyboardInterrupt


def never(folder):
    pytest.fail("a chapter after an interrupted one")


@pytest.fixture
def without_linearmodels(monkeypatch):
    monkeypatch.setitem(sys.modules, "linearmodels.datasets", None)  # as when not installed
    monkeypatch.delitem(sys.modules, "hakari.inference.card", raising=False)


LACKING = 'hakari: no inference: linearmodels is not installed: pip install "hakari[inference]"\n'


def test_a_half_that_is_not_installed_leaves_the_other(
    type_in, tmp_path, monkeypatch, without_linearmodels
):
    stand_in(monkeypatch, train)
    status, out, err = type_in("demo", "--out", "shown")
    assert (status, err) == (0, LACKING + "hakari: Trains nothing.\n")
    assert out.splitlines()[1:] == ["loss 0", "shown/report.html"]
    assert {p.name for p in (tmp_path / "shown").iterdir()} == {
        "config.toml",
        "report.html",
        "tiny",
    }
    assert read_config(tmp_path / "shown")["chapters"] == {"tiny": {"seed": 1}}


def test_nothing_installed_is_refused_and_leaves_nothing(
    type_in, tmp_path, monkeypatch, without_linearmodels
):
    stand_in(monkeypatch)
    status, out, err = type_in("demo", "--out", "shown")
    assert (status, out) == (2, "")
    assert err == LACKING + 'hakari: no chapter to show: pip install "hakari[all]"\n'
    assert not (tmp_path / "shown").exists()


@pytest.mark.parametrize("stop", [interrupt, cut_short])
def test_a_chapter_that_is_interrupted_is_the_last(
    stop, type_in, tmp_path, monkeypatch, without_linearmodels
):
    before = [train] if stop is interrupt else []
    stand_in(monkeypatch, *before, stop, never)
    status, out, err = type_in("demo", "--json", "--out", "shown")
    assert status == 130
    assert list(json.loads(out)["chapters"]) == ["tiny"]
    assert ("the report holds the chapters before" in err) == (stop is interrupt)
    assert Page((tmp_path / "shown" / "report.html").read_text()).headings == ["Nothing trained"]


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
]


def opened(page, folder):
    """(DOM, console messages, requests that the page made to the network)."""
    folder.mkdir()
    log = folder / "net.json"
    places = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    done = subprocess.run(
        [BROWSER, *FLAGS, *places, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    asked = [e["params"] for e in events if "url" in e.get("params", {})]
    outside = {
        p["url"]
        for p in asked
        if p["url"].startswith(("http", "ws"))
        and p.get("initiator", "not an origin") != "not an origin"
    }
    return done.stdout, console, outside


@needs_browser
def test_a_browser_opens_the_report(report, tmp_path):
    dom, console, outside = opened(report, tmp_path / "browser")
    assert "<title>hakari demo: each system on real data</title>" in dom
    assert Page(dom).headings == Page(report.read_text()).headings
    assert console == []
    assert outside == set()


@needs_browser
def test_a_page_that_is_not_self_contained_would_be_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<title>bad</title><img src='http://127.0.0.1:9/x.png'><script>console.error('no')</script>"
    )
    _, console, outside = opened(page, tmp_path / "browser")
    assert any("no" in line for line in console)
    assert outside == {"http://127.0.0.1:9/x.png"}
