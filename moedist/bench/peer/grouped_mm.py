"""What one writes with torch alone: sort the pairs, `torch.nn.functional.grouped_mm`, add up. No ranks, no limit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.bench.peer.contract import Peer, PulledRouter, WithShared
from moedist.bench.trial import Trial


class GroupedMM(Peer):
    """The plainest layer with grouped products."""

    name = "grouped_mm"
    about = "index_select, F.grouped_mm, silu, mul, index_add"

    def build(self, trial: Trial) -> nn.Module:  # noqa: D102
        return WithShared(trial, GroupedMMLayer(trial))


class StackedWeights(nn.Module):
    """[e, D, F] and [e, F, D] for grouped products."""

    def __init__(self, trial: Trial, num_local: int):
        super().__init__()
        shape = trial.shape

        def stack(width: int, out: int) -> nn.Parameter:
            value = torch.empty(num_local, width, out, device=trial.mesh.device, dtype=shape.dtype)
            return nn.Parameter(value.normal_(0, width**-0.5))

        self.up = stack(shape.dim, shape.hidden_dim)
        self.gate = stack(shape.dim, shape.hidden_dim) if shape.gated else None
        self.down = stack(shape.hidden_dim, shape.dim)

    def forward(self, x_RD: Tensor, ends_e: Tensor) -> Tensor:
        """Rows in the order of experts, which end at ``ends_e``."""
        up = F.grouped_mm(x_RD, self.up, offs=ends_e)
        hidden = F.gelu(up) if self.gate is None else F.silu(F.grouped_mm(x_RD, self.gate, offs=ends_e)) * up
        return F.grouped_mm(hidden, self.down, offs=ends_e)


class GroupedMMLayer(nn.Module):
    """Router and experts on one device."""

    def __init__(self, trial: Trial):
        super().__init__()
        self.num_experts, self.top_k = trial.shape.num_experts, trial.shape.top_k
        self.router, self.experts = PulledRouter(trial), StackedWeights(trial, self.num_experts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor]:
        """[T, D] -> [T, D]."""
        weight_TK, expert_TK = self.router(x_TD)
        order_R = expert_TK.view(-1).argsort()
        token_R = order_R // self.top_k
        ends_E = torch.bincount(expert_TK.view(-1), minlength=self.num_experts).cumsum(0).to(torch.int32)
        y_RD = self.experts(x_TD.index_select(0, token_R), ends_E)
        y_RD = y_RD * weight_TK.view(-1)[order_R, None].to(y_RD.dtype)
        return (torch.zeros_like(x_TD).index_add(0, token_R, y_RD),)


PEERS = [GroupedMM()]
