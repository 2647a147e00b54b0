"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads from one narrow vector."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moedist.config import require
from moedist.model.attention.contract import Attention, AttentionConfig, AttentionContext
from moedist.model.linear import Linear
from moedist.model.norm.contract import NormConfig
from moedist.model.rope import rotate


@dataclasses.dataclass(frozen=True)
class MLAConfig(AttentionConfig):
    """Multi-head latent attention, causal within each document; the defaults are DeepSeek-V3's.

    Attributes:
        num_heads: heads.
        query_rank: width of the latent vector that queries come from; None for queries straight from the input.
        kv_rank: width of the latent vector that keys and values come from.
        head_dim: width of a head's query and key that carries no position, and comes from the latent vectors.
        rope_dim: width that carries the position; its key is one for all heads.
        value_dim: width of a head's value.
        rope_theta: base of the rotary wavelengths.
    """

    num_heads: int = 128
    query_rank: int | None = 1536
    kv_rank: int = 512
    head_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        for key in ("num_heads", "query_rank", "kv_rank", "head_dim", "rope_dim", "value_dim"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "is too small", "Set it to 1 or more.")
        require(
            self.rope_dim % 2 == 0,
            "rope_dim",
            self.rope_dim,
            "is not an even number of dims, which the rotation turns in pairs",
            "Set an even number.",
        )
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "is not above 0", "Set it to 10000 or so.")

    def build(
        self,
        dim: int,
        *,
        norm: NormConfig,
        output_scale: float,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MLA:
        """Builds the module; arguments as in the contract."""
        return MLA(self, dim, norm, output_scale, device, dtype)


class MLA(Attention):
    """Multi-head latent attention of one block.

    Parameters: query_down, query_norm and query_up (or query alone), kv_down, kv_norm, kv_up, output. ``kv_down`` makes
    the latent vector and the one rotated key; ``kv_up`` makes each head's key and value from the latent vector.
    """

    def __init__(
        self,
        config: MLAConfig,
        dim: int,
        norm: NormConfig,
        output_scale: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.config = config
        query_dim = config.num_heads * (config.head_dim + config.rope_dim)
        rank = config.query_rank
        self.query_down = None if rank is None else Linear(dim, rank, device=device, dtype=dtype)
        self.query_norm = None if rank is None else norm.build(rank, device=device, dtype=dtype)
        self.query = Linear(dim if rank is None else rank, query_dim, device=device, dtype=dtype)
        self.kv_down = Linear(dim, config.kv_rank + config.rope_dim, device=device, dtype=dtype)
        self.kv_norm = norm.build(config.kv_rank, device=device, dtype=dtype)
        kv_dim = config.num_heads * (config.head_dim + config.value_dim)
        self.kv_up = Linear(config.kv_rank, kv_dim, device=device, dtype=dtype)
        out_dim = config.num_heads * config.value_dim
        self.output = Linear(out_dim, dim, std=output_scale * out_dim**-0.5, device=device, dtype=dtype)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        """[B, S, D] -> [B, S, D]; a position sees the positions of its document up to itself."""
        config = self.config
        table = context.rope(config.rope_dim, config.rope_theta)
        latent_BSQ = x_BSD
        if self.query_down is not None and self.query_norm is not None:
            latent_BSQ = self.query_norm(self.query_down(x_BSD))
        query_BSHh = self.query(latent_BSQ).unflatten(2, (config.num_heads, -1))
        plain_BSHh, turned_BSHh = query_BSHh.split([config.head_dim, config.rope_dim], dim=-1)
        query_BSHh = torch.cat([plain_BSHh, rotate(turned_BSHh, table)], dim=-1)

        latent_BSR, shared_BSh = self.kv_down(x_BSD).split([config.kv_rank, config.rope_dim], dim=-1)
        kv_BSHh = self.kv_up(self.kv_norm(latent_BSR)).unflatten(2, (config.num_heads, -1))
        plain_BSHh, value_BSHv = kv_BSHh.split([config.head_dim, config.value_dim], dim=-1)
        shared_BS1h = rotate(shared_BSh.unsqueeze(2), table)
        key_BSHh = torch.cat([plain_BSHh, shared_BS1h.expand(-1, -1, config.num_heads, -1)], dim=-1)
        out_BHSv = scaled_dot_product_attention(
            query_BSHh.transpose(1, 2),
            key_BSHh.transpose(1, 2),
            value_BSHv.transpose(1, 2),
            attn_mask=context.mask_B1SS,
            is_causal=context.mask_B1SS is None,
        )
        return self.output(out_BHSv.transpose(1, 2).flatten(2))

    def score_flops(self, length: int) -> float:
        """Scores over ``head_dim + rope_dim``, sums over ``value_dim``: 2 FLOPs per dim, head and visible position."""
        config = self.config
        widths = config.head_dim + config.rope_dim + config.value_dim
        return 2 * config.num_heads * widths * length / 2
