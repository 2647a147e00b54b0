"""What keeps experts evenly used: losses on the router, and rules that move a selection bias."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moedist.config import Choice, require
from moedist.mesh import Axis
from moedist.moe.context import TokenContext
from moedist.moe.plan import CapacityPlan
from moedist.moe.router.contract import Router, Routing


class BalanceLoss(nn.Module):
    """A differentiable loss, in shares that add up over ranks and micro-batches.

    Attributes:
        dp: the data-parallel axis, for losses that look at the tokens of all ranks.
    """

    def __init__(self, config: BalanceLossConfig):
        super().__init__()
        self.config = config
        self.dp = Axis("dp")

    def forward(self, routing: Routing, plan: CapacityPlan, ctx: TokenContext) -> Tensor:
        """0-dim, fp32 or wider, without coefficient: this rank's share of the step's value. Called on every rank in
        every micro-step of training, so it may hold collectives over ``dp``."""
        raise NotImplementedError

    def coefficient(self, ctx: TokenContext) -> Tensor:
        """0-dim fp64 (0.3 in fp32 is not 0.3): the coefficient of this step."""
        first, last = self.config.coefficient, self.config.final_coefficient
        at_first = torch.full((), first, dtype=torch.float64, device=ctx.step.device)
        if last is None:
            return at_first
        return at_first + (last - first) * (ctx.step.double() / self.config.coefficient_steps).clamp_max(1)


class BalanceBias(nn.Module):
    """A rule for the router's selection bias; no loss, no gradient."""

    def forward(self, bias_E: Tensor, load_E: Tensor) -> Tensor:
        """The bias (fp32 [E]) after an optimizer step in which the whole global batch asked for ``load_E`` (int64)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BalanceConfig(Choice, path="moe.balance"):
    """One way to balance."""

    def check(self, router: Router) -> None:
        """Raises `ConfigError` where it cannot work with the layer's router (which may be on the meta device)."""

    def build(self, num_experts: int) -> BalanceLoss | BalanceBias:
        """For a layer of ``num_experts``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BalanceLossConfig(BalanceConfig):
    """A loss and its weight.

    Attributes:
        coefficient: what the loss is multiplied by, once, before it joins the task loss.
        final_coefficient: its value from step ``coefficient_steps`` on, reached on a straight line; None for a
            constant.
        coefficient_steps: length of that line in optimizer steps.
    """

    coefficient: float = 0.0
    final_coefficient: float | None = dataclasses.field(default=None, kw_only=True)
    coefficient_steps: int = dataclasses.field(default=1000, kw_only=True)

    def __post_init__(self) -> None:
        for key in ("coefficient", "final_coefficient"):
            value = getattr(self, key)
            require(value is None or value >= 0, key, value, "rewards imbalance", "Set it to 0 (off) or more.")
        require(
            self.coefficient_steps >= 1, "coefficient_steps", self.coefficient_steps, "is no length", "Set 1 or more."
        )


def per_token(total: Tensor, ctx: TokenContext) -> Tensor:
    """``total`` / valid tokens of the step's global batch, in the dtype of ``total``; an empty batch divides by 1."""
    return total / ctx.num_tokens.clamp_min(1)
