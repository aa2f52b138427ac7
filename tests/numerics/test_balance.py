"""The injected gradients of balance and z-loss against autograd of the formula, in float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from hakari.training.config import Model, MoE
from hakari.training.model import Transformer, initialise
from hakari.training.moe import balance
from hakari.training.moe.health import examine
from hakari.training.moe.layer import MixtureOfExperts, adjust_bias
from hakari.training.noise import token_keys

torch.set_num_threads(1)

B, S, D, E = 4, 12, 16, 8
ALPHA, ZETA = 0.7, 0.3
FORGOT = r"call balance\.settle\(model, group\) between forward and backward, or choose"


def sparse(**changes) -> MixtureOfExperts:
    options = {"experts": E, "hidden": 8, "jitter": 0.4, "balance": ALPHA} | changes
    layer = MixtureOfExperts(D, MoE(**options)).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    for weight in (layer.gate, layer.up, layer.down):
        torch.nn.init.normal_(weight, std=0.3)
    return layer


def inputs(rows: int = B, domains: int = 1) -> torch.Tensor:
    """Tokens [rows, S, D]; those of one domain lie around one point."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(rows, S, D, generator=draw, dtype=torch.float64)
    centres = 2 * torch.randn(domains, D, generator=draw, dtype=torch.float64)
    return x + (domains > 1) * centres.repeat_interleave(rows // domains, 0)[:, None]


def noise(rows: int = B) -> torch.Tensor:
    return token_keys(1, 0, torch.arange(rows * S).view(rows, S))


def padding() -> torch.Tensor:
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, 5:] = valid[3, :] = False
    return valid


