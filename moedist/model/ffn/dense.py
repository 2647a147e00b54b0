"""A dense feed-forward layer: SwiGLU (Shazeer 2020, eq. 6), or two matrices with GELU or ReLU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from moedist.config import require
from moedist.model.ffn.contract import FFN, FFNConfig, FFNOutput
from moedist.model.linear import Linear
from moedist.moe.context import TokenContext

if TYPE_CHECKING:
    from moedist.moe.layer import MoEConfig


@dataclasses.dataclass(frozen=True)
class DenseConfig(FFNConfig):
    """A dense feed-forward layer without biases.

    Attributes:
        hidden_dim: hidden width (F); None for the width with the parameters of a two-matrix layer of 4 x dim: 4 x dim,
            or for SwiGLU, which has three matrices, 8/3 x dim rounded up to a multiple of 64.
        activation: ``swiglu``: ``down(silu(gate(x)) * up(x))``; ``gelu`` (exact) or ``relu``: ``down(act(up(x)))``.
    """

    hidden_dim: int | None = None
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"

    def __post_init__(self) -> None:
        require(
            self.hidden_dim is None or self.hidden_dim >= 1,
            "hidden_dim",
            self.hidden_dim,
            "is too small",
            "Set it to 1 or more, or to null for a width that suits the model's.",
        )

    def build(
        self,
        dim: int,
        *,
        layer: int,
        moe: MoEConfig,
        output_scale: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Dense:
        """Builds the module; arguments as in the contract."""
        hidden_dim = self.hidden_dim or (-(-8 * dim // 3 // 64) * 64 if self.activation == "swiglu" else 4 * dim)
        return Dense(dim, hidden_dim, self.activation, output_scale, device, dtype)


class Dense(FFN):
    """A dense feed-forward layer of one block. Parameters: gate (SwiGLU only), up, down."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Literal["swiglu", "gelu", "relu"],
        output_scale: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.activation = activation
        self.gate = Linear(dim, hidden_dim, device=device, dtype=dtype) if activation == "swiglu" else None
        self.up = Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.down = Linear(hidden_dim, dim, std=output_scale * hidden_dim**-0.5, device=device, dtype=dtype)

    def forward(self, x_BSD: Tensor, context: TokenContext) -> FFNOutput:
        """[B, S, D] -> [B, S, D], each position on its own."""
        up_BSF = self.up(x_BSD)
        if self.gate is not None:
            hidden_BSF = silu(self.gate(x_BSD)) * up_BSF
        else:
            hidden_BSF = gelu(up_BSF) if self.activation == "gelu" else relu(up_BSF)
        return FFNOutput(self.down(hidden_BSF), None)
