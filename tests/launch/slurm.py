"""A SLURM cluster on this machine: one controller, two nodes that share the address 127.0.0.1, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
START_S = 60.0
"""Seconds that a daemon may take to answer on busy cores."""


def why_not() -> str | None:
    """Why there can be none here."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs {', '.join(missing)} (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "needs root to start SLURM's daemons"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Slurm:
    """The cluster; all its files lie in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def make(self) -> None:
        control, first, second = free_ports(3)
        host = socket.gethostname()
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "slurm.conf").write_text(f"""
ClusterName=moedist
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket
CryptoType=crypto/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool_%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd_%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd_%n.log
KillWait=30
NodeName=sn1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=2000
NodeName=sn2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=2000
PartitionName=all Nodes=sn1,sn2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
""")
        (self.folder / "state").mkdir()
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self._until(lambda: (munge / "socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in ("sn1", "sn2"):
            self._start("slurmd", "-D", "-N", node)
        self._until(lambda: self.ask("sinfo", "--noheader", "--format=%A").startswith("0/2"), "idle nodes")

    def ask(self, *command: str) -> str:
        """What a command of SLURM says; empty where it fails."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def remove(self) -> None:
        self.ask("scancel", "--full", "--signal=KILL", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as log:
            path = shutil.which(command[0], path=PATH)
            assert path is not None
            self._daemons.append(
                subprocess.Popen(
                    [path, *command[1:]], env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            )

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            said = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out")]
            said += [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")]
            assert time.monotonic() < deadline, f"no {what}: {said}"
            time.sleep(0.1)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster that is gone afterwards, whatever happened."""
    made = Slurm(folder)
    try:
        made.make()
        yield made
    finally:
        made.remove()
