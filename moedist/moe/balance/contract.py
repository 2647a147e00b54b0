"""What keeps experts evenly used: losses on the router, and rules that move a selection bias."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from moedist.config import Choice, ConfigError, require
from moedist.moe.context import TokenContext
from moedist.moe.plan import CapacityPlan
from moedist.moe.report import CountedMass
from moedist.moe.router.contract import Router, Routing

Scope = Literal["global", "micro_batch", "sequence"]


class BalanceLoss(nn.Module):
    """A differentiable loss, in shares that add up over ranks and micro-batches."""

    def __init__(self, config: BalanceLossConfig):
        super().__init__()
        self.config = config

    def count(self, routing: Routing, ctx: TokenContext) -> Tensor | None:
        """What the loss must know of tokens that are not in this micro-batch, as this micro-batch's part of it: sums
        over tokens, without gradient, of one shape on all ranks. The layer adds up the parts of all ranks, and of the
        step's other micro-steps as the config says, and hands them to `forward`. None for nothing.
        """
        return None

    def forward(
        self, routing: Routing, plan: CapacityPlan, ctx: TokenContext, counts: Tensor | None = None
    ) -> Tensor | CountedMass:
        """0-dim, fp32 or wider, without coefficient: this rank's share of the step's value; or, of a loss that is taken
        over all layers together, what this layer adds to it. Called on every rank in every micro-step of training.

        Args:
            counts: of the loss's whole scope; None where that is this micro-batch alone.
        """
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

    def observe(self, router: Router, routing: Routing, ctx: TokenContext) -> Tensor | None:
        """What the rule must know besides the load, of this rank's micro-batch in training: int64 counts of one shape,
        which are added up over the step's micro-steps and all ranks. None for nothing."""
        return None

    def forward(self, bias_E: Tensor, load_E: Tensor, observed: Tensor | None = None) -> Tensor:
        """The bias (fp32 [E]) after an optimizer step, from the counts of the whole global batch.

        Args:
            bias_E: fp32, the bias that the step was routed with.
            load_E: int64 pairs that asked for each expert, before any limit.
            observed: the sum of what `observe` returned.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BalanceConfig(Choice, path="moe.balance"):
    """One way to balance."""

    @property
    def of_all_layers(self) -> bool:
        """Whether it is taken over all MoE layers of a model together, which then have it alike."""
        return False

    def check(self, router: Router) -> None:
        """Raises `ConfigError` where it cannot work with the layer's router (which may be on the meta device)."""

    def build(self, num_experts: int) -> BalanceLoss | BalanceBias:
        """For a layer of ``num_experts``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SelectionBiasConfig(BalanceConfig):
    """A rule for the selection bias."""

    @property
    def finds_whole_bias(self) -> bool:
        """Whether each step's bias is the rule's alone, so that no other rule can stand beside it."""
        return False

    def check(self, router: Router) -> None:
        """The router must have a selection to move."""
        try:
            router.add_selection_bias()
        except ConfigError as error:
            raise ConfigError("kind", self.kind, f"cannot be used: {error.problem}", error.remedy) from None


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

    @property
    def needs_whole_step(self) -> bool:
        """Whether counts of the whole step must be known before its first backward."""
        return False

    def __post_init__(self) -> None:
        for key in ("coefficient", "final_coefficient"):
            value = getattr(self, key)
            require(value is None or value >= 0, key, value, "rewards imbalance", "Set it to 0 (off) or more.")
        require(
            self.coefficient_steps >= 1, "coefficient_steps", self.coefficient_steps, "is no length", "Set 1 or more."
        )


@dataclasses.dataclass(frozen=True)
class ScopedLossConfig(BalanceLossConfig):
    """A loss of a group of tokens, which is no sum of its tokens' losses: products of means do not add up.

    The loss is the mean over groups, weighted by valid tokens; so the coefficient acts alike however a batch is cut.

    Attributes:
        scope: the group: ``global`` (the tokens of all ranks), ``micro_batch`` (one rank's in one micro-step) or
            ``sequence``.
        accumulation: what ``global`` counts where a step has several micro-steps: ``running``, those so far, or
            ``two_pass``, the whole step, counted first by a forward pass without gradient: value and gradient then
            don't depend on how the batch is cut.
    """

    scope: Scope = "global"
    accumulation: Literal["running", "two_pass"] = dataclasses.field(default="running", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.accumulation == "running" or self.scope == "global",
            "accumulation",
            self.accumulation,
            f"counts the whole step, and scope = {self.scope} a part of it",
            "Set it to running, or scope to global.",
        )

    @property
    def needs_whole_step(self) -> bool:
        """See ``accumulation``."""
        return self.accumulation == "two_pass"


def per_token(total: Tensor, ctx: TokenContext) -> Tensor:
    """``total`` / valid tokens of the step's global batch, in the dtype of ``total``; an empty batch divides by 1."""
    return total / ctx.num_tokens.clamp_min(1)
