"""A graph layer: nodes attend to their neighbours by a mixture of attention experts that know the edges."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.config import require
from moedist.model.attention.experts.contract import Sight, SparseEdges
from moedist.model.attention.mixture import MixtureConfig
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw, below, fill_xavier_uniform, named_draw
from moedist.moe.report import MoEReport


class GraphOutput(NamedTuple):
    """What a graph layer returns.

    Attributes:
        node_BND: the nodes' new vectors.
        report: of the routing; ``pack_reports([report]).objective()`` joins the loss.
    """

    node_BND: Tensor
    report: MoEReport


class MoEGNNLayer(nn.Module):
    """``mixture(h, h, h)`` with ``h = gelu(W x + b)`` over each node's neighbours and itself.

    Edge features are encoded as ``relu(W e)``, without a bias, so that pairs without features stay at zero. A node
    without neighbours hears itself alone.

    Args:
        node_dim: width of the nodes (D).
        edge_dim: width of the edges' features; None where they have none.
        attention: the mixture. Its experts must be able to keep a mask; those that read edges say how wide they want
            them, all the same.
        layer: place of the layer in the model; names its first values and its noise.
        device, dtype: of its parameters.

    Raises:
        ConfigError: an expert does not fit the width, cannot keep the adjacency, or there are edge features and no
            expert that reads them.
    """

    def __init__(
        self,
        node_dim: int,
        edge_dim: int | None,
        attention: MixtureConfig,
        *,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.node_dim, self.edge_dim = node_dim, edge_dim
        encoded_dim = _check_experts(attention, edge_dim)
        self.node_transform = nn.Linear(node_dim, node_dim, device=device, dtype=dtype)
        self.edge_encoder: nn.Linear | None = None
        if edge_dim is not None and encoded_dim is not None:
            self.edge_encoder = nn.Linear(edge_dim, encoded_dim, bias=False, device=device, dtype=dtype)
        self.mixture = attention.build_mixture(node_dim, layer=layer, device=device, dtype=dtype)
        if not self.node_transform.weight.is_meta:
            self.init_weights(named_draw(0, f"layer.{layer}"))

    def forward(
        self,
        node_BND: Tensor,
        adjacency: Tensor,
        edges: Tensor | SparseEdges | None = None,
        *,
        valid_BN: Tensor | None = None,
        ctx: TokenContext | None = None,
    ) -> GraphOutput:
        """[B, N, D] nodes of B graphs -> [B, N, D].

        Args:
            adjacency: [N, N] or [B, N, N], not zero at [i, j] where node i hears node j.
            edges: [B, N, N, edge_dim] features of what i hears of j, or `SparseEdges` whose query is i and whose key is
                j; None where ``edge_dim`` is.
            valid_BN: bool, false at places of smaller graphs that hold no node; None for none.
            ctx: of the nodes, T = B * N; None for one that counts this call alone.

        Raises:
            ValueError: shapes that do not fit, with the numbers.
        """
        self._check(node_BND, adjacency, edges)
        num_graphs, num_nodes, _ = node_BND.shape
        itself_NN = torch.eye(num_nodes, dtype=torch.bool, device=node_BND.device)
        mask_BNN = (adjacency.unsqueeze(0) if adjacency.dim() == 2 else adjacency).ne(0) | itself_NN
        sight = Sight(key_valid_BS=valid_BN, mask_BHQS=mask_BNN[:, None], edges=self._encode(edges))
        if ctx is None:
            valid_T = None if valid_BN is None else valid_BN.flatten()
            device, training = node_BND.device, self.training
            ctx = TokenContext.of_rows(num_graphs, num_nodes, device=device, valid_T=valid_T, training=training)
        hidden_BND = F.gelu(self.node_transform(node_BND))
        output = self.mixture(hidden_BND, hidden_BND, hidden_BND, sight, ctx)
        return GraphOutput(output.out_BQD, output.report)

    def init_weights(self, draw: Draw) -> None:
        """Xavier uniform matrices, a zero bias, and the mixture as it says."""
        fill_xavier_uniform(self.node_transform.weight, draw("node_transform.weight"))
        nn.init.zeros_(self.node_transform.bias)
        if self.edge_encoder is not None:
            fill_xavier_uniform(self.edge_encoder.weight, draw("edge_encoder.weight"))
        self.mixture.init_weights(below(draw, "mixture"))

    def _encode(self, edges: Tensor | SparseEdges | None) -> Tensor | SparseEdges | None:
        if edges is None or self.edge_encoder is None:
            return None
        if isinstance(edges, SparseEdges):
            return dataclasses.replace(edges, feature_Me=F.relu(self.edge_encoder(edges.feature_Me)))
        return F.relu(self.edge_encoder(edges))

    def _check(self, node_BND: Tensor, adjacency: Tensor, edges: Tensor | SparseEdges | None) -> None:
        if node_BND.dim() != 3 or node_BND.shape[2] != self.node_dim:
            raise ValueError(f"nodes have the shape {list(node_BND.shape)}, not [B, N, {self.node_dim}]")
        num_graphs, num_nodes, _ = node_BND.shape
        if list(adjacency.shape) not in ([num_nodes, num_nodes], [num_graphs, num_nodes, num_nodes]):
            raise ValueError(
                f"the adjacency has the shape {list(adjacency.shape)}, and {num_graphs} graphs of {num_nodes} nodes "
                f"need {[num_nodes, num_nodes]} or {[num_graphs, num_nodes, num_nodes]}"
            )
        if (edges is None) != (self.edge_dim is None):
            raise ValueError(f"the layer was built with edge_dim = {self.edge_dim}, and edges are {_said(edges)}")
        if edges is None or self.edge_dim is None:
            return
        feature = edges.feature_Me if isinstance(edges, SparseEdges) else edges
        sparse = isinstance(edges, SparseEdges)
        pairs = [feature.shape[0]] if sparse else [num_graphs, num_nodes, num_nodes]
        if list(feature.shape) != [*pairs, self.edge_dim]:
            raise ValueError(f"edge features have the shape {list(feature.shape)}, not {[*pairs, self.edge_dim]}")


def _said(edges: Tensor | SparseEdges | None) -> str:
    return "not given" if edges is None else "given"


def _check_experts(attention: MixtureConfig, edge_dim: int | None) -> int | None:
    """The width that edges are encoded to; None where there are none."""
    for place, expert in enumerate(attention.experts):
        require(
            expert.keeps_masks,
            f"experts.{place}.kind",
            expert.kind,
            "has no weights of single pairs, and could not keep to a node's neighbours",
            "Take standard, hyperbolic or edge_featured.",
        )
    wanted = sorted({expert.edge_width for expert in attention.experts if expert.edge_width is not None})
    require(
        edge_dim is None or len(wanted) == 1,
        "experts",
        [expert.kind for expert in attention.experts],
        "read no edges, and edge_dim is set" if not wanted else f"want edges of the widths {wanted}",
        "List an edge_featured expert, or set edge_dim to None."
        if not wanted
        else "Give all of them the same edge_dim.",
    )
    return None if edge_dim is None else wanted[0]
