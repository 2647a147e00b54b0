"""What single ranks of a run would hold, found without the ranks: a plan of 1,024 of them on a laptop.

The chosen ranks are built one after the other by the code that a run uses (mesh, model, spread, optimizer, engine), on
process groups that send nothing and tensors without storage. Then every weight of the whole model must lie exactly once
among the ranks that hold its pieces.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from moedist.engine.contract import Engine
from moedist.mesh import Mesh, MeshConfig
from moedist.mesh.fake import fake_mesh
from moedist.moe.layer import MoE
from moedist.train.build import SpreadModel, build_engine, build_model
from moedist.train.config import RunConfig
from moedist.train.layout import Layout, Shape, check_whole

NOT_COUNTED = "activations, the rows of an all-to-all, gathered weights, buffers of collectives and of the allocator"
"""What a rank needs besides, and this plan does not know."""


@dataclasses.dataclass(frozen=True)
class PlannedRank:
    """One rank.

    Attributes:
        rank: global.
        groups: global ranks on each of its lines, by the axis's name.
        experts: global ids of its experts, by the index of the block.
        shapes: of what it holds of each parameter.
        weight_bytes, gradient_bytes, optimizer_bytes: of its parameters, their gradients and the optimizer's state.
    """

    rank: int
    groups: dict[str, tuple[int, ...]]
    experts: dict[int, tuple[int, ...]]
    shapes: dict[str, Shape]
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all that is counted."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The plan.

    Attributes:
        world_size: all ranks.
        num_parameters: of the whole model; the pieces were found to add up to it.
        parameters: how each lies.
        ranks: those that were built.
        on_host: whether all that is counted lies on the host and not on the device.
        seconds: what it took.
    """

    world_size: int
    num_parameters: int
    parameters: dict[str, Layout]
    ranks: tuple[PlannedRank, ...]
    on_host: bool
    seconds: float


def dry_run(config: RunConfig, vocab_size: int, world_size: int) -> DryRun:
    """Builds the ranks of `chosen_ranks` and checks that the whole model is there.

    Args:
        config: checked for ``world_size`` ranks.
        vocab_size: number of token ids of the data (V).
        world_size: all ranks.
    """
    begin = time.perf_counter()
    whole = {
        name: tuple(parameter.shape)
        for name, parameter in config.model.build(vocab_size, config.moe, device="meta").named_parameters()
    }
    ranks: list[PlannedRank] = []
    parameters: dict[str, Layout] = {}
    mesh_config = dataclasses.replace(config.mesh, ranks_per_node=config.ranks_per_node(world_size))
    for rank in chosen_ranks(mesh_config, world_size):
        with fake_mesh(mesh_config, rank, world_size) as mesh:
            spread = build_model(config, vocab_size, mesh)
            parameters |= check_whole(spread, whole, world_size)
            engine = build_engine(config, spread, mesh)
            ranks.append(plan_rank(spread, engine, mesh))
            engine.close()
    num_parameters = sum(math.prod(shape) for shape in whole.values())
    on_host = config.engine.weights_on_host and config.mesh.fsdp is not None
    return DryRun(world_size, num_parameters, parameters, tuple(ranks), on_host, time.perf_counter() - begin)


def chosen_ranks(config: MeshConfig, world_size: int) -> list[int]:
    """The first and the last rank of the first expert-parallel group, the first of the second, the last of all; with
    ``fsdp`` the first of the second replica too.

    >>> chosen_ranks(MeshConfig(ep=64), 1024)
    [0, 63, 64, 1023]
    """
    wanted = {0, config.ep - 1, config.ep, config.fsdp or 0, world_size - 1}
    return sorted(rank for rank in wanted if rank < world_size)


