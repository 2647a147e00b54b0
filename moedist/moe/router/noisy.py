"""Noisy top-k gating with learned noise (Shazeer et al. 2017, section 2.1, equations 3 to 5)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.moe.context import TokenContext
from moedist.moe.init import Draw, fill_xavier_normal
from moedist.moe.noise import ROUTER_NOISE, draw_normal
from moedist.moe.router.contract import RouterSite, wide
from moedist.moe.token_choice import TokenChoiceConfig, TokenChoiceRouter


@dataclasses.dataclass(frozen=True)
class NoisyConfig(TokenChoiceConfig):
    """``H(x) = x W + N(0, 1) softplus(x W_noise)`` in training, ``x W`` in evaluation.

    ``noise_std`` is a constant part of the standard deviation, added to the learned one.
    """

    @property
    def draws_noise(self) -> bool:
        """Always: softplus is above 0."""
        return True

    def build_at(self, site: RouterSite) -> NoisyRouter:
        return NoisyRouter(self, site)


class NoisyRouter(TokenChoiceRouter):
    """Two linear maps.

    Attributes:
        weight: [E, D], the logits'. noise_weight: [E, D], the noise's.
    """

    def __init__(self, config: NoisyConfig, site: RouterSite):
        super().__init__(config, site)
        self.weight = site.parameter(site.num_experts, site.dim)
        self.noise_weight = site.parameter(site.num_experts, site.dim)

    def init_weights(self, draw: Draw) -> None:
        """Xavier normal logits; zero noise weights, so that every expert begins with noise of softplus(0) = ln 2.

        (The paper starts both at zero; random logits tell tokens apart from the first step on.)
        """
        super().init_weights(draw)
        fill_xavier_normal(self.weight, draw("weight"))
        nn.init.zeros_(self.noise_weight)

    def logits(self, x_TD: Tensor, step: Tensor) -> Tensor:
        """``x W``."""
        return F.linear(x_TD, wide(self.weight))

    def with_noise(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, Tensor | None]:
        """Noisy logits, and for each expert the probability that another draw of its own noise would choose it."""
        std_TE = F.softplus(F.linear(x_TD, wide(self.noise_weight))) + self.config.noise_std
        normal_TE = draw_normal(ctx, self.num_experts, layer=self.layer, stream=ROUTER_NOISE).to(std_TE.dtype)
        noisy_TE = logits_TE + std_TE * normal_TE
        if self.top_k == self.num_experts:
            return noisy_TE, torch.ones_like(noisy_TE)
        # Equation 9: to be chosen, an expert must beat the K-th greatest of the others.
        sorted_TE = noisy_TE.sort(dim=1, descending=True).values
        last_in_T1, first_out_T1 = sorted_TE[:, self.top_k - 1, None], sorted_TE[:, self.top_k, None]
        threshold_TE = torch.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
        return noisy_TE, torch.special.ndtr((logits_TE - threshold_TE) / std_TE)
