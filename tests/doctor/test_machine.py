from __future__ import annotations

import dataclasses
import errno
import os
import resource
import threading
from pathlib import Path

import pytest

from moedist.doctor import machine
from moedist.doctor.finding import ok, problem, warning, worst
from moedist.doctor.machine import Wanted

WANTED = Wanted(nproc=4, world_size=8, threads=2, device="cpu", folder=Path("/nowhere/runs"))
GIB = 2**30


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_worst_counts():
    good, bad, so_so = ok("a", ""), problem("b", "", "Do."), warning("c", "", "Do.")
    assert worst([]) == worst([good]) == "ok"
    assert worst([good, so_so]) == "warning" and worst([so_so, bad, good]) == "problem"


def test_threads_against_cores_and_quota(tmp_path: Path):
    assert machine.cpu_quota(tmp_path) is None and machine.numa_nodes(tmp_path) == 1
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert machine.cpu_quota(tmp_path) is None
    write(tmp_path, "sys/fs/cgroup/cpu.max", "250000 100000\n")
    assert machine.cpu_quota(tmp_path) == 2.5
    for node in ("node0", "node1", "possible"):
        write(tmp_path, f"sys/devices/system/node/{node}/cpulist", "")
    assert machine.numa_nodes(tmp_path) == 2
    assert machine.check_cores(WANTED, 8, None, 2) == ok("cores", "8 cores on 2 NUMA nodes; 4 ranks x 2 OMP threads")
    few = machine.check_cores(WANTED, 4, None, 1)
    assert few.level == "warning" and few.remedy == "Set launch.threads=1."
    quota = machine.check_cores(dataclasses.replace(WANTED, threads=1), 8, 2.5, 1)
    assert "time for 2.5 of them" in quota.text and quota.remedy == "Set launch.nproc=2."


def test_an_older_kernels_quota(tmp_path: Path):
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert machine.cpu_quota(tmp_path) is None
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n")
    assert machine.cpu_quota(tmp_path) == 3


def test_memory(tmp_path: Path):
    write(tmp_path, "meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    assert machine.check_memory(tmp_path / "meminfo", None) == ok("memory", "4.0 of 8.0 GiB available")
    assert machine.check_memory(tmp_path / "meminfo", 2 * GIB).text.endswith(", 2.0 GiB allowed")
    write(tmp_path, "meminfo", "MemTotal: 8388608 kB\nMemAvailable: 419430 kB\n")
    assert machine.check_memory(tmp_path / "meminfo", None).level == "warning"
    assert machine.check_memory(tmp_path / "none", None).level == "warning"
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    assert machine.memory_limit(tmp_path) is None
    write(tmp_path, "sys/fs/cgroup/memory.max", "1024\n")
    assert machine.memory_limit(tmp_path) == 1024


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"total": 64 * 2**20, "free": 60 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    container = machine.check_shared_memory(tmp_path, "cuda")
    assert container.level == "warning" and "--shm-size" in container.remedy and "0.06 of 0.06 GiB" in container.text
    usage.free = usage.total = 4 * GIB
    assert machine.check_shared_memory(tmp_path, "cuda").level == "ok"
    monkeypatch.undo()
    assert machine.check_shared_memory(tmp_path / "none", "cpu").level == "warning"
    assert machine.check_shared_memory(tmp_path / "none", "cuda").level == "problem"


def test_locked_memory_matters_to_infiniband(tmp_path: Path):
    assert machine.check_locked_memory(2**20, {}).level == "ok"
    write(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n")
    write(tmp_path, "sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN\n")
    ports = machine.infiniband_ports(tmp_path)
    assert ports == {"mlx5_0/1": "ACTIVE", "mlx5_1/1": "DOWN"}
    assert machine.check_locked_memory(2**20, ports).level == "problem"
    down = machine.check_locked_memory(resource.RLIM_INFINITY, ports)
    assert down.level == "warning" and "mlx5_1/1 is down" in down.remedy
    assert machine.check_locked_memory(resource.RLIM_INFINITY, {"mlx5_0/1": "ACTIVE"}).level == "ok"


def test_open_files():
    assert machine.check_open_files((1024, 4096), 8).level == "ok"
    few = machine.check_open_files((1024, 4096), 512)
    assert few.level == "warning" and few.remedy == "ulimit -n 4352"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert machine.nearest_folder(tmp_path / "a" / "b") == tmp_path
    found = machine.check_disk(tmp_path / "runs" / "first")
    assert found.text.startswith(f"{tmp_path}: ") and not list(tmp_path.iterdir()), "nothing is left or made"
    fast = machine.check_disk(tmp_path, lambda folder: 0.5)
    assert "writes 67 MB/s" in fast.text

    def full(folder: Path) -> float:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert machine.check_disk(tmp_path, full).text == f"{tmp_path}: No space left on device"
    monkeypatch.setattr(machine, "LIMIT_S", 0.01)
    never = threading.Event()
    hung = machine.check_disk(tmp_path, lambda folder: never.wait(60.0) and 1.0)
    never.set()
    assert hung.level == "problem" and "did not take 32 MiB within" in hung.text
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert machine.check_disk(tmp_path).level == "problem"


def test_interfaces_that_are_named():
    assert machine.check_interfaces({}.get, {"lo", "eth0"}) == ok("interfaces", "eth0, lo")
    told = {"NCCL_SOCKET_IFNAME": "^docker0,lo", "GLOO_SOCKET_IFNAME": "eth0"}
    assert machine.check_interfaces(told.get, {"lo", "eth0"}).level == "ok"
    gone = machine.check_interfaces({"GLOO_SOCKET_IFNAME": "ib0"}.get, {"lo", "eth0"})
    assert gone.level == "problem" and gone.text.endswith("GLOO_SOCKET_IFNAME=ib0: ib0 is not here")


def test_the_rendezvous_address(monkeypatch: pytest.MonkeyPatch):
    assert machine.check_rendezvous(None).level == "ok"
    assert machine.check_rendezvous("127.0.0.1:29400") == ok("rendezvous", "127.0.0.1:29400 is 127.0.0.1")
    assert machine.check_rendezvous("[::1]:29400").level == "ok"
    assert machine.check_rendezvous("8.8.8.8:29400").level == "warning"

    def unknown(*_: object, **__: object) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    lost = machine.check_rendezvous("node0:29400")
    assert lost.level == "problem" and "node0:29400 is not known here: Name or service not known" in lost.text


def test_wandb_says_whether_and_never_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    assert machine.check_wandb(None) == ok("wandb", "not among log.sinks")
    assert machine.check_wandb("offline") == ok("wandb", "offline")
    monkeypatch.setattr("moedist.log.sink.wandb.decide_mode", lambda mode: ("online", ""))
    assert machine.check_wandb("auto") == ok("wandb", "online: logged in")
    monkeypatch.setattr("moedist.log.sink.wandb.decide_mode", lambda mode: ("offline", "no API key"))
    assert machine.check_wandb("auto").level == "warning"


def test_everything_at_once(tmp_path: Path):
    found = machine.examine_machine(dataclasses.replace(WANTED, folder=tmp_path))
    assert [finding.check for finding in found] == [
        "versions", "cores", "memory", "shared memory", "locked memory", "open files", "disk", "interfaces",
        "rendezvous", "wandb",
    ]  # fmt: skip
    assert all((finding.remedy == "") == (finding.level == "ok") for finding in found)
