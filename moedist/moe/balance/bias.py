"""Loss-free balancing: a selection bias that follows the load (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from moedist.config import require
from moedist.moe.balance.contract import BalanceBias, SelectionBiasConfig


@dataclasses.dataclass(frozen=True)
class BiasConfig(SelectionBiasConfig):
    """Once per optimizer step ``bias += rate * sign(mean load - load)``, then centred on 0.

    The counts are those of the whole global batch, before any limit, in int64; evaluation moves nothing.

    Attributes:
        rate: size of a step.
        update: ``sign`` (the paper), or ``proportional``: ``rate * (mean load - load) / mean load``.
    """

    rate: float = 1e-3
    update: Literal["sign", "proportional"] = "sign"

    def __post_init__(self) -> None:
        require(self.rate > 0, "rate", self.rate, "moves nothing", "Set it above 0; 1e-3 is common.")

    def build(self, num_experts: int) -> BiasRule:  # noqa: D102
        return BiasRule(self)


class BiasRule(BalanceBias):
    """The update."""

    def __init__(self, config: BiasConfig):
        super().__init__()
        self.config = config

    def forward(self, bias_E: Tensor, load_E: Tensor, observed: Tensor | None = None) -> Tensor:
        """fp32 [E]."""
        # Integers: mean - load has the sign of total - E * load, which no rounding can flip.
        error_E = load_E.sum() - load_E.shape[0] * load_E
        if self.config.update == "sign":
            change_E = error_E.sign().to(bias_E.dtype)
        else:
            change_E = (error_E.double() / load_E.sum().clamp_min(1)).to(bias_E.dtype)
        moved_E = bias_E + self.config.rate * change_E
        return moved_E - moved_E.mean()
