"""The balance loss of Switch Transformer (Fedus et al. 2022, equations 4 to 6), for any K and scope."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from moedist.config import require
from moedist.moe.balance.contract import BalanceLoss, ScopedLossConfig, per_token
from moedist.moe.context import TokenContext
from moedist.moe.plan import CapacityPlan, count
from moedist.moe.report import CountedMass
from moedist.moe.router.contract import Router, Routing


@dataclasses.dataclass(frozen=True)
class SwitchConfig(ScopedLossConfig):
    """``E * sum_i f_i * P_i``; 1 for uniform routing at any K.

    f_i is expert i's share of the pairs *before* any drop (counted after it, a full expert would look balanced and the
    gradient would die); P_i is the mean of the full distribution and carries the gradient.

    Attributes:
        count: which pairs f counts: ``all``; tokens' ``first`` choices alone (GShard, DeepSpeed's top-2); or those that
            are ``used``, with a probability above 1 / (2 E): for dense routing, where all pairs are one per token and
            expert, whatever the router says.
        layers: ``each`` has a loss of its own; ``pooled``: one loss for the model, f and P being those of the tokens of
            all its MoE layers together (transformers' Mixtral). transformers doesn't divide f by K: its loss is K times
            this one, 1 here being K there, so a ``router_aux_loss_coef`` of c is a coefficient of K c.
    """

    coefficient: float = 0.01
    count: Literal["all", "first", "used"] = "all"
    layers: Literal["each", "pooled"] = "each"

    @property
    def of_all_layers(self) -> bool:
        """See ``layers``."""
        return self.layers == "pooled"

    def check(self, router: Router) -> None:
        """First choices are tokens'."""
        require(
            self.count != "first" or router.has_first_choices,
            "count",
            self.count,
            "needs a router in which tokens choose",
            "Set it to all, or choose a token-choice router (moe/router=topk).",
        )

    def build(self, num_experts: int) -> SwitchLoss:  # noqa: D102
        return SwitchLoss(self, num_experts)


class SwitchLoss(BalanceLoss):
    """The loss of one layer."""

    config: SwitchConfig

    def __init__(self, config: SwitchConfig, num_experts: int):
        super().__init__(config)
        self.num_experts = num_experts

    def count(self, routing: Routing, ctx: TokenContext) -> Tensor | None:
        """int64 [E]: the pairs that f counts."""
        return self.asked(routing, ctx) if self.config.scope == "global" else None

    def forward(
        self, routing: Routing, plan: CapacityPlan, ctx: TokenContext, counts: Tensor | None = None
    ) -> Tensor | CountedMass:
        """The mean over groups weighted by valid tokens is one sum over tokens: ``E / T sum_t sum_i f_i(t) p_ti``."""
        probs_TE = routing.probs_TE.masked_fill(~ctx.valid_T[:, None], 0)
        if self.config.scope == "sequence":
            pair_N = ctx.sequence_T[routing.token_N] * self.num_experts + routing.expert_N
            asked_BE = count(pair_N, ctx.num_sequences * self.num_experts, self.counted(routing, ctx))
            asked_GE = asked_BE.view(-1, self.num_experts)
            # [B, E] sums of probabilities: what index_add would give, without its order of adding.
            length = probs_TE.shape[0] // max(ctx.num_sequences, 1)
            mass_GE = probs_TE.view(ctx.num_sequences, length, self.num_experts).sum(1)
        else:
            asked_E = self.asked(routing, ctx) if counts is None else counts
            asked_GE, mass_GE = asked_E[None], probs_TE.sum(0)[None]
        part = CountedMass(asked_GE, per_token(mass_GE, ctx))
        return part.loss() if self.config.layers == "each" else part

    def asked(self, routing: Routing, ctx: TokenContext) -> Tensor:
        """int64 [E]: the pairs that f counts, of this micro-batch."""
        return count(routing.expert_N, self.num_experts, self.counted(routing, ctx))

    def counted(self, routing: Routing, ctx: TokenContext) -> Tensor:
        """Bool [N]: the pairs that f counts, before any drop; padding never."""
        valid_N = ctx.valid_T[routing.token_N]
        if routing.live_N is not None:
            valid_N = valid_N & routing.live_N
        if self.config.count == "all":
            return valid_N
        if self.config.count == "used":
            return valid_N & (routing.probs_TE.detach()[routing.token_N, routing.expert_N] > 0.5 / self.num_experts)
        assert routing.pairs_per_token is not None, "only token choice has first choices"
        return valid_N & (torch.arange(valid_N.shape[0], device=valid_N.device) % routing.pairs_per_token == 0)
