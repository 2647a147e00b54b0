"""Top-k token choice by one linear map (Shazeer et al. 2017; Switch, Fedus et al. 2022; DeepSeek-V3, 2024)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.moe.init import Draw, fill_xavier_normal
from moedist.moe.router.contract import wide
from moedist.moe.token_choice import TokenChoiceConfig, TokenChoiceRouter


@dataclasses.dataclass(frozen=True)
class TopKConfig(TokenChoiceConfig):
    """``logits = x W``.

    Attributes:
        bias: whether the map has a learned bias.
    """

    bias: bool = False

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TopKRouter:
        return TopKRouter(self, dim, num_experts, layer, device, dtype)


class TopKRouter(TokenChoiceRouter):
    """One linear map.

    Attributes:
        weight: [E, D]. bias: [E], with ``bias`` only.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        config: TopKConfig,
        dim: int,
        num_experts: int,
        layer: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__(config, num_experts, layer)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if config.bias else None
        )

    def init_weights(self, draw: Draw) -> None:
        """Xavier normal, standard deviation sqrt(2 / (D + E)); zero bias."""
        super().init_weights(draw)
        fill_xavier_normal(self.weight, draw("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x_TD: Tensor, step: Tensor) -> Tensor:
        """``x W + b``."""
        return F.linear(x_TD, wide(self.weight), None if self.bias is None else wide(self.bias))
