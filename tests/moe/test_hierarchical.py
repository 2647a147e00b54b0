"""Once per node: what crosses, counted; rows drawn by hand; n ranks on simulated nodes equal one device."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moedist.config import ConfigError
from moedist.mesh import Axis
from moedist.mesh.collectives import all_sum
from moedist.mesh.nodes import one_node
from moedist.moe.bank.local import LocalConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.dispatch.hierarchical import HierarchicalConfig, part_of, telling_order
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.dispatch.traffic import Batch, share_reached, there_and_back
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan, plan_capacity
from moedist.moe.router.topk import TopKConfig
from moedist.parallel.recompute import recompute_in_backward
from moedist.parallel.spread import spread
from tests.moe.by_hand import dropless, routing_of
from tests.moe.test_parity import cases, cases_of_the_field
from tests.parity import Scene, build, compare, counted_bytes, many_ranks, one_device, task_loss
from tests.ranks import Here

ONCE = {"node": HierarchicalConfig(), "rank": HierarchicalConfig(once_per="rank")}

# Rows drawn by hand: experts 0 | 1 || 2 | 3 on two nodes of two ranks, 3 choices per token.

CHOICES = [[0, 2, 3], [3, 1, 2], [0, 1, 3]]
"""Tokens 0, 1, 2 of every rank; the third choice of token 2 is dropped."""


def hand_plan(rank: int) -> CapacityPlan:
    gates = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]) + rank
    plan = dropless(routing_of(CHOICES, 4, gates), TokenContext.of_rows(1, 3))
    # Expert 3 was asked by tokens 0, 1 and 2 and keeps two.
    return dataclasses.replace(
        plan,
        slot_N=torch.where(torch.arange(9) == 8, -1, plan.slot_N),
        gate_N=torch.where(torch.arange(9) == 8, 0, plan.gate_N),
        kept_E=plan.kept_E - torch.tensor([0, 0, 0, 1]),
    )


def by_hand(here: Here) -> dict[str, Any]:
    ep = here.mesh_of(4, None, 2).ep
    dispatcher = HierarchicalConfig().build(Placement.in_order(4, 4), ep)
    x_TD = torch.arange(3.0, dtype=torch.float64)[:, None] + 10 * here.rank
    arrived = dispatcher.dispatch(x_TD, hand_plan(here.rank))
    across, inside = arrived.ticket.crossings
    home = dispatcher.combine(arrived.rows.x_RD, arrived.ticket)
    return {
        "rows": arrived.rows.x_RD[:, 0].tolist(),
        "gates": [round(gate, 1) for gate in arrived.rows.gate_R.tolist()],
        "sizes": arrived.rows.sizes,
        "ends": arrived.rows.ends_e.tolist(),
        "across": (across.send_sizes, across.receive_sizes),
        "inside": (inside.send_sizes, inside.receive_sizes),
        "home": home[:, 0].tolist(),
    }


def test_rows_by_hand(ranks):
    first, second, third, fourth = ranks(4).run(by_hand)
    # Tokens 0, 1, 2 need node 0; 0 and 1 need node 1.
    assert [one["across"] for one in (first, second)] == [([3, 2], [3, 3])] * 2
    assert [one["across"] for one in (third, fourth)] == [([3, 2], [2, 2])] * 2
    # Rank 0 has rows of itself and rank 2: expert 0 wants tokens 0 and 2 of each, expert 1 (rank 1) 1 and 2.
    assert [one["inside"] for one in (first, second)] == [([4, 4], [4, 4])] * 2
    assert [one["inside"] for one in (third, fourth)] == [([4, 4], [4, 4])] * 2
    assert first["rows"] == [0, 2, 20, 22, 10, 12, 30, 32] and first["gates"] == [
        0.1,
        0.7,
        2.1,
        2.7,
        1.1,
        1.7,
        3.1,
        3.7,
    ]
    assert second["rows"] == [1, 2, 21, 22, 11, 12, 31, 32]
    assert third["rows"] == [0, 1, 20, 21, 10, 11, 30, 31] and third["gates"] == [
        0.2,
        0.6,
        2.2,
        2.6,
        1.2,
        1.6,
        3.2,
        3.6,
    ]
    assert fourth["rows"] == [0, 1, 20, 21, 10, 11, 30, 31] and fourth["gates"] == [
        0.3,
        0.4,
        2.3,
        2.4,
        1.3,
        1.4,
        3.3,
        3.4,
    ]
    for rank, one in enumerate((first, second, third, fourth)):
        assert one["sizes"] == (8,) and one["ends"] == [8]
        assert one["home"] == [3 * 10 * rank, 3 * (10 * rank + 1), 2 * (10 * rank + 2)]


def test_what_is_told_before():
    """Node 0's rows, then rank 0's and the pairs of its two experts, rank 1's and of its one; and so on."""
    sizes = (2, 1, 0, 3)
    told = ["m0", "m1", "r0", "r1", "r2", "r3", "e0", "e1", "e2", "e3", "e4", "e5"]
    nodes = [told[place] for place in telling_order(sizes, (2, 4))]
    assert nodes == ["m0", "r0", "e0", "e1", "r1", "e2", "m1", "r2", "r3", "e3", "e4", "e5"]
    ranks = [told[2:][place] for place in telling_order(sizes, (4,))]
    assert ranks == ["r0", "e0", "e1", "r1", "e2", "r2", "r3", "e3", "e4", "e5"]
    assert telling_order(sizes, ()) == (0, 1, 2, 3, 4, 5)


