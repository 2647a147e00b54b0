"""Top-k token choice with softmax scores (Shazeer et al. 2017; Switch, Fedus et al. 2022)."""

from __future__ import annotations

import dataclasses
import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.config import require
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw
from moedist.moe.noise import ROUTER_NOISE, draw_normal
from moedist.moe.router.contract import Router, RouterConfig, Routing, wide

EPS = 1e-20


@dataclasses.dataclass(frozen=True)
class TopKConfig(RouterConfig):
    """Each token picks its ``top_k`` most probable experts; equal scores go to the lowest expert index.

    Attributes:
        top_k: experts per token (K).
        noise_std: standard deviation of gaussian noise on the logits, in training only; 0 for none.
        renormalize: whether a token's gates sum to 1. None: yes for K >= 2, no for K = 1, where a renormalised gate is
            the constant 1 and the router would get no gradient from the task (Switch keeps the probability).
    """

    top_k: int = 2
    noise_std: float = 0.0
    renormalize: bool | None = None

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "top_k", self.top_k, "picks no expert", "Set it to 1 or more.")
        require(self.noise_std >= 0, "noise_std", self.noise_std, "is negative", "Set it to 0 (none) or more.")
        if self.top_k == 1 and self.renormalize:
            warnings.warn(
                "moe.router.renormalize = True with top_k = 1 makes every gate the constant 1: the router learns from "
                "the balance losses only. Leave renormalize at null to keep the probability as the gate.",
                stacklevel=2,
            )

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TopKRouter:
        require(
            self.top_k <= num_experts,
            "top_k",
            self.top_k,
            f"is more than the {num_experts} experts",
            f"Set moe.router.top_k to {num_experts} or less, or raise moe.num_experts.",
        )
        return TopKRouter(self, dim, num_experts, layer, device, dtype)

    def experts_per_token(self, num_experts: int) -> int:  # noqa: D102
        return self.top_k


class TopKRouter(Router):
    """Linear scores without bias, softmax over all experts, the K best of each token.

    Attributes:
        weight: [E, D].
    """

    def __init__(
        self,
        config: TopKConfig,
        dim: int,
        num_experts: int,
        layer: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.config, self.layer = config, layer
        self.renormalize = config.top_k > 1 if config.renormalize is None else config.renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))

    def init_weights(self, draw: Draw) -> None:
        """Xavier normal: standard deviation sqrt(2 / (D + E))."""
        weight = torch.empty(self.weight.shape).normal_(
            0, math.sqrt(2 / sum(self.weight.shape)), generator=draw("weight")
        )
        with torch.no_grad():
            self.weight.copy_(weight)

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> Routing:
        """Pairs in token order, each token's experts in falling order of score."""
        top_k, num_tokens = self.config.top_k, x_TD.shape[0]
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(wide(x_TD), wide(self.weight))
            noisy_TE = logits_TE
            if self.config.noise_std > 0 and ctx.training:
                noise_TE = draw_normal(ctx, logits_TE.shape[1], layer=self.layer, stream=ROUTER_NOISE)
                noisy_TE = logits_TE + self.config.noise_std * noise_TE.to(logits_TE.dtype)
            probs_TE = noisy_TE.softmax(dim=1)
            # A stable sort, because torch.topk breaks ties as it likes. Sorting logits keeps apart what softmax rounds
            # to one value.
            expert_TK = noisy_TE.detach().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
            score_TK = probs_TE.gather(1, expert_TK)
            gate_TK = score_TK
            if self.renormalize:
                gate_TK = score_TK / score_TK.sum(dim=1, keepdim=True).clamp_min(EPS)
        return Routing(
            token_N=torch.arange(num_tokens, device=x_TD.device).repeat_interleave(
                top_k, output_size=num_tokens * top_k
            ),
            expert_N=expert_TK.reshape(-1),
            gate_N=gate_TK.reshape(-1),
            score_N=score_TK.detach().reshape(-1),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            pairs_per_token=top_k,
        )