def pass_through(layer, x, valid=None, slope=1.0, tokens=None):
    """Gradients of router and x of one step; slope 0: those of balance and z-loss alone."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    if tokens is not None:
        balance.begin(layer, tokens)
    out = layer(x, noise(len(x)), valid)
    if tokens is not None:
        balance.settle(layer)
    (slope * out.sin().sum()).backward()
    return layer.router.weight.grad.clone(), x.grad.clone()


def formula(layer, x, load, valid=None, alpha=ALPHA, zeta=0.0):
    """Gradients of alpha E sum f_i P_i + zeta mean log-sum-exp squared, `load` = f held fixed."""
    weight, x = (t.detach().requires_grad_() for t in (layer.router.weight, x))
    logits = x.flatten(0, 1) @ weight.T
    kept = logits if valid is None else logits[valid.flatten()]
    mean = kept.softmax(-1).mean(0)
    loss = alpha * E * (load * mean).sum() + zeta * kept.logsumexp(-1).square().mean()
    return torch.autograd.grad(loss, (weight, x))


def share(layer) -> torch.Tensor:
    return layer.ledger.counts.double() / layer.ledger.counts.sum()


def apart(one, other) -> float:
    """Largest relative distance of two lists of tensors."""
    pairs = zip(one, other, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


# --- the formula ----------------------------------------------------------------------------


@pytest.mark.parametrize("zeta", [0.0, ZETA])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", ["step", "rank", "unmanaged"])
@pytest.mark.parametrize("router", ["grin", "gshard", "switch"])
def test_the_injected_gradient_is_that_of_the_formula(router, scope, padded, zeta):
    top_k = 1 if router == "switch" else 2
    named = {"router": router, "top_k": top_k, "z_loss": zeta}
    layer = sparse(balance_scope="rank" if scope == "rank" else "step", **named)
    valid = padding() if padded else None
    tokens = int(valid.sum()) if padded else B * S
    tokens = None if scope == "unmanaged" else tokens
    alone = pass_through(layer, inputs(), valid, 0.0, tokens)
    expected = formula(layer, inputs(), share(layer), valid, zeta=zeta)
    assert apart(alone, expected) < 1e-12
    # beside the gradient of the task, which it leaves as it is
    whole = pass_through(layer, inputs(), valid, 1.0, tokens)
    task = pass_through(sparse(**named | {"balance": 0, "z_loss": 0}), inputs(), valid)
    assert apart([w - t for w, t in zip(whole, task, strict=True)], expected) < 1e-12


def test_wrong_formulas_are_far_from_it():
    layer, valid = sparse(), padding()
    found = pass_through(layer, inputs(), valid, 0.0, int(valid.sum()))
    logits = inputs().flatten(0, 1) @ layer.router.weight.detach().T
    best = torch.bincount(logits[valid.flatten()].topk(2).indices.flatten(), minlength=E)
    wrong = {
        "best experts, not those sampled": formula(layer, inputs(), best / best.sum(), valid),
        "padding counted": formula(layer, inputs(), share(layer)),
        "no factor E": formula(layer, inputs(), share(layer), valid, alpha=ALPHA / E),
    }
    assert apart(found, formula(layer, inputs(), share(layer), valid)) < 1e-12
    for gradients in wrong.values():
        assert apart(found, gradients) > 0.05


def test_nothing_flows_through_the_load():
    # were f = P differentiable, the gradient of f.P would be twice that with f held fixed
    layer = sparse()
    pass_through(layer, inputs(), None, 0.0, B * S)
    logits = inputs().flatten(0, 1) @ layer.router.weight.detach().T
    mean = logits.softmax(-1).mean(0)
    layer.ledger.fraction.copy_(mean)
    balance.begin(layer, B * S, settled=True)
    layer.zero_grad()
    (0 * layer(inputs(), noise())).sum().backward()
    weight = layer.router.weight.detach().requires_grad_()
    soft = (inputs().flatten(0, 1) @ weight.T).softmax(-1).mean(0)
    (twice,) = torch.autograd.grad(ALPHA * E * (soft * soft).sum(), weight)
    assert apart([2 * layer.router.weight.grad], [twice]) < 1e-12


def test_the_output_is_the_same_bits_with_and_without():
    on, off = sparse(z_loss=ZETA), sparse(balance=0)
    assert torch.equal(on(inputs(), noise()), off(inputs(), noise()))


@pytest.mark.parametrize("router", ["grin", "aux_free"])
def test_aux_free_has_no_balance_loss(router):
    layer = sparse(router=router)
    gradients = pass_through(layer, inputs(), None, 0.0, B * S)
    assert bool(gradients[0].count_nonzero()) is (router == "grin")


# --- the step -------------------------------------------------------------------------------


def test_to_forget_settle_is_an_error():
    layer = sparse()
    balance.begin(layer, B * S)
    out = layer(inputs(), noise()).sum()
    with pytest.raises(RuntimeError, match=FORGOT):
        out.backward()


def test_a_settled_step_does_not_excuse_the_next():
    layer = sparse()
    pass_through(layer, inputs(), tokens=B * S)
    balance.begin(layer, B * S)
    with pytest.raises(RuntimeError, match=FORGOT):
        layer(inputs(), noise()).sum().backward()


@pytest.mark.parametrize("options", [{"balance_scope": "rank"}, {"balance": 0, "z_loss": ZETA}])
def test_settle_is_not_needed_where_no_load_of_the_step_is(options):
    layer = sparse(**options)
    balance.begin(layer, B * S)
    layer(inputs(), noise()).sum().backward()
    assert layer.router.weight.grad.isfinite().all()


def in_micro_batches(layer, x, size, count_first=True):
    """The gradient of balance of one step in parts of `size` rows, as `passes` does it."""
    parts = list(zip(x.split(size), noise(len(x)).split(size), strict=True))
    layer.zero_grad()
    balance.begin(layer, x.shape[0] * S)
    if count_first:
        with torch.no_grad():
            for part, keys in parts:
                layer(part, keys)
        balance.settle(layer)
        balance.begin(layer, x.shape[0] * S, settled=True)
    for part, keys in parts:
        out = layer(part, keys)
        if not count_first:
            balance.settle(layer)
        (0 * out).sum().backward()
    return layer.router.weight.grad.clone()


def test_micro_batches_with_a_pass_that_counts_give_the_whole_gradient():
    layer, x = sparse(), inputs(8, domains=8)
    whole = pass_through(layer, x, None, 0.0, 8 * S)[0]
    counts = layer.ledger.counts.clone()
    assert apart([in_micro_batches(layer, x, 2)], [whole]) < 1e-12
    assert torch.equal(layer.ledger.counts, counts)
    assert apart([in_micro_batches(layer, x, 2, count_first=False)], [whole]) > 0.1


def test_shards_sorted_by_domain_need_the_counts_of_all():
    # mixture-of-experts.md section 0.7: a local load is far off in size and direction
    x = inputs(8, domains=8)
    whole = pass_through(layer := sparse(), x, None, 0.0, 8 * S)[0]
    expected = formula(layer, x, share(layer))[0]
    value = examine(layer)[0].balance
    together = in_micro_batches(sparse(), x, 1)
    local = in_micro_batches(sparse(balance_scope="rank"), x, 1, count_first=False)
    assert apart([whole], [expected]) < 1e-12
    assert apart([together], [expected]) < 1e-12
    assert apart([local], [expected]) > 1
    assert torch.cosine_similarity(local.flatten(), expected.flatten(), 0) < 0.8
    values = []
    for shard in x.split(1):
        balance.begin(layer, S)
        layer(shard, noise(1))
        values.append(examine(layer)[0].balance)
    assert sum(values) / 8 > 1.5 * value


# --- what is counted ------------------------------------------------------------------------


def test_the_ledger_holds_counts_probabilities_and_facts_of_valid_tokens():
    layer, valid = sparse(), padding()
    balance.begin(layer, int(valid.sum()))
    layer(inputs(), noise(), valid)
    book, flat = layer.ledger, valid.flatten()
    logits = inputs().flatten(0, 1) @ layer.router.weight.detach().T
    p = logits[flat].softmax(-1)
    routing = layer._route(inputs().flatten(0, 1), noise().flatten(), None)
    balance.begin(layer, int(valid.sum()))
    layer(inputs(), noise(), valid)
    assert (
        book.counts.tolist() == torch.bincount(routing.expert[flat].flatten(), minlength=E).tolist()
    )
    assert book.counts.sum() == 2 * valid.sum()
    torch.testing.assert_close(book.chance, p.sum(0))
    entropy = -(p * p.log()).sum()
    squared = logits[flat].logsumexp(-1).square().sum()
    expected = [valid.sum(), entropy, routing.singleton[flat].sum(), squared]
    torch.testing.assert_close(book.facts, torch.stack(expected).double())
    assert book.peak == logits.abs().max()


def test_the_ledger_keeps_its_types_whatever_the_model_is_cast_to():
    layer = sparse()
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        layer.to(kind)
        assert layer.ledger.counts.dtype == layer.number.dtype == torch.int64
        assert layer.ledger.chance.dtype == layer.ledger.fraction.dtype == torch.float64
        assert layer.ledger.ready.dtype == torch.bool


def model(recompute: bool) -> Transformer:
    moe = MoE(experts=4, hidden=8, balance=0.1)
    made = Transformer(Model(vocabulary=32, dim=16, layers=2, heads=2, hidden=16, moe=moe)).double()
    initialise(made, 1)
    made.recompute = recompute
    return made


def counted(recompute: bool) -> list[list[int]]:
    """The counts of each layer after a forward and a backward pass over 20 tokens."""
    made, tokens = model(recompute), torch.arange(20).view(2, 10)
    balance.begin(made, 20)
    loss = made(tokens, noise=token_keys(1, 0, tokens), targets=tokens)
    balance.settle(made)
    loss.backward()
    return [ledger.counts.tolist() for ledger in balance.ledgers(made)]


def test_a_recomputed_router_is_not_counted_again(monkeypatch):
    assert counted(True) == counted(False)
    assert [sum(layer) for layer in counted(True)] == [40, 40]
    monkeypatch.setattr(
        "hakari.training.model.recompute_contexts", lambda block: (nullcontext(), nullcontext())
    )
    assert [sum(layer) for layer in counted(True)] == [80, 80]


# --- the selection bias ---------------------------------------------------------------------


def test_the_selection_bias_rises_below_the_mean_load_and_falls_above():
    layer = sparse(router="aux_free", experts=4)
    layer.selection_bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    balance.begin(layer, 10)
    layer.ledger.counts.copy_(torch.tensor([8, 5, 0, 7]))
    balance.settle(layer)
    adjust_bias(layer, 0.01)
    assert layer.selection_bias.tolist() == pytest.approx([0.09, 0.2, 0.31, 0.39])


def test_the_selection_bias_evens_out_the_load():
    layer, loads = sparse(router="aux_free"), []
    for _ in range(200):
        balance.begin(layer, 8 * S)
        layer(inputs(8), noise(8))
        loads.append(examine(layer)[0].largest)
        balance.settle(layer)
        adjust_bias(layer, 0.01)
    assert loads[-1] < 1.3 < loads[0]


def test_other_routers_have_no_selection_bias():
    layer = sparse(router="gshard")
    assert "selection_bias" not in layer.state_dict()
    adjust_bias(layer, 0.1)


def test_a_scale_multiplies_the_injected_gradient() -> None:
    # as a GradScaler's, or the number of ranks where DDP averages
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(scale: float) -> torch.Tensor:
        layer = balance.Ledger(3)
        balance.begin(layer, 6, scale=scale)
        z = logits.clone().requires_grad_()
        p = z.softmax(-1)
        expert = z.argmax(-1, keepdim=True)
        counts = balance.record(layer, z, p, expert, torch.zeros_like(expert).bool(), None)
        gate = p.gather(-1, expert)
        balance.settle(layer)
        out = balance.inject(gate, z, layer, counts, None, balance=0.1, z_loss=0.0, scope="step")
        (out.sum() * 0).backward()
        assert z.grad is not None
        return z.grad

    once, load = gradient(1.0), torch.bincount(logits.argmax(-1), minlength=3).double() / 6
    p = logits.softmax(-1)
    assert torch.allclose(once, 0.1 * 3 * p * (load - (p @ load)[:, None]) / 6, rtol=1e-13)
    assert torch.allclose(gradient(512.0), 512 * once, rtol=1e-13)


def test_without_begin_the_ledger_is_of_the_latest_call() -> None:
    layer = balance.Ledger(2)
    z = torch.zeros(4, 2)
    for _ in range(3):
        expert = torch.zeros(4, 1, dtype=torch.int64)
        balance.record(layer, z, z.softmax(-1), expert, expert.bool(), None)
    assert layer.counts.tolist() == [4, 0]
