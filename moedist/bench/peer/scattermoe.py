"""ScatterMoE's experts behind a plain router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moedist.bench.peer.contract import Peer, PulledRouter, WithShared
from moedist.bench.trial import Trial


class ScatterMoE(Peer):
    """Triton kernels that scatter rows inside the product."""

    name = package = "scattermoe"
    needs_cuda = True
    about = "scattermoe.mlp"

    def build(self, trial: Trial) -> nn.Module:  # noqa: D102
        return WithShared(trial, ScatterMoELayer(trial))


class ScatterMoELayer(nn.Module):
    """``GLUMLP`` or ``MLP`` of the library."""

    def __init__(self, trial: Trial):
        super().__init__()
        from scattermoe.mlp import GLUMLP, MLP

        shape = trial.shape
        kind, activation = (GLUMLP, nn.SiLU()) if shape.gated else (MLP, nn.GELU())
        self.router = PulledRouter(trial)
        self.experts = kind(shape.dim, shape.hidden_dim, shape.num_experts, shape.top_k, activation=activation)
        self.experts.to(trial.mesh.device, shape.dtype)

    def forward(self, x_TD: Tensor) -> tuple[Tensor]:
        """[T, D] -> [T, D]."""
        weight_TK, expert_TK = self.router(x_TD)
        out_TD: Tensor = self.experts(x_TD, weight_TK.to(x_TD.dtype), expert_TK.to(torch.int64))
        return (out_TD,)


PEERS = [ScatterMoE()]