def plan_rank(spread: SpreadModel, engine: Engine, mesh: Mesh) -> PlannedRank:
    """What this rank holds."""
    parameters = dict(spread.model.named_parameters())
    layers = (module for module in spread.model.modules() if isinstance(module, MoE))
    return PlannedRank(
        rank=mesh.dp.rank,
        groups={axis.name: axis.ranks for axis in mesh.axes()},
        experts={layer.layer: layer.bank.experts.expert_ids for layer in layers},
        shapes={name: tuple(local(parameter).shape) for name, parameter in parameters.items()},
        weight_bytes=num_bytes(parameters.values()),
        gradient_bytes=num_bytes(parameter for parameter in parameters.values() if parameter.requires_grad),
        optimizer_bytes=num_bytes(tensors(engine.state()["optimizer"])),
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_bytes(parts: Iterable[Tensor]) -> int:
    """What this rank's parts take."""
    return sum(local(part).nbytes for part in parts)


def tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """The leaves of a nested mapping."""
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors(value)


# For people


def describe(plan: DryRun) -> list[str]:
    """The plan as lines of text."""
    lines = []
    for rank in plan.ranks:
        lines.append(f"rank {rank.rank}")
        lines += [f"  {name:<9} {in_short(ranks)} ({len(ranks)})" for name, ranks in rank.groups.items()]
        for experts, blocks in alike(rank.experts):
            lines.append(f"  experts   {in_short(experts)} of layers {in_short(blocks)}")
        parts = {"weights": rank.weight_bytes, "gradients": rank.gradient_bytes, "optimizer": rank.optimizer_bytes}
        told = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
        where = " on the host" if plan.on_host else ""
        lines.append(f"  memory    {size_text(rank.total_bytes)}{where}: {told}")
    lines += ["", *shape_table(plan), ""]
    lines.append(f"check        all {plan.num_parameters:,} parameters are there, each exactly once in every copy")
    lines.append(f"not counted  {NOT_COUNTED}")
    lines.append(f"took         {plan.seconds:.1f} s")
    return lines


def shape_table(plan: DryRun) -> list[str]:
    """Whole and local shapes of each kind of parameter: those of all blocks that lie alike are a line."""
    kinds: dict[tuple[str, Layout, tuple[Shape, ...]], int] = {}
    for name, layout in plan.parameters.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        key = (kind, layout, tuple(rank.shapes.get(name, (0,)) for rank in plan.ranks))
        kinds[key] = kinds.get(key, 0) + 1
    rows = [("parameter", "number", "whole", "pieces", "copies", "on a rank")]
    for (kind, layout, shapes), number in kinds.items():
        held = [
            f"{shape_text(shape)} on {in_short(at)}"
            for shape, at in alike(dict(zip((rank.rank for rank in plan.ranks), shapes, strict=True)))
        ]
        own = shape_text(shapes[0]) if len(set(shapes)) == 1 else ", ".join(held)
        rows.append((kind, str(number), shape_text(layout.whole), str(layout.pieces), str(layout.copies), own))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def alike(values: Mapping[int, tuple[int, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each distinct value with the keys that have it."""
    keys: dict[tuple[int, ...], list[int]] = {}
    for key, value in values.items():
        keys.setdefault(value, []).append(key)
    return [(value, tuple(having)) for value, having in keys.items()]


def in_short(numbers: Sequence[int]) -> str:
    """Numbers at equal distances by their ends.

    >>> in_short([4, 5, 6, 7]), in_short([0, 64, 128, 192]), in_short([3]), in_short([0, 1, 5])
    ('4-7', '0, 64, ..., 192', '3', '0, 1, 5')
    """
    distances = {after - before for before, after in itertools.pairwise(numbers)}
    if len(numbers) > 2 and len(distances) == 1:
        return f"{numbers[0]}-{numbers[-1]}" if distances == {1} else f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    return ", ".join(map(str, numbers))


def shape_text(shape: Shape) -> str:
    """``[64, 2048]``."""
    return f"[{', '.join(map(str, shape))}]"


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.3f} GiB" if size >= 2**24 else f"{size / 2**20:.3f} MiB"
