"""Rows that travel to experts: how many leave, how many arrive, and how few copies would do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moedist.config import ConfigError, require
from moedist.estimate.activations import Rows
from moedist.estimate.shape import Layout, ModelShape
from moedist.mesh.nodes import nodes_per_ep_group
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.dispatch.traffic import Batch, Traffic, share_reached
from moedist.moe.layer import MoEConfig
from moedist.moe.trace import LayerTrace, TraceError, open_trace, read_step


@dataclasses.dataclass(frozen=True)
class LayerTraffic:
    """What one rank sends in one MoE layer and micro-step, in forward and backward together, and where it ends.

    Attributes:
        rows: on the rank that has most; what memory must hold and what the others wait for.
        chosen: by the run's dispatcher.
        in_forward: share of it, as vectors have it: their gradients may travel in wider numbers.
        in_turn: whether it sends to other nodes first and inside the node after that; else both at once.
        per_pair: with a row for each pair, in numbers of its own.
        per_rank, per_node: with one copy of a token for each rank, or node, that has an expert of it.
    """

    rows: Rows
    chosen: Traffic
    in_forward: float
    in_turn: bool
    per_pair: Traffic
    per_rank: Traffic
    per_node: Traffic


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of one layer's recorded tokens: how unevenly they load the ranks, and how many places each is sent to.

    Attributes:
        heaviest: largest number of pairs at a rank / the even share, the worst over micro-steps.
        ranks, nodes: places per token with an expert of it that computes it.
        pairs_per_token: that are computed.
    """

    heaviest: float
    ranks: float
    nodes: float
    pairs_per_token: float


