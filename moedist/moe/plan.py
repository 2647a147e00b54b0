"""Which pairs stay: the capacity plan, made from this rank's tokens alone before any row moves.

Everything has a static shape: a pair that is dropped, or that belongs to padding, stays in the plan with slot -1 and
gate 0. So the plan never asks the host, compiles whole, and EP = 1 and EP = n drop the same pairs.
"""

from __future__ import annotations

import dataclasses
import warnings
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from moedist.config import Config, require
from moedist.moe.context import TokenContext
from moedist.moe.noise import RANDOM_DROP, draw_uniform
from moedist.moe.router.contract import Routing


@dataclasses.dataclass(frozen=True)
class CapacityConfig(Config):
    """How many pairs an expert takes from one capacity group, and which.

    The limit of a group with ``t`` valid tokens is ``max(min_capacity, ceil(factor * t * K / E))``, never above ``t``,
    in exact integer arithmetic on the factor as the decimal that was written (beyond six decimals the nearest fraction
    with a denominator up to 10^6, so that 4/3 is 4/3 and int64 holds every product).

    Attributes:
        factor: multiple of the even share ``t * K / E``; None takes every pair (dropless).
        expert_capacity: a fixed limit per group instead of the factor's.
        eval_factor: the factor of evaluations during training; ``train`` for the same.
        min_capacity: lower bound of the limit.
        group: tokens that share one limit: ``rank`` (a rank's tokens of one micro-batch, as DeepSpeed and Megatron do)
            or ``sequence`` (one row).
        drop_policy: who stays at a full expert: ``probability`` (highest unbiased score, ties by position), ``choice``
            (all first choices in token order, then second ones; GShard, Lepikhin et al. 2021), ``token`` (token order,
            a token's choices in order) or ``random``.
        overflow: what becomes of the rest: ``drop`` leaves the token to the residual.
        renormalize_after_drop: whether a token's surviving gates are rescaled to the sum that its gates had before.
    """

    factor: float | None = 1.25
    expert_capacity: int | None = None
    eval_factor: float | None | Literal["train"] = "train"
    min_capacity: int = 1
    group: Literal["rank", "sequence"] = "rank"
    drop_policy: Literal["probability", "choice", "token", "random"] = "probability"
    overflow: Literal["drop"] = "drop"
    renormalize_after_drop: bool = True

    def __post_init__(self) -> None:
        for key in ("factor", "eval_factor"):
            value = getattr(self, key)
            if value is None or isinstance(value, str):
                continue
            require(
                0 < value < 1e6,
                key,
                value,
                "is no multiple of the even share of pairs",
                "Set it above 0 (1.25 is common), or to null to drop nothing.",
            )
            if value < 1:
                warnings.warn(
                    f"moe.capacity.{key} = {value} is below 1: pairs are dropped even at perfect balance.", stacklevel=2
                )
        for key, least in (("expert_capacity", 1), ("min_capacity", 0)):
            value = getattr(self, key)
            require(value is None or value >= least, key, value, "is too small", f"Set it to {least} or more.")

    def limit(self, training: bool) -> Limit | None:
        """The rule in force; None where nothing is dropped."""
        if self.expert_capacity is not None:
            return Limit(Fraction(0), self.expert_capacity)
        factor = self.factor if training or self.eval_factor == "train" else self.eval_factor
        assert not isinstance(factor, str)
        return None if factor is None else Limit(Fraction(str(factor)).limit_denominator(10**6), self.min_capacity)

    @property
    def dropless(self) -> bool:
        """Whether nothing is ever dropped, in training and in evaluation."""
        return self.limit(training=True) is None and self.limit(training=False) is None

    @property
    def causal(self) -> bool:
        """Whether no later token, and no neighbour in the batch, can evict an earlier one."""
        return self.dropless or (self.drop_policy == "token" and self.group == "sequence")

    def without_limit(self) -> CapacityConfig:
        """The same, dropless: evaluation of a finished model, generation, exports."""
        return dataclasses.replace(self, factor=None, eval_factor="train", expert_capacity=None)


