"""Blocks written out one by one."""

from __future__ import annotations

import dataclasses

from moedist.config import require
from moedist.model.layers.contract import LayersConfig, LayerSpec


@dataclasses.dataclass(frozen=True)
class ListedConfig(LayersConfig):
    """The blocks as they are listed.

    Attributes:
        blocks: specs from the input to the output, each with its ``repeat``.
    """

    blocks: tuple[LayerSpec, ...] = (LayerSpec(),)

    def __post_init__(self) -> None:
        require(len(self.blocks) > 0, "blocks", self.blocks, "lists no block", "List at least one.")

    def specs(self) -> list[LayerSpec]:
        """The list."""
        return list(self.blocks)
