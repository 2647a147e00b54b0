"""What the stack of blocks is: a list of specs."""

from __future__ import annotations

import dataclasses

from moedist.config import Choice, Config, require
from moedist.model.attention.contract import AttentionConfig
from moedist.model.ffn.contract import FFNConfig
from moedist.model.norm.contract import NormConfig


@dataclasses.dataclass(frozen=True)
class LayerSpec(Config):
    """``repeat`` equal blocks.

    Attributes:
        repeat: number of blocks.
        attention: None for the model's.
        ffn: None for the model's.
        norm: None for the model's.
    """

    repeat: int = 1
    attention: AttentionConfig | None = None
    ffn: FFNConfig | None = None
    norm: NormConfig | None = None

    def __post_init__(self) -> None:
        require(self.repeat >= 1, "repeat", self.repeat, "is too small", "Set it to 1 or more, or leave the entry out.")


@dataclasses.dataclass(frozen=True)
class LayersConfig(Choice, path="model.layers"):
    """One way to say which blocks a model has."""

    def specs(self) -> list[LayerSpec]:
        """The blocks from the input to the output."""
        raise NotImplementedError
