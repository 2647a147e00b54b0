"""A bank that runs its tokens in two halves, one exchange each: less memory at once, the same sums."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.moe.bank.contract import BankConfig
from moedist.moe.bank.dispatched import DispatchedBank
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.experts.contract import Experts
from moedist.moe.plan import CapacityPlan, fill_buckets


@dataclasses.dataclass(frozen=True)
class HalvedConfig(BankConfig):
    def build(self, experts: Experts, dispatch: DispatchConfig) -> HalvedBank:
        return HalvedBank(experts, dispatch)


class HalvedBank(DispatchedBank):
    def forward(self, x_TD: Tensor, plan: CapacityPlan) -> Tensor:
        early_N = plan.token_N < x_TD.shape[0] // 2
        return sum(super(HalvedBank, self).forward(x_TD, part(plan, here_N)) for here_N in (early_N, ~early_N))


def part(plan: CapacityPlan, here_N: Tensor) -> CapacityPlan:
    """The plan of some of the pairs; the others stand in it as dropped."""
    stays_N = here_N & (plan.slot_N >= 0)
    slot_N, kept_E = fill_buckets(torch.where(stays_N, plan.expert_N, -1), plan.kept_E.shape[0], None)
    return dataclasses.replace(plan, gate_N=torch.where(stays_N, plan.gate_N, 0), slot_N=slot_N, kept_E=kept_E)
