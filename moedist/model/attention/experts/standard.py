"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2) as an expert."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.model.attention.experts.contract import (
    Attended,
    AttentionExpert,
    AttentionExpertConfig,
    ExpertSite,
    Sight,
    masked_softmax,
)
from moedist.moe.init import Draw, fill_xavier_uniform


@dataclasses.dataclass(frozen=True)
class StandardConfig(AttentionExpertConfig):
    """``softmax(q k^T / sqrt(D / H)) v`` in each head, from projections without biases."""

    def build(self, site: ExpertSite) -> StandardExpert:  # noqa: D102
        return StandardExpert(site)


class StandardExpert(AttentionExpert):
    """Multi-head attention without the projection behind it.

    Attributes:
        query, key, value: [D, D].
    """

    def __init__(self, site: ExpertSite):
        super().__init__()
        self.site = site
        self.query = site.parameter(site.dim, site.dim)
        self.key = site.parameter(site.dim, site.dim)
        self.value = site.parameter(site.dim, site.dim)

    def init_weights(self, draw: Draw) -> None:
        """Xavier uniform."""
        for name, parameter in self.named_parameters():
            fill_xavier_uniform(parameter, draw(name))

    def forward(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, *, need_weights: bool = False
    ) -> Attended:
        """See the contract; edges are left aside."""
        q_BHQh = self._heads(F.linear(query_BQD, self.query))
        k_BHSh = self._heads(F.linear(key_BSD, self.key))
        v_BHSh = self._heads(F.linear(value_BSD, self.value))
        dropout = self.site.dropout if self.training else 0.0
        weights_BHQS: Tensor | None = None
        if need_weights:
            score_BHQS = q_BHQh @ k_BHSh.transpose(2, 3) * self.site.head_dim**-0.5
            if (bias := sight.bias()) is not None:
                score_BHQS = score_BHQS + bias.to(score_BHQS.dtype)
            weights_BHQS = F.dropout(masked_softmax(score_BHQS, sight.seen(query_BQD, key_BSD)), dropout)
            out_BHQh = weights_BHQS @ v_BHSh
        elif sight.is_plain and query_BQD.shape[1] == key_BSD.shape[1]:
            out_BHQh = F.scaled_dot_product_attention(q_BHQh, k_BHSh, v_BHSh, dropout_p=dropout, is_causal=sight.causal)
        else:
            out_BHQh = self._behind_mask(q_BHQh, k_BHSh, v_BHSh, sight.seen(query_BQD, key_BSD), sight.bias(), dropout)
        return Attended(out_BHQh.transpose(1, 2).flatten(2), weights_BHQS)

    def score_flops(self, length: int) -> float:
        """Two matmuls of 2 x D FLOPs per visible position; on average half of ``length`` is visible."""
        return 2 * 2 * self.site.dim * length / 2

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(2, (self.site.num_heads, self.site.head_dim)).transpose(1, 2)

    @staticmethod
    def _behind_mask(
        q_BHQh: Tensor, k_BHSh: Tensor, v_BHSh: Tensor, seen: Tensor | None, bias: Tensor | None, dropout: float
    ) -> Tensor:
        """[B, H, Q, h]; 0 for a query that sees nothing, which is given all first: not every backend gives it 0."""
        if seen is None:
            mask = None if bias is None else bias.to(q_BHQh.dtype)
            return F.scaled_dot_product_attention(q_BHQh, k_BHSh, v_BHSh, attn_mask=mask, dropout_p=dropout)
        any_BHQ1 = seen.any(3, keepdim=True)
        mask = seen | ~any_BHQ1
        if bias is not None:
            mask = bias.to(q_BHQh.dtype).masked_fill(~mask, -torch.inf)
        out_BHQh = F.scaled_dot_product_attention(q_BHQh, k_BHSh, v_BHSh, attn_mask=mask, dropout_p=dropout)
        return out_BHQh.masked_fill(~any_BHQ1, 0)
