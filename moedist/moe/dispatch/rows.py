"""Copying tokens to rows, summing rows to tokens, exchanging rows: three functions, each other's gradients, to any
order.

All are gathers: every output element is written once, so results are bitwise repeatable and nothing asks the host.
An index of -1 stands for a row, or a pair, that is not there: it reads as zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.mesh import Axis
from moedist.mesh.collectives import all_to_all
from moedist.moe.dispatch.wire import Wire
from moedist.moe.host import on_host
from moedist.moe.kernels.device import why_not
from moedist.moe.kernels.pairs import sum_rows
from moedist.moe.plan import CapacityPlan

ID_TYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""In which numbers of experts travel, by the bytes of a row's element: whole elements, so that they fit behind the
row."""


def take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` along dim 0, zero where the index is -1; any index shape, ``x`` may have no rows."""
    if x.shape[0] == 0:
        return x.new_zeros(*index.shape, *x.shape[1:])
    if index.dim() == 1 and sums_in_kernel(x):
        return sum_rows(x, index[:, None])
    taken = x.index_select(0, index.clamp_min(0).view(-1))
    absent = (index < 0).view(-1)
    if on_host(x):  # mostly all are there
        taken.index_fill_(0, absent.nonzero()[:, 0], 0)
    else:
        taken.masked_fill_(absent.view(-1, *(1,) * (x.dim() - 1)), 0)
    return taken.view(*index.shape, *x.shape[1:])


def sums_in_kernel(x: Tensor) -> bool:
    """Whether rows of ``x`` are copied and summed by a kernel."""
    return x.dim() == 2 and x.is_floating_point() and why_not(x.device, "pairs") is None


def pair_of_row(row_N: Tensor, num_rows: int) -> Tensor:
    """int64 [R]: the inverse of ``row_N``, the row of each pair (-1: none); -1 for a row without a pair."""
    pair_N = torch.arange(row_N.shape[0], device=row_N.device)
    # Pairs without a row are written to a trash row behind the last, which is cut off.
    pair_R = torch.full((num_rows + 1,), -1, device=row_N.device)
    return pair_R.scatter_(0, torch.where(row_N < 0, num_rows, row_N), pair_N)[:num_rows]


def sum_pairs(
    y_RD: Tensor, row_N: Tensor, token_N: Tensor | None, pairs_per_token: int | None, num_tokens: int
) -> Tensor:
    """[T, D]: each token's sum over its pairs' rows; ``token_N`` is needed where a token has any number of pairs."""
    if pairs_per_token == 1:
        return take(y_RD, row_N)
    if pairs_per_token is not None:
        row_TK = row_N.view(num_tokens, pairs_per_token)
        if y_RD.shape[0] and sums_in_kernel(y_RD):
            return sum_rows(y_RD, row_TK)
        if y_RD.dim() == 2 and on_host(y_RD) and y_RD.dtype in (torch.float32, torch.float64):
            return sum_bags(y_RD, row_TK)
        if row_N.shape[0] > 2 * y_RD.shape[0]:  # mostly empty: all columns at once would take more room than the rows
            sum_TD = y_RD.new_zeros(num_tokens, *y_RD.shape[1:], dtype=torch.promote_types(y_RD.dtype, torch.float32))
            for row_T in row_TK.unbind(1):
                sum_TD += take(y_RD, row_T)
            return sum_TD.to(y_RD.dtype)
        return take(y_RD, row_TK).sum(1)
    assert token_N is not None
    return y_RD.new_zeros(num_tokens, *y_RD.shape[1:]).index_add(0, token_N, take(y_RD, row_N))


def sum_bags(y_RD: Tensor, row_TK: Tensor) -> Tensor:
    """[T, D]: the same for K pairs each in one pass, without the [T, K, D] in between."""
    there_TK = row_TK >= 0
    size_T = there_TK.sum(1)
    return F.embedding_bag(row_TK[there_TK], y_RD, size_T.cumsum(0) - size_T, mode="sum")


class TokensToRows(torch.autograd.Function):
    """[T, ...] -> [R, ...]: ``out[r] = x[token_R[r]]``; its gradient is `RowsToTokens`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token_R: Tensor, row_N: Tensor, token_N: Tensor | None, pairs_per_token: int | None
    ) -> Tensor:
        ctx.save_for_backward(token_R, row_N, token_N)
        ctx.pairs_per_token, ctx.num_tokens = pairs_per_token, x.shape[0]
        return take(x, token_R)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        grad = RowsToTokens.apply(grad_R, *ctx.saved_tensors, ctx.pairs_per_token, ctx.num_tokens)
        return grad, None, None, None, None


class RowsToTokens(torch.autograd.Function):
    """[R, D] -> [T, D]: each token's sum over its pairs' rows; its gradient is `TokensToRows`."""

    @staticmethod
    def forward(
        ctx: Any,
        y_RD: Tensor,
        token_R: Tensor,
        row_N: Tensor,
        token_N: Tensor | None,
        pairs_per_token: int | None,
        num_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(token_R, row_N, token_N)
        ctx.pairs_per_token = pairs_per_token
        return sum_pairs(y_RD, row_N, token_N, pairs_per_token, num_tokens)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return TokensToRows.apply(grad_TD, *ctx.saved_tensors, ctx.pairs_per_token), None, None, None, None, None


@dataclasses.dataclass(frozen=True)
class Copies:
    """A row for each pair that has one.

    Attributes:
        x_RD, gate_R: with gradient; zero at a row without a pair.
        pair_R, token_R: whose row it is; -1 at a row without a pair.
    """

    x_RD: Tensor
    gate_R: Tensor
    pair_R: Tensor
    token_R: Tensor


def copy_to_rows(x_TD: Tensor, plan: CapacityPlan, row_N: Tensor, num_rows: int) -> Copies:
    """Each pair's token and gate at the pair's row ``row_N`` (-1: none)."""
    pair_N = torch.arange(row_N.shape[0], device=row_N.device)
    pair_R = pair_of_row(row_N, num_rows)
    token_R = torch.where(pair_R < 0, -1, plan.token_N[pair_R]) if row_N.shape[0] else pair_R
    return Copies(
        x_RD=TokensToRows.apply(x_TD, token_R, row_N, plan.token_N, plan.pairs_per_token),
        gate_R=TokensToRows.apply(plan.gate_N, pair_R, row_N, pair_N, 1),
        pair_R=pair_R,
        token_R=token_R,
    )


class Reorder(torch.autograd.Function):
    """``x[order]`` for a permutation, given with its inverse, which is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        order, inverse = ctx.saved_tensors
        return Reorder.apply(grad, inverse, order), None, None


class Exchange(torch.autograd.Function):
    """Rows, and numbers with each where there are some, to other ranks in one all-to-all; its gradient goes the same
    way back. The rows travel in the numbers of a wire, and what stands behind them as it is. Whole numbers have no
    gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        axis: Axis,
        wire: Wire,
        send_sizes: list[int] | None,
        receive_sizes: list[int] | None,
        x_RD: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.axis, ctx.wire, ctx.send_sizes, ctx.receive_sizes = axis, wire, send_sizes, receive_sizes
        ctx.floating = [part.is_floating_point() for part in (x_RD, *others)]
        coded = wire.encode(x_RD)
        arrived = exchange((*coded, *others), axis, send_sizes, receive_sizes)
        received = wire.decode(arrived[: len(coded)], x_RD.dtype), *arrived[len(coded) :]
        ctx.mark_non_differentiable(*(part for part in received if not part.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent = [grad for grad, floating in zip(grads, ctx.floating, strict=True) if floating]
        wire = ctx.wire.of_gradients
        home = iter(Exchange.apply(ctx.axis, wire, ctx.receive_sizes, ctx.send_sizes, *sent))
        return None, None, None, None, *(next(home) if floating else None for floating in ctx.floating)


def exchange(
    parts: Sequence[Tensor], axis: Axis, send_sizes: list[int] | None, receive_sizes: list[int] | None
) -> tuple[Tensor, ...]:
    """Tensors [R, ...] to other ranks, side by side in one all-to-all.

    What stands behind the first travels as raw bytes, so that an fp32 gate stays fp32 beside bf16 rows; the bytes of
    one row of each are a multiple of the first one's element.
    """
    first, *others = parts
    if not others:
        return (all_to_all(first.contiguous(), axis, send_sizes, receive_sizes),)
    tails = [(part if part.dim() == 2 else part[:, None]).contiguous().view(first.dtype) for part in others]
    received = all_to_all(torch.cat([first, *tails], dim=1), axis, send_sizes, receive_sizes)
    # Copies of their own: a view with the stride of the whole would not qualify for grouped matmul, and one row counts
    # as contiguous wherever it begins, which may be between two numbers of its type.
    pieces = [
        piece.clone(memory_format=torch.contiguous_format)
        for piece in received.split([part.shape[1] for part in (first, *tails)], dim=1)
    ]
    whole = [piece.view(part.dtype) for piece, part in zip(pieces, parts, strict=True)]
    return tuple(one if part.dim() == 2 else one[:, 0] for one, part in zip(whole, parts, strict=True))
