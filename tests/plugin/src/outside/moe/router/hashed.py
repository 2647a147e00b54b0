"""Experts by a hash of the token's id and place (hash layers, Roller et al. 2021), weighted by a learned softmax."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.config import require
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw, fill_normal
from moedist.moe.router.contract import Router, RouterConfig, RouterSite, Routing, wide


@dataclasses.dataclass(frozen=True)
class HashedConfig(RouterConfig):
    """Nothing is learned about where a token goes; its gates are."""

    fan_out: int = 2

    def build_at(self, site: RouterSite) -> HashedRouter:
        require(self.fan_out <= site.num_experts, "fan_out", self.fan_out, "is more than the experts", "Set it lower.")
        return HashedRouter(self.fan_out, site)

    def experts_per_token(self, num_experts: int) -> int:
        return self.fan_out


class HashedRouter(Router):
    def __init__(self, fan_out: int, site: RouterSite):
        super().__init__(site)
        self.fan_out = fan_out
        self.weight = site.parameter(site.num_experts, site.dim)

    def init_weights(self, draw: Draw) -> None:
        fill_normal(self.weight, draw("weight"), 0.2)

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> Routing:
        num_tokens, num_experts = x_TD.shape[0], self.weight.shape[0]
        logits_TE = F.linear(wide(x_TD), wide(self.weight))
        probs_TE = logits_TE.softmax(dim=1)
        first_T = ((ctx.id_T + 31 * ctx.position_T) * 2654435761 >> 7) % num_experts
        choice_K = torch.arange(self.fan_out, device=x_TD.device)
        expert_TK = (first_T[:, None] + 3 * choice_K) % num_experts
        gate_N = probs_TE.gather(1, expert_TK).reshape(-1)
        token_T = torch.arange(num_tokens, device=x_TD.device)
        return Routing(
            token_N=token_T.repeat_interleave(self.fan_out, output_size=num_tokens * self.fan_out),
            expert_N=expert_TK.reshape(-1),
            gate_N=gate_N,
            score_TE=probs_TE,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            pairs_per_token=self.fan_out,
        )
