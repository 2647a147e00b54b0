"""Where rows lie, drawn by hand; the exchange between ranks; what a ticket may hold."""

from __future__ import annotations

import dataclasses
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.config import ConfigError
from moedist.mesh import Axis
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig, AllToAllDispatcher
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.dispatch.rows import Exchange
from moedist.moe.dispatch.wire import EXACT
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.placement import Placement
from moedist.moe.plan import plan_capacity
from moedist.moe.router.topk import TopKConfig
from tests.moe.by_hand import dropless, route_logits, routing_of
from tests.parity import counted_bytes
from tests.ranks import Here

DISPATCHES = {"all_to_all": AllToAllConfig(), "padded": PaddedConfig(), "hierarchical": HierarchicalConfig()}
PACKED = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def tokens(num_tokens, rank=0):
    """Row t of rank r is [r * 100 + t]."""
    return torch.arange(num_tokens, dtype=torch.float64)[:, None] + 100 * rank


def hand_plan(dropping=True):
    """Tokens 0..3, two choices each; expert 0 has room for two."""
    routing = routing_of([[0, 1], [0, 2], [0, 1], [2, 1]], 4, [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    config = CapacityConfig(factor=None, expert_capacity=2 if dropping else None, drop_policy="token")
    return plan_capacity(routing, TokenContext.of_rows(1, 4), dataclasses.replace(config, renormalize_after_drop=False))


def test_packed_rows_on_one_rank():
    arrived = AllToAllConfig().build(Placement.in_order(4, 1), Axis("ep")).dispatch(tokens(4), hand_plan())
    # expert 0: tokens 0 1 (2 dropped) | 1: tokens 0 2 (3 dropped) | 2: tokens 1 3 | 3: none
    assert arrived.rows.x_RD[:, 0].tolist() == [0, 1, 0, 2, 1, 3]
    assert arrived.rows.gate_R.tolist() == [0.9, 0.8, 0.1, 0.3, 0.2, 0.6]
    assert arrived.rows.sizes == (2, 2, 2, 0) and arrived.rows.ends_e.tolist() == [2, 4, 6, 6]
    assert arrived.rows.ends_e.dtype == torch.int32 and not arrived.rows.uniform
    assert arrived.ticket.row_N.tolist() == [0, 2, 1, 4, -1, 3, 5, -1]


def test_fixed_slots_on_one_rank():
    arrived = PaddedConfig().build(Placement.in_order(4, 1), Axis("ep")).dispatch(tokens(4) + 1, hand_plan())
    assert arrived.rows.x_RD[:, 0].tolist() == [1, 2, 1, 3, 2, 4, 0, 0]
    assert arrived.rows.gate_R.tolist() == [0.9, 0.8, 0.1, 0.3, 0.2, 0.6, 0, 0]
    assert arrived.rows.sizes == (2,) * 4 and arrived.rows.uniform and arrived.rows.ends_e.tolist() == [2, 4, 6, 8]
    assert arrived.ticket.token_R.tolist() == [0, 1, 0, 2, 1, 3, -1, -1]


def test_fixed_slots_without_a_limit_have_room_for_every_token():
    arrived = PaddedConfig().build(Placement.in_order(4, 1), Axis("ep")).dispatch(tokens(4) + 1, hand_plan(False))
    assert arrived.rows.x_RD[:, 0].tolist() == [1, 2, 3, 0] + [1, 3, 4, 0] + [2, 4, 0, 0] + [0] * 4


def test_scattered_experts_on_one_rank():
    """Rows lie in the order of the weights, not of the ids."""
    placement = Placement(((2, 0, 3, 1),))
    packed = AllToAllConfig().build(placement, Axis("ep")).dispatch(tokens(4), hand_plan())
    assert packed.rows.x_RD[:, 0].tolist() == [1, 3, 0, 1, 0, 2] and packed.rows.sizes == (2, 2, 0, 2)
    slots = PaddedConfig().build(placement, Axis("ep")).dispatch(tokens(4) + 1, hand_plan())
    assert slots.rows.x_RD[:, 0].tolist() == [2, 4, 1, 2, 0, 0, 1, 3]


def lying(here: Here, kind: str) -> tuple[list[float], list[float], list[float], tuple[int, ...]]:
    """Rows, gates and what combine gives back, with experts 0 1 | 2 3 on two ranks; rank 1 brings tokens 100..103."""
    dispatcher = DISPATCHES[kind].build(Placement.in_order(4, 2), here.mesh_of(2).ep)
    arrived = dispatcher.dispatch(tokens(4, here.rank) + 1, hand_plan())
    home = dispatcher.combine(arrived.rows.x_RD, arrived.ticket)
    rows = arrived.rows
    return rows.x_RD[:, 0].tolist(), rows.gate_R.tolist(), home[:, 0].tolist(), rows.sizes


def test_packed_rows_over_two_ranks(ranks):
    first, second = ranks(2).run(lying, "all_to_all")
    # by expert, then by the rank they came from
    assert first[0] == [1, 2, 101, 102] + [1, 3, 101, 103]
    assert first[1] == [0.9, 0.8] * 2 + [0.1, 0.3] * 2
    assert first[3] == (4, 4)
    assert second[0] == [2, 4, 102, 104] and second[3] == (4, 0)
    # token 0 kept two pairs, 1 two, 2 one, 3 one
    assert first[2] == [2, 4, 3, 4] and second[2] == [202, 204, 103, 104]


def test_fixed_slots_over_two_ranks(ranks):
    first, second = ranks(2).run(lying, "padded")
    assert first[0] == [1, 2, 101, 102] + [1, 3, 101, 103]
    assert second[0] == [2, 4, 102, 104] + [0] * 4 and second[1][4:] == [0] * 4
    assert first[3] == second[3] == (4, 4)
    assert first[2] == [2, 4, 3, 4] and second[2] == [202, 204, 103, 104]


COUNTS = torch.tensor([[11, 0, 0, 0, 0, 1], [0, 1, 0, 9, 0, 0], [0, 0, 4, 0, 0, 8]])


def test_split_plan():
    """G08: what three ranks with two experts each send and receive."""
    placement = Placement.in_order(6, 3)
    sends, receives = [], []
    for rank in range(3):
        dispatcher = AllToAllDispatcher(placement, Axis("ep", 3, rank))
        send, arriving = dispatcher.read_sizes(COUNTS[rank], COUNTS[:, 2 * rank : 2 * rank + 2])
        sends.append(send)
        receives.append([sum(sizes) for sizes in arriving])
    assert sends == [[11, 0, 1], [1, 9, 0], [0, 4, 8]]
    assert receives == [[11, 1, 0], [0, 9, 4], [1, 0, 8]]


def exchanged_sizes(here: Here, seed: int) -> tuple[list[int], list[int]]:
    """Sizes that a rank sends and receives for random counts."""
    placement = Placement(((5, 0), (3,), (), (1, 2, 4)))
    dispatcher = AllToAllDispatcher(placement, here.mesh_of(4).ep)
    kept_E = torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(seed + here.rank))
    arriving_We = dispatcher.exchange_counts(placement.slots_first(kept_E))
    sends, arriving = dispatcher.read_sizes(placement.slots_first(kept_E), arriving_We)
    assert sum(sends) == kept_E.sum()
    return sends, [sum(sizes) for sizes in arriving]


def test_what_is_sent_is_received(ranks):
    """Property (c): the sizes of all ranks are one matrix and its transpose."""
    for seed in range(0, 40, 4):
        results = ranks(4).run(exchanged_sizes, seed)
        sends = torch.tensor([sends for sends, _ in results])
        assert torch.equal(sends.t(), torch.tensor([receives for _, receives in results]))
        assert (sends[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("arriving", "order", "sizes"),
    [([[2, 3], [1, 4]], [0, 1, 5, 2, 3, 4, 6, 7, 8, 9], [3, 7]), ([[0, 3], [2, 0]], [3, 4, 0, 1, 2], [2, 3])],
)
def test_rows_by_expert(arriving, order, sizes):
    """G10."""
    arriving_We = torch.tensor(arriving)
    by_expert, by_source = AllToAllDispatcher.expert_order(arriving_We, int(arriving_We.sum()))
    assert by_expert.tolist() == order and arriving_We.sum(0).tolist() == sizes
    assert by_source[by_expert].tolist() == list(range(len(order)))


@PACKED
@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4))
def test_order_is_a_bijection(arriving):
    """Property (d)."""
    arriving_We = torch.tensor(arriving)
    num_rows = int(arriving_We.sum())
    by_expert, by_source = AllToAllDispatcher.expert_order(arriving_We, num_rows)
    assert sorted(by_expert.tolist()) == list(range(num_rows))
    assert torch.equal(by_expert[by_source], torch.arange(num_rows))
    expert_R = torch.arange(3).repeat(len(arriving)).repeat_interleave(arriving_We.view(-1))
    assert torch.equal(expert_R[by_expert], expert_R.sort().values)


