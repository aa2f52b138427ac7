"""The transformer against itself in other words: limits, masks, heads, first weights, compiled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from hakari.training.config import Model, MoE, from_dict
from hakari.training.model import Transformer, initialise, summed_loss, tie
from hakari.training.moe import balance
from hakari.training.moe.layer import MixtureOfExperts
from hakari.training.noise import token_keys
from hakari.training.parallel import alone, keep_stage, make_mesh
from hakari.training.rotary import angles, rotate
from hakari.training.step import make_work, prepare, train_step, validate
from tests.distributed.ranks import ranks
from tests.distributed.steps import batch, gradients, table

torch.set_num_threads(1)

B, S, V = 2, 14, 64
SMALL: dict[str, Any] = {
    "vocabulary": V,
    "dim": 32,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "hidden": 24,
    "initial_std": 0.2,
}
SPARSE = MoE(experts=4, hidden=16, jitter=0.3, balance=0.1, z_loss=0.05)


def made(seed: int = 1, **changes: Any) -> Transformer:
    model = Transformer(Model(**SMALL | changes)).double()
    initialise(model, seed)
    return model


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(seed))


def noise() -> torch.Tensor:
    return token_keys(1, 0, torch.arange(B * S).view(B, S))


def changed(x: torch.Tensor, *where: slice) -> torch.Tensor:
    """The tokens with other ones in these columns."""
    y = x.clone()
    for part in where:
        y[:, part] = (y[:, part] + 1) % V
    return y


def moved(model, x, y, **given) -> list[bool]:
    """Which positions' logits differ between two texts, in any row."""
    with torch.no_grad():
        gap = (model(x, **given) - model(y, **given)).abs().amax((0, 2))
    return (gap > 1e-9).tolist()


# --- which tokens matter --------------------------------------------------------------------


@pytest.mark.parametrize("moe", [MoE(), SPARSE], ids=["dense", "sparse"])
def test_later_tokens_do_not_matter_and_earlier_ones_do(moe):
    model, x = made(moe=moe), tokens()
    assert moved(model, x, changed(x, slice(9, S)), noise=noise()) == [False] * 9 + [True] * 5
    assert moved(model, x, changed(x, slice(0, 1)), noise=noise()) == [True] * S


@pytest.mark.parametrize("moe", [MoE(), SPARSE], ids=["dense", "sparse"])
def test_a_token_sees_its_own_document_only(moe):
    model, x = made(moe=moe), tokens()
    documents = torch.tensor([0] * 5 + [1] * 6 + [-1] * 3).expand(B, S)
    other = changed(x, slice(0, 5), slice(11, S))
    isolated = moved(model, x, other, documents=documents, noise=noise())
    assert isolated == [True] * 5 + [False] * 6 + [True] * 3
    assert moved(model, x, other, noise=noise()) == [True] * S


def test_the_first_document_is_as_if_alone():
    model, x = made(moe=SPARSE), tokens()
    documents = (torch.arange(S) >= 8).long().expand(B, S)
    with torch.no_grad():
        whole = model(x, documents, noise())
        torch.testing.assert_close(whole[:, :8], model(x[:, :8], noise=noise()[:, :8]))


def test_a_window_bounds_what_a_layer_sees_and_layers_add_up():
    x, y = tokens(), changed(tokens(), slice(3, 4))
    for layers in (1, 2, 3):
        reach = 3 + layers * 3  # four tokens, itself included
        expected = [3 <= i <= reach for i in range(S)]
        assert moved(made(window=4, layers=layers), x, y) == expected
    assert moved(made(window=S), x, y) == [i >= 3 for i in range(S)]


def test_window_and_documents_both_hold():
    model, x = made(window=4, layers=1), tokens()
    documents = (torch.arange(S) >= 5).long().expand(B, S)
    found = moved(model, x, changed(x, slice(3, 4)), documents=documents)
    assert found == [i in (3, 4) for i in range(S)]


def test_a_window_wider_than_the_text_changes_nothing():
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(made(window=S)(x), made()(x), rtol=0, atol=1e-12)
        assert not torch.allclose(made(window=S - 4)(x), made()(x))


