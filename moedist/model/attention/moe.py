"""A mixture of attention experts as the attention half of a block."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import torch
from torch import Tensor

from moedist.config import ConfigError, require
from moedist.model.attention.contract import Attention, AttentionConfig, AttentionContext, AttentionOutput
from moedist.model.attention.experts.contract import AttentionExpert
from moedist.model.attention.mixture import MixtureConfig
from moedist.model.norm.contract import NormConfig


@dataclasses.dataclass(frozen=True)
class MixedAttentionConfig(MixtureConfig, AttentionConfig):
    """Self-attention, causal within each document, by routed experts of any kinds."""

    def check(self, dim: int) -> None:
        """Refuses routers in which other tokens decide where a query goes."""
        require(
            self.router.causal,
            "router.kind",
            self.router.kind,
            "lets later tokens, or other rows of the batch, decide where a query goes, and the model is causal: it "
            "would see the future in training and miss it in generation",
            "Choose a token-choice router: topk, noisy, mlp, cosine or hash.",
        )
        self.check_width(dim)

    def check_spread(self, ep: int) -> None:
        """Refuses a cut that is not even."""
        self.check_ep(ep)

    def check_alike(self, reason: str) -> None:
        """Refuses ``gathered``."""
        self.check_ep(self.num_experts, reason)

    def check_order(self, reason: str) -> None:
        """Refuses: an expert that no token of a rank chose is not called there."""
        raise ConfigError(
            "kind",
            self.kind,
            "calls experts as tokens choose them, so their gradients arrive in another order on each rank, and "
            + reason,
            "Set engine.zero_stage to 1 or 0, without overlap_comm, or engine=native.",
        )

    def build(
        self,
        dim: int,
        *,
        norm: NormConfig,
        output_scale: float,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MixedAttention:
        """Builds the module; arguments as in the contract."""
        self.check(dim)
        return MixedAttention(self, dim, norm, output_scale, layer, device, dtype)


class MixedAttention(Attention):
    """Routed attention of one block. Child: mixture."""

    has_report = True

    def __init__(
        self,
        config: MixedAttentionConfig,
        dim: int,
        norm: NormConfig,
        output_scale: float,
        layer: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        std = output_scale * dim**-0.5
        self.mixture = config.build_mixture(dim, layer=layer, norm=norm, output_std=std, device=device, dtype=dtype)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> AttentionOutput:
        """[B, S, D] -> [B, S, D] and a report; a position sees the positions of its document up to itself."""
        assert context.tokens is not None, "an attention that routes must know its tokens"
        output = self.mixture(x_BSD, x_BSD, x_BSD, context.sight, context.tokens)
        return AttentionOutput(output.out_BQD, output.report)

    def active_shares(self) -> dict[str, Fraction]:
        """Of an expert's three projections a token meets two as a key and a value, and the query's where it is
        routed."""
        return {"mixture.bank": (2 + self._chosen) / 3}

    def score_flops(self, length: int) -> float:
        """The mean expert's, times the experts of a query."""
        experts = [self.mixture.bank.experts[str(expert)] for expert in self.mixture.bank.expert_ids]
        each = [expert.score_flops(length) for expert in experts if isinstance(expert, AttentionExpert)]
        return float(self._chosen) * self.mixture.config.num_experts * sum(each) / len(each)

    @property
    def _chosen(self) -> Fraction:
        config = self.mixture.config
        return Fraction(config.router.experts_per_token(config.num_experts), config.num_experts)