UNEQUAL = Placement(((5, 0), (3,), (), (1, 2, 4)))


def unequal_differs(here: Here, factor: float | None) -> float:
    """The largest difference from one device, in output and gradients, with unlike numbers of scattered experts."""
    from moedist.mesh.collectives import all_sum
    from moedist.moe.bank.local import LocalConfig

    mesh = here.mesh_of(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MoEConfig(
            num_experts=6, capacity=CapacityConfig(factor=factor), experts=LoopConfig(hidden_dim=6, bias=True)
        )
    layer = config.build(4, dtype=torch.float64)
    layer.spread(UNEQUAL, mesh.ep, mesh.dp)
    plain = dataclasses.replace(config, bank=LocalConfig()).build(4, dtype=torch.float64)
    num_tokens = (9, 0, 5, 16)[here.rank]
    x_TD = torch.randn(num_tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(here.rank))
    worst = 0.0
    results = []
    for one in (layer, plain):
        leaf = x_TD.clone().requires_grad_()
        routing = one.router(leaf, ctx := TokenContext.of_rows(1, num_tokens))
        out_TD = one.bank(leaf, plan_capacity(routing, ctx, config.capacity))
        out_TD.square().sum().backward()
        results.append((out_TD.detach(), leaf.grad, one.router.weight.grad))
    for got, expected in zip(*results, strict=True):
        worst = max(worst, (got - expected).abs().max().item() if got.numel() else 0.0)
    for name, parameter in plain.bank.experts.named_parameters():
        whole = all_sum(parameter.grad, mesh.dp)[list(UNEQUAL.expert_ids[here.rank])]
        got = layer.bank.experts.get_parameter(name).grad
        assert got is not None and got.shape == whole.shape
        worst = max(worst, (got - whole).abs().max().item() if got.numel() else 0.0)
    return worst


@pytest.mark.parametrize("factor", [0.75, None])
def test_unequal_placement_equals_one_device(ranks, factor):
    assert max(ranks(4).run(unequal_differs, factor)) <= 1e-12


def test_fixed_slots_need_equally_many_experts():
    with pytest.raises(ConfigError, match=r"not \(2, 1, 0, 3\). Set moe.dispatch.kind to all_to_all"):
        PaddedConfig().build(UNEQUAL, Axis("ep", 4, 0))


def ragged(here: Here, factor: float | None) -> tuple[int, bool, int]:
    """0, 1, 7 and 64 tokens on four ranks; bytes sent, whether all gradients are there, and rows kept."""
    mesh = here.mesh_of(4)
    layer = MoEConfig(num_experts=4, capacity=CapacityConfig(factor=factor)).build(8)
    layer.spread(Placement.in_order(4, 4), mesh.ep, mesh.dp)
    num_tokens = (0, 1, 7, 64)[here.rank]
    x_TD = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(here.rank)).requires_grad_()
    with counted_bytes() as sent:
        output = layer(x_TD, TokenContext.of_rows(1, num_tokens))
        (output.out_TD.sum() + sum(output.report.losses.values())).backward()
    whole = all(p.grad is not None and p.grad.isfinite().all() for p in (x_TD, *layer.parameters()))
    return sum(sent), whole, int(output.report.kept_E.sum())


