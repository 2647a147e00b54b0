"""Attention that knows about pairs: features of the edge between a query and a key enter its score and its value."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.config import require
from moedist.model.attention.experts.contract import Attended, ExpertSite, Sight, SparseEdges, masked_softmax
from moedist.model.attention.experts.standard import StandardExpert
from moedist.model.heads import Heads, HeadsConfig, join_heads, with_zero_gradients
from moedist.moe.init import Draw, fill_xavier_uniform

_CLIP = 5.0
"""Bound of the scores of ``gated`` before the edge's term (Hussain et al. 2022, section 3.2)."""
_SLOPE = 0.2
"""Of the leaky ReLU of ``gatv2`` below zero (Brody et al. 2022)."""

Edges = Tensor | SparseEdges


@dataclasses.dataclass(frozen=True)
class EdgeFeaturedConfig(HeadsConfig):
    """Attention with edge features e_ij, i being the query and j the key.

    Attributes:
        edge_dim: width of the features.
        mode: where they enter.
            ``key_value`` (Shi et al. 2021): W_e e_ij is added to key and value; no tensor of all pairs is as wide as a
            head.
            ``bias`` (Ying et al. 2021): each head adds a linear map of e_ij to the score.
            ``gated`` (Hussain et al. 2022): as ``bias``, the score first clipped to [-5, 5], and each weight times a
            sigmoid of another linear map: weights sum to less than 1.
            ``gatv2`` (Brody et al. 2022): the score is a^T leakyReLU(W_q x_i + W_k x_j + W_e e_ij), the value W_k x_j.
            This does have a tensor of all pairs, as wide as a head.
    """

    edge_dim: int = 16
    mode: Literal["key_value", "bias", "gated", "gatv2"] = "key_value"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.edge_dim >= 1, "edge_dim", self.edge_dim, "is no width", "Set it to 1 or more.")
        if self.mode == "key_value":
            self.refuse("rope_theta", "what is added to a key by its edge would not turn with the key's place")
        if self.mode == "gatv2":
            for key in ("rope_theta", "qk_norm", "num_kv_heads"):
                self.refuse(key, "gatv2 compares by a sum and not by a dot product of queries and keys")

    @property
    def edge_width(self) -> int:
        """As wide as ``edge_dim`` says."""
        return self.edge_dim

    def build(self, site: ExpertSite) -> EdgeFeaturedExpert:  # noqa: D102
        modes = {"key_value": KeyValueExpert, "bias": BiasExpert, "gated": GatedExpert, "gatv2": GATv2Expert}
        return modes[self.mode](self, site)


