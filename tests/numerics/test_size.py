"""Sizes said before a run, against the tensors that are really there."""

from __future__ import annotations

import importlib
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hakari.training.config import Config, from_dict
from hakari.training.model import Transformer, initialise
from hakari.training.moe import balance, experts
from hakari.training.noise import token_keys
from hakari.training.optimizer import make_optimizer
from hakari.training.parallel import keep_stage
from hakari.training.sizing import GIB, Size, first_line, size

torch.set_num_threads(1)

module = importlib.import_module("hakari.training.sizing")  # the package exports its function

DENSE = {"vocabulary": 512, "dim": 64, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 160}
SPARSE = {"moe": {"experts": 8, "hidden": 96}}


def config(model=None, **changes) -> Config:
    return from_dict({"batch": 4, "length": 64, "model": DENSE | (model or {})} | changes)


CONFIGS = {
    "dense": config(),
    "sparse": config(SPARSE),
    "sparse, every second layer, one expert a token": config(
        {"moe": {"experts": 4, "top_k": 1, "hidden": 96, "layers": [1, 3]}}
    ),
    "untied, LayerNorm, biases": config(
        {"tied": False, "norm": "layer", "attention_bias": True, "head_bias": True}
    ),
    "wide heads": config({"head_dim": 32, "kv_heads": 4}),
    "no documents": config(data={"isolate": False}, length=128),
    "window": config({"window": 16}, data={"isolate": False}),
    "wide experts": config({"moe": {"experts": 4, "hidden": 512}}, length=128),
    "gshard": config({"moe": {"experts": 8, "hidden": 96, "router": "gshard"}}),
    "float64": config(SPARSE, precision="float64"),
    "bfloat16": config(precision="bfloat16"),
    "bfloat16, sparse": config(SPARSE, precision="bfloat16"),
}


def made(c: Config) -> Transformer:
    model = Transformer(c.model)
    model = model.double() if c.precision == "float64" else model
    initialise(model, 1)
    model.recompute = c.recompute
    return model


def loss(model: Transformer, c: Config) -> torch.Tensor:
    tokens = torch.arange(c.batch * c.length).view(c.batch, c.length)
    masked = torch.zeros_like(tokens) if c.data.isolate else None
    words = (tokens * 7919) % c.model.vocabulary
    balance.begin(model, tokens.numel())
    with torch.autocast("cpu", torch.bfloat16, enabled=c.precision == "bfloat16"):
        found = model(words, masked, token_keys(1, 0, tokens), words)
    balance.settle(model)
    return found


def saved_bytes(c: Config) -> int:
    """What autograd keeps of one forward pass, each storage once, parameters and buffers not."""
    model, kept = made(c), {}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, c)
    return sum(storage.nbytes() for storage in kept.values())


def around_the_logits(c: Config) -> int:
    """Their gradient, and under autocast themselves: not saved, but there at the peak."""
    wide, narrow = module.ITEMS[c.precision]
    return c.batch * c.length * c.model.vocabulary * (wide + (narrow if narrow < wide else 0))


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_what_autograd_keeps(name):
    c = CONFIGS[name]
    measured = saved_bytes(c) + around_the_logits(c)
    assert size(c).activation_bytes == pytest.approx(measured, rel=0.12)


def test_routers_of_many_experts_keep_logits_and_weights():
    c = config({"moe": {"experts": 128, "hidden": 8}})
    never = dict.fromkeys((2, 4, 8), -1)
    with patch.object(experts, "CALL", never):  # few rows each: padding would be most of them
        measured = saved_bytes(c) + around_the_logits(c)
    assert size(c).activation_bytes == pytest.approx(measured, rel=0.05)


def test_experts_of_an_accelerator_keep_what_three_products_need():
    c = CONFIGS["wide experts"]
    with patch.object(experts, "_mlp", lambda *inputs: (experts._composed(*inputs),)):
        measured = saved_bytes(c) + around_the_logits(c)
    # the norm of a CPU keeps one tensor more, on four blocks two each
    norms = 4 * 2 * c.model.dim * 4 * c.batch * c.length
    found = size(c, device="cuda").activation_bytes
    assert found == pytest.approx(measured - norms, rel=0.12)
    assert found > 1.25 * size(c).activation_bytes


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_recomputation_keeps_inputs_and_one_block(name):
    c = replace(CONFIGS[name], recompute=True)
    deeper = replace(CONFIGS[name], model=replace(CONFIGS[name].model, layers=5))
    block = saved_bytes(deeper) - saved_bytes(CONFIGS[name])
    measured = saved_bytes(c) + block + around_the_logits(c)
    assert size(c).activation_bytes == pytest.approx(measured, rel=0.12)
    assert size(c).activation_bytes < 0.6 * size(CONFIGS[name]).activation_bytes


def test_activations_follow_the_micro_batch_and_the_split():
    whole = size(config()).activation_bytes
    assert size(config(micro_batch=1)).activation_bytes == pytest.approx(whole / 4, abs=1)
    assert size(config(), processes=4).activation_bytes == pytest.approx(whole / 4, abs=1)
    split = {"tensor": 2, "data": 1}
    assert whole / 2 < size(config(parallel=split)).activation_bytes < whole