@pytest.mark.pitfall("5", "22")
@pytest.mark.parametrize("factor", [1.25, None])
def test_uneven_tokens_over_ranks(ranks, factor):
    """Pitfalls 5 and 22."""
    results = ranks(4).run(ragged, factor)
    assert all(whole for _, whole, _ in results)
    assert results[0][2] == 0 and results[3][2] > 60


def gates_arrive(here: Here, kind: str) -> bool:
    """Whether fp32 gates beside bf16 rows arrive bit for bit at the rank that holds their expert."""

    def gates_of(rank: int) -> torch.Tensor:
        return torch.rand(16, generator=torch.Generator().manual_seed(rank))

    ep = here.mesh_of(4).ep
    x_TD = torch.stack([torch.full((16,), float(here.rank)), torch.arange(16.0)], 1).bfloat16()
    routing = routing_of([[t % 4] for t in range(16)], 4)
    routing = dataclasses.replace(routing, gate_N=gates_of(here.rank))
    arrived = (
        DISPATCHES[kind]
        .build(Placement.in_order(4, 4), ep)
        .dispatch(x_TD, dropless(routing, TokenContext.of_rows(1, 16)))
    )
    rows = arrived.rows
    used = rows.gate_R != 0
    expected = torch.stack([gates_of(int(r))[int(t)] for r, t in rows.x_RD[used].tolist()])
    return rows.gate_R.dtype == torch.float32 and used.sum() == 16 and torch.equal(rows.gate_R[used], expected)


@pytest.mark.parametrize("kind", DISPATCHES)
def test_gates_stay_fp32_beside_bf16_rows(ranks, kind):
    assert ranks(4).run(gates_arrive, kind) == [True] * 4


