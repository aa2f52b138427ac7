"""`hakari checkpoint` as a user types it."""

import json
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hakari import checkpoint_cli
from hakari.training.checkpoint import convert, load, save, storage
from hakari.training.checkpoint.formats import FORMATS, WRITTEN
from hakari.training.checkpoint.language.rules import shipped_names

from .conftest import hakari

ZERO = Path(__file__).parents[1] / "fixtures" / "deepspeed"
MEGATRON = ZERO.parent / "megatron" / "stacked"
COMMANDS = ["inspect", "verify", "diff", "convert", "export", "prune"]


def model_and_optimizer():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with steps 3, 5 and 8, which differ, and an incomplete save."""
    folder = tmp_path_factory.mktemp("made")
    model, optimizer = model_and_optimizer()
    for step in (3, 5, 8):
        save(folder, model, optimizer, {"cursor": step}, step=step, rank_state={"seed": 1})
        with torch.no_grad():
            model[1].bias += 0.5
    (folder / ".tmp-step-00000009-abcdef").mkdir()
    return folder


@pytest.fixture
def root(made, tmp_path):
    """The same, to be changed; the command runs beside it."""
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root"


def flip(folder, tensor):
    """Change a byte of a tensor; returns its file and place."""
    (file,) = (folder / "data").iterdir()
    data = bytearray(file.read_bytes())
    length = 8 + struct.unpack("<Q", data[:8])[0]
    start, stop = json.loads(data[8:length])[tensor]["data_offsets"]
    data[length + start] ^= 1
    file.write_bytes(data)
    return f"data/{file.name}, bytes {length + start:,} to {length + stop:,}"


def flat(text):
    return " ".join(text.split())


# --- help ---------------------------------------------------------------------------------


def test_help_lists_the_commands(tmp_path):
    done = hakari("checkpoint", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(f" {name} " in done.stdout for name in COMMANDS)
    assert " checkpoint " in hakari("--help", cwd=tmp_path).stdout


def test_help_of_convert_shows_every_option(tmp_path):
    shown = hakari("checkpoint", "convert", "--help", cwd=tmp_path).stdout
    options = ["to", "from", "rules", "target-rules", "set", "tag", "dtype", "config"]
    options += ["processes", "stage", "pipeline", "budget", "workers", "optimizer"]
    assert all(f"--{name} " in shown for name in options)
    assert shown.count("For example") == 2
    assert all(name in shown for name in (*FORMATS, *shipped_names()))
    assert "--set heads=32 kv_heads=8, or --set" in flat(shown.replace("│", ""))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name, type_in):
    status, out, err = type_in("checkpoint", name, "--help")
    assert (status, err) == (0, "")
    for line in out.splitlines():
        if "--" in line and line.startswith("│ ") and "example" not in line:
            assert len(line.strip("│ ").split()) > 2, line  # a name, and what it is


def test_formats_are_those_that_there_are():
    assert checkpoint_cli.Form.__args__ == FORMATS
    assert checkpoint_cli.Written.__args__ == WRITTEN


# --- inspect ------------------------------------------------------------------------------


def test_inspect_a_folder_of_checkpoints(root, type_in):
    status, out, err = type_in("checkpoint", "inspect", "root")
    assert (status, err) == (0, "")
    text = flat(out)
    assert "step size made 3 " in text
    assert "+00:00 latest" in text
    assert "never completed: .tmp-step-00000009-abcdef" in text
    for said in (
        "root/step-00000008",
        "format hakari",
        "step 8 ",
        "optimizer AdamW",
        "parameters 4 with 45 elements",
        f"torch {torch.__version__}",
        "processes 1",
        "extra state cursor",
        "states of ranks 1: seed",
        "group 0: 4 parameters;",
        "lr 0.25",
        "0.weight 5x6 F32 364 B step exp_avg exp_avg_sq",
    ):
        assert said in text, said


def test_inspect_one_of_them_as_json(root, type_in):
    status, out, err = type_in("checkpoint", "inspect", "root/step-00000005", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["root"] is None
    said = found["checkpoint"]
    assert (said["step"], said["tensors"], said["form"]) == (5, 16, "hakari")
    row = next(row for row in said["parameters"] if row["name"] == "0.weight")
    assert row["shape"] == [5, 6]
    assert row["states"]["exp_avg"] == {"shape": [5, 6], "dtype": "F32"}
    assert said["groups"][0]["options"]["lr"] == 0.25
    found = json.loads(type_in("checkpoint", "inspect", "root", "--filter", "0.*", "--json")[1])
    assert [each["step"] for each in found["root"]["steps"]] == [3, 5, 8]
    assert {row["name"] for row in found["checkpoint"]["parameters"]} == {"0.weight", "0.bias"}


def test_inspect_shows_some_parameters_or_all(tmp_path, type_in):
    save_file({f"w{i:02d}": torch.zeros(1) for i in range(33)}, tmp_path / "model.safetensors")
    out = type_in("checkpoint", "inspect", ".")[1]
    assert "w19" in out
    assert "w20" not in out
    assert "and 13 more: --all lists them" in out
    assert "w32" in type_in("checkpoint", "inspect", ".", "--all")[1]
    out = type_in("checkpoint", "inspect", ".", "--filter", "w3?")[1]
    assert [f"w{i}" in out for i in (29, 30, 31, 32)] == [False, True, True, True]
    status, _, err = type_in("checkpoint", "inspect", ".", "--filter", "v*")
    assert (status, err) == (2, "hakari: no parameter's name matches 'v*'\n")


def test_inspect_what_deepspeed_saved(type_in):
    status, out, err = type_in("checkpoint", "inspect", ZERO / "zero2-bf16")
    assert (status, err) == (0, "")
    assert "format deepspeed" in flat(out)
    assert "step 3" in flat(out)
    assert "tied embed.weight, head.weight" in flat(out)


def test_inspect_shows_a_folder_of_which_none_is_complete(root, type_in):
    for step in (3, 5, 8):
        (root / f"step-{step:08d}" / "COMMIT").unlink()
    status, out, _ = type_in("checkpoint", "inspect", "root")
    assert status == 0
    assert "never completed: step-00000005" in out
    assert "LATEST names 'step-00000008', which is not a complete checkpoint" in flat(out)


# --- verify -------------------------------------------------------------------------------


def test_verify_a_whole_one(root, type_in):
    status, out, err = type_in("checkpoint", "verify", "root")
    assert (status, err) == (0, "")
    assert out.startswith("root/step-00000008: whole: 16 tensors, ")
    assert out.endswith("GB/s)\n")


def test_verify_lists_all_damage_with_names_and_places(root, type_in):
    folder = root / "step-00000008"
    places = {name: flip(folder, name) for name in ("exp_avg/1.bias", "weight/0.weight")}
    status, out, err = type_in("checkpoint", "verify", "root/step-00000008")
    assert (status, err) == (1, "")
    assert f"1.bias (exp_avg): {places['exp_avg/1.bias']}: not what was written" in out
    assert f"0.weight (weight): {places['weight/0.weight']}: not what was written" in out
    assert out.splitlines()[-1].startswith("root/step-00000008: damaged: 2 places; 16 tensors")
    status, out, _ = type_in("checkpoint", "verify", "root", "--json")
    (found,) = json.loads(out)
    assert status == 1
    assert found["whole"] is False
    assert {row["parameter"] for row in found["damage"]} == {"1.bias", "0.weight"}


def test_verify_all_of_a_folder(root, type_in):
    flip(root / "step-00000005", "weight/1.weight")
    assert type_in("checkpoint", "verify", "root")[0] == 0
    status, out, _ = type_in("checkpoint", "verify", "root", "--all")
    assert status == 1
    verdicts = [line.split(":")[:2] for line in out.splitlines() if line.startswith("root/")]
    assert verdicts == [
        ["root/step-00000003", " whole"],
        ["root/step-00000005", " damaged"],
        ["root/step-00000008", " whole"],
    ]


def test_verify_claims_no_more_than_it_knows(tmp_path, type_in):
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    status, out, _ = type_in("checkpoint", "verify", ".")
    assert status == 0
    assert out.startswith(".: readable: 1 tensors")
    assert "keeps no checksums" in out


# --- diff ---------------------------------------------------------------------------------


def test_diff(root, type_in):
    status, out, err = type_in("checkpoint", "diff", "root", "root/step-00000008")
    assert (status, out, err) == (0, "16 tensors are equal; no difference\n", "")
    status, out, err = type_in("checkpoint", "diff", "root/step-00000003", "root/step-00000005")
    assert (status, err) == (1, "")
    assert "values: 1 " in flat(out)
    assert "1.bias weight 5 0.5 " in flat(out)
    assert "step 3 5 extra_state/cursor 3 5" in flat(out)
    assert out.endswith("15 tensors are equal\n")
    status, out, _ = type_in(
        "checkpoint", "diff", "root/step-00000003", "root/step-00000005", "--json"
    )
    found = json.loads(out)
    assert (status, found["same"], found["equal"]) == (1, False, 15)
    assert found["values"][0]["largest"] == 0.5


def test_states_of_ranks_are_shown_and_are_no_difference(tmp_path, type_in):
    for seed in (1, 2):
        save(tmp_path / str(seed), *model_and_optimizer(), step=3, rank_state={"seed": seed})
    status, out, _ = type_in("checkpoint", "diff", "1", "2")
    assert status == 0
    assert "states of ranks: 1 1 2 rank_states/0/seed 1 2 " in flat(out)
    said = "16 tensors are equal; no difference but in what each rank keeps of its own\n"
    assert out.endswith(said)
    found = json.loads(type_in("checkpoint", "diff", "1", "2", "--json")[1])
    assert (found["same"], found["ranks"]) == (True, [["rank_states/0/seed", "1", "2"]])


def test_diff_of_other_formats_and_long_lists(tmp_path, type_in):
    for name, fill in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        tensors = {f"w{i:02d}": torch.full((2,), fill) for i in range(33)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    out = type_in("checkpoint", "diff", "a", "b")[1]
    assert "and 13 more: --all lists them" in out
    assert "w32" not in out
    assert "w32" in type_in("checkpoint", "diff", "a", "b", "--all")[1]


# --- convert ------------------------------------------------------------------------------


def test_convert_to_hugging_face_and_back(root, type_in, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"dtype": "float32"}')
    words = ["root", "out", "--to", "hugging-face", "--dtype", "bf16", "--config", "model"]
    status, out, err = type_in("checkpoint", "convert", *words)
    assert (status, out) == (0, "out\n")
    assert err == "left out: step, exp_avg, exp_avg_sq (Hugging Face folders hold weights alone)\n"
    written = load_file(tmp_path / "out" / "model.safetensors")
    model, _ = model_and_optimizer()
    model[1].bias.data += 1.0
    for name, value in model.state_dict().items():
        assert torch.equal(written[name], value.bfloat16()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16"}
    status, out, err = type_in("checkpoint", "convert", "out", "ours")
    assert (status, out, err) == (0, "ours/step-00000000\n", "")
    assert type_in("checkpoint", "verify", "ours")[0] == 0
    status, out, err = type_in("checkpoint", "convert", "out", "copy", "--to", "hugging-face")
    assert (status, out, err) == (0, "copy\n", "")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    _, _, err = type_in("checkpoint", "convert", "ours", "bare", "--to", "hugging-face")
    assert err == "no config.json: give --config FOLDER for transformers to open it\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "deepspeed", "--stage", "1", "--processes", "3"],
        ["--to", "deepspeed", "--stage", "3", "--processes", "2"],
        ["--to", "deepspeed-universal"],
        ["--to", "dcp"],
    ],
)
def test_convert_from_any_to_any(options, type_in):
    status, out, err = type_in("checkpoint", "convert", ZERO / "zero2-bf16", "there", *options)
    assert (status, out, err) == (0, "there\n", "")
    assert type_in("checkpoint", "verify", "there")[0] == 0
    status, out, _ = type_in("checkpoint", "convert", "there", "back")
    assert (status, out) == (0, "back/step-00000003\n")
    found = json.loads(type_in("checkpoint", "diff", ZERO / "zero2-bf16", "back", "--json")[1])
    assert found["values"] == found["kinds"] == found["only_second"] == []
    left_out = {name for name, _ in found["only_first"]}
    assert not left_out or options[1] == "deepspeed-universal"  # buffers and frozen ones


def interrupt(monkeypatch, after):
    """Send this process SIGINT, as Ctrl-C does, when so many data files have been closed."""
    plain, opened = storage.LocalFile.__enter__, []

    def enter(self):
        opened.append(self.path)
        if len([p for p in opened if p.endswith((".safetensors", ".pt"))]) == after + 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # the main thread has it now
        return plain(self)

    monkeypatch.setattr(storage.LocalFile, "__enter__", enter)


def test_ctrl_c_and_the_same_command_goes_on(root, type_in, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[convert.__module__], "FILE", 100)
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        words = ["checkpoint", "convert", "root", "ours", "--workers", "1"]
        status, out, err = type_in(*words)
    assert (status, out) == (130, "")
    assert err == "hakari: interrupted: the same command goes on where it stopped\n"
    (folder,) = (tmp_path / "ours").iterdir()
    assert folder.name.startswith(".tmp-step-00000008-")
    assert not (folder / "COMMIT").exists()
    before = {file.name: file.stat().st_ino for file in (folder / "data").iterdir()}
    records = [file.name for file in folder.glob("done-*.json")]
    assert len(records) == 3
    assert type_in(*words)[:2] == (0, "ours/step-00000008\n")
    after = {f.name: f.stat().st_ino for f in (tmp_path / "ours/step-00000008/data").iterdir()}
    kept = [name for name, inode in before.items() if after[name] == inode]
    assert len(kept) >= len(records)
    assert len(after) > len(kept)
    assert type_in("checkpoint", "verify", "ours")[0] == 0
    status, out, _ = type_in("checkpoint", "diff", "root", "ours")
    assert (status, out) == (0, "16 tensors are equal; no difference\n")


def test_a_changed_source_does_not_go_on(root, type_in, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[convert.__module__], "FILE", 100)
    words = ["checkpoint", "convert", "root", "ours", "--workers", "1"]
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        type_in(*words)
    (file,) = (root / "step-00000008" / "data").iterdir()
    os.utime(file, (1, 1))
    assert type_in(*words)[0] == 0
    assert len(list((tmp_path / "ours").glob(".tmp-*"))) == 1  # of the first attempt
    assert "never completed: .tmp-" in type_in("checkpoint", "inspect", "ours")[1]


@pytest.mark.parametrize("form", ["hugging-face", "deepspeed"])
@pytest.mark.parametrize("there", [True, False])
def test_ctrl_c_removes_what_nothing_can_go_on_with(
    root, type_in, monkeypatch, tmp_path, form, there
):
    if there:
        (tmp_path / "out").mkdir()
    interrupt(monkeypatch, after=0 if form == "hugging-face" else 1)
    words = [ZERO / "zero2-bf16", "out", "--to", form, "--processes", "4"]
    status, out, err = type_in("checkpoint", "convert", *words)
    assert (status, out) == (130, "")
    assert err.endswith("hakari: interrupted: what it wrote is removed\n")
    assert (tmp_path / "out").exists() == there
    assert not there or not list((tmp_path / "out").iterdir())


def test_a_damaged_source_leaves_no_target(root, type_in, tmp_path):
    flip(root / "step-00000008", "weight/0.weight")
    status, out, err = type_in("checkpoint", "convert", "root", "out", "--to", "hugging-face")
    assert (status, out) == (2, "")
    assert "hakari: 0.weight (weight) is damaged: bytes " in err
    assert not (tmp_path / "out").exists()
    status, _, err = type_in("checkpoint", "convert", "root", "ours")
    assert status == 2
    assert "0.weight (weight) is damaged" in err
    assert not list((tmp_path / "ours").glob("step-*"))


def test_rules_and_their_numbers(root, type_in, tmp_path):
    (tmp_path / "rules.toml").write_text(
        "[[rule]]\nmatch = '(?P<part>\\d)\\.weight'\nto = 'layer.{part}.kernel'\nkind = 'unique'\n"
        "[[rule]]\nmatch = '(?P<part>\\d)\\.bias'\nto = 'layer.{part}.bias'\nkind = 'unique'\n"
    )
    assert type_in("checkpoint", "convert", "root", "x", "--rules", "rules.toml")[0] == 0
    out = type_in("checkpoint", "inspect", "x", "--all")[1]
    assert "layer.0.kernel" in out
    words = ["x", "back", "--target-rules", "rules.toml"]
    assert type_in("checkpoint", "convert", *words)[0] == 0
    found = json.loads(type_in("checkpoint", "diff", "root", "back", "--json")[1])
    assert (found["equal"], found["only_first"], found["only_second"]) == (16, [], [])


def test_megatron_both_ways(type_in):
    config = ["heads=4", "kv_heads=2", "head_dim=2", "vocab=13", "vocab_multiple=16"]
    numbers = [word for pair in config for word in ("--set", pair)]
    words = [MEGATRON, "ours", "--rules", "megatron-gpt", *numbers]
    assert type_in("checkpoint", "convert", *words) == (0, "ours/step-00000005\n", "")
    words = ["ours", "theirs", "--to", "megatron", "--target-rules", "megatron-gpt", *numbers]
    assert type_in("checkpoint", "convert", *words) == (0, "theirs\n", "")
    words = ["theirs", "again", "--rules", "megatron-gpt", *numbers]
    assert type_in("checkpoint", "convert", *words)[0] == 0
    status, out, _ = type_in("checkpoint", "diff", "ours", "again")
    assert (status, out) == (0, "84 tensors are equal; no difference\n")


# --- export and prune ---------------------------------------------------------------------


def test_export(root, type_in, tmp_path):
    lost = "step 8, optimizer AdamW, the optimizer's options, extra state, rank states"
    said = f"left out: {lost} (atoms are tensors alone)\n"
    assert type_in("checkpoint", "export", "root", "atoms") == (0, "atoms\n", said)
    (file,) = (tmp_path / "atoms").iterdir()
    grouped = load_file(file)
    assert {"weight/0.weight", "exp_avg/1.bias", "step/1.bias"} <= grouped.keys()
    assert len(grouped) == 16
    words = ["--layout", "one-file-per-parameter"]
    assert type_in("checkpoint", "export", "root", "files", *words)[0] == 0
    for name, value in grouped.items():
        state, _, parameter = name.partition("/")
        own = load_file(tmp_path / "files" / parameter / f"{state}.safetensors")
        assert torch.equal(own[name], value)
    assert type_in("checkpoint", "export", "root", "files") == (
        2,
        "",
        "hakari: files is not empty: choose another folder\n",
    )


def test_export_writes_no_file_outside_its_folder(tmp_path, type_in):
    save_file({"../../evil": torch.zeros(2)}, tmp_path / "model.safetensors")
    words = ["atoms", "--layout", "one-file-per-parameter"]
    status, _, err = type_in("checkpoint", "export", ".", *words)
    assert (status, "'../../evil' cannot be a file name" in err) == (2, True)
    assert type_in("checkpoint", "export", ".", "atoms")[0] == 0


def test_prune_says_what_it_removes(root, type_in):
    status, out, err = type_in("checkpoint", "prune", "root", "--keep", "1", "--dry-run")
    assert (status, err) == (0, "")
    lines = [line.rpartition(" (")[0] for line in out.splitlines()]
    assert lines == ["would remove step-00000005", "would remove step-00000003"]
    assert len(list(root.glob("step-*"))) == 3
    status, out, _ = type_in("checkpoint", "prune", "root", "--keep", "2", "--leftovers")
    lines = [line.rpartition(" (")[0] for line in out.splitlines()]
    assert lines == ["removed step-00000003", "removed .tmp-step-00000009-abcdef"]
    assert sorted(p.name for p in root.iterdir()) == ["LATEST", "step-00000005", "step-00000008"]
    assert type_in("checkpoint", "prune", "root", "--keep", "2")[1] == "nothing to remove\n"
    model, optimizer = model_and_optimizer()
    assert load(root, model, optimizer).step == 8


def test_prune_keeps_the_last_whole_one(root, type_in):
    for step in (5, 8):
        (file,) = (root / f"step-{step:08d}" / "data").iterdir()
        file.write_bytes(file.read_bytes()[:-1])
    assert type_in("checkpoint", "prune", "root", "--keep", "1")[1] == "nothing to remove\n"


# --- mistakes -----------------------------------------------------------------------------

MISTAKES = {
    "no folder": (["inspect", "lost"], "lost is not a folder, or there is nothing in it"),
    "no checkpoint": (["inspect", "."], "is no checkpoint that is known: it has none of COMMIT"),
    "unknown format": (["inspect", "root", "--from", "tar"], "tar"),
    "tag": (["inspect", "root", "--tag", "x"], "only DeepSpeed's checkpoints have tags"),
    "workers": (["verify", "root", "--workers", "0"], "--workers 0: give at least 1"),
    "wrong format": (["verify", "root", "--from", "hugging-face"], "has neither model.safetensors"),
    "one": (["diff", "root"], "SECOND"),
    "other": (["diff", "root", "lost"], "lost is not a folder"),
    "budget": (["convert", "root", "x", "--budget", "much"], "--budget much: write a size"),
    "small": (["convert", "root", "x", "--budget", "3kB"], "too little: give at least 16MB"),
    "threads": (["convert", "root", "x", "--workers", "0"], "--workers 0: give at least 1"),
    "number": (["convert", "root", "x", "--set", "a=b"], "--set a=b: write NAME=NUMBER"),
    "rules": (["convert", "root", "x", "--rules", "magic"], "no rules are called 'magic'"),
    "megatron": (
        ["convert", "root", "x", "--to", "megatron"],
        "give some (--target-rules), such as megatron-gpt; with hakari come hakari, llama-fused-",
    ),
    "optimizer": (
        ["convert", "root", "x", "--optimizer", "torch.optim.AdamW"],
        "--optimizer torch.optim.AdamW: write the name of its class, such as AdamW",
    ),
    "atoms": (["convert", "root", "x", "--to", "atoms"], "atoms"),
    "full": (["convert", "root", ".", "--to", "hugging-face"], ". is not empty"),
    "step": (["convert", "root", "root"], "root/step-00000008 exists"),
    "stage": (["convert", "root", "x", "--stage", "4"], "4"),
    "config": (
        ["convert", "root", "x", "--to", "hugging-face", "--config", "lost"],
        "lost has no config.json",
    ),
    "nothing": (["prune", "root"], "nothing to do: give --keep N, --after STEP or --leftovers"),
    "none": (["prune", "root", "--keep", "0"], "keep 0: at least 1 checkpoint has to be kept"),
    "itself": (["prune", "root/step-00000008", "--keep", "1"], "is one checkpoint"),
    "foreign": (["prune", ZERO / "zero2-bf16", "--keep", "1"], "is deepspeed: only checkpoints of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(mistake, type_in, root, tmp_path):
    words, told = MISTAKES[mistake]
    before = sorted(p for p in tmp_path.rglob("*"))
    status, out, err = type_in("checkpoint", *words)
    assert (status, out) == (2, "")
    complaint = err.splitlines()[-1]
    assert complaint.startswith("hakari: ")
    assert told in complaint
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_object_stores(made, type_in):
    """All of it on fsspec's store in memory, which like others has no folders and no rename."""
    store = f"memory://checkpoints-{os.getpid()}"
    status, out, err = type_in("checkpoint", "convert", made, f"{store}/ours")
    assert (status, out, err) == (0, f"{store}/ours/step-00000008\n", "")
    assert type_in("checkpoint", "verify", f"{store}/ours", "--all")[0] == 0
    assert type_in("checkpoint", "diff", made, f"{store}/ours")[0] == 0
    words = [f"{store}/ours", f"{store}/theirs", "--to", "hugging-face"]
    assert type_in("checkpoint", "convert", *words)[:2] == (0, f"{store}/theirs\n")
    found = json.loads(type_in("checkpoint", "inspect", f"{store}/theirs", "--json")[1])
    assert found["checkpoint"]["form"] == "hugging-face"
    assert found["checkpoint"]["made"] is None
    assert type_in("checkpoint", "export", f"{store}/ours", f"{store}/atoms")[0] == 0
    status, out, _ = type_in("checkpoint", "prune", f"{store}/ours", "--keep", "1")
    assert (status, out) == (0, "nothing to remove\n")
    words = ["convert", f"{store}/ours", f"{store}/theirs", "--to", "hugging-face"]
    assert "theirs is not empty" in type_in("checkpoint", *words)[2]
