"""Attention with edge features against torch-geometric, numbers, and the forms that are built the long way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch_geometric.nn import GATv2Conv, TransformerConv

from moedist.model.attention.experts.contract import Sight, SparseEdges
from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig, EdgeFeaturedExpert
from moedist.model.attention.experts.standard import StandardConfig
from tests.model.attention.experts.made import EDGED, KINDS, B, D, E, H, Largest, S, build, edges, golden, rows


def number(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def pairs(num: int) -> tuple[Tensor, Tensor]:
    """Query and key of every pair of one sequence, in the order of a flattened [Q, S]."""
    query, key = torch.meshgrid(torch.arange(num), torch.arange(num), indexing="ij")
    return query.flatten(), key.flatten()


@pytest.mark.parametrize("case", ["key_value", "bias", "gated"])
def test_R2_46_golden(case: str):
    numbers = golden()
    expert = build(EdgeFeaturedConfig(edge_dim=2, mode=case), dim=2, num_heads=1)
    chosen = {"edge": torch.eye(2), "edge_score": torch.ones(1, 2), "edge_gate": torch.tensor([[1.0, 0.0]])}
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            parameter.copy_(chosen.get(name, torch.zeros(1) if name.endswith("bias") else torch.eye(2)))
    edge = number(numbers["e"])[None]
    inputs = [number(numbers[key])[None] for key in "qkv"]
    shown = expert(*inputs, Sight(edges=edge), need_weights=True)
    close(shown.weights_BHQS[0, 0], number(numbers[case]["weights"]), 1e-9)
    close(shown.out_BQD[0], number(numbers[case]["out"]), 1e-9)


def conv_of(expert: EdgeFeaturedExpert) -> torch.nn.Module:
    """torch-geometric's layer with the same weights."""
    width = D // H
    with torch.no_grad():
        if expert.config.mode == "gatv2":
            conv = GATv2Conv(D, width, heads=H, edge_dim=E, add_self_loops=False, bias=False).double()
            conv.lin_l.weight.copy_(expert.key)
            conv.lin_r.weight.copy_(expert.query)
            conv.att.copy_(expert.direction[None])
        else:
            conv = TransformerConv(D, width, heads=H, edge_dim=E, root_weight=False, bias=False).double()
            for linear, matrix in ((conv.lin_query, "query"), (conv.lin_key, "key"), (conv.lin_value, "value")):
                linear.weight.copy_(getattr(expert, matrix))
                if linear.bias is not None:
                    linear.bias.zero_()
        conv.lin_edge.weight.copy_(expert.edge)
    return conv


@pytest.mark.parametrize("mode", ["key_value", "gatv2"])
@pytest.mark.parametrize("graph", ["complete", "sparse"])
def test_equals_torch_geometric_with_gradients(mode: str, graph: str):
    """Edges that lead from key to query, and are unlike those that lead back."""
    expert = build(KINDS[mode])
    assert isinstance(expert, EdgeFeaturedExpert)
    conv, edge = conv_of(expert), edges()[:1]
    query, key = pairs(S)
    adjacent = torch.ones(S, S, dtype=torch.bool)
    if graph == "sparse":
        adjacent = torch.rand(S, S, generator=torch.Generator().manual_seed(2)) < 0.4
        adjacent |= torch.eye(S, dtype=torch.bool)
    chosen = adjacent.flatten()
    index = torch.stack([key, query])[:, chosen]
    x, twin = (rows(S, D, seed=4).requires_grad_() for _ in range(2))
    expected = conv(twin, index, edge[0].flatten(0, 1)[chosen])
    mask = adjacent[None, None]
    weight = rows(S, D, seed=5)
    expected_grad = torch.autograd.grad((expected * weight).sum(), twin)[0]
    sparse = SparseEdges(torch.zeros_like(query[chosen]), query[chosen], key[chosen], edge[0].flatten(0, 1)[chosen])
    for given in (edge, sparse):
        got = expert(x[None], x[None], x[None], Sight(mask_BHQS=mask, edges=given)).out_BQD[0]
        close(got, expected)
        close(torch.autograd.grad((got * weight).sum(), x)[0], expected_grad)


@pytest.mark.parametrize("name", EDGED)
def test_sparse_edges_give_what_dense_ones_with_zeros_give(name: str):
    expert = build(name)
    generator = torch.Generator().manual_seed(1)
    num = 25
    sequence, query, key = (torch.randint(high, (num,), generator=generator) for high in (B, S, S))
    query[-2:] = -1  # none
    feature = rows(num, E, seed=8).requires_grad_()
    sparse = SparseEdges(sequence, query, key, feature)
    inputs = [rows(B, S, D, seed=n).requires_grad_() for n in range(3)]
    weight, found = rows(B, S, D, seed=5), []
    for given in (sparse, sparse.dense(B, S, S)):
        attended = expert(*inputs, Sight(causal=True, edges=given), need_weights=True)
        tensors = [*inputs, feature, *expert.parameters()]
        found.append([attended.out_BQD, *torch.autograd.grad((attended.out_BQD * weight).sum(), tensors)])
    for one, other in zip(*found, strict=True):
        close(one, other)


@pytest.mark.parametrize("name", ["key_value", "bias"])
def test_without_edges_and_with_edges_of_zeros_it_is_plain_attention(name: str):
    expert, plain = build(name), build(StandardConfig())
    plain.load_state_dict({key: value for key, value in expert.state_dict().items() if not key.startswith("edge")})
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    expected = plain(*inputs, Sight(causal=True)).out_BQD
    close(expert(*inputs, Sight(causal=True)).out_BQD, expected, 0)
    close(expert(*inputs, Sight(causal=True, edges=torch.zeros_like(edges()))).out_BQD, expected)


