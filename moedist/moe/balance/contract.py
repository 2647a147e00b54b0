"""What keeps experts evenly used: losses on the router, each a share that adds up over ranks and micro-batches."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from moedist.config import Choice, require
from moedist.mesh import Axis
from moedist.moe.context import TokenContext
from moedist.moe.plan import CapacityPlan
from moedist.moe.router.contract import Routing


class BalanceLoss(nn.Module):
    """One loss.

    Attributes:
        dp: the data-parallel axis, for losses that look at the tokens of all ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dp = Axis("dp")

    def forward(self, routing: Routing, plan: CapacityPlan, ctx: TokenContext) -> Tensor:
        """0-dim, fp32 or wider, without coefficient: this rank's share of the step's value. Called on every rank in
        every micro-step of training, so it may hold collectives over ``dp``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BalanceConfig(Choice, path="moe.balance"):
    """One loss and its weight.

    Attributes:
        coefficient: what the loss is multiplied by, once, before it joins the task loss.
    """

    coefficient: float

    def __post_init__(self) -> None:
        require(
            self.coefficient >= 0, "coefficient", self.coefficient, "rewards imbalance", "Set it to 0 (off) or more."
        )

    def build(self, num_experts: int) -> BalanceLoss:
        """The loss for a layer of ``num_experts``."""
        raise NotImplementedError


def per_token(total: Tensor, ctx: TokenContext) -> Tensor:
    """``total`` / valid tokens of the step's global batch, in the dtype of ``total``; an empty batch divides by 1."""
    return total / ctx.num_tokens.clamp_min(1)
