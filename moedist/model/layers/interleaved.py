"""Dense and MoE blocks in turn."""

from __future__ import annotations

import dataclasses

from moedist.config import require
from moedist.model.ffn.moe import MoEFFNConfig
from moedist.model.layers.contract import LayersConfig, LayerSpec


@dataclasses.dataclass(frozen=True)
class InterleavedConfig(LayersConfig):
    """The first blocks dense, then a MoE layer in every n-th block; all else is the model's.

    Attributes:
        num_layers: number of blocks (L).
        first_dense: number of blocks at the input whose feed-forward layer is the model's dense one.
        moe_every: after those, the last of every ``moe_every`` blocks has a MoE layer: 1 for every block, 2 for dense,
            MoE, dense, MoE.
    """

    num_layers: int = 4
    first_dense: int = 0
    moe_every: int = 1

    def __post_init__(self) -> None:
        require(self.num_layers >= 1, "num_layers", self.num_layers, "is too small", "Set it to 1 or more.")
        require(self.first_dense >= 0, "first_dense", self.first_dense, "is negative", "Set it to 0 or more.")
        require(self.moe_every >= 1, "moe_every", self.moe_every, "is too small", "Set it to 1 for every block.")
        require(
            self.first_dense + self.moe_every <= self.num_layers,
            "num_layers",
            self.num_layers,
            f"leaves no block for a MoE layer after first_dense = {self.first_dense} with moe_every = {self.moe_every}",
            f"Set it to {self.first_dense + self.moe_every} or more.",
        )

    def specs(self) -> list[LayerSpec]:
        """One spec per block."""
        return [LayerSpec(ffn=MoEFFNConfig() if self._has_moe(index) else None) for index in range(self.num_layers)]

    def _has_moe(self, index: int) -> bool:
        return index >= self.first_dense and (index - self.first_dense + 1) % self.moe_every == 0
