"""How long a step takes: kernels at the roofline, exchanges and sums at the speed of their links."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from moedist.estimate.cluster import Cluster
from moedist.estimate.shape import BlockShape, Layout, ModelShape
from moedist.estimate.traffic import LayerTraffic
from moedist.moe.ffn import FFNExpertsConfig
from moedist.moe.layer import MoEConfig


@dataclasses.dataclass(frozen=True)
class Duration:
    """Seconds of one optimizer step on the slowest rank.

    Attributes:
        compute: kernels of all micro-steps, at the cluster's share of their floor.
        floor: the same at the floor: each kernel at P or B, whichever binds.
        exchange: all-to-alls of all MoE layers and micro-steps; nothing runs beside them.
        weights: gathering of weights and summing of gradients.
        weights_exposed: of it what no compute hides.
        update: of the optimizer.
    """

    compute: float
    floor: float
    exchange: float
    weights: float
    weights_exposed: float
    update: float

    @property
    def exposed(self) -> float:
        """Communication that compute waits for."""
        return self.exchange + self.weights_exposed

    @property
    def step(self) -> float:
        """All of it."""
        return self.compute + self.exposed + self.update


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One fused kernel: FLOPs, and bytes that it reads and writes."""

    flops: float
    num_bytes: float

    def seconds(self, cluster: Cluster, precision: str) -> float:
        """At the roofline."""
        return max(self.flops / cluster.flops(precision), self.num_bytes / (cluster.memory_gb_per_s * 1e9))


def duration(shape: ModelShape, layout: Layout, traffic: Mapping[int, LayerTraffic], cluster: Cluster) -> Duration:
    """Of one optimizer step."""
    precision, steps = layout.precision, layout.accumulation
    forward = backward = exchange = 0.0
    for index, block in enumerate(shape.blocks):
        first = [*_attention(shape, block, shape.score_flops[index], layout, 1)]
        second = [*_attention(shape, block, shape.score_flops[index], layout, 2)]
        if block.moe is None:
            first += _matrices(block.ffn_count.other, shape.dim, layout, 1)
            second += _matrices(block.ffn_count.other, shape.dim, layout, 2)
        else:
            first += moe_forward(block.moe, shape.dim, layout, traffic[index].rows.arrived)
            second += moe_backward(block.moe, shape.dim, layout, traffic[index].rows.arrived)
            exchange += _exchange(traffic[index], layout, cluster)
        once = sum(kernel.seconds(cluster, precision) for kernel in first)
        forward += once
        backward += sum(kernel.seconds(cluster, precision) for kernel in second)
        backward += once if layout.checkpointing == "full" else 0.0
    head = [*_matrices(shape.head.largest, shape.dim, layout, 1), *_matrices(shape.head.largest, shape.dim, layout, 2)]
    logits = layout.tokens * shape.vocab_size
    head.append(Kernel(0, 6 * logits * max(layout.compute_size, 4)))  # softmax and its gradient
    floor = steps * (forward + backward + sum(kernel.seconds(cluster, precision) for kernel in head))
    compute = floor / cluster.share_of_floor
    weights, exposed = _weights(shape, layout, cluster, compute)
    # AdamW reads weight, gradient and moments and writes all but the gradient; the norm and the clip read and write it.
    update = 10 * layout.weight_size * layout.updated(shape.count) / (cluster.memory_gb_per_s * 1e9)
    return Duration(compute, floor, steps * exchange, weights, exposed, update)


def _attention(
    shape: ModelShape, block: BlockShape, score_flops: float, layout: Layout, passes: int
) -> Iterator[Kernel]:
    """Forward (one pass) or backward (two) of an attention, its norm and the residual sums of the block."""
    yield from _matrices(block.attention_count.other, shape.dim, layout, passes)
    yield Kernel(passes * score_flops * layout.tokens, passes * 4 * layout.tokens * shape.dim * layout.compute_size)
    yield Kernel(0, passes * 6 * layout.tokens * shape.dim * layout.residual_size)


def _matrices(parameters: int, dim: int, layout: Layout, passes: int) -> Iterator[Kernel]:
    """Products of all positions with matrices that have ``dim`` on one side."""
    width = parameters / dim
    num_bytes = parameters + layout.tokens * (dim + width)
    yield Kernel(2 * passes * layout.tokens * parameters, passes * num_bytes * layout.compute_size)


def moe_forward(moe: MoEConfig, dim: int, layout: Layout, num_rows: int) -> list[Kernel]:
    """One fused kernel for each product of a MoE layer, with gather and activation in the first; combine is alone."""
    tokens, up, down, row, hidden, position = _moe_sizes(moe, dim, layout, num_rows)
    gated = up // down
    return [
        Kernel(2 * tokens * dim * moe.num_experts, position + 8 * tokens * moe.num_experts),
        Kernel(2 * num_rows * dim * _width(moe, dim) * gated, row + up + (gated + 1) * hidden),
        Kernel(2 * num_rows * dim * _width(moe, dim), hidden + down + row),
        Kernel(0, row + position),
        *_shared(moe, dim, layout, 1),
    ]


