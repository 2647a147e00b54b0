"""The named shapes of a MoE layer that are measured."""

from __future__ import annotations

import dataclasses

import torch

from moedist.config import require


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One layer and the tokens that a rank brings to it.

    Attributes:
        name: of the configuration.
        tokens: of each rank (T).
        dim, hidden_dim: widths D and F.
        num_experts: over all ranks (E).
        top_k: experts per token (K).
        gated: three matrices and SwiGLU, or two and GELU.
        shared_hidden_dim: of the expert that every token runs through; None for none.
        dtype: of weights and rows.
    """

    name: str
    tokens: int
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    gated: bool = True
    shared_hidden_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def pairs(self) -> int:
        """(token, expert) pairs of a rank (N)."""
        return self.tokens * self.top_k

    @property
    def num_matrices(self) -> int:
        """Of an expert."""
        return 3 if self.gated else 2

    @property
    def num_up(self) -> int:
        """Matrices in front of the activation."""
        return self.num_matrices - 1


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("olmoe", 16384, 2048, 1024, 64, 8),
        LayerShape("mixtral", 8192, 4096, 14336, 8, 2),
        LayerShape("qwen3_30b_a3b", 16384, 2048, 768, 128, 8),
        LayerShape("deepseek_v3", 4096, 7168, 2048, 32, 8, shared_hidden_dim=2048),
        LayerShape("switch", 32768, 1024, 4096, 64, 1, gated=False),
        LayerShape("cpu", 2048, 256, 512, 8, 2, dtype=torch.float32),
        LayerShape("cpu_many", 2048, 256, 128, 64, 8, dtype=torch.float32),
    )
}
"""``deepseek_v3`` is one rank's slice of 8: the experts that it holds, with rows for all of them."""


def choose_shapes(names: str, device_type: str, top_k: int | None = None) -> list[LayerShape]:
    """The shapes that a user names.

    Args:
        names: separated by commas, or ``all`` for those of a device like this one.
        device_type: ``cpu`` or ``cuda``.
        top_k: in place of theirs; None for theirs.

    Raises:
        ConfigError: there is none of the name, or it has too few experts.
    """
    on_cpu = device_type == "cpu"
    wanted = [name for name in SHAPES if name.startswith("cpu") is on_cpu] if names == "all" else names.split(",")
    for name in wanted:
        require(name in SHAPES, "--config", name, "is not known", f"Name one of {', '.join(SHAPES)}, or all.")
    shapes = [SHAPES[name] for name in wanted]
    if top_k is not None:
        fewest = min(shape.num_experts for shape in shapes)
        require(1 <= top_k <= fewest, "--top-k", top_k, f"does not fit {fewest} experts", f"Set 1 to {fewest}.")
        shapes = [dataclasses.replace(shape, top_k=top_k) for shape in shapes]
    return shapes
