"""SwiGLU experts without capacity and without dropped tokens (mixture-of-experts.md section 4).

T tokens, D model width, K experts per token, N = T K rows, E experts, F expert width. Rows are
sorted by expert, multiplied group by group and put back in the order of the tokens. A weight is
[E, out, in], a stack of `nn.Linear` weights: in forward and backward together no layout was
faster, and it is that of Hugging Face's files.

On a CPU `expert_mlp` is one operator, which also pads the groups to one size where that is cheaper
than a matrix product for each expert. Elsewhere it is three grouped products, whose elementwise
parts torch.compile can fuse and which never make the host wait. Both do the same sums.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

CALL = {2: 2**22, 4: 2**20, 8: 2**20}
"""Multiply-adds done in the time that one more matrix product costs, by bytes of an element.
Measured on two cores (AVX-512, bf16 instructions), where it hardly matters within a factor 2."""


# --- public -------------------------------------------------------------------------------


def expert_mlp(
    x: Float[Tensor, "T D"],
    expert: Int64[Tensor, "T K"],
    gate: Float[Tensor, "E F D"],
    up: Float[Tensor, "E F D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "T K D"]:
    """down(silu(gate x) * up x) of each token's K experts, chosen in 0 .. E - 1.

    Every (token, expert) pair is computed, however uneven the load. Weights may be DTensors
    sharded over F on a tensor mesh of one axis: then each rank computes its slice, the output is
    summed over ranks, and so is the gradient of x, which must be the same on all ranks.
    Under autocast x and weights are cast. Differentiable once.

    Raises ValueError if shapes or dtypes do not fit, and on a CPU for an expert out of range.
    """
    if isinstance(gate, DTensor):
        return _tensor_parallel(x, expert, gate, up, down)
    x, gate, up, down = _cast(x, gate, up, down)
    experts, hidden, dim = gate.shape
    shapes = [x.shape[1:], up.shape, down.shape, expert.shape[:1]]
    if shapes != [(dim,), gate.shape, (experts, dim, hidden), x.shape[:1]]:
        raise ValueError(
            f"x {[*x.shape]}, expert {[*expert.shape]}, gate {[*gate.shape]}, up {[*up.shape]}, "
            f"down {[*down.shape]} do not fit [T, D], [T, K], [E, F, D], [E, F, D], [E, D, F]"
        )
    if x.device.type == "cpu":
        return cast(Tensor, _mlp(x, expert, gate, up, down)[0])
    return _composed(x, expert, gate, up, down)


def grouped_matmul(
    x: Float[Tensor, "N A"],
    w: Float[Tensor, "E O A"],
    ends: Int32[Tensor, " E"],
    *,
    check: bool = False,
) -> Float[Tensor, "N O"]:
    """Multiply each group of rows by its matrix: x[ends[e - 1] : ends[e]] @ w[e].T.

    ends: where each group's rows end; the last is N. That is verified on a CPU; on a device only
    with `check`, since the host must then wait. Rows beyond would be memory as it was found.
    `torch.nn.functional.grouped_mm` does it where it can (float32 and less, widths of whole 16
    bytes), one batched product if groups are equal on a CPU, else a loop over the experts.
    Under autocast both operands are cast. Differentiable any number of times.

    Raises ValueError if shapes, dtypes or ends do not fit.
    """
    if ends.dtype != torch.int32:
        raise ValueError(f"ends are {ends.dtype}: torch.int32 is needed")
    x, w = _cast(x, w)
    if (x.ndim, w.ndim) != (2, 3) or w.shape[::2] != (len(ends), x.shape[1]):
        raise ValueError(
            f"x {[*x.shape]}, w {[*w.shape]}, ends {[*ends.shape]} do not fit "
            "[N, A], [E, O, A], [E]"
        )
    return cast(Tensor, _grouped(x, w, ends, check))


def dispatch(
    x: Float[Tensor, "T D"], expert: Int64[Tensor, "T K"], experts: int
) -> tuple[Float[Tensor, "N D"], Int32[Tensor, " E"], Int64[Tensor, " N"]]:
    """One row for each (token, expert) pair, sorted by expert, then by token.

    Returns rows, the `ends` of each expert's rows, and `inverse`, which row belongs to pair
    t K + k. The gradient of x is summed over k in order: the same bits each time, also on GPUs.
    """
    chosen, order = expert.flatten().sort(stable=True)
    bounds = torch.arange(experts, device=x.device)
    ends = torch.searchsorted(chosen, bounds, right=True, out_int32=True)
    rows = _Permute.apply(x, order, _inverse(order), expert.shape[1])
    return cast(Tensor, rows), ends, _inverse(order)


def gather(
    rows: Float[Tensor, "N D"], inverse: Int64[Tensor, " N"], tokens: int, top_k: int
) -> Float[Tensor, "T K D"]:
    """Rows back in the order of the tokens; undoes `dispatch`."""
    put = _Permute.apply(rows, inverse, _inverse(inverse), 1)
    return cast(Tensor, put).view(tokens, top_k, rows.shape[1])


class _Permute(torch.autograd.Function):
    """Repeat each row `copies` times, then take the copies in `order`; gathers both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inverse,) = ctx.saved_tensors
        return _sum_copies(gradients[0].index_select(0, inverse), ctx.copies), None, None, None


