"""A balance loss that says it counts over all ranks and counts its own rank's pairs."""

from __future__ import annotations

import dataclasses

from moedist.moe.balance.contract import BalanceLossConfig
from moedist.moe.balance.switch import SwitchConfig, SwitchLoss


@dataclasses.dataclass(frozen=True)
class OwnRanksConfig(BalanceLossConfig):
    coefficient: float = 0.1
    scope: str = "global"

    def build(self, num_experts: int) -> SwitchLoss:
        return SwitchLoss(SwitchConfig(self.coefficient, "micro_batch"), num_experts)
