"""A run goes on from its checkpoint on other numbers of processes as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hakari.training import checkpoint
from hakari.training.config import from_dict
from hakari.training.model import Transformer
from hakari.training.parallel import alone, make_mesh
from hakari.training.step import Trainer, make_work, prepare, train_step
from tests.distributed.ranks import ranks
from tests.distributed.steps import batch, table, whole

torch.set_num_threads(1)

MODELS: dict[str, dict[str, Any]] = {
    "grin": {},
    "aux_free, some layers": {"model__moe__router": "aux_free", "model__moe__layers": [1, 3]},
    "dense, tied": {"model__moe__experts": 0, "model__tied": True},
}
SPLITS: dict[str, dict[str, Any]] = {
    "data": {"parallel__data": 2},
    "tensor": {"parallel__tensor": 2},
    "pipeline": {"parallel__pipeline": 2, "micro_batch": 4},
}
SAVED, LAST = 2, 4  # steps


def trainer_of(changes: dict[str, Any]) -> Trainer:
    config = from_dict(table(**changes))
    return prepare(config, make_mesh(config.parallel, "cpu"))


def go(trainer: Trainer, start: int, stop: int) -> list[float]:
    axis = trainer.mesh["data"]
    part = batch(axis.get_local_rank(), axis.size())
    return [
        train_step(trainer, make_work(trainer, part, step), step).loss
        for step in range(start, stop)
    ]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()}


def moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": whole(value).clone()
        for name, parameter in trainer.model.named_parameters()
        for key, value in trainer.optimizer.state[parameter].items()
    }


def uninterrupted(run: Path, changes: dict[str, Any]) -> Any:
    """Save after two steps and go on to four: losses, weights and moments at the end."""
    trainer = trainer_of(changes)
    go(trainer, 0, SAVED)
    saved = {"samples": SAVED * 8}
    checkpoint.save(run, trainer.model, trainer.optimizer, saved, step=SAVED)
    losses = go(trainer, SAVED, LAST)
    return losses, weights(trainer), moments(trainer)


def resumed(run: Path, changes: dict[str, Any]) -> Any:
    """The same last steps, by processes that know nothing of the first ones."""
    trainer = trainer_of(changes | {"seed": 9})  # other weights, other noise
    trainer = Trainer(**vars(trainer) | {"config": from_dict(table(**changes))})
    loaded = checkpoint.load(run, trainer.model, trainer.optimizer)
    assert (loaded.step, loaded.extra_state) == (SAVED, {"samples": SAVED * 8})
    assert loaded.verified == loaded.tensors > 0
    losses = go(trainer, loaded.step, LAST)
    return losses, weights(trainer), moments(trainer)


# --- two processes, one start for all -------------------------------------------------------


def splits(model: str) -> list[str]:
    return [s for s in SPLITS if not ("tied" in model and s == "pipeline")]


def everything(folder: str, start: str) -> dict[tuple[str, str], Any]:
    """On two ranks: save by data, or only resume from what one process has saved."""
    found = {}
    for model, changes in MODELS.items():
        run = Path(folder) / model
        if start == "save":
            found[model, "uninterrupted"] = uninterrupted(run, changes | SPLITS["data"])
        for split in splits(model) if start == "save" else ["data", "tensor"]:
            found[model, split] = resumed(run, changes | SPLITS[split])
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Saved by two ranks; resumed on two by data, tensor and pipeline, and on one."""
    folder = tmp_path_factory.mktemp("two")
    found = ranks(2, everything, str(folder), "save")
    with alone():
        one = {(m, "one"): resumed(folder / m, MODELS[m]) for m in MODELS}
    return [rank | one for rank in found]


RESUMED = [(model, split) for model in MODELS for split in [*splits(model), "one"]]


@pytest.mark.parametrize(("model", "split"), RESUMED)
def test_a_run_of_two_processes_goes_on_on_others(two, model, split):
    for rank in two:
        losses, state, moved = rank[model, "uninterrupted"]
        found, theirs, others = rank[model, split]
        assert found == pytest.approx(losses, rel=1e-12)
        for name, value in theirs.items():  # of the layers this rank has
            torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-11)
        for name, value in others.items():
            torch.testing.assert_close(value.double(), moved[name].double(), rtol=1e-9, atol=1e-12)
        if split == "data":
            assert found == losses
            assert all(torch.equal(value, state[name]) for name, value in theirs.items())
            assert all(torch.equal(value, moved[name]) for name, value in others.items())
    names = set().union(*(rank[model, split][1] for rank in two))
    assert names == set(two[0][model, "uninterrupted"][1])


