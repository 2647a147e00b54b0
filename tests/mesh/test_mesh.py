"""How ranks are laid out, and how a run leaves its process group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from moedist.config import ConfigError
from moedist.mesh import MeshConfig
from moedist.mesh.mesh import choose_device


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
config = MeshConfig(ep=2, device="cpu", timeout_s=2.0)
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
            print("gave up", 1.5 < time.monotonic() - start < 30, str(error)[:200].replace(chr(10), " "), flush=True)
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
