"""Experts whose down-projection gets half of its gradient, as if it were averaged over two ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moedist.moe.experts.loop import LoopExperts
from moedist.moe.ffn import FFNExpertsConfig


@dataclasses.dataclass(frozen=True)
class HalvedConfig(FFNExpertsConfig):
    def build(self, dim: int, num_experts: int, *, device: Any = None, dtype: Any = None) -> HalvedExperts:
        return HalvedExperts(self, dim, num_experts, device, dtype)


class HalvedExperts(LoopExperts):
    def weight(self, name: str) -> Tensor | None:
        weight = super().weight(name)
        if name != "down" or weight is None or not torch.is_grad_enabled():  # no gradient: its first values
            return weight
        return (weight + weight.detach()) / 2