# --- equal in other words -------------------------------------------------------------------


def with_experts_of(dense: Transformer, router: str) -> Transformer:
    """A model of one expert a layer, which has the weights of a dense model."""
    moe = MoE(experts=1, top_k=1, hidden=24, router=router, balance=0.0)
    model = Transformer(replace(dense.config, moe=moe)).double()
    initialise(model, 9)
    state = model.state_dict()
    for name, weight in dense.state_dict().items():
        if ".mlp." in name:
            state[name.removesuffix(".weight")].copy_(weight[None])
        else:
            state[name].copy_(weight)
    return model


@pytest.mark.parametrize(
    "router",
    ["gshard", "switch", "sparsemixer", "grin", "grin_paper", "grin_star", "aux_free", "joint"],
)
def test_one_expert_is_the_dense_model(router):
    dense = made()
    sparse = with_experts_of(dense, router)
    keys = None if router == "joint" else noise()  # whose coin shrinks even a sure choice
    losses = []
    for model in (dense, sparse):
        losses.append(model(tokens(), noise=keys, targets=tokens(1)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-13)
    found = dict(sparse.named_parameters())
    for name, parameter in dense.named_parameters():
        one = found[name.removesuffix(".weight") if ".mlp." in name else name].grad
        torch.testing.assert_close(one.view_as(parameter), parameter.grad, rtol=1e-10, atol=1e-12)
    for block in sparse.layers.values():
        assert block.mlp.router.weight.grad.abs().max() < 1e-12  # nothing to choose


def test_grouped_queries_are_heads_whose_keys_are_repeated():
    few, many = made(kv_heads=2), made(kv_heads=4)
    weights = few.state_dict()
    for name, weight in weights.items():
        if ".key." in name or ".value." in name:
            heads = weight.view(2, 8, 32).repeat_interleave(2, 0)
            weights[name] = heads.reshape(32, 32)
    many.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(many(tokens()), few(tokens()), rtol=0, atol=1e-12)


def test_rotated_products_depend_on_the_distance_alone():
    config = Model(**SMALL)
    cosine, sine = (part.double() for part in angles(config, 40, torch.device("cpu")))
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=draw, dtype=torch.float64)
    turned = [rotate(z.expand(1, 1, 40, 8), cosine, sine)[0, 0] for z in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in (-3, 0, 5):
        along = products.diagonal(distance)
        assert (along - along[0]).abs().max() < 1e-5  # the angles are float32
    assert (products[0] - products[0, 0]).abs().max() > 0.1


ROTATIONS = {
    r"'yarn': known are default, llama3, longrope": {"rope_type": "yarn"},
    r"model\.rope_scaling of type llama3 lacks low_freq_factor, ": {"rope_type": "llama3"},
}


@pytest.mark.parametrize("message", ROTATIONS)
def test_a_rotation_that_is_not_known_or_complete_is_refused(message):
    config = Model(**SMALL, rope_scaling=ROTATIONS[message])
    with pytest.raises(ValueError, match=message):
        Transformer(config)


def test_the_loss_is_the_sum_of_surprises_of_known_targets():
    logits = torch.randn(B, S, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = tokens()
    targets[0, 3:] = -100
    by_hand = sum(
        -(logits[b, s, targets[b, s]] - logits[b, s].exp().sum().log())
        for b in range(B)
        for s in range(S)
        if targets[b, s] >= 0
    )
    assert summed_loss(logits, targets).item() == pytest.approx(by_hand.item(), rel=1e-13)
    assert summed_loss(logits.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize("micro_batch", [0, 3])  # the last of three has two rows
def test_a_step_has_the_loss_and_gradient_of_the_mean_over_known_targets(micro_batch):
    changes = {"model__moe__experts": 0, "optimizer__clip": 0, "micro_batch": micro_batch}
    config = from_dict(table(**changes))
    with alone():
        trainer = prepare(config, make_mesh(config.parallel, "cpu"))
        work = make_work(trainer, batch(), 0)
        twin = Transformer(config.model).double()
        twin.load_state_dict(trainer.model.state_dict())
        outcome = train_step(trainer, work, 0)
        held = validate(trainer, [batch(0, 2), batch(1, 2)])
    logits = twin(work.tokens, work.documents)
    chosen = logits.log_softmax(-1).gather(-1, work.targets.clamp(min=0)[..., None])[..., 0]
    known = work.targets != -100
    mean = -chosen[known].mean()
    mean.backward()
    assert outcome.tokens == known.sum() == 88
    assert outcome.loss == pytest.approx(mean.item(), rel=1e-13)
    for name, parameter in twin.named_parameters():
        found = trainer.model.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-14)
    squares = sum(p.grad.square().sum() for p in twin.parameters())
    assert outcome.gradient_norm == pytest.approx(squares.sqrt().item(), rel=1e-12)
    with torch.no_grad():  # after the step
        after = trainer.model(work.tokens, work.documents, targets=work.targets) / 88
    assert held == pytest.approx(after.item(), rel=1e-13)


def test_balance_and_z_loss_are_the_sum_over_layers_of_their_formulas():
    model = made(moe=replace(SPARSE, layers=(0, 2)), tied=False)
    x, targets, count = tokens(), tokens(1), B * S
    balance.begin(model, count)
    loss = model(x, noise=noise(), targets=targets) / count
    balance.settle(model)
    loss.backward()
    injected = {name: p.grad.clone() for name, p in model.named_parameters()}
    loads = [ledger.counts.double() / ledger.counts.sum() for ledger in balance.ledgers(model)]

    plain = made(moe=replace(SPARSE, layers=(0, 2), balance=0, z_loss=0), tied=False)
    seen = []
    layers = [m for m in plain.modules() if isinstance(m, MixtureOfExperts)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, 1)))
    whole = plain(x, noise=noise(), targets=targets) / count
    for layer, inputs, load in zip(layers, seen, loads, strict=True):
        logits = inputs @ layer.router.weight.T
        whole = whole + 0.1 * 4 * (load * logits.softmax(-1).mean(0)).sum()
        whole = whole + 0.05 * logits.logsumexp(-1).square().mean()
    whole.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(injected[name], parameter.grad, rtol=1e-10, atol=1e-13)


