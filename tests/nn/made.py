"""Layers of unlike modules, and of routings that are given."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from moedist.nn import MoELayer


class Scaled(nn.Module):
    """An expert that is no stack of linear maps, and gives another width than it takes."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__()
        self.norm = nn.LayerNorm(in_features, dtype=dtype)
        self.map = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.map(self.norm(x))) * self.scale


def unlike_experts(count: int, in_features: int = 6, out_features: int = 5, dtype=torch.float64) -> list[nn.Module]:
    """Unlike types and widths inside."""
    makers = itertools.cycle(
        (
            lambda: nn.Linear(in_features, out_features, dtype=dtype),
            lambda: Scaled(in_features, out_features, dtype),
            lambda: nn.Sequential(
                nn.Linear(in_features, 7, dtype=dtype), nn.ReLU(), nn.Linear(7, out_features, dtype=dtype)
            ),
        )
    )
    return [make() for make in itertools.islice(makers, count)]


def layer_of(
    count: int = 4, top_k: int | None = 2, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs
) -> MoELayer:
    torch.manual_seed(seed)
    experts = unlike_experts(count, dtype=dtype)
    return MoELayer(experts, nn.Linear(6, count, dtype=dtype), 6, 5, top_k=top_k, **kwargs)


def vectors(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def modules_of(layer: MoELayer) -> tuple[nn.Module, list[nn.Module]]:
    return layer.moe.router.scorer, list(layer.moe.bank.experts.expert.values())


def given_routing(probs_TE: Tensor, top_k: int | None) -> MoELayer:
    """A layer that routes its one-hot inputs with these probabilities."""
    count = probs_TE.shape[1]
    router = nn.Linear(probs_TE.shape[0], count, bias=False, dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(probs_TE.log().t())
    experts = [nn.Linear(probs_TE.shape[0], 2, dtype=torch.float64) for _ in range(count)]
    return MoELayer(experts, router, probs_TE.shape[0], 2, top_k=top_k, use_aux_loss=True)
