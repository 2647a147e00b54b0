"""All experts of a rank in one call per matrix: grouped matmul over ragged rows, batched matmul over fixed slots.

On a CPU one expert after the other, in caches (`moedist.moe.host_experts`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.moe.experts.contract import Rows
from moedist.moe.ffn import FFNExpertsConfig, StackedFFN, activate, bias_of_rows, run_one_by_one
from moedist.moe.host import on_host
from moedist.moe.host_experts import host_experts


@dataclasses.dataclass(frozen=True)
class GroupedConfig(FFNExpertsConfig):
    """Grouped matrix products; where a dtype or a width does not qualify, the loop of `moedist.moe.experts.loop`; on a
    CPU, SwiGLU without biases, `moedist.moe.host_experts`."""

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GroupedExperts:
        return GroupedExperts(self, dim, num_experts, device, dtype)


def qualifies(dtype: torch.dtype, *widths: int) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes rows of these widths.

    It wants strides in multiples of 16 bytes, has no fp64, and its fp16 is a slow path. Under `torch.compile` torch's
    own shape rule for it refuses fp32 too.
    """
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.float32, torch.bfloat16)
    return dtype in dtypes and all(width * dtype.itemsize % 16 == 0 for width in widths)


class ContiguousGradient(torch.autograd.Function):
    """The identity; lays its gradient out in memory, because grouped_mm's backward refuses an expanded one."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor) -> Tensor:
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Tensor:
        return grad_RD.contiguous()


class GroupedExperts(StackedFFN):
    """One matrix product per weight for all experts."""

    def forward(self, rows: Rows) -> Tensor:
        """[R, D]: ``gate * expert(x)``."""
        x_RD, dtype = rows.x_RD, rows.x_RD.dtype
        num_rows = x_RD.shape[0]
        if self.fit_host(rows):
            up, gate, down = self.weight("up"), self.weight("gate"), self.weight("down")
            assert up is not None and gate is not None and down is not None
            return host_experts(x_RD, rows.gate_R, up, gate, down, rows.read_sizes())
        if num_rows == 0 or not (rows.uniform or qualifies(dtype, self.dim, self.hidden_dim)):
            return run_one_by_one(self, x_RD, rows.gate_R, rows.read_sizes())

        def multiply(x: Tensor, name: str) -> Tensor | None:
            weight, bias = self.weight(name), self.weight(f"{name}_bias")
            if weight is None:
                return None
            if rows.uniform:
                y = torch.bmm(x.view(len(rows.ends_e), -1, x.shape[1]), weight.to(dtype)).view(num_rows, -1)
            else:
                # The rows end where the last expert's do: past that, grouped_mm leaves its output uninitialised.
                y = ContiguousGradient.apply(F.grouped_mm(x, weight.to(dtype), offs=rows.ends_e))
            return y if bias is None or name == "down" else y + bias_of_rows(bias, rows).to(dtype)

        up, gate = multiply(x_RD, "up"), multiply(x_RD, "gate")
        assert up is not None
        # The row's weight goes in before the down-projection, where the row is saved anyway.
        hidden = (activate(up, gate, self.config.activation) * rows.gate_R[:, None]).to(dtype)
        output = multiply(hidden, "down")
        assert output is not None
        if self.down_bias is not None:
            bias = self.weight("down_bias")
            assert bias is not None
            output = output + (bias_of_rows(bias, rows) * rows.gate_R[:, None]).to(dtype)
        return output

    def fit_host(self, rows: Rows) -> bool:
        """Whether `moedist.moe.host_experts` computes them: the default expert, on a CPU, in one dtype throughout."""
        dtype = rows.x_RD.dtype
        alike = rows.gate_R.dtype == self.up.dtype == dtype
        return bool(self.expert_ids) and alike and self.suits_host(dtype) and on_host(rows.x_RD)

    def suits_host(self, dtype: torch.dtype) -> bool:
        """Whether these are experts, and numbers, that `moedist.moe.host_experts` knows."""
        plain = self.config.activation == "swiglu" and not self.config.bias
        return plain and dtype in (torch.float32, torch.float64)