def _composed(x: Tensor, expert: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows, ends, inverse = dispatch(x, expert, len(gate))
    hidden = F.silu(grouped_matmul(rows, gate, ends)) * grouped_matmul(rows, up, ends)
    return gather(grouped_matmul(hidden, down, ends), inverse, *expert.shape)


def _tensor_parallel(x: Tensor, expert: Tensor, gate: DTensor, up: Tensor, down: Tensor) -> Tensor:
    mesh = gate.device_mesh
    entered = DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
    slices = [cast(DTensor, weight).to_local() for weight in (gate, up, down)]
    part = expert_mlp(entered, expert, *slices)
    total = DTensor.from_local(part, mesh, [Partial()]).redistribute(placements=[Replicate()])
    return total.to_local()


def _cast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast, its dtype; else refuse different ones. grouped_mm does neither."""
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
    if len({tensor.dtype for tensor in tensors}) > 1:
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise ValueError(f"x and weights are {dtypes}: one dtype is needed, or autocast")
    return list(tensors)


# --- the whole MLP as one operator on a CPU -----------------------------------------------------


@torch.library.custom_op("hakari::expert_mlp", mutates_args=(), device_types="cpu")
def _mlp(
    x: Tensor, expert: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, and what backward needs: rows, gate rows, up rows, row of each pair, ends."""
    slot, ends, size = _layout(expert, gate)
    rows = _place(x, slot, size)
    a, b = _multiply(rows, gate, ends), _multiply(rows, up, ends)
    output = _multiply(F.silu(a).mul_(b), down, ends).index_select(0, slot)
    return output.view(*expert.shape, x.shape[1]), rows, a, b, slot, ends


@torch.library.custom_op("hakari::expert_mlp_backward", mutates_args=(), device_types="cpu")
def _mlp_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    rows: Tensor,
    a: Tensor,
    b: Tensor,
    slot: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out = _place(grad.reshape(-1, rows.shape[1]), slot, len(rows))
    hidden = F.silu(a)
    grad_a = _multiply(grad_out, down.mT, ends)  # of the hidden layer, so far
    grad_b = hidden * grad_a
    grad_down = _outer(grad_out, hidden.mul_(b), ends)
    torch.ops.aten.silu_backward.grad_input(grad_a.mul_(b), a, grad_input=grad_a)
    grad_rows = _multiply(grad_a, gate.mT, ends)
    _add_product(grad_rows, grad_b, up.mT, ends)
    grad_x = _sum_copies(grad_rows.index_select(0, slot), grad.shape[1])
    return grad_x, _outer(grad_a, rows, ends), _outer(grad_b, rows, ends), grad_down


@_mlp.register_fake
def _(x: Tensor, expert: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Any:
    size = torch.library.get_ctx().new_dynamic_size(min=0)  # padding depends on the load
    kept = [x.new_empty(size, width) for width in (x.shape[1], gate.shape[1], gate.shape[1])]
    slot, ends = expert.new_empty(expert.numel()), expert.new_empty(len(gate), dtype=torch.int32)
    return x.new_empty(*expert.shape, x.shape[1]), *kept, slot, ends


@_mlp_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, down: Tensor, *kept: Tensor) -> Any:
    tokens, _, dim = grad.shape
    return grad.new_empty(tokens, dim), *(w.new_empty(w.shape) for w in (gate, up, down))


def _mlp_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[2:], *output[1:])
    ctx.set_materialize_grads(False)  # what is kept gets no gradient, and zeros cost time


