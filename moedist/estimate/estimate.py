"""All figures of one configuration on one cluster, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moedist.config import ConfigError
from moedist.estimate.cluster import Cluster
from moedist.estimate.duration import Duration, duration, times_sent
from moedist.estimate.memory import Memory, memory
from moedist.estimate.shape import Layout, ModelShape, shape_of
from moedist.estimate.traffic import LayerTraffic, Spread, traffic_of
from moedist.train.config import RunConfig

Accepts = Callable[[RunConfig, int], bool]
"""Whether `moedist train` would start a configuration on so many ranks."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Everything; bytes and seconds.

    Attributes:
        shape, layout, cluster: what was estimated.
        memory: of the rank that holds most.
        duration: of an optimizer step.
        traffic: by the index of the block.
    """

    shape: ModelShape
    layout: Layout
    cluster: Cluster
    memory: Memory
    duration: Duration
    traffic: Mapping[int, LayerTraffic]

    @property
    def fits(self) -> bool:
        """Whether the worst moment fits the memory that a rank can use."""
        return self.memory.peak <= self.cluster.usable_bytes

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.layout.world * self.layout.tokens * self.layout.accumulation

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens_per_step / self.duration.step

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the cluster's large matrix products reach."""
        reached = self.layout.world * self.cluster.flops(self.layout.precision)
        return self.shape.flops_per_token * self.tokens_per_second / reached

    def bytes_per_layer(self, kind: str, link: str = "total") -> int:
        """Sent by a rank per layer and micro-step: dispatch, combine and their gradients; the mean of all MoE layers.

        Args:
            kind: field of `LayerTraffic`.
            link: field of `moedist.moe.dispatch.traffic.Traffic`.
        """
        layers = [getattr(getattr(layer, kind), link) for layer in self.traffic.values()]
        return round(sum(layers) / max(len(layers), 1))


def estimate(
    config: RunConfig,
    vocab_size: int,
    world: int,
    cluster: Cluster,
    *,
    shape: ModelShape | None = None,
    spreads: Mapping[int, Spread] | None = None,
) -> Estimate:
    """Estimates a configuration that `moedist train` would accept on ``world`` ranks.

    Args:
        config: the run.
        vocab_size: number of token ids (V).
        world: all ranks.
        cluster: where.
        shape: of the model, where it is known already.
        spreads: of recorded routing, by the index of the block; None for even routing.

    Raises:
        ConfigError: a part has no closed form.
    """
    shape = shape or shape_of(config, vocab_size)
    layout = Layout.of(config, world, cluster.device)
    traffic = traffic_of(shape, layout, cluster.ranks_per_node, spreads)
    rows = {block: layer.rows for block, layer in traffic.items()}
    return Estimate(
        shape=shape,
        layout=layout,
        cluster=cluster,
        memory=memory(shape, layout, rows),
        duration=duration(shape, layout, traffic, cluster),
        traffic=traffic,
    )


def changes(config: RunConfig, world: int) -> Iterator[tuple[str, str | int]]:
    """Keys and values with which a rank holds less, from the cheapest to the dearest, each on top of those before."""
    strengths = ("none", "selective", "full")
    for strength in strengths[strengths.index(config.train.activation_checkpointing) + 1 :]:
        yield "train.activation_checkpointing", strength
    if config.mesh.fsdp != world and config.engine.kind == "native":
        yield "mesh.fsdp", world
    micro_batch = config.train.micro_batch
    while micro_batch > 1:
        micro_batch //= 2
        yield "train.micro_batch", micro_batch
    ep = config.mesh.ep
    while config.moe.num_experts % (2 * ep) == 0 and world % (2 * ep) == 0:
        ep *= 2
        yield "mesh.ep", ep


def changed(config: RunConfig, made: Mapping[str, str | int]) -> RunConfig:
    """The configuration with some of `changes`.

    Raises:
        ConfigError: two values do not go together.
    """
    values: dict[str, dict[str, Any]] = {"train": {}, "mesh": {}}
    for key, value in made.items():
        part, name = key.split(".")
        values[part][name] = value
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, **values["train"]),
        mesh=dataclasses.replace(config.mesh, **values["mesh"]),
    )


def what_to_change(config: RunConfig, found: Estimate, accepts: Accepts) -> tuple[str, ...] | None:
    """`changes` with which it fits, none of them for nothing; None where all of them do not help."""
    world = found.layout.world

    def fits(made: Mapping[str, str | int]) -> bool:
        try:
            candidate = changed(config, made)
        except ConfigError:
            return False
        if not accepts(candidate, world):
            return False
        return estimate(candidate, found.shape.vocab_size, world, found.cluster, shape=found.shape).fits

    made = dict[str, str | int]()
    for key, value in changes(config, world):
        made[key] = value
        if fits(made):
            for earlier in tuple(made):
                fewer = {kept: made[kept] for kept in made if kept != earlier}
                made = fewer if fits(fewer) else made
            return tuple(f"{kept}={made[kept]}" for kept in made)
    return None


def as_mapping(found: Estimate) -> dict[str, Any]:
    """Stable keys, for scripts; sizes in bytes, times in seconds."""
    size, memory, seconds = found.shape.size, found.memory, found.duration
    whole = found.bytes_per_layer("chosen")
    sent = sum(layer.chosen.total * times_sent(layer, found.layout) for layer in found.traffic.values())
    return {
        "parameters_total": size.total,
        "parameters_active": size.active,
        "flops_per_token": found.shape.flops_per_token,
        "layout": dataclasses.asdict(found.layout),
        "memory_per_rank": memory.peak,
        "memory": {**dataclasses.asdict(memory), "usable": found.cluster.usable_bytes},
        "fits": found.fits,
        "all_to_all_bytes_per_layer": whole,
        "all_to_all": {
            "bytes_per_layer": whole,
            "bytes_per_layer_across_nodes": found.bytes_per_layer("chosen", "across"),
            "bytes_per_layer_one_row_per_pair": found.bytes_per_layer("per_pair"),
            "bytes_per_layer_one_copy_per_rank": found.bytes_per_layer("per_rank"),
            "bytes_per_layer_one_copy_per_node": found.bytes_per_layer("per_node"),
            "bytes_per_step": round(found.layout.accumulation * sent),
            "layers": len(found.traffic),
        },
        "step_seconds": seconds.step,
        "step": {**dataclasses.asdict(seconds), "exposed": seconds.exposed},
        "exposed_communication": seconds.exposed / seconds.step,
        "tokens_per_step": found.tokens_per_step,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
    }
