"""All experts of a rank in two kernels forward and four backward: products, activation and row weights in one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.moe.experts.contract import Rows
from moedist.moe.ffn import FFNExpertsConfig, StackedFFN, bias_of_rows, run_one_by_one
from moedist.moe.kernels.device import why_not
from moedist.moe.kernels.ffn import FusedFFN


@dataclasses.dataclass(frozen=True)
class FusedConfig(FFNExpertsConfig):
    """Triton kernels, for every dtype and width; where Triton cannot run, the loop of `moedist.moe.experts.loop`."""

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FusedExperts:
        return FusedExperts(self, dim, num_experts, device, dtype)


FIRST_COST = (
    "the first step at new sizes tries several tilings of each kernel, which takes a while; the fastest are kept on "
    "disk (TRITON_CACHE_DIR)"
)


def run_fused(experts: StackedFFN, rows: Rows) -> Tensor:
    """[R, D]: ``gate * expert(x)`` by kernels that read sizes on the device."""
    dtype = rows.x_RD.dtype

    def weight(name: str) -> Tensor | None:
        value = experts.weight(name)
        return None if value is None else value.to(dtype).contiguous()

    source = rows.source
    y_RD: Tensor = FusedFFN.apply(
        rows.x_RD.contiguous(),
        *((None, None) if source is None else (source.x_TD.detach().contiguous(), source.token_R)),
        rows.gate_R.contiguous(),
        rows.ends_e,
        *(weight(name) for name in ("up", "gate", "down", "up_bias", "gate_bias")),
        experts.config.activation,
        torch.is_grad_enabled(),
    )
    if (bias := experts.weight("down_bias")) is not None:
        y_RD = y_RD + (bias_of_rows(bias, rows) * rows.gate_R[:, None]).to(dtype)
    return y_RD


class FusedExperts(StackedFFN):
    """Kernels, or the loop."""

    def forward(self, rows: Rows) -> Tensor:
        """[R, D]: ``gate * expert(x)``."""
        if rows.x_RD.shape[0] == 0 or not self.expert_ids or why_not(rows.x_RD.device, "ffn") is not None:
            return run_one_by_one(self, rows.x_RD, rows.gate_R, rows.read_sizes())
        return run_fused(self, rows)

    def note(self, device: torch.device, dtype: torch.dtype, uniform: bool) -> str:
        """Kernels or loop."""
        reason = why_not(device, "ffn")
        return f"moe/experts=fused runs as loop: {reason}" if reason else f"moe/experts=fused: {FIRST_COST}"
