"""One rank of a layer's exchange over nodes: dispatch and combine, forward and backward, by both dispatchers in turns.

Rank 0 prints one JSON object: per number of choices and dispatcher the bytes that all ranks sent to other nodes, those
that had to cross by the routing, and the seconds of every round.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from moedist.mesh import Mesh, MeshConfig, close_mesh, join_mesh
from moedist.mesh.collectives import all_sum, barrier
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.contract import Dispatcher
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan
from tests.moe.by_hand import dropless, routing_of
from tests.parity import counted_bytes

TOKENS, DIM, NUM_EXPERTS = 512, 256, 16
DISPATCHES = {"all_to_all": AllToAllConfig(), "hierarchical": HierarchicalConfig()}


def plan_of(rank: int, top_k: int) -> CapacityPlan:
    generator = torch.Generator().manual_seed(rank)
    expert_TK = torch.rand(TOKENS, NUM_EXPERTS, generator=generator).argsort(1)[:, :top_k]
    gate_TK = torch.rand(TOKENS, top_k, generator=generator)
    plan = dropless(routing_of(expert_TK, NUM_EXPERTS, gate_TK), TokenContext.of_rows(1, TOKENS))
    plan.gate_N.data = plan.gate_N.float()
    return plan


def rows_to_cross(plan: CapacityPlan, mesh: Mesh) -> dict[str, int]:
    """Rows that this rank has to send to other nodes: one per pair, or one per token and node."""
    nodes = mesh.ep.nodes
    assert nodes is not None
    node_N = plan.expert_N // (NUM_EXPERTS // nodes.across.size)
    abroad_N = node_N != nodes.across.rank
    pairs = torch.stack([plan.token_N, node_N])[:, abroad_N]
    return {"all_to_all": pairs.shape[1], "hierarchical": pairs.unique(dim=1).shape[1]}


def exchange(dispatcher: Dispatcher, x_TD: torch.Tensor, plan: CapacityPlan) -> None:
    """Experts that weight their rows by the gate, so that the exchange is all that takes time."""
    leaf, gate_N = x_TD.detach().requires_grad_(), plan.gate_N.requires_grad_()
    arrived = dispatcher.dispatch(leaf, plan)
    out_TD = dispatcher.combine(arrived.rows.x_RD * arrived.rows.gate_R[:, None], arrived.ticket)
    out_TD.sum().backward()
    assert leaf.grad is not None and gate_N.grad is not None


def measure(mesh: Mesh, top_k: int, rounds: int) -> dict[str, dict[str, object]]:
    plan = plan_of(mesh.dp.rank, top_k)
    x_TD = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(mesh.dp.rank))
    must = rows_to_cross(plan, mesh)
    found: dict[str, dict[str, object]] = {}
    dispatchers = {
        kind: one.build(Placement.in_order(NUM_EXPERTS, mesh.ep.size), mesh.ep) for kind, one in DISPATCHES.items()
    }
    assert mesh.ep.nodes is not None
    for kind, dispatcher in dispatchers.items():
        with counted_bytes(mesh.ep.nodes.inside.size) as sent:
            exchange(dispatcher, x_TD, plan)
        numbers = torch.tensor([sum(sent), must[kind]])
        sent_bytes, rows = all_sum(numbers, mesh.dp).tolist()
        found[kind] = {"bytes": sent_bytes, "rows": rows, "seconds": []}
    for _ in range(rounds):
        for kind, dispatcher in dispatchers.items():
            barrier(mesh.dp, mesh.device)
            begin = time.perf_counter()
            exchange(dispatcher, x_TD, plan)
            barrier(mesh.dp, mesh.device)
            found[kind]["seconds"].append(time.perf_counter() - begin)
    return found


def main(choices: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    try:
        mesh = join_mesh(MeshConfig(ep=4, device="cpu"))
        results = {top_k: measure(mesh, top_k, rounds) for top_k in choices}
        if mesh.dp.rank == 0:
            print(json.dumps(results))
    finally:
        close_mesh()


if __name__ == "__main__":
    main([int(text) for text in sys.argv[2:]], rounds=int(sys.argv[1]))
