"""The experts of transformers' models (OLMoE's), by each implementation that the library offers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moedist.bench.peer.contract import Peer, PulledRouter, WithShared
from moedist.bench.trial import Trial


class Transformers(Peer):
    """One implementation: ``eager`` loops over experts, ``grouped_mm`` multiplies them together."""

    package = "transformers"

    def __init__(self, implementation: str):
        self.implementation = implementation
        self.name = f"transformers_{implementation}"
        self.about = f"OlmoeExperts, experts_implementation={implementation}"

    def why_not(self, trial: Trial) -> str | None:
        """OLMoE's experts are gated."""
        return super().why_not(trial) or (None if trial.shape.gated else "has gated experts only")

    def build(self, trial: Trial) -> nn.Module:  # noqa: D102
        return WithShared(trial, TransformersLayer(trial, self.implementation))


class TransformersLayer(nn.Module):
    """The library's experts behind a plain router."""

    def __init__(self, trial: Trial, implementation: str):
        super().__init__()
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        shape = trial.shape
        config: Any = OlmoeConfig(
            hidden_size=shape.dim,
            intermediate_size=shape.hidden_dim,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = implementation
        self.router = PulledRouter(trial)
        self.experts = OlmoeExperts(config).to(trial.mesh.device, shape.dtype)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(0, parameter.shape[-1] ** -0.5)

    def forward(self, x_TD: Tensor) -> tuple[Tensor]:
        """[T, D] -> [T, D]."""
        weight_TK, expert_TK = self.router(x_TD)
        return (self.experts(x_TD, expert_TK, weight_TK.to(x_TD.dtype)),)


PEERS = [Transformers("eager"), Transformers("batched_mm"), Transformers("grouped_mm")]
