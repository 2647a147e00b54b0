"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2) as an expert."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.model.attention.experts.contract import Attended, ExpertSite, Sight, masked_softmax
from moedist.model.heads import Heads, HeadsConfig, ProjectedExpert, join_heads


@dataclasses.dataclass(frozen=True)
class StandardConfig(HeadsConfig):
    """``softmax(q k^T / sqrt(D / H)) v`` in each head, from projections without biases."""

    def build(self, site: ExpertSite) -> StandardExpert:  # noqa: D102
        return StandardExpert(self, site)


class StandardExpert(ProjectedExpert):
    """Multi-head attention without the projection behind it: ``torch.nn.MultiheadAttention(bias=False)``, with fused
    kernels unless the weights are asked for or dropped."""

    def forward(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, *, need_weights: bool = False
    ) -> Attended:
        """See the contract; edges are left aside."""
        heads = self.project(query_BQD, key_BSD, value_BSD, sight)
        if not need_weights and self.dropout == 0:
            return Attended(join_heads(fused_attention(heads, sight, query_BQD, key_BSD)), None)
        score_BHQS = heads.query_BHQh @ heads.key_BHSh.transpose(2, 3) * self.site.head_dim**-0.5
        if (bias := sight.bias()) is not None:
            score_BHQS = score_BHQS + bias.to(score_BHQS.dtype)
        weights_BHQS = masked_softmax(score_BHQS, sight.seen(query_BQD, key_BSD))
        weights_BHQS = self.drop(weights_BHQS, sight.names, sight.places(query_BQD))
        out_BQD = join_heads(weights_BHQS.to(heads.value_BHSh.dtype) @ heads.value_BHSh)
        return Attended(out_BQD, weights_BHQS if need_weights else None)

    def score_flops(self, length: int) -> float:
        """Two matmuls of 2 x D FLOPs per visible position; on average half of ``length`` is visible."""
        return 2 * 2 * self.site.dim * length / 2


def fused_attention(
    heads: Heads, sight: Sight, query_BQD: Tensor, key_BSD: Tensor, scale: float | None = None
) -> Tensor:
    """[B, H, Q, h]: torch's fused attention; zero for a query that sees nothing, on every backend.

    Args:
        query_BQD, key_BSD: what ``sight`` is of.
        scale: factor on the scores; None for one over the root of a head's width.
    """
    if sight.is_plain:
        return F.scaled_dot_product_attention(*heads, is_causal=sight.causal, scale=scale)
    seen, mask = sight.seen(query_BQD, key_BSD), sight.bias()
    mask = None if mask is None else mask.to(heads.query_BHQh.dtype)
    if seen is None:
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale)
    any_BHQ1 = seen.any(3, keepdim=True)
    seen = seen | ~any_BHQ1  # given all first: not every backend gives such a query zero
    mask = seen if mask is None else mask.masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).masked_fill(~any_BHQ1, 0)