@dataclasses.dataclass(frozen=True)
class Limit:
    """``min(t, max(least, ceil(factor * t * K / E)))`` for a group of t valid tokens, exactly."""

    factor: Fraction
    least: int

    def of_shape(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """The largest limit that a group of ``num_tokens`` positions can have: what buffers are sized for.

        >>> Limit(Fraction("1.1"), 1).of_shape(100, top_k=1, num_experts=10)
        11
        """
        share = -(-self.factor.numerator * num_tokens * top_k // (self.factor.denominator * num_experts))
        return min(num_tokens, max(self.least, share))

    def of_counts(self, tokens_G: Tensor, top_k: int, num_experts: int) -> Tensor:
        """int64 [G]: the limit of each group from its valid tokens, on the device."""
        scaled_G = -self.factor.numerator * top_k * tokens_G
        share_G = -torch.div(scaled_G, self.factor.denominator * num_experts, rounding_mode="floor")
        return torch.minimum(tokens_G, share_G.clamp_min(self.least))


@dataclasses.dataclass(frozen=True)
class CapacityPlan:
    """What happens to every proposed pair.

    Attributes:
        token_N, expert_N: int64, as proposed; experts are logical (global) ids.
        gate_N: with gradient; 0 for a pair that does not stay.
        slot_N: int64, the pair's place among its expert's kept pairs, dense from 0; -1 for a pair that does not stay.
        asked_E, kept_E: int64 pairs per expert before and after the limit, padding not counted.
        capacity: upper bound of ``kept_E`` known from the shapes; None where nothing limits it but the token count.
        pairs_per_token: K where pair ``t * K + k`` is token t's choice k, else None.
    """

    token_N: Tensor
    expert_N: Tensor
    gate_N: Tensor
    slot_N: Tensor
    asked_E: Tensor
    kept_E: Tensor
    capacity: int | None
    pairs_per_token: int | None


def plan_capacity(routing: Routing, ctx: TokenContext, config: CapacityConfig, *, layer: int = 0) -> CapacityPlan:
    """Decides for every pair whether it stays and where; ``layer`` names the draws of ``drop_policy: random``."""
    token_N, expert_N = routing.token_N, routing.expert_N
    num_experts, num_tokens = routing.probs_TE.shape[1], ctx.valid_T.shape[0]
    limit = config.limit(ctx.training)
    if limit is None or config.group == "rank":
        num_groups, group_N = 1, torch.zeros_like(token_N)
        tokens_G = ctx.valid_T.sum()[None]
    else:
        num_groups, group_N = ctx.num_sequences, ctx.sequence_T[token_N]
        tokens_G = count(ctx.sequence_T, num_groups, ctx.valid_T)

    valid_N = ctx.valid_T[token_N]
    bucket_N = group_N * num_experts + expert_N
    asked_GE = count(bucket_N, num_groups * num_experts, valid_N).view(num_groups, num_experts)
    order_N = None if limit is None else keep_order(routing, ctx, config.drop_policy, layer)
    # Padding goes to a bucket of its own, behind all others.
    place_N = place_in_bucket(torch.where(valid_N, bucket_N, asked_GE.numel()), asked_GE.numel() + 1, order_N)

    if limit is None:
        kept_GE, kept_N, capacity = asked_GE, valid_N, None
    else:
        assert routing.pairs_per_token is not None, "a capacity factor needs a fixed number of pairs per token"
        limit_G = limit.of_counts(tokens_G, routing.pairs_per_token, num_experts)
        kept_GE = torch.minimum(asked_GE, limit_G[:, None])
        kept_N = valid_N & (place_N < limit_G[group_N])
        capacity = num_groups * limit.of_shape(num_tokens // max(num_groups, 1), routing.pairs_per_token, num_experts)
    # An expert's slots run through the groups one after the other.
    first_slot_GE = kept_GE.cumsum(0) - kept_GE
    slot_N = torch.where(kept_N, place_N + first_slot_GE.view(-1)[bucket_N], -1)

    return CapacityPlan(
        token_N=token_N,
        expert_N=expert_N,
        gate_N=surviving_gates(
            routing, kept_N, valid_N, num_tokens, config.renormalize_after_drop and limit is not None
        ),
        slot_N=slot_N,
        asked_E=asked_GE.sum(0),
        kept_E=kept_GE.sum(0),
        capacity=capacity,
        pairs_per_token=routing.pairs_per_token,
    )


def keep_order(routing: Routing, ctx: TokenContext, policy: str, layer: int) -> Tensor | None:
    """int64 [N]: the pairs from the first to keep to the last; None for the order they stand in."""
    if policy == "probability":
        return routing.score_N.sort(descending=True, stable=True).indices
    if policy == "choice":
        assert routing.pairs_per_token is not None, "only token choice has first and second choices"
        pair_N = torch.arange(routing.token_N.shape[0], device=routing.token_N.device)
        return pair_N.view(-1, routing.pairs_per_token).t().reshape(-1)
    if policy == "random":
        uniform_TE = draw_uniform(ctx, routing.probs_TE.shape[1], layer=layer, stream=RANDOM_DROP)
        return uniform_TE[routing.token_N, routing.expert_N].sort(stable=True).indices
    assert policy == "token", policy
    return None


def place_in_bucket(bucket_N: Tensor, num_buckets: int, order_N: Tensor | None) -> Tensor:
    """int64 [N]: how many entries of the same bucket stand before each, in the given order (None: as they stand)."""
    bucket_in_order_N = bucket_N if order_N is None else bucket_N[order_N]
    by_bucket_N = bucket_in_order_N.sort(stable=True).indices
    pair_N = by_bucket_N if order_N is None else order_N[by_bucket_N]
    size_B = count(bucket_N, num_buckets)
    first_B = size_B.cumsum(0) - size_B
    place_N = torch.arange(bucket_N.shape[0], device=bucket_N.device) - first_B[bucket_N[pair_N]]
    return torch.empty_like(place_N).scatter_(0, pair_N, place_N)


def count(index_N: Tensor, num_bins: int, valid_N: Tensor | None = None) -> Tensor:
    """int64 [num_bins]: occurrences of each index; unlike `torch.bincount` it never asks the host."""
    ones_N = torch.ones_like(index_N) if valid_N is None else valid_N.to(torch.int64)
    return torch.zeros(num_bins, dtype=torch.int64, device=index_N.device).scatter_add_(0, index_N, ones_N)


def surviving_gates(routing: Routing, kept_N: Tensor, valid_N: Tensor, num_tokens: int, renormalize: bool) -> Tensor:
    """Gates of the pairs that stay, else 0; where asked, a token's survivors carry the sum of all its gates."""
    gate_N = torch.where(kept_N, routing.gate_N, 0)
    if not renormalize:
        return gate_N

    def sum_by_token(value_N: Tensor) -> Tensor:
        if routing.pairs_per_token is not None:
            sum_T = value_N.view(-1, routing.pairs_per_token).sum(1)
        else:
            sum_T = value_N.new_zeros(num_tokens).index_add(0, routing.token_N, value_N)
        return sum_T[routing.token_N]

    before_N, after_N = sum_by_token(torch.where(valid_N, routing.gate_N, 0)), sum_by_token(gate_N)
    # Where nothing survives there is nothing to rescale: the divisor is then 1, so that no 0 / 0 reaches the gradient.
    return gate_N * (before_N / torch.where(after_N > 0, after_N, 1))
