"""What an attention is: a module ``(x_BSD, AttentionContext) -> out_BSD``."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.model.attention.experts.contract import Sight
from moedist.model.batch import TokenBatch
from moedist.model.norm.contract import NormConfig
from moedist.model.rope import RopeTable, rope_table
from moedist.moe.context import TokenContext
from moedist.moe.report import MoEReport


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What all attentions of one forward pass know about its tokens, made once and shared by the blocks.

    Attributes:
        position_BS: int64 position within the document.
        mask_B1SS: bool, true where the query (third dim) sees the key (fourth); None for plain causal attention.
        sight: the same for attentions that take some of the queries.
        tokens: for attentions that route; None outside of a model.
    """

    position_BS: Tensor
    mask_B1SS: Tensor | None
    sight: Sight = Sight(causal=True)
    tokens: TokenContext | None = None
    _rope_tables: dict[tuple[int, float], RopeTable] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_batch(cls, batch: TokenBatch, tokens: TokenContext | None = None) -> AttentionContext:
        """Causal within each document; where rows have several, a position sees no padding but itself."""
        if batch.document_BS is None:
            return cls(batch.position_BS, None, tokens=tokens)
        length = batch.document_BS.shape[1]
        same_BSS = batch.document_BS.unsqueeze(2) == batch.document_BS.unsqueeze(1)
        earlier_SS = torch.ones(length, length, dtype=torch.bool, device=same_BSS.device).tril()
        itself_SS = torch.eye(length, dtype=torch.bool, device=same_BSS.device)
        # Padding sees itself: a query that sees nothing would be NaN, and so would the gradients of the others.
        mask_BSS = (same_BSS & earlier_SS & batch.valid_BS.unsqueeze(1)) | itself_SS
        sight = Sight(causal=True, document_BS=batch.document_BS, key_valid_BS=batch.valid_BS)
        return cls(batch.position_BS, mask_BSS.unsqueeze(1), sight, tokens)

    def rope(self, head_dim: int, theta: float) -> RopeTable:
        """The rotary table for these positions; computed on first use, then shared by all blocks."""
        if torch.compiler.is_compiling():  # a graph may not change what lies outside of it
            return rope_table(self.position_BS, head_dim, theta)
        key = (head_dim, theta)
        if key not in self._rope_tables:
            self._rope_tables[key] = rope_table(self.position_BS, head_dim, theta)
        return self._rope_tables[key]


class AttentionOutput(NamedTuple):
    """What a block gets of its attention.

    Attributes:
        out_BSD: goes to the residual stream.
        report: of the routing inside; None where there is none.
    """

    out_BSD: Tensor
    report: MoEReport | None


class Attention(nn.Module):
    """The base of every attention.

    Attributes:
        has_report: whether it routes: `forward` then returns an `AttentionOutput`, with a report.
    """

    has_report: bool = False

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor | AttentionOutput:
        """[B, S, D] -> [B, S, D]."""
        raise NotImplementedError

    def active_shares(self) -> dict[str, Fraction]:
        """The share of a child module's parameters (name relative to this module) that one token meets; 1 elsewhere."""
        return {}

    def score_flops(self, length: int) -> float:
        """FLOPs per token of a forward pass that no parameter accounts for: scores and weighted sums of values.

        For documents of ``length`` positions; what causality removes is not counted.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Choice, path="model.attention"):
    """One kind of attention."""

    @property
    def num_experts(self) -> int | None:
        """Experts that it routes to; None where it does not route."""
        return None

    def check(self, dim: int) -> None:
        """Raises `ConfigError` where this attention does not fit a causal model of width ``dim``."""

    def check_spread(self, ep: int) -> None:
        """Raises `ConfigError` where it cannot be spread over ``ep`` expert-parallel ranks."""

    def check_alike(self, reason: str) -> None:
        """Raises `ConfigError` where it would give ranks unlike parameters, which ``reason`` forbids."""

    def check_order(self, reason: str) -> None:
        """Raises `ConfigError` where its gradients may arrive in another order on each rank, which ``reason``
        forbids."""

    def build(
        self,
        dim: int,
        *,
        norm: NormConfig,
        output_scale: float,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Attention:
        """Builds the module.

        Args:
            dim: model width (D).
            norm: the block's norm, for norms inside the attention.
            output_scale: factor on the first standard deviation of the projection into the residual stream.
            layer: place among the routed layers of the model, for attentions that route; it names their noise.
            device: where.
            dtype: of the parameters.

        Raises:
            ConfigError: as `check`.
        """
        raise NotImplementedError
