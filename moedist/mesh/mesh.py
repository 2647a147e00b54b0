"""The ranks of a run as a mesh of named axes."""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moedist.config import Config, require
from moedist.mesh.axis import Axis


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """How the ranks are laid out.

    Attributes:
        ep: expert-parallel size: each expert layer's experts are sharded over this many ranks.
        device: ``cpu`` (gloo), ``cuda`` (NCCL) or ``auto``: CUDA where there is a device for every local rank.
        timeout_s: seconds that a collective may wait for a missing rank before the run ends.
        save_timeout_s: the same while a checkpoint is written or read.
    """

    ep: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: float = 120.0
    save_timeout_s: float = 900.0

    def __post_init__(self) -> None:
        require(self.ep >= 1, "ep", self.ep, "is not a number of ranks", "Set it to 1 or more.")
        for key in ("timeout_s", "save_timeout_s"):
            value = getattr(self, key)
            require(value > 0, key, value, "is not a duration", "Set it to a positive number of seconds.")

    def check_world(self, world_size: int) -> None:
        """Raises `ConfigError` unless ``world_size`` ranks can be laid out so."""
        sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
        choices = ", ".join(map(str, sizes[:-1])) + f" or {sizes[-1]}" if len(sizes) > 1 else "1"
        require(
            world_size % self.ep == 0,
            "ep",
            self.ep,
            f"does not divide the {world_size} ranks launched",
            f"Set mesh.ep to {choices}, or launch a multiple of {self.ep} (launch.nproc x launch.nnodes).",
        )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This rank's place in the run.

    The ranks form a grid [expert data parallel, expert parallel]. Expert-parallel ranks are data-parallel ranks for
    the dense weights, so ``dp`` runs over the whole grid; ``edp`` has ``world / ep`` ranks, which hold the same
    experts. Tensor, pipeline and context axes will be further dims of the same `DeviceMesh`.
    """

    device: torch.device
    dp: Axis
    ep: Axis
    edp: Axis
    device_mesh: DeviceMesh | None = None

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Mesh:
        """One process without a process group."""
        return cls(torch.device(device), Axis("dp"), Axis("ep"), Axis("edp"))

    @classmethod
    def of(cls, device_mesh: DeviceMesh, device: torch.device) -> Mesh:
        """Adopts a mesh with the axes ``edp`` and ``ep``, whoever made it."""
        dp = device_mesh["edp", "ep"]._flatten("dp")
        return cls(
            device=device,
            dp=Axis.of(dp, "dp"),
            ep=Axis.of(device_mesh["ep"], "ep"),
            edp=Axis.of(device_mesh["edp"], "edp"),
            device_mesh=device_mesh,
        )


def choose_device(name: str, local_rank: int, local_size: int) -> torch.device:
    """The device of a local rank; ``auto`` takes CUDA only where every local rank gets a device of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_size else "cpu"
    return torch.device(name, local_rank) if name == "cuda" else torch.device("cpu")


def join_mesh(config: MeshConfig) -> Mesh:
    """Joins the process group described by torchrun's environment and lays out the mesh. Pair with `close_mesh`."""
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
        )
    return grid(dist.get_world_size(), config.ep, device, timeout)


def grid(world_size: int, ep: int, device: torch.device, timeout: datetime.timedelta | None = None) -> Mesh:
    """The mesh [world / ep, ep] over the ranks of the default process group."""
    device_mesh = init_device_mesh(device.type, (world_size // ep, ep), mesh_dim_names=("edp", "ep"))
    mesh = Mesh.of(device_mesh, device)
    if timeout is not None:  # sub-groups don't inherit the default group's time-out
        for axis in (mesh.dp, mesh.ep, mesh.edp):
            dist.distributed_c10d._set_pg_timeout(timeout, axis.group)
    return mesh


def close_mesh() -> None:
    """Leaves the process group; without it a process may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