def moe_backward(moe: MoEConfig, dim: int, layout: Layout, num_rows: int) -> list[Kernel]:
    """As `moe_forward`: for each product the gradient of its input and of its weights."""
    tokens, up, down, row, hidden, position = _moe_sizes(moe, dim, layout, num_rows)
    gated = up // down
    flops = 2 * num_rows * dim * _width(moe, dim)
    return [
        Kernel(flops, row + down + (2 * gated + 1) * hidden),
        Kernel(flops, row + hidden + down),
        Kernel(flops * gated, gated * hidden + up + row),
        Kernel(flops * gated, row + gated * hidden + up),
        Kernel(0, row + position),
        Kernel(4 * tokens * dim * moe.num_experts, 3 * position + 8 * tokens * moe.num_experts),
        *_shared(moe, dim, layout, 2),
    ]


def _moe_sizes(moe: MoEConfig, dim: int, layout: Layout, num_rows: int) -> tuple[int, int, int, int, int, int]:
    """Positions, and bytes: weights of the first product(s) and of the last, rows, hidden rows, positions."""
    size, width = layout.compute_size, _width(moe, dim)
    down = moe.num_experts // layout.ep * dim * width * size
    gated = moe.experts.expert_matmul_parameters(dim) // (dim * width) - 1
    rows, hidden = num_rows * dim * size, num_rows * width * size
    return layout.tokens, gated * down, down, rows, hidden, layout.tokens * dim * size


def _width(moe: MoEConfig, dim: int) -> int:
    assert isinstance(moe.experts, FFNExpertsConfig)
    return moe.experts.width(dim)


def _shared(moe: MoEConfig, dim: int, layout: Layout, passes: int) -> Iterator[Kernel]:
    if moe.shared_hidden_dim is not None:
        parameters = moe.experts.expert_matmul_parameters(dim) // _width(moe, dim) * moe.shared_hidden_dim
        yield from _matrices(parameters, dim, layout, passes)


def passes(layout: Layout) -> int:
    """Exchanges of a layer and micro-step: dispatch, combine, and the gradients of both; with ``full`` checkpointing
    dispatch and combine once more."""
    return 6 if layout.checkpointing == "full" else 4


def times_sent(traffic: LayerTraffic, layout: Layout) -> float:
    """How often a layer's bytes are sent in a micro-step: once, and what goes in forward again with ``full``
    checkpointing."""
    return 1.0 + (traffic.in_forward if layout.checkpointing == "full" else 0.0)


def _exchange(traffic: LayerTraffic, layout: Layout, cluster: Cluster) -> float:
    """Seconds of a layer's all-to-alls in one micro-step. Rows leave for the node and for the network at once, and the
    slower link decides, or in turn; the rank that most rows go to keeps the others waiting."""
    if layout.ep == 1:
        return 0.0
    heaviest = traffic.rows.arrived / max(traffic.rows.sent, 1)
    inside = traffic.chosen.inside / (cluster.node_gb_per_s * 1e9)
    across = traffic.chosen.across / (cluster.network_gb_per_s * 1e9)
    rows = inside + across if traffic.in_turn else max(inside, across)
    return times_sent(traffic, layout) * heaviest * rows + passes(layout) * cluster.latency_us * 1e-6


def _ring(num_bytes: float, ranks: int, neighbours: int, cluster: Cluster) -> float:
    """Seconds in which ``ranks`` gather, or sum and cut, ``num_bytes`` in all; ``neighbours`` of them share a node."""
    if ranks == 1:
        return 0.0
    speed = cluster.node_gb_per_s if ranks <= neighbours else cluster.network_gb_per_s
    return num_bytes * (ranks - 1) / ranks / (speed * 1e9) + cluster.latency_us * 1e-6


def _weights(shape: ModelShape, layout: Layout, cluster: Cluster, compute: float) -> tuple[float, float]:
    """Seconds of gathering and summing, all of it and the part that nothing hides."""
    count, size, node = shape.count, layout.weight_size, cluster.ranks_per_node
    dense, experts = count.other + count.router, count.experts // layout.ep
    # Ranks with the same experts lie `ep` apart.
    near = max(node // layout.ep, 1)
    if layout.fsdp is None:
        sums = 2 * _ring(dense * size, layout.world, node, cluster)
        sums += 2 * _ring(experts * size, layout.edp, near, cluster)
        times = layout.accumulation if layout.zero_stage == 2 else 1
        return times * sums, times * sums
    shard = layout.fsdp // layout.ep
    gather = _ring(dense * layout.compute_size, layout.fsdp, node, cluster)
    gather += _ring(experts * layout.compute_size, shard, near, cluster)
    reduce = _ring(dense * size, layout.fsdp, node, cluster) + _ring(experts * size, shard, near, cluster)
    replicas = layout.world // layout.fsdp
    copies = 2 * _ring(layout.held(count) * size, replicas, max(node // layout.fsdp, 1), cluster)
    moved = layout.accumulation * (2 * gather + reduce) + copies
    # Gathered one unit ahead on CUDA; what takes longer than the compute beside it is waited for.
    hidden = min(moved, compute) if layout.device == "cuda" else 0.0
    return moved, moved - hidden
