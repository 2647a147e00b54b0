"""Hash routing: a fixed table from token id to experts (Hash Layers, Roller et al. 2021)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.config import require
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw
from moedist.moe.noise import hash_columns
from moedist.moe.router.contract import Router, RouterConfig, RouterSite, Routing, wide


@dataclasses.dataclass(frozen=True)
class HashConfig(RouterConfig):
    """Every id goes to ``top_k`` experts of its own, for ever, with equal gates: no parameters, no gradient.

    The table is a random one, worked out from the id where it is needed instead of stored.

    Attributes:
        top_k: experts per token (K).
        table_seed: picks the table.
    """

    top_k: int = 1
    table_seed: int = 0

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "top_k", self.top_k, "picks no expert", "Set it to 1 or more.")

    def build_at(self, site: RouterSite) -> HashRouter:
        require(
            self.top_k <= site.num_experts,
            "top_k",
            self.top_k,
            f"is more than the {site.num_experts} experts",
            f"Set moe.router.top_k to {site.num_experts} or less, or raise moe.num_experts.",
        )
        return HashRouter(self, site)

    def experts_per_token(self, num_experts: int) -> int:  # noqa: D102
        return self.top_k


class HashRouter(Router):
    """Each layer has a table of its own."""

    def __init__(self, config: HashConfig, site: RouterSite):
        super().__init__(site)
        self.config = config

    def init_weights(self, draw: Draw) -> None:
        """There is nothing to fill."""

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> Routing:
        """Pairs in token order, with gates of 1 / K."""
        top_k, num_tokens = self.config.top_k, x_TD.shape[0]
        lottery_TE = hash_columns(ctx.id_T, self.num_experts, (self.config.table_seed, self.layer))
        expert_TK = lottery_TE.sort(dim=1, stable=True).indices[:, :top_k]
        gate_TE = wide(x_TD.new_zeros(num_tokens, self.num_experts)).scatter(1, expert_TK, 1 / top_k)
        gate_N = gate_TE.gather(1, expert_TK).reshape(-1)
        return Routing(
            token_N=torch.arange(num_tokens, device=x_TD.device).repeat_interleave(
                top_k, output_size=num_tokens * top_k
            ),
            expert_N=expert_TK.reshape(-1),
            gate_N=gate_N,
            score_TE=torch.full_like(gate_TE, 1 / top_k),  # any other expert is as good
            logits_TE=torch.zeros_like(gate_TE),
            probs_TE=gate_TE,
            pairs_per_token=top_k,
        )
