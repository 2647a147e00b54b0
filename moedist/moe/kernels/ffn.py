"""All feed-forward experts of a rank as one differentiable function, computed by `moedist.moe.kernels.ffn_kernels`.

Its twin, function and gradients, is `moedist.moe.ffn.run_one_by_one`. Saved for backward are the rows (or the
tokens that they are copies of), their weights and the products in front of the activation, 4 * R * F bytes of them in
bf16 with SwiGLU; the hidden vectors are computed again in the epilogue of the product that makes their gradient.

Forward and backward are operators of torch's own, so that a compiled graph holds them whole and recomputation can keep
what they made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@torch.library.custom_op("moedist::ffn_forward", mutates_args=())
def ffn_forward(
    x: Tensor,
    gate_R: Tensor,
    ends_e: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """``gate_R * expert(x)`` without the last bias.

    Args:
        x: [R, D] rows, expert by expert.
        gate_R: the weight of each row.
        ends_e: int32, where each expert's rows end; rows past the last end give zero.
        up, gate, down, up_bias, gate_bias: as `moedist.moe.ffn.StackedFFN`, all in the dtype of ``x``, contiguous.
        activation: as `moedist.moe.ffn.FFNExpertsConfig`.
        keep: whether backward will follow.

    Returns:
        [R, D]; and [P, R, F], the P = 1 or 2 products in front of the activation, P = 0 where nothing is kept.
    """
    from moedist.moe.kernels.ffn_kernels import forward

    return forward(x, gate_R, ends_e, up, gate, down, up_bias, gate_bias, activation, keep)


@ffn_forward.register_fake
def _(
    x: Tensor,
    gate_R: Tensor,
    ends_e: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    num_products = (1 if gate is None else 2) if keep else 0
    num_rows, (_, dim, hidden_dim) = gate_R.shape[0], up.shape
    return x.new_empty(num_rows, dim), x.new_empty(num_products, num_rows, hidden_dim)


@torch.library.custom_op("moedist::ffn_backward", mutates_args=())
def ffn_backward(
    grad_y_RD: Tensor,
    x: Tensor,
    token_R: Tensor | None,
    gate_R: Tensor,
    ends_e: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    products: Tensor,
    activation: str,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows, ``gate_R``, ``up``, ``gate``, ``down``, ``up_bias`` and ``gate_bias``; an empty tensor for
    what is not there.

    Args:
        grad_y_RD: contiguous.
        x: the rows, or with ``token_R`` what they are copies of (`moedist.moe.experts.contract.Source`).
    """
    from moedist.moe.kernels.ffn_kernels import backward

    return backward(grad_y_RD, x, token_R, gate_R, ends_e, up, gate, down, products, activation, biased)


@ffn_backward.register_fake
def _(
    grad_y_RD: Tensor,
    x: Tensor,
    token_R: Tensor | None,
    gate_R: Tensor,
    ends_e: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    products: Tensor,
    activation: str,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def bias(there: bool) -> Tensor:
        return up.new_empty(up.shape[0], up.shape[2]) if there else up.new_empty(0)

    return (
        torch.empty_like(grad_y_RD),
        torch.empty_like(gate_R),
        torch.empty_like(up),
        up.new_empty(0) if gate is None else torch.empty_like(gate),
        torch.empty_like(down),
        bias(biased),
        bias(biased and gate is not None),
    )


class FusedFFN(torch.autograd.Function):
    """`ffn_forward` with its gradients; arguments as there, and whose copies the rows are, to be kept instead."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        x_TD: Tensor | None,
        token_R: Tensor | None,
        gate_R: Tensor,
        ends_e: Tensor,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        activation: str,
        keep: bool,
    ) -> Tensor:
        y_RD, products = ffn_forward(x_RD, gate_R, ends_e, up, gate, down, up_bias, gate_bias, activation, keep)
        x = x_RD if x_TD is None else x_TD
        ctx.save_for_backward(x, token_R, gate_R, ends_e, up, gate, down, products)
        ctx.activation, ctx.biased = activation, up_bias is not None
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x, token_R, gate_R, ends_e, up, gate, down, products = ctx.saved_tensors
        grad_x, grad_gate_R, grad_up, grad_gate, grad_down, grad_up_bias, grad_gate_bias = ffn_backward(
            grad_RD.contiguous(), x, token_R, gate_R, ends_e, up, gate, down, products, ctx.activation, ctx.biased
        )
        of_products = grad_up, None if gate is None else grad_gate, grad_down
        of_biases = grad_up_bias, None if gate is None else grad_gate_bias
        return (
            grad_x,
            None,
            None,
            grad_gate_R,
            None,
            *of_products,
            *(of_biases if ctx.biased else (None, None)),
            None,
            None,
        )