def test_a_pipeline_holds_as_many_micro_batches_as_are_in_flight():
    def held(**parallel):
        c = config({"tied": False}, batch=8, micro_batch=1, parallel={"data": 1} | parallel)
        return size(c).activation_bytes

    alone = held()
    assert held(pipeline=2) == pytest.approx(alone, rel=0.01)  # half the layers, two in flight
    ratio = (held(pipeline=2, schedule="GPipe") - alone) / alone
    assert ratio > 1.5  # all eight


@pytest.mark.parametrize(("precision", "each"), [("float32", 16), ("float64", 32)])
def test_state_is_weights_gradients_and_two_moments(precision, each):
    c = config(SPARSE, precision=precision)
    model = made(c)
    optimizer = make_optimizer(model, c.optimizer)
    loss(model, c).backward()
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad)]
    tensors += [m for s in optimizer.state.values() for n, m in s.items() if n != "step"]
    found = size(c)
    assert found.state_bytes == sum(t.nbytes for t in tensors) == each * found.total
    assert found.bytes == found.state_bytes + found.activation_bytes


def test_state_is_shared_out_over_processes_and_the_fullest_stage_counts():
    untied = config({"tied": False})
    whole = size(untied)
    assert size(untied, processes=4).state_bytes == whole.state_bytes // 4
    stages = []
    for stage in range(3):
        model = keep_stage(Transformer(untied.model), stage, 3)
        stages.append(sum(p.numel() for p in model.parameters()))
    assert sum(stages) == whole.total
    split = {"pipeline": 3, "data": 1}
    assert size(config({"tied": False}, parallel=split)).state_bytes == 16 * max(stages)


# --- parameters and arithmetic --------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_total_is_the_number_of_parameters(name):
    model = Transformer(CONFIGS[name].model)
    assert size(CONFIGS[name]).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("top_k", "layers"), [(1, []), (2, []), (2, [0, 3]), (8, [])])
def test_active_leaves_out_the_experts_that_are_not_visited(top_k, layers):
    c = config({"moe": {"experts": 8, "top_k": top_k, "hidden": 96, "layers": layers}})
    d, sparse = 64, len(layers) or 4
    attention = 2 * d * d + 2 * d * 32
    dense = 4 * (attention + 2 * d) + (4 - sparse) * 3 * d * 160 + d + 512 * d
    assert size(c).active == dense + sparse * (8 * d + top_k * 3 * d * 96)
    assert size(c).total == dense + sparse * (8 * d + 8 * 3 * d * 96)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied):
    c = config({"tied": tied, "kv_heads": 4}, data={"isolate": False})
    model = made(c)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(model, c).backward()
    counted = counter.get_total_flops() / (c.batch * c.length)
    assert size(c).flops_per_token == pytest.approx(counted, rel=0.01)


def test_flops_of_a_sparse_model_are_those_of_its_active_parameters():
    one, two = (config({"moe": {"experts": 8, "top_k": k, "hidden": 96}}) for k in (1, 2))
    assert size(two).flops_per_token - size(one).flops_per_token == 6 * 4 * 3 * 64 * 96
    more = config({"moe": {"experts": 16, "top_k": 2, "hidden": 96}})
    assert size(more).flops_per_token - size(two).flops_per_token == 6 * 4 * 8 * 64


# --- the first line -------------------------------------------------------------------------


def line(found: Size, free: float, monkeypatch) -> str:
    monkeypatch.setattr(module, "free_bytes", lambda device: int(free * GIB))
    return first_line(found, config(), torch.device("cpu"))


def test_the_first_line_says_parameters_memory_and_what_it_will_not_fit(monkeypatch):
    found = Size(41_900_000_000, 6_640_000_000, 30 * GIB, 15 * GIB, 1.0)
    assert line(found, 64, monkeypatch) == (
        "41.9 billion parameters, 6.64 billion active; about 45.00 GiB a process (30.00 state, "
        "15.00 activations), 64.0 GiB free here; will not fit a 40 GiB device"
    )
    assert "44.0 GiB free here: IT WILL NOT FIT; will not fit" in line(found, 44, monkeypatch)


def test_the_first_line_of_a_small_dense_model(monkeypatch):
    found = Size(1_234, 1_234, GIB // 2, GIB // 4, 1.0)
    assert line(found, 2, monkeypatch) == (
        "1.23 thousand parameters; about 0.75 GiB a process (0.50 state, 0.25 activations), "
        "2.0 GiB free here; fits a 4 GiB device"
    )


def test_free_memory_is_a_number_of_bytes():
    assert 2**20 < module.free_bytes(torch.device("cpu")) < 2**50


def test_nothing_is_allocated():
    vast = config({"dim": 8192, "layers": 64, "heads": 64, "hidden": 32768, "vocabulary": 2**17})
    assert size(vast).total > 5e10  # 200 GB of weights
