"""All experts on this device, no rows moved between ranks: the plain twin of the dispatched bank."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.config import require
from moedist.mesh import Axis
from moedist.moe.bank.contract import Bank, BankConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.dispatch.wire import Wire, rounded
from moedist.moe.experts.contract import Experts, Rows
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan


@dataclasses.dataclass(frozen=True)
class LocalConfig(BankConfig):
    """Indexing and torch's own gradients; no dispatcher. The oracle of every parity test."""

    def check_spread(self, ep: int) -> None:  # noqa: D102
        require(
            ep == 1,
            "kind",
            "local",
            f"keeps all experts on every rank and cannot be spread over {ep}",
            "Set moe.bank.kind to dispatched, or mesh.ep to 1.",
        )

    def build(self, experts: Experts, dispatch: DispatchConfig) -> LocalBank:  # noqa: D102
        return LocalBank(self, experts, dispatch.wire)


class LocalBank(Bank):
    """Kept pairs sorted by expert, one gather, one scatter-add; rows are rounded as if they had travelled."""

    def __init__(self, config: LocalConfig, experts: Experts, wire: Wire):
        super().__init__()
        self.config, self.experts, self.wire = config, experts, wire
        self.placement, self.ep = Placement.in_order(len(experts.expert_ids), 1), Axis("ep")

    def forward(self, x_TD: Tensor, plan: CapacityPlan) -> Tensor:
        """[T, D] -> [T, D]."""
        kept = (plan.slot_N >= 0).nonzero()[:, 0]
        place = plan.expert_N[kept] * (plan.slot_N.numel() + 1) + plan.slot_N[kept]
        pair_R = kept[place.argsort()]
        token_R = plan.token_N[pair_R]
        rows = Rows(
            x_RD=rounded(x_TD[token_R], self.wire),
            gate_R=plan.gate_N[pair_R],
            sizes=tuple(plan.kept_E.tolist()),
            ends_e=plan.kept_E.cumsum(0).to(torch.int32),
        )
        y_RD = rounded(self.experts(rows).to(x_TD.dtype), self.wire)
        return y_RD.new_zeros(x_TD.shape[0], y_RD.shape[1]).index_add(0, token_R, y_RD)

    def spread(self, placement: Placement, ep: Axis) -> None:
        """Only over one rank."""
        self.config.check_spread(ep.size)
