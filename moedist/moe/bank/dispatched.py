"""Rows move to weights: experts sharded over ranks, tokens sent to them and their outputs sent back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.mesh import Axis
from moedist.moe.bank.contract import Bank, BankConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.experts.contract import Experts
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan


@dataclasses.dataclass(frozen=True)
class DispatchedConfig(BankConfig):
    """Dispatch, experts, combine; on one device the same without the exchange."""

    def build(self, experts: Experts, dispatch: DispatchConfig) -> DispatchedBank:  # noqa: D102
        return DispatchedBank(experts, dispatch)


class DispatchedBank(Bank):
    """The expert-parallel bank."""

    def __init__(self, experts: Experts, dispatch: DispatchConfig):
        super().__init__()
        self.experts, self.dispatch = experts, dispatch
        self.static, self.may_spill = dispatch.static, dispatch.may_spill
        self.placement, self.ep = Placement.in_order(len(experts.expert_ids), 1), Axis("ep")
        self.dispatcher = dispatch.build(self.placement, self.ep)

    def forward(self, x_TD: Tensor, plan: CapacityPlan) -> Tensor:
        """[T, D] -> [T, D]."""
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):  # before the exchange, so that rows travel in the narrow type
            x_TD = x_TD.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            arrived = self.dispatcher.dispatch(x_TD, plan)
            y_RD = self.experts(arrived.rows)
            return self.dispatcher.combine(y_RD, arrived.ticket)

    def spilled(self, plan: CapacityPlan) -> Tensor | None:
        """The dispatcher's."""
        return self.dispatch.spilled(plan, self.placement) if self.may_spill and plan.may_spill else None

    def spread(self, placement: Placement, ep: Axis) -> None:
        """Keeps this rank's experts and moves rows over ``ep``."""
        self.experts.keep(placement.expert_ids[ep.rank])
        self.placement, self.ep = placement, ep
        self.dispatcher = self.dispatch.build(placement, ep)