class EdgeFeaturedExpert(StandardExpert):
    """Scaled dot-product attention with a part for edges; without edges it is `StandardExpert`.

    A subclass has the edge's parameters, which start Xavier uniform where they are matrices, and zero elsewhere.
    """

    def __init__(self, config: EdgeFeaturedConfig, site: ExpertSite):
        super().__init__(config, site)
        self.config = config

    def init_weights(self, draw: Draw) -> None:
        """Xavier uniform matrices, zero biases."""
        super().init_weights(draw)
        for name, parameter in self.edge_parameters().items():
            if parameter.dim() == 2:
                fill_xavier_uniform(parameter, draw(name))
            else:
                nn.init.zeros_(parameter)

    def edge_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that need edges, by name."""
        return {name: value for name, value in self.named_parameters(recurse=False) if name.startswith("edge")}

    def forward(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, *, need_weights: bool = False
    ) -> Attended:
        """See the contract.

        Raises:
            ValueError: the edges of ``sight`` have another shape than its queries and keys, or another width.
        """
        if sight.edges is None:
            return self.without_edges(query_BQD, key_BSD, value_BSD, sight, need_weights)
        edges = self._checked(sight.edges, query_BQD, key_BSD)
        return self.with_edges(query_BQD, key_BSD, value_BSD, sight, edges, need_weights)

    def without_edges(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, need_weights: bool
    ) -> Attended:
        """Plain attention."""
        out_BQD, weights_BHQS = super().forward(query_BQD, key_BSD, value_BSD, sight, need_weights=need_weights)
        return Attended(with_zero_gradients(out_BQD, [*self.edge_parameters().values()]), weights_BHQS)

    def with_edges(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, edges: Edges, need_weights: bool
    ) -> Attended:
        """Attention with the scores, gates and values of this mode."""
        heads = self.project(query_BQD, key_BSD, value_BSD, sight)
        score_BHQS = self.scores(heads, edges)
        if (bias := sight.bias()) is not None:
            score_BHQS = score_BHQS + bias.to(score_BHQS.dtype)
        weights_BHQS = self.gate(masked_softmax(score_BHQS, sight.seen(query_BQD, key_BSD)), edges)
        weights_BHQS = self.drop(weights_BHQS, sight.names, sight.places(query_BQD))
        taken_BHQS = weights_BHQS.to(heads.value_BHSh.dtype)
        out_BHQh = self.values(taken_BHQS @ heads.value_BHSh, taken_BHQS, edges)
        return Attended(join_heads(out_BHQh), weights_BHQS if need_weights else None)

    def scores(self, heads: Heads, edges: Edges) -> Tensor:
        """[B, H, Q, S] before the mask."""
        raise NotImplementedError

    def gate(self, weights_BHQS: Tensor, edges: Edges) -> Tensor:
        """The weights after softmax: as they are."""
        return weights_BHQS

    def values(self, out_BHQh: Tensor, weights_BHQS: Tensor, edges: Edges) -> Tensor:
        """The weighted sum of values, with the edges' part of it: as it is."""
        return out_BHQh

    def dot_products(self, heads: Heads) -> Tensor:
        """[B, H, Q, S]: q k^T over the root of a head's width."""
        return heads.query_BHQh @ heads.key_BHSh.transpose(2, 3) * self.site.head_dim**-0.5

    def score_flops(self, length: int) -> float:
        """Those of `StandardExpert` and ``edge_flops`` per visible position."""
        return super().score_flops(length) + self.edge_flops() * length / 2

    def edge_flops(self) -> float:
        """FLOPs per visible position for the edge."""
        raise NotImplementedError

    def _checked(self, edges: Edges, query_BQD: Tensor, key_BSD: Tensor) -> Edges:
        """The edges in the dtype of the projections; raises `ValueError` where their shape is wrong."""
        wanted = [query_BQD.shape[0], query_BQD.shape[1], key_BSD.shape[1], self.config.edge_dim]
        sparse = isinstance(edges, SparseEdges)
        feature = edges.feature_Me if isinstance(edges, SparseEdges) else edges
        got, needed = list(feature.shape), [feature.shape[0], wanted[-1]] if sparse else wanted
        if got != needed:
            raise ValueError(
                f"edge features have the shape {got}, and {wanted[1]} queries and {wanted[2]} keys in each of "
                f"{wanted[0]} sequences with edge_dim = {wanted[3]} need {needed}"
            )
        feature = feature.to(query_BQD.dtype)
        return dataclasses.replace(edges, feature_Me=feature) if isinstance(edges, SparseEdges) else feature


