"""The ranks that other tests stand on: they compute together, and a failure says where it was."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from moedist.mesh.collectives import all_sum, barrier
from tests.ranks import Here, RankError


def _axes(here: Here, offset: int) -> tuple[float, int, int, bool]:
    mesh = here.mesh_of(ep=2)
    total = all_sum(torch.tensor([float(here.rank + offset)]), mesh.dp)
    return total.item(), mesh.ep.rank, mesh.edp.rank, here.mesh_of(ep=2) is mesh


def _raise_on_one(here: Here) -> None:
    if here.rank == 1:
        raise ValueError("one rank is not like the others")
    barrier(here.mesh_of(ep=1).dp, torch.device("cpu"))


def _die_on_one(here: Here) -> None:
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _hang_on_one(here: Here) -> None:
    if here.rank == 1:
        signal.pause()


@pytest.mark.parametrize("world", [2, 4])
def test_jobs_share_a_world(ranks, world: int) -> None:
    total = float(sum(range(world)) + world)
    assert ranks(world).run(_axes, 1) == [(total, rank % 2, rank // 2, True) for rank in range(world)]


@pytest.mark.slow
def test_failures_are_readable_and_the_pool_recovers(ranks) -> None:
    pool = ranks(2)
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: Traceback.*_raise_on_one.*not like the others"):
        pool.run(_raise_on_one)
    with pytest.raises(RankError, match="rank 1 of 2: died, exit code -9"):
        pool.run(_die_on_one)
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: did not end.*_hang_on_one"):
        pool.run(_hang_on_one, limit_s=3.0)
    assert [result[0] for result in pool.run(_axes, 0)] == [1.0, 1.0]