# --- initial weights ------------------------------------------------------------------------


def test_initial_weights_are_reproducible_and_depend_on_the_seed():
    one, same, other = (dict(made(seed, moe=SPARSE).named_parameters()) for seed in (1, 1, 2))
    for name in one:
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], other[name]) is ("norm" in name)


def test_a_layer_starts_the_same_whichever_others_there_are():
    whole = dict(made(moe=SPARSE, tied=False).named_parameters())
    parts: dict[str, torch.Tensor] = {}
    for stage in range(2):
        model = keep_stage(Transformer(Model(**SMALL, moe=SPARSE, tied=False)).double(), stage, 2)
        initialise(model, 1)
        parts |= dict(model.named_parameters())
    assert set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    # the same width but one layer sparse and others dense
    mixed = dict(made(moe=replace(SPARSE, layers=(1,)), tied=False).named_parameters())
    for name in set(mixed) & set(whole):
        assert torch.equal(mixed[name], whole[name])


def test_no_two_weights_start_equal():
    weights = [p for name, p in made(moe=SPARSE).named_parameters() if "norm" not in name]
    firsts = [round(p.flatten()[0].item(), 9) for p in weights]
    assert len(set(firsts)) == len(firsts)


def test_initial_weights_have_the_stated_spread():
    shape = {"dim": 128, "layers": 8, "hidden": 256, "initial_std": 0.05}
    model = made(**shape, moe=replace(SPARSE, layers=(3,)), head_bias=True, attention_bias=True)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        elif "norm" in name:
            assert (weight == 1).all()
        else:
            residual = "attention.output" in name or "mlp.down" in name
            wanted = 0.05 / math.sqrt(2 * 8) if residual else 0.05
            error = 5 / math.sqrt(2 * weight.numel())  # five standard errors
            assert weight.std().item() == pytest.approx(wanted, rel=error), name
            assert abs(weight.mean().item()) < 5 * wanted / math.sqrt(weight.numel()), name


