"""Copying tokens to rows, summing rows to tokens, exchanging rows: three functions, each other's gradients.

All are gathers: every output element is written once, so results are bitwise repeatable and nothing asks the host.
An index of -1 stands for a row, or a pair, that is not there: it reads as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moedist.mesh import Axis
from moedist.mesh.collectives import all_to_all


def take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` along dim 0, zero where the index is -1; any index shape, ``x`` may have no rows."""
    if x.shape[0] == 0:
        return x.new_zeros(*index.shape, *x.shape[1:])
    taken = x.index_select(0, index.clamp_min(0).view(-1)).view(*index.shape, *x.shape[1:])
    return taken.masked_fill_((index < 0).view(*index.shape, *(1,) * (x.dim() - 1)), 0)


def sum_pairs(y_RD: Tensor, row_N: Tensor, token_N: Tensor, pairs_per_token: int | None, num_tokens: int) -> Tensor:
    """[T, D]: each token's sum over its pairs' rows."""
    if pairs_per_token == 1:
        return take(y_RD, row_N)
    if pairs_per_token is not None:
        return take(y_RD, row_N.view(num_tokens, pairs_per_token)).sum(1)
    return y_RD.new_zeros(num_tokens, *y_RD.shape[1:]).index_add(0, token_N, take(y_RD, row_N))


class TokensToRows(torch.autograd.Function):
    """[T, ...] -> [R, ...]: ``out[r] = x[token_R[r]]``; its gradient is `RowsToTokens`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token_R: Tensor, row_N: Tensor, token_N: Tensor, pairs_per_token: int | None
    ) -> Tensor:
        ctx.save_for_backward(row_N, token_N)
        ctx.pairs_per_token, ctx.num_tokens = pairs_per_token, x.shape[0]
        return take(x, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        row_N, token_N = ctx.saved_tensors
        return sum_pairs(grad_R, row_N, token_N, ctx.pairs_per_token, ctx.num_tokens), None, None, None, None


class RowsToTokens(torch.autograd.Function):
    """[R, D] -> [T, D]: each token's sum over its pairs' rows; its gradient is `TokensToRows`."""

    @staticmethod
    def forward(
        ctx: Any,
        y_RD: Tensor,
        token_R: Tensor,
        row_N: Tensor,
        token_N: Tensor,
        pairs_per_token: int | None,
        num_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(token_R)
        return sum_pairs(y_RD, row_N, token_N, pairs_per_token, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (token_R,) = ctx.saved_tensors
        return take(grad_TD, token_R), None, None, None, None, None


class Reorder(torch.autograd.Function):
    """``x[order]`` for a permutation, given with its inverse, which is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class Exchange(torch.autograd.Function):
    """Rows, and a number with each where asked, to other ranks in one all-to-all; its gradient goes the same way back.

    The number travels behind its row as raw bytes, so that an fp32 gate stays fp32 beside bf16 rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gate_R: Tensor | None,
        axis: Axis,
        send_sizes: list[int] | None,
        receive_sizes: list[int] | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.axis, ctx.send_sizes, ctx.receive_sizes = axis, send_sizes, receive_sizes
        ctx.gate_dtype = None if gate_R is None else gate_R.dtype
        return exchange(x_RD, gate_R, axis, send_sizes, receive_sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor, grad_gate_R: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_x, grad_gate = exchange(
            grad_RD,
            None if ctx.gate_dtype is None else grad_gate_R,
            ctx.axis,
            ctx.receive_sizes,
            ctx.send_sizes,
        )
        return grad_x, grad_gate, None, None, None


def exchange(
    x_RD: Tensor,
    gate_R: Tensor | None,
    axis: Axis,
    send_sizes: list[int] | None,
    receive_sizes: list[int] | None,
) -> tuple[Tensor, Tensor | None]:
    """`Exchange` without its gradient."""
    if gate_R is None:
        return all_to_all(x_RD.contiguous(), axis, send_sizes, receive_sizes), None
    tail = gate_R.contiguous()[:, None].view(x_RD.dtype)
    received = all_to_all(torch.cat([x_RD, tail], dim=1), axis, send_sizes, receive_sizes)
    dim = x_RD.shape[1]
    # Two copies of their own: a view with the gate's stride would not qualify for grouped matmul.
    return received[:, :dim].contiguous(), received[:, dim:].contiguous().view(gate_R.dtype)[:, 0]
