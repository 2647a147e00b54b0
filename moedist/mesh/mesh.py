"""The ranks of a run as a mesh of named axes."""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moedist.config import Config, require
from moedist.mesh.axis import Axis
from moedist.mesh.nodes import lay_on_nodes, one_node


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """How the ranks are laid out.

    Attributes:
        ep: expert-parallel size: each expert layer's experts are sharded over this many ranks.
        fsdp: None: every rank holds all dense weights. n: weights, gradients and optimizer state are cut over n ranks
            (dense ones over the n, an expert's over the ``n / ep`` of them that hold it), and the ``world / n`` groups
            of n ranks are replicas of each other. 1 cuts nothing, but runs the same code.
        ranks_per_node: ranks that share a node and its fast links, numbered node by node; None: as many as were started
            on each (``launch.nproc``). A smaller number than that treats parts of a machine as nodes.
        device: ``cpu`` (gloo), ``cuda`` (NCCL) or ``auto``: CUDA where there is a device for every local rank.
        timeout_s: seconds that a collective may wait for a missing rank before the run ends.
        save_timeout_s: the same while a checkpoint is written or read.
    """

    ep: int = 1
    fsdp: int | None = None
    ranks_per_node: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: float = 120.0
    save_timeout_s: float = 900.0

    def __post_init__(self) -> None:
        require(self.ep >= 1, "ep", self.ep, "is not a number of ranks", "Set it to 1 or more.")
        require(
            self.fsdp is None or (self.fsdp >= 1 and self.fsdp % self.ep == 0),
            "fsdp",
            self.fsdp,
            f"is no multiple of mesh.ep = {self.ep}: an expert's weights are cut over the fsdp / ep ranks that hold it",
            f"Set mesh.fsdp to {self.ep} or a multiple of it, or to null for whole dense weights on every rank.",
        )
        require(
            self.ranks_per_node is None or self.ranks_per_node >= 1,
            "ranks_per_node",
            self.ranks_per_node,
            "is not a number of ranks",
            "Set it to 1 or more, or to null for as many as are started on a node.",
        )
        for key in ("timeout_s", "save_timeout_s"):
            value = getattr(self, key)
            require(value > 0, key, value, "is not a duration", "Set it to a positive number of seconds.")

    def check_world(self, world_size: int) -> None:
        """Raises `ConfigError` unless ``world_size`` ranks can be laid out so."""
        sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
        require(
            world_size % self.ep == 0,
            "ep",
            self.ep,
            f"does not divide the {world_size} ranks launched",
            f"Set mesh.ep to {one_of(sizes)}, or launch a multiple of {self.ep} (launch.nproc x launch.nnodes).",
        )
        sizes = [size for size in sizes if size % self.ep == 0]
        require(
            self.fsdp is None or world_size % self.fsdp == 0,
            "fsdp",
            self.fsdp,
            f"does not divide the {world_size} ranks launched",
            f"Set mesh.fsdp to {one_of(sizes)} or to null, or launch a multiple of {self.fsdp} ranks.",
        )
        sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
        require(
            self.ranks_per_node is None or world_size % self.ranks_per_node == 0,
            "ranks_per_node",
            self.ranks_per_node,
            f"does not divide the {world_size} ranks launched",
            f"Set mesh.ranks_per_node to {one_of(sizes)}, or to null for as many as are started on a node.",
        )


def one_of(sizes: list[int]) -> str:
    """``1, 2 or 4``."""
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))


