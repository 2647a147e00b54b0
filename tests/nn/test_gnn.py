"""The graph layer: what a node hears of whom."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moedist.config import ConfigError
from moedist.model.attention.experts.contract import SparseEdges
from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.mixture import MixtureConfig
from moedist.moe import pack_reports
from moedist.nn.gnn import MoEGNNLayer

B, N, D, E = 2, 7, 12, 3
EXPERTS = (
    EdgeFeaturedConfig(edge_dim=5),
    HyperbolicConfig(),
    StandardConfig(),
    EdgeFeaturedConfig(edge_dim=5, mode="gatv2"),
)


def build(edge_dim: int | None = E, experts: tuple = EXPERTS, **changes: Any) -> MoEGNNLayer:
    return MoEGNNLayer(D, edge_dim, MixtureConfig(num_heads=3, experts=experts), dtype=torch.float64, **changes)


def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, an adjacency that is no mirror of itself and leaves node 4 alone, and edge features."""
    draw = torch.Generator().manual_seed(0)
    nodes = torch.randn(B, N, D, dtype=torch.float64, generator=draw)
    adjacency = torch.rand(N, N, generator=draw) < 0.35
    adjacency[4], adjacency[:, 4] = False, False
    return nodes, adjacency, torch.randn(B, N, N, E, dtype=torch.float64, generator=draw)


def changed(before: Tensor, after: Tensor) -> set[int]:
    """Nodes whose vector moved in the first graph."""
    return set((before - after)[0].abs().amax(1).gt(1e-12).nonzero()[:, 0].tolist())


def test_R2_55_node_transform_edge_encoder_and_adjacency_are_applied():
    """Each of the three was there in the original, and none was used."""
    layer, (nodes, adjacency, edges) = build(), graph()
    out = layer(nodes, adjacency, edges).node_BND
    assert out.shape == nodes.shape and out.isfinite().all()
    # A node is heard by those whose rows name it, and by itself.
    moved = nodes.clone()
    moved[0, 2] += 1
    hears = set(adjacency[:, 2].nonzero()[:, 0].tolist()) | {2}
    assert changed(out, layer(moved, adjacency, edges).node_BND) == hears and len(hears) < N
    # So is an edge, where there is one.
    told = edges.clone()
    told[0, 1] += 1
    assert changed(out, layer(nodes, adjacency, told).node_BND) <= {1}
    hidden = edges.clone()
    hidden[:, ~adjacency & ~torch.eye(N, dtype=torch.bool)] = 1e3
    assert not changed(out, layer(nodes, adjacency, hidden).node_BND)
    for part in (layer.node_transform, layer.edge_encoder):
        twin = copy.deepcopy(layer)
        assert part is not None
        own = twin.get_submodule("node_transform" if part is layer.node_transform else "edge_encoder")
        with torch.no_grad():
            own.weight.mul_(2)
        assert changed(out, twin(nodes, adjacency, edges).node_BND)


def test_a_node_without_neighbours_hears_itself_and_gradients_are_finite():
    layer, (nodes, adjacency, edges) = build(), graph()
    nodes.requires_grad_()
    for seen in (adjacency, torch.zeros_like(adjacency)):
        output = layer(nodes, seen, edges)
        loss = output.node_BND.square().sum() + pack_reports([output.report]).objective()
        grads = torch.autograd.grad(loss, [nodes, *layer.parameters()])
        assert all(grad.isfinite().all() for grad in grads)
        assert all(grad.any() for grad in grads[1:3])
        alone = layer(nodes[:, 4:5], seen[4:5, 4:5], edges[:, 4:5, 4:5]).node_BND
        torch.testing.assert_close(output.node_BND[:, 4:5], alone, rtol=0, atol=1e-12)
        # It hears itself, which an adjacency without its own place would not let it do.
        moved = nodes.detach().clone()
        moved[0, 4] += 1
        assert changed(output.node_BND, layer(moved, seen, edges).node_BND) == {4}
        assert output.node_BND[:, 4].abs().amin() > 0


def test_sparse_edges_are_dense_ones_with_zeros_and_numbers_are_no_weights():
    layer, (nodes, adjacency, edges) = build(), graph()
    sequence, query, key = adjacency.expand(B, -1, -1).nonzero().unbind(1)
    sparse = SparseEdges(sequence, query, key, edges[sequence, query, key])
    dense = torch.where(adjacency[None, :, :, None], edges, 0)
    expected = layer(nodes, adjacency, dense).node_BND
    torch.testing.assert_close(layer(nodes, 3 * adjacency.double(), sparse).node_BND, expected, rtol=0, atol=1e-12)


def test_graphs_of_unlike_sizes_are_as_if_alone():
    layer, (nodes, adjacency, edges) = build(), graph()
    each = torch.stack([adjacency, adjacency.T])
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[1, 5:] = False
    both = layer(nodes, each, edges, valid_BN=valid)
    small = layer(nodes[1:, :5], each[1, :5, :5], edges[1:, :5, :5]).node_BND
    torch.testing.assert_close(both.node_BND[1:, :5], small, rtol=0, atol=1e-12)
    assert int(both.report.asked_E.sum()) == 2 * (N + 5)


def test_without_edge_features():
    layer, (nodes, adjacency, _) = build(None, (StandardConfig(), HyperbolicConfig())), graph()
    assert layer.edge_encoder is None and layer(nodes, adjacency).node_BND.isfinite().all()


def test_first_values_follow_the_layer():
    first, again, second = build(), build(), build(layer=1)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.node_transform.weight, second.node_transform.weight)


def test_experts_that_cannot_are_refused():
    with pytest.raises(ConfigError, match="experts.1.kind = 'linear' has no weights of single pairs"):
        build(experts=(EdgeFeaturedConfig(edge_dim=5), LinearConfig()))
    with pytest.raises(ConfigError, match="read no edges, and edge_dim is set. List an edge_featured expert"):
        build(experts=(StandardConfig(), StandardConfig()))
    with pytest.raises(ConfigError, match=r"want edges of the widths \[4, 5\]. Give all of them the same edge_dim"):
        build(experts=(EdgeFeaturedConfig(edge_dim=5), EdgeFeaturedConfig(edge_dim=4)))


def test_shapes_that_do_not_fit_are_named():
    layer, (nodes, adjacency, edges) = build(), graph()
    for arguments, message in [
        ((nodes[..., :4], adjacency, edges), r"nodes have the shape \[2, 7, 4\], not \[B, N, 12\]"),
        ((nodes, adjacency[:5], edges), r"the shape \[5, 7\], and 2 graphs of 7 nodes need \[7, 7\] or \[2, 7, 7\]"),
        ((nodes, adjacency, edges[..., :2]), r"edge features have the shape \[2, 7, 7, 2\], not \[2, 7, 7, 3\]"),
        ((nodes, adjacency), "edge_dim = 3, and edges are not given"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
