"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2) as an expert."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.model.attention.experts.contract import Attended, ExpertSite, Sight, masked_softmax
from moedist.model.heads import HeadsConfig, ProjectedExpert, join_heads


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
        if sight.is_plain and not need_weights and self.dropout == 0:
            return Attended(join_heads(F.scaled_dot_product_attention(*heads, is_causal=sight.causal)), None)
        seen, bias = sight.seen(query_BQD, key_BSD), sight.bias()
        if not need_weights and self.dropout == 0:
            return Attended(join_heads(attend_behind_mask(*heads, seen, bias)), None)
        score_BHQS = heads.query_BHQh @ heads.key_BHSh.transpose(2, 3) * self.site.head_dim**-0.5
        if bias is not None:
            score_BHQS = score_BHQS + bias.to(score_BHQS.dtype)
        weights_BHQS = self.drop(masked_softmax(score_BHQS, seen), sight.names, sight.places(query_BQD))
        out_BQD = join_heads(weights_BHQS.to(heads.value_BHSh.dtype) @ heads.value_BHSh)
        return Attended(out_BQD, weights_BHQS if need_weights else None)

    def score_flops(self, length: int) -> float:
        """Two matmuls of 2 x D FLOPs per visible position; on average half of ``length`` is visible."""
        return 2 * 2 * self.site.dim * length / 2


def attend_behind_mask(
    query_BHQh: Tensor,
    key_BHSh: Tensor,
    value_BHSh: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """[B, H, Q, h]: torch's fused attention; zero for a query that sees nothing, on every backend.

    Args:
        seen: as `Sight.seen` gives it.
        bias: added to the scores.
        scale: factor on the scores; None for one over the root of a head's width.
    """
    any_BHQ1 = None if seen is None else seen.any(3, keepdim=True)
    mask = bias if bias is None else bias.to(query_BHQh.dtype)
    if seen is not None and any_BHQ1 is not None:
        open_BHQS = seen | ~any_BHQ1  # given all first: not every backend gives such a query zero
        mask = open_BHQS if mask is None else mask.masked_fill(~open_BHQS, -torch.inf)
    out_BHQh = F.scaled_dot_product_attention(query_BHQh, key_BHSh, value_BHSh, attn_mask=mask, scale=scale)
    return out_BHQh if any_BHQ1 is None else out_BHQh.masked_fill(~any_BHQ1, 0)