class KeyValueExpert(EdgeFeaturedExpert):
    """``s_ij = q_i (k_j + W_e e_ij) / sqrt(h)``, ``o_i = sum_j a_ij (v_j + W_e e_ij)``, computed as
    ``(W_e^T q_i) e_ij`` and ``W_e sum_j a_ij e_ij``.

    Attributes:
        edge: W_e, [D, d_e].
    """

    def __init__(self, config: EdgeFeaturedConfig, site: ExpertSite):
        super().__init__(config, site)
        self.edge = site.parameter(site.dim, config.edge_dim)

    def scores(self, heads: Heads, edges: Edges) -> Tensor:  # noqa: D102
        query_BHQh = heads.query_BHQh
        probe_BHQe = torch.einsum("bhqd,hde->bhqe", query_BHQh, self._edge_Hhe().to(query_BHQh.dtype))
        probe_BHQe = probe_BHQe * self.site.head_dim**-0.5
        if isinstance(edges, Tensor):
            return self.dot_products(heads) + torch.einsum("bhqe,bqse->bhqs", probe_BHQe, edges)
        probe_MHe = probe_BHQe.transpose(1, 2)[edges.sequence_M, edges.query_M]
        number_MH = torch.einsum("mhe,me->mh", probe_MHe, edges.feature_Me)
        return self.dot_products(heads) + _of_pairs(number_MH, edges, _sizes(heads))

    def values(self, out_BHQh: Tensor, weights_BHQS: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        if isinstance(edges, Tensor):
            mean_BHQe = torch.einsum("bhqs,bqse->bhqe", weights_BHQS, edges)
        else:
            num_sequences, num_heads, num_queries, _ = weights_BHQS.shape
            weight_MH = weights_BHQS.permute(0, 2, 3, 1)[edges.sequence_M, edges.query_M, edges.key_M]
            weight_MH = weight_MH.masked_fill(edges.query_M[:, None] < 0, 0)
            row_M = edges.sequence_M * num_queries + edges.query_M.clamp_min(0)
            added_MHe = weight_MH[:, :, None] * edges.feature_Me[:, None, :]
            mean_NHe = added_MHe.new_zeros(num_sequences * num_queries, num_heads, added_MHe.shape[2])
            mean_NHe = mean_NHe.index_add(0, row_M, added_MHe)
            mean_BHQe = mean_NHe.unflatten(0, (num_sequences, num_queries)).transpose(1, 2)
        return out_BHQh + torch.einsum("bhqe,hde->bhqd", mean_BHQe, self._edge_Hhe().to(out_BHQh.dtype))

    def score_flops(self, length: int) -> float:
        """As the others; and W_e is applied twice to a query row, where a parameter counts once."""
        return super().score_flops(length) + 2 * self.site.dim * self.config.edge_dim

    def edge_flops(self) -> float:  # noqa: D102
        return 2 * 2 * self.site.num_heads * self.config.edge_dim

    def _edge_Hhe(self) -> Tensor:
        return self.edge.unflatten(0, (self.site.num_heads, self.site.head_dim))


class BiasExpert(EdgeFeaturedExpert):
    """``s_ij = q_i k_j / sqrt(h) + w_h e_ij``; a constant beside w_h would cancel under softmax.

    Attributes:
        edge_score: [H, d_e].
    """

    def __init__(self, config: EdgeFeaturedConfig, site: ExpertSite):
        super().__init__(config, site)
        self.edge_score = site.parameter(site.num_heads, config.edge_dim)

    def scores(self, heads: Heads, edges: Edges) -> Tensor:  # noqa: D102
        return self.dot_products(heads) + _mapped(edges, self.edge_score, _sizes(heads))

    def edge_flops(self) -> float:  # noqa: D102
        return 2 * self.site.num_heads * self.config.edge_dim


class GatedExpert(EdgeFeaturedExpert):
    """``a_ij = softmax_j(clip(q_i k_j / sqrt(h), -5, 5) + E_h e_ij) sigmoid(G_h e_ij)``.

    Attributes:
        edge_score, edge_score_bias, edge_gate, edge_gate_bias: [H, d_e] and [H] of E_h and G_h. The first bias cancels
            under softmax; the source has it.
    """

    def __init__(self, config: EdgeFeaturedConfig, site: ExpertSite):
        super().__init__(config, site)
        self.edge_score = site.parameter(site.num_heads, config.edge_dim)
        self.edge_score_bias = site.parameter(site.num_heads)
        self.edge_gate = site.parameter(site.num_heads, config.edge_dim)
        self.edge_gate_bias = site.parameter(site.num_heads)

    def scores(self, heads: Heads, edges: Edges) -> Tensor:  # noqa: D102
        added_BHQS = _mapped(edges, self.edge_score, _sizes(heads)) + self.edge_score_bias[:, None, None]
        return self.dot_products(heads).clamp(-_CLIP, _CLIP) + added_BHQS

    def gate(self, weights_BHQS: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        num_sequences, _, num_queries, num_keys = weights_BHQS.shape
        gate_BHQS = _mapped(edges, self.edge_gate, (num_sequences, num_queries, num_keys))
        gate_BHQS = gate_BHQS + self.edge_gate_bias[:, None, None]
        return weights_BHQS * gate_BHQS.sigmoid()

    def edge_flops(self) -> float:  # noqa: D102
        return 2 * 2 * self.site.num_heads * self.config.edge_dim


class GATv2Expert(EdgeFeaturedExpert):
    """``s_ij = a_h^T leakyReLU(W_q x_i + W_k x_j + W_e e_ij)``, ``o_i = sum_j a_ij W_k x_j``.

    The order of keys can differ between queries, as it cannot where the leaky ReLU comes after the product with a
    (GATv1). Without edges, e_ij is zero.

    Attributes:
        value: none: W_k projects values too.
        edge: W_e, [D, d_e].
        direction: a, [H, D / H].
    """

    def __init__(self, config: EdgeFeaturedConfig, site: ExpertSite):
        super().__init__(config, site)
        self.register_parameter("value", None)
        self.edge = site.parameter(site.dim, config.edge_dim)
        self.direction = site.parameter(site.num_heads, site.head_dim)

    def init_weights(self, draw: Draw) -> None:
        """Xavier uniform."""
        super().init_weights(draw)
        fill_xavier_uniform(self.direction, draw("direction"))

    def value_weight(self) -> Tensor:
        """W_k."""
        return self.key

    def without_edges(  # noqa: D102
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, need_weights: bool
    ) -> Attended:
        no_pair_M = torch.zeros(0, dtype=torch.int64, device=query_BQD.device)
        none = SparseEdges(no_pair_M, no_pair_M, no_pair_M, query_BQD.new_zeros(0, self.config.edge_dim))
        return self.with_edges(query_BQD, key_BSD, value_BSD, sight, none, need_weights)

    def scores(self, heads: Heads, edges: Edges) -> Tensor:  # noqa: D102
        if isinstance(edges, SparseEdges):
            edges = edges.dense(*_sizes(heads))
        query_BHQh = heads.query_BHQh
        edge_BHQSh = F.linear(edges, self.edge.to(edges.dtype)).unflatten(3, (self.site.num_heads, -1)).movedim(3, 1)
        summed_BHQSh = query_BHQh[:, :, :, None] + heads.key_BHSh[:, :, None] + edge_BHQSh
        return torch.einsum("bhqsd,hd->bhqs", F.leaky_relu(summed_BHQSh, _SLOPE), self.direction.to(query_BHQh.dtype))

    def score_flops(self, length: int) -> float:
        """Per dim and visible position (half of ``length``) 1 FLOP for the sum, 2 for the product with a, 2 for the
        sum of values; and the edge's."""
        return (5 * self.site.dim + self.edge_flops()) * length / 2

    def edge_flops(self) -> float:  # noqa: D102
        return (2 * self.config.edge_dim + 1) * self.site.dim


def _sizes(heads: Heads) -> tuple[int, int, int]:
    """B, Q and S."""
    return heads.query_BHQh.shape[0], heads.query_BHQh.shape[2], heads.key_BHSh.shape[2]


def _of_pairs(number_MH: Tensor, edges: SparseEdges, sizes: tuple[int, int, int]) -> Tensor:
    """[B, H, Q, S]: a number for each head and edge, at its pair; zero elsewhere."""
    return dataclasses.replace(edges, feature_Me=number_MH).dense(*sizes).movedim(3, 1)


def _mapped(edges: Edges, weight_He: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """[B, H, Q, S]: a linear map of each pair's features."""
    if isinstance(edges, SparseEdges):
        return _of_pairs(F.linear(edges.feature_Me, weight_He.to(edges.feature_Me.dtype)), edges, sizes)
    return F.linear(edges, weight_He.to(edges.dtype)).movedim(3, 1)
