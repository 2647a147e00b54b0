"""How ranks are laid out, and how a run leaves its process group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moedist.config import ConfigError
from moedist.mesh import Mesh, MeshConfig
from moedist.mesh.mesh import choose_device
from tests.ranks import Here


@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        ({"ep": 0}, "ep", "is not a number of ranks. Set it to 1 or more"),
        ({"timeout_s": 0.0}, "timeout_s", "is not a duration"),
        ({"save_timeout_s": -1.0}, "save_timeout_s", "positive number of seconds"),
    ],
)
def test_errors(config, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        MeshConfig(**config)
    assert caught.value.key == key and caught.value.value == config[key]


@pytest.mark.parametrize(
    ("ep", "world", "said"),
    [
        (
            3,
            4,
            "ep = 3 does not divide the 4 ranks launched. Set mesh.ep to 1, 2 or 4, or launch a multiple of 3 "
            "(launch.nproc x launch.nnodes).",
        ),
        (8, 2, "ep = 8 does not divide the 2 ranks launched. Set mesh.ep to 1 or 2, or launch a multiple of 8"),
        (2, 1, "ep = 2 does not divide the 1 ranks launched. Set mesh.ep to 1, or launch a multiple of 2"),
    ],
)
def test_world_that_does_not_fit(ep, world, said):
    with pytest.raises(ConfigError) as caught:
        MeshConfig(ep=ep).check_world(world)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("config", "world", "said"),
    [
        ({"ep": 2, "fsdp": 3}, 6, "fsdp = 3 is no multiple of mesh.ep = 2: .* Set mesh.fsdp to 2 or a multiple of it"),
        ({"fsdp": 0}, 4, "fsdp = 0 is no multiple of mesh.ep = 1"),
        ({"ep": 2, "fsdp": 8}, 4, "fsdp = 8 does not divide the 4 ranks launched. Set mesh.fsdp to 2 or 4 or to null"),
        ({"ep": 4, "fsdp": 12}, 4, "fsdp = 12 does not divide the 4 ranks launched. Set mesh.fsdp to 4 or to null"),
    ],
)
def test_pieces_that_do_not_fit(config, world, said):
    with pytest.raises(ConfigError, match=said) as caught:
        MeshConfig(**config).check_world(world)
    assert caught.value.key == "fsdp"


def axes_of(here: Here, ep: int, fsdp: int | None) -> dict[str, tuple[int, ...]]:
    mesh = here.mesh_of(ep, fsdp)
    return {axis.name: tuple(dist.get_process_group_ranks(axis.group)) for axis in mesh.axes()}


def test_lines_of_ranks(ranks):
    """Expert-parallel ranks are neighbours; a replica's pieces lie on neighbours too."""
    at = ranks(4).run(axes_of, 2, 2)
    assert at[1] == {"dp": (0, 1, 2, 3), "ep": (0, 1), "edp": (1, 3), "fsdp": (0, 1), "replicate": (1, 3)}
    at = ranks(4).run(axes_of, 2, 4)
    assert at[2] == {"dp": (0, 1, 2, 3), "ep": (2, 3), "edp": (0, 2), "fsdp": (0, 1, 2, 3), "replicate": (2,)}
    assert ranks(4).run(axes_of, 1, None)[3] == {"dp": (0, 1, 2, 3), "ep": (3,), "edp": (0, 1, 2, 3)}


def adopted(here: Here) -> tuple[int, ...]:
    """A mesh with an axis of its own in front, and one with ``edp`` in place of replicas and shards."""
    device = torch.device("cpu")
    theirs = init_device_mesh("cpu", (2, 1, 1, 2), mesh_dim_names=("pipeline", "replicate", "shard", "ep"))
    mesh = Mesh.of(theirs, device, fully_shard=True)
    plain = Mesh.of(init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep")), device)
    assert mesh.fsdp is not None and plain.fsdp is None
    return mesh.dp.size, mesh.fsdp.pieces.size, mesh.fsdp.copies.size, mesh.edp.size, plain.dp.size, plain.edp.size


def test_a_mesh_with_further_axes_is_adopted(ranks):
    assert ranks(4).run(adopted) == [(2, 2, 1, 1, 4, 2)] * 4


def test_worlds_that_fit():
    for ep, world in ((1, 1), (1, 3), (2, 4), (4, 4), (3, 12)):
        MeshConfig(ep=ep).check_world(world)


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1)
    assert choose_device("auto", 1, 4) == torch.device("cpu")
    assert choose_device("cuda", 3, 4) == torch.device("cuda", 3)
    assert choose_device("cpu", 0, 1) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0, 1) == torch.device("cpu")


# Rank 1 joins, then waits for its standard input to close and never calls; rank 0 calls and must not wait for ever.
PROGRAM = """
import sys, time
import torch
from moedist.mesh import MeshConfig, close_mesh, join_mesh
from moedist.mesh.collectives import all_sum
config = MeshConfig(ep=2, device="cpu", timeout_s=5.0)
try:
    mesh = join_mesh(config)
    print("total", int(all_sum(torch.tensor([mesh.dp.rank + 1]), mesh.dp)), flush=True)
    if mesh.ep.rank == 1:
        sys.stdin.read()
    else:
        start = time.monotonic()
        try:
            all_sum(torch.zeros(1), mesh.ep)
        except RuntimeError as error:
            print("gave up", 4.5 < time.monotonic() - start < 60, str(error)[:200].replace(chr(10), " "), flush=True)
finally:
    close_mesh()
print("left", flush=True)
"""


@pytest.mark.pitfall("37")
def test_a_missing_rank_ends_the_wait_and_the_exit_is_clean():
    """Pitfall 37: the time-out reaches the group of the expert-parallel axis too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        first, error = processes[0].communicate(timeout=120)
        second, other_error = processes[1].communicate("", timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert first.splitlines()[0] == "total 3" and second.splitlines()[0] == "total 3"
    assert "gave up True" in first and "imed out" in first, first
    assert first.splitlines()[-1] == second.splitlines()[-1] == "left"
    assert [process.returncode for process in processes] == [0, 0], error + other_error
