"""A dispatcher that leaves the moving to the packed one and counts the rows that arrive."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from moedist.mesh import Axis
from moedist.moe.dispatch.all_to_all import AllToAllDispatcher
from moedist.moe.dispatch.contract import Arrived, DispatchConfig
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan

ARRIVED: list[int] = []
"""Rows of each dispatch in this process."""


@dataclasses.dataclass(frozen=True)
class CountedConfig(DispatchConfig):
    def build(self, placement: Placement, ep: Axis) -> CountedDispatcher:
        return CountedDispatcher(AllToAllDispatcher(placement, ep))


@dataclasses.dataclass(frozen=True)
class CountedDispatcher:
    inner: AllToAllDispatcher

    def dispatch(self, x_TD: Tensor, plan: CapacityPlan) -> Arrived[Any]:
        arrived = self.inner.dispatch(x_TD, plan)
        ARRIVED.append(arrived.rows.x_RD.shape[0])
        return arrived

    def combine(self, y_RD: Tensor, ticket: Any) -> Tensor:
        return self.inner.combine(y_RD, ticket)
