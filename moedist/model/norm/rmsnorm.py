"""Root mean square norm (Zhang and Sennrich 2019, eq. 4): ``x / sqrt(mean(x^2) + eps) * weight``."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moedist.config import require
from moedist.model.norm.contract import NormConfig
from moedist.moe.init import Draw


@dataclasses.dataclass(frozen=True)
class RMSNormConfig(NormConfig):
    """Root mean square norm.

    Attributes:
        eps: added to the mean square.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.eps > 0, "eps", self.eps, "divides by zero where all inputs are zero", "Set it above 0.")

    def build(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RMSNorm:
        """A norm over a last dim of width ``dim``."""
        return RMSNorm(dim, self.eps, device=device, dtype=dtype)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim, computed in fp32 or wider, returned in x's dtype."""

    def __init__(
        self,
        dim: int,
        eps: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        # torch's kernel widens 16-bit inputs inside; with autocast it may also return the wide type.
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)

    def init_weights(self, draw: Draw) -> None:
        """Ones."""
        nn.init.ones_(self.weight)
