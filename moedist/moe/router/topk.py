"""Top-k token choice by one linear map (Shazeer et al. 2017; Switch, Fedus et al. 2022; DeepSeek-V3, 2024)."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.nn import functional as F

from moedist.moe.init import Draw, Xavier, fill_xavier
from moedist.moe.router.contract import RouterSite, wide
from moedist.moe.token_choice import TokenChoiceConfig, TokenChoiceRouter


@dataclasses.dataclass(frozen=True)
class TopKConfig(TokenChoiceConfig):
    """``logits = x W``.

    Attributes:
        bias: whether the map has a learned bias.
        init: first values of the map; a bias starts at zero.
    """

    bias: bool = False
    init: Xavier = "xavier_normal"

    def build_at(self, site: RouterSite) -> TopKRouter:
        return TopKRouter(self, site)


class TopKRouter(TokenChoiceRouter):
    """One linear map.

    Attributes:
        weight: [E, D]. bias: [E], with ``bias`` only.
    """

    config: TopKConfig
    bias: nn.Parameter | None

    def __init__(self, config: TopKConfig, site: RouterSite):
        super().__init__(config, site)
        self.weight = site.parameter(site.num_experts, site.dim)
        self.register_parameter("bias", site.parameter(site.num_experts) if config.bias else None)

    def init_weights(self, draw: Draw) -> None:
        """Standard deviation sqrt(2 / (D + E)); zero bias."""
        super().init_weights(draw)
        fill_xavier(self.weight, draw("weight"), self.config.init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x_TD: Tensor, step: Tensor) -> Tensor:
        """``x W + b``."""
        return F.linear(x_TD, wide(self.weight), None if self.bias is None else wide(self.bias))
