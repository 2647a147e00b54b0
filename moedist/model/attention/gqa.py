"""Grouped-query attention (Ainslie et al. 2023): several query heads share one key and value head."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moedist.config import require
from moedist.model.attention.contract import Attention, AttentionConfig, AttentionContext
from moedist.model.linear import Linear
from moedist.model.norm.contract import NormConfig
from moedist.model.rope import rotate


@dataclasses.dataclass(frozen=True)
class GQAConfig(AttentionConfig):
    """Grouped-query attention with rotary positions, causal within each document.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by ``num_heads / num_kv_heads`` query heads; None for as many as
            query heads (multi-head attention).
        head_dim: width of a head; None for ``dim / num_heads``.
        rope_theta: base of the rotary wavelengths.
        qk_norm: the block's norm on queries and keys before the rotation: ``head`` over each head with weights shared
            by the heads (Qwen3), ``projection`` over all heads at once (OLMoE), None for none.
        bias: whether query, key and value projections have biases.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    qk_norm: Literal["head", "projection"] | None = "head"
    bias: bool = False

    def __post_init__(self) -> None:
        require(self.num_heads >= 1, "num_heads", self.num_heads, "is too small", "Set it to 1 or more.")
        kv = self.num_kv_heads
        require(
            kv is None or (kv >= 1 and self.num_heads % kv == 0),
            "num_kv_heads",
            kv,
            f"does not divide num_heads = {self.num_heads}",
            f"Set it to {_divisors(self.num_heads)}, or to null for {self.num_heads}.",
        )
        require(
            self.head_dim is None or (self.head_dim >= 2 and self.head_dim % 2 == 0),
            "head_dim",
            self.head_dim,
            "is not an even number of dims, which the rotation turns in pairs",
            "Set an even number, or null for dim / num_heads.",
        )
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "is not above 0", "Set it to 10000 or so.")

    def check(self, dim: int) -> None:
        """Raises `ConfigError` where ``dim`` does not split into heads of even width."""
        require(
            self.head_dim is not None or dim % (2 * self.num_heads) == 0,
            "num_heads",
            self.num_heads,
            f"does not split dim = {dim} into heads of an even width",
            f"Set it to {_divisors(dim // 2) if dim % 2 == 0 else 'a divisor of an even dim'}, or set head_dim.",
        )

    def build(
        self,
        dim: int,
        *,
        norm: NormConfig,
        output_scale: float,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GQA:
        """Builds the module; arguments as in the contract."""
        self.check(dim)
        return GQA(self, dim, norm, output_scale, device, dtype)


class GQA(Attention):
    """Grouped-query attention of one block. Parameters: query, key, value, output, query_norm, key_norm."""

    def __init__(
        self,
        config: GQAConfig,
        dim: int,
        norm: NormConfig,
        output_scale: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.head_dim = config.head_dim or dim // config.num_heads
        self.num_heads = config.num_heads
        self.rope_theta = config.rope_theta
        query_dim = config.num_heads * self.head_dim
        kv_dim = (config.num_kv_heads or config.num_heads) * self.head_dim
        self.query = Linear(dim, query_dim, bias=config.bias, device=device, dtype=dtype)
        self.key = Linear(dim, kv_dim, bias=config.bias, device=device, dtype=dtype)
        self.value = Linear(dim, kv_dim, bias=config.bias, device=device, dtype=dtype)
        self.output = Linear(query_dim, dim, std=output_scale * query_dim**-0.5, device=device, dtype=dtype)
        self.norms_heads = config.qk_norm == "head"
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.qk_norm is not None:
            self.query_norm = norm.build(self.head_dim if self.norms_heads else query_dim, device=device, dtype=dtype)
            self.key_norm = norm.build(self.head_dim if self.norms_heads else kv_dim, device=device, dtype=dtype)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        """[B, S, D] -> [B, S, D]; a position sees the positions of its document up to itself."""
        table = context.rope(self.head_dim, self.rope_theta)
        query_BSHh = rotate(self._heads(self.query(x_BSD), self.query_norm), table)
        key_BSHh = rotate(self._heads(self.key(x_BSD), self.key_norm), table)
        value_BSHh = self._heads(self.value(x_BSD), None)
        out_BHSh = scaled_dot_product_attention(
            query_BSHh.transpose(1, 2),
            key_BSHh.transpose(1, 2),
            value_BSHh.transpose(1, 2),
            attn_mask=context.mask_B1SS,
            is_causal=context.mask_B1SS is None,
            enable_gqa=query_BSHh.shape[2] != key_BSHh.shape[2],
        )
        return self.output(out_BHSh.transpose(1, 2).flatten(2))

    def _heads(self, x_BSD: Tensor, norm: nn.Module | None) -> Tensor:
        """Splits the heads [B, S, heads, head_dim] and applies the norm before or after, as it is meant."""
        if norm is not None and not self.norms_heads:
            x_BSD = norm(x_BSD)
        x_BSHh = x_BSD.unflatten(2, (-1, self.head_dim))
        return norm(x_BSHh) if norm is not None and self.norms_heads else x_BSHh

    def score_flops(self, length: int) -> float:
        """Two matmuls of 2 x head_dim FLOPs per head and visible position; on average half of ``length`` is visible."""
        return 2 * 2 * self.num_heads * self.head_dim * length / 2


def _divisors(number: int) -> str:
    *others, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(others)} or {last}" if others else last
