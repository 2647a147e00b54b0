"""Experts by the kernels of SonicMoE (Guo et al. 2025, arXiv:2512.14080), where that library is installed."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch
from torch import Tensor

from moedist.config import require
from moedist.moe.experts.contract import Rows
from moedist.moe.ffn import FFNExpertsConfig, StackedFFN, run_one_by_one

DTYPES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class SonicConfig(FFNExpertsConfig):
    """SwiGLU experts without biases by a library for Hopper and later; in other types than bf16 and fp16, on a CPU and
    in a compiled graph, the loop of `moedist.moe.experts.loop`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "or set moe/experts to auto, which has its own kernels."
        require(
            self.activation == "swiglu",
            "activation",
            self.activation,
            "is not what moe/experts=sonic computes",
            f"Set it to swiglu, {remedy}",
        )
        require(
            not self.bias, "bias", self.bias, "is not what moe/experts=sonic computes", f"Set it to false, {remedy}"
        )

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SonicExperts:
        """All experts.

        Raises:
            ConfigError: the library is not installed, or there is no GPU.
        """
        instead = "set moe/experts to auto, which has its own kernels"
        require(
            importlib.util.find_spec("sonicmoe") is not None,
            "moe.experts.kind",
            self.kind,
            "needs the package sonic-moe, which is not installed",
            f"Install it (docs/kernels.md says how), or {instead}.",
        )
        require(
            torch.cuda.is_available(),
            "moe.experts.kind",
            self.kind,
            "needs a GPU, and torch finds none",
            f"Run it where there is one, or {instead}.",
        )
        return SonicExperts(self, dim, num_experts, device, dtype)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the library cannot compute such rows, to be read behind a colon; None where it can."""
    if device.type != "cuda":
        return f"SonicMoE's kernels need a GPU, not {device.type}"
    if dtype not in DTYPES:
        return f"SonicMoE's kernels need bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    return "SonicMoE does not compile" if torch.compiler.is_compiling() else None


class SonicExperts(StackedFFN):
    """The library's kernels, or the loop."""

    def forward(self, rows: Rows) -> Tensor:
        """[R, D]: ``gate * expert(x)``."""
        x_RD = rows.x_RD
        if x_RD.shape[0] == 0 or not self.expert_ids or why_not(x_RD.device, x_RD.dtype) is not None:
            return run_one_by_one(self, x_RD, rows.gate_R, rows.read_sizes())
        return run_sonic(self, rows)

    def note(self, device: torch.device, dtype: torch.dtype, uniform: bool) -> str:
        """Library or loop."""
        reason = why_not(device, dtype)
        if reason is not None:
            return f"moe/experts=sonic runs as loop: {reason}"
        return "moe/experts=sonic: SonicMoE's kernels; weights are copied to its layout in every micro-batch"


def run_sonic(experts: StackedFFN, rows: Rows) -> Tensor:
    """[R, D]: ``gate * expert(x)``, each row a token of the library's that has chosen one expert."""
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    x_RD, gate_R, device = rows.x_RD, rows.gate_R, rows.x_RD.device
    num_rows, num_experts = x_RD.shape[0], len(rows.ends_e)
    row_R = torch.arange(num_rows, device=device, dtype=torch.int32)
    expert_R = torch.searchsorted(rows.ends_e, row_R, right=True, out_int32=True).clamp_max(num_experts - 1)
    # Every row must have an expert: those that carry nothing, and may hold anything, bring zeros to the last one.
    nothing_R = row_R >= rows.ends_e[-1] if rows.sizes is None or sum(rows.sizes) < num_rows else None
    if nothing_R is not None:
        x_RD, gate_R = x_RD.masked_fill(nothing_R[:, None], 0), gate_R.masked_fill(nothing_R, 0)
    y_RD, _ = moe_general_routing_inputs(
        x_RD.contiguous(),
        gate_R,
        row_R,
        expert_R,
        *in_its_layout(experts, x_RD.dtype),
        num_experts,
        torch.cuda.current_stream(device).cuda_stream,
        ActivationType.SWIGLU,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
    )
    return y_RD if nothing_R is None else y_RD.masked_fill(nothing_R[:, None], 0)


def in_its_layout(experts: StackedFFN, dtype: torch.dtype) -> tuple[Tensor, None, Tensor, None]:
    """First weights [2 F, D, e] (gate and up by turns), no biases, second weights [D, F, e], no biases; each expert's
    matrix lies in memory as a whole, its last but one dim contiguous."""
    up, gate, down = experts.weight("up"), experts.weight("gate"), experts.weight("down")
    assert up is not None and gate is not None and down is not None
    num_experts, dim, hidden_dim = up.shape
    first = torch.stack((gate.to(dtype).mT, up.to(dtype).mT), dim=2).view(num_experts, 2 * hidden_dim, dim)
    second = down.to(dtype).mT.contiguous()
    return first.permute(1, 2, 0), None, second.permute(1, 2, 0), None
