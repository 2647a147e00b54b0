"""What an attention is: a module ``(x_BSD, AttentionContext) -> out_BSD``."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.model.batch import TokenBatch
from moedist.model.norm.contract import NormConfig
from moedist.model.rope import RopeTable, rope_table


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What all attentions of one forward pass know about its tokens, made once and shared by the blocks.

    Attributes:
        position_BS: int64 position within the document.
        mask_B1SS: bool, true where the query (third dim) sees the key (fourth); None for plain causal attention.
    """

    position_BS: Tensor
    mask_B1SS: Tensor | None
    _rope_tables: dict[tuple[int, float], RopeTable] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_batch(cls, batch: TokenBatch) -> AttentionContext:
        """Causal within each document; where rows have several, a position sees no padding but itself."""
        if batch.document_BS is None:
            return cls(batch.position_BS, None)
        length = batch.document_BS.shape[1]
        same_BSS = batch.document_BS.unsqueeze(2) == batch.document_BS.unsqueeze(1)
        earlier_SS = torch.ones(length, length, dtype=torch.bool, device=same_BSS.device).tril()
        itself_SS = torch.eye(length, dtype=torch.bool, device=same_BSS.device)
        # Padding sees itself: a query that sees nothing would be NaN, and so would the gradients of the others.
        mask_BSS = (same_BSS & earlier_SS & batch.valid_BS.unsqueeze(1)) | itself_SS
        return cls(batch.position_BS, mask_BSS.unsqueeze(1))

    def rope(self, head_dim: int, theta: float) -> RopeTable:
        """The rotary table for these positions; computed on first use, then shared by all blocks."""
        if torch.compiler.is_compiling():  # a graph may not change what lies outside of it
            return rope_table(self.position_BS, head_dim, theta)
        key = (head_dim, theta)
        if key not in self._rope_tables:
            self._rope_tables[key] = rope_table(self.position_BS, head_dim, theta)
        return self._rope_tables[key]


class Attention(nn.Module):
    """The base of every attention."""

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        raise NotImplementedError

    def score_flops(self, length: int) -> float:
        """FLOPs per token of a forward pass that no parameter accounts for: scores and weighted sums of values.

        For documents of ``length`` positions; what causality removes is not counted.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Choice, path="model.attention"):
    """One kind of attention."""

    def check(self, dim: int) -> None:
        """Raises `ConfigError` where this attention does not fit a model of width ``dim``."""

    def build(
        self,
        dim: int,
        *,
        norm: NormConfig,
        output_scale: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Attention:
        """Builds the module.

        Args:
            dim: model width (D).
            norm: the block's norm, for norms inside the attention.
            output_scale: factor on the first standard deviation of the projection into the residual stream.
            device: where.
            dtype: of the parameters.

        Raises:
            ConfigError: as `check`.
        """
        raise NotImplementedError
