"""Dense models as the start of sparse ones: exact where the gates of a token sum to a constant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hakari.training import upcycling as upcycle_file
from hakari.training.config import Model, MoE
from hakari.training.hugging_face import save
from hakari.training.model import Transformer, initialise, tie
from hakari.training.moe.estimators import ESTIMATORS
from hakari.training.moe.router import route
from hakari.training.upcycling import gate_factor, start, upcycle

torch.set_num_threads(1)

DENSE = Model(
    vocabulary=64, dim=32, layers=3, heads=4, kv_heads=2, hidden=48, initial_std=0.3, tied=False
)


def dense(dtype: torch.dtype = torch.float32, config: Model = DENSE) -> Transformer:
    model = Transformer(config).to(dtype).eval()
    initialise(model, seed=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.linspace(-0.5, 0.5, len(weight)))
    return model


def sparse(dtype: torch.dtype = torch.float32, layers: tuple[int, ...] = (), **moe) -> Transformer:
    whole = MoE(**({"experts": 8, "hidden": 48, "layers": layers} | moe))
    return Transformer(replace(DENSE, moe=whole)).to(dtype).eval()


def text() -> torch.Tensor:
    return torch.randint(0, 64, (4, 30), generator=torch.Generator().manual_seed(0))


EXACT = {
    "gshard": {"router": "gshard"},
    "gshard in halves": {"router": "gshard", "hidden": 24},
    "gshard in quarters": {"router": "gshard", "hidden": 12, "top_k": 4},
    "two groups of halves": {"router": "gshard", "hidden": 24, "top_k": 4},
    "aux_free": {"router": "aux_free"},
    "aux_free in halves": {"router": "aux_free", "hidden": 24},
    "one layer": {"router": "gshard", "layers": (1,)},
    "five experts": {"router": "gshard", "experts": 5, "top_k": 3},
    "grin without jitter": {"router": "grin", "jitter": 0.0},
    "sparsemixer without jitter": {"router": "sparsemixer", "jitter": 0.0, "top_k": 1},
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_where_gates_sum_to_a_constant_logits_are_those_of_the_dense_model(
    name: str, dtype: torch.dtype, within: float
) -> None:
    source, target = dense(dtype), sparse(dtype, **EXACT[name])
    upcycle(source, target, seed=1)
    with torch.no_grad():
        expected = source(text())
        assert expected.std() > 0.3
        torch.testing.assert_close(target(text()), expected, rtol=0, atol=within)


@pytest.mark.parametrize("name", EXACT)
def test_with_the_factor_a_tenth_off_logits_are_not_those_of_the_dense_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = upcycle_file.gate_factor
    monkeypatch.setattr(upcycle_file, "gate_factor", lambda *given: 0.9 * right(*given))
    source, target = dense(), sparse(**EXACT[name])
    upcycle(source, target, seed=1)
    with torch.no_grad():
        assert (target(text()) - source(text())).abs().max() > 0.01


@pytest.mark.parametrize("name", [name for name in EXACT if "halves" in name])
def test_with_groups_that_mix_parts_logits_are_not_those_of_the_dense_model(name: str) -> None:
    source, target = dense(), sparse(**EXACT[name])
    upcycle(source, target, seed=1)
    with torch.no_grad():
        router = target.layers["0"].mlp.router.weight
        router.copy_(router[[0, 2, 1, 3, 4, 6, 5, 7]])
        assert (target(text()) - source(text())).abs().max() > 0.01


@pytest.mark.parametrize("router", ["grin", "grin_star", "joint", "switch"])
def test_a_layer_gives_the_dense_mlp_times_the_factor_and_the_sum_of_the_gates(router: str) -> None:
    top_k = 1 if router == "switch" else 2
    source, target = dense(torch.float64), sparse(torch.float64, router=router, top_k=top_k)
    upcycle(source, target, seed=1)
    x = torch.randn(1, 200, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer, mlp = target.layers["1"].mlp, source.layers["1"].mlp
    moe, norm = target.config.moe, source.layers["1"].mlp_norm.weight.norm().item()
    with torch.no_grad():
        gates = route(
            layer.router(x[0]),
            ESTIMATORS[router],
            top_k=top_k,
            jitter=moe.jitter,
            mask="code",
            noise=None,
            layer=1,
        ).gate.sum(-1)
        expected = gates[:, None] * gate_factor(target.config, 0.3 * norm) * mlp(x)[0]
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)
        assert gates.std() > 0.05


def test_the_factor_brings_grin_nearer_to_the_dense_model_than_none_or_a_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = dense()
    distance = {}
    for name, factor in [("ours", None), ("half", 0.5), ("none", 1.0)]:
        with monkeypatch.context() as patch, torch.no_grad():
            if factor:
                patch.setattr(upcycle_file, "gate_factor", lambda config, spread, f=factor: f)
            target = sparse(jitter=0.2)
            upcycle(source, target, seed=1)
            distance[name] = (target(text()) - source(text())).square().mean().item()
    assert distance["ours"] < 0.8 * min(distance["half"], distance["none"])


def test_the_factor_is_that_of_quadrature_for_two_experts() -> None:
    # the larger of two gates is sigmoid(|d|), d the difference of two logits
    spread = 1.3
    d = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    density = torch.exp(-d.square() / (4 * spread**2))
    gate = d.abs().sigmoid()
    expected = (gate * density).sum() / (gate.square() * density).sum()
    two = replace(DENSE, moe=MoE(experts=2, top_k=1, router="switch"))
    assert gate_factor(two, spread) == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        (MoE(experts=8, router="gshard"), 1.0),
        (MoE(experts=8, router="aux_free"), 1.0),
        (MoE(experts=8, router="grin", jitter=0.0), 1 / 2),
        (MoE(experts=8, router="joint", jitter=0.0, top_k=3), 1 / 3),
        (MoE(experts=8, router="switch", top_k=1), 8.0),
    ],
)
def test_the_factor_of_tiny_logits_is_known(moe: MoE, expected: float) -> None:
    found = gate_factor(replace(DENSE, moe=moe), spread=1e-6)
    assert found == pytest.approx(expected, rel=1e-5)


def test_at_a_router_of_zeros_the_gates_of_grin_jump() -> None:
    def mean_sum(logits: torch.Tensor) -> float:
        settings = {"top_k": 2, "jitter": 0.1, "mask": "code", "noise": None, "layer": 0}
        return route(logits, ESTIMATORS["grin"], **settings).gate.sum(-1).mean().item()

    noise = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    assert mean_sum(torch.zeros(5, 8)) == pytest.approx(1 / 8 + 1 / 7)
    assert mean_sum(1e-6 * noise) > 1.6


def test_experts_are_the_parts_of_the_dense_mlp_in_turn() -> None:
    source, target = dense(), sparse(router="gshard", hidden=24)
    upcycle(source, target, seed=1)
    whole, found = source.layers["2"].mlp, target.layers["2"].mlp
    for expert in range(8):
        part = slice(0, 24) if expert % 2 == 0 else slice(24, 48)
        assert torch.equal(found.gate[expert], whole.gate.weight[part])
        assert torch.equal(found.up[expert], whole.up.weight[part])
        assert torch.equal(found.down[expert], 2 * whole.down.weight[:, part])


def test_groups_share_a_row_of_the_router_but_not_its_gradient() -> None:
    source, target = dense(), sparse(router="gshard", hidden=24)
    upcycle(source, target, seed=1)
    target(text()).square().sum().backward()
    router = target.layers["0"].mlp.router.weight
    assert torch.equal(router[0::2], router[1::2])
    assert len({row.sum().item() for row in router}) == 4
    assert (router.grad[0::2] - router.grad[1::2]).abs().max() > 1e-3


def test_routers_depend_on_seed_and_layer_and_have_the_stated_size() -> None:
    source = dense()

    def routers(seed: int) -> torch.Tensor:
        target = sparse(router="gshard")
        upcycle(source, target, seed=seed)
        blocks = target.layers.values()
        return torch.stack([block.mlp.router.weight.detach() for block in blocks])

    one, other = routers(1), routers(2)
    assert torch.equal(one, routers(1))
    assert (one - other).abs().min() > 0
    assert (one[0] - one[1]).abs().min() > 0
    assert one.std() == pytest.approx(0.3, rel=0.1)
    assert abs(one.mean()) < 0.05


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"hidden": 32}, "model.moe.hidden = 32 does not divide the dense MLP's width 48"),
        ({"hidden": 96}, "model.moe.hidden = 96 does not divide the dense MLP's width 48"),
        ({"hidden": 24}, "router 'grin' would not choose all 2 parts .* set model.moe.hidden = 48"),
        ({"hidden": 24, "router": "switch", "top_k": 1}, "router 'switch' would not choose all 2"),
        ({"hidden": 24, "router": "gshard", "experts": 7}, "experts = 7 is not a multiple of 2"),
        ({"hidden": 12, "router": "gshard"}, "top_k = 2 is not a multiple of 4, the parts of"),
    ],
)
def test_widths_and_routers_that_cannot_carry_the_dense_mlp_are_refused(
    moe: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(dense(), sparse(**moe), seed=1)


def test_a_tensor_that_does_not_fit_or_is_not_there_is_named() -> None:
    source = dict(dense().named_parameters())
    source["norm.weight"] = torch.zeros(31)
    with pytest.raises(ValueError, match=r"norm.weight is \(31,\) in the dense model, \(32,\)"):
        upcycle(source, sparse(router="gshard"), seed=1)
    del source["norm.weight"]
    with pytest.raises(ValueError, match=r"the dense model has no norm.weight"):
        upcycle(source, sparse(router="gshard"), seed=1)
    with pytest.raises(ValueError, match=r"the dense model has no layers.0.mlp.gate.weight"):
        upcycle(sparse(router="gshard"), dense(), seed=1)


# --- from a folder ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(dense(), tmp_path / "hf")
    return tmp_path / "hf"


def test_a_folder_starts_dense_and_sparse_models(folder: Path) -> None:
    expected = dense()(text()).detach()
    for model in (dense(), sparse(router="gshard"), sparse(router="gshard", layers=(0, 2))):
        initialise(model, seed=9)
        start(model, folder, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(model(text()), expected, rtol=0, atol=1e-5)


def test_a_sparse_folder_starts_a_sparse_model(tmp_path: Path) -> None:
    config = replace(DENSE, norm="layer", moe=MoE(experts=4, hidden=24))
    source, target = dense(config=config), Transformer(config).eval()
    save(source, tmp_path / "hf")
    start(target, tmp_path / "hf", seed=1)
    for weight, expected in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(weight, expected)


def test_a_stage_of_a_pipeline_starts_as_in_the_whole(folder: Path) -> None:
    whole, stage = sparse(router="gshard"), sparse(router="gshard")
    del stage.layers["0"], stage.layers["1"]
    stage.embed = None
    tie(stage)
    for model in (whole, stage):
        start(model, folder, seed=4)
    expected = dict(whole.named_parameters())
    found = dict(stage.named_parameters())
    assert "layers.2.mlp.router.weight" in found
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_a_tied_folder_starts_a_head_of_its_own(tmp_path: Path) -> None:
    tied = dense(config=replace(DENSE, tied=True))
    save(tied, tmp_path / "hf")
    target = sparse(router="gshard")
    start(target, tmp_path / "hf", seed=1)
    with torch.no_grad():
        torch.testing.assert_close(target(text()), tied(text()), rtol=0, atol=1e-5)


def test_a_model_that_is_not_the_folders_is_refused_with_every_difference(folder: Path) -> None:
    other = replace(DENSE, heads=2, rope_base=5e5, norm_eps=1e-6, hidden=40, tied=True)
    with pytest.raises(ValueError, match=r"\[model\] is not the model in") as caught:
        start(Transformer(other), folder, seed=1)
    for part in (
        "model.heads = 2, there 4",
        "model.rope_base = 500000.0, there 10000.0",
        "model.norm_eps = 1e-06, there 1e-05",
        "model.hidden = 40, there 48",
        "model.tied = True, there False",
    ):
        assert part in str(caught.value)
    # with experts in every layer, no layer has the dense width
    start(Transformer(replace(sparse(router="gshard").config, hidden=40)), folder, seed=1)


def test_a_folder_that_lacks_or_adds_tensors_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("model.norm.weight")
    save_file(tensors | {"model.norm.scale": lost}, folder / "model.safetensors")
    message = r"missing \(1\): model.norm.weight; unexpected \(1\): model.norm.scale"
    with pytest.raises(ValueError, match=message):
        start(sparse(router="gshard"), folder, seed=1)
