"""Experts one after the other: the slow, obvious twin that the fast ones are held against."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.moe.experts.contract import Rows
from moedist.moe.ffn import FFNExpertsConfig, StackedFFN, run_one_by_one


@dataclasses.dataclass(frozen=True)
class LoopConfig(FFNExpertsConfig):
    """A loop over experts; works in every dtype, fp64 included."""

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LoopExperts:
        return LoopExperts(self, dim, num_experts, device, dtype)


class LoopExperts(StackedFFN):
    """One set of matrix products per expert."""

    def forward(self, rows: Rows) -> Tensor:
        """[R, D]: ``gate * expert(x)``."""
        return run_one_by_one(self, rows.x_RD, rows.gate_R, rows.read_sizes())
