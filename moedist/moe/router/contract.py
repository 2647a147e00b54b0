"""What a router proposes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw


@dataclasses.dataclass(frozen=True)
class Routing:
    """Proposed pairs (token, expert, gate). N pairs; K exists only inside a router.

    Token choice gives N = T * K in token order, a token's choices in falling order of preference. Pairs of padding
    tokens stay in place; the plan ignores them.

    Attributes:
        token_N, expert_N: int64.
        gate_N: weight of the expert's output, fp32 or wider, with gradient.
        score_N: the unbiased score of the pair, without gradient: who stays under ``drop_policy: probability``.
        logits_TE: raw, un-noised logits, fp32 or wider, with gradient (z-loss).
        probs_TE: the full distribution over experts, rows sum to 1, with gradient (balance losses).
        pairs_per_token: K where pair ``t * K + k`` is token t's choice k; None where pairs have another order.
    """

    token_N: Tensor
    expert_N: Tensor
    gate_N: Tensor
    score_N: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    pairs_per_token: int | None


class Router(nn.Module):
    """Scores tokens and proposes pairs."""

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> Routing:
        """Proposes pairs for [T, D] vectors; leaves ``x_TD`` as it is."""
        raise NotImplementedError

    def init_weights(self, draw: Draw) -> None:
        """Fills the parameters."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RouterConfig(Choice, path="moe.router"):
    """One way to choose experts."""

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """A router of [*, dim] vectors over ``num_experts``; ``layer`` names its noise.

        Raises:
            ConfigError: the choice does not fit ``num_experts``.
        """
        raise NotImplementedError

    def experts_per_token(self, num_experts: int) -> int:
        """Experts that a token runs through, for counts of active parameters."""
        raise NotImplementedError


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 where it is fp64: scores are never taken in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
