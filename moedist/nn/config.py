"""A layer of equal experts, described by numbers."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from moedist.config import Config, require


@dataclasses.dataclass(frozen=True)
class MoELayerConfig(Config):
    """A layer of equal experts ``Linear -> activation -> Linear`` behind a linear router.

    >>> MoELayerConfig(in_features=4).expert()[2]
    Linear(in_features=16, out_features=4, bias=True)

    Attributes:
        num_experts: 2 or more.
        in_features, out_features: widths of the layer; ``out_features`` None for ``in_features``.
        hidden_features: width inside of each expert; None for ``expansion * in_features``.
        expansion: 1 or more.
        activation: of each expert: ``relu``, ``gelu`` or ``silu``.
        top_k: experts per token; 0 or None for all.
        use_aux_loss, aux_loss_weight: see `MoELayer`.
    """

    num_experts: int = 4
    in_features: int = 128
    out_features: int | None = None
    hidden_features: int | None = None
    expansion: float = 4.0
    activation: str = "relu"
    top_k: int | None = None
    use_aux_loss: bool = True
    aux_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        require(self.num_experts >= 2, "num_experts", self.num_experts, "leaves nothing to choose", "Set 2 or more.")
        for key in ("in_features", "out_features", "hidden_features"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "is no width", "Set it to 1 or more.")
        require(self.expansion >= 1, "expansion", self.expansion, "is below 1", "Set it to 1 or more; 4 is common.")
        require(
            self.activation in ACTIVATIONS,
            "activation",
            self.activation,
            "is not known",
            f"Choose one of {', '.join(ACTIVATIONS)}.",
        )
        require(
            self.top_k is None or 0 <= self.top_k <= self.num_experts,
            "top_k",
            self.top_k,
            f"is outside of 0 to {self.num_experts}",
            "Set 1 to num_experts, or 0 for all experts.",
        )
        require(self.aux_loss_weight >= 0, "aux_loss_weight", self.aux_loss_weight, "is negative", "Set 0 or more.")

    def expert(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """One expert, with torch's own first values."""
        hidden = self.hidden_features or int(self.expansion * self.in_features)
        return nn.Sequential(
            nn.Linear(self.in_features, hidden, device=device, dtype=dtype),
            ACTIVATIONS[self.activation](),
            nn.Linear(hidden, self.out_features or self.in_features, device=device, dtype=dtype),
        )


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
