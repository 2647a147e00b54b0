"""A layer in torchtitan's manner, written here after its description: pairs sorted by expert, counts and rows exchanged
by all-to-all, grouped products, the way back, scores applied to outputs. Dropless."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moedist.bench.peer.contract import Peer, PulledRouter, WithShared
from moedist.bench.peer.grouped_mm import StackedWeights
from moedist.bench.trial import Trial
from moedist.mesh import Axis
from moedist.mesh.collectives import all_to_all


class TorchtitanLike(Peer):
    """Its structure, not its code."""

    name = "torchtitan_like"
    spreads = True
    about = "a reference in its manner, written here: sort, all_to_all, grouped_mm, scatter_add"

    def build(self, trial: Trial) -> nn.Module:  # noqa: D102
        return WithShared(trial, TorchtitanLikeLayer(trial))


class Exchanged(torch.autograd.Function):
    """An all-to-all with a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return all_to_all(rows, axis, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(grad.contiguous(), ctx.axis, ctx.receive, ctx.send), None, None, None


class TorchtitanLikeLayer(nn.Module):
    """Router and this rank's experts."""

    def __init__(self, trial: Trial):
        super().__init__()
        self.num_experts, self.top_k, self.ep = trial.shape.num_experts, trial.shape.top_k, trial.mesh.ep
        self.num_local = self.num_experts // self.ep.size
        self.router, self.experts = PulledRouter(trial), StackedWeights(trial, self.num_local)

    def forward(self, x_TD: Tensor) -> tuple[Tensor]:
        """[T, D] -> [T, D]."""
        weight_TK, expert_TK = self.router(x_TD)
        order_R = expert_TK.view(-1).argsort(stable=True)
        token_R = order_R // self.top_k
        sent_E = torch.bincount(expert_TK.view(-1), minlength=self.num_experts)
        sent_We = sent_E.view(self.ep.size, -1)
        arriving_We = all_to_all(sent_E, self.ep).view(self.ep.size, -1)
        send, receive = sent_We.sum(1).tolist(), arriving_We.sum(1).tolist()

        x_RD = Exchanged.apply(x_TD.index_select(0, token_R), self.ep, send, receive)
        local = torch.arange(self.num_local, device=x_TD.device).repeat(self.ep.size)
        by_expert = local.repeat_interleave(arriving_We.view(-1)).argsort(stable=True)
        y_RD = self.experts(x_RD[by_expert], arriving_We.sum(0).cumsum(0).to(torch.int32))
        back_RD = torch.empty_like(y_RD).index_copy(0, by_expert, y_RD)
        y_RD = Exchanged.apply(back_RD, self.ep, receive, send)
        y_RD = (y_RD.float() * weight_TK.view(-1)[order_R, None]).to(x_TD.dtype)
        return (torch.zeros_like(x_TD).scatter_add(0, token_R[:, None].expand_as(y_RD), y_RD),)


PEERS = [TorchtitanLike()]
