"""What happens to pairs around the experts, as operators of torch's own: tokens choose, pairs find their places, rows
are copied and summed. `moedist.moe.kernels.pairs_kernels` computes them, where `moedist.moe.kernels.device` lets it.

The twins in torch stand where the operators are called: `moedist.moe.token_choice`, `moedist.moe.plan`,
`moedist.moe.dispatch.rows`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_EXPERTS = 1024
"""That a program holds at once; more of them, or of buckets, go the way of the twins."""
MOST_CHOICES = 32
"""That a program unrolls; likewise groups of experts."""


class ChoiceRules(NamedTuple):
    """How tokens choose, as `moedist.moe.token_choice.TokenChoiceConfig` says it.

    Attributes:
        top_k: experts per token (K).
        score: ``softmax`` or ``sigmoid``.
        renormalize: whether a token's gates sum to 1.
        eps: smallest sum that gates are divided by.
        num_groups: equal blocks of experts, of which a token picks from its ``top_groups`` best; 0 for none.
        sum_of_two: whether a group is worth what its two best experts are; else its best one.
    """

    top_k: int
    score: str
    renormalize: bool
    eps: float
    num_groups: int = 0
    top_groups: int = 0
    sum_of_two: bool = False


@torch.library.custom_op("moedist::sum_rows", mutates_args=())
def sum_rows(x: Tensor, index_MK: Tensor) -> Tensor:
    """[M, D]: the sum of rows ``index_MK`` of ``x`` [R, D], taken in fp32 or wider from the first to the last; an index
    of -1 adds nothing. With K = 1 a copy. Not differentiable."""
    from moedist.moe.kernels import pairs_kernels

    return pairs_kernels.sum_rows(x, index_MK)


@sum_rows.register_fake
def _(x: Tensor, index_MK: Tensor) -> Tensor:
    return x.new_empty(index_MK.shape[0], x.shape[1])


@torch.library.custom_op("moedist::fill_buckets", mutates_args=())
def fill_buckets(bucket_N: Tensor, num_buckets: int, order_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """`moedist.moe.plan.fill_buckets`, by counting instead of sorting, in one pass that counts and one that places."""
    from moedist.moe.kernels import pairs_kernels

    return pairs_kernels.fill_buckets(bucket_N, num_buckets, order_N)


@fill_buckets.register_fake
def _(bucket_N: Tensor, num_buckets: int, order_N: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(bucket_N), bucket_N.new_empty(num_buckets)


@torch.library.custom_op("moedist::choose", mutates_args=())
def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    eps: float,
    num_groups: int,
    top_groups: int,
    sum_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In one pass: scores [T, E], the chosen experts [T, K], their gates [T, K], and bool [T, E], the experts of each
    token's best groups ([T, 0] without groups).

    Chosen are the highest logits; with a bias the highest sums of score and bias, of the very scores that are returned.

    Args:
        logits_TE: contiguous, fp32 or fp64.
        bias_E: added to scores for the selection; None for none.
        top_k, score, ...: `ChoiceRules`.
    """
    from moedist.moe.kernels import pairs_kernels

    rules = (top_k, score, renormalize, eps, num_groups, top_groups, sum_of_two)
    return pairs_kernels.choose(logits_TE, bias_E, *rules)


@choose.register_fake
def _(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    eps: float,
    num_groups: int,
    top_groups: int,
    sum_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    return (
        torch.empty_like(logits_TE),
        logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits_TE.new_empty(num_tokens, top_k),
        logits_TE.new_empty(num_tokens, num_experts if num_groups else 0, dtype=torch.bool),
    )


@torch.library.custom_op("moedist::choose_gradient", mutates_args=())
def choose_gradient(
    score_TE: Tensor,
    expert_TK: Tensor,
    grad_score_TE: Tensor,
    grad_gate_TK: Tensor,
    score: str,
    renormalize: bool,
    eps: float,
) -> Tensor:
    """[T, E]: the gradient of `choose`'s logits."""
    from moedist.moe.kernels import pairs_kernels

    return pairs_kernels.choose_gradient(score_TE, expert_TK, grad_score_TE, grad_gate_TK, score, renormalize, eps)


@choose_gradient.register_fake
def _(
    score_TE: Tensor,
    expert_TK: Tensor,
    grad_score_TE: Tensor,
    grad_gate_TK: Tensor,
    score: str,
    renormalize: bool,
    eps: float,
) -> Tensor:
    return torch.empty_like(score_TE)


def gradient_of_logits(
    score_TE: Tensor,
    expert_TK: Tensor,
    grad_score_TE: Tensor,
    grad_gate_TK: Tensor,
    score: str,
    renormalize: bool,
    eps: float,
) -> Tensor:
    """`choose_gradient` in torch, to be differentiated again."""
    if renormalize:
        score_TK = score_TE.gather(1, expert_TK)
        sum_T1 = score_TK.sum(1, keepdim=True)
        divisor_T1 = sum_T1.clamp_min(eps)
        shared_T1 = (score_TK * grad_gate_TK).sum(1, keepdim=True) / divisor_T1
        grad_gate_TK = (grad_gate_TK - torch.where(sum_T1 >= eps, shared_T1, 0)) / divisor_T1
    grad_TE = grad_score_TE.scatter_add(1, expert_TK, grad_gate_TK)
    if score == "softmax":
        return score_TE * (grad_TE - (score_TE * grad_TE).sum(1, keepdim=True))
    return grad_TE * score_TE * (1 - score_TE)


class Choose(torch.autograd.Function):
    """`choose` with its gradient; the bias has none."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, rules: ChoiceRules
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        score_TE, expert_TK, gate_TK, allowed_TE = choose(logits_TE.contiguous(), bias_E, *rules)
        ctx.save_for_backward(score_TE, expert_TK)
        ctx.rules = (rules.score, rules.renormalize, rules.eps)
        ctx.mark_non_differentiable(expert_TK, allowed_TE)
        return score_TE, expert_TK, gate_TK, allowed_TE

    @staticmethod
    def backward(ctx: Any, grad_score_TE: Tensor, _: Any, grad_gate_TK: Tensor, __: Any) -> tuple[Tensor | None, ...]:
        score_TE, expert_TK = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants second derivatives
            grad_TE = gradient_of_logits(score_TE, expert_TK, grad_score_TE, grad_gate_TK, *ctx.rules)
        else:
            grads = grad_score_TE.contiguous(), grad_gate_TK.contiguous()
            grad_TE = choose_gradient(score_TE, expert_TK, *grads, *ctx.rules)
        return grad_TE, None, None
