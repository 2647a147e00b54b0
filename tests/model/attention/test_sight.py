"""What a query sees, and the standard expert held against torch's own attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from moedist.config import ConfigError
from moedist.launch.choices import list_choices
from moedist.launch.decode import decode
from moedist.model.attention.experts.contract import AttentionExpertConfig, ExpertSite, Sight, SparseEdges
from moedist.model.attention.experts.standard import StandardConfig
from moedist.moe.init import named_draw

B, S, D, H = 2, 7, 12, 3


def make(**site: object) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """An expert, and queries and keys."""
    expert = StandardConfig().build(ExpertSite(D, H, dtype=torch.float64, **site))
    expert.init_weights(named_draw(0))
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(B, n, D, dtype=torch.float64, generator=draw) for n in (S, S))
    return expert, query, key


def sights() -> dict[str, Sight]:
    draw = torch.Generator().manual_seed(1)
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, 5:] = False
    document = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1]])
    mask = torch.rand(B, H, S, S, generator=draw) < 0.7
    additive = torch.randn(1, H, S, S, generator=draw, dtype=torch.float64).masked_fill(~mask[:1], -torch.inf)
    return {
        "all": Sight(),
        "causal": Sight(causal=True),
        "padding": Sight(key_valid_BS=valid),
        "documents": Sight(causal=True, document_BS=document, key_valid_BS=valid),
        "mask": Sight(mask_BHQS=mask),
        "additive": Sight(causal=True, mask_BHQS=additive),
    }


def test_it_is_a_choice_that_decodes_from_a_list():
    assert list_choices(AttentionExpertConfig)["standard"] is StandardConfig
    assert decode(StandardConfig, {}) == StandardConfig()


@pytest.mark.parametrize("name", list(sights()))
def test_equals_torchs_attention(name: str):
    expert, query, key = make()
    sight = sights()[name]
    twin = nn.MultiheadAttention(D, H, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([expert.query, expert.key, expert.value]))
        twin.out_proj.weight.copy_(torch.eye(D))
    seen, bias = sight.seen(query, key), sight.bias()
    mask = torch.zeros(B, H, S, S, dtype=torch.float64)
    mask = mask if seen is None else mask.masked_fill(~seen, -torch.inf)
    mask = (mask if bias is None else mask + bias).flatten(0, 1)
    expected, _ = twin(query, key, key, attn_mask=mask, need_weights=False)
    blind = (
        torch.zeros(B, S, 1, dtype=torch.bool)
        if seen is None
        else ~seen.any(3).transpose(1, 2).repeat_interleave(D // seen.shape[1], 2)
    )
    expected = expected.masked_fill(blind, 0)
    got = expert(query, key, key, sight)
    assert got.weights_BHQS is None
    torch.testing.assert_close(got.out_BQD, expected, rtol=0, atol=1e-14)
    shown = expert(query, key, key, sight, need_weights=True)
    torch.testing.assert_close(shown.out_BQD, expected, rtol=0, atol=1e-14)
    assert shown.weights_BHQS.shape == (B, H, S, S)


@pytest.mark.parametrize("name", list(sights()))
def test_some_rows_see_what_they_saw_among_all(name: str):
    expert, query, key = make()
    sight = sights()[name]
    row = torch.tensor([[4, 1, 1, 6], [0, 3, 5, 2]])
    some = expert(query.gather(1, row[:, :, None].expand(-1, -1, D)), key, key, sight.of_rows(row, row >= 0, S))
    among_all = expert(query, key, key, sight).out_BQD.gather(1, row[:, :, None].expand(-1, -1, D))
    torch.testing.assert_close(some.out_BQD, among_all, rtol=0, atol=1e-14)


def test_documents_and_padding_by_hand():
    seen = sights()["documents"].seen(*make()[1:])[:, 0]
    document, valid = sights()["documents"].document_BS, sights()["documents"].key_valid_BS
    for b, q, s in itertools.product(range(B), range(S), range(S)):
        assert seen[b, q, s] == (s <= q and document[b, q] == document[b, s] and valid[b, s])


def test_a_query_that_sees_nothing_gets_zero_and_finite_gradients():
    expert, query, key = make()
    sight = Sight(mask_BHQS=torch.zeros(1, 1, S, S, dtype=torch.bool))
    for need_weights in (False, True):
        out = expert(query.requires_grad_(), key, key, sight, need_weights=need_weights).out_BQD
        assert not out.any()
        out.square().sum().backward()
        assert query.grad.isfinite().all()


def test_sparse_edges_are_dense_ones_with_zeros():
    feature = torch.randn(4, 2)
    edges = SparseEdges(torch.tensor([0, 0, 1, 1]), torch.tensor([2, 1, 0, -1]), torch.tensor([0, 3, 6, 2]), feature)
    dense = edges.dense(B, S, S)
    assert torch.equal(dense[0, 2, 0], feature[0]) and torch.equal(dense[1, 0, 6], feature[2])
    assert int(dense.ne(0).any(3).sum()) == 3
    row, live = torch.tensor([[2, 5, 0], [0, 0, 0]]), torch.tensor([[True, True, False], [True, False, False]])
    some = Sight(edges=edges).of_rows(row, live, S).edges.dense(B, 3, S)
    full = Sight(edges=dense).of_rows(row, live, S).edges
    assert torch.equal(some * live[:, :, None, None], full * live[:, :, None, None])


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="num_heads = 5 does not divide dim = 12"):
        ExpertSite(12, 5)