@dataclasses.dataclass(frozen=True)
class FullyShard:
    """Where the pieces of fully sharded weights lie.

    Attributes:
        pieces: the n ranks among which every weight of the model lies once (``fsdp`` = ``shard`` x ``ep``).
        copies: the ranks that hold the same pieces (``replicate``).
        dense: over which dense weights are cut: [fsdp], or [replicate, fsdp] where there are replicas.
        experts: over which an expert's weights are cut: [shard], or [replicate, shard].
    """

    pieces: Axis
    copies: Axis
    dense: DeviceMesh
    experts: DeviceMesh

    @classmethod
    def of(cls, device_mesh: DeviceMesh) -> FullyShard:
        """Of a mesh with the axes ``replicate``, ``shard`` and ``ep``."""
        replicate, shard = device_mesh["replicate"], device_mesh["shard"]
        fsdp = device_mesh["shard", "ep"]._flatten("fsdp")
        alone = replicate.size() == 1
        return cls(
            pieces=Axis.of(fsdp, "fsdp"),
            copies=Axis.of(replicate, "replicate"),
            dense=fsdp if alone else DeviceMesh._concatenate([replicate, fsdp]),
            experts=shard if alone else device_mesh["replicate", "shard"],
        )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This rank's place in the run.

    The ranks form a grid [replicate, shard, expert parallel], neighbours along the last. Expert-parallel ranks are
    data-parallel ranks for the dense weights, so ``dp`` runs over the whole grid; ``edp`` (``replicate`` x ``shard``)
    has ``world / ep`` ranks, which hold the same experts or pieces of them. Tensor, pipeline and context axes will be
    further dims of the same `DeviceMesh`.

    Attributes:
        fsdp: where the pieces lie; None where every rank holds all dense weights, and its experts, whole.
    """

    device: torch.device
    dp: Axis
    ep: Axis
    edp: Axis
    device_mesh: DeviceMesh | None = None
    fsdp: FullyShard | None = None

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Mesh:
        """One process without a process group."""
        return cls(torch.device(device), Axis("dp"), Axis("ep", nodes=one_node(Axis("ep"))), Axis("edp"))

    @classmethod
    def of(
        cls,
        device_mesh: DeviceMesh,
        device: torch.device,
        *,
        fully_shard: bool = False,
        ranks_per_node: int | None = None,
    ) -> Mesh:
        """Adopts a mesh with the axes ``replicate``, ``shard`` and ``ep``, whoever made it; it may have others.

        Args:
            device_mesh: without sharding, ``edp`` in place of ``replicate`` and ``shard`` will do.
            device: of this rank.
            fully_shard: whether weights are cut over ``shard`` and ``ep``.
            ranks_per_node: ranks that share a node; None: all.
        """
        names = device_mesh.mesh_dim_names or ()
        over_edp = ("edp",) if "edp" in names else ("replicate", "shard")
        edp = device_mesh["edp"] if "edp" in names else device_mesh[over_edp]._flatten("edp")
        ep = Axis.of(device_mesh["ep"], "ep")
        return cls(
            device=device,
            dp=Axis.of(device_mesh[(*over_edp, "ep")]._flatten("dp"), "dp"),
            ep=lay_on_nodes(ep, device_mesh["ep"], ranks_per_node or ep.size),
            edp=Axis.of(edp, "edp"),
            device_mesh=device_mesh,
            fsdp=FullyShard.of(device_mesh) if fully_shard else None,
        )

    def axes(self) -> tuple[Axis, ...]:
        """Every line of ranks that this rank is on."""
        nodes = self.ep.nodes
        of_nodes = () if nodes is None or nodes.along_one else (nodes.across, nodes.inside)
        of_pieces = () if self.fsdp is None else (self.fsdp.pieces, self.fsdp.copies)
        return self.dp, self.ep, *of_nodes, self.edp, *of_pieces


def choose_device(name: str, local_rank: int, local_size: int) -> torch.device:
    """The device of a local rank; ``auto`` takes CUDA only where every local rank gets a device of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_size else "cpu"
    return torch.device(name, local_rank) if name == "cuda" else torch.device("cpu")


def join_mesh(config: MeshConfig, store: Store | None = None) -> Mesh:
    """Joins the process group described by torchrun's environment and lays out the mesh. Pair with `close_mesh`.

    Args:
        config: the layout.
        store: where the ranks find each other; None for the one that the environment names.
    """
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    config.check_world(int(os.environ["WORLD_SIZE"]))
    device = choose_device(config.device, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
            store=store,
            rank=-1 if store is None else int(os.environ["RANK"]),
            world_size=-1 if store is None else int(os.environ["WORLD_SIZE"]),
        )
    return grid(
        dist.get_world_size(),
        config.ep,
        device,
        timeout,
        fsdp=config.fsdp,
        ranks_per_node=config.ranks_per_node or local_size,
    )


def grid(
    world_size: int,
    ep: int,
    device: torch.device,
    timeout: datetime.timedelta | None = None,
    *,
    fsdp: int | None = None,
    ranks_per_node: int | None = None,
) -> Mesh:
    """The mesh [replicate, shard, ep] over the ranks of the default process group; ``fsdp`` as `MeshConfig` has it.

    Args:
        ranks_per_node: ranks that share a node; None: all.
    """
    shard = 1 if fsdp is None else fsdp // ep
    device_mesh = init_device_mesh(
        device.type, (world_size // (shard * ep), shard, ep), mesh_dim_names=("replicate", "shard", "ep")
    )
    mesh = Mesh.of(device_mesh, device, fully_shard=fsdp is not None, ranks_per_node=ranks_per_node)
    if timeout is not None:  # sub-groups don't inherit the default group's time-out
        for group in (*(axis.group for axis in mesh.axes()), *device_mesh.get_all_groups()):
            dist.distributed_c10d._set_pg_timeout(timeout, group)
    return mesh


def close_mesh() -> None:
    """Leaves the process group; without it a process may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
