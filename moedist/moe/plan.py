"""Which pairs stay: the capacity plan, made from this rank's tokens alone before any row moves.

Everything has a static shape: a pair that is dropped, or that belongs to padding, stays in the plan with slot -1 and
gate 0. So the plan never asks the host, compiles whole, and EP = 1 and EP = n drop the same pairs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.moe.capacity import CapacityConfig, Limit
from moedist.moe.context import TokenContext
from moedist.moe.kernels.device import why_not
from moedist.moe.kernels.pairs import MOST_EXPERTS
from moedist.moe.kernels.pairs import fill_buckets as fill_buckets_in_kernel
from moedist.moe.noise import RANDOM_DROP, draw_uniform
from moedist.moe.router.contract import Routing

DROP_REASONS = ("full", "exhausted", "barred")
"""Why a pair is computed by no expert; each dropped pair has one reason.

- ``full``: its expert was full, and ``overflow: drop`` tries no other. The only reason in that mode.
- ``exhausted``: under ``overflow: next_best``, every expert is full in its capacity group: the limit is too low.
- ``barred``: under ``overflow: next_best``, the experts that still have room are not for this token, because they
  compute it already or lie outside of its group limit.

Padding, and pairs that a router holds for the shape's sake only (`Routing.live_N`), were never asked and are no drops;
nor is a token that no expert chose under expert choice.
"""
FULL, EXHAUSTED, BARRED = range(3)


@dataclasses.dataclass(frozen=True)
class CapacityPlan:
    """What happens to every proposed pair.

    Attributes:
        token_N: int64, as proposed.
        expert_N: int64, where the pair ends, a logical (global) id; as proposed unless overflow has moved it.
        gate_N: with gradient; 0 for a pair that does not stay.
        slot_N: int64, the pair's place among its expert's kept pairs, dense from 0; -1 for a pair that does not stay.
        asked_E: int64 pairs that proposed each expert, before any limit; padding not counted.
        kept_E: int64 pairs that each expert computes.
        dropped_ME: int64 pairs that proposed each expert and are computed by none, by reason: M = 3, in the order of
            `DROP_REASONS`. (What was proposed and is computed elsewhere is the rest: ``asked - dropped`` summed over
            experts is ``kept`` summed.)
        room: 0-dim int64, pairs that the limits of all capacity groups leave room for over all experts; 0 for no limit.
        capacity: upper bound of ``kept_E`` known from the shapes; None where nothing limits it but the token count.
        pairs_per_token: K where pair ``t * K + k`` is token t's choice k, else None.
        may_spill: as the context says.
    """

    token_N: Tensor
    expert_N: Tensor
    gate_N: Tensor
    slot_N: Tensor
    asked_E: Tensor
    kept_E: Tensor
    dropped_ME: Tensor
    room: Tensor
    capacity: int | None
    pairs_per_token: int | None
    may_spill: bool = False


@dataclasses.dataclass(frozen=True)
class Groups:
    """Capacity groups of the pairs: how many (a shape), each pair's (None: all are of one), and the valid tokens of
    each."""

    num: int
    group_N: Tensor | None
    tokens_G: Tensor

    def at(self, value_G: Tensor) -> Tensor:
        """Of each pair's group, the entry of ``value_G`` [G, ...]; one that stands for all where there is one group."""
        return value_G[:1] if self.group_N is None else value_G[self.group_N]

    def at_experts(self, value_GE: Tensor, expert_N: Tensor) -> Tensor:
        """[N]: of each pair's group and ``expert_N``, the entry of ``value_GE``."""
        return value_GE[0, expert_N] if self.group_N is None else value_GE[self.group_N, expert_N]


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where pairs stand: expert, place within (group, expert), whether they stay; and what that comes to.

    Attributes:
        expert_N, kept_N: as said. place_N: means nothing where a pair does not stay.
        asked_E, dropped_ME: as `CapacityPlan`. kept_GE: int64 pairs that stay at each expert, by capacity group.
    """

    expert_N: Tensor
    place_N: Tensor
    kept_N: Tensor
    asked_E: Tensor
    kept_GE: Tensor
    dropped_ME: Tensor


def plan_capacity(routing: Routing, ctx: TokenContext, config: CapacityConfig, *, layer: int = 0) -> CapacityPlan:
    """Decides for every pair whether it stays and where; ``layer`` names the draws of ``drop_policy: random``."""
    num_experts, num_tokens = routing.probs_TE.shape[1], ctx.valid_T.shape[0]
    limit = config.limit(ctx.training)
    groups = capacity_groups(routing, ctx, by_sequence=limit is not None and config.group == "sequence")
    valid_N = ctx.valid_T[routing.token_N]
    if routing.live_N is not None:
        valid_N = valid_N & routing.live_N

    if limit is None:
        placed = place_all(routing, valid_N, groups)
        room = groups.tokens_G.new_zeros(())
        capacity, gate_N = routing.capacity, torch.where(valid_N, routing.gate_N, 0)
        if config.renormalize_after_drop == "one" and routing.pairs_per_token is not None:
            gate_N = rescaled(gate_N, 1, routing)  # a model trained so is the same without a limit
    else:
        assert routing.pairs_per_token is not None, "a capacity limit needs a fixed number of pairs per token"
        limit_G = limit.of_counts(groups.tokens_G, routing.pairs_per_token, num_experts, ctx.step)
        room = limit_G.sum() * num_experts
        placed = place_pairs(routing, valid_N, ctx, config, groups, limit_G, layer)
        capacity = largest_capacity(limit, groups.num, num_tokens, routing.pairs_per_token, num_experts)
        gate_N = surviving_gates(routing, placed, valid_N, config.renormalize_after_drop)

    slot_N = placed.place_N
    if groups.num > 1:  # an expert's slots run through the groups one after the other
        slot_N = slot_N + groups.at_experts(placed.kept_GE.cumsum(0) - placed.kept_GE, placed.expert_N)
    return CapacityPlan(
        token_N=routing.token_N,
        expert_N=placed.expert_N,
        gate_N=gate_N,
        slot_N=torch.where(placed.kept_N, slot_N, -1),
        asked_E=placed.asked_E,
        kept_E=placed.kept_GE.sum(0),
        dropped_ME=placed.dropped_ME,
        room=room,
        capacity=capacity,
        pairs_per_token=routing.pairs_per_token,
        may_spill=ctx.may_spill,
    )


def capacity_groups(routing: Routing, ctx: TokenContext, by_sequence: bool) -> Groups:
    """The groups that share a limit: this rank's tokens, or each row's."""
    if not by_sequence:
        return Groups(1, None, ctx.valid_T.sum()[None])
    tokens_G = count(ctx.sequence_T, ctx.num_sequences, ctx.valid_T)
    return Groups(ctx.num_sequences, ctx.sequence_T[routing.token_N], tokens_G)


def largest_capacity(limit: Limit, num_groups: int, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Upper bound of an expert's kept pairs from the shapes."""
    return num_groups * limit.of_shape(num_tokens // max(num_groups, 1), top_k, num_experts)


def place_all(routing: Routing, valid_N: Tensor, groups: Groups) -> Placed:
    """Every pair at the expert that was proposed."""
    num_experts = routing.probs_TE.shape[1]
    bucket_N = bucket_of(routing.expert_N, valid_N, groups, num_experts)
    place_N, kept_E = fill_buckets(bucket_N, num_experts, None)
    dropped_ME = kept_E.new_zeros(len(DROP_REASONS), num_experts)
    return Placed(routing.expert_N, place_N, valid_N, kept_E, kept_E[None], dropped_ME)


def place_pairs(
    routing: Routing,
    valid_N: Tensor,
    ctx: TokenContext,
    config: CapacityConfig,
    groups: Groups,
    limit_G: Tensor,
    layer: int,
) -> Placed:
    """First every pair at the expert that was proposed; then, where overflow asks for it, the rest elsewhere."""
    num_experts = routing.probs_TE.shape[1]
    num_buckets = groups.num * num_experts
    ask_N = order_key(routing, routing.expert_N, ctx, config.drop_policy, layer)
    place_N, asked_B = fill_buckets(bucket_of(routing.expert_N, valid_N, groups, num_experts), num_buckets, ask_N)
    asked_GE = asked_B.view(groups.num, num_experts)
    kept_GE, asked_E = torch.minimum(asked_GE, limit_G[:, None]), asked_GE.sum(0)
    # All for the one reason that there is without `next_best`.
    dropped_ME = F.pad((asked_E - kept_GE.sum(0))[None], (0, 0, FULL, len(DROP_REASONS) - 1 - FULL))
    kept_N = valid_N & (place_N < groups.at(limit_G))
    placed = Placed(routing.expert_N, place_N, kept_N, asked_E, kept_GE, dropped_ME)
    if config.overflow == "drop":
        return placed

    top_k, num_tokens = routing.pairs_per_token, ctx.valid_T.shape[0]
    assert top_k is not None, "a token's other experts are known for token choice only"
    score_TE = routing.score_TE.detach()
    tried_TE = torch.zeros_like(score_TE, dtype=torch.bool) if routing.allowed_TE is None else ~routing.allowed_TE
    tried_TE[routing.token_N, routing.expert_N] = True
    has_room_TE = (num_tokens, top_k, num_experts)
    for _ in range(num_experts - top_k):
        room_GE = limit_G[:, None] - placed.kept_GE
        open_TE = ~tried_TE & groups.at(room_GE > 0).expand(num_tokens * top_k, -1).view(has_room_TE)[:, 0]
        # A token's homeless pairs ask its open experts from the best down, one each.
        best_TE = score_TE.masked_fill(~open_TE, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        homeless_TK = (valid_N & ~placed.kept_N).view(num_tokens, top_k)
        turn_TK = homeless_TK.cumsum(1) - homeless_TK.to(torch.int64)
        wanted_N = best_TE.gather(1, turn_TK).reshape(-1)
        asks_N = (homeless_TK & (turn_TK < open_TE.sum(1, keepdim=True))).reshape(-1)
        tried_TE |= count(routing.token_N * num_experts + wanted_N, tried_TE.numel(), asks_N).view_as(tried_TE) > 0
        ask_N = order_key(routing, wanted_N, ctx, config.drop_policy, layer)
        place_N, wanted_B = fill_buckets(bucket_of(wanted_N, asks_N, groups, num_experts), num_buckets, ask_N)
        gets_N = asks_N & (place_N < groups.at_experts(room_GE, wanted_N))
        placed = dataclasses.replace(
            placed,
            expert_N=torch.where(gets_N, wanted_N, placed.expert_N),
            place_N=torch.where(gets_N, groups.at_experts(placed.kept_GE, wanted_N) + place_N, placed.place_N),
            kept_N=placed.kept_N | gets_N,
            kept_GE=placed.kept_GE + torch.minimum(wanted_B.view_as(room_GE), room_GE),
        )
    # Every token has asked all that it may ask: what has room now is barred to it.
    reason_N = torch.where(groups.at((placed.kept_GE < limit_G[:, None]).any(1)), BARRED, EXHAUSTED)
    reason_E_N = reason_N * num_experts + routing.expert_N
    dropped = count(reason_E_N, len(DROP_REASONS) * num_experts, valid_N & ~placed.kept_N)
    return dataclasses.replace(placed, dropped_ME=dropped.view(-1, num_experts))


def order_key(routing: Routing, expert_N: Tensor, ctx: TokenContext, policy: str, layer: int) -> Tensor | None:
    """int64 [N]: the pairs from the first to keep to the last, each asking ``expert_N``; None for their own order."""
    if policy == "probability":
        return routing.score_TE.detach()[routing.token_N, expert_N].sort(descending=True, stable=True).indices
    if policy == "gate":
        return routing.gate_N.detach().sort(descending=True, stable=True).indices
    if policy == "choice":
        assert routing.pairs_per_token is not None, "only token choice has first and second choices"
        pair_N = torch.arange(routing.token_N.shape[0], device=routing.token_N.device)
        return pair_N.view(-1, routing.pairs_per_token).t().reshape(-1)
    if policy == "random":
        uniform_TE = draw_uniform(ctx, routing.probs_TE.shape[1], layer=layer, stream=RANDOM_DROP)
        return uniform_TE[routing.token_N, expert_N].sort(stable=True).indices
    assert policy == "token", policy
    return None


def bucket_of(expert_N: Tensor, counts_N: Tensor, groups: Groups, num_experts: int) -> Tensor:
    """int64 [N]: (group, expert) as one number; -1 for pairs that don't count."""
    bucket_N = expert_N if groups.group_N is None else groups.group_N * num_experts + expert_N
    return torch.where(counts_N, bucket_N, -1)


def fill_buckets(bucket_N: Tensor, num_buckets: int, order_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 [N] and [num_buckets]: how many entries of the same bucket stand before each, in the given order (None: as
    they stand), and how many each bucket has. An entry of bucket -1 is in none and has place -1."""
    if num_buckets <= MOST_EXPERTS and why_not(bucket_N.device, "pairs") is None:
        return fill_buckets_in_kernel(bucket_N, num_buckets, order_N)
    return fill_by_sorting(bucket_N, num_buckets, order_N)


def fill_by_sorting(bucket_N: Tensor, num_buckets: int, order_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """`fill_buckets` by a stable sort."""
    bucket_in_order_N = bucket_N if order_N is None else bucket_N[order_N]
    sorted_N, by_bucket_N = bucket_in_order_N.sort(stable=True)
    pair_N = by_bucket_N if order_N is None else order_N[by_bucket_N]
    size_B = count(bucket_N + 1, num_buckets + 1)  # what is in no bucket stands first
    first_B = size_B.cumsum(0) - size_B
    place_N = torch.arange(bucket_N.shape[0], device=bucket_N.device) - first_B[sorted_N + 1]
    place_N = torch.where(sorted_N < 0, -1, place_N)
    return torch.empty_like(place_N).scatter_(0, pair_N, place_N), size_B[1:]


def count(index_N: Tensor, num_bins: int, valid_N: Tensor | None = None) -> Tensor:
    """int64 [num_bins]: occurrences of each index; unlike `torch.bincount` it never asks the host."""
    ones_N = torch.ones_like(index_N) if valid_N is None else valid_N.to(torch.int64)
    return torch.zeros(num_bins, dtype=torch.int64, device=index_N.device).scatter_add_(0, index_N, ones_N)


def surviving_gates(routing: Routing, placed: Placed, valid_N: Tensor, rescale: bool | str) -> Tensor:
    """Gates of the pairs that stay, else 0; ``rescale`` as `CapacityConfig.renormalize_after_drop`."""
    gate_N = routing.gate_N
    if placed.expert_N is not routing.expert_N:
        # A pair that was moved carries its new expert's score, by the same factor as before.
        asked_N = routing.score_TE[routing.token_N, routing.expert_N]
        got_N = routing.score_TE[routing.token_N, placed.expert_N]
        moved_N = placed.expert_N != routing.expert_N
        gate_N = torch.where(moved_N, gate_N / torch.where(asked_N > 0, asked_N, 1) * got_N, gate_N)
    gate_N = torch.where(placed.kept_N, gate_N, 0)
    if rescale is False:
        return gate_N
    before_N = 1 if rescale == "one" else sum_by_token(torch.where(valid_N, routing.gate_N, 0), routing)
    return rescaled(gate_N, before_N, routing)


def rescaled(gate_N: Tensor, sum_N: Tensor | int, routing: Routing) -> Tensor:
    """The gates by a factor per token, so that those of a token sum to ``sum_N``."""
    after_N = sum_by_token(gate_N, routing)
    # Where nothing survives there is nothing to rescale: the divisor is then 1, so that no 0 / 0 reaches the gradient.
    return gate_N * (sum_N / torch.where(after_N > 0, after_N, 1))


def sum_by_token(value_N: Tensor, routing: Routing) -> Tensor:
    """[N]: the sum over all pairs of each one's token."""
    assert routing.pairs_per_token is not None, "a token's pairs stand together in token choice only"
    value_TK = value_N.view(-1, routing.pairs_per_token)
    return value_TK.sum(1, keepdim=True).expand_as(value_TK).reshape(-1)