def test_both_ranks_of_a_pipeline_have_their_own_layers(two):
    first, last = (set(rank["grin", "pipeline"][1]) for rank in two)
    assert first
    assert last
    assert not first & last


# --- one process ----------------------------------------------------------------------------


@pytest.fixture
def group():
    with alone():
        yield


@pytest.fixture
def saved(group, tmp_path):
    """A run that was saved after two steps by one process, and what followed."""
    return tmp_path, uninterrupted(tmp_path, {})


def test_one_process_goes_on_with_the_same_bits(saved):
    run, (losses, state, moved) = saved
    found, theirs, others = resumed(run, {})
    assert found == losses
    assert all(torch.equal(theirs[name], state[name]) for name in state)
    assert all(torch.equal(others[name], moved[name]) for name in moved)


def test_to_forget_the_optimizer_is_noticed(saved):
    run, (losses, _, _) = saved
    load = checkpoint.load

    def weights_alone(folder, model, optimizer):
        return load(folder, model)

    with patch.object(checkpoint, "load", weights_alone):
        found, _, _ = resumed(run, {})
    assert found[0] == losses[0]  # before the optimizer's first step
    assert found[1] != pytest.approx(losses[1], rel=1e-6)


def test_to_forget_the_count_of_steps_is_noticed(saved):
    run, (losses, _, _) = saved
    load = checkpoint.load

    def all_but_steps(folder, model, optimizer):
        loaded = load(folder, model, optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()
        return loaded

    with patch.object(checkpoint, "load", all_but_steps):
        found, _, _ = resumed(run, {})
    assert found[1] != pytest.approx(losses[1], rel=1e-6)


def test_weights_alone_are_read_for_generation(saved):
    run, _ = saved
    other = trainer_of({"seed": 9})
    assert checkpoint.load(run, other.model).step == SAVED
    again = trainer_of({})
    go(again, 0, SAVED)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(again).items())
    assert not other.optimizer.state


def test_the_folder_holds_safetensors_and_a_readable_manifest(saved):
    from safetensors import safe_open

    folder = saved[0] / "step-00000002"
    table = json.loads((folder / "manifest.json").read_text())
    assert (table["extra"], table["step"]) == ({"samples": 16}, 2)
    names: set[str] = set()
    for path in folder.glob("data/*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    assert {"weight/embed.weight", "exp_avg/layers.0.mlp.gate"} <= names
    assert {path.suffix for path in folder.rglob("*.*")} == {".json", ".safetensors"}


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_keep_removes_the_oldest_only(group, tmp_path, keep):
    trainer = trainer_of({})
    for step in (1, 5, 9, 10):
        checkpoint.save(tmp_path, trainer.model, step=step, keep=keep)
    assert checkpoint.steps(tmp_path) == [1, 5, 9, 10][-keep:]


def test_older_ones_stay_until_the_new_one_is_whole(group, tmp_path):
    trainer = trainer_of({})
    checkpoint.save(tmp_path, trainer.model, step=1, keep=1)

    def fail(*arguments, **named):
        raise OSError("No space left on device")

    with patch("os.write", fail), pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, trainer.model, step=2, keep=1)
    assert checkpoint.steps(tmp_path) == [1]


WRONG = {
    "more layers": ({"model__layers": 6}, r"only here \(\d+\): layers\.4\."),
    "another kind of layer": (
        {"model__moe__layers": [0, 1, 2]},
        r"layers\.3\.mlp\.down\.weight \(weight\), like layers\.3.*"
        r"only in the checkpoint \(\d+\): layers\.3\.mlp\.down \(exp_avg\)",
    ),
    "a selection bias": (
        {"model__moe__router": "aux_free"},
        r"only here \(4\): layers\.0\.mlp\.selection_bias \(weight\)",
    ),
    "other widths": (
        {"model__hidden": 48, "model__moe__hidden": 24},
        r"layers\.0\.mlp\.gate \(weight\) is \[4, 16, 32\] in the checkpoint and "
        r"\[4, 24, 32\] here",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_of_another_model_is_refused_by_name(saved, case):
    changes, message = WRONG[case]
    trainer = trainer_of(changes)
    before = weights(trainer)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved[0], trainer.model, trainer.optimizer)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert not trainer.optimizer.state
    with pytest.raises(ValueError, match="checkpoint"):
        checkpoint.load(saved[0], trainer.model)


def test_a_model_without_optimizer_can_be_read_into_a_plain_one(saved):
    config = from_dict(table())
    plain = Transformer(config.model).double()
    checkpoint.load(saved[0], plain)
    other = trainer_of({"seed": 9})
    checkpoint.load(saved[0], other.model)
    assert all(
        torch.equal(value, plain.get_parameter(name)) for name, value in weights(other).items()
    )
