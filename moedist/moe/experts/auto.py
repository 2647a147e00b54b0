"""The fastest way to compute experts that a device, a dtype and a width allow: fused, else grouped, else the loop."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.moe.experts.contract import Rows
from moedist.moe.experts.fused import FIRST_COST, run_fused
from moedist.moe.experts.grouped import GroupedExperts, qualifies
from moedist.moe.ffn import FFNExpertsConfig
from moedist.moe.kernels.device import why_not


@dataclasses.dataclass(frozen=True)
class AutoConfig(FFNExpertsConfig):
    """What runs is said at the start of a run, with the reason."""

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AutoExperts:
        return AutoExperts(self, dim, num_experts, device, dtype)


class AutoExperts(GroupedExperts):
    """Kernels where Triton runs; grouped products, with their own loop behind them, where it does not."""

    def forward(self, rows: Rows) -> Tensor:
        """[R, D]: ``gate * expert(x)``."""
        if rows.x_RD.shape[0] == 0 or not self.expert_ids or why_not(rows.x_RD.device, "ffn") is not None:
            return super().forward(rows)
        return run_fused(self, rows)

    def note(self, device: torch.device, dtype: torch.dtype, uniform: bool) -> str:
        """What runs, and why nothing faster."""
        reason = why_not(device, "ffn")
        if reason is None:
            return f"moe/experts=auto runs as fused; {FIRST_COST}"
        on_host = device.type == "cpu" and self.suits_host(dtype)
        if uniform or on_host or qualifies(dtype, self.dim, self.hidden_dim):
            return f"moe/experts=auto runs as grouped: {reason}"
        return (
            f"moe/experts=auto runs as loop: {reason}, and grouped products need fp32 or bf16 in widths of whole 16 "
            f"bytes, not {str(dtype).removeprefix('torch.')} in {self.dim} and {self.hidden_dim}"
        )
