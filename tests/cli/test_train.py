"""`hakari train` and `hakari generate` as a user types them, with Ctrl-C, SIGTERM and torchrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hakari.training import checkpoint, trainer
from hakari.training.config import explain, from_dict
from hakari.training.interrupt import graceful_stop
from hakari.training.metrics import read

from .conftest import HAKARI

torch.set_num_threads(1)

CONFIG = """
steps = 100_000
batch = 4
length = 32
validate_every = 2
validate_batches = 2

[model]
dim = 32
layers = 2
heads = 2
kv_heads = 1

[model.moe]
experts = 4
hidden = 16

[data]
text = ["{text}"]
vocabulary = 300
validation = 0.3
cache = "{cache}"

[optimizer]
schedule = "constant"   # so that a longer run begins as a shorter one
warmup = 2
"""
PATIENCE = 240  # seconds: the cores may be busy
SAME = ("loss", "gradient_norm", "tokens", "learning_rate", "load", "entropy", "balance")


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str
    run: Path
    last: int  # step of the newest checkpoint
    rows: list[dict]


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with text/ of a few modules, small.toml and a place for shards."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text").mkdir()
    for name in ("textwrap", "argparse", "shlex", "glob", "calendar"):
        source = Path(sys.modules["os"].__file__).parent / f"{name}.py"
        shutil.copyfile(source, folder / "text" / f"{name}.py")
    text = CONFIG.format(text=folder / "text" / "*.py", cache=folder / "cache")
    (folder / "small.toml").write_text(text)
    return folder


def start(place: Path, *words: object, processes: int = 1) -> subprocess.Popen:
    """A command that runs; its messages go to a file beside the run."""
    command = [HAKARI, "train"]
    if processes > 1:
        command = [HAKARI.with_name("torchrun"), "--nproc-per-node", processes, "--standalone"]
        command += ["-m", "hakari.training"]
    name = str(words[-1])
    with (place / f"{name}.out").open("w") as out, (place / f"{name}.err").open("w") as err:
        return subprocess.Popen(
            [str(word) for word in [*command, *words]],
            cwd=place,
            stdout=out,
            stderr=err,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def stop_after_first_step(place: Path, process: subprocess.Popen, name: str, number: int) -> None:
    end = time.monotonic() + PATIENCE
    while "step 1/" not in (place / f"{name}.err").read_text():
        assert process.poll() is None, (place / f"{name}.err").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)


def ended(place: Path, process: subprocess.Popen, name: str, run: str) -> Ended:
    status = process.wait(PATIENCE)
    out, err = ((place / f"{name}.{kind}").read_text() for kind in ("out", "err"))
    found = checkpoint.steps(place / run / "checkpoints")
    assert found, err
    last = found[-1]
    return Ended(status, out, err, place / run, last, read(place / run))


STOPS = {"SIGINT": signal.SIGINT, "torchrun": signal.SIGTERM}


@pytest.fixture(scope="session")
def stopped(place) -> dict[str, Ended]:
    """Endless runs, told to stop after their first step; one of them on two processes."""
    running = {}
    for name in STOPS:
        processes = 2 if name == "torchrun" else 1
        running[name] = start(place, "small.toml", "--out", name, processes=processes)
    for name, number in STOPS.items():
        stop_after_first_step(place, running[name], name, number)
    return {name: ended(place, running[name], name, name) for name in STOPS}


@pytest.fixture(scope="session")
def resumed(place, stopped) -> dict[str, Ended]:
    """Each of them carried on for three steps on one process; "whole" was never stopped."""
    running = {}
    for name, found in stopped.items():
        shutil.copytree(place / name, place / f"{name}-on")
        more = ("--set", f"steps={found.last + 3}", "--resume", f"{name}-on")
        running[f"{name}-on"] = start(place, *more)
    steps = max(found.last for found in stopped.values()) + 3
    running["whole"] = start(place, "small.toml", "--set", f"steps={steps}", "--out", "whole")
    return {name: ended(place, process, name, name) for name, process in running.items()}


# --- a run ----------------------------------------------------------------------------------


def test_a_run_leaves_what_was_promised(place, resumed):
    whole = resumed["whole"]
    assert whole.status == 0
    assert whole.out == "whole\n"
    assert {path.name for path in whole.run.iterdir()} == {
        "config.toml",
        "environment.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "metrics.parquet",
        "tensorboard",
        "loss.png",
        "experts.png",
        "checkpoints",
    }
    assert [row["step"] for row in whole.rows] == list(range(1, whole.last + 1))
    assert whole.rows[-1]["tokens"] == whole.last * 4 * 32
    assert whole.rows[-1]["loss"] < whole.rows[0]["loss"]
    facts = json.loads((whole.run / "environment.json").read_text())
    assert facts["processes"] == 1
    assert facts["versions"]["torch"] == torch.__version__


def test_the_first_line_says_how_large_it_will_be(resumed):
    first = resumed["whole"].err.splitlines()[0]
    assert re.match(
        r"hakari: [\d.]+ thousand parameters, [\d.]+ thousand active; "
        r"about \d+\.\d\d GiB a process \(\d+\.\d\d state, "
        r"\d+\.\d\d activations\), \d+\.\d GiB free here; fits a 4 GiB device$",
        first,
    )


def test_the_resolved_configuration_is_written_and_read_back(place, resumed):
    table = tomllib.loads((resumed["whole"].run / "config.toml").read_text())
    found = from_dict(table)
    assert found.model.vocabulary == 320  # 300 tokens, rounded up to 64
    assert (found.model.head_dim, found.optimizer.schedule) == (16, "constant")
    assert found.steps == resumed["whole"].last


def test_validation_is_taken_when_due_and_at_the_end(resumed):
    for row in resumed["whole"].rows:
        due = row["step"] % 2 == 0 or row["step"] == resumed["whole"].last
        assert (row["validation_loss"] is not None) is due


# --- stop and go on -------------------------------------------------------------------------


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(stopped):
    found = stopped["SIGINT"]
    assert found.status == 130
    assert found.out == "SIGINT\n"
    assert "hakari: stopped; go on with: hakari train --resume SIGINT\n" in found.err
    assert "Traceback" not in found.err
    assert [row["step"] for row in found.rows] == list(range(1, found.last + 1))
    assert (found.run / "loss.png").is_file()


def test_torchrun_passes_the_signal_on_and_a_checkpoint_is_saved(stopped):
    found = stopped["torchrun"]
    assert "stopped; go on with: hakari train --resume torchrun" in found.err
    assert [row["step"] for row in found.rows] == list(range(1, found.last + 1))
    facts = json.loads((found.run / "environment.json").read_text())
    assert facts["processes"] == 2


def same_bits(rows: list[dict], others: list[dict]) -> None:
    for row, other in zip(rows, others, strict=False):
        assert {key: row[key] for key in SAME} == {key: other[key] for key in SAME}
        if row["step"] % 2 == 0:
            assert row["validation_loss"] == other["validation_loss"] is not None


def test_a_resumed_run_has_the_metrics_of_one_that_never_stopped(stopped, resumed):
    found = resumed["SIGINT-on"]
    assert found.status == 0
    assert found.last == stopped["SIGINT"].last + 3 == len(found.rows)
    same_bits(found.rows, resumed["whole"].rows)


def test_sigterm_saves_too_and_the_run_goes_on_to_the_same_bits(
    train, type_in, resumed, monkeypatch
):
    consumed = []

    def rows_of(text, samples, *rest):
        consumed.append(samples)
        return rank_batch(text, samples, *rest)

    rank_batch = trainer.rank_batch
    monkeypatch.setattr(trainer, "rank_batch", rows_of)

    def step_and_signal(trainer, text, cursor):
        if cursor.step == 1:  # the second step; it is finished all the same
            signal.raise_signal(signal.SIGTERM)
        return one(trainer, text, cursor)

    one = trainer._one
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_one", step_and_signal)
        status, out, err = train("steps=4")
    assert (status, out) == (130, "answer\n"), err
    assert "hakari: stopped; go on with: hakari train --resume answer\n" in err
    assert [row["step"] for row in read(Path("answer"))] == [1, 2]
    status, _, err = type_in("train", "--resume", "answer")
    assert status == 0, err
    rows = read(Path("answer"))
    assert len(rows) == 4
    assert consumed == [0, 4, 8, 12]  # no sequence is lost, none comes twice
    same_bits(rows, resumed["whole"].rows)


def test_two_processes_have_the_losses_of_one_and_go_on_as_one(stopped, resumed):
    found, whole = resumed["torchrun-on"], resumed["whole"]
    assert found.last == stopped["torchrun"].last + 3 == len(found.rows)
    for row, other in zip(found.rows, whole.rows, strict=False):
        assert row["tokens"] == other["tokens"]
        if row["step"] <= 8:  # rounding differs, and grows from step to step without bound
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_resumed_run_may_not_change_what_was_learnt(place, stopped, type_in):
    before = (place / "SIGINT" / "config.toml").read_text()
    words = ("--resume", place / "SIGINT", "--set", "model.dim=64")
    status, out, err = type_in("train", *words)
    assert (status, out) == (2, "")
    assert "model.dim = 64 is not what" in err
    assert (place / "SIGINT" / "config.toml").read_text() == before


# --- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number):
    before = signal.getsignal(number)
    with graceful_stop() as asked:
        assert not asked.is_set()
        signal.raise_signal(number)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_beside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with graceful_stop() as asked:
            seen.append((asked.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


# --- other settings -------------------------------------------------------------------------

SETTINGS = {
    "bfloat16": ["precision=bfloat16"],
    "float64, recomputed, micro-batches": ["precision=float64", "recompute=true", "micro_batch=2"],
    "deterministic": ["deterministic=true"],
    "dense, untied, windowed, one document a row": [
        "model.moe.experts=0",
        "model.tied=false",
        "model.window=8",
        "data.packing=false",
        "data.isolate=false",
    ],
    "aux_free": ["model.moe.router=aux_free", "model.moe.layers=[1]"],
}


@pytest.fixture
def train(place, type_in):
    """`hakari train small.toml --set steps=3 ... --out answer` here: (status, out, err)."""

    def typed(*changes: str, out: str = "answer"):
        words = [word for change in ("steps=3", *changes) for word in ("--set", change)]
        return type_in("train", place / "small.toml", *words, "--out", out)

    yield typed
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_train_too(train, name):
    status, out, err = train(*SETTINGS[name])
    assert (status, out) == (0, "answer\n"), err
    rows = read(Path("answer"))
    assert len(rows) == 3
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert Path("answer/experts.png").exists() is ("dense" not in name)


def test_deterministic_runs_have_the_same_bits_and_recomputation_too(train):
    runs = {"a": (), "b": ("deterministic=true",), "c": ("recompute=true",)}
    for out, changes in runs.items():
        train(*changes, out=out)
    losses = [[row["loss"] for row in read(Path(out))] for out in runs]
    assert losses[0] == losses[1] == losses[2]


def test_another_seed_is_another_run(train):
    train(out="a")
    train("seed=2", out="b")
    assert read(Path("a"))[0]["loss"] != read(Path("b"))[0]["loss"]


# --- mistakes -------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": ("modle.dim=3", "unknown key modle: did you mean model?"),
    "wrong type": ("steps=many", "steps = 'many' should be a whole number"),
    "malformed": ("steps", "--set 'steps': write it as name=value, such as model.dim=256"),
    "cross-field": ("model.heads=3", "model.dim = 32 is not a multiple of model.heads = 3"),
    "router": ("model.moe.jitter=0.5", "with mask 'code' it must be at least 0 and below 0.5"),
    "vocabulary": ("model.vocabulary=8", "is smaller than the tokenizer's 300 tokens"),
    "text": ("data.text=lost/*.txt", "lost"),
    "split": ("parallel.tensor=2", "2 processes, but there are 1"),
    "rope": ("model.rope_scaling={rope_type='yarn'}", "has type 'yarn'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(train, mistake):
    change, told = MISTAKES[mistake]
    status, out, err = train(change)
    assert (status, out) == (2, "")
    assert told in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("hakari: ")
    assert "Traceback" not in err
    assert not Path("answer").exists()


def test_one_file_or_a_run_to_resume_and_not_both(place, type_in):
    for words in ([], [place / "small.toml", "--resume", place]):
        status, _, err = type_in("train", *words)
        assert status == 2
        assert err == (
            "hakari: give a TOML file, or --resume RUN to carry a run on, and not both\n"
        )


def test_a_resumed_run_stays_in_its_folder(stopped, type_in):
    run = stopped["SIGINT"].run
    status, _, err = type_in("train", "--resume", run, "--out", "other")
    assert status == 2
    assert err == f"hakari: --resume {run} goes on in its own folder: leave out --out other\n"


def test_a_folder_without_a_checkpoint_cannot_be_resumed(type_in, tmp_path):
    status, _, err = type_in("train", "--resume", tmp_path)
    assert status == 2
    assert "it is not the folder of a run" in err
    (tmp_path / "config.toml").write_text("steps = 3")
    status, _, err = type_in("train", "--resume", tmp_path)
    assert status == 2
    assert "has no complete checkpoint to resume from" in err


def test_a_run_that_explodes_is_one_line_with_the_last_good_checkpoint(train):
    changes = ("optimizer.learning_rate=1e30", "optimizer.warmup=0", "optimizer.clip=0")
    status, out, err = train(*changes)
    assert (status, out) == (2, "")
    assert re.search(r"hakari: step 2: .*not finite|hakari: step 2: loss", err)
    assert "step 1 is saved: hakari train --resume answer" in err
    assert "Traceback" not in err
    assert [row["step"] for row in read(Path("answer"))] == [1]


def test_a_layer_that_collapses_is_named_and_its_run_can_go_on(train, type_in):
    changes = ("model.moe.experts=200", "model.moe.dead_steps=2", "batch=1", "length=8")
    status, _, err = train(*changes)
    assert status == 2
    assert re.search(r"hakari: step 2: layer 0 has collapsed: no token reached expert \d+", err)
    assert "step 2 is saved" in err
    status, out, err = type_in("train", "--resume", "answer", "--set", "model.moe.dead_steps=0")
    assert (status, out) == (0, "answer\n"), err
    assert checkpoint.steps("answer/checkpoints")[-1] == 3


# --- text and fields ------------------------------------------------------------------------


def test_generate_writes_the_same_text_for_the_same_seed(resumed, type_in):
    def written(*words):
        status, out, err = type_in("generate", resumed["whole"].run, "def wrap", *words)
        assert (status, err) == (0, "")
        assert out.startswith("def wrap")
        assert out.endswith("\n")
        return out

    words = ("--tokens", 30)
    one, same, other = (written(*words, "--seed", seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) > len("def wrap\n") + 5
    cold = [written(*words, "--temperature", 0, "--seed", seed) for seed in (1, 2)]
    assert cold[0] == cold[1]


def test_generate_needs_a_run(type_in, tmp_path):
    status, _, err = type_in("generate", tmp_path, "x")
    assert status == 2
    assert "it is not the folder of a run" in err


def test_fields_lists_every_field(type_in):
    status, out, err = type_in("train", "--fields")
    assert (status, err) == (0, "")
    for name, kind, default, text in explain():
        assert f"{name} = {default}  ({kind})\n    {text}\n" in out


def test_help_of_train_and_generate_shows_their_options(type_in):
    status, out, _ = type_in("train", "--help")
    assert status == 0
    for option in ("--set", "--out", "--resume", "--fields", "torchrun --nproc-per-node 2"):
        assert option in out
    status, out, _ = type_in("generate", "--help")
    assert status == 0
    for option in ("--tokens", "--temperature", "--top-p", "--seed"):
        assert option in out
