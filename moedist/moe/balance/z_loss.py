"""The router z-loss of ST-MoE (Zoph et al. 2022, equation 5)."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from moedist.moe.balance.contract import BalanceLoss, BalanceLossConfig, per_token
from moedist.moe.context import TokenContext
from moedist.moe.plan import CapacityPlan
from moedist.moe.router.contract import Routing


@dataclasses.dataclass(frozen=True)
class ZLossConfig(BalanceLossConfig):
    """Mean over tokens of ``logsumexp(logits) ** 2``, on un-noised logits: keeps them small, where softmax is exact."""

    coefficient: float = 0.001

    def build(self, num_experts: int) -> ZLoss:  # noqa: D102
        return ZLoss(self)


class ZLoss(BalanceLoss):
    """The loss of one layer."""

    def forward(self, routing: Routing, plan: CapacityPlan, ctx: TokenContext, counts: Tensor | None = None) -> Tensor:
        """``1 / T sum_t logsumexp(logits_t) ** 2``."""
        squared_T = routing.logits_TE.logsumexp(1).square()
        return per_token(squared_T.masked_fill(~ctx.valid_T, 0).sum(), ctx)
