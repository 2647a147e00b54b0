"""A configuration made small enough to be checked on any machine in seconds; what is checked stays as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

LARGEST = {
    "dim": 64,
    "hidden_dim": 64,
    "shared_hidden_dim": 64,
    "head_dim": 16,
    "repeat": 1,
    "first_dense": 1,
    "moe_every": 2,
    "sequence_length": 64,
    "micro_batch": 2,
}
"""Largest values of sizes, by the last part of their key. Numbers of heads, experts and choices are kept."""
MOE_LAYERS = 2
ACCUMULATION = 2
VOCAB_SIZE = 8192
"""Above it, made-up tokens of so many ids stand for the data's."""


@dataclasses.dataclass(frozen=True)
class Small:
    """A shrunk configuration.

    Attributes:
        mapping: plain mappings, as in ``config.yaml``.
        changes: what differs from the user's, as lines for people.
    """

    mapping: dict[str, Any]
    changes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ranks and how they lie; see `MeshConfig`."""

    world_size: int
    ep: int
    fsdp: int | None
    ranks_per_node: int | None = None


def shrink_layout(layout: Layout, limit: int) -> Layout:
    """At most ``limit`` ranks: as many expert-parallel ones as fit, then two groups of them where the run has several;
    and groups of them on two nodes, or one on each, where the run has groups on several.

    Args:
        layout: the run's.
        limit: ranks that the machine can run.

    >>> shrink_layout(Layout(1024, 64, None, ranks_per_node=8), 4)
    Layout(world_size=4, ep=4, fsdp=None, ranks_per_node=2)
    >>> shrink_layout(Layout(8, 2, 8), 4)
    Layout(world_size=4, ep=2, fsdp=4, ranks_per_node=None)
    """
    ep = max(size for size in range(1, min(layout.ep, limit) + 1) if layout.ep % size == 0)
    world_size = min(layout.world_size // layout.ep, 2, limit // ep) * ep
    whole = layout.fsdp is None or layout.fsdp == layout.world_size
    spans_nodes = layout.ranks_per_node is not None and layout.ranks_per_node < layout.ep
    return Layout(
        world_size,
        ep,
        fsdp=None if layout.fsdp is None else world_size if whole else ep,
        ranks_per_node=(ep // 2 if ep % 2 == 0 else 1) if spans_nodes else None,
    )


def shrink(mapping: Mapping[str, Any], layout: Layout, *, device: str, precision: str, accumulation: int) -> Small:
    """The same run on fewer ranks, with narrower and fewer layers and smaller batches, for one step without a clip.

    Kept: router, capacity, dispatch, number of experts, balance, activation checkpointing, engine, cut of dense
    weights.

    Args:
        mapping: the user's configuration, as plain mappings.
        layout: the ranks to run it on.
        device: of these ranks.
        precision: to check in.
        accumulation: micro-steps per optimizer step in the user's run.
    """
    small = copy.deepcopy(dict(mapping))
    told = ("model", "moe", "train")
    for branch in told:
        _cap(small[branch])
    train = small["train"]
    accumulation = min(accumulation, ACCUMULATION)
    tokens = layout.world_size * train["micro_batch"] * train["sequence_length"] * accumulation
    train |= {"global_batch_tokens": tokens, "precision": precision, "clip_norm": None}
    small["mesh"] |= {"ep": layout.ep, "device": device}
    if "fsdp" in small["mesh"]:
        small["mesh"]["fsdp"] = layout.fsdp
    small["mesh"]["ranks_per_node"] = layout.ranks_per_node
    small["launch"] |= {"nproc": layout.world_size, "nnodes": 1, "rendezvous": None, "max_restarts": 0}
    return Small(small, tuple(_differences({key: mapping[key] for key in told}, {key: small[key] for key in told})))


def with_synthetic_data(small: Small, vocab_size: int, reason: str) -> Small:
    """The same on made-up tokens."""
    ids = min(vocab_size, VOCAB_SIZE)
    data = {"kind": "synthetic", "vocab_size": ids, "cross_documents": small.mapping["data"]["cross_documents"]}
    return Small({**small.mapping, "data": data}, (*small.changes, f"data: synthetic, {ids} ids ({reason})"))


def _cap(value: Any) -> None:
    """Takes every size below ``value`` down to its largest; in place."""
    if isinstance(value, list):
        for inner in value:
            _cap(inner)
    if not isinstance(value, dict):
        return
    _keep_heads(value)
    for key, inner in value.items():
        if key in LARGEST and isinstance(inner, int):
            value[key] = min(inner, LARGEST[key])
        else:
            _cap(inner)
    if "num_layers" in value:
        least = value.get("first_dense", 0) + MOE_LAYERS * value.get("moe_every", 1)
        value["num_layers"] = min(value["num_layers"], least)


def _keep_heads(value: dict[str, Any]) -> None:
    """Heads whose width follows from ``dim`` would be cut below what a rotation can turn: they get one of their own."""
    dim, attention = value.get("dim"), value.get("attention")
    if not isinstance(attention, dict) or not isinstance(dim, int) or dim <= LARGEST["dim"]:
        return
    if "num_heads" in attention and attention.get("head_dim", 0) is None:
        attention["head_dim"] = dim // attention["num_heads"]


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inner = [_differences(old.get(k), new[k], f"{key}.{k}" if key else k) for k in new]
        return [line for lines in inner for line in lines]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for index, (was, now) in pairs for line in _differences(was, now, f"{key}.{index}")]
    return [] if old == new else [f"{key}: {old} -> {new}"]