def test_gates_need_edges_and_their_weights_sum_to_less_than_one():
    expert = build("gated")
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    gated = expert(*inputs, Sight(edges=edges()), need_weights=True).weights_BHQS.sum(3)
    assert (gated < 1).all() and (gated > 0).all()
    close(expert(*inputs, Sight(), need_weights=True).weights_BHQS.sum(3), torch.ones(B, H, S).double())


def test_gates_clip_the_scores_of_queries_and_keys_before_the_edges_term():
    expert = build("gated")
    query, key, value = (rows(B, S, D, seed=n) for n in range(3))
    edge = torch.zeros_like(edges())
    # So large that every score is -5 or 5: larger ones change nothing.
    far, farther = (expert(query * size, key, value, Sight(edges=edge), need_weights=True) for size in (1e5, 1e6))
    close(far.weights_BHQS, farther.weights_BHQS)
    ratio = far.weights_BHQS.amax(3) / far.weights_BHQS.amin(3)
    assert (ratio < 1.0001 * torch.tensor(10.0).exp()).all() and ratio.max() > 0.99 * torch.tensor(10.0).exp()


def test_gatv2_without_edges_is_gatv2_with_edges_of_zeros():
    expert = build("gatv2")
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    close(expert(*inputs, Sight()).out_BQD, expert(*inputs, Sight(edges=torch.zeros_like(edges()))).out_BQD)


def test_D18_two_queries_can_rank_keys_in_opposite_order():
    """GATv1, where the leaky ReLU comes after the product with a, ranks keys alike for every query."""
    expert = build(EdgeFeaturedConfig(edge_dim=1, mode="gatv2"), dim=2, num_heads=1)
    with torch.no_grad():
        expert.query.copy_(torch.eye(2))
        expert.key.copy_(torch.eye(2))
        expert.direction.copy_(torch.tensor([[1.0, 1.0]]))
    nodes = number([[[1.0, -1.0], [-1.0, 1.0]]])
    weights = expert(nodes, nodes, nodes, Sight(), need_weights=True).weights_BHQS[0, 0]
    assert weights[0, 0] > weights[0, 1] and weights[1, 0] < weights[1, 1]
    first = (nodes[0] @ number([1.0, 1.0]))[:, None] + (nodes[0] @ number([1.0, 1.0]))[None]
    static = torch.nn.functional.leaky_relu(first, 0.2)
    assert torch.equal(static.argsort(1)[0], static.argsort(1)[1])


@pytest.mark.parametrize("name", EDGED)
def test_D18_a_mask_hides_pairs_and_drops_no_edge(name: str):
    """In the original a mask silently dropped all edges."""
    expert = build(name)
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
    with_edges = expert(*inputs, Sight(mask_BHQS=mask, edges=edges())).out_BQD
    close(with_edges, expert(*inputs, Sight(causal=True, edges=edges())).out_BQD)
    assert (with_edges - expert(*inputs, Sight(mask_BHQS=mask)).out_BQD).abs().max() > 0.01


@pytest.mark.parametrize("name", EDGED)
def test_an_edge_leads_from_key_to_query(name: str):
    expert = build(name)
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    straight = expert(*inputs, Sight(edges=edges())).out_BQD
    turned = expert(*inputs, Sight(edges=edges().transpose(1, 2))).out_BQD
    assert (straight - turned).abs().max() > 0.01
    moved = edges().clone()
    moved[:, 3, 5] += 1  # what query 3 knows of key 5
    changed = (expert(*inputs, Sight(edges=moved)).out_BQD - straight).abs().amax(2) > 1e-9
    assert changed[:, 3].all() and changed.sum() == B


@pytest.mark.parametrize("name", ["key_value", "bias", "gated"])
def test_no_tensor_of_all_pairs_is_as_wide_as_a_head(name: str):
    """Of 8 dims, where the features are 1 wide: forward and backward."""
    expert = build(dataclasses.replace(KINDS[name], edge_dim=1), torch.float32, dim=16, num_heads=2)
    x, edge = rows(1, 40, 16, dtype=torch.float32), rows(1, 40, 40, 1, dtype=torch.float32)
    with Largest() as seen:
        expert(x, x, x, Sight(edges=edge)).out_BQD.sum().backward()
    assert seen.numel <= 2 * 40 * 40


def test_score_flops():
    flops = {name: build(name).score_flops(10) for name in EDGED}
    plain = 2 * 2 * D * 5
    assert flops == {
        "key_value": plain + 4 * H * E * 5 + 2 * D * E,
        "bias": plain + 2 * H * E * 5,
        "gated": plain + 4 * H * E * 5,
        "gatv2": (5 * D + (2 * E + 1) * D) * 5,
    }


@pytest.mark.parametrize("name", ["sequence_M", "query_M", "key_M"])
@pytest.mark.parametrize("mode", ["key_value", "bias", "gated", "gatv2"])
def test_an_edge_between_rows_that_are_not_there_is_an_error(mode: str, name: str):
    """It would else land at the next query's first key."""
    expert = build(EdgeFeaturedConfig(edge_dim=2, mode=mode))
    ends = {key: torch.zeros(1, dtype=torch.int64) for key in ("sequence_M", "query_M", "key_M")}
    ends[name] += B if name == "sequence_M" else S
    x = rows(B, S, D)
    sparse = SparseEdges(**ends, feature_Me=rows(1, 2))
    with pytest.raises(IndexError):
        expert(x, x, x, Sight(edges=sparse))
    row_BR = torch.arange(S - 1).expand(B, -1)
    if name != "key_M":
        with pytest.raises(IndexError):
            Sight(edges=sparse).of_rows(row_BR, torch.ones_like(row_BR, dtype=torch.bool), S)
