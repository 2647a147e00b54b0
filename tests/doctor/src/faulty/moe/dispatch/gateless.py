"""A dispatcher that sends the gates without their gradient: the router learns nothing from the task."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from moedist.mesh import Axis
from moedist.moe.dispatch.all_to_all import AllToAllDispatcher
from moedist.moe.dispatch.contract import Arrived, DispatchConfig
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan


@dataclasses.dataclass(frozen=True)
class GatelessConfig(DispatchConfig):
    def build(self, placement: Placement, ep: Axis) -> GatelessDispatcher:
        return GatelessDispatcher(AllToAllDispatcher(placement, ep))


@dataclasses.dataclass(frozen=True)
class GatelessDispatcher:
    inner: AllToAllDispatcher

    def dispatch(self, x_TD: Tensor, plan: CapacityPlan) -> Arrived[Any]:
        return self.inner.dispatch(x_TD, dataclasses.replace(plan, gate_N=plan.gate_N.detach()))

    def combine(self, y_RD: Tensor, ticket: Any) -> Tensor:
        return self.inner.combine(y_RD, ticket)