def test_a_model_moved_from_meta_is_the_same():
    with torch.device("meta"):
        model = Transformer(Model(**SMALL, moe=SPARSE)).double()
    model.to_empty(device="cpu")
    tie(model)
    initialise(model, 1)
    here = made(moe=SPARSE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, here.state_dict()[name]), name
    for layer, block in model.layers.items():
        assert block.mlp.number.item() == int(layer)  # part of the noise's key
        assert not block.mlp.ledger.counts.any()
    model.train()
    assert torch.equal(model(tokens(), noise=noise()), here(tokens(), noise=noise()))


def test_tied_weights_are_one():
    model = made()
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    model(tokens(), targets=tokens(1)).backward()
    untied = made(tied=False)
    with torch.no_grad():
        untied.load_state_dict(model.state_dict())
    untied(tokens(), targets=tokens(1)).backward()
    both = untied.embed.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(model.embed.weight.grad, both)
    assert made(tied=False).head.weight is not made(tied=False).embed.weight


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"model\.vocabulary = 0: it is the tokenizer's to fill"):
        Transformer(Model())


# --- compiled -------------------------------------------------------------------------------

COMPILED: dict[str, dict[str, Any]] = {
    "dense": {"model__moe__experts": 0},
    "grin": {"model__layers": 10},  # more than the limit of recompilations
    "aux_free, some layers, rank scope": {
        "model__moe__router": "aux_free",
        "model__moe__layers": [1, 3],
        "model__moe__balance_scope": "rank",
    },
    "recomputed": {"recompute": True},
    "recomputed, micro-batches": {"recompute": True, "micro_batch": 4},
}
GRAPHS = {"dense": 1, "grin": 1, "aux_free, some layers, rank scope": 2, "recomputed": 1}


@dataclass(frozen=True)
class Compiled:
    """Losses and last gradients of three steps, compiled and not; what the compiler did."""

    losses: tuple[list[float], list[float]]
    gradients: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
    breaks: int
    graphs: int


def three_steps(changes: dict[str, Any], backend: str) -> tuple[list[float], Any]:
    """In float32; backend: "" as the configuration says."""
    config = from_dict(table(precision="float32", optimizer__learning_rate=1e-3, **changes))
    trainer = prepare(config, make_mesh(config.parallel, "cpu"))
    if backend:
        for block in trainer.model.layers.values():
            block.compile(backend=backend)
    losses = [
        train_step(trainer, make_work(trainer, batch(), step), step).loss for step in range(3)
    ]
    return losses, gradients(trainer.model)


def both(changes: dict[str, Any], backend: str) -> Compiled:
    torch._dynamo.reset()
    counters.clear()
    torch._dynamo.config.capture_dynamic_output_shape_ops = bool(backend)  # else set by `prepare`
    found = three_steps(changes | {"compile": not backend}, backend)
    breaks, graphs = len(counters["graph_break"]), counters["stats"]["unique_graphs"]
    plain = three_steps(changes, "")
    return Compiled((found[0], plain[0]), (found[1], plain[1]), breaks, graphs)


def all_cases(backend: str) -> dict[str, Compiled]:
    return {name: both(changes, backend) for name, changes in COMPILED.items()}


@cache
def compiled(backend: str) -> dict[str, Compiled]:
    """All cases, in a process of their own: the checks of shapes here would be compiled too."""
    return ranks(1, all_cases, backend)[0]


def agree(found: Compiled, tolerance: float) -> None:
    assert found.losses[0] == pytest.approx(found.losses[1], rel=tolerance)
    for name, gradient in found.gradients[0].items():
        wanted = found.gradients[1][name]
        assert (gradient - wanted).norm() <= 20 * tolerance * wanted.norm() + 1e-9, name


@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("", marks=pytest.mark.slow)])
def test_a_compiled_run_has_the_losses_and_gradients_of_an_eager_one(name, backend):
    agree(compiled(backend)[name], 1e-5)


@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("name", GRAPHS)
def test_blocks_are_traced_whole_and_layers_share_their_graphs(name):
    found = compiled("aot_eager")[name]
    assert (found.breaks, found.graphs) == (0, GRAPHS[name])
