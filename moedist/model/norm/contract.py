"""What a norm is: a module [..., D] -> [..., D]."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from moedist.config import Choice


@dataclasses.dataclass(frozen=True)
class NormConfig(Choice, path="model.norm"):
    """One kind of norm."""

    def build(
        self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """A norm over a last dim of width ``dim``."""
        raise NotImplementedError
