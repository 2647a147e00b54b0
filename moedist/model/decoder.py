"""A decoder-only transformer: pre-norm residual blocks of attention and feed-forward layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from moedist.config import ConfigError, require
from moedist.model.attention.contract import AttentionConfig, AttentionContext
from moedist.model.attention.gqa import GQAConfig
from moedist.model.batch import TokenBatch
from moedist.model.contract import LanguageModel, ModelConfig, ModelOutput, StepContext
from moedist.model.ffn.contract import FFNConfig
from moedist.model.ffn.dense import DenseConfig
from moedist.model.init import init_weights
from moedist.model.layers.contract import LayersConfig, LayerSpec
from moedist.model.layers.interleaved import InterleavedConfig
from moedist.model.linear import Embedding, Linear
from moedist.model.norm.contract import NormConfig
from moedist.model.norm.rmsnorm import RMSNormConfig
from moedist.moe.context import TokenContext
from moedist.moe.report import MoEReport

if TYPE_CHECKING:
    from moedist.moe.layer import MoEConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """A decoder-only transformer.

    Attributes:
        dim: model width (D).
        attention: of every block whose spec brings none.
        ffn: the feed-forward layer of every block whose spec brings none: the dense one.
        norm: of every block whose spec brings none, and before the head.
        layers: the blocks.
        tie_embeddings: whether the head shares the table of the input embedding.
    """

    dim: int = 256
    attention: AttentionConfig = dataclasses.field(default_factory=GQAConfig)
    ffn: FFNConfig = dataclasses.field(default_factory=DenseConfig)
    norm: NormConfig = dataclasses.field(default_factory=RMSNormConfig)
    layers: LayersConfig = dataclasses.field(default_factory=InterleavedConfig)
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        require(self.dim >= 1, "dim", self.dim, "is too small", "Set it to 1 or more.")
        self._check_attentions(lambda attention: attention.check(self.dim))
        self._check_ffns(lambda ffn: ffn.check_causal(None))
        numbers = {(spec.attention or self.attention).num_experts for spec in self.layers.specs()} - {None}
        require(
            len(numbers) <= 1,
            "attention",
            sorted(map(str, numbers)),
            "are unlike numbers of attention experts in one model, and their loads are one table",
            "List as many experts in every block whose attention routes.",
        )

    def check_spread(self, ep: int, ranks_per_node: int | None = None) -> None:
        """See the contract."""
        self._check_ffns(lambda ffn: ffn.check_spread(ep, ranks_per_node))
        self._check_attentions(lambda attention: attention.check_spread(ep))

    def check_alike(self, reason: str) -> None:
        """See the contract."""
        self._check_attentions(lambda attention: attention.check_alike(reason))

    def check_order(self, reason: str) -> None:
        """See the contract."""
        self._check_attentions(lambda attention: attention.check_order(reason))

    def _check_attentions(self, check: Callable[[AttentionConfig], None]) -> None:
        """Checks every attention, and says of which block an error is."""
        for index, spec in enumerate(self.layers.specs()):
            try:
                check(spec.attention or self.attention)
            except ConfigError as error:
                raise error.under(f"layers.blocks.{index}.attention" if spec.attention else "attention") from None

    def _check_ffns(self, check: Callable[[FFNConfig], None]) -> None:
        """Checks every feed-forward layer, and says of which block an error is."""
        for index, spec in enumerate(self.layers.specs()):
            try:
                check(spec.ffn or self.ffn)
            except ConfigError as error:
                raise error.under(f"layers.blocks.{index}.ffn" if spec.ffn else "ffn") from None

    def blocks(self) -> list[LayerSpec]:
        """One complete spec per block, from the input to the output."""
        return [
            LayerSpec(1, spec.attention or self.attention, spec.ffn or self.ffn, spec.norm or self.norm)
            for spec in self.layers.specs()
            for _ in range(spec.repeat)
        ]

    def build(
        self,
        vocab_size: int,
        moe: MoEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Decoder:
        """Builds the model; arguments as in the contract."""
        self._check_ffns(lambda ffn: ffn.check_beside(moe))
        model = Decoder(self, vocab_size, moe, device, dtype)
        if not model.embedding.weight.is_meta:
            init_weights(model, seed=0)
        return model


class BlockOutput(NamedTuple):
    """A block's residual stream [B, S, D], and the reports of its MoE layer and its attention where they route."""

    x_BSD: Tensor
    report: MoEReport | None
    attention_report: MoEReport | None


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``.

    Both write into the residual stream 2L times in all, so their output projections start smaller by ``(2L) ** -0.5``
    (GPT-2, section 2.3). Experts start as they say themselves.
    """

    def __init__(
        self,
        spec: LayerSpec,
        dim: int,
        *,
        layer: int,
        num_layers: int,
        moe: MoEConfig,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        assert spec.attention is not None and spec.ffn is not None and spec.norm is not None, "an incomplete spec"
        scale = (2 * num_layers) ** -0.5
        self.attention_norm = spec.norm.build(dim, device=device, dtype=dtype)
        self.attention = spec.attention.build(
            dim, norm=spec.norm, output_scale=scale, layer=num_layers + layer, device=device, dtype=dtype
        )
        self.ffn_norm = spec.norm.build(dim, device=device, dtype=dtype)
        self.ffn = spec.ffn.build(dim, layer=layer, moe=moe, output_scale=scale, device=device, dtype=dtype)

    def forward(self, x_BSD: Tensor, attention: AttentionContext, tokens: TokenContext) -> BlockOutput:
        """[B, S, D] -> [B, S, D] and reports."""
        attended = self.attention(self.attention_norm(x_BSD), attention)
        attended_BSD, attention_report = attended if self.attention.has_report else (attended, None)
        x_BSD = x_BSD + attended_BSD
        out_BSD, report = self.ffn(self.ffn_norm(x_BSD), tokens)
        return BlockOutput(x_BSD + out_BSD, report, attention_report)


class Decoder(LanguageModel):
    """Embedding, blocks, norm, head. Without ``head`` the embedding's table is the head."""

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        moe: MoEConfig,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        specs = config.blocks()
        for spec in specs:
            assert spec.ffn is not None
            spec.ffn.check_causal(moe)
        self.embedding = Embedding(vocab_size, config.dim, device=device, dtype=dtype)
        blocks = [
            Block(spec, config.dim, layer=index, num_layers=len(specs), moe=moe, device=device, dtype=dtype)
            for index, spec in enumerate(specs)
        ]
        self.moe_blocks = tuple(index for index, block in enumerate(blocks) if block.ffn.has_report)
        self.attention_blocks = tuple(index for index, block in enumerate(blocks) if block.attention.has_report)
        self.blocks = nn.ModuleList(blocks)
        self.norm = config.norm.build(config.dim, device=device, dtype=dtype)
        self.head = None if config.tie_embeddings else Linear(config.dim, vocab_size, device=device, dtype=dtype)
        self.looked_up = () if self.head is None else ("embedding.weight",)

    def forward(self, batch: TokenBatch, context: StepContext) -> ModelOutput:
        """Runs one micro-batch of one rank; reports come in the order of ``moe_blocks``."""
        tokens = _token_context(batch, context)
        attention = AttentionContext.of_batch(batch, tokens)
        x_BSD = self.embedding(batch.token_BS)
        reports, attention_reports = [], []
        for block in self.blocks:
            x_BSD, report, attention_report = block(x_BSD, attention, tokens)
            if report is not None:
                reports.append(report)
            if attention_report is not None:
                attention_reports.append(attention_report)
        x_BSD = self.norm(x_BSD)
        logits_BSV = self.embedding.as_head(x_BSD) if self.head is None else self.head(x_BSD)
        return ModelOutput(logits_BSV, tuple(reports), tuple(attention_reports))

    def units(self) -> Sequence[nn.Module]:
        """The blocks, and the embedding unless it is the head as well."""
        return [*self.blocks] if self.head is None else [self.embedding, *self.blocks]


def _token_context(batch: TokenBatch, context: StepContext) -> TokenContext:
    num_rows, length = batch.token_BS.shape
    return TokenContext.of_rows(
        num_rows,
        length,
        device=batch.token_BS.device,
        id_T=batch.token_BS.flatten(),
        valid_T=batch.valid_BS.flatten(),
        sample_B=batch.sample_B,
        num_tokens=context.num_tokens,
        seed=context.seed,
        step=context.step,
        training=context.training,
        counts=context.counts,
        may_spill=context.may_spill,
    )