def bytes_of(here: Here, kind: str, autocast: bool) -> list[int]:
    """Bytes sent in forward."""
    mesh = here.mesh_of(2)
    config = MoEConfig(
        num_experts=4, router=TopKConfig(top_k=1), capacity=CapacityConfig(expert_capacity=2), dispatch=DISPATCHES[kind]
    )
    layer = config.build(16)
    layer.spread(Placement.in_order(4, 2), mesh.ep, mesh.dp)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 16))
    x_TD = torch.eye(4, 16).repeat(2, 1)  # two tokens for each of the four experts
    with counted_bytes() as sent, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x_TD, TokenContext.of_rows(1, 8))
    assert output.out_TD.dtype == torch.float32 and output.report.kept_E.tolist() == [2] * 4
    return sent


@pytest.mark.parametrize(("autocast", "width"), [(False, 4), (True, 2)])
def test_rows_travel_in_the_narrow_type(ranks, autocast, width):
    """Four rows of 16 to the other rank with a gate of 4 bytes each, and back without; counts of two experts first."""
    there, back = 4 * (16 * width + 4), 4 * 16 * width
    assert ranks(2).run(bytes_of, "padded", autocast) == [[there, back]] * 2
    assert ranks(2).run(bytes_of, "all_to_all", autocast) == [[2 * 8, there, back]] * 2


def held_by(here: Here, kind: str) -> list[str]:
    """Types of everything that a ticket and the autograd graph of a layer hold."""
    mesh = here.mesh_of(2)
    dispatcher = DISPATCHES[kind].build(Placement.in_order(4, 2), mesh.ep)
    x_TD = tokens(4).requires_grad_()
    arrived = dispatcher.dispatch(x_TD, hand_plan())
    pickle.dumps(arrived.ticket)  # a process group cannot be pickled
    pickle.dumps(dispatcher)
    out_TD = dispatcher.combine(arrived.rows.x_RD, arrived.ticket)
    held, seen, nodes = [], set(), [out_TD.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        held += [type(value).__name__ for value in getattr(node, "__dict__", {}).values()]
        nodes += [parent for parent, _ in node.next_functions]
    assert any(type(node).__name__ == "ExchangeBackward" for node in seen)
    return sorted(set(held))


@pytest.mark.pitfall("37")
@pytest.mark.parametrize("kind", DISPATCHES)
def test_no_process_group_is_held(ranks, kind):
    """Pitfall 37: one kept alive by a graph aborts at exit."""
    for held in ranks(2).run(held_by, kind):
        assert "Axis" in held and not [name for name in held if "Group" in name]


def exchanged_gradient(here: Here) -> bool:
    """Whether a transposed gradient comes through an exchange as it should."""
    ep = here.mesh_of(2).ep
    x_RD = torch.arange(12.0).view(4, 3).requires_grad_()
    (received,) = Exchange.apply(ep, EXACT, None, None, x_RD)
    weight_DR = torch.arange(12.0).view(3, 4) + 100 * here.rank
    (received.t() * weight_DR).sum().backward()
    mine, other = weight_DR.t(), weight_DR.t() + 100 * (1 - 2 * here.rank)
    half = slice(2 * here.rank, 2 * here.rank + 2)
    expected = torch.empty(4, 3)
    expected[half], expected[2 - 2 * here.rank : 4 - 2 * here.rank] = mine[half], other[half]
    return torch.equal(x_RD.grad, expected)


@pytest.mark.pitfall("7b")
def test_a_transposed_gradient_is_exchanged_right(ranks):
    """Pitfall 7b."""
    assert ranks(2).run(exchanged_gradient) == [True, True]


@pytest.mark.parametrize("kind", DISPATCHES)
@pytest.mark.parametrize("expert_capacity", [2, None])
def test_gradcheck_of_gate_dispatch_and_combine(kind, expert_capacity):
    """Property (i), in fp64."""
    generator = torch.Generator().manual_seed(2)
    logits_TE = torch.randn(6, 4, dtype=torch.float64, generator=generator).requires_grad_()
    x_TD = torch.randn(6, 3, dtype=torch.float64, generator=generator).requires_grad_()
    scale_E = torch.rand(4, dtype=torch.float64, generator=generator).requires_grad_()
    dispatcher = DISPATCHES[kind].build(Placement.in_order(4, 1), Axis("ep"))
    config = CapacityConfig(factor=None, expert_capacity=expert_capacity)

    def forward(logits_TE, x_TD, scale_E):
        ctx = TokenContext.of_rows(1, 6)
        arrived = dispatcher.dispatch(x_TD, plan_capacity(route_logits(logits_TE, ctx, top_k=2), ctx, config))
        scale_R = scale_E.repeat_interleave(torch.tensor(arrived.rows.sizes))
        y_RD = (arrived.rows.x_RD * scale_R[:, None]).tanh() * arrived.rows.gate_R[:, None]
        return dispatcher.combine(y_RD, arrived.ticket)

    assert torch.autograd.gradcheck(forward, (logits_TE, x_TD, scale_E))
