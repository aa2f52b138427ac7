"""`hakari checkpoint` between formats: what one of them lacks is said, or told by the user."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from hakari.training.checkpoint import Target, load, open_any, save, write_any

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA = FIXTURES / "zero_llama"
MEGATRON = FIXTURES / "megatron" / "stacked"
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(kind: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    optimizer = kind(model.parameters(), **options)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


# --- atoms --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["grouped", "one-file-per-parameter"])
def test_what_was_exported_comes_back(type_in, tmp_path, layout):
    model, optimizer = trained(torch.optim.AdamW)
    save("root", model, optimizer, {"cursor": 3}, step=8)
    lost = "step 8, optimizer AdamW, the optimizer's options, extra state"
    said = f"left out: {lost} (atoms are tensors alone)\n"
    words = ["export", "root", "atoms", "--layout", layout]
    assert type_in("checkpoint", *words) == (0, "atoms\n", said)
    status, out, err = type_in("checkpoint", "inspect", "atoms")
    assert (status, err) == (0, "")
    assert "format atoms step unknown size 556 B, tensors: 16 " in " ".join(out.split())
    status, out, _ = type_in("checkpoint", "verify", "atoms")
    assert (status, out.startswith("atoms: readable: 16 tensors")) == (0, True)
    assert type_in("checkpoint", "convert", "atoms", "back") == (0, "back/step-00000000\n", "")
    for first, second in (("root", "back"), ("root", "atoms"), ("atoms", "back")):
        _, out, _ = type_in("checkpoint", "diff", first, second, "--json")
        found = json.loads(out)
        assert found["equal"] == 16, (first, second)
        unequal = ("only_first", "only_second", "kinds", "values")
        assert [found[name] for name in unequal] == [[], [], [], []]
    other, _ = trained(torch.optim.AdamW)
    nn.init.zeros_(other[0].weight)
    load("back", other)
    assert torch.equal(other[0].weight, model[0].weight)


def test_weights_alone_lose_nothing_as_atoms(type_in, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert type_in("checkpoint", "export", ".", "atoms") == (0, "atoms\n", "")
    words = ["export", "atoms", "again", "--from", "atoms"]
    assert type_in("checkpoint", *words) == (0, "again\n", "")


def test_numbers_ties_and_ranks_are_lost_as_atoms(type_in, tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

        def get_extra_state(self) -> Any:
            return {"kept": 1}

        def set_extra_state(self, state: Any) -> None: ...

    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.a.weight]["seen"] = 5
    save("root", model, optimizer, step=2, rank_state=[1])
    err = type_in("checkpoint", "export", "root", "atoms")[2]
    for said in ("plain numbers (seen)", "ties (a.weight = b.weight)", "rank states", "what modul"):
        assert said in err
    assert "extra state" not in err


# --- numbers of rules ---------------------------------------------------------------------

NUMBERS = ["heads=4", "kv_heads=2", "head_dim=2", "vocab=13", "vocab_multiple=16"]


def test_numbers_are_given_together_or_one_by_one(type_in):
    together = ["--set", *NUMBERS]
    words = [MEGATRON, "ours", "--rules", "megatron-gpt"]
    assert type_in("checkpoint", "convert", *words, *together)[0] == 0
    one_by_one = ["--set", *NUMBERS[:3], "--set", NUMBERS[3], f"--set={NUMBERS[4]}"]
    words = [MEGATRON, "again", "--rules", "megatron-gpt"]
    assert type_in("checkpoint", "convert", *words, *one_by_one)[0] == 0
    out = type_in("checkpoint", "diff", "ours", "again")[1]
    assert out == "84 tensors are equal; no difference\n"


def test_numbers_come_from_a_models_configuration(type_in, tmp_path):
    """Those that --set does not give; of a Hugging Face folder it is its own."""
    to = ["--to", "megatron", "--target-rules", "megatron-gpt"]
    status, out, err = type_in("checkpoint", "convert", LLAMA / "checkpoint", "mega", *to)
    told = "rules megatron-gpt need heads, kv_heads, head_dim, vocab, vocab_multiple: give --set "
    assert (status, out) == (2, "")
    assert err == f"hakari: {told}heads=... or --config FOLDER (in Python: config)\n"
    assert not (tmp_path / "mega").exists()
    model = ["--config", LLAMA / "model"]
    words = [LLAMA / "checkpoint", "mega", *to, *model]
    _, _, err = type_in("checkpoint", "convert", *words)
    assert err.startswith("hakari: rules megatron-gpt need vocab_multiple: give --set vocab_mult")
    more = ["--set", "vocab_multiple=64"]
    status, out, err = type_in("checkpoint", "convert", *words, *more)
    assert (status, out) == (0, "mega\n")
    kept = ", ".join(
        f"extra_state/{each}"
        for each in ("lr_scheduler", "engine", "optimizer", "buffers", "client")
    )
    said = f"left out: {kept} (Megatron-core's folders have no place for it)\n"
    assert err == said
    words = ["mega", "back", "--rules", "megatron-gpt", *model, *more]
    assert type_in("checkpoint", "convert", *words)[0] == 0
    found = json.loads(type_in("checkpoint", "diff", LLAMA / "checkpoint", "back", "--json")[1])
    assert (found["equal"], found["values"], found["kinds"]) == (84, [], [])
    wrong = [*words[:1], "wrong", *words[2:], "heads=8"]
    assert "linear_qkv.weight: it has" in type_in("checkpoint", "convert", *wrong)[2]
    lost = ["mega", "lost", "--rules", "megatron-gpt", "--config", "mega"]
    assert "mega has no config.json" in type_in("checkpoint", "convert", *lost)[2]
    words = ["mega", "hf", "--to", "hugging-face", "--rules", "megatron-gpt", *model, *more]
    assert type_in("checkpoint", "convert", *words)[0] == 0
    words = ["hf", "of-hf", *to, *more]
    assert type_in("checkpoint", "convert", *words) == (0, "of-hf\n", "")


def test_what_a_rule_file_says_comes_before_a_configuration(type_in, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text("[config]\nheads = 3\n[[rule]]\nmatch = 'w'\nto = 'v'\nsize = 'heads'\n")
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 9}')
    words = [".", "out", "--rules", "rules.toml"]
    assert type_in("checkpoint", "convert", *words)[0] == 0
    rules.write_text(rules.read_text().replace("heads = 3\n", ""))
    _, _, err = type_in("checkpoint", "convert", ".", "other", *words[2:])
    assert "it has 3 rows along dimension 0" in err
    assert "the rule says 9" in err


def test_a_save_that_shall_load_is_no_models_configuration(type_in, tmp_path):
    """With --to deepspeed, --config is a save: numbers of rules are not looked for in it."""
    rules = tmp_path / "rules.toml"
    rules.write_text("[[rule]]\nmatch = '(?P<name>.*)'\nto = '{name}'\n")
    source = FIXTURES / "deepspeed" / "zero2-bf16"
    for number, which in enumerate(("--rules", "--target-rules")):
        words = [source, f"out{number}", "--to", "deepspeed", "--config", source, which, rules]
        assert type_in("checkpoint", "convert", *words) == (0, f"out{number}\n", "")


# --- the optimizer's class ----------------------------------------------------------------


def saved_by_torch(kind: Any, folder: Path, **options: Any) -> None:
    model, optimizer = trained(kind, **options)
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": states}, checkpoint_id=folder, no_dist=True)


@ALONE
@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (torch.optim.AdamW, {}, "AdamW"),
        (torch.optim.AdamW, {"amsgrad": True}, "AdamW"),
        (torch.optim.Adam, {}, "Adam"),
        (torch.optim.RAdam, {}, ""),
        (torch.optim.RAdam, {"decoupled_weight_decay": True}, ""),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}, ""),
        (torch.optim.Adamax, {}, ""),
        (torch.optim.SGD, {"momentum": 0.9}, ""),
    ],
)
def test_of_torchs_containers_adam_and_adamw_are_told(tmp_path, kind, options, told):
    """And are when hakari writes them: it adds no option that would make one of another."""
    saved_by_torch(kind, tmp_path / "dcp", **options)
    source = open_any(tmp_path / "dcp")
    assert source.optimizer == told
    for number, known in enumerate((told, kind.__name__)):
        stated = replace(source, optimizer=known)
        where = write_any(stated, tmp_path / f"again{number}", Target("dcp"))
        assert open_any(where).optimizer == told


@pytest.mark.parametrize(("said", "told"), [("Adam", "Adam"), ("AdamW", "AdamW"), ("Lamb", "")])
def test_options_that_torch_wants_do_not_change_the_class(tmp_path, said, told):
    """As other frameworks save them: few options, and without decay Adam and AdamW are the same."""
    model, optimizer = trained(torch.optim.AdamW)
    save(tmp_path / "root", model, optimizer, step=1)
    source = open_any(tmp_path / "root")
    groups = (replace(source.groups[0], options={"lr": 0.5, "weight_decay": 0}),)
    few = replace(source, optimizer=said, groups=groups)
    assert open_any(write_any(few, tmp_path / "dcp", Target("dcp"))).optimizer == told


@ALONE
def test_a_class_that_no_file_says_is_said_by_the_user(type_in, tmp_path):
    saved_by_torch(torch.optim.RAdam, tmp_path / "dcp", lr=0.5)
    assert type_in("checkpoint", "convert", "dcp", "ours")[0] == 0
    model, optimizer = trained(torch.optim.RAdam)
    with pytest.raises(
        ValueError,
        match=r"or say so in it: hakari checkpoint convert .*ours/step-00000001 NEW "
        r"--optimizer RAdam$",
    ):
        load("ours", model, optimizer)
    words = ["ours/step-00000001", "new", "--optimizer", "RAdam"]
    assert type_in("checkpoint", "convert", *words) == (0, "new/step-00000001\n", "")
    assert "optimizer RAdam" in " ".join(type_in("checkpoint", "inspect", "new")[1].split())
    load("new", model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="the checkpoint's optimizer is RAdam, and this is AdamW"):
        load("new", *trained(torch.optim.AdamW))


def test_megatron_does_not_say_it_and_the_user_does(type_in):
    words = [MEGATRON, "ours", "--rules", "megatron-gpt", "--set", *NUMBERS]
    type_in("checkpoint", "convert", *words)
    said = json.loads(type_in("checkpoint", "inspect", "ours", "--json")[1])["checkpoint"]
    assert said["optimizer"] == ""
    words = [MEGATRON, "new", "--optimizer", "AdamW", *words[2:]]
    assert type_in("checkpoint", "convert", *words)[0] == 0
    said = json.loads(type_in("checkpoint", "inspect", "new", "--json")[1])["checkpoint"]
    assert said["optimizer"] == "AdamW"


def test_a_class_against_what_the_source_says(type_in, tmp_path):
    save("root", *trained(torch.optim.AdamW), step=1)
    words = ["root", "new", "--optimizer", "SGD+Adam"]
    status, out, err = type_in("checkpoint", "convert", *words)
    assert (status, out) == (0, "new/step-00000001\n")
    assert err == "the source says that its optimizer is AdamW; now it is SGD+Adam\n"
    assert open_any("new").optimizer == "Adam+SGD"
    shutil.rmtree(tmp_path / "root")
    save("root", trained(torch.optim.AdamW)[0], step=1)
    _, _, err = type_in("checkpoint", "convert", "root", "more", "--optimizer", "AdamW")
    assert err == "hakari: --optimizer AdamW: the source has no state of an optimizer\n"
