"""Cosine routing on a small hypersphere (X-MoE, Chi et al. 2022, section 3.2)."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor, nn
from torch.nn import functional as F

from moedist.config import require
from moedist.moe.init import Draw, fill_xavier_normal
from moedist.moe.router.contract import RouterSite, wide
from moedist.moe.token_choice import TokenChoiceConfig, TokenChoiceRouter

LARGEST_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class CosineConfig(TokenChoiceConfig):
    """``logits = cos(x W, e) / temperature`` with a learned temperature: no expert can win by the length of its vector.

    Attributes:
        projection_dim: width of the sphere's space; None for half the number of experts (the paper), at least 2.
        temperature: the first value; learned from then on, and never below 1 / 100.
    """

    projection_dim: int | None = None
    temperature: float = 0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.projection_dim is None or self.projection_dim >= 1,
            "projection_dim",
            self.projection_dim,
            "is no width",
            "Set it to 1 or more, or to null for half the number of experts.",
        )
        require(
            self.temperature >= 1 / LARGEST_SCALE,
            "temperature",
            self.temperature,
            f"is below {1 / LARGEST_SCALE}",
            "Set it higher; the paper starts at 0.07.",
        )

    def build_at(self, site: RouterSite) -> CosineRouter:
        return CosineRouter(self, site)


class CosineRouter(TokenChoiceRouter):
    """A projection, experts' directions, and a scale.

    Attributes:
        projection: [P, D]. weight: [E, P]. log_scale: 0-dim, the logarithm of 1 / temperature.
    """

    def __init__(self, config: CosineConfig, site: RouterSite):
        super().__init__(config, site)
        self.temperature = config.temperature
        width = config.projection_dim or max(2, site.num_experts // 2)
        self.projection = site.parameter(width, site.dim)
        self.weight = site.parameter(site.num_experts, width)
        self.log_scale = site.parameter()

    def init_weights(self, draw: Draw) -> None:
        """Xavier normal maps."""
        super().init_weights(draw)
        fill_xavier_normal(self.projection, draw("projection"))
        fill_xavier_normal(self.weight, draw("weight"))
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def logits(self, x_TD: Tensor, step: Tensor) -> Tensor:
        """Cosines times the scale."""
        point_TP = F.normalize(F.linear(x_TD, wide(self.projection)), dim=1)
        expert_EP = F.normalize(wide(self.weight), dim=1)
        return F.linear(point_TP, expert_EP) * wide(self.log_scale).clamp_max(math.log(LARGEST_SCALE)).exp()
