"""Experts and their inputs, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moedist.model.attention.experts.contract import AttentionExpert, AttentionExpertConfig, ExpertSite, Sight
from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.moe.init import named_draw

B, S, D, H, E = 2, 9, 12, 3, 5
"""Sequences, positions, width, heads, width of edges."""

KINDS: dict[str, AttentionExpertConfig] = {
    "standard": StandardConfig(),
    "geodesic": HyperbolicConfig(learnable=True),
    "squared_lorentz": HyperbolicConfig(score="squared_lorentz", learnable=True),
    "elu": LinearConfig(chunk=4),
    "favor": LinearConfig(features="favor", num_features=16, chunk=4),
    "key_value": EdgeFeaturedConfig(edge_dim=E),
    "bias": EdgeFeaturedConfig(edge_dim=E, mode="bias"),
    "gated": EdgeFeaturedConfig(edge_dim=E, mode="gated"),
    "gatv2": EdgeFeaturedConfig(edge_dim=E, mode="gatv2"),
}
EDGED = ("key_value", "bias", "gated", "gatv2")
MASKED = tuple(name for name in KINDS if name not in ("elu", "favor"))
"""Those that can keep a mask."""


def golden() -> dict[str, Any]:
    """tests/golden/attention.json."""
    return json.loads((Path(__file__).parents[3] / "golden" / "attention.json").read_text())


def build(config: AttentionExpertConfig | str, dtype: torch.dtype = torch.float64, **site: Any) -> AttentionExpert:
    """An expert with the first values of seed 0, small parameters moved off zero so that each has an effect."""
    config = KINDS[config] if isinstance(config, str) else config
    site = {"dim": D, "num_heads": H, "dtype": dtype, **site}
    expert = config.build(ExpertSite(**site))
    expert.init_weights(named_draw(0, "expert.0"))
    with torch.no_grad():
        for parameter in expert.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.3, 0.4, parameter.numel(), dtype=parameter.dtype))
    return expert


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def edges(num_queries: int = S, num_keys: int = S, seed: int = 7) -> Tensor:
    """Features of all pairs; no pair has those of its mirror image."""
    return rows(B, num_queries, num_keys, E, seed=seed)


def documents() -> Sight:
    """Packed, causal rows with padding at the end of the second."""
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, 7:] = False
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    return Sight(causal=True, key_valid_BS=valid, document_BS=document)


def random_mask(seed: int = 3) -> Tensor:
    """bool [B, H, S, S] in which the second query of the first sequence sees nothing."""
    mask = torch.rand(B, H, S, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0, :, 1] = False
    return mask


class Largest(TorchDispatchMode):
    """Watches the results of torch's operations; ``numel`` is the size of the largest."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out
