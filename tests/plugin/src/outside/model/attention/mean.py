"""Attention without scores: every position sees the mean of its document up to itself (Zhang et al. 2018)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moedist.model.attention.contract import Attention, AttentionConfig, AttentionContext
from moedist.model.linear import Linear
from moedist.model.norm.contract import NormConfig


@dataclasses.dataclass(frozen=True)
class MeanConfig(AttentionConfig):
    def build(self, dim: int, *, norm: NormConfig, output_scale: float, layer: int = 0, **place: Any) -> Mean:
        return Mean(dim, output_scale, place)


class Mean(Attention):
    def __init__(self, dim: int, output_scale: float, place: dict[str, Any]):
        super().__init__()
        self.value = Linear(dim, dim, **place)
        self.output = Linear(dim, dim, std=output_scale * dim**-0.5, **place)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        length = x_BSD.shape[1]
        sees_BSS = torch.ones(1, length, length, dtype=torch.bool, device=x_BSD.device).tril()
        if context.mask_B1SS is not None:
            sees_BSS = context.mask_B1SS[:, 0]
        weight_BSS = sees_BSS.to(x_BSD.dtype)
        return self.output((weight_BSS / weight_BSS.sum(2, keepdim=True)) @ self.value(x_BSD))

    def score_flops(self, length: int) -> float:
        return 2.0 * self.value.out_features * length / 2
