"""An estimate as lines for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from moedist.estimate.estimate import Estimate
from moedist.estimate.search import Found

GIB = 2**30


def describe(found: Estimate) -> Iterator[str]:
    """Line by line, the parts of memory and of a step under one another."""
    size, layout, memory, seconds = found.shape.size, found.layout, found.memory, found.duration
    yield f"parameters     {count(size.total)}, active {count(size.active)}"
    yield f"FLOPs          {found.shape.flops_per_token / 1e9:.2f} G per token, forward and backward"
    cut = f"{layout.world} ranks, ep {layout.ep}, fsdp {layout.fsdp or 'none'}"
    batch = f"{layout.micro_batch} x {layout.length} positions x {layout.accumulation} micro-steps"
    yield f"layout         {cut}; {batch}; checkpointing {layout.checkpointing}, {layout.precision}"
    yield ""
    room = found.cluster.usable_bytes
    yield f"memory         {memory.peak / GIB:.2f} GiB per rank at most ({memory.moment}), of {room / GIB:.2f} usable"
    for name in ("weights", "gradients", "optimizer", "activations", "exchange", "temporary"):
        yield f"  {name:<12} {getattr(memory, name) / GIB:8.3f} GiB"
    if memory.host:
        yield f"  on the host  {memory.host / GIB:8.3f} GiB"
    yield ""
    yield from _traffic(found)
    tokens = found.tokens_per_second
    yield f"step           {seconds.step:.3f} s, {tokens:,.0f} tokens/s, {tokens / layout.world:,.0f} per rank"
    for name, value in {
        "compute": seconds.compute,
        "exchange": seconds.exchange,
        "weights": seconds.weights_exposed,
        "update": seconds.update,
    }.items():
        yield f"  {name:<12} {value:8.3f} s  {value / seconds.step:4.0%}"
    yield f"  kernels at {found.cluster.share_of_floor:.0%} of their floor, {seconds.floor:.3f} s; MFU {found.mfu:.1%}"


def _traffic(found: Estimate) -> Iterator[str]:
    if not found.traffic:
        return
    yield f"all-to-all     {mib(found.bytes_per_layer('chosen'))} sent per rank, layer and micro-step"
    for name, kind in {"per pair": "per_pair", "copy per rank": "per_rank", "copy per node": "per_node"}.items():
        across = found.bytes_per_layer(kind, "across")
        yield f"  {name:<14} {mib(found.bytes_per_layer(kind))}, of it to other nodes {mib(across)}"
    heaviest = max(layer.rows.arrived / max(layer.rows.sent, 1) for layer in found.traffic.values())
    yield f"  rows on the fullest rank: {heaviest:.2f} x the mean"
    yield ""


def describe_search(found: Sequence[Found]) -> Iterator[str]:
    """A table, a layout a line."""
    yield "tokens/s/rank  GiB/rank  exposed  layout"
    for one in found:
        number = one.estimate
        speed = f"{number.tokens_per_second / number.layout.world:13,.0f}" if number.fits else " does not fit"
        exposed = number.duration.exposed / number.duration.step
        yield f"{speed}  {number.memory.peak / GIB:8.2f}  {exposed:7.0%}  {' '.join(one.overrides)}"


@dataclasses.dataclass(frozen=True)
class Budget:
    """What so many tokens take: seconds, hours of all devices together, and money where a price is known."""

    tokens: float
    seconds: float
    device_hours: float
    cost: float | None

    def describe(self) -> str:
        """One line."""
        cost = "" if self.cost is None else f", {self.cost:,.0f} in all"
        days = f"{self.seconds / 86400:,.2f} days"
        return f"budget         {self.tokens:.3g} tokens: {days}, {self.device_hours:,.0f} device hours{cost}"


def budget(found: Estimate, tokens: float, price: float | None) -> Budget:
    """Time and cost; ``price`` of a device and hour."""
    seconds = tokens / found.tokens_per_second
    hours = seconds / 3600 * found.layout.world
    return Budget(tokens, seconds, hours, None if price is None else hours * price)


def count(number: int) -> str:
    """``46.70e9``."""
    for unit, name in ((1e9, "e9"), (1e6, "e6")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return f"{number:,}"


def mib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**20:.2f} MiB"
