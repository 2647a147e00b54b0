"""A way to talk that may take long: for checkpoints."""

from __future__ import annotations

import datetime

import torch.distributed as dist

from moedist.mesh.axis import Axis
from moedist.mesh.mesh import Mesh


def slow_axis(mesh: Mesh, timeout_s: float) -> Axis:
    """Every rank of the run on a process group of its own (gloo, CPU tensors) with a longer time-out.

    A checkpoint takes longer than any step may, and waiting for a disk is no reason to call a rank lost; raising the
    time-out of the step's own groups instead would hide the ranks that are. Call it once per run, on all ranks.

    Args:
        timeout_s: ``mesh.save_timeout_s``.
    """
    if mesh.dp.group_name is None:
        return Axis("slow")
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s), group_desc="slow")
    return Axis("slow", dist.get_world_size(), dist.get_rank(), group.group_name)
