"""Expert choice: each expert picks its best tokens (Zhou et al. 2022)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.config import require
from moedist.moe.capacity import Limit, exact
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw, fill_xavier_normal
from moedist.moe.router.contract import Router, RouterConfig, RouterSite, Routing, wide


@dataclasses.dataclass(frozen=True)
class ExpertChoiceConfig(RouterConfig):
    """Every expert takes its ``ceil(factor * T / E)`` highest-scoring tokens of a rank's micro-batch.

    The load is even by construction: it has its own capacity (``moe.capacity.factor`` must be null) and needs no
    balance loss. A token may get no expert, or many. Later tokens decide what an earlier one gets, so a causal model
    refuses it.

    Attributes:
        factor: experts per token on average.
    """

    factor: float = 2.0

    def __post_init__(self) -> None:
        require(
            0 < self.factor < 1e6,
            "factor",
            self.factor,
            "is no number of experts per token",
            "Set it above 0; 2 is common.",
        )

    @property
    def causal(self) -> bool:
        """Later tokens compete with earlier ones."""
        return False

    @property
    def has_own_capacity(self) -> bool:
        """Yes: the number of tokens per expert."""
        return True

    def build_at(self, site: RouterSite) -> ExpertChoiceRouter:
        return ExpertChoiceRouter(self, site)

    def experts_per_token(self, num_experts: int) -> int:
        """The average, rounded."""
        return max(1, round(self.factor))


class ExpertChoiceRouter(Router):
    """Scores by one linear map and a softmax over experts.

    Attributes:
        weight: [E, D].
    """

    has_first_choices = False

    def __init__(self, config: ExpertChoiceConfig, site: RouterSite):
        super().__init__(site)
        self.limit = Limit(exact(config.factor), 1)
        self.weight = site.parameter(site.num_experts, site.dim)

    def init_weights(self, draw: Draw) -> None:
        """Xavier normal."""
        fill_xavier_normal(self.weight, draw("weight"))

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> Routing:
        """E * C pairs, expert by expert, each expert's tokens in falling order of score, ties by position."""
        num_tokens, num_experts = x_TD.shape[0], self.weight.shape[0]
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(wide(x_TD), wide(self.weight))
            probs_TE = logits_TE.softmax(dim=1)
        capacity = self.limit.of_shape(num_tokens, 1, num_experts)
        order_TE = probs_TE.detach().masked_fill(~ctx.valid_T[:, None], -1)
        token_EC = order_TE.t().sort(dim=1, descending=True, stable=True).indices[:, :capacity]
        # The shape sets the number of pairs, the valid tokens how many of them count.
        allowed = self.limit.of_counts(ctx.valid_T.sum()[None], 1, num_experts)
        live_EC = (torch.arange(capacity, device=x_TD.device) < allowed).expand(num_experts, capacity)
        token_N = token_EC.reshape(-1)
        expert_N = torch.arange(num_experts, device=x_TD.device).repeat_interleave(
            capacity, output_size=num_experts * capacity
        )
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            gate_N=probs_TE[token_N, expert_N],
            score_TE=probs_TE,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            pairs_per_token=None,
            live_N=live_EC.reshape(-1),
            capacity=capacity,
        )
