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

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

CALL = {2: 2**21, 4: 2**19, 8: 2**19}
"""Multiply-adds that each thread does in the time one more matrix product costs, by the bytes of
an element. Measured with one and two threads; a factor of two hardly matters."""


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
    bytes), else a loop over the experts, which is about as fast on a CPU.
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
    inverse = _inverse(order)
    rows = _Permute.apply(x, order, inverse, expert.shape[1])
    return cast(Tensor, rows), ends, inverse


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
    a, b = (x.new_empty(size, gate.shape[1]) for _ in range(2))
    out = torch.empty_like(rows)
    for r, a_, b_, o, g, u, d in _groups(ends, (rows, a, b, out), (gate, up, down)):
        _multiply(r, g.mT, a_)
        _multiply(r, u.mT, b_)
        _multiply(F.silu(a_).mul_(b_), d.mT, o)
    output = out.index_select(0, slot).view(*expert.shape, x.shape[1])
    return output, rows, a, b, slot, ends


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
    grad_rows = _place(grad.reshape(-1, rows.shape[1]), slot, len(rows))
    grad_gate, grad_up, grad_down = (w.new_empty(w.shape) for w in (gate, up, down))
    weights = gate, up, down, grad_gate, grad_up, grad_down
    for y, r, a_, b_, g, u, d, dg, du, dd in _groups(ends, (grad_rows, rows, a, b), weights):
        s, v = F.silu(a_), torch.empty_like(a_)
        _multiply(y, d, v)
        _multiply(y.mT, s * b_, dd)
        s *= v  # the gradient of b_
        torch.ops.aten.silu_backward.grad_input(v.mul_(b_), a_, grad_input=v)  # and of a_
        _multiply(v.mT, r, dg)
        _multiply(s.mT, r, du)
        _multiply(v, g, y)  # y was read for the last time
        _multiply(s, u, y, add=True)
    grad_x = _sum_copies(grad_rows.index_select(0, slot), grad.shape[1])
    return grad_x, grad_gate, grad_up, grad_down


def _multiply(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> None:
    """Write x @ y, of one group or of all in a batch, to `out`, or add it."""
    if x.ndim == 3:
        torch.baddbmm(out, x, y, out=out) if add else torch.bmm(x, y, out=out)
    else:
        torch.addmm(out, x, y, out=out) if add else torch.mm(x, y, out=out)


def _groups(
    ends: Tensor, rows: Sequence[Tensor], weights: Sequence[Tensor]
) -> Iterable[Sequence[Tensor]]:
    """Rows and weights of each expert; of all at once, [E, rows of one, width], if equal."""
    sizes = _sizes(ends, len(rows[0]))
    if len(set(sizes)) == 1:
        return [(*(r.unflatten(0, (len(sizes), sizes[0])) for r in rows), *weights)]
    return zip(*(r.split(sizes) for r in rows), *(w.unbind(0) for w in weights), strict=True)


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
    if padding * gate[0].numel() > calls * CALL[gate.element_size()] * torch.get_num_threads():
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
    """x[start:end] @ w[e].T: x [N, A], w [E, O, A] -> [N, O]."""
    x = x.contiguous()
    if check or x.device.type == "cpu":
        _sizes(ends, len(x))
    if _native(x, w.shape[1]):
        whole = w if w.is_contiguous() or w.mT.is_contiguous() else w.contiguous()
        return F.grouped_mm(x, whole.mT, offs=ends)
    out = x.new_empty(len(x), w.shape[1])
    for x_e, out_e, w_e in _groups(ends, (x, out), (w,)):
        _multiply(x_e, w_e.mT, out_e)
    return out


@torch.library.custom_op("hakari::grouped_outer", mutates_args=())
def _grouped_outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """g[start:end].T @ x[start:end]: g [N, O], x [N, A] -> [E, O, A], zero for no rows."""
    g, x = g.contiguous(), x.contiguous()
    if _native(x, g.shape[1]):
        return F.grouped_mm(g.mT, x, offs=ends)
    out = x.new_empty(len(ends), g.shape[1], x.shape[1])
    for g_e, x_e, out_e in _groups(ends, (g, x), (out,)):
        _multiply(g_e.mT, x_e, out_e)
    return out


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


def _native(x: Tensor, width: int) -> bool:
    """Whether `grouped_mm` takes these rows, and matrices of this width."""
    device, size = x.device, x.element_size()
    if x.dtype == torch.float64 or width * size % 16 or x.shape[1] * size % 16:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu"


def _sizes(ends: Tensor, rows: int) -> list[int]:
    """Rows of each group; raises ValueError unless they are all the rows."""
    places = [0, *ends.tolist()]
    sizes = [end - start for start, end in pairwise(places)]
    if places[-1] != rows or min(sizes) < 0:
        raise ValueError(f"ends {places[1:]} of {rows} rows: they must rise to {rows}")
    return sizes
