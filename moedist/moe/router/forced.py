"""Forced routing for benchmarks and debugging: a chosen load instead of a learned one."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from moedist.config import require
from moedist.moe.context import TokenContext
from moedist.moe.noise import FORCED, draw_uniform
from moedist.moe.router.contract import Router, RouterSite
from moedist.moe.router.topk import TopKConfig, TopKRouter


@dataclasses.dataclass(frozen=True)
class ForcedConfig(TopKConfig):
    """Experts by a pattern, gates by the learned scores, so that the work and the gradients are those of training.

    Every log line and record of such a run says so.

    Attributes:
        pattern: ``balanced`` (experts in turn), ``zipf`` (expert i is drawn with probability ~ 1 / (i + 1) **
            exponent) or ``one_empty`` (balanced over all experts but the last, which gets nothing).
        exponent: of ``zipf``.
    """

    pattern: Literal["balanced", "zipf", "one_empty"] = "balanced"
    exponent: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.exponent >= 0, "exponent", self.exponent, "is negative", "Set it to 0 (even) or more.")
        require(self.groups is None, "groups", self.groups, "does not go with a forced pattern", "Set it to null.")

    @property
    def label(self) -> str:
        """Named in every log line."""
        return f"forced {self.pattern}"

    @property
    def draws_noise(self) -> bool:
        """With ``zipf``, whose pattern is drawn."""
        return self.pattern == "zipf" or super().draws_noise

    def check(self, num_experts: int) -> None:  # noqa: D102
        super().check(num_experts)
        require(
            self.pattern != "one_empty" or self.experts_per_token(num_experts) < num_experts,
            "pattern",
            self.pattern,
            f"leaves {num_experts - 1} experts for top_k = {self.top_k}",
            "Set top_k lower, or moe.num_experts higher.",
        )

    def build_at(self, site: RouterSite) -> ForcedRouter:
        return ForcedRouter(self, site)


class ForcedRouter(TopKRouter):
    """The linear map of `topk`, a selection that does not look at it."""

    config: ForcedConfig

    def add_selection_bias(self) -> None:
        """Refused: the pattern selects."""
        Router.add_selection_bias(self)

    def selection_order(self, logits_TE: Tensor, score_TE: Tensor, ctx: TokenContext) -> Tensor:
        """Higher for the experts that the pattern wants."""
        num_experts = logits_TE.shape[1]
        if self.config.pattern == "zipf":
            # Gumbel's trick: the K largest of log p - log(-log u) are K draws without replacement.
            uniform_TE = draw_uniform(ctx, num_experts, layer=self.layer, stream=FORCED)
            rank_E = torch.arange(1, num_experts + 1, device=logits_TE.device, dtype=torch.float64)
            return -self.config.exponent * rank_E.log() - (-uniform_TE.log()).log()
        num_used = num_experts - (self.config.pattern == "one_empty")
        first_T = (ctx.valid_T.cumsum(0) - 1) * self.top_k  # padding takes no turn
        expert_E = torch.arange(num_experts, device=logits_TE.device)
        turn_TE = (expert_E - first_T[:, None]) % num_used
        return torch.where(expert_E < num_used, -turn_TE, -num_experts)
