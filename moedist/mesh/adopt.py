"""A mesh over ranks that somebody else has started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from moedist.config import require
from moedist.mesh.mesh import Mesh, MeshConfig, grid


def adopt_mesh(ep: int, device: torch.device | str, *, ranks_per_node: int | None = None) -> Mesh:
    """Lays out the ranks of the caller's own process group; collective, called by every rank once.

    The groups that it makes wait as long as the caller's does. They end with it: `torch.distributed`'s
    ``destroy_process_group`` is the caller's to call.

    Args:
        ep: expert-parallel size, a divisor of the number of ranks: 1 puts all experts on every rank.
        device: where this rank computes: ``cpu``, or its own CUDA device.
        ranks_per_node: ranks that share a node, numbered node by node; None: as many as torchrun says
            (``LOCAL_WORLD_SIZE``), or all.

    Raises:
        ConfigError: there is no process group, or ``ep`` or ``ranks_per_node`` do not divide its ranks.
    """
    config = MeshConfig(ep=ep, ranks_per_node=ranks_per_node)
    require(
        dist.is_available() and dist.is_initialized(),
        "mesh.ep",
        ep,
        "needs the ranks of a process group, and there is none yet",
        "Call torch.distributed.init_process_group first; for one process alone, take Mesh.alone().",
    )
    config.check_world(dist.get_world_size())
    device = torch.device(device)
    timeout = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
    world_size = dist.get_world_size()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return grid(world_size, ep, device, timeout, ranks_per_node=ranks_per_node or local_size)
