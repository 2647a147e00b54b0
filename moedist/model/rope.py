"""Rotary position embedding (Su et al. 2021, eq. 34), in the half-split layout of Llama-family weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RopeTable(NamedTuple):
    """cos and sin of the angles; both [B, S, head_dim / 2], fp32."""

    cos_BSh: Tensor
    sin_BSh: Tensor


def rope_table(position_BS: Tensor, head_dim: int, theta: float) -> RopeTable:
    """The angles ``position * theta ** (-2 i / head_dim)`` for i = 0 .. head_dim / 2 - 1, as cos and sin, in fp32.

    Args:
        position_BS: int64 position within the document.
        head_dim: even width of a head.
        theta: base of the wavelengths.
    """
    exponent_h = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_BS.device) / head_dim
    angle_BSh = position_BS.float().unsqueeze(-1) * theta**-exponent_h
    return RopeTable(angle_BSh.cos(), angle_BSh.sin())


def rotate(x_BSHh: Tensor, table: RopeTable) -> Tensor:
    """Turns dim i against dim i + head_dim / 2 by its angle, in fp32 or wider: [B, S, heads, head_dim], x's dtype."""
    first, second = x_BSHh.chunk(2, dim=-1)
    cos, sin = table.cos_BSh.unsqueeze(2), table.sin_BSh.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSHh.dtype)