def _mlp_gradient(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    if grad is None:
        return None, None, None, None, None
    grad_x, *grad_weights = _mlp_backward(grad, *ctx.saved_tensors)
    return grad_x, None, *grad_weights


_mlp.register_autograd(_mlp_gradient, setup_context=_mlp_context)


def _layout(expert: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
    """Row of each pair, where each group ends, and how many rows there are, padding included.

    Padding costs work, a product for each expert costs calls: whichever is less.
    """
    chosen, experts = expert.flatten(), len(gate)
    counts = torch.bincount(chosen, minlength=experts)
    if len(counts) > experts:
        raise ValueError(f"expert {len(counts) - 1} was chosen of {experts}: 0 to {experts - 1}")
    slot, ends = _inverse(chosen.argsort(stable=True)), counts.cumsum(0)
    loads = counts.tolist()
    largest, calls = max(loads), experts - loads.count(0)
    padding = experts * largest - len(chosen)
    if padding * gate[0].numel() > calls * CALL[gate.element_size()]:
        return slot, ends.int(), len(chosen)
    equal = largest * torch.arange(1, experts + 1)
    slot += (equal - largest - ends + counts)[chosen]
    return slot, equal.int(), experts * largest


def _place(x: Tensor, slot: Tensor, size: int) -> Tensor:
    """Rows of x, each as often as slot says, at `slot`; zero where there is padding."""
    copies = len(slot) // max(1, len(x))
    source = slot.new_full((size,), -1).scatter_(0, slot, torch.arange(len(slot)) // copies)
    if size == len(slot):
        return x.index_select(0, source)
    rows = x.index_select(0, source.clamp(min=0))
    return rows.index_fill_(0, (source < 0).nonzero().squeeze(1), 0)


def _inverse(order: Tensor) -> Tensor:
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def _sum_copies(rows: Tensor, copies: int) -> Tensor:
    """Add each `copies` neighbouring rows, in order."""
    return reduce(torch.add, rows.unflatten(0, (-1, copies)).unbind(1))


# --- grouped products ---------------------------------------------------------------------------


@torch.library.custom_op("hakari::grouped_matmul", mutates_args=())
def _grouped(x: Tensor, w: Tensor, ends: Tensor, check: bool) -> Tensor:
    if check:
        _sizes(x, w.shape[1], ends, check=True)
    return _multiply(x.contiguous(), w, ends)


@torch.library.custom_op("hakari::grouped_outer", mutates_args=())
def _grouped_outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return _outer(g.contiguous(), x.contiguous(), ends)


@_grouped.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor, check: bool) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@_grouped_outer.register_fake
def _(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return g.new_empty(ends.shape[0], g.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _grouped_gradient(ctx: Any, grad: Tensor) -> Any:
    x, w, ends = ctx.saved_tensors
    grad_x = _grouped(grad, w.mT, ends, False) if ctx.needs_input_grad[0] else None
    grad_w = _grouped_outer(grad, x, ends) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None, None


def _outer_gradient(ctx: Any, grad: Tensor) -> Any:
    g, x, ends = ctx.saved_tensors
    return _grouped(x, grad, ends, False), _grouped(g, grad.mT, ends, False), None


_grouped.register_autograd(_grouped_gradient, setup_context=_keep)
_grouped_outer.register_autograd(_outer_gradient, setup_context=_keep)


def _multiply(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x[start:end] @ w[e].T: x [N, A], w [E, O, A] -> [N, O]."""
    sizes = _sizes(x, w.shape[1], ends)
    if sizes is None:
        whole = w if w.is_contiguous() or w.mT.is_contiguous() else w.contiguous()
        return F.grouped_mm(x, whole.mT, offs=ends)
    if len(set(sizes)) == 1:
        return torch.bmm(x.unflatten(0, (len(w), sizes[0])), w.mT).flatten(0, 1)
    out = x.new_empty(len(x), w.shape[1])
    # unbind, and results written in place: w[e] would give each gradient the size of all of w
    for x_e, w_e, out_e in zip(x.split(sizes), w.unbind(0), out.split(sizes), strict=True):
        torch.mm(x_e, w_e.t(), out=out_e)
    return out


def _add_product(total: Tensor, x: Tensor, w: Tensor, ends: Tensor) -> None:
    """Add `_multiply` to total, without a buffer of its own where that can be."""
    sizes = _sizes(x, w.shape[1], ends)
    if sizes is None or len(set(sizes)) > 1:
        total += _multiply(x, w, ends)
    else:
        groups = (len(w), sizes[0])
        total.unflatten(0, groups).baddbmm_(x.unflatten(0, groups), w.mT)


def _outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """g[start:end].T @ x[start:end]: g [N, O], x [N, A] -> [E, O, A], zero for no rows."""
    sizes = _sizes(x, g.shape[1], ends)
    if sizes is None:
        return F.grouped_mm(g.t(), x, offs=ends)
    if len(set(sizes)) == 1:
        groups = (len(ends), sizes[0])
        return torch.bmm(g.unflatten(0, groups).mT, x.unflatten(0, groups))
    out = x.new_empty(len(ends), g.shape[1], x.shape[1])
    for g_e, x_e, out_e in zip(g.split(sizes), x.split(sizes), out.unbind(0), strict=True):
        torch.mm(g_e.t(), x_e, out=out_e)
    return out


def _sizes(x: Tensor, width: int, ends: Tensor, check: bool = False) -> list[int] | None:
    """Rows of each group; None where `grouped_mm` takes them as they are."""
    device = x.device.type
    native = device == "cpu" or (
        device == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
    bytes_ = [size * x.element_size() for size in (width, x.shape[1])]
    native = native and x.dtype != torch.float64 and not any(size % 16 for size in bytes_)
    if native and device != "cpu" and not check:
        return None
    places = [0, *ends.tolist()]
    sizes = [end - start for start, end in pairwise(places)]
    if places[-1] != len(x) or min(sizes) < 0:
        raise ValueError(f"ends {places[1:]} of {len(x)} rows: they must rise to {len(x)}")
    return None if native and (device != "cpu" or len(set(sizes)) > 1) else sizes