def even_spread(num_experts: int, top_k: int, ep: int, num_nodes: int) -> Spread:
    """Experts chosen evenly and independently of each other.

    >>> round(even_spread(64, 8, ep=8, num_nodes=1).ranks, 2)
    5.43
    """
    ranks, nodes = (places * share_reached(num_experts, top_k, num_experts // places) for places in (ep, num_nodes))
    return Spread(1.0, ranks, nodes, top_k)


def read_spreads(path: Path | str, shape: ModelShape, layout: Layout, ranks_per_node: int) -> dict[int, Spread]:
    """Each MoE layer's spread in recorded routing, cut anew into micro-steps of this layout.

    Args:
        path: of a run, or of its traces; every recorded step counts.
        shape, layout: of the run that is estimated.
        ranks_per_node: of the cluster.

    Raises:
        ConfigError: the trace cannot be read, or is of other layers.
    """
    try:
        index = open_trace(path)
    except TraceError as error:
        raise ConfigError(
            "--trace", str(path), f"cannot be used: {error}", "Record one with log.trace.every."
        ) from error
    for block in shape.moe_blocks:
        moe, sizes = shape.blocks[block].moe, index.layers.get(block)
        require(
            moe is not None and sizes is not None and sizes.num_experts == moe.num_experts,
            "--trace",
            str(path),
            f"is of another model: its layer {block} has "
            f"{'no experts' if sizes is None else f'{sizes.num_experts} experts'}",
            "Name a trace of a run with these layers, or give the configuration that it was recorded with.",
        )
    found: dict[int, list[Spread]] = {block: [] for block in shape.moe_blocks}
    for files in index.steps.values():
        step = read_step(files, shape.moe_blocks)
        for block in shape.moe_blocks:
            layer = step.layers[block]
            found[block].append(_spread(layer, step.valid_T, layout, ranks_per_node))
    return {block: _mean(spreads) for block, spreads in found.items()}


def _spread(layer: LayerTrace, valid_T: Tensor, layout: Layout, ranks_per_node: int) -> Spread:
    """Of one layer and step. The expert-parallel group's tokens of a micro-step are taken one such row after the
    other; what is left over at the end is a smaller one where there is none."""
    computed_TK = layer.computed_TK.masked_fill(~valid_T[:, None], -1)
    together = min(layout.tokens * layout.ep, computed_TK.shape[0])
    num_groups = computed_TK.shape[0] // together
    per_rank = layer.num_experts // layout.ep
    rank_TK = torch.where(computed_TK >= 0, computed_TK // per_rank, -1)
    heaviest = 1.0
    for group_TK in rank_TK[: num_groups * together].split(together):
        load_W = torch.bincount(group_TK[group_TK >= 0], minlength=layout.ep).double()
        heaviest = max(heaviest, float(load_W.max() / load_W.mean().clamp_min(1)))
    node_TK = torch.where(rank_TK >= 0, rank_TK // min(ranks_per_node, layout.ep), -1)
    num_tokens = max(int(valid_T.sum()), 1)  # those of which nothing is computed too: they are tokens of a rank
    return Spread(
        heaviest,
        _distinct(rank_TK) / num_tokens,
        _distinct(node_TK) / num_tokens,
        int((computed_TK >= 0).sum()) / num_tokens,
    )


def _distinct(place_TK: Tensor) -> int:
    """Number of different places of each token, all tokens together."""
    sorted_TK = place_TK.sort(dim=1).values
    first_TK = torch.ones_like(sorted_TK, dtype=torch.bool)
    first_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return int((first_TK & (sorted_TK >= 0)).sum())


def _mean(spreads: list[Spread]) -> Spread:
    number = len(spreads)
    return Spread(
        max(spread.heaviest for spread in spreads),
        sum(spread.ranks for spread in spreads) / number,
        sum(spread.nodes for spread in spreads) / number,
        sum(spread.pairs_per_token for spread in spreads) / number,
    )


def layer_traffic(
    moe: MoEConfig, dim: int, layout: Layout, ranks_per_node: int, spread: Spread | None = None
) -> LayerTraffic:
    """Of one layer; ``spread`` as recorded, None for even routing."""
    top_k = moe.router.experts_per_token(moe.num_experts)
    # Groups that begin or end inside a node are taken for the worst: every other rank is on another node.
    num_nodes = nodes_per_ep_group(layout.ep, ranks_per_node) or layout.ep
    even = even_spread(moe.num_experts, top_k, layout.ep, num_nodes)
    spread = spread or even
    batch = batch_of(moe, dim, layout, num_nodes)
    rows = even_rows(moe, batch)
    if room_of(moe, batch) is None:
        sent = min(rows.sent, round(layout.tokens * spread.pairs_per_token))
        rows = Rows(sent, math.ceil(sent * spread.heaviest))
    per_pair = _scaled(AllToAllConfig().traffic(batch), spread.pairs_per_token / top_k)
    per_rank = _scaled(HierarchicalConfig(once_per="rank").traffic(batch), spread.ranks / even.ranks)
    per_node = HierarchicalConfig(once_per="node").traffic(batch)
    per_node = Traffic(per_node.inside * spread.ranks / even.ranks, per_node.across * spread.nodes / even.nodes)
    chosen, in_turn = per_pair, False
    if isinstance(moe.dispatch, HierarchicalConfig):
        in_turn = moe.dispatch.once_per == "node"
        chosen = per_node if in_turn else per_rank
    elif room_of(moe, batch) is not None:
        chosen = moe.dispatch.traffic(batch) or per_pair
    elif isinstance(moe.dispatch, AllToAllConfig):
        chosen = _scaled(moe.dispatch.traffic(batch), spread.pairs_per_token / top_k)
    wire = moe.dispatch.wire
    there, back = (each.row_bytes(dim, batch.element_bytes) for each in (wire, wire.of_gradients))
    return LayerTraffic(rows, chosen, there / (there + back), in_turn, per_pair, per_rank, per_node)


def _scaled(traffic: Traffic, factor: float) -> Traffic:
    return Traffic(traffic.inside * factor, traffic.across * factor)


def batch_of(moe: MoEConfig, dim: int, layout: Layout, num_nodes: int) -> Batch:
    """What travels for one rank and micro-step, and how far."""
    return Batch(
        tokens=layout.tokens,
        dim=dim,
        num_experts=moe.num_experts,
        experts_per_token=moe.router.experts_per_token(moe.num_experts),
        capacity=capacity_of(moe, layout),
        ep=layout.ep,
        nodes=num_nodes,
        element_bytes=layout.compute_size,
        gate_bytes=max(layout.compute_size, 4),
    )


def room_of(moe: MoEConfig, batch: Batch) -> int | None:
    """Rows that there are whether they are used or not; None where they follow the routing."""
    return None if moe.bank.kind == "local" else moe.dispatch.room(batch)


def capacity_of(moe: MoEConfig, layout: Layout) -> int | None:
    """Slots of an expert for one rank's pairs of a micro-step; None without a limit."""
    limit = moe.capacity.limit(training=True)
    if limit is None:
        return None
    groups = layout.micro_batch if moe.capacity.group == "sequence" else 1
    top_k = moe.router.experts_per_token(moe.num_experts)
    return groups * limit.of_shape(layout.tokens // groups, top_k, moe.num_experts)


def even_rows(moe: MoEConfig, batch: Batch) -> Rows:
    """Rows that leave a rank and that arrive at one, under even routing.

    Room that is fixed travels whether it is used or not; else ``T * K`` pairs, or what experts take of them.
    """
    rows = room_of(moe, batch)
    if rows is None:
        slots = moe.num_experts * (batch.tokens if batch.capacity is None else batch.capacity)
        rows = min(batch.tokens * batch.experts_per_token, slots)
    return Rows(rows, rows)


def traffic_of(
    shape: ModelShape, layout: Layout, ranks_per_node: int, spreads: Mapping[int, Spread] | None = None
) -> dict[int, LayerTraffic]:
    """Of every MoE layer, by the index of its block."""
    traffic = {}
    for block in shape.moe_blocks:
        moe = shape.blocks[block].moe
        assert moe is not None
        traffic[block] = layer_traffic(
            moe, shape.dim, layout, ranks_per_node, None if spreads is None else spreads[block]
        )
    return traffic
