"""What this machine offers a run, and what of it will not do.

Each check reads one thing and judges it; nothing is changed, and nothing is waited for longer than `LIMIT_S`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import ipaddress
import os
import platform
import resource
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moedist.doctor.finding import Finding, ok, problem, warning

LIMIT_S = 10.0
"""Seconds that a disk, a server or a driver's tool gets to answer."""
PACKAGES = ("numpy", "hydra-core", "pydantic", "wandb", "deepspeed")
GIB = 2**30
SHARED_MEMORY = GIB
"""Bytes that NCCL's and the data loader's buffers on one machine can be expected to need."""
FREE_DISK = 10 * GIB
PROBE_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run asks of this machine.

    Attributes:
        nproc: ranks on it.
        world_size: all ranks.
        threads: OMP threads of each.
        device: ``cpu`` or ``cuda``: what the ranks will compute on.
        folder: where the run writes; need not exist.
        rendezvous: host:port where several nodes meet; None for one node.
        wandb: ``mode`` of its W&B sink; None where it has none.
    """

    nproc: int
    world_size: int
    threads: int
    device: str
    folder: Path
    rendezvous: str | None = None
    wandb: str | None = None


def examine_machine(wanted: Wanted) -> list[Finding]:
    """All checks of this machine but those of its GPUs (`moedist.doctor.gpus`), in the order they are shown."""
    system = Path("/")
    return [
        check_versions(),
        check_cores(wanted, visible_cores(), cpu_quota(system), numa_nodes(system)),
        check_memory(system / "proc/meminfo", memory_limit(system)),
        check_shared_memory(system / "dev/shm", wanted.device),
        check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], infiniband_ports(system)),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE), wanted.world_size),
        check_disk(wanted.folder),
        check_interfaces(os.environ.get, {name for _, name in socket.if_nameindex()}),
        check_rendezvous(wanted.rendezvous),
        check_wandb(wanted.wandb),
    ]


def check_versions() -> Finding:
    """Of Python, torch and the packages that matter to a bug report."""
    import torch

    import moedist

    found = [f"moedist {moedist.__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ok("versions", f"{', '.join(found)}; {platform.system()} {platform.release()} {platform.machine()}")


def visible_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that the control group grants; None for all."""
    for quota, period in (
        (root / "sys/fs/cgroup/cpu.max", None),
        (root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", root / "sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            words = quota.read_text().split() + ([] if period is None else period.read_text().split())
            if words[0] not in ("max", "-1"):
                return int(words[0]) / int(words[1])
    return None


def numa_nodes(root: Path) -> int:
    """Memory nodes of the machine; 1 where the kernel does not say."""
    return len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) or 1


def check_cores(wanted: Wanted, cores: int, quota: float | None, numa: int) -> Finding:
    """Threads of all ranks against the cores that they get: above them, every step waits for the scheduler."""
    usable = min(cores, quota or cores)
    text = f"{cores} cores on {numa} NUMA node{'s' * (numa > 1)}"
    if quota is not None and quota < cores:
        text += f", time for {quota:g} of them"
    text += f"; {wanted.nproc} ranks x {wanted.threads} OMP threads"
    if wanted.nproc * wanted.threads > usable:
        fitting = max(1, int(usable) // wanted.nproc)
        what = f"launch.threads={fitting}" if wanted.nproc <= usable else f"launch.nproc={max(1, int(usable))}"
        return warning("cores", f"{text}: more threads than cores", f"Set {what}.")
    return ok("cores", text)


def memory_limit(root: Path) -> int | None:
    """Bytes that the control group allows; None for all."""
    for path in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int((root / path).read_text())
    return None


def check_memory(meminfo: Path, limit: int | None) -> Finding:
    """Host memory: weights are built and checkpoints gathered there."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return warning("memory", "the kernel does not say how much there is", "See that /proc is mounted.")
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if limit is not None and limit < total:
        text += f", {limit / GIB:.1f} GiB allowed"
    if available < total / 10:
        return warning("memory", text, "End what fills it: a rank that finds none is killed by the kernel.")
    return ok("memory", text)


def check_shared_memory(folder: Path, device: str) -> Finding:
    """/dev/shm: what ranks of one machine share. A container gets 64 MiB of it unless told otherwise."""
    remedy = "Start the container with --shm-size=8g or --ipc=host, or mount a larger tmpfs there."
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        judge = problem if device == "cuda" else warning
        return judge("shared memory", f"{folder} is not there", remedy)
    text = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return problem("shared memory", f"{folder} cannot be written", f"Make {folder} writable for this user.")
    return warning("shared memory", text, remedy) if usage.free < SHARED_MEMORY else ok("shared memory", text)


def infiniband_ports(root: Path) -> dict[str, str]:
    """State of every InfiniBand or RoCE port (``mlx5_0/1``: ``ACTIVE``)."""
    ports = {}
    for state in sorted((root / "sys/class/infiniband").glob("*/ports/*/state")):
        with contextlib.suppress(OSError):
            ports[f"{state.parts[-4]}/{state.parts[-2]}"] = state.read_text().partition(":")[2].strip()
    return ports


def check_locked_memory(limit: int, ports: dict[str, str]) -> Finding:
    """RDMA registers locked memory; without such a network the limit does not matter."""
    text = "unlimited" if limit == resource.RLIM_INFINITY else f"up to {limit / 2**20:.1f} MiB"
    if not ports:
        return ok("locked memory", f"{text}; no InfiniBand here")
    down = [name for name, state in ports.items() if state != "ACTIVE"]
    text += f"; InfiniBand ports {', '.join(f'{name} {state}' for name, state in ports.items())}"
    if limit != resource.RLIM_INFINITY:
        return problem("locked memory", text, "Raise it: ulimit -l unlimited, or --ulimit memlock=-1 of the container.")
    if down:
        return warning("locked memory", text, f"See why {', '.join(down)} is down, or leave it out by NCCL_IB_HCA.")
    return ok("locked memory", text)


def check_open_files(limits: tuple[int, int], world_size: int) -> Finding:
    """A rank holds a connection to every other, in every process group, beside its files."""
    soft, hard = limits
    needed = 256 + 8 * world_size
    text = f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} per process"
    if soft != resource.RLIM_INFINITY and soft < needed:
        return warning("open files", f"{text}, and {world_size} ranks may need {needed}", f"ulimit -n {needed}")
    return ok("open files", text)


def check_disk(folder: Path, probe: Callable[[Path], float] | None = None) -> Finding:
    """Whether the run can write, how fast, and how much room is left."""
    place = nearest_folder(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        return problem("disk", f"{place} cannot be written", "Set run.dir to a folder that this user may write.")
    try:
        seconds = within(LIMIT_S, lambda: (probe or write_speed)(place))
        free = shutil.disk_usage(place).free
    except OSError as error:
        return problem("disk", f"{place}: {error.strerror or error}", "Make room or mend the disk, or set run.dir.")
    if seconds is None:
        text = f"{place} did not take {PROBE_BYTES / 2**20:.0f} MiB within {LIMIT_S:.0f} s"
        return problem("disk", text, "See whether the file system answers, or set run.dir to another one.")
    text = f"{place}: {free / GIB:.1f} GiB free, writes {PROBE_BYTES / seconds / 1e6:.0f} MB/s"
    if free < FREE_DISK:
        return warning("disk", text, "Make room, set run.dir, or keep fewer checkpoints (checkpoint.keep).")
    return ok("disk", text)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def write_speed(folder: Path) -> float:
    """Seconds that it takes to bring `PROBE_BYTES` to the disk; the file is gone afterwards."""
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        file.write(os.urandom(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - begin


def within(limit_s: float, work: Callable[[], float]) -> float | None:
    """What ``work`` returns or raises; None where it takes longer than ``limit_s``, and then it is left to itself."""
    results: list[float] = []
    errors: list[OSError] = []

    def run() -> None:
        try:
            results.append(work())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    return results[0] if results else None


def check_interfaces(variable: Callable[[str], str | None], interfaces: set[str]) -> Finding:
    """The network interfaces that the collectives are told to use."""
    told = {name: value for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if (value := variable(name))}
    # Behind ^ stand those that NCCL shall not use, which need not be here.
    names = [word.lstrip("=") for value in told.values() if value[0] != "^" for word in value.split(",")]
    missing = [name for name in names if not any(interface.startswith(name) for interface in interfaces)]
    text = ", ".join(sorted(interfaces)) + "".join(f"; {name}={value}" for name, value in told.items())
    if missing:
        return problem("interfaces", f"{text}: {', '.join(missing)} is not here", "Name interfaces of this machine.")
    return ok("interfaces", text)


def check_rendezvous(rendezvous: str | None) -> Finding:
    """Where several nodes meet: its name must be known here, and its address nobody else's to reach."""
    if rendezvous is None:
        return ok("rendezvous", "loopback: one node")
    host, _, port = rendezvous.rpartition(":")
    host = host.strip("[]")
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "Set launch.rendezvous to an address of the first node, or mend name look-up."
        return problem("rendezvous", f"{rendezvous} is not known here: {reason}", remedy)
    text = f"{rendezvous} is {', '.join(addresses)}"
    if public := [address for address in addresses if is_public(address)]:
        return warning(
            "rendezvous",
            f"{text}: {', '.join(public)} can be reached from anywhere",
            "Use an address of a private network, or a firewall: torch's stores and collectives ask for no password.",
        )
    return ok("rendezvous", text)


def is_public(address: str) -> bool:
    """Whether an address belongs to the whole internet.

    >>> is_public("10.0.0.1"), is_public("fe80::1%eth0"), is_public("8.8.8.8")
    (False, False, True)
    """
    return ipaddress.ip_address(address).is_global


def check_wandb(mode: str | None) -> Finding:
    """Where metrics would go; whether there is a key is looked up, the key is never read out."""
    if mode is None:
        return ok("wandb", "not among log.sinks")
    from moedist.log.sink.wandb import decide_mode

    decided, reason = decide_mode(mode)
    text = f"{decided}{f' ({reason})' if reason else ''}"
    if decided == "offline" and mode != "offline" and reason != "WANDB_MODE":
        return warning("wandb", text, "Runs upload later by wandb sync; wandb login or WANDB_API_KEY logs in.")
    return ok("wandb", f"{text}: logged in" if decided == "online" else text)
