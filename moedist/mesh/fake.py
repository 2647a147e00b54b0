"""A rank of a world that is not there, for plans of large runs on a small machine."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from moedist.mesh.mesh import Mesh, MeshConfig, close_mesh, grid


@contextlib.contextmanager
def fake_mesh(config: MeshConfig, rank: int, world_size: int) -> Iterator[Mesh]:
    """The mesh as ``rank`` sees it, in a process that is in no process group; its groups send nothing.

    The groups are torch's fake ones, all of them as in a run of ``world_size`` ranks. The mesh's device is ``meta``:
    there is nothing to compute on. Nothing of it may be used after leaving.
    """
    excepthook = sys.excepthook
    assert not dist.is_initialized(), "a process that is a rank cannot be another one"
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        mesh = grid(world_size, config.ep, torch.device("cpu"), fsdp=config.fsdp, ranks_per_node=config.ranks_per_node)
        yield dataclasses.replace(mesh, device=torch.device("meta"))
    finally:
        close_mesh()
        sys.excepthook = excepthook  # joining a group makes it name the rank, for good
        _clear_sharding_prop_cache()  # it would hand this rank's mesh to the next one, which looks the same