def test_a_plan_on_fake_tensors_leaves_nothing_behind():
    slot, bounds = torch.tensor([-1, 0, 1, 2, 5]), (0, 1, 1, 2, 6)
    with FakeTensorMode():
        assert part_of(torch.zeros(3, dtype=torch.int64), bounds).shape == (3,)
    assert part_of(slot, bounds).tolist() == [4, 0, 2, 3, 3]


# What crosses, counted on the wire

E, K, D, TOKENS = 16, 8, 24, 40
SIZES = Batch(TOKENS, D, E, K, capacity=None, ep=4, nodes=2, element_bytes=4)


def random_plan(rank: int, factor: float | None) -> CapacityPlan:
    generator = torch.Generator().manual_seed(rank)
    expert_TK = torch.rand(TOKENS, E, generator=generator).argsort(1)[:, :K]
    routing = routing_of(expert_TK, E, torch.rand(TOKENS, K, generator=generator).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a factor below 1 is the point here
        plan = plan_capacity(routing, TokenContext.of_rows(1, TOKENS), CapacityConfig(factor=factor))
    return dataclasses.replace(plan, gate_N=plan.gate_N.float())


def crossing(here: Here, kind: str, ranks_per_node: int, factor: float | None) -> dict[str, Any]:
    """Bytes to other nodes of each exchange, forward and backward, and the rows that had to cross."""
    mesh = here.mesh_of(4, None, ranks_per_node)
    dispatch: DispatchConfig = {"all_to_all": AllToAllConfig(), **ONCE}[kind]
    dispatcher = dispatch.build(Placement.in_order(E, 4), mesh.ep)
    plan = random_plan(here.rank, factor)
    plan.gate_N.requires_grad_()
    x_TD = torch.randn(TOKENS, D, requires_grad=True)
    with counted_bytes(ranks_per_node) as sent:
        arrived = dispatcher.dispatch(x_TD, plan)
        out_TD = dispatcher.combine(arrived.rows.x_RD * arrived.rows.gate_R[:, None], arrived.ticket)
        out_TD.sum().backward()
    kept = plan.slot_N >= 0
    rank_N = plan.expert_N // (E // 4)
    node_N = rank_N // ranks_per_node
    abroad_N = kept & (node_N != here.rank // ranks_per_node)
    return {
        "sent": sent,
        "pairs": int(abroad_N.sum()),
        "nodes": len(set(zip(plan.token_N[abroad_N].tolist(), node_N[abroad_N].tolist(), strict=True))),
        "ranks": len(set(zip(plan.token_N[abroad_N].tolist(), rank_N[abroad_N].tolist(), strict=True))),
    }


def summed(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all ranks; what one sends in a dispatch another sends back."""
    found = {key: sum(one[key] for one in results) for key in ("pairs", "nodes", "ranks")}
    return {**found, "sent": [sum(sent) for sent in zip(*(one["sent"] for one in results), strict=True)]}


@pytest.mark.parametrize("factor", [0.75, None])
def test_a_token_crosses_once_per_node(ranks, factor):
    """Every exchange, there and back and of gradients, sends one row per (token, other node) and no byte more."""
    results = ranks(4).run(crossing, "node", 2, factor)
    there, back, gates = 4 * D + K * (4 + 4), 4 * D, 4 * D + 4 * K  # a vector, with K gates and slots; with K gates
    told = 8 * (1 + 2 + E // 2)  # the other node hears of its rows, its two ranks' rows, its experts' pairs
    for one in results:
        assert one["nodes"] <= TOKENS and one["pairs"] > 2 * one["nodes"]
        assert one["sent"][:4] == [told, 0, one["nodes"] * there, 0], "told across and inside; sent across and inside"
    total = summed(results)
    rows = total["nodes"]
    # home: inside, across; gradients of what came home: across, inside; of what was sent: inside, across
    assert total["sent"] == [4 * told, 0, rows * there, 0, 0, rows * back, rows * back, 0, 0, rows * gates]
    assert sum(total["sent"][2:]) == there_and_back(rows, SIZES, gates=K, ids=K)


@pytest.mark.parametrize(("once_per", "ranks_per_node"), [("rank", 2), ("node", 1)])
def test_a_token_goes_once_to_each_rank(ranks, once_per, ranks_per_node):
    """One exchange where nodes do not count, or have one rank each. A rank has four experts, so four pairs at most."""
    results = ranks(4).run(crossing, once_per, ranks_per_node, None)
    there, back, gates = 4 * D + 4 * (4 + 4), 4 * D, 4 * D + 4 * 4
    told = 8 * (1 + E // 4) * (4 - ranks_per_node)
    assert all(one["sent"][:2] == [told, one["ranks"] * there] for one in results)
    total = summed(results)
    rows = total["ranks"]
    assert total["sent"] == [4 * told, rows * there, rows * back, rows * back, rows * gates]
    assert rows < 0.75 * total["pairs"]


def test_the_flat_exchange_sends_a_row_per_pair(ranks):
    total = summed(ranks(4).run(crossing, "all_to_all", 2, None))
    assert sum(total["sent"][1:]) == there_and_back(total["pairs"], SIZES, gates=1)


def test_share_of_tokens_that_need_some_experts():
    """Against all choices of K distinct experts of E."""
    for num_experts, top_k, given in itertools.product((4, 6), (1, 2, 3), (1, 2, 3, 4)):
        chosen = list(itertools.combinations(range(num_experts), top_k))
        needing = sum(min(choice) < given for choice in chosen) / len(chosen)
        assert share_reached(num_experts, top_k, given) == pytest.approx(needing)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_closed_form_of_what_is_sent(nodes):
    """Rows of even random routing, counted, against the formulas; inside and between nodes."""
    batch = Batch(20000, 64, E, 3, capacity=500, ep=4, nodes=nodes, element_bytes=2)
    expert_TK = torch.rand(batch.tokens, E, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :3]
    rank_TK, per_node = expert_TK // (E // 4), 4 // nodes

    def rows(part_TK: Tensor, parts: range) -> float:
        return sum(float((part_TK == part).any(1).sum()) for part in parts)

    node_TK, own = rank_TK // per_node, range(per_node)
    there = {"gates": 3, "ids": 3}
    between = there_and_back(rows(node_TK, range(1, nodes)), batch, **there)
    if nodes == 4:  # one rank each
        between = there_and_back(rows(rank_TK, range(1, 4)), batch, **there)
    traffic = HierarchicalConfig().traffic(batch)
    assert traffic.across == pytest.approx(between, rel=0.02)
    # From each node come as many rows as this rank sends to each, and go on to the other ranks here.
    assert traffic.inside == pytest.approx(nodes * there_and_back(rows(rank_TK, own[1:]), batch, **there), rel=0.02)
    flat = AllToAllConfig().traffic(batch)
    pairs = [float((rank_TK == rank).sum()) for rank in range(4)]
    assert flat.inside == pytest.approx(there_and_back(sum(pairs[1:per_node]), batch, gates=1), rel=0.02)
    assert flat.across == pytest.approx(there_and_back(sum(pairs[per_node:]), batch, gates=1), rel=0.02)
    once = ONCE["rank"].traffic(batch)
    assert once.total == pytest.approx(there_and_back(rows(rank_TK, range(1, 4)), batch, **there), rel=0.02)
    padded = PaddedConfig().traffic(batch)
    assert padded.total == there_and_back(500 * 12, batch, gates=1)
    assert padded.inside == there_and_back(500 * 4 * (per_node - 1), batch, gates=1)
    assert DispatchConfig().traffic(batch) is None


# n ranks equal one device

GRIDS = ((4, None, 2), (4, 4, 2), (2, 4, 1), (4, None, 1))
"""ep, fsdp, ranks per node: two nodes of two, the same with every weight cut over all, one rank per node twice."""


def holds(here: Here, every: int, whole_product: bool) -> dict[str, float]:
    """Cases of the parity suite with this dispatcher, on nodes in turn."""
    turns = itertools.cycle(itertools.product(ONCE.values(), GRIDS))
    worst, number, dropped = 0.0, 0, 0
    for place, (config, scene) in enumerate(cases() if whole_product else cases_of_the_field()):
        if not isinstance(config.dispatch, AllToAllConfig) or place % every > 1:
            continue
        dispatch, (ep, fsdp, ranks_per_node) = next(turns)
        config = dataclasses.replace(config, dispatch=dispatch)
        expected = one_device(config, scene, here.world)
        try:
            worst = max(worst, compare(many_ranks(config, scene, here.mesh_of(ep, fsdp, ranks_per_node)), expected))
        except AssertionError as error:
            raise AssertionError(f"{error} on {ep, fsdp, ranks_per_node}, scene {scene.name}: {config}") from error
        number += 1
        tokens = sum(int(scene.valid_T(rank).sum()) for rank in range(here.world))
        dropped += tokens * config.router.experts_per_token(config.num_experts) - int(expected.kept_E.sum())
    return {"worst": worst, "number": number, "dropped": dropped}


@pytest.mark.parametrize(
    ("every", "whole_product"),
    [(4, False), pytest.param(2, False, marks=pytest.mark.slow), pytest.param(2, True, marks=pytest.mark.slow)],
)
def test_nodes_equal_one_device(ranks, every: int, whole_product: bool):
    """Every router, with dropping and without; ranks with 0, 1, 7 and 24 tokens and every token to one expert."""
    for result in ranks(4).run(holds, every, whole_product, limit_s=600):
        assert result["worst"] <= 1e-12
        assert result["number"] >= 15 and result["dropped"] > 5 * result["number"]


UNEQUAL = {
    "nodes with 3 experts each": Placement(((5, 0), (3,), (), (1, 2, 4))),
    "a node without experts": Placement(((), (), (5, 0, 3, 1), (2, 4))),
}


def unequal_differs(here: Here, placement: str, once_per: str, top_k: int) -> float:
    """The largest difference from one device, with unlike numbers of scattered experts."""
    mesh = here.mesh_of(4, None, 2)
    lies = UNEQUAL[placement]
    config = MoEConfig(
        num_experts=6,
        router=TopKConfig(top_k=top_k),
        capacity=CapacityConfig(factor=1.0),
        dispatch=ONCE[once_per],
        experts=LoopConfig(hidden_dim=6, bias=True),
    )
    layer = config.build(4, dtype=torch.float64)
    layer.spread(lies, mesh.ep, mesh.dp)
    plain = dataclasses.replace(config, bank=LocalConfig()).build(4, dtype=torch.float64)
    num_tokens = (9, 0, 5, 16)[here.rank]
    x_TD = torch.randn(num_tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(here.rank))
    found = []
    for one in (layer, plain):
        leaf = x_TD.clone().requires_grad_()
        routing = one.router(leaf, ctx := TokenContext.of_rows(1, num_tokens))
        out_TD = one.bank(leaf, plan_capacity(routing, ctx, config.capacity))
        out_TD.square().sum().backward()
        found.append([out_TD.detach(), leaf.grad, one.router.weight.grad])
    for name, parameter in plain.bank.experts.named_parameters():
        whole = all_sum(parameter.grad, mesh.dp)[list(lies.expert_ids[here.rank])]
        found[0].append(layer.bank.experts.get_parameter(name).grad)
        found[1].append(whole)
    assert all(got.shape == expected.shape for got, expected in zip(*found, strict=True))
    differences = [(got - expected).abs().max().item() for got, expected in zip(*found, strict=True) if got.numel()]
    return max(differences)


@pytest.mark.parametrize("placement", UNEQUAL)
@pytest.mark.parametrize(("once_per", "top_k"), [("node", 2), ("rank", 5)])
def test_unequal_placement_equals_one_device(ranks, placement: str, once_per: str, top_k: int):
    assert max(ranks(4).run(unequal_differs, placement, once_per, top_k)) <= 1e-12


NOISY = MoEConfig(
    num_experts=8,
    router=TopKConfig(top_k=4, noise_std=0.7),
    capacity=CapacityConfig(factor=1.0, drop_policy="random"),
    dispatch=HierarchicalConfig(),
    experts=LoopConfig(hidden_dim=12),
)


def repeated(here: Here) -> list[float]:
    """The largest difference of an output or gradient from the first pass: run again, recomputed in full, in part."""
    from tests.parity import batch_of

    found: list[list[Tensor]] = []
    for recompute in (None, None, "full", "selective"):
        layer = build(NOISY, Scene("uneven"))
        spread(layer, here.mesh_of(4, None, 2))
        if recompute is not None:
            recompute_in_backward(layer, recompute)
        x_TD, ctx = batch_of(Scene("uneven"), here.rank, 32)
        out_TD = layer(x_TD.requires_grad_(), ctx).out_TD
        task_loss(out_TD, ctx, 32).backward()
        grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in layer.parameters()]
        found.append([out_TD.detach(), x_TD.grad, *grads])
    assert max(grad.abs().max().item() for grad in found[0][2:]) > 1e-6
    return [
        max((one - other).abs().max().item() for one, other in zip(found[0], again, strict=True)) for again in found[1:]
    ]


@pytest.mark.pitfall("17", "25")
def test_repeated_and_recomputed_bit_for_bit(ranks):
    """Pitfalls 17 and 25."""
    assert ranks(4).run(repeated) == [[0.0, 0.0, 0.0]] * 4


# What it refuses, and says


def test_groups_that_begin_inside_a_node():
    with pytest.raises(
        ConfigError, match="groups of 6 ranks begin or end inside a node of 4. Set mesh.ep to"
    ) as caught:
        MoEConfig(num_experts=6, dispatch=HierarchicalConfig()).check_spread(6, 4)
    assert caught.value.key == "dispatch.once_per"
    MoEConfig(num_experts=6, dispatch=ONCE["rank"]).check_spread(6, 4)
    MoEConfig(num_experts=6, dispatch=HierarchicalConfig()).check_spread(6)
    with pytest.raises(ConfigError, match="whole nodes. Set mesh.ep to a divisor or a multiple of mesh.ranks_per_node"):
        HierarchicalConfig().build(Placement.in_order(6, 6), Axis("ep", 6, 0))


def test_more_experts_than_slots_can_name():
    with pytest.raises(ConfigError, match="numbers experts in 16 bits, and there are 40000"):
        HierarchicalConfig().build(Placement.in_order(40000, 1), Axis("ep"))


def test_notes():
    ep = Axis("ep", 4, 0)
    on_one = dataclasses.replace(ep, nodes=one_node(ep))
    assert "nothing crosses nodes" in HierarchicalConfig().note(8, 2, True, on_one)
    assert "as many rows as all_to_all" in HierarchicalConfig().note(8, 1, True, on_one)
    assert HierarchicalConfig().note(8, 2, True, ep) is None and ONCE["rank"].note(8, 2, True, on_one) is None
    assert HierarchicalConfig().note(8, 1, True, Axis("ep")) is None
