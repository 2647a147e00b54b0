"""Every layout that `moedist train` accepts for a number of ranks, the fastest first."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator
from typing import Literal

from moedist.config import ConfigError
from moedist.estimate.cluster import Cluster
from moedist.estimate.estimate import Accepts, Estimate, estimate
from moedist.estimate.shape import shape_of
from moedist.train.config import RunConfig

Recomputing = Literal["none", "selective", "full"]
LARGEST_MICRO_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Found:
    """One layout: its overrides and its estimate."""

    overrides: tuple[str, ...]
    estimate: Estimate


def search(config: RunConfig, vocab_size: int, world: int, cluster: Cluster, accepts: Accepts) -> list[Found]:
    """Estimates every accepted layout: those that fit by tokens per second, then the others by what they hold.

    The global batch stays: accumulation follows from the micro-batch.

    Args:
        config: all else is its.
        vocab_size: number of token ids (V).
        world: all ranks.
        cluster: where.
        accepts: the checks of a run.
    """
    shape = shape_of(config, vocab_size)
    found = []
    for overrides, candidate in layouts(config, world):
        if accepts(candidate, world):
            found.append(Found(overrides, estimate(candidate, vocab_size, world, cluster, shape=shape)))
    return sorted(found, key=_place)


def _place(found: Found) -> tuple[bool, float]:
    number = found.estimate
    return (not number.fits, -number.tokens_per_second if number.fits else number.memory.peak)


def layouts(config: RunConfig, world: int) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """All combinations of ``mesh.ep``, ``mesh.fsdp``, ``train.micro_batch`` and checkpointing that may be accepted."""
    train = config.train
    batch = train.global_batch_tokens or world * train.micro_batch * train.sequence_length
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    for ep, fsdp, micro_batch, again in itertools.product(
        [size for size in divisors if config.moe.num_experts % size == 0],
        [None, *divisors],
        [rows for rows in range(1, LARGEST_MICRO_BATCH + 1) if batch % (world * rows * train.sequence_length) == 0],
        typing.get_args(Recomputing),
    ):
        if fsdp is not None and fsdp % ep != 0:
            continue
        overrides = (
            f"mesh.ep={ep}",
            f"mesh.fsdp={'null' if fsdp is None else fsdp}",
            f"train.micro_batch={micro_batch}",
            f"train.activation_checkpointing={again}",
        )
        try:
            yield (
                overrides,
                dataclasses.replace(
                    config,
                    mesh=dataclasses.replace(config.mesh, ep=ep, fsdp=fsdp),
                    train=dataclasses.replace(
                        train,
                        micro_batch=micro_batch,
                        activation_checkpointing=again,
                        global_batch_tokens=batch,
                    ),
                ),
            )
        except ConfigError:
            continue
