"""Feed-forward experts on a CPU: one expert after the other, forward and backward, each in one go.

What an expert works on is small enough to stay in a core's caches between its matrix products and what stands between
them, and small enough for the allocator to use again at once; over all experts together every element-wise operation
would run through main memory and touch fresh pages. Nothing is stacked or concatenated: rows lie in the order of
experts, outputs and gradients are written where they belong. Rows and first products alone are kept for backward; the
activation is computed again.

Operators of torch's own, so that a compiled graph holds them whole and selective recomputation can keep what they
return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def host_experts(
    x_RD: Tensor, weight_R: Tensor, up: Tensor, gate: Tensor, down: Tensor, sizes: Sequence[int]
) -> Tensor:
    """[R, D]: ``weight * down(silu(x gate) * x up)`` of each row's expert (twin: `moedist.moe.ffn.run_one_by_one`).

    Args:
        x_RD: rows in the order of experts, on a CPU.
        weight_R: of each row's output, in the dtype of the rows.
        up, gate, down: [e, D, F], [e, D, F], [e, F, D], likewise.
        sizes: rows of each expert; rows behind the last one's may hold anything, before and after.
    """
    y_RD, _, _ = _forward(x_RD.contiguous(), weight_R, up, gate, down, list(sizes))
    return y_RD


def blocks(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows. One without rows is among them: products of empty matrices make its gradients zeros.

    >>> list(blocks([2, 0, 1]))
    [(0, slice(0, 2, None)), (1, slice(2, 2, None)), (2, slice(2, 3, None))]
    """
    first = 0
    for expert, size in enumerate(sizes):
        yield expert, slice(first, first + size)
        first += size


@torch.library.custom_op("moedist::host_experts", mutates_args=())
def _forward(
    x_RD: Tensor, weight_R: Tensor, up: Tensor, gate: Tensor, down: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the products that backward needs."""
    y_RD = torch.empty_like(x_RD)
    up_RF, gate_RF = (x_RD.new_empty(x_RD.shape[0], up.shape[2]) for _ in range(2))
    for expert, rows in blocks(sizes):
        torch.mm(x_RD[rows], up[expert], out=up_RF[rows])
        torch.mm(x_RD[rows], gate[expert], out=gate_RF[rows])
        hidden = F.silu(gate_RF[rows]).mul_(up_RF[rows]).mul_(weight_R[rows, None])
        torch.mm(hidden, down[expert], out=y_RD[rows])
    return y_RD, up_RF, gate_RF


@_forward.register_fake
def _(
    x_RD: Tensor, weight_R: Tensor, up: Tensor, gate: Tensor, down: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = (x_RD.shape[0], up.shape[2])
    return torch.empty_like(x_RD), x_RD.new_empty(hidden), x_RD.new_empty(hidden)


@torch.library.custom_op("moedist::host_experts_backward", mutates_args=())
def _backward(
    grad_RD: Tensor,
    x_RD: Tensor,
    weight_R: Tensor,
    up: Tensor,
    gate: Tensor,
    down: Tensor,
    up_RF: Tensor,
    gate_RF: Tensor,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, weights of rows, and the three matrices."""
    grad_x, grad_weight = torch.empty_like(x_RD), torch.empty_like(weight_R)
    grad_up, grad_gate, grad_down = (torch.empty_like(each) for each in (up, gate, down))
    for expert, rows in blocks(sizes):
        x, weight, grad = x_RD[rows], weight_R[rows, None], grad_RD[rows]
        silu = F.silu(gate_RF[rows])
        hidden = silu * up_RF[rows]
        grad_hidden = grad @ down[expert].t()
        torch.sum(grad_hidden * hidden, dim=1, out=grad_weight[rows])
        torch.mm(hidden.mul_(weight).t(), grad, out=grad_down[expert])
        grad_hidden.mul_(weight)
        grad_before = torch.ops.aten.silu_backward(grad_hidden * up_RF[rows], gate_RF[rows])
        grad_after = silu.mul_(grad_hidden)
        torch.mm(x.t(), grad_after, out=grad_up[expert])
        torch.mm(x.t(), grad_before, out=grad_gate[expert])
        torch.mm(grad_after, up[expert].t(), out=grad_x[rows])
        grad_x[rows].addmm_(grad_before, gate[expert].t())
    return grad_x, grad_weight, grad_up, grad_gate, grad_down


@_backward.register_fake
def _(
    grad_RD: Tensor,
    x_RD: Tensor,
    weight_R: Tensor,
    up: Tensor,
    gate: Tensor,
    down: Tensor,
    up_RF: Tensor,
    gate_RF: Tensor,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = [torch.empty_like(each) for each in (x_RD, weight_R, up, gate, down)]
    return like[0], like[1], like[2], like[3], like[4]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.sizes = inputs
    ctx.set_materialize_grads(False)  # no zeros for the products, which have no gradient
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx: Any, grad_RD: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_RD.contiguous(), *ctx.saved_tensors, ctx.sizes), None


_forward.register_autograd(_gradients, setup_context=_keep)
