"""A router with a hidden layer and a temperature."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.nn import functional as F

from moedist.config import require
from moedist.moe.init import Draw, Xavier, fill_xavier
from moedist.moe.router.contract import RouterSite, wide
from moedist.moe.token_choice import TokenChoiceConfig, TokenChoiceRouter


@dataclasses.dataclass(frozen=True)
class MLPConfig(TokenChoiceConfig):
    """``logits = (relu(x W1 + b1) W2 + b2) / temperature``.

    Attributes:
        hidden_dim: width between the maps.
        init: first values of the maps; biases start at zero.
        temperature: higher is more uniform, lower sharper; the chosen set does not depend on it.
        final_temperature: its value at ``temperature_steps`` and after, reached on a straight line; None for a
            constant.
        temperature_steps: length of that line in optimizer steps.
    """

    hidden_dim: int = 256
    temperature: float = 1.0
    final_temperature: float | None = None
    temperature_steps: int = 1000
    init: Xavier = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden_dim >= 1, "hidden_dim", self.hidden_dim, "is no width", "Set it to 1 or more.")
        for key in ("temperature", "final_temperature"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "is no temperature", "Set it above 0; 1 changes nothing.")
        require(
            self.temperature_steps >= 1, "temperature_steps", self.temperature_steps, "is no length", "Set 1 or more."
        )

    def build_at(self, site: RouterSite) -> MLPRouter:
        return MLPRouter(self, site)


class MLPRouter(TokenChoiceRouter):
    """Two linear maps with biases, ReLU between.

    Attributes:
        hidden_weight: [H, D]. hidden_bias: [H]. weight: [E, H]. bias: [E].
    """

    config: MLPConfig

    def __init__(self, config: MLPConfig, site: RouterSite):
        super().__init__(config, site)
        self.hidden_weight = site.parameter(config.hidden_dim, site.dim)
        self.hidden_bias = site.parameter(config.hidden_dim)
        self.weight = site.parameter(site.num_experts, config.hidden_dim)
        self.bias = site.parameter(site.num_experts)

    def init_weights(self, draw: Draw) -> None:
        """Maps of standard deviation sqrt(2 / (inputs + outputs)), zero biases."""
        super().init_weights(draw)
        for name in ("hidden_weight", "weight"):
            fill_xavier(getattr(self, name), draw(name), self.config.init)
        nn.init.zeros_(self.hidden_bias)
        nn.init.zeros_(self.bias)

    def logits(self, x_TD: Tensor, step: Tensor) -> Tensor:
        """The maps, then this step's temperature, which reaches here as a tensor: a schedule recompiles nothing."""
        hidden_TH = F.relu(F.linear(x_TD, wide(self.hidden_weight), wide(self.hidden_bias)))
        logits_TE = F.linear(hidden_TH, wide(self.weight), wide(self.bias))
        if self.config.final_temperature is None:
            return logits_TE / self.config.temperature
        share = (step.to(logits_TE.dtype) / self.config.temperature_steps).clamp_max(1)
        change = self.config.final_temperature - self.config.temperature
        return logits_TE / (self.config.temperature + share * change)
