"""What a CPU does in another way than other devices, against what they do."""

from __future__ import annotations

import pytest
import torch

from moedist.moe.dispatch.rows import sum_pairs, take
from moedist.moe.experts.contract import Rows
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.token_choice import best_experts


@pytest.mark.parametrize("sizes", [(5, 0, 3, 8), (0, 0, 0, 0), (4, 4, 4, 4)])
def test_experts_equal_the_loop(sizes):
    """Outputs and every gradient; an expert without rows gets zeros."""
    torch.manual_seed(0)
    fast, slow = (
        config(hidden_dim=10).build(6, len(sizes), dtype=torch.float64) for config in (GroupedConfig, LoopConfig)
    )
    for name, parameter in fast.named_parameters():
        torch.nn.init.normal_(parameter)
        getattr(slow, name).data.copy_(parameter.data)
    x_RD = torch.randn(sum(sizes), 6, dtype=torch.float64)
    gate_R = torch.rand(sum(sizes), dtype=torch.float64)
    gate_R[:1] = 0  # a pair that was dropped, or whose probability has underflowed
    grad_RD = torch.randn_like(x_RD)
    found = []
    for experts in (fast, slow):
        x, gate = x_RD.clone().requires_grad_(), gate_R.clone().requires_grad_()
        rows = Rows(x, gate, sizes, torch.tensor(sizes).cumsum(0).to(torch.int32))
        assert experts is slow or experts.fit_host(rows)
        y_RD = experts(rows)
        grads = torch.autograd.grad(y_RD, [x, gate, *experts.parameters()], grad_RD)
        found.append((y_RD, *grads))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-12)
    empty = [expert for expert, size in enumerate(sizes) if size == 0]
    assert all(not grad[empty].any() for grad in found[0][3:])


def test_the_operator_holds_what_torch_asks_of_one():
    shapes = [(7, 4), (7,), (3, 4, 6), (3, 4, 6), (3, 6, 4)]
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.library.opcheck(torch.ops.moedist.host_experts.default, (*arguments, [2, 0, 5]))


def test_only_what_it_computes_goes_to_it():
    rows = Rows(torch.zeros(4, 8), torch.zeros(4), (2, 2), torch.tensor([2, 4], dtype=torch.int32))
    wide = Rows(rows.x_RD.double(), rows.gate_R, rows.sizes, rows.ends_e)
    for config, fits in (
        (GroupedConfig(hidden_dim=4), True),
        (GroupedConfig(hidden_dim=4, bias=True), False),
        (GroupedConfig(hidden_dim=4, activation="gelu"), False),
    ):
        experts = config.build(8, 2)
        assert experts.fit_host(rows) is fits and not experts.fit_host(wide)
    narrow = Rows(rows.x_RD.bfloat16(), rows.gate_R, rows.sizes, rows.ends_e)
    assert not GroupedConfig(hidden_dim=4).build(8, 2).fit_host(narrow)


def test_rows_that_are_not_there_read_as_zero(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    x[0] = torch.nan  # the row that an index of -1 would read in the end
    index = torch.tensor([[3, -1, 1], [-1, -1, -1], [4, 4, 2]])
    bags = sum_pairs(x, index.view(-1), None, 3, 3)
    taken = take(x, index)
    monkeypatch.setattr("moedist.moe.dispatch.rows.on_host", lambda _: False)
    torch.testing.assert_close(sum_pairs(x, index.view(-1), None, 3, 3), bags)
    assert torch.equal(take(x, index), taken)
    assert not bags[1].any() and not taken[index < 0].any() and not bags.isnan().any()


def test_ties_go_to_the_lowest_index_and_only_they_are_sorted(monkeypatch):
    torch.manual_seed(0)
    apart = torch.rand(64, 16).argsort(1).double()
    tied = torch.randint(0, 4, (64, 16)).double()
    shut = apart.masked_fill(apart < 13, -torch.inf)  # as a group limit leaves three experts
    whole = apart[:, :4]
    for order_TE, top_k in ((apart, 3), (tied, 3), (shut, 3), (whole, 4)):
        wanted = order_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        assert torch.equal(best_experts(order_TE, top_k), wanted)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    best_experts(apart, 3)
    with pytest.raises(TypeError):
        best_experts(tied, 3)
