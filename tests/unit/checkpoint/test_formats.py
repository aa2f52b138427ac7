"""Formats are told apart, opened and written by one call each."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as dcp

from hakari.training.checkpoint import formats, open_checkpoint, save
from hakari.training.checkpoint.foreign.optimizer_class import class_by_states
from hakari.training.checkpoint.formats import (
    FORMATS,
    Target,
    cast,
    detect,
    fingerprint,
    open_any,
    write_any,
)
from hakari.training.checkpoint.source import Group
from hakari.training.checkpoint.tensors import as_tensor

FIXTURES = Path(__file__).parents[2] / "fixtures"
ZERO = FIXTURES / "deepspeed"


def make(folder, steps=(3,)):
    torch.manual_seed(1)
    model = nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    for step in steps:
        save(folder, model, optimizer, step=step)
    return model


def touch(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_ours(tmp_path):
    make(tmp_path)
    assert detect(tmp_path) == "hakari-root"
    assert detect(tmp_path / "step-00000003") == "hakari"
    (tmp_path / "LATEST").unlink()
    assert detect(str(tmp_path)) == "hakari-root"
    (tmp_path / "step-00000003" / "COMMIT").unlink()
    assert detect(tmp_path) == "hakari-root"  # an incomplete save
    assert detect(tmp_path / "step-00000003") == "hakari"
    with pytest.raises(FileNotFoundError, match="step-00000003 holds no complete checkpoint"):
        open_any(tmp_path / "step-00000003")


def test_hugging_face(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert detect(tmp_path) == "hugging-face"
    touch(tmp_path / "shards", **{"model.safetensors.index.json": "{}"})
    assert detect(tmp_path / "shards") == "hugging-face"


ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@ALONE
def test_dcp_made_by_torch(tmp_path):
    dcp.save({"a": torch.zeros(2)}, checkpoint_id=tmp_path / "plain", no_dist=True)
    assert detect(tmp_path / "plain") == "dcp"


@ALONE
def test_dcp_in_safetensors_made_by_torch(tmp_path):
    writer = dcp.HuggingFaceStorageWriter(path=str(tmp_path), save_distributed=True)
    dcp.save({"a": torch.zeros(2)}, storage_writer=writer, no_dist=True)
    assert detect(tmp_path) == "dcp"


@pytest.mark.parametrize("name", ["zero0-fp32", "zero1-bf16", "zero2-bf16", "zero3-fp32"])
def test_deepspeed_made_by_deepspeed(name):
    assert detect(ZERO / name) == "deepspeed"
    (tag,) = (p for p in (ZERO / name).glob("global_step*") if "universal" not in p.name)
    assert detect(tag) == "deepspeed"
    source = open_any(ZERO / name)
    truth = load_file(ZERO / name / "truth.safetensors")
    assert source.step == 3
    assert truth
    assert {state for _, state in source.tensors} >= {"weight", "exp_avg", "exp_avg_sq"}
    assert open_any(tag).tensors == source.tensors


def test_deepspeed_without_a_file_that_names_the_newest(tmp_path):
    shutil.copytree(ZERO / "zero1-bf16" / "global_step3", tmp_path / "global_step3")
    assert detect(tmp_path) == "deepspeed"
    assert open_any(tmp_path, tag="global_step3").step == 3
    shutil.copytree(tmp_path / "global_step3", tmp_path / "best")
    assert detect(tmp_path, "best") == "deepspeed"
    with pytest.raises(ValueError, match="is no checkpoint that is known"):
        detect(tmp_path, "worst")


def test_universal_made_by_deepspeed(tmp_path):
    """Where a save and its conversion lie side by side, the save is meant, unless one is named."""
    folder = ZERO / "zero1-fp32"
    assert (folder / "latest_universal").exists()
    assert detect(folder) == "deepspeed"
    assert detect(folder / "global_step3_universal") == "deepspeed-universal"
    assert detect(folder, "global_step3_universal") == "deepspeed-universal"
    for file in ("latest_universal", "global_step3_universal"):
        place = shutil.copytree if (folder / file).is_dir() else shutil.copy
        place(folder / file, tmp_path / file)
    assert detect(tmp_path) == "deepspeed-universal"
    zero = open_any(folder)
    for source in (open_any(folder, "deepspeed-universal"), open_any(tmp_path)):
        for key, info in source.tensors.items():
            assert zero.tensors[key] == info
            assert np.array_equal(zero.array(key), source.array(key)), key


@pytest.mark.parametrize("name", ["stacked", "layered"])
def test_megatron_made_by_megatron(name):
    assert detect(FIXTURES / "megatron" / name) == "megatron"


def test_megatron(tmp_path):
    table = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    folder = touch(tmp_path / "iter_0000100", **{"metadata.json": table, "common.pt": ""})
    assert detect(folder) == "megatron"
    touch(folder, **{".metadata": ""})
    assert detect(folder) == "megatron"
    touch(tmp_path, **{"latest_checkpointed_iteration.txt": "100\n"})
    assert detect(tmp_path) == "megatron"
    touch(tmp_path, **{"latest_checkpointed_iteration.txt": "../../x"})
    with pytest.raises(ValueError, match=r"says '\.\./\.\./x', which is no iteration"):
        open_any(tmp_path)


def test_what_is_nothing_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder, or there is nothing in it"):
        detect(tmp_path / "nowhere")
    touch(tmp_path, **{"notes.txt": "", "latest": "global_step3", "other.safetensors": "x" * 8})
    with pytest.raises(ValueError, match=r"other\.safetensors: its header claims"):
        detect(tmp_path)
    (tmp_path / "other.safetensors").unlink()
    with pytest.raises(ValueError, match="is no checkpoint that is known: it has none of") as told:
        detect(tmp_path)
    for name in FORMATS:
        assert f"({name})" in str(told.value)
    touch(tmp_path, checkpoints__x="")
    with pytest.raises(ValueError, match=f"; give {tmp_path}/checkpoints$"):
        detect(tmp_path)


def test_wrong_words(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="format 'tar' is none of hakari, hugging-face"):
        open_any(tmp_path, "tar")
    with pytest.raises(ValueError, match="tag 'x': only DeepSpeed's checkpoints have tags"):
        open_any(tmp_path, tag="x")
    source = open_any(tmp_path)
    with pytest.raises(ValueError, match="format 'tar' is none of hakari, hugging-face"):
        write_any(source, tmp_path / "x", Target("tar"))
    with pytest.raises(ValueError, match=r"'atoms' is none of .*\(atoms: by hakari checkpoint exp"):
        write_any(source, tmp_path / "x", Target("atoms"))
    with pytest.raises(ValueError, match=r"megatron is written by rules: give .* megatron-gpt,"):
        write_any(source, tmp_path / "x", Target("megatron"))
    with pytest.raises(ValueError, match=r"no rules are called 'magic': there are .*megatron-gpt"):
        open_any(tmp_path, rules="magic")


# --- conversions --------------------------------------------------------------------------


def values(source):
    """Everything that is a tensor, with its type."""
    return {
        key: (info.dtype, info.shape, source.array(key).tobytes())
        for key, info in source.tensors.items()
    }


@pytest.mark.parametrize("name", ["zero1-bf16", "zero2-three", "zero3-fp32"])
def test_deepspeed_to_ours_keeps_every_bit(tmp_path, name):
    source = open_any(ZERO / name)
    where = write_any(source, tmp_path, Target("hakari"))
    assert where == f"{tmp_path}/step-00000003"
    again = open_any(where)
    assert values(again) == values(source)
    assert (again.step, again.optimizer, again.tied) == (3, source.optimizer, source.tied)
    assert [dict(g.options) for g in again.groups] == [dict(g.options) for g in source.groups]


@pytest.mark.parametrize(
    "target",
    [
        Target("deepspeed", stage=1, processes=3),
        Target("deepspeed", stage=2, processes=2),
        Target("deepspeed", stage=3, processes=4),
        Target("deepspeed-universal"),
        Target("deepspeed-universal", stage=3),
    ],
)
def test_there_and_back_again(tmp_path, target):
    """Ours, made of DeepSpeed's, written as DeepSpeed's: the trained states are the same bits."""
    first = open_any(ZERO / "zero2-bf16")
    write_any(first, tmp_path / "ours", Target("hakari"))
    template = Target(**{**vars(target), "config": str(ZERO / "zero2-bf16")})
    write_any(open_any(tmp_path / "ours"), tmp_path / "theirs", template)
    assert detect(tmp_path / "theirs") == target.form
    again, expected = values(open_any(tmp_path / "theirs")), values(first)
    trained = {name for group in first.groups for name in group.members}
    assert {key: value for key, value in again.items() if key[0] in trained} == {
        key: value for key, value in expected.items() if key[0] in trained
    }


def test_weights_are_rounded_as_torch_does_and_states_are_not(tmp_path):
    model = make(tmp_path)
    source = cast(open_checkpoint(tmp_path), "BF16")
    assert source.tensors["weight", "weight"].dtype == "BF16"
    assert source.tensors["weight", "exp_avg"].dtype == "F32"
    rounded = model.weight.detach().bfloat16()
    part = np.zeros((4, 12), np.uint16)[:, ::4]  # not contiguous
    source.read(("weight", "weight"), ((1, 5), (2, 5)), part)
    assert torch.equal(as_tensor(np.ascontiguousarray(part), "BF16"), rounded[1:5, 2:5])
    write_any(open_checkpoint(tmp_path), tmp_path / "again", Target("hakari", dtype="BF16"))
    assert values(open_any(tmp_path / "again")) == values(source)
    with pytest.raises(ValueError, match=r"cannot be rounded to 'I8': use one of F64, F32"):
        cast(source, "I8")


FLAGS = {"decoupled_weight_decay": True, "amsgrad": False}
CLASSES = [
    ({"step", "exp_avg", "exp_avg_sq"}, [FLAGS, FLAGS], "AdamW"),
    ({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, [FLAGS], "AdamW"),
    ({"exp_avg", "exp_avg_sq"}, [FLAGS | {"decoupled_weight_decay": False}], "Adam"),
    ({"exp_avg", "exp_avg_sq"}, [FLAGS, FLAGS | {"decoupled_weight_decay": False}], ""),
    ({"exp_avg", "exp_avg_sq"}, [FLAGS, {"decoupled_weight_decay": True}], ""),
    ({"exp_avg", "exp_avg_sq"}, [FLAGS | {"decoupled_weight_decay": None}], ""),
    ({"exp_avg", "exp_avg_sq"}, [], ""),
    ({"exp_avg"}, [FLAGS], ""),
    ({"exp_avg", "exp_avg_sq", "mu_product"}, [FLAGS], ""),
    (set(), [FLAGS], ""),
]


@pytest.mark.parametrize(("states", "options", "told"), CLASSES)
def test_the_class_of_an_optimizer_is_told_only_where_no_other_has_the_same(states, options, told):
    keys = [("w", state) for state in {"weight", *states}]
    assert class_by_states(keys, [Group(each, ("w",)) for each in options]) == told


def test_rules_rename_what_is_read_and_back_what_is_written(tmp_path):
    make(tmp_path / "ours")
    file = tmp_path / "rules.toml"
    file.write_text(
        "[[rule]]\nmatch = 'weight'\nto = 'fc.kernel'\nkind = 'unique'\n"
        "[[rule]]\nmatch = 'bias'\nto = 'fc.bias'\nkind = 'unique'\n"
    )
    plain, renamed = open_any(tmp_path / "ours"), open_any(tmp_path / "ours", rules=str(file))
    assert {name for name, _ in renamed.tensors} == {"fc.kernel", "fc.bias"}
    assert np.array_equal(
        renamed.array(("fc.kernel", "exp_avg")), plain.array(("weight", "exp_avg"))
    )
    write_any(renamed, tmp_path / "back", Target("hakari", rules=str(file)))
    assert values(open_any(tmp_path / "back")) == values(plain)


def test_a_fingerprint_is_of_files_rules_and_words(tmp_path):
    make(tmp_path / "root")
    rules = touch(tmp_path, **{"rules.toml": "one"}) / "rules.toml"
    ask = tmp_path / "root", "hakari-root", [str(rules), "shipped"], "more"
    first = fingerprint(*ask)
    assert fingerprint(*ask) == first
    assert fingerprint(*ask[:3], "other") != first
    rules.write_text("two")
    second = fingerprint(*ask)
    assert second != first
    (file,) = (tmp_path / "root" / "step-00000003" / "data").iterdir()
    file.touch()
    assert fingerprint(*ask) != second


def test_the_table_of_formats_is_that_of_the_documentation():
    for name in FORMATS:
        assert f"\n{name} " in inspect.cleandoc(formats.__doc__)
