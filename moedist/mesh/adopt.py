"""A mesh over ranks that somebody else has started."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moedist.config import require
from moedist.mesh.mesh import Mesh, MeshConfig, grid


def adopt_mesh(ep: int, device: torch.device | str) -> Mesh:
    """Lays out the ranks of the caller's own process group; collective, called by every rank once.

    The groups that it makes wait as long as the caller's does. They end with it: `torch.distributed`'s
    ``destroy_process_group`` is the caller's to call.

    Args:
        ep: expert-parallel size, a divisor of the number of ranks: 1 puts all experts on every rank.
        device: where this rank computes: ``cpu``, or its own CUDA device.

    Raises:
        ConfigError: there is no process group, or ``ep`` ranks do not divide it.
    """
    config = MeshConfig(ep=ep)
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
    return grid(dist.get_world_size(), ep, device, timeout)
