"""Dropless experts against a sum over tokens, one by one, in float64; backends against each other.

The foil, experts with a capacity of 1.25 times the mean load, must fail where ours pass.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hakari.training.moe import experts
from hakari.training.moe.experts import dispatch, expert_mlp, gather, grouped_matmul

torch.set_num_threads(1)

LOADS = ["even", "skewed", "one expert", "most idle"]
ROUTES = ["padded", "sorted", "composed"]


def close(a, b, rtol):
    """Whether tensors differ by at most rtol of the norm of b."""
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= rtol * b.norm())


def problem(load="skewed", T=48, D=16, H=24, E=6, K=2, dtype=torch.float64, seed=0):
    """x, experts of each token, weights (gate, up, down)."""
    draw = torch.Generator().manual_seed(seed)
    odds = {
        "even": torch.ones(E),
        "skewed": 1 / torch.arange(1, E + 1) ** 2,
        "one expert": torch.tensor([1e9] + [1.0] * (E - 1)),
        "most idle": torch.tensor([1.0] * K + [0.0] * (E - K)),
    }[load]
    expert = torch.multinomial(odds.expand(T, E).double(), K, generator=draw)
    shapes = [(T, D), (E, H, D), (E, H, D), (E, D, H)]
    x, *weights = (
        torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) / 4 for s in shapes
    )
    return x, expert, weights


@pytest.fixture
def route(request, monkeypatch):
    """`expert_mlp` made to pad always, or never, or the form it has on other devices."""
    if request.param == "composed":
        return experts._composed
    limit = {"padded": 1e18, "sorted": -1}[request.param]
    monkeypatch.setattr(experts, "CALL", dict.fromkeys((2, 4, 8), limit))
    return expert_mlp


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def one_by_one(x, expert, gate, up, down):
    """The definition: each token through each of its experts, alone."""
    return torch.stack(
        [
            torch.stack([swiglu(x_t[None], gate[e], up[e], down[e])[0] for e in chosen])
            for x_t, chosen in zip(x, expert.tolist(), strict=True)
        ]
    )


def with_gradients(mlp, x, expert, weights, slope=None):
    """Output and gradients of x and weights."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    output = mlp(leaves[0], expert, *leaves[1:])
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_output_and_gradients_are_those_of_each_token_alone(route, load, K):
    x, expert, weights = problem(load, K=K)
    for ours, theirs in zip(
        with_gradients(route, x, expert, weights),
        with_gradients(one_by_one, x, expert, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_every_dtype_agrees_with_float64(route, load, dtype):
    x, expert, weights = problem(load, dtype=dtype)
    wide = with_gradients(route, x.double(), expert, [w.double() for w in weights])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for narrow, exact in zip(with_gradients(route, x, expert, weights), wide, strict=True):
        assert narrow.dtype == dtype
        assert close(narrow, exact, tolerance)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_derivatives_are_right(route):
    x, expert, weights = problem(T=5, D=3, H=2, E=4)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    assert torch.autograd.gradcheck(lambda x, *w: route(x, expert, *w), leaves)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero(route):
    x, expert, weights = problem("most idle", dtype=torch.float32)
    for gradient in with_gradients(route, x, expert, weights)[2:]:
        assert (gradient[2:] == 0).all()
        assert (gradient[:2] != 0).any()


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_no_tokens_give_no_output_and_zero_gradients(route):
    x, expert, weights = problem(T=0)
    output, x_gradient, *gradients = with_gradients(route, x, expert, weights)
    assert output.shape == (0, 2, 16)
    assert x_gradient.shape == (0, 16)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_an_expanded_gradient_is_taken(route):
    x, expert, weights = problem(dtype=torch.float32)
    leaf = weights[2].requires_grad_()
    route(x, expert, *weights[:2], leaf).sum().backward()
    ones = torch.ones(x.shape[0], expert.shape[1], x.shape[1])
    (explicit,) = torch.autograd.grad(route(x, expert, *weights[:2], leaf), leaf, ones)
    assert close(leaf.grad, explicit, 1e-6)


# --- what must not change it --------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_tokens_in_another_order_give_outputs_in_that_order(route):
    x, expert, weights = problem()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    moved, moved_gradient, *_ = with_gradients(
        lambda x, e, *w: route(x[order], e[order], *w)[order.argsort()], x, expert, weights
    )
    output, gradient, *_ = with_gradients(route, x, expert, weights)
    torch.testing.assert_close(moved, output, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_experts_under_other_numbers_give_the_same(route):
    x, expert, weights = problem()
    number = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    renamed = [w[number.argsort()] for w in weights]
    same = route(x, number[expert], *renamed)
    torch.testing.assert_close(same, route(x, expert, *weights), rtol=1e-14, atol=1e-16)


def changes_with_the_batch(mlp):
    """Largest change of the first tokens' outputs when 90 others join them at the same experts."""
    x, expert, weights = problem("even")
    others = torch.randn(90, 16, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    crowd = expert[-1].expand(90, 2)
    alone = mlp(x, expert, *weights)
    joined = mlp(torch.cat([others, x]), torch.cat([crowd, expert]), *weights)[90:]
    return float((joined - alone).abs().max())


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_a_token_does_not_depend_on_the_rest_of_the_batch(route):
    assert changes_with_the_batch(route) < 1e-14


def test_experts_with_a_capacity_do_depend_on_the_rest_of_the_batch():
    def dropping(x, expert, *weights):
        pairs = expert.flatten()
        capacity = int(1.25 * len(pairs) / len(weights[0]))
        place = F.one_hot(pairs, len(weights[0])).cumsum(0).gather(1, pairs[:, None]) - 1
        kept = (place < capacity).view(*expert.shape, 1)
        return one_by_one(x, expert, *weights) * kept

    assert changes_with_the_batch(dropping) > 0.01


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_equal_experts_are_one_mlp(route):
    x, expert, weights = problem()
    same = [w[:1].expand(6, -1, -1).contiguous() for w in weights]
    output = route(x, expert, *same)
    alone = swiglu(x, *(w[0] for w in same))
    torch.testing.assert_close(output, alone[:, None].expand_as(output), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_one_expert_is_the_dense_mlp(route):
    x, expert, weights = problem("even", E=1, K=1)
    ours = with_gradients(route, x, expert, weights)

    def dense(x, _, *weights):
        return swiglu(x, *(w[0] for w in weights))[:, None]

    for one, other in zip(ours, with_gradients(dense, x, expert, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


# --- dispatch and gather ------------------------------------------------------------------------


@st.composite
def choices(draw):
    E, K = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    T = draw(st.integers(0, 12))
    numbers = st.lists(st.integers(0, E - 1), min_size=T * K, max_size=T * K)
    return torch.tensor(draw(numbers), dtype=torch.int64).view(T, K), E


def check_dispatch(expert, E):
    T, K = expert.shape
    x = torch.arange(T, dtype=torch.float64)[:, None]  # each row names its token
    rows, ends, inverse = dispatch(x, expert, E)
    assert inverse.sort()[0].tolist() == list(range(T * K))
    assert ends.dtype == torch.int32
    assert ends.tolist() == [int((expert < e + 1).sum()) for e in range(E)]
    owner = torch.bucketize(inverse, ends, right=True, out_int32=True)
    assert torch.equal(owner.view(T, K).long(), expert)
    assert torch.equal(gather(rows, inverse, T, K), x[:, None].expand(T, K, 1))
    for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False):
        assert rows[start:end, 0].tolist() == sorted(rows[start:end, 0].tolist())


@given(choices())
@settings(deadline=None, max_examples=200)
def test_each_pair_is_computed_exactly_once_whatever_the_load(case):
    check_dispatch(*case)


@given(choices(), st.sampled_from([-1, 1e18]))
@settings(deadline=None, max_examples=200)
def test_rows_of_the_operator_are_those_of_dispatch_and_padding_is_zero(case, limit):
    expert, E = case
    T, K = expert.shape
    x = torch.arange(1, T + 1, dtype=torch.float64)[:, None].repeat(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "CALL", dict.fromkeys((2, 4, 8), limit))
        slot, ends, size = experts._layout(expert, torch.empty(E, 1, 2, dtype=x.dtype))
    rows = experts._place(x, slot, size)
    assert len(set(slot.tolist())) == T * K
    assert torch.equal(torch.bucketize(slot, ends, right=True).view(T, K), expert)
    assert torch.equal(rows[slot].view(T, K, 2), x[:, None].expand(T, K, 2))
    assert rows.sum() == K * x.sum()
    assert ends[-1] == size == len(rows)


def test_groups_are_padded_only_where_that_is_cheaper_than_calls():
    even = torch.arange(64).repeat(4)[:, None]
    uneven = torch.cat([even, torch.full((64, 1), 7)])
    narrow, wide = torch.empty(64, 8, 16), torch.empty(1, 512, 512).expand(64, -1, -1)
    assert experts._layout(even[:-1], wide)[2] == 256  # one row of padding
    assert experts._layout(uneven, narrow)[2] == 64 * 68
    assert experts._layout(uneven, wide)[2] == 320
    assert experts._layout(even[:2], wide)[2] == 2  # two tokens need not read all experts


def test_gradient_of_dispatch_is_the_sum_over_a_tokens_rows():
    x, expert, _ = problem()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dispatch(x, expert, 6)[0], x)
    rows, _, inverse = dispatch(x.detach(), expert, 6)
    assert torch.autograd.gradcheck(
        lambda rows: gather(rows, inverse, *expert.shape), rows.requires_grad_()
    )


def test_a_wrong_inverse_is_caught(monkeypatch):
    monkeypatch.setattr(experts, "_inverse", lambda order: order)
    with pytest.raises(AssertionError):
        check_dispatch(torch.tensor([[2, 0], [1, 2], [0, 1]]), 3)


def test_an_unstable_sort_is_caught(monkeypatch):
    sort = torch.Tensor.sort

    def backwards(x, stable=False):
        values, order = sort(x.flip(0), stable=True)
        return values, len(x) - 1 - order if stable else order

    monkeypatch.setattr(torch.Tensor, "sort", backwards)
    with pytest.raises(AssertionError):
        check_dispatch(torch.tensor([[2, 0], [1, 2], [0, 1]]), 3)


# --- grouped_matmul -----------------------------------------------------------------------------


def groups(sizes, A=16, O=8, dtype=torch.float64):  # noqa: E741
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(sum(sizes), A, generator=draw, dtype=torch.float64).to(dtype)
    w = torch.randn(len(sizes), O, A, generator=draw, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), w.requires_grad_(), torch.tensor(sizes).cumsum(0).int()


def count_native_calls(monkeypatch):
    calls, grouped_mm = [], F.grouped_mm

    def counted(*arguments, **named):
        calls.append(arguments)
        return grouped_mm(*arguments, **named)

    monkeypatch.setattr(F, "grouped_mm", counted)
    return calls


@pytest.mark.parametrize("sizes", [[5, 0, 9, 2], [0, 0, 7, 0], [4, 4, 4, 4], [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(sizes, dtype):
    narrow, wide = groups(sizes, dtype=dtype), groups(sizes)
    results = []
    for x, w, ends in (narrow, wide):
        y = grouped_matmul(x, w, ends)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        results.append([y.detach(), x.grad, w.grad])
    for one, other in zip(*results, strict=True):
        assert close(one, other, 1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(
    ("width", "dtype", "sizes", "native"),
    [
        (8, torch.float32, [5, 0, 11], True),
        (8, torch.bfloat16, [5, 0, 11], True),
        (4, torch.bfloat16, [5, 0, 11], False),  # 8 bytes
        (7, torch.float32, [5, 0, 11], False),
        (8, torch.float64, [5, 0, 11], False),
        (8, torch.float32, [4, 4, 4], True),
        (8, torch.float64, [4, 4, 4], False),
    ],
)
def test_grouped_mm_is_called_only_where_it_works_and_the_rest_agrees(
    width, dtype, sizes, native, monkeypatch
):
    calls = count_native_calls(monkeypatch)
    x, w, ends = groups(sizes, A=width, O=width, dtype=dtype)
    y = grouped_matmul(x, w, ends)
    y.sum().backward()
    assert len(calls) == (3 if native else 0)
    pieces = zip(x.detach().split(sizes), w.detach().unbind(0), strict=True)
    exact = torch.cat([x_e.double() @ w_e.double().T for x_e, w_e in pieces])
    assert close(y, exact, 0.02 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("sizes", [[2, 0, 3], [2, 2, 2]])
def test_first_and_second_derivatives_of_grouped_matmul_are_right(sizes):
    x, w, ends = groups(sizes, A=3, O=2)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, ends), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_matmul(x, w, ends), (x, w))


@pytest.mark.parametrize(
    "ends", [[5, 5, 9], [5, 5, 17], [5, 4, 16], [-1, 5, 16]], ids=["short", "far", "falls", "neg"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_that_do_not_fit_the_rows_are_refused(ends, dtype):
    x, w, _ = groups([5, 0, 11], dtype=dtype)
    with pytest.raises(ValueError, match=r"ends \[.*\] of 16 rows: they must rise to 16"):
        grouped_matmul(x, w, torch.tensor(ends, dtype=torch.int32))


def test_what_does_not_fit_is_refused():
    x, w, ends = groups([5, 0, 11])
    with pytest.raises(ValueError, match=r"ends are torch.int64: torch.int32 is needed"):
        grouped_matmul(x, w, ends.long())
    with pytest.raises(ValueError, match=r"x \[16, 16\], w \[3, 8, 16\], ends \[2\] do not fit"):
        grouped_matmul(x, w, ends[:2])
    with pytest.raises(ValueError, match=r"torch.float64, torch.float32: one dtype is needed"):
        grouped_matmul(x, w.float(), ends)
    x, expert, (gate, up, down) = problem()
    with pytest.raises(ValueError, match=r"down \[6, 24, 16\] do not fit"):
        expert_mlp(x, expert, gate, up, down.mT)
    with pytest.raises(ValueError, match=r"expert 6 was chosen of 6: 0 to 5"):
        expert_mlp(x, expert.clamp(min=6), gate, up, down)


@pytest.mark.parametrize("route", ["padded", "composed"], indirect=True)
def test_under_autocast_operands_are_cast(route):
    x, expert, weights = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_gradients(route, x, expert, weights)
    assert cast[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in cast[1:])
    for one, other in zip(cast, with_gradients(route, x, expert, weights), strict=True):
        assert close(one, other, 0.03)


# --- operators under compilation ----------------------------------------------------------------


# dynamo itself instantiates an autograd.Function, and is warned
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_compiled_as_one_graph_it_is_the_same(route):
    torch._dynamo.reset()
    x, expert, weights = problem(dtype=torch.float32)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):  # other loads, same graph
        expert = problem(seed=seed)[1]
        pairs = zip(
            with_gradients(compiled, x, expert, weights),
            with_gradients(route, x, expert, weights),
            strict=True,
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_compiled_to_machine_code_it_is_the_same(route):
    torch._dynamo.reset()
    x, expert, weights = problem(dtype=torch.float32)
    compiled = torch.compile(lambda x, e, *w: 2 * route(2 * x, e, *w), fullgraph=True)
    expected = with_gradients(lambda x, e, *w: 2 * route(2 * x, e, *w), x, expert, weights)
    for one, other in zip(with_gradients(compiled, x, expert, weights), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_keep_the_rules_of_operators(dtype):
    x, w, ends = groups([5, 0, 11], dtype=dtype)
    torch.library.opcheck(experts._grouped, (x, w, ends, False))
    torch.library.opcheck(
        experts._grouped_outer, (x[:, :8].detach().clone().requires_grad_(), x, ends)
    )
    x, expert, weights = problem(dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    torch.library.opcheck(experts._mlp, (leaves[0], expert, *leaves[1:]))
